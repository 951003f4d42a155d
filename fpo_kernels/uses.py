"""Which of a model's chosen parameters are used where no tap sees it: a count of torch's functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.overrides import TorchFunctionMode

from .layers import Site


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, those in lists and tuples (torch.cat's, chunk's) one by one."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


# What takes a parameter's dtype, device or shape, or leaves the tape: no use of its values for a gradient.
_PLAIN = (type(None), Tensor, nn.Parameter)
_NEUTRAL = re.compile(r"detach|data|(zeros|ones|empty|full|rand|randn|randint)_like|new_\w+|to|type_as")


class Reads(dict[str, Any]):
    """A module's parameters, counting how often one is asked for: what a pass costs that needs no `Uses`.

    Attributes:
        own: the module's dictionary, for which this stands.
        count: how often a parameter was asked for.
        changed: another was put in a parameter's place, or one was taken out.
    """

    __slots__ = ("changed", "count", "own")

    def __init__(self, own: dict[str, Any]) -> None:
        super().__init__(own)
        self.own = own
        self.count = 0
        self.changed = False

    def __getitem__(self, name: str, _get: Any = dict.__getitem__) -> Any:
        self.count += 1
        return _get(self, name)


def _remembered(change: Any) -> Any:
    """A dictionary's method, remembering that it was called."""

    def changing(self: Reads, *args: Any, **kwargs: Any) -> Any:
        self.changed = True
        return change(self, *args, **kwargs)

    return changing


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(Reads, _name, _remembered(getattr(dict, _name)))


class Uses(TorchFunctionMode):
    """Counts the torch functions that turn a parameter into a tensor: a module's own call is one."""

    def __init__(self, sites: Iterable[Site]) -> None:
        super().__init__()
        self._names = {id(site.parameter): site.name for site in sites}
        self._paused = False
        self.count: dict[str, int] = {}

    @contextmanager
    def paused(self, module: nn.Module | None = None) -> Iterator[None]:
        """Without counting: what a tap looks up for itself is no use of the model's.

        Of a `module` whose parameters are plain tensors functions do not come by here at all meanwhile.
        """
        before, self._paused = self._paused, True
        plain = module is not None and all(type(p) in _PLAIN for p in module._parameters.values())
        try:
            with torch._C.DisableTorchFunction() if plain else nullcontext():
                yield
        finally:
            self._paused = before

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if self._paused or not self._given(args, kwargs):
            return out
        # under no_grad a value is used, and its gradient is not
        if not is_grad_enabled() or not any(isinstance(x, Tensor) and x.is_floating_point() for x in _flat([out])):
            return out  # sizes, dtypes, devices and comparisons are no use of its values
        given = list(_flat([*args, *(kwargs or {}).values()]))
        attribute = getattr(function, "__self__", None)  # of a property's __get__, which all share a name
        if _NEUTRAL.fullmatch(getattr(attribute or function, "__name__", "")):
            casts = function in (Tensor.to, Tensor.type_as)  # of the parameter itself they are a use
            given = given[:1] if casts else []
        # a cast to the dtype that it has gives the parameter itself (Gemma's norms in fp32)
        given = [x for x in given if x is not out]
        for name in {self._names[id(x)] for x in given if id(x) in self._names}:
            self.count[name] = self.count.get(name, 0) + 1
        return out

    def _given(self, args: Any, kwargs: Any) -> bool:
        """Whether a parameter is among the arguments: asked of every function of a forward pass, so it is quick."""
        names = self._names
        for x in (*args, *kwargs.values()) if kwargs else args:
            if id(x) in names or (type(x) in (list, tuple) and any(id(one) in names for one in x)):
                return True
        return False

    def outside(self, calls: Mapping[nn.Module, int], sites: Iterable[Site]) -> dict[str, str]:
        """Name → reason of parameters that are also used outside their modules' calls, where no tap sees them."""
        return {
            site.name: "used outside its module's call (functionally, or by another method)"
            for site in sites
            if self.count.get(site.name, 0) > sum(calls.get(module, 0) for module in site.rules)
        }
