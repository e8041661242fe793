"""The figures of DeepViT (arXiv 2103.11886, sections 3 and 4) for any model, readable without colour.

Every function returns a ``matplotlib.figure.Figure`` and touches no pyplot state; :func:`save_figure` writes it.
Without matplotlib they raise an ``ImportError`` that says how to install it.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reattn.analysis.features import FeatureMaps
from reattn.analysis.output import replacing
from reattn.analysis.similarity import similar_heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")

# Apart in darkness, dashes and markers, so that none of the three is needed to tell lines from one another.
_STYLES: list[dict[str, Any]] = [
    {"color": "#0b3c7d", "linestyle": "-", "marker": "o"},
    {"color": "#e07b00", "linestyle": "--", "marker": "s"},
    {"color": "#6f6f6f", "linestyle": ":", "marker": "^"},
    {"color": "#2a9d8f", "linestyle": "-.", "marker": "D"},
    {"color": "#000000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#b0305c", "linestyle": (0, (1, 2)), "marker": "x"},
]
_COLOUR_MAP = "cividis"
_ANNOTATED_HEADS = 16


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; ``ImportError`` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'reattn[analysis]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(
    figure: Figure, folder: str | os.PathLike[str], name: str, formats: Sequence[str] = FORMATS, dpi: int = 150
) -> list[Path]:
    """Writes ``folder/name.FORMAT`` for each format, making the folder; a file is there whole or not at all.

    Raises:
        ValueError: a format is neither "png" nor "svg".
    """
    unknown = [extension for extension in formats if extension not in FORMATS]
    if unknown:
        raise ValueError(f"formats must be among {FORMATS}, got {unknown}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{extension}" for extension in formats]
    layout = figure.get_layout_engine()
    try:
        for path, extension in zip(paths, formats, strict=True):
            # Without the date the same figure makes the same file.
            metadata = {"Date": None} if extension == "svg" else None
            with replacing(path) as temporary:
                figure.savefig(temporary, format=extension, dpi=dpi, metadata=metadata)
            # Laid out once: that takes most of the time.
            figure.set_layout_engine("none")
    finally:
        if layout is not None:
            figure.set_layout_engine(layout)
    return paths


def name_figure(figure: Figure, *lines: str) -> Figure:
    """Writes what a figure shows above it, such as the model and the images; long lines are broken to fit."""
    width = int(figure.get_figwidth() * (14 if figure.get_figwidth() < 12 else 10))
    broken = [part for line in lines if line for part in textwrap.wrap(line, width, break_on_hyphens=False)]
    figure.suptitle("\n".join(broken), fontsize=9 if figure.get_figwidth() < 12 else 12)
    return figure


def plot_similarity(similarities: Mapping[str, Mapping[int, Tensor]], threshold: float = 0.8) -> Figure:
    """The paper's figure a: similarity to the block k further on, by depth.

    Args:
        similarities: a panel's title -> what :func:`block_similarity` returns, a line for each distance.
        threshold: drawn as a line across.

    Raises:
        ValueError: there is nothing to draw.
    """
    _check_not_empty(similarities, "similarities")
    figure = new_figure(5 * len(similarities), 4.4)
    panels = figure.subplots(1, len(similarities), sharey=True, squeeze=False)[0]
    for axes, (title, by_distance) in zip(panels, similarities.items(), strict=True):
        for style, (distance, similarity) in zip(line_styles(len(by_distance)), by_distance.items(), strict=True):
            axes.plot(range(len(similarity)), _list(similarity), label=f"k = {distance}", **style)
        axes.axhline(threshold, color="0.5", linewidth=0.8, zorder=0, label=f"similar above {threshold:g}")
        axes.set(xlabel="block", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        tidy(axes, legend=False)
    panels[0].set_ylabel("similarity to block + k\n(mean cosine of columns)")
    _legend_below(figure, max(panels, key=lambda axes: len(axes.lines)))
    return figure


def plot_similar_blocks(counts: Mapping[str, Sequence[tuple[int, int, float]]], threshold: float = 0.8) -> Figure:
    """The paper's figure b: number and share of blocks similar to the next, by the depth of the model.

    Args:
        counts: a line's label -> for each model (depth, number, share), the last two as from :func:`similar_blocks`.
        threshold: that they were counted with.

    Raises:
        ValueError: there is nothing to draw.
    """
    _check_not_empty(counts, "counts")
    figure = new_figure(10, 4.4)
    left, right = figure.subplots(1, 2)
    for index, (style, (label, models)) in enumerate(zip(line_styles(len(counts)), counts.items(), strict=True)):
        # Hollow and of different sizes: points in one place do not hide each other.
        style |= {"markersize": 5 + 3 * (index % len(_STYLES)), "fillstyle": "none"}
        depths, numbers, shares = zip(*sorted(models), strict=True)
        left.plot(depths, numbers, label=label, **style)
        right.plot(depths, shares, label=label, **style)
    left.set(xlabel="blocks of the model", ylabel=f"similar blocks (above {threshold:g})")
    right.set(xlabel="blocks of the model", ylabel="share of all blocks", ylim=(-0.03, 1.03))
    left.set_ylim(bottom=min(0, left.get_ylim()[0]))
    for axes in (left, right):
        axes.set_xticks(sorted({depth for models in counts.values() for depth, _, _ in models}))
        tidy(axes, legend=False)
    left.yaxis.get_major_locator().set_params(integer=True)
    _legend_below(figure, left)
    return figure


def plot_similarity_matrix(matrices: Mapping[str, Tensor], label: str = "block") -> Figure:
    """Similarity of every two blocks, or heads, as an image.

    Args:
        matrices: a panel's title -> ``(blocks, blocks)``, as from :func:`similarity_matrix`.
        label: of both axes.

    Raises:
        ValueError: there is nothing to draw.
    """
    _check_not_empty(matrices, "matrices")
    figure = new_figure(5 * len(matrices) + 0.6, 4.4)
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    lowest = min(0.0, *(float(matrix.min()) for matrix in matrices.values()))
    for axes, (title, matrix) in zip(panels, matrices.items(), strict=True):
        image = axes.imshow(_list(matrix), cmap=_COLOUR_MAP, vmin=lowest, vmax=1.0)
        axes.set(xlabel=label, ylabel=label, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    _shared_bar(figure, image, list(panels), "similarity (mean cosine of columns)")
    return figure


def plot_head_similarity(similarities: Mapping[str, Tensor], threshold: float = 0.5) -> Figure:
    """The paper's figure c: similarity between the heads of one block, with how many pairs exceed ``threshold``.

    Args:
        similarities: a panel's title -> ``(heads, heads)``, an entry of what :func:`head_similarity` returns.
        threshold: see :func:`similar_heads`.

    Raises:
        ValueError: there is nothing to draw.
    """
    titles = {}
    for title, similarity in similarities.items():
        number, share = similar_heads(similarity, threshold)
        titles[f"{title}\n{counted(number, 'pair')} ({share:.0%}) above {threshold:g}"] = similarity
    figure = plot_similarity_matrix(titles, label="head")
    for axes, similarity in zip(figure.axes, similarities.values(), strict=False):
        if len(similarity) > _ANNOTATED_HEADS:
            continue
        low, high = axes.images[0].get_clim()
        # Five characters in a cell; a panel is some 3.4 inches wide.
        fontsize = min(8, 72 * 3.4 / len(similarity) / 3.3)
        for row, values in enumerate(_list(similarity)):
            for column, value in enumerate(values):
                ink = "black" if value > (low + high) / 2 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=fontsize, color=ink)
    return figure


def feature_strength(features: Tensor) -> Tensor:
    """Length of the features at each place, relative to the mean over the image: ``(batch, channels, height, width)``
    to ``(batch, height, width)``; 1 everywhere where all are alike in length."""
    strength = features.float().norm(dim=1)
    return strength / strength.mean(dim=(-2, -1), keepdim=True).clamp(min=1e-30)


def plot_feature_maps(image: Tensor, features: Mapping[int, FeatureMaps], sample: int = 0) -> Figure:
    """Feature maps of several blocks, with re-attention above and without mixing below, or of plain attention: their
    length at each place, relative to the mean over the image.

    One scale for all, so that features that hardly vary over the image look it.

    Args:
        image: ``(channels, height, width)`` in [0, 1].
        features: what :func:`feature_maps` returns.
        sample: which of its batch.

    Raises:
        ValueError: there is nothing to draw.
    """
    _check_not_empty(features, "features")
    mixes = any(not torch.equal(maps.re_attention, maps.softmax) for maps in features.values())
    kinds = {"re-attention": "re_attention", "without mixing": "softmax"} if mixes else {"plain attention": "softmax"}
    rows = {
        label: {index: feature_strength(getattr(maps, kind))[sample] for index, maps in features.items()}
        for label, kind in kinds.items()
    }
    return plot_feature_strengths(image, rows)


def plot_feature_strengths(image: Tensor, strengths: Mapping[str, Mapping[int, Tensor]]) -> Figure:
    """A row for each entry, such as a model: the image, then its blocks' feature maps, as :func:`plot_feature_maps`
    draws them.

    Args:
        image: ``(channels, height, width)`` in [0, 1].
        strengths: a row's label -> index of the block -> ``(height, width)``; the same blocks in every row.

    Raises:
        ValueError: there is nothing to draw.
    """
    _check_not_empty(strengths, "strengths")
    columns = max(map(len, strengths.values())) + 1
    figure = new_figure(2.2 * columns + 0.6, 2.2 * len(strengths) + 0.2)
    grid = figure.subplots(len(strengths), columns, squeeze=False)
    highest = max(float(strength.max()) for row in strengths.values() for strength in row.values())
    for axes_row, (label, row) in zip(grid, strengths.items(), strict=True):
        _show_image(axes_row[0], image)
        axes_row[0].set_ylabel(label)
        for axes, (index, strength) in zip(axes_row[1:], row.items(), strict=True):
            drawn = axes.imshow(_list(strength), cmap=_COLOUR_MAP, vmin=0.0, vmax=highest)
            axes.set(title=f"block {index}", xticks=[], yticks=[])
    _shared_bar(figure, drawn, grid, "length / mean length")
    return figure


def plot_query_maps(
    image: Tensor,
    maps: Mapping[int, Tensor],
    title: str = "",
    sample: int = 0,
    place: tuple[int, int] | None = None,
) -> Figure:
    """What one token attends to: a row for each block, a column for each head, the image at the left.

    The heads of a block have one scale, which stands at the right.

    Args:
        image: ``(channels, height, width)`` in [0, 1].
        maps: what :func:`query_maps` returns.
        title: of the figure.
        sample: which of its batch.
        place: row and column of the token's patch, framed in the image; None: it has no place.

    Raises:
        ValueError: there is nothing to draw.
    """
    _check_not_empty(maps, "maps")
    heads = max(rows.shape[1] for rows in maps.values())
    figure = new_figure(1.3 * (heads + 1) + 1.2, 1.5 * len(maps) + 0.7)
    grid, bars = _with_bars(figure, len(maps), heads + 1)
    for axes_row, bar, (index, rows) in zip(grid, bars, maps.items(), strict=True):
        _show_image(axes_row[0], image)
        _frame(axes_row[0], rows, place)
        axes_row[0].set_ylabel(f"block {index}")
        low, high = (float(extreme) for extreme in rows[sample].aminmax())
        for head, axes in enumerate(axes_row[1:]):
            axes.set_axis_off()
            if head < rows.shape[1]:
                drawn = axes.imshow(_list(rows[sample, head]), cmap=_COLOUR_MAP, vmin=low, vmax=high)
                axes.set_title(f"head {head}", fontsize=8)
        _colour_bar(figure, drawn, bar, "weight")
    return name_figure(figure, title)


def plot_rollout(
    images: Tensor,
    rollouts: Mapping[str, Tensor],
    titles: Sequence[str] = (),
    place: tuple[int, int] | None = None,
) -> Figure:
    """Where a token's rollout comes from: the images above, below them a row for each kind of maps, each with a scale
    of its own.

    Args:
        images: ``(batch, channels, height, width)`` in [0, 1].
        rollouts: a row's label -> ``(batch, height, width)``, a row of :func:`attention_rollout` on the image's grid.
        titles: of the images.
        place: row and column of the token's patch, framed in the images; None: it has no place.

    Raises:
        ValueError: there is nothing to draw.
    """
    _check_not_empty(rollouts, "rollouts")
    figure = new_figure(2.2 * len(images) + 1.2, 2.3 * (len(rollouts) + 1))
    grid, bars = _with_bars(figure, len(rollouts) + 1, len(images))
    bars[0].set_axis_off()
    for axes, image in zip(grid[0], images, strict=True):
        _show_image(axes, image)
        _frame(axes, next(iter(rollouts.values())), place)
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(title, fontsize=8)
    for axes_row, bar, (label, maps) in zip(grid[1:], bars[1:], rollouts.items(), strict=True):
        axes_row[0].set_ylabel(label)
        low, high = (float(extreme) for extreme in maps.aminmax())
        for axes, weights in zip(axes_row, maps, strict=True):
            drawn = axes.imshow(_list(weights), cmap=_COLOUR_MAP, vmin=low, vmax=high)
            axes.set(xticks=[], yticks=[])
        _colour_bar(figure, drawn, bar, "share of the rollout")
    return figure


def plot_curves(curves: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str = "epoch", first: int = 1) -> Figure:
    """Training curves: a panel for each quantity, such as loss and accuracy, a line for each model.

    Args:
        curves: quantity -> a line's label -> its values from the first epoch on.
        xlabel: what is counted.
        first: its number where the values begin.

    Raises:
        ValueError: there is nothing to draw.
    """
    _check_not_empty(curves, "curves")
    figure = new_figure(5 * len(curves), 4)
    labels = list(dict.fromkeys(label for lines in curves.values() for label in lines))
    styles = dict(zip(labels, line_styles(len(labels)), strict=True))
    for axes, (quantity, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for label, values in lines.items():
            every = max(1, len(values) // 12)
            axes.plot(range(first, first + len(values)), values, label=label, markevery=every, **styles[label])
        axes.set(xlabel=xlabel, ylabel=quantity)
        axes.xaxis.get_major_locator().set_params(integer=True)
        tidy(axes)
    return figure


def _check_not_empty(argument: Mapping[Any, Any], name: str) -> None:
    if not argument or any(isinstance(entry, Mapping | list | tuple) and not entry for entry in argument.values()):
        raise ValueError(f"{name} must hold something to draw in every entry, got the entries {list(argument)}")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def line_styles(count: int) -> list[dict[str, Any]]:
    return [{**_STYLES[index % len(_STYLES)], "markersize": 4} for index in range(count)]


def _list(tensor: Tensor) -> Any:
    return tensor.detach().double().cpu().tolist()


def tidy(axes: Any, legend: bool = True) -> None:
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_below(figure: Figure, axes: Any) -> None:
    """One legend for all panels, where it covers none of them."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, int(figure.get_figwidth() * 14 / (max(map(len, labels)) + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _with_bars(figure: Figure, rows: int, columns: int) -> tuple[Any, Any]:
    """Axes ``[rows][columns]``, and for each row those of a colour bar at its right."""
    axes = figure.subplots(rows, columns + 1, squeeze=False, width_ratios=[1.0] * columns + [0.06])
    return axes[:, :-1], axes[:, -1]


