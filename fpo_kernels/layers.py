"""What a module's per-example gradient is made of, and which parameters can be told apart by example.

A rule turns one call of a module, its input and the gradient of its output, into a stream of one parameter's
per-example gradients. Parameters without a rule are named, with the reason.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .gradients import Factors, Packing, Rows, Scaled, Stream, Vectors

Parameters = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
HEAD_NAMES = frozenset({"score", "classifier", "classification_head", "v_head", "value_head", "reward_head"})
SOME = 4  # rows
# Batch statistics let examples meet, and groups of channels are scaled through a shape of their own.
_OTHER_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms
    nn.GroupNorm,
)


class Call(Protocol):
    """One use of a module, example by example: B examples of R rows each."""

    @property
    def a(self) -> Tensor:
        """(B, R, p) the module's input, or (B, R) ids."""

    @property
    def d(self) -> Tensor:
        """(B, R, q) the gradient of its output."""

    def inputs(self, dtype: torch.dtype | None) -> Tensor:
        """(S, p) or (S,) the input without padding, in a dtype; the same tensor for all that read it."""

    def gradients(self) -> tuple[Tensor, Packing]:
        """(S, q) the gradient without padding."""


def _none(module: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class Rule:
    """How one parameter of a kind of module is served.

    Attributes:
        name: as `coverage()` shows it.
        attribute: what the module calls the parameter.
        stream: (module, call) → the parameter's per-example gradients.
        reads_input: whether `stream` looks at the module's input.
        objection: why a module cannot be served; "" where it can.
    """

    name: str
    attribute: str
    stream: Callable[[nn.Module, Call], Stream]
    reads_input: bool = True
    objection: Callable[[nn.Module], str] = _none


class Coverage(NamedTuple):
    """How one chosen parameter is served: `rule` names the way, or is None and `reason` says why not.

    Under `fallback="per_example"` the rule of a parameter without one is "per_example", its reason stays.
    """

    parameter: str
    shape: tuple[int, ...]
    rule: str | None
    reason: str


@dataclass(frozen=True, eq=False)
class Site:
    """A chosen parameter, the modules that use it, and each one's rule."""

    name: str
    parameter: nn.Parameter
    rules: dict[nn.Module, Rule]


def _outer(module: nn.Module, call: Call) -> Factors:
    d, packing = call.gradients()
    # under autocast the module multiplied its input in the dtype of its output
    return Factors(call.inputs(d.dtype), d, packing)


def _outer_transposed(module: nn.Module, call: Call) -> Factors:
    d, packing = call.gradients()
    return Factors(call.inputs(d.dtype), d, packing, transposed=True)


def _sum(module: nn.Module, call: Call) -> Vectors:
    return Vectors(call.d.sum(1, dtype=_at_least_fp32(call.d)))


def _lookup(module: nn.Module, call: Call) -> Rows:
    d, packing = call.gradients()
    ids = call.inputs(None).flatten()
    weight = module.weight
    assert isinstance(weight, Tensor)
    return Rows(ids, d, packing, len(weight))


def _scale(module: nn.Module, call: Call) -> Vectors:
    return Scaled(call.d, call.a, functools.partial(normalised, module), _kind(module))


def _kind(module: nn.Module) -> object:
    """Equal for norms that normalise alike: of one class, with the same numbers set; None where that is not sure."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    plain = all(isinstance(value, (bool, int, float, str, tuple, type(None))) for value in own.values())
    changed = "forward" in own or module._buffers
    return (type(module), tuple(sorted(own.items(), key=str))) if plain and not changed else None


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """x̂, what the module's weight multiplies: what it returns with weight 1 less what it returns with 0.

    This is the model's own arithmetic (LlamaRMSNorm normalises in fp32 even in a float64 model) and also
    right where the weight counts from one, x̂·(1 + w).
    """
    return _with_parameters(module, x, weight=1.0, bias=0.0) - _with_parameters(module, x, weight=0.0, bias=0.0)


def returns_what_it_should(module: nn.Module, a: Tensor, output: Tensor) -> bool:
    """Whether the output is what the rules suppose the module makes of its input, to a few roundings.

    It is not where a forward was replaced, takes more than its input, or does more than its class says. Four rows
    tell, one of the first example among them: all of them would cost as much as the forward.
    """
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    assert isinstance(weight, Tensor)
    if output.shape[:-1] != a.shape[:-1]:
        return False
    a, output = some_rows(a), some_rows(output)
    if is_linear(module):
        made = nn.functional.linear(a, weight, bias)
    elif is_conv1d(module):
        made = nn.functional.linear(a, weight.T, bias)
    else:
        if a.shape[-1:] != weight.shape or output.shape != a.shape:
            return False
        made = _with_parameters(module, a, weight=0.0, bias=0.0) + normalised(module, a) * weight
        made = made if bias is None else made + bias
    # many norms compute in fp32 even in a float64 model
    eps = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
    if made.shape != output.shape:
        return False
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float64)
    return not bool(norm(made - output) > 16 * eps * norm(output))


def some_rows(x: Tensor) -> Tensor:
    """(…, p) → (1, …, SOME, p): some rows, evenly spaced from the first; x itself where it has no more."""
    shape = x.shape
    count = math.prod(shape[:-1])
    if count <= SOME:
        return x
    step = count // SOME
    return x.reshape(count, shape[-1])[: SOME * step : step].view(*[1] * (len(shape) - 2), SOME, shape[-1])


def _with_parameters(module: nn.Module, x: Tensor, **constants: float) -> Tensor:
    """What the module's forward returns with each parameter set to a constant; the module itself is not touched."""
    twin = copy.copy(module)
    own = dict(module.named_parameters(recurse=False))
    twin.__dict__["_parameters"] = {
        name: torch.full_like(own[name], constants[name]) if name in own else None for name in module._parameters
    }
    out: Tensor = type(module).forward(twin, x)
    return out


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A module's input, the first parameter of its forward, passed by place or by name.

    Raises:
        ValueError: it comes with other arguments, which the rules know nothing of (an embedding's are its own).
    """
    if args:
        given, rest = args[0], [*args[1:], *kwargs.values()]
    else:
        name = _first_name(type(module).forward)
        given, rest = kwargs[name], [value for key, value in kwargs.items() if key != name]
    if not isinstance(module, nn.Embedding) and any(value is not None for value in rest):
        raise ValueError(f"{type(module).__name__} is called with more than its input")
    return given


@functools.cache
def _first_name(forward: Callable[..., Any]) -> str:
    return list(inspect.signature(forward).parameters)[1]


@dataclass(frozen=True)
class Lookup:
    """What becomes of the rows that an embedding looks up: output = scale · weight[ids], and one row never learns."""

    scale: float = 1.0
    padding: int | None = None

    def gradient(self, ids: Tensor | None, d: Tensor) -> Tensor:
        """d (B, …, h) as it arrives at the rows; of other modules, whose look-up is `Lookup()`, d itself."""
        d = d if self.scale == 1 else d * self.scale
        return d if self.padding is None or ids is None else d.masked_fill((ids == self.padding)[..., None], 0)


def looked_up(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, known: Lookup | None
) -> tuple[Tensor, Lookup]:
    """An embedding's ids and what becomes of its rows, also of classes that look them up themselves.

    With that known from an earlier call, the output is not compared again.

    Raises:
        ValueError: the output is something else, or made with an option that no rule follows.
    """
    if type(module).forward is nn.Embedding.forward and "forward" not in vars(module):
        return input_of(module, args, kwargs), Lookup(padding=getattr(module, "padding_idx", None))
    with _Lookups(module) as seen:
        module.forward(*args, **kwargs)
    if len(seen.ids) == 1:
        if known is not None:
            return seen.ids[0], known
        for factor in dict.fromkeys((1.0, float(getattr(module, "embed_scale", 1.0)))):
            plain = seen.values[0]
            if plain.shape == output.shape and torch.equal(plain * torch.tensor(factor, dtype=plain.dtype), output):
                return seen.ids[0], Lookup(factor, seen.padding)
    raise ValueError(f"{type(module).__name__} does more than look rows up")


class _Lookups(TorchFunctionMode):
    """Records what is looked up in a module's weight, and which row is said not to learn."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.weight: Any = module.weight
        self.ids: list[Tensor] = []
        self.values: list[Tensor] = []
        self.padding: int | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is nn.functional.embedding:
            given = inspect.signature(nn.functional.embedding).bind(*args, **(kwargs or {})).arguments
            if given["weight"] is self.weight:
                if given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
                    raise ValueError("it looks rows up with max_norm or scale_grad_by_freq")
                self.ids.append(given["input"])
                self.values.append(out)
                padding = given.get("padding_idx")
                self.padding = padding + len(self.weight) if padding is not None and padding < 0 else padding
        return out


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _embedding_objection(module: nn.Module) -> str:
    if getattr(module, "max_norm", None) is not None:
        return "an Embedding with max_norm rewrites its weight as it reads it"
    if getattr(module, "scale_grad_by_freq", False):
        return "an Embedding with scale_grad_by_freq divides gradients by counts over the whole batch"
    return ""


def rules_of(module: nn.Module) -> dict[str, Rule]:
    """Attribute → rule of the parameters that a module of this kind owns; {} for kinds without rules."""
    bias = Rule("bias", "bias", _sum, reads_input=False)
    if is_linear(module):
        rules = [Rule("linear weight", "weight", _outer), bias]
    elif is_conv1d(module):
        rules = [Rule("conv1d weight", "weight", _outer_transposed), bias]
    elif isinstance(module, nn.Embedding):
        rules = [Rule("embedding", "weight", _lookup, objection=_embedding_objection)]
    elif is_norm(module):
        rules = [Rule("norm weight", "weight", _scale), bias]
    else:
        rules = []
    return {rule.attribute: rule for rule in rules}


def is_linear(module: nn.Module) -> bool:
    """Linear, and classes that change nothing about its forward."""
    return type(module).forward is nn.Linear.forward


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is (p, q)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and their likes: x̂ scaled by one vector, over the last dimension."""
    own = dict(module.named_parameters(recurse=False))
    return (
        "Norm" in type(module).__name__
        and not isinstance(module, _OTHER_NORMS)
        and "weight" in own
        and own.keys() <= {"weight", "bias"}
        and all(parameter.ndim == 1 for parameter in own.values())
        and not any(module.children())
    )


def choose(model: nn.Module, parameters: Parameters) -> dict[str, nn.Parameter]:
    """The chosen parameters by canonical name.

    Raises:
        ValueError: nothing chosen, an unknown keyword, or a name or glob that matches no parameter.
    """
    everything = dict(model.named_parameters())
    if callable(parameters):
        chosen = {name: p for name, p in everything.items() if parameters(name, p)}
    elif parameters == "all":
        chosen = everything
    elif parameters == "head":
        # peft keeps the head it replaced beside the one in use, under the name original_module
        parts = {n: set(n.split(".")) for n in everything}
        chosen = {n: p for n, p in everything.items() if HEAD_NAMES & parts[n] and "original_module" not in parts[n]}
    elif parameters == "lora":
        chosen = {n: p for n, p in everything.items() if "lora_" in n}
    elif parameters == "trainable":
        chosen = {n: p for n, p in everything.items() if p.requires_grad}
    elif isinstance(parameters, str) or not isinstance(parameters, Sequence):
        raise ValueError(
            f"parameters={parameters!r}: wanted 'all', 'head', 'lora', 'trainable', "
            "a list of names or globs, or a predicate on (name, parameter)"
        )
    else:
        chosen = _by_globs(model, everything, parameters)
    if not chosen:
        raise ValueError(f"parameters={parameters!r} chooses no parameter of {type(model).__name__}")
    return chosen


def _by_globs(model: nn.Module, everything: dict[str, nn.Parameter], globs: Sequence[str]) -> dict[str, nn.Parameter]:
    aliases = dict(model.named_parameters(remove_duplicate=False))
    wanted: set[int] = set()
    for glob in globs:
        hits = [glob] if glob in aliases else [n for n in aliases if fnmatchcase(n, glob)]  # linear for long lists
        if not hits:
            raise ValueError(f"parameters: {glob!r} matches no parameter of {type(model).__name__}")
        wanted |= {id(aliases[name]) for name in hits}
    return {name: p for name, p in everything.items() if id(p) in wanted}


def survey(model: nn.Module, chosen: dict[str, nn.Parameter]) -> tuple[list[Site], dict[str, str]]:
    """Who serves each chosen parameter: the sites that can, and name → reason of those that none can."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    sites, refused = [], {}
    for name, parameter in chosen.items():
        uses = owners[id(parameter)]
        rules = [(module, rules_of(module).get(attribute), attribute) for module, attribute in uses]
        reason = next((why for module, rule, attribute in rules if (why := _objection(module, rule, attribute))), "")
        kinds = {rule.name for _, rule, _ in rules if rule is not None}
        if not reason and not (len(kinds) == 1 or kinds == {"linear weight", "embedding"}):
            reason = f"shared between uses of different kinds ({', '.join(sorted(kinds))})"
        if not reason and len({module for module, _ in uses}) < len(uses):
            reason = f"used twice by one {type(uses[0][0]).__name__}"
        if reason:
            refused[name] = reason
        else:
            sites.append(Site(name, parameter, {module: rule for module, rule, _ in rules if rule is not None}))
    return sites, refused


def is_hooked(parameter: Tensor) -> bool:
    """Whether a hook of somebody's may change the gradient on its way to the parameter."""
    return any(not getattr(hook, "only_reads", False) for hook in (parameter._backward_hooks or {}).values())


def _objection(module: nn.Module, rule: Rule | None, attribute: str) -> str:
    if rule is None:
        return f"no rule for {type(module).__name__}.{attribute}"
    parameter = getattr(module, attribute)
    if is_hooked(parameter):
        return "a hook on it (register_hook) changes its gradient as it arrives"
    if not parameter.is_floating_point():
        return f"a {parameter.dtype} weight has no gradient"
    return rule.objection(module)
