"""`fingerprint`: the same for the same weights, another for any single value that changes."""

import copy

import pytest
import torch
from torch import nn

import fpo_kernels as fk
from fpo_kernels.fingerprint import COLUMNS


class Tied(nn.Module):
    """A large and a small weight, two names of one parameter, buffers of both kinds."""

    def __init__(self, dtype=torch.float32, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(1201, 301, dtype=dtype)  # above 1 MiB in fp32, of odd size
        self.head = nn.Linear(301, 3, bias=False, dtype=dtype)
        self.again = nn.Linear(301, 3, bias=False, dtype=dtype)
        with torch.no_grad():
            self.again.weight.copy_(self.head.weight)
        if tied:
            self.again.weight = self.head.weight
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def changed(model, name, place, value):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.state_dict(keep_vars=True)[name].view(-1)[place] = value
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_same_weights_have_the_same_fingerprint(dtype):
    model = Tied(dtype)
    found = fk.fingerprint(model)
    assert len(found) == 32
    assert int(found, 16)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    twin.cache += 1
    assert fk.fingerprint(twin) == found
    # Another storage, where weights begin at odd places and rows are apart.
    spread = torch.zeros(1201 * 302 + 1, dtype=dtype)[1:].view(1201, 302)[:, 1:]
    twin.embedding.weight = nn.Parameter(spread.copy_(model.embedding.weight))
    flat = torch.cat([torch.zeros(1, dtype=dtype), model.embedding.weight.detach().flatten()])
    assert fk.fingerprint(twin) == found
    twin.embedding.weight = nn.Parameter(flat[1:].view(1201, 301))
    assert twin.embedding.weight.data_ptr() % 8 == dtype.itemsize % 8
    assert fk.fingerprint(twin) == found


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight", "mean"])
def test_any_value_counts(name):
    model = Tied()
    found, size = fk.fingerprint(model), model.state_dict()[name].numel()
    for place in {0, size - 1, *torch.randint(size, (5,)).tolist()}:
        last_bit = torch.nextafter(model.state_dict()[name].view(-1)[place], torch.tensor(9.0))
        other = changed(model, name, place, last_bit)
        assert fk.fingerprint(other) != found
        assert fk.fingerprint(changed(other, name, place, model.state_dict()[name].view(-1)[place])) == found


@pytest.mark.parametrize("width", [1024, 2 * COLUMNS])
def test_rows_of_a_large_weight_that_change_places_count(width):
    model = nn.Linear(width, 600, bias=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.weight[[3, 5]] = model.weight[[5, 3]]
    # At twice 4099 fp32 numbers a row the columns of the sums are those of the matrix: the stated blind spot.
    assert (fk.fingerprint(other) == fk.fingerprint(model)) == (width == 2 * COLUMNS)


def test_names_shapes_dtypes_and_ties_count():
    model = Tied()
    untied = Tied(tied=False)
    untied.load_state_dict(model.state_dict())
    reshaped, renamed = copy.deepcopy(model), copy.deepcopy(model)
    reshaped.mean = reshaped.mean.view(1, 2)
    renamed.body = renamed.embedding
    del renamed.embedding
    integers = copy.deepcopy(model)
    integers.mean = integers.mean.view(torch.int32)
    found = [fk.fingerprint(m) for m in (model, untied, reshaped, renamed, integers)]
    assert len(set(found)) == 5


def test_the_order_of_registration_does_not_count():
    first, second = nn.ModuleDict(), nn.ModuleDict()
    parts = {"a": nn.Linear(2, 3), "b": nn.Linear(3, 2)}
    for name in "ab":
        first[name] = parts[name]
    for name in "ba":
        second[name] = parts[name]
    assert fk.fingerprint(first) == fk.fingerprint(second)


def test_packed_and_empty_weights_are_read():
    def model(last):
        packed = nn.Module()
        packed.weight = nn.Parameter(torch.tensor([[1], [2], [last]], dtype=torch.uint8), requires_grad=False)
        packed.nothing = nn.Parameter(torch.empty(0, 3))
        packed.scale = nn.Parameter(torch.tensor(2.0))
        packed.set_extra_state = packed.get_extra_state = lambda *_: {"not": "a tensor"}
        return packed

    assert fk.fingerprint(model(3)) == fk.fingerprint(model(3)) != fk.fingerprint(model(4))


def test_what_has_no_bytes_is_refused():
    with pytest.raises(ValueError, match=r"model: 0\.bias is on the meta device"):
        fk.fingerprint(nn.Sequential(nn.Linear(2, 2, device="meta")))
    model = nn.Module()
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="model: adjacency is a Tensor whose bytes cannot be read"):
        fk.fingerprint(model)
