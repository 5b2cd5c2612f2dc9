"""What the stages have in common: what they learn from, and the network before and after.

A stage is prepared once for all members, and is then the task of the training loop
(:class:`aiida_eipnn.science.nn.training.Task`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.pseudo_labels import PseudoLabels
from aiida_eipnn.science.eip.selection import Selection, SelectionParameters
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.device import ON_CPU, array_of
from aiida_eipnn.science.nn.heads import CONSENSUS, DFT_HEAD, sum_atoms
from aiida_eipnn.science.nn.network import (
    Network,
    NetworkParameters,
    derivatives,
    describe_configurations,
    with_gradient,
)
from aiida_eipnn.science.nn.sizes import BATCH_EDGES, Sizes
from aiida_eipnn.science.nn.training import Loss, Step, TrainingParameters
from aiida_eipnn.science.nn.trunk import Batch
from aiida_eipnn.science.reference import (
    MAD_TO_SIGMA,
    count_elements,
    fit_reference_energies,
)

LOGGER = logging.getLogger(__name__)

# Configurations that the standardisation of descriptors and features is fitted on.
_MAX_FOR_STATISTICS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """What a stage learns from.

    Parameters
    ----------
    configurations
        Every configuration there is, labelled or not.
    labels
        DFT labels, all of them there.
    eip_labels
        EIP labels, missing ones among them.
    selection
        The EIP chosen for each configuration; makes pseudo-labels in fine-tuning.
    pseudo
        Pseudo-labels to learn beside the DFT labels, in fine-tuning; made of the selection where
        there is one.
    members
        Networks to start from, member ``i`` from ``members[i % len(members)]``.
    eips
        Names of the EIPs that these learnt from.
    judges
        Ids of the DFT labels that may be held out; all where it is empty.
    """

    configurations: Configurations
    labels: Labels | None = None
    eip_labels: Labels | None = None
    selection: Selection | None = None
    pseudo: PseudoLabels | None = None
    members: tuple[Network, ...] = ()
    eips: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """How a stage learns.

    Parameters
    ----------
    network
        Architecture of networks that start from scratch.
    training
        Schedule and weights.
    selection
        When an EIP is to be believed.
    device
        Where networks and data are.
    batch_parts
        Parts that a batch is computed in, one after the other, where the memory is small.
    batch_edges
        Places for neighbours that are computed at once, at most; divided by ``batch_parts``.
    """

    network: NetworkParameters
    training: TrainingParameters
    selection: SelectionParameters
    device: torch.device = ON_CPU
    batch_parts: int = 1
    batch_edges: int = BATCH_EDGES

    @property
    def edges_at_once(self) -> int:
        """Places that a part of a batch may have: whatever does not fit is halved by two parts."""
        return max(1, self.batch_edges // self.batch_parts)


class Stage(Protocol):
    """A prepared stage: the task of the loop, and the network before and after."""

    settings: StageSettings
    n_labels: int
    parameters: NetworkParameters
    elements: tuple[int, ...]
    statistics: "Statistics"
    # Rows of the labels that are not learnt but judge.
    held_out: IntArray

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the energy heads of its networks."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of its networks, empty where there is no classifier."""
        ...

    @property
    def n_drawn(self) -> int | None:
        """Heads to draw about that of DFT, ``None`` where networks tell no feature uncertainty."""
        ...

    def __len__(self) -> int:
        """Return the number of labelled configurations."""
        ...

    def for_member(self, member: int) -> Self:
        """Return the task of a member, which shares all that was prepared."""
        ...

    def network(self, seed: int, member: int) -> Network:
        """Return the network that a member starts from."""
        ...

    def loss(self, network: Network, rows: IntArray, step: Step) -> Loss:
        """Return the loss of the given labelled configurations."""
        ...

    def sizes(self, rows: IntArray, step: Step) -> Sequence[Sizes]:
        """Return the sizes of all that the loss of these configurations computes."""
        ...

    def validate(self, network: Network) -> dict[str, float]:
        """Return errors on labels that are held out, empty where there are none."""
        ...

    def finish(self, network: Network, seed: int) -> None:
        """Fit what is fitted after the training; ``seed`` is that of the member."""
        ...


class Statistics:
    """The configurations that standardisations are fitted on: the set, or an even part of it."""

    def __init__(
        self, inputs: StageInputs, parameters: NetworkParameters, settings: StageSettings
    ) -> None:
        n = len(inputs.configurations)
        rows = np.unique(np.linspace(0, n - 1, min(n, _MAX_FOR_STATISTICS)).astype(np.int64))
        self.elements = elements_of(inputs)
        self.described = describe_configurations(
            inputs.configurations.take(rows),
            parameters,
            self.elements,
            device=settings.device,
            batch_edges=settings.edges_at_once,
        )


def blank_network(stage: Stage) -> Network:
    """Return a network of the stage to load weights into."""
    network = Network(
        stage.parameters, stage.elements, stage.heads, stage.class_names, stage.n_drawn
    )
    return network.to(stage.settings.device)


