"""What differs between the stages: labels, loss, and what the network starts from.

A stage is prepared once for all members (:func:`prepare`), and is then the task of the training
loop (:class:`aiida_eipnn.science.nn.training.Task`).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations, ragged_rows
from aiida_eipnn.science.eip.potential import symbols_of
from aiida_eipnn.science.eip.selection import NONE, Selection, SelectionParameters, class_labels
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.heads import CONSENSUS, DFT_HEAD
from aiida_eipnn.science.nn.network import (
    Network,
    NetworkParameters,
    batches_of,
    derivatives,
    describe_configurations,
    fit_pooling,
    with_gradient,
)
from aiida_eipnn.science.nn.training import Loss, Step, TrainingParameters
from aiida_eipnn.science.nn.trunk import Batch, BatchSet
from aiida_eipnn.science.reference import count_elements, fit_alignment, fit_reference_energies

LOGGER = logging.getLogger(__name__)

# From these residuals on the loss is linear: energies in eV/atom, forces in eV/Å.
HUBER_ENERGY = 0.1
HUBER_FORCES = 1.0
# EIP energies beyond this many robust standard deviations are not learnt.
OUTLIER_SIGMA = 8.0
# In the last part of the training there are no pseudo-labels.
PSEUDO_END = 0.8
# How often the forces of the consensus are trained on, rather than those of one EIP.
CONSENSUS_SHARE = 0.25
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
    members
        Networks to start from, member ``i`` from ``members[i % len(members)]``.
    eips
        Names of the EIPs that these learnt from.
    """

    configurations: Configurations
    labels: Labels | None = None
    eip_labels: Labels | None = None
    selection: Selection | None = None
    members: tuple[Network, ...] = ()
    eips: tuple[str, ...] = ()


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
    """

    network: NetworkParameters
    training: TrainingParameters
    selection: SelectionParameters


class Stage(Protocol):
    """A prepared stage: the task of the loop, and the network before and after."""

    n_labels: int

    def __len__(self) -> int:
        """Return the number of labelled configurations."""
        ...

    def network(self, seed: int, member: int) -> Network:
        """Return the network that a member starts from."""
        ...

    def loss(self, network: Network, rows: IntArray, step: Step) -> Loss:
        """Return the loss of the given labelled configurations."""
        ...

    def finish(self, network: Network) -> None:
        """Fit what is fitted after the training."""
        ...


class Statistics:
    """The configurations that standardisations are fitted on: the set, or an even part of it."""

    def __init__(self, inputs: StageInputs, parameters: NetworkParameters) -> None:
        n = len(inputs.configurations)
        rows = np.unique(np.linspace(0, n - 1, min(n, _MAX_FOR_STATISTICS)).astype(np.int64))
        self.elements = elements_of(inputs)
        self.described = describe_configurations(
            inputs.configurations.take(rows), parameters, self.elements
        )


class Pretraining:
    """Learn what every EIP says about every configuration, and what they say in the median."""

    defaults: Mapping[str, Any] = {
        # Enough for the consensus to stop improving on a few hundred configurations.
        "epochs": 60,
        "batch_size": 8,
    }

    def __init__(self, inputs: StageInputs, settings: StageSettings) -> None:
        labels = _need(inputs.eip_labels, "pre-training", "labels of at least one EIP")
        self.settings, self.inputs = settings, inputs
        self.parameters = network_parameters(inputs, settings)
        self.statistics = Statistics(inputs, self.parameters)
        self.elements = self.statistics.elements
        self.targets = eip_targets(inputs.configurations, labels, self.elements)
        self.n_labels = int(self.targets.known[:, :-1].sum())
        self.described = describe_configurations(
            self.targets.configurations, self.parameters, self.elements
        )

    def __len__(self) -> int:
        return len(self.described)

    def network(self, seed: int, member: int) -> Network:
        """Return the network that a member starts from."""
        names = [*map(str, self.targets.sources), CONSENSUS]
        network = new_network(self, names, seed=seed)
        if self.inputs.members:
            source = self.inputs.members[member % len(self.inputs.members)]
            network.trunk.load_state_dict(source.trunk.state_dict())
            for name in set(names) & set(source.heads.names):
                copy_head(network, name, source, name)
        network.heads.reference.copy_(torch.from_numpy(self.targets.reference))
        network.heads.scale.fill_(self.targets.scale)
        return network

    def loss(self, network: Network, rows: IntArray, step: Step) -> Loss:
        """Return the loss: energies of all heads, forces of one head for each configuration."""
        batch = with_gradient(self.described.batch(rows))
        energies = network.energies(network.trunk(batch), batch.graph)
        known = torch.from_numpy(self.targets.known[rows])
        target = torch.from_numpy(self.targets.energy[rows])
        per_atom = ((energies - target) / batch.graph.n_atoms[:, None])[known]
        heads = choose_heads(self.targets.known[rows], step.rng)
        chosen = energies.gather(1, torch.from_numpy(heads)[:, None])[:, 0]
        weights = self.settings.training
        forces = derivatives(chosen, batch, trainable=weights.forces_weight > 0).forces
        atoms = ragged_rows(self.targets.configurations.offsets, rows)
        wanted = self.targets.forces[
            np.repeat(heads, self.described.neighbours.n_atoms[rows]), atoms
        ]
        error = forces - torch.from_numpy(wanted)
        return Loss(
            weights.energy_weight * huber(per_atom, HUBER_ENERGY)
            + weights.forces_weight * huber(error, HUBER_FORCES),
            {"energy_mae": absolute(per_atom), "forces_mae": absolute(error)},
        )

    def finish(self, network: Network) -> None:
        """Fit the standardisation of the pooled features."""
        fit_pooling(network, self.statistics.described)


class Classification:
    """Learn which EIP is right where, from the configurations that DFT labelled."""

    defaults: Mapping[str, Any] = {
        # A linear readout of frozen features, from some ten labels: held down by weight decay.
        "epochs": 300,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "weight_decay": 0.2,
        "trunk_rate_factor": 0.0,
        "ema_decay": 0.98,
    }

    def __init__(self, inputs: StageInputs, settings: StageSettings) -> None:
        labels = _need(inputs.labels, "classification", "DFT labels")
        eip_labels = _need(inputs.eip_labels, "classification", "labels of at least one EIP")
        self.settings, self.inputs = settings, inputs
        self.parameters = network_parameters(inputs, settings)
        self.statistics = Statistics(inputs, self.parameters)
        self.elements = self.statistics.elements
        alignment = fit_alignment(inputs.configurations, labels, eip_labels)
        self.aligned = alignment.apply(inputs.configurations, eip_labels)
        both = labels.take(np.flatnonzero(np.isin(labels.ids, eip_labels.ids)))
        if not len(both):
            raise ValueError(
                f"none of the {len(labels)} configurations with DFT labels has EIP labels; label "
                "them with the EIPs first"
            )
        self.classes = class_labels(both, self.aligned, settings.selection)
        self.n_labels = len(both)
        configurations = inputs.configurations
        self.described = describe_configurations(
            configurations.take(configurations.rows_of(both.ids)), self.parameters, self.elements
        )

    def __len__(self) -> int:
        return len(self.described)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The EIPs, then none."""
        return (*map(str, self.aligned.sources), NONE)

    def network(self, seed: int, member: int) -> Network:
        """Return the network that a member starts from."""
        source = (
            self.inputs.members[member % len(self.inputs.members)] if self.inputs.members else None
        )
        heads = source.heads.names if source else ()
        network = new_network(self, heads, self.class_names, seed=seed)
        if source:
            network.trunk.load_state_dict(source.trunk.state_dict())
            network.heads.load_state_dict(source.heads.state_dict())
        fit_pooling(network, self.statistics.described)
        return network

    def loss(self, network: Network, rows: IntArray, step: Step) -> Loss:
        """Return the cross-entropy."""
        batch = self.described.batch(rows)
        logits = network.logits(network.trunk(batch), batch.graph)
        wanted = torch.from_numpy(self.classes[rows])
        hits = int((logits.argmax(dim=1) == wanted).sum())
        return Loss(nn.functional.cross_entropy(logits, wanted), {"accuracy": (hits, len(rows))})

    def finish(self, network: Network) -> None:
        """Do nothing: the classifier needs the standardisation that it was trained with."""


