"""What a user can mend: the command line prints such an error as its one sentence, without a traceback."""


class RunError(Exception):
    """A run cannot start or go on; the message says what was given and what is wanted."""
