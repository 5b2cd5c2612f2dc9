"""Batches and parts of them that hold no more neighbours than they may."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.pseudo_labels import PseudoLabels
from aiida_eipnn.science.nn.shares import Share
from aiida_eipnn.science.nn.sizes import Sizes, count_parts

torch = pytest.importorskip("torch")

from small_trainings import HARD, SOFT, committee_of, labels_of, settings_for  # noqa: E402

from aiida_eipnn.science.nn.directions import DrawnDirections, KeptDirections  # noqa: E402
from aiida_eipnn.science.nn.graph import GraphTable, find_neighbours  # noqa: E402
from aiida_eipnn.science.nn.network import fit_pooling  # noqa: E402
from aiida_eipnn.science.nn.stage import StageInputs  # noqa: E402
from aiida_eipnn.science.nn.stages import prepare  # noqa: E402
from aiida_eipnn.science.nn.training import Step, fit, start_training  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch")

CUTOFF = 3.0
SMALL = {"cutoff": CUTOFF, "width": 4, "depth": 1, "n_radial": 4, "l_max": 1}
# Atoms of the cells of the pool: a step may meet any of them.
CELLS = [(1, 1, 1), (2, 1, 1), (2, 2, 2)]
# Places that are allowed: those of 16 atoms are more.
EDGES = 60


def pool_of(n, seed=0):
    """Return cells of 2, 4 and 16 atoms in turn."""
    rng = np.random.default_rng(seed)
    frames = [bulk("Si").repeat(CELLS[number % 3]) for number in range(n)]
    for atoms in frames:
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
    return Configurations.from_atoms(frames, "rattled")


def inputs_of(stage, trunk):
    """Return what a stage learns from: everything that a step can compute."""
    pool = pool_of(14)
    said = labels_of(pool, {"soft": SOFT, "hard": HARD})
    if stage == "pretrain":
        return StageInputs(configurations=pool, eip_labels=said)
    unknown = pool.take(range(8, 14))
    other = labels_of(unknown, {"dft": HARD})
    start = prepare("pretrain", inputs_of("pretrain", trunk), settings_of("pretrain", trunk))
    return StageInputs(
        configurations=pool,
        labels=labels_of(pool.take(range(8)), {"dft": SOFT}),
        eip_labels=said,
        pseudo=PseudoLabels(
            ids=unknown.ids,
            offsets=other.offsets,
            energy=other.energy[:, 0],
            energy_error=np.full(6, 0.02),
            forces=other.forces[0],
            forces_error=np.full(6, 0.2),
        ),
        members=(start.network(0, 0),),
        eips=("soft", "hard"),
    )


def settings_of(stage, trunk, **training):
    network = {"trunk": trunk, **SMALL}
    return settings_for(stage, network, **{"steps": 4, "batch_size": 4, **training})


def train(stage, **bounds):
    """Return the weights, and what was reported."""
    state = start_training(stage.network(0, 0), stage.settings.training, 0)
    assert fit(state, stage, stage.settings.training, **bounds)
    stage.finish(state.network, 0)
    return dict(state.network.state_dict()), state.history


@pytest.fixture
def graphs(monkeypatch):
    """Places and configurations of every batch that is made."""
    made, batch = [], GraphTable.batch

    def seen(self, rows):
        graph = batch(self, rows)
        made.append((graph.partners.numel(), len(graph.n_atoms)))
        return graph

    monkeypatch.setattr(GraphTable, "batch", seen)
    return made


def sizes_of(*pairs):
    return Sizes(*np.array(pairs, dtype=np.int64).reshape(-1, 2).T)


def test_the_places_of_a_batch_are_those_of_its_graph():
    # Atoms of a cluster have different numbers of neighbours, and a lone one has none.
    frames = [*map(pool_of(5).atoms, range(5)), Atoms("Si", pbc=False)]
    frames[2].pbc = False
    neighbours = find_neighbours(Configurations.from_atoms(frames), (14,), CUTOFF)
    table, sizes = GraphTable(neighbours), neighbours.sizes
    for rows in ([0], [2], [5], [5, 5], [2, 5, 0], [4, 3, 2, 1, 0]):
        chosen = sizes.take(np.array(rows))
        places = table.batch(np.array(rows)).partners.numel()
        assert chosen.n_atoms.sum() * chosen.n_places.max() == places


def test_batches_are_in_order_and_below_both_bounds():
    rng = np.random.default_rng(0)
    sizes = Sizes(rng.integers(1, 40, 200), rng.integers(1, 30, 200))

    def places(rows):
        return sizes.n_atoms[rows].sum() * sizes.n_places[rows].max()

    batches = sizes.batches(3, 900)

    assert np.concatenate(batches).tolist() == list(range(200))
    assert any(len(rows) == 1 and places(rows) > 900 for rows in batches)
    for rows, following in zip(batches, [*batches[1:], None], strict=True):
        assert len(rows) == 1 or (len(rows) <= 3 and places(rows) <= 900)
        if following is not None and len(rows) < 3:
            assert places(np.append(rows, following[0])) > 900


def test_nothing_makes_no_batch():
    assert sizes_of().batches(3, 10) == []


@pytest.mark.parametrize(("batch_size", "batch_edges"), [(0, 10), (3, 0)])
def test_a_batch_must_hold_something(batch_size, batch_edges):
    with pytest.raises(ValueError, match="must be a whole number from 1 on, not 0"):
        sizes_of((2, 4)).batches(batch_size, batch_edges)


@pytest.mark.parametrize(
    ("pairs", "edges", "parts"),
    [
        # 4 configurations of 10 places each, and what of them fits.
        ([(2, 5)] * 4, 40, 1),
        ([(2, 5)] * 4, 39, 2),
        ([(2, 5)] * 4, 20, 2),
        ([(2, 5)] * 4, 19, 4),
        # No more parts than configurations: one cannot be divided.
        ([(2, 5)] * 4, 1, 4),
        # The atoms of all have places for the neighbours of the one with most.
        ([(2, 5), (2, 5), (2, 5), (1, 50)], 300, 2),
        # A large one alone is above the bound whatever is done.
        ([(100, 5), (2, 5)], 100, 2),
        ([(100, 5), (2, 5), (2, 5), (2, 5)], 100, 3),
    ],
)
def test_a_batch_is_computed_in_as_many_parts_as_it_takes(pairs, edges, parts):
    assert count_parts([sizes_of(*pairs)], edges) == parts


def test_what_is_drawn_beside_the_batch_counts_too():
    batch, beside = sizes_of(*[(2, 5)] * 4), sizes_of(*[(4, 5)] * 8)
    assert count_parts([batch], 50) == 1
    assert count_parts([batch, beside], 50) == 4
    uneven = sizes_of((10, 5), *[(1, 5)] * 7)
    assert count_parts([batch, uneven], 60) == 5


def test_processes_share_the_parts_and_more_may_be_asked_for():
    sets = [sizes_of(*[(2, 5)] * 16)]
    assert count_parts(sets, 20) == 8
    assert count_parts(sets, 20, n_processes=2) == 4
    assert count_parts(sets, 20, n_processes=3) == 3
    assert count_parts(sets, 20, n_parts=9) == 9
    assert count_parts(sets, 1000, n_parts=3) == 3


@pytest.mark.parametrize("trunk", ["power_spectrum", "schnet"])
@pytest.mark.parametrize("stage", ["pretrain", "classify", "finetune"])
def test_sizes_are_those_of_what_the_loss_computes(trunk, stage, graphs, monkeypatch):
    settings = settings_of(stage, trunk, validation_fraction=0.3)
    prepared = prepare(stage, inputs_of(stage, trunk), settings)
    network, moved = prepared.network(0, 0), []
    for kind in (KeptDirections, DrawnDirections):

        def seen(self, network, rows, rng, share, move=kind.move):
            moved.append(self.sizes.take(rows))
            return move(self, network, rows, rng, share)

        monkeypatch.setattr(kind, "move", seen)
    graphs.clear()
    rows = np.array([3, 0, 4, 1])
    prepared.loss(network, rows, Step(0.1, np.random.default_rng(3)))

    told = prepared.sizes(rows, Step(0.1, np.random.default_rng(3)))

    beside = told if stage == "pretrain" else told[1:]
    assert len(beside) == len(moved) == {"pretrain": 1, "classify": 0, "finetune": 2}[stage]
    for mine, theirs in zip(beside, moved, strict=True):
        np.testing.assert_array_equal(mine.n_atoms, theirs.n_atoms)
        np.testing.assert_array_equal(mine.n_places, theirs.n_places)
    # Kept descriptors come without a graph.
    with_graph = told if trunk == "schnet" else told[: len(told) - len(beside)]
    assert [item.n_atoms.sum() * item.n_places.max() for item in with_graph] == [
        places for places, _ in graphs
    ]
    # In the last part of a training there are no pseudo-labels.
    late = prepared.sizes(rows, Step(0.9, np.random.default_rng(3)))
    assert len(told) - len(late) == (stage == "finetune")


@pytest.mark.parametrize("trunk", ["power_spectrum", "schnet"])
def test_a_bound_changes_no_training_and_is_kept(trunk, graphs, monkeypatch):
    edges = 100
    settings = settings_of(
        "finetune",
        trunk,
        min_epochs=4,
        stress_weight=1.0,
        n_heads=3,
        validation_fraction=0.3,
    )
    inputs = inputs_of("finetune", trunk)
    stage = prepare("finetune", inputs, settings)
    shares, loss = [], type(stage).loss

    def seen(self, network, rows, step):
        before = len(graphs)
        value = loss(self, network, rows, step)
        shares.append((step.share, graphs[before:]))
        return value

    monkeypatch.setattr(type(stage), "loss", seen)

    whole = train(stage)
    # Usual batches are below the bound there is by default.
    assert {share.count for share, _ in shares} == {1}
    assert max(places for places, _ in graphs) > 2 * edges
    graphs.clear()
    shares.clear()
    stage = prepare("finetune", inputs, replace(settings, batch_edges=edges))
    bounded = train(stage, batch_edges=edges)

    for name, weight in whole[0].items():
        # The root of an inverse magnifies how sums are rounded.
        rtol = 1e-5 if "density" in name else 1e-7
        torch.testing.assert_close(bounded[0][name], weight, rtol=rtol, atol=1e-9, msg=name)
    for one, other in zip(whole[1], bounded[1], strict=True):
        assert {**other, "seconds": 0} == pytest.approx({**one, "seconds": 0}, rel=1e-7)
    # Descriptions, statistics, errors on held-out labels and heads that are drawn keep it too.
    assert any(n > 1 for _, n in graphs)
    assert all(n == 1 or places <= edges for places, n in graphs)
    for _, parts in shares:
        assert all(n == 1 for _, n in parts) or sum(places for places, _ in parts) <= edges
    # As many parts as the batch takes, not always as many as the largest one.
    assert len({share.count for share, _ in shares}) > 1


def test_errors_on_held_out_labels_with_a_bound_are_those_without(graphs):
    inputs, settings = inputs_of("finetune", "schnet"), settings_of("finetune", "schnet")
    stage = prepare("finetune", inputs, settings)
    network, stage.held_out = stage.network(0, 0), np.array([7, 2, 5, 4, 0])
    whole = stage.validate(network)
    graphs.clear()
    stage.settings = replace(settings, batch_edges=EDGES)

    assert stage.validate(network) == pytest.approx(whole, rel=1e-9)

    # Of 4 atoms, which do not fit beside 16; twice 16; then 4 and 2.
    assert [n for _, n in graphs] == [1, 1, 1, 2]


def test_a_part_of_a_training_in_parts_has_less_than_a_part_of_the_bound(graphs):
    settings = settings_of("finetune", "schnet")
    settings = replace(settings, batch_edges=2 * EDGES, batch_parts=2)
    assert settings.edges_at_once == EDGES
    assert replace(settings, batch_parts=1000).edges_at_once == 1
    prepare("finetune", inputs_of("finetune", "schnet"), settings).network(0, 0)
    assert all(n == 1 or places <= EDGES for places, n in graphs)


@pytest.fixture(scope="module")
def committee():
    stage = prepare(
        "finetune", inputs_of("finetune", "schnet"), settings_of("finetune", "schnet", n_heads=2)
    )
    networks = [stage.network(seed, 0) for seed in (0, 1)]
    for network in networks:
        fit_pooling(network, stage.statistics.described)
    return committee_of(*networks)


def test_predictions_with_a_bound_are_those_without(committee, graphs):
    pool = pool_of(10, seed=5)
    whole = committee.predict(pool, 6)
    graphs.clear()

    bounded = committee.predict(pool, 6, EDGES)

    assert all(n == 1 or places <= EDGES for places, n in graphs)
    # One of 16 atoms has more, and is alone; the others are not.
    assert max(places for places, _ in graphs) > EDGES
    assert len(graphs) < len(pool)
    assert sum(n for _, n in graphs) == len(pool)
    assert bounded.ids.tolist() == whole.ids.tolist()
    for name, array in whole.arrays().items():
        if name != "ids":
            found = bounded.arrays()[name]
            tolerance = 1e-5 if array.dtype == np.float32 else 1e-9
            np.testing.assert_allclose(found, array, rtol=tolerance, atol=tolerance, err_msg=name)


def test_every_part_of_predictions_is_below_the_bound_of_configurations(committee, graphs):
    parts = list(committee.predict_parts(pool_of(7), 3, 10**6))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert [n for _, n in graphs] == [3, 3, 1]


def test_bounds_of_predictions_are_checked_before_the_first_part(committee):
    with pytest.raises(ValueError, match="batch_edges must be a whole number from 1 on, not 0"):
        committee.predict_parts(pool_of(1), 3, 0)


def test_a_selection_with_a_bound_is_that_without(graphs):
    stage = prepare("classify", inputs_of("classify", "schnet"), settings_of("classify", "schnet"))
    committee = committee_of(stage.network(0, 0), stage="classify", eips=("soft", "hard"))
    pool = pool_of(9, seed=2)
    said = labels_of(pool, {"soft": SOFT, "hard": HARD})
    whole = committee.select(pool, said)
    graphs.clear()

    bounded = committee.select(pool, said, batch_edges=EDGES)

    assert len(graphs) > 1
    assert all(n == 1 or places <= EDGES for places, n in graphs)
    for name, array in whole.arrays().items():
        found = bounded.arrays()[name]
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found, array, rtol=1e-9)
        else:
            np.testing.assert_array_equal(found, array)


def test_shares_are_where_they_were_counted():
    # The places of shares are counted where `Share` puts them.
    sizes = sizes_of(*[(n, 3) for n in (1, 9, 2, 7, 3)])
    n_parts = count_parts([sizes], 36)
    shares = [Share(number, n_parts).of(np.arange(5)) for number in range(n_parts)]
    assert all(3 * sizes.n_atoms[rows].sum() <= 36 for rows in shares)
    fewer = [Share(number, n_parts - 1).of(np.arange(5)) for number in range(n_parts - 1)]
    assert any(3 * sizes.n_atoms[rows].sum() > 36 for rows in fewer)
