"""``aiida-eipnn dataset``: labels in through the gate, found, shown, traced and out again."""

import hashlib
import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aiida.common.exceptions import ClosedStorage, NotExistent
from aiida.orm import Dict, Node, QueryBuilder, SinglefileData, load_node
from click.testing import CliRunner

from aiida_eipnn.calculations.dft import with_fingerprint
from aiida_eipnn.cli import eip_rank
from aiida_eipnn.cli.commands import main
from aiida_eipnn.cli.dataset import typed
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.reports.dataset import Kind, find_dataset, find_datasets
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.io import read_labelled, write_labelled
from aiida_eipnn.science.labels import checksum, join_labels

SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
PAGE = Path(__file__).parent.parent.parent / "docs" / "howto" / "datasets.md"
PBE = ("--level", "functional=PBE", "--level", "ecutwfc=40")

# The synthetic loop belongs to the tests of the reports; under the name that pytest gives it there
# the loops that are made serve both.
SYNTHETIC = "tests.reports.conftest"
if SYNTHETIC not in sys.modules:
    path = Path(__file__).parent.parent / "reports" / "conftest.py"
    spec = importlib.util.spec_from_file_location(SYNTHETIC, path)
    sys.modules[SYNTHETIC] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[SYNTHETIC])
Maker = sys.modules[SYNTHETIC].Maker
CACHE = {}


@pytest.fixture
def call(aiida_profile_clean):
    """Return a function that runs ``aiida-eipnn dataset`` in an empty profile."""
    return run


