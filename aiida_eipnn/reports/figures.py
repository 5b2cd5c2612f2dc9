"""Figures of the report: Axes in, Axes out, and the drawing of Axes as SVG for a page.

This is the only module that imports matplotlib. Colours are those of Okabe and Ito [1]_, which
people with any colour vision can tell apart; what matters differs by marker or hatch too.

References
----------
.. [1] Okabe and Ito, Color Universal Design (2008).
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.uncertainty import Calibration, Curves

# Curves of the uncertainties, and how to draw them.
Line = tuple[Curves, dict[str, Any]]

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
INK, MUTED, GRID, PALE = "#1f2933", "#697586", "#e4e7eb", "#c5ccd6"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW)
MARKERS = "osD^vPX*"
HATCHES = ("", "////", "....")

# More points than this make a page slow: they are drawn as an image inside the figure.
MANY_POINTS = 4000

# More ticks than this run into one another.
MOST_TICKS = 8

# matplotlib names every key in its types; a plain dictionary is all that is needed here.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": PALE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    # Text stays text: it is sharp, can be found and copied, and takes the font of the page.
    "svg.fonttype": "none",
}
PAGE_FONT = "font-family: inherit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of a learning curve.

    Parameters
    ----------
    name
        What it is, for the legend.
    x
        DFT labels trained on.
    y
        Error; NaN where it is not known.
    is_reference
        Whether it is what the others are measured by, and drawn as a dashed line.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_reference: bool = False


def draw(
    name: str,
    paint: Callable[[Sequence[Axes]], None],
    *,
    n_axes: int = 1,
    width: float = 9.2,
    height: float = 3.0,
) -> str:
    """Return a row of Axes, painted by ``paint``, as an SVG element for a page.

    Parameters
    ----------
    name
        Name of the figure: makes the ids in it differ from those of other figures.
    paint
        Called with the Axes.
    n_axes
        How many, side by side.
    width, height
        In inches; 9.2 is the width of the text of the page.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(list(figure.subplots(1, n_axes, squeeze=False)[0]))
        stream = io.StringIO()
        # Without the date the same loop gives the same page, byte for byte.
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return embedded(stream.getvalue(), name)


