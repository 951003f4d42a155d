"""How well projections of per-example gradients keep their inner products, and what they cost."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import floors, gradients
from benchmarks.gradients import Layer
from benchmarks.registry import Case, Competitor, Contest, Headline

TENSOR, LOGRA, SJLT, DENSE = "tensor sketch", "LoGra", "SJLT", "dense signs"
BLOCKS = (5, 25)  # an early and a late one of SmolLM2's 30, seven layers each
# k·p·q signs a layer: seconds a call at 1024, four times as many at 4096.
LARGEST_DENSE = 1024
BIAS_SEEDS = 64
# What a sound projection exceeds with probability 0.001. The squared distance of the mean Gram matrix over that
# expected of it is at most as heavy in the tail as F(1, 63) (of sums of squares of normal numbers, one alone has the
# heaviest: Székely and Bakirov 2003), here for 14 layers and their sum at once; and Student's t with 63 degrees.
MOST_DISTANCE, MOST_T = 18.2, 3.46


@dataclass(frozen=True)
class Setting:
    """k numbers for each layer's gradient of each text.

    Attributes:
        dim: k. model: "smollm2" on real texts, or "tiny".
        seeds: over which errors are averaged, of SJLT and dense signs. quick_seeds: of the two that take no time.
        bias_seeds: over which the tensor sketch's mean is tested, 0 for not.
        rounds: the most that the tensor sketch and LoGra are timed in. slow_rounds: SJLT.
    """

    name: str
    dim: int
    model: str
    seeds: int
    quick_seeds: int
    bias_seeds: int = 0
    rounds: int | None = None
    slow_rounds: int = 0


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """k from 64 to 16384; most seeds where projections are compared."""
    if quick:
        return [Setting(f"k={dim}", dim, "tiny", 2, 2, bias_seeds=8 if dim == 64 else 0) for dim in (64, 256)]
    return [
        Setting("k=64", 64, "smollm2", 5, 20, rounds=2),
        Setting("k=256", 256, "smollm2", 20, BIAS_SEEDS, slow_rounds=3),
        Setting("k=1024", 1024, "smollm2", 20, BIAS_SEEDS, bias_seeds=BIAS_SEEDS, slow_rounds=3),
        Setting("k=4096", 4096, "smollm2", 10, BIAS_SEEDS, slow_rounds=3),
        Setting("k=8192", 8192, "smollm2", 10, 20, rounds=2),
        Setting("k=16384", 16384, "smollm2", 5, 20, rounds=2),
    ]


KINDS: dict[str, Any] = {TENSOR: fk.TensorSketch, LOGRA: fk.LoGra, SJLT: fk.SJLT, DENSE: fk.DenseProjection}
Sketcher = Callable[[int], Tensor]  # seed → (layers, examples, k)


def build(setting: Setting, device: torch.device) -> Contest:
    """Every layer's gradients projected; the answers are the layers' Gram matrices (layers, examples, examples)."""
    layers, exact = measured(setting.model, device)
    cannot = {}
    if math.isqrt(setting.dim) ** 2 != setting.dim:
        cannot[LOGRA] = f"√{setting.dim} is not whole"
    if setting.dim > LARGEST_DENSE:
        cannot[DENSE] = f"not measured beyond k={LARGEST_DENSE}"
    rounds = {TENSOR: setting.rounds, LOGRA: setting.rounds, SJLT: setting.slow_rounds, DENSE: 0}
    competitors = {}
    for name, kind in KINDS.items():
        if name not in cannot:
            sketch = functools.partial(projected, kind, layers, setting.dim)
            competitors[name] = Competitor(
                run=functools.partial(gram_matrices, sketch, 0),
                budget=2 * bound(name, setting.dim, exact),
                answers="gram",
                rounds=rounds[name],
                figures=functools.partial(
                    figures,
                    sketch,
                    exact,
                    setting.quick_seeds if name in (TENSOR, LOGRA) else setting.seeds,
                    setting.bias_seeds if name == TENSOR else 0,
                ),
            )
    floor = floors.read([x for layer in layers for x in (layer.a, layer.d)], exact)
    return Contest(competitors=competitors, expected=lambda: {"gram": exact}, cannot=cannot, floors={"gram": floor})


@functools.lru_cache(maxsize=1)
def measured(model: str, device: torch.device) -> tuple[list[Layer], Tensor]:
    """The layers' streams, and their exact Gram matrices (layers, examples, examples) in float64."""
    layers = gradients.tiny(device) if model == "tiny" else gradients.smollm2(BLOCKS, device)
    examples = len(layers[0].offsets) - 1
    pairs = torch.cartesian_prod(torch.arange(examples), torch.arange(examples)).to(device)
    exact = [fk.grad_products(x.a.double(), x.d.double(), x.offsets, pairs) for x in layers]
    return layers, torch.stack(exact).view(len(layers), examples, examples).cpu()


