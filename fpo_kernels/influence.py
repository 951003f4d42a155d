"""`Influence`: inner products of a model's per-example gradients from one backward, no gradient formed.

For example i of a batch, g_i is the gradient of the example's own scalar output with respect to the chosen
parameters. One forward and one activation-only backward run with taps (`capture`, `passes`); each parameter's
rule (`layers`) turns what its taps deliver into a stream (`gradients`), whose products are taken at once and
added up over the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from .batches import Batch, check_entries, chunks, join, partners, rows_of, take
from .blocks import Blocks
from .captured import MODES, Captures
from .finite import Fault, forward_faults, in_order, of_streams
from .gather import Layout
from .gradients import Pairs, Stream, Vectors
from .layers import Coverage, Parameters, Site, choose
from .models import check_mode, lock_of, pad_id_of, refuse_wrapped
from .outputs import Output, OutputMap, first_logit
from .passes import CHECKS, PER_EXAMPLE, Passes
from .pieces import Pieces
from .sketched import Maps, Sketched
from .streams import sent
from .totals import Total, symmetric, unread, wide
from .vectors import by_parameter

T = TypeVar("T")


class Steering(NamedTuple):
    """Rewards (N,), the references' rewards (N,), and ⟨g_z, g_z − g_ref⟩ (N,), fp32 or float64."""

    reward: Tensor
    reference_reward: Tensor
    product: Tensor


