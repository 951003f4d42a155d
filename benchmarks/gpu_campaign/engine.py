"""The whole engine on an 8B-shaped reward model: what each question costs beside a forward and a backward."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fpo_kernels as fk
from benchmarks import peers
from benchmarks.gpu_campaign.clock import Run, captured, in_turn, once, tidy
from benchmarks.gpu_campaign.record import Record
from benchmarks.models import Batch, block_weights, reward_model, rows, token_batch
from benchmarks.registry import TOLERANCE

FORWARD, BACKWARD, CAPTURED_BACKWARD = "forward", "forward + backward", "forward + backward, captured"
STEERING, CAPTURED, HOOKS, LOOP = "steering", "steering, captured", "torch hooks", "autograd call each"
LORA_BACKWARD, LORA = "LoRA: forward + backward", "LoRA: steering"
DIMS = (1024, 4096)
ORDER = (FORWARD, BACKWARD, CAPTURED_BACKWARD, STEERING, CAPTURED, HOOKS, LOOP)  # of the rows; others follow
LATE = 120.0  # seconds after which no further size is begun: LoRA is to come


@dataclass(frozen=True, kw_only=True)
class Size:
    """N candidates and a reference of T tokens.

    Attributes:
        full: all of T, else of unequal lengths up to it. every: all questions, else steering alone.
        loop: whether the published way is timed, once. rounds: timed calls of each.
    """

    candidates: int
    tokens: int
    full: bool = True
    every: bool = True
    loop: bool = False
    rounds: int = 5

    @property
    def name(self) -> str:
        return f"{self.candidates}+1 of {'' if self.full else '1-'}{self.tokens}"


def plan(device: torch.device, quick: bool) -> tuple[str, int, list[Size]]:
    """The shape of models.SHAPES, its layers, and the sizes; what matters most comes first."""
    if device.type != "cuda":
        whole = Size(candidates=3, tokens=12, loop=True, rounds=1)
        return "tiny", 2, [whole, Size(candidates=3, tokens=12, full=False, every=False, rounds=1)]
    if quick:
        return "llama3.1-8b", 8, [Size(candidates=8, tokens=t, rounds=3) for t in (256, 64)]
    sizes = [Size(candidates=8, tokens=t, loop=t <= 64) for t in (256, 64, 512)]
    sizes.append(Size(candidates=8, tokens=256, full=False, every=False))
    sizes += [Size(candidates=32, tokens=t, every=False, rounds=3) for t in (64, 256, 512)]
    return "llama3.1-8b", 32, sizes


def run(record: Record) -> None:
    """One row a size and question: ms, ratio to forward + backward, peak bytes beyond the weights, error."""
    shape, layers, sizes = plan(record.device, record.quick)
    dtype = torch.bfloat16 if record.device.type == "cuda" else torch.float32
    model = reward_model(shape, layers, dtype, record.device)
    record.say(f"{shape}, {layers} layers, {dtype}: made")
    for size in sizes:
        if record.seconds > LATE and record.device.type == "cuda":
            record.say(f"{size.name}: left out, {LATE:.0f} s are over")
            continue
        measure(record, model, size)
        tidy(record.device)
    if importlib.util.find_spec("peft"):
        lora(record, model, sizes[0])
    else:
        record.say("no LoRA: peft is not installed")


def measure(record: Record, model: nn.Module, size: Size) -> None:
    """Every question at one size; the engines and their graphs go with it."""
    batch = token_batch(size.candidates + 1, size.tokens, record.device, full=size.full)
    runs, notes = questions(model, batch, size)
    times = in_turn(runs, record.device, size.rounds)
    times |= {name: {"cannot": why} for name, why in notes.items()}
    if size.loop:
        loop = functools.partial(peers.autograd_loop, model, block_weights(model), batch)
        times[LOOP] = once(loop, record.device)
    errors = gate(record, runs, times, size)
    base = times[BACKWARD].get("ms")
    for name in sorted(times, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        row = times[name]
        ratio = row["ms"] / base if base and "ms" in row else None
        error = {"error": errors[name]} if name in errors else {}
        told = row.get("cannot") or f"{row['ms']:.2f} ms" + (f" ({ratio:.2f})" if ratio else "")
        told += f", error {errors[name]:.1e}" if name in errors else ""
        record.add(f"{size.name}: {name}: {told}", setting=size.name, run=name, ratio=ratio, **row, **error)


def questions(model: nn.Module, batch: Batch, size: Size) -> tuple[dict[str, Run], dict[str, str]]:
    """Name → run, and name → why it cannot be asked here."""
    names = block_weights(model)
    candidates, reference = rows(batch, slice(0, -1)), rows(batch, slice(-1, None))
    eager, notes = engine(model, names), {}
    backward = functools.partial(peers.forward_and_backward, model, batch)
    runs: dict[str, Run] = {
        FORWARD: torch.no_grad()(functools.partial(peers.rewards, model, batch)),
        BACKWARD: backward,
        STEERING: lambda: eager.steering(candidates, reference).product,
        HOOKS: functools.partial(peers.hooked_token_products, model, batch),
    }
    if not batch["input_ids"].is_cuda:
        notes[CAPTURED_BACKWARD] = "CUDA graphs want a GPU"
    else:
        runs[CAPTURED_BACKWARD] = _Late(backward)
    if "capture" in inspect.signature(fk.Influence).parameters:
        graphs = engine(model, names, capture="auto")
        runs[CAPTURED] = lambda: graphs.steering(candidates, reference).product
    else:
        notes[CAPTURED] = "this Influence does not capture"
    if size.every:
        runs |= others(model, eager, batch)
    return runs, notes


def others(model: nn.Module, eager: fk.Influence, batch: Batch) -> dict[str, Run]:
    """Norms, sketches, a direction over all Linear weights; steering over the head and over all parameters."""
    candidates, reference = rows(batch, slice(0, -1)), rows(batch, slice(-1, None))
    head, whole = engine(model, "head"), engine(model, "all")
    # a view of the weights themselves: as good a direction as any, and takes no memory
    vectors: Mapping[str, Tensor] = {name: model.get_parameter(name).detach() for name in block_weights(model)}
    runs: dict[str, Run] = {"norms": lambda: eager.norms(batch)}
    for dim in DIMS:
        runs[f"sketch {dim}"] = functools.partial(eager.sketch, batch, dim=dim)
    runs["direction"] = lambda: eager.direction(batch, vectors)
    runs["steering, head"] = lambda: head.steering(candidates, reference).product
    runs["steering, all parameters"] = lambda: whole.steering(candidates, reference).product
    return runs


def engine(model: nn.Module, parameters: str | Sequence[str], capture: str = "never") -> fk.Influence:
    """An engine that captures or does not, where that is an argument."""
    if "capture" not in inspect.signature(fk.Influence).parameters:
        return fk.Influence(model, parameters=parameters)
    more = {"capture": capture}
    return fk.Influence(model, parameters=parameters, **more)  # type: ignore[arg-type]


class _Late:
    """A run that is captured when it is first called, so that a refusal is its own."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._replay: Run | None = None

    def __call__(self) -> Tensor:
        if self._replay is None:
            self._replay = captured(self._run)
        return self._replay()


