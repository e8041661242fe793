"""Checks every identity of operator.md against autograd, in float64.

Run: python docs/math_check.py        (needs torch only; raises AssertionError where an identity fails)
Letters as in operator.md: b batch, k head of query and key, h head of the softmax, g head after mixing, i query, j key.
All with mixing before the softmax, with an additive mask that the batch shares, and with keys that another mask hides.
"""

import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
B, H, N, D, EPS = 3, 5, 7, 4, 1e-5
SCALE = D**-0.5
OUT = 0.7  # output_scale
OVER = (0, 2, 3)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


q, k, v = leaf(B, H, N, D), leaf(B, H, N, D), leaf(B, H, N, D)
pre_theta, pre_bias, added = leaf(H, H), leaf(H), leaf(1, H, N, N)
theta, bias, gamma, beta = leaf(H, H), leaf(H), leaf(H), leaf(H)
NAMES = ("q", "k", "v", "pre_theta", "pre_bias", "added", "theta", "bias", "gamma", "beta")
LEAVES = (q, k, v, pre_theta, pre_bias, added, theta, bias, gamma, beta)
MASKS = {
    "all": torch.ones(B, 1, N, N, dtype=torch.bool),
    "padding": (torch.arange(N) < torch.tensor([N, 4, 6])[:, None, None, None]).expand(B, 1, N, N),
    "causal": torch.ones(N, N, dtype=torch.bool).tril().expand(B, 1, N, N),
    "by head": torch.rand(B, H, N, N) < 0.4,  # some queries see nothing
}


def per_head(x):
    return x[:, None, None]


def mix(weight, p):
    return torch.einsum("bhij,hg->bgij", p, weight)


def visible_softmax(visible):
    """P, 0 where a key is hidden and where a query sees none."""
    s = mix(pre_theta, q @ k.mT * SCALE) + per_head(pre_bias) + added
    weights = s.exp() * visible
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def below_the_maps(p, d_p):
    """Gradients of all that comes before P."""
    delta = (p * d_p).sum(-1, keepdim=True)
    d_s = p * (d_p - delta)
    d_r = torch.einsum("bhij,kh->bkij", d_s, pre_theta)
    d_pre_theta = torch.einsum("bkij,bhij->kh", q @ k.mT * SCALE, d_s)
    # The softmax takes away what is added to a whole row.
    torch.testing.assert_close(d_s.sum(OVER), torch.zeros(H))
    return SCALE * d_r @ k, SCALE * d_r.mT @ q, d_pre_theta, torch.zeros(H), d_s.sum(0, keepdim=True)


def definition(norm, visible):
    """Section 1."""
    a = mix(theta, visible_softmax(visible)) + per_head(bias)
    if norm == "layer":
        a = F.layer_norm(a.permute(0, 2, 3, 1), (H,), gamma, beta, EPS).permute(0, 3, 1, 2)
    return (a * visible) @ v


@torch.no_grad()
def closed_form(norm, visible, d_out):
    """The folded forward (section 2) and the backward (sections 4 and 5), without autograd."""
    p = visible_softmax(visible)
    d_norm = d_out @ v.mT * visible
    if norm == "layer":
        weight, shift = theta - theta.mean(1, keepdim=True), bias - bias.mean()
        a = mix(weight, p) + per_head(shift)
        r = (a.square().mean(1, keepdim=True) + EPS).rsqrt()
        a_hat = a * r
        normed = a_hat * per_head(gamma) + per_head(beta)
        d_gamma, d_beta = (d_norm * a_hat).sum(OVER), d_norm.sum(OVER)
        t = d_norm * per_head(gamma)
        d_a = r * (t - a_hat * (t * a_hat).mean(1, keepdim=True))
        d_weight, d_shift = torch.einsum("bhij,bgij->hg", p, d_a), d_a.sum(OVER)
        d_theta, d_bias = d_weight - d_weight.mean(1, keepdim=True), d_shift - d_shift.mean()
        d_p = torch.einsum("hg,bgij->bhij", weight, d_a)
    else:
        normed = mix(theta, p) + per_head(bias)
        d_theta, d_bias = torch.einsum("bhij,bgij->hg", p, d_norm), d_norm.sum(OVER)
        d_gamma = d_beta = None
        d_p = torch.einsum("hg,bgij->bhij", theta, d_norm)
    normed = normed * visible
    d_q, d_k, *of_scores = below_the_maps(p, d_p)
    return normed @ v, (d_q, d_k, normed.mT @ d_out, *of_scores, d_theta, d_bias, d_gamma, d_beta)


