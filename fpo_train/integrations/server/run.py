"""`fpo-train serve`: load, listen, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from fpo_train.config import RewardModelConfig, ServeConfig
from fpo_train.data.sources import load_tokenizer
from fpo_train.errors import RunError
from fpo_train.integrations.reward import FPOReward
from fpo_train.oracle.function import import_function
from fpo_train.whole import read_state, write_state

from .app import Service, create_app
from .batching import Worker
from .metrics import Metrics
from .owner import REFERENCE, Owner

STATE = "fpo.pt"
log = logging.getLogger("fpo_train.serve")
LEFT = 10.0  # seconds that connections may take to close, and the model to come to its end, when all is drained


def serve(config: ServeConfig, token: str) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is under way and keep what was learnt.

    Args:
        token: that requests must bring; empty: none.

    Raises:
        RunError: a reward that cannot be had, a port that is taken, or a model that did not come to its end.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    listening = listen(config.host, config.port)
    with listening:
        owner = Owner(reward_of(config), config.learning)
        folder = Path(config.state).expanduser() if config.state else None
        if folder and (folder / STATE).is_file():
            owner.load_state_dict(read_state(folder / STATE))
            log.info("goes on from %s: %d updates, %d pairs", folder, owner.updates, owner.reward.pairs)

        def saved() -> None:
            if folder:
                write_state(folder / STATE, owner.state_dict())

        metrics = Metrics()
        worker = Worker(owner, config.batching, metrics, saved)
        worker.start()
        app = create_app(config, worker, metrics, token)
        host, port = listening.getsockname()[:2]
        named = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        server = Draining(app, app.state.service, lambda: print(f"listening: {named}", flush=True))
        asyncio.run(server.serve(sockets=[listening]))
        if not worker.stop(LEFT):
            raise RunError("the model was still at work when the server had to end; what it has learnt since is lost")
        saved()
        log.info("stopped after %d updates%s", owner.updates, f"; kept in {folder}" if folder else "")


def reward_of(config: ServeConfig) -> FPOReward:
    """The reward that the settings describe, tried on a text.

    Raises:
        RunError: no such model, or an oracle that is not there.
    """
    if not config.reward_model:
        raise RunError("reward_model: wanted the folder or hub id of a sequence classifier, got none")
    learning = config.learning
    settings = RewardModelConfig(
        input=config.input,
        max_tokens=config.max_tokens,
        dtype=config.dtype,
        learning_rate=learning.learning_rate,
        steps=learning.steps,
        buffer=learning.buffer,
        replay_pairs=learning.replay_pairs,
    )
    reward = FPOReward(
        config.reward_model,
        load_tokenizer(config.tokenizer) if config.tokenizer else None,
        config.penalty,
        config.gamma,
        config.gamma_units,
        config.parameters,
        import_function(config.oracle, columns=True) if config.oracle else None,
        REFERENCE,
        train=None if learning.train == "parameters" else learning.train,
        settings=settings,
        oracle_temperature=learning.temperature,
        rows_at_once=config.batching.rows_at_once,
        seed=config.seed,
    )
    reward.model.check([("One?", "Two.")])
    return reward


def listen(host: str, port: int) -> socket.socket:
    """A socket that has the address.

    Raises:
        RunError: it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise RunError(f"host {host}, port {port}: {error}") from error


class Draining(uvicorn.Server):
    """A server that, told to stop, first refuses new work and answers what is under way; told twice, it just stops."""

    def __init__(self, app: Any, service: Service, ready: Callable[[], None]) -> None:
        seconds = int(LEFT)
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=seconds)
        )
        self._service, self._ready = service, ready
        self._tasks: list[asyncio.Task[None]] = []  # a loop keeps no more than a weak hold on them

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it listens once it does."""
        await super().startup(sockets=sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the first signal drain; at the second leave."""
        name = signal.Signals(sig).name
        if self._service.draining:
            log.warning("%s again: leaving at once", name)
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        log.info("%s: draining, for at most %g seconds", name, self._service.config.drain)
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(lambda: self._tasks.append(loop.create_task(self._drain())))

    async def _drain(self) -> None:
        latest = time.monotonic() + self._service.config.drain
        while self._service.worker.busy and time.monotonic() < latest:
            await asyncio.sleep(0.02)
        if self._service.worker.busy:
            log.error("requests are still under way after %g seconds; they are refused", self._service.config.drain)
        self.should_exit = True
