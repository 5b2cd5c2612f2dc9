"""The report of a loop: one HTML file that needs nothing else, neither network nor this package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from aiida.orm import Data, ProcessNode

from aiida_eipnn import __version__
from aiida_eipnn.reports import evidence
from aiida_eipnn.reports.history import History, Iteration, read_history
from aiida_eipnn.reports.lineage import Lineage, trace
from aiida_eipnn.reports.points import PointState, inputs_of, latest, loop_outputs
from aiida_eipnn.science.assessment import FORCES, Assessment
from aiida_eipnn.science.eip.names import without_kim_id
from aiida_eipnn.science.eip.selection import NONE
from aiida_eipnn.science.metrics import Errors
from aiida_eipnn.science.reference import SourceErrors
from aiida_eipnn.science.uncertainty import LEVELS, Conformal

# Of the dots that are moved sideways in a figure, so that the same loop gives the same page.
JITTER_SEED = 0

# What a stage is called in a list of times.
SHORT = {
    "explore": "pool",
    "label_with_eips": "EIP labels",
    "dft": "DFT",
    "pretrain": "pre-training",
    "classify": "classification",
    "finetune": "fine-tuning",
    "scratch": "twin",
    "evaluate": "evaluation",
    "evaluate_scratch": "evaluation of the twin",
    "extend": "exploration",
    "label_found": "EIP labels of what it found",
}

# What features alone tell of atoms.
BY_FEATURES = {"atom_energy_std": "last layer", "strangeness": "strangeness"}
# The same, in a table.
KINDS = {
    "energy_std": "Energy: spread of the members",
    "atom_energy_std": "Forces: spread of the atom's energy that labels leave to the last layer",
    "strangeness": "Forces: distance of the atom's features from those of labelled atoms",
}

# Of pw.x, and of aiida-quantumespresso's distance of k-points.
UNITS = {"ecutwfc": "Ry", "ecutrho": "Ry", "degauss": "Ry", "kpoints_distance": "1/Å"}

SOFTWARE = (
    ("AiiDA", "Huber et al., Sci. Data 7, 300 (2020)", "10.1038/s41597-020-00638-4"),
    (
        "Quantum ESPRESSO",
        "Giannozzi et al., J. Phys.: Condens. Matter 29, 465901 (2017)",
        "10.1088/1361-648X/aa8f79",
    ),
    ("OpenKIM", "Tadmor et al., JOM 63, 17 (2011)", "10.1007/s11837-011-0102-6"),
    (
        "Learning from EIPs",
        "Shui et al., Injecting Domain Knowledge from Empirical Interatomic Potentials to Neural "
        "Networks for Predicting Material Properties, NeurIPS (2022)",
        "10.48550/arXiv.2210.08047",
    ),
    (
        "ASE",
        "Larsen et al., J. Phys.: Condens. Matter 29, 273002 (2017)",
        "10.1088/1361-648X/aa680e",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A key number: what it is, its value with unit, and what to compare it with."""

    title: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EipRow:
    """An EIP in the league table; what is not known is empty."""

    name: str
    title: str
    citation: str
    doi: str
    machine_learned: bool
    energy: str
    forces: str
    n_labels: str
    chosen: str


def write_report(node: ProcessNode, path: str | Path) -> Path:
    """Write the report of an active-learning loop: finished, broken or still running.

    Parameters
    ----------
    node
        The process node of the loop.
    path
        The HTML file to write; one that exists is replaced.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ValueError
        If the node is not a loop, or if matplotlib is not installed.
    """
    path = Path(path)
    path.write_text(render(node), encoding="utf-8")
    return path


def render(node: ProcessNode) -> str:
    """Return the report of a loop as HTML."""
    history = read_history(node)
    inputs, outputs = inputs_of(node.pk), loop_outputs(node.pk)
    lineage = trace(node) if "pretrained" in outputs else None
    pool = latest(outputs, inputs, "pool")
    errors = evidence.read_eip_errors(history, outputs, pool)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aiida_eipnn", "reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"duration": duration, "milli": milli, "day": day, "level": level_text}
    return environment.get_template("template.html").render(
        history=history,
        lineage=lineage,
        title=title(history),
        words=SHORT,
        kinds=KINDS,
        levels=LEVELS,
        summary=summary(history),
        status=status_word(history),
        cards=cards(history),
        figures=draw_figures(history, outputs, pool),
        league=league(history, lineage, errors),
        last=history.assessed[-1] if history.assessed else None,
        batches=[batch_row(history, name) for name in history.batches],
        stages=stage_times(history),
        software=SOFTWARE,
        version=__version__,
        seed=inputs["seed"].value,
        made=datetime.now(UTC),
    )


