"""SketchStore: killed, cut, without power, on a full disk, between writers, it has finished appends and no others."""

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fpo_kernels as fk
from fpo_kernels import durable

ROOT = Path(__file__).parent.parent.parent
SPACE = fk.SketchSpace(dim=64, seed=0, layers=("a",), model="0f")
BATCH = 7
FILES = ("rows.bin", "ids.bin", "log.bin")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="appending needs POSIX")


def numbered(first, count=BATCH):
    """Rows first to first + count, each with its number everywhere, and their ids."""
    rows = torch.arange(first, first + count)
    return rows[:, None].expand(-1, SPACE.dim).float(), [f"row {row}" if row % 2 else row for row in rows.tolist()]


def assert_whole(store):
    sketches, ids = numbered(0, len(store))
    assert torch.equal(store.read(), sketches)
    assert list(store.ids) == ids
    store.verify()


def read_files(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)


# Loads torch once and forks a writer a line: each appends until it is killed, and tells what has been appended.
# Their disk takes a moment, as on a temporary file system it would not: kills are to meet unfinished appends.
NURSERY = """
import os, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_store_crash import numbered
import fpo_kernels as fk
from fpo_kernels import durable
sync = durable._synced
durable._synced = lambda handle: (time.sleep(0.001), sync(handle))
for _ in sys.stdin:
    child = os.fork()
    if not child:
        store = fk.SketchStore(sys.argv[1])
        os.write(1, b"%d %d\\n" % (os.getpid(), len(store)))
        while True:
            store.append(*numbered(len(store)))
            os.write(1, b"%d %d\\n" % (os.getpid(), len(store)))
    os.waitpid(child, 0)
    os.write(1, b"end\\n")
"""


def test_twenty_kills_lose_nothing_but_the_unfinished_append(tmp_path):
    fk.SketchStore(tmp_path / "s", SPACE)
    command = [sys.executable, "-c", NURSERY, str(tmp_path / "s"), str(Path(__file__).parent)]
    chance, unfinished = random.Random(0), 0
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        for turn in range(20):
            print(file=nursery.stdin, flush=True)
            for _ in range(1 + turn % 2):  # every other one is given the time for an append
                pid, told = (int(word) for word in nursery.stdout.readline().split())
            time.sleep(chance.uniform(0, 0.08))
            os.kill(pid, signal.SIGKILL)
            for line in iter(nursery.stdout.readline, "end\n"):
                told = int(line.split()[1])
            store = fk.SketchStore(tmp_path / "s")
            assert told <= len(store) <= told + BATCH
            assert_whole(store)
            unfinished += (tmp_path / "s" / "rows.bin").stat().st_size > len(store) * 4 * SPACE.dim
            with store:  # neither the lock nor the tail stands in the way of the next
                store.append(*numbered(len(store)))
            assert_whole(store)
        nursery.stdin.close()
    assert unfinished, "no kill met an append"


def cuts(before, after):
    """Of what an append adds to a file: nothing, one byte, all but one byte, all."""
    return sorted({len(before), len(before) + 1, len(after) - 1, len(after)})


@pytest.mark.parametrize("appends", [0, 1, 3])
def test_an_append_cut_at_any_file_and_byte_is_dropped_whole(tmp_path, appends):
    folder = tmp_path / "s"
    with fk.SketchStore(folder, SPACE) as store:
        for number in range(appends):
            store.append(*numbered(number * BATCH))
        before = read_files(folder)
        store.append(*numbered(appends * BATCH))
    after = read_files(folder)
    states = [
        {"rows.bin": after["rows.bin"][:rows], "ids.bin": after["ids.bin"][:ids], "log.bin": before["log.bin"]}
        for rows in cuts(before["rows.bin"], after["rows.bin"])
        for ids in cuts(before["ids.bin"], after["ids.bin"])
    ]
    tail = len(before["log.bin"])
    states += [{**after, "log.bin": after["log.bin"][:log]} for log in range(tail, len(after["log.bin"]))]
    # Sizes that reached the disk without their bytes, and bytes of no meaning.
    record = durable.RECORD.itemsize
    states += [{**after, "log.bin": before["log.bin"] + filler} for filler in (bytes(record), b"\xff" * record)]
    states += [{**after, "log.bin": after["log.bin"][:-4] + bytes(4)}]
    for state in states:
        write_files(folder, state)
        with fk.SketchStore(folder) as store:
            assert len(store) == appends * BATCH
            assert_whole(store)
            assert read_files(folder) == state, "reading changed something"
            store.append(*numbered(len(store)))
            assert_whole(store)
            assert read_files(folder) == after


