"""The paper's Figs. 3 and 6 from measured numbers, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2m_model.atomic import atomic_file
from d2m_model.blocks import BFL_BLOCKS

from .. import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOUR_MAP = "viridis"


def _new_figure(width: float, height: float) -> Figure:
    """Make a figure; sizes in inches. pyplot is avoided, since it keeps every figure and may need a display."""
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(width, height), layout="constrained")
    return figure


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as PNG. Raises UserError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as part:
            figure.savefig(part, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}).") from None


def block_change(by_prompt: np.ndarray, by_timestep: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Draw Fig. 3: log10 of the MSE between input and output of every block, a line per prompt and per timestep.

    `by_prompt` is [prompts, blocks], `by_timestep` [steps, blocks] from noise to image. The black line is the mean MSE.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    figure = _new_figure(max(8, 0.22 * len(names) + 6), 4)
    left, right = figure.subplots(1, 2, sharey=True)
    doubles = sum(name.startswith(BFL_BLOCKS["double"]) for name in names)
    for axes, lines, what in ((left, by_prompt, "prompts"), (right, by_timestep, "timesteps")):
        # The first timestep, with pure noise, is dark.
        colours = matplotlib.colormaps["tab20" if what == "prompts" else _COLOUR_MAP](
            np.linspace(0, 1, max(2, len(lines)))
        )
        for line, colour in zip(lines, colours, strict=False):
            axes.plot(np.log10(_positive(line)), color=colour, linewidth=0.8, alpha=0.7)
        axes.plot(np.log10(_positive(lines.mean(0))), color="black", linewidth=2, label="mean")
        if 0 < doubles < len(names):
            axes.axvline(doubles - 0.5, color="grey", linestyle=":", label="double | single blocks")
        axes.set(title=f"{len(lines)} {what}", xlabel="block, in the order in which they run")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize="small")
    left.set_ylabel("log10 MSE of output and input")
    figure.suptitle(title)
    return figure


def _positive(values: np.ndarray) -> np.ndarray:
    """Replace zeros, which have no logarithm, by the smallest positive number."""
    return np.maximum(values, np.finfo(np.float32).tiny)


def expert_selection(
    layers: dict[str, dict[str, np.ndarray]], categories: Sequence[str], text_tokens: dict[str, int], title: str
) -> Figure:
    """Draw Fig. 6: how often experts are selected, by prompt, timestep and token; a row of three maps per layer.

    Each layer has `prompt` [prompts, E], sorted by `categories` (one per prompt, separated by white lines), `timestep`
    [steps, E] and `token` [tokens, E]. `text_tokens`: number of each layer's first tokens that are text.
    """
    figure = _new_figure(12, 3.6 * len(layers))
    grid: Any = figure.subplots(len(layers), 3, squeeze=False)
    for row, (name, maps) in zip(grid, layers.items(), strict=True):
        for axes, what in zip(row, ("prompt", "timestep", "token"), strict=True):
            drawn = axes.imshow(maps[what], aspect="auto", interpolation="nearest", cmap=_COLOUR_MAP, vmin=0)
            axes.set(title=f"{name}, by {what}", xlabel="expert", ylabel=what)
            figure.colorbar(drawn, ax=axes)
        _label_categories(row[0], categories)
        if 0 < text_tokens[name] < len(maps["token"]):
            row[2].axhline(text_tokens[name] - 0.5, color="white", linewidth=1)
            row[2].set_ylabel("token (text above the line, image below)")
    figure.suptitle(title)
    return figure


def _label_categories(axes: Axes, categories: Sequence[str]) -> None:
    names, counts = zip(*((name, len(list(some))) for name, some in groupby(categories)), strict=True)
    if len(names) < 2:
        return
    ends = np.cumsum(counts)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1)
    axes.set_yticks(ends - np.array(counts) / 2 - 0.5, names, fontsize="small")
    axes.set_ylabel("")
