"""``aiida-eipnn dataset import`` of runs of pw.x: those of the profile, and output in folders."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from aiida.common.exceptions import ClosedStorage, NotExistent
from aiida.common.links import LinkType
from aiida.engine import run_get_node
from aiida.orm import (
    Bool,
    CalcJobNode,
    Dict,
    Float,
    Group,
    KpointsData,
    StructureData,
    load_group,
    load_node,
)
from aiida.plugins import CalculationFactory, WorkflowFactory
from aiida_quantumespresso.data.hubbard_structure import HubbardStructureData
from ase import Atoms
from ase.build import bulk
from click.testing import CliRunner

from aiida_eipnn.calculations import dft, pw_runs
from aiida_eipnn.cli import dataset_runs, eip_rank
from aiida_eipnn.cli.commands import main
from aiida_eipnn.reports.dataset import find_dataset, find_datasets

SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
PAGE = Path(__file__).parent.parent.parent / "docs" / "howto" / "pw-runs.md"
INPUT = """\
&CONTROL
 calculation = '{kind}', prefix = 'si', outdir = './out', pseudo_dir = '{folder}'
 tprnfor = .true., tstress = .true., nstep = 3, dt = 40
/
&SYSTEM
 ibrav = 0, nat = 2, ntyp = 1, ecutwfc = {cutoff}
 occupations = 'smearing', smearing = 'cold', degauss = 0.02
/
&ELECTRONS
 conv_thr = 1e-8, electron_maxstep = {steps}
