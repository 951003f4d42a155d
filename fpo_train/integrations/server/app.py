"""The routes of a reward server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from fpo_train import __version__
from fpo_train.config import ServeConfig
from fpo_train.config.units import parse_bytes
from fpo_train.errors import RunError

from . import formats
from .batching import Full, Kind, Stopped, Worker
from .limits import Gate, Refused
from .metrics import CONTENT_TYPE, Metrics
from .owner import Failed, Worth
from .reading import Reader

ROUTES = ("/score", "/rewards", "/update", "/openrlhf", "/slime", "/monitor", "/health", "/metrics", "/openapi.json")
WHY = {
    400: "No JSON, a body that was cut off, or another host's name.",
    401: "No token, or a wrong one.",
    408: "The body did not arrive in time.",
    409: "There is no oracle, and so nothing to learn.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "The request makes no sense, or asks for more than is allowed.",
    500: "The reward or its oracle has failed.",
    503: "Too many requests wait, or the server is draining.",
    504: "There was no answer in time.",
}


class Service:
    """What routes have in common: the worker, its clock, and whether the server is about to end."""

    def __init__(self, config: ServeConfig, worker: Worker, metrics: Metrics) -> None:
        self.config, self.worker, self.metrics = config, worker, metrics
        self.read = Reader(config, worker.owner.reward)
        self.draining = False
        metrics.gauges |= {
            "fpo_queue_requests": ("Requests that wait.", lambda: worker.waiting),
            "fpo_collected_texts": ("Completions kept for the next update.", lambda: worker.owner.collected),
            "fpo_labelled_pairs": ("Labelled pairs kept.", lambda: worker.owner.reward.pairs),
            "fpo_draining": ("1 once the server takes no new work.", lambda: int(self.draining)),
        }

    async def ask(self, kind: Kind, texts: Any) -> Any:
        """What the model answers.

        Raises:
            Refused: it is asked by too many, has failed, or has no answer in time.
        """
        try:
            return await asyncio.wait_for(
                asyncio.wrap_future(self.worker.submit(kind, texts)), self.config.limits.timeout
            )
        except Full as error:
            raise Refused(503, f"{error}; try again later", Retry_After="1") from error
        except Stopped as error:
            raise Refused(503, "the server stops", Retry_After="5") from error
        except asyncio.TimeoutError as error:
            raise Refused(504, f"no answer within {self.config.limits.timeout:g} seconds") from error
        except Failed as error:
            raise Refused(500, f"the reward has failed: {error}") from error
        except RunError as error:
            raise Refused(422, f"cannot be scored: {error}") from error


def create_app(config: ServeConfig, worker: Worker, metrics: Metrics, token: str = "") -> FastAPI:
    """The application, around a worker that runs; its `state.service` can be told to drain.

    Args:
        token: that requests must bring, empty: none.
    """
    service = Service(config, worker, metrics)
    bearer = [Depends(HTTPBearer(auto_error=False))] if token else []
    app = FastAPI(
        title="fpo-train serve",
        version=__version__,
        description="Rewards less their steering penalty, from one reward model that learns.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    _add_batches(app, service, bearer)
    _add_others(app, service, bearer)
    _add_monitor(app, service, bearer)
    _add_own(app, service, bearer)
    app.exception_handler(Refused)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http)
    app.add_middleware(
        Gate,
        token=token,
        hosts=() if token else ("localhost", "127.0.0.1", "[::1]", config.host, f"[{config.host}]"),
        body=parse_bytes(config.limits.body, "limits.body"),
        seconds=config.limits.timeout,
        metrics=metrics,
        routes=ROUTES,
        draining=lambda: service.draining,
    )
    return app


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's description says of its errors."""
    return {status: {"model": formats.Problem, "description": WHY[status]} for status in statuses}


ASKING = errors(400, 401, 408, 413, 415, 422, 500, 503, 504)