class PseudoLabels(NamedTuple):
    """Energies, in eV, of the EIP chosen where DFT has no label, and its probability."""

    described: BatchSet
    energy: FloatArray
    weight: FloatArray


class Finetuning:
    """Learn DFT energies and forces, from the consensus of the EIPs or from scratch."""

    defaults: Mapping[str, Any] = {
        "epochs": 300,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "trunk_rate_factor": 0.3,
        # From a few tens of labels a network learns noise too; this lowers the force error of
        # networks from scratch and of pre-trained ones alike.
        "weight_decay": 0.3,
    }

    def __init__(self, inputs: StageInputs, settings: StageSettings) -> None:
        self.labels = _need(inputs.labels, "fine-tuning", "DFT labels")
        self.settings, self.inputs = settings, inputs
        self.parameters = network_parameters(inputs, settings)
        self.statistics = Statistics(inputs, self.parameters)
        self.elements = self.statistics.elements
        configurations = inputs.configurations
        self.configurations = configurations.take(configurations.rows_of(self.labels.ids))
        self.described = describe_configurations(
            self.configurations, self.parameters, self.elements
        )
        self.pseudo = pseudo_labels(inputs, self.labels, self.parameters, self.elements)
        self.n_labels = len(self.labels)

    def __len__(self) -> int:
        return len(self.described)

    def network(self, seed: int, member: int) -> Network:
        """Return the network that a member starts from."""
        network = new_network(self, (DFT_HEAD,), seed=seed)
        if self.inputs.members:
            source = self.inputs.members[member % len(self.inputs.members)]
            network.trunk.load_state_dict(source.trunk.state_dict())
            copy_head(network, DFT_HEAD, source, energy_head(source))
            network.heads.scale.copy_(source.heads.scale)
            shake(network, self.settings.training.head_noise, seed)
        else:
            residual = fit_referenced(self.configurations, self.labels.energy[:, 0])
            network.heads.scale.fill_(energy_scale(residual))
        self._fit_reference(network)
        return network

    def loss(self, network: Network, rows: IntArray, step: Step) -> Loss:
        """Return the loss of energies, forces and stress, and of the pseudo-labels."""
        batch = with_gradient(self.described.batch(rows))
        weights, labels = self.settings.training, self.labels
        energy = network.energies(network.trunk(batch), batch.graph)[:, 0]
        wanted = self._target(network, batch, labels.energy[rows, 0])
        per_atom = (energy - wanted) / batch.graph.n_atoms
        slopes = derivatives(energy, batch, trainable=True)
        atoms = ragged_rows(self.configurations.offsets, rows)
        error = slopes.forces - torch.from_numpy(labels.forces[0, atoms])
        value = weights.energy_weight * huber(per_atom, HUBER_ENERGY)
        value = value + weights.forces_weight * huber(error, HUBER_FORCES)
        if weights.stress_weight:
            virial = virial_error(slopes.virial, labels.stress[rows, 0], batch)
            value = value + weights.stress_weight * huber(virial, HUBER_ENERGY)
        if self.pseudo is not None and step.progress < PSEUDO_END and weights.pseudo_weight:
            fading = weights.pseudo_weight * (1 - step.progress / PSEUDO_END)
            value = value + fading * weights.energy_weight * self._pseudo_loss(network, step)
        return Loss(value, {"energy_mae": absolute(per_atom), "forces_mae": absolute(error)})

    def finish(self, network: Network) -> None:
        """Fit the standardisation of the pooled features."""
        fit_pooling(network, self.statistics.described)

    def _target(self, network: Network, batch: Batch, energy: FloatArray) -> Tensor:
        return torch.from_numpy(energy) - network.heads.references(batch.graph)[:, 0]

    def _pseudo_loss(self, network: Network, step: Step) -> Tensor:
        pseudo = self.pseudo
        assert pseudo is not None
        n_drawn = min(self.settings.training.batch_size, len(pseudo.energy))
        rows = step.rng.choice(len(pseudo.energy), n_drawn, replace=False)
        batch = pseudo.described.batch(rows)
        energy = network.energies(network.trunk(batch), batch.graph)[:, 0]
        residual = (
            energy - self._target(network, batch, pseudo.energy[rows])
        ) / batch.graph.n_atoms
        # An EIP is wrong by design somewhere: its labels pull, but the less the farther away.
        each = nn.functional.huber_loss(
            residual, torch.zeros_like(residual), reduction="none", delta=HUBER_ENERGY / 4
        )
        return (torch.from_numpy(pseudo.weight[rows]) * each).mean()

    def _fit_reference(self, network: Network) -> None:
        """Let the references explain what the network does not yet."""
        with torch.no_grad():
            predicted = torch.cat(
                [
                    network.energies(network.trunk(batch), batch.graph)[:, 0]
                    for batch in batches_of(self.described)
                ]
            )
        residual = self.labels.energy[:, 0] - predicted.numpy()
        reference = fit_reference_energies(self.configurations, residual)
        if unknown := sorted(set(self.elements) - set(reference)):
            LOGGER.warning(
                "no DFT label contains %s: energies of such configurations have no true zero",
                symbols_of(unknown),
            )
        mean = float(np.mean(list(reference.values())))
        values = [reference.get(element, mean) for element in self.elements]
        network.heads.reference[0] = torch.tensor(values, dtype=torch.float64)


