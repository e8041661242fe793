"""The figures of reattn.analysis: what is drawn, that files are whole, and that matplotlib is needed for them alone."""

import io
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib import colormaps  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

from reattn.analysis import (  # noqa: E402
    FeatureMaps,
    name_figure,
    plot_curves,
    plot_feature_maps,
    plot_head_similarity,
    plot_query_maps,
    plot_rollout,
    plot_similar_blocks,
    plot_similarity,
    plot_similarity_matrix,
    plots,
    save_figure,
)
from reattn.analysis.output import write_json  # noqa: E402

IMAGE = torch.rand(3, 8, 8)
SIMILARITIES = {1: torch.tensor([0.9, 0.2, 0.5]), 2: torch.tensor([0.1, 0.3]), 3: torch.tensor([0.4])}
MATRIX = torch.tensor([[1.0, 0.6, -0.2], [0.6, 1.0, 0.4], [-0.2, 0.4, 1.0]])
FEATURES = {index: FeatureMaps(torch.rand(2, 6, 4, 4), torch.rand(2, 6, 4, 4)) for index in (0, 3)}

# How each is called, how many axes it has (colour bars included), lines, images and texts in the first of them.
FIGURES = {
    "similarity": (lambda: plot_similarity({"re-attention": SIMILARITIES, "softmax": SIMILARITIES}), 2, 4, 0, 0),
    "similar_blocks": (
        lambda: plot_similar_blocks({"a": [(32, 9, 0.3), (16, 2, 0.1)], "b": [(16, 1, 0.0)]}),
        2,
        2,
        0,
        0,
    ),
    "matrix": (lambda: plot_similarity_matrix({"a": MATRIX, "b": MATRIX}), 3, 0, 1, 0),
    "heads": (lambda: plot_head_similarity({"block 3": MATRIX}), 2, 0, 1, 9),
    "many-heads": (lambda: plot_head_similarity({"block 3": torch.eye(17)}), 2, 0, 1, 0),
    "features": (lambda: plot_feature_maps(IMAGE, FEATURES, sample=1), 7, 0, 1, 0),
    "queries": (lambda: plot_query_maps(IMAGE, {0: torch.rand(2, 3, 4, 4), 5: torch.rand(2, 2, 4, 4)}), 10, 0, 1, 0),
    "rollout": (lambda: plot_rollout(torch.rand(2, 1, 8, 8), {"softmax": torch.rand(2, 4, 4)}), 6, 0, 1, 0),
    "curves": (lambda: plot_curves({"loss": {"a": [3.0, 2.0], "b": [3.0]}, "accuracy": {"b": [0.1]}}), 2, 2, 0, 0),
}


