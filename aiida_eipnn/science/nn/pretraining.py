"""The stage that learns what every EIP says, and what they say in the median."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from aiida_eipnn.science.arrays import IntArray
from aiida_eipnn.science.configurations import ragged_rows
from aiida_eipnn.science.nn.device import ON_CPU
from aiida_eipnn.science.nn.directions import directed_set, forces_along
from aiida_eipnn.science.nn.eip_targets import EipTargets, eip_targets
from aiida_eipnn.science.nn.heads import CONSENSUS
from aiida_eipnn.science.nn.losses import absolute, weighted_huber
from aiida_eipnn.science.nn.network import Network, NetworkParameters, fit_pooling
from aiida_eipnn.science.nn.shares import WHOLE, Share
from aiida_eipnn.science.nn.sizes import BATCH_EDGES, Sizes
from aiida_eipnn.science.nn.stage import (
    StageInputs,
    StageSettings,
    Statistics,
    copy_head,
    need_labels,
    network_parameters,
    new_network,
)
from aiida_eipnn.science.nn.training import Loss, Step, TrainingParameters

# Errors are counted in units of this part of what an EIP's labels spread over, so that one with
# strong forces does not outweigh the others; beyond these numbers of units the loss is linear.
UNIT_OF_ENERGY, UNIT_OF_FORCES = 1 / 3, 1 / 2
HUBER_ENERGY = 1.0
HUBER_FORCES = 2.0


class EipErrors(NamedTuple):
    """Errors of the heads of EIPs where there is a label: in eV/atom and eV/Å, and the loss."""

    energy: Tensor
    along: Tensor
    loss: Tensor


class EipTask:
    """The heads of the EIPs and their labels: energies, and forces along random directions.

    Parameters
    ----------
    targets
        What the heads learn.
    parameters
        Of the networks.
    elements
        Atomic numbers that the networks know.
    device
        Where the networks are.
    batch_edges
        Places for neighbours that are described at once, at most.
    """

    def __init__(
        self,
        targets: EipTargets,
        parameters: NetworkParameters,
        elements: tuple[int, ...],
        device: torch.device = ON_CPU,
        batch_edges: int = BATCH_EDGES,
    ) -> None:
        self.offsets = targets.configurations.offsets
        self.names = (*targets.sources, CONSENSUS)
        n_atoms = targets.configurations.n_atoms[:, None]
        place: dict[str, Any] = {"dtype": parameters.dtype, "device": device}
        per_atom = np.nan_to_num(targets.energy / n_atoms)
        self.per_atom = torch.as_tensor(per_atom, **place)
        self.forces = np.nan_to_num(targets.forces).astype(np.float32)
        self.known = torch.as_tensor(targets.known, device=device)
        self.energy_unit = torch.as_tensor(UNIT_OF_ENERGY * targets.energy_spread, **place)
        self.forces_unit = torch.as_tensor(UNIT_OF_FORCES * targets.forces_spread, **place)
        # The directions belong to the set, not to a member: they are drawn once for all.
        self.directed = directed_set(
            targets.configurations,
            parameters,
            elements,
            seed=0,
            device=device,
            batch_edges=batch_edges,
        )

    def __len__(self) -> int:
        return len(self.per_atom)

    def errors(
        self,
        network: Network,
        rows: IntArray,
        rng: np.random.Generator,
        weights: TrainingParameters,
        share: Share = WHOLE,
    ) -> EipErrors:
        """Return the errors of the heads on a share of these configurations."""
        moved, n = self.directed.move(network, rows, rng, share), len(rows)
        rows = share.of(rows)
        atoms = ragged_rows(self.offsets, rows)
        wanted = forces_along(self.forces[:, atoms], moved.directions, np.diff(self.offsets)[rows])
        columns = np.array([network.heads.row(name) for name in self.names])
        part, heads = (torch.as_tensor(item, device=self.known.device) for item in (rows, columns))
        known = self.known[part]
        energy = moved.energies[:, heads] - self.per_atom[part]
        along = moved.along[:, heads] - torch.as_tensor(wanted).to(energy)
        mask = known.to(energy.dtype)
        loss = weighted_huber(energy / self.energy_unit, mask, HUBER_ENERGY, n)
        if weights.forces_weight:
            loss = loss + weighted_huber(along / self.forces_unit, mask, HUBER_FORCES, n)
        return EipErrors(energy[known], along[known], loss / len(heads))


class Pretraining:
    """Learn what every EIP says about every configuration, and what they say in the median."""

    defaults: Mapping[str, Any] = {
        # Three times as many lowered the error of a network that was fine-tuned on 10 labels of
        # mvl_W from 2.8 to 2.3 meV/atom, and that of its forces not at all.
        "steps": 6000,
        "batch_size": 64,
        "learning_rate": 3e-3,
        "weight_decay": 1e-2,
        "ema_decay": 0.999,
    }

    def __init__(self, inputs: StageInputs, settings: StageSettings) -> None:
        labels = need_labels(inputs.eip_labels, "pre-training", "labels of at least one EIP")
        self.settings, self.inputs = settings, inputs
        self.held_out = np.zeros(0, dtype=np.int64)
        self.parameters = network_parameters(inputs, settings)
        self.statistics = Statistics(inputs, self.parameters, settings)
        self.elements = self.statistics.elements
        self.targets = eip_targets(inputs.configurations, labels, self.elements)
        self.n_labels = int(self.targets.known[:, :-1].sum())
        self.task = EipTask(
            self.targets,
            self.parameters,
            self.elements,
            settings.device,
            settings.edges_at_once,
        )

    def __len__(self) -> int:
        return len(self.task)

    @property
    def heads(self) -> tuple[str, ...]:
        """The EIPs, then their consensus."""
        return self.task.names

    @property
    def class_names(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def n_drawn(self) -> None:
        """None: there is no head of DFT."""
        return None

    def for_member(self, member: int) -> Self:
        """Return itself: all members learn from the same labels."""
        return self

    def network(self, seed: int, member: int) -> Network:
        """Return the network that a member starts from."""
        network = new_network(self, seed)
        if self.inputs.members:
            source = self.inputs.members[member % len(self.inputs.members)]
            network.trunk.load_state_dict(source.trunk.state_dict())
            for name in set(self.heads) & set(source.heads.names):
                copy_head(network, name, source, name)
        network.heads.reference.copy_(torch.as_tensor(self.targets.reference))
        network.heads.scale.fill_(self.targets.scale)
        return network

    def loss(self, network: Network, rows: IntArray, step: Step) -> Loss:
        """Return the loss: energies and forces of all heads."""
        errors = self.task.errors(network, rows, step.rng, self.settings.training, step.share)
        # A force along a direction is distributed as its components, and is reported as such.
        return Loss(
            errors.loss,
            {"energy_mae": absolute(errors.energy), "forces_mae": absolute(errors.along)},
        )

    def sizes(self, rows: IntArray, step: Step) -> Sequence[Sizes]:
        """Return the sizes of these configurations."""
        return [self.task.directed.sizes.take(rows)]

    def validate(self, network: Network) -> dict[str, float]:
        """Return nothing: no label is held out."""
        return {}

    def finish(self, network: Network, seed: int) -> None:
        """Fit the standardisation of the pooled features."""
        fit_pooling(network, self.statistics.described, self.settings.edges_at_once)
