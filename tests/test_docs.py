"""What the documents claim by running code holds, their Python runs, and the site is built of them."""

import html
import importlib
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import documents
import pytest
import torch
from libraries import library
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import reattn
from reattn.analysis import attentions, visit_attention_maps
from reattn.models import DeepViT, create_model

ROOT = pathlib.Path(__file__).parent.parent


def test_identities_of_the_operator() -> None:
    check = subprocess.run([sys.executable, ROOT / "docs" / "math_check.py"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
    assert check.stdout.count("all gradients agree") == 16


def test_table_of_compatibility() -> None:
    """Each row names a test that there is, or says that nothing was tried."""
    table = (ROOT / "docs" / "compatibility.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| library")]
    assert len(rows) > 25
    for row in rows:
        named = re.search(r"`(test_\w+)` \|$", row)
        assert f"def {named[1]}(" in tests if named else "not tried" in row, row


# Where the Python of a document is run: section -> test, or one test for the whole document.
RUN: dict[str, str | dict[str, str]] = {
    "README.md": {"Use": "test_use", "Equivalent to": "test_equivalent_to"},
    "docs/analysis.md": {"In Python": "test_analysis_in_python", "Gradients of maps": "test_gradients_of_maps"},
    "docs/deployment.md": "test_code_of_the_documents",
    "docs/migration.md": "test_code_of_the_documents",
    "docs/training.md": {
        "The similarity of maps as a loss": "test_the_loop_in_the_documents",
        "DTensors and tensor parallel plans": "test_tensor_parallel_plan",
        "From a pretrained ViT": "test_from_a_pretrained_vit",
    },
}
SMALL = "depth=2, embed_dim=48, num_heads=4"


def test_all_python_is_run() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for path in documents.DOCUMENTS:
        name = path.relative_to(ROOT).as_posix()
        by = RUN.get(name, {})
        held = [section for section, text in documents.sections(name).items() if documents.CODE.search(text)]
        if isinstance(by, str):
            assert held and f'"{name}"' in tests and f"def {by}(" in tests
            continue
        assert held == list(by), name
        assert all(f"def {test}(" in tests for test in by.values())
        assert len(documents.CODE.findall(path.read_text())) == sum(len(documents.blocks(name, s)) for s in held)


def test_use(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's, with a smaller model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REATTN_BACKEND", "reference")
    *blocks, conversion = documents.blocks("README.md", "Use")
    sizes = {"num_classes": 10, "depth": 2, "embed_dim": 48, "num_heads": 4}
    weights = create_model("deepvit_s", **sizes).state_dict()
    torch.save(weights, "deepvit_s.pth")
    names = documents.run(blocks, {"num_classes=10": f"num_classes=10, {SMALL}"})
    assert isinstance(names["out"], torch.Tensor) and names["out"].shape == (2, 197, 384)
    assert isinstance(names["model"], DeepViT)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in names["model"].state_dict().items())
    images = torch.randn(2, 3, 224, 224)
    model = create_model("deepvit_16b", attention="self", **sizes).eval()
    with torch.no_grad():
        before = model(images)
        documents.run([conversion], model=model, images=images)
        assert isinstance(model.blocks[0].attn, reattn.ReAttention)
        for converted in (model.eval(), model.train()):
            torch.testing.assert_close(converted(images), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_equivalent_to(norm: str | None) -> None:
    """The README's definition against the operator, whatever backend it takes."""
    definition: Any = documents.run(documents.blocks("README.md", "Equivalent to"))["re_attention"]
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 16, generator=draw)
    theta, pre_theta = torch.randn(2, 4, 4, generator=draw)
    bias, pre_bias, weight, norm_bias = torch.randn(4, 4, generator=draw)
    for training in (False, True):
        statistics = [[torch.zeros(4), torch.ones(4)] if norm == "batch" else [None, None] for _ in range(2)]
        affine = {"norm_weight": weight, "norm_bias": norm_bias} if norm else {"norm_weight": None, "norm_bias": None}
        outputs = [
            function(query, key, value, theta, bias, norm=norm, **affine, running_mean=mean, running_var=var,
                     training=training, pre_theta=pre_theta, pre_bias=pre_bias, output_scale=0.5)
            for function, (mean, var) in zip((definition, reattn.re_attention), statistics, strict=True)
        ]  # fmt: skip
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics[1], statistics[0], rtol=1e-4, atol=1e-5)