def gate(record: Record, runs: Mapping[str, Run], times: Mapping[str, dict], size: Size) -> dict[str, float]:
    """Relative errors in norm: steering to the hooks' in the dtype's tolerance, sketches' norms to the norms.

    A number over its budget, or a captured pass of other bits than the eager one, fails the part.
    """
    able = {name for name in runs if "cannot" not in times[name]}
    errors: dict[str, float] = {}
    budgets: dict[str, float] = {}
    if HOOKS in able:
        exact = runs[HOOKS]().double()
        if {STEERING, CAPTURED} <= able and not torch.equal(runs[STEERING](), runs[CAPTURED]()):
            record.fail(f"{size.name}: {CAPTURED}: other bits than the eager pass")
        for name in {STEERING, CAPTURED} & able:
            errors[name] = float((runs[name]().double() - exact).norm() / exact.norm())
            budgets[name] = TOLERANCE[torch.bfloat16 if record.device.type == "cuda" else torch.float32]
    if "norms" in able:
        squared = runs["norms"]().double()
        for dim in DIMS:
            if (name := f"sketch {dim}") in able:
                errors[name] = float((runs[name]().double().square().sum(1) / squared - 1).abs().max())
                budgets[name] = 8 * (2 / dim) ** 0.5  # eight standard deviations
    for name, error in errors.items():
        if not error <= budgets[name]:
            record.fail(f"{size.name}: {name}: error {error:.1e} over its budget {budgets[name]:.1e}")
    for name in {FORWARD, BACKWARD, STEERING, HOOKS} - able:
        if "OutOfMemory" not in times[name]["cannot"]:
            record.fail(f"{size.name}: {name}: {times[name]['cannot']}")
    return errors


def lora(record: Record, model: nn.Module, size: Size) -> None:
    """Steering over LoRA's factors beside that model's own forward and backward."""
    from peft import LoraConfig, get_peft_model

    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=16, target_modules=linear, init_lora_weights=False)
    with torch.device(record.device):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False).eval().requires_grad_(False)
    dtype = next(model.parameters()).dtype
    adapted.to(dtype)
    batch = token_batch(size.candidates + 1, size.tokens, record.device, full=size.full)
    candidates, reference = rows(batch, slice(0, -1)), rows(batch, slice(-1, None))
    factors = engine(adapted, "lora")
    runs: dict[str, Run] = {
        LORA_BACKWARD: functools.partial(peers.forward_and_backward, adapted, batch),
        LORA: lambda: factors.steering(candidates, reference).product,
    }
    times = in_turn(runs, record.device, size.rounds)
    base = times[LORA_BACKWARD].get("ms")
    for name, row in times.items():
        ratio = row["ms"] / base if base and "ms" in row else None
        told = row.get("cannot") or f"{row['ms']:.2f} ms"
        record.add(f"{size.name}: {name}: {told}", setting=size.name, run=name, ratio=ratio, **row)
        if "cannot" in row:
            record.fail(f"{name}: {row['cannot']}")
