"""One module a case, and the list of them."""

from __future__ import annotations

from benchmarks.registry import Case


def cases() -> dict[str, Case]:
    """Every case by name."""
    from benchmarks.cases import (
        attribution,
        decode,
        direction,
        engine_sketch,
        exact,
        grad_sketch,
        head,
        host,
        influence,
        lds,
        neural,
        packages,
        products,
        projections,
        scaling,
        serving,
        sketch,
        store,
        tracin,
        train_step,
        ways,
    )

    kernels = (products, ways, direction, influence, head, sketch, grad_sketch, engine_sketch, store, tracin, exact)
    every = (*kernels, packages, projections, scaling, host, decode, train_step, neural, attribution, lds, serving)
    return {module.CASE.name: module.CASE for module in every}