def test_no_longer_tail_is_left_behind_a_shorter_append(tmp_path):
    folder = tmp_path / "s"
    with fk.SketchStore(folder, SPACE) as store:
        store.append(*numbered(0))
        for name in FILES[:2]:
            with open(folder / name, "ab") as file:
                file.write(b"unfinished" * 1000)
    with fk.SketchStore(folder) as store:
        store.append(*numbered(BATCH, 1))
    assert_whole(store)
    assert (folder / "rows.bin").stat().st_size == (BATCH + 1) * 4 * SPACE.dim
    assert (folder / "ids.bin").stat().st_size < 1000


def test_a_making_that_was_cut_is_taken_up(tmp_path):
    for leftovers in ([], ["lock"], ["lock", "header.json.tmp"], ["lock", "header.json.tmp", *FILES]):
        folder = tmp_path / f"s{len(leftovers)}"
        folder.mkdir()
        for name in leftovers:
            (folder / name).write_text("{" if name == "header.json.tmp" else "")
        assert len(fk.SketchStore(folder, SPACE)) == 0
        assert sorted(path.name for path in folder.iterdir()) == ["header.json", *sorted([*FILES, "lock"])]


def test_whatever_a_power_cut_leaves_has_all_finished_appends(tmp_path, monkeypatch):
    """The disk keeps what was synced, and of later writes any it likes."""
    folder = tmp_path / "s"
    store = fk.SketchStore(folder, SPACE)
    names, events = {}, []
    write, sync = os.pwrite, durable._synced

    def noted_write(handle, data, at):
        name = names.setdefault(handle, Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        events.append((name, bytes(data), at))
        return write(handle, data, at)

    def noted_sync(handle):
        sync(handle)
        events.append((names[handle], None, 0))

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here")
    monkeypatch.setattr(os, "pwrite", noted_write)
    monkeypatch.setattr(durable, "_synced", noted_sync)
    finished = [0]
    for number in range(3):
        store.append(*numbered(number * BATCH))
        finished.append(len(events))
    store.close()
    assert {name for name, data, _ in events if data is None} == set(FILES)
    states = 0
    for stop in range(len(events) + 1):
        safe, open_writes = dict.fromkeys(FILES, b""), []
        for event in events[:stop]:
            if event[1] is None:
                for name, data, at in [w for w in open_writes if w[0] == event[0]]:
                    safe[name] = safe[name][:at].ljust(at, b"\0") + data
                open_writes = [w for w in open_writes if w[0] != event[0]]
            else:
                open_writes.append(event)
        for lucky in itertools.product([False, True], repeat=len(open_writes)):
            state = dict(safe)
            for name, data, at in itertools.compress(open_writes, lucky):
                state[name] = state[name][:at].ljust(at, b"\0") + data
            write_files(folder, state)
            kept = fk.SketchStore(folder)
            least = sum(stop >= end for end in finished[1:])
            assert least * BATCH <= len(kept) <= (least + 1) * BATCH
            assert_whole(kept)
            states += 1
    assert states > 3 * 8


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_full_disk_adds_nothing(tmp_path, monkeypatch, broken):
    store, write, calls = fk.SketchStore(tmp_path / "s", SPACE), os.pwrite, itertools.count()
    store.append(*numbered(0))
    before = read_files(store.folder)

    def full(handle, data, at):
        if next(calls) == broken:
            write(handle, data[:5], at)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        store.append(*numbered(BATCH))
    monkeypatch.undo()
    assert len(store) == store.refresh() == BATCH
    assert_whole(fk.SketchStore(store.folder))
    store.append(*numbered(BATCH))
    assert_whole(store)
    assert {name: content[: len(before[name])] for name, content in read_files(store.folder).items()} == before


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_disk_that_does_not_sync_adds_nothing(tmp_path, monkeypatch, broken):
    store, calls = fk.SketchStore(tmp_path / "s", SPACE), itertools.count()
    store.append(*numbered(0))

    def failing(handle):
        if next(calls) == broken:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable, "_synced", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.append(*numbered(BATCH))
    monkeypatch.undo()
    assert fk.SketchStore(store.folder).refresh() == BATCH
    store.append(*numbered(BATCH))
    assert_whole(store)
    assert len(store) == 2 * BATCH


def test_short_writes_and_reads_are_gone_on_with(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: write(handle, data[:100], at))
    store = fk.SketchStore(tmp_path / "s", SPACE)
    store.append(*numbered(0))
    assert_whole(store)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(tmp_path, name):
    with fk.SketchStore(tmp_path / "s", SPACE) as store:
        for number in range(3):
            store.append(*numbered(number * BATCH))
    whole = read_files(store.folder)
    flipped = bytearray(whole[name])
    flipped[len(flipped) // 2] ^= 1
    write_files(store.folder, {name: bytes(flipped)})
    with pytest.raises(ValueError, match=r"damaged: rows 7 to 13 are not what was appended"):
        fk.SketchStore(store.folder).verify()
    write_files(store.folder, whole)
    assert_whole(store)
    lost = whole[name][:-1] if name != "log.bin" else whole[name][:-64] + bytes(64)
    write_files(store.folder, {name: lost})
    for damaged in (lambda: fk.SketchStore(store.folder), lambda: store.append(*numbered(21)), store.refresh):
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            damaged()
    assert (store.folder / name).read_bytes() == lost


def test_there_is_one_writer(tmp_path):
    first = fk.SketchStore(tmp_path / "s", SPACE)
    second = fk.SketchStore(tmp_path / "s", SPACE)
    first.append(*numbered(0))
    before = read_files(first.folder)
    with pytest.raises(RuntimeError, match="another writer has it, and there may be one at a time"):
        second.append(*numbered(0))
    assert read_files(first.folder) == before
    first.close()
    second.append(*numbered(BATCH))  # it takes up what the first left
    assert_whole(second)
    with pytest.raises(RuntimeError, match="another writer"):
        first.append(*numbered(BATCH))
    del second
    first.append(*numbered(2 * BATCH))
    assert_whole(first)


FORKING = """
import os, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_store_crash import BATCH, numbered
import fpo_kernels as fk
store = fk.SketchStore(sys.argv[1])
store.append(*numbered(0))
if not os.fork():
    try:
        store.append(*numbered(BATCH))
    except RuntimeError as refused:
        print(refused, flush=True)
    print(os.getpid(), flush=True)
    time.sleep(20)
time.sleep(20)
"""


def test_a_fork_neither_writes_nor_holds_the_lock(tmp_path):
    store = fk.SketchStore(tmp_path / "s", SPACE)
    command = [sys.executable, "-c", FORKING, str(store.folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert "another writer" in parent.stdout.readline()
        child = int(parent.stdout.readline())
        with pytest.raises(RuntimeError, match="another writer"):
            store.append(*numbered(BATCH))
        parent.kill()
        parent.wait()
        try:
            store.append(*numbered(BATCH))  # though the child lives
        finally:
            os.kill(child, signal.SIGKILL)
    assert len(store) == 2 * BATCH
    assert_whole(store)
