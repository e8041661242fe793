"""What leaves eager Python: ONNX, torch.export, AOTInductor, TorchScript, torch.fx; and docs/deployment.md's code."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext

import documents
import pytest
import torch
from libraries import library
from torch import nn

import reattn
from reattn import ReAttention, re_attention, use_backend
from reattn.backends import choose
from reattn.models import DeepViT, SelfAttention
from reattn.problem import Problem

DOCUMENT = "docs/deployment.md"
SECTIONS = documents.sections(DOCUMENT)
COMPILED = ("torch.compile", "AOTInductor")  # by inductor

# Loads files where reattn cannot be imported: the results that were saved beside them, and the input's gradient.
WITHOUT_REATTN = """
import sys

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "reattn":
            raise ImportError("reattn must not be imported")

sys.meta_path.insert(0, Refuse())
import torch

load = {"program": lambda file: torch.export.load(file).module(), "script": torch.jit.load,
        "library": torch._inductor.aoti_load_package}
for argument in sys.argv[2:]:
    kind, file = argument.split(":")
    loaded = load[kind](file)
    for given, wanted, gradient in torch.load(sys.argv[1]):
        x = given.clone().requires_grad_(kind != "library")
        output = loaded(x)
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
        if kind != "library":
            output.square().sum().backward()
            torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-5)
assert "reattn" not in sys.modules
print("as expected")
"""


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv("REATTN_BACKEND", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def needs_compiler(monkeypatch):
    # setuptools, which inductor imports, refuses to load where something has loaded the standard distutils before.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")


def tokens(batch=2, seqlen=7):
    return torch.randn(batch, seqlen, 32, generator=torch.Generator().manual_seed(batch))


def images(batch=2, height=16, width=None):
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(batch))


def attention(**options):
    torch.manual_seed(0)
    return ReAttention(32, 4, **options).eval()


def vit(**options):
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    return DeepViT(**{**shape, **options}).eval()


def expected(model, *given):
    """The model's own answer, by the backend that needs no compilation."""
    with use_backend("reference"):
        return model(*given)


def load_without_reattn(folder, model, inputs, *files):
    """What a process without reattn makes of files, each ``kind:name``, against the model."""
    cases = []
    for given in inputs:
        x = given.clone().requires_grad_()
        output = expected(model, x)
        output.square().sum().backward()
        cases.append((given, output.detach(), x.grad))
    torch.save(cases, folder / "cases")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", WITHOUT_REATTN, "cases", *files]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "as expected\n"


# The documents


@pytest.mark.parametrize(
    "section", [pytest.param(n, marks=pytest.mark.slow if n in COMPILED else ()) for n in SECTIONS]
)
def test_code_of_the_documents(section, tmp_path, monkeypatch):
    if section == "ONNX":
        library("onnxruntime"), library("onnxscript")
    if section in COMPILED:
        needs_compiler(monkeypatch)
    monkeypatch.chdir(tmp_path)
    blocks = documents.blocks(DOCUMENT, section)
    assert len(blocks) >= 2
    torch.manual_seed(0)
    names = documents.run(blocks)
    if section == "AOTInductor":
        load_without_reattn(tmp_path, names["model"], [names["images"]], "library:compiled.pt2")


def test_every_format_has_a_section():
    assert list(SECTIONS) == [
        "torch.compile", "torch.export", "AOTInductor", "ONNX", "Quantisation", "TorchScript", "torch.fx",
    ]  # fmt: skip


# use_backend


def test_use_backend(monkeypatch):
    problem = Problem(torch.device("cpu"), torch.float32, 4, 8)
    automatic = choose("auto", problem, "")
    monkeypatch.setenv("REATTN_BACKEND", "triton")
    with use_backend("reference"):
        assert choose("auto", problem, "") == "reference"
        with use_backend("auto"):
            assert choose("auto", problem, "") == automatic
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(reattn.backends._entered.name))
        thread.start(), thread.join()
        assert elsewhere == [None]
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this: dtype"):
            choose("cuda", problem._replace(dtype=torch.float64), "")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this"):
        choose("auto", problem._replace(dtype=torch.float64), "")
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert reattn.backends._entered.name is None
    assert use_backend("reference")(choose)("auto", problem, "") == "reference"


def test_use_backend_refuses_unknown_names_at_once():
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', 'cuda', .*\], got 'flash'"):
        use_backend("flash")