def test_analysis_in_python(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/analysis.md's, with a smaller model; then an attention of the class that it registers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attentions, "_registered", {})
    blocks = documents.blocks("docs/analysis.md", "In Python")
    names: Any = documents.run(blocks, {'"deepvit_16b"': f'"deepvit_16b", {SMALL}'})
    assert names["measured"].blocks["re_attention"].shape == (2, 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"matrix.png", "matrix.svg"}

    class Attention(names["MyAttention"]):  # type: ignore[misc]
        scale = 0.5

        def query_and_key(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x[:, None], 2 * x[:, None]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    x = torch.randn(2, 5, 8)
    maps: list[torch.Tensor] = []
    visit_attention_maps(torch.nn.Sequential(Attention()), x, maps.append)
    torch.testing.assert_close(maps[0], (x @ x.mT).softmax(-1)[:, None])


def test_gradients_of_maps() -> None:
    """docs/analysis.md's, with a smaller model."""
    blocks = documents.blocks("docs/analysis.md", "Gradients of maps")
    names = documents.run(blocks, {'"deepvit_16b"': f'"deepvit_16b", {SMALL}'})
    patches = names["patches"]
    assert isinstance(patches, torch.Tensor) and patches.shape == (14, 14) and patches.min() >= 0 < patches.max()


def test_tensor_parallel_plan(tmp_path: pathlib.Path) -> None:
    """docs/training.md's, on a mesh of one process; tests/test_distributed.py has two."""
    model = DeepViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=3, backend="reference")
    images = torch.randn(2, 3, 16, 16)
    expected = model.eval()(images)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", world_size=1, rank=0)
    try:
        mesh = init_device_mesh("cpu", (1,))
        documents.run(
            documents.blocks("docs/training.md", "DTensors and tensor parallel plans"), model=model, mesh=mesh
        )
        assert isinstance(model.blocks[1].attn.qkv.weight, DTensor)
        torch.testing.assert_close(model(images), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.libraries
def test_from_a_pretrained_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/training.md's, with a smaller model, whose weights are not fetched."""
    library("timm")
    monkeypatch.setenv("REATTN_BACKEND", "reference")
    changes = {"pretrained=True": f"pretrained=False, {SMALL}"}
    blocks = documents.blocks("docs/training.md", "From a pretrained ViT")
    model: Any = documents.run(blocks, changes, images=torch.randn(2, 3, 224, 224))["model"]
    assert isinstance(model.blocks[0].attn, reattn.ReAttention) and model(torch.randn(1, 3, 224, 224)).shape == (1, 10)


def test_site(tmp_path: pathlib.Path) -> None:
    """``make docs``: no warning, everything public has its description, and no link leads nowhere."""
    if os.environ.get("REATTN_TEST_NO_SKIPS") != "1":
        for name in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
            pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[docs]'")
    recipe = re.search(r"^docs:.*\n\t\$\(PY\) (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    folders = {"out/doctrees": str(tmp_path / "doctrees"), "out/docs": str(tmp_path / "site")}
    command = [folders.get(word, word) for word in recipe[1].split()]
    build = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    pages = {path: path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    for module in ("reattn", "reattn.models", "reattn.checkpoints", "reattn.losses", "reattn.analysis"):
        page = pages[tmp_path / "site" / "docs" / "api" / f"{module.removeprefix('reattn.')}.html"]
        for name in importlib.import_module(module).__all__:
            assert f'id="{module}.{name}"' in page, f"{module}.{name}"
    for path, page in pages.items():
        for target, anchor in re.findall(r'<a [^>]*href="(?!https?:)([^"#]*)(?:#([^"]*))?"', page):
            linked = (path.parent / target).resolve() if target else path
            assert linked.is_file(), (path, target)
            assert not anchor or linked.suffix != ".html" or f'id="{html.unescape(anchor)}"' in pages[linked], (
                path,
                anchor,
            )
