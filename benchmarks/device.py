"""How fast networks learn and predict here, on the CPU and on a GPU, and against mace-torch.

    make bench-device

mlearn_Si, published split: 214 configurations of mostly 64 atoms to learn from, 25 to test on. Each
row is the training loop of this package on one device: neighbour lists and descriptors are made
before, as for every training; batches, losses, gradients, the running average and checks count.
The peer is mace-torch's own model, data loader, loss and ``train_one_epoch`` with the same
architecture, precision and batch, a gradient clip and a running average, in turns with ours.
Predictions are energies, forces, stresses and features of a pool, neighbour lists included.
Without a GPU the rows of the CPU are measured alone.
"""

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.selection import SelectionParameters
from aiida_eipnn.science.io import read_tagged
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.device import FULL, MIXED_PRECISIONS, choose_device
from aiida_eipnn.science.nn.network import Network, NetworkParameters
from aiida_eipnn.science.nn.stage import Stage, StageInputs, StageSettings
from aiida_eipnn.science.nn.stages import STAGES, prepare
from aiida_eipnn.science.nn.training import (
    TrainingParameters,
    TrainingState,
    fit,
    start_training,
)

RESULTS = Path(__file__).parent / "results" / "device.json"
DATA = Path(os.environ.get("EIPNN_DATA", "../shared/data"))
# Architectures by name; what is missing is the default of the trunk.
NETWORKS: dict[str, dict[str, Any]] = {
    "power_spectrum": {"trunk": "power_spectrum"},
    "schnet": {"trunk": "schnet"},
    "mace_32": {"trunk": "mace"},
    "mace_128": {"trunk": "mace", "width": 128},
}
PEERS = ("mace_32", "mace_128")
# Where a CPU is asked for: a MACE of 128 channels takes half a minute a step there.
ON_CPU_TOO = ("power_spectrum", "schnet", "mace_32")
PARTS = ("prediction", "training", "peer", "agreement", "accuracy")
BATCH = 16
# Steps before the clock starts: what is compiled at first use is not measured.
WARM_UP_STEPS = 5
TURNS = 3
MEBIBYTE = 2**20


def main() -> None:
    """Measure, print tables, write JSON."""
    given = _options().parse_args()
    torch.set_num_threads(given.threads)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if given.devices:
        devices = given.devices
    train_set, test_set = read_split()
    result: dict[str, Any] = {"machine": _machine(given.threads), "batch": BATCH}
    parts: dict[str, Iterator[dict[str, Any]]] = {
        "prediction": _prediction_rows(given, devices, train_set),
        "training": _training_rows(given, devices, train_set),
        "peer": _peer_rows(given, devices, train_set),
        "agreement": _agreement_rows(given, devices, train_set, test_set),
        "accuracy": _accuracy_rows(given, devices, train_set, test_set),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for part in given.parts:
        print(f"== {part}", flush=True)
        result[part] = list(_shown(parts[part]))
        # After each part: a machine may be lent for a short time only.
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"== written to {given.output}")


def read_split() -> tuple[tuple[Configurations, Labels], tuple[Configurations, Labels]]:
    """Return what to learn from and what to test on."""
    configurations, labels, tags = read_tagged(DATA / "mlearn_Si.extxyz", ["split"])
    train, test = (
        (configurations.take(rows), labels.take(rows))
        for rows in (np.flatnonzero(tags["split"] == name) for name in ("train", "test"))
    )
    return train, test


def stage_of(name: str, device: str, data: tuple[Configurations, Labels], **training: Any) -> Stage:
    """Return a prepared fine-tuning from scratch on a device."""
    content = {"min_epochs": 1, "batch_size": BATCH, **training}
    settings = StageSettings(
        network=NetworkParameters.from_dict({"precision": "float32", **NETWORKS[name]}),
        training=TrainingParameters.from_dict(content, STAGES["finetune"].defaults),
        selection=SelectionParameters(),
        device=choose_device(device),
    )
    return prepare("finetune", StageInputs(configurations=data[0], labels=data[1]), settings)


def learn_for(stage: Stage, network: Network, seconds: float) -> float:
    """Take steps for so long; return how many configurations were learnt from in a second."""
    # Far from the end of the schedule, whatever the speed.
    parameters = replace(stage.settings.training, steps=10**7)
    state = start_training(network, parameters, seed=0)
    fit(state, stage, parameters, must_stop=partial(_has_taken, state, WARM_UP_STEPS))
    taken, start = state.n_steps, _now(stage.settings.device)
    fit(state, stage, parameters, must_stop=lambda: time.perf_counter() - start > seconds)
    spent = _now(stage.settings.device) - start
    per_step = len(stage) / np.ceil(len(stage) / parameters.batch_size)
    return float((state.n_steps - taken) * per_step / spent)


def _has_taken(state: TrainingState, n_steps: int) -> bool:
    return state.n_steps >= n_steps