def title(history: History) -> str:
    """Return the headline: what was made, and of what."""
    what = "-".join(history.elements) or "an unknown system"
    if not history.assessed:
        return f"Active learning of {what}"
    n = history.assessed[-1].n_training_labels
    return f"A potential for {what} from {counted(n or 0, 'DFT label')}"


def summary(history: History) -> list[str]:
    """Return the result in a few sentences."""
    if not history.assessed:
        done, asked = history.count(PointState.DONE), len(history.points)
        points = f" {done} of {counted(asked, 'DFT point')} are labelled." if asked else ""
        return [f"There are no errors to report yet.{points}", *_ending(history)]
    last = history.assessed[-1]
    sentences = [_reached(last)]
    if last.finetuned:
        sentences.append(f"That is the twin from scratch; with EIPs it is {both(last.finetuned)}.")
    elif last.scratch:
        sentences.append(f"The same network trained from scratch reaches {both(last.scratch)}.")
    if last.verdict:
        sentences.append(f"{last.verdict}.")
    if last.best_eip:
        name = short_name(last.best_eip_name)
        sentences.append(f"The best single EIP, {name}, is off by {both(last.best_eip)}.")
    return [*sentences, *_ending(history)]


def status_word(history: History) -> str:
    """Return the state of the loop in one word: finished, running or failed."""
    if history.is_ok:
        return "finished"
    return "failed" if history.is_over else "running"


def cards(history: History) -> list[Card]:
    """Return the key numbers, those that are known."""
    found = []
    if history.assessed:
        last = history.assessed[-1]
        found = [
            error_card("Force error", last, "forces_mae", "meV/Å"),
            error_card("Energy error", last, "energy_mae", "meV/atom"),
        ]
        found += [card for card in (gain_card(last), trust_card(last)) if card]
    done, failed = history.count(PointState.DONE), history.count(PointState.FAILED)
    wall = sum(point.wall_seconds for point in history.points)
    cached = sum(point.cached for point in history.points)
    found.append(
        Card(
            title="DFT points",
            value=str(done),
            unit=f"of {len(history.points)}",
            note=f"{history.count(PointState.DONE, 'test')} of them held out for the test"
            + (f", {failed} failed" if failed else ""),
        )
    )
    if history.n_eip_labels is not None:
        found.append(
            Card(
                title="EIP labels",
                value=f"{history.n_eip_labels:,}".replace(",", "\u202f"),
                note=f"{counted(len(history.eips), 'EIP')} × "
                f"{counted(history.n_pool or 0, 'configuration')}",
            )
        )
    found.append(
        Card(
            title="DFT time",
            value=duration(wall),
            note=f"{cached} taken from the cache" if cached else "wall time of all pw.x runs",
        )
    )
    found.append(Card(title="Loop", value=duration(history.seconds), note=iterations_note(history)))
    return found


def iterations_note(history: History) -> str:
    """Return how many iterations there were of how many."""
    return f"{len(history.iterations)} of at most {counted(history.max_iterations, 'iteration')}"


def error_card(name: str, last: Iteration, field: str, unit: str) -> Card:
    """Return the card of one error of the committee."""
    others = [
        f"{who} {milli(getattr(errors, field))}"
        for who, errors in (("from scratch", last.scratch), ("best EIP", last.best_eip))
        if errors is not None
    ]
    return Card(
        title=name,
        value=milli(getattr(last.committee, field)),
        unit=unit,
        note=", ".join(others),
    )


def gain_card(last: Iteration) -> Card | None:
    """Return what the EIPs bring: the error of the forces over that of the twin without them."""
    informed = last.finetuned or last.committee
    if last.scratch is None or informed is None or not informed.forces_mae > 0:
        return None
    gain = last.scratch.forces_mae / informed.forces_mae
    return Card(
        title="What the EIPs bring",
        value=f"{gain:.2g}×",
        note="force error from scratch over that with EIPs"
        + ("" if gain > 1 else ": here the twin is better"),
    )


def trust_card(last: Iteration) -> Card | None:
    """Return how well the uncertainty ranks the errors."""
    judged = last.of_forces
    if judged is None or not np.isfinite(judged.calibration.spearman):
        return None
    return Card(
        title="Does it know its errors?",
        value=f"{judged.calibration.spearman:.2f}",
        note="rank correlation of uncertainty and force error; 1 is perfect"
        + _interval(judged.conformal),
    )