def assert_all_agree(out, d_out, found, grads):
    torch.testing.assert_close(found, out, rtol=1e-10, atol=1e-11)
    expected = torch.autograd.grad(out, LEAVES, d_out, allow_unused=True)
    for name, right, grad in zip(NAMES, expected, grads, strict=True):
        assert (right is None) == (grad is None), name
        if right is not None:
            torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-10, msg=lambda m, at=name: f"d{at}: {m}")


# Two accumulators in one sweep, in the place of D (section 4).
with torch.no_grad():
    p, d_p = visible_softmax(MASKS["all"]), torch.randn(B, H, N, N)
    delta = (p * d_p).sum(-1, keepdim=True)
    torch.testing.assert_close(p * (d_p - delta) @ k, (p * d_p) @ k - delta * (p @ k))

for norm in (None, "layer"):
    for name, visible in MASKS.items():
        out = definition(norm, visible)
        d_out = torch.randn_like(out)
        assert_all_agree(out, d_out, *closed_form(norm, visible, d_out))
        print(f"norm={norm}, visible: {name}: forward and all gradients agree")


# Batch norm in training, in one pass (sections 2, 4 and 5): with dropout, and with a head that gamma switches off.
# Hidden positions have weight 0 and do not count in the statistics, which are each head's own.


def batch_norm_by_definition(keep, visible):
    a = mix(theta, visible_softmax(visible) * keep) + per_head(bias)
    count = visible.expand(B, H, N, N).sum(OVER)
    mean = (a * visible).sum(OVER) / count
    var = ((a - per_head(mean)).square() * visible).sum(OVER) / count
    normed = (a - per_head(mean)) * per_head((var + EPS).rsqrt() * gamma) + per_head(beta)
    return OUT * (normed * visible) @ v, mean, var


@torch.no_grad()
def batch_norm_in_one_pass(keep, visible, d_out):
    count = visible.expand(B, H, N, N).sum(OVER)
    centre = 1 / N  # any number would do; this one is the mean of P where nothing is hidden or dropped
    p = visible_softmax(visible)
    # The sweep: mixed maps with the weights as they are, times V, and two sums by head.
    a = mix(theta, p * keep - centre) * visible
    u, sums, squares = a @ v, a.sum(OVER), a.square().sum(OVER)
    # The epilogue: what is known of the whole batch, and an elementwise pass over the output.
    seen = visible.to(v.dtype) @ v  # without a mask, or with padding, one row a sample
    offset = sums / count
    var = squares / count - offset.square()
    rstd = (var + EPS).rsqrt()
    slope, shift = OUT * gamma, OUT * beta
    out = per_head(slope * rstd) * (u - per_head(offset) * seen) + per_head(shift) * seen
    mean = offset + centre * theta.sum(0) + bias
    # Backward: two sums by head before any sweep, no division by gamma, no heads x heads matrix.
    of_out, of_values = (d_out * out).sum(OVER), (d_out * seen).sum(OVER)
    common, along = slope * of_values / count, (of_out - shift * of_values) / count
    a_hat = (a - per_head(offset)) * per_head(rstd) * visible
    d_norm = d_out @ v.mT * visible
    d_a = (per_head(slope) * d_norm - per_head(common) - per_head(along) * a_hat) * visible
    d_theta = torch.einsum("bhij,bgij->hg", p * keep, d_a) * rstd
    d_gamma, d_beta = OUT * (d_norm * a_hat).sum(OVER), OUT * of_values
    d_q, d_k, *of_scores = below_the_maps(p, torch.einsum("hg,bgij->bhij", theta * rstd, d_a) * keep)
    d_v = ((per_head(slope) * a_hat + per_head(shift)) * visible).mT @ d_out
    return out, mean, var, (d_q, d_k, d_v, *of_scores, d_theta, torch.zeros(H), d_gamma, d_beta)


with torch.no_grad():
    gamma[2] = 0.0
for name, visible in MASKS.items():
    for rate in (0.0, 0.3):
        keep = (torch.rand(B, H, N, N) >= rate).double() / (1 - rate)
        out, *statistics = batch_norm_by_definition(keep, visible)
        d_out = torch.randn_like(out)
        found, *found_statistics, grads = batch_norm_in_one_pass(keep, visible, d_out)
        torch.testing.assert_close(found_statistics, statistics, rtol=1e-9, atol=1e-10)
        assert_all_agree(out, d_out, found, grads)
        print(f"norm=batch, visible: {name}, dropout {rate}: forward, statistics and all gradients agree")
