"""SketchStore: what goes in comes out, what does not fit is refused, and searches equal brute force."""

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fpo_kernels as fk

ROOT = Path(__file__).parent.parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def space(dim=5, **fields):
    return fk.SketchSpace(**{"dim": dim, "seed": 0, "layers": ("a", "b"), "model": "0f"} | fields)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def filled(tmp_path):
    """A store of nine rows in three appends."""
    sketches, ids = torch.randn(9, 5), [f"e{row}" for row in range(9)]
    with fk.SketchStore(tmp_path / "store", space()) as store:
        for rows in (slice(0, 4), slice(4, 5), slice(5, 9)):
            store.append(sketches[rows], ids[rows])
    return store, sketches, ids


names = st.text(st.characters(exclude_categories=("Cs",)), max_size=5) | st.integers(-(2**70), 2**70)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.lists(names, max_size=6), max_size=5),
    dim=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_what_goes_in_comes_out(tmp_path_factory, batches, dim, dtype, seed, data):
    folder = tmp_path_factory.mktemp("round") / "trip"
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(len(batch), dim, generator=generator, dtype=torch.float64) for batch in batches]
    with fk.SketchStore(folder, space(dim), dtype=dtype) as store:
        for part, batch in zip(parts, batches, strict=True):
            store.append(part, batch, space(dim))
    expected = torch.cat([*parts, torch.empty(0, dim)]).to(dtype)
    ids = [name for batch in batches for name in batch]
    for kept in (store, fk.SketchStore(folder), fk.SketchStore(str(folder), space(dim), dtype=dtype)):
        assert len(kept) == len(kept.ids) == len(ids)
        assert list(kept.ids) == kept.ids[:] == ids
        assert [type(name) for name in kept.ids] == [type(name) for name in ids]
        assert torch.equal(kept.read(), expected)
        kept.verify()
    if ids:
        rows = data.draw(st.lists(st.integers(-len(ids), len(ids) - 1), max_size=8))
        assert torch.equal(kept[rows], expected[rows])
        assert torch.equal(kept[torch.tensor(rows, dtype=torch.int64)], expected[rows])
        assert [kept.ids[row] for row in rows] == [ids[row] for row in rows]
        assert all(torch.equal(kept[row], expected[row]) for row in rows)
    start, stop = (data.draw(st.none() | st.integers(-12, 12)) for _ in range(2))
    assert torch.equal(kept.read(start or 0, stop), expected[slice(start or 0, stop)])
    assert torch.equal(kept[start:stop], expected[slice(start, stop)])
    assert kept.ids[start:stop] == ids[slice(start, stop)]
    assert torch.equal(kept[::-2], expected.flip(0)[::2])


def test_copies_are_the_callers_own(filled):
    store, sketches, _ = filled
    for copy in (store[2], store[1:4], store[[2]], store.read(0, 3)):
        copy.zero_()
    assert torch.equal(store.read(), sketches)


def test_an_id_may_come_again(tmp_path):
    store = fk.SketchStore(tmp_path / "s", space())
    for value in (1.0, 2.0):
        store.append(torch.full((1, 5), value), ["twice"])
    assert list(store.ids) == ["twice", "twice"]
    assert store.read()[:, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("rows", [9, -10, [0, 9]])
def test_rows_that_are_not_there(filled, rows):
    store, *_ = filled
    with pytest.raises(IndexError):
        store[rows]
    if isinstance(rows, int):
        with pytest.raises(IndexError):
            store.ids[rows]


@pytest.mark.parametrize("rows", [0.5, [0.5], torch.tensor([True] * 9), [[1]], "a"])
def test_rows_that_are_no_integers(filled, rows):
    with pytest.raises(TypeError, match="wanted an integer"):
        filled[0][rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, r"space\.seed: 7 was given, the store in .* has 0"),
        ({"dim": 6}, r"space\.dim: 6 was given, .* has 5"),
        ({"model": "ff"}, r"space\.model: 'ff' was given, .* has '0f'"),
        ({"maps": 2}, r"space\.maps: 2 was given, .* has 1"),
        (
            {"layers": ("b", "c", "d")},
            r"space\.layers: 3 were given, .* has 2: 'c' and 1 more only among given, 'a' only among the store's",
        ),
    ],
)
def test_another_space_is_refused(filled, change, message):
    store, *_ = filled
    before = contents(store.folder)
    with pytest.raises(ValueError, match=message):
        fk.SketchStore(store.folder, space(**change))
    with pytest.raises(ValueError, match=message):
        store.append(torch.ones(1, 5), ["x"], space(**change))
    assert contents(store.folder) == before


