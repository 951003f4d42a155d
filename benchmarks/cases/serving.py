"""`fpo-train serve` under many clients that each wait for their answer: requests scored together, and one by one.

A request is what verl, OpenRLHF and slime send: one completion and its reference. Servers and clients are processes of
one machine, and take each other's time; servers count among the others whose share of the CPU is noted. What is saved
is what a pass costs however much it holds: where a text's own arithmetic is all there is to pay for, as with a large
model on a CPU, nothing is.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import reward_model
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, Headline
from fpo_train.data.prompts import read_prompts

JOINED, ALONE = "micro-batched", "one by one"
TEXTS = {JOINED: 64, ALONE: 1}  # completions a pass
POOL = 512  # different requests
WORDS = 24  # of a completion, and of a reference
GAMMA = 1.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`clients` that ask without a pause about `layers` of a shape, ∇ over `parameters`.

    Attributes:
        seconds: that latencies and throughput are measured for.
    """

    name: str
    shape: str
    layers: int
    parameters: str = "head"
    clients: int = 64
    seconds: float = 60.0


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """A tiny model, where serving is all there is to pay for, over its head and over all; four layers of SmolLM2's."""
    if quick:
        return [Setting(name="tiny, head, 16 clients", shape="tiny", layers=2, clients=16, seconds=2)]
    return [
        Setting(name="tiny, head, 64 clients", shape="tiny", layers=2),
        Setting(name="tiny, all, 64 clients", shape="tiny", layers=2, parameters="all"),
        Setting(name="4 layers of SmolLM2, head, 64 clients", shape="smollm2-135m", layers=4),
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """A server a way, until the contest is gone."""
    folder = Path(tempfile.mkdtemp(prefix="fpo-serving-"))
    servers: list[subprocess.Popen[str]] = []

    def ended() -> None:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(30)
        shutil.rmtree(folder)

    try:
        written(setting, folder)
        bodies = requests()
        expected = direct(setting, folder, bodies)
        ways = {name: Asking(served(setting, folder, name, servers), setting, bodies, expected) for name in TEXTS}
        competitors = {
            name: Competitor(run=way, budget=TOLERANCE[torch.float32], answers="effective", figures=way.figures)
            for name, way in ways.items()
        }
        contest = Contest(competitors=competitors, expected=lambda: {"effective": expected})
    except BaseException:
        ended()
        raise
    weakref.finalize(contest, ended)
    return contest


def written(setting: Setting, folder: Path) -> None:
    """The reward model and a tokenizer of the shipped questions' bytes and pairs, as users have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>"], initial_alphabet=alphabet)
    raw.train_from_iterator([text for _, text in read_prompts("questions")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>").save_pretrained(folder)
    model: Any = reward_model(setting.shape, setting.layers, torch.float32, torch.device("cpu"))
    model.save_pretrained(folder)


def requests() -> list[dict[str, Any]]:
    """One completion and its reference each."""
    asked = [str(text) for _, text in read_prompts("questions")]
    words = " ".join(asked).split()

    def some(first: int) -> str:
        return " ".join(words[(first + n) % len(words)] for n in range(WORDS))

    return [
        {"prompts": [asked[n % len(asked)] + " "], "completions": [some(7 * n)], "references": [some(7 * n + 3)]}
        for n in range(POOL)
    ]


def direct(setting: Setting, folder: Path, bodies: Sequence[Mapping[str, Any]]) -> Tensor:
    """What FPOReward says of each request by itself, without a server."""
    from fpo_train import FPOReward

    reward = FPOReward(str(folder), None, "practical", GAMMA, "raw", setting.parameters)
    scored = [reward.score(one["prompts"], one["completions"], reference=one["references"]) for one in bodies]
    return torch.cat([one.effective for one in scored])


def served(setting: Setting, folder: Path, name: str, servers: list[subprocess.Popen[str]]) -> str:
    """The address of a server that was started."""
    words = [sys.executable, "-m", "fpo_train", "serve", "--reward_model", str(folder), "--port", "0"]
    words += ["--gamma", str(GAMMA), "--gamma_units", "raw", "--parameters", setting.parameters]
    words += ["--batching.texts", str(TEXTS[name])]
    environment = {**os.environ, "FPO_TOKEN": ""}
    server = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    servers.append(server)
    line = server.stdout.readline() if server.stdout else ""
    if not line.startswith("listening: http://"):
        raise RuntimeError(f"the server did not start: {line!r}, exit code {server.wait(30)}")
    return line.split("http://")[1].strip()


class Asking:
    """Clients of one server, a thread and a connection each; every answer is held to the direct one."""

    def __init__(self, address: str, setting: Setting, bodies: Sequence[Mapping[str, Any]], expected: Tensor) -> None:
        self._address, self._setting = address, setting
        self._bodies = [json.dumps(body).encode() for body in bodies]
        self._expected = expected.tolist()

    def __call__(self) -> Tensor:
        """Each request once, by all clients between them."""
        found = torch.full((len(self._bodies),), torch.nan)

        def ask(client: int, post: Callable[[int], float]) -> None:
            for place in range(client, len(self._bodies), self._setting.clients):
                found[place] = post(place)

        self._together(ask)
        return found

    def figures(self) -> Mapping[str, float]:
        """Requests a second, and milliseconds that half and all but a hundredth of the answers took at most."""
        seconds: list[float] = []
        began = time.perf_counter()
        until = began + self._setting.seconds

        def ask(client: int, post: Callable[[int], float]) -> None:
            place, own = client, []
            while (start := time.perf_counter()) < until:
                place = (place + self._setting.clients) % len(self._bodies)
                value, wanted = post(place), self._expected[place]
                own.append(time.perf_counter() - start)
                if abs(value - wanted) > 1e-4 * max(1.0, abs(wanted)):
                    raise RuntimeError(f"request {place}: {value} under load, {wanted} alone")
            seconds.extend(own)

        self._together(ask)
        cuts = statistics.quantiles(seconds, n=100)
        passed = time.perf_counter() - began
        return {
            "requests_per_second": len(seconds) / passed,
            "p50_ms": 1000 * cuts[49],
            "p99_ms": 1000 * cuts[98],
            "answers": float(len(seconds)),
        }

    def _together(self, ask: Callable[[int, Callable[[int], float]], None]) -> None:
        problems: list[Exception] = []

        def client(number: int) -> None:
            line = http.client.HTTPConnection(self._address, timeout=120)

            def post(place: int) -> float:
                line.request("POST", "/score", self._bodies[place], {"Content-Type": "application/json"})
                answer = line.getresponse()
                text = answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {text[:200]!r}")
                return float(json.loads(text)["effective"][0])

            try:
                ask(number, post)
            except Exception as problem:
                problems.append(problem)
            finally:
                line.close()

        threads = [threading.Thread(target=client, args=(n,)) for n in range(self._setting.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]


def summary(rows: list[dict[str, Any]]) -> str:
    """Throughput and latency of each way."""
    lines = []
    for row in rows:
        if "figures" in row:
            f = row["figures"]
            told = f"{f['requests_per_second']:.0f} requests/s, p50 {f['p50_ms']:.0f} ms, p99 {f['p99_ms']:.0f} ms"
            lines.append(f"{row['setting']['name']}, {row['competitor']}: {told}, {f['answers']:.0f} answers")
    return "\n".join(lines)


CASE = Case(
    name="serving",
    description="fpo-train serve under concurrent clients: requests scored together against one by one",
    competitors=(JOINED, ALONE),
    baseline=ALONE,
    settings=settings,
    build=build,
    headlines=(
        Headline(
            text="throughput, micro-batched over one by one", over=JOINED, under=ALONE, figure="requests_per_second"
        ),
        Headline(text="p50 latency, one by one over micro-batched", over=ALONE, under=JOINED, figure="p50_ms"),
        Headline(text="p99 latency, one by one over micro-batched", over=ALONE, under=JOINED, figure="p99_ms"),
    ),
    summary=summary,
    rounds=3,
)
