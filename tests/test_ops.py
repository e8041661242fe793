"""The operator as torch ops: one a direction, few launches, schemas that hold, and no second derivative in silence."""

import copy
import functools
import importlib

import pytest
import torch
from parity import BACKENDS as BACKEND_NAMES
from parity import FUSED, MODES, compute, device_of, make_problem
from torch.autograd import functional
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from reattn import ReAttention, ops, re_attention
from reattn.backends import FUSED as BACKENDS
from reattn.backends import cuda_driver
from reattn.backends.common import as_float32
from reattn.backends.contract import Gradients, Inputs
from reattn.problem import Problem

modes = pytest.mark.parametrize("mode", MODES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# Not test_autograd_registration: the ops have no formula of their own, ReAttentionFunction outside them has it.
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def make_call(mode, backend, device, dtype=torch.float32, strided=False, **options):
    """A problem of three heads, its inputs, and the options of its ops."""
    made = make_problem(mode, head_dim=33, seqlen=5, seqlen_k=6, dtype=dtype, device=device)
    tensors = dict(made.tensors)
    if strided:
        tensors |= {name: made[name].mT.contiguous().mT for name in ("query", "key", "value", "theta")}
    inputs = Inputs(**tensors)
    if mode == "batch-training":
        inputs = inputs._replace(num_batches_tracked=torch.tensor(4, device=device))
    if options.get("dropout_p"):
        inputs = inputs._replace(seed=torch.tensor([7], device=device))
    norm, training = MODES[mode]
    problem = Problem.of(inputs.query, norm=norm, training=training, scale=0.25, **options)
    return made, inputs, ops._options(backend, problem)


@dtypes
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@modes
def test_opcheck(mode, dropout_p, dtype, backend, device):
    """Schemas, what they change among it, and fake implementations; the strides of outputs are compared."""
    made, inputs, options = make_call(mode, backend, device, dtype, dropout_p=dropout_p)
    torch.library.opcheck(torch.ops.reattn.forward.default, inputs, options, test_utils=OPCHECKS)
    outputs = torch.ops.reattn.forward(*inputs, **options)
    arguments = (made.grad, None, *inputs, *outputs)
    torch.library.opcheck(torch.ops.reattn.backward.default, arguments, options, test_utils=OPCHECKS)


@dtypes
def test_opcheck_of_what_is_synchronised(dtype, backend, device):
    made, inputs, options = make_call("batch-training", backend, device, dtype, synchronised=True)
    # Not a comparison of two runs: a GPU's value_sum is written by ``finish``.
    torch.library.opcheck(torch.ops.reattn.forward.default, inputs, options, test_utils=OPCHECKS[:2])
    outputs = torch.ops.reattn.forward(*inputs, **options)
    arguments = (*inputs, *(tensor.clone() for tensor in outputs))
    torch.library.opcheck(torch.ops.reattn.finish.default, arguments, options, test_utils=OPCHECKS)
    statistics = torch.ops.reattn.finish(*inputs, *outputs, **options)
    outputs = (*outputs[:2], statistics, outputs[3])
    torch.library.opcheck(torch.ops.reattn.grad_sums.default, (made.grad, *outputs), options, test_utils=OPCHECKS)
    sums = torch.ops.reattn.grad_sums(made.grad, *outputs, **options)
    arguments = (made.grad, sums, *inputs, *outputs)
    torch.library.opcheck(torch.ops.reattn.backward.default, arguments, options, test_utils=OPCHECKS)


@modes
def test_opcheck_with_strided_inputs(mode, backend, device):
    """The fake implementation tells the strides of the outputs whatever those of the inputs are."""
    made, inputs, options = make_call(mode, backend, device, strided=True)
    torch.library.opcheck(torch.ops.reattn.forward.default, inputs, options, test_utils=OPCHECKS)
    outputs = torch.ops.reattn.forward(*inputs, **options)
    grad = made.grad.mT.contiguous().mT
    torch.library.opcheck(
        torch.ops.reattn.backward.default, (grad, None, *inputs, *outputs), options, test_utils=OPCHECKS
    )


@pytest.mark.parametrize("kind", ["padding", "bias", "causal"])
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_opcheck_with_masks(mode, kind, backend, device):
    """One whose gradient is wanted among them, and mixing before the softmax."""
    draw = torch.Generator().manual_seed(0)
    mask = {
        "padding": torch.tensor([[3], [6]]) > torch.arange(6),
        "bias": torch.randn(3, 5, 6, generator=draw),
        "causal": None,
    }[kind]
    options = {"is_causal": kind == "causal", "mask_gradient": kind == "bias"}
    options["mask"] = {"padding": "bool", "bias": "float"}.get(kind)
    made, inputs, options = make_call(mode, backend, device, **options)
    if mask is not None:
        mask = mask[:, None, None] if kind == "padding" else mask[None]
        inputs = inputs._replace(attn_mask=mask.to(device))
    if kind == "padding":
        inputs = inputs._replace(pre_theta=torch.randn(3, 3, generator=draw).to(device))
    torch.library.opcheck(torch.ops.reattn.forward.default, inputs, options, test_utils=OPCHECKS)
    outputs = torch.ops.reattn.forward(*inputs, **options)
    arguments = (made.grad, None, *inputs, *outputs)
    torch.library.opcheck(torch.ops.reattn.backward.default, arguments, options, test_utils=OPCHECKS)
    found = Gradients(*torch.ops.reattn.backward(*arguments, **options))
    assert found.attn_mask.shape == (mask.shape if kind == "bias" else (0,))
    assert found.pre_theta.shape == ((3, 3) if kind == "padding" else (0,))


def test_synchronised_steps_are_the_whole(backend, device):
    """With one rank: forward and finish, grad_sums and backward, against one op a direction."""
    made, inputs, options = make_call("batch-training", backend, device)
    running = [tensor.clone() for tensor in inputs[7:10]]
    whole = torch.ops.reattn.forward(*inputs, **options)
    expected = torch.ops.reattn.backward(made.grad, None, *inputs, *whole, **options)
    twin = inputs._replace(running_mean=running[0], running_var=running[1], num_batches_tracked=running[2])
    options["synchronised"] = True
    parts = torch.ops.reattn.forward(*twin, **options)
    assert all(torch.equal(a, b) for a, b in zip(twin[7:10], running, strict=True))
    statistics = torch.ops.reattn.finish(*twin, *parts, **options)
    parts = (*parts[:2], statistics, parts[3])
    sums = torch.ops.reattn.grad_sums(made.grad, *parts, **options)
    found = torch.ops.reattn.backward(made.grad, sums, *twin, *parts, **options)
    for one, two in zip((*whole, *expected, *inputs[7:10]), (*parts, *found, *twin[7:10]), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


class Operations(TorchDispatchMode):
    """Names of the operations that are dispatched, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten._unsafe_view):
            self.names.append(str(function.overloadpacket))
        return result


def test_defaults_are_those_of_problem():
    """What a call leaves out, an op must take to be the same."""
    for name in ("forward", "finish", "grad_sums", "backward", "backward_into"):
        arguments = getattr(torch.ops.reattn, name).default._schema.arguments
        defaults = {a.name: a.default_value for a in arguments if a.kwarg_only and a.name != "backend"}
        assert defaults == {option: Problem._field_defaults[option] for option in defaults}
        assert len(defaults) == 11


@modes
def test_one_op_a_direction(mode, backend, device):
    """Between the projections of a module there is nothing else."""
    norm, training = MODES[mode]
    attention = ReAttention(48, 3, norm=norm, backend=backend, device=device).train(training)
    attention.qkv, attention.proj = torch.nn.Identity(), torch.nn.Identity()
    x = torch.randn(2, 7, 3 * 48, device=device, requires_grad=True)
    with Operations() as forward:
        output = attention(x)
    assert forward.names == ["reattn.forward"]
    grad = torch.ones_like(output)
    with Operations() as backward:
        output.backward(grad)
    assert backward.names == ["aten.empty_like", "reattn.backward_into"]


LAUNCHES = {
    "forward": {"batch-training": 2},
    "backward": {"batch-training": 5, "batch-eval": 3, "layer": 3, "none": 3},
}


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that the two GPU backends launch."""
    launched = []
    triton = BACKENDS["triton"]
    run = triton._run

    def recorded(kernel, grid, *args, **constants):
        launched.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
        return run(kernel, grid, *args, **constants)

    monkeypatch.setattr(triton, "_run", recorded)
    launch = cuda_driver.launch
    monkeypatch.setattr(cuda_driver, "launch", lambda *a: launched.append(a[0].kernel.name) or launch(*a))
    return launched


@pytest.mark.parametrize("gpu_backend", FUSED[:2])
@modes
def test_launches(mode, gpu_backend, launches):
    device = device_of(gpu_backend)
    made, inputs, options = make_call(mode, gpu_backend, device)
    outputs = torch.ops.reattn.forward(*inputs, **options)
    assert len(launches) == LAUNCHES["forward"].get(mode, 1), launches
    launches.clear()
    torch.ops.reattn.backward(made.grad, None, *inputs, *outputs, **options)
    # Triton's query gradient has a kernel of its own.
    assert len(launches) == LAUNCHES["backward"][mode] + (gpu_backend == "triton"), launches
    if mode == "batch-training":
        options["synchronised"] = True
        launches.clear()
        outputs = torch.ops.reattn.forward(*inputs, **options)
        torch.ops.reattn.finish(*inputs, *outputs, **options)
        assert len(launches) == 3, launches


@pytest.mark.extension
@modes
def test_one_call_of_the_extension_a_direction(mode, monkeypatch):
    extension = importlib.import_module("reattn._cpu")
    called = []
    for name in ("forward", "finish", "grad_sums", "backward"):
        original = getattr(extension, name)
        monkeypatch.setattr(extension, name, lambda call, n=name, f=original: called.append(n) or f(call))
    compute(make_problem(mode), "cpu")
    assert called == ["forward", "backward"]


@modes
def test_saves_no_map(mode, backend, device):
    """Only query, key, value, the LSE and what heads or batch and head_dim span; under batch statistics the output."""
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


def checkpointed_by(how, module):
    """What calls a module with activation checkpointing of one kind."""
    if how == "compiled inside":
        module = torch.compile(module, backend="aot_eager")
    if how == "wrapper":
        return checkpoint_wrapper(module)
    options = {"use_reentrant": how == "reentrant"}
    if how == "selective":
        keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)
    return functools.partial(checkpoint, module, **options)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective", "wrapper"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_checkpointing_counts_a_batch_once(backend, how, momentum, device):
    """Statistics, output and gradients are those without; torch's BatchNorm2d would count every batch twice."""
    assert_counted_once(backend, how, momentum, device)


def test_checkpointing_of_what_is_compiled(backend, device):
    """The ops tell a first pass from another themselves. Compiled plain PyTorch, the reference's too, cannot."""
    assert_counted_once(backend, "compiled inside", 0.1, device)


def assert_counted_once(backend, how, momentum, device):
    torch.manual_seed(0)
    module = ReAttention(32, 4, norm_momentum=momentum, backend=backend, device=device)
    other = copy.deepcopy(module)
    found = {}
    for each, function in ((module, module), (other, checkpointed_by(how, other))):
        for seed in range(2):
            x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()
            output = function(x)
            output.square().sum().backward()
        found[each] = {"output": output, "input": x.grad, "theta": each.theta.grad, **dict(each.named_buffers())}
    assert found[module]["head_norm.num_batches_tracked"] == 2
    for name, expected in found[module].items():
        torch.testing.assert_close(found[other][name], expected, msg=lambda m, n=name: f"{n}: {m}")


def without_running(problem, mode):
    """Its tensors; in training without the running statistics, which transforms could not update."""
    left_out = ("running_mean", "running_var") if mode == "batch-training" else ()
    return {name: None if name in left_out else tensor for name, tensor in problem.tensors.items()}


def operator_of(name, mode, backend, device):
    """The sum of the output's squares as a function of one tensor alone, and that tensor."""
    problem = make_problem(mode, seqlen=5, batch=1, device=device)
    tensors = {
        n: None if n.startswith("running") and mode == "batch-training" else t for n, t in problem.tensors.items()
    }
    return (
        lambda tensor: re_attention(**(tensors | {name: tensor}), **problem.options, backend=backend).square().sum(),
        problem[name],
    )


REFUSED = 'differentiable once, in reverse mode: use backend="reference"'
TWICE = {
    "hessian": functional.hessian,
    "hvp": lambda f, x: functional.hvp(f, x, x),
    "vhp": lambda f, x: functional.vhp(f, x, x),
    "jvp": lambda f, x: functional.jvp(f, x, x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "func.jacrev of func.grad": lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
}


@pytest.mark.parametrize("name", ["query", "theta"])
@pytest.mark.parametrize("how", TWICE)
@modes
def test_other_derivatives_are_refused(mode, how, name, backend, device):
    function, tensor = operator_of(name, mode, backend, device)
    with pytest.raises(RuntimeError, match=REFUSED):
        TWICE[how](function, tensor)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("requires_grad", [True, False])
def test_tangents_are_refused_in_compiled_code(requires_grad, backend, device):
    """Of parameters that are frozen, too; there is no tangent of zero in silence."""
    function, tensor = operator_of("theta", "layer", backend, device)
    compiled = torch.compile(lambda t: torch.func.jvp(function, (t,), (t,))[1], backend="eager")
    with pytest.raises(Exception, match=REFUSED):
        compiled(tensor.detach().requires_grad_(requires_grad))


@pytest.mark.parametrize("how", ["hvp", "func.jvp", "func.hessian"])
@modes
def test_the_reference_has_them(mode, how, device):
    function, tensor = operator_of("theta", mode, "reference", device)
    first = torch.func.grad(function)(tensor)
    step = 1e-2
    change = (
        (torch.func.grad(function)(tensor * (1 + step)) - torch.func.grad(function)(tensor * (1 - step))) / 2 / step
    )
    found = TWICE[how](function, tensor)
    if how == "hvp":
        torch.testing.assert_close(found[1], change, rtol=0.05, atol=0.02 * change.abs().max().item())
    elif how == "func.jvp":
        torch.testing.assert_close(found[1], (first * tensor).sum(), rtol=1e-3, atol=1e-3)
    else:
        product = torch.tensordot(found, tensor, 2)
        torch.testing.assert_close(product, change, rtol=0.05, atol=0.02 * change.abs().max().item())


@modes
def test_gradient_of_a_gradient_is_refused(mode, backend, device):
    """By whatever way it is reached: the leaf that was differentiated, another one, or the output's gradient."""
    problem = make_problem(mode, seqlen=5, device=device)
    arguments = {n: t.detach().requires_grad_(not n.startswith("running")) for n, t in problem.tensors.items()}
    output = re_attention(**arguments, **problem.options, backend=backend)
    grad = problem.grad.detach().requires_grad_()
    gradients = torch.autograd.grad(output, (arguments["query"], arguments["theta"]), grad, create_graph=True)
    for gradient in gradients:
        for leaf in (arguments["query"], arguments["value"], arguments["theta"], grad):
            with pytest.raises(RuntimeError, match=REFUSED):
                gradient.sum().backward(inputs=[leaf], retain_graph=True)


@modes
def test_func_transforms(mode, backend, device):
    """``grad``, ``jacrev``, and a gradient of theta for each sample: those of the reference."""
    problem = make_problem(mode, seqlen=5, batch=3, device=device)
    tensors = {
        n: None if n.startswith("running") and mode == "batch-training" else t for n, t in problem.tensors.items()
    }

    def loss(theta, query, key, value, backend):
        maps = {"query": query[None], "key": key[None], "value": value[None], "theta": theta}
        return re_attention(**(tensors | maps), **problem.options, backend=backend).square().sum()

    samples = problem["query"], problem["key"], problem["value"]
    for transform in (
        lambda b: torch.func.grad(loss)(problem["theta"], *(t[0] for t in samples), b),
        lambda b: torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, 0, 0, 0, None))(
            problem["theta"], *samples, b
        ),
        lambda b: torch.func.jacrev(lambda q: loss(problem["theta"], q, *(t[0] for t in samples[1:]), b))(
            samples[0][0]
        ),
        lambda b: torch.func.vmap(loss, (None, 0, 0, 0, None))(problem["theta"], *samples, b),
    ):
        torch.testing.assert_close(transform(backend), transform("reference"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_vmap_over_a_mask(mode, backend, device):
    """Every sample its own, boolean or a bias and its gradient; and one for all of them."""
    problem = make_problem(mode, seqlen=5, batch=3, device=device)
    draw = torch.Generator().manual_seed(0)
    tensors = without_running(problem, mode)

    def loss(mask, query, key, value, backend):
        maps = {"query": query[None], "key": key[None], "value": value[None]}
        return re_attention(**(tensors | maps), **problem.options, attn_mask=mask, backend=backend).square().sum()

    samples = problem["query"], problem["key"], problem["value"]
    bias = torch.randn(3, 3, 5, 5, generator=draw).to(device)
    for function, mask, dim in (
        (loss, bias > -1, 0),
        (loss, bias[0], None),
        (torch.func.grad(loss), bias, 0),
        (torch.func.grad(loss, argnums=(0, 1)), bias[0, 0], None),
    ):
        found, expected = (
            torch.func.vmap(function, (dim, 0, 0, 0, None))(mask, *samples, which) for which in (backend, "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_running_statistics_are_not_updated_inside_vmap(backend, device):
    problem = make_problem("batch-training", device=device)

    def operator(query):
        return re_attention(**(problem.tensors | {"query": query}), **problem.options, backend=backend)

    with pytest.raises(RuntimeError, match="running_mean cannot be updated inside torch.vmap"):
        torch.func.vmap(operator)(problem["query"][None])


@dtypes
@modes
def test_packed(mode, dtype, backend, device):
    """Query, key and value in one tensor: bitwise what they are apart, and a gradient in one piece."""
    problem = make_problem(mode, dtype=dtype, device=device)
    expected = compute(problem, backend)
    tensors = {n: t.clone().requires_grad_(not n.startswith("running")) for n, t in problem.tensors.items()}
    maps = [tensors.pop(name) for name in ("query", "key", "value")]
    packed = torch.stack([tensor.detach().transpose(1, 2) for tensor in maps], 2).requires_grad_()
    output = re_attention(packed, None, None, **tensors, **problem.options, backend=backend)
    output.backward(problem.grad)
    assert torch.equal(output, expected["output"])
    for name, gradient in zip(("query", "key", "value"), packed.grad.unbind(2), strict=True):
        assert torch.equal(gradient.transpose(1, 2), expected[f"{name} gradient"])
    assert torch.equal(tensors["theta"].grad, expected["theta gradient"])


@modes
def test_packed_with_permuted_memory(mode, backend, device):
    """head_dim before the heads in memory: the gradient is the same, wherever it lies."""
    problem = make_problem(mode, heads=4, head_dim=3, seqlen=5, device=device)
    tensors = {name: tensor for name, tensor in problem.tensors.items() if name not in ("query", "key", "value")}
    plain = torch.stack([problem[name].transpose(1, 2) for name in ("query", "key", "value")], 2)
    gradients = []
    for packed in (plain, plain.mT.contiguous().mT):
        leaf = packed.detach().requires_grad_()
        given = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}
        re_attention(leaf, None, None, **given, **problem.options, backend=backend).backward(problem.grad)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_batched_gradients_of_a_module(backend, device):
    """``is_grads_batched``, as the vectorised jacobian uses it, through query, key and value in one tensor."""
    attention = ReAttention(12, 3, norm="layer", backend=backend, device=device)
    x = torch.randn(1, 4, 12, device=device, requires_grad=True)
    output = attention(x)
    grads = torch.randn(3, *output.shape, device=device)
    (batched,) = torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(output, x, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(batched, torch.stack(single))


def test_packed_in_another_shape(device):
    with pytest.raises(ValueError, match=r"query must have shape \(batch, seqlen, 3, heads, head_dim\)"):
        re_attention(torch.zeros(2, 3, 5, 4, device=device), None, None, torch.eye(3, device=device))


@pytest.mark.parametrize("name", ["scale", "output_scale"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@modes
def test_learned_factors(mode, shape, name, backend, device):
    """A tensor in the place of a number has its gradient."""
    problem = make_problem(mode, device=device)
    found = {}
    for which in (backend, "reference"):
        factor = torch.full(shape, 0.3, device=device, requires_grad=True)
        query = problem["query"].detach().requires_grad_()
        output = re_attention(
            **(problem.tensors | {"query": query}), **problem.options, **{name: factor}, backend=which
        )
        output.backward(problem.grad)
        found[which] = output.detach(), query.grad, factor.grad
    number = re_attention(**problem.tensors, **problem.options, **{name: 0.3}, backend=backend)
    torch.testing.assert_close(found[backend][0], number, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[backend], found["reference"], rtol=1e-3, atol=1e-3)


def test_parameters_are_not_copied():
    """As a rule, what the kernels read is what the user has."""
    parameter = torch.randn(3, 3)
    assert as_float32(parameter) is parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_eval_leaves_the_running_statistics_alone(dtype, backend, device):
    """Not even their version changes: what an earlier call saved of them stays valid."""
    problem = make_problem("batch-eval", device=device)
    running = {name: problem[name].to(dtype) for name in ("running_mean", "running_var")}
    query = problem["query"].detach().requires_grad_()
    tensors = problem.tensors | running | {"query": query}
    outputs = [re_attention(**tensors, **problem.options, backend=backend) for _ in range(2)]
    assert all(tensor._version == 0 for tensor in running.values())
    outputs[0].backward(problem.grad)
    with torch.inference_mode():
        running = {name: tensor.clone() for name, tensor in running.items()}
        re_attention(**(problem.tensors | running), **problem.options, backend=backend)


def test_statistics_that_have_changed_are_noticed(backend, device):
    """Saved by a call in eval, updated by one in training: the gradients of the first would be wrong."""
    problem = make_problem("batch-eval", device=device)
    running = {name: problem[name].clone() for name in ("running_mean", "running_var")}
    query = problem["query"].detach().requires_grad_()
    output = re_attention(**(problem.tensors | running | {"query": query}), **problem.options, backend=backend)
    re_attention(**(problem.tensors | running), **(problem.options | {"training": True}), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(problem.grad)


@pytest.mark.parametrize("seqlen_k", [197, 4096])
def test_float16_of_saturated_maps(seqlen_k, backend, device):
    """Every query picks the same key, whose value is large before the statistics are known."""
    if backend != "cpu" and seqlen_k > 1000 and device.type == "cpu":
        pytest.skip("takes long without a GPU")
    key = torch.zeros(1, 4, seqlen_k, 16, device=device, dtype=torch.float16)
    key[:, :, 0] = 20
    query = torch.full((1, 4, 8, 16), 20.0, device=device, dtype=torch.float16)
    value = torch.zeros_like(key)
    value[:, :, 0] = 600
    theta = torch.ones(4, 4, device=device)
    found = re_attention(query, key, value, theta, norm="batch", training=True, backend=backend)
    expected = re_attention(
        *(tensor.double() for tensor in (query, key, value)), theta, norm="batch", training=True, backend="reference"
    )
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("heads", [3, 12])
def test_a_key_that_is_infinite(heads, backend, device):
    """Rows of padding, whose scores would be 0 times infinity, do not count in the statistics."""
    problem = make_problem("batch-training", heads=heads, seqlen=5, seqlen_k=7, device=device)
    key = problem["key"].clone()
    key[:, :, 2] = float("-inf")
    problem = problem.with_tensors(query=problem["query"].abs() + 0.1, key=key)
    found, expected = (
        re_attention(**{n: t.clone() for n, t in problem.tensors.items()}, **problem.options, backend=which)
        for which in (backend, "reference")
    )
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_grad_sums_of_no_rows(backend, device):
    made = make_problem("batch-training", seqlen=0, seqlen_k=5, device=device)
    inputs = Inputs(**made.tensors)
    options = ops._options(backend, Problem.of(inputs.query, norm="batch", training=True, synchronised=True))
    outputs = torch.ops.reattn.forward(*inputs, **options)
    assert not torch.ops.reattn.grad_sums(made.grad, *outputs, **options).any()


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_momentum_out_of_range(momentum, device):
    problem = make_problem("batch-training", device=device, momentum=momentum)
    with pytest.raises(ValueError, match=f"momentum must be None or in \\[0, 1\\], got {momentum}"):
        re_attention(**problem.tensors, **problem.options)


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("qk_norm", "compiled"), [(False, False), (True, False), (False, True)], ids=["packed", "maps", "compiled"]
)
def test_flops_are_those_of_the_reference(qk_norm, compiled, backend, device):
    """What FlopCounterMode counts of a forward pass, and of both: the products in the definition."""
    counts = {}
    for name in (backend, "reference"):
        module = ReAttention(32, 4, qk_norm=qk_norm, backend=name, device=device)
        x = torch.randn(2, 10, 32, device=device, requires_grad=True)
        function = torch.compile(module, backend="aot_eager") if compiled else module
        function(x).sum().backward()  # what the compiler itself does is not counted
        forward = count_flops(lambda function=function, x=x: function(x))
        counts[name] = forward, count_flops(lambda function=function, x=x: function(x).sum().backward())
    projections, attention = 2 * 20 * 32 * (96 + 32), 2 * 2 * 10 * 10 * 4 * (8 + 4 + 8)
    assert counts[backend] == counts["reference"] == (projections + attention, 3 * (projections + attention))


def test_flops_are_those_without_a_mask(backend, device):
    """As torch counts its own attention."""
    module = ReAttention(32, 4, backend=backend, device=device)
    x, mask = torch.randn(2, 10, 32, device=device), torch.rand(10, 10, device=device) > 0.5
    expected = count_flops(lambda: module(x).sum().backward())
    assert count_flops(lambda: module(x, mask, is_causal=True).sum().backward()) == expected
