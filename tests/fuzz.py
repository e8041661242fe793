"""Random problems: anything that a backend takes, in any layout."""

import functools
from dataclasses import replace

import torch
from parity import MODES, device_of, drawn_mask, make_problem

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Of a long row a mask takes its time.
mask_of = functools.cache(drawn_mask)


def with_mask(problem, backend, **sizes):
    """The same problem, and the dropout mask for the reference, if there is any."""
    dropout_p = problem.options["dropout_p"]
    return replace(problem, keep=mask_of(backend, **sizes, head_dim=128, dropout_p=dropout_p)) if dropout_p else problem


def laid_out(tensor, draw, may_expand):
    """The tensor with strides of one kind or another, NaN between its elements; how."""
    kind = draw.choice(["as it was", "permuted", "sliced", *["expanded"] * bool(may_expand)])
    if kind == "permuted":
        order = draw.sample(range(tensor.ndim), tensor.ndim)
        back = [order.index(dim) for dim in range(tensor.ndim)]
        return tensor.permute(order).contiguous().permute(back), f"permuted {order}"
    if kind == "sliced":
        steps = [draw.randint(1, 3) for _ in range(tensor.ndim)]
        around = [2 + step * size for step, size in zip(steps, tensor.shape, strict=True)]
        slices = tuple(slice(1, -1, step) for step in steps)
        between = float("nan") if tensor.is_floating_point() else True
        return tensor.new_full(around, between)[slices].copy_(tensor), f"sliced {steps}"
    if kind == "expanded":
        dim = draw.choice(may_expand)
        return tensor.narrow(dim, 0, 1).expand(tensor.shape), f"expanded {dim}"
    return tensor, kind


def random_problem(draw, backend, most_queries=60, most_keys=80):
    """Anything that the backend takes, and what it is made of."""
    mode = draw.choice(list(MODES))
    sizes = {
        "heads": draw.choice([draw.randint(1, 12), draw.randint(1, 32)]),
        "seqlen": draw.randint(1, most_queries),
        "seqlen_k": draw.randint(2, most_keys),
        "batch": draw.randint(1, 3),
    }
    options = {
        "head_dim": draw.choice([draw.choice([16, 32, 64]), draw.randint(1, 128)]),
        "dtype": draw.choice(list(FLOATS.values())),
        "parameter_dtype": draw.choice([torch.float32, torch.bfloat16]),
        # Without a scale the maps have no variance to divide by.
        "scale": draw.choice([None, 0.3, -0.2, -0.2 if mode == "batch-training" else 0.0]),
        "output_scale": draw.choice([1.0, 0.5]),
        "dropout_p": draw.choice([0.0, 0.3, 0.8]),
    }
    absent = [name for name in ("bias", "norm_weight", "norm_bias") if draw.random() < 0.3]
    problem = make_problem(mode, **sizes, **options, device=device_of(backend)).with_tensors(**dict.fromkeys(absent))
    layouts = {}
    for name in ("query", "key", "value", "grad"):
        # A sixteenth: the sums of eager arithmetic stay within float16.
        tensor = problem.grad / 16 if name == "grad" else problem[name]
        dims = [0, 1, 3] if mode == "batch-training" and name == "key" else [0, 1, 2, 3]
        tensor, layouts[name] = laid_out(tensor, draw, dims)
        problem = replace(problem, grad=tensor) if name == "grad" else problem.with_tensors(**{name: tensor})
    return with_mask(problem, backend, **sizes), {"mode": mode, **sizes, **options, "absent": absent, **layouts}