def _training_rows(
    given: argparse.Namespace, devices: list[str], data: tuple[Configurations, Labels]
) -> Iterator[dict[str, Any]]:
    for name, device, precision in _cases(given, devices):
        stage = stage_of(name, device, data, steps=1, mixed_precision=precision)
        with _watched(device) as seen:
            measured = learn_for(stage, stage.network(0, 0), given.seconds)
        yield {
            "network": name,
            "device": device,
            "mixed_precision": precision,
            "configurations_per_s": round(measured, 1),
            **seen,
        }


def _cases(given: argparse.Namespace, devices: list[str]) -> Iterator[tuple[str, str, str]]:
    for name in given.networks:
        for device in devices:
            if device == "cpu" and name not in ON_CPU_TOO:
                continue
            yield name, device, FULL
            if device == "cuda":
                reducible = NetworkParameters.from_dict(NETWORKS[name]).has_reducible_layers
                yield name, device, "tf32"
                if reducible:
                    yield name, device, "bfloat16"


def _peer_rows(
    given: argparse.Namespace, devices: list[str], data: tuple[Configurations, Labels]
) -> Iterator[dict[str, Any]]:
    for name in (name for name in PEERS if name in given.networks):
        for device in devices:
            if device == "cpu" and name not in ON_CPU_TOO:
                continue
            yield _against_peer(given, name, device, _less_on_cpu(device, data))


def _against_peer(
    given: argparse.Namespace, name: str, device: str, data: tuple[Configurations, Labels]
) -> dict[str, Any]:
    stage = stage_of(name, device, data, steps=1)
    network, peer = stage.network(0, 0), mace_trainer(stage.settings, data)
    ours, theirs = [], []
    for _ in range(TURNS):
        ours.append(learn_for(stage, network, given.seconds))
        theirs.append(_peer_speed(peer, len(data[1]), stage.settings.device, given.seconds))
    ratios = np.array(ours) / np.array(theirs)
    return {
        "network": name,
        "device": device,
        "ours_per_s": round(float(np.median(ours)), 1),
        "mace_torch_per_s": round(float(np.median(theirs)), 1),
        "ratio": round(float(np.median(ratios)), 3),
        "ratios": [round(float(ratio), 3) for ratio in ratios],
    }


def _peer_speed(
    epoch: Callable[[], None], n_items: int, device: torch.device, seconds: float
) -> float:
    epoch()
    start, n_epochs = _now(device), 0
    while time.perf_counter() - start < seconds:
        epoch()
        n_epochs += 1
    return n_epochs * n_items / (_now(device) - start)


def mace_trainer(
    settings: StageSettings, data: tuple[Configurations, Labels]
) -> Callable[[], None]:
    """Return what trains mace-torch's model for an epoch, with its own loader and trainer."""
    from mace import data as mace_data
    from mace.modules import WeightedEnergyForcesLoss
    from mace.tools import torch_geometric, utils
    from mace.tools.train import train_one_epoch
    from torch_ema import ExponentialMovingAverage  # type: ignore[import-untyped]

    torch.set_default_dtype(torch.float32)
    keys = mace_data.KeySpecification({"energy": "REF_energy"}, {"forces": "REF_forces"})
    table = utils.AtomicNumberTable(list(data[0].elements))
    items = []
    for row in range(len(data[0])):
        atoms, rows = data[0].atoms(row), slice(*data[1].offsets[row : row + 2])
        atoms.info["REF_energy"] = float(data[1].energy[row, 0])
        atoms.arrays["REF_forces"] = data[1].forces[0, rows]
        config = mace_data.config_from_atoms(atoms, keys)
        items.append(mace_data.AtomicData.from_config(config, table, settings.network.cutoff))
    loader = torch_geometric.dataloader.DataLoader(
        items, batch_size=BATCH, shuffle=True, pin_memory=settings.device.type == "cuda"
    )
    model = _mace_model(settings.network, table.zs).to(settings.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, amsgrad=True)
    average = ExponentialMovingAverage(model.parameters(), decay=0.99)

    def epoch() -> None:
        train_one_epoch(
            model=model,
            loss_fn=WeightedEnergyForcesLoss().to(settings.device),
            data_loader=loader,
            optimizer=optimiser,
            epoch=0,
            output_args={"forces": True, "virials": False, "stress": False},
            max_grad_norm=10.0,
            ema=average,
            logger=_Silent(),
            device=settings.device,
            distributed=False,
        )

    return epoch


