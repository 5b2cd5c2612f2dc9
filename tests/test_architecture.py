"""The floor plan: rooms, what each may import, entry points, one version."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import aiida_eipnn

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "aiida_eipnn"
ROOMS = {
    "cli", "reports", "workflows", "calculations", "parsers", "data", "jobs", "science",
}  # fmt: skip

# What the rooms of the compute node must do without, and the modules that exist for one of them.
BLOCKED = (
    "aiida",
    "aiida_quantumespresso",
    "aiida_pseudo",
    "click",
    "torch",
    "safetensors",
    "vesin",
    "kimpy",
    "numba",
    "matplotlib",
)
NEEDS_NUMBA = {"aiida_eipnn.science.eip.neighbours"}
NEEDS_KIM = {"aiida_eipnn.science.eip.catalogue", "aiida_eipnn.science.eip.kim"}
NEEDS_MACE = {"aiida_eipnn.science.nn.mace"}
NEEDS_TORCH = {"aiida_eipnn.jobs.train", "aiida_eipnn.jobs.evaluate"}


def modules_of(room):
    for path in sorted((PACKAGE / room).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run(*command, cwd=ROOT):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def import_without(blocked, modules):
    """Import ``modules`` in a fresh interpreter in which ``blocked`` cannot be imported."""
    code = (
        "import importlib, sys\n"
        f"for name in {tuple(blocked)!r}: sys.modules[name] = None\n"
        f"for name in {tuple(modules)!r}: importlib.import_module(name)\n"
    )
    return run(sys.executable, "-c", code)


def test_every_folder_of_the_package_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}

    assert folders == ROOMS


def test_no_room_is_a_box_for_odds_and_ends():
    names = {path.stem for path in PACKAGE.rglob("*.py")}

    assert not names & {"utils", "helpers", "common", "tools", "misc"}


def test_the_package_root_imports_nothing():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())

    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def node_modules():
    """Return the modules of the compute node that need neither torch nor kimpy."""
    return {
        name
        for room in ("science", "jobs")
        for name in modules_of(room)
        if name not in NEEDS_KIM | NEEDS_NUMBA | NEEDS_TORCH
        and not name.startswith("aiida_eipnn.science.nn")
    }


def test_science_and_jobs_import_on_a_bare_compute_node():
    imported = import_without(BLOCKED, sorted(node_modules()))

    assert imported.returncode == 0, imported.stderr


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("torch", NEEDS_TORCH),
        ("kimpy", NEEDS_KIM),
        ("numba", NEEDS_NUMBA),
    ],
)
def test_what_is_excused_from_a_rule_has_to_be(package, modules):
    check_that_all_need(package, modules)


def test_the_trunk_that_needs_mace_is_excused_for_it(torch):
    check_that_all_need("mace", NEEDS_MACE)


def check_that_all_need(package, modules):
    code = (
        f"import importlib, sys\nsys.modules[{package!r}] = None\n"
        f"for name in {sorted(modules)!r}:\n"
        "    try: importlib.import_module(name)\n"
        f"    except ModuleNotFoundError as error: assert error.name == {package!r}, error\n"
        "    else: sys.exit(name)\n"
    )

    imported = run(sys.executable, "-c", code)

    assert imported.returncode == 0, imported.stderr


def test_what_needs_torch_imports_without_aiida(torch):
    blocked = [*(name for name in BLOCKED if name != "torch"), "mace"]
    modules = {*modules_of("science/nn"), *NEEDS_TORCH} - NEEDS_MACE

    imported = import_without(blocked, sorted(modules))

    assert imported.returncode == 0, imported.stderr


def test_a_blocked_package_is_seen():
    imported = import_without(["numpy"], ["aiida_eipnn.science.arrays"])

    assert "numpy" in imported.stderr


def test_help_is_instant_because_it_imports_no_aiida():
    code = (
        "import sys; from aiida_eipnn.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'aiida', 'torch', 'numpy'} & set(sys.modules)\n"
    )

    shown = run(sys.executable, "-c", code)

    assert shown.returncode == 0, shown.stderr


def test_neither_the_daemon_nor_a_job_that_labels_loads_torch(torch):
    names = [name for room in ("workflows", "calculations", "parsers") for name in modules_of(room)]
    code = (
        "import importlib, sys\n"
        f"for name in {[*names, 'aiida_eipnn.jobs.label', 'aiida_eipnn.science.eip.kim']!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )

    imported = run(sys.executable, "-c", code)

    assert imported.returncode == 0, imported.stderr


@pytest.mark.parametrize(
    "entry_point",
    metadata.distribution("aiida-eipnn").entry_points,
    ids=lambda entry_point: f"{entry_point.group}:{entry_point.name}",
)
def test_entry_point_loads(entry_point):
    assert callable(entry_point.load())


def test_installed_entry_points_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        (group, name, target)
        for group, entries in project["entry-points"].items()
        for name, target in entries.items()
    } | {("console_scripts", name, target) for name, target in project["scripts"].items()}

    installed = {
        (entry_point.group, entry_point.name, entry_point.value)
        for entry_point in metadata.distribution("aiida-eipnn").entry_points
    }

    assert installed == declared, "pip install --editable . makes them anew"


def test_every_plugin_has_an_entry_point():
    declared = {
        entry_point.value
        for entry_point in metadata.distribution("aiida-eipnn").entry_points
        if entry_point.group.startswith("aiida.")
    }

    classes = {
        f"{name}:{node.name}": {base.id for base in node.bases if isinstance(base, ast.Name)}
        for room in ("calculations", "data", "parsers", "workflows")
        for name in modules_of(room)
        for node in ast.parse(path_of(name).read_text()).body
        if isinstance(node, ast.ClassDef)
        and re.search(r"(Calculation|Data|Parser|WorkChain)$", node.name)
    }
    # A class that others derive from is the base of a family, not a plugin.
    bases = set().union(*classes.values())

    assert {name for name in classes if name.split(":")[1] not in bases} <= declared


def path_of(module):
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize(
    ("module", "planted", "broken"),
    [
        ("science/arrays.py", "import aiida", "science and jobs know no AiiDA"),
        ("jobs/spec.py", "import aiida_eipnn.data", "rooms import one way"),
        ("workflows/__init__.py", "import torch", "torch only in science.nn"),
    ],
)
def test_import_contract_bites(tmp_path, module, planted, broken):
    shutil.copytree(PACKAGE, tmp_path / "aiida_eipnn")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "aiida_eipnn" / module).open("a") as file:
        file.write(f"\n{planted}\n")

    linted = run(Path(sys.executable).with_name("lint-imports"), "--no-cache", cwd=tmp_path)

    assert linted.returncode == 1
    assert f"{broken} BROKEN" in linted.stdout


def test_version_has_one_home():
    version = aiida_eipnn.__version__

    assert metadata.version("aiida-eipnn") == version
    elsewhere = [
        path.name
        for path in [ROOT / "pyproject.toml", ROOT / "CITATION.cff", *PACKAGE.rglob("*.py")]
        if path != PACKAGE / "__init__.py" and version in path.read_text()
    ]
    assert elsewhere == []


def test_index_of_the_docs_reaches_every_page():
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    linked = re.findall(r"\]\(([^)#]+\.md)\)", (ROOT / "docs" / "index.md").read_text())

    assert pages - {Path("index.md")} <= {Path(link) for link in linked}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/index.md"])
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text())

    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
