"""One process is left as it is; two processes over gloo give what plain concatenation and addition give."""

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fpo_train.processes as module
from fpo_train.config import LoggingConfig, RunConfig
from fpo_train.errors import RunError
from fpo_train.processes import Processes, flatten

ROOT = Path(__file__).parents[2]
WORLD = 2


def pieces(rank):
    """What a rank brings, by name: uneven lengths, an empty one, each kind of number."""
    generator = torch.Generator().manual_seed(rank)
    n = (3, 5)[rank]
    floats = torch.randn(n, 4, generator=generator)
    floats[0, 0] = float("nan")
    return {
        "fp32": floats,
        "float64": torch.randn(n, generator=generator, dtype=torch.float64),
        "bf16": torch.randn(n, 3, generator=generator).bfloat16(),
        "int64": torch.randint(-(2**62), 2**62, (n, 2, 2), generator=generator),
        "bool": torch.rand(n, generator=generator) < 0.5,
        "strided": torch.randn(4, n, generator=generator).T,
        "one has none": torch.randn(2 * rank, 3, generator=generator),
        "none": torch.zeros(0, 3),
        "no width": torch.zeros(n, 0),
    }


def layers(rank):
    """Parameters with gradients on both ranks, on one, on none, and in half precision."""
    generator = torch.Generator().manual_seed(10 + rank)
    shapes = [(5, 3), (7,), (2, 2), (300,), (4,), ()]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    parameters[4] = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    for place, p in enumerate(parameters):
        if place != 2 and (place != 1 or rank == 1):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    return parameters


def work(folder):
    """What each of the two processes does: every call, its results into a file, its rows to three trackers."""
    processes = Processes()
    found = {"gather": {name: processes.gather(tensor) for name, tensor in pieces(processes.rank).items()}}
    found["identity"] = (processes.rank, processes.world, processes.main, processes.device.type)
    found["objects"] = processes.gather_objects([{"rank": processes.rank, "n": n} for n in range(processes.rank + 1)])
    found["total"] = (
        processes.total(pieces(processes.rank)["float64"][:3]),
        processes.total(torch.tensor(processes.rank + 1)),
    )
    found["flags"] = [processes.broadcast_flag(flag) for flag in (False, processes.rank == 1, True)]
    found["share"] = processes.share(list(range(6)))
    for name, call in {
        "odd share": lambda: processes.share([1, 2, 3]),
        "widths": lambda: processes.gather(torch.zeros(2, processes.rank + 1)),
    }.items():
        try:
            call()
        except (RunError, ValueError) as error:
            found[name] = str(error)
    for bucket in (2**24, 16):  # in one collective, and in several
        module.BUCKET = bucket
        parameters = layers(processes.rank)
        processes.sum_gradients(parameters)
        found[f"gradients {bucket}"] = [None if p.grad is None else p.grad for p in parameters]
    for tracker in ("wandb", "trackio", "tensorboard"):
        for done in (0, 1):
            logging = LoggingConfig(tracker=tracker, project="alley")
            processes.start_tracking(RunConfig(out=str(folder / "run"), logging=logging), done)
            row = {"reward": 0.5, "kl": None, "seconds": {"score": 1.5}, "warning": "careful"}
            processes.track(row, done + 1)
    processes.barrier()
    processes.finish()
    torch.save(found, folder / f"{processes.rank}.pt")


STUB = """
import json, os
calls = []
def note(*what):
    with open(os.environ["CALLS"] + "." + os.environ["RANK"], "a") as file:
        file.write(json.dumps([__name__, *what]) + "\\n")
class Run:
    def log(self, values, step=None): note("log", values, step)
    def finish(self): note("finish")
class Config:
    def update(self, values, **more): note("config", {k: values[k] for k in ("seed", "penalty.gamma")})
config = Config()
def init(**options): note("init", options); return Run()
class SummaryWriter:
    def __init__(self, folder, **options): note("init", options | {"folder": str(folder)})
    def add_scalar(self, key, value, global_step): note("log", {key: value}, global_step)
    add_text = add_scalar
    def add_hparams(self, values, metric_dict): note("config", {k: values[k] for k in ("seed", "penalty.gamma")})
    def flush(self): pass
    def close(self): note("finish")
"""


def stubs(folder):
    """Packages by the trackers' names that write down how accelerate calls them."""
    for name in ("wandb", "trackio", "tensorboardX"):
        (folder / f"{name}.py").write_text(STUB)
        (folder / f"{name}-9.dist-info").mkdir()
        (folder / f"{name}-9.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9\n")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder with the results of two processes, begun as torchrun begins them."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "packages").mkdir()
    stubs(folder / "packages")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_process_group, pathlib; "
    code += f"test_process_group.work(pathlib.Path({str(folder)!r}))"
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder / 'packages'}", "CALLS": str(folder / "calls"),
        "CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": str(WORLD),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return folder


@pytest.fixture(scope="module")
def results(two):
    return [torch.load(two / f"{rank}.pt") for rank in range(WORLD)]


def same_bits(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.contiguous().view(-1).view(torch.uint8).equal(
        b.contiguous().view(-1).view(torch.uint8)
    )


def test_two_processes_know_each_other(results):
    assert [r["identity"] for r in results] == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]
    assert [r["share"] for r in results] == [[0, 1, 2], [3, 4, 5]]
    expected = [{"rank": 0, "n": 0}, {"rank": 1, "n": 0}, {"rank": 1, "n": 1}]
    assert [r["objects"] for r in results] == [expected, expected]
    assert [r["flags"] for r in results] == [[False, True, True]] * 2