def _shared_bar(figure: Figure, drawn: Any, axes: Any, label: str) -> None:
    # So many ticks whatever its size: others would come, and be wider, when the room for them is already found.
    figure.colorbar(drawn, ax=axes, label=label).ax.locator_params(nbins=5)


def _colour_bar(figure: Figure, drawn: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(drawn, cax=axes)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.locator_params(nbins=4)
    # The numbers themselves, not what is to be added to one above.
    bar.ax.ticklabel_format(axis="y", useOffset=False)


def _show_image(axes: Any, image: Tensor) -> None:
    pixels = image.detach().float().cpu()
    # The first channel of what is neither greyscale nor RGB.
    shown = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
    axes.imshow(shown.tolist(), cmap="gray", vmin=0.0, vmax=1.0)
    axes.set(xticks=[], yticks=[])


def _frame(axes: Any, maps: Tensor, place: tuple[int, int] | None) -> None:
    """A frame around one patch of the image that was shown, white in black, so that it is seen on any ground."""
    if place is None:
        return
    from matplotlib.patches import Rectangle

    (bottom, top), (left, right) = axes.get_ylim(), axes.get_xlim()
    height, width = (bottom - top) / maps.shape[-2], (right - left) / maps.shape[-1]
    for line, colour in ((3.0, "black"), (1.2, "white")):
        corner = left + place[1] * width, top + place[0] * height
        axes.add_patch(Rectangle(corner, width, height, fill=False, linewidth=line, edgecolor=colour))
