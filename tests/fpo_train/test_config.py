"""The configuration, of runs and of evaluations: documented, frozen, light to import."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from fpo_train.config import attribution, serving
from fpo_train.config import evaluation as evaluate_config
from fpo_train.config import settings as config


def sections(*modules):
    found = {key: value for module in modules or (config, evaluate_config) for key, value in vars(module).items()}
    return [c for c in found.values() if isinstance(c, type) and dataclasses.is_dataclass(c)]


WORDS = [
    (section, name, get_args(hint))
    for section in sections(config, evaluate_config, attribution, serving)
    for name, hint in get_type_hints(section).items()
    if get_origin(hint) is Literal
]


@pytest.mark.parametrize(("section", "name", "choices"), WORDS, ids=lambda x: getattr(x, "__name__", None))
def test_a_word_that_is_no_choice_is_refused_by_name(section, name, choices):
    with pytest.raises(ValueError, match=rf"{name}: wanted one of {', '.join(choices)}, got 'strong'"):
        section(**{name: "strong"})


def test_importing_it_loads_neither_torch_nor_triton():
    loaded = "{'torch', 'triton', 'transformers'} & set(sys.modules)"
    room = Path(config.__file__).parent
    every = ", ".join(f"fpo_train.config.{path.stem}" for path in room.glob("[a-z]*.py"))
    code = f"import sys, {every}; sys.exit(bool({loaded}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("section", sections(), ids=lambda c: c.__name__)
def test_frozen_keyword_only_and_every_field_has_its_line(section):
    assert section.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(section))
    tree = ast.parse(Path(sys.modules[section.__module__].__file__).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == section.__name__)
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, f"{section.__name__}.{ast.unparse(node.target)} has no line"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config.RolloutConfig(candidates=0), "rollout.candidates: wanted a number above 0, got 0"),
        (lambda: config.RolloutConfig(top_p=1.5), "rollout.top_p"),
        (lambda: config.RolloutConfig(min_new_tokens=40), "rollout.min_new_tokens"),
        (lambda: config.PenaltyConfig(gamma=-1.0), "penalty.gamma"),
        (lambda: config.RunConfig(compare="none,brave"), "unknown penalty 'brave'; wanted none, practical, relaxed"),
        (lambda: config.RunConfig(compare="none,none"), "twice"),
        (lambda: config.RunConfig(iterations=0), "run.iterations"),
        (
            lambda: config.RunConfig(rollout=config.RolloutConfig(candidates=1)),
            "rollout.candidates: of one, penalty.kind practical has nothing to choose; wanted 2 or more",
        ),
        (lambda: config.PolicyConfig(lora_rank="many"), "policy.lora_rank: wanted a number above 0, got 'many'"),
        (
            lambda: config.RewardModelConfig(model="somebody/rm"),
            "reward_model.model: reward_model.kind head has no use for it, classifier has; got 'somebody/rm'",
        ),
        (lambda: config.RewardModelConfig(kind="lora", train="all"), "reward_model.train: reward_model.kind lora"),
        (lambda: config.OracleConfig(model="somebody/rm"), "oracle.model: .* has no use for it, gold and judge have"),
        (lambda: config.OracleConfig(function="mine:score"), "oracle.function: oracle.kind base has no use for it"),
        (lambda: config.OracleConfig(kind="gold", model="x", url="http://x"), "oracle.url: .* gold has no use for it"),
    ],
)
def test_values_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