@pytest.mark.parametrize("name", pieces(0))
def test_gather_joins_in_rank_order(results, name):
    expected = torch.cat([pieces(rank)[name] for rank in range(WORLD)])
    for result in results:
        assert same_bits(result["gather"][name], expected)


def test_totals(results):
    expected = sum(pieces(rank)["float64"][:3] for rank in range(WORLD))
    for result in results:
        assert same_bits(result["total"][0], expected)
        assert result["total"][1].item() == 3


@pytest.mark.parametrize("bucket", [2**24, 16])
def test_gradients_are_summed(results, bucket):
    mine, other = layers(0), layers(1)
    for place, (a, b) in enumerate(zip(mine, other, strict=True)):
        found = [r[f"gradients {bucket}"][place] for r in results]
        if a.grad is None and b.grad is None:
            assert found == [None, None]
            continue
        parts = [p.grad.float() for p in (a, b) if p.grad is not None]
        for grad in found:
            assert same_bits(grad, sum(parts).to(a.dtype))


def test_what_cannot_be_shared_is_refused_on_all_ranks(results):
    for result in results:
        assert "2 processes cannot share 3 prompts evenly" in result["odd share"]
        assert "rows take [4, 8] bytes" in result["widths"]


def test_trackers_are_told_by_the_main_rank_alone(two):
    assert not (two / "calls.1").exists()
    calls = [json.loads(line) for line in (two / "calls.0").read_text().splitlines()]
    run_id = (two / "run" / "tracking" / "id").read_text()
    seen = {name: [call[1:] for call in calls if call[0] == name] for name in ("wandb", "trackio", "tensorboardX")}
    flat = {"reward": 0.5, "seconds/score": 1.5, "warning": "careful"}
    config = ["config", {"seed": 0, "penalty.gamma": 1.0}]

    wandb = {"id": run_id, "name": "run", "dir": str(two / "run" / "tracking"), "resume": "allow", "project": "alley"}
    once = [["init", wandb], config, ["log", flat, 1], ["finish"]]
    assert seen["wandb"] == [*once, ["init", wandb], ["log", flat, 2], ["finish"]]  # the same run: its id, and resumed
    trackio = {"name": f"run-{run_id}", "resume": "allow", "project": "alley"}
    again = [["init", trackio], ["log", flat, 1], ["finish"], ["init", trackio], ["log", flat, 2], ["finish"]]
    assert seen["trackio"] == again
    if importlib.util.find_spec("tensorboard") is None:  # accelerate then takes tensorboardX
        inits = [options for kind, *rest in seen["tensorboardX"] if kind == "init" for options in rest]
        where = str(two / "run" / "tracking" / "alley")
        assert inits == [{"purge_step": 1, "folder": where}, {"purge_step": 2, "folder": where}]
        logged = [rest for kind, *rest in seen["tensorboardX"] if kind == "log"]
        assert logged == [[{key: value}, step] for step in (1, 2) for key, value in flat.items()]


def test_alone_everything_is_what_it_was():
    processes = Processes()
    assert (processes.rank, processes.world, processes.main) == (0, 1, True)
    assert processes.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    for tensor in pieces(0).values():
        assert same_bits(processes.gather(tensor), tensor)
        if tensor.dtype != torch.bool:
            assert same_bits(processes.total(tensor), tensor)
    items = [object(), object()]
    assert processes.gather_objects(items) == processes.share(items) == items
    parameters = layers(0)
    before = [p.grad for p in parameters]
    processes.sum_gradients(parameters)
    assert all(p.grad is grad for p, grad in zip(parameters, before, strict=True))
    assert [processes.broadcast_flag(flag) for flag in (False, True)] == [False, True]
    x = torch.ones(2, requires_grad=True)
    assert not processes.gather(x * 2).requires_grad
    with pytest.raises(ValueError, match="got a scalar"):
        processes.gather(torch.tensor(1.0))
    with pytest.raises(ValueError, match="truth values"):
        processes.total(torch.tensor([True]))
    processes.track({"reward": 1.0}, 1)  # no tracker: nothing happens
    processes.finish()


def test_a_tracker_that_is_not_there_is_named(tmp_path, monkeypatch):
    import accelerate.tracking

    config = RunConfig(out=str(tmp_path / "run"))
    processes = Processes()
    processes.start_tracking(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    for tracker in ("tensorboard", "wandb", "trackio"):
        wanted = dataclasses.replace(config, logging=LoggingConfig(tracker=tracker))
        with pytest.raises(RunError, match=f"needs the package {tracker}"):
            processes.start_tracking(wanted)
    assert not (tmp_path / "run").exists()


def test_flatten():
    tree = {"a": {"b": {"c": 1}, "d": None}, "e": (1, 2), "f": True, "g": {}}
    assert dict(flatten(tree, "/")) == {"a/b/c": 1, "a/d": None, "e": "(1, 2)", "f": True}


def test_importing_the_engine_brings_no_accelerate():
    code = "import sys, fpo_train.processes; print('accelerate' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
