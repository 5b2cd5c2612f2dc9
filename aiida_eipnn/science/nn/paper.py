r"""The method of Shui et al. as published: the baseline that ours is measured against.

A classifier learns from DFT labels which EIP is right where; its choice makes pseudo-labels
(strategy 1). Heads for the energies of all EIPs pre-train a trunk (strategy 2). Both together train
the trunk of strategy 2 on the labels of strategy 1. Targets are total energies, without reference,
and nothing but energies is learnt [1]_.

This is the baseline as published, so it keeps its own schedule: Adam, rates by epoch, the last
batch of an epoch dropped, and the weights of the epoch that is best in validation. Every random
choice is drawn from the seed and the epoch.

References
----------
.. [1] Shui et al., Injecting Domain Knowledge from Empirical Interatomic Potentials to Neural
   Networks for Predicting Material Properties, NeurIPS 2022, arXiv:2210.08047.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aiida_eipnn.science.arrays import FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.selection import (
    NONE,
    SelectionParameters,
    class_labels,
    select,
)
from aiida_eipnn.science.labels import DFT, Labels
from aiida_eipnn.science.nn.losses import PseudoWeight, masked_mse, mse_with_pseudo_labels
from aiida_eipnn.science.nn.paper_network import (
    PaperNetwork,
    PaperSet,
    forces_of,
    paper_set,
    with_vector_gradient,
)
from aiida_eipnn.science.nn.paper_parameters import AFFINE, PaperParameters
from aiida_eipnn.science.nn.paper_parameters import NONE as NOT_ALIGNED
from aiida_eipnn.science.nn.training import Diverged
from aiida_eipnn.science.reference import MIN_LABELS_FOR_SCALE, fit_alignment

__all__ = [
    "PaperInputs",
    "PaperNetwork",
    "PaperParameters",
    "PaperPrediction",
    "PaperTraining",
    "PseudoLabels",
    "align_eips",
    "linear_decay",
    "n_steps",
    "noisy_pseudo_labels",
    "oracle_pseudo_labels",
    "paper_classes",
    "predict",
    "pretrain",
    "pseudo_labels",
    "pseudo_weight",
    "slanted_triangle",
    "train",
    "train_classifier",
]

# Energies of EIPs above this, in eV/atom, are not learnt. As published, there is no lower bound.
MAX_ENERGY = 200.0
# The rate rises for a fifth of the epochs, from a 32nd.
RISE, RISE_FROM = 0.2, 32.0
# The linear schedule falls towards this part of its start.
FINAL_RATE = 0.01
# Configurations that are evaluated at once; no result depends on it.
_EVALUATED = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaperInputs:
    """What the method learns from.

    Parameters
    ----------
    configurations
        Every configuration of the labels and of the pool.
    train, validation
        DFT labels, all of them there: to learn from, and to choose the best epoch by.
    eip_labels
        Labels of the EIPs, of the pool and of both sets with DFT labels.
    pool
        Ids of the configurations without DFT label. Shape ``(n_pool,)``.

    Raises
    ------
    ValueError
        If a part has no labels or shares configurations with another one.
    """

    configurations: Configurations
    train: Labels
    validation: Labels
    eip_labels: Labels | None = None
    pool: StrArray = field(default_factory=lambda: np.zeros(0, "<U32"))

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            labels = getattr(self, name)
            if not len(labels) or len(labels.sources) != 1 or not labels.ok.all():
                raise ValueError(
                    f"{name} must have labels of one source, none of them missing: got "
                    f"{len(labels)} of {labels.sources.tolist()}, {(~labels.ok).sum()} missing"
                )
        parts = np.concatenate([self.train.ids, self.validation.ids, self.pool])
        values, counts = np.unique(parts, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"configuration {values[counts > 1][0]} is in two of train, validation and pool, "
                "or twice in one of them; each may have it once"
            )

    def part(self, ids: StrArray) -> Configurations:
        """Return the configurations with these ids."""
        return self.configurations.take(self.configurations.rows_of(ids))


class PseudoLabels(NamedTuple):
    """Energies to train on beside those of DFT.

    ``ids`` of the configurations, ``energy`` in eV, and ``choice``, the column of the EIP that each
    comes from (-1 where it comes from none). Shape ``(n,)`` each.
    """

    ids: StrArray
    energy: FloatArray
    choice: IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaperTraining:
    """A training that is complete.

    Parameters
    ----------
    network
        With the weights of the best epoch.
    history
        Of each epoch: ``epoch``, ``learning_rate``, ``loss``, and ``validation``, which is the mean
        absolute error of the total energy in eV, or for a classifier the part that is wrong.
    best_epoch
        Counted from 1.
    n_steps
        Steps that were taken.
    """

    network: PaperNetwork
    history: tuple[dict[str, float], ...]
    best_epoch: int
    n_steps: int


class PaperPrediction(NamedTuple):
    """Energies in eV, shape ``(n,)``, and forces in eV/Å, shape ``(N, 3)``."""

    energy: FloatArray
    forces: FloatArray


class _Stage(NamedTuple):
    """What one training consists of.

    ``loss`` takes the outputs and rows of a batch of ``train``; ``score`` takes all outputs for
    ``validation``, and is better the lower it is; ``rate`` is the factor on the learning rate in an
    epoch out of so many.
    """

    train: PaperSet
    validation: PaperSet
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor], float]
    rate: Callable[[int, int], float]


def train_classifier(
    inputs: PaperInputs, parameters: PaperParameters, *, seed: int
) -> PaperTraining:
    """Learn which EIP is right for a configuration, or that none is (strategy 1, first step).

    From scratch, by unweighted cross-entropy on the training part; the best epoch has the highest
    accuracy in validation.
    """
    if parameters.batch_size < 2:
        raise ValueError("the classifier normalises over a batch: take a batch_size from 2 on")
    eips = align_eips(inputs, parameters)
    wanted = torch.from_numpy(paper_classes(inputs.train, eips, parameters))
    wanted_validation = torch.from_numpy(paper_classes(inputs.validation, eips, parameters))
    network = PaperNetwork(
        parameters,
        inputs.configurations.elements,
        [*map(str, eips.sources), NONE],
        classifies=True,
        seed=seed,
    )
    stage = _Stage(
        train=paper_set(inputs.part(inputs.train.ids), parameters, network.elements),
        validation=paper_set(inputs.part(inputs.validation.ids), parameters, network.elements),
        loss=lambda logits, rows: nn.functional.cross_entropy(logits, wanted[rows]),
        score=lambda logits: float((logits.argmax(dim=1) != wanted_validation).double().mean()),
        rate=slanted_triangle,
    )
    return _fit(network, stage, parameters, seed)


def pretrain(inputs: PaperInputs, parameters: PaperParameters, *, seed: int) -> PaperTraining:
    """Learn the energies of all EIPs on the pool, each with an output of its own (strategy 2).

    All labels weigh the same; those that are missing are left out. The best epoch has the smallest
    error against the EIPs on the validation part.
    """
    eips = align_eips(inputs, parameters)
    pool = _tensor(eips.energy[eips.rows_of(inputs.pool)], parameters)
    validation = _tensor(eips.energy[eips.rows_of(inputs.validation.ids)], parameters)
    for name, energies in (("pool", pool), ("validation part", validation)):
        if not torch.isfinite(energies).any():
            raise ValueError(f"the {name} has no label of an EIP; pre-training needs some")
    network = PaperNetwork(
        parameters, inputs.configurations.elements, [*map(str, eips.sources)], seed=seed
    )
    stage = _Stage(
        train=paper_set(inputs.part(inputs.pool), parameters, network.elements),
        validation=paper_set(inputs.part(inputs.validation.ids), parameters, network.elements),
        loss=lambda energies, rows: masked_mse(energies, pool[rows]),
        score=lambda energies: _mean_error(energies, validation),
        rate=slanted_triangle,
    )
    return _fit(network, stage, parameters, seed)


def train(
    inputs: PaperInputs,
    parameters: PaperParameters,
    *,
    seed: int,
    pseudo: PseudoLabels | None = None,
    pretrained: PaperNetwork | None = None,
) -> PaperTraining:
    """Learn the energy of DFT: from scratch, with pseudo-labels, from a pre-trained trunk, or both.

    Parameters
    ----------
    inputs
        Labels.
    parameters
        Settings.
    seed
        Of the weights and of the order of the batches.
    pseudo
        Pseudo-labels to add.
    pretrained
        The network whose trunk to start from; its head is not used, and nothing is frozen.

    Raises
    ------
    ValueError
        If the trunk is of another architecture, or if a pseudo-label is not of the pool.
    """
    n_pseudo = 0 if pseudo is None else len(pseudo.ids)
    ids, energy = inputs.train.ids, inputs.train.energy[:, 0]
    if pseudo is not None:
        _check_of_pool(pseudo, inputs)
        ids, energy = np.concatenate([ids, pseudo.ids]), np.concatenate([energy, pseudo.energy])
    target = _tensor(energy, parameters)
    is_pseudo = torch.arange(len(ids)) >= len(inputs.train)
    weight = PseudoWeight(
        pseudo_weight(parameters, len(inputs.train), n_pseudo), parameters.tukey_c
    )
    validation = _tensor(inputs.validation.energy, parameters)
    network = PaperNetwork(parameters, inputs.configurations.elements, [DFT], seed=seed)
    if pretrained is not None:
        _copy_trunk(network, pretrained)
    stage = _Stage(
        train=paper_set(inputs.part(ids), parameters, network.elements),
        validation=paper_set(inputs.part(inputs.validation.ids), parameters, network.elements),
        loss=lambda energies, rows: mse_with_pseudo_labels(
            energies[:, 0], target[rows], is_pseudo[rows], weight
        ),
        score=lambda energies: _mean_error(energies, validation),
        rate=linear_decay,
    )
    return _fit(network, stage, parameters, seed)


def align_eips(inputs: PaperInputs, parameters: PaperParameters) -> Labels:
    """Return the EIPs' labels on DFT's zero, as far as ``alignment`` asks for that.

    Energies above ``MAX_ENERGY`` become infinite: they are neither aligned by, nor chosen, nor
    learnt.

    Raises
    ------
    ValueError
        If there are none.
    """
    labels = inputs.eip_labels
    if labels is None or not len(labels):
        raise ValueError("the labels of the EIPs are needed here, and there are none")
    absurd = labels.energy > MAX_ENERGY * labels.n_atoms[:, None]
    if parameters.alignment != NOT_ALIGNED:
        unusable = labels.ok & (absurd | ~np.isfinite(labels.energy))
        labels = replace(
            labels,
            status=np.where(unusable, len(labels.reasons) + 1, labels.status),
            reasons=np.append(labels.reasons, f"no energy, or above {MAX_ENERGY} eV/atom"),
        )
        least = MIN_LABELS_FOR_SCALE if parameters.alignment == AFFINE else None
        alignment = fit_alignment(
            inputs.configurations, inputs.train, labels, min_labels_for_scale=least
        )
        labels = alignment.apply(inputs.configurations, labels)
    return replace(labels, energy=np.where(absurd, np.inf, labels.energy))


def paper_classes(reference: Labels, eips: Labels, parameters: PaperParameters) -> IntArray:
    """Return the class of each configuration of ``reference``: the best EIP, or none of them.

    That of :func:`~aiida_eipnn.science.eip.selection.class_labels`. Without ``nan_fix`` the class
    is, as published, the first EIP without an energy, if there is one.

    Parameters
    ----------
    reference
        DFT labels.
    eips
        From :func:`align_eips`.
    parameters
        Tolerance and ``nan_fix``.
    """
    if parameters.nan_fix:
        return class_labels(reference, eips, SelectionParameters(tolerance=parameters.tolerance))
    part = eips.take(eips.rows_of(reference.ids))
    error = np.abs(part.energy - reference.energy[:, :1]) / part.n_atoms[:, None]
    # NaN is the smallest number to argmin, and not above the tolerance either.
    best = error.argmin(axis=1)
    wrong = error[np.arange(len(best)), best] > parameters.tolerance
    return np.where(wrong, len(part.sources), best).astype(np.int64)


def pseudo_labels(
    classifier: PaperNetwork, inputs: PaperInputs, parameters: PaperParameters
) -> PseudoLabels:
    """Return the energies of the EIPs that the classifier takes for the most probable.

    A configuration is dropped where that is none of them. How probable it is makes no difference.
    An EIP without an energy is not chosen; without ``nan_fix`` it is, and the configuration is
    dropped for want of a label.

    Raises
    ------
    ValueError
        If the network is no classifier of these EIPs.
    """
    eips = align_eips(inputs, parameters)
    if not classifier.classifies or list(classifier.outputs[:-1]) != eips.sources.tolist():
        raise ValueError(
            f"this network tells {list(classifier.outputs)}, but the choice is among "
            f"{eips.sources.tolist()}; train a classifier with these EIPs"
        )
    eips = eips.take(eips.rows_of(inputs.pool))
    logits = _outputs(
        classifier, paper_set(inputs.part(inputs.pool), classifier.settings, classifier.elements)
    )
    probabilities = logits.double().softmax(dim=1).numpy()
    choice = _choose(probabilities, eips, parameters)
    return _chosen_energies(eips, choice)


def oracle_pseudo_labels(
    reference: Labels, inputs: PaperInputs, parameters: PaperParameters
) -> PseudoLabels:
    """Return the energies of the EIPs that are truly best, however wrong: the best case.

    Parameters
    ----------
    reference
        DFT labels of configurations of the pool, which are used for nothing else.
    inputs
        Labels of the EIPs.
    parameters
        Alignment.
    """
    eips = align_eips(inputs, parameters)
    eips = eips.take(eips.rows_of(reference.ids))
    anything = SelectionParameters(tolerance=np.finfo(np.float64).max)
    return _chosen_energies(eips, class_labels(reference, eips, anything))


def noisy_pseudo_labels(
    reference: Labels, mean: float, std: float, rng: np.random.Generator
) -> PseudoLabels:
    """Return energies of DFT with normal errors of this mean and spread, in eV: a control."""
    energy = reference.energy[:, 0] + rng.normal(mean, std, len(reference))
    return PseudoLabels(reference.ids, energy, np.full(len(reference), -1, np.int64))


def pseudo_weight(parameters: PaperParameters, n_labels: int, n_pseudo: int) -> float:
    """Return the weight of all pseudo-labels of a batch together, relative to its labels.

    ``alpha``, times the ratio of labels to pseudo-labels with ``rho``: then each pseudo-label
    weighs less by the square of their number.
    """
    if not n_pseudo:
        return 0.0
    return parameters.alpha * (n_labels / n_pseudo if parameters.rho else 1.0)


def predict(network: PaperNetwork, configurations: Configurations) -> PaperPrediction:
    """Predict energies and forces.

    Raises
    ------
    ValueError
        If the network does not have one energy, or if it does not know an element.
    """
    if network.classifies or len(network.outputs) != 1:
        raise ValueError(
            f"a network with one energy can predict, but this one tells {list(network.outputs)}; "
            "train it on DFT labels"
        )
    data = paper_set(configurations, network.settings, network.elements)
    network.eval()
    energies, forces = [np.zeros(0)], [np.zeros((0, 3))]
    for rows in _evaluation_rows(len(data)):
        batch = with_vector_gradient(data.batch(rows))
        energy = network(batch)[:, 0]
        forces.append(forces_of(energy, batch).double().numpy())
        energies.append(energy.detach().double().numpy())
    return PaperPrediction(np.concatenate(energies), np.concatenate(forces))


def n_steps(n_train: int, batch_size: int, epochs: int) -> int:
    """Return the number of steps; what does not fill a batch is dropped in each epoch."""
    return n_train // batch_size * epochs


def slanted_triangle(epoch: int, epochs: int) -> float:
    """Return the factor on the rate: up from 1/32 in a fifth of the epochs, then down again."""
    top = math.floor(epochs * RISE)
    height = epoch / top if epoch < top else (epochs - epoch) / (epochs - top)
    return (1 + height * (RISE_FROM - 1)) / RISE_FROM


def linear_decay(epoch: int, epochs: int) -> float:
    """Return the factor on the rate: linearly from 1 towards 1/100, which it does not reach."""
    return 1 - (1 - FINAL_RATE) * epoch / epochs


def _fit(
    network: PaperNetwork, stage: _Stage, parameters: PaperParameters, seed: int
) -> PaperTraining:
    """Train, and return the network as it was after the best epoch."""
    per_epoch = n_steps(len(stage.train), parameters.batch_size, 1)
    if not per_epoch:
        raise ValueError(
            f"{len(stage.train)} configurations do not fill a batch of {parameters.batch_size}, "
            "and what does not is dropped; take a smaller batch_size"
        )
    optimiser = torch.optim.Adam(network.parameters(), lr=parameters.learning_rate)
    history: list[dict[str, float]] = []
    best_score, best_epoch, best_state = math.inf, 0, network.state_dict()
    for epoch in range(parameters.epochs):
        rate = parameters.learning_rate * stage.rate(epoch, parameters.epochs)
        optimiser.param_groups[0]["lr"] = rate
        order = np.random.default_rng([seed, epoch]).permutation(len(stage.train))
        batches = order[: per_epoch * parameters.batch_size].reshape(per_epoch, -1)
        loss = _train_epoch(network, stage, optimiser, batches, parameters.gradient_clip)
        score = stage.score(_outputs(network, stage.validation))
        _check_finite(epoch, loss, score)
        history.append(
            {"epoch": epoch + 1, "learning_rate": rate, "loss": loss, "validation": score}
        )
        if score < best_score:
            best_score, best_epoch = score, epoch + 1
            best_state = copy.deepcopy(network.state_dict())
    network.load_state_dict(best_state)
    network.eval()
    return PaperTraining(
        network=network,
        history=tuple(history),
        best_epoch=best_epoch,
        n_steps=per_epoch * parameters.epochs,
    )


def _train_epoch(
    network: PaperNetwork,
    stage: _Stage,
    optimiser: torch.optim.Optimizer,
    batches: IntArray,
    clip: float,
) -> float:
    """Take a step with each batch and return the mean loss."""
    network.train()
    total = 0.0
    for rows in batches:
        loss = stage.loss(network(stage.train.batch(rows)), torch.from_numpy(rows))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimiser.step()
        total += float(loss.detach())
    return total / len(batches)


def _check_finite(epoch: int, loss: float, score: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(score)):
        raise Diverged(f"loss and error became {loss} and {score} in epoch {epoch + 1}")


def _outputs(network: PaperNetwork, data: PaperSet) -> Tensor:
    """Return what the network says about all configurations. Shape ``(n, n_outputs)``."""
    network.eval()
    with torch.no_grad():
        parts = [network(data.batch(rows)) for rows in _evaluation_rows(len(data))]
    empty = torch.zeros(0, len(network.outputs), dtype=network.settings.dtype)
    return torch.cat([empty, *parts])


def _evaluation_rows(n: int) -> list[IntArray]:
    return [np.arange(start, min(start + _EVALUATED, n)) for start in range(0, n, _EVALUATED)]


def _choose(probabilities: FloatArray, eips: Labels, parameters: PaperParameters) -> IntArray:
    if parameters.nan_fix:
        return select(probabilities, eips).choice
    choice: IntArray = probabilities.argmax(axis=1).astype(np.int64)
    return choice


def _chosen_energies(eips: Labels, choice: IntArray) -> PseudoLabels:
    """Return the energies of the chosen EIPs, where one is chosen and has an energy."""
    energy = np.column_stack([eips.energy, np.full(len(eips), np.nan)])
    chosen = energy[np.arange(len(eips)), choice]
    use = np.isfinite(chosen)
    return PseudoLabels(eips.ids[use], chosen[use], choice[use])


def _check_of_pool(pseudo: PseudoLabels, inputs: PaperInputs) -> None:
    strange = np.setdiff1d(pseudo.ids, inputs.pool)
    if len(strange):
        raise ValueError(
            f"{len(strange)} of {len(pseudo.ids)} pseudo-labels are not of the pool, such as "
            f"{strange[0]}; label configurations of the pool only"
        )


def _copy_trunk(network: PaperNetwork, pretrained: PaperNetwork) -> None:
    mine, theirs = network.settings.architecture, pretrained.settings.architecture
    if mine != theirs:
        raise ValueError(
            f"a trunk of {theirs} does not fit a network of {mine}; pre-train with the same one"
        )
    network.trunk.load_state_dict(pretrained.trunk.state_dict())


def _mean_error(energies: Tensor, wanted: Tensor) -> float:
    """Return the mean absolute error where there is a label, in eV."""
    known = torch.isfinite(wanted)
    return float((energies[known] - wanted[known]).abs().double().mean())


def _tensor(energy: FloatArray, parameters: PaperParameters) -> Tensor:
    return torch.from_numpy(energy).to(parameters.dtype)
