"""Checks every identity of operator.md against autograd, in float64.

Run: python docs/math_check.py        (needs torch only; raises AssertionError where an identity fails)
Letters as in operator.md: b batch, h head before mixing, g head after mixing, i query, j key.
"""

import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
B, H, N, D, EPS = 3, 5, 7, 4, 1e-5
SCALE = D**-0.5
M = B * N * N


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


q, k, v = leaf(B, H, N, D), leaf(B, H, N, D), leaf(B, H, N, D)
theta, bias, gamma, beta = leaf(H, H), leaf(H), leaf(H), leaf(H)


def per_head(x):
    return x[:, None, None]


def mix(weight, p):
    return torch.einsum("bhij,hg->bgij", p, weight)


def reference(norm):
    """The definition, section 1."""
    a = mix(theta, (q @ k.mT * SCALE).softmax(-1)) + per_head(bias)
    if norm == "layer":
        a = F.layer_norm(a.permute(0, 2, 3, 1), (H,), gamma, beta, EPS).permute(0, 3, 1, 2)
    elif norm == "batch":
        a = F.batch_norm(a, None, None, gamma, beta, True, 0.0, EPS)
    return a @ v


@torch.no_grad()
def closed_form(norm, d_out):
    """The folded forward (section 2) and the backward (section 4), without autograd."""
    p = (q @ k.mT * SCALE).softmax(-1)
    d_norm = d_out @ v.mT
    if norm == "layer":
        weight, shift = theta - theta.mean(1, keepdim=True), bias - bias.mean()
        a = mix(weight, p) + per_head(shift)
        r = (a.square().mean(1, keepdim=True) + EPS).rsqrt()
        a_hat = a * r
        normed = a_hat * per_head(gamma) + per_head(beta)
        d_gamma, d_beta = (d_norm * a_hat).sum((0, 2, 3)), d_norm.sum((0, 2, 3))
        t = d_norm * per_head(gamma)
        d_a = r * (t - a_hat * (t * a_hat).mean(1, keepdim=True))
        d_weight, d_shift = torch.einsum("bhij,bgij->hg", p, d_a), d_a.sum((0, 2, 3))
        d_theta, d_bias = d_weight - d_weight.mean(1, keepdim=True), d_shift - d_shift.mean()
        d_p = torch.einsum("hg,bgij->bhij", weight, d_a)
    elif norm == "batch":
        cov = torch.einsum("bhij,bkij->hk", p - 1 / N, p - 1 / N) / M
        mean = theta.sum(0) / N + bias
        var = torch.einsum("hg,hk,kg->g", theta, cov, theta)
        a = mix(theta, p) + per_head(bias)
        torch.testing.assert_close(mean, a.mean((0, 2, 3)))
        torch.testing.assert_close(var, a.var((0, 2, 3), unbiased=False))
        s = gamma / (var + EPS).sqrt()
        weight, shift = theta * s, (bias - mean) * s + beta
        normed = mix(weight, p) + per_head(shift)
        out = normed @ v
        # Known before any sweep over the keys: only dO, O and V enter.
        d_shift = (d_out.sum(2) * v.sum(2)).sum((0, 2))
        d_var = -((d_out * out).sum((0, 2, 3)) - beta * d_shift) / (2 * (var + EPS))
        e = 2 / M * torch.einsum("g,hg,kg->hk", d_var, theta, theta)
        d_weight = torch.einsum("bhij,bgij->hg", p, d_norm)
        d_s = (d_weight * theta).sum(0) - d_shift * theta.sum(0) / N
        d_gamma, d_beta, d_bias = d_s / (var + EPS).sqrt(), d_shift, torch.zeros(H)
        d_theta = d_weight * s - d_shift * s / N + 2 * cov @ theta * d_var
        d_p = torch.einsum("hg,bgij->bhij", weight, d_norm) + torch.einsum("hk,bkij->bhij", e, p)
    else:
        normed = mix(theta, p) + per_head(bias)
        d_theta, d_bias = torch.einsum("bhij,bgij->hg", p, d_norm), d_norm.sum((0, 2, 3))
        d_gamma = d_beta = None
        d_p = torch.einsum("hg,bgij->bhij", theta, d_norm)
    delta = (p * d_p).sum(-1, keepdim=True)
    d_s_logits = p * (d_p - delta)
    d_q = SCALE * d_s_logits @ k
    torch.testing.assert_close(d_q, SCALE * ((p * d_p) @ k - delta * (p @ k)))  # one sweep, two accumulators
    d_k = SCALE * d_s_logits.mT @ q
    d_v = normed.mT @ d_out
    return normed @ v, (d_q, d_k, d_v, d_theta, d_bias, d_gamma, d_beta)


for norm in (None, "layer", "batch"):
    out = reference(norm)
    d_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v, theta, bias, gamma, beta), d_out, allow_unused=True)
    got_out, got = closed_form(norm, d_out)
    torch.testing.assert_close(got_out, out, rtol=1e-10, atol=1e-11)
    for name, e, g in zip(("q", "k", "v", "theta", "bias", "gamma", "beta"), expected, got, strict=True):
        assert (e is None) == (g is None), name
        if e is not None:
            torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-11, msg=lambda m, at=f"{norm} d{name}": f"{at}: {m}")
    print(f"norm={norm}: forward and all gradients agree")
