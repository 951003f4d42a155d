"""`CheckpointStore`: what is written is read back bit for bit, and a save is there whole or not at all."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fpo_kernels as fk
from tests.fpo_kernels.tiny import tiny_llama


def small(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_is_read_back_in_the_order_of_steps(tmp_path, dtype):
    store = fk.CheckpointStore(tmp_path / "made" / "by the first save")
    assert (len(store), store.steps, list(store)) == (0, (), [])
    rates = {20: 0.1 + 0.2, 3: 5e-324, 100: 0.0, 0: 1e308}
    states = {}
    for step, rate in rates.items():
        model = small(step, dtype)
        returned = store.save(model, step=step, learning_rate=rate)
        assert (returned.step, returned.learning_rate) == (step, rate)
        states[step] = dict(model.named_parameters())
    again = fk.CheckpointStore(str(store.folder))
    assert (len(again), again.steps) == (4, (0, 3, 20, 100))
    assert [(c.step, c.learning_rate) for c in again] == sorted(rates.items())
    for checkpoint in again:
        loaded, expected = checkpoint.load(), states[checkpoint.step]
        assert set(loaded) == set(checkpoint.names) == set(expected)
        assert all(loaded[n].dtype == dtype and torch.equal(loaded[n], expected[n]) for n in loaded)


def test_only_what_requires_grad_now_and_shared_parameters_once(tmp_path):
    model = tiny_llama(1, torch.float32, tie_word_embeddings=True)
    model.tied = nn.Linear(24, 61, bias=False)
    model.tied.weight = model.model.embed_tokens.weight
    store = fk.CheckpointStore(tmp_path)
    assert set(store.save(model, step=1, learning_rate=1).names) == {name for name, _ in model.named_parameters()}
    model.requires_grad_(False)
    model.score.requires_grad_(True)
    model.tied.requires_grad_(True)
    checkpoint = store.save(model, step=2, learning_rate=1)
    assert checkpoint.names == ("model.embed_tokens.weight", "score.weight")
    assert checkpoint.path.stat().st_size < 4 * (61 * 24 + 24) + 1000


def test_parameters_that_are_views_of_one_buffer(tmp_path):
    model, flat = small(2), torch.randn(1000)
    with torch.no_grad():
        model[0].weight.data = flat[:12].view(3, 4).T
        model[0].bias.data = flat[4:8]
        model[2].weight.data = flat[4:8].view(1, 4)
    (checkpoint,) = [fk.CheckpointStore(tmp_path).save(model, step=1, learning_rate=1)]
    loaded = checkpoint.load()
    assert all(torch.equal(loaded[name], p) for name, p in model.named_parameters())
    assert checkpoint.path.stat().st_size < 1500


def test_a_step_is_replaced_only_on_request(tmp_path):
    store, first, second = fk.CheckpointStore(tmp_path), small(3), small(4)
    store.save(first, step=7, learning_rate=0.5)
    with pytest.raises(FileExistsError, match="step=7 is already in"):
        store.save(second, step=7, learning_rate=0.25)
    (kept,) = store
    assert kept.learning_rate == 0.5
    assert torch.equal(kept.load()["0.weight"], first[0].weight)
    store.save(second, step=7, learning_rate=0.25, overwrite=True)
    (kept,) = store
    assert kept.learning_rate == 0.25
    assert torch.equal(kept.load()["0.weight"], second[0].weight)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    store = fk.CheckpointStore(tmp_path)
    store.save(small(5), step=1, learning_rate=1)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.save(small(6), step=2, learning_rate=1)
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]


KILLED = """
import sys, torch, fpo_kernels as fk
model = torch.nn.Linear(2000, 2000)
store = fk.CheckpointStore(sys.argv[1])
for step in range(10_000):
    torch.nn.init.constant_(model.weight, step)
    store.save(model, step=step, learning_rate=step)
    print(step, flush=True)
"""


def test_a_killed_save_is_not_there_and_is_cleared_away(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        lines = [child.stdout.readline() for _ in range(3)]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # kill it while a file is half written
            halves = [p for p in tmp_path.glob(".*") if p.name.endswith(".partial")]
            try:
                if halves and halves[0].stat().st_size > 0:
                    break
            except FileNotFoundError:
                continue
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    told = [int(line) for line in lines if line.strip()]
    store = fk.CheckpointStore(tmp_path)
    assert store.steps[: len(told)] == tuple(told)
    assert len(store) <= len(told) + 1  # the last may have been renamed and not told of
    for checkpoint in store:
        assert checkpoint.learning_rate == checkpoint.step
        assert bool((checkpoint.load()["weight"] == checkpoint.step).all())
    (tmp_path / ".9-0123456789abcdef.partial").write_bytes(b"half")
    (tmp_path / ".gitkeep").touch()
    assert len(store) <= len(told) + 1
    store.save(small(7), step=20_000, learning_rate=1)
    assert [path.name for path in tmp_path.glob(".*")] == [".gitkeep"]


def test_refuses_what_would_make_no_checkpoint(tmp_path):
    store, model = fk.CheckpointStore(tmp_path / "none"), small(8)
    for step, rate, message in [
        (-1, 1.0, "step=-1"),
        (1, -0.1, "learning_rate=-0.1"),
        (1, float("nan"), "learning_rate=nan"),
        (1, float("inf"), "learning_rate=inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.save(model, step=step, learning_rate=rate)
    with pytest.raises(TypeError):
        store.save(model, step=1.5, learning_rate=1)
    with pytest.raises(ValueError, match="no parameter of Sequential requires grad"):
        store.save(small(9).requires_grad_(False), step=1, learning_rate=1)
    with torch.no_grad():
        model[2].weight[0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"2\.weight: not every weight is finite"):
        store.save(model, step=1, learning_rate=1)

    class FullyShardedDataParallel(nn.Sequential):
        pass

    with pytest.raises(TypeError, match="FSDP"):
        store.save(FullyShardedDataParallel(small(10)), step=1, learning_rate=1)
    assert not store.folder.exists()


def test_refuses_folders_and_files_of_others(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        fk.CheckpointStore(tmp_path / "file")
    with pytest.raises(ValueError, match=r"folder of checkpoints alone, found 'file'"):
        fk.CheckpointStore(tmp_path)
    store = fk.CheckpointStore(tmp_path / "own")
    path = store.save(small(11), step=1, learning_rate=1).path
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"1\.safetensors: damaged"):
            list(store)
    path.write_bytes(whole)
    path.rename(path.with_name("2.safetensors"))
    with pytest.raises(ValueError, match="of step 2, its metadata is"):
        list(store)
    save_file({"weight": torch.zeros(2)}, path.with_name("2.safetensors"))
    with pytest.raises(ValueError, match=r"its metadata is \{\}"):
        list(store)
