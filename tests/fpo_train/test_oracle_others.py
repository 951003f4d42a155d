"""A function and people as the oracle, and how each kind is loaded."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file

from fpo_train.config import OracleConfig
from fpo_train.errors import RunError
from fpo_train.oracle import FileOracle, FunctionOracle, Labels, load_oracle
from fpo_train.processes import Processes

from .test_oracle import ROWS, config, every, rollout  # noqa: F401 (rollout is a fixture)

MODULE = '''
import numpy, torch
def length(prompts, completions):
    return [len(p) + len(c) / 10 for p, c in zip(prompts, completions)]
def array(prompts, completions): return numpy.arange(len(prompts)) / 2
def tensor(prompts, completions): return torch.arange(len(prompts)) / 2
def scalars(prompts, completions): return [torch.tensor(n / 2) for n in range(len(prompts))]
def placed(asked, said): return [len(p) + len(c) / 10 for p, c in zip(asked, said)]
def trl(completions, prompts, **columns): return length(prompts, completions)
def silent(prompts, completions): return [None, float("nan")] + [1.5] * (len(prompts) - 2)
def short(prompts, completions): return [1.0]
def number(prompts, completions): return 3.0
def text(prompts, completions): return ["7"] * len(prompts)
def pairs(prompts, completions): return [[1.0, 2.0]] * len(prompts)
def endless(prompts, completions): return [float("inf")] * len(prompts)
def nothing(prompts, completions): return None
def lone(prompts): return [0.0] * len(prompts)
def broken(prompts, completions): raise KeyError("no such key\\nand more")
'''  # fmt: skip


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_taste.py").write_text(MODULE)
    (tmp_path / "my_ruin.py").write_text("import no_such_thing_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    yield "my_taste"
    sys.modules.pop("my_taste", None)


def function(name):
    return FunctionOracle(OracleConfig(kind="function", function=name, temperature=2.0))


def test_a_function_gives_utilities(rollout, module):  # noqa: F811
    oracle = function("my_taste:length")
    utility = oracle.utility(rollout, None, ROWS)
    truth = [len(rollout.prompts[r // 4].text) + len(rollout.texts[r]) / 10 for r in ROWS.tolist()]
    assert utility.tolist() == pytest.approx(truth)
    p = Labels(oracle, rollout, None).preferences(every(rollout))
    reference = len(rollout.texts[3]) - len(rollout.texts[0])
    assert float(p[0, 0]) == pytest.approx(1 / (1 + math.exp(reference / 10 / 2)))
    for name in ("placed", "trl"):  # by place where it has other names; by name where it has these, in any order
        assert function(f"my_taste:{name}").utility(rollout, None, ROWS).tolist() == utility.tolist()
    for name in ("array", "tensor", "scalars"):
        assert function(f"my_taste:{name}").utility(rollout, None, ROWS).tolist() == [n / 2 for n in range(9)]


def test_a_function_that_cannot_say(rollout, module):  # noqa: F811
    oracle = function("my_taste:silent")
    labels = Labels(oracle, rollout, None)
    p = labels.preferences(every(rollout))
    assert p.isnan().flatten().tolist() == [True, True, False, False, False, False]
    assert (labels.calls, labels.failures) == (6, 2)
    assert oracle.counts == {"scored": 6, "no_answer": 2}
    assert oracle.report() == "no_answer 2, scored 6; my_taste:silent said None or NaN of 2 completions"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("short", "my_taste:short returned 1 numbers for 9 completions"),
        ("number", "returned a float; wanted a list of 9 numbers"),
        ("nothing", "returned a NoneType"),
        ("text", "returned '7' for completion 0; wanted a finite number"),
        ("pairs", r"returned \[1.0, 2.0\] for completion 0; wanted a number"),
        ("endless", "returned inf for completion 0; wanted a finite number"),
        ("broken", r"my_taste:broken raised KeyError: 'no such key.* \(my_taste.py, line 18\)"),
    ],
)
def test_a_function_that_errs_is_named(rollout, module, name, says):  # noqa: F811
    with pytest.raises(RunError, match=says) as caught:
        function(f"my_taste:{name}").utility(rollout, None, ROWS)
    assert "\n" not in str(caught.value)


def test_functions_that_do_not_exist(module):
    for name, says in (
        ("my_taste", "wanted module:function"),
        ("my_taste:no_such", "module my_taste has no function 'no_such'"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("my_taste:lone", r"my_taste:lone takes \(prompts\); wanted two lists, prompts and completions"),
        ("my_ruin:f", "cannot be imported: .*no_such_thing_at_all"),
    ):
        with pytest.raises(RunError, match=says):
            function(name)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_people_s_preferences_are_looked_up_both_ways(rollout, tmp_path):  # noqa: F811
    texts, prompt = rollout.texts, rollout.prompts
    rows = [
        {"prompt": prompt[0].text, "chosen": texts[0] + "\n", "rejected": texts[3]},
        {"prompt": prompt[0].text, "chosen": texts[3], "rejected": texts[1], "preference": 0.7},
        {"prompt": prompt[0].text, "chosen": texts[3], "rejected": texts[1], "preference": 0.9},
        {"prompt": "another prompt", "chosen": texts[2], "rejected": texts[3]},
    ]
    oracle = FileOracle(write(tmp_path / "people.jsonl", rows), tmp_path / "run" / "unlabelled.jsonl")
    rollout.texts[6] = rollout.texts[7]  # said the same as the reference
    labels = Labels(oracle, rollout, None)
    p = labels.preferences(every(rollout)).flatten()
    assert p.nan_to_num(-1).tolist() == pytest.approx([1.0, 0.2, -1, -1, -1, 0.5])
    assert (labels.calls, labels.failures) == (6, 3)
    assert oracle.counts == {"labelled": 2, "unlabelled": 3, "identical": 1}
    assert labels.utilities(every(rollout)) is None
    assert oracle.pairs()[:2] == [
        (prompt[0].text, texts[0], texts[3], 1.0),
        (prompt[0].text, texts[3], texts[1], 0.7),
    ]
    assert len(oracle.pairs()) == 4

    path = tmp_path / "run" / "unlabelled.jsonl"
    waiting = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["chosen"] for row in waiting] == [texts[2], texts[4], texts[5]]
    assert waiting[0] == {"prompt": prompt[0].text, "chosen": texts[2], "rejected": texts[3]}
    path.write_text(path.read_text()[:-9])  # killed in the middle of the last line
    again = FileOracle(tmp_path / "people.jsonl", path)
    Labels(again, rollout, None).preferences(every(rollout))
    assert [json.loads(line) for line in path.read_text().splitlines()] == waiting  # each pair once
    labelled = FileOracle(path, tmp_path / "other.jsonl")  # the file comes back as it was written
    assert float(labelled.preference(rollout, None, torch.tensor([2]), torch.tensor([3]))) == 1.0


def test_nobody_having_labelled_yet_is_no_failure_of_the_run(rollout, tmp_path):  # noqa: F811
    path = write(tmp_path / "people.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    labels = Labels(FileOracle(path, tmp_path / "unlabelled.jsonl"), rollout, None)
    labels.preferences(every(rollout))
    assert labels.failures == labels.calls == 6
    labels.check(Processes())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{torn", "line 3 is not JSON"),
        ('["a"]', "line 3 is not an object"),
        ('{"prompt": "a", "chosen": "b"}', 'line 3 has no text under "rejected"'),
        ('{"prompt": "a", "chosen": 1, "rejected": "c"}', 'line 3 has no text under "chosen"'),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "preference": 1.5}', "from 0 to 1, got 1.5"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "preference": "often"}', "from 0 to 1, got 'often'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "preference": NaN}', "from 0 to 1, got nan"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, says):
    path = tmp_path / "people.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n' + line + "\n")
    with pytest.raises(RunError, match=says):
        FileOracle(path, tmp_path / "unlabelled.jsonl")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe4\n")
    for name, says in (("empty", "holds no preferences"), ("latin", "is not UTF-8"), ("none", "cannot be read: No")):
        with pytest.raises(RunError, match=says):
            FileOracle(tmp_path / f"{name}.jsonl", tmp_path / "unlabelled.jsonl")


def test_each_kind_is_loaded(tiny, policy, module, tmp_path):
    people = write(tmp_path / "people.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    (tmp_path / "gold").mkdir()
    save_file({"score.weight": torch.ones(1, 32)}, tmp_path / "gold" / "head.safetensors")
    write(tmp_path / "gold" / "config.json", [{"base": str(tiny)}])
    for settings, name, utilities in (
        ({}, "BaseOracle", True),
        ({"kind": "gold", "model": str(tmp_path / "gold")}, "HeadOracle", True),
        ({"kind": "function", "function": "my_taste:length"}, "FunctionOracle", True),
        ({"kind": "judge", "model": "m", "url": "http://localhost/v1"}, "JudgeOracle", False),
        ({"kind": "file", "file": str(people)}, "FileOracle", False),
    ):
        oracle = load_oracle(config(tiny, **settings), policy, Processes())
        assert type(oracle).__name__ == name
        assert oracle.has_utilities is utilities
        oracle.counts["scored"] += 3
        state = oracle.state_dict()
        oracle.counts.clear()
        oracle.load_state_dict(state)
        assert oracle.counts == {"scored": 3}