def test_use_backend_and_the_compiler(backend):
    """What was compiled outside is compiled anew inside; entered in a compiled function, it holds there."""
    module, x, targets = attention(norm="layer"), tokens(), []

    def keeping(graph, inputs):
        targets.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def entering(x):
        with use_backend("reference"):
            return module(x)

    compiled = torch.compile(module, fullgraph=True, backend=keeping)
    with use_backend(backend), torch.no_grad():
        outside = compiled(x)
        with use_backend("reference"):
            torch.testing.assert_close(compiled(x), outside, rtol=1e-3, atol=1e-3)
        compiled(x)
        torch.compile(entering, fullgraph=True, backend=keeping)(x)
    assert ["reattn.forward" in str(graph) for graph in targets] == [True, False, False]


# ONNX


def exported(model, example, file, *, dynamo, **options):
    library("onnxscript")
    torch.onnx.export(model, example, file, dynamo=dynamo, verbose=False, **options)
    return library("onnxruntime").InferenceSession(file)


def assert_same(session, model, *inputs):
    for given in inputs:
        names = [node.name for node in session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        output = torch.from_numpy(session.run(None, feed)[0])
        wanted = expected(model, *given).detach()
        assert (output - wanted).abs().max() < 1e-5 * wanted.abs().max()


exporters = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "older"])
norms = pytest.mark.parametrize("norm", ["batch", "layer", None])


@exporters
@norms
def test_onnx(norm, dynamo, tmp_path):
    """Any batch and seqlen, with other padding than the example's."""
    model, file = attention(norm=norm, num_heads_out=2 if norm == "layer" else None), tmp_path / "model.onnx"
    mask = torch.arange(7) < torch.tensor([4, 7])[:, None, None, None]
    if dynamo:
        options = {"dynamic_shapes": ({0: "batch", 1: "seqlen"}, {0: "batch", 3: "seqlen"})}
    else:
        axes = {"x": {0: "batch", 1: "seqlen"}, "mask": {0: "batch", 3: "seqlen"}}
        options = {"input_names": ["x", "mask"], "dynamic_axes": axes}
    session = exported(model, (tokens(), mask), file, dynamo=dynamo, **options)
    others = torch.rand(5, 1, 1, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    assert_same(session, model, (tokens(), mask), (tokens(), mask.flip(0)), (tokens(5, 9), others))


def test_onnx_of_the_model(tmp_path):
    """Any batch and any image size, the own one among them, which needs no resampling."""
    model = vit(dynamic_img_size=True, conv_stem=True)
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    session = exported(model, (images(),), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=shapes)
    assert_same(session, model, (images(),), (images(3, 24),), (images(1, 12, 20),))


def test_onnx_of_the_model_by_the_older_exporter(tmp_path):
    model, axes = vit(global_pool="avg", re_attention_blocks=1, dynamic_img_size=True), {"images": {0: "batch"}}
    options = {"input_names": ["images"], "dynamic_axes": axes}
    session = exported(model, (images(),), tmp_path / "model.onnx", dynamo=False, **options)
    assert_same(session, model, (images(),), (images(5),))


def test_onnx_of_an_exported_program(tmp_path):
    model = vit()
    with use_backend("reference"):
        program = torch.export.export(model, (images(),))
    assert_same(exported(program, None, tmp_path / "model.onnx", dynamo=True), model, (images(),))


@pytest.mark.libraries
def test_onnx_of_a_converted_model(tmp_path):
    timm = library("timm")
    from reattn.convert import to_re_attention

    model = to_re_attention(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)).eval()
    example = torch.randn(2, 3, 32, 32)
    session = exported(model, (example,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: "batch"},))
    assert_same(session, model, (example,), (torch.randn(3, 3, 32, 32),))


@exporters
@pytest.mark.parametrize("named_by", ["module", "context", "environment"])
def test_onnx_refuses_a_fused_backend(named_by, dynamo, tmp_path, monkeypatch):
    library("onnxscript")
    if named_by == "environment":
        monkeypatch.setenv("REATTN_BACKEND", "cuda")
    model = attention(backend="cuda" if named_by == "module" else "auto")
    message = (
        r"(?s)backend 'cuda' is an operator of this package, which ONNX does not have: use\s+backend=\"reference\""
    )
    entered = use_backend("cuda") if named_by == "context" else nullcontext()
    with entered, pytest.raises(Exception, match=message):
        torch.onnx.export(model, (tokens(),), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "training=True, dropout_p=0.0"),
        ({"norm": "layer", "attn_drop_rate": 0.5}, "dropout_p=0.5"),
        ({"norm": None, "drop_path_rate": 0.5}, "stochastic depth"),
    ],
)
def test_onnx_refuses_training(options, message, tmp_path):
    library("onnxscript")
    with pytest.raises(Exception, match=rf"(?s)call eval\(\) .*{message}|{message}.*call eval\(\)"):
        torch.onnx.export(vit(**options).train(), (images(),), tmp_path / "model.onnx", verbose=False)


