"""The report as one page."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from aiida.orm import Dict
from matplotlib.figure import Figure

from aiida_eipnn.reports import figures, report
from aiida_eipnn.reports.history import read_history
from aiida_eipnn.reports.report import (
    cards,
    duration,
    kinds_figure,
    milli,
    panel_figure,
    summary,
    write_report,
)
from aiida_eipnn.science.uncertainty import calibrate

# Elements that HTML and SVG close by themselves.
VOID = {"meta", "br", "path", "use", "link"}


class Page(HTMLParser):
    """Collects what a page shows and what it would fetch, and checks that its elements close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.fetched, self.ids, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        for key in ("src", "href", "xlink:href"):
            if key in given and tag != "a":
                self.fetched.append(given[key])

    def handle_startendtag(self, tag, attrs):
        if tag not in VOID:
            self.handle_starttag(tag, attrs)
            self.open.pop()
        else:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def shown(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


# A page takes seconds; what it shows of a loop that has ended does not change.
PAGES = {}


def text_of(node, path) -> str:
    if node.uuid not in PAGES:
        PAGES[node.uuid] = write_report(node, path / "report.html").read_text(encoding="utf-8")
    return PAGES[node.uuid]


def page_of(node, path) -> Page:
    page = Page(text_of(node, path))
    assert page.open == []
    return page


def test_the_report_of_a_finished_loop_shows_result_eips_failures_and_origin(make_loop, tmp_path):
    loop = make_loop()
    page = page_of(loop.node, tmp_path)
    shown = page.shown()
    assert "A potential for Si from 5 DFT labels" in shown
    assert "It stopped because iteration 2 of 2 is done." in shown
    assert "Stillinger and Weber, Phys. Rev. B 31" in shown
    assert "did not converge" in shown
    assert loop.committee.uuid in shown
    assert "ecutwfc 20.0 Ry" in shown
    assert "torch 2.13.0" in shown


def test_the_report_fetches_nothing_and_ids_of_its_figures_are_unique(make_loop, tmp_path):
    page = page_of(make_loop().node, tmp_path)
    outside = [
        item for item in page.fetched if not item.startswith(("#", "data:image/png;base64,"))
    ]
    assert outside == []
    assert len(page.ids) == len(set(page.ids)) > 50


def test_the_figures_of_the_same_loop_are_equal_byte_for_byte(make_loop, tmp_path):
    loop = make_loop()
    pages = [text_of(loop.node, tmp_path), write_report(loop.node, tmp_path / "b").read_text()]
    first, second = (re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) for page in pages)
    assert first == second
    assert len(first) == 7


def test_the_uncertainties_of_every_iteration_are_drawn(make_loop, tmp_path):
    history = read_history(make_loop().node)
    assert [len(item.of_forces.curves.expected) for item in history.assessed] == [19, 19]
    page = page_of(make_loop().node, tmp_path)
    shown = page.shown()
    for text in (
        "share of errors expected in the interval",
        "most uncertain left out, %",
        "calibrated uncertainty, rms, eV/Å",
        "errors within the interval, %",
        "gain by rejection",
        "ENCE",
    ):
        assert text in shown
    panel = history.assessed[0].of_forces.panel
    assert f"1 {panel.spearman:.2f} {panel.nll:.2f} {panel.miscalibration_area:.3f}" in shown


def test_curves_show_what_was_recorded(make_loop):
    assessed = read_history(make_loop().node).assessed
    curves = {f"iteration {item.number}": item.of_forces.curves for item in assessed}
    axes = Figure().subplots(1, 3)
    lines = figures.fading(curves)
    figures.calibration_curves(axes[0], lines)
    figures.rejection_curves(axes[1], lines)
    figures.spread_against_error(axes[2], lines)
    last = curves["iteration 2"]
    line = {item.get_label(): item for item in axes[0].lines}["iteration 2"]
    assert line.get_ydata()[1:-1].tolist() == list(last.observed)
    kept = {item.get_label(): item for item in axes[1].lines}
    assert kept["iteration 2"].get_ydata()[0] == kept["errors known"].get_ydata()[0] == 1.0
    assert (kept["errors known"].get_ydata() <= kept["iteration 2"].get_ydata() + 1e-4).all()
    points = {item.get_label(): item for item in axes[2].lines}["iteration 2"]
    assert points.get_ydata().tolist() == list(last.bin_error)


def test_a_loop_whose_uncertainties_nobody_judged_is_reported_too(make_loop, tmp_path, monkeypatch):
    node = make_loop().node
    history = read_history(node)
    bare = [replace(item, uncertainties={}) for item in history.iterations]
    monkeypatch.setattr(report, "read_history", lambda _: replace(history, iterations=bare))
    shown = Page(write_report(node, tmp_path / "bare.html").read_text(encoding="utf-8")).shown()
    assert "How good is it, and does it know?" in shown
    assert "Does it know its errors?" not in shown
    assert "ENCE" not in shown