def _mace_model(network: NetworkParameters, numbers: list[int]) -> torch.nn.Module:
    from e3nn import o3
    from mace import modules

    model: torch.nn.Module = modules.ScaleShiftMACE(
        r_max=network.cutoff,
        num_bessel=network.n_radial,
        num_polynomial_cutoff=5,
        max_ell=network.l_max,
        interaction_cls_first=modules.RealAgnosticInteractionBlock,
        interaction_cls=modules.RealAgnosticResidualInteractionBlock,
        num_interactions=network.depth,
        num_elements=len(numbers),
        hidden_irreps=o3.Irreps(f"{network.width}x0e"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(len(numbers)),
        avg_num_neighbors=27.0,
        atomic_numbers=numbers,
        correlation=3,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    return model


class _Silent:
    def log(self, metrics: dict[str, Any]) -> None:
        """Say nothing."""


def _prediction_rows(
    given: argparse.Namespace, devices: list[str], data: tuple[Configurations, Labels]
) -> Iterator[dict[str, Any]]:
    for name in given.networks:
        for device in devices:
            if device == "cpu" and name not in ON_CPU_TOO:
                continue
            stage = stage_of(name, device, data, steps=1)
            committee = _committee_of(stage.network(0, 0))
            pool = _less_on_cpu(device, data)[0]
            committee.predict(pool.take(np.arange(min(len(pool), 64))))
            with _watched(device) as seen:
                start, n = time.perf_counter(), 0
                while time.perf_counter() - start < given.seconds:
                    committee.predict(pool)
                    n += len(pool)
                spent = time.perf_counter() - start
            yield {
                "network": name,
                "device": device,
                "configurations_per_s": round(n / spent, 1),
                **seen,
            }


def _agreement_rows(
    given: argparse.Namespace,
    devices: list[str],
    train_set: tuple[Configurations, Labels],
    test_set: tuple[Configurations, Labels],
) -> Iterator[dict[str, Any]]:
    """Yield how far predictions of the same weights differ between the devices."""
    for name in given.networks if "cuda" in devices else ():
        stage = stage_of(name, "cuda", train_set, steps=1)
        network = stage.network(0, 0)
        parameters = replace(stage.settings.training, steps=10**6)
        state = start_training(network, parameters, seed=0)
        fit(state, stage, parameters, must_stop=partial(_has_taken, state, 50))
        there = _committee_of(network)
        here = there.to(torch.device("cpu"))
        some = test_set[0].take(np.arange(5))
        found, expected = there.predict(some), here.predict(some)
        n_atoms = np.diff(some.offsets)
        yield {
            "network": name,
            "energy_mev": float(1000 * np.abs((found.energy - expected.energy) / n_atoms).max()),
            "forces_mev": float(1000 * np.abs(found.forces - expected.forces).max()),
            "largest_force_mev": float(1000 * np.abs(expected.forces).max()),
        }


def _accuracy_rows(
    given: argparse.Namespace,
    devices: list[str],
    train_set: tuple[Configurations, Labels],
    test_set: tuple[Configurations, Labels],
) -> Iterator[dict[str, Any]]:
    """Yield test errors after equal steps with each precision, and of a second seed."""
    cases = [(FULL, 0), (FULL, 1), *((name, 0) for name in MIXED_PRECISIONS[1:])]
    for precision, seed in cases if "cuda" in devices else ():
        stage = stage_of(
            "power_spectrum",
            "cuda",
            train_set,
            steps=given.steps,
            mixed_precision=precision,
            weight_decay=0.3,
            ema_decay=0.999,
        )
        state = start_training(stage.network(seed, 0), stage.settings.training, seed)
        start = time.perf_counter()
        fit(state, stage, stage.settings.training)
        spent = time.perf_counter() - start
        predicted = _committee_of(state.network).predict(test_set[0])
        wrong = (predicted.energy - test_set[1].energy[:, 0]) / test_set[1].n_atoms
        yield {
            "network": "power_spectrum",
            "mixed_precision": precision,
            "seed": seed,
            "steps": state.n_steps,
            "seconds": round(spent, 1),
            "energy_mae_mev": round(1000 * float(np.abs(wrong).mean()), 3),
            "force_mae_mev": round(
                1000 * float(np.abs(predicted.forces - test_set[1].forces[0]).mean()), 2
            ),
        }


def _less_on_cpu(device: str, data: tuple[Configurations, Labels]) -> tuple[Configurations, Labels]:
    rows = np.arange(min(len(data[0]), 2 * BATCH if device == "cpu" else len(data[0])))
    return data[0].take(rows), data[1].take(rows)


def _committee_of(network: Network) -> Committee:
    return Committee(members=(network,), stage="finetune", seeds=(0,))


def _now(device: torch.device) -> float:
    """Return the time when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _watched(device: str) -> Iterator[dict[str, float]]:
    """Fill in how busy a GPU was and how much of its memory was taken; nothing for a CPU."""
    seen: dict[str, float] = {}
    if device != "cuda":
        yield seen
        return
    samples: list[float] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.1):
            samples.append(torch.cuda.utilization())

    thread = threading.Thread(target=sample)
    torch.cuda.reset_peak_memory_stats()
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        # The first ones are of the warm-up.
        seen["busy_percent"] = float(np.median(samples[len(samples) // 3 :] or [np.nan]))
        seen["peak_mib"] = round(torch.cuda.max_memory_allocated() / MEBIBYTE)


def _machine(threads: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_threads": threads,
    }


def _shown(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        yield row


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options.add_argument("--devices", nargs="+", choices=["cpu", "cuda"])
    options.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    options.add_argument("--steps", type=int, default=3000, help="of each test of accuracy")
    options.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    options.add_argument("--output", type=Path, default=RESULTS)
    return options


if __name__ == "__main__":
    main()
