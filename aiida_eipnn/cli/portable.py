"""``aiida-eipnn portable-code``: an ``eipnn-job`` that AiiDA takes along to any computer."""

import io
import shlex
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

import aiida_eipnn
from aiida_eipnn.cli.loop import profile_option, use_profile

if TYPE_CHECKING:
    from aiida.orm import PortableCode

LABEL = "eipnn-job-portable"
# Two files, whatever the package grows to: AiiDA copies them one by one, for every job.
EXECUTABLE = "eipnn-job"
ARCHIVE = "aiida_eipnn.zip"
ROOMS = ("science", "jobs")

SCRIPT = """\
#!/bin/sh
# eipnn-job of aiida-eipnn {version}, from the archive beside this file.
python={python}
here=$(cd "$(dirname "$0")" && pwd) || exit 1
export PYTHONPATH="$here/{archive}${{PYTHONPATH:+:$PYTHONPATH}}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "eipnn-job needs Python 3.11 or newer, which $python is not here: load a module that has it \
in the prepend text of the code, or name it with aiida-eipnn portable-code --python" >&2
  exit 1
fi
# -P: files of the job must not stand in for modules.
exec "$python" -P -m aiida_eipnn.jobs "$@"
"""

# The same at all times and places: the content of the code is what tells two of them apart.
_TIME = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644 << 16


@click.command("portable-code")
@click.option("--label", default=LABEL, show_default=True, help="Label of the code.")
@click.option(
    "--python",
    default="python3",
    show_default=True,
    help="Python of the compute nodes that has torch, ase and kimpy.",
)
@click.option(
    "--prepend-text", default="", help="What the job script says before, `module load ...` say."
)
@profile_option
def cmd_portable_code(label: str, python: str, prepend_text: str, profile: str | None) -> None:
    """Make a code that brings eipnn-job along.

    AiiDA copies it into the folder of each job, so nothing of this package has to be installed
    where jobs run: Python 3.11 or newer with torch, ase and, for KIM models, kimpy will do. It
    belongs to no computer: say `computer: LABEL` in the --options of a launch script, or give
    metadata.computer to a process.
    """
    use_profile(profile)
    made = ensure_portable_code(label, python=python, prepend_text=prepend_text)
    click.echo(f"{'made' if made else 'there already':13}  code {label}")


def ensure_portable_code(label: str, *, python: str = "python3", prepend_text: str = "") -> bool:
    """Store the portable code ``label`` unless it is there; say whether there was anything to do.

    A code of this name with another content is renamed and hidden, not changed: finished
    calculations refer to it.
    """
    from aiida.orm import PortableCode, QueryBuilder

    code = portable_code(label, python=python, prepend_text=prepend_text)
    query = QueryBuilder().append(PortableCode, filters={"label": label})
    there = query.first(flat=True)
    if there is not None:
        if _content(there) == _content(code):
            return False
        there.label = f"{label}-{there.pk}"
        there.is_hidden = True
    code.store()
    return True


def portable_code(
    label: str = LABEL, *, python: str = "python3", prepend_text: str = ""
) -> "PortableCode":
    """Return the code, not stored yet."""
    from aiida.orm import PortableCode

    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), python=python)
        return PortableCode(
            label=label,
            description=f"eipnn-job of aiida-eipnn {aiida_eipnn.__version__}",
            filepath_files=folder,
            filepath_executable=EXECUTABLE,
            prepend_text=prepend_text,
            with_mpi=False,
        )


def _content(code: "PortableCode") -> tuple[str, str]:
    return code.base.repository.hash(), code.prepend_text


def write_files(folder: Path, *, python: str = "python3") -> None:
    """Write what runs jobs: a shell script, and the rooms that it needs in an archive.

    Equal sources give equal bytes.
    """
    script = SCRIPT.format(
        version=aiida_eipnn.__version__, archive=ARCHIVE, python=shlex.quote(python)
    )
    (folder / EXECUTABLE).write_text(script)
    (folder / EXECUTABLE).chmod(0o755)
    (folder / ARCHIVE).write_bytes(_archive())


def _archive() -> bytes:
    root = Path(aiida_eipnn.__file__).parent
    content = io.BytesIO()
    # Not compressed: what zlib makes of a text depends on its version.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for path in _sources(root):
            name = str(Path(root.name) / path.relative_to(root).as_posix())
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = _MODE
            # Unix, wherever it was made.
            entry.create_system = 3
            archive.writestr(entry, path.read_bytes())
    return content.getvalue()


def _sources(root: Path) -> list[Path]:
    """Return the files of the rooms: modules, and the tables beside them."""
    found = [
        path
        for room in ROOMS
        for suffix in ("py", "json")
        for path in (root / room).rglob(f"*.{suffix}")
    ]
    return [root / "__init__.py", *sorted(found, key=lambda path: path.as_posix())]