def projected(kind: Any, layers: Sequence[Layer], dim: int, seed: int) -> Tensor:
    """Every layer's k numbers a text, (layers, examples, k), by a class of fpo_kernels."""
    found = []
    for x in layers:
        shared = {"family": x.block} if kind is fk.TensorSketch else {}
        sketch = kind(p=x.a.shape[1], q=x.d.shape[1], dim=dim, seed=seed, name=x.name, **shared)
        found.append(fk.grad_sketch(x.a, x.d, x.offsets, sketch))
    return torch.stack(found)


def gram_matrices(sketch: Sketcher, seed: int) -> Tensor:
    """Of one seed's vectors, (layers, examples, examples)."""
    vectors = sketch(seed)
    return vectors @ vectors.mT


def bound(name: str, dim: int, exact: Tensor) -> float:
    """What the relative error of all Gram matrices is at most, in the root mean square over seeds.

    The variance of ⟨S_i, S_j⟩ over ‖G_i‖²‖G_j‖² is at most 2/k for signs, dense or one a coordinate; (1 + 2/√k)² − 1
    for Gaussians on both sides; 11/k for the tensor sketch (Avron, Nguyen and Woodruff 2014).
    """
    variance = {LOGRA: (1 + 2 * dim**-0.5) ** 2 - 1, TENSOR: 11 / dim}.get(name, 2 / dim)
    traces = exact.diagonal(dim1=1, dim2=2).sum(1)
    return math.sqrt(variance) * float(traces.norm() / exact.norm())


def figures(sketch: Sketcher, exact: Tensor, seeds: int, bias_seeds: int) -> Mapping[str, float]:
    """Relative errors in Frobenius norm over seeds 0, 1, …: of each layer's Gram matrix, and of the layers' sum.

    error: mean over seeds and layers. sum_error: mean over seeds, of sketches added up over the layers into one.
    …_deviation: standard error of the mean. layers, examples, bytes: of one text's sketches, and of their sum.
    """
    each, summed, kept = [], [], []
    total = exact.sum(0)
    for seed in range(max(seeds, bias_seeds)):
        vectors = sketch(seed).double().cpu()
        grams = vectors @ vectors.mT
        kept.append(grams)
        if seed < seeds:
            each.append(float(_relative(grams, exact).mean()))
            one = vectors.sum(0)
            summed.append(float(_relative(one @ one.mT, total)))
    layers, examples, dim = vectors.shape
    return {
        "seeds": seeds,
        "error": statistics.mean(each),
        "error_deviation": statistics.stdev(each) / math.sqrt(seeds),
        "sum_error": statistics.mean(summed),
        "sum_error_deviation": statistics.stdev(summed) / math.sqrt(seeds),
        "layers": layers,
        "examples": examples,
        "bytes": 4 * dim * layers,
        "sum_bytes": 4 * dim,
        **(_bias(torch.stack(kept), exact) if bias_seeds else {}),
    }


def _relative(got: Tensor, exact: Tensor) -> Tensor:
    return (got - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))


def _bias(grams: Tensor, exact: Tensor) -> Mapping[str, float]:
    """Is the mean of Gram matrices (seeds, layers, B, B) the exact one?

    bias_distance: over all layers the largest ‖mean − exact‖² over what is expected of it without bias, the variance
    of the mean. bias_scale: mean over layers of ⟨mean, exact⟩/‖exact‖², minus 1; bias_t: it in standard errors.
    bias_error, bias_expected: ‖mean − exact‖/‖exact‖ and the root of its expectation, in the mean over layers.
    """
    seeds, mean = len(grams), grams.mean(0)
    off = (mean - exact).square().sum((1, 2))
    expected = (grams - mean).square().sum((0, 2, 3)) / (seeds * (seeds - 1))
    size = exact.norm(dim=(1, 2))
    scales = ((grams * exact).sum((2, 3)) / size**2).mean(1) - 1
    return {
        "bias_seeds": seeds,
        "bias_error": float((off.sqrt() / size).mean()),
        "bias_expected": float((expected.sqrt() / size).mean()),
        "bias_distance": float((off / expected).max()),
        "bias_scale": float(scales.mean()),
        "bias_t": float(scales.mean() / scales.std() * math.sqrt(seeds)),
    }


