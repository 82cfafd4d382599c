"""A weight laid out once gives the bits of the plain product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from upslope.kernels.products import Product, can_pack


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_packed_is_the_plain_product(rows: int) -> None:
    weight, x = torch.randn(96, 64), torch.randn(rows, 64).bfloat16()
    product = Product(weight[:32], weight[32:], dtype=torch.bfloat16)
    assert product.packed == can_pack(weight.bfloat16())
    bias = torch.randn(96).bfloat16()
    wide = x.double() @ weight.bfloat16().double().t() + bias.double()
    assert torch.equal(product.dense(), weight.bfloat16())
    assert float((product(x, bias).double() - wide).abs().max()) < 0.3
    assert torch.equal(
        product(x.expand(64, -1) if rows == 1 else x)[:rows], F.linear(x.repeat(64, 1), product.dense())[:rows]
    )


def test_load_takes_new_values() -> None:
    weight = torch.randn(8, 16)
    product = Product(weight, dtype=torch.float32)
    weight += 1.0
    assert not torch.equal(product.dense(), weight)  # its own copy
    product.load(weight)
    assert torch.equal(product.dense(), weight)
    assert product(torch.ones(2, 16)).shape == (2, 8)
