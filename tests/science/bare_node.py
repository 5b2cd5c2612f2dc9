"""A Python that has torch, ase, kimpy and what these bring, and nothing else."""

import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PROMISED = ("torch", "ase", "kimpy")


def make_node(folder: Path, *more: str) -> Path:
    """Make an environment that sees those packages of this one; return its ``python3``.

    More may be seen beside them, by name. No package is copied.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python3"
    packages = next((folder / "lib").glob("python*/site-packages"))
    for distribution in brought_by(*PROMISED, *more):
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = packages / name
            if not link.exists():
                link.symlink_to(distribution.locate_file(name))
    return python


def brought_by(*names: str) -> list[metadata.Distribution]:
    """Return packages and all that they depend on, as far as it is installed."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if distribution.name in found:
            continue
        found[distribution.name] = distribution
        wanted = map(Requirement, distribution.requires or ())
        waiting += [
            item.name for item in wanted if not item.marker or item.marker.evaluate({"extra": ""})
        ]
    return list(found.values())


def run_bare(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` without what this Python was told to see."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "AIIDA_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        command,
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    print(make_node(Path(sys.argv[1]), *sys.argv[2:]))  # noqa: T201
