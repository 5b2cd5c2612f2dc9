"""The benchmark of AiiDA's overhead: what it makes of what it measured."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overhead

    yield overhead
    for name in ("overhead", "scale", "postgres"):
        sys.modules.pop(name, None)


def test_time_inside_runs_is_clipped_and_counted_once(overhead):
    runs = [
        {"start": 0.0, "end": 12.0},
        {"start": 14.0, "end": 16.0},
        {"start": 15.0, "end": 17.0},
        {"start": 19.0, "end": 40.0},
        {"start": 50.0, "end": 60.0},
    ]
    assert overhead.inside(runs, start=10.0, end=20.0) == pytest.approx(2.0 + 3.0 + 1.0)


def test_cpu_time_of_a_window_is_interpolated(overhead):
    samples = [overhead.Sample(float(time), {"worker": 0.5 * time}) for time in (0, 4, 8)]
    assert overhead.cpu_between(samples, 1.0, 7.0) == {"worker": pytest.approx(3.0)}


def test_costs_are_divided_by_the_points(overhead):
    row = overhead.per_point(
        4,
        (100.0, 120.0),
        [{"start": 101.0, "end": 103.0}, {"start": 102.0, "end": 106.0}],
        [overhead.Sample(100.0, {"worker": 3.0}), overhead.Sample(120.0, {"worker": 11.0})],
        overhead.State(nodes=10, database=1024, repository=0),
        overhead.State(nodes=70, database=9 * 1024, repository=4 * 1024),
    )
    assert row == {
        "wall_s_per_point": 5.0,
        "pw_runs": 2,
        "pw_s_per_run": 3.0,
        "outside_pw_s_per_point": 3.75,
        "worker_cpu_s_per_point": 2.0,
        "nodes_per_point": 15.0,
        "database_kb_per_point": 2.0,
        "repository_kb_per_point": 1.0,
        "profile_kb_per_point": 3.0,
    }


def test_rows_that_are_there_are_not_measured_again(overhead):
    cases = overhead.cases_of(("pw", "loop"), quick=True, with_postgres=True)
    row = {"part": "pw", "storage": "core.psql_dos", "workers": 2, "points": 6, "ratio": 9.0}
    left = overhead.missing(cases, [row])
    assert len(left) == len(cases) - 1
    assert overhead.Case("pw", "core.psql_dos", 2, 6) not in left
    assert overhead.rows_of(cases, [row, row | {"points": 7}]) == [row]


def test_without_postgresql_the_other_rows_are_left(overhead):
    cases = overhead.cases_of(("pw", "loop"), quick=False, with_postgres=False)
    assert {case.storage for case in cases} == {"core.sqlite_dos"}
    assert {case.part for case in cases} == {"pw", "loop"}


def test_tables_have_the_rows_of_their_part_in_order(overhead):
    row = dict.fromkeys(overhead.COLUMNS["loop"], 0) | {"part": "loop", "workers": 1}
    rows = [
        row | {"storage": storage, "points": points}
        for storage, points in (("core.psql_dos", 10), ("core.sqlite_dos", 100))
    ]
    rows.append(row | {"storage": "core.sqlite_dos", "points": 10})
    lines = overhead.table("loop", overhead.sort_rows(rows)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(overhead.COLUMNS["loop"].values())
    assert [(line[0], line[3]) for line in cells[2:]] == [
        ("core.sqlite_dos", "10"),
        ("core.sqlite_dos", "100"),
        ("core.psql_dos", "10"),
    ]
    assert overhead.table("pw", rows).count("\n") == 1
