"""What a committee costs, and how good it is, with one pre-training for all members or one each.

    make bench-committee

Each committee learns the same DFT labels with the defaults of the stages and replay, each member
from its own seed; the members hold out different labels. Times are CPU seconds of one thread,
against those of a single member in the same run. Errors are those of the mean prediction on test
configurations; the rank correlation is that of the largest force spread of the members with the
largest error of a force component in a configuration.
"""

import argparse
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
from aiida_eipnn.science.uncertainty import spearman

RESULTS = Path(__file__).parent / "results" / "committee.json"
MEMBERS = 4
SETS = {"pyxtal_Si": 100, "mvl_W": 20}
HELD_OUT = 0.1


class Timed(NamedTuple):
    """Networks, and the CPU seconds that each took."""

    networks: list[Network]
    seconds: list[float]


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
    settings = settings_for(problem, "finetune", {"validation_fraction": HELD_OUT})
    start = time.process_time()
    stage = prepare("finetune", inputs, settings)
    prepared = time.process_time() - start

    def member(number: int) -> Network:
        task = stage.for_member(number)
        network: Network = trained_state(task, settings, number, number).network
        return network

    return _timed([lambda number=number: member(number) for number in range(n_members)], prepared)


def _timed(makers: list[Any], prepared: float) -> Timed:
    """Make networks; what was prepared for all counts with the first."""
    networks, seconds = [], []
    for make in makers:
        start = time.process_time()
        networks.append(make())
        seconds.append(time.process_time() - start)
    seconds[0] += prepared
    return Timed(networks, seconds)


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
    errors = {
        "energy_mae_mev": round(1000 * float(energy.mean()), 2),
        "force_mae_mev": round(1000 * float(wrong.mean()), 2),
    }
    if len(networks) == 1:
        return errors
    return errors | {
        "spearman": round(spearman(predicted.uncertainty, worst), 3),
        # Above 1: errors are larger than the members' spread says.
        "error_over_spread": round(float(size.mean() / predicted.forces_std.mean()), 2),
    }


def measure(name: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each kind of committee."""
    dataset = load_dataset(name)
    problem = make_problem(dataset, "power_spectrum", n, seed)
    unseen = dataset.configurations.take(dataset.test)
    truth = dataset.dft.take(dataset.test)
    learnt = pretrain(problem, range(MEMBERS))
    shared = finetune(problem, learnt.networks[:1], MEMBERS)
    own = finetune(problem, learnt.networks, MEMBERS)
    single = learnt.seconds[0] + shared.seconds[0]
    costs = {
        "one member": (shared.networks[:1], single),
        "one pre-training": (shared.networks, learnt.seconds[0] + sum(shared.seconds)),
        "one pre-training each": (own.networks, sum(learnt.seconds) + sum(own.seconds)),
    }
    return [
        {
            "dataset": name,
            "n": n,
            "seed": seed,
            "committee": kind,
            "members": len(networks),
            "cpu_s": round(seconds, 1),
            "times_one_member": round(seconds / single, 2),
            **quality(networks, unseen, truth),
        }
        for kind, (networks, seconds) in costs.items()
    ]


def line_of(row: dict[str, Any]) -> str:
    """Return a row as a line of the table."""
    line = (
        f"{row['dataset']:<10} {row['n']:>4} seed {row['seed']} {row['committee']:<22} "
        f"{row['cpu_s']:6.0f} s ({row['times_one_member']:.2f}) {row['energy_mae_mev']:7.2f} "
        f"meV/atom {row['force_mae_mev']:7.1f} meV/Å"
    )
    if "spearman" not in row:
        return line
    return (
        f"{line}  rank correlation {row['spearman']:.2f}  "
        f"error/spread {row['error_over_spread']:.2f}"
    )


def main() -> None:
    """Train the committees, print a table, write JSON."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--datasets", nargs="+", choices=SETS, default=list(SETS))
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in given.datasets:
        for seed in range(given.seeds):
            rows += measure(name, SETS[name], seed)
            print(*map(line_of, rows[-3:]), sep="\n", flush=True)
    given.output.write_text(json.dumps({"members": MEMBERS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