def run(*arguments, expect=0):
    result = CliRunner().invoke(main, ["dataset", *map(str, arguments)])
    assert result.exit_code == expect, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def labelled(kim):
    """Silicon that Stillinger and Weber label in the place of DFT; the last atoms overlap."""
    from ase.build import bulk

    rng = np.random.default_rng(3)
    frames = []
    for number in range(13):
        atoms = bulk("Si")
        atoms.set_cell(atoms.cell * rng.uniform(0.95, 1.05), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        atoms.info["config_type"] = "bulk" if number % 3 else "strained"
        frames.append(atoms)
    frames[-1].positions[1] = frames[-1].positions[0] + [0.9, 0.0, 0.0]
    configurations = Configurations.from_atoms(frames)
    labels = label_with_eips(configurations.take(range(12)), [SW])
    # No EIP labels atoms that overlap.
    bad = replace(labels.take([0]), ids=configurations.ids[-1:])
    labels = join_labels([labels, bad])
    energy = labels.energy - 100.0 * labels.n_atoms[:, None]
    return configurations, replace(labels, sources=np.array(["dft"]), energy=energy)


@pytest.fixture
def write(labelled, tmp_path):
    """Return a function that writes some of the labels, changed as one wants, to a file."""

    def write(name="si.extxyz", rows=range(12), *, shift=0.0, turn=False, **changes):
        configurations, labels = (part.take(rows) for part in labelled)
        if turn:
            # The forces stay as they are: only geometries and energies count here.
            configurations = turned(configurations)
            labels = replace(labels, ids=configurations.ids)
        labels = replace(labels, energy=labels.energy + shift * labels.n_atoms[:, None])
        changes = {key: change(getattr(labels, key)) for key, change in changes.items()}
        write_labelled(tmp_path / name, configurations, [replace(labels, **changes)])
        return tmp_path / name

    return write


def turned(configurations):
    """Return the configurations, turned and moved."""
    frames = [configurations.atoms(row) for row in range(len(configurations))]
    for atoms in frames:
        atoms.rotate(37, (1, 2, 3), rotate_cell=True)
        atoms.translate([0.1, 0.2, 0.3])
    return Configurations.from_atoms(frames)


def new_loop(**settings):
    """Return the maker of a loop that has a pool and nothing else yet."""
    maker = Maker(n_iterations=1, state="waiting", **settings)
    maker.start()
    maker.explore()
    return maker


def ask(maker, batch, rows, **settings):
    """Let the loop ask DFT for some configurations of its pool."""
    uncertainty = (
        np.linspace(0.5, 0.4, len(rows)) if batch == "i001" else np.full(len(rows), np.nan)
    )
    maker.choices[batch] = maker.choice(rows, uncertainty, "diverse")
    maker.dft(batch, **settings)


@pytest.fixture
def loop(aiida_profile, aiida_localhost):
    """A loop with its DFT labels; made again only where another test emptied the database."""
    assert aiida_localhost.label == "localhost"
    try:
        load_node(CACHE["loop"].loop.uuid)
    except (KeyError, NotExistent, ClosedStorage):
        maker = CACHE["loop"] = new_loop()
        ask(maker, "test", [0])
        ask(maker, "initial", [1, 2], failing=True)
        ask(maker, "i001", [10, 11])
    return CACHE["loop"]


def bring(path, *options, level=PBE):
    """Import a file unchecked, and return the PK of the dataset."""
    shown = run("import", path, *level, "--no-gate", *options).stdout
    return int(re.match(r"dataset (\d+)", shown)[1])


def n_nodes():
    return QueryBuilder().append(Node).count()


def test_files_and_loops_are_listed_and_can_be_chosen_from(loop, write):
    pk = bring(write(), "--label", "mine")

    def listed(*options):
        lines = run("list", *options).stdout.splitlines()
        return [int(line.split()[0]) for line in lines if line[0].isdigit()]

    of_loop = [loop.labels[name].pk for name in ("test", "initial", "i001")]
    assert {*of_loop, pk} <= set(listed())
    assert pk in listed("--source", "file")
    assert not {*of_loop} & {*listed("--source", "file")}
    # Other tests leave loops behind.
    of_loops = listed("--source", "loop", "--element", "Si")
    assert [item for item in of_loops if item in of_loop] == of_loop
    assert pk not in of_loops
    assert {*of_loop} & {*listed("--iteration", "i001")} == {of_loop[-1]}
    assert pk in listed("--level", find_dataset(load_node(pk)).fingerprint[:6])
    assert not {*of_loop} & {*listed("--level", find_dataset(load_node(pk)).fingerprint[:6])}
    assert "no such dataset" in run("list", "--element", "Xe").stdout
    assert f"loop {loop.loop.pk} i001" in run("list").stdout


def test_a_label_of_a_loop_is_traced_to_pw_and_the_iteration(loop):
    labels = loop.labels["i001"]
    value = labels.value()
    shown = run("trace", labels.pk, value.ids[0]).stdout
    run_of_pw = load_node(str(value.origins[0]))
    assert f"PwCalculation {run_of_pw.pk} {run_of_pw.uuid}" in shown
    assert "code           pw@localhost 6.7MaX" in shown
    assert f"PwBaseWorkChain {run_of_pw.caller.pk}, DftLabelWorkChain" in shown
    assert f"asked by       iteration 1 of loop {loop.loop.pk}, uncertainty" in shown


def test_a_run_that_failed_is_traced_too(loop):
    labels = loop.labels["initial"]
    failure = labels.value().failures()[0]
    shown = run("trace", labels.pk, failure.id).stdout
    assert "energy         none" in shown
    assert f"reason         {failure.reason}" in shown
    assert "asked by       the first DFT points" in shown
    assert re.search(r"PwCalculation \d+", shown)


def test_an_import_goes_through_the_gate_and_says_what_it_found(call, write):
    shown = call("import", write(), *PBE, "--eips", SW, "--label", "silicon").stdout

    assert re.match(r"dataset \d+: 12 labels of Si from si.extxyz\n", shown)
    assert "passed; " in shown
    assert "no label refused" in shown
    assert "functional PBE" in shown
    assert "geometries in other datasets: none" in shown


def test_the_lineage_of_an_import_begins_at_the_file(call, write):
    call("import", write(), *PBE, "--eips", SW)

    (dataset,) = find_datasets()
    node = load_node(dataset.pk)
    reader = node.creator.inputs.labels.creator
    assert node.creator.process_label == "check_given_labels"
    assert node.creator.inputs.eip_labels.creator.inputs.eips.get_list() == [SW]
    assert reader.process_label == "read_dataset"
    assert isinstance(reader.inputs.file, SinglefileData)
    assert reader.inputs.level.get_dict() == {"functional": "PBE", "ecutwfc": 40}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"forces": np.negative}, "change the sign of all forces"),
        ({"forces": lambda forces: forces / 51.422}, "give eV/Å"),
    ],
)
def test_wrong_signs_and_units_stop_the_import_before_anything_is_stored(
    call, write, changes, found
):
    before = n_nodes()
    result = call("import", write(**changes), *PBE, "--eips", SW, expect=1)

    assert found in result.stderr
    assert "nothing was stored" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert n_nodes() == before