class EipTargets(NamedTuple):
    """What the heads of ``m`` EIPs and of their consensus learn.

    Parameters
    ----------
    configurations
        Those with at least one label, ``n`` of them.
    sources
        The EIPs.
    reference
        Reference energies in eV; zero for the consensus. Shape ``(m + 1, n_elements)``.
    scale
        Robust spread of the energies per atom, in eV.
    energy
        Energies less the references, in eV; NaN where there is none. Shape ``(n, m + 1)``.
    forces
        In eV/Å. Shape ``(m + 1, N, 3)``.
    known
        Where there is a label. Shape ``(n, m + 1)``.
    """

    configurations: Configurations
    sources: tuple[str, ...]
    reference: FloatArray
    scale: float
    energy: FloatArray
    forces: FloatArray
    known: BoolArray


def eip_targets(
    configurations: Configurations, labels: Labels, elements: tuple[int, ...]
) -> EipTargets:
    """Return what is learnt from EIP labels: each EIP on its own zero, and their median.

    Raises
    ------
    ValueError
        If there is not one label.
    """
    part = configurations.take(configurations.rows_of(labels.ids))
    known, reference = usable_labels(part, labels, elements)
    rows = np.flatnonzero(known.any(axis=1))
    if not len(rows):
        raise ValueError(
            f"not one of {len(labels)} configurations has a usable label of "
            f"{', '.join(map(str, labels.sources))}; see why in the labels"
        )
    part, labels, known = part.take(rows), labels.take(rows), known[rows]
    counts = count_elements(part, np.array(elements))
    energy = np.where(known, labels.energy - counts @ reference.T, np.nan)
    per_atom = np.repeat(known, part.n_atoms, axis=0).T[:, :, None]
    forces = np.where(per_atom, labels.forces, np.nan)
    # Every configuration has a label left, so no median is empty.
    consensus, pull = np.nanmedian(energy, axis=1), np.nanmedian(forces, axis=0)
    return EipTargets(
        configurations=part,
        sources=tuple(map(str, labels.sources)),
        reference=np.concatenate([reference, np.zeros((1, len(elements)))]),
        scale=energy_scale((energy / part.n_atoms[:, None])[known]),
        energy=np.column_stack([energy, consensus]),
        forces=np.concatenate([forces, pull[None]]),
        known=np.column_stack([known, np.ones(len(rows), bool)]),
    )