def new_network(stage: Stage, seed: int) -> Network:
    """Return a network of the stage with random weights whose descriptors are standardised."""
    network = blank_network(stage)
    network.initialise(seed)
    network.trunk.standardise(stage.statistics.described)
    return network


def network_parameters(inputs: StageInputs, settings: StageSettings) -> NetworkParameters:
    """Return the architecture: that of the networks to start from, where there are any."""
    return inputs.members[0].settings if inputs.members else settings.network


def elements_of(inputs: StageInputs) -> tuple[int, ...]:
    """Return the elements of the network: those it starts with, else all there are."""
    return inputs.members[0].elements if inputs.members else inputs.configurations.elements


def energy_head(network: Network) -> str:
    """Return the name of the head that speaks for the network.

    Raises
    ------
    ValueError
        If it has none.
    """
    for name in (DFT_HEAD, CONSENSUS):
        if name in network.heads.names:
            return name
    raise ValueError(
        "this committee predicts no energies: it was trained from scratch to classify EIPs; "
        "pre-train or fine-tune one"
    )


class BatchPrediction(NamedTuple):
    """Energies in eV, forces in eV/Å, stresses in eV/Å³ and features of atoms of a batch."""

    energy: FloatArray
    forces: FloatArray
    stress: FloatArray
    features: Tensor


def predict_batch(network: Network, batch: Batch) -> BatchPrediction:
    """Return what the head that speaks for the network predicts."""
    row = network.heads.row(energy_head(network))
    several = _predict(network, batch, network.heads.weight[row : row + 1])
    return several._replace(
        energy=several.energy[0], forces=several.forces[0], stress=several.stress[0]
    )


def predict_heads(network: Network, batch: Batch) -> BatchPrediction:
    """Return what each head that was drawn predicts; else that which speaks for the network.

    The trunk is evaluated once; each of ``m`` heads costs a pass back. Energies have shape
    ``(m, n)``, forces ``(m, N, 3)`` and stresses ``(m, n, 6)``.
    """
    if network.feature_uncertainty is not None and network.n_drawn:
        return _predict(network, batch, network.feature_uncertainty.heads)
    row = network.heads.row(energy_head(network))
    return _predict(network, batch, network.heads.weight[row : row + 1])


def _predict(network: Network, batch: Batch, weights: Tensor) -> BatchPrediction:
    """Return what heads with these weights predict, with all else as that of the network has it."""
    batch = with_gradient(batch)
    heads, row = network.heads, network.heads.row(energy_head(network))
    features = network.trunk(batch)
    readout = torch.nn.functional.linear(features, weights) + heads.bias[row]
    energy = sum_atoms(readout.to(torch.float64) * heads.scale, batch.graph).T
    slopes = [derivatives(part, batch, trainable=False) for part in energy]
    total = energy.detach() + heads.references(batch.graph)[:, row]
    stress = torch.stack([item.virial for item in slopes]) / batch.graph.volumes[:, None]
    forces = torch.stack([item.forces for item in slopes])
    return BatchPrediction(array_of(total), array_of(forces), array_of(stress), features.detach())


def copy_head(network: Network, name: str, source: Network, source_name: str) -> None:
    """Copy a head, without its references."""
    row, source_row = network.heads.row(name), source.heads.row(source_name)
    with torch.no_grad():
        network.heads.weight[row] = source.heads.weight[source_row]
        network.heads.bias[row] = source.heads.bias[source_row]


def shake(network: Network, noise: float, seed: int) -> None:
    """Change the heads by relative noise."""
    generator = torch.Generator().manual_seed(seed)
    weight = network.heads.weight
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
    with torch.no_grad():
        weight.add_(noise * weight.square().mean().sqrt() * drawn)


def energy_scale(per_atom: FloatArray) -> float:
    """Return the robust spread of energies per atom, in eV; 1 where they are all equal."""
    deviation = np.abs(per_atom - np.median(per_atom))
    spread = max(MAD_TO_SIGMA * float(np.median(deviation)), 0.1 * float(np.std(per_atom)))
    return spread if spread > 1e-6 else 1.0


def less_references(configurations: Configurations, energy: FloatArray) -> FloatArray:
    """Return energies per atom less fitted references, in eV/atom. Shape ``(n,)``."""
    fitted = fit_reference_energies(configurations, energy)
    counts = count_elements(configurations, np.array(list(fitted)))
    residual: FloatArray = energy - counts @ np.array(list(fitted.values()))
    return residual / configurations.n_atoms


def need_labels(labels: Labels | None, stage: str, what: str) -> Labels:
    """Return the labels; ``ValueError`` where there are none."""
    if labels is None or not len(labels):
        raise ValueError(f"{stage} needs {what}, and there is not one")
    return labels


def check_known(configurations: Configurations, labels: Labels, what: str) -> None:
    """Raise ``ValueError`` where labels are of configurations that are not there."""
    unknown = np.setdiff1d(labels.ids, configurations.ids)
    if len(unknown):
        raise ValueError(
            f"{len(unknown)} of {len(labels)} {what} labels are of configurations that are not in "
            f"the sets given, such as {unknown[0]}; give the set that they were made of too"
        )
