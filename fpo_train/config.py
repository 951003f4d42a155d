"""Everything a run can be told, as frozen keyword-only dataclasses. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast, get_args

PenaltyKind = Literal["none", "practical", "relaxed"]
PENALTY_KINDS: tuple[PenaltyKind, ...] = get_args(PenaltyKind)


def _positive(section: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{section}.{name}: wanted a number above 0, got {value}")


def _not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{section}.{name}: wanted 0 or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy: a causal language model with a LoRA adapter."""

    model: str = "smollm2"
    """`smollm2`, a local folder, a GGUF file, or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the frozen base weights; the adapter is always float32."""
    lora_rank: int = 16
    """Rank r of the adapter's factors."""
    lora_alpha: int = 32
    """The adapter's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input while the policy learns (never while it generates)."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the linear layers that carry the adapter."""

    def __post_init__(self) -> None:
        _positive("policy", lora_rank=self.lora_rank, lora_alpha=self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"policy.lora_dropout: wanted a rate in [0, 1), got {self.lora_dropout}")


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """The reward model: a linear head on the policy's frozen base, r = w·h."""

    fit_pairs: int = 48
    """Pairs of base-model replies, labelled by the oracle, on which the head is fitted before the first iteration."""
    fit_ridge: float = 0.1
    """Ridge of that fit, relative to the mean diagonal of ΣΔhΔhᵀ."""
    learning_rate: float = 1e-4
    """AdamW step for the head, one step an iteration."""
    weight_decay: float = 0.01
    """AdamW weight decay of the head."""

    def __post_init__(self) -> None:
        _positive("reward_model", fit_pairs=self.fit_pairs, fit_ridge=self.fit_ridge)
        _not_negative("reward_model", learning_rate=self.learning_rate, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """The oracle: the base model's mean log-likelihood of a reply's tokens given the prompt, in nats a token."""

    temperature: float = 1.0
    """Divides the utility difference in p* = σ((U(z) − U(ref)) / temperature); 1 as in the paper."""

    def __post_init__(self) -> None:
        _positive("oracle", temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prompts."""

    prompts: str = "questions"
    """`questions` (the 192 short questions that ship with the package) or a JSONL file with a `prompt` a line."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What an iteration samples."""

    prompts: int = 4
    """Prompts an iteration, all sampled at once."""
    candidates: int = 8
    """Replies of the policy a prompt; one reference reply of the base model comes on top."""
    max_new_tokens: int = 32
    """Longest reply, in tokens."""
    min_new_tokens: int = 5
    """Shortest reply, in tokens."""
    temperature: float = 0.8
    """Sampling temperature."""
    top_p: float = 0.9
    """Smallest set of tokens with at least this probability is sampled from."""
    top_k: int = 50
    """At most this many tokens are sampled from."""

    def __post_init__(self) -> None:
        _positive(
            "rollout",
            prompts=self.prompts,
            candidates=self.candidates,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens: wanted 0 to max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}"
            )
        if self.top_p > 1:
            raise ValueError(f"rollout.top_p: wanted a probability in (0, 1], got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """The steering penalty; the policy maximises r(z) − γ · penalty(z)."""

    kind: PenaltyKind = "practical"
    """`none` (plain RLHF), `practical` ⟨∇r, u⟩, or `relaxed` c·⟨∇r, u⟩, which asks the oracle about every candidate."""
    gamma: float = 1.0
    """γ, the weight of the penalty."""
    gamma_units: Literal["raw", "reward_std"] = "reward_std"
    """`raw` as in the paper; `reward_std`: γ = 1 gives the penalty the reward's running spread over all candidates."""

    def __post_init__(self) -> None:
        _not_negative("penalty", gamma=self.gamma)


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """What the policy learns: cross-entropy on the best candidate's reply tokens."""

    learning_rate: float = 1e-4
    """AdamW step for the adapter, one step an iteration."""
    weight_decay: float = 0.01
    """AdamW weight decay of the adapter."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""

    def __post_init__(self) -> None:
        _not_negative("update", learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        _positive("update", max_grad_norm=self.max_grad_norm)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run leaves behind."""

    checkpoint_every: int = 10
    """Iterations between checkpoints; the last iteration is always one."""
    checkpoint_keep: int = 2
    """How many checkpoints stay on disk."""
    controlled: bool = False
    """Show the paper's linear environment (a second of work) in the report, beside the language model."""

    def __post_init__(self) -> None:
        _positive("logging", checkpoint_every=self.checkpoint_every, checkpoint_keep=self.checkpoint_keep)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of iterative RLHF with a foresighted policy."""

    out: str = "runs/run"
    """Folder the run writes; it must be new or empty unless `resume` is true."""
    iterations: int = 20
    """Iterations of sample, score, update, retrain."""
    seed: int = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on from the last checkpoint in `out`."""
    compare: str = ""
    """Comma-separated penalties, in place of penalty.kind: run one by one from one start, a sub-folder each."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The policy."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """The reward model."""
    oracle: OracleConfig = field(default_factory=OracleConfig)
    """The oracle."""
    data: DataConfig = field(default_factory=DataConfig)
    """The prompts."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """What an iteration samples."""
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    """The steering penalty."""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    """What the policy learns."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What a run leaves behind."""

    def __post_init__(self) -> None:
        _positive("run", iterations=self.iterations)
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"run.seed: wanted 0 to 2**40 − 1, got {self.seed}")
        if self.compare and not self.compared:
            raise ValueError(f"compare: {self.compare!r} names no penalty; wanted {', '.join(PENALTY_KINDS)}")
        if not self.out:
            raise ValueError("out: wanted a folder, got an empty name")
        unknown = [kind for kind in self.compared if kind not in PENALTY_KINDS]
        if unknown:
            raise ValueError(f"compare: unknown penalty {unknown[0]!r}; wanted {', '.join(PENALTY_KINDS)}")
        if len(set(self.compared)) < len(self.compared):
            raise ValueError(f"compare: {self.compare!r} names a penalty twice")

    @property
    def compared(self) -> tuple[PenaltyKind, ...]:
        """The penalties named by `compare`, in order."""
        return tuple(cast(PenaltyKind, name.strip()) for name in self.compare.split(",") if name.strip())
