"""``aiida-eipnn eip check``: whether the numbers of KIM models belong together."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from aiida_eipnn.science.eip.checked import ElementResult


@click.command("check")
@click.option(
    "--elements",
    metavar="A,B",
    help="Elements to check on.  [default: all that the shipped results have]",
)
@click.option("--models", metavar="A,B", help="KIM ids.  [default: all that are installed]")
@click.option(
    "--seconds",
    metavar="S",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="How long one model may take for one element.",
)
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the results as JSON, as this package ships them.",
)
def cmd_check(
    elements: str | None, models: str | None, seconds: float, output: Path | None
) -> None:
    """Check KIM models on crystals of the elements they know.

    Each model runs in a process of its own: reuse, forces and stress against finite differences,
    supercells, rotations.
    """
    # Needs kimpy, which setup and the other commands do not.
    from aiida_eipnn.science.eip import checked
    from aiida_eipnn.science.eip.kim import installed_kim_models
    from aiida_eipnn.science.eip.names import split_names

    names = split_names(models) if models else installed_kim_models()
    symbols = split_names(elements) if elements else checked.ELEMENTS
    checks = checked.check_models(names, symbols, seconds=seconds, on_result=_tell)
    faulty = {key: row.faults for key, row in checks.results.items() if row.faults}
    drifting = [key for key, row in checks.results.items() if row.refresh_drift]
    click.echo(
        f"{len(checks.results)} checked, {len(faulty)} with a fault, {len(drifting)} on which "
        "ASE's own calculator drifts"
    )
    for (name, element), faults in faulty.items():
        click.echo(f"{element:2}  {name}: {'; '.join(faults)}")
    if output:
        checked.write_checks(checks, output)


def _tell(name: str, element: str, result: "ElementResult") -> None:
    drift = f"  drift {result.refresh_drift:.1e} eV/atom in ASE" if result.refresh_drift else ""
    click.echo(f"{'FAULT' if result.faults else 'ok':5}  {element:2}  {name}{drift}", err=True)