@pytest.mark.parametrize("draw, axes, lines, images, texts", FIGURES.values(), ids=FIGURES)
def test_figures(tmp_path, draw, axes, lines, images, texts):
    figure = draw()
    assert isinstance(figure, Figure)
    assert len(figure.axes) == axes
    first = figure.axes[0]
    assert (len(first.lines), len(first.images), len(first.texts)) == (lines, images, texts)
    (path,) = save_figure(figure, tmp_path / "new", "figure", formats=("png",), dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000
    assert os.listdir(tmp_path / "new") == ["figure.png"]
    # No figure is left in pyplot's hands.
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_what_is_drawn():
    figure = plot_similarity({"re-attention": SIMILARITIES}, threshold=0.7)
    *curves, threshold = figure.axes[0].lines
    assert [line.get_ydata() for line in curves] == [pytest.approx(values.tolist()) for values in SIMILARITIES.values()]
    assert [list(line.get_xdata()) for line in curves] == [[0, 1, 2], [0, 1], [0]]
    assert set(threshold.get_ydata()) == {0.7}
    left, right = plot_similar_blocks({"a": [(32, 9, 0.3), (16, 2, 0.1)]}).axes
    assert [list(left.lines[0].get_xdata()), list(left.lines[0].get_ydata())] == [[16, 32], [2, 9]]
    assert list(right.lines[0].get_ydata()) == [0.1, 0.3]
    heads = plot_head_similarity({"block 3": MATRIX}).axes[0]
    assert heads.get_title() == "block 3\n1 pair (33%) above 0.5"
    assert heads.images[0].get_array().tolist() == [pytest.approx(row) for row in MATRIX.tolist()]
    shown = plot_feature_maps(IMAGE, FEATURES, sample=1).axes
    lengths = FEATURES[3].softmax[1].norm(dim=0)
    drawn = torch.tensor(shown[5].images[0].get_array().tolist())
    torch.testing.assert_close(drawn, lengths / lengths.mean())
    # One scale for all panels.
    assert len({axes.images[0].get_clim() for axes in (shown[1], shown[2], shown[4], shown[5])}) == 1


def test_one_scale_and_a_bar_for_all_heads_of_a_block_and_all_images_of_a_row():
    maps = {0: torch.rand(2, 3, 4, 4), 5: torch.rand(2, 2, 4, 4)}
    grid = plot_query_maps(IMAGE, maps, sample=1).axes
    for row, (index, drawn) in enumerate(maps.items()):
        shown = [axes.images[0] for axes in grid[5 * row + 1 : 5 * row + 4] if axes.images]
        limits = (drawn[1].min().item(), drawn[1].max().item())
        assert [image.get_clim() for image in shown] == [pytest.approx(limits)] * drawn.shape[1]
        assert torch.tensor(shown[0].get_array().tolist()).equal(drawn[1, 0].double())
        assert grid[5 * row].get_ylabel() == f"block {index}"
        assert grid[5 * row + 4].get_ylabel() == "weight"
        assert grid[5 * row + 4].get_ylim() == pytest.approx(limits)
    rollouts = {"softmax": torch.rand(2, 4, 4)}
    figure = plot_rollout(torch.rand(2, 3, 8, 8), rollouts, ["cats/0.jpg", "dogs/1.jpg"])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["cats/0.jpg", "dogs/1.jpg"]
    limits = (rollouts["softmax"].min().item(), rollouts["softmax"].max().item())
    assert [axes.images[0].get_clim() for axes in figure.axes[3:5]] == [pytest.approx(limits)] * 2


def test_features_of_plain_attention_are_drawn_once():
    same = {index: FeatureMaps(maps.softmax, maps.softmax) for index, maps in FEATURES.items()}
    figure = plot_feature_maps(IMAGE, same)
    assert len(figure.axes) == 4 and figure.axes[0].get_ylabel() == "plain attention"


@pytest.mark.parametrize(
    "draw",
    [
        # Up to 1.01 there was room for ticks like 0.5, and others like 0.25 were drawn.
        lambda: plots.plot_feature_strengths(IMAGE, {"plain attention": {0: torch.full((4, 4), 1.01)}}),
        lambda: plot_similarity_matrix({"a": MATRIX}),
        lambda: plot_query_maps(IMAGE, {0: torch.rand(1, 2, 4, 4)}),
        lambda: plot_rollout(IMAGE[None], {"softmax": torch.rand(1, 4, 4)}),
    ],
)
def test_nothing_is_cut_off(draw):
    """No ink reaches the border of the picture, where the label of a colour bar stands."""
    file = io.BytesIO()
    name_figure(draw(), "a model", "features").savefig(file, format="png", dpi=150)
    with Image.open(file) as picture:
        grey = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8).view(picture.size[::-1])
    assert all((edge == 255).all() for edge in (grey[:, 0], grey[:, -1], grey[0], grey[-1]))
    assert grey.min() == 0


