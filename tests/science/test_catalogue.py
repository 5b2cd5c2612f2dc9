"""Which KIM models there are, which to use, and what is wrong with the others."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase.calculators.calculator import Calculator

from aiida_eipnn.science.eip.checked import (
    ELEMENTS,
    SHIPPED,
    CheckedModels,
    ElementResult,
    check_model,
    check_models,
    fault_of,
    read_checks,
    shipped_checks,
    write_checks,
)
from aiida_eipnn.science.eip.checks import CHECKS, crystals
from aiida_eipnn.science.eip.potential import describe_potential, open_potential

SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
SNAP = "SNAP_ZuoChenLi_2019_Si__MO_869330304805_000"
UNIVERSAL = "LJ_ElliottAkerson_2015_Universal__MO_959249795837_003"
WAGNER = "MEAM_LAMMPS_Wagner_2007_Cu__MO_313717476091_000"
WRONG_FORCES = "EAM_IMD_BrommerGaehler_2006B_AlNiCo__MO_128037485276_003"
# One potential in two files, for SiC and for SiGe.
TERSOFF = (
    "Tersoff_LAMMPS_Tersoff_1989_SiC__MO_171585019474_003",
    "Tersoff_LAMMPS_Tersoff_1989_SiGe__MO_350526375143_003",
)
DRIFTING = {
    ("MEAM_LAMMPS_PascuetFernandez_2015_Al__MO_315820974149_000", "Al"),
    ("MEAM_LAMMPS_PascuetFernandez_2015_AlU__MO_596300673917_000", "Al"),
    (WAGNER, "Cu"),
    ("MEAM_LAMMPS_Wagner_2007_Ni__MO_444394830472_000", "Ni"),
    ("MEAM_LAMMPS_Wagner_2007_SiC__MO_430846853065_000", "Si"),
}
PROTOCOL = (
    Path(__file__).parents[2] / "aiida_eipnn" / "workflows" / "protocols" / "active_learning.yaml"
)


@pytest.fixture(scope="module")
def installed(kim, tmp_path_factory):
    """All installed models, looked at once."""
    from aiida_eipnn.science.eip.catalogue import installed_models

    folder = tmp_path_factory.mktemp("cache")
    return installed_models(folder), folder


@pytest.fixture
def catalogue(installed, tmp_path, monkeypatch):
    """The function under test, with a cache folder of its own, which saves seconds each time."""
    shutil.copytree(installed[1], tmp_path / "cache" / "aiida-eipnn")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from aiida_eipnn.science.eip import catalogue

    return catalogue


def result_of(*numbers, **other):
    return ElementResult(energy=numbers, force=numbers, **other)


def checks_of(**results):
    return CheckedModels(made={}, results={(name, "Si"): row for name, row in results.items()})


def test_every_installed_model_can_be_opened(installed):
    models, _ = installed

    assert not [model.description.name for model in models if model.trouble]
    assert all(model.cutoff > 0 for model in models)


def test_what_models_say_is_kept_on_disk(installed, monkeypatch):
    from aiida_eipnn.science.eip import catalogue

    models, folder = installed
    monkeypatch.setattr(catalogue, "each_apart", None)

    assert catalogue.installed_models(folder) == models


def test_a_cache_that_is_broken_is_made_anew(installed, tmp_path):
    from aiida_eipnn.science.eip.catalogue import installed_models

    models, folder = installed
    (name,) = (path.name for path in folder.iterdir())
    (tmp_path / name).write_text("[{")

    assert installed_models(tmp_path) == models
    assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_a_cache_that_cannot_be_written_is_no_error(installed, tmp_path):
    from aiida_eipnn.science.eip.catalogue import installed_models

    file = tmp_path / "file"
    file.touch()

    assert installed_models(file / "cache") == installed[0]


def test_a_model_that_cannot_be_opened_is_listed_with_the_reason(kim, tmp_path, monkeypatch):
    from aiida_eipnn.science.eip import catalogue

    monkeypatch.setattr(catalogue, "installed_kim_models", lambda: (SW, "gone"))
    models = catalogue.installed_models(tmp_path)

    assert [model.trouble for model in models] == [
        "",
        "ValueError: the KIM model gone is not installed",
    ]
    assert str(catalogue.installed_models(tmp_path)) == str(models)


def test_the_cache_is_where_the_system_says(catalogue, monkeypatch, tmp_path):
    assert catalogue.cache_folder() == tmp_path / "cache" / "aiida-eipnn"

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert catalogue.cache_folder() == Path.home() / ".cache" / "aiida-eipnn"


def test_all_models_of_an_element_are_listed_and_what_is_left_out_has_its_reason(catalogue):
    left_out = {entry.name: entry.left_out for entry in catalogue.catalogue(["Si"])}

    assert left_out[SW] is None
    assert left_out[SNAP] == "made by machine learning"
    assert left_out[UNIVERSAL] == "one formula for 139 elements, fitted to none"
    assert left_out[TERSOFF[0]] is None
    assert left_out[TERSOFF[1]] == f"same numbers as {TERSOFF[0]}"


def test_a_model_with_a_fault_is_left_out_for_that_element_only(catalogue):
    for element, used in (("Ni", False), ("Al", True), ("Co", True)):
        assert (WRONG_FORCES in catalogue.usable_eips([element])) is used


def test_models_of_several_elements_know_all_of_them(catalogue):
    entries = catalogue.catalogue(["Al", "Ni"])

    assert entries
    assert all({"Al", "Ni"} <= set(entry.model.description.species) for entry in entries)
    # Of pairs of elements nothing was compared.
    assert not any(entry.same_as for entry in entries)


def test_a_model_of_an_unchecked_element_is_used_and_known_to_be_unchecked(catalogue):
    entries = [entry for entry in catalogue.catalogue(["Ge"]) if entry.left_out is None]

    assert entries
    assert all(entry.checked == () for entry in entries)


@pytest.mark.parametrize(
    ("elements", "message"), [([], "give at least one"), (["Si", "Xy"], "there is no element Xy")]
)
def test_elements_that_do_not_exist_are_refused(catalogue, elements, message):
    with pytest.raises(ValueError, match=message):
        catalogue.usable_eips(elements)


def test_the_protocol_uses_distinct_models_without_a_fault(catalogue):
    eips = yaml.safe_load(PROTOCOL.read_text())["default_inputs"]["eips"]

    for element, names in eips.items():
        entries = {entry.name: entry for entry in catalogue.catalogue([element])}
        for name in names:
            assert entries[name].fault is None, name
            assert not entries[name].model.description.machine_learned, name
            assert not set(entries[name].same_as) & set(names), name


def test_the_shipped_file_is_small_and_says_how_to_remake_it():
    made = shipped_checks().made

    assert SHIPPED.stat().st_size < 150_000
    assert made["made_by"].startswith("aiida-eipnn eip check --elements Si,Al,Cu,Ni,Mo,W,Fe,Ta")
    assert set(made) >= {"date", "kim_api", "openkim_models", "tolerances"}
    assert list(made["tolerances"]) == list(CHECKS) == made["residuals"]


def test_every_installed_model_was_checked_on_every_element_it_knows(installed):
    models, _ = installed
    expected = {
        (model.description.name, element)
        for model in models
        for element in set(ELEMENTS) & set(model.description.species)
    }

    assert expected == set(shipped_checks().results)


def test_what_passed_is_within_the_tolerances():
    passed = [row for row in shipped_checks().results.values() if not row.faults]

    assert len(passed) > 250
    for name, check in CHECKS.items():
        assert max(row.residuals[name] for row in passed) <= check.tolerance


def test_the_fault_of_a_model_names_the_element():
    assert fault_of(SW, ["Si"]) is None
    assert fault_of(WRONG_FORCES, ["Al"]) is None
    assert "Ni: forces are not minus the slope of the energy" in fault_of(
        WRONG_FORCES, ["Al", "Ni"]
    )
    assert fault_of("python:of:mine", ["Si"]) is None


def test_results_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "checks.json"
    checks = shipped_checks()

    write_checks(checks, path)

    assert read_checks(path) == checks
    assert path.read_bytes() == SHIPPED.read_bytes()


def test_a_check_of_today_finds_what_is_shipped(kim):
    for key in ((SW, "Si"), (WAGNER, "Cu"), (WRONG_FORCES, "Ni")):
        shipped, today = shipped_checks().results[key], check_model(key)

        assert set(today.faults) <= set(shipped.faults)
        np.testing.assert_allclose(today.energy, shipped.energy, atol=2e-8)
        np.testing.assert_allclose(today.force, shipped.force, atol=2e-6)
        assert bool(today.refresh_drift) == bool(shipped.refresh_drift)


def test_a_model_that_takes_too_long_has_that_as_its_fault(kim):
    checks = check_models([SW], ["Al", "Si"], seconds=1e-3)

    assert checks.fault_of(SW, ["Si"]) == "Si: not done within 0.001 s"
    assert list(checks.results) == [(SW, "Si")]


def test_equal_numbers_on_one_crystal_are_not_the_same_numbers():
    checks = checks_of(
        a=result_of(1.0, 2.0), b=result_of(1.0, 2.1), c=result_of(1.0, 2.000001), d=ElementResult()
    )

    assert checks.same_numbers("Si") == (("a", "c"),)


def test_tabulations_that_lie_along_a_line_are_one_group():
    checks = checks_of(**{name: result_of(place * 8e-6) for place, name in enumerate("abcde")})

    assert checks.same_numbers("Si") == (("a", "b", "c", "d", "e"),)


def test_what_is_faulty_replaces_no_other_model(catalogue):
    good, bad = TERSOFF[1], TERSOFF[0]
    results = dict(shipped_checks().results)
    row = results[bad, "Si"]
    results[bad, "Si"] = ElementResult(faults=("wrong",), energy=row.energy, force=row.force)

    entries = catalogue.catalogue(["Si"], checks=CheckedModels(made={}, results=results))
    left_out = {entry.name: entry.left_out for entry in entries}

    assert left_out[bad] == "Si: wrong"
    assert left_out[good] is None


def test_the_models_that_ases_calculator_spoils_are_known_and_used():
    drifting = {key for key, row in shipped_checks().results.items() if row.refresh_drift}

    assert drifting == DRIFTING
    assert not [key for key in drifting if shipped_checks().results[key].faults]


def test_ases_calculator_drifts_where_a_potential_of_ours_does_not(kim):
    """On one structure, asked six times: ``clear_then_refresh`` against none."""
    from ase.calculators.kim import KIM

    copper = crystals("Cu")["rattled"]
    fresh = open_potential(WAGNER).label(copper).energy / len(copper)

    potential = open_potential(WAGNER)
    ours = [potential.label(copper).energy / len(copper) for _ in range(6)]
    theirs = energies_of(KIM(WAGNER), copper, 6)

    np.testing.assert_allclose(ours, fresh, rtol=0, atol=1e-10)
    assert np.all(np.abs(theirs - fresh) > 1e-3)
    assert np.all(np.diff(theirs) > 1e-3)


def energies_of(calculator: Calculator, atoms, n: int):
    energies = []
    for _ in range(n):
        calculator.reset()
        energies.append(calculator.get_potential_energy(atoms) / len(atoms))
    return np.array(energies)


def test_machine_learned_models_are_never_used(catalogue):
    for element in ELEMENTS:
        for name in catalogue.usable_eips([element]):
            assert not describe_potential(name).machine_learned