def slope(rows: list[dict[str, Any]]) -> float:
    """Of log error against log k, least squares over the tensor sketch's settings; −1/2 is what theory says."""
    points = [
        (math.log(row["setting"]["dim"]), math.log(row["figures"]["error"]))
        for row in rows
        if row["competitor"] == TENSOR and row["status"] == "timed"
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def chart(rows: list[dict[str, Any]], figure: str) -> list[str]:
    """Markdown: k, every projection's figure ("error", "sum_error" or "seconds"), and the bytes one text takes."""
    found = {(row["setting"]["dim"], row["competitor"]): row for row in rows if row["status"] == "timed"}
    names = (TENSOR, LOGRA, SJLT, DENSE)
    lines = [f"| k | {' | '.join(names)} | bytes a text |", "|---" * (len(names) + 2) + "|"]
    for dim in dict.fromkeys(dim for dim, _ in found):
        cells = []
        for name in names:
            row = found.get((dim, name))
            if not row:
                cells.append("–")
            elif figure == "seconds":
                cells.append(f"{row['seconds']['min'] * 1e3:.0f} ms")
            else:
                cells.append(f"{row['figures'][figure]:.3f} ± {row['figures'][f'{figure}_deviation']:.3f}")
        size = next(
            row["figures"]["sum_bytes" if figure == "sum_error" else "bytes"]
            for (k, _), row in found.items()
            if k == dim
        )
        lines.append(f"| {dim} | {' | '.join(cells)} | {size:,} |")
    return lines


def unbiased(rows: list[dict[str, Any]]) -> list[str]:
    """The test for bias, a line or two a setting that has one."""
    lines = []
    for row in rows:
        x = row.get("figures") or {}
        if "bias_t" in x:
            sound = x["bias_distance"] <= MOST_DISTANCE and abs(x["bias_t"]) <= MOST_T
            lines += [
                f"mean of {x['bias_seeds']} seeds at {row['setting']['name']}: {x['bias_error']:.4f} off, "
                f"{x['bias_expected']:.4f} expected without bias; the worst layer's square is {x['bias_distance']:.1f} "
                f"times its expectation (bound {MOST_DISTANCE}),",
                f"the scale off by {x['bias_scale']:+.4f}, {x['bias_t']:+.1f} standard errors (bound {MOST_T}): "
                f"{'no bias' if sound else 'BIASED'} at 99.9% confidence each",
            ]
    return lines


def summary(rows: list[dict[str, Any]]) -> str:
    """The tables, the slope and the test for bias."""
    return "\n".join(
        [
            "relative error of the Gram matrix, each layer apart, mean over layers and seeds ± its standard error:",
            *chart(rows, "error"),
            "the same, sketches of all layers added up into one:",
            *chart(rows, "sum_error"),
            "least time of a call for all layers and texts:",
            *chart(rows, "seconds"),
            f"error of the {TENSOR} ∝ k^{slope(rows):.2f}",
            *unbiased(rows),
        ]
    )


CASE = Case(
    name="sketch",
    description="error of inner products of gradients after projection, by bytes and time",
    competitors=(TENSOR, LOGRA, SJLT, DENSE),
    baseline=TENSOR,
    ours=(TENSOR,),
    settings=settings,
    build=build,
    headlines=(
        Headline(text=f"error a layer, {TENSOR} / {LOGRA}", over=TENSOR, under=LOGRA, figure="error"),
        Headline(text=f"error a layer, {TENSOR} / {SJLT}", over=TENSOR, under=SJLT, figure="error"),
        Headline(text=f"error a layer, {TENSOR} / {DENSE}", over=TENSOR, under=DENSE, figure="error"),
        Headline(text=f"error of the sum, {TENSOR} / {SJLT}", over=TENSOR, under=SJLT, figure="sum_error"),
        Headline(text=f"error of the sum, {TENSOR} / {DENSE}", over=TENSOR, under=DENSE, figure="sum_error"),
        Headline(text=f"time, {SJLT} / {TENSOR}", over=SJLT, under=TENSOR),
        Headline(text=f"time, {DENSE} / {TENSOR}", over=DENSE, under=TENSOR),
    ),
    summary=summary,
)