def test_a_single_bad_label_is_a_row_with_its_reason(call, write):
    shown = call("import", write(rows=range(13)), *PBE, "--eips", SW).stdout

    assert "12 labels of Si" in shown
    assert "rows without a label (1)" in shown
    assert "two atoms overlap" in shown
    assert find_datasets()[0].n_missing == 1


def test_show_gives_statistics_by_type_the_level_and_the_refused(call, write, tmp_path):
    call("import", write(rows=range(13)), *PBE, "--eips", SW)
    (dataset,) = find_datasets()
    shown = call("show", dataset.pk, "--plot", tmp_path / "si.png").stdout
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}

    labels = dataset.labels().labelled()
    energy = labels.energy[:, 0] / labels.n_atoms
    assert rows["all"][1:3] == ["12", "2"]
    assert rows["all"][3:6] == [f"{value:.3f}" for value in np.quantile(energy, (0, 0.5, 1))]
    assert rows["all"][7] == f"{np.linalg.norm(labels.forces[0], axis=1).max():.3f}"
    assert int(rows["bulk"][1]) + int(rows["strained"][1]) == 12
    assert "rows without a label (1)" in shown
    assert checksum(dataset.labels()) in shown
    assert (tmp_path / "si.png").read_bytes().startswith(b"\x89PNG")


def test_a_configuration_that_is_not_the_stored_one_is_an_error(call, write, monkeypatch, tmp_path):
    call("import", write(), *PBE, "--no-gate")
    (dataset,) = find_datasets()
    value = ConfigurationsData.value

    def moved(self):
        found = value(self)
        return replace(found, positions=found.positions + 1e-9)

    monkeypatch.setattr(ConfigurationsData, "value", moved)
    result = call("export", dataset.pk, "-o", tmp_path / "out.extxyz", expect=1)

    assert "is not the one that was stored" in result.stderr
    assert not (tmp_path / "out.extxyz").exists()


def test_rows_without_a_label_are_not_exported(call, write, tmp_path):
    call("import", write(rows=range(13)), *PBE, "--eips", SW)
    shown = call("export", find_datasets()[0].pk, "-o", tmp_path / "out.extxyz").stdout
    assert "because they have no label: 1\n" in shown
    assert len(read_labelled(tmp_path / "out.extxyz")[1]) == 12


def test_a_file_imported_again_is_named_and_not_stored(call, write):
    pk = bring(write(), "--label", "silicon")
    before = n_nodes()
    again = (write("copy.extxyz"), "--level", "ecutwfc=40.0", *PBE[:2])
    shown = call("import", *again, "--no-gate").stdout

    assert f"is dataset {pk} already" in shown
    assert "silicon" in shown
    assert "not asked" in shown
    assert n_nodes() == before
    # What was stored unchecked may be checked later.
    shown = call("import", *again).stdout
    assert "already" not in shown
    assert find_datasets()[-1].gate
    assert "already" in call("import", *again).stdout


