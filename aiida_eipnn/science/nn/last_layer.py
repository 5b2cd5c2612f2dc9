r"""What DFT labels leave open of the last layer: the spread of heads that explain them as well.

Energies and forces are linear in the weights :math:`w` of a head: the energy per atom is
:math:`s\, w \cdot \bar f`, and the force along a direction :math:`-s\, w \cdot \dot f`
(:mod:`aiida_eipnn.science.nn.directions`). So the weights that explain the labels are distributed
about the trained ones with the covariance :math:`\alpha^2 P^{-1}` [1]_,

.. math:: P = s^2 \sum_c \left[ \frac{\bar f_c \bar f_c^T}{\sigma_E^2}
    + \frac{1}{K \sigma_F^2} \sum_{k=1}^K \dot f_{ck} \dot f_{ck}^T \right] + \varsigma^2 I ,

with the root mean square errors :math:`\sigma` of the network. Forces of a configuration count
together like its energy, for their errors are alike; :math:`\alpha` makes up for it. Weights
drawn from that are heads that share a trunk: a committee for little more than the price of one
network [2]_.

References
----------
.. [1] Bigi et al., Mach. Learn.: Sci. Technol. 5, 045018 (2024), arXiv:2403.02251.
.. [2] Kellner and Ceriotti, Mach. Learn.: Sci. Technol. 5, 035006 (2024), arXiv:2402.16621.
"""

import math
from typing import NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.device import array_of
from aiida_eipnn.science.nn.directions import DrawnDirections, ask_along
from aiida_eipnn.science.nn.head_start import SMALL_ENERGY, SMALL_FORCE
from aiida_eipnn.science.nn.heads import DFT_HEAD
from aiida_eipnn.science.nn.network import Network
from aiida_eipnn.science.reference import count_elements
from aiida_eipnn.science.uncertainty import calibration_scale

# Labels that are asked at most, and directions along which forces of each are asked: the fewer
# labels, the more, so that what the labels say is not taken for what they leave open.
MAX_LABELS = 300
MIN_PROBES, MAX_PROBES = 24, 96
ROWS_BY_FEATURE = 8
# Held-out labels that errors are taken from, at least; else those that were learnt give them.
MIN_HELD_OUT = 5
# Ridge relative to the mean eigenvalue of what the labels say.
RIDGE = 1e-5


class LabelledRows(NamedTuple):
    """What a head reads of labelled configurations, and how wrong it is.

    Parameters
    ----------
    energies
        Derivative of the energy per atom by the weights, in eV/atom. Shape ``(n, n_features)``.
    forces
        The same of forces along ``k`` directions, in eV/Å. Shape ``(k, n, n_features)``.
    energy_error, force_error
        Errors, in eV/atom and eV/Å. Shapes ``(n,)`` and ``(k, n)``.
    """

    energies: FloatArray
    forces: FloatArray
    energy_error: FloatArray
    force_error: FloatArray


def fit_last_layer(
    network: Network,
    described: DrawnDirections,
    configurations: Configurations,
    labels: Labels,
    learnt: IntArray,
    held_out: IntArray,
    rng: np.random.Generator,
) -> FloatArray:
    """Return the symmetric root of the covariance of the weights. Shape ``(n_features,) * 2``.

    Its scale is such that the spread of forces is the size of the errors on labels that were held
    out, or, where there are too few, of those on learnt ones, which are smaller.

    Parameters
    ----------
    network
        A network that learnt DFT labels.
    described
        The configurations with DFT labels.
    configurations
        The same configurations.
    labels
        Their DFT labels.
    learnt, held_out
        Rows that were learnt, and that were not.
    rng
        Draws directions, and rows where there are too many.
    """

    def ask(rows: IntArray) -> LabelledRows:
        chosen = np.sort(rng.permutation(rows)[:MAX_LABELS])
        return read_rows(network, described, configurations, labels, chosen, rng)

    known = ask(learnt)
    judge = ask(held_out) if len(held_out) >= MIN_HELD_OUT else known
    root = symmetric_root(precision_of(known, judge))
    spread = np.linalg.norm(judge.forces @ root, axis=2)
    scale = calibration_scale(spread.ravel(), judge.force_error.ravel()) if spread.any() else 0.0
    return scale * root


