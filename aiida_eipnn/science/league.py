"""The league table: how good each EIP is on a labelled set, and whether any is good enough."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.predictors import MIN_COVERAGE
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import (
    MAD_TO_SIGMA,
    SourceErrors,
    element_fractions,
    fit_alignment,
    fit_robust_shifts,
    source_errors,
)
from aiida_eipnn.science.uncertainty import spearman
from aiida_eipnn.science.worth import Worth, first_of_copies, judge_worth

# Errors closer than this are a draw, in eV/atom and eV/Å: re-tabulations of one EIP.
DRAW = 1e-6
# Fewer EIPs cannot disagree about a median.
MIN_EIPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One EIP in the table; NaN where there is nothing to compare.

    Parameters
    ----------
    eip
        Its name.
    n
        Configurations that were compared.
    missing
        How many configurations it has no label of, by reason.
    scale
        Of its energies, by the alignment.
    energy_mae, energy_rmse
        Error of the aligned energy, in eV/atom.
    shifted_mae, shifted_rmse
        The same, with shifts and no scale.
    forces_mae, forces_rmse
        Error of the components of the forces as the EIP gives them, in eV/Å.
    scaled_forces_mae
        The same, with the scale of the energies.
    energy_wins, forces_wins
        Share of the configurations on which it is the best; a draw is shared.
    """

    eip: str
    n: int
    missing: dict[str, int]
    scale: float
    energy_mae: float
    energy_rmse: float
    shifted_mae: float
    shifted_rmse: float
    forces_mae: float
    forces_rmse: float
    scaled_forces_mae: float
    energy_wins: float
    forces_wins: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """What the disagreement of the EIPs says about the error of their median.

    Parameters
    ----------
    n
        Configurations that at least three EIPs labelled.
    spread
        Robust standard deviation over the EIPs, the mean over the configurations, in eV/atom or
        eV/Å.
    consensus_mae
        Mean absolute error of the median over the EIPs, in the same unit.
    spearman
        Rank correlation of the two.
    """

    n: int
    spread: float
    consensus_mae: float
    spearman: float


@dataclass(frozen=True, slots=True, kw_only=True)
class League:
    """EIPs on a labelled set.

    Parameters
    ----------
    standings
        The EIPs, the smallest energy error first.
    n_configurations, n_atoms
        Configurations that were compared, and their atoms; copies are left out.
    n_copies
        Copies of other configurations: equal up to orientation or symmetry.
    alignment
        How the energies were aligned, in words.
    best_energy, best_forces
        The EIP with the smallest error among those that labelled enough; ``None`` without any.
    oracle_energy, oracle_forces
        Error if the best EIP were known for each configuration, in eV/atom and eV/Å.
    constant_energy, zero_forces
        Error of a constant for each element, and of no force at all.
    same_winner
        How often the best EIP for the energy is the best one for the forces too.
    energy_disagreement, forces_disagreement
        What their disagreement says.
    worth
        Whether they carry information here.
    """

    standings: tuple[Standing, ...]
    n_configurations: int
    n_atoms: int
    n_copies: int
    alignment: str
    best_energy: str | None
    best_forces: str | None
    oracle_energy: float
    oracle_forces: float
    constant_energy: float
    zero_forces: float
    same_winner: float
    energy_disagreement: Disagreement
    forces_disagreement: Disagreement
    worth: Worth

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ``None`` for NaN."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def rank_eips(
    configurations: Configurations,
    reference: Labels,
    labels: Labels,
    rng: np.random.Generator,
    *,
    train: Collection[str] | None = None,
) -> League:
    """Rank EIPs by their errors against a labelled set.

    Copies count once. Energies are compared after :func:`~.reference.fit_alignment`. With a
    training part, the alignment is fitted and the worth judged on it, and the table shows the
    errors on the rest; without, all is done on all: an alignment has too few parameters to matter,
    and the worth is judged by cross-validation in either case.

    Parameters
    ----------
    configurations
        Must contain every configuration of ``reference``.
    reference
        Labels of one source, ``dft``.
    labels
        Labels of the EIPs, joined to the reference by id.
    rng
        The source of all randomness in the cross-validation.
    train
        Ids of the training part.

    Raises
    ------
    ValueError
        If no configuration has a reference label and was given to the EIPs, or if one of the two
        parts is empty.
    """
    names = _common(reference, labels, train)
    configurations = configurations.take(configurations.rows_of(names))
    reference = reference.take(reference.rows_of(names))
    labels = labels.take(labels.rows_of(names))
    distinct = first_of_copies(configurations, reference)
    fitted, shown = _parts(names, distinct, train)
    known = reference.take(fitted)
    alignment = fit_alignment(configurations, known, labels)
    shift_only = fit_alignment(configurations, known, labels, min_labels_for_scale=None)
    part, seen, given = configurations.take(shown), reference.take(shown), labels.take(shown)
    aligned, shifted = alignment.apply(part, given), shift_only.apply(part, given)
    energy, forces = _energy_errors(seen, aligned), _forces_errors(seen, given)
    wins = _wins(energy), _wins(forces)
    tables = [source_errors(seen, item) for item in (given, aligned, shifted)]
    standings = [
        _standing(item, _missing(aligned, column), float(alignment.scale[column]), shares)
        for column, (item, shares) in enumerate(
            zip(zip(*tables, strict=True), _shares(wins), strict=True)
        )
    ]
    level = _level(configurations, reference, fitted)[shown]
    return League(
        standings=tuple(sorted(standings, key=lambda row: (row.n == 0, row.energy_mae))),
        n_configurations=len(shown),
        n_atoms=int(part.n_atoms.sum()),
        n_copies=len(names) - len(distinct),
        alignment=alignment.text,
        best_energy=_best(standings, "energy_mae"),
        best_forces=_best(standings, "forces_mae"),
        oracle_energy=_oracle(energy, np.ones(len(shown))),
        oracle_forces=_oracle(forces, part.n_atoms.astype(np.float64)),
        constant_energy=float(np.abs(seen.energy[:, 0] / seen.n_atoms - level).mean()),
        zero_forces=float(np.abs(seen.forces[0]).mean()),
        same_winner=_share(_same_winner(*wins)),
        energy_disagreement=_disagree_on_energy(seen, aligned),
        forces_disagreement=_disagree_on_forces(seen, aligned),
        worth=judge_worth(configurations.take(fitted), known, labels.take(fitted), rng),
    )


