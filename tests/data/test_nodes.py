"""Nodes: equal content is equal, survives the archive, and says what it holds."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from aiida.common.exceptions import ValidationError
from aiida.orm import QueryBuilder, load_node
from aiida.tools.archive import create_archive, import_archive

from aiida_eipnn.data.choice import Choice, ChoiceData
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.science.labels import DFT, Labels, checksum


@pytest.fixture
def configurations(rattled_silicon):
    return rattled_silicon(5)


def test_equal_sets_have_equal_hashes_and_different_ones_do_not(configurations, rattled_silicon):
    first = ConfigurationsData.from_value(configurations).store()
    again = ConfigurationsData.from_value(configurations).store()
    other = ConfigurationsData.from_value(rattled_silicon(5, seed=1)).store()
    assert first.base.caching.get_hash() == again.base.caching.get_hash()
    assert first.base.caching.get_hash() != other.base.caching.get_hash()


def test_the_value_comes_back_exactly(configurations):
    node = ConfigurationsData.from_value(configurations).store()
    value = load_node(node.pk).value()
    assert value.ids.tolist() == configurations.ids.tolist()
    assert (value.positions == configurations.positions).all()
    assert len(node) == 5


def test_elements_can_be_queried_where_the_database_cannot_search_lists(configurations):
    node = ConfigurationsData.from_value(configurations).store()
    query = QueryBuilder().append(
        ConfigurationsData, filters={"attributes.has_Si": True, "id": node.pk}, project="id"
    )
    assert query.all(flat=True) == [node.pk]
    assert node.base.attributes.get("config_types") == {"rattled": 3, "strained": 2}


def test_a_clone_of_the_cache_holds_the_same_arrays(configurations):
    node = ConfigurationsData.from_value(configurations).store()
    clone = node.clone().store()
    assert (clone.value().positions == configurations.positions).all()


def dft_labels(configurations):
    labels = Labels.missing(configurations, [DFT], "not run")
    return replace(
        labels,
        energy=np.ones_like(labels.energy),
        forces=np.ones_like(labels.forces),
        status=np.zeros_like(labels.status),
    )


def test_dft_labels_carry_the_checksum_that_they_are_held_against(configurations):
    labels = dft_labels(configurations)
    node = LabelsData.from_value(labels, level={}).store()
    query = QueryBuilder().append(
        LabelsData, filters={"attributes.checksum": checksum(labels)}, project="id"
    )
    assert node.pk in query.all(flat=True)
    assert load_node(node.pk).checksum == node.checksum == checksum(labels)

    damaged = LabelsData.from_value(labels, level={})
    forces = labels.forces.copy()
    forces[0, 0, 0] = 2.0
    np.save(file := BytesIO(), forces)
    file.seek(0)
    # As a disk does it: the attributes know nothing of it.
    damaged.base.repository.put_object_from_filelike(file, "forces.npy")
    damaged.store()
    with pytest.raises(ValueError, match=r"not those that were stored.*verdi storage backup"):
        load_node(damaged.pk).value()


def test_labels_of_eips_carry_none_and_can_be_compared_all_the_same(configurations):
    labels = Labels.missing(configurations, ["a", "b"], "no model")
    node = LabelsData.from_value(labels, level={})
    assert node.base.attributes.get("checksum", None) is None
    assert node.checksum == checksum(labels)


def test_labels_survive_an_archive(aiida_profile_clean, configurations, tmp_path):
    labels = Labels.missing(configurations, ["a", "b"], "no model")
    node = LabelsData.from_value(labels, level={"ecutwfc": 28.0}).store()
    uuid = node.uuid
    create_archive([node], filename=tmp_path / "labels.aiida")
    aiida_profile_clean.reset_storage()
    import_archive(tmp_path / "labels.aiida")
    back = load_node(uuid)
    assert back.level == {"ecutwfc": 28.0}
    assert back.value().failures()[0].reason == "no model"
    assert back.base.attributes.get("n_failures") == 10


def test_arrays_that_do_not_fit_are_not_stored(configurations):
    node = ConfigurationsData.from_value(configurations)
    node.set_array("cells", np.zeros((1, 3, 3)))
    with pytest.raises(ValidationError, match="cells has shape"):
        node.store()


def test_a_choice_keeps_its_order_and_its_scores():
    choice = Choice(ids=np.array(["b", "a"]), scores=np.array([0.3, 0.1]))
    node = ChoiceData.from_value(choice, strategy="uncertainty").store()
    assert node.ids().tolist() == ["b", "a"]
    assert node.value().scores.tolist() == [0.3, 0.1]
    assert node.base.attributes.get("strategy") == "uncertainty"


def test_a_committee_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"seeds": [1]}')
    with pytest.raises(FileNotFoundError, match="weights"):
        CommitteeData.from_folder(tmp_path)
