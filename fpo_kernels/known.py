"""What a pass's taps are made from: the plan of a model's sites, and what earlier passes saw of its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import Coverage, Lookup, Site
from .uses import Reads


class Manner(NamedTuple):
    """How a pass calls a module: how often, and whether ever without the batch in front."""

    module: nn.Module
    times: int
    odd: bool


class Known:
    """What earlier passes saw of the modules, and what need not be looked at again.

    Attributes:
        checked: modules that return what their rules suppose.
        separable: of those, how they were called when they were seen to keep two or more examples apart.
        lookups: what an embedding does with the rows it looks up.
        slow: modules whose gradient did not come where it was only noted; they have full taps.
        remade: modules whose input was seen to come out the same when it is multiplied again (`remake`).
    """

    def __init__(self) -> None:
        self.checked: set[nn.Module] = set()
        self.separable: set[Manner] = set()
        self.lookups: dict[nn.Module, Lookup] = {}
        self.remade: set[nn.Module] = set()
        self.slow: set[nn.Module] = set()
        self._rates: dict[nn.Module, tuple[int, int]] = {}  # how often its parameters were asked for, in so many calls

    def expect(self, reads: Mapping[nn.Module, Reads], calls: Mapping[nn.Module, int]) -> None:
        """A forward that was looked at: what it asked for belongs to so many calls."""
        self._rates.update((module, (own.count, calls[module])) for module, own in reads.items() if calls[module])

    def expects(self, reads: Mapping[nn.Module, Reads], calls: Mapping[nn.Module, int]) -> bool:
        """Whether every module was asked for its parameters as often a call as before: another use is one more."""
        rates = self._rates
        for module, own in reads.items():
            count, of = rates.get(module, (0, 1))
            if own.count * of != count * calls[module]:
                return False
        return True

    def is_plain(self, module: nn.Module) -> bool:
        """Whether a call needs no look but at its shape: what it returns is known, and it looks nothing up."""
        return module in self.checked and module not in self.slow and not isinstance(module, nn.Embedding)


class Quick(NamedTuple):
    """What is asked of a module whose calls need no look but at their shape."""

    reads: bool  # whether a rule reads the input
    remade: bool  # whether the input was seen to come out the same when it is made again


class Current:
    """The pass that stand-ins note calls for: they are made once for all passes of a plan.

    Attributes:
        arrivals: its noted calls. otherwise: what takes on a call that is none to note.
    """

    __slots__ = ("arrivals", "otherwise")

    def __init__(self) -> None:
        self.arrivals: Any = None
        self.otherwise: Any = None


class Stand(NamedTuple):
    """A stand-in, of a module of which so much was known, for the forward that was its own, apart from its class's."""

    quick: Quick
    before: Any
    forward: Callable[..., Any]


class Plan:
    """What all passes over the same sites share: worked out once.

    Attributes:
        sites: the parameters that taps serve.
        names: module → the chosen parameters it serves. own: module → their attributes and parameters.
        reading: modules a rule of which reads the input.
        modules: all of the model's. parameters: theirs. quantised: those with a packed 4-bit weight.
        device: the first parameter's.
        quick: modules whose calls need no look, by `quicken`. stands: their stand-ins, for the pass that is `current`.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.names: dict[nn.Module, list[str]] = {}
        self.own: dict[nn.Module, list[tuple[str, Tensor]]] = {}
        self.reading: set[nn.Module] = set()
        for site in sites:
            for module, rule in site.rules.items():
                self.names.setdefault(module, []).append(site.name)
                self.own.setdefault(module, []).append((rule.attribute, site.parameter))
                if rule.reads_input:
                    self.reading.add(module)
        self.quick: dict[nn.Module, Quick] = {}
        self.stands: dict[nn.Module, Stand] = {}
        self.current = Current()
        self.modules = list(model.modules())
        self.parameters = list(dict.fromkeys(p for m in self.modules for p in m._parameters.values() if p is not None))
        # of a parametrised weight, asking for it would already be a step (spectral norm's)
        weights = ((module, module._parameters.get("weight")) for module in self.modules)
        self.quantised = [m for m, weight in weights if getattr(weight, "quant_state", None) is not None]
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")

    def quicken(self, known: Known) -> None:
        """Take up what passes have seen of the modules."""
        self.quick = {
            module: Quick(module in self.reading, module in known.remade)
            for module in self.names
            if known.is_plain(module)
        }


def coverage(
    chosen: Mapping[str, nn.Parameter],
    sites: Sequence[Site],
    refused: Mapping[str, str],
    unused: Set[str],
    without: str | None,
) -> list[Coverage]:
    """One row a chosen parameter, in the model's order; `without` is the rule of those that are refused."""
    rules = {site.name: next(iter(site.rules.values())).name for site in sites}
    shared = {site.name for site in sites if len(site.rules) > 1}
    rows = []
    for name, parameter in chosen.items():
        rule, reason = rules.get(name), refused.get(name, "")
        if name in refused:
            rule = without
        elif name in unused:
            reason = "not used by the model's forward so far: its gradient is zero"
        elif name in shared:
            reason = "shared by several modules, counted once"
        rows.append(Coverage(name, tuple(parameter.shape), rule, reason))
    return rows
