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


for norm in (None, "layer"):
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


# Batch norm in training, in one pass (sections 2 and 4): with dropout, with keys that a mask hides, and with a head
# that gamma switches off. Hidden positions have weight 0 and do not count in the statistics.
OUT = 0.7  # output_scale


def batch_norm_by_definition(theta, bias, gamma, beta, keep, visible):
    scores = (q @ k.mT * SCALE).masked_fill(~visible, -torch.inf)
    a = mix(theta, scores.softmax(-1) * keep) + per_head(bias)
    count = visible.sum()
    mean = (a * visible).sum((0, 2, 3)) / count
    var = ((a - per_head(mean)).square() * visible).sum((0, 2, 3)) / count
    normed = (a - per_head(mean)) * per_head((var + EPS).rsqrt() * gamma) + per_head(beta)
    return OUT * (normed * visible) @ v, mean, var


@torch.no_grad()
def batch_norm_in_one_pass(theta, bias, gamma, beta, keep, visible, d_out):
    count, over = visible.sum(), (0, 2, 3)
    centre = B * N / count  # any number would do; this one is the mean of P where nothing is dropped
    p = (q @ k.mT * SCALE).masked_fill(~visible, -torch.inf).softmax(-1)
    # The sweep: mixed maps with the weights as they are, times V, and two sums by head.
    a = mix(theta, p * keep - centre) * visible
    u, sums, squares = a @ v, a.sum(over), a.square().sum(over)
    # The epilogue: what is known of the whole batch, and an elementwise pass over the output.
    seen = visible.to(v.dtype) @ v  # without a mask one row a sample
    offset = sums / count
    var = squares / count - offset.square()
    rstd = (var + EPS).rsqrt()
    slope, shift = OUT * gamma, OUT * beta
    out = per_head(slope * rstd) * (u - per_head(offset) * seen) + per_head(shift) * seen
    mean = offset + centre * theta.sum(0) + bias
    # Backward: two sums by head before any sweep, no division by gamma, no heads x heads matrix.
    of_out, of_values = (d_out * out).sum(over), (d_out * seen).sum(over)
    common, along = slope * of_values / count, (of_out - shift * of_values) / count
    weight = theta * rstd
    a_hat = (a - per_head(offset)) * per_head(rstd) * visible
    d_norm = d_out @ v.mT * visible
    d_a = (per_head(slope) * d_norm - per_head(common) - per_head(along) * a_hat) * visible
    d_theta = torch.einsum("bhij,bgij->hg", p * keep, d_a) * rstd
    d_gamma, d_beta = OUT * (d_norm * a_hat).sum(over), OUT * of_values
    d_p = torch.einsum("hg,bgij->bhij", weight, d_a) * keep
    d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True))
    d_v = ((per_head(slope) * a_hat + per_head(shift)) * visible).mT @ d_out
    return out, mean, var, (SCALE * d_s @ k, SCALE * d_s.mT @ q, d_v, d_theta, torch.zeros(H), d_gamma, d_beta)


with torch.no_grad():
    gamma[2] = 0.0
MASKS = {
    "all": torch.ones(B, 1, N, N, dtype=torch.bool),
    "padding": (torch.arange(N) < torch.tensor([N, 4, 6])[:, None, None, None]).expand(B, 1, N, N),
    "causal": torch.ones(N, N, dtype=torch.bool).tril().expand(B, 1, N, N),
}
for name, visible in MASKS.items():
    for rate in (0.0, 0.3):
        keep = (torch.rand(B, H, N, N) >= rate).double() / (1 - rate)
        leaves = (q, k, v, theta, bias, gamma, beta)
        out, mean, var = batch_norm_by_definition(theta, bias, gamma, beta, keep, visible)
        d_out = torch.randn_like(out)
        expected = torch.autograd.grad(out, leaves, d_out)
        got_out, got_mean, got_var, got = batch_norm_in_one_pass(theta, bias, gamma, beta, keep, visible, d_out)
        for found, right in ((got_out, out), (got_mean, mean), (got_var, var), *zip(got, expected, strict=True)):
            torch.testing.assert_close(found, right.detach(), rtol=1e-9, atol=1e-10)
        print(f"norm=batch, visible: {name}, dropout {rate}: forward, statistics and all gradients agree")
