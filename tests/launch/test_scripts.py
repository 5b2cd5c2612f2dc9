"""Every launch script runs, in the order in which the README of workflows/ names them."""

import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from aiida.manage.caching import enable_caching
from aiida.orm import CalcJobNode, Int, Node, QueryBuilder, WorkChainNode
from click.testing import CliRunner

from aiida_eipnn.cli import dry_run, launch
from aiida_eipnn.cli.commands import main
from aiida_eipnn.cli.dry_run import describe_loop
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.reports.dft_cost import cost_rate
from aiida_eipnn.science.dft_cost import cost_units
from aiida_eipnn.science.eip.engine import label_with_eips
from aiida_eipnn.science.io import write_labelled
from aiida_eipnn.workflows.active_learning import ActiveLearningWorkChain
from aiida_eipnn.workflows.builder import Codes, Start

SCRIPTS = Path(__file__).parents[2] / "workflows"
SW = "SW_StillingerWeber_1985_Si__MO_405512056662_005"
EDIP = "EDIP_JustoBazantKaxiras_1998_Si__MO_958932894036_002"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script with arguments and return what it printed."""

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def files(tmp_path, rattled_silicon, pseudo_family):
    """A pool as extended XYZ, and overrides that make each script a matter of seconds."""
    overrides = {
        "n_members": 2,
        "label": {"n_workers": 1},
        "train": {"n_workers": 1},
        "dft": {
            "scaling": {"conv_thr_per_atom": 1e-7},
            "pw_base": {"kpoints_distance": 0.9, "pseudo_family": pseudo_family},
        },
        "network": {"n_radial": 4, "l_max": 2, "width": 8, "depth": 1},
        "explore": {"recipes": [{"config_type": "rattled", "count": 6}]},
        **{name: {"steps": 12} for name in ("pretrain", "classify", "finetune")},
        # Loops with a twin are in tests/workflows.
        "train_scratch": False,
        "split": {"test": 2, "initial": 2},
        "acquisition": {"n_select": 1},
        "stop": {"max_iterations": 2},
    }
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    write_labelled(tmp_path / "pool.xyz", rattled_silicon(10))
    return tmp_path


@pytest.fixture
def one_iteration(files):
    """The same overrides for a loop that stops after one iteration."""
    overrides = yaml.safe_load((files / "overrides.yaml").read_text())
    path = files / "one_iteration.yaml"
    path.write_text(yaml.safe_dump(overrides | {"stop": {"max_iterations": 1}}))
    return path


def newest(kind):
    query = QueryBuilder().append(kind, project="*").order_by({kind: {"id": "desc"}})
    return query.first(flat=True)


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_each_script_says_what_it_is_for(run, script, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--help")
    assert stop.value.code == 0
    assert "verdi run workflows/" in capsys.readouterr().out


def test_the_steps_one_after_another(kim, torch, job_code, pw_code, files, run):
    minutes = {"max_wallclock_seconds": 900, "dft": {"max_wallclock_seconds": 800}}
    (files / "options.yaml").write_text(yaml.safe_dump(minutes))
    common = ["--overrides", files / "overrides.yaml", "--options", files / "options.yaml"]
    job = ["--job-code", job_code.full_label]
    eips = ["--eip", SW, "--eip", EDIP]
    printed = run("01_label_with_eips.py", "--pool", files / "pool.xyz", *eips, *job, *common)
    assert "20 labels" in printed
    eip_labels, pool = newest(LabelsData), newest(ConfigurationsData)

    pw = ["--pw-code", pw_code.full_label]
    printed = run("02_label_with_dft.py", "--pool", pool.pk, "--n", 3, *pw, *common)
    assert "DFT labels" in printed
    labels = newest(LabelsData)
    assert labels.base.attributes.get("n_labels") == 3

    run("03_pretrain_committee.py", "--pool", pool.pk, "--eip-labels", eip_labels.pk, *job, *common)
    pretrained = newest(CommitteeData)
    assert pretrained.base.attributes.get("stage") == "pretrain"

    data = ["--pool", pool.pk, "--labels", labels.pk]
    run("04_finetune_committee.py", *data, "--committee", pretrained.pk, *job, *common)
    assert newest(CommitteeData).base.attributes.get("stage") == "finetune"
    # Each stage is told what is for it.
    jobs = QueryBuilder().append(CalcJobNode).order_by({CalcJobNode: {"id": "desc"}}).limit(6)
    assert [job.get_option("max_wallclock_seconds") for job in jobs.all(flat=True)] == [
        *(900, 900),
        *(800, 800, 800),
        900,
    ]


def test_the_whole_loop_and_its_report(kim, torch, job_code, pw_code, files, one_iteration, run):
    printed = run(
        "active_learning.py",
        *("--pool", files / "pool.xyz", "--eip", SW, "--eip", EDIP),
        *("--overrides", one_iteration, "--report", files / "first.html"),
        *("--job-code", job_code.full_label, "--pw-code", pw_code.full_label),
    )
    assert "finished" in printed
    assert (files / "first.html").stat().st_size > 10_000
    loop = next(
        node
        for node in QueryBuilder()
        .append(WorkChainNode, project="*")
        .order_by({WorkChainNode: {"id": "desc"}})
        .all(flat=True)
        if node.process_label == "ActiveLearningWorkChain"
    )
    run("05_report.py", loop.pk, "--output", files / "second.html")
    assert (files / "second.html").stat().st_size > 10_000

    builder = loop.get_builder_restart()
    assert launch.finished_before(builder) is None  # caching is off
    with enable_caching():
        assert launch.finished_before(builder).pk == loop.pk
        printed = run(
            "active_learning.py",
            *("--pool", files / "pool.xyz", "--eip", SW, "--eip", EDIP),
            *("--overrides", one_iteration, "--report", files / "third.html"),
            *("--job-code", job_code.full_label, "--pw-code", pw_code.full_label),
        )
        assert f"loop {loop.pk} finished with these inputs: nothing to do" in printed
        assert (files / "third.html").stat().st_size > 10_000
        builder.seed = Int(builder.seed.value + 1)
        assert launch.finished_before(builder) is None


def test_a_dry_run_says_what_would_be_done_and_stores_nothing(
    kim, job_code, pw_code, pseudo_family, files, run, capsys
):
    (files / "options.yaml").write_text("account: me\ntrain: {queue_name: gpu}\n")
    before = QueryBuilder().append(Node).count()
    with pytest.raises(SystemExit) as stop:
        run(
            "active_learning.py",
            *("--pool", files / "pool.xyz", "--eip", SW, "--eip", EDIP, "--dry-run"),
            *("--overrides", files / "overrides.yaml"),
            *("--job-code", job_code.full_label, "--pw-code", "nobody@nowhere"),
            *("--code", f"dft={pw_code.full_label}", "--options", files / "options.yaml"),
        )
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "train.job.metadata.options.queue_name: gpu" in printed
    assert "label.job.metadata.options.queue_name" not in printed
    assert "label.job.metadata.options.account: me" in printed
    assert QueryBuilder().append(Node).count() == before


def test_a_loop_may_start_from_a_dataset(
    kim, job_code, pw_code, files, run, rattled_silicon, monkeypatch, capsys
):
    pool = rattled_silicon(10)
    labels = replace(label_with_eips(pool, [SW]), sources=np.array(["dft"]))
    write_labelled(files / "labelled.xyz", pool, [labels])
    monkeypatch.chdir(files)
    imported = CliRunner().invoke(
        main, ["dataset", "import", "labelled.xyz", "--level", "functional=PBE", "--no-gate"]
    )
    pk = re.match(r"dataset (\d+):", imported.output)[1]
    page = (SCRIPTS.parent / "docs" / "howto" / "datasets.md").read_text()
    known, stored = re.findall(r"verdi run workflows/active_learning.py (--.*)", page)
    common = ["--eip", SW, "--overrides", "overrides.yaml", "--job-code", job_code.full_label]
    common += ["--pw-code", pw_code.full_label, "--dry-run"]

    def dry_run(*words):
        with pytest.raises(SystemExit) as stop:
            run("active_learning.py", *[pk if word == "PK" else word for word in words], *common)
        return str(stop.value.code) + capsys.readouterr().out

    assert "of different levels of theory" in dry_run(*known.split())
    shown = dry_run(*stored.split(), "--known", pk)
    assert "pool: 10 configurations of Si" in shown
    assert "declares no level" not in shown
    shown = dry_run("--pool", "pool.xyz", "--known", "labelled.xyz")
    assert "labelled.xyz declares no level of theory" in shown
    assert "there is no node '123456789'" in dry_run("--stored", "123456789")


@pytest.fixture
def described(job_code, pw_code, files):
    """Return what a dry run says of a loop with these overrides."""

    def call(**changes):
        overrides = yaml.safe_load((files / "overrides.yaml").read_text()) | changes
        builder = ActiveLearningWorkChain.get_builder_from_protocol(
            Codes(job=job_code, pw=pw_code),
            Start(pool=launch.configurations_of(files / "pool.xyz"), eips=[SW, EDIP]),
            protocol="demo",
            overrides=overrides,
        )
        return describe_loop(builder)

    return call


def test_a_dry_run_counts_dft_points(described):
    text = described()
    assert "pool: 10 configurations of Si" in text
    assert SW in text
    # Two to test on, two to begin with, one in the second iteration.
    assert "DFT points: 5 at most" in text
    assert "train.job.network: {" in text
    assert text.endswith("nothing was stored, nothing runs")
    long = {"stop": {"max_iterations": 50, "dft_budget": 6}, "acquisition": {"n_select": 4}}
    # No batch asks for more than the budget leaves.
    assert "DFT points: 6 at most" in described(**long)


def test_a_dry_run_estimates_the_cost_by_the_runs_of_the_profile(
    described, pw_code, files, run, monkeypatch, capsys
):
    monkeypatch.setattr(dry_run, "cost_rate", lambda _: None)
    assert "unknown, for no run of pw.x on Si has finished" in described()
    monkeypatch.undo()

    common = ["--overrides", files / "overrides.yaml"]
    pool = launch.configurations_of(files / "pool.xyz").store()
    run(
        "02_label_with_dft.py",
        "--pool",
        pool.pk,
        "--n",
        3,
        "--pw-code",
        pw_code.full_label,
        *common,
    )
    rate = cost_rate(["Si"])
    assert rate.n_runs >= 3
    assert 0 < rate.low <= rate.median <= rate.high
    assert cost_rate(["Ge"]) is None
    assert cost_rate(["Ge", "Si"]) is None
    text = described()
    assert f"as {rate.n_runs} runs on Si in this profile took" in text
    n_nodes = QueryBuilder().append(Node).count()
    with pytest.raises(SystemExit) as stop:
        run(
            "02_label_with_dft.py",
            *("--pool", files / "pool.xyz", "--n", 4, "--dry-run"),
            *("--pw-code", pw_code.full_label, *common),
        )
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "DFT points: 4, 2 at a time" in printed
    assert f"as {rate.n_runs} runs on Si in this profile took" in printed
    assert "pw_base.kpoints_distance: 0.9" in printed
    hours = float(re.search(r"about (\S+) core hours", printed).group(1))
    assert hours == pytest.approx(4 * rate.median * 4 * 40 / 3600, rel=0.2)
    assert QueryBuilder().append(Node).count() == n_nodes
    # Two-atom cells of about 40 Å³ each: five points take what five runs took.
    hours = float(re.search(r"about (\S+) core hours", text).group(1))
    assert hours == pytest.approx(5 * rate.median * 4 * 40 / 3600, rel=0.2)
    assert "budget" not in text
    # As much as forty of them take, then as little as one: four are paid for in any case.
    known = pool.value()
    each = rate.median * cost_units(known.n_atoms, known.cells).mean() / 3600
    long = {"stop": {"max_iterations": 50, "core_hours_budget": 40.5 * each}}
    assert "enough for about 40 of these points" in described(**long)
    long["stop"]["core_hours_budget"] = hours / 5
    assert "enough for about 4 of these points" in described(**long)


def test_a_dry_run_refuses_what_a_run_would(described):
    with pytest.raises(ValueError, match="pool"):
        described(split={"test": 20, "initial": 2})


def test_a_loop_on_the_labels_of_a_file_needs_no_pw(
    kim, torch, job_code, files, one_iteration, run, rattled_silicon
):
    pool = rattled_silicon(10)
    stored = replace(label_with_eips(pool, [SW]), sources=np.array(["dft"]))
    write_labelled(files / "labelled.xyz", pool, [stored])
    printed = run(
        "active_learning.py",
        *("--stored", files / "labelled.xyz", "--eip", SW, "--eip", EDIP),
        *("--overrides", one_iteration, "--report", files / "report.html"),
        *("--job-code", job_code.full_label),
    )
    assert "finished" in printed
    assert (files / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pw-code", "nobody@nowhere"], "no code 'nobody@nowhere'"),
        (["--protocol", "heroic"], "heroic"),
        (["--pool", "missing.xyz"], "missing.xyz"),
        (["--overrides", "missing.yaml"], "cannot read the overrides"),
        (["--options", "missing.yaml"], "cannot read the options"),
        (["--code", "gpu"], "--code takes STAGE=CODE"),
        (["--code", "train=nobody@nowhere"], "no code 'nobody@nowhere'"),
    ],
)
def test_a_wrong_option_is_one_clear_line(run, job_code, pw_code, pseudo_family, arguments, words):
    codes = ["--job-code", job_code.full_label, "--pw-code", pw_code.full_label]
    with pytest.raises(SystemExit, match=words):
        run("active_learning.py", *codes, *arguments)


def test_submit_without_a_daemon_says_how_to_start_one(run, job_code, pw_code, files):
    codes = ["--job-code", job_code.full_label, "--pw-code", pw_code.full_label]
    with pytest.raises(SystemExit, match=r"verdi daemon start"):
        run(
            "active_learning.py",
            *codes,
            *("--pool", files / "pool.xyz", "--overrides", files / "overrides.yaml", "--submit"),
        )
