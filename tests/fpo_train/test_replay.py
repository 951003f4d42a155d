"""The labelled pairs that are kept."""

import io

import pytest
import torch

from fpo_train.data.prompts import Prompt
from fpo_train.reward_model.replay import Pair, Replay


def pair(n, preference=0.5, features=True):
    prompt = Prompt(name=f"p{n}", text=f"prompt {n}", ids=(1, n))
    own = (torch.full((3,), float(n)), torch.zeros(3)) if features else None
    return Pair(prompt=prompt, chosen=(n,), reference=(n, 2), chosen_text="a", reference_text="b",
                preference=preference, iteration=n, features=own)  # fmt: skip


def test_the_newest_stay():
    replay = Replay(4)
    replay.add(pair(n) for n in range(1, 7))
    assert len(replay) == 4
    assert [p.iteration for p in replay.newest(2)] == [5, 6]
    assert [p.iteration for p in replay.newest(10)] == [3, 4, 5, 6]
    assert replay.newest(0) == []
    assert [p.iteration for p in replay.since(4)] == [5, 6]


def test_draws_are_of_older_pairs_without_repetition():
    replay = Replay(20)
    replay.add(pair(n) for n in range(1, 13))
    drawn = [p.iteration for p in replay.draw(5, torch.Generator().manual_seed(1), until=8)]
    assert drawn == [p.iteration for p in replay.draw(5, torch.Generator().manual_seed(1), until=8)]
    assert drawn != [p.iteration for p in replay.draw(5, torch.Generator().manual_seed(2), until=8)]
    assert len(set(drawn)) == 5
    assert max(drawn) <= 8
    assert len(replay.draw(50, torch.Generator(), until=8)) == 8
    assert replay.draw(3, torch.Generator(), until=0) == []


def test_state_goes_through_a_file_of_plain_things():
    replay, file = Replay(4), io.BytesIO()
    replay.add([pair(1), pair(2, 0.9, features=False)])
    torch.save(replay.state_dict(), file)
    file.seek(0)
    again = Replay(4)
    again.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(again.newest(9), replay.newest(9), strict=True):
        assert (a.prompt, a.chosen, a.reference, a.preference) == (b.prompt, b.chosen, b.reference, b.preference)
        assert (a.features is None) == (b.features is None)
    assert torch.equal(again.newest(2)[0].features[0], torch.ones(3))


@pytest.mark.parametrize("preference", [float("nan"), -0.1, 1.1])
def test_what_is_no_label(preference):
    with pytest.raises(ValueError, match="preference"):
        pair(1, preference)
