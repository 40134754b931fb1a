"""The figures, by matplotlib without a screen. Told apart without colour too: by dashes, marks and lightness."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from distrib.config import Config, UserError
from distrib.tools.study.outcome import METRICS, Outcome, mean_curve, mean_gradients
from distrib.tools.study.plan import Study

# Okabe and Ito's colours, from dark to light.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
MARKS = ("o", "s", "^", "D", "v", "P")
DPI = 110
CONVOLUTION = re.compile(r"(^|\.)conv\d+\.weight$")


def check_matplotlib() -> None:
    """Raises UserError where matplotlib is missing: before hours of training, not behind them."""
    if find_spec("matplotlib") is None:
        raise UserError("the figure needs matplotlib: pip install 'distrib[plots]'")


def check_settings(study: Study, configs: Mapping[str, Config]) -> None:
    """Raises UserError where a variant will not write what the figure shows: also before the training."""
    bare = next((name for name, config in configs.items() if not config.log.layers), None)
    if study.about.figure == "gradients" and bare is not None:
        raise UserError(f"the figure of gradients needs log.layers=true in every variant: {bare} is without")


def draw(study: Study, outcomes: Mapping[str, Sequence[Outcome]]) -> bytes:
    """The study's figure as PNG.

    Raises:
        UserError: the runs do not hold what is to be drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        figure = {"curves": _curves, "gradients": _gradients, "points": _points}[study.about.figure](study, outcomes)
        figure.suptitle(study.about.title)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=DPI)
        pyplot.close(figure)
    return stream.getvalue()


def _subplots(columns: int, width: float, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, 3.8), layout="constrained", squeeze=False, **options)
    return figure, list(axes[0])


def _curves(study: Study, outcomes: Mapping[str, Sequence[Outcome]]) -> Any:
    """Training error by epoch: the seeds' mean, and a band from the lowest to the highest."""
    panels = study.about.panels or {"": list(outcomes)}
    figure, axes = _subplots(len(panels), 4.2 * len(panels), sharey=True)
    for ax, (title, variants) in zip(axes, panels.items(), strict=True):
        for k, variant in enumerate(variants):
            points = mean_curve(outcomes[variant])
            if not points:
                raise UserError(
                    f"{variant}: its seeds have no epoch in common to draw a curve of: make it "
                    "figure: points, or remove the folders of its runs and train them without a stop"
                )
            epochs, mean, low, high = zip(*points, strict=True)
            colour = COLOURS[k % len(COLOURS)]
            ax.plot(epochs, mean, color=colour, linestyle=DASHES[k % len(DASHES)], label=variant, linewidth=1.8)
            ax.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.set(title=title, xlabel="epoch")
        ax.legend()
    axes[0].set_ylabel(METRICS["train_error"][0])
    return figure


def _gradients(study: Study, outcomes: Mapping[str, Sequence[Outcome]]) -> Any:
    """The norm of each convolution's gradient by step; one scale for all variants."""
    from matplotlib.colors import LogNorm

    tables = {
        name: mean_gradients(runs, lambda layer: bool(CONVOLUTION.search(layer))) for name, runs in outcomes.items()
    }
    bare = next((name for name, (_, _, rows) in tables.items() if not rows), None)
    if bare is not None:
        raise UserError(
            f"{bare}: its runs hold no norms of gradients at a step that all seeds have: remove the folders of its "
            "runs, and train them with log.layers=true and without a stop"
        )
    norms = [value for _, _, rows in tables.values() for row in rows for value in row if value > 0]
    if not norms:
        raise UserError("no norm of a gradient is above 0 in any run: there is nothing to draw")
    figure, axes = _subplots(len(tables), 4.2 * len(tables) + 0.8, sharey=True)
    scale = LogNorm(min(norms), max(norms))
    for ax, (name, (steps, layers, rows)) in zip(axes, tables.items(), strict=True):
        corners = [0, *steps], [k + 0.5 for k in range(len(layers) + 1)]
        mesh = ax.pcolormesh(*corners, rows, norm=scale, cmap="viridis", rasterized=True)
        ax.set(title=name, xlabel="step")
        ax.grid(visible=False)
    axes[0].set_ylabel("convolution, from the image on")
    figure.colorbar(mesh, ax=axes, label="norm of its gradient")
    return figure


def _points(study: Study, outcomes: Mapping[str, Sequence[Outcome]]) -> Any:
    """Training error and validation accuracy: a point for each seed, a bar for their mean."""
    figure, axes = _subplots(2, 8.4)
    for ax, metric in zip(axes, ("train_error", "top1"), strict=True):
        for k, (variant, runs) in enumerate(outcomes.items()):
            values = [run.values[metric] for run in runs]
            colour = COLOURS[k % len(COLOURS)]
            width = 0.3 / max(1, len(values) - 1)
            places = [k + (i - (len(values) - 1) / 2) * width for i in range(len(values))]
            ax.scatter(places, values, color=colour, marker=MARKS[k % len(MARKS)], s=30, label=variant)
            ax.hlines(statistics.mean(values), k - 0.32, k + 0.32, color=colour, linewidth=1.5)
        ax.set_xticks(range(len(outcomes)), list(outcomes))
        ax.set_xlim(-0.6, len(outcomes) - 0.4)
        ax.margins(y=0.15)
        ax.set_ylabel(METRICS[metric][0])
    return figure
