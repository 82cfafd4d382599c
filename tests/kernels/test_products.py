"""A weight laid out once gives the plain product, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import random
from upslope.kernels import cpu
from upslope.kernels.products import Product, layout_for


@pytest.fixture(params=["panels", "blocked", "plain"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "panels":
        monkeypatch.setattr(cpu, "multiplies", lambda: False)
    if request.param == "plain":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    if layout_for(torch.zeros(2, 2, dtype=torch.bfloat16)) != request.param:
        pytest.skip(f"this processor has nothing for weights as {request.param}")
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 3, 8, 21, 130])
@pytest.mark.parametrize(("outputs", "width"), [(96, 64), (49, 34), (17, 2)])
def test_a_product_of_joined_weights_with_a_bias(layout: str, rows: int, outputs: int, width: int) -> None:
    weight, x = random(outputs, width), random(rows, width, seed=1).bfloat16()
    product = Product(weight[:9], weight[9:], dtype=torch.bfloat16)
    assert product.layout == layout
    assert torch.equal(product.dense(), weight.bfloat16())
    bias = random(outputs, seed=2).bfloat16()
    plain = x.double() @ weight.bfloat16().double().t()
    for found, exact in ((product(x), plain), (product(x, bias), plain + bias.double())):
        assert found.shape == (rows, outputs)
        assert float(((found.double() - exact) / exact.abs().clamp_min(0.1)).abs().max()) < 2**-7


def test_a_row_does_not_depend_on_the_others(layout: str) -> None:
    product, x = Product(random(80, 128), dtype=torch.bfloat16), random(70, 128, seed=1).bfloat16()
    whole = product(x)
    if layout == "panels":
        for rows in (1, 2, 7, 9, 64, 65):
            assert torch.equal(product(x[:rows]), whole[:rows])
    assert torch.equal(product(x.flip(0)).flip(0), whole)


@pytest.mark.skipif(not cpu.multiplies(), reason="this processor has no instructions for products in bf16")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    product, x = Product(random(80, 128), dtype=torch.bfloat16), random(70, 128, seed=1).bfloat16()
    whole, before = product(x), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(product(x), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not cpu.multiplies(), reason="this processor has no instructions for products in bf16")
def test_panels_hold_pairs_of_a_row_side_by_side() -> None:
    weight = torch.arange(3 * 4).view(3, 4).bfloat16()
    panels = cpu.panels_of(weight)
    assert panels.shape == (1, 2, cpu.PANEL, 2)
    assert panels[0, :, :3].tolist() == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]
    assert not panels[0, :, 3:].any()
    assert torch.equal(cpu.rows_of(panels, 3), weight)


def test_nan_and_infinity_go_through() -> None:
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    x[0, 1] = float("nan")
    weight = torch.ones(3, 4)
    weight[1, 2] = float("inf")
    found = Product(weight, dtype=torch.bfloat16)(x)
    assert found[0].isnan().all() and found[1].tolist() == [4.0, float("inf"), 4.0]


def test_load_takes_new_values() -> None:
    weight = torch.randn(8, 16)
    product = Product(weight, dtype=torch.float32)
    weight += 1.0
    assert not torch.equal(product.dense(), weight)  # its own copy
    product.load(weight)
    assert torch.equal(product.dense(), weight)
    assert torch.equal(product(torch.ones(2, 16)), F.linear(torch.ones(2, 16), weight))