def _interval(conformal: Conformal | None) -> str:
    """Return how wide an interval of nine in ten is, and how often it holds elsewhere."""
    if conformal is None:
        return ""
    return (
        f"; {100 * conformal.level:.0f} % of the errors are below {conformal.factor:.2g} "
        f"times the uncertainty ({100 * conformal.coverage:.0f} % where other configurations "
        "set that)"
    )


def league(
    history: History, lineage: Lineage | None, errors: Sequence[SourceErrors]
) -> list[EipRow]:
    """Return the EIPs, best first, with what is known of each one."""
    facts = {eip.name: eip for eip in lineage.eips} if lineage else {}
    chosen = history.iterations[-1].choices if history.iterations else {}
    total = sum(chosen.values())
    found = {row.source: row for row in errors}
    names = [*found, *(name for name in history.eips if name not in found)]
    return [
        EipRow(
            name=name,
            title=(facts[name].title if name in facts else "") or short_name(name),
            citation=facts[name].citation if name in facts else "",
            doi=facts[name].doi if name in facts else "",
            machine_learned=name in facts and facts[name].machine_learned,
            energy=milli(found[name].energy_mae) if name in found else "",
            forces=milli(found[name].forces_mae) if name in found else "",
            n_labels=_labels_text(facts[name]) if name in facts else "",
            chosen=f"{100 * chosen.get(name, 0) / total:.0f} %" if total else "",
        )
        for name in names
    ]


def stage_times(history: History) -> str:
    """Return how long each stage took, in words."""
    seconds = history.seconds_by_stage()
    return ", ".join(f"{SHORT.get(name, name)} {duration(time)}" for name, time in seconds.items())


def batch_row(history: History, name: str) -> dict[str, Any]:
    """Return what one batch of DFT points came to."""
    points = [point for point in history.points if point.batch == name]
    return {
        "name": batch_text(name),
        "n": len(points),
        "done": history.count(PointState.DONE, name),
        "failed": history.count(PointState.FAILED, name),
        "wall": sum(point.wall_seconds for point in points),
        "cpu": sum(point.cpu_seconds for point in points),
        "runs": sum(point.n_runs for point in points),
        "cached": sum(point.cached for point in points),
    }


def batch_text(name: str) -> str:
    """Return the name of a batch of DFT points for people."""
    words = {"test": "test set", "initial": "initial", "known": "given"}
    return words.get(name) or f"iteration {int(name.removeprefix('i'))}"


def draw_figures(history: History, outputs: Mapping[str, Data], pool: Data) -> dict[str, str]:
    """Return each figure as SVG by name, empty where there are no data for it.

    Raises
    ------
    ValueError
        If matplotlib is not installed.
    """
    last = history.assessed[-1] if history.assessed else None
    # The same types in the same order, so that a type has one colour on the whole page.
    types = sorted({point.config_type for point in history.points})
    return {
        "learning": learning_figure(history),
        "parity": parity_figure(evidence.read_test_set(outputs, last), last),
        "curves": curves_figure(history),
        "panel": panel_figure(history),
        "kinds": kinds_figure(last),
        "choices": choices_figure(evidence.read_choices(outputs, pool, last), history.eips),
        "asked": asked_figure(
            history, evidence.read_uncertainties(outputs, history.iterations), types
        ),
        "cost": cost_figure(history, types),
    }


def learning_figure(history: History) -> str:
    """Draw the errors of committee, twin and best EIP against the DFT labels."""
    if not history.assessed:
        return ""
    figures = load_figures()
    labels = [item.n_training_labels or 0 for item in history.assessed]

    def curves(field: str) -> list[Any]:
        rows = (
            ("with EIPs", [item.committee for item in history.assessed], False),
            ("from scratch", [item.scratch for item in history.assessed], False),
            ("best single EIP", [item.best_eip for item in history.assessed], True),
        )
        return [
            figures.Curve(
                name=name,
                x=labels,
                y=[1000 * getattr(item, field) if item else np.nan for item in items],
                is_reference=is_reference,
            )
            for name, items, is_reference in rows
            if any(items)
        ]

    def paint(axes: Sequence[Any]) -> None:
        figures.learning_curve(axes[0], curves("forces_mae"), "force MAE, meV/Å")
        figures.learning_curve(axes[1], curves("energy_mae"), "energy MAE, meV/atom")

    return str(figures.draw("learning", paint, n_axes=2, height=3.0))