/
&IONS
/
&CELL
/
ATOMIC_SPECIES
Si 28.08 {pseudo}
ATOMIC_POSITIONS angstrom
Si {positions[0]}
Si {positions[1]}
CELL_PARAMETERS angstrom
0 2.7 2.7
2.7 0 2.7
2.7 2.7 0
K_POINTS automatic
2 2 2 0 0 0
"""
START = ((0.0, 0.0, 0.0), (1.45, 1.30, 1.36))
CACHE = {}


def dataset(*arguments, expect=0):
    result = CliRunner().invoke(main, ["dataset", *map(str, arguments)])
    assert result.exit_code == expect, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def pks(shown):
    return [int(pk) for pk in re.findall(r"^dataset (\d+):", shown, re.MULTILINE)]


@pytest.fixture(scope="module")
def run_pw(tmp_path_factory):
    """Return a function that runs pw.x on two-atom silicon in a folder."""
    from tests.conftest import PSEUDOS, SI_PSEUDO, skip_without

    skip_without("qe")

    def run(folder, kind="scf", *, cutoff=12, steps=50, positions=START):
        folder.mkdir(parents=True)
        text = INPUT.format(
            kind=kind,
            cutoff=cutoff,
            steps=steps,
            folder=PSEUDOS,
            pseudo=SI_PSEUDO,
            positions=[" ".join(map(repr, map(float, row))) for row in positions],
        )
        (folder / "pw.in").write_text(text)
        with (folder / "pw.out").open("w") as output:
            subprocess.run(["pw.x", "-in", "pw.in"], cwd=folder, stdout=output, check=False)
        return folder

    return run


@pytest.fixture(scope="module")
def folder(run_pw, tmp_path_factory):
    """Runs of pw.x: a relaxation, one at another cutoff, one that failed, and a file cut short."""
    root = tmp_path_factory.mktemp("pw") / "runs"
    for kind in ("relax", "vc-relax", "md"):
        run_pw(root / kind, kind)
    run_pw(root / "deep" / "er", cutoff=14)
    run_pw(root / "failed", steps=2)
    whole = (root / "md" / "out" / "si.xml").read_text()
    (root / "cut.xml").write_text(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("not of pw.x")
    return root


@pytest.fixture
def calculations(pw_code, pseudo_family):
    """A group with a work chain of one run, molecular dynamics, and a run that failed."""
    from aiida.orm import load_group

    try:
        return load_group(CACHE["group"])
    except (KeyError, NotExistent, ClosedStorage):
        pass
    pseudos = load_group(pseudo_family).get_pseudos(elements=["Si"])
    cell = 2.7 * (np.ones((3, 3)) - np.eye(3))
    structure = StructureData(ase=Atoms("Si2", positions=START, cell=cell, pbc=True)).store()
    options = {"resources": {"num_machines": 1}, "withmpi": False}

    def inputs(kind, maxstep=50):
        parameters = {
            "CONTROL": {"calculation": kind, "tprnfor": True, "tstress": True, "nstep": 3},
            "SYSTEM": {"ecutwfc": 12.0, "occupations": "smearing", "degauss": 0.02},
            "ELECTRONS": {"conv_thr": 1e-8, "electron_maxstep": maxstep},
        }
        return {
            "code": pw_code,
            "structure": structure,
            "pseudos": pseudos,
            "parameters": Dict(parameters),
            "metadata": {"options": options},
        }

    mesh = KpointsData()
    mesh.set_kpoints_mesh([2, 2, 2])
    nodes = [
        run_get_node(CalculationFactory("quantumespresso.pw"), kpoints=mesh, **inputs(*given))[1]
        for given in (("md",), ("scf", 2))
    ]
    base = {
        "pw": inputs("scf"),
        "kpoints_distance": Float(0.9),
        "kpoints_force_parity": Bool(False),
    }
    nodes.append(run_get_node(WorkflowFactory("quantumespresso.pw.base"), **base)[1])
    group = Group(label=f"silicon-{nodes[0].pk}").store()
    group.add_nodes(nodes)
    CACHE["group"] = group.label
    return group


def test_a_folder_is_searched_and_each_level_of_theory_is_a_dataset(folder, aiida_profile_clean):
    shown = dataset("import", folder, "--no-gate").stdout

    assert shown.startswith("2 levels of theory, which are never mixed: a dataset for each")
    many, one = (find_dataset(load_node(pk)) for pk in pks(shown))
    # All three begin with one geometry.
    assert (many.n_labels, many.n_copies, one.n_labels) == (7, 2, 1)
    assert (many.level["ecutwfc"], one.level["ecutwfc"]) == (12, 14)
    assert many.level["functional"] == "PZ"
    assert many.level["pseudos"] == {"Si": "Si.pz-vbc.UPF"}
    assert sorted(set(many.configurations().config_types)) == ["md", "relax", "vc-relax"]
    reasons = many.unread
    assert (
        "electronic minimization did not converge"
        in reasons["failed/out/si.save/data-file-schema.xml"]
    )
    assert "not readable" in reasons["cut.xml"]
    assert "cut.xml: not readable" in shown
    assert "cut.xml: not readable" in dataset("show", many.pk).stdout


def test_the_label_of_a_step_is_that_of_its_geometry(folder, run_pw, tmp_path):
    """The structure that pw.x ends with is the one that it would have computed next."""
    for kind in ("relax", "md", "vc-relax"):
        (run,) = pw_runs.runs_of_folder(folder / kind)
        assert len(run.steps) == 3
    (run,) = pw_runs.runs_of_folder(folder / "md")
    step = run.steps[-1]

    here = run_pw(tmp_path / "again", positions=step.positions)

    (again,) = pw_runs.runs_of_folder(here)
    results = again.steps[0].calc.results
    assert step.calc.results["energy"] == pytest.approx(results["energy"], abs=1e-4)
    np.testing.assert_allclose(step.calc.results["forces"], results["forces"], atol=2e-3)
    # pw.x says the stress of this one: as ASE, negative where the cell would rather expand.
    tensor = (here / "pw.out").read_text().split("P=")[1].split()[0]
    pressure = -results["stress"][:3].mean() * 1602.1766
    assert pressure == pytest.approx(float(tensor), abs=0.02)


def test_a_charge_is_of_the_level_of_theory(folder, tmp_path):
    text = (folder / "deep" / "er" / "out" / "si.xml").read_text()
    charged = re.sub(r"(<tot_charge>)[^<]*", r"\g<1>1.0e0", text)
    assert charged != text
    (tmp_path / "si.xml").write_text(charged)

    (run,), (neutral,) = (
        pw_runs.runs_of_folder(where) for where in (tmp_path, folder / "deep" / "er")
    )
    assert run.level == neutral.level | {"tot_charge": 1.0}


def test_hubbard_parameters_are_of_the_level_of_theory(aiida_localhost, pseudo_family):
    # It has a checksum, and that is what counts here.
    pseudo = load_group(pseudo_family).get_pseudo("Si")

    def level_with(value, repeat=1):
        atoms = bulk("NiO", "rocksalt", a=4.18) * (repeat, 1, 1)
        structure = HubbardStructureData.from_structure(StructureData(ase=atoms))
        if value:
            structure.initialize_onsites_hubbard("Ni", "3d", value, "U", use_kinds=False)
        mesh = KpointsData()
        mesh.set_kpoints_mesh([2, 2, 2])
        node = CalcJobNode(computer=aiida_localhost)
        inputs = {"structure": structure, "kpoints": mesh, "parameters": Dict({"SYSTEM": {}})}
        for label, data in inputs.items():
            node.base.links.add_incoming(data.store(), LinkType.INPUT_CALC, label)
        node.base.links.add_incoming(pseudo, LinkType.INPUT_CALC, "pseudos__Ni")
        return pw_runs._level_of_calculation(node)

    assert level_with(5.0)["hubbard"] == [["Ni", "3d", "Ni", "3d", "U", 5.0]]
    assert level_with(5.0) == level_with(5.0, repeat=2) != level_with(4.0)
    assert "hubbard" not in level_with(0.0)


def test_standard_output_needs_a_level_and_counts_only_without_its_xml(
    folder, tmp_path, aiida_profile_clean
):
    shutil.copy(folder / "relax" / "pw.out", tmp_path / "si.log")
    result = dataset("import", tmp_path / "si.log", "--no-gate", expect=1)
    assert "say the level with --level" in result.stderr
    assert "nothing was stored" in result.stderr
    assert not find_datasets()

    shown = dataset("import", tmp_path / "si.log", "--no-gate", "--level", "ecutwfc=12").stdout
    (pk,) = pks(shown)
    assert find_dataset(load_node(pk)).n_labels == 3
    name = load_node(pk).value().ids[0]
    assert "si.log md5" in dataset("trace", pk, name).stdout
    assert (
        f"is dataset {pk} already"
        in dataset("import", tmp_path / "si.log", "--no-gate", "--level", "ecutwfc=12").stdout
    )
    # Beside its XML the same output is no run of its own.
    assert len(pw_runs.runs_of_folder(folder / "relax")) == 1


def test_an_empty_folder_is_one_line(tmp_path, aiida_profile):
    result = dataset("import", tmp_path, expect=1)
    assert "holds no output of pw.x" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_runs_of_a_group_are_rows_with_their_lineage(calculations, kim):
    shown = dataset("import", "-G", calculations.label, "--eips", SW).stdout

    md, failed, base = calculations.nodes
    labelled = {item.pk: item for item in map(find_dataset, map(load_node, pks(shown)))}
    assert sorted(item.n_labels for item in labelled.values()) == [1, 3]
    of_base = next(item for item in labelled.values() if item.n_labels == 1)
    of_md = next(item for item in labelled.values() if item.n_labels == 3)
    assert of_md.gate.endswith("no label refused")
    # The level of a work chain with a distance is the one that a loop with these inputs has.
    pw = base.inputs.pw
    level = dft.level_of_theory(
        pw.parameters,
        base.inputs.kpoints_distance,
        base.inputs.kpoints_force_parity,
        Si=pw.pseudos.Si,
    )
    assert of_base.fingerprint == level["fingerprint"]
    assert of_md.level["kpoints_mesh"] == [2, 2, 2]

    trajectory = md.outputs.output_trajectory
    labels = of_md.labels()
    np.testing.assert_allclose(labels.energy[:, 0], trajectory.get_array("energy"))
    reader = load_node(of_md.source.process_pk)
    assert trajectory.pk in {node.pk for node in reader.base.links.get_incoming().all_nodes()}
    traced = dataset("trace", of_md.pk, labels.ids[1]).stdout
    assert f"PwCalculation {md.pk} {md.uuid}" in traced
    assert "pw@localhost" in traced
    (run,) = (node for node in base.called if node.process_label == "PwCalculation")
    name = of_base.labels().ids[0]
    assert f"PwCalculation {run.pk} {run.uuid}" in dataset("trace", of_base.pk, name).stdout
    # The run that failed began where molecular dynamics did, which has the label.
    assert failed.exit_status == 410
    assert "already" in dataset("import", "-N", md.pk, "-N", failed.pk, "--eips", SW).stdout


def test_a_run_that_failed_is_a_row_with_the_reason(calculations):
    md, failed, _ = calculations.nodes
    run = pw_runs.run_of(failed)
    assert run.steps == ()
    assert run.reason.startswith("pw.x exit 410")
    elsewhere = run.start.copy()
    elsewhere.rattle(0.1)
    other = pw_runs.Run(name="x", start=elsewhere, reason=run.reason, level=run.level)
    _, labels, _, _ = pw_runs.table_of([pw_runs.run_of(md), other])
    (failure,) = labels.failures()
    assert failure.reason == run.reason
    result = dataset("import", "-N", failed.pk, expect=1)
    assert "not one of 1 runs" in result.stderr
    assert "pw.x exit 410" in result.stderr


def test_a_run_that_left_nothing_is_reported(aiida_profile):
    from aiida.orm import CalcJobNode

    node = CalcJobNode(process_type="aiida.calculations:quantumespresso.pw")
    node.base.attributes.set_many({"process_label": "PwCalculation", "process_state": "killed"})
    result = dataset("import", "-N", node.store().pk, expect=1)
    assert f"{node.pk}: pw.x was killed" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a file, a folder, or calculations"),
        (("-N", "987654"), "there is no node '987654'"),
        (("-G", "nobody"), "there is no group 'nobody'"),
    ],
)
def test_what_is_not_there_is_one_line(aiida_profile, arguments, message):
    result = dataset("import", *arguments, expect=1)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_node_without_a_run_of_pw_is_one_line(aiida_profile):
    pk = Dict({}).store().pk
    result = dataset("import", "-N", pk, expect=1)
    assert "is a Dict without a run of pw.x" in result.stderr


def silicon_run(mesh, scale=1.0, **level):
    """Return a run on silicon as a file tells it."""
    atoms = bulk("Si", a=5.43 * scale)
    atoms.calc = None
    step = pw_runs._labelled(atoms, -215.0 - scale, np.zeros((2, 3)), None)
    facts = {"code": "quantumespresso.pw", "ecutwfc": 30.0, **level}
    mesh = {"kpoints_mesh": mesh, "kpoints_offset": [0, 0, 0]}
    return pw_runs.Run(name=f"{scale}", steps=(step,), level={**facts, **mesh})


def test_meshes_that_differ_ask_for_the_distance_which_is_checked(aiida_profile):
    runs = [silicon_run([5, 5, 5]), silicon_run([4, 4, 4], 1.3)]
    with pytest.raises(ValueError, match="say how far apart k-points may be"):
        dataset_runs._refuse_meshes("runs", pw_runs.by_level(runs))

    fitting = [pw_runs.with_facts(run, {"kpoints_distance": 0.42}) for run in runs]
    assert len(pw_runs.by_level(fitting)) == 1
    assert pw_runs.level_of_runs(fitting)["kpoints_distance"] == 0.42
    wrong = pw_runs.with_facts(runs[0], {"kpoints_distance": 0.2})
    assert "its k-points are [5, 5, 5]" in wrong.reason
    assert wrong.steps == ()


def test_what_a_run_says_is_not_overruled():
    run = pw_runs.with_facts(silicon_run([2, 2, 2]), {"ecutwfc": 40})
    assert run.reason == "it says ecutwfc 30.0, and --level 40"
    same = pw_runs.with_facts(silicon_run([2, 2, 2]), {"ecutwfc": 30, "vdw": "none"})
    assert same.level["vdw"] == "none"


def test_pseudopotentials_must_agree_where_both_have_the_element():
    silicon = silicon_run([2, 2, 2], pseudos={"Si": "a"})
    both = silicon_run([2, 2, 2], 1.1, pseudos={"Si": "a", "C": "b"})
    other = silicon_run([2, 2, 2], 1.2, pseudos={"Si": "c"})
    groups = pw_runs.by_level([silicon, both, other])
    assert [len(group) for group in groups] == [2, 1]
    assert pw_runs.level_of_runs(groups[0])["pseudos"] == {"C": "b", "Si": "a"}


def test_a_geometry_with_two_energies_has_no_label():
    run = silicon_run([2, 2, 2])
    atoms = run.steps[0].copy()
    other = pw_runs._labelled(atoms, -215.0, np.zeros((2, 3)), None)
    another = silicon_run([2, 2, 2], 1.1)
    _, labels, _, _ = pw_runs.table_of(
        [run, pw_runs.Run(name="b", steps=(other,), level=run.level), another]
    )
    (failure,) = labels.failures()
    assert "runs 1.0 and b give this geometry energies" in failure.reason


def test_every_command_of_the_page_runs(calculations, folder, kim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eip_rank, "default_eips", lambda *_: [SW])
    shutil.copytree(folder, "runs")
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 7
    known = {"RUN": calculations.nodes[0].uuid, "silicon": calculations.label}
    for command in commands:
        words = [known.get(word, word) for word in shlex.split(command)]
        assert words[:2] == ["aiida-eipnn", "dataset"]
        shown = dataset(*words[2:]).stdout
        if found := pks(shown):
            known |= {"PK": str(found[0]), "ID": load_node(found[0]).value().ids[0][:8]}