def _add_batches(app: FastAPI, service: Service, bearer: Sequence[Any]) -> None:
    @app.post("/score", responses=ASKING, dependencies=bearer)
    async def score(batch: formats.ScoreBatch) -> formats.Scores:
        """What completions are worth at the weights and γ's scale as they are; nothing is counted."""
        return _scores(await service.ask("score", service.read.batch(batch, batch.collect)))

    @app.post("/rewards", responses=ASKING, dependencies=bearer)
    async def rewards(batch: formats.Batch) -> formats.Scores:
        """The same in training: γ's scale moves, and each prompt's best completion becomes a labelled pair.

        A request is one call, by itself: bring all completions of a prompt in one.
        """
        return _scores(await service.ask("rewards", service.read.batch(batch)))

    @app.post("/update", responses=errors(400, 401, 408, 409, 413, 415, 500, 503, 504), dependencies=bearer)
    async def update() -> formats.Updated:
        """Train the reward model on what was collected since the last time."""
        if not service.worker.owner.reward.trains:
            raise Refused(409, "there is no oracle to label pairs; wanted fpo-train serve --oracle module:function")
        return formats.Updated(**await service.ask("update", service.read.nothing()))


def _add_others(app: FastAPI, service: Service, bearer: Sequence[Any]) -> None:
    @app.post("/openrlhf", responses=ASKING, dependencies=bearer)
    async def openrlhf(query: formats.OpenRLHFQuery) -> formats.OpenRLHFScores:
        """OpenRLHF's remote reward; all is kept for the next update, where there is an oracle."""
        worth: Worth = await service.ask("score", service.read.openrlhf(query))
        known = [_known(values, "query") for values in (worth.effective, worth.rewards, worth.penalties)]
        logs = {"fpo_reward": known[1], "fpo_penalty": known[2]}
        return formats.OpenRLHFScores(rewards=known[0], scores=known[0], extra_logs=logs)

    @app.post("/slime", responses=ASKING, dependencies=bearer)
    async def slime(sample: formats.SlimeSample) -> float:
        """slime's remote_rm: a number alone; all is kept for the next update, where there is an oracle."""
        worth: Worth = await service.ask("score", service.read.slime(sample))
        return _known(worth.effective, "response")[0]


def _add_monitor(app: FastAPI, service: Service, bearer: Sequence[Any]) -> None:
    @app.post("/monitor", responses=ASKING | errors(409), dependencies=bearer)
    async def watch(batch: formats.WatchedBatch) -> formats.Step:
        """A step of a run that uses no penalty; `warning` where its reward rises while what it stands for falls."""
        if not service.worker.owner.reward.trains and (batch.utilities is None or batch.steering):
            wanted = "utilities" if batch.utilities is None else "steering false"
            asked = "utilities are" if batch.utilities is None else "steering is"
            told = f"{asked} the oracle's to say, and there is none"
            raise Refused(409, f"{told}; wanted {wanted}, or fpo-train serve --oracle module:function")
        return formats.Step(**await service.ask("watch", service.read.watched(batch)))

    @app.get("/monitor", responses=errors(401), dependencies=bearer)
    async def watched() -> formats.Steps:
        """The latest steps, the newest last."""
        return formats.Steps(steps=[formats.Step(**row) for row in list(service.worker.owner.watched.rows)])


def _add_own(app: FastAPI, service: Service, bearer: Sequence[Any]) -> None:
    draining = {"model": formats.Health, "description": "The server is draining."}

    @app.get("/health", responses={503: draining})
    async def health(response: Response) -> formats.Health:
        """Whether new work is taken. Asks for no token."""
        response.status_code = 503 if service.draining else 200
        status: Any = "draining" if service.draining else "ready"
        return formats.Health(status=status, queue=service.worker.waiting)

    text = {"content": {"text/plain": {}}, "description": "Prometheus' format."}
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    said: dict[int | str, dict[str, Any]] = {200: text, 401: {"content": problem, "description": WHY[401]}}

    @app.get("/metrics", responses=said, response_class=PlainTextResponse, dependencies=bearer)
    async def metrics() -> PlainTextResponse:
        """Counters, in Prometheus' text format."""
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE)


def _scores(worth: Worth) -> formats.Scores:
    return formats.Scores(**vars(worth))


def _known(values: Sequence[float | None], name: str) -> list[float]:
    """Numbers, where the caller can read nothing else.

    Raises:
        Refused: one is missing.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        place = list(values).index(None)
        raise Refused(422, f"{name} {place}: it cannot be scored (its text, its reference or its label is not there)")
    return known


async def _refused(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": error.detail}, error.status, headers=error.headers)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    torn = [one for one in error.errors() if one["type"] == "json_invalid"]
    if torn:
        place = torn[0]["loc"][-1]
        return JSONResponse({"detail": f"the body is no JSON: {torn[0]['ctx']['error']}, at character {place}"}, 400)
    return JSONResponse({"detail": formats.sentence(error.errors())}, 422)


async def _http(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": str(error.detail)}, error.status_code, headers=error.headers)
