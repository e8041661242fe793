"""torch.compile without graph breaks and torch.export, forward and backward."""

import shutil

import pytest
import torch
from parity import BACKENDS, MODES, make_problem

from reattn import ReAttention, re_attention

backends = pytest.mark.parametrize("backend", BACKENDS)
modes = pytest.mark.parametrize("mode", MODES)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def tokens(device, batch=2, seqlen=7, seed=0):
    return torch.randn(batch, seqlen, 48, generator=torch.Generator().manual_seed(seed)).to(device)


def make_module(mode, backend, device, **options):
    torch.manual_seed(0)
    norm, training = MODES[mode]
    return ReAttention(48, 3, norm=norm, backend=backend, device=device, **options).train(training)


def step(function, module, x):
    """The output, the gradients of the input and of every parameter, and the buffers after it."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    output = function(x)
    output.square().sum().backward()
    parameters = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **parameters, **dict(module.named_buffers())}


def assert_same(found, expected):
    for name, tensor in expected.items():
        scale = tensor.abs().max().item() if name != "theta_bias" else 1.0
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


@backends
@modes
def test_module(mode, backend, device):
    module, twin = (make_module(mode, backend, device) for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        expected = step(module, module, tokens(device, seed=seed))
        assert_same(step(compiled, twin, tokens(device, seed=seed)), expected)


@backends
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_other_sizes_without_recompilation(mode, backend, device):
    module, twin = (make_module(mode, backend, device) for _ in range(2))
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend=counting)
    for batch, seqlen in ((2, 7), (3, 9), (4, 5)):
        x = tokens(device, batch, seqlen)
        assert_same(step(compiled, twin, x), step(module, module, x))
    assert len(graphs) == 1


@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_dropout(mode, backend, device):
    """A compiled graph draws from torch's generator as eager code does: the same seed gives the same mask."""
    module, twin = (make_module(mode, backend, device, attn_drop=0.4) for _ in range(2))
    module.train(), twin.train()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for function, owner in ((module, module), (compiled, twin)):
        torch.manual_seed(5)
        results.append(step(function, owner, tokens(device)))
    assert_same(*reversed(results))
    torch.manual_seed(6)
    assert not torch.allclose(step(compiled, twin, tokens(device))["output"], results[0]["output"])


@backends
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_autocast(mode, backend, device):
    module, twin = (make_module(mode, backend, device) for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for function, owner in ((module, module), (compiled, twin)):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            results.append(step(function, owner, tokens(device)))
    assert results[0]["output"].dtype == torch.bfloat16
    for name, tensor in results[0].items():
        assert results[1][name].dtype == tensor.dtype
        torch.testing.assert_close(results[1][name], tensor, rtol=0.02, atol=0.02 * tensor.abs().max().item())


def given_masks(kind, device):
    """What the module takes beside seven tokens of two samples."""
    if kind == "causal":
        return {"is_causal": True}
    if kind == "padding":
        return {"attn_mask": (torch.tensor([[4], [7]]) > torch.arange(7))[:, None, None].to(device)}
    bias = torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(1))
    return {"attn_mask": bias.to(device).requires_grad_()}


masks = pytest.mark.parametrize("kind", ["padding", "bias", "causal"])


@backends
@masks
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_masks(mode, kind, backend, device):
    module, twin = (make_module(mode, backend, device) for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for function, owner in ((module, module), (compiled, twin)):
        given = given_masks(kind, device)
        results.append(step(lambda x, f=function, g=given: f(x, **g), owner, tokens(device)))
        if kind == "bias":
            results[-1]["bias"] = given["attn_mask"].grad
    assert_same(*reversed(results))
    assert not torch.allclose(results[0]["output"], module(tokens(device)))


@backends
@masks
def test_masks_under_autocast(kind, backend, device):
    """Compiled as in eager mode; a float32 bias keeps its dtype in its gradient."""
    module = make_module("layer", backend, device)
    results = []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        given = given_masks(kind, device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            results.append(step(lambda x, f=function, g=given: f(x, **g), module, tokens(device)))
        if kind == "bias":
            results[-1]["bias"] = given["attn_mask"].grad
            assert results[-1]["bias"].dtype == torch.float32
    assert results[0]["output"].dtype == torch.bfloat16
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=0.02, atol=0.02 * tensor.abs().max().item())


@pytest.mark.slow
def test_inductor(backend, device, monkeypatch):
    # setuptools, which inductor imports, refuses to load where something has loaded the standard distutils before.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    module, twin = (make_module("batch-training", backend, device) for _ in range(2))
    assert_same(step(torch.compile(twin, fullgraph=True), twin, tokens(device)), step(module, module, tokens(device)))


@backends
@modes
def test_function(mode, backend, device):
    """With everything given as arguments, running statistics among them."""
    problem = make_problem(mode, seqlen=5, device=device)
    results = []
    for function in (re_attention, torch.compile(re_attention, fullgraph=True, backend="aot_eager")):
        arguments = {n: t.clone().requires_grad_(not n.startswith("running")) for n, t in problem.tensors.items()}
        output = function(**arguments, **problem.options, backend=backend)
        output.backward(problem.grad)
        gradients = {name: tensor.grad for name, tensor in arguments.items() if tensor.grad is not None}
        statistics = {name: tensor for name, tensor in arguments.items() if not tensor.requires_grad}
        results.append({"output": output.detach(), **gradients, **statistics})
    eager, compiled = results
    assert compiled.keys() == eager.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-3)


@backends
@pytest.mark.parametrize("mode", ["batch-eval", "layer", "none"])
def test_export(mode, backend, device):
    """One opaque op for a fused backend, any batch size."""
    module = make_module(mode, backend, device).eval()
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(module, (tokens(device),), dynamic_shapes=({0: batch},))
    for size in (2, 5):
        x = tokens(device, size)
        torch.testing.assert_close(program.module()(x), module(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("reattn.forward.default") == (backend != "reference")


@backends
@masks
def test_export_with_masks(kind, backend, device):
    """The mask is an input, with the batch of the tokens where it has one; causal is part of the program."""
    module = make_module("layer", backend, device).eval()
    given, batch = given_masks(kind, device), torch.export.Dim("batch", max=64)
    if "attn_mask" in given:
        given["attn_mask"] = given["attn_mask"].detach()
    shapes = {"x": {0: batch}, "attn_mask": {0: batch} if kind == "padding" else {}, "is_causal": None}
    shapes = {name: shape for name, shape in shapes.items() if name == "x" or name in given}
    program = torch.export.export(module, (tokens(device),), given, dynamic_shapes=shapes)
    for size in (2, 4):
        x = tokens(device, size)
        if kind == "padding":
            given["attn_mask"] = given["attn_mask"][:2].flip(0).repeat(size // 2, 1, 1, 1)
        torch.testing.assert_close(program.module()(x, **given), module(x, **given))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("reattn.forward.default") == (backend != "reference")


@backends
def test_export_takes_other_masks_than_its_example(backend, device):
    """One for all queries, expanded, is the example; another for each query is what the program is given then."""
    module, x = make_module("layer", backend, device).eval(), tokens(device)
    seqlen = x.shape[1]
    mask = torch.ones(seqlen, seqlen, dtype=torch.bool, device=device)
    program = torch.export.export(module, (x,), {"attn_mask": mask[:1].expand(seqlen, seqlen)})
    torch.testing.assert_close(program.module()(x, attn_mask=mask.tril()), module(x, is_causal=True))
