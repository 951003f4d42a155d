"""`Influence`: inner products of a model's per-example gradients from one backward, no gradient formed.

For example i of a batch, g_i is the gradient of the example's own scalar output with respect to the chosen
parameters. One forward and one activation-only backward run with taps (`capture`); each parameter's rule
(`layers`) turns what its taps deliver into inner products at once, and the parameters are added up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batches import Batch, chunks, join, rows_of, take
from .capture import Consume, Gather, Uses, input_of, tapped
from .factors import Factors, concatenate
from .layers import Coverage, Parameters, Site, choose, survey

Output = Callable[..., Tensor]


class Steering(NamedTuple):
    """Rewards (N,), the references' rewards (N,), and ⟨g_z, g_z − g_ref⟩ (N,), fp32 or float64."""

    reward: Tensor
    reference_reward: Tensor
    product: Tensor


class Influence:
    """Per-example gradient inner products of `model` over the chosen parameters.

    Args:
        model: called as `model(**batch)`. Its parameters, modes and buffers are left as they were found.
        parameters: "all", "head" (the score head), "lora" (the LoRA factors), "trainable" (what requires
            grad now), a list of names or globs, or a predicate on (name, parameter).
        output: maps what the model returns, or (returned, batch), to one scalar an example, (B,).
            Default: `returned.logits[:, 0]`.
        fallback: "error" refuses a parameter whose gradient cannot be told apart by example.
        micro_batch: the most sequences on one autograd tape; None puts a call's whole batch on one. Each
            piece of a steering call runs the references it needs again.

    Raises:
        ValueError: a choice that matches nothing, or a parameter whose gradient cannot be told apart by
            example with the rules at hand (each is named with the reason).
        TypeError: a compiled or FSDP-sharded model.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters = "all",
        output: Output | None = None,
        fallback: str = "error",
        micro_batch: int | None = None,
    ) -> None:
        if fallback != "error":
            raise ValueError(f"fallback={fallback!r}: wanted 'error'")
        if micro_batch is not None and not (isinstance(micro_batch, int) and micro_batch >= 1):
            raise ValueError(f"micro_batch={micro_batch!r}: wanted a positive number of sequences, or None")
        _refuse_wrapped(model)
        self.model = model
        self.micro_batch = micro_batch
        self._output = _with_batch(output or _first_logit)
        self._sites, self._coverage = survey(model, choose(model, parameters))
        self._known_uses = self._known_layout = False
        refused: dict[str, list[str]] = {}
        for row in self._coverage:
            if row.rule is None:
                refused.setdefault(row.reason, []).append(row.parameter)
        if refused:
            named = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in refused.items())
            raise ValueError(
                "parameters whose gradients cannot be told apart by example were chosen "
                f"({named}); leave them out through `parameters`"
            )

    def coverage(self) -> list[Coverage]:
        """One row a chosen parameter: its name, shape and the rule that serves it."""
        return list(self._coverage)

    def norms(self, batch: Batch) -> Tensor:
        """‖g_i‖² of every example, (B,), fp32 or float64 (accumulated so). Raises as `gram` does."""
        self._check_mode()
        parts = []
        for rows in chunks(rows_of(batch), self.micro_batch):
            total = _Total()
            outputs = self._backward(take(batch, rows), total.over(_diagonal))
            parts.append(total.result(outputs, outputs.shape[0]))
        return torch.cat(parts)

    def gram(self, batch: Batch, other: Batch | None = None) -> Tensor:
        """⟨g_i, g_j⟩ over one batch, (B, B), or between two, (B, M); fp32 or float64 (accumulated so).

        With `micro_batch`, blocks of rows are held and met by every later block: the factors of two
        blocks are in memory at a time, for n(n+1)/2 passes over n blocks (n·m between two batches).

        Raises:
            RuntimeError: called under `torch.inference_mode`, or the model drops activations at random.
            ValueError: the model's output is not one scalar an example, a chosen parameter's module is
                not called, or a module's input does not carry the batch in its first dimension.
        """
        self._check_mode()
        lefts = chunks(rows_of(batch), self.micro_batch)
        if other is None:
            blocks = []
            for n, rows in enumerate(lefts):
                own, held = self._gram_block(take(batch, rows), hold=n + 1 < len(lefts))
                right = [self._cross_block(len(own), held, take(batch, later)) for later in lefts[n + 1 :]]
                blocks.append([own, *right])
            return _symmetric(blocks)
        rights = chunks(rows_of(other), self.micro_batch)
        grid = []
        for rows in lefts:
            outputs, held = self._hold(take(batch, rows))
            grid.append(torch.cat([self._cross_block(len(outputs), held, take(other, cols)) for cols in rights], 1))
        return torch.cat(grid)

    def steering(self, candidates: Batch, references: Batch, reference_of: Tensor | None = None) -> Steering:
        """⟨g_z, g_z − g_ref⟩ of every candidate z against its reference (the paper's practical penalty).

        Args:
            candidates: N sequences. references: M sequences, of any width.
            reference_of: (N,) indices into the references; None with one reference for all (M = 1) or
                one each (M = N).

        Raises: as `gram`; ValueError for a `reference_of` that does not fit.
        """
        self._check_mode()
        n, m = rows_of(candidates), rows_of(references)
        partner = _partners(n, m, reference_of)
        parts = [
            self._steer(take(candidates, rows), references, partner[rows]) for rows in self._steering_chunks(n, partner)
        ]
        return Steering(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _steering_chunks(self, n: int, partner: Tensor) -> list[slice]:
        """Slices of candidates that fit on one tape together with their references, where any do."""
        if self.micro_batch is None:
            return [slice(0, n)]
        shared = bool((partner == partner[0]).all())
        return chunks(n, max(1, self.micro_batch - 1 if shared else self.micro_batch // 2))

    def _steer(self, candidates: Batch, references: Batch, partner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        used, partner = torch.unique(partner, return_inverse=True)
        references = take(references, used)
        n, m = len(partner), len(used)
        fits = self.micro_batch is None or n + m <= self.micro_batch
        both = join(candidates, references, self._pad_id()) if fits else None
        total = _Total()
        index = torch.arange(n)
        own_pairs = torch.stack([index, index], 1)
        if both is not None:
            pairs = torch.cat([own_pairs, torch.stack([index, n + partner], 1)])
            outputs = self._backward(both, total.over(lambda own: pairs))
            products = total.result(outputs, 2 * n)
            reward, reference_reward = outputs[:n], outputs[n:]
        else:
            reference_reward, held = self._hold(references)
            cross = torch.stack([index, partner], 1)
            crossed = _Total()

            def consume(site: Site, own: Factors) -> None:
                total.add(site, own, own_pairs)
                if site.name in held:
                    crossed.add(site, own, cross, held[site.name])

            reward = self._backward(candidates, consume)
            products = torch.cat([total.result(reward, n), crossed.result(reward, n)])
        on_device = partner.to(reward.device)
        return _wide(reward), _wide(reference_reward)[on_device], products[:n] - products[n:]

    def _hold(self, batch: Batch) -> tuple[Tensor, dict[str, Factors]]:
        """Outputs and every site's factors of a batch, at most `micro_batch` sequences on a tape."""
        outputs, parts = [], []
        for rows in chunks(rows_of(batch), self.micro_batch):
            held: dict[str, Factors] = {}
            outputs.append(self._backward(take(batch, rows), _holding(held)))
            parts.append(held)
        sizes = [len(o) for o in outputs]
        names = dict.fromkeys(name for part in parts for name in part)
        merged = {name: concatenate([part.get(name) for part in parts], sizes) for name in names}
        return torch.cat(outputs), merged

    def _gram_block(self, batch: Batch, hold: bool) -> tuple[Tensor, dict[str, Factors]]:
        total = _Total()
        held: dict[str, Factors] = {}

        def consume(site: Site, own: Factors) -> None:
            total.add(site, own, _upper(own))
            if hold:
                held[site.name] = own

        outputs = self._backward(batch, consume)
        b = outputs.shape[0]
        upper = total.result(outputs, b * (b + 1) // 2)
        rows, cols = torch.triu_indices(b, b, device=upper.device)
        gram = upper.new_empty(b, b)
        gram[rows, cols] = upper
        gram[cols, rows] = upper
        return gram, held

    def _cross_block(self, size: int, held: dict[str, Factors], batch: Batch) -> Tensor:
        """⟨g_i, g_j⟩ of the `size` held examples i and the batch's examples j, (I, J)."""
        total = _Total()

        def consume(site: Site, own: Factors) -> None:
            if site.name in held:
                b = own.examples
                pairs = torch.cartesian_prod(torch.arange(b), torch.arange(size))
                total.add(site, own, pairs, held[site.name])

        outputs = self._backward(batch, consume)
        return total.result(outputs, outputs.shape[0] * size).view(-1, size).T

    def _backward(self, batch: Batch, consume: Consume) -> Tensor:
        """One tapped forward and backward; `consume` meets each parameter's factors as they are complete."""
        gather = Gather(self._sites, batch, consume)
        rows = rows_of(batch)
        with tapped(self.model, gather.modules, gather.deliver) as taps:
            with nullcontext() if self._known_uses else Uses(self._sites) as uses:
                outputs = self._output(self.model(**batch), batch)
            if not isinstance(outputs, Tensor) or outputs.shape != (rows,) or not outputs.is_floating_point():
                got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                raise ValueError(f"output: wanted one floating-point scalar an example, ({rows},), got {got}")
            gather.start(taps.calls)
            if uses is not None:
                uses.check(taps.calls, self._sites)
                self._known_uses = True
            taps.backward(outputs)
        gather.finish()
        if gather.square and not self._known_layout:
            self._check_layout(batch, gather.square)
        return outputs.detach()

    def _check_layout(self, batch: Batch, modules: set[nn.Module]) -> None:
        """Where tokens and examples are equally many, one example alone tells which dimension is which."""
        first: list[int] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            first.append(input_of(args, kwargs).shape[0])

        handles = [module.register_forward_hook(look, with_kwargs=True) for module in modules]
        try:
            with torch.no_grad():
                self.model(**take(batch, slice(0, 1)))
        finally:
            for handle in handles:
                handle.remove()
        if any(size != 1 for size in first):
            raise ValueError("a chosen module's input does not carry the batch in its first dimension")
        self._known_layout = True

    def _pad_id(self) -> int | None:
        return getattr(getattr(self.model, "config", None), "pad_token_id", None)

    def _check_mode(self) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Influence needs a backward pass and cannot run under torch.inference_mode; use no_grad")
        for name, module in self.model.named_modules():
            if module.training and _is_random(module):
                raise RuntimeError(
                    f"{name} ({type(module).__name__}) drops activations at random or mixes examples in train "
                    "mode: call model.eval() first"
                )


class _Total:
    """Inner products summed over parameters, in fp32 or float64."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, site: Site, own: Factors, pairs: Tensor, other: Factors | None = None) -> None:
        part = site.products(own, pairs.to(own.d.device), other)
        self.value = part if self.value is None else self.value + part

    def over(self, pairs_of: Callable[[Factors], Tensor]) -> Consume:
        """A consumer that adds the products of the pairs chosen for each stream."""

        def consume(site: Site, own: Factors) -> None:
            self.add(site, own, pairs_of(own))

        return consume

    def result(self, outputs: Tensor, n: int) -> Tensor:
        """The sum, or zeros where no gradient reached any chosen parameter."""
        return _wide(outputs).new_zeros(n) if self.value is None else self.value


def _holding(held: dict[str, Factors]) -> Consume:
    def consume(site: Site, own: Factors) -> None:
        held[site.name] = own

    return consume


def _symmetric(blocks: list[list[Tensor]]) -> Tensor:
    """A symmetric matrix from its blocks on and above the diagonal."""
    sizes = [row[0].shape[0] for row in blocks]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    whole = blocks[0][0].new_empty(sum(sizes), sum(sizes))
    for n, row in enumerate(blocks):
        top = slice(starts[n], starts[n] + sizes[n])
        upper = torch.cat(row, 1)
        whole[top, starts[n] :] = upper
        whole[starts[n] :, top] = upper.T
    return whole


def _diagonal(own: Factors) -> Tensor:
    index = torch.arange(own.examples)
    return torch.stack([index, index], 1)


def _upper(own: Factors) -> Tensor:
    b = own.examples
    return torch.triu_indices(b, b).T.contiguous()


def _partners(n: int, m: int, reference_of: Tensor | None) -> Tensor:
    if reference_of is None:
        if m not in (1, n):
            raise ValueError(f"references: {m} for {n} candidates; wanted one for all, one each, or `reference_of`")
        return torch.zeros(n, dtype=torch.long) if m == 1 else torch.arange(n)
    if not isinstance(reference_of, Tensor):
        raise TypeError(f"reference_of: wanted a tensor of integers ({n},), got {type(reference_of).__name__}")
    if reference_of.shape != (n,) or reference_of.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"reference_of: {reference_of.dtype} {tuple(reference_of.shape)}; wanted integers ({n},)")
    reference_of = reference_of.long().cpu()
    if n and not (int(reference_of.min()) >= 0 and int(reference_of.max()) < m):
        raise ValueError(f"reference_of: indices must lie in [0, {m}), got {reference_of.tolist()}")
    return reference_of


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _first_logit(returned: Any) -> Tensor:
    return returned.logits[:, 0]


def _with_batch(output: Output) -> Callable[[Any, Mapping[str, Any]], Tensor]:
    """Let an output map take (returned) or (returned, batch): two parameters without defaults ask for both."""
    try:
        signature = inspect.signature(output.forward if isinstance(output, nn.Module) else output)
    except ValueError:  # some built-ins show none
        signature = inspect.Signature()
    accepts = signature.parameters.values()
    needed = [p for p in accepts if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    if len(needed) >= 2:
        return output
    return lambda returned, batch: output(returned)


def _is_random(module: nn.Module) -> bool:
    """Whether a module in train mode drops activations or lets examples meet in batch statistics."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(isinstance(value, float) and value > 0 and "drop" in name for name, value in vars(module).items())


def _refuse_wrapped(model: nn.Module) -> None:
    for module in model.modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if "OptimizedModule" in kinds or getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"model: {type(module).__name__} is compiled and taps cannot see inside it; "
                "pass the module before torch.compile"
            )
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise TypeError(f"model: {type(module).__name__} is FSDP-sharded; pass an unsharded model")
