"""``aiida-eipnn eip list``: which EIPs are there for some elements."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from aiida_eipnn.science.eip.catalogue import CatalogueEntry

HEADER = ("model", "family", "cutoff/Å", "year", "doi", "remark")


@click.command("list")
@click.option("--elements", metavar="A,B", required=True, help="Symbols, such as Si or Al,Ni.")
@click.option(
    "--all", "everything", is_flag=True, help="List what is left out too, and say why it is."
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with the citations.")
def cmd_list(elements: str, *, everything: bool, as_json: bool) -> None:
    """List the installed KIM models that know all of some elements.

    Left out, unless --all is given, are models made by machine learning, models with a known fault,
    and all but one of those that give the same numbers.
    """
    # Needs kimpy, which setup and the other commands do not.
    from aiida_eipnn.science.eip.catalogue import catalogue
    from aiida_eipnn.science.eip.names import split_names

    entries = catalogue(split_names(elements))
    shown = [entry for entry in entries if everything or entry.left_out is None]
    if as_json:
        click.echo(json.dumps([_row_of(entry) for entry in shown], indent=1, ensure_ascii=False))
        return
    _print_table([HEADER, *(_line_of(entry) for entry in shown)])
    click.echo(_summary(entries, everything=everything))


def _row_of(entry: "CatalogueEntry") -> dict[str, Any]:
    cutoff = entry.model.cutoff
    return asdict(entry.model.description) | {
        "cutoff": cutoff if math.isfinite(cutoff) else None,
        "checked": entry.checked,
        "fault": entry.fault,
        "refresh_drift": entry.refresh_drift,
        "same_as": entry.same_as,
        "left_out": entry.left_out,
    }


def _line_of(entry: "CatalogueEntry") -> tuple[str, ...]:
    described = entry.model.description
    return (
        described.name,
        described.family or "-",
        f"{entry.model.cutoff:.1f}",
        str(described.year or "-"),
        described.doi or "-",
        _remark(entry),
    )


def _remark(entry: "CatalogueEntry") -> str:
    if entry.left_out:
        return f"left out: {entry.left_out}"
    remarks = []
    if entry.same_as:
        remarks.append(f"{len(entry.same_as)} more with the same numbers")
    if entry.refresh_drift:
        remarks.append("wrong in ASE's own calculator")
    if not entry.checked:
        remarks.append("not checked")
    return "; ".join(remarks)


def _print_table(lines: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def _summary(entries: "Sequence[CatalogueEntry]", *, everything: bool) -> str:
    n_usable = sum(entry.left_out is None for entry in entries)
    text = f"{len(entries)} models, {n_usable} to use as EIPs"
    hidden = len(entries) - n_usable
    return text if everything or not hidden else f"{text}; --all lists the other {hidden}"
