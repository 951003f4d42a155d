"""/openapi.json tells the truth: generated requests find no answer that it does not describe."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from fpo_train.config import BatchingConfig, LimitsConfig, ServeConfig

from .serving import ORACLE, made, scorer

TOKEN = "s3cret-token"


@pytest.fixture(scope="module")
def schema(tiny, tmp_path_factory):
    """Of an application that serves, without a server around it."""
    folder = scorer(tiny, tmp_path_factory.mktemp("scorer"))
    config = ServeConfig(
        reward_model=folder,
        oracle=ORACLE,
        gamma_units="raw",
        reference="group",
        limits=LimitsConfig(texts=16, characters=300),
        batching=BatchingConfig(wait_ms=0),
    )
    app, worker = made(config, TOKEN)
    # JSON Schema cannot say that lists are of one length, so that 422 answers some of what it allows
    positive = {"expected-statuses": ["2xx", 401, 404, 409, 422]}
    settled = SchemathesisConfig.from_dict({"checks": {"positive_data_acceptance": positive}})
    headers = {"Authorization": f"Bearer {TOKEN}"}
    yield schemathesis.openapi.from_asgi("/openapi.json", app, config=settled, headers=headers)
    assert worker.stop(10)


ROUTES = {
    "/score": "post",
    "/rewards": "post",
    "/update": "post",
    "/openrlhf": "post",
    "/slime": "post",
    "/monitor": "post",
    "/health": "get",
    "/metrics": "get",
}


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("route", ROUTES)
def test_every_answer_is_described(schema, route, mode):
    requests = schema[route][ROUTES[route]].as_strategy(generation_mode=mode)

    @given(case=requests)
    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def validated(case):
        case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"})

    try:
        validated()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # there is nothing to get wrong
        assert route in ("/update", "/health", "/metrics")


def test_every_route_is_described(schema):
    found = {operation.ok().path: operation.ok().method for operation in schema.get_all_operations()}
    assert found == ROUTES
