"""What each phase of an iteration holds at its fullest moment, in bytes, by part: `plan` asks for it by rows at once.

A phase is the fullest of a few moments (reading the prompts, sampling, the logits, the backward pass …). What stays
over the whole iteration is in all of them: weights, adapters, optimizer states, the prompts' keys and values once they
are read, and from scoring on the base's states of the rollout. Gradients go with the step that takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fpo_train.config import RunConfig

from .architecture import Architecture
from .footprint import (
    FP32,
    Kept,
    Tape,
    adapter_weights,
    backward_bytes,
    cache_bytes,
    forward_bytes,
    layer_bytes,
    packed_bytes,
    tape_bytes,
    unpacked_bytes,
    weight_bytes,
)

PARTS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "KV cache",
    "logits",
    "influence",
    "states",
)
PHASES = ("generate", "score", "update", "retrain")
Parts = dict[str, float]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
FP64 = 8
# fp32 copies of the logits that are alive at once: while a token is sampled, between two tokens, while log p is taken
# without a tape, through it and back, and for KL between two models
SAMPLING, BETWEEN, LOG_PROBS, LOSS, KL = 5, 2, 2, 4, 5
STATE_8BIT = 2 + 2 * FP32 / 256  # bytes a weight: two codes, and two fp32 scales a block of 256


def fullest(moments: list[Parts]) -> Parts:
    """The moment that holds most."""
    return max(moments, key=lambda parts: sum(parts.values()))


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Peaks of one run's phases on one process.

    Attributes:
        policy, reward: architectures; `reward` is the classifier's, None where the reward model sits on the base.
        gold: the oracle's classifier, None where it has none.
        prompt_tokens: longest prompt, template included.
        prompts: of this process.
        unpacks: whether 4-bit weights stay unpacked while replies are decoded.
    """

    config: RunConfig
    policy: Architecture
    reward: Architecture | None
    gold: Architecture | None = None
    prompt_tokens: int
    prompts: int
    cuda: bool
    unpacks: bool = False

    @property
    def width(self) -> int:
        """Tokens of the longest row: prompt, reply, closing token."""
        return self.prompt_tokens + self.config.rollout.max_new_tokens + 1

    def whole(self, phase: str) -> int:
        """Rows of a phase when none is put off."""
        config, n = self.config, self.config.rollout.candidates
        if phase == "retrain":
            return 2 * (self.prompts * config.reward_model.every + config.reward_model.replay_pairs)
        if phase == "update":
            return self.prompts * (n if config.update.kind == "rloo" else 1)
        return self.prompts * (n + 1)

    def at(self, phase: str, rows: int) -> Parts:
        """What the phase holds at its fullest with so many rows at once."""
        parts = fullest(getattr(self, phase)(min(rows, self.whole(phase))))
        return {part: parts.get(part, 0.0) for part in PARTS}

    # what stays

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.config.policy.dtype]

    @property
    def unpacked(self) -> int:
        return unpacked_bytes(self.policy, self.itemsize, self.config.policy.quantization)

    @property
    def reward_itemsize(self) -> int:
        return ITEMSIZE[self.config.reward_model.dtype] if self.reward else self.itemsize

    @property
    def policy_trained(self) -> float:
        """Bytes of the policy's adapter."""
        policy = self.config.policy
        return FP32 * adapter_weights(self.policy, policy.lora_targets, policy.lora_rank)

    @property
    def reward_trained(self) -> float:
        """Bytes of the reward model's trained weights."""
        settings, body = self.config.reward_model, self.reward or self.policy
        adapter = FP32 * adapter_weights(body, settings.lora_targets, settings.lora_rank)
        if not self.reward:
            return body.hidden * FP32 + (adapter if settings.kind == "lora" else 0)
        if settings.train == "all":
            return (body.parameters + body.hidden) * self.reward_itemsize
        return body.hidden * self.reward_itemsize + (adapter if settings.train == "lora" else 0)

    @property
    def resident(self) -> Parts:
        """Weights, adapters and optimizer states."""
        config = self.config
        weights = weight_bytes(self.policy, self.itemsize, config.policy.quantization) + self._others
        if config.policy.input_embedding == "host" and self.cuda:
            weights -= self.policy.embedding * self.itemsize
        if not self.cuda and self.itemsize == FP32 and config.rollout.engine == "transformers":
            weights += packed_bytes(self.policy)
        inside = self.reward is not None and config.reward_model.train == "all"
        if self.reward:
            weights += weight_bytes(self.reward, self.reward_itemsize, "none")
        trained = self.policy_trained, self.reward_trained
        kinds = config.update.optimizer, config.reward_model.optimizer
        sizes = FP32, self.reward_itemsize if inside else FP32
        states = [
            2 * bytes_ if kind == "adamw" else bytes_ / size * STATE_8BIT
            for bytes_, kind, size in zip(trained, kinds, sizes, strict=True)
        ]
        # the reward model's earlier states and its first one are kept on the host
        earlier = 0 if self.cuda else (config.penalty.checkpoints + 1) * trained[1]
        adapters = trained[0] + (0 if inside else trained[1]) + earlier
        return {"weights": weights, "adapters": adapters, "optimizer": sum(states)}

    @property
    def _second_base(self) -> bool:
        """Whether the oracle reads with a copy of the base of its own."""
        oracle = self.config.oracle
        return oracle.kind == "base" and oracle.quantization not in ("none", self.config.policy.quantization)

    @property
    def _others(self) -> float:
        """Bytes of models that only the oracle reads."""
        if self._second_base:
            return weight_bytes(self.policy, self.itemsize, self.config.oracle.quantization)
        return weight_bytes(self.gold, FP32, "none") if self.gold else 0.0

    @property
    def prefix(self) -> float:
        """Keys and values of all prompts, and their last states: read once, and kept as long as the rollout."""
        tokens = self.prompts * self.prompt_tokens
        return cache_bytes(self.policy, self.itemsize, tokens) + tokens * self.policy.hidden * self.itemsize

    @property
    def states(self) -> float:
        """The base's states of all rows: the closing one in fp32, and those that predict the reply."""
        rows = self.prompts * (self.config.rollout.candidates + 1)
        new = self.config.rollout.max_new_tokens
        return rows * self.policy.hidden * (FP32 + new * self.itemsize)

    # the phases

    def generate(self, rows: int) -> list[Parts]:
        model, e, length = self.policy, self.itemsize, self.prompt_tokens
        last = length + self.config.rollout.max_new_tokens - 1
        read = self.prompts * length
        cache = 2 * self.prefix + cache_bytes(model, e, rows * last)  # as the policy reads the prompts, and as the base
        step = forward_bytes(model, e, rows, last, 0 if self.unpacks else self.unpacked)
        logits = rows * model.vocabulary
        prefill = forward_bytes(model, e, read, length, self.unpacked)
        decoding = dict(self.resident)
        if self.unpacks:
            decoding["weights"] += model.linear_weights * e
        return [
            self.resident | {"activations": prefill, "KV cache": self.prefix + cache_bytes(model, e, read)},
            decoding | {"activations": step, "KV cache": cache, "logits": BETWEEN * FP32 * logits},
            decoding | {"KV cache": cache, "logits": (SAMPLING * FP32 + e * (e < FP32)) * logits},
        ]

    @property
    def scored(self) -> Parts:
        """What stays from scoring on."""
        return self.resident | {"KV cache": self.prefix, "states": self.states}

    def score(self, rows: int) -> list[Parts]:
        model, e, settings = self.policy, self.itemsize, self.config.rollout
        tail = settings.max_new_tokens + 1
        again = forward_bytes(model, e, rows * tail, self.width, self.unpacked)
        before = rows * tail * model.hidden * e * (rows < self.whole("score"))  # the rows before, not yet let go
        held = self.scored
        moments = [
            held | {"activations": again + before, "KV cache": self.prefix + cache_bytes(model, e, rows * self.width)},
            held | {"states": 2 * self.states},  # joined from the parts
            held | {"influence": self._judging},
        ]
        return moments + self._asking(rows) + self._rewarding(rows)

    def _asking(self, rows: int) -> list[Parts]:
        """The oracle's reading of what it is asked about: whole rows, prompts too, unless it shares the base's."""
        config, model, e, held = self.config, self.policy, self.itemsize, self.scored
        each = config.rollout.candidates if config.penalty.labels_all else 1
        asked = self.prompts * (each + 1)
        tokens = min(rows, asked) * self.width
        if self.gold:
            width = min(self.width, self.gold.context)
            return [held | {"activations": forward_bytes(self.gold, FP32, min(rows, asked) * width, width)}]
        if config.oracle.kind != "base":
            return []
        new = config.rollout.max_new_tokens
        at_once = min(config.update.logits_at_once, asked * (new + 1)) * model.vocabulary
        logits = at_once * (LOG_PROBS * FP32 + e * (e < FP32))
        if config.oracle.mean_over == "reply" and not self._second_base:
            return [held | {"logits": logits}]
        read = asked * model.hidden * (FP32 + new * e)
        forward = forward_bytes(model, e, tokens, self.width, self.unpacked)
        return [
            held | {"activations": forward, "states": self.states + (read if rows < asked else 0)},
            held | {"states": self.states + read, "logits": logits},
        ]

    @property
    def _judging(self) -> float:
        """Gradient features of all rows and of the labelled pairs, in float64, with what is solved from them."""
        config = self.config
        if config.penalty.kind == "none":
            return 0
        body = self.reward or self.policy
        rows = self.prompts * (config.rollout.candidates + 1)
        width = body.hidden if self._head_alone else config.penalty.sketch_dim
        pairs = config.penalty.pairs * (config.penalty.kind in ("exact", "residual"))
        features = rows * 3 if self._head_alone or pairs else 0
        return (features + 4 * pairs) * width * FP64

    @property
    def _head_alone(self) -> bool:
        settings = self.config.reward_model
        trained = "head" if not self.reward and settings.kind == "head" else settings.train if self.reward else "lora"
        named = self.config.penalty.parameters
        return named == "head" or (named == "trainable" and trained == "head")

    def _rewarding(self, rows: int) -> list[Parts]:
        """Scores of a reward model that is more than a head on the base, and its gradients' products."""
        config, settings = self.config, self.config.reward_model
        held = self.scored
        if settings.kind == "head" and self._head_alone:
            return []
        body, e, width = self.reward or self.policy, self.reward_itemsize, self.reward_width
        unpacked = 0 if self.reward else self.unpacked
        known = self.reward is not None and settings.train == "head"  # its head's inputs, once for good
        tokens = rows * width
        if config.penalty.kind != "none" and not (known and self._head_alone):
            # `fk.Influence` takes half of them for candidates, who bring their references
            candidates = max(1, rows // 2)
            tokens = width * (candidates + ceil(candidates / config.rollout.candidates))
        forward = forward_bytes(body, e, tokens, width, unpacked)
        over = config.penalty.parameters
        # PEFT has the embedding's output require grad where there is checkpointing: the base is on any tape then
        base = config.policy.gradient_checkpointing and not self.reward
        if config.penalty.kind == "none" or (self._head_alone and not base):
            return [held | {"activations": forward}]
        if self._head_alone:
            # candidates and references apart, since the module on the base names no id that pads
            kept = tape_bytes(body, Tape(itemsize=e), max(1, rows // 2) * width, width)
            return [held | {"activations": max(kept, forward), "influence": self._judging}]
        tape = self._reward_tape("frozen" if over == "lora" else "tapped", remakes=True)
        kept = tape_bytes(body, tape, tokens, width)
        under_way = backward_bytes(body, tape, tokens, unpacked)
        moments = [held | {"activations": kept, "influence": under_way + self._judging}]
        if config.penalty.kind == "tracin":  # the mean gradient is formed, from an ordinary backward pass
            chosen = self.reward_trained if over in ("lora", "trainable") else body.parameters * FP32
            whole = self._reward_tape("frozen" if over == "lora" else "trained")
            taped = tape_bytes(body, whole, rows * width, width) + backward_bytes(body, whole, rows * width, unpacked)
            moments.append(held | {"activations": taped, "influence": 2 * chosen})
        return moments

    @property
    def reward_width(self) -> int:
        """Tokens of the longest row that the reward model reads."""
        longest = self.config.reward_model.max_tokens or self.width
        return min(longest, self.width, (self.reward or self.policy).context)

    def _reward_tape(self, kept: Kept, remakes: bool = False) -> Tape:
        settings = self.config.reward_model
        adapter = settings.kind == "lora" or settings.train == "lora"
        return Tape(
            itemsize=self.reward_itemsize,
            targets=settings.lora_targets if adapter else (),
            rank=settings.lora_rank if adapter else 0,
            kept=kept,
            remakes=remakes,  # and no checkpointing: transformers does so in training mode, which it is never in
            cuda=self.cuda,
        )

    def update(self, rows: int) -> list[Parts]:
        model, e, config = self.policy, self.itemsize, self.config
        tokens = rows * self.width
        tape = Tape(
            itemsize=e,
            targets=config.policy.lora_targets,
            rank=config.policy.lora_rank,
            dropout=config.policy.lora_dropout > 0,
            checkpointing=config.policy.gradient_checkpointing,
            cuda=self.cuda,
        )
        base = (self.whole("update") + rows) * config.rollout.max_new_tokens * model.hidden * e
        held = self.scored
        held["states"] += base  # of the learnt rows, apart from all, and of those at hand
        if rows < self.whole("update"):  # else they arise as the tape goes
            held["gradients"] = self.policy_trained
            held["states"] += tokens * model.hidden * e  # of the rows before, not yet let go
        kept = tape_bytes(model, tape, tokens, self.width)
        learnt = rows * config.rollout.max_new_tokens
        logits = min(config.update.logits_at_once, learnt) * model.vocabulary
        said = (
            (3 * learnt + tokens) * model.hidden * e
        )  # the states that predict the replies, their gradients, all states
        forward = kept - (layer_bytes(model, tape, tokens, self.width) if tape.checkpointing else 0)
        log_probs = max(LOSS * FP32 + e * (e < FP32), KL * FP32)
        return [
            held | {"activations": kept + backward_bytes(model, tape, tokens, self.unpacked)},
            held | {"activations": forward + said, "logits": logits * log_probs},
            self.scored | {"gradients": 2 * self.policy_trained},
        ]

    def retrain(self, rows: int) -> list[Parts]:
        settings, body = self.config.reward_model, self.reward or self.policy
        held = self.scored
        features = 3 * self.whole("retrain") * body.hidden * FP32
        # the head's first fit, by Newton's method on the host: the Hessian, a product on the way to it, its factors
        fit = 4 * body.hidden**2 * FP64 * (settings.fit_pairs > 0 and not self.cuda)
        moments = [
            held | {"influence": features},
            held | {"gradients": 2 * self.reward_trained},
            self.resident | {"influence": fit},
        ]
        full = self.reward is not None and settings.train == "all"
        if settings.kind == "head" or (self.reward and settings.train == "head"):
            return moments
        tape = self._reward_tape("trained" if full else "frozen")
        rows = max(2, rows // 2 * 2)  # whole pairs
        tokens = rows * self.reward_width
        kept = tape_bytes(body, tape, tokens, self.reward_width)
        under_way = backward_bytes(body, tape, tokens, 0 if self.reward else self.unpacked)
        learning = dict(held)
        if rows < self.whole("retrain"):
            learning["gradients"] = self.reward_trained
        return [*moments, learning | {"activations": kept + under_way}]
