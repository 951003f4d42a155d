"""Which settings have an effect, by what else a run is told. Imports neither torch nor triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .settings import PENALTY_KINDS, RunConfig

STEERING = tuple(kind for kind in PENALTY_KINDS if kind != "none")
READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("penalty.gamma", "penalty.gamma_units", "penalty.parameters", "penalty.checkpoints"), STEERING),
    **dict.fromkeys(("penalty.sketch_dim", "penalty.pairs"), ("exact", "residual")),
    "penalty.damping": ("exact",),
    **dict.fromkeys(("penalty.lengths", "penalty.noises"), ("residual",)),
    **dict.fromkeys(("oracle.offset", "oracle.utility_range", "oracle.mean_over", "oracle.quantization"), ("base",)),
    **dict.fromkeys(("oracle.key_variable", "oracle.requests_per_minute", "oracle.concurrency"), ("judge",)),
    **dict.fromkeys(("oracle.retries", "oracle.timeout"), ("judge",)),
}
"""Setting → the kinds of its section that read it; what is not here all read, or its own class looks at."""


def refuse_idle(given: Iterable[str], config: RunConfig, penalties: Sequence[str]) -> None:
    """See that each setting of a command line has an effect; a file's may wait for another kind.

    Args:
        given: names, as penalty.gamma. penalties: kinds that will run.

    Raises:
        ValueError: one has none; the message says who reads it.
    """
    running = {"penalty": tuple(penalties), "oracle": (config.oracle.kind,)}
    for name in given:
        section = name.partition(".")[0]
        kinds = READ_BY.get(name)
        if kinds and not set(kinds) & set(running[section]):
            have = f"{' and '.join(kinds)} {'has' if len(kinds) == 1 else 'have'}"
            raise ValueError(f"{name}: {section}.kind {', '.join(running[section])} has no use for it, {have}")
    lora = config.reward_model.kind == "lora" or config.reward_model.train == "lora"
    for name in given:
        if name.startswith("reward_model.lora_") and not lora:
            told = "has no use for it, lora has, and a classifier with reward_model.train lora"
            raise ValueError(f"{name}: reward_model.kind {config.reward_model.kind} {told}")
        if name == "logging.project" and config.logging.tracker == "none":
            raise ValueError(f"{name}: logging.tracker none has no use for it")
