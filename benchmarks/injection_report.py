"""Write the page and the figures of the results of `make bench-injection`.

    python benchmarks/injection_report.py

Reads benchmarks/results/injection.json and writes docs/topics/injection-results.md, with
docs/topics/figures/*.svg beside it. Equal results give equal files, byte for byte.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from injection_summary import (  # type: ignore[import-not-found]
    OURS,
    PAPER,
    QUANTITIES,
    SCRATCH,
    Row,
    Table,
    judge,
    name_groups,
    sizes_of,
    tabulate,
    text_of,
)
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from aiida_eipnn.reports.figures import Curve, draw, learning_curve

RESULTS = Path(__file__).parent / "results" / "injection.json"
TOPICS = Path(__file__).resolve().parent.parent / "docs" / "topics"

# What is drawn together: more lines than colours cannot be told apart.
FIGURES = {
    "arms": (SCRATCH, "eip_affine", "stack", "delta", PAPER, OURS),
    "strategies": (SCRATCH, "paper_1", "paper_2", "ours_1", "ours_2", OURS),
    "controls": (SCRATCH, "worst_eip", "shuffled", OURS),
}
UNITS = {"energy": "energy MAE, meV/atom", "force": "force MAE, meV/Å"}
DETAILED = ("stack", SCRATCH, PAPER, OURS)
VERDICTS = {True: "reached", False: "**missed**", None: "–"}

INTRODUCTION = """\
# What EIPs are worth when DFT labels are few: results

Made by `make bench-injection-full` and `benchmarks/injection_report.py`; \
`benchmarks/injection.py` says what is measured, `benchmarks/injection_arms.py` what the arms are.
Each cell is the mean absolute error of energies in meV/atom / of force components in meV/Å on \
test configurations that no training saw, the mean over seeds; in brackets the change against \
`scratch`, the same network on the DFT labels alone. Validation labels count as labelled points. \
The oracle knows the test labels: a bound of what choosing among EIPs can give.
"""


def write_page(results: dict[str, Any], folder: Path) -> None:
    """Write the page and its figures into a folder."""
    rows, saved = results["rows"], results["saved"]
    for stale in (folder / "figures").glob("injection-*.svg"):
        stale.unlink()
    parts = [INTRODUCTION, _conditions(results["meta"], rows)]
    for trunk, targets in judge(rows, saved).items():
        parts.append(f"## Targets, {trunk}\n")
        parts.append(
            _table(
                ("target", "goal", "found", ""),
                [(item.what, item.goal, item.found, VERDICTS[item.reached]) for item in targets],
            )
        )
    for dataset, trunk in name_groups(rows):
        parts += _section(rows, saved, dataset, trunk, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "injection-results.md").write_text("\n".join(parts), encoding="utf-8")


def _conditions(meta: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return on what the results rest."""
    if not meta:
        return "The run has not ended.\n"
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return (
        f"{len(rows)} trainings, {meta['cpu_s'] / 3600:.1f} CPU hours, one thread each, on "
        f"{meta['cores']} cores ({meta['machine']}); Python {meta['python']}, {versions}; "
        f"{meta['date']}.\n"
    )


def _section(
    rows: Sequence[Row], saved: Sequence[Row], dataset: str, trunk: str, folder: Path
) -> list[str]:
    """Return what there is to say of one set and trunk."""
    table = tabulate(rows, dataset, trunk)
    name = dataset if trunk == "none" else f"{dataset}, {trunk}"
    parts = [f"## {name}\n"]
    figures = draw_figures(table, f"injection-{dataset}-{trunk}", folder / "figures")
    parts += [f"![Learning curves of {name}](figures/{figure})\n" for figure in figures]
    parts.append(_error_table(table, list(table)))
    mine = [row for row in saved if (row["dataset"], row["trunk"]) == (dataset, trunk)]
    if mine:
        parts += ["### Points saved against scratch at equal force error\n", _saved_table(mine)]
    without = _without_twins(rows)
    if any(row["dataset"] == dataset for row in without):
        parts.append("### Without test configurations that have a twin in training\n")
        parts.append(_detailed(tabulate(without, dataset, trunk)))
    for kind in _types(rows, dataset):
        part = tabulate(_of_type(rows, kind), dataset, trunk)
        if part:
            parts += [f"### {kind} alone\n", _detailed(part)]
    return parts