class Influence:
    """Per-example gradient inner products of `model` over the chosen parameters.

    Served are the weights and biases of Linear, transformers' Conv1D, Embedding, LayerNorm, RMSNorm and their
    likes, LoRA's factors among them; a shared parameter's gradient is the sum over all its uses. What else is
    chosen is named with the reason, see `fallback` and `coverage`.

    Args:
        model: called as `model(**batch)`. Its parameters, modes and buffers are left as they were found.
        parameters: "all", "head" (the score head), "lora" (the LoRA factors), "trainable" (what requires
            grad now), a list of names or globs, or a predicate on (name, parameter).
        output: maps what the model returns, or (returned, batch), to one scalar an example, (B,).
            Default: `returned.logits[:, 0]` of logits (B, 1).
        fallback: what becomes of a parameter whose gradient cannot be told apart by example. "error" refuses
            it; "per_example" computes it exactly by one forward and backward an example and holds these
            gradients, (sequences on a tape) × (its weights) numbers.
        micro_batch: the most sequences on one autograd tape. Each piece of a steering call runs the references it
            needs again. None puts a call's whole batch on one; but a CPU goes by pieces of some 2048 tokens, where few
            references run again for it and examples are the same in a smaller batch (`pieces`).
        check: when a pass is compared with one ordinary backward along random directions, and what differs beyond
            rounding is refused by name. "first": at the first batch and at batches of a new kind (another width to a
            power of two, side of padding, order of lengths, entries, mode), by one ordinary forward and backward over
            one of its examples, or an eighth of them up to four, in a batch of their own; "every": each batch, over
            the whole of it; "never". Where it differs, the reason is looked for in a few passes more. What can be seen
            without a comparison is looked at in every pass that is not replayed, whatever `check` is: in a new kind of
            batch every function that a parameter meets, later how often modules are asked for them.
        capture: "auto" (CUDA): of batches of up to 2048 tokens, padding among them, a shape that comes a second time is
            recorded as a CUDA graph and replayed from then on by `steering` (of candidates and references that share a
            tape), `norms`, and `gram` of two batches. Widths are rounded up, by a quarter at most, where that changes
            no answer. Weights updated in place are seen; replaced ones, or another mode, record anew. At most eight
            recordings share one pool of memory, about the largest's peak. What cannot be recorded runs eagerly and
            `coverage` says why. "never": each call runs.

    On CUDA, of a kind of batch that was met before, a padded position that has a gradient after all gives NaN.

    That examples do not meet, an engine's first call sees from the same comparison. Where it cannot (in 16 bits, with
    check="never", of layers that no gradient reaches) three examples run once more, forward and backward; in 16 bits
    the comparison then takes a pass and an ordinary backward over three or four.

    Raises:
        ValueError: a choice that matches nothing, or a parameter that cannot be served (each is named with
            the reason; some show only when the model runs, in the first call).
        TypeError: a compiled or FSDP-sharded model.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters = "all",
        output: Output | None = None,
        fallback: str = "error",
        micro_batch: int | None = None,
        check: str = "first",
        capture: str = "auto",
    ) -> None:
        if fallback not in ("error", PER_EXAMPLE):
            raise ValueError(f"fallback={fallback!r}: wanted 'error' or {PER_EXAMPLE!r}")
        if check not in CHECKS:
            raise ValueError(f"check={check!r}: wanted 'first', 'every' or 'never'")
        if capture not in MODES:
            raise ValueError(f"capture={capture!r}: wanted 'auto' or 'never'")
        if micro_batch is not None and not (isinstance(micro_batch, int) and micro_batch >= 1):
            raise ValueError(f"micro_batch={micro_batch!r}: wanted a positive number of sequences, or None")
        refuse_wrapped(model)
        self.model = model
        self.micro_batch = micro_batch
        self._output = OutputMap(output or first_logit)
        self._fallback, self._check = fallback, check
        self._capture, self._captures = capture, Captures(capture)
        self._passes = Passes(model, choose(model, parameters), self._output, fallback, check)

    def coverage(self) -> list[Coverage]:
        """One row a chosen parameter: its name, shape, the rule that serves it, and a reason where it is not served.

        Reasons that show only when the model runs are known after the first call.
        """
        eager = f"runs eagerly: {self._captures.reason}" if self._captures.reason else ""
        return [row if row.reason else row._replace(reason=eager) for row in self._passes.coverage()]

    def norms(self, batch: Batch) -> Tensor:
        """‖g_i‖² of every example, the norm squared: `gram`'s diagonal, (B,), fp32 or float64 (accumulated so).

        Raises: as `gram`.
        """

        def one(rows: slice) -> Tensor:
            part = take(batch, rows)
            index = torch.arange(rows_of(part))
            return self._ask(part, Pairs(torch.stack([index, index], 1)))[1]

        return self._call(lambda: torch.cat(self._pieces.each(one, self._pieces.of(batch))), batch)

    def direction(self, batch: Batch, vectors: Mapping[str, Tensor]) -> Tensor:
        """⟨g_i, v⟩ of every example, (B,), fp32 or float64 (accumulated so); the model's stated directional derivative.

        Args:
            batch: B sequences.
            vectors: parameter name → tensor of the parameter's shape, floating point. Chosen parameters that
                are not named count as zero.

        Raises: as `gram`; ValueError for a name that is not a chosen parameter, or a tensor of another shape.
        """
        wanted = by_parameter(self.model, self._passes.chosen, vectors)

        def one(rows: slice) -> Tensor:
            total = Total(self._passes.padding_read)

            def consume(sites: list[Site], streams: list[Stream]) -> None:
                for site, stream in zip(sites, streams, strict=True):
                    if site.name in wanted:
                        device = stream.v.device if isinstance(stream, Vectors) else stream.d.device
                        total.add(stream.direction(wanted[site.name].to(device)))

            outputs = self._passes.run(take(batch, rows), consume)
            return total.result(outputs, len(outputs))

        return self._call(lambda: torch.cat(self._pieces.each(one, self._pieces.of(batch))), batch)

    def gram(self, batch: Batch, other: Batch | None = None) -> Tensor:
        """⟨g_i, g_j⟩ over one batch, (B, B), or between two, (B, M); fp32 or float64 (accumulated so).

        Two batches of the same shapes share a tape where they fit. With `micro_batch`, blocks of rows are held
        and met by every later block: the streams of two blocks are in memory at a time, for n(n+1)/2 passes
        over n blocks (n·m between two batches).

        Raises:
            RuntimeError: called under `torch.inference_mode`, or the model drops activations at random.
            ValueError: the model's output is not one scalar an example, or a chosen parameter turns out not
                to be told apart by example under `fallback="error"`.
        """
        return self._call(lambda: self._gram(batch) if other is None else self._cross_gram(batch, other), batch, other)

    def summed_gram(self, batch: Batch, other: Batch | None, states: Callable[[], Iterator[float]]) -> Tensor:
        """Σ_k w_k · gram over states of the model's weights, summed in float64; raises as `gram`.

        Iterating `states()` brings the model to each state and yields its w_k; a call may begin anew. Modules and
        modes are checked once, not in every state.
        """

        def compute() -> Tensor:
            total: Tensor | None = None
            for weight in states():
                gram = self._gram(batch) if other is None else self._cross_gram(batch, other)
                total = weight * gram.double() if total is None else total + weight * gram.double()
            if total is None:
                raise ValueError("states: wanted at least one, got none")
            return total.to(gram.dtype)

        return self._call(compute, batch, other)

    @overload
    def sketch(self, batch: Batch, dim: int = 4096, seed: int = 0, per_layer: Literal[False] = False) -> Tensor: ...
    @overload
    def sketch(
        self, batch: Batch, dim: int = 4096, seed: int = 0, *, per_layer: Literal[True]
    ) -> dict[str, Tensor]: ...

    def sketch(
        self, batch: Batch, dim: int = 4096, seed: int = 0, per_layer: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """S_i with E⟨S_i, S_j⟩ = ⟨g_i, g_j⟩ over the maps that seeds draw: (B, dim), fp32 or float64.

        Covers what `gram` covers, added up over the parameters. Gradients of other batches, other runs and other
        machines meet through it, if the seed, the dim and the parameters' names are the same.

        Args:
            batch: B sequences.
            dim: k, a power of two from 64 to 16384. The products' error is about ‖g_i‖‖g_j‖/√k.
            seed: of the maps, 64 bits; `fpo_kernels/sketch/maps.py` says how they are drawn.
            per_layer: parameter name → (B, dim) in place of the sum; all names, zeros where no gradient came.

        Raises: as `gram`; ValueError for another `dim` or seed.

        Source: tensor sketch, see `grad_sketch`.
        """
        maps = Maps(dim, seed)  # raises before the model runs
        shapes = {name: tuple(parameter.shape) for name, parameter in self._passes.chosen.items()}

        def one(rows: slice) -> dict[str, Tensor]:
            sketched = Sketched(maps, shapes, per_layer)
            outputs = self._blocks.lying(take(batch, rows), sketched.consume)
            return sketched.result(outputs)

        def whole() -> dict[str, Tensor]:
            found = self._pieces.each(one, self._pieces.of(batch))
            return {name: torch.cat([piece[name] for piece in found]) for name in found[0]}

        sums = self._call(whole, batch)
        return sums if per_layer else sums[""]

    def steering(self, candidates: Batch, references: Batch, reference_of: Tensor | None = None) -> Steering:
        """⟨g_z, g_z − g_ref⟩ of every candidate z against its reference (the paper's practical penalty).

        Args:
            candidates: N sequences. references: M sequences, of any width.
            reference_of: (N,) indices into the references; None with one reference for all (M = 1) or
                one each (M = N).

        Raises: as `gram`; ValueError for a `reference_of` that does not fit.
        """
        n, m = rows_of(candidates), rows_of(references)
        partner = partners(n, m, reference_of)

        def whole() -> Steering:
            found = self._pieces.each(
                lambda rows: self._steer(take(candidates, rows), references, partner[rows]),
                self._pieces.of_candidates(candidates, references, partner),
            )
            return Steering(*(torch.cat(column) for column in zip(*found, strict=True)))

        return self._call(whole, candidates, references)

    def faults(self, batch: Batch) -> list[Fault]:
        """Where NaN or an infinite number arises, of each example that has one: the first module, else the gradient.

        For when an answer is not finite, which that of other examples is not for it. Runs the model once without a
        tape, and where all that its modules make is finite once more, forward and backward. [] where all is finite: an
        answer is then beyond its dtype, being a product of large numbers.

        Raises: as `gram`.
        """
        found: dict[int | None, Fault] = {}

        def look() -> None:
            found.clear()
            found.update((fault.example, fault) for fault in forward_faults(self.model, batch))
            if not found:
                self._blocks.lying(batch, lambda sites, streams: of_streams(sites, streams, found))

        self._call(look, batch)
        return in_order(found.values())

    def _ask(self, batch: Batch, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """One pass: outputs (B,) and the products of pairs (n,); replayed where its shape came before."""
        layout = self._passes.layout(batch)
        if not self._passes.is_repeatable:
            return self._run(batch, pairs, layout)
        return self._captures.answer(batch, pairs, self._run, layout, self._passes.weights, pad_id_of(self.model))

    def _run(self, batch: Batch, pairs: Pairs, layout: Layout) -> tuple[Tensor, Tensor]:
        total = Total(unread if layout.static else self._passes.padding_read)
        outputs = self._passes.run(batch, total.over(pairs), layout)
        return outputs, total.result(outputs, len(pairs.host))

    def _call(self, compute: Callable[[], T], *batches: Batch | None) -> T:
        given = [batch for batch in batches if batch is not None]
        for batch in given:
            check_entries(batch)
        with lock_of(self.model):
            self._renew()
            check_mode(self.model, self._passes.modules)
            if self.micro_batch is not None or self._fallback == PER_EXAMPLE or len(given) > 1:
                for batch in given:
                    self._passes.see_entries(batch)
            return self._passes.settled(compute)

    def _renew(self) -> None:
        """Look at the model anew where modules or parameters were replaced since."""
        if self._passes.current():
            return
        refuse_wrapped(self.model)
        now = dict(self.model.named_parameters())
        gone = [name for name in self._passes.chosen if name not in now]
        if gone:
            raise ValueError(f"model: {gone[0]} is gone since the engine was made; make a new one")
        chosen = {name: now[name] for name in self._passes.chosen}
        self._passes = Passes(self.model, chosen, self._output, self._fallback, self._check)
        self._captures = Captures(self._capture)

    def _gram(self, batch: Batch) -> Tensor:
        blocks = self._blocks
        if slices := self._pieces.to_hold(batch):
            return blocks.of_parts(self._pieces.each(lambda rows: blocks.part(take(batch, rows)), slices))
        lefts = chunks(rows_of(batch), self.micro_batch)
        grid = []
        for n, rows in enumerate(lefts):
            own, held = blocks.within(take(batch, rows), hold=n + 1 < len(lefts))
            right = [blocks.across(len(own), held, take(batch, later)) for later in lefts[n + 1 :]]
            grid.append([own, *right])
        return symmetric(grid)

    def _cross_gram(self, batch: Batch, other: Batch) -> Tensor:
        b, m = rows_of(batch), rows_of(other)
        by_pieces = self._cross_by_pieces(batch, other)
        if by_pieces is not None:
            return by_pieces
        fits = self.micro_batch is None or b + m <= self.micro_batch
        both = join(batch, other, pad_id_of(self.model)) if fits else None
        if both is not None:
            crossed = Pairs(torch.cartesian_prod(torch.arange(b), b + torch.arange(m)))
            return self._ask(both, crossed)[1].view(b, m)
        rights = chunks(rows_of(other), self.micro_batch)
        grid = []
        for rows in chunks(rows_of(batch), self.micro_batch):
            outputs, held = self._blocks.hold(take(batch, rows))
            grid.append(torch.cat([self._blocks.across(len(outputs), held, take(other, cols)) for cols in rights], 1))
        return torch.cat(grid)

    def _cross_by_pieces(self, batch: Batch, other: Batch) -> Tensor | None:
        """The smaller batch held, the other met piece by piece; None where both go on one tape."""
        small, large = sorted((batch, other), key=rows_of)
        slices = self._pieces.beside_held(small, large)
        if not slices:
            return None
        outputs, held = self._blocks.hold(small)
        blocks = self._pieces.each(lambda rows: self._blocks.across(len(outputs), held, take(large, rows)), slices)
        return torch.cat(blocks, 1) if small is batch else torch.cat(blocks, 1).T

    @property
    def _blocks(self) -> Blocks:
        return Blocks(self._passes, self.micro_batch)

    @property
    def _pieces(self) -> Pieces:
        return Pieces(self.micro_batch, self._passes.device, lambda: self._passes.alike)

    def _steer(self, candidates: Batch, references: Batch, partner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        used, partner = torch.unique(partner, return_inverse=True)
        if len(used) < rows_of(references):
            references = take(references, used)
        n, m = len(partner), len(used)
        fits = self.micro_batch is None or n + m <= self.micro_batch
        both = join(candidates, references, pad_id_of(self.model)) if fits else None
        index = torch.arange(n)
        own = torch.stack([index, index], 1)
        if both is not None:
            outputs, products = self._ask(both, Pairs(torch.cat([own, torch.stack([index, n + partner], 1)])))
            reward, reference_reward = outputs[:n], outputs[n:]
        else:
            reference_reward, held = self._blocks.hold(references)
            total, crossed = Total(self._passes.padding_read), Total(self._passes.padding_read)
            own_pairs, cross_pairs = Pairs(own), Pairs(torch.stack([index, partner], 1))

            def consume(sites: list[Site], streams: list[Stream]) -> None:
                total.multiply(sites, streams, own_pairs)
                crossed.multiply(sites, streams, cross_pairs, held)

            reward = self._blocks.lying(candidates, consume)
            products = torch.cat([total.result(reward, n), crossed.result(reward, n)])
        own_reference = wide(reference_reward)[sent(partner.numpy(), reward.device)]
        return wide(reward), own_reference, products[:n] - products[n:]