def test_layers_have_no_order(filled):
    assert fk.SketchStore(filled[0].folder, space(layers=["b", "a"])).space == space()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: wanted at least 1, got 0"),
        ({"dim": 2.0}, TypeError, r"dim: wanted an integer, got 2\.0"),
        ({"seed": True}, TypeError, "seed: wanted an integer"),
        ({"layers": "weight"}, TypeError, "layers: wanted parameter names"),
        ({"layers": ()}, ValueError, "at least one name"),
        ({"layers": ("a", "a")}, ValueError, "none twice"),
        ({"model": None}, TypeError, "model: wanted a fingerprint"),
    ],
)
def test_spaces_that_are_none(fields, error, message):
    with pytest.raises(error, match=message):
        space(**fields)


def test_folders_that_are_refused(filled, tmp_path):
    with pytest.raises(FileNotFoundError, match="give space"):
        fk.SketchStore(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"is no store: there is no header\.json"):
        fk.SketchStore(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt' and no header\.json"):
        fk.SketchStore(tmp_path / "other", space())
    with pytest.raises(ValueError, match="is a file"):
        fk.SketchStore(tmp_path / "file", space())
    assert contents(tmp_path / "other") == {"notes.txt": b"mine"}
    store, *_ = filled
    with pytest.raises(ValueError, match=r"dtype: torch\.float16 was given, .* has torch\.float32"):
        fk.SketchStore(store.folder, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype: wanted one of torch\.float32"):
        fk.SketchStore(tmp_path / "new", space(), dtype=torch.int8)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"format": 2}, {"dtype": "int4"}, {"space": {"dim": 5}}, None])
def test_headers_that_cannot_be_read(filled, change):
    path = filled[0].folder / "header.json"
    path.write_text("[" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"reads 1|is no store's|cannot be read"):
        fk.SketchStore(filled[0].folder)


@pytest.mark.parametrize(
    ("sketches", "ids", "message"),
    [
        (torch.ones(2, 6), ["a", "b"], r"sketches: wanted floating point \(n, 5\), got torch\.float32 \(2, 6\)"),
        (torch.ones(5), ["a"], r"got torch\.float32 \(5,\)"),
        (torch.ones(0, 4), [], r"\(0, 4\)"),
        (torch.ones(2, 5, dtype=torch.int64), ["a", "b"], r"got torch\.int64"),
        (torch.ones(2, 5), ["a"], "ids: wanted 2, one a sketch, got 1"),
        (torch.ones(2, 5), "ab", "ids: wanted 2, one a sketch, got ab"),
        (torch.ones(2, 5), ["a", 0.5], r"ids\[1\]: wanted Unicode text or an integer, got 0\.5"),
        (torch.ones(2, 5), [True, "a"], r"ids\[0\]: .* got True"),
        (torch.ones(1, 5), ["\ud800"], r"ids\[0\]: wanted Unicode text"),
        (torch.tensor([[1.0] * 5, [1, 1, float("nan"), 1, 1]]), ["a", "b"], r"sketches\[1\], of 'b': not finite"),
        (torch.tensor([[float("-inf")] * 5]), [3], r"sketches\[0\], of 3: not finite in torch\.float32"),
        (torch.full((1, 5), 1e39, dtype=torch.float64), ["a"], r"not finite in torch\.float32"),
    ],
)
def test_appends_that_are_refused(filled, sketches, ids, message):
    store, *_ = filled
    before = contents(store.folder)
    with pytest.raises(ValueError, match=message):
        store.append(sketches, ids)
    assert contents(store.folder) == before
    assert len(store) == 9


def test_a_reader_sees_what_it_opened_until_it_refreshes(filled):
    store, *_ = filled
    reader = fk.SketchStore(store.folder)
    store.append(torch.ones(2, 5), [10, 11])
    assert (len(store), len(reader), len(reader.ids), len(reader.read())) == (11, 9, 9, 9)
    assert reader.top(torch.ones(1, 5), 20).rows.shape == (1, 9)
    assert reader.refresh() == 11
    assert reader.ids[-2:] == [10, 11]


