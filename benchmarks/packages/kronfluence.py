"""kronfluence: influence scores of its Analyzer with the identity for a Hessian, which are the products themselves."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator

import kronfluence
import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, prepare_model
from torch import Tensor, nn

from benchmarks.models import Batch
from benchmarks.peers import rewards

from .work import Cannot, Run, Task

NAME, WAYS = "kronfluence", ("kronfluence", "kronfluence, tuned")
FACTORS, SCORES = "identity", "scores"
FEW = 12  # fewer rows of 10⁶ numbers than that MKL adds up one by one: in fp32 7e-5 off


class Reward(kronfluence.Task):
    """Both the loss and what is measured."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        """Summed over texts."""
        return rewards(model, batch).sum()

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        """The same."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Those of the chosen weights."""
        return self.modules


def ready(task: Task, way: str) -> Run:
    """As README has it, which leaves the number of texts a batch to a search; tuned: all texts, at once, no search."""
    work, device, tuned = task.work, task.batch["input_ids"].device, way == WAYS[1]
    if work.question == "sketch":
        raise Cannot("it projects nothing at random: queries' gradients can only be made of low rank, by an SVD")
    reward = Reward([name.removesuffix(".weight") for name in task.names])
    analyzer = Analyzer(
        analysis_name="work",
        model=prepare_model(task.model, reward),
        task=reward,
        cpu=device.type == "cpu",
        output_dir=tempfile.mkdtemp(prefix="fpo-kronfluence-"),
        disable_tqdm=tuned,
    )
    own, others = _rows(task.own), _rows(task.others)
    analyzer.fit_all_factors(FACTORS, dataset=own, factor_args=FactorArguments(strategy=FACTORS))
    scores = ScoreArguments()
    if tuned and work.question == "gram" and len(own) < FEW:
        scores.score_dtype = torch.float64

    def norms() -> Tensor:
        analyzer.compute_self_scores(
            SCORES,
            FACTORS,
            train_dataset=own,
            per_device_train_batch_size=len(own) if tuned else None,
            score_args=scores,
            overwrite_output_dir=True,
        )
        found: Tensor = analyzer.load_self_scores(SCORES)["all_modules"]
        return found

    def products(queries: list[Batch]) -> Tensor:
        analyzer.compute_pairwise_scores(
            SCORES,
            FACTORS,
            query_dataset=queries,
            train_dataset=own,
            per_device_query_batch_size=len(queries),  # README's 1024 is an IndexError where there are fewer
            per_device_train_batch_size=len(own) if tuned else None,
            score_args=scores,
            overwrite_output_dir=True,
        )
        found: Tensor = analyzer.load_pairwise_scores(SCORES)["all_modules"]
        return found.T

    def run() -> Tensor:
        with _nothing_to_collect() if tuned else contextlib.nullcontext():
            if work.question == "gram":
                return products(own)
            return task.from_parts(
                None if work.question == "cross" else norms(), None if work.question == "norms" else products(others)
            )

    return run


@contextlib.contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Its calls of the garbage collector, three to seven an answer and 0.3 s each, look at what is new alone."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _rows(batch: Batch) -> list[Batch]:
    """A dataset: one dictionary a text."""
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]