def _parts(
    names: list[str], distinct: IntArray, train: Collection[str] | None
) -> tuple[IntArray, IntArray]:
    """Return the rows to fit on and those to show errors of, all for both without a split."""
    if train is None:
        return distinct, distinct
    chosen = np.isin(names, list(train))[distinct]
    if chosen.all() or not chosen.any():
        raise ValueError(
            f"of {len(distinct)} distinct labelled configurations {chosen.sum()} are in the "
            "training part; name a split with some in it and some not, or leave the split out"
        )
    return distinct[chosen], distinct[~chosen]


def _standing(
    errors: tuple[SourceErrors, ...],
    missing: dict[str, int],
    scale: float,
    wins: tuple[float, float],
) -> Standing:
    """Return the row of one EIP from its errors as given, aligned, and with shifts alone."""
    given, aligned, shifted = errors
    return Standing(
        eip=given.source,
        n=aligned.n,
        missing=missing,
        scale=scale,
        energy_mae=aligned.energy_mae,
        energy_rmse=aligned.energy_rmse,
        shifted_mae=shifted.energy_mae,
        shifted_rmse=shifted.energy_rmse,
        forces_mae=given.forces_mae,
        forces_rmse=given.forces_rmse,
        scaled_forces_mae=aligned.forces_mae,
        energy_wins=wins[0],
        forces_wins=wins[1],
    )


def _common(reference: Labels, labels: Labels, train: Collection[str] | None) -> list[str]:
    """Return the ids that both have, the training part first: of copies the first one stays."""
    known = set(labels.ids.tolist())
    names = [name for name in reference.ids[reference.ok[:, 0]].tolist() if name in known]
    if not names:
        raise ValueError(
            f"none of the {len(reference)} configurations has both a reference label and been "
            "given to the EIPs; label the same configurations with both"
        )
    chosen = set(train or ())
    return sorted(names, key=lambda name: name not in chosen)


def _level(configurations: Configurations, reference: Labels, fitted: IntArray) -> FloatArray:
    """Return what a constant for each element says, in eV/atom. Shape ``(n,)``."""
    fractions = element_fractions(configurations, np.array(configurations.elements, dtype=np.int64))
    per_atom = reference.energy[:, 0] / reference.n_atoms
    return fractions @ fit_robust_shifts(fractions[fitted], per_atom[fitted])


def _energy_errors(reference: Labels, aligned: Labels) -> FloatArray:
    """Return absolute errors per atom, in eV/atom, NaN without a label. Shape ``(n, m)``."""
    errors = np.abs(aligned.energy - reference.energy[:, :1]) / reference.n_atoms[:, None]
    return np.where(aligned.ok, errors, np.nan)


def _forces_errors(reference: Labels, labels: Labels) -> FloatArray:
    """Return mean absolute errors of components, in eV/Å, NaN without a label. Shape ``(n, m)``."""
    components = np.abs(labels.forces - reference.forces).sum(axis=2)
    errors = np.add.reduceat(components, reference.offsets[:-1], axis=1).T
    return np.where(labels.ok, errors / (3 * reference.n_atoms[:, None]), np.nan)


