"""Everything a run can be told, as frozen keyword-only dataclasses. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from .checks import moment, named, not_negative, of_kind, positive, words
from .oracle import OracleConfig
from .units import parse_bytes

PenaltyKind = Literal["none", "practical", "relaxed", "tracin", "exact", "residual"]
PENALTY_KINDS: tuple[PenaltyKind, ...] = get_args(PenaltyKind)
CLASSIFIER = "minilm"
Optimizer = Literal["adamw", "paged_adamw_8bit"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy: a causal language model with a LoRA adapter."""

    model: str = "smollm2"
    """`smollm2`, a local folder, a GGUF file, or a hub id; or the folder of a LoRA adapter (a run's `policy/`) to train
    on: its base is the reference, and `lora_*` are the adapter's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the frozen base weights (of the computation, where they are quantised)."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Frozen base weights in 4 bits (NF4, double quantisation) or 8, by bitsandbytes."""
    input_embedding: Literal["device", "host"] = "device"
    """Where the table of input embeddings lies; `host` saves its bytes on a GPU and takes a copy of a few rows a step.
    Not for models whose output projection is the same table."""
    gradient_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass in place of keeping them."""
    lora_rank: int = 16
    """Rank r of the adapter's factors, which are always float32."""
    lora_alpha: int = 32
    """The adapter's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input while the policy learns."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the linear layers that carry the adapter."""

    def __post_init__(self) -> None:
        words("policy", self)
        positive("policy", lora_rank=self.lora_rank, lora_alpha=self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"policy.lora_dropout: wanted a rate in [0, 1), got {self.lora_dropout}")
        named("policy", lora_targets=self.lora_targets)


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """The reward model and how it is retrained, by AdamW on BCE(σ(r(z) − r(ref)), p*)."""

    kind: Literal["head", "lora", "classifier"] = "head"
    """`head`: a linear score on the policy's frozen base; `lora`: that and an adapter of its own; `classifier`: a
    sequence-classification model of its own."""
    model: str = ""
    """`classifier`: a local folder, or a hub id; empty: `minilm`."""
    train: Literal["head", "lora", "all"] = "head"
    """Which weights of the classifier are trained."""
    input: Literal["chat", "pair", "reply", "written"] = "chat"
    """What it reads: the chat-rendered prompt and reply, both as a pair of texts, the reply alone (the paper), or, as
    trainers' own rewards read, turns chat-rendered and a text prompt with the reply right behind it (`written`)."""
    max_tokens: int = 0
    """Its inputs are cut at this many tokens; 0: at its context."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The classifier's weights; float16 loses small updates (the paper). Scores are float32 always."""
    dropout_when_scoring: bool = False
    """Leave dropout on while the candidates of penalty `none` are scored (the paper)."""
    nan_scores: Literal["fail", "drop"] = "fail"
    """A score that is not a number stops the run, or drops its candidate in silence (the paper)."""
    lora_rank: int = 16
    """Rank of the reward model's adapter, where it has one."""
    lora_alpha: int = 32
    """Its output is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Linear layers that carry it."""
    fit_pairs: int = 48
    """Pairs of base-model replies, labelled by the oracle, that a fresh score head is first fitted on; 0: none."""
    fit: Literal["fresh", "always"] = "fresh"
    """A score head that `model` brings trained is taken as it is, or fitted (and so lost) like a fresh one."""
    fit_ridge: float = 0.1
    """Ridge of that fit, relative to the mean diagonal of ΣΔhΔhᵀ."""
    learning_rate: float = 1e-4
    """AdamW step."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    optimizer: Optimizer = "adamw"
    """`paged_adamw_8bit` is bitsandbytes'."""
    schedule: Schedule = "constant"
    """How the learning rate falls over the run."""
    warmup: int = 0
    """Trainings over which it rises from 0."""
    every: int = 1
    """Iterations between trainings."""
    steps: int = 1
    """Optimizer steps a training."""
    buffer: int = 512
    """Labelled pairs kept, newest first; `exact` and `residual` read them."""
    replay_pairs: int = 0
    """Kept pairs that join the new ones in each step, drawn at random."""

    def __post_init__(self) -> None:
        words("reward_model", self)
        positive("reward_model", lora_rank=self.lora_rank, lora_alpha=self.lora_alpha, fit_ridge=self.fit_ridge)
        positive("reward_model", every=self.every, steps=self.steps, buffer=self.buffer)
        not_negative("reward_model", learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        not_negative("reward_model", fit_pairs=self.fit_pairs, replay_pairs=self.replay_pairs)
        not_negative("reward_model", warmup=self.warmup, max_tokens=self.max_tokens)
        named("reward_model", lora_targets=self.lora_targets)
        train = "" if self.train == "head" else self.train
        of_kind("reward_model", self.kind, model=(self.model, "classifier"), train=(train, "classifier"))

    @property
    def classifier(self) -> str:
        """The model of the kind `classifier`."""
        return self.model or CLASSIFIER


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prompts."""

    prompts: str = "questions"
    """`questions` (192 short ones that ship with the package), a file (.jsonl, .json, .csv, .tsv, .parquet; .txt: a
    prompt a line), a folder of datasets' `save_to_disk`, or the hub id of a dataset."""
    column: str = ""
    """That holds the prompt, a text or a list of messages up to the user's last; empty: `prompt`, else `messages`."""
    split: str = "train"
    """Split of a dataset."""
    subset: str = ""
    """Subset (configuration) of a hub dataset that has several."""
    system: str = ""
    """System prompt put before what has none of its own, in `oracle.file` too."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """A row without a prompt, or with one that does not fit, stops the run, or is skipped and counted."""
    limit: int = 0
    """Take the first so many prompts; 0: all."""
    max_tokens: int = 0
    """Longest prompt, chat template included; 0: what the model's context leaves."""
    truncate: Literal["refuse", "header", "right"] = "refuse"
    """What becomes of a longer one, in `oracle.file` too: refused, shortened with the assistant's header kept, or cut
    off (the paper)."""
    double_bos: bool = False
    """Tokenise the rendered prompt with a second BOS (the paper)."""
    chat_template: str = "auto"
    """`auto`: the policy's, where it has one; `none`: prompts as they are written, whatever it has; or a Jinja file."""
    date: str = ""
    """What chat templates take for now, as 2026-01-31; empty: when the run began, also after a resume."""

    def __post_init__(self) -> None:
        words("data", self)
        not_negative("data", limit=self.limit, max_tokens=self.max_tokens)
        moment("data", date=self.date)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What an iteration samples."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """Who generates; vLLM where it is installed."""
    prompts: int = 4
    """Prompts an iteration (of all processes together), all sampled at once."""
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
    skip_blank: bool = True
    """Leave replies without any text out of the choice."""
    lora_dropout: bool = False
    """Leave the adapter's dropout on while generating (the paper)."""
    attention_mask: bool = True
    """False: the policy is given no attention mask, so it reads padding too (the paper)."""

    def __post_init__(self) -> None:
        words("rollout", self)
        positive("rollout", prompts=self.prompts, candidates=self.candidates, max_new_tokens=self.max_new_tokens)
        positive("rollout", temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            most = f"max_new_tokens={self.max_new_tokens}"
            raise ValueError(f"rollout.min_new_tokens: wanted 0 to {most}, got {self.min_new_tokens}")
        if self.top_p > 1:
            raise ValueError(f"rollout.top_p: wanted a probability in (0, 1], got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """The steering penalty; the policy maximises r(z) − γ · penalty(z)."""

    kind: PenaltyKind = "practical"
    """`none` (plain RLHF), `practical` ⟨∇r, u⟩, `relaxed` c·⟨∇r, u⟩, `tracin` c·⟨ḡ, u⟩, `exact` c·⟨ḡ, H⁻¹u⟩, `residual`
    ĉ·⟨∇r, u⟩, ĉ foretold from the labels bought; `relaxed`, `tracin`, `exact` ask the oracle about all candidates."""
    gamma: float = 1.0
    """γ, the weight of the penalty."""
    gamma_units: Literal["raw", "reward_std"] = "reward_std"
    """`raw` as in the paper; `reward_std`: γ = 1 gives the penalty the reward's running spread over all candidates."""
    parameters: str = "head"
    """Weights that ∇ is over: `head`, `lora`, `all`, `trainable`, or comma-separated names and globs."""
    checkpoints: int = 1
    """Sum the penalty over this many last states of the reward model, each times the learning rate it was trained at;
    1: the reward model as it is, times 1."""
    sketch_dim: int = 4096
    """`exact`, `residual`: numbers a gradient sketch (a score head's gradient is taken whole)."""
    pairs: int = 64
    """`exact`, `residual`: newest labelled pairs read."""
    damping: float = 0.1
    """`exact`: λ of H, relative to its mean diagonal."""
    lengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """`residual`: length scales to choose from, in units of the median distance of the pairs' features."""
    noises: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """`residual`: label noise variances to choose from, relative to the signal's."""

    def __post_init__(self) -> None:
        words("penalty", self)
        not_negative("penalty", gamma=self.gamma, damping=self.damping)
        positive("penalty", checkpoints=self.checkpoints, pairs=self.pairs)
        if not 64 <= self.sketch_dim <= 16384 or self.sketch_dim & (self.sketch_dim - 1):
            raise ValueError(f"penalty.sketch_dim: wanted a power of two from 64 to 16384, got {self.sketch_dim}")
        for name, values in (("lengths", self.lengths), ("noises", self.noises)):
            if not values or min(values) <= 0:
                raise ValueError(f"penalty.{name}: wanted numbers above 0, got {list(values)}")

    @property
    def labels_all(self) -> bool:
        """Whether every candidate needs the oracle's label."""
        return self.kind in ("relaxed", "tracin", "exact")


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """What the policy learns from judged candidates, one optimizer step an iteration."""

    kind: Literal["best_of_n", "rloo"] = "best_of_n"
    """Cross-entropy on the best candidate (the paper), or REINFORCE with the other candidates' mean as baseline."""
    learning_rate: float = 1e-4
    """AdamW step for the adapter."""
    weight_decay: float = 0.01
    """AdamW weight decay of the adapter."""
    optimizer: Optimizer = "adamw"
    """`paged_adamw_8bit` is bitsandbytes'."""
    schedule: Schedule = "constant"
    """How the learning rate falls over the run."""
    warmup: int = 0
    """Iterations over which it rises from 0."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm; 0: never."""
    kl_weight: float = 0.0
    """β of KL(policy ‖ base): nats a reply taken off the reward (rloo), nats a token added to the loss (best_of_n)."""
    loss_on: Literal["reply", "prompt_and_reply", "padded"] = "reply"
    """Tokens of the loss: the reply's, the prompt's too, or padding as well (the paper)."""
    mean: Literal["token", "prompt"] = "token"
    """The loss is a mean over all tokens, or of each prompt's own mean (the paper)."""
    logits_at_once: int = 1024
    """Tokens whose logits over the vocabulary exist at a time."""

    def __post_init__(self) -> None:
        words("update", self)
        not_negative("update", learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        not_negative("update", warmup=self.warmup, kl_weight=self.kl_weight, max_grad_norm=self.max_grad_norm)
        positive("update", logits_at_once=self.logits_at_once)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How much memory the run may hold; `fpo-train plan` shows where it goes."""

    budget: str = ""
    """Bytes for models, activations and caches, as 24GiB, 16GB; empty: what the device has left, on a CPU no bound."""
    generate_rows: int = 0
    """Sequences generated at a time; 0: by the plan."""
    score_rows: int = 0
    """Sequences scored at a time; 0: by the plan."""
    update_rows: int = 0
    """Sequences on one tape while the policy learns; 0: by the plan."""
    retrain_rows: int = 0
    """Sequences on one tape while the reward model learns; 0: by the plan."""
    runs_at_once: int = 0
    """Penalties of `compare` that run side by side, on a CPU; 0: as many as is quickest and fits."""

    def __post_init__(self) -> None:
        not_negative("memory", **{name: rows for name, rows in vars(self).items() if name != "budget"})
        if self.budget:
            parse_bytes(self.budget, "memory.budget")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run leaves behind."""

    checkpoint_every: int = 10
    """Iterations between checkpoints; the last iteration is always one."""
    checkpoint_keep: int = 2
    """How many checkpoints stay on disk."""
    save: Literal["all", "policy"] = "all"
    """`policy`: the reward model is not saved at the end (the paper)."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where the metrics go beside the run's own files, through accelerate."""
    project: str = "fpo"
    """The tracker's project."""
    window: int = 10
    """Iterations over which the reward must rise while the oracle's utility falls for a warning of collapse."""
    audit: bool = False
    """Ask the oracle about every candidate, for the metrics alone (`audit_utility`, `audit_gain`), whatever it takes;
    `compare` does so with a `base` or `gold` oracle, any run where nothing has to be read. Counted as `audit_calls`."""
    watched: int = 3
    """Questions that the policy is asked again after iterations 1, 4, 16, 64, … and the last, greedily; 0: none."""
    controlled: bool = False
    """Show the paper's linear environment (a second of work) in the report, beside the language model."""

    def __post_init__(self) -> None:
        words("logging", self)
        not_negative("logging", watched=self.watched)
        positive("logging", checkpoint_every=self.checkpoint_every, checkpoint_keep=self.checkpoint_keep)
        if self.window < 4:
            raise ValueError(f"logging.window: wanted 4 iterations or more, got {self.window}")


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
    profile: Literal["sound", "paper"] = "sound"
    """Defaults of every option marked (the paper): as it should be, or as published."""
    dry_run: bool = False
    """Rehearse in a temporary folder: two iterations of two prompts and short replies at most, with stand-ins for
    models that are not at hand; `out` is left alone."""
    compare: str = ""
    """Comma-separated penalties, in place of penalty.kind: run from one start, a sub-folder each."""
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
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """How much memory the run may hold."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What a run leaves behind."""

    def __post_init__(self) -> None:
        words("", self)
        positive("run", iterations=self.iterations)
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"run.seed: wanted 0 to 2**40 − 1, got {self.seed}")
        if self.compare and not self.compared:
            raise ValueError(f"compare: {self.compare!r} names no penalty; wanted {', '.join(PENALTY_KINDS)}")
        if not self.out:
            raise ValueError("out: wanted a folder, got an empty name")
        if unknown := [kind for kind in self.compared if kind not in PENALTY_KINDS]:
            raise ValueError(f"compare: unknown penalty {unknown[0]!r}; wanted {', '.join(PENALTY_KINDS)}")
        steered = [kind for kind in self.compared or (self.penalty.kind,) if kind != "none"]
        if steered and self.rollout.candidates == 1 and self.update.kind == "best_of_n":
            wanted = "wanted 2 or more, or penalty.kind none"
            raise ValueError(f"rollout.candidates: of one, penalty.kind {steered[0]} has nothing to choose; {wanted}")
        if len(set(self.compared)) < len(self.compared):
            raise ValueError(f"compare: {self.compare!r} names a penalty twice")

    @property
    def compared(self) -> tuple[PenaltyKind, ...]:
        """The penalties named by `compare`, in order."""
        return tuple(cast(PenaltyKind, name.strip()) for name in self.compare.split(",") if name.strip())