def parity_figure(test: evidence.TestSet | None, last: Iteration | None) -> str:
    """Draw energies, forces and uncertainties of the test set."""
    if test is None or last is None or not len(test):
        return ""
    figures = load_figures()
    zero = float(test.energy.mean())

    def paint(axes: Sequence[Any]) -> None:
        figures.parity(
            axes[0],
            test.energy - zero,
            test.predicted_energy - zero,
            label="energy less its mean, eV/atom",
            unit="meV/atom",
            scale=1000.0,
        )
        figures.parity(
            axes[1],
            test.forces.ravel(),
            test.predicted_forces.ravel(),
            label="force component, eV/Å",
            unit="meV/Å",
            scale=1000.0,
        )
        calibration = last.of_forces.calibration if last.of_forces else None
        figures.uncertainty_against_error(axes[2], test.forces_std, test.forces_error, calibration)

    return str(figures.draw("parity", paint, n_axes=3, height=3.2))


def curves_figure(history: History) -> str:
    """Draw calibration, rejection, and spread against error, of every iteration."""
    curves = {
        f"iteration {item.number}": item.of_forces.curves
        for item in history.assessed
        if item.of_forces
    }
    if not curves:
        return ""
    return _draw_curves("curves", load_figures().fading(curves))


def kinds_figure(last: Iteration | None) -> str:
    """Draw what the last committee says of force errors, by its spread and by features alone."""
    if last is None or last.of_forces is None:
        return ""
    kinds = {
        text: last.uncertainties[name].curves
        for name, text in {FORCES: "members", **BY_FEATURES}.items()
        if name in last.uncertainties
    }
    if len(kinds) < 2:
        return ""
    return _draw_curves("kinds", load_figures().side_by_side(kinds))


def _draw_curves(name: str, lines: Sequence[Any]) -> str:
    figures = load_figures()

    def paint(axes: Sequence[Any]) -> None:
        figures.calibration_curves(axes[0], lines)
        figures.rejection_curves(axes[1], lines)
        figures.spread_against_error(axes[2], lines)

    return str(figures.draw(name, paint, n_axes=3, height=3.3))


def panel_figure(history: History) -> str:
    """Draw the panel of the uncertainties against the iterations."""
    items = [item for item in history.assessed if item.of_forces]
    judged = [item.of_forces for item in items if item.of_forces]
    if not judged:
        return ""
    figures = load_figures()
    numbers = [item.number for item in items]

    def line(field: str) -> list[float]:
        return [getattr(found.panel, field) for found in judged]

    def paint(axes: Sequence[Any]) -> None:
        covered, wanted = _coverage(judged)
        figures.by_iteration(axes[0], numbers, covered, "errors within the interval, %", wanted)
        ranking = {"rank correlation": line("spearman"), "gain by rejection": line("rejection")}
        ranking |= _ranks_by_features(items)
        figures.by_iteration(axes[1], numbers, ranking, "1 is perfect")
        off = {"ENCE": line("ence"), "miscal. area": line("miscalibration_area")}
        figures.by_iteration(axes[2], numbers, off, "0 is perfect")

    return str(figures.draw("panel", paint, n_axes=3, height=3.2))


def _ranks_by_features(items: Sequence[Iteration]) -> dict[str, list[float]]:
    """Return how well features alone rank the errors, by iteration, where that is known."""
    return {
        text: [
            found.panel.spearman if (found := item.uncertainties.get(name)) else np.nan
            for item in items
        ]
        for name, text in BY_FEATURES.items()
        if any(name in item.uncertainties for item in items)
    }