def usable_labels(
    configurations: Configurations, labels: Labels, elements: tuple[int, ...]
) -> tuple[BoolArray, FloatArray]:
    """Return which EIP labels are learnt, shape ``(n, m)``, and the references of the EIPs.

    An energy far off on either side is left out: one atom too close to another one would outweigh
    all others. References have shape ``(m, n_elements)``, in eV.
    """
    finite = np.isfinite(np.abs(labels.forces).sum(axis=2)).astype(np.int64)
    n_finite = np.add.reduceat(finite, labels.offsets[:-1], axis=1).T
    known = labels.ok & np.isfinite(labels.energy) & (n_finite == labels.n_atoms[:, None])
    reference = np.zeros((len(labels.sources), len(elements)))
    counts = count_elements(configurations, np.array(elements))
    for column in range(len(labels.sources)):
        for _ in range(5):
            rows = np.flatnonzero(known[:, column])
            if not len(rows):
                break
            fitted = fit_reference_energies(configurations.take(rows), labels.energy[rows, column])
            reference[column] = [fitted.get(element, 0.0) for element in elements]
            residual = labels.energy[rows, column] - counts[rows] @ reference[column]
            far = outliers(residual / configurations.n_atoms[rows])
            if not far.any():
                break
            known[rows[far], column] = False
    return known, reference