def embedded(svg: str, name: str) -> str:
    """Return an SVG file as an element: no prologue, ids of its own, width of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", rf"font-size: \1px; {PAGE_FONT}", svg)
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)


def learning_curve(axes: Axes, curves: Sequence[Curve], label: str) -> Axes:
    """Draw errors against the number of DFT labels, on a logarithmic axis of errors."""
    for number, curve in enumerate(curves):
        axes.plot(
            curve.x,
            curve.y,
            label=curve.name,
            color=MUTED if curve.is_reference else CYCLE[number],
            linestyle=(0, (4, 3)) if curve.is_reference else "-",
            linewidth=1.3 if curve.is_reference else 1.8,
            marker="" if curve.is_reference and len(curve.x) > 1 else MARKERS[number],
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    counts = sorted({x for curve in curves for x in curve.x})
    if len(counts) <= MOST_TICKS:
        axes.set_xticks(counts)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS, integer=True))
    axes.set_xlabel("DFT labels in training")
    axes.set_ylabel(label)
    return legend_above(axes)


def parity(
    axes: Axes, reference: FloatArray, predicted: FloatArray, *, label: str, unit: str, scale: float
) -> Axes:
    """Draw predictions against the reference, with the errors in the corner.

    Parameters
    ----------
    axes
        Where to draw.
    reference, predicted
        In eV/atom or eV/Å. Shape ``(n,)``.
    label
        What it is, with the unit of the axes.
    unit
        Of the errors in the corner.
    scale
        From the unit of the axes to that.
    """
    low, high = padded(np.concatenate([reference, predicted]))
    axes.plot([low, high], [low, high], color=PALE, linewidth=1.2, zorder=1)
    many = len(reference) > 60
    axes.scatter(
        reference,
        predicted,
        s=9 if many else 26,
        color=BLUE,
        alpha=0.55 if many else 0.85,
        linewidths=0 if many else 0.6,
        edgecolors="white",
        rasterized=len(reference) > MANY_POINTS,
        zorder=2,
    )
    error = scale * (predicted - reference)
    axes.text(
        0.04,
        0.96,
        f"MAE {np.abs(error).mean():.3g} {unit}\nRMSE {np.sqrt((error**2).mean()):.3g} {unit}",
        transform=axes.transAxes,
        va="top",
        linespacing=1.5,
    )
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set_box_aspect(1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"DFT, {label}")
    axes.set_ylabel(f"committee, {label}")
    return axes


def uncertainty_against_error(
    axes: Axes, uncertainty: FloatArray, error: FloatArray, calibration: Calibration | None
) -> Axes:
    """Draw the error of the force on each atom against its uncertainty, both in eV/Å.

    The line is where the error equals the calibrated uncertainty.
    """
    used = (uncertainty > 0) & (error > 0)
    axes.scatter(
        uncertainty[used],
        error[used],
        s=9,
        color=BLUE,
        alpha=0.5,
        linewidths=0,
        rasterized=len(error) > MANY_POINTS,
    )
    axes.set(xscale="log", yscale="log")
    if calibration is not None and used.any():
        ends = np.array([uncertainty[used].min(), uncertainty[used].max()])
        axes.plot(ends, calibration.scale * ends, color=RED, linewidth=1.4)
        axes.text(
            0.04,
            0.96,
            f"rank correlation {calibration.spearman:.2f}\n"
            f"error = {calibration.scale:.2g} × uncertainty\n"
            f"{100 * calibration.coverage:.0f} % below the line (68 % if normal)",
            transform=axes.transAxes,
            va="top",
            linespacing=1.5,
        )
        low, high = error[used].min(), error[used].max()
        # Room for the three lines of text above the points.
        axes.set_ylim(low / 1.5, 1.5 * high * (high / low) ** 0.45)
    axes.set_box_aspect(1)
    for axis in (axes.xaxis, axes.yaxis):
        plain_log_ticks(axis)
    axes.set_xlabel("force uncertainty, eV/Å")
    axes.set_ylabel("force error, eV/Å")
    return axes


def calibration_curves(axes: Axes, lines: Sequence[Line]) -> Axes:
    """Draw the share of errors within the interval of each probability: the diagonal is right."""
    axes.plot([0, 1], [0, 1], color=PALE, linewidth=1.2, zorder=1)
    for curve, style in lines:
        axes.plot([0, *curve.expected, 1], [0, *curve.observed, 1], **style)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_box_aspect(1)
    axes.set_xlabel("share of errors expected in the interval")
    axes.set_ylabel("share observed")
    return legend_above(axes)


def rejection_curves(axes: Axes, lines: Sequence[Line]) -> Axes:
    """Draw the error of what is kept when the most uncertain are left out, over that of all.

    Dotted: as if the errors were known, for the last line.
    """
    for curve, style in lines:
        axes.plot(_left_out(curve), _over_all(curve, curve.kept_error), **style)
    last = lines[-1][0]
    axes.plot(
        _left_out(last),
        _over_all(last, last.least_error),
        color=MUTED,
        linestyle=":",
        linewidth=1.3,
        label="errors known",
    )
    axes.axhline(1.0, color=PALE, linewidth=1.2, zorder=1)
    axes.set(xlim=(0, 100), ylim=(0, None))
    axes.set_box_aspect(1)
    axes.set_xlabel("most uncertain left out, %")
    axes.set_ylabel("MAE of the rest over MAE of all")
    return axes


def _left_out(curve: Curves) -> list[float]:
    return [100 * (1 - share) for share in curve.kept]


def _over_all(curve: Curves, errors: Sequence[float]) -> list[float]:
    return [value / (curve.kept_error[0] or 1.0) for value in errors]


def spread_against_error(axes: Axes, lines: Sequence[Line]) -> Axes:
    """Draw error against calibrated uncertainty in bins, both in eV/Å: the diagonal is right."""
    seen: list[float] = []
    for curve, style in lines:
        axes.plot(curve.bin_sigma, curve.bin_error, marker="o", markersize=4, **style)
        seen += [value for value in (*curve.bin_sigma, *curve.bin_error) if value > 0]
    if seen:
        ends = (min(seen) / 1.2, max(seen) * 1.2)
        axes.plot(ends, ends, color=PALE, linewidth=1.2, zorder=1)
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        for axis in (axes.xaxis, axes.yaxis):
            plain_log_ticks(axis)
    axes.set_box_aspect(1)
    axes.set_xlabel("calibrated uncertainty, rms, eV/Å")
    axes.set_ylabel("force error, rms, eV/Å")
    return axes


def fading(iterations: Mapping[str, Curves]) -> list[Line]:
    """Return the lines of iterations: the last one strong, earlier ones paler."""
    last = len(iterations) - 1
    return [
        (
            curve,
            {
                "color": BLUE if number == last else SKY,
                "alpha": 1.0 if number == last else 0.3 + 0.4 * number / last,
                "linewidth": 1.8 if number == last else 1.1,
                # Of many iterations the first and the last are named.
                "label": name if number in (0, last) else "_",
            },
        )
        for number, (name, curve) in enumerate(iterations.items())
    ]


def side_by_side(kinds: Mapping[str, Curves]) -> list[Line]:
    """Return the lines of kinds of uncertainty, each in a colour of its own."""
    return [
        (curve, {"color": colour, "linewidth": 1.6, "label": name})
        for colour, (name, curve) in zip(CYCLE, kinds.items(), strict=False)
    ]


def by_iteration(
    axes: Axes,
    iterations: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    label: str,
    nominal: Mapping[str, float] | None = None,
) -> Axes:
    """Draw numbers against the iteration, NaN where one is not known.

    Parameters
    ----------
    axes
        Where to draw.
    iterations
        Numbers of the iterations.
    lines
        Values by name.
    label
        Of the vertical axis.
    nominal
        Where the line of a name should lie, drawn dashed.
    """
    for number, (name, values) in enumerate(lines.items()):
        axes.plot(
            iterations,
            values,
            label=name,
            color=CYCLE[number],
            marker=MARKERS[number],
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )
        if nominal and name in nominal:
            dashed: Any = (0, (4, 3))
            axes.axhline(nominal[name], color=CYCLE[number], linestyle=dashed, linewidth=1.0)
    axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS, integer=True))
    axes.set_xlim(min(iterations) - 0.5, max(iterations) + 0.5)
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    return legend_above(axes, n_columns=min(len(lines), 3))


def stacked_bars(
    axes: Axes, table: Mapping[str, Mapping[str, int]], classes: Sequence[str], *, none: str = ""
) -> Axes:
    """Draw the shares of classes in each group as horizontal bars, with the counts beside.

    Parameters
    ----------
    axes
        Where to draw.
    table
        Counts by group and class.
    classes
        The classes in the order of drawing.
    none
        The class that stands for no choice, drawn in grey.
    """
    groups = list(table)[::-1]
    totals = {group: max(sum(table[group].values()), 1) for group in groups}
    left = np.zeros(len(groups))
    for number, name in enumerate(classes):
        share = np.array([100 * table[group].get(name, 0) / totals[group] for group in groups])
        axes.barh(
            groups,
            share,
            left=left,
            height=0.68,
            label=name,
            color=PALE if name == none else CYCLE[number % len(CYCLE)],
            hatch=HATCHES[number // len(CYCLE) % len(HATCHES)] if name != none else "",
            edgecolor="white",
            linewidth=0.8,
        )
        left += share
    for row, group in enumerate(groups):
        axes.text(101.5, row, f"{totals[group]}", va="center", color=MUTED)
    axes.set(xlim=(0, 100))
    axes.set_xlabel("share of the configurations, %")
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    return axes


def legend_above(
    axes: Axes, handles: Sequence[Artist] | None = None, *, n_columns: int | None = None
) -> Axes:
    """Put the legend above the Axes, where it hides nothing."""
    shown = axes.get_legend_handles_labels()[0] if handles is None else list(handles)
    axes.legend(
        handles=shown,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=n_columns or (len(shown) if len(shown) <= 6 else 4),
        borderaxespad=0.1,
        borderpad=0.2,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.0,
    )
    return axes


def legend_below(axes: Axes, *, n_columns: int) -> Axes:
    """Put the legend below the Axes, for names too long to be beside."""
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=n_columns,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
    )
    return axes


def column_bars(
    axes: Axes, table: Mapping[str, Mapping[str, float]], classes: Sequence[str], label: str
) -> Axes:
    """Draw stacked columns: one for each entry of ``table``, one colour for each class."""
    names = list(table)
    bottom = np.zeros(len(names))
    for number, kind in enumerate(classes):
        height = np.array([float(table[name].get(kind, 0.0)) for name in names])
        if not height.any():
            # Skipped, but its colour stays its own: other figures use the same classes.
            continue
        axes.bar(
            names,
            height,
            bottom=bottom,
            width=0.62,
            label=kind,
            color=CYCLE[number % len(CYCLE)],
            edgecolor="white",
            linewidth=0.8,
        )
        bottom += height
    axes.set_ylim(0, 1.15 * max(bottom.max(initial=0.0), 1e-9))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=float(bottom.max(initial=0.0)) >= 5))
    axes.set_ylabel(label)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    # A single column as wide as the figure would look like an area.
    axes.set_xlim(-0.6, max(len(names), 4) - 0.4)
    return legend_above(axes)


def strip(
    axes: Axes,
    groups: Mapping[str, FloatArray],
    chosen: Mapping[str, FloatArray],
    label: str,
    rng: np.random.Generator,
) -> Axes:
    """Draw all values of each group as a cloud of dots, and those that were chosen on top.

    ``rng`` moves dots sideways, so that they do not hide one another.
    """
    for number, (name, values) in enumerate(groups.items()):
        picked = chosen.get(name, np.zeros(0))
        axes.scatter(
            spread(number, len(values), rng),
            values,
            s=7,
            color=PALE,
            linewidths=0,
            rasterized=len(values) > MANY_POINTS,
        )
        axes.scatter(
            spread(number, len(picked), rng),
            picked,
            s=24,
            color=RED,
            edgecolors="white",
            linewidths=0.6,
        )
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel(label)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    handles = [
        axes.scatter([], [], s=16, color=PALE, label="pool"),
        axes.scatter([], [], s=26, color=RED, label="chosen for DFT"),
    ]
    return legend_above(axes, handles)


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: 1, 2 and 5 of each decade if there is room."""
    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def padded(values: FloatArray) -> tuple[float, float]:
    """Return limits with a margin around finite values."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def spread(centre: float, n: int, rng: np.random.Generator) -> FloatArray:
    """Return ``n`` places around ``centre``."""
    return centre + rng.uniform(-0.27, 0.27, n)


def save_figure(
    path: Path, paint: Callable[[Sequence[Axes]], None], *, n_axes: int = 1, width: float = 9.2
) -> None:
    """Write a row of Axes, painted by ``paint``, to a file of the format that its name says.

    Raises
    ------
    ValueError
        If matplotlib does not know the format.
    """
    with mpl.rc_context({**STYLE, "svg.fonttype": "path", "figure.facecolor": "white"}):
        figure = Figure(figsize=(width, 3.0), layout="constrained")
        paint(list(figure.subplots(1, n_axes, squeeze=False)[0]))
        figure.savefig(path, dpi=200)


def histogram(axes: Axes, values: Mapping[str, FloatArray], label: str, counted: str) -> Axes:
    """Draw how often values occur, one colour for each name, NaN left out."""
    finite = {name: array[np.isfinite(array)] for name, array in values.items()}
    together = np.concatenate(list(finite.values()))
    axes.set(xlabel=label, ylabel=counted)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if not len(together):
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
        return axes
    edges = np.histogram_bin_edges(together, bins=min(40, max(10, len(together) // 5)))
    axes.hist(
        list(finite.values()),
        bins=edges.tolist(),
        stacked=True,
        label=list(finite),
        color=[CYCLE[number % len(CYCLE)] for number in range(len(finite))],
    )
    return axes
