import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.io import (
    read_configurations,
    read_labelled,
    read_tagged,
    source_key,
    write_labelled,
)
from aiida_eipnn.science.labels import Labels


@pytest.fixture
def configurations():
    rng = np.random.default_rng(0)
    frames = []
    for scale in (0.97, 1.0, 1.04):
        atoms = bulk("SiC", "zincblende", a=4.36 * scale)
        atoms.positions += rng.normal(scale=0.05, size=(2, 3))
        frames.append(atoms)
    frames.append(Atoms("Si2", positions=[[0, 0, 0], [0, 0, 2.2]]))
    return Configurations.from_atoms(frames, ["bulk", "bulk", "bulk", "molecule"])


def random_labels(configurations, sources, missing=()):
    rng = np.random.default_rng(1)
    n, m = len(configurations), len(sources)
    status = np.zeros((n, m), dtype=np.int64)
    for row, source in missing:
        status[row, source] = 1
    return Labels(
        ids=configurations.ids,
        offsets=configurations.offsets,
        sources=np.array(sources),
        energy=rng.normal(size=(n, m)) * 100,
        forces=rng.normal(size=(m, len(configurations.numbers), 3)),
        stress=np.where(
            configurations.pbc.all(axis=1)[:, None, None], rng.normal(size=(n, m, 6)), np.nan
        ),
        status=status,
        reasons=np.array(["not run"]),
        origins=np.full(n, "", dtype="<U36"),
    )


def write_frames(path, frames):
    write(path, frames, format="extxyz")
    return path


def labelled_atoms(**results):
    atoms = bulk("Si")
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path, configurations):
    labels = random_labels(configurations, ["dft"])
    write_labelled(tmp_path / "set.extxyz", configurations, [labels])

    back, back_labels = read_labelled(tmp_path / "set.extxyz")

    for name, array in configurations.arrays().items():
        np.testing.assert_array_equal(back.arrays()[name], array, err_msg=name)
    for name in ("ids", "energy", "forces", "stress", "sources"):
        np.testing.assert_array_equal(getattr(back_labels, name), getattr(labels, name))


def test_one_file_holds_many_sources_and_leaves_out_what_is_missing(tmp_path, configurations):
    dft = random_labels(configurations, ["dft"])
    eips = random_labels(configurations, ["SW_Si__MO_1", "lennard-jones"], missing=[(0, 1)])
    write_labelled(tmp_path / "set.extxyz", configurations, [dft.take([1, 0]), eips])

    text = (tmp_path / "set.extxyz").read_text()

    assert text.count("dft_energy") == 2
    assert text.count("SW_Si__MO_1_energy") == 4
    assert text.count("lennard-jones_energy") == 3
    with pytest.raises(ValueError, match="frame 0: no energy under 'lennard-jones_energy'"):
        read_labelled(tmp_path / "set.extxyz", "lennard-jones_energy", "lennard-jones_forces", "no")


def test_results_of_a_calculator_are_labels_too(tmp_path):
    stress = np.array([1.0, 2, 3, 4, 5, 6]) / 100
    atoms = labelled_atoms(energy=-3.5, forces=np.ones((2, 3)), stress=stress)

    _, labels = read_labelled(write_frames(tmp_path / "set.extxyz", [atoms]))

    assert labels.energy[0, 0] == -3.5
    np.testing.assert_allclose(labels.stress[0, 0], stress)
    assert labels.sources.tolist() == ["dft"]


def test_keys_of_other_programs_can_be_named(tmp_path):
    atoms = bulk("Si")
    atoms.info.update(REF_energy=-3.0, REF_stress=np.diag([1.0, 2.0, 3.0]))
    atoms.arrays["REF_forces"] = np.zeros((2, 3))
    path = write_frames(tmp_path / "set.extxyz", [atoms])

    _, labels = read_labelled(path, "REF_energy", "REF_forces", "REF_stress", source="r2scan")

    assert labels.energy[0, 0] == -3.0
    assert labels.stress[0, 0].tolist() == [1, 2, 3, 0, 0, 0]
    assert labels.sources.tolist() == ["r2scan"]


def test_a_set_without_stress_has_no_stress(tmp_path):
    atoms = labelled_atoms(energy=-3.5, forces=np.ones((2, 3)))

    _, labels = read_labelled(write_frames(tmp_path / "set.extxyz", [atoms]))

    assert np.isnan(labels.stress).all()
    assert labels.ok.all()


def test_a_geometry_that_comes_twice_is_read_once(tmp_path):
    atoms = labelled_atoms(energy=-3.5, forces=np.ones((2, 3)))
    path = write_frames(tmp_path / "set.extxyz", [atoms, atoms])

    assert len(read_configurations(path)) == 1
    assert len(read_labelled(path)[0]) == 1


def test_one_geometry_with_two_energies_is_refused(tmp_path):
    frames = [labelled_atoms(energy=e, forces=np.ones((2, 3))) for e in (-3.5, -3.4)]

    with pytest.raises(ValueError, match=r"frame 1: this geometry came before .* drop one"):
        read_labelled(write_frames(tmp_path / "set.extxyz", frames))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*nowhere\.extxyz"):
        read_configurations(tmp_path / "nowhere.extxyz")


