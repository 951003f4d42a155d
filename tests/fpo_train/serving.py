"""Reward servers for tests: in a thread of this process, or as a command."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import torch
import uvicorn
from transformers import AutoTokenizer, LlamaForSequenceClassification

from fpo_train.config import ServeConfig
from fpo_train.integrations.server.app import create_app
from fpo_train.integrations.server.batching import Worker
from fpo_train.integrations.server.metrics import Metrics
from fpo_train.integrations.server.owner import Owner
from fpo_train.integrations.server.run import listen, reward_of

ROOT = Path(__file__).parent.parent.parent
SLOW = "slow to judge"  # in a completion: the oracle below takes its time


def scorer(tiny, folder):
    """A tiny reward model whose head says something, in a folder."""
    model = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


def vowels(prompts, completions):
    """An oracle: the share of vowels; slow where a completion asks for it, broken where one says so."""
    said = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    if any(SLOW in one for one in said):
        time.sleep(1.5)
    if any("break the oracle" in one for one in said):
        raise ValueError("broken")
    if any("leave" in one for one in said):
        raise SystemExit(1)
    return [sum(letter in "aeiou" for letter in text) / (len(text) or 1) for text in said]


def graded(prompts, completions, grade):
    """An oracle that reads a column, and needs it."""
    return [float(one) for one in grade]


ORACLE = f"{vowels.__module__}:vowels"
GRADED = f"{graded.__module__}:graded"


def made(config, token=""):
    """The application and its worker, which runs."""
    metrics = Metrics()
    worker = Worker(Owner(reward_of(config), config.learning), config.batching, metrics)
    worker.start()
    return create_app(config, worker, metrics, token), worker


@contextlib.contextmanager
def serving(config=None, token="", **settings):
    """A server in a thread; gives its address and its application."""
    config = config or ServeConfig(**settings)
    app, worker = made(config, token)
    with listen("127.0.0.1", 0) as socket:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}", app
        finally:
            server.should_exit = True
            thread.join(10)
            assert worker.stop(10)


@contextlib.contextmanager
def command(*options, token="", log=None):
    """`fpo-train serve` as a process; gives it and its address."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FPO_TOKEN": token}
    words = [sys.executable, "-m", "fpo_train", "serve", "--port", "0", *options]
    with subprocess.Popen(words, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=log) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("listening: "), (line, process.wait())
            yield process, line.split()[1]
        finally:
            process.kill()


def asked(url, route="/score", token="", **body):
    """A request's answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.post(url + route, json=body, headers=headers, timeout=60)


def sample(name, completions=2):
    """A request's prompts, completions and references, which its name tells from others'."""
    said = [f"Reply {n} to {name}, " + "and so on " * (hash_of(name) % 5 + n) for n in range(completions)]
    return {
        "prompts": [f"What of {name}? "] * completions,
        "completions": said,
        "references": [f"Nothing of {name}."] * completions,
    }


def hash_of(name):
    """A number that is the same in every process."""
    return sum(map(ord, name))
