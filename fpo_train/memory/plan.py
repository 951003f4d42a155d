"""`fpo-train plan`: what each phase of an iteration holds, and how many rows at a time fit a budget.

It works from a configuration alone: no weights, no network, no GPU. `peaks` and `footprint` hold the arithmetic; a
test holds it to what live tensors take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fpo_train.config import RunConfig
from fpo_train.config.units import parse_bytes, show_bytes
from fpo_train.data.adapters import base_model, classifier_of, settle
from fpo_train.errors import RunError

from .architecture import Architecture, architecture, from_config, scorer
from .peaks import PARTS, PHASES, Peaks

if TYPE_CHECKING:
    from fpo_train.policy import Policy

MARGIN = 0.05  # of the budget is left for what the arithmetic does not see: fragments, workspaces of libraries
USUAL_PROMPT = 512  # tokens a prompt is taken to have at most where the configuration does not say


@dataclass(frozen=True)
class Phase:
    """A phase at its fullest: bytes by part, rows at a time and in all."""

    name: str
    parts: dict[str, int]
    rows: int
    whole: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """The phases of a run under a budget (None: no bound).

    Attributes:
        smallest: the least budget under which every phase fits, by as many rows at a time as take least where the
            configuration does not fix their number.
        notes: what the reader of the table has to know.
        bound: what the budget is, for messages.
        unpacks: whether the budget has room for 4-bit weights to stay unpacked while replies are decoded.
    """

    phases: dict[str, Phase]
    budget: int | None
    smallest: int
    notes: tuple[str, ...]
    bound: str = "memory.budget"
    unpacks: bool = False

    @property
    def fits(self) -> bool:
        """Whether every phase stays below the budget less its margin."""
        return self.budget is None or all(_fits(phase.total, self.budget) for phase in self.phases.values())

    @property
    def rows(self) -> dict[str, int]:
        """Rows at a time by phase."""
        return {name: phase.rows for name, phase in self.phases.items()}

    def check(self) -> None:
        """Raises RunError where the budget cannot hold the run, naming the smallest that can."""
        if not self.fits:
            assert self.budget is not None
            most = max(self.phases.values(), key=lambda phase: phase.total)
            raise RunError(
                f"{self.bound} {show_bytes(self.budget)}: {most.name} takes {show_bytes(most.total)} with {most.rows} "
                f"row{'s' * (most.rows > 1)} at a time; the smallest budget that works is {_show_up(self.smallest)}"
            )


def make_plan(
    config: RunConfig,
    policy: Architecture,
    prompt_tokens: int,
    device: str = "cpu",
    processes: int = 1,
    available: int | None = None,
) -> Plan:
    """The largest micro-batches whose peaks fit the budget.

    Rows at a time are powers of two, or all there are; `memory.*_rows` fix them.

    Args:
        policy: architecture of `policy.model`. Those of the other models are looked up by name.
        prompt_tokens: longest prompt, template included.
        device: its type, "cpu" or "cuda".
        processes: that share an iteration's prompts.
        available: bytes that the device has left: the budget where the configuration has none, or a larger one.

    Raises:
        RunError: a model whose architecture is not at hand, or is not one that the plan can count; a policy that is
            no decoder.
        ValueError: no room for a prompt.
    """
    if not policy.decoder:
        raise RunError(f"policy.model {policy.name}: wanted a causal language model, got an encoder")
    if policy.tied and config.policy.input_embedding == "host":
        raise RunError(f"policy.input_embedding host: of {policy.name} the output projection is the same table")
    if prompt_tokens < 1:
        raise ValueError(f"prompt_tokens: wanted a number above 0, got {prompt_tokens}")
    classifier = config.reward_model.kind == "classifier"
    peaks = Peaks(
        config=config,
        policy=policy,
        reward=scorer(architecture(classifier_of(config.reward_model.classifier))) if classifier else None,
        gold=_gold(config),
        prompt_tokens=prompt_tokens,
        prompts=-(-config.rollout.prompts // processes),
        cuda=device == "cuda",
    )
    budget, bound = available, "what the device has left,"
    if config.memory.budget:
        told = parse_bytes(config.memory.budget, "memory.budget")
        if available is None or told <= available:
            budget, bound = told, "memory.budget"
    phases, least = {}, 0
    for name in PHASES:
        given = getattr(config.memory, f"{name}_rows")
        choices = [_at(peaks, name, given)] if given else [_at(peaks, name, rows) for rows in _choices(peaks, name)]
        fitting = [phase for phase in choices if budget is None or _fits(phase.total, budget)]
        smallest = min(choices, key=lambda phase: phase.total)  # fewer rows can take more: then gradients stay between
        phases[name] = fitting[-1] if fitting else smallest
        least = max(least, smallest.total)
    if unpacked := _unpacked(peaks, phases["generate"], budget):
        phases["generate"] = unpacked
    notes = tuple(_notes(config, prompt_tokens, processes, device, unpacked is not None))
    return Plan(phases, budget, int(least / (1 - MARGIN)) + 1, notes, bound, unpacked is not None)


def _unpacked(peaks: Peaks, packed: Phase, budget: int | None) -> Phase | None:
    """The phase of generation with 4-bit weights unpacked throughout, where all rows and these fit a budget."""
    settings = peaks.config
    fixed = settings.policy.quantization != "nf4" or settings.rollout.engine != "transformers" or not peaks.cuda
    if fixed or budget is None or packed.rows < packed.whole:
        return None
    phase = _at(dataclasses.replace(peaks, unpacks=True), "generate", packed.rows)
    return phase if _fits(phase.total, budget) else None


def _gold(config: RunConfig) -> Architecture | None:
    """The oracle's own classifier; a head that a run has saved sits on the policy's base."""
    folder = Path(config.oracle.model).expanduser()
    if config.oracle.kind != "gold" or (folder / "head.safetensors").is_file():
        return None
    return scorer(architecture(config.oracle.model))


def _choices(peaks: Peaks, name: str) -> list[int]:
    whole = peaks.whole(name)
    return sorted({whole, *(1 << power for power in range(whole.bit_length()) if 1 << power < whole)})


def _at(peaks: Peaks, name: str, rows: int) -> Phase:
    whole = peaks.whole(name)
    parts = {part: round(bytes_) for part, bytes_ in peaks.at(name, rows).items()}
    return Phase(name, parts, min(rows, whole), whole)


def _fits(total: int, budget: int) -> bool:
    return total <= budget * (1 - MARGIN)


def _show_up(size: int) -> str:
    """A size rounded up to what `memory.budget` takes, so that the number named does work."""
    return f"{-(-size // 2**20)}MiB"


def _notes(config: RunConfig, prompt_tokens: int, processes: int, device: str, unpacks: bool) -> Iterator[str]:
    reply = config.rollout.max_new_tokens
    width = prompt_tokens + reply + 1
    yield f"rows of up to {width} tokens: prompts of {prompt_tokens}, replies of {reply}, and a closing one"
    if processes > 1:
        yield f"each of {processes} processes"
    if config.memory.budget:
        yield f"{MARGIN:.0%} of the budget is left free"
    yield "models are counted by their configurations, and prompts are not read: --dry_run tries both"
    if unpacks:
        yield "4-bit weights stay unpacked while replies are decoded, since the budget holds both"
    elif config.policy.quantization == "nf4" and config.rollout.engine == "transformers":
        yield "4-bit weights are unpacked for each token; they stay so where a budget holds both and all rows"
    if device == "cuda":
        yield "the CUDA context, about half a GiB, comes on top"
    if "paged_adamw_8bit" in (config.update.optimizer, config.reward_model.optimizer):
        yield "paged_adamw_8bit: states of tensors of 100,000 numbers or more can move to the host's memory"
    if config.penalty.kind != "none" and config.penalty.parameters not in ("head", "lora", "all"):
        yield f"penalty.parameters {config.penalty.parameters!r} is counted as if it were all"


def format_table(plan: Plan) -> str:
    """Phases as rows; parts, total, share of the budget and rows at a time as columns; notes beneath."""
    used = [part for part in PARTS if any(phase.parts[part] for phase in plan.phases.values())]
    head = ["phase", *used, "total"] + ["of budget"] * (plan.budget is not None) + ["rows at a time"]
    table = [head]
    for phase in plan.phases.values():
        shown = [show_bytes(bytes_) if (bytes_ := phase.parts[part]) else "–" for part in used]
        row = [phase.name, *shown, show_bytes(phase.total)]
        if plan.budget is not None:
            row.append(f"{phase.total / plan.budget:.0%}")
        table.append([*row, f"{phase.rows} of {phase.whole}"])
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    budget = "no budget" if plan.budget is None else f"budget {show_bytes(plan.budget)}"
    return "\n".join([*lines, f"{budget}; the smallest that works is {_show_up(plan.smallest)}", *plan.notes])


def plan_command(config: RunConfig, device: str | None = None) -> int:
    """Print the plan of a configuration. → 0, or 1 where the budget cannot hold it.

    `device`: "cpu" or "cuda"; None takes "cuda" for a model that is quantised or in half precision, as only those
    that are to run there are.

    Raises:
        RunError: as `make_plan`, replies that leave no room for a prompt, or an adapter that no policy can begin on.
    """
    if device is None:
        device = "cuda" if config.policy.quantization != "none" or config.policy.dtype == "bfloat16" else "cpu"
    config, base = settle(config), base_model(config.policy.model)
    policy = architecture(base)
    room = policy.context - config.rollout.max_new_tokens - 1
    if room < 1:
        longest = config.rollout.max_new_tokens
        raise RunError(f"rollout.max_new_tokens: {longest} leave no prompt in a context of {policy.context} tokens")
    plan = make_plan(config, policy, min(config.data.max_tokens or USUAL_PROMPT, room), device)
    print(f"{base}: {policy.parameters / 1e9:.2f} billion parameters")
    if base != config.policy.model:
        print(f"the policy begins on the adapter {config.policy.model}, of rank {config.policy.lora_rank}")
    print(format_table(plan))
    if plan.fits:
        return 0
    try:
        plan.check()
    except RunError as error:
        print(error)
    return 1


def plan_for(config: RunConfig, policy: Policy, prompt_tokens: int, processes: int = 1) -> Plan | None:
    """The plan of a run whose policy is loaded; None where nothing bounds it and its models cannot be counted.

    On CUDA the bound is what is free on the device and what this process has reserved of it, or a smaller
    `memory.budget`.

    Raises:
        RunError: a budget for a model that cannot be counted.
        ValueError: as `make_plan`.
    """
    device, available = policy.device, None
    if device.type == "cuda":
        import torch

        available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        model = from_config(config.policy.model, policy.lm.config.to_dict())
        return make_plan(config, model, prompt_tokens, device.type, processes, available)
    except RunError:
        if config.memory.budget:
            raise
        return None