def test_a_reader_beside_a_writer_reads_finished_rows_only(tmp_path):
    store = fk.SketchStore(tmp_path / "s", space(64))

    def write():
        for first in range(0, 600, 3):
            rows = torch.arange(first, first + 3)
            store.append(rows[:, None].expand(-1, 64).float(), rows.tolist())

    reader, seen, writing = fk.SketchStore(store.folder), set(), threading.Thread(target=write)
    writing.start()
    while writing.is_alive() or len(reader) < 600:
        seen.add(reader.refresh())
        assert len(reader) % 3 == 0
        assert torch.equal(reader[-3:], reader[-3:][:, :1].expand(-1, 64))
        assert reader.ids[-3:] == reader[-3:][:, 0].int().tolist()
    writing.join()
    assert len(seen) > 5
    reader.verify()


def test_a_store_travels_to_another_process(filled):
    store, sketches, _ = filled
    store.append(torch.ones(1, 5), ["last"])  # it is the writer now, and its copy is not
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.read(), torch.cat([sketches, torch.ones(1, 5)]))
    with pytest.raises(RuntimeError, match="another writer"):
        copy.append(torch.ones(1, 5), ["x"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 40),
    dim=st.integers(1, 7),
    queries=st.integers(0, 5),
    count=st.integers(1, 12),
    largest=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    block=st.integers(1, 60),
)
def test_top_is_brute_force(tmp_path_factory, rows, dim, queries, count, largest, dtype, wide, seed, block):
    generator = np.random.default_rng(seed)
    # Small integers: every sum is exact and ties abound.
    sketches = torch.from_numpy(generator.integers(-2, 3, (rows, dim))).float()
    asked = torch.from_numpy(generator.integers(-2, 3, (queries, dim))).to(torch.float64 if wide else dtype)
    store = fk.SketchStore(tmp_path_factory.mktemp("top") / "s", space(dim), dtype=dtype)
    store.append(sketches, [f"{row}" for row in range(rows)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpo_kernels.store.BLOCK_NUMBERS", block)
        patch.setattr("fpo_kernels.store.QUERIES", 2)
        found = store.top(asked, count, largest)
    products = asked.double() @ sketches.double().T
    order = products.sort(dim=1, descending=largest, stable=True)
    assert found.scores.dtype == (torch.float64 if wide else torch.float32)
    assert found.rows.tolist() == order.indices[:, :count].tolist()
    assert torch.equal(found.scores.double(), order.values[:, :count])
    assert found.ids == [[f"{row}" for row in line] for line in found.rows.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_adds_up_in_fp32(tmp_path, dtype):
    sketches, queries = torch.randn(70, 1024).to(dtype), torch.randn(3, 1024)
    store = fk.SketchStore(tmp_path / "s", space(1024), dtype=dtype)
    store.append(sketches, range(70))
    exact = queries.double() @ sketches.double().T
    rounding = 1024 * torch.finfo(torch.float32).eps * (queries.abs() @ sketches.float().abs().T).max()
    found = store.top(queries, 70)
    assert (found.scores - exact.gather(1, found.rows)).abs().max() < rounding
    assert sorted(found.ids[0]) == list(range(70))


@pytest.mark.parametrize(
    ("queries", "count", "message"),
    [
        (torch.ones(1, 6), 1, r"queries: wanted floating point \(m, 5\), got torch\.float32 \(1, 6\)"),
        (torch.ones(5), 1, r"\(5,\)"),
        (torch.ones(1, 5, dtype=torch.int32), 1, r"torch\.int32"),
        (torch.full((1, 5), float("inf")), 1, "queries: not finite"),
        (torch.ones(1, 5), 0, "count: wanted at least 1, got 0"),
    ],
)
def test_queries_that_are_refused(filled, queries, count, message):
    with pytest.raises(ValueError, match=message):
        filled[0].top(queries, count)


HUNGRY = """
import sys, torch, fpo_kernels as fk
from benchmarks.meters import high_water_bytes
store = fk.SketchStore(sys.argv[1])
queries = torch.randn(16, 1024)
torch.randn(16, 1024) @ torch.randn(1024, 1024)  # what the library takes for itself
before = high_water_bytes()
store.top(queries)
print(high_water_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_searching_holds_a_block_and_not_the_store(tmp_path):
    batch = torch.randn(4096, 1024)
    with fk.SketchStore(tmp_path / "s", space(1024)) as store:
        for first in range(0, 13 * 4096, 4096):
            store.append(batch, range(first, first + 4096))
    held = subprocess.run(
        [sys.executable, "-c", HUNGRY, str(store.folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (store.folder / "rows.bin").stat().st_size > 200 * 2**20
    assert int(held.stdout) < 60 * 2**20
