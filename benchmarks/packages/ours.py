"""fpo_kernels: `fk.Influence`, as README has it; there is nothing to tune."""

from __future__ import annotations

from torch import Tensor

import fpo_kernels as fk

from .work import Run, Task

NAME, WAYS = "fpo-kernels", ("fpo_kernels",)


def ready(task: Task, way: str) -> Run:
    """The question's own method."""
    engine = fk.Influence(task.model, parameters=task.names)
    own, others, work = task.own, task.others, task.work

    def sketched() -> Tensor:
        sketch = engine.sketch(own, dim=work.numbers)
        return sketch @ sketch.T

    answers = {
        "norms": lambda: engine.norms(own),
        "gram": lambda: engine.gram(own),
        "cross": lambda: engine.gram(own, others),
        "steering": lambda: engine.steering(own, others).product,
        "sketch": sketched,
    }
    return answers[work.question]
