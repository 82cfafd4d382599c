"""Element-wise operations against composed ones, and their second derivatives, which the Fisher products need."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import tiny_decoder
from upslope.algo import token_kl
from upslope.models.ops import RMSNorm, SwiGLU
from upslope.ragged import Ragged


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_rms_norm_and_its_first_two_derivatives(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.double, requires_grad=True)
    function = lambda a, w: RMSNorm.apply(a, w, 1e-5)
    torch.testing.assert_close(function(x, weight), F.rms_norm(x, shape[-1:], weight, 1e-5))
    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))


def test_swiglu_and_its_first_two_derivatives():
    torch.manual_seed(0)
    shapes = ((3, 4), (3, 4), (5, 4))
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    gate, up, weight = inputs
    torch.testing.assert_close(SwiGLU.apply(*inputs), F.linear(F.silu(gate) * up, weight))
    assert torch.autograd.gradcheck(SwiGLU.apply, inputs)
    assert torch.autograd.gradgradcheck(SwiGLU.apply, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_as_compiled_is_the_composed_one(dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((9, 32), (9, 32), (16, 32))]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    pull = torch.randn(9, 16)
    found = (SwiGLU.apply(*inputs), *torch.autograd.grad(SwiGLU.apply(*inputs), inputs, pull.to(dtype)))
    out = F.linear(F.silu(wide[0]) * wide[1], wide[2])
    expected = (out, *torch.autograd.grad(out, wide, pull.to(dtype).double()))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * theirs.norm()


@pytest.mark.parametrize("shape", [{}, {"norm": "layer", "position": "learned", "mlp": "plain"}, {"qk_norm": True}])
def test_c36_the_fisher_product_of_a_whole_decoder_is_the_kls_second_derivative(shape):
    """Double backward through every layer against finite differences of the gradient, in float64."""
    model = tiny_decoder(scale=3.0, **shape).double()
    model.compute_dtype = torch.double
    batch = Ragged.of([[3, 1], [4, 1, 5], [9, 2]], [-1, 0, 0])
    old_hidden = model.hidden(batch).detach()
    old_weight = model.output_weight.detach().clone()
    parameters = list(model.parameters())

    def gradient(graph=False):
        kl = token_kl(model.hidden(batch), model.output_weight, old_hidden, old_weight).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(kl, parameters, create_graph=graph)])

    def nudge(amount):
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters) + amount, parameters)

    torch.manual_seed(1)
    v = torch.randn(sum(p.numel() for p in parameters), dtype=torch.double)
    product = torch.cat([h.flatten() for h in torch.autograd.grad(gradient(graph=True) @ v, parameters)])
    nudge(1e-6 * v)
    high = gradient()
    nudge(-2e-6 * v)
    low = gradient()
    torch.testing.assert_close(product, (high - low) / 2e-6, atol=1e-6, rtol=1e-4)
    assert product.norm() > 0.1 and product @ v > 0