def test_a_value_is_a_number_where_it_looks_like_one():
    values = {"40": 40, "4.5": 4.5, "1e-3": 1e-3, "TRUE": True, "4_4_4": "4_4_4", "nan": "nan"}
    assert {text: typed(text) for text in values} == values


def test_the_same_file_at_another_level_is_another_dataset_that_shares_geometries(call, write):
    pk = bring(write())
    shown = call("import", write(), "--level", "functional=LDA", "--no-gate").stdout
    assert f"12 in dataset {pk} (si.extxyz), another level of theory" in shown


def test_frames_that_repeat_an_earlier_one_are_counted(call, write):
    path = write()
    path.write_text(path.read_text() + write("one.extxyz", [0]).read_text())
    shown = call("import", path, *PBE, "--no-gate").stdout
    assert "12 labels of Si" in shown
    assert "because they repeat an earlier one: 1\n" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no level of theory: say how these labels were computed"),
        (("--level", "PBE"), "write KEY=VALUE"),
        (("--level", "xc=PBE", "--level", "xc=LDA"), "given twice, PBE and LDA"),
        ((*PBE, "--eips", SW, "--no-gate"), "exclude one another"),
        ((*PBE, "--eips", "nonsense"), "import the labels unchecked with --no-gate"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(call, write, options, message):
    before = n_nodes()
    result = call("import", write(), *options, expect=1)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert n_nodes() == before


def test_equal_levels_have_one_fingerprint_however_they_are_written():
    one = with_fingerprint({"ecutwfc": 40, "pseudos": {"Si": "a", "O": "b"}})
    other = with_fingerprint({"pseudos": {"O": "b", "Si": "a"}, "ecutwfc": 40.0})
    assert one["fingerprint"] == other["fingerprint"]
    assert one["fingerprint"] != with_fingerprint({"ecutwfc": 41})["fingerprint"]


def test_what_the_gate_of_a_loop_left_is_its_dataset(call, aiida_localhost):
    assert aiida_localhost.label == "localhost"
    maker = new_loop()
    ask(maker, "test", [0])
    raw = maker.labels["test"]
    check = maker.graph.process(
        maker.function, "refuse_dft_labels", caller=maker.loop, inputs={"labels": raw}
    )
    gate = {"verdict": "passed", "text": "no label refused"}
    left = LabelsData.from_value(raw.value(), level=raw.level, gate=gate)
    maker.graph.create(check, result=left)

    (dataset,) = find_datasets()
    assert (dataset.pk, dataset.source.kind) == (left.pk, Kind.LOOP)
    assert dataset.gate == "passed; no label refused"
    assert f"the dataset is {left.pk}" in run("show", raw.pk, expect=1).stderr


def test_a_dataset_without_any_label_is_shown_but_not_drawn(call, aiida_localhost, tmp_path):
    assert aiida_localhost.label == "localhost"
    maker = new_loop()
    ask(maker, "i001", [10], failing=True)
    pk = maker.labels["i001"].pk
    assert "labels       0 of 1 rows" in call("show", pk).stdout
    result = call("show", pk, "--plot", tmp_path / "x.png", expect=1)
    assert "not one row of this dataset has a label" in result.stderr


def test_geometries_in_two_datasets_are_shown_with_how_far_energies_differ(call, write):
    pk = bring(write("one.extxyz"))
    other = bring(write("two.extxyz", range(8, 12), shift=0.0005))
    shown = call("show", pk).stdout
    assert f"4 in dataset {other} (two.extxyz), the same level of theory" in shown
    assert "differ by up to 0.5 meV/atom" in shown


def test_an_export_read_again_has_the_same_checksum(call, write, tmp_path):
    pk = bring(write())
    shown = call("export", pk, "-o", tmp_path / "out.extxyz").stdout

    _, labels = read_labelled(tmp_path / "out.extxyz")
    digest = hashlib.sha256((tmp_path / "out.extxyz").read_bytes()).hexdigest()
    assert "12 labels are in" in shown
    assert checksum(labels) == checksum(load_node(pk).value())
    assert f"{checksum(labels)} (labels)" in shown
    assert f"sha256       {digest}" in shown


def test_one_geometry_of_two_datasets_is_exported_once(call, write, tmp_path):
    pks = [bring(write("a.extxyz", range(8))), bring(write("b.extxyz", range(6, 12)))]
    shown = call("export", *pks, "-o", tmp_path / "out.extxyz").stdout
    assert "12 labels are in" in shown
    assert "because an earlier dataset has the geometry: 2\n" in shown
    assert len(read_labelled(tmp_path / "out.extxyz")[1]) == 12


def test_a_turned_geometry_of_two_datasets_is_exported_once(call, write, tmp_path):
    pks = [bring(write("a.extxyz", range(8))), bring(write("b.extxyz", range(6, 12), turn=True))]
    shown = call("show", pks[1]).stdout
    assert f"2 in dataset {pks[0]} (a.extxyz), the same level of theory" in shown
    shown = call("export", *pks, "-o", tmp_path / "out.extxyz").stdout
    assert "12 labels are in" in shown
    assert "because an earlier dataset has the geometry: 2\n" in shown


def test_what_looks_the_same_and_is_labelled_otherwise_is_not_lost(call, write, tmp_path):
    changed = write("b.extxyz", range(6, 12), turn=True, forces=lambda forces: 1.1 * forces)
    pks = [bring(write("a.extxyz", range(8))), bring(changed)]
    shown = call("export", *pks, "-o", tmp_path / "out.extxyz").stdout
    assert "14 labels are in" in shown
    assert "2 in dataset" not in call("show", pks[1]).stdout


def test_a_dataset_that_cannot_be_read_does_not_hide_the_others(call, write, monkeypatch):
    pks = [bring(write(f"{n}.extxyz", range(n))) for n in (8, 12)]
    value = LabelsData.value

    def damaged(self):
        if self.pk == pks[0]:
            raise ValueError("its file is gone")
        return value(self)

    monkeypatch.setattr(LabelsData, "value", damaged)
    assert f"dataset {pks[0]} cannot be read: its file is gone" in call("show", pks[1]).stdout


def test_levels_of_theory_are_not_mixed(call, write, tmp_path):
    pks = [bring(write()), bring(write(), level=("--level", "functional=LDA"))]
    result = call("export", *pks, "-o", tmp_path / "out.extxyz", expect=1)
    assert "different levels of theory" in result.stderr
    assert "'functional': ('PBE', 'LDA')" in result.stderr
    assert not (tmp_path / "out.extxyz").exists()


def test_two_energies_of_one_geometry_are_not_exported(call, write, tmp_path):
    pks = [bring(write("a.extxyz")), bring(write("b.extxyz", shift=0.1))]
    result = call("export", *pks, "-o", tmp_path / "out.extxyz", expect=1)
    assert f"datasets {pks[0]} and {pks[1]} give 12 geometries energies" in result.stderr
    assert "0.1 eV/atom" in result.stderr


def test_a_label_from_a_file_is_traced_to_the_file(call, write):
    path = write()
    dataset = find_dataset(load_node(bring(path)))
    name = dataset.labels().ids[5]
    shown = call("trace", dataset.pk, name[:10]).stdout
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    assert f"configuration  {name} (" in shown
    assert f"si.extxyz md5 {md5} (SinglefileData {dataset.source.file_pk}" in shown


def test_a_label_that_a_loop_took_from_a_dataset_is_traced_to_the_file(
    call, aiida_localhost, write
):
    assert aiida_localhost.label == "localhost"
    pk = bring(write(), level=("--level", "functional=PBE"))
    stored = load_node(pk)
    maker = new_loop()
    taken = LabelsData.from_value(stored.value(), level=stored.level)
    configurations = load_node(find_dataset(stored).configurations_pk)
    chain = maker.graph.process(
        maker.work,
        "DftLabelWorkChain",
        caller=maker.loop,
        label="dft_i001",
        inputs={"stored": stored, "configurations": configurations},
    )
    look_up = maker.graph.process(
        maker.function, "look_up", caller=chain, inputs={"stored": stored}
    )
    maker.graph.create(look_up, labels=taken)
    maker.graph.give_back(chain, labels=taken)

    shown = run("trace", taken.pk, stored.value().ids[0]).stdout
    assert f"taken from     dataset {pk} si.extxyz" in shown
    assert "si.extxyz md5" in shown


def test_ids_that_fit_none_or_several_are_one_line(call, write):
    pk = bring(write())
    result = call("trace", pk, "xyz", expect=1)
    assert "has an id that begins with 'xyz'" in result.stderr
    result = call("trace", pk, "", expect=1)
    assert "12 ids of dataset" in result.stderr
    assert "give more digits" in result.stderr


@pytest.mark.parametrize("command", [("show",), ("trace",), ("export",)])
def test_what_is_no_dataset_is_one_line(call, command, tmp_path):
    rest = {"show": (), "trace": ("a",), "export": ("-o", tmp_path / "x.xyz")}[command[0]]
    pk = Dict({}).store().pk
    for given, message in ((pk, "is a Dict, not a dataset of DFT labels"), (99999, "no node")):
        result = call(*command, given, *rest, expect=1)
        assert message in result.stderr
        assert "dataset list" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_checksums_depend_on_what_labels_say_and_not_on_who_made_them(labelled):
    labels = labelled[1]
    other = replace(labels, origins=np.full(len(labels), "x" * 36), ids=labels.ids.astype("<U40"))
    assert checksum(other) == checksum(labels)
    for name in ("energy", "forces"):
        assert checksum(replace(labels, **{name: getattr(labels, name) + 1e-3})) != checksum(labels)
    assert checksum(labels.take(range(12))) != checksum(labels)


def blocks_of_page(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_command_of_the_page_runs(call, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eip_rank, "default_eips", lambda *_: [SW])
    write()
    lines = [line for block in blocks_of_page("bash") for line in block.splitlines()]
    # Those of loops are in tests/launch.
    commands = [line for line in lines if not line.startswith("verdi run workflows/")]
    assert (len(lines), len(commands)) == (9, 7)
    for command in commands:
        words = shlex.split(command)
        if found := find_datasets():
            known = {"PK": str(found[0].pk), "ID": found[0].labels().ids[0][:8]}
            words = [known.get(word, word) for word in words]
        assert words[:2] == ["aiida-eipnn", "dataset"]
        run(*words[2:])
    assert (tmp_path / "si.png").is_file()
    assert (tmp_path / "labels.extxyz").is_file()


def test_every_recipe_of_the_page_finds_what_it_says(call, aiida_localhost, write):
    assert aiida_localhost.label == "localhost"
    pk, _ = bring(write()), bring(write(), level=("--level", "functional=LDA"))
    source = find_dataset(load_node(pk))
    given = {
        "known__configurations": load_node(source.configurations_pk),
        "known__labels": load_node(pk),
    }
    maker = new_loop(extra=given)
    ask(maker, "i001", [10, 11], failing=True)

    by_level, of_iteration, of_dataset = (
        exec_recipe(text, pk) for text in blocks_of_page("python")
    )
    assert by_level == [["si.extxyz", pk, 12]]
    assert of_iteration == [[maker.loop.pk, maker.labels["i001"].pk, 1, 1]]
    assert of_dataset == [maker.loop.pk]


def exec_recipe(text, pk):
    names = {"PK": pk}
    exec(text, names)
    return names["found"]


@pytest.mark.parametrize("command", ["import", "list", "show", "export", "trace"])
def test_each_command_explains_itself_in_one_sentence_without_aiida(command):
    code = (
        "import sys\nsys.modules['aiida'] = None\n"
        f"from aiida_eipnn.cli import main\nmain(['dataset', '{command}', '--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[2].strip().endswith(".")
