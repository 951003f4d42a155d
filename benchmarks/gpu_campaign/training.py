"""An iteration of training on an 8B-shaped policy with random weights in NF4: phase by phase, in time and memory.

What is predicted for one H200, in ms, from 4 TB/s of copies, 600 TFLOP/s and 70 µs of the host's time a map with an
adapter: a token of 72 rows reads 14 GB of unpacked matrices (4 ms) and runs some 1,300 small kernels of a graph (5 ms).
64 of them take 0.6 s; the prompts, one launched token, recording one and unpacking take half a second more. Packed,
each token also writes and reads what it unpacks (8 ms). The update is three passes that the host launches (0.1 s each)
and as many unpackings (8 ms each); the score is one pass over what the replies add to the prompts.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_campaign.clock import tidy
from benchmarks.gpu_campaign.record import Record
from benchmarks.models import language_model
from benchmarks.phases import Bench
from fpo_train.config import MemoryConfig, PenaltyConfig, PolicyConfig, RewardModelConfig, RolloutConfig, RunConfig
from fpo_train.memory.architecture import from_config
from fpo_train.memory.peaks import PHASES
from fpo_train.memory.plan import make_plan
from fpo_train.policy import decoding
from fpo_train.policy.embedding import keep_in_host
from fpo_train.rollout import sampler

ITERATIONS = 3  # the first warms up
ROOM = 60 * 2**30  # bytes, where 4-bit weights may stay unpacked
PROMPT, REPLY = 46, 64  # tokens: rows of about 110


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an iteration is run.

    Attributes:
        budget: as `memory.budget`; with one, the input embedding lies in the host's memory.
        unpacks: 4-bit weights stay unpacked while replies are decoded. records: a token's step is recorded.
        predicted: ms by phase.
    """

    name: str
    budget: str = ""
    unpacks: bool = False
    records: bool = True
    predicted: dict[str, float] = dataclasses.field(default_factory=dict)


WAYS = (
    Way(
        name="unpacked, recorded",
        unpacks=True,
        predicted={"generate": 1100.0, "score": 300.0, "update": 500.0, "retrain": 20.0},
    ),
    Way(name="packed, recorded", predicted={"generate": 1600.0}),
    Way(name="packed, launched", records=False, predicted={"generate": 8500.0}),
    Way(name="8 GB", budget="8GB", predicted={"update": 600.0}),
)


def run(record: Record) -> None:
    """One row a way and phase: ms, least, peak bytes, planned bytes, predicted ms."""
    cuda = record.device.type == "cuda"
    shape, layers, vocabulary = ("llama3.1-8b", 4 if record.quick else 32, 128_256) if cuda else ("tiny", 2, 300)
    dtype = torch.bfloat16 if cuda else torch.float32
    for way in WAYS:
        model = language_model(shape, layers, vocabulary, dtype, record.device, nf4=cuda)
        record.say(f"{shape}, {layers} layers: made")
        try:
            measure(record, model, way)
        except Exception as problem:  # the other ways are still to come
            record.fail(f"{way.name}: {type(problem).__name__}: {problem}")
        del model
        tidy(record.device)


def configured(way: Way, cuda: bool) -> RunConfig:
    """Eight prompts of eight candidates, a head on the policy's base, penalty practical."""
    prompts, candidates, reply = (8, 8, REPLY) if cuda else (2, 2, 5)
    return RunConfig(
        policy=PolicyConfig(
            quantization="nf4" if cuda else "none",
            dtype="bfloat16" if cuda else "float32",
            gradient_checkpointing=True,
            input_embedding="host" if way.budget and cuda else "device",
        ),
        reward_model=RewardModelConfig(fit_pairs=0),
        rollout=RolloutConfig(
            prompts=prompts, candidates=candidates, max_new_tokens=reply, min_new_tokens=reply, skip_blank=False
        ),
        penalty=PenaltyConfig(kind="practical"),
        memory=MemoryConfig(budget=way.budget),
    )


def measure(record: Record, model: Any, way: Way) -> None:
    """Iterations of one way, each phase waited for."""
    cuda, config = record.device.type == "cuda", configured(way, record.device.type == "cuda")
    length = PROMPT if cuda else 7
    room = ROOM if way.unpacks else None
    planned = make_plan(config, from_config("model", model.config.to_dict()), length, record.device.type, 1, room)
    if config.policy.input_embedding == "host":
        keep_in_host(model, "model")
    bench = Bench(model, config, length)
    own = sampler(bench.parts.policy, config.rollout, 0, planned.unpacks)
    bench.parts = dataclasses.replace(bench.parts, sampler=own)
    ahead, decoding.AHEAD = decoding.AHEAD, decoding.AHEAD if way.records else "none"
    samples: dict[str, list[float]] = {phase: [] for phase in PHASES}
    peaks = dict.fromkeys(PHASES, 0)
    try:
        for _ in range(ITERATIONS):
            for phase in PHASES:
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                getattr(bench, phase)(planned.rows[phase])
                if cuda:
                    torch.cuda.synchronize()
                    peaks[phase] = max(peaks[phase], torch.cuda.max_memory_allocated())
                samples[phase].append((time.perf_counter() - start) * 1e3)
            bench.forget()
    finally:
        decoding.AHEAD = ahead
    for phase, times in samples.items():
        ms = min(times[1:])
        said = f"{way.name}: {phase}: {ms:.0f} ms, peak {peaks[phase] / 2**30:.2f} GiB"
        row: dict[str, Any] = {"ms": ms, "greatest": max(times[1:]), "peak_bytes": peaks[phase]}
        row |= {"planned_bytes": planned.phases[phase].total, "predicted_ms": way.predicted.get(phase)}
        record.add(said, setting=way.name, run=phase, **row)
    record.add(setting=way.name, run="whole", ms=sum(min(times[1:]) for times in samples.values()))
