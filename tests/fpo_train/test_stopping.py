"""Signals: the first lets the iteration finish, where there is one; a second does not wait."""

import os
import signal

import pytest

from fpo_train.running.stopping import listening


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(number, capfd):
    former = signal.getsignal(number)
    with listening() as request, request.finishing():
        os.kill(os.getpid(), number)
        assert request.made
        assert "stopping once this iteration is done; the same again stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is former


def test_where_there_is_nothing_to_finish_the_first_ends_it():
    with listening() as request:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with request.finishing():
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not request.made
