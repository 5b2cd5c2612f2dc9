"""Where a committee comes from."""

import json

import pytest
from aiida.common.links import LinkType
from aiida.orm import CalcJobNode, Dict

from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.reports.lineage import trace, unexplained_inputs, without_latex
from aiida_eipnn.reports.points import PointState


def test_the_lineage_of_a_committee_names_every_dft_point_and_who_asked_for_it(make_loop):
    loop = make_loop()
    lineage = trace(loop.committee)
    assert lineage.iteration == "i002"
    assert lineage.loop_pk == loop.node.pk
    assert [point.batch for point in lineage.points] == ["initial"] * 4 + ["i001"] * 2
    assert [point.id for point in lineage.points[4:]] == loop.points["i001"]
    assert all(point.uncertainty > 0 for point in lineage.points[4:])
    assert all(point.uncertainty is None for point in lineage.points[:4])
    assert [point.id for point in lineage.test_points] == loop.points["test"]


def test_each_labelled_point_leads_to_its_calculation(make_loop):
    from aiida.orm import load_node

    loop = make_loop()
    lineage = trace(loop.committee)
    labels = loop.labels["initial"].value()
    for point in lineage.points[:3]:
        row = labels.rows_of([point.id])[0]
        assert point.pw_uuid == labels.origins[row]
        assert point.energy == pytest.approx(labels.energy[row, 0])
        assert load_node(point.base_uuid).process_label == "PwBaseWorkChain"
    assert lineage.points[3].state is PointState.FAILED


def test_a_loop_stands_for_its_last_committee(make_loop):
    loop = make_loop()
    assert trace(loop.node).committee_uuid == loop.committee.uuid
    waiting = make_loop("waiting", n_iterations=1)
    assert trace(waiting.node).iteration == "i001"


def test_the_stages_come_in_order_with_seeds_settings_and_versions(make_loop):
    lineage = trace(make_loop().node)
    assert [stage.stage for stage in lineage.stages] == ["pretrain", "classify", "finetune"]
    assert lineage.stages[-1].seeds == (11, 12)
    assert lineage.stages[-1].training == {"steps": 5, "n_heads": 8}
    assert lineage.versions == {
        "aiida-eipnn": "0.1.0",
        "torch": "2.13.0",
        "aiida-core": "2.9.4",
    }


def test_a_pretrained_committee_has_eips_but_no_dft_points(make_loop):
    lineage = trace(make_loop().pretrained)
    assert lineage.iteration == "pretrained"
    assert lineage.points == ()
    assert [stage.stage for stage in lineage.stages] == ["pretrain"]
    assert lineage.eips[0].doi == "10.1103/PhysRevB.31.5262"
    assert lineage.eips[1].citation == ""


def test_level_pseudopotential_and_codes_are_named(make_loop):
    lineage = trace(make_loop().node)
    assert lineage.level["ecutwfc"] == 20.0
    (pseudo,) = lineage.pseudos
    assert (pseudo.element, pseudo.filename) == ("Si", "Si.upf")
    assert {code.label: code.version for code in lineage.codes} == {
        "eipnn-job@localhost": "0.1.0",
        "pw@localhost": "pw.x 6.7MaX",
    }


def test_the_lineage_survives_json(make_loop):
    content = json.loads(json.dumps(trace(make_loop().node).to_dict()))
    assert content["points"][0]["state"] == "done"
    assert content["eips"][0]["kim_id"] == "MO_405512056662_005"


def test_a_loop_without_a_committee_says_where_to_look(make_loop):
    with pytest.raises(ValueError, match="has no committee yet: see how far it is"):
        trace(make_loop("created").node)


def test_a_committee_that_nothing_made_is_refused(make_loop, tmp_path):
    make_loop("created")
    (tmp_path / "config.json").write_text('{"seeds": [1]}')
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="was made by no calculation"):
        trace(CommitteeData.from_folder(tmp_path).store())


def test_everything_behind_the_committee_was_made_or_given(make_loop):
    loop = make_loop()
    assert unexplained_inputs(loop.committee, loop.node) == []


def test_an_input_that_nobody_made_or_gave_is_found(make_loop):
    loop = make_loop()
    stray = Dict({"stage": "finetune"}).store()
    training = CalcJobNode()
    training.base.links.add_incoming(stray, LinkType.INPUT_CALC, "training")
    training.base.links.add_incoming(loop.pretrained, LinkType.INPUT_CALC, "committee")
    training.store()
    committee = loop.pretrained.clone()
    committee.base.links.add_incoming(training, LinkType.CREATE, "committee")
    committee.store()
    assert [node.pk for node in unexplained_inputs(committee, loop.node)] == [stray.pk]


def test_citations_lose_the_marks_of_bibtex():
    text = r"Justo, Jo\~{a}o F. and M\"uller, A modified {S}tillinger potential 2539--2550"
    assert (
        without_latex(text)
        == "Justo, João F. and Müller, A modified Stillinger potential 2539–2550"
    )
