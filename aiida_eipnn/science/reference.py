"""Energy references: one zero of energy for each element, and EIPs brought onto that of DFT."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import numpy as np

from aiida_eipnn.science.arrays import Arrays, BoolArray, FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import Configurations, pick_fields
from aiida_eipnn.science.eip.potential import symbols_of
from aiida_eipnn.science.labels import Labels

# With fewer labels than this the energies cannot tell scale and shift apart.
MIN_LABELS_FOR_SCALE = 10
# How far from 1 a scale is expected to be before any label is seen, and how far it may go: EIPs
# are fitted to bulk energies, which they miss by tens of per cent, not by factors.
SCALE_SPREAD = 0.3
SCALE_BOUNDS = (0.5, 2.0)
# Weight of the prior of an element's energy relative to one configuration of only that element:
# enough to decide what fixed compositions leave open, too little to be seen elsewhere.
RIDGE = 1e-8
# How far aligned EIPs are expected to be from the reference before any label is seen, in eV/atom,
# and how many labels that counts for: two labels that are met exactly are not known exactly.
EXPECTED_ERROR = 0.05
EXPECTED_WEIGHT = 3.0
# Elements get shifts of their own where their difference is above so many standard errors.
CLEAR_DIFFERENCE = 3.0

_HUBER = 1.345  # 95 % efficiency for normal errors
_FAR_OUT = 3.0  # robust standard deviations
MAD_TO_SIGMA = 1.4826
_ROUNDS = 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Alignment:
    r"""Scale and shifts that bring the energies of ``m`` EIPs onto those of the reference.

    :math:`E' = a\, E + \sum_Z n_Z b_Z`, so forces and stress scale by :math:`a`.

    Parameters
    ----------
    sources
        The EIPs. Shape ``(m,)``.
    elements
        Atomic numbers, ascending. Shape ``(n_elements,)``.
    scale
        :math:`a`, without unit; NaN for an EIP that cannot be used. Shape ``(m,)``.
    shift
        :math:`b_Z`, in eV per atom; NaN for an EIP that cannot be used, and for an element that
        is in none of the labels. Shape ``(m, n_elements)``.
    n_labels
        How many labels it rests on. Shape ``(m,)``.
    """

    sources: StrArray
    elements: IntArray
    scale: FloatArray
    shift: FloatArray
    n_labels: IntArray

    def __post_init__(self) -> None:
        m = len(self.sources)
        if self.scale.shape != (m,) or self.shift.shape != (m, len(self.elements)):
            raise ValueError(
                f"scale {self.scale.shape} and shift {self.shift.shape} do not fit {m} EIPs and "
                f"{len(self.elements)} elements"
            )
        if self.n_labels.shape != (m,):
            raise ValueError(f"n_labels {self.n_labels.shape} does not fit {m} EIPs")

    @property
    def usable(self) -> BoolArray:
        """Which EIPs can be used. Shape ``(m,)``."""
        return np.isfinite(self.scale)

    @property
    def text(self) -> str:
        """What was fitted, in one sentence."""
        if not self.usable.any():
            return "no EIP could be aligned: none labelled a configuration with a reference label"
        n = self.n_labels[self.usable]
        if not n.any():
            return "not aligned, for want of labels: each EIP counts energies from its own zero"
        count = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
        noun = "label" if n.max() == 1 else "labels"
        if self._is_scaled():
            return f"aligned on {count} {noun}: a scale for each EIP and {self._shifts_text()}"
        few = f", no scale below {MIN_LABELS_FOR_SCALE}" if n.max() < MIN_LABELS_FOR_SCALE else ""
        return f"aligned on {count} {noun}: {self._shifts_text()}{few}"

    def _is_scaled(self) -> bool:
        return bool((self.scale[self.usable] != 1.0).any())

    def _shifts_text(self) -> str:
        spread = np.nanmax(self.shift[self.usable], axis=1) - np.nanmin(
            self.shift[self.usable], axis=1
        )
        return "a shift for each element" if (spread > 0).any() else "one shift"

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Build from :meth:`arrays`."""
        return cls(**pick_fields(cls, arrays))

    def arrays(self) -> Arrays:
        """Return every field by name, ready for :func:`~.arrays.save_arrays`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def apply(self, configurations: Configurations, labels: Labels) -> Labels:
        """Return labels of the same EIPs on the reference's zero.

        Labels of an EIP that cannot be used, and of configurations with an element the alignment
        does not know, become missing.

        Parameters
        ----------
        configurations
            Must contain every configuration of ``labels``.
        labels
            As the EIPs gave them.

        Raises
        ------
        ValueError
            If the EIPs are not those of this alignment.
        """
        if labels.sources.tolist() != self.sources.tolist():
            raise ValueError(
                f"this alignment is for {self.sources.tolist()}, not {labels.sources.tolist()}"
            )
        counts, known = self._count_elements(configurations, labels)
        shift = np.nan_to_num(self.shift)
        unknown = ~known[:, None] | (counts @ np.isnan(self.shift).T > 0)
        status, reasons = labels.status, list(map(str, labels.reasons))
        status, reasons = _refuse(status, reasons, ~self.usable, "the EIP could not be aligned")
        status, reasons = _refuse(status, reasons, unknown, self._unknown_reason())
        missing = status > 0
        per_atom = np.repeat(missing, labels.n_atoms, axis=0).T[:, :, None]
        return Labels(
            ids=labels.ids,
            offsets=labels.offsets,
            sources=labels.sources,
            energy=np.where(missing, np.nan, self.scale * labels.energy + counts @ shift.T),
            forces=np.where(per_atom, np.nan, self.scale[:, None, None] * labels.forces),
            stress=np.where(missing[:, :, None], np.nan, self.scale[:, None] * labels.stress),
            status=status,
            reasons=np.array(reasons, dtype=np.str_),
            origins=labels.origins,
        )

    def _count_elements(
        self, configurations: Configurations, labels: Labels
    ) -> tuple[FloatArray, BoolArray]:
        """Return atoms per element of each labelled configuration, and whether that is all."""
        part = configurations.take(configurations.rows_of(labels.ids))
        counts = count_elements(part, self.elements)
        return counts, counts.sum(axis=1) == part.n_atoms

    def _unknown_reason(self) -> str:
        known = self.elements[np.isfinite(self.shift).any(axis=0)]
        return f"an element has no reference energy (there are {symbols_of(known)})"


class SourceErrors(NamedTuple):
    """How far one EIP is from the reference.

    ``n`` configurations were compared; energies in eV/atom, forces in eV/Å per component; NaN
    where there is nothing to compare.
    """

    source: str
    n: int
    energy_mae: float
    energy_rmse: float
    forces_mae: float
    forces_rmse: float


def fit_reference_energies(configurations: Configurations, energy: FloatArray) -> dict[int, float]:
    r"""Return the energy of one atom of each element that explains the energies best, in eV.

    Least squares on :math:`E / N = \sum_Z x_Z b_Z`. What the compositions leave open (all
    configurations with the same ratio of elements) is shared evenly.

    Parameters
    ----------
    configurations
        The configurations.
    energy
        Their energies in eV, NaN where there is none. Shape ``(n,)``.

    Raises
    ------
    ValueError
        If there is no energy at all.
    """
    known = np.isfinite(energy)
    if not known.any():
        raise ValueError(f"none of the {len(configurations)} configurations has an energy")
    elements = np.array(configurations.elements, dtype=np.int64)
    fractions = element_fractions(configurations, elements)[known]
    per_atom = energy[known] / configurations.n_atoms[known]
    shifts = _fit_reference(fractions, per_atom)
    return {int(z): float(shift) for z, shift in zip(elements, shifts, strict=True)}


def fit_alignment(
    configurations: Configurations,
    reference_labels: Labels,
    labels: Labels,
    *,
    min_labels_for_scale: int | None = MIN_LABELS_FOR_SCALE,
) -> Alignment:
    """Fit scale and shifts that bring each EIP onto the reference.

    Robust least squares on energies per atom. What is fitted grows with the labels:

    - none: the alignment changes nothing, and :attr:`Alignment.text` says so;
    - one: a shift per atom, shared by the elements that occur in it;
    - more: a shift for each element, as far as the labels tell them apart (where compositions are
      all but equal, or labels few, they share one), by Huber's weights from a start by least
      absolute deviations, so that one absurd label of three is outvoted;
    - from ``min_labels_for_scale`` on: a scale too, held towards 1 as far as the noise asks.

    An EIP without one label that can be compared cannot be used: its scale is NaN. An element
    that is in no label that can be compared has no shift: it is NaN.

    Parameters
    ----------
    configurations
        Must contain every configuration that has a label of both kinds.
    reference_labels
        Labels of one source, ``dft``.
    labels
        Labels of the EIPs.
    min_labels_for_scale
        Fewest labels for a scale; ``None`` fits none.

    Raises
    ------
    ValueError
        If the reference has more than one source.
    """
    rows, reference_rows = _common_rows(labels, reference_labels)
    elements = np.array(configurations.elements, dtype=np.int64)
    part = configurations.take(configurations.rows_of(labels.ids[rows]))
    fractions, n_atoms = element_fractions(part, elements), part.n_atoms
    target = reference_labels.energy[reference_rows, 0] / n_atoms
    energy, ok = labels.energy[rows] / n_atoms[:, None], labels.ok[rows]
    scale = np.full(len(labels.sources), np.nan)
    shift = np.full((len(scale), len(elements)), np.nan)
    for column in range(len(scale)):
        use = ok[:, column]
        if not len(rows) and labels.ok[:, column].any():
            scale[column], shift[column] = 1.0, 0.0
        elif use.any():
            scaled = min_labels_for_scale is not None and use.sum() >= min_labels_for_scale
            fit = _fit_scale_and_shifts if scaled else _fit_shifts_alone
            scale[column], fitted = fit(fractions[use], energy[use, column], target[use])
            shift[column] = np.where(fractions[use].any(axis=0), fitted, np.nan)
    return Alignment(
        sources=labels.sources,
        elements=elements,
        scale=scale,
        shift=shift,
        n_labels=ok.sum(axis=0).astype(np.int64),
    )


def source_errors(reference: Labels, aligned: Labels) -> tuple[SourceErrors, ...]:
    """Return how far each EIP is from the reference on the configurations both labelled.

    Parameters
    ----------
    reference
        Labels of one source, ``dft``.
    aligned
        Labels of the EIPs, on the reference's zero.
    """
    rows, reference_rows = _common_rows(aligned, reference)
    table = []
    for column, source in enumerate(map(str, aligned.sources)):
        use = aligned.ok[rows, column]
        energy, forces = _residuals(
            reference.take(reference_rows[use]), aligned.take(rows[use]), column
        )
        table.append(SourceErrors(source, int(use.sum()), *_mae_rmse(energy), *_mae_rmse(forces)))
    return tuple(table)


def best_single(configurations: Configurations, reference: Labels, aligned: Labels) -> str:
    """Return the EIP with the smallest energy error on the reference's labels.

    Where there are no more labels than an alignment has parameters, every energy error is zero by
    construction, so there the force error decides. An EIP that labelled less than half of what the
    most complete one did is left out: a few easy configurations prove nothing.

    Parameters
    ----------
    configurations
        Must contain every configuration of ``reference``.
    reference
        Labels of one source, ``dft``.
    aligned
        Labels of the EIPs, on the reference's zero.

    Raises
    ------
    ValueError
        If no EIP has a label on a configuration of the reference.
    """
    errors = source_errors(reference, aligned)
    most = max((row.n for row in errors), default=0)
    if most == 0:
        raise ValueError(
            f"none of {aligned.sources.tolist()} labelled a configuration that the reference "
            "labelled too; label the reference's configurations with them first"
        )
    candidates = [row for row in errors if row.n >= most / 2]
    n_parameters = 1 + len(configurations.elements)
    if most <= n_parameters and all(np.isfinite(row.forces_mae) for row in candidates):
        return min(candidates, key=lambda row: row.forces_mae).source
    return min(candidates, key=lambda row: row.energy_mae).source


def count_elements(configurations: Configurations, elements: IntArray) -> FloatArray:
    """Return how many atoms of each element each configuration has.

    Shape ``(n, n_elements)``; atoms of other elements are not counted.
    """
    n, m = len(configurations), len(elements)
    owner = np.repeat(np.arange(n), configurations.n_atoms)
    known = np.isin(configurations.numbers, elements)
    column = np.searchsorted(elements, configurations.numbers[known])
    counted = np.bincount(owner[known] * m + column, minlength=n * m)
    return counted.reshape(n, m).astype(np.float64)


def element_fractions(configurations: Configurations, elements: IntArray) -> FloatArray:
    """Return the share of each element in each configuration. Shape ``(n, n_elements)``."""
    return count_elements(configurations, elements) / configurations.n_atoms[:, None]


def _fit_shifts_alone(
    fractions: FloatArray, energy: FloatArray, target: FloatArray
) -> tuple[float, FloatArray]:
    """Return a scale of 1, and the shifts of one EIP; energies are per atom."""
    return 1.0, fit_robust_shifts(fractions, target - energy)


def _fit_scale_and_shifts(
    fractions: FloatArray, energy: FloatArray, target: FloatArray
) -> tuple[float, FloatArray]:
    """Return scale and shifts of one EIP, by reweighted least squares; energies are per atom."""
    trust = _trust(fractions, energy, target)
    scale, shift = 1.0, fit_robust_shifts(fractions, target - energy)
    for _ in range(_ROUNDS):
        before = np.append(shift, scale)
        residual = target - scale * energy - fractions @ shift
        sigma = robust_sigma(residual)
        weights = huber_weights(residual, sigma)
        scale = _fit_scale(fractions, energy, target, trust * weights, sigma)
        shift = _fit_shifts(fractions, target - scale * energy, trust * weights, sigma)
        if _is_settled(before, np.append(shift, scale)):
            break
    return scale, shift


def _trust(fractions: FloatArray, energy: FloatArray, target: FloatArray) -> FloatArray:
    """Return less than 1 where the EIP's energy is far out and the reference's is not.

    There the EIP is absurd, and as a regressor its energy would pull the scale however large the
    residual: the weights fall as the square of it. A configuration that is far out for both says
    most about the scale and is kept.
    """
    spread = [
        np.abs(values - fractions @ fit_robust_shifts(fractions, values))
        for values in (energy, target)
    ]
    of_eip, of_reference = (values / robust_sigma(values) for values in spread)
    return np.minimum(1.0, (_FAR_OUT + of_reference) / np.maximum(of_eip, _FAR_OUT)) ** 2


def fit_robust_shifts(fractions: FloatArray, per_atom: FloatArray) -> FloatArray:
    """Return the energy per element that explains energies per atom, robustly, in eV.

    Parameters
    ----------
    fractions
        Share of each element. Shape ``(n, n_elements)``.
    per_atom
        Energies per atom, in eV, none missing. Shape ``(n,)``.
    """
    # Start and spread of least absolute deviations: from the mean, or with a spread that follows
    # the fit, one absurd value of three would count as noise and not as absurd.
    shift = _fit_least_absolute(fractions, per_atom)
    sigma = robust_sigma(per_atom - fractions @ shift)
    for _ in range(_ROUNDS):
        before, weights = shift, huber_weights(per_atom - fractions @ shift, sigma)
        shift = _fit_shifts(fractions, per_atom, weights, sigma)
        if _is_settled(before, shift):
            break
    return shift


def _fit_least_absolute(fractions: FloatArray, per_atom: FloatArray) -> FloatArray:
    """Return the energy per element with the least sum of absolute deviations."""
    shift = _fit_shifts(fractions, per_atom, np.ones(len(per_atom)), 0.0)
    for _ in range(_ROUNDS):
        residual = np.abs(per_atom - fractions @ shift)
        before, floor = shift, 1e-9 + 1e-3 * float(residual.mean())
        shift = _fit_shifts(fractions, per_atom, floor / np.maximum(residual, floor), 0.0)
        if _is_settled(before, shift):
            break
    return shift


def _is_settled(before: FloatArray, after: FloatArray) -> bool:
    """Return whether a round changed nothing that counts, in eV/atom."""
    return bool(np.abs(after - before).max() < 1e-7)


def huber_weights(residual: FloatArray, sigma: float) -> FloatArray:
    """Return the weight of each residual."""
    return np.asarray(1.0 / np.maximum(1.0, np.abs(residual) / (_HUBER * sigma)), dtype=np.float64)


def robust_sigma(residual: FloatArray) -> float:
    """Return the standard deviation about zero by the median, at least 1e-9."""
    # The floor, in eV/atom, matters where more than half of the labels are met exactly.
    return max(MAD_TO_SIGMA * float(np.median(np.abs(residual))), 1e-9)


def _fit_scale(
    fractions: FloatArray,
    energy: FloatArray,
    target: FloatArray,
    weights: FloatArray,
    sigma: float,
) -> float:
    """Return the scale, with what the shifts can explain taken out of both energies."""
    x = energy - fractions @ _fit_shifts(fractions, energy, weights, 0.0)
    y = target - fractions @ _fit_shifts(fractions, target, weights, 0.0)
    ridge = (sigma / SCALE_SPREAD) ** 2
    steepness = float(weights @ x**2) + ridge
    if steepness < 1e-20:
        return 1.0
    return float(np.clip((weights @ (x * y) + ridge) / steepness, *SCALE_BOUNDS))


def _fit_shifts(
    fractions: FloatArray, per_atom: FloatArray, weights: FloatArray, sigma: float
) -> FloatArray:
    """Return the energy per element; where the compositions leave it open, the mean decides.

    Elements are told apart along the principal directions of the compositions, and only where the
    difference is clear beside its standard error for residuals of ``sigma``, in eV/atom: a
    direction that the labels hardly know would be extrapolated without bound. With ``sigma`` 0 a
    direction counts wherever there is any.
    """
    total = weights.sum()
    centre, mean = weights @ fractions / total, weights @ per_atom / total
    centred = fractions - centre
    weighted = (centred * weights[:, None]).T
    information, directions = np.linalg.eigh(weighted @ centred)
    some = information > 1e-10 * total
    information = np.where(some, information, 1.0)
    slope = directions.T @ (weighted @ (per_atom - mean)) / information
    error = _expected_sigma(sigma, len(per_atom)) / np.sqrt(information) if sigma > 0 else 0.0
    slope = np.where(some & (np.abs(slope) > CLEAR_DIFFERENCE * error), slope, 0.0)
    difference = directions @ slope
    return np.asarray(mean + difference - centre @ difference, dtype=np.float64)


def _expected_sigma(sigma: float, n: int) -> float:
    """Return the error to expect, in eV/atom, of ``n`` residuals and of what is known before."""
    total = EXPECTED_WEIGHT * EXPECTED_ERROR**2 + n * sigma**2
    return float(np.sqrt(total / (EXPECTED_WEIGHT + n)))


def _fit_reference(fractions: FloatArray, per_atom: FloatArray) -> FloatArray:
    """Return the energy per element by least squares, what compositions leave open shared."""
    mean = per_atom.mean()
    matrix = fractions.T @ fractions + RIDGE * np.eye(fractions.shape[1])
    correction = np.linalg.solve(matrix, fractions.T @ (per_atom - mean))
    return np.asarray(mean + correction, dtype=np.float64)


def _common_rows(labels: Labels, reference: Labels) -> tuple[IntArray, IntArray]:
    """Return the rows of both for the configurations that the reference labelled."""
    if len(reference.sources) != 1:
        raise ValueError(
            f"the reference must be one source, not {reference.sources.tolist()}; "
            "keep only the labels to align with"
        )
    rows = {str(name): row for row, name in enumerate(labels.ids)}
    pairs = [
        (rows[str(name)], row)
        for row, name in enumerate(reference.ids)
        if reference.ok[row, 0] and str(name) in rows
    ]
    joined = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return joined[:, 0], joined[:, 1]


def _residuals(reference: Labels, aligned: Labels, column: int) -> tuple[FloatArray, FloatArray]:
    """Return errors of energy per atom and of force components, one row against one row."""
    energy = (aligned.energy[:, column] - reference.energy[:, 0]) / aligned.n_atoms
    forces = (aligned.forces[column] - reference.forces[0]).ravel()
    return energy, forces[np.isfinite(forces)]


def _mae_rmse(errors: FloatArray) -> tuple[float, float]:
    if not len(errors):
        return float("nan"), float("nan")
    return float(np.abs(errors).mean()), float(np.sqrt((errors**2).mean()))


def _refuse(
    status: IntArray, reasons: Sequence[str], where: BoolArray, reason: str
) -> tuple[IntArray, list[str]]:
    """Return status and reasons with ``reason`` where a label was and ``where`` is true."""
    hit = np.broadcast_to(where, status.shape) & (status == 0)
    if not hit.any():
        return status, list(reasons)
    return np.where(hit, len(reasons) + 1, status), [*reasons, reason]
