"""The injection benchmark on a small set of its own: every arm, and going on where it was."""

import json
import sys

import numpy as np
import pytest


@pytest.fixture
def run(injection, tmp_path, monkeypatch, capsys):
    """Run the benchmark; return its results and what it printed."""

    def go(*options: str):
        output = tmp_path / "results.json"
        given = ["injection.py", "--datasets", "mvl_W", "--output", str(output), *options]
        monkeypatch.setattr(sys, "argv", given)
        assert injection.main() == 0
        return json.loads(output.read_text()), capsys.readouterr().out

    return go


def test_every_arm_gives_a_row_with_errors(injection, run):
    results, _ = run("--n", "6", "--seeds", "0")

    rows = {row["arm"]: row for row in results["rows"]}
    assert set(rows) == {*injection.ALONE, *injection.NETWORKS}
    for row in rows.values():
        assert row["energy_mae_mev"] > 0
        assert row["force_mae_mev"] > 0
        assert row["by_type"]["hot"]["n"] == 10
    assert all(rows[arm]["steps"] > 0 for arm in injection.NETWORKS)
    # Pre-training counts where its network is used.
    assert rows["paper_2"]["steps"] > rows["paper_1"]["steps"]
    for arm in ("ours_1", "ours_2", "ours_both", "worst_eip", "shuffled"):
        notes = rows[arm]["notes"]
        if not notes["eips_help"]:
            assert rows[arm]["force_mae_mev"] == rows["scratch"]["force_mae_mev"]


def test_a_run_goes_on_where_it_was_in_another_checkout_too(injection, run, tmp_path):
    first, _ = run("--arms", "constant", "eip_shift", "--n", "6", "12", "--seeds", "0")
    # The errors of single configurations stay behind in the other checkout.
    for path in (tmp_path / "errors").rglob("*.npz"):
        path.unlink()

    second, printed = run("--arms", "constant", "eip_shift", "--n", "6", "20", "--seeds", "0")

    assert "4 trainings, 2 of them done before" in printed
    assert len(second["rows"]) == 6
    assert [row for row in second["rows"] if row in first["rows"]] == first["rows"]


def test_points_saved_are_those_of_the_errors_that_were_kept(run):
    results, _ = run("--arms", "scratch", "eip_shift", "--n", "4", "8", "16", "--seeds", "0", "1")

    (saved, *_) = [entry for entry in results["saved"] if entry["n_scratch"] == 16]
    scratch = [row for row in results["rows"] if row["arm"] == "scratch" and row["n"] == 16]
    mean = np.mean([row["force_mae_mev"] for row in scratch])
    assert saved["target_force_mae_mev"] == pytest.approx(mean, rel=1e-3)
    assert saved["n_seeds"] == 2


def test_of_two_processes_that_make_the_same_folder_the_first_one_is_kept(injection, tmp_path):
    from injection_networks import whole_folder

    with whole_folder(tmp_path / "made") as late:
        late.mkdir()
        (late / "name").write_text("late")
        other = tmp_path / "made"
        other.mkdir()
        (other / "name").write_text("first")
        # Whoever finished first is read from then on: it must not go away, not even for a moment.
        opened = (other / "name").stat().st_ino

    assert (tmp_path / "made" / "name").read_text() == "first"
    assert (tmp_path / "made" / "name").stat().st_ino == opened
    assert not late.exists()
