"""The stage that learns DFT labels: from scratch, or from what EIPs taught before.

With few labels a network forgets what it had learnt from EIPs long before it has learnt DFT. So
the heads of the EIPs stay in the loss (replay), and the head of DFT starts as the combination of
them that fits the DFT labels best.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from aiida_eipnn.science.arrays import IntArray
from aiida_eipnn.science.configurations import Configurations, ragged_rows
from aiida_eipnn.science.eip.potential import symbols_of
from aiida_eipnn.science.eip.pseudo_labels import (
    HALF_BELIEVED_ENERGY,
    HALF_BELIEVED_FORCES,
    PseudoLabels,
    pseudo_labels_of_selection,
    pseudo_weights,
)
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.device import ON_CPU, array_of
from aiida_eipnn.science.nn.directions import DrawnDirections, directed_set, forces_along
from aiida_eipnn.science.nn.eip_targets import eip_targets
from aiida_eipnn.science.nn.head_start import SMALL_ENERGY, SMALL_FORCE, combine_heads
from aiida_eipnn.science.nn.heads import CONSENSUS, DFT_HEAD
from aiida_eipnn.science.nn.labelled_atoms import fit_density
from aiida_eipnn.science.nn.last_layer import draw_weights, fit_last_layer
from aiida_eipnn.science.nn.losses import absolute, huber, virial_error, weighted_huber
from aiida_eipnn.science.nn.network import (
    Network,
    NetworkParameters,
    batches_of,
    derivatives,
    describe_configurations,
    fit_pooling,
    with_gradient,
)
from aiida_eipnn.science.nn.pretraining import EipTask
from aiida_eipnn.science.nn.shares import WHOLE, Share
from aiida_eipnn.science.nn.sizes import BATCH_EDGES, Sizes
from aiida_eipnn.science.nn.stage import (
    LOGGER,
    StageInputs,
    StageSettings,
    Statistics,
    copy_head,
    energy_scale,
    less_references,
    need_labels,
    network_parameters,
    new_network,
    predict_batch,
    shake,
)
from aiida_eipnn.science.nn.training import EIP_START, Loss, Step
from aiida_eipnn.science.reference import count_elements, fit_reference_energies
from aiida_eipnn.science.verdict import SCORE

# From these residuals on the loss is linear, so that the mean error counts and not the largest
# ones: energies in eV/atom, forces in eV/Å.
HUBER_ENERGY = 0.02
HUBER_FORCES = 0.1
# In the last part of the training there are no pseudo-labels.
PSEUDO_END = 0.8
# Configurations that EIP heads are held by, and how many of them in a step.
MAX_REPLAY = 3000
REPLAY_BATCH = 16
PSEUDO_BATCH = 32
# Held-out configurations that are predicted at once.
_BATCH = 64


class PseudoErrors(NamedTuple):
    """Errors on some pseudo-labels: which ones, in eV/atom, and of forces along a direction."""

    rows: IntArray
    energy: Tensor
    along: Tensor


class PseudoTask:
    """Pseudo-labels where DFT has none.

    Parameters
    ----------
    configurations
        Must contain every configuration with a pseudo-label.
    labels
        The pseudo-labels.
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
        configurations: Configurations,
        labels: PseudoLabels,
        parameters: NetworkParameters,
        elements: tuple[int, ...],
        device: torch.device = ON_CPU,
        batch_edges: int = BATCH_EDGES,
    ) -> None:
        part = configurations.take(configurations.rows_of(labels.ids))
        self.labels = labels
        self.counts = count_elements(part, np.array(elements))
        self.directed = directed_set(
            part, parameters, elements, seed=1, device=device, batch_edges=batch_edges
        )
        self.believed, self.pulled = (
            torch.as_tensor(pseudo_weights(error, half), device=device)
            for error, half in (
                (labels.energy_error, HALF_BELIEVED_ENERGY),
                (labels.forces_error, HALF_BELIEVED_FORCES),
            )
        )

    def loss(
        self,
        network: Network,
        rng: np.random.Generator,
        energy_weight: float,
        share: Share = WHOLE,
    ) -> Tensor:
        """Return the loss of a share of some of them."""
        errors, n = self.errors(network, rng, share), self._n_at_once
        believed, pulled = self.believed[errors.rows], self.pulled[errors.rows]
        value = energy_weight * weighted_huber(errors.energy, believed, HUBER_ENERGY, n)
        return value + weighted_huber(errors.along, pulled, HUBER_FORCES, n)

    @property
    def _n_at_once(self) -> int:
        return min(PSEUDO_BATCH, len(self.labels))

    def draw(self, rng: np.random.Generator) -> IntArray:
        """Return those that a step learns from."""
        return rng.choice(len(self.labels), self._n_at_once, replace=False)

    def errors(
        self, network: Network, rng: np.random.Generator, share: Share = WHOLE
    ) -> PseudoErrors:
        """Return the errors of a share of some of them."""
        labels, row = self.labels, network.heads.row(DFT_HEAD)
        rows = self.draw(rng)
        moved = self.directed.move(network, rows, rng, share)
        rows = share.of(rows)
        n_atoms = np.diff(labels.offsets)[rows]
        shift = self.counts[rows] @ array_of(network.heads.reference[row])
        atoms = ragged_rows(labels.offsets, rows)
        along = forces_along(labels.forces[None, atoms], moved.directions, n_atoms)[:, 0]
        wanted = (labels.energy[rows] - shift) / n_atoms
        energy, forces = (
            said[:, row] - torch.as_tensor(values, device=said.device)
            for said, values in ((moved.energies, wanted), (moved.along, along))
        )
        return PseudoErrors(rows, energy, forces)