def outliers(values: FloatArray) -> BoolArray:
    """Return which values are beyond ``OUTLIER_SIGMA`` robust standard deviations."""
    deviation = np.abs(values - np.median(values))
    # The floor, in eV/atom, matters where more than half of the values are equal.
    return np.asarray(deviation > OUTLIER_SIGMA * max(1.4826 * float(np.median(deviation)), 1e-3))


def choose_heads(known: BoolArray, rng: np.random.Generator) -> IntArray:
    """Draw one head with a label for each configuration; the last one is the consensus."""
    chance = rng.random(known.shape)
    # The largest number among the EIPs with a label draws one of them evenly.
    drawn: IntArray = np.where(known[:, :-1], chance[:, :-1], -1.0).argmax(axis=1)
    drawn[chance[:, -1] < CONSENSUS_SHARE] = known.shape[1] - 1
    return drawn


def pseudo_labels(
    inputs: StageInputs, labels: Labels, parameters: NetworkParameters, elements: tuple[int, ...]
) -> PseudoLabels | None:
    """Return the aligned energies of the chosen EIPs where there is no DFT label.

    ``None`` without a selection, or where it believes no EIP anywhere.

    Raises
    ------
    ValueError
        If there is a selection but no EIP labels, or if they are of other EIPs.
    """
    if inputs.selection is None:
        return None
    eip_labels = _need(inputs.eip_labels, "fine-tuning with a selection", "the EIPs' labels")
    if inputs.selection.sources[:-1].tolist() != eip_labels.sources.tolist():
        raise ValueError(
            f"the selection is among {inputs.selection.sources[:-1].tolist()}, but the EIP labels "
            f"are of {eip_labels.sources.tolist()}; give the labels that the selection was made of"
        )
    selected = {str(name) for name in inputs.selection.ids} - set(map(str, labels.ids))
    free = np.array([str(name) in selected for name in eip_labels.ids], dtype=bool)
    alignment = fit_alignment(inputs.configurations, labels, eip_labels)
    aligned = alignment.apply(inputs.configurations, eip_labels.take(np.flatnonzero(free)))
    choice = inputs.selection.take(aligned.ids)
    energy = np.column_stack([aligned.energy, np.full(len(aligned), np.nan)])
    chosen = energy[np.arange(len(aligned)), choice.choice]
    use = np.flatnonzero(np.isfinite(chosen))
    if not len(use):
        return None
    rows = inputs.configurations.rows_of(aligned.ids[use])
    described = describe_configurations(inputs.configurations.take(rows), parameters, elements)
    weight = choice.probabilities[use, choice.choice[use]]
    return PseudoLabels(described, chosen[use], weight)


