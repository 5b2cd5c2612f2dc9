"""The numbers behind the figures: test set, uncertainties and EIPs of a loop, as plain arrays."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from aiida.orm import Data

from aiida_eipnn.reports.history import History, Iteration, iteration_outputs
from aiida_eipnn.reports.points import inputs_of, latest
from aiida_eipnn.science.arrays import FloatArray, StrArray
from aiida_eipnn.science.configurations import ragged_rows, rows_of
from aiida_eipnn.science.labels import Labels, join_labels
from aiida_eipnn.science.reference import SourceErrors, fit_alignment, source_errors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TestSet:
    """What DFT and the committee say about the ``n`` test configurations with ``N`` atoms.

    Parameters
    ----------
    energy, predicted_energy
        Per atom, in eV/atom. Shape ``(n,)``.
    forces, predicted_forces
        In eV/Å. Shape ``(N, 3)``.
    forces_std
        Disagreement of the committee on each atom, in eV/Å. Shape ``(N,)``.
    """

    energy: FloatArray
    predicted_energy: FloatArray
    forces: FloatArray
    predicted_forces: FloatArray
    forces_std: FloatArray

    def __len__(self) -> int:
        return len(self.energy)

    @property
    def forces_error(self) -> FloatArray:
        """Length of the error of the force on each atom, in eV/Å. Shape ``(N,)``."""
        error: FloatArray = np.linalg.norm(self.predicted_forces - self.forces, axis=1)
        return error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choices:
    """Which EIP was chosen for each configuration of the pool, and what type that is.

    Both of shape ``(n,)``.
    """

    names: StrArray
    config_types: StrArray

    def table(self) -> dict[str, dict[str, int]]:
        """Return how often each EIP is chosen, by type of configuration."""
        return {
            str(group): dict(Counter(self.names[self.config_types == group].tolist()))
            for group in np.unique(self.config_types)
        }


def read_test_set(outputs: Mapping[str, Data], last: Iteration | None) -> TestSet | None:
    """Return the test set with the predictions of the last assessed iteration."""
    labels = outputs.get("test_labels")
    node = None if last is None else iteration_outputs(outputs, last.number).get("predictions")
    if labels is None or node is None:
        return None
    test, predicted = labels.value().labelled(), node.value()
    rows = rows_of(predicted.ids, test.ids)
    atoms = ragged_rows(predicted.offsets, rows)
    return TestSet(
        energy=test.energy[:, 0] / test.n_atoms,
        predicted_energy=predicted.energy[rows] / test.n_atoms,
        forces=test.forces[0],
        predicted_forces=predicted.forces[atoms],
        forces_std=predicted.forces_std[atoms],
    )


def read_choices(outputs: Mapping[str, Data], pool: Data, last: Iteration | None) -> Choices | None:
    """Return the EIPs chosen in the last iteration that chose any."""
    node = None if last is None else iteration_outputs(outputs, last.number).get("selection")
    if node is None:
        return None
    selection, configurations = node.value(), pool.value()
    known = np.isin(selection.ids, configurations.ids)
    rows = configurations.rows_of(selection.ids[known])
    return Choices(
        names=selection.sources[selection.choice[known]],
        config_types=configurations.config_types[rows],
    )


def read_uncertainties(
    outputs: Mapping[str, Data], iterations: tuple[Iteration, ...]
) -> dict[str, FloatArray]:
    """Return the uncertainty of every configuration by iteration, for those that asked DFT."""
    found = {}
    for item in iterations:
        node = iteration_outputs(outputs, item.number).get("predictions")
        if node is not None and item.asked is not None:
            found[item.name] = node.value().uncertainty
    return found


def read_eip_errors(
    history: History, outputs: Mapping[str, Data], pool: Data
) -> tuple[SourceErrors, ...]:
    """Return how far each EIP is from DFT on the test set, best first.

    Each EIP is first brought onto DFT with the training labels, as the loop does.
    """
    training = training_labels(history)
    if training is None:
        return ()
    configurations = pool.value()
    here = training.take(np.flatnonzero(np.isin(training.ids, configurations.ids)))
    labels = latest(outputs, {}, "eip_labels").value()
    labels = labels.take(np.flatnonzero(np.isin(labels.ids, configurations.ids)))
    aligned = fit_alignment(configurations, here, labels).apply(configurations, labels)
    table = source_errors(outputs["test_labels"].value().labelled(), aligned)
    return tuple(sorted(table, key=lambda row: (row.n == 0, row.energy_mae)))


def training_labels(history: History) -> Labels | None:
    """Return the DFT labels of the last iteration that was assessed, ``None`` before the first."""
    assessments = [call.pk for call in history.calls if call.name == "assess" and call.is_ok]
    if not assessments:
        return None
    inputs = inputs_of(assessments[-1])
    parts = [inputs[name].value() for name in sorted(inputs) if name.startswith("labels_")]
    return join_labels(parts).labelled()
