"""`fpo-train attribute`: the training pairs that taught a reward model to like, or to dislike, replies.

The folder holds `attributions.jsonl` (`table.Attribution.rows`), `config.yaml` and `environment.json` of the last
question, and `store/`, what was computed of the pairs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

import fpo_kernels as fk
from fpo_train.config import AttributeConfig
from fpo_train.data.sources import cached
from fpo_train.errors import RunError, about
from fpo_train.penalty.gradients import refusals
from fpo_train.report.progress import stage
from fpo_train.report.records import CONFIG, ENVIRONMENT, tidy
from fpo_train.running.folder import environment
from fpo_train.whole import write_text

from . import model as models
from .baselines import LONGEST, MINILM, Embedder, Lexical, nearest, text_of
from .gradients import UNSKETCHED, Known, Reader, Shelf, kept
from .influence import State, influences
from .inputs import Text, TrainingPair, read_pairs, read_replies
from .table import Attribution

STORE, RESULTS = "store", "attributions.jsonl"


def attribute(config: AttributeConfig) -> Path:
    """Say which pairs taught the reward model to like each reply; returns the file of the results.

    Raises:
        RunError: pairs, replies, checkpoints or a reward model that cannot be used, weights that it does not have or
            whose gradients cannot be told apart by example, or a folder that cannot be written.
    """
    out = Path(config.out).expanduser()
    if out.exists() and not out.is_dir():
        raise RunError(f"out: {out} is a file; wanted a folder")
    if (out / ENVIRONMENT).is_file() and not (out / RESULTS).is_file():
        raise RunError(f"out: {out} holds something else; choose another folder")
    pairs, replies = read_pairs(config), read_replies(config)
    settings = models.described(config.reward_model)
    if config.checkpoints:
        models.stored(config.checkpoints)
    with stage(f"loading {config.reward_model.model}"):
        model = models.load(config.reward_model, settings, _device())
    asked: list[Text] = [(reply.prompt, reply.text) for reply in replies]
    model.check([*asked, *(text for pair in pairs for text in pair.texts)])
    names = models.chosen(model, config.parameters)
    checkpoints = models.Checkpoints(config.checkpoints, model) if config.checkpoints else None
    reader = Reader(model, names, config.sketched, config.seed, config.rows_at_once)
    states = _States(out / STORE, reader, pairs, asked)
    labels = torch.tensor([pair.preference for pair in pairs], dtype=torch.float64)
    with refusals("damping"):
        found = influences(states.over(checkpoints), labels, config.damping if config.curvature else None)
    embedder, similarity = _embeddings(config, reader, states, pairs, asked)
    documents = Lexical(["\n\n".join([text_of(*pair.texts[0]), pair.rejected]) for pair in pairs])
    told = Attribution(
        replies=replies,
        pairs=pairs,
        rewards=states.rewards,
        margins=states.margins,
        influences=found,
        lexical=torch.stack([documents.scores(text_of(*one)) for one in asked]),
        embedding=similarity,
    )
    rows = list(told.rows(config.top))
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(tidy(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(out / RESULTS, text)
    write_text(out / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
    write_text(out / CONFIG, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))
    print(told.text(config.top))
    print(f"\n{_how(config, reader, checkpoints)}")
    print(f"BM25 and embedding are ranks among all pairs; {embedder}")
    print(f"pairs: {len(pairs)}, {states.found} of them known from {out / STORE}")
    return out / RESULTS


class _States:
    """The replies and pairs as states of the reward model see them.

    Attributes:
        known: what is known of the pairs by the reward model as it is. rewards, margins: by it too, (m,) and (n,).
        hidden: (m, H) what its head reads of the replies. found: pairs of which the gradients were on disk.
    """

    def __init__(self, root: Path, reader: Reader, pairs: Sequence[TrainingPair], asked: Sequence[Text]) -> None:
        self._root, self._reader, self._pairs, self._asked = root, reader, pairs, asked
        self.known = Known(root, reader, pairs, "pairs", gradients=False)
        self.hidden, self.margins = reader.hidden(asked).cpu(), self._margins(self.known)
        self.rewards, self.found = reader.rewards(self.hidden).cpu(), self.known.found

    def over(self, checkpoints: models.Checkpoints | None) -> Iterator[State]:
        """Its earlier states, each while the model is in it; the one of now where there are no checkpoints."""
        for number, rate in enumerate(checkpoints or [1.0], start=1):
            what = f"pairs at checkpoint {number}" if checkpoints else "gradients"
            known = Known(self._root, self._reader, self._pairs, what)
            self.found = min(self.found, known.found)
            _, gradients = self._reader.gradients(self._asked)
            yield State(replies=gradients.cpu(), margins=self._margins(known), pairs=known.differences, weight=rate)

    def _margins(self, known: Known) -> Tensor:
        rewards = self._reader.rewards(known.hidden().flatten(0, 1)).cpu()
        return rewards[::2] - rewards[1::2]


def _embeddings(
    config: AttributeConfig, reader: Reader, states: _States, pairs: Sequence[TrainingPair], asked: Sequence[Text]
) -> tuple[str, Tensor]:
    """Whose embeddings they are, in words, and how near each reply is to each pair, (m, n)."""
    if config.embedder == "reward_model" or (config.embedder == "auto" and not cached(MINILM)):
        return "embeddings are what the reward model's head reads", nearest(states.hidden, states.known.hidden())
    with about("embedder"):
        embedder = Embedder(reader.model.device)
    width, name = embedder.model.config.hidden_size, fk.fingerprint(embedder.model)
    space = fk.SketchSpace(dim=width, seed=LONGEST, layers=("mean over tokens",), model=name, maps=UNSKETCHED)
    texts = [text_of(*text) for pair in pairs for text in pair.texts]
    shelf = Shelf(Path(config.out).expanduser() / STORE, space)
    found = kept(shelf, states.known.sides, texts, embedder).unflatten(0, (-1, 2))
    return "embeddings are MiniLM's means over tokens", nearest(embedder([text_of(*one) for one in asked]).cpu(), found)


def _how(config: AttributeConfig, reader: Reader, checkpoints: models.Checkpoints | None) -> str:
    """The influence that was taken, in words."""
    numbers = sum(reader.model.module.get_parameter(name).numel() for name in reader.names)
    over = f"{numbers} weights ({config.parameters})"
    taken = f"sketched to {reader.dim} numbers" if reader.dim else "taken whole"
    if checkpoints:
        return f"influence by TracIn over {len(checkpoints)} checkpoints, gradients over {over}, {taken}"
    between = f"with curvature, damping {config.damping:g}" if config.curvature else "without curvature"
    return f"influence {between}, gradients over {over}, {taken}"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