def prepare(name: str, inputs: StageInputs, settings: StageSettings) -> Stage:
    """Prepare a stage: ``pretrain``, ``classify`` or ``finetune``.

    Raises
    ------
    ValueError
        If labels that the stage needs are missing, or if labels are of unknown configurations.
    """
    for what, labels in (("DFT", inputs.labels), ("EIP", inputs.eip_labels)):
        if labels is not None:
            _check_known(inputs.configurations, labels, what)
    stage: Stage = STAGES[name](inputs, settings)
    return stage


def new_network(
    stage: "Pretraining | Classification | Finetuning",
    heads: tuple[str, ...] | list[str],
    classes: tuple[str, ...] = (),
    *,
    seed: int,
) -> Network:
    """Return a network with random weights whose descriptors are standardised."""
    network = Network(stage.parameters, stage.elements, heads, classes)
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
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    with torch.no_grad():
        weight.add_(noise * weight.square().mean().sqrt() * drawn)


def energy_scale(per_atom: FloatArray) -> float:
    """Return the robust spread of energies per atom, in eV; 1 where they are all equal."""
    deviation = np.abs(per_atom - np.median(per_atom))
    spread = max(1.4826 * float(np.median(deviation)), 0.1 * float(np.std(per_atom)))
    return spread if spread > 1e-6 else 1.0


def fit_referenced(configurations: Configurations, energy: FloatArray) -> FloatArray:
    """Return energies per atom less fitted references, in eV/atom. Shape ``(n,)``."""
    fitted = fit_reference_energies(configurations, energy)
    counts = count_elements(configurations, np.array(list(fitted)))
    residual: FloatArray = energy - counts @ np.array(list(fitted.values()))
    return residual / configurations.n_atoms


def virial_error(virial: Tensor, stress: FloatArray, batch: Batch) -> Tensor:
    """Return the errors of the virial per atom, in eV/atom, where there is a stress."""
    wanted = torch.from_numpy(stress) * batch.graph.volumes[:, None]
    error = (virial - wanted.nan_to_num()) / batch.graph.n_atoms[:, None]
    return error[torch.isfinite(wanted)]


def huber(residual: Tensor, delta: float) -> Tensor:
    """Return the mean Huber loss; 0 of nothing."""
    if not residual.numel():
        return torch.zeros((), dtype=torch.float64)
    return nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=delta)


def absolute(residual: Tensor) -> tuple[float, int]:
    """Return the sum of absolute values, and how many there are."""
    return float(residual.detach().abs().sum()), residual.numel()


def _need(labels: Labels | None, stage: str, what: str) -> Labels:
    if labels is None or not len(labels):
        raise ValueError(f"{stage} needs {what}, and there is not one")
    return labels


def _check_known(configurations: Configurations, labels: Labels, what: str) -> None:
    unknown = np.setdiff1d(labels.ids, configurations.ids)
    if len(unknown):
        raise ValueError(
            f"{len(unknown)} of {len(labels)} {what} labels are of configurations that are not in "
            f"the sets given, such as {unknown[0]}; give the set that they were made of too"
        )


STAGES: dict[str, type[Pretraining | Classification | Finetuning]] = {
    "pretrain": Pretraining,
    "classify": Classification,
    "finetune": Finetuning,
}
