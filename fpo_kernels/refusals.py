"""What a pass finds out that keeps a parameter, or a model, from being served."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class UnservedError(Exception):
    """What a pass found out about chosen parameters that the modules' kinds did not tell: name → reason."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        self.reasons = dict(reasons)


def refuse(reasons: Mapping[str, str]) -> None:
    """Raises ValueError where there are parameters, name → reason, that cannot be told apart by example."""
    if not reasons:
        return
    named: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        named.setdefault(reason, []).append(name)
    told = "; ".join(f"{_some(names)}: {reason}" for reason, names in named.items())
    raise ValueError(
        f"parameters whose gradients cannot be told apart by example were chosen ({told}); leave them out "
        'through `parameters`, or compute them by one backward an example with fallback="per_example"'
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


class UnexpectedError(Exception):
    """A forward asked for parameters more or less often than those before: it has to be looked at anew."""


class UnusableError(RuntimeError):
    """A model through which no gradient can come as it stands, whoever asks; the message says what to do."""


def named(names: Mapping[nn.Module, list[str]], modules: set[nn.Module], reason: str) -> dict[str, str]:
    """The same reason for all parameters, module → names, that modules serve."""
    return {name: reason for module in modules for name in names[module]}