def _wins(errors: FloatArray) -> FloatArray:
    """Return the share of each EIP in each win. Shape ``(n, m)``.

    A row is NaN where less than two EIPs have a label, or all do equally well.
    """
    errors = np.where(np.isnan(errors), np.inf, errors)
    first = errors <= errors.min(axis=1, keepdims=True) + DRAW
    labelled = np.isfinite(errors)
    contested = (labelled.sum(axis=1) > 1) & ((first & labelled).sum(axis=1) < labelled.sum(axis=1))
    share = first / np.maximum(first.sum(axis=1, keepdims=True), 1)
    return np.where(contested[:, None], share, np.nan)


def _same_winner(energy: FloatArray, forces: FloatArray) -> FloatArray:
    """Return where one EIP won both; NaN where one was not contested. Shape ``(n,)``."""
    both = ((energy > 0) & (forces > 0)).any(axis=1).astype(np.float64)
    return np.where(np.isnan(energy[:, 0]) | np.isnan(forces[:, 0]), np.nan, both)


def _shares(wins: tuple[FloatArray, FloatArray]) -> list[tuple[float, float]]:
    """Return how often each EIP won in energy and in forces."""
    energy, forces = ([_share(column) for column in table.T] for table in wins)
    return list(zip(energy, forces, strict=True))


def _share(wins: FloatArray) -> float:
    counted = wins[np.isfinite(wins)]
    return float(counted.mean()) if len(counted) else float("nan")


def _missing(labels: Labels, column: int) -> dict[str, int]:
    """Return how many labels are missing, by reason, the commonest first."""
    status = labels.status[:, column]
    numbers, counts = np.unique(status[status > 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(labels.reasons[numbers[k] - 1]): int(counts[k]) for k in order}


def _best(rows: Collection[Standing], key: str) -> str | None:
    """Return the EIP with the smallest error, of those that labelled enough."""
    most = max((row.n for row in rows), default=0)
    enough = [row for row in rows if row.n and row.n >= MIN_COVERAGE * most]
    return min(enough, key=lambda row: float(getattr(row, key))).eip if enough else None


def _oracle(errors: FloatArray, weights: FloatArray) -> float:
    """Return the error of the best EIP of each configuration that has one."""
    smallest = np.where(np.isnan(errors), np.inf, errors).min(axis=1)
    use = np.isfinite(smallest)
    return float(np.average(smallest[use], weights=weights[use])) if use.any() else float("nan")


def _disagree_on_energy(reference: Labels, aligned: Labels) -> Disagreement:
    rows = _enough(aligned)
    per_atom = (aligned.energy / aligned.n_atoms[:, None])[rows]
    consensus, spread = _median_and_spread(per_atom.T)
    target = (reference.energy[:, 0] / reference.n_atoms)[rows]
    return _disagreement(spread, np.abs(consensus - target), np.ones(int(rows.sum())))


def _disagree_on_forces(reference: Labels, aligned: Labels) -> Disagreement:
    rows = np.flatnonzero(_enough(aligned))
    aligned, reference = aligned.take(rows), reference.take(rows)
    if not len(rows):
        return _disagreement(np.zeros(0), np.zeros(0), np.zeros(0))
    consensus, spread = _median_and_spread(aligned.forces)
    starts, size = reference.offsets[:-1], (3 * reference.n_atoms).astype(np.float64)
    errors = np.abs(consensus - reference.forces[0]).sum(axis=1)
    return _disagreement(
        np.add.reduceat(spread.sum(axis=1), starts) / size,
        np.add.reduceat(errors, starts) / size,
        size,
    )


def _enough(aligned: Labels) -> BoolArray:
    return np.asarray(aligned.ok.sum(axis=1) >= MIN_EIPS)


def _median_and_spread(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the median over the first axis, and the robust standard deviation about it."""
    if not values.size:
        return np.zeros(values.shape[1:]), np.zeros(values.shape[1:])
    consensus = np.nanmedian(values, axis=0)
    return consensus, MAD_TO_SIGMA * np.nanmedian(np.abs(values - consensus), axis=0)


def _disagreement(spread: FloatArray, errors: FloatArray, weights: FloatArray) -> Disagreement:
    if not len(spread):
        return Disagreement(n=0, spread=np.nan, consensus_mae=np.nan, spearman=np.nan)
    return Disagreement(
        n=len(spread),
        spread=float(np.average(spread, weights=weights)),
        consensus_mae=float(np.average(errors, weights=weights)),
        spearman=spearman(spread, errors),
    )


def _plain(value: Any) -> Any:
    """Return plain values, with ``None`` for what JSON cannot say."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
