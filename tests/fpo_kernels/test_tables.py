"""Where the small tables that kernels read are made: of a recorded pass, in memory that was there before it."""

import itertools

import numpy as np
import pytest
import torch

from fpo_kernels.streams import counted_tables, fill, sent, table, tables_apart

CPU = torch.device("cpu")
LISTED = np.arange(70, dtype=np.int32)
TOLD = np.arange(12, dtype=np.int64).reshape(3, 4) - 5


def made() -> list[torch.Tensor]:
    later = table([5], torch.int64, CPU)
    fill(later, np.arange(5))
    return [sent(LISTED, CPU), sent(TOLD, CPU), later]


def values(tables: list[torch.Tensor]) -> list[list]:
    return [one.tolist() for one in tables]


def test_tables_of_a_recording_lie_in_one_memory_and_are_filled_after_it() -> None:
    with counted_tables() as room:
        plain = made()
    assert values(plain) == [LISTED.tolist(), TOLD.tolist(), list(range(5))]
    with tables_apart(room) as tables:
        before = torch.empty(1)  # nothing that is allocated meanwhile lies there
        ours = made()
        assert len({one.untyped_storage().data_ptr() for one in ours}) == 1
        assert before.untyped_storage().data_ptr() != ours[0].untyped_storage().data_ptr()
        spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in ours)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        for one in ours:
            assert one.data_ptr() % 8 == 0
            one.fill_(-1)
    assert values(ours) != values(plain)
    tables.fill()
    assert values(ours) == values(plain)
    assert [one.dtype for one in ours] == [one.dtype for one in plain]
    assert values(made()) == values(plain)  # as before, once it is over


def test_other_tables_than_were_counted_are_refused() -> None:
    with counted_tables() as room:
        sent(TOLD, CPU)
    with tables_apart(room):
        sent(TOLD, CPU)
        with pytest.raises(RuntimeError, match="other tables"):
            sent(TOLD, CPU)
    with tables_apart({}), pytest.raises(RuntimeError, match="other tables"):
        sent(TOLD, CPU)