def test_onnx_refuses_called_modules_in_training(tmp_path):
    library("onnxscript")
    model = vit().train()
    model.blocks[1].attn.head_norm.register_forward_hook(lambda *_: None)
    model.blocks[0].attn.head_norm.eval()
    with pytest.raises(Exception, match="(?s)no training mode, got head_norm of ReAttention: BatchNorm2d with hooks"):
        torch.onnx.export(model, (images(),), tmp_path / "model.onnx", verbose=False)


# torch.export and AOTInductor


def export(model, example, **options):
    with use_backend("reference"):
        return torch.export.export(model, example, **options)


def test_files_without_reattn(tmp_path, monkeypatch):
    """An exported program and traces, made with gradients on and off: any batch, any image size."""
    model, example = vit(dynamic_img_size=True), images()
    sides = {dim: 4 * torch.export.Dim(f"side{dim}", max=64) for dim in (2, 3)}
    program = export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch"), **sides},))
    monkeypatch.chdir(tmp_path)
    torch.export.save(program, "model.pt2")
    torch.jit.trace(model, example).save("with.ts")
    with torch.no_grad():
        torch.jit.trace(model, example).save("without.ts")
    inputs = [example, images(3, 24, 12)]
    load_without_reattn(tmp_path, model, inputs, "program:model.pt2", "script:with.ts", "script:without.ts")


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_of_any_image_size(strict):
    """Whatever the example's: the own size decides nothing."""
    model = vit(dynamic_img_size=True, norm="layer")
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = export(model, (images(),), dynamic_shapes=(sides,), strict=strict).module()
    for height, width in ((16, 16), (24, 8)):
        x = images(2, height, width)
        torch.testing.assert_close(program(x), expected(model, x))
    with pytest.raises(AssertionError, match="% 4 == 0"):
        program(images(2, 18))


# TorchScript


@norms
def test_trace_takes_other_masks_than_its_example(norm):
    model, x = attention(norm=norm), tokens()
    traced = torch.jit.trace(model, (x, torch.ones(1, 7, dtype=torch.bool).expand(7, 7)))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(traced(x, mask), expected(model, x, None, True))


def test_trace_of_the_function():
    theta = torch.randn(4, 4)
    maps = [torch.randn(size, 4, 5 + size, 8) for size in (2, 3)]

    def function(query):
        return re_attention(query, query, query, theta, norm="layer")

    traced = torch.jit.trace(function, maps[0])
    torch.testing.assert_close(traced(maps[1]), expected(function, maps[1]))


def test_trace_refuses_a_fused_backend():
    """The operator would be traced without its gradient."""
    with pytest.raises(RuntimeError, match="backend 'cpu' is .* which TorchScript does not have.*\"reference\""):
        torch.jit.trace(attention(backend="cpu"), tokens())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:The TorchScript type system:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "layer", "pre_mix": True, "dynamic_img_size": True},
        {"conv_stem": True, "re_attention_blocks": 1, "output_scale": 0.3, "residual_scale": 0.5, "reg_tokens": 2},
        {"patch_drop_rate": 0.5, "drop_path_rate": 0.3, "attn_drop_rate": 0.2, "global_pool": "avgmax"},
    ],
    ids=str,
)
def test_scripted(options, tmp_path, reference):
    """The definition, with gradients, written and loaded; the model stays as it is."""
    model = vit(**options)
    modules = list(model.modules())
    torch.jit.script(model).save(tmp_path / "model.ts")
    assert list(model.modules()) == modules
    loaded = torch.jit.load(tmp_path / "model.ts")
    for example in (images(), images(3, 24, 12)) if model.dynamic_img_size else (images(), images(3)):
        torch.testing.assert_close(loaded(example), model(example), rtol=1e-4, atol=1e-5)
    loaded(images()).square().sum().backward()
    model(images()).square().sum().backward()
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(torch.jit.Error, match="x must be images"):
        loaded(images(2, 18))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:The TorchScript type system:UserWarning")