def precision_of(known: LabelledRows, judge: LabelledRows) -> FloatArray:
    """Return the precision of the weights, before it is scaled. Shape ``(n_features,) * 2``."""
    sigma_energy = max(float(np.sqrt((judge.energy_error**2).mean())), SMALL_ENERGY)
    sigma_force = max(float(np.sqrt((judge.force_error**2).mean())), SMALL_FORCE)
    n_probes, _, n_features = known.forces.shape
    forces = known.forces.reshape(-1, n_features) / (np.sqrt(n_probes) * sigma_force)
    rows = np.concatenate([known.energies / sigma_energy, forces])
    precision: FloatArray = rows.T @ rows
    ridge = RIDGE * max(float(np.trace(precision)) / len(precision), 1e-300)
    return precision + ridge * np.eye(len(precision))


def symmetric_root(precision: FloatArray) -> FloatArray:
    """Return the symmetric root of the inverse, which is unique: the same on every machine."""
    values, vectors = np.linalg.eigh(precision)
    root: FloatArray = (vectors / np.sqrt(np.maximum(values, 1e-12 * values[-1]))) @ vectors.T
    return root


def draw_weights(
    mean: FloatArray, root: FloatArray, n_heads: int, rng: np.random.Generator
) -> FloatArray:
    """Return weights of heads whose mean is that of the trained one.

    Parameters
    ----------
    mean
        Weights of the trained head. Shape ``(n_features,)``.
    root
        Symmetric root of their covariance. Shape ``(n_features, n_features)``.
    n_heads
        How many to draw, at least two.
    rng
        Draws them.

    Returns
    -------
    FloatArray
        Shape ``(n_heads, n_features)``.
    """
    drawn = rng.normal(size=(n_heads, len(mean)))
    # Centred, and as wide as before: what a mean takes away is given back.
    drawn = (drawn - drawn.mean(axis=0)) * np.sqrt(n_heads / (n_heads - 1))
    weights: FloatArray = mean + drawn @ root
    return weights


def read_rows(
    network: Network,
    described: DrawnDirections,
    configurations: Configurations,
    labels: Labels,
    chosen: IntArray,
    rng: np.random.Generator,
) -> LabelledRows:
    """Return what the head of DFT reads of labelled configurations, and how wrong it is."""
    part, known = configurations.take(chosen), labels.take(chosen)
    heads = network.heads
    row, scale = heads.row(DFT_HEAD), float(heads.scale)
    weight = array_of(heads.weight[row].detach()).astype(np.float64)
    forces, errors = [], []
    for _ in range(count_probes(len(chosen), network.trunk.n_features)):
        pooled, true = ask_along(
            lambda rows: described.pool(network, rows, rng),
            described.batches(chosen),
            known.forces,
            part.n_atoms,
        )
        change = np.concatenate([array_of(item.change.double()) for item in pooled])
        forces.append(-scale * change)
        errors.append(forces[-1] @ weight - true)
    energies = scale * np.concatenate([array_of(item.mean.double()) for item in pooled])
    reference = count_elements(part, np.array(network.elements)) @ array_of(heads.reference[row])
    wanted = (known.energy[:, 0] - reference) / part.n_atoms
    said = energies @ weight + scale * float(heads.bias[row].detach())
    return LabelledRows(
        energies=energies,
        forces=np.array(forces),
        energy_error=said - wanted,
        force_error=np.array(errors),
    )


def count_probes(n_labels: int, n_features: int) -> int:
    """Return along how many directions the forces of each configuration are asked."""
    wanted = math.ceil(ROWS_BY_FEATURE * n_features / n_labels)
    return min(MAX_PROBES, max(MIN_PROBES, wanted))
