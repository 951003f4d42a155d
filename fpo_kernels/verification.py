"""Every kernel and launch configuration against the float64 reference on a device: `fpo-train doctor --kernels`.

An operation adds itself by a function that lists its checks, in `REGISTRY`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fpo_kernels import verified
from fpo_kernels.direction import blocked as direction_room
from fpo_kernels.direction import checked as direction
from fpo_kernels.products import checked as products
from fpo_kernels.products import config_triton
from fpo_kernels.products import ops as products_ops
from fpo_kernels.sketch import checked as sketch
from fpo_kernels.sketch import ops as sketch_ops

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16, F64)
DIMS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Check(NamedTuple):
    """A launch configuration and how to compare it."""

    operation: str
    implementation: str
    configuration: str
    dtype: str
    run: Callable[[], verified.Comparison] | None  # None: it cannot run here
    why_not: str = ""


class Verdict(NamedTuple):
    """What a check found."""

    operation: str
    implementation: str
    configuration: str
    dtype: str
    ratio: float | None  # error over budget; None: not run
    verdict: str  # "agrees", "WRONG: …" or "not here: …"

    @property
    def wrong(self) -> bool:
        """Whether it ran and disagreed, or failed as it ran."""
        return self.verdict.startswith("WRONG")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def products_checks(device: torch.device) -> Iterator[Check]:
    """Rooms of `grad_products`, each at each of its tiles."""
    for impl, way in (
        ("torch", "tokens"),
        ("torch", "form"),
        ("native", "tokens"),
        ("triton", "tokens"),
        ("triton", "form"),
    ):
        label = f"{impl}, {way}"
        if (why := products.missing(impl, device)) is not None:
            yield Check("grad_products", label, "", "", None, why)
            continue
        for dtype in DTYPES[:3] if impl == "triton" else DTYPES:
            for configuration, widths, tokens in products.configurations(impl, way, dtype):

                def run(
                    impl: str = impl, way: str = way, dtype: torch.dtype = dtype,
                    widths: tuple[int, tuple[int, ...]] = widths, tokens: int = tokens,
                ) -> verified.Comparison:  # fmt: skip
                    room = products_ops.load(impl, way)
                    return products.check(room, impl, way, dtype, device, *widths, tokens)

                yield Check("grad_products", label, configuration, _name(dtype), run)


def layers_checks(device: torch.device) -> Iterator[Check]:
    """Launches of many layers, at each of their tiles."""
    if (why := products.missing("triton", device)) is not None:
        yield Check("grad_products", "triton, layers", "", "", None, why)
        return
    for dtype in DTYPES[:3]:
        for aligned in (True, False):
            tiles = [config_triton.tokens(dtype, n, aligned, config_triton.chip(device)) for n in (64, 128, 256)]
            for tile in dict.fromkeys(tiles):
                run = functools.partial(products.check_layers, dtype, tile, aligned, device)
                label = f"{tile.tokens} x {tile.features}, {'aligned' if aligned else 'odd rows'}"
                yield Check("grad_products", "triton, layers", label, _name(dtype), run)


def direction_checks(device: torch.device) -> Iterator[Check]:
    """`grad_direction` with every pair of dtypes; both ways round, the wider stream being a or d."""
    for dtype in DTYPES:
        for other in DTYPES:
            for p, q in ((147, 66), (7, 130)):

                def run(
                    dtype: torch.dtype = dtype, other: torch.dtype = other, p: int = p, q: int = q
                ) -> verified.Comparison:
                    return direction.check(direction_room.grad_direction, dtype, other, device, p, q)

                label = f"direction in {_name(other)}, {p} to {q}"
                yield Check("grad_direction", "torch", label, _name(dtype), run)


def sketch_checks(device: torch.device) -> Iterator[Check]:
    """Rooms of `grad_sketch` at every size: streams narrower than it, and wider where that stays small."""
    for impl in ("torch", "native", "triton"):
        if (why := sketch.missing(impl, device)) is not None:
            yield Check("grad_sketch", impl, "", "", None, why)
            continue
        for dim in DIMS:
            for dtype in DTYPES[:3] if impl == "triton" else DTYPES:
                for p, qs in ((45, (33,)), (300, (70, 129))) if dim <= 256 else ((300, (70, 129)),):

                    def run(
                        impl: str = impl, dim: int = dim, dtype: torch.dtype = dtype,
                        p: int = p, qs: tuple[int, ...] = qs,
                    ) -> verified.Comparison:  # fmt: skip
                        return sketch.check(sketch_ops.load(impl), impl, dtype, device, dim, p, qs)

                    yield Check("grad_sketch", impl, f"k={dim}, {p} to {', '.join(map(str, qs))}", _name(dtype), run)


REGISTRY: list[Callable[[torch.device], Iterator[Check]]] = [
    products_checks,
    layers_checks,
    direction_checks,
    sketch_checks,
]


def verify_kernels(device: torch.device | str | None = None) -> Iterator[Verdict]:
    """Each launch configuration of each implementation held to the float64 reference, one after another.

    Args:
        device: where to run; None: CUDA if there is a GPU, else the CPU.

    Yields:
        A `Verdict` a configuration. `ratio` is the largest |got − exact| over what rounding allows there; above 1, or
        where the kernel failed to run, `wrong` is true.
    """
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    for checks in REGISTRY:
        for check in checks(where):
            yield _run(check, where)


def _run(check: Check, device: torch.device) -> Verdict:
    name = check[:4]
    if check.run is None:
        return Verdict(*name, None, f"not here: {check.why_not}")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = check.run()
    except Exception as error:  # whatever a compiler or driver raises is the verdict
        return Verdict(
            *name, None, f"WRONG: it does not run ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        )
    if found.agrees:
        return Verdict(*name, found.ratio, "agrees")
    return Verdict(*name, found.ratio, f"WRONG: off by {found.error:.3g}, allowed {found.allowed:.3g}, {found.where}")
