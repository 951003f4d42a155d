"""What the settings of all sections are held to."""

from __future__ import annotations

from datetime import datetime
from numbers import Real
from typing import Any, Literal, get_args, get_origin, get_type_hints


def words(section: str, settings: Any) -> None:
    """Raises ValueError, with the setting's full name, for a word that is none of a setting's choices."""
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            full = f"{section}.{name}" if section else name
            raise ValueError(f"{full}: wanted one of {', '.join(get_args(hint))}, got {value!r}")


def positive(section: str, **values: float) -> None:
    """Raises ValueError, with the setting's full name, for a value that is not above 0."""
    for name, value in values.items():
        if not (isinstance(value, Real) and value > 0):
            raise ValueError(f"{section}.{name}: wanted a number above 0, got {value!r}")


def not_negative(section: str, **values: float) -> None:
    """Raises ValueError, with the setting's full name, for a value that is not 0 or more."""
    for name, value in values.items():
        if not (isinstance(value, Real) and value >= 0):
            raise ValueError(f"{section}.{name}: wanted 0 or more, got {value!r}")


def named(section: str, **values: tuple[str, ...]) -> None:
    """Raises ValueError, with the setting's full name, for a list of names that is empty or has an empty one."""
    for name, value in values.items():
        if not all(value) or not value:
            raise ValueError(f"{section}.{name}: wanted one name or more, got {list(value)}")


def moment(section: str, **values: str) -> None:
    """Raises ValueError, with the setting's full name, for what is neither empty nor a moment in ISO 8601."""
    for name, value in values.items():
        try:
            datetime.fromisoformat(value or "2000-01-01")
        except ValueError:
            wanted = "wanted a day as 2026-01-31, or a moment as 2026-01-31T18:30:00"
            raise ValueError(f"{section}.{name}: {wanted}, got {value!r}") from None


def of_kind(section: str, kind: str, **given: tuple[str, ...]) -> None:
    """Raises ValueError, with the setting's full name, for a value that the section's kind has no use for.

    Args:
        given: (value, the kinds that read it …) by name; an empty value is none.
    """
    for name, (value, *kinds) in given.items():
        if value and kind not in kinds:
            have = f"{' and '.join(kinds)} {'has' if len(kinds) == 1 else 'have'}"
            told = f"{section}.kind {kind} has no use for it, {have}"
            raise ValueError(f"{section}.{name}: {told}; got {value!r}")
