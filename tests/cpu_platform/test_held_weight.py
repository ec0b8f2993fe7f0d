"""Weights that are held once: what is stored, what a reader gets, and what a loader writes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rksc_sgl.cpu_platform.held_weight import Held, HeldWeight, exact_type, float32_rows, load_into
from rksc_sgl.errors import HeldWeightError

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def parameter(numbers: torch.Tensor | None = None, **more: object) -> torch.nn.Parameter:
    held = Held(50, 37, **more)  # type: ignore[arg-type]
    if numbers is not None:
        held.replace(numbers)
    return torch.nn.Parameter(HeldWeight(held), requires_grad=False)


@pytest.mark.parametrize(
    ("stored", "more", "result"),
    [(None, BF16, BF16), (None, torch.float64, F32), (BF16, BF16, BF16), (BF16, F16, F32), (F32, BF16, F32)],
)
def test_a_type_has_the_numbers_of_both(stored: torch.dtype | None, more: torch.dtype, result: torch.dtype) -> None:
    assert exact_type(stored, more) == result


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("inference", [False, True])
def test_whoever_reads_the_parameter_gets_the_float32_numbers(dtype: torch.dtype, inference: bool) -> None:
    numbers = torch.randn(50, 37).to(dtype)
    weight, dense, x = parameter(numbers), numbers.float(), torch.randn(3, 37)
    assert isinstance(weight, torch.nn.Parameter) and weight.held.dtype == dtype
    assert (weight.shape, weight.dtype, weight.device.type) == (dense.shape, F32, "cpu")
    with torch.inference_mode(inference):
        assert torch.equal(F.linear(x, weight), F.linear(x, dense))
        assert torch.equal(x @ weight.T, x @ dense.T)
        assert torch.equal(F.embedding(torch.tensor([3, 49]), weight), dense[[3, 49]])
        assert torch.equal(weight[7:9], dense[7:9]) and torch.equal(weight.data.narrow(0, 1, 2), dense[1:3])
        assert weight.cpu().to(F32).numpy().tolist() == weight.tolist() == dense.tolist()
        layer = torch.nn.Module()
        layer.weight = weight
        assert torch.equal(float32_rows(layer), dense)
        assert torch.equal(layer.state_dict()["weight"].sum(0), dense.sum(0))


def test_an_ordinary_weight_is_its_own_float32_rows() -> None:
    layer = torch.nn.Linear(3, 4)
    assert float32_rows(layer) is layer.weight


def test_what_is_written_to_all_of_it_is_stored_in_a_type_that_has_it() -> None:
    weight = parameter(torch.randn(50, 37).to(BF16))
    other = torch.randn(50, 37).to(F16)
    with torch.inference_mode():
        weight.data.copy_(other)
        assert weight.held.dtype == F16 and torch.equal(weight.held.float32(), other.float())
        weight.mul_(1 / 3)
        assert weight.held.dtype == F32 and torch.equal(weight.held.float32(), other.float() * (1 / 3))
        weight.copy_(parameter(other))
    assert torch.equal(weight.held.float32(), other.float())
    with pytest.raises(ValueError, match=r"\[50, 37\] cannot become one of \[3, 3\]"):
        weight.held.replace(torch.randn(3, 3))


def test_made_up_numbers_have_the_type_that_the_configuration_names() -> None:
    weight = parameter(declared=BF16)
    weight.uniform_(-1, 1)
    assert weight.held.dtype == BF16 and weight.held.float32().std() > 0.4
    assert parameter(declared=BF16).held.panels().dtype == BF16


def test_a_target_whose_result_would_be_lost_is_refused_by_name() -> None:
    with pytest.raises(HeldWeightError, match="mm"):
        torch.mm(torch.randn(50, 5), torch.randn(5, 37), out=parameter(torch.randn(50, 37)))


def _load_shard(param: torch.nn.Parameter, loaded: torch.Tensor, first: int = 0) -> None:
    """As SGLang's loaders of merged layers do."""
    assert param.output_dim == 0
    param.data.narrow(param.output_dim, first, len(loaded)).copy_(loaded)


@pytest.mark.parametrize("in_rows", [False, True])
def test_a_loader_writes_shard_by_shard_and_other_weights_may_come_between(in_rows: bool) -> None:
    weight, between = parameter(in_rows=in_rows), parameter()
    weight.output_dim = between.output_dim = 0
    load, parts = load_into(_load_shard), torch.randn(50, 37).to(BF16).split([20, 25, 5])
    load(weight, parts[0], 0)
    load(between, torch.randn(50, 37).to(BF16))
    assert (weight.held._panels is None) is in_rows, "one weight at a time lies in rows because it is written to"
    load(weight, parts[2], 45)
    load(weight, parts[1], first=20)
    assert weight.held.dtype == BF16 and torch.equal(weight.held.float32(), torch.cat(parts).float())
    assert torch.equal(weight.held.lookup(torch.tensor([44])), parts[1][24:].float())
    x, whole = torch.randn(3, 37), Held(50, 37)
    whole.replace(torch.cat(parts).float())
    assert torch.equal(weight.held.panels()(x, None), whole.panels()(x, None))
    assert torch.equal(weight.held.lookup(torch.tensor([44])), parts[1][24:].float())


def test_a_shard_of_another_type_makes_the_whole_weight_one_that_has_both() -> None:
    weight = parameter(torch.randn(50, 37).to(BF16))
    weight.output_dim = 0
    before, shard = weight.held.float32(), torch.randn(5, 37)
    load_into(_load_shard)(weight, shard, 10)
    assert weight.held.dtype == F32
    assert torch.equal(weight.held.float32(), torch.cat((before[:10], shard, before[15:])))


def test_an_update_of_loaded_weights_is_what_is_used_next() -> None:
    weight = parameter(torch.randn(50, 37).to(BF16))
    weight.output_dim = 0
    weight.held.panels()
    numbers, x = torch.randn(50, 37).to(BF16), torch.eye(37)
    load_into(_load_shard)(weight, numbers)
    assert torch.equal(weight.held.panels()(x, None), numbers.float().T)
    assert weight.held._rows is None, "held once"
