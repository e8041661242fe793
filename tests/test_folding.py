"""Every norm in its canonical form, against torch's norms on materialised maps; heads x heads tensors only."""

import pytest
import torch
import torch.nn.functional as F

from reattn import folding

# An eps that shows.
HEADS, EPS = 4, 0.05


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def maps():
    return normal(2, HEADS, 5, 7, seed=9).mul(2).softmax(-1)


def optional(present):
    """bias, norm_weight, norm_bias."""
    return (normal(HEADS, seed=1), 1 + 0.5 * normal(HEADS, seed=2), normal(HEADS, seed=3)) if present else (None,) * 3


def mix(weight, shift, maps):
    mixed = torch.einsum("hg,bhij->bgij", weight, maps)
    return mixed if shift is None else mixed + shift[:, None, None]


def evaluate(canonical, maps):
    """What the kernels compute, as the module's docstring has it."""
    mixed = mix(canonical.weight, canonical.shift, maps)
    if canonical.gamma is None:
        return mixed
    unit = mixed * (mixed.square().mean(1, keepdim=True) + EPS).rsqrt()
    return unit * canonical.gamma[:, None, None] + canonical.beta[:, None, None]


presence = pytest.mark.parametrize("present", [True, False], ids=["optional-tensors", "theta-alone"])


@presence
def test_plain(present, maps):
    theta, (bias, _, _) = normal(HEADS, HEADS), optional(present)
    canonical = folding.fold_plain(theta, bias, 0.5)
    assert canonical.gamma is None and canonical.beta is None
    torch.testing.assert_close(evaluate(canonical, maps), 0.5 * mix(theta, bias, maps))


@presence
def test_layer(present, maps):
    theta, (bias, weight, shift) = normal(HEADS, HEADS), optional(present)
    expected = F.layer_norm(mix(theta, bias, maps).movedim(1, -1), (HEADS,), weight, shift, EPS).movedim(-1, 1)
    canonical = folding.fold_layer(theta, bias, weight, shift, 0.5)
    torch.testing.assert_close(evaluate(canonical, maps), 0.5 * expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(canonical.weight.sum(1), torch.zeros(HEADS), rtol=0, atol=1e-5)


@presence
def test_batch(present, maps):
    theta, (bias, weight, shift) = normal(HEADS, HEADS), optional(present)
    mean, var = normal(HEADS, seed=4), normal(HEADS, seed=5).square()
    expected = F.batch_norm(mix(theta, bias, maps), mean, var, weight, shift, eps=EPS)
    canonical = folding.fold_batch(theta, bias, mean, var, weight, shift, EPS, 0.5)
    assert canonical.gamma is None
    torch.testing.assert_close(evaluate(canonical, maps), 0.5 * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_canonical_tensors_are_float32(dtype):
    theta, statistics = normal(HEADS, HEADS).to(dtype), torch.ones(2, HEADS, dtype=dtype)
    forms = (
        folding.fold_plain(theta, None, 1.0),
        folding.fold_layer(theta, None, None, None, 1.0),
        folding.fold_batch(theta, None, *statistics, None, None, EPS, 1.0),
    )
    assert all(tensor is None or tensor.dtype == torch.float32 for form in forms for tensor in form)


def moments(maps):
    """Mean (heads,) and covariance (heads, heads) of the maps over batch, rows and keys."""
    by_head = maps.transpose(0, 1).flatten(1)
    return by_head.mean(1), by_head.cov(correction=0)


@presence
def test_mixed_moments(present, maps):
    theta, (bias, _, _) = normal(HEADS, HEADS), optional(present)
    mean, var = folding.mixed_moments(theta, bias, *moments(maps.double()))
    mixed = mix(theta, bias, maps).double()
    assert mean.dtype == var.dtype == torch.float64
    torch.testing.assert_close(mean, mixed.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, mixed.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-7)


def test_moments_of_nearly_equal_heads(maps):
    """Weights that cancel what the heads share leave a variance far below that of any head."""
    alike = maps[:, :1] + 1e-4 * maps
    theta = normal(HEADS, HEADS)
    theta = theta - theta.mean(0)
    _, var = folding.mixed_moments(theta, None, *moments(alike.double()))
    expected = mix(theta.double(), None, alike.double()).var((0, 2, 3), correction=0)
    assert expected.max() < 1e-7
    torch.testing.assert_close(var, expected, rtol=1e-6, atol=0)


def test_coupling_is_the_gradient_through_the_statistics():
    """Training's gradient of the maps is that with constant statistics plus E (P - 1/seqlen_k) + e, rows of any sum."""
    maps = normal(2, HEADS, 5, 7, seed=9, dtype=torch.float64).softmax(-1) * 1.3
    maps = maps.masked_fill(normal(2, HEADS, 5, 7, seed=8) < -0.5, 0.0).requires_grad_()
    theta, value = normal(HEADS, HEADS).double(), normal(2, HEADS, 7, 3, seed=6).double()
    bias, weight, shift = (tensor.double() for tensor in optional(True))
    grad = normal(2, HEADS, 5, 3, seed=7).double()

    mixed = mix(theta, bias, maps)
    out = F.batch_norm(mixed, None, None, weight, shift, training=True, eps=EPS) * 0.5 @ value
    (expected,) = torch.autograd.grad(out, maps, grad)

    map_mean, map_cov = moments(maps.detach())
    mean, var = folding.mixed_moments(theta, bias, map_mean, map_cov)
    canonical = folding.fold_batch(theta, bias, mean, var, weight, shift, EPS, 0.5)
    positions = torch.tensor([2 * 5 * 7.0])
    coupling = folding.couple(canonical, theta, var, shift, map_mean, positions, EPS, 0.5)
    grad_dot_out = (grad * out.detach()).sum((0, 2, 3)).float()
    grad_shift = torch.einsum("bgid,bgjd->g", grad, value).float()
    coupled, constant = folding.coupling_gradient(coupling, grad_dot_out, grad_shift, 7)

    (direct,) = torch.autograd.grad((evaluate(canonical, maps.float()) @ value.float()), maps, grad.float())
    through = torch.einsum("hk,bkij->bhij", coupled, maps.detach().float() - 1 / 7) + constant[:, None, None]
    torch.testing.assert_close(direct.float() + through, expected.float(), rtol=1e-3, atol=1e-3)
    assert (through.abs().max() > 0.1) and not torch.allclose(direct, expected, rtol=0.01, atol=0.01)


def test_mixing_bias_has_no_gradient_under_batch_statistics():
    theta, (bias, weight, shift) = normal(HEADS, HEADS), optional(True)
    bias.requires_grad_()
    mean, var = folding.mixed_moments(theta, bias, torch.full((HEADS,), 1 / 7).double(), torch.eye(HEADS).double())
    canonical = folding.fold_batch(theta, bias, mean, var, weight, shift, EPS, 1.0)
    canonical.shift.backward(normal(HEADS, seed=4))
    assert not bias.grad.any()