@pytest.mark.parametrize("training", [False, True])
def test_scripted_models_change_their_mode(training, tmp_path, reference):
    model = vit(patch_drop_rate=0.5, drop_path_rate=0.5, attn_drop_rate=0.5, global_pool="avg")
    torch.jit.script(copy.deepcopy(model).train(training)).save(tmp_path / "model.ts")
    loaded = torch.jit.load(tmp_path / "model.ts").eval()
    torch.testing.assert_close(loaded(images()), model(images()), rtol=1e-4, atol=1e-5)
    loaded.train()
    assert not torch.allclose(loaded(images()), loaded(images()))
    # A batch counts once.
    assert loaded.state_dict()["blocks.0.attn.head_norm.num_batches_tracked"] == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_scripted_attention_of_another_model(reference, caplog):
    """torch.jit.script puts what it compiles into the model that it is given."""
    reattn.module._log_scripting.cache_clear()

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attention(norm="batch").eval()

        def forward(self, x):
            return x + self.attn(x)

    model = Residual().eval()
    expected = model(tokens())
    torch.testing.assert_close(torch.jit.script(model)(tokens()), expected)
    assert caplog.text.count("torch.jit.script compiles the definition of ReAttention, without fused kernels") == 1
    torch.testing.assert_close(model(tokens()), expected)


# torch.fx


@pytest.fixture
def reference(monkeypatch):
    """Kernels are other tests' business."""
    monkeypatch.setenv("REATTN_BACKEND", "reference")


class Tracer(torch.fx.Tracer):
    """Attention stays whole."""

    def is_leaf_module(self, module, name):
        return isinstance(module, ReAttention | SelfAttention) or super().is_leaf_module(module, name)


MODELS = {
    "plain": {},
    "self": {"attention": "self", "qk_norm": True},
    "conv stem": {"conv_stem": True, "residual_scale": 0.5, "re_attention_blocks": 1},
    "patch norm": {"patch_norm": True, "global_pool": "avg"},
    "any size": {"dynamic_img_size": True, "num_classes": 0},
    "random": {"drop_path_rate": 0.4, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "pos_drop_rate": 0.2},
    "random self": {"attention": "self", "attn_drop_rate": 0.5, "drop_path_rate": 0.4},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_fx(options, training, reference):
    """Values, running statistics and gradients, with masks and without, and after pickling."""
    model = vit(**options).train(training)
    graph = torch.fx.GraphModule(copy.deepcopy(model), Tracer().trace(model))
    assert "blocks.1.attn" in {node.target for node in graph.graph.nodes}
    graph = pickle.loads(pickle.dumps(graph))
    mask = torch.arange(17) < 12
    inputs = [(images(),), (images(), mask, True)]
    if model.dynamic_img_size:
        inputs.append((images(2, 24, 8),))
    for given in inputs:
        results = []
        for function in (model, graph):
            function.zero_grad()
            torch.manual_seed(1)
            output = function(*given)
            output.square().sum().backward()
            gradients = {name: parameter.grad for name, parameter in function.named_parameters()}
            results.append({"output": output.detach(), **gradients, **dict(function.named_buffers())})
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_fx_keeps_the_checks():
    graph = torch.fx.GraphModule(vit(), Tracer().trace(vit()))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with pytest.raises(ValueError, match=r"x must be images of shape \(batch, 3, 16, 16\), got \(2, 3, 18, 18\)"):
        graph(images(2, 18))


def test_fx_leaves_recomputation_out(reference):
    model = vit()
    model.set_grad_checkpointing()
    graph = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(graph(images()), model(images()))


@pytest.mark.libraries
def test_feature_extraction(reference, request):
    """By torchvision and by timm."""
    library("timm")
    from timm.layers import _fx, register_notrace_module
    from timm.models import create_feature_extractor
    from torchvision.models import feature_extraction

    model, features = vit(), {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *call, n=name: features.update({n: call[-1]}))
        for name in ("blocks.0.mlp", "blocks.1.attn")
    ]
    model(images())
    for hook in hooks:
        hook.remove()
    leaves = {"leaf_modules": [ReAttention]}
    _, names = feature_extraction.get_graph_node_names(model, tracer_kwargs=leaves, suppress_diff_warning=True)
    assert "blocks.1.attn" in names
    register_notrace_module(ReAttention)
    request.addfinalizer(lambda: _fx._leaf_modules.discard(ReAttention))
    for extractor in (
        feature_extraction.create_feature_extractor(model, list(features), tracer_kwargs=leaves),
        create_feature_extractor(model, list(features)),
    ):
        torch.testing.assert_close(extractor(images()), features)


# Quantisation


def test_dynamic_quantisation(reference):
    """Every Linear, within and around the attention, and nothing else."""
    model = vit(conv_stem=True, norm="layer")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    assert torch.equal(quantised.blocks[0].attn.theta, model.blocks[0].attn.theta)
    wanted = model(images())
    assert (quantised(images()) - wanted).abs().max() < 0.1 * wanted.abs().max()
