"""`fingerprint`: by which model, with which weights, something was computed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

WHOLE_BYTES = 1 << 20  # tensors up to this size are hashed as they are
# Larger ones by this many sums, 32 KiB. A prime: rows of a matrix that change places meet other columns.
COLUMNS = 4099


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """32 hex digits that change with the weights: BLAKE2b over every entry of `model.state_dict()`, by name.

    An entry counts with its name, shape, dtype and values; a tensor that has several names counts once, and its
    other names as names of it. Parameters, persistent buffers and the scales of quantised weights are entries.
    Every byte is read, on the device where it is, and the result does not depend on the device: tensors up to 1 MiB
    are hashed themselves, larger ones by the sums (mod 2^64) of their 64-bit words over the columns of a matrix
    4099 words wide. Any single value that changes is seen, and so is training; changes of several values of one
    large tensor that cancel in a column, which chance does not make, are not.

    Not seen: what is no entry — the model's code and configuration, train or eval mode, what `requires_grad`,
    buffers that are not persistent (rotary tables change with the longest text seen), extra state that is no tensor.

    Raises:
        ValueError: a tensor on the meta device, or a kind without bytes of its own (sparse, sharded); it is named.
    """
    digest = hashlib.blake2b(digest_size=16)
    seen: dict[int, str] = {}
    for name, entry in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(entry, Tensor):
            continue
        first = seen.setdefault(id(entry), name)
        described = f"{name} {tuple(entry.shape)} {entry.dtype} {first}\n" if first == name else f"{name} = {first}\n"
        digest.update(described.encode())
        if first == name:
            digest.update(_essence(name, entry))
    return digest.hexdigest()


def _essence(name: str, entry: Tensor) -> bytes:
    if entry.is_meta:
        raise ValueError(f"model: {name} is on the meta device, it has no values to tell models apart by")
    try:
        data = entry.detach().reshape(-1).contiguous().view(torch.uint8)
        if data.data_ptr() % 8:
            data = data.clone()  # words need an aligned beginning
    except (RuntimeError, NotImplementedError) as problem:
        raise ValueError(f"model: {name} is a {type(entry).__name__} whose bytes cannot be read: {problem}") from None
    if data.numel() <= WHOLE_BYTES:
        return data.cpu().numpy().tobytes()
    body = data.numel() // (8 * COLUMNS) * (8 * COLUMNS)
    sums = data[:body].view(torch.int64).view(-1, COLUMNS).sum(0)
    return sums.cpu().numpy().tobytes() + data[body:].cpu().numpy().tobytes()
