"""What a committee costs, and how good it is: full networks, or heads drawn on one trunk.

    make bench-committee

Full networks have one pre-training for all members or one each; heads are drawn about that of DFT
(`n_heads`) of one member, or of all.

Each committee learns the same DFT labels with the defaults of the stages and replay, each member
from its own seed; the members hold out different labels. Times are CPU seconds of one thread,
against those of a single member in the same run. Errors are those of the mean prediction on test
configurations; the rank correlation is that of the largest force spread of the members with the
largest error of a force component in a configuration, and that of atoms is of the force on each.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from injection_data import Problem, load_dataset, make_problem  # type: ignore[import-not-found]
from injection_networks import (  # type: ignore[import-not-found]
    material,
    settings_for,
    trained_state,
)

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.network import Network
from aiida_eipnn.science.nn.stage import StageInputs
from aiida_eipnn.science.nn.stages import prepare
from aiida_eipnn.science.predictions import OF_FEATURES
from aiida_eipnn.science.uncertainty import spearman

RESULTS = Path(__file__).parent / "results" / "committee.json"
MEMBERS, HEADS = 4, 8
SETS = {"pyxtal_Si": 100, "mvl_W": 20}
HELD_OUT = 0.1


class Timed(NamedTuple):
    """Networks, and the CPU seconds that each took, and its heads after it."""

    networks: list[Network]
    seconds: list[float]
    drawing: list[float]


def pretrain(problem: Problem, seeds: range) -> Timed:
    """Return networks that learnt what the EIPs say."""
    inputs = StageInputs(configurations=material(problem).pool, eip_labels=material(problem).eips)
    settings = settings_for(problem, "pretrain", {})
    start = time.process_time()
    stage = prepare("pretrain", inputs, settings)
    prepared = time.process_time() - start
    return _timed(
        [lambda seed=seed: trained_state(stage, settings, seed).network for seed in seeds], prepared
    )


def finetune(problem: Problem, sources: list[Network], n_members: int) -> Timed:
    """Return members that learnt DFT labels, from the pre-trained networks in turn."""
    inputs = StageInputs(
        configurations=material(problem).pool,
        labels=problem.dft,
        eip_labels=material(problem).eips,
        members=tuple(sources),
    )
    training = {"validation_fraction": HELD_OUT, "n_heads": HEADS}
    settings = settings_for(problem, "finetune", training)
    start = time.process_time()
    stage = prepare("finetune", inputs, settings)
    prepared = time.process_time() - start

    def member(number: int) -> Network:
        task = stage.for_member(number)
        network: Network = trained_state(task, settings, number, number).network
        return network

    timed = _timed([lambda number=number: member(number) for number in range(n_members)], prepared)
    for number, network in enumerate(timed.networks):
        start = time.process_time()
        stage.for_member(number).finish(network, number)
        timed.drawing.append(time.process_time() - start)
    return timed


def headless(networks: list[Network]) -> list[Network]:
    """Return the networks without the heads that were drawn."""
    plain = copy.deepcopy(networks)
    for network in plain:
        network.feature_uncertainty = None
    return plain


def _timed(makers: list[Any], prepared: float) -> Timed:
    """Make networks; what was prepared for all counts with the first."""
    networks, seconds = [], []
    for make in makers:
        start = time.process_time()
        networks.append(make())
        seconds.append(time.process_time() - start)
    seconds[0] += prepared
    return Timed(networks, seconds, [])


def quality(networks: list[Network], unseen: Configurations, truth: Labels) -> dict[str, float]:
    """Return errors of the mean, and of a committee what the spread says of them."""
    seeds = tuple(range(len(networks)))
    committee = Committee(members=tuple(networks), stage="finetune", seeds=seeds)
    predicted = committee.predict(unseen)
    energy = np.abs(predicted.energy - truth.energy[:, 0]) / truth.n_atoms
    wrong = np.abs(predicted.forces - truth.forces[0])
    starts = truth.offsets[:-1]
    worst = np.maximum.reduceat(wrong.max(axis=1), starts)
    size = np.sqrt((wrong**2).sum(axis=1))
    of_atoms = {
        f"spearman_{name}": round(spearman(values.astype(np.float64), size), 3)
        for name in OF_FEATURES
        if (values := getattr(predicted, name)) is not None
    }
    errors = {
        "energy_mae_mev": round(1000 * float(energy.mean()), 2),
        "force_mae_mev": round(1000 * float(wrong.mean()), 2),
    }
    if committee.n_heads == 1:
        return errors
    return errors | {
        "spearman": round(spearman(predicted.uncertainty, worst), 3),
        "spearman_atoms": round(spearman(predicted.forces_std, size), 3),
        **of_atoms,
        # Above 1: errors are larger than the members' spread says.
        "error_over_spread": round(float(size.mean() / predicted.forces_std.mean()), 2),
    }


def measure(name: str, n: int, seed: int, *, with_own: bool) -> list[dict[str, Any]]:
    """Return a row for each kind of committee; that with a pre-training each takes the longest."""
    dataset = load_dataset(name)
    problem = make_problem(dataset, "power_spectrum", n, seed)
    unseen = dataset.configurations.take(dataset.test)
    truth = dataset.dft.take(dataset.test)
    learnt = pretrain(problem, range(MEMBERS if with_own else 1))
    shared = finetune(problem, learnt.networks[:1], MEMBERS)
    plain = headless(shared.networks)
    single = learnt.seconds[0] + shared.seconds[0]
    together = learnt.seconds[0] + sum(shared.seconds)
    costs = {
        "one member": (plain[:1], single),
        "heads of one member": (shared.networks[:1], single + shared.drawing[0]),
        "one pre-training": (plain, together),
        "one pre-training, heads": (shared.networks, together + sum(shared.drawing)),
    }
    if with_own:
        own = finetune(problem, learnt.networks, MEMBERS)
        seconds = sum(learnt.seconds) + sum(own.seconds)
        costs["one pre-training each"] = (headless(own.networks), seconds)
    return [
        {
            "dataset": name,
            "n": n,
            "seed": seed,
            "committee": kind,
            "members": len(networks),
            "heads": sum(max(1, network.n_drawn) for network in networks),
            "cpu_s": round(seconds, 1),
            "times_one_member": round(seconds / single, 2),
            **quality(networks, unseen, truth),
        }
        for kind, (networks, seconds) in costs.items()
    ]


def line_of(row: dict[str, Any]) -> str:
    """Return a row as a line of the table."""
    line = (
        f"{row['dataset']:<10} {row['n']:>4} seed {row['seed']} {row['committee']:<23} "
        f"{row['cpu_s']:6.0f} s ({row['times_one_member']:.2f}) {row['energy_mae_mev']:7.2f} "
        f"meV/atom {row['force_mae_mev']:7.1f} meV/Å"
    )
    if "spearman" not in row:
        return line
    return (
        f"{line}  rank correlation {row['spearman']:.2f}, of atoms "
        f"{row['spearman_atoms']:.2f}  error/spread {row['error_over_spread']:.2f}"
    )


def main() -> None:
    """Train the committees, print a table, write JSON."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--datasets", nargs="+", choices=SETS, default=list(SETS))
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument(
        "--shared-only",
        action="store_true",
        help="leave out a pre-training for each member; its rows in the output stay",
    )
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    torch.set_num_threads(1)
    rows = {}
    if given.output.exists():
        rows = {key_of(row): row for row in json.loads(given.output.read_text())["rows"]}
    for name in given.datasets:
        for seed in range(given.seeds):
            found = measure(name, SETS[name], seed, with_own=not given.shared_only)
            print(*map(line_of, found), sep="\n", flush=True)
            rows |= {key_of(row): row for row in found}
    ordered = sorted(rows.values(), key=lambda row: (list(SETS).index(row["dataset"]), row["seed"]))
    content = {"members": MEMBERS, "heads": HEADS, "rows": ordered}
    given.output.write_text(json.dumps(content, indent=1) + "\n")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what of a row is measured once."""
    return tuple(row[name] for name in ("dataset", "n", "seed", "committee"))


if __name__ == "__main__":
    main()