def _detailed(table: Table) -> str:
    return _error_table(table, [arm for arm in DETAILED if arm in table])


def _error_table(table: Table, arms: Sequence[str]) -> str:
    sizes = sizes_of(table)
    heads = ["labelled points", *map(str, sizes)]
    return _table(heads, [(arm, *(text_of(table, arm, n) for n in sizes)) for arm in arms])


def _saved_table(saved: Sequence[Row]) -> str:
    """Return the points each arm saves; columns are the points that scratch was given."""
    sizes = sorted({row["n_scratch"] for row in saved})
    heads = ["points of scratch", *map(str, sizes)]
    by_arm: dict[str, dict[int, str]] = {}
    for row in saved:
        by_arm.setdefault(row["arm"], {})[row["n_scratch"]] = (
            f"{row['bound']} {100 * row['saving']:.0f} % "
            f"({100 * row['low']:.0f} to {100 * row['high']:.0f})"
        ).strip()
    return _table(
        heads, [(arm, *(cells.get(n, "") for n in sizes)) for arm, cells in by_arm.items()]
    )


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _without_twins(rows: Iterable[Row]) -> list[Row]:
    return [{**row, **_errors(row["without_twins"])} for row in rows if "without_twins" in row]


def _types(rows: Iterable[Row], dataset: str) -> list[str]:
    """Return the types of the test configurations, none where there is only one."""
    kinds = sorted({kind for row in rows if row["dataset"] == dataset for kind in row["by_type"]})
    return kinds if len(kinds) > 1 else []


def _of_type(rows: Iterable[Row], kind: str) -> list[Row]:
    """Return rows with the errors of one type; those without forces say nothing here."""
    parts = [(row, row["by_type"].get(kind)) for row in rows]
    return [
        {**row, **_errors(part)}
        for row, part in parts
        if part and part["force_mae_mev"] is not None
    ]


def _errors(part: Row) -> Row:
    return {name: part[name] for name in QUANTITIES.values()}


def draw_figures(table: Table, stem: str, folder: Path) -> list[str]:
    """Draw learning curves of energies and forces; return the names of the files."""
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    for kind, arms in FIGURES.items():
        drawn = [arm for arm in arms if arm in table]
        # A figure of the reference and what another figure shows too says nothing new.
        if kind != "arms" and len(set(drawn) - {SCRATCH, OURS}) == 0:
            continue
        name = f"{stem}-{kind}"
        svg = draw(name, _painter(table, drawn), n_axes=2, height=3.4)
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
        names.append(f"{name}.svg")
    return names


def _painter(table: Table, arms: Sequence[str]) -> Callable[[Sequence[Axes]], None]:
    """Return what paints energies and forces side by side."""

    def paint(axes: Sequence[Axes]) -> None:
        for ax, (quantity, label) in zip(axes, UNITS.items(), strict=True):
            curves = [
                Curve(
                    name=arm,
                    x=list(table[arm]),
                    y=[getattr(cell, quantity) for cell in table[arm].values()],
                    is_reference=arm == SCRATCH,
                )
                for arm in arms
            ]
            learning_curve(ax, curves, label)
            ax.set_xscale("log")
            sizes = sizes_of(table)
            ax.set_xticks(sizes, labels=[str(n) for n in sizes])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlabel("labelled points")

    return paint


def main() -> None:
    """Read the results and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=TOPICS)
    given = parser.parse_args()
    write_page(json.loads(given.results.read_text()), given.folder)
    print(f"written to {given.folder / 'injection-results.md'}")


if __name__ == "__main__":
    main()