class Teachers(NamedTuple):
    """What is learnt beside the DFT labels: what holds the EIP heads, and pseudo-labels."""

    replay: EipTask | None
    pseudo: PseudoTask | None


class Finetuning:
    """Learn DFT energies and forces, from the heads of the EIPs or from scratch."""

    defaults: Mapping[str, Any] = {
        "steps": 1000,
        # Every label is seen that often, however many there are.
        "min_epochs": 20,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "ema_decay": 0.99,
    }

    def __init__(
        self, inputs: StageInputs, settings: StageSettings, teachers: Teachers | None = None
    ) -> None:
        labels = need_labels(inputs.labels, "fine-tuning", "DFT labels")
        self.settings, self.inputs, self.labels = settings, inputs, labels
        self.parameters = network_parameters(inputs, settings)
        self.statistics = Statistics(inputs, self.parameters, settings)
        self.elements = self.statistics.elements
        configurations = inputs.configurations
        self.configurations = configurations.take(configurations.rows_of(labels.ids))
        self.described = describe_configurations(
            self.configurations,
            self.parameters,
            self.elements,
            device=settings.device,
            batch_edges=settings.edges_at_once,
        )
        self._sizes = self.described.neighbours.sizes
        # Those of another training on the same inputs serve as well, and take long to prepare.
        self.teachers = teachers or Teachers(
            replay_task(inputs, settings, self.parameters, self.elements),
            pseudo_task(inputs, settings, labels, self.parameters, self.elements),
        )
        # Those that are held out were paid for too.
        self.n_labels = len(labels)
        self.learnt, self.held_out = hold_out(
            labels, settings.training.validation_fraction, judges=inputs.judges
        )

    def for_member(self, member: int) -> Self:
        """Return the task of a member: each holds out other labels."""
        task = copy.copy(self)
        fraction = self.settings.training.validation_fraction
        task.learnt, task.held_out = hold_out(self.labels, fraction, member, self.inputs.judges)
        return task

    def __len__(self) -> int:
        return len(self.learnt)

    @property
    def heads(self) -> tuple[str, ...]:
        """DFT, then what is held by replay."""
        replay = self.teachers.replay
        return (DFT_HEAD, *(replay.names if replay is not None else ()))

    @property
    def class_names(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def n_drawn(self) -> int:
        """As many as the settings ask for; one is the head of DFT itself."""
        n_heads = self.settings.training.n_heads
        return n_heads if n_heads > 1 else 0

    def network(self, seed: int, member: int) -> Network:
        """Return the network that a member starts from."""
        members = self.inputs.members
        source = members[member % len(members)] if members else None
        network = new_network(self, seed)
        if source is None:
            known = self.configurations.take(self.learnt)
            residual = less_references(known, self.labels.energy[self.learnt, 0])
            network.heads.scale.fill_(energy_scale(residual))
        else:
            self._transfer(network, source, seed)
        self._fit_reference(network)
        return network

    def loss(self, network: Network, rows: IntArray, step: Step) -> Loss:
        """Return the loss of energies, forces and stress, of pseudo-labels and of replay."""
        value, sums = self._loss_of_labels(network, self.learnt[rows], step.share)
        return Loss(value + self.knowledge(network, step), sums)

    def sizes(self, rows: IntArray, step: Step) -> Sequence[Sizes]:
        """Return the sizes of these configurations, and of those that EIPs are asked about."""
        return [self._sizes.take(self.learnt[rows]), *self._sizes_of_knowledge(step)]

    def _sizes_of_knowledge(self, step: Step) -> Iterator[Sizes]:
        """Yield the sizes of what :meth:`knowledge` draws, and draw what it does."""
        replay, pseudo = self.teachers.replay, self._pseudo_at(step)
        if replay is not None:
            rows = _draw_replay(replay, step.rng)
            yield replay.directed.sizes.take(rows)
            replay.directed.draw(rows, step.rng)
        if pseudo is not None:
            yield pseudo.directed.sizes.take(pseudo.draw(step.rng))

    def _loss_of_labels(self, network: Network, whole: IntArray, share: Share) -> Loss:
        """Return the loss of a share of these labels."""
        rows = share.of(whole)
        if not len(rows):
            nothing = torch.zeros((), device=network.device)
            return Loss(nothing, {"energy_mae": (0.0, 0), "forces_mae": (0.0, 0)})
        batch = with_gradient(self.described.batch(rows))
        weights, labels = self.settings.training, self.labels
        row = network.heads.row(DFT_HEAD)
        energy = network.energies(network.trunk(batch), batch.graph)[:, row]
        wanted = torch.as_tensor(labels.energy[rows, 0], device=energy.device)
        wanted = wanted - network.heads.references(batch.graph)[:, row]
        per_atom = (energy - wanted) / batch.graph.n_atoms
        slopes = derivatives(energy, batch, trainable=True)
        atoms = ragged_rows(self.configurations.offsets, rows)
        error = slopes.forces - torch.as_tensor(labels.forces[0, atoms], device=energy.device)
        value = weights.energy_weight * huber(per_atom, HUBER_ENERGY, len(whole))
        n_components = 3 * int(labels.n_atoms[whole].sum())
        value = value + weights.forces_weight * huber(error, HUBER_FORCES, n_components)
        if weights.stress_weight:
            virial = virial_error(slopes.virial, labels.stress[rows, 0], batch)
            value = value + weights.stress_weight * huber(
                virial, HUBER_ENERGY, self._count_stresses(whole)
            )
        return Loss(value, {"energy_mae": absolute(per_atom), "forces_mae": absolute(error)})

    def _count_stresses(self, rows: IntArray) -> int:
        """Return how many components of the stress there are to learn."""
        volumes = self.described.neighbours.volumes[rows]
        return int(np.isfinite(self.labels.stress[rows, 0] * volumes[:, None]).sum())

    def validate(self, network: Network) -> dict[str, float]:
        """Return the errors on labels that are held out."""
        rows = self.held_out
        if not len(rows):
            return {}
        size = max(1, _BATCH // self.settings.batch_parts)
        batches = self._sizes.take(rows).batches(size, self.settings.edges_at_once)
        parts = [predict_batch(network, self.described.batch(rows[batch])) for batch in batches]
        energy, forces = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("energy", "forces")
        )
        known = self.labels.take(rows)
        wrong = (energy - known.energy[:, 0]) / known.n_atoms
        energy_mae = float(np.abs(wrong).mean())
        forces_mae = float(np.abs(forces - known.forces[0]).mean())
        return {
            "validation_energy_mae": energy_mae,
            "validation_forces_mae": forces_mae,
            # Relative improvements of both count alike; what is as good as exact counts no more.
            SCORE: math.log(energy_mae + SMALL_ENERGY) + math.log(forces_mae + SMALL_FORCE),
        }

    def finish(self, network: Network, seed: int) -> None:
        """Fit the standardisation of the pooled features, and how unsure features make it."""
        edges = self.settings.edges_at_once
        fit_pooling(network, self.statistics.described, edges)
        known = network.feature_uncertainty
        if known is None:
            return
        rng = np.random.default_rng([seed, 4])
        root = fit_last_layer(
            network,
            DrawnDirections(self.described, edges),
            self.configurations,
            self.labels,
            self.learnt,
            self.held_out,
            rng,
        )
        centres, density = fit_density(network, self.described, edges)
        fitted = {"last_layer": root, "centres": centres, "density": density}
        if self.n_drawn:
            trained = network.heads.weight[network.heads.row(DFT_HEAD)]
            fitted["heads"] = draw_weights(array_of(trained.double()), root, self.n_drawn, rng)
        for name, values in fitted.items():
            getattr(known, name).copy_(torch.as_tensor(values))

    def knowledge(self, network: Network, step: Step) -> Tensor:
        """Return the loss of what EIPs say."""
        weights = self.settings.training
        value = torch.zeros((), device=network.device)
        replay, pseudo = self.teachers.replay, self._pseudo_at(step)
        if replay is not None:
            rows = _draw_replay(replay, step.rng)
            errors = replay.errors(network, rows, step.rng, weights, step.share)
            value = value + weights.replay_weight * errors.loss
        if pseudo is not None:
            fading = weights.pseudo_weight * (1 - step.progress / PSEUDO_END)
            loss = pseudo.loss(network, step.rng, weights.energy_weight, step.share)
            value = value + fading * loss
        return value

    def _pseudo_at(self, step: Step) -> PseudoTask | None:
        """Return the pseudo-labels, where a step learns them."""
        learnt = step.progress < PSEUDO_END and self.settings.training.pseudo_weight
        return self.teachers.pseudo if learnt else None

    def _transfer(self, network: Network, source: Network, seed: int) -> None:
        """Take over the trunk and the heads, and start the head of DFT from them."""
        heads = network.heads
        network.trunk.load_state_dict(source.trunk.state_dict())
        heads.scale.copy_(source.heads.scale)
        teachers = [name for name in source.heads.names if name not in (DFT_HEAD, CONSENSUS)]
        with torch.no_grad():
            for name in set(heads.names) & set(source.heads.names):
                copy_head(network, name, source, name)
                old = source.heads.reference[source.heads.row(name)]
                heads.reference[heads.row(name)] = old
            wanted = self.settings.training.head_start == EIP_START
            if wanted and teachers and DFT_HEAD not in source.heads.names:
                self._start_head(network, source, seed)
        shake(network, self.settings.training.head_noise, seed)

    def _start_head(self, network: Network, source: Network, seed: int) -> None:
        """Let the head of DFT be the combination of EIP heads that fits its labels."""
        fitted = combine_heads(
            source,
            DrawnDirections(self.described, self.settings.edges_at_once),
            self.configurations,
            self.labels,
            self.learnt,
            np.random.default_rng([seed, 3]),
        )
        shares = torch.as_tensor(fitted).to(network.heads.weight)
        row = network.heads.row(DFT_HEAD)
        network.heads.weight[row] = shares @ source.heads.weight
        network.heads.bias[row] = shares @ source.heads.bias

    def _fit_reference(self, network: Network) -> None:
        """Let the references explain what the network does not yet."""
        row = network.heads.row(DFT_HEAD)
        with torch.no_grad():
            predicted = torch.cat(
                [
                    network.energies(network.trunk(batch), batch.graph)[:, row]
                    for batch in batches_of(self.described, self.settings.edges_at_once)
                ]
            )
        residual = self.labels.energy[:, 0] - array_of(predicted)
        known = self.configurations.take(self.learnt)
        reference = fit_reference_energies(known, residual[self.learnt])
        if unknown := sorted(set(self.elements) - set(reference)):
            LOGGER.warning(
                "no DFT label contains %s: energies of such configurations have no true zero",
                symbols_of(unknown),
            )
        mean = float(np.mean(list(reference.values())))
        values = [reference.get(element, mean) for element in self.elements]
        network.heads.reference[row] = torch.as_tensor(np.array(values))


def hold_out(
    labels: Labels, fraction: float, member: int = 0, judges: Sequence[str] = ()
) -> tuple[IntArray, IntArray]:
    """Return rows of labels to learn, and rows to judge by.

    The same for a member every time, and others for the next, until each was held out once.

    Parameters
    ----------
    labels
        All there are.
    fraction
        Part of those that may judge to hold out.
    member
        Number of the member.
    judges
        Ids of those that may judge; all where none of them is there.

    Raises
    ------
    ValueError
        If there are too few for both.
    """
    allowed = np.flatnonzero(np.isin(labels.ids, judges))
    if not len(allowed):
        allowed = np.arange(len(labels))
    n_held = math.ceil(fraction * len(allowed))
    if fraction and n_held >= len(labels):
        raise ValueError(
            f"validation_fraction {fraction} of {len(labels)} DFT labels leaves none to learn "
            "from; lower it, or set it to 0"
        )
    # By id, so that the order in which labels came does not matter.
    order = allowed[np.argsort(labels.ids[allowed], kind="stable")]
    order = order[np.random.default_rng(0).permutation(len(order))]
    held = np.sort(order[(member * n_held + np.arange(n_held)) % len(order)])
    return np.setdiff1d(np.arange(len(labels)), held), held


def replay_task(
    inputs: StageInputs,
    settings: StageSettings,
    parameters: NetworkParameters,
    elements: tuple[int, ...],
) -> EipTask | None:
    """Return what holds the heads of the EIPs; ``None`` where there are none to hold.

    Raises
    ------
    ValueError
        If the EIP labels are of other EIPs than the network learnt from.
    """
    if not (inputs.members and inputs.eip_labels and settings.training.replay_weight):
        return None
    heads, labels = inputs.members[0].heads, inputs.eip_labels
    sources = tuple(map(str, labels.sources))
    if missing := [name for name in sources if name not in heads.names]:
        raise ValueError(
            f"the network to fine-tune has no heads for {missing}, only {list(heads.names)}; give "
            "the labels of the EIPs that it was pre-trained on, or set replay_weight to 0"
        )
    # An even part of the set, the same for all members.
    n = len(labels)
    rows = np.unique(np.linspace(0, n - 1, min(n, MAX_REPLAY)).astype(np.int64))
    reference = array_of(heads.reference)[[heads.row(name) for name in sources]]
    targets = eip_targets(inputs.configurations, labels.take(rows), elements, reference)
    return EipTask(targets, parameters, elements, settings.device, settings.edges_at_once)


def _draw_replay(replay: EipTask, rng: np.random.Generator) -> IntArray:
    """Return the configurations of a step that EIP heads are held by."""
    return rng.choice(len(replay), min(REPLAY_BATCH, len(replay)), replace=False)


def pseudo_task(
    inputs: StageInputs,
    settings: StageSettings,
    labels: Labels,
    parameters: NetworkParameters,
    elements: tuple[int, ...],
) -> PseudoTask | None:
    """Return the pseudo-labels where there is no DFT label; ``None`` where there are none.

    Raises
    ------
    ValueError
        If there is a selection but no EIP labels, or if they are of other EIPs.
    """
    pseudo = inputs.pseudo
    if inputs.selection is not None:
        said = need_labels(inputs.eip_labels, "fine-tuning with a selection", "the EIPs' labels")
        pseudo = pseudo_labels_of_selection(inputs.configurations, labels, said, inputs.selection)
    if pseudo is None:
        return None
    known = pseudo.take(pseudo.ids[np.isfinite(pseudo.energy_error)])
    if not len(known):
        return None
    return PseudoTask(
        inputs.configurations,
        known,
        parameters,
        elements,
        settings.device,
        settings.edges_at_once,
    )
