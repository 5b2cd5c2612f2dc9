"""Which versions of which packages made a result."""

import platform
from collections.abc import Iterable
from importlib import metadata

from aiida_eipnn import __version__


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of this package, of Python and of those ``packages`` that are installed.

    That of this package is its own: it need not be installed to run.
    """
    versions = {"aiida-eipnn": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