@pytest.mark.parametrize("name", ["empty.extxyz", "empty.xyz"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("")

    with pytest.raises(ValueError, match=name):
        read_configurations(tmp_path / name)


def test_a_file_that_is_no_structure_is_refused(tmp_path):
    (tmp_path / "notes.extxyz").write_text("dear diary,\ntoday I relaxed.\n")

    with pytest.raises(ValueError, match=r"cannot read .*give a file that ASE reads"):
        read_configurations(tmp_path / "notes.extxyz")


def test_a_file_that_ends_too_soon_is_refused(tmp_path, configurations):
    path = tmp_path / "cut.extxyz"
    write_labelled(path, configurations)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")

    with pytest.raises(ValueError, match="cannot read"):
        read_configurations(path)


def test_a_position_that_is_no_number_is_refused_with_its_frame(tmp_path):
    bad = bulk("Si")
    bad.positions[1, 2] = np.nan

    with pytest.raises(ValueError, match="frame 2: a position is not a finite number; repair"):
        read_configurations(write_frames(tmp_path / "s.extxyz", [bulk("Si"), bulk("C"), bad]))


def test_a_periodic_cell_without_volume_is_refused_with_its_frame(tmp_path):
    flat = Atoms("Si", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]], pbc=True)

    with pytest.raises(ValueError, match="frame 1: its periodic cell has no volume"):
        read_configurations(write_frames(tmp_path / "s.extxyz", [bulk("Si"), flat]))


def test_a_frame_without_labels_is_refused_with_its_number(tmp_path):
    frames = [labelled_atoms(energy=-3.5, forces=np.ones((2, 3))), bulk("C")]

    with pytest.raises(ValueError, match=r"frame 1: no energy under 'dft_energy'.*drop this frame"):
        read_labelled(write_frames(tmp_path / "s.extxyz", frames))


def test_a_label_that_is_no_number_is_refused(tmp_path):
    atoms = labelled_atoms(energy=float("nan"), forces=np.ones((2, 3)))

    with pytest.raises(ValueError, match=r"frame 0: the energy .* is not finite"):
        read_labelled(write_frames(tmp_path / "s.extxyz", [atoms]))


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("SW_Si__MO_1", "SW_Si__MO_1"),
        ("_own", "_own"),
        ("lennard-jones[sigma=2.1]", "lennard-jones_sigma_2.1"),
        ("python:module:callable", "python_module_callable"),
        ("stillinger-weber[hauch-1999,A=16]", "stillinger-weber_hauch-1999_A_16"),
        ("ase:ase.calculators.emt:EMT[cut=(1, 2)]", "ase_ase.calculators.emt_EMT_cut_1_2"),
        ("2body", "_2body"),
    ],
)
def test_any_source_has_a_key_under_which_its_labels_are_read_back(
    tmp_path, configurations, source, key
):
    labels = random_labels(configurations, [source])
    write_labelled(tmp_path / "s.extxyz", configurations, [labels])

    _, back = read_labelled(
        tmp_path / "s.extxyz", f"{key}_energy", f"{key}_forces", f"{key}_stress", source=source
    )

    assert source_key(source) == key
    for name in ("energy", "forces", "stress", "sources"):
        np.testing.assert_array_equal(getattr(back, name), getattr(labels, name))


def test_a_source_without_a_name_is_refused(tmp_path, configurations):
    with pytest.raises(ValueError, match="cannot be a key"):
        write_labelled(
            tmp_path / "s.extxyz", configurations, [random_labels(configurations, ["[]"])]
        )


def test_sources_with_the_same_key_are_refused(tmp_path, configurations):
    labels = random_labels(configurations, ["lj[sigma=2]", "lj(sigma=2)"])

    with pytest.raises(ValueError, match=r"occurs twice: \['lj_sigma_2'\]"):
        write_labelled(tmp_path / "s.extxyz", configurations, [labels])


def test_a_source_is_written_once(tmp_path, configurations):
    dft = random_labels(configurations, ["dft"])

    with pytest.raises(ValueError, match="occurs twice"):
        write_labelled(tmp_path / "s.extxyz", configurations, [dft, dft])


def test_tags_of_the_frames_come_with_the_labels(tmp_path):
    frames = [labelled_atoms(energy=-3.5, forces=np.ones((2, 3))) for _ in range(3)]
    for number, atoms in enumerate(frames):
        atoms.positions += number
        atoms.info["good"] = number > 0
        atoms.info["config_type"] = f"kind{number}"
    frames[1].info["split"] = "test"
    path = write_frames(tmp_path / "set.extxyz", frames)

    configurations, labels, tags = read_tagged(path, ["split", "good"])

    assert configurations.config_types.tolist() == ["kind0", "kind1", "kind2"]
    assert labels.energy[:, 0].tolist() == [-3.5] * 3
    assert tags["split"].tolist() == ["", "test", ""]
    assert tags["good"].tolist() == ["F", "T", "T"]


def test_a_tag_that_no_frame_has_is_refused(tmp_path):
    atoms = labelled_atoms(energy=-3.5, forces=np.ones((2, 3)))
    atoms.info["split"] = "train"

    with pytest.raises(ValueError, match=r"says 'part'; they say \['split'\]"):
        read_tagged(write_frames(tmp_path / "set.extxyz", [atoms]), ["part"])