def test_what_features_tell_is_drawn_and_in_the_table_where_it_is_known(make_loop, tmp_path):
    loop = make_loop(tells_of_atoms=True)
    history = read_history(loop.node)
    last = history.assessed[-1]
    assert last.uncertainties.keys() == {"forces_std", "energy_std", "strangeness"}
    for shown in (panel_figure(history), kinds_figure(last)):
        assert "strangeness" in shown
        assert "last layer" not in shown
    panel, shown = last.uncertainties["strangeness"].panel, page_of(loop.node, tmp_path).shown()
    assert f"those of labelled atoms {panel.spearman:.2f} {panel.nll:.2f}" in shown
    panel = last.uncertainties["energy_std"].panel
    assert f"Energy: spread of the members {panel.spearman:.2f} {panel.nll:.2f}" in shown


def test_without_it_only_energies_are_in_the_table(make_loop, tmp_path):
    loop = make_loop()
    history = read_history(loop.node)
    assert "strangeness" not in panel_figure(history)
    assert kinds_figure(history.assessed[-1]) == ""
    shown = page_of(loop.node, tmp_path).shown()
    assert "Energy: spread of the members" in shown
    assert "those of labelled atoms" not in shown


@pytest.mark.parametrize(
    ("state", "n_iterations", "says"),
    [
        ("created", 0, "The loop is running: waiting to start."),
        ("broken", 0, "The loop did not finish: failed (403): The loop broke"),
        ("waiting", 1, "The loop is running: labelling the points of iteration 1 with DFT."),
    ],
)
def test_a_loop_that_is_not_done_is_reported_as_far_as_it_came(
    make_loop, tmp_path, state, n_iterations, says
):
    loop = make_loop(state, n_iterations=n_iterations)
    assert says in page_of(loop.node, tmp_path).shown()


def test_the_summary_gives_the_numbers_of_the_last_assessment(make_loop):
    history = read_history(make_loop().node)
    last = history.assessed[-1]
    first, twin, eip, _ = summary(history)
    assert first.startswith("With 5 DFT labels the committee reaches")
    assert f"{milli(last.committee.forces_mae)}\u00a0meV/Å on 3 held-out" in first
    assert milli(last.scratch.energy_mae) in twin
    assert "SW StillingerWeber 1985 Si" in eip


def test_the_cards_count_points_of_training_test_and_failure(make_loop):
    found = {card.title: card for card in cards(read_history(make_loop().node))}
    assert (found["DFT points"].value, found["DFT points"].unit) == ("8", "of 9")
    assert found["DFT points"].note == "3 of them held out for the test, 1 failed"
    assert found["DFT time"].value == "4 min 0 s"
    assert found["EIP labels"].value == "48"


def test_what_is_no_loop_gets_no_report(make_loop, tmp_path):
    make_loop("created")
    with pytest.raises(ValueError, match="not a loop"):
        write_report(Dict({}).store(), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_numbers_are_written_for_people():
    assert [milli(value) for value in (0.001234, 0.1234, 1.5, np.nan)] == [
        "1.23",
        "123",
        "1500",
        "–",
    ]
    assert [duration(value) for value in (5, 65, 3700, 90000)] == [
        "5 s",
        "1 min 5 s",
        "1 h 1 min",
        "1 d 1 h",
    ]


def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_parity_has_equal_limits_and_the_errors_in_the_corner():
    reference = np.array([0.0, 1.0, 2.0])
    drawn = figures.parity(
        axes(), reference, reference + 0.01, label="energy", unit="meV", scale=1000.0
    )
    assert drawn.get_xlim() == drawn.get_ylim()
    assert drawn.texts[0].get_text() == "MAE 10 meV\nRMSE 10 meV"


def test_uncertainty_without_calibration_draws_no_line():
    values = np.array([0.1, 0.2, 0.0])
    assert figures.uncertainty_against_error(axes(), values, values, None).get_lines() == []
    found = calibrate(np.array([0.1, 0.2, 0.4]), np.array([0.1, 0.3, 0.2]))
    drawn = figures.uncertainty_against_error(
        axes(), np.array([0.1, 0.2, 0.4]), np.array([0.1, 0.3, 0.2]), found
    )
    assert "rank correlation 0.50" in drawn.texts[0].get_text()


def test_more_classes_than_colours_differ_by_hatch():
    classes = [f"eip {number}" for number in range(9)]
    drawn = figures.stacked_bars(axes(), {"rattled": dict.fromkeys(classes, 1)}, classes)
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in drawn.patches}
    assert len(looks) == 9
