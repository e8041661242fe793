"""The fused operator as torch ops and as a differentiable function."""

import pytest
import torch
from parity import MODES, compute, make_problem
from torch.utils.checkpoint import checkpoint

from reattn import re_attention

modes = pytest.mark.parametrize("mode", MODES)
# Not test_autograd_registration: the ops have no formula of their own, ReAttentionFunction outside them has it.
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def canonical(device, dtype=torch.float32, head_dim=16):
    """Arguments of the ops by name: three heads, a norm over heads, statistics coupled back."""
    problem = make_problem(head_dim=head_dim, seqlen=5, seqlen_k=6, dtype=dtype, device=device)
    seed = torch.tensor([7], device=device)
    lse = (problem["query"].float() @ problem["key"].float().mT * 0.25).logsumexp(-1) * 1.4427
    return {
        **{name: problem[name] for name in ("query", "key", "value")},
        **{"grad": problem.grad, "out": problem.grad + 1, "lse": lse, "seed": seed},
        **{"weight": problem["theta"], "shift": problem["bias"]},
        **{"gamma": problem["norm_weight"], "beta": problem["norm_bias"]},
        **{"coupled": problem["theta"] * 0.1, "constant": problem["bias"] * 0.1},
    }


def op_arguments(op, backend, tensors, seed=False, gamma=True, coupled=False, lse=True):
    """Positional arguments of an op, optional ones by choice."""
    absent = {"seed": not seed, "gamma": not gamma, "beta": not gamma, "coupled": not coupled, "constant": not coupled}
    if op == "forward":
        absent["lse"] = not lse
    names = {
        "statistics": ("query", "key", "seed"),
        "forward": ("query", "key", "value", "weight", "shift", "gamma", "beta", "lse", "seed"),
        "backward": (
            *("grad", "query", "key", "value", "weight", "shift", "gamma", "beta"),
            *("coupled", "constant", "lse", "seed"),
        ),
        "grad_dot_out": ("grad", "out"),
    }[op]
    given = [None if absent.get(name) else tensors[name] for name in names]
    dropout_p = 0.3 if seed else 0.0
    scalars = {"statistics": (0.25, dropout_p), "grad_dot_out": ()}.get(op, (0.25, 1e-5, dropout_p))
    return (*given, *scalars, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "choices"),
    [
        ("statistics", {}),
        ("statistics", {"seed": True}),
        ("forward", {"gamma": True, "lse": False}),
        ("forward", {"gamma": False, "seed": True}),
        ("backward", {"gamma": True}),
        ("backward", {"gamma": False, "coupled": True, "seed": True}),
        ("grad_dot_out", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()) or "default",
)
def test_opcheck(op, choices, dtype, backend, device):
    """Schema and fake implementation; the output's strides are among what is compared."""
    arguments = op_arguments(op, backend, canonical(device, dtype, head_dim=33), **choices)
    torch.library.opcheck(getattr(torch.ops.reattn, op).default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_opcheck_with_strided_inputs(op, backend, device):
    """The fake implementation tells the strides of the outputs whatever those of the inputs are."""
    tensors = canonical(device)
    strided = {name: tensors[name].mT.contiguous().mT for name in ("query", "key", "value", "weight", "grad")}
    arguments = op_arguments(op, backend, tensors | strided, gamma=False)
    torch.library.opcheck(getattr(torch.ops.reattn, op).default, arguments, test_utils=OPCHECKS)


@modes
def test_saves_no_map(mode, backend, device):
    """Only query, key, value, the LSE and heads x heads tensors; under batch statistics the output too."""
    problem = make_problem(mode, seqlen=67, seqlen_k=71, head_dim=16, batch=1, device=device)
    saved = []
    arguments = {n: t.detach().requires_grad_(not n.startswith("running")) for n, t in problem.tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        re_attention(**arguments, **problem.options, backend=backend)
    assert max(tensor.numel() for tensor in saved) == 3 * 71 * 16
    large = sum(tensor.numel() for tensor in saved if tensor.numel() > 67)
    rows = 3 * 16 * (67 + 2 * 71) + 3 * 67
    assert large == rows + (3 * 16 * 67 if mode == "batch-training" else 0)


@pytest.mark.parametrize("name", ["query", "key", "value", "theta", "bias", "norm_weight", "norm_bias"])
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_gradient_of_one_tensor_alone(mode, name, backend, device):
    problem = make_problem(mode, seqlen=5, device=device)
    arguments = {n: t.detach().requires_grad_(n == name) for n, t in problem.tensors.items()}
    re_attention(**arguments, **problem.options, backend=backend).backward(problem.grad)
    expected = compute(problem, backend)[f"{name} gradient"]
    found = arguments[name].grad
    torch.testing.assert_close(torch.zeros_like(expected) if found is None else found, expected, rtol=0, atol=0)
    assert all(tensor.grad is None for other, tensor in arguments.items() if other != name)


def test_nothing_is_recorded_without_gradients(backend, device):
    problem = make_problem(device=device)
    assert not re_attention(**problem.tensors, **problem.options, backend=backend).requires_grad


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_second_backward_pass_repeats_the_first(mode, dropout_p, backend, device):
    problem = make_problem(mode, seqlen=5, device=device, dropout_p=dropout_p)
    query = problem["query"].detach().requires_grad_()
    output = re_attention(**(problem.tensors | {"query": query}), **problem.options, backend=backend)
    first, second = (torch.autograd.grad(output, query, problem.grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_not_twice_differentiable(backend, device):
    problem = make_problem(seqlen=5, device=device)
    query = problem["query"].detach().requires_grad_()
    output = re_attention(**(problem.tensors | {"query": query}), **problem.options, backend=backend)
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_checkpointing_draws_the_same_mask(mode, backend, device):
    problem = make_problem(mode, seqlen=5, device=device, dropout_p=0.4)
    grads = []
    for checkpointed in (False, True):
        query = problem["query"].detach().requires_grad_()

        def operator(query):
            tensors = {name: tensor.clone() for name, tensor in problem.tensors.items()}
            return re_attention(**(tensors | {"query": query}), **problem.options, backend=backend)

        torch.manual_seed(3)
        output = checkpoint(operator, query, use_reentrant=False) if checkpointed else operator(query)
        output.backward(problem.grad)
        grads.append(query.grad)
    assert torch.equal(*grads)


def test_statistics_op(backend, device):
    """Sums over centred maps, and over their products for every two heads."""
    tensors = canonical(device)
    sums, products, lse = torch.ops.reattn.statistics(*op_arguments("statistics", backend, tensors))
    scores = tensors["query"].double() @ tensors["key"].double().mT * 0.25
    centred = scores.softmax(-1) - 1 / 6
    assert sums.dtype == products.dtype == torch.float64 and lse.dtype == torch.float32
    torch.testing.assert_close(sums, centred.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products, torch.einsum("bhij,bgij->hg", centred, centred), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) / torch.tensor(2.0).log().double())


def test_grad_dot_out_op(backend, device):
    tensors = canonical(device, head_dim=33)
    found = torch.ops.reattn.grad_dot_out(*op_arguments("grad_dot_out", backend, tensors))
    torch.testing.assert_close(found, (tensors["grad"] * tensors["out"]).sum((0, 2, 3)))


def test_known_lse_changes_nothing(backend, device):
    tensors = canonical(device)
    (fresh, lse), (reused, passed) = (
        torch.ops.reattn.forward(*op_arguments("forward", backend, tensors | given, lse=bool(given)))
        for given in ({}, {"lse": torch.ops.reattn.statistics(*op_arguments("statistics", backend, tensors))[2]})
    )
    torch.testing.assert_close(reused, fresh)
    assert torch.equal(passed, lse)
