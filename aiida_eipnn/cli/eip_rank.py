"""``aiida-eipnn eip rank``: which EIP is good on a labelled set, and whether any is."""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aiida_eipnn.science.eip.names import split_names, without_kim_id

if TYPE_CHECKING:
    from aiida_eipnn.science.configurations import Configurations
    from aiida_eipnn.science.labels import Labels
    from aiida_eipnn.science.league import Disagreement, League
    from aiida_eipnn.science.worth import Comparison, Quantity

PROTOCOLS = Path(__file__).parent.parent / "workflows" / "protocols" / "active_learning.yaml"
ALL = "all"
VERDICTS = {
    "help": "EIPs help here",
    "do not help": "EIPs do not help here",
    "cannot tell": "one cannot tell whether EIPs help here",
}


@click.command("rank")
@click.argument(
    "path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--eips",
    metavar="A,B",
    help="EIPs to rank, or `all` that `eip list` shows.  [default: the protocol's]",
)
@click.option("--split-key", metavar="KEY", help="Key of the comment line that names the part.")
@click.option(
    "--train", default="train", show_default=True, help="Its value for the training part."
)
@click.option("--only", metavar="KEY=VALUE", help="Leave out frames that say something else.")
@click.option(
    "--json",
    "output",
    metavar="OUT",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write everything as JSON too.",
)
@click.option("--workers", metavar="N", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--seed", default=20260101, show_default=True, help="Of the cross-validation.")
def cmd_rank(
    path: Path,
    eips: str | None,
    split_key: str | None,
    train: str,
    only: str | None,
    output: Path | None,
    workers: int | None,
    seed: int,
) -> None:
    """Rank EIPs on a file with DFT labels, and say whether they carry information there.

    FILE is any file that ASE reads, extended XYZ for instance, with energy and forces of each
    frame under the bare keys or under dft_energy and dft_forces.
    """
    import numpy as np

    from aiida_eipnn.science.eip.engine import label_with_eips
    from aiida_eipnn.science.league import rank_eips

    configurations, reference, ids = read(path, only, split_key, train)
    symbols = configurations.symbols
    names = split_names(eips) if eips and eips != ALL else default_eips(symbols, eips)
    click.echo(
        f"labelling {len(configurations)} configurations of {'-'.join(symbols)} with "
        f"{len(names)} EIPs",
        err=True,
    )
    labels = label_with_eips(
        configurations, names, n_workers=workers or len(os.sched_getaffinity(0))
    )
    refuse_silence(labels)
    league = rank_eips(configurations, reference, labels, np.random.default_rng(seed), train=ids)
    head = [header(path, configurations, symbols, league, split_key, train)]
    click.echo("\n".join([*head, "", *table(league), "", *notes(league, names), *worth(league)]))
    if output is not None:
        content = {"file": path.name, "elements": symbols, "seed": seed, **league.as_dict()}
        output.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def read(
    path: Path, only: str | None, split_key: str | None, train: str
) -> "tuple[Configurations, Labels, list[str] | None]":
    """Return what to rank on, and the ids of the training part if a split was named.

    Raises
    ------
    ValueError
        If nothing is left, or ``only`` is not ``KEY=VALUE``.
    """
    from aiida_eipnn.science.io import read_tagged

    key, equals, value = (only or "").partition("=")
    if only is not None and not (key and equals):
        raise ValueError(f"--only {only}: write KEY=VALUE, such as --only split=train")
    tags = [name for name in (key, split_key) if name]
    configurations, labels, values = read_tagged(path, tags)
    rows = list(range(len(configurations)))
    if key:
        rows = [row for row in rows if values[key][row] == value]
        if not rows:
            found = sorted(set(values[key].tolist()))[:10]
            raise ValueError(f"no frame has {key}={value}; there are {found}")
    ids = None
    if split_key:
        ids = [str(labels.ids[row]) for row in rows if values[split_key][row] == train]
    return configurations.take(rows), labels.take(rows), ids


def default_eips(symbols: Sequence[str], wanted: str | None) -> list[str]:
    """Return the protocol's EIPs for these elements, else all that are installed.

    Raises
    ------
    ValueError
        If there is none.
    """
    import yaml

    # Read here, because to import the protocols is to import AiiDA, for seconds.
    table = yaml.safe_load(PROTOCOLS.read_text(encoding="utf-8"))["default_inputs"]["eips"]
    key = "-".join(sorted(symbols))
    if wanted != ALL and key in table:
        return list(table[key])
    try:
        from aiida_eipnn.science.eip.catalogue import usable_eips
    except ModuleNotFoundError as error:
        raise ValueError(
            "kimpy is not installed: pip install aiida-eipnn[kim], or name EIPs with --eips"
        ) from error
    names = list(usable_eips(symbols))
    if not names:
        raise ValueError(
            f"no installed KIM model knows {key}: name EIPs with --eips, for instance "
            "lennard-jones or python:module:callable"
        )
    return names


def refuse_silence(labels: "Labels") -> None:
    """Raise ``ValueError`` if not one EIP gave a label."""
    if labels.ok.any():
        return
    reasons = Counter(failure.reason for failure in labels.failures())
    raise ValueError(
        "no EIP gave a label: " + "; ".join(reason for reason, _ in reasons.most_common(3))
    )


def header(
    path: Path,
    configurations: "Configurations",
    symbols: Sequence[str],
    league: "League",
    split_key: str | None,
    train: str,
) -> str:
    """Return what was compared, in one paragraph."""
    types = Counter(configurations.config_types.tolist())
    kinds = ", ".join(f"{name} {count}" for name, count in types.most_common(6))
    more = f" and {len(types) - 6} more types" if len(types) > 6 else ""
    part = f" outside {split_key}={train}" if split_key else ""
    return (
        f"{path.name}: {len(configurations)} configurations of {'-'.join(symbols)} "
        f"({kinds}{more}), {league.n_copies} of them copies of others; errors on "
        f"{league.n_configurations} distinct ones{part} ({league.n_atoms} atoms)\n"
        f"energies {league.alignment}"
    )


def best_of(name: str | None) -> str:
    """Return the EIP that is best, without its KIM id."""
    return without_kim_id(name) if name else "none"


def table(league: "League") -> list[str]:
    """Return the league table."""
    width = max(28, *(len(without_kim_id(row.eip)) for row in league.standings))
    lines = [
        f"{'':{width}}           energy (meV/atom)           forces (meV/Å)        best (%) in",
        f"{'EIP':{width}}  labels     MAE    RMSE  shifted     MAE    RMSE  scaled  energy forces",
    ]
    lines += [
        f"{without_kim_id(row.eip):{width}}  {row.n:6d} {milli(row.energy_mae):>7} "
        f"{milli(row.energy_rmse):>7}  {milli(row.shifted_mae):>7} {milli(row.forces_mae):>7} "
        f"{milli(row.forces_rmse):>7} {milli(row.scaled_forces_mae):>7}  "
        f"{percent(row.energy_wins):>6} {percent(row.forces_wins):>6}"
        for row in league.standings
    ]
    for name, energy, forces in (
        ("best for each configuration", league.oracle_energy, league.oracle_forces),
        ("constant, zero force", league.constant_energy, league.zero_forces),
    ):
        lines.append(f"{name:{width}}  {'':6} {milli(energy):>7} {'':7}  {'':7} {milli(forces):>7}")
    return [
        *lines,
        "",
        "shifted: energies without the scale; scaled: forces with the scale of the energies",
    ]


def notes(league: "League", names: Sequence[str]) -> list[str]:
    """Return the findings that are no table."""
    lines = [
        f"best single EIP       {best_of(league.best_energy)} in energy, "
        f"{best_of(league.best_forces)} in forces",
        f"same winner           the EIP best in energy is best in forces for "
        f"{percent(league.same_winner)} % of the configurations",
        *disagreement_lines(league.energy_disagreement, "energy", "meV/atom"),
        *disagreement_lines(league.forces_disagreement, "forces", "meV/Å"),
    ]
    lines += missing_lines(league)
    if learned := machine_learned(names):
        lines.append(
            "machine-learned       " + ", ".join(learned) + ": perhaps fitted to these very labels"
        )
    return [*lines, ""]


def missing_lines(league: "League") -> list[str]:
    """Return which labels are missing and why, EIPs that lack the same together."""
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    for row in league.standings:
        for reason, count in row.missing.items():
            found[reason, count].append(without_kim_id(row.eip))
    return [
        f"missing               {who(names, league)}: {count} × {reason}"
        for (reason, count), names in found.items()
    ]


def who(names: Sequence[str], league: "League") -> str:
    """Return some EIPs as text."""
    every = len(names) == len(league.standings) > 1
    return "every EIP" if every else ", ".join(names)


def disagreement_lines(found: "Disagreement", quantity: str, unit: str) -> list[str]:
    """Return what the disagreement of EIPs says."""
    if not found.n:
        return [f"disagreement          {quantity}: fewer than three EIPs, no median"]
    return [
        f"disagreement          {quantity}: EIPs spread by {milli(found.spread)} {unit} about "
        f"their median, which errs by {milli(found.consensus_mae)}; "
        f"rank correlation {found.spearman:.2f}"
    ]


def machine_learned(names: Sequence[str]) -> list[str]:
    """Return those of the EIPs that were fitted by machine learning."""
    from aiida_eipnn.science.eip.potential import describe_potential

    found = []
    for name in names:
        try:
            described = describe_potential(name)
        except (ValueError, ModuleNotFoundError):
            # It is in the table as missing, with its reason.
            continue
        if described.machine_learned:
            found.append(without_kim_id(name))
    return found


def worth(league: "League") -> list[str]:
    """Return the cross-validation and the verdict."""
    from aiida_eipnn.science.worth import Quantity

    lines = []
    for quantity in Quantity:
        rows = [row for row in league.worth.comparisons if row.quantity is quantity]
        if rows:
            lines += [*comparison_lines(quantity, rows), ""]
    return [*lines, f"verdict: {VERDICTS[league.worth.answer]}: {league.worth.text}"]


def comparison_lines(quantity: "Quantity", rows: "Sequence[Comparison]") -> list[str]:
    """Return the cross-validation of one quantity, a column for each way to hold labels out."""
    unit = "meV/atom" if quantity == "energy" else "meV/Å"
    lines = [
        (f"cross-validation, {quantity} MAE ({unit})", [f"{row.n_train} labels" for row in rows]),
        ("  held out", [row.where for row in rows]),
    ]
    lines += [
        (f"  {name}", [milli(row.errors.get(name, math.nan)) for row in rows])
        for name in dict.fromkeys(name for row in rows for name in row.errors)
    ]
    lines += [
        ("  chosen without EIPs", [milli(row.without) for row in rows]),
        ("  chosen with EIPs", [milli(row.with_eips) for row in rows]),
        ("  gain, %", [f"{100 * row.gain:.0f}" for row in rows]),
        ("  95 % interval", [f"{100 * row.low:.0f} to {100 * row.high:.0f}" for row in rows]),
        ("  EIPs", [str(row.answer) for row in rows]),
    ]
    return [f"{name:42}" + "".join(f"{cell:>28}" for cell in cells) for name, cells in lines]


def milli(value: float) -> str:
    """Return a number in eV as one in meV."""
    if math.isnan(value):
        return "-"
    return f"{1000 * value:.1f}" if value < 100 else f"{1000 * value:.1e}"


def percent(value: float) -> str:
    """Return a share in percent."""
    return "-" if math.isnan(value) else f"{100 * value:.0f}"
