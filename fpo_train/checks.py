"""What the settings of all sections are held to."""

from __future__ import annotations


def positive(section: str, **values: float) -> None:
    """Raises ValueError, with the setting's full name, for a value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{section}.{name}: wanted a number above 0, got {value}")


def not_negative(section: str, **values: float) -> None:
    """Raises ValueError, with the setting's full name, for a value that is not 0 or more."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{section}.{name}: wanted 0 or more, got {value}")