def _coverage(
    judged: Sequence[Assessment],
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the coverage of each kind of interval by iteration, and what it should be, in %."""
    levels = list(judged[0].panel.coverage)
    wanted = {f"{100 * float(level):.0f} %": 100 * float(level) for level in levels}
    lines = {
        name: [100 * found.panel.coverage[level] for found in judged]
        for name, level in zip(wanted, levels, strict=True)
    }
    for name, field in (("atoms", "conformal"), ("worst atom", "conformal_worst")):
        conformal = [getattr(found, field) for found in judged]
        if any(conformal):
            lines[name] = [100 * item.coverage if item else np.nan for item in conformal]
    return lines, wanted


def choices_figure(choices: evidence.Choices | None, eips: Sequence[str]) -> str:
    """Draw which EIP was chosen for which type of configuration."""
    if choices is None or not len(choices.names):
        return ""
    figures = load_figures()
    shown = {name: short_name(name) for name in eips} | {NONE: "none of them"}
    table = {
        group: {shown[name]: n for name, n in counts.items()}
        for group, counts in choices.table().items()
    }
    classes = [text for text in shown.values() if any(text in counts for counts in table.values())]

    def paint(axes: Sequence[Any]) -> None:
        figures.stacked_bars(axes[0], table, classes, none=shown[NONE])
        figures.legend_below(axes[0], n_columns=3)

    height = 1.0 + 0.32 * len(table) + 0.2 * -(-len(classes) // 3)
    return str(figures.draw("choices", paint, width=9.2, height=height))


def asked_figure(history: History, uncertainties: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Draw what the iterations asked for: counts by type, and uncertainty within the pool."""
    asked = {item.name: item.asked for item in history.iterations if item.asked is not None}
    if not asked or not uncertainties:
        return ""
    figures = load_figures()
    counts = {short_batch(name): dict(item.config_types) for name, item in asked.items()}
    pool = {short_batch(name): values for name, values in uncertainties.items()}
    chosen = {short_batch(name): np.array(item.uncertainties) for name, item in asked.items()}

    def paint(axes: Sequence[Any]) -> None:
        figures.column_bars(axes[0], counts, classes, "DFT points asked for")
        rng = np.random.default_rng(JITTER_SEED)
        figures.strip(axes[1], pool, chosen, "force uncertainty, eV/Å", rng)

    return str(figures.draw("asked", paint, n_axes=2, height=3.0))


def cost_figure(history: History, classes: Sequence[str]) -> str:
    """Draw the DFT time of each batch, by type of configuration."""
    points = [point for point in history.points if point.wall_seconds > 0]
    if not points:
        return ""
    figures = load_figures()
    table: dict[str, dict[str, float]] = {short_batch(name): {} for name in history.batches}
    for point in points:
        row = table[short_batch(point.batch)]
        row[point.config_type] = row.get(point.config_type, 0.0) + point.wall_seconds / 60

    def paint(axes: Sequence[Any]) -> None:
        figures.column_bars(axes[0], table, classes, "pw.x wall time, min")

    return str(figures.draw("cost", paint, width=4.6, height=3.0))


def short_batch(name: str) -> str:
    """Return the name of a batch, short enough for an axis."""
    return str(int(name[1:])) if name[1:].isdigit() else name


def level_text(level: Mapping[str, Any]) -> str:
    """Return a level of theory for people, with units."""
    shown = {key: value for key, value in level.items() if key not in {"pseudos", "fingerprint"}}
    return ", ".join(f"{key} {value} {UNITS.get(key, '')}".rstrip() for key, value in shown.items())


def load_figures() -> Any:
    """Return the module that draws; matplotlib is an optional dependency.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    try:
        from aiida_eipnn.reports import figures
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a report needs {error.name}: install it with `pip install aiida-eipnn[plots]`"
        ) from error
    return figures


def both(errors: Errors) -> str:
    """Return energy and force error in words."""
    # A number and its unit stay on one line.
    return f"{milli(errors.energy_mae)}\u00a0meV/atom and {milli(errors.forces_mae)}\u00a0meV/Å"


def counted(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it needs it."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def milli(value: float) -> str:
    """Return a value in thousandths of its unit with three digits, a dash where there is none."""
    if not np.isfinite(value):
        return "–"
    scaled = 1000 * value
    return f"{scaled:.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def duration(seconds: float) -> str:
    """Return a time span in the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def day(moment: datetime) -> str:
    """Return a date and time in UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def short_name(name: str) -> str:
    """Return the readable part of an extended KIM id; any other name as it is."""
    readable = without_kim_id(name)
    return name if readable == name else readable.replace("_", " ")


def _reached(last: Iteration) -> str:
    if last.committee is None:
        return ""
    return (
        f"With {counted(last.n_training_labels or 0, 'DFT label')} the committee reaches "
        f"{both(last.committee)} on "
        f"{counted(last.committee.n_configurations, 'held-out configuration')}."
    )


def _ending(history: History) -> list[str]:
    if history.stop_text and history.is_ok:
        return [f"It stopped because {history.stop_text.rstrip('.')}."]
    if history.is_ok:
        return ["It is finished."]
    if history.is_over:
        return [f"The loop did not finish: {history.stage}"]
    return [f"The loop is running: {history.stage}."]


def _labels_text(eip: Any) -> str:
    if eip.n_labels is None:
        return ""
    return f"{eip.n_labels}" + (f" ({eip.n_failures} failed)" if eip.n_failures else "")