def test_the_patch_of_the_query_is_framed():
    for figure, images in (
        (plot_query_maps(IMAGE, {0: torch.rand(1, 2, 4, 2)}, place=(3, 1)), [0]),
        (plot_rollout(IMAGE.expand(2, 3, 8, 8), {"softmax": torch.rand(2, 4, 2)}, place=(3, 1)), [0, 1]),
    ):
        # Patches of 2 x 4 pixels, the last of them; a pixel's centre is a whole number.
        assert [index for index, axes in enumerate(figure.axes) if axes.patches] == images
        assert {frame.get_bbox().bounds for index in images for frame in figure.axes[index].patches} == {
            (3.5, 5.5, 4, 2)
        }
    assert not any(axes.patches for axes in plot_query_maps(IMAGE, {0: torch.rand(1, 2, 4, 2)}).axes)


def test_equal_points_are_all_seen():
    for axes in plot_similar_blocks({name: [(16, 2, 0.1)] for name in "abc"}).axes:
        assert len({line.get_markersize() for line in axes.lines}) == 3
        assert {line.get_fillstyle() for line in axes.lines} == {"none"}


def test_names_fit():
    """Long names, such as those of a model with many arguments, are broken at the width of the figure."""
    figure = name_figure(plot_similarity({"a": SIMILARITIES}), "model " * 40, "", "3 images")
    lines = figure.get_suptitle().split("\n")
    assert lines[-1] == "3 images" and max(map(len, lines)) <= 70
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["k = 1", "k = 2", "k = 3", "similar above 0.8"]
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_tightbbox())


def test_lines_are_told_apart_without_colour():
    styles = [(str(style["linestyle"]), style["marker"]) for style in plots._STYLES]
    assert len({dashes for dashes, _ in styles}) == len({marker for _, marker in styles}) == len(styles)
    grey = sorted(
        sum(w * c for w, c in zip((0.299, 0.587, 0.114), to_rgb(s["color"]), strict=True)) for s in plots._STYLES[:3]
    )
    assert min(b - a for a, b in zip(grey, grey[1:], strict=False)) > 0.08
    shades = [
        sum(w * c for w, c in zip((0.299, 0.587, 0.114), rgba, strict=False))
        for rgba in colormaps[plots._COLOUR_MAP](range(256))
    ]
    assert all(a < b + 1e-3 for a, b in zip(shades, shades[1:], strict=False))


def test_svg_is_the_same_each_time(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "0"}):
        paths = [save_figure(plot_similarity({"a": SIMILARITIES}), tmp_path, name, ("svg",))[0] for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"<svg" in paths[0].read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    class Broken(Figure):
        def savefig(self, path, **options):
            path.write_text("half")
            raise OSError("disk full")

    (tmp_path / "figure.png").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        save_figure(Broken(), tmp_path, "figure", ("png",))
    assert os.listdir(tmp_path) == ["figure.png"] and (tmp_path / "figure.png").read_text() == "old"


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "numbers.json"
    write_json({1: torch.tensor([1.0, float("nan")]), "a": (float("inf"), 2, None, "x")}, path)
    assert path.read_text() == '{\n "1": [\n  1.0,\n  null\n ],\n "a": [\n  null,\n  2,\n  null,\n  "x"\n ]\n}\n'
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert os.listdir(tmp_path) == ["numbers.json"] and "null" in path.read_text()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: plot_similarity({}), "similarities must hold something to draw"),
        (
            lambda: plot_similarity({"a": {}}),
            "similarities must hold something to draw in every entry, got the entries \\['a'\\]",
        ),
        (lambda: plot_similar_blocks({"a": []}), "counts must hold"),
        (lambda: plot_curves({"loss": {}}), "curves must hold"),
        (lambda: plot_head_similarity({"a": torch.ones(2, 3)}), r"similarity must have shape \(heads, heads\)"),
        (lambda: save_figure(Figure(), "nowhere", "a", ("pdf",)), r"formats must be among .*, got \['pdf'\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_matplotlib():
    """Importing needs none of the extra; a plot says what is missing."""
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["PIL"] = sys.modules["tqdm"] = None
from reattn.analysis import block_similarity, plot_similarity
import torch
try:
    plot_similarity({"a": {1: torch.ones(2)}})
except ImportError as error:
    assert "pip install 'reattn[analysis]'" in str(error), error
else:
    raise SystemExit("no error")
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
