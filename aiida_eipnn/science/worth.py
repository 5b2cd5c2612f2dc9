"""Do EIPs carry information about a labelled set? An answer by cross-validation.

Two predictors of held-out labels are compared. One has no EIPs: it chooses, on its training labels,
among a constant for each element and a kernel regression on distances and angles (energies), or
among zero and a fitted pair potential (forces). The other may use EIPs too: the best aligned one, a
ridge regression that stacks all, or the stack and the structure together. EIPs carry information
where the second errs less. It may choose as the first does, so EIPs that say nothing make it no
better, and hardly worse.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from aiida_eipnn.science.arrays import BoolArray, FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.predictors import LabelledSet, Split, fit_energies, fit_forces
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.reference import count_elements
from aiida_eipnn.science.regression import Fit

# A gain below this is not worth the EIPs.
RELEVANT_GAIN = 0.05
CONFIDENCE = 0.95
RESAMPLES = 2000
# Fewer distinct configurations than this decide nothing.
MIN_TO_TELL = 20
# More say no more here, and the regressions take the cube of it.
MAX_CONFIGURATIONS = 500
MAX_ATOMS = 15_000

# What a loop has after its first DFT batches: where EIPs should matter most.
FEW = 25
FEW_DRAWS = 10
N_FOLDS = 5
# Two groups are a contrast, not a sample.
MIN_GROUPS = 3
MAX_GROUP_FOLDS = 10
MIN_TRAIN = 10

RANDOM = "at random"
BY_TYPE = "one config_type at a time"

# Predictors without EIPs come first.
N_WITHOUT = 2
WITHOUT, WITH = "without EIPs", "with EIPs"


class Answer(StrEnum):
    """Whether EIPs carry information."""

    HELP = "help"
    NO_HELP = "do not help"
    UNKNOWN = "cannot tell"


OTHERWISE = {
    Answer.HELP: "help",
    Answer.NO_HELP: "do not help",
    Answer.UNKNOWN: "may or may not help",
}


class Quantity(StrEnum):
    """What is predicted."""

    ENERGY = "energy"
    FORCES = "force"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Held-out errors with and without EIPs.

    Parameters
    ----------
    quantity
        What is predicted: energies, errors in eV/atom, or force components, errors in eV/Å.
    where
        What was held out, for people.
    n_train
        Labelled configurations to learn from, the median over the folds.
    n_test
        Configurations that were held out in turn.
    errors
        Mean absolute error of each predictor, by name.
    without, with_eips
        Mean absolute error of what was chosen on the training labels among the predictors without
        EIPs, and among all.
    gain
        ``1 - with_eips / without``.
    low, high
        Interval of the gain, 95 %, by bootstrap over configurations, over groups where groups
        are held out, and over training sets where these are drawn.
    answer
        *help* where the whole interval is above zero and the gain at least 5 %; *do not help* where
        the whole interval is below 5 %; *cannot tell* otherwise.
    """

    quantity: Quantity
    where: str
    n_train: int
    n_test: int
    errors: dict[str, float]
    without: float
    with_eips: float
    gain: float
    low: float
    high: float
    answer: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What EIPs are worth on a labelled set.

    Parameters
    ----------
    answer
        *help* if they do in any comparison, *do not help* if they do in none, for sure.
    text
        The reason, in one sentence.
    comparisons
        What it rests on.
    n_configurations
        How many configurations took part, after sampling.
    """

    answer: Answer
    text: str
    comparisons: tuple[Comparison, ...]
    n_configurations: int


def judge_worth(
    configurations: Configurations, reference: Labels, labels: Labels, rng: np.random.Generator
) -> Worth:
    """Say whether EIPs carry information about the reference's labels.

    Parameters
    ----------
    configurations
        Their types are the groups that are held out in turn.
    reference
        Labels of one source, of the same configurations in the same order, none missing.
    labels
        Labels of the EIPs, of the same configurations in the same order.
    rng
        The source of all randomness: samples, folds, bootstrap.
    """
    rows = _sample(configurations, first_of_copies(configurations, reference), rng)
    configurations, reference = configurations.take(rows), reference.take(rows)
    labels = labels.take(rows)
    if not labels.ok.any():
        return _cannot_tell("no EIP labelled any of the configurations", len(rows))
    if len(rows) < MIN_TO_TELL:
        return _cannot_tell(
            f"{len(rows)} distinct labelled configurations are too few, {MIN_TO_TELL} are needed",
            len(rows),
        )
    problem = LabelledSet(configurations, reference, labels)
    schemes = [
        _without_strangers(problem, scheme) for scheme in _schemes(configurations.config_types, rng)
    ]
    comparisons = tuple(
        comparison
        for scheme in schemes
        if scheme.splits
        for comparison in _compare(problem, scheme, rng)
    )
    answer = _combine([item.answer for item in comparisons])
    return Worth(
        answer=answer,
        text=_reason(answer, comparisons),
        comparisons=comparisons,
        n_configurations=len(rows),
    )


def first_of_copies(configurations: Configurations, reference: Labels) -> IntArray:
    """Return the rows less the copies of earlier ones, ascending.

    Copies have the same composition, volume and energy and the same size of forces: one geometry
    in two orientations, or symmetry-equivalent strains. With one to learn from and the other held
    out, an error would be a matter of memory.
    """
    if not len(reference):
        return np.zeros(0, dtype=np.int64)
    elements = np.array(configurations.elements, dtype=np.int64)
    lengths = np.linalg.norm(reference.forces[0], axis=1)
    # In units of what files round to: 1e-4 eV, 0.01 Å³, 0.01 eV/Å.
    keys = np.column_stack(
        [
            count_elements(configurations, elements),
            reference.energy[:, 0] / 1e-4,
            np.abs(np.linalg.det(configurations.cells)) / 1e-2,
            np.add.reduceat(lengths, reference.offsets[:-1]) / 1e-2,
        ]
    )
    # Sorted by composition and energy, copies lie together but for a chance energy in between.
    order = np.lexsort([np.arange(len(keys)), *keys.T[::-1]])
    copy_of = np.arange(len(keys))
    for step in (1, 2, 3):
        first, second = order[:-step], order[step:]
        same = (np.abs(keys[first] - keys[second]) < 1.0).all(axis=1)
        for one, two in zip(first[same], second[same], strict=True):
            copy_of[copy_of == copy_of[two]] = copy_of[one]
    return np.sort(np.unique(copy_of, return_index=True)[1])


class _Scheme(NamedTuple):
    """A way to hold labels out.

    ``groups`` are resampled too where there are any; ``drawn`` says that each split draws its
    training set anew.
    """

    where: str
    splits: tuple[Split, ...]
    groups: IntArray | None = None
    drawn: bool = False


def _without_strangers(problem: LabelledSet, scheme: _Scheme) -> _Scheme:
    """Return the scheme without test rows that have an element no training row has.

    Nothing could know its zero of energy.
    """
    splits = []
    for split in scheme.splits:
        unseen = ~problem.fractions[split.train].any(axis=0)
        strange = problem.fractions[split.test][:, unseen].any(axis=1)
        if not strange.all():
            splits.append(split._replace(test=split.test[~strange]))
    return scheme._replace(splits=tuple(splits))


def _schemes(types: StrArray, rng: np.random.Generator) -> tuple[_Scheme, ...]:
    """Return few labels, all labels, and all but one type, as far as the set allows."""
    n = len(types)
    schemes = []
    if n >= 2 * FEW:
        orders = [rng.permutation(n) for _ in range(FEW_DRAWS)]
        splits = [_split(np.isin(np.arange(n), order[:FEW]), rng) for order in orders]
        schemes.append(_Scheme(RANDOM, tuple(splits), drawn=True))
    folds = rng.permutation(n) % N_FOLDS
    splits = [_split(folds != fold, rng) for fold in range(N_FOLDS)]
    schemes.append(_Scheme(RANDOM, tuple(splits)))
    groups = np.unique(types, return_inverse=True)[1].astype(np.int64)
    if splits := _group_splits(groups):
        schemes.append(_Scheme(BY_TYPE, tuple(splits), groups))
    return tuple(schemes)


def _split(train: BoolArray, rng: np.random.Generator) -> Split:
    """Return a split whose training rows have parts at random, of equal size."""
    parts = rng.permutation(int(train.sum())) % N_FOLDS
    return Split(np.flatnonzero(train), np.flatnonzero(~train), parts)


def _group_splits(groups: IntArray) -> list[Split]:
    """Return splits that hold out one group, or a few where there are many."""
    sizes = np.bincount(groups)
    if len(sizes) < MIN_GROUPS:
        return []
    folds = np.empty(len(sizes), dtype=np.int64)
    folds[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes)) % MAX_GROUP_FOLDS
    splits = []
    for fold in range(min(len(sizes), MAX_GROUP_FOLDS)):
        train = folds[groups] != fold
        if train.sum() < MIN_TRAIN:
            return []
        # What suits new groups is chosen by how it does on groups.
        splits.append(Split(np.flatnonzero(train), np.flatnonzero(~train), folds[groups][train]))
    return splits


def _compare(problem: LabelledSet, scheme: _Scheme, rng: np.random.Generator) -> list[Comparison]:
    """Compare energies, and forces where there are any."""
    comparisons = [_compare_by(problem, scheme, Quantity.ENERGY, rng)]
    if np.abs(problem.forces).mean() > 1e-6:
        comparisons.append(_compare_by(problem, scheme, Quantity.FORCES, rng))
    return comparisons


def _compare_by(
    problem: LabelledSet, scheme: _Scheme, quantity: Quantity, rng: np.random.Generator
) -> Comparison:
    """Predict what each split holds out, and compare the errors of all splits together."""
    energies = quantity is Quantity.ENERGY
    fit = fit_energies if energies else fit_forces
    shape = (len(scheme.splits), len(problem.energy))
    errors: dict[str, FloatArray] = defaultdict(lambda: np.zeros(shape))
    weight = np.zeros(shape)
    counts: Counter[str] = Counter()
    for number, split in enumerate(scheme.splits):
        fits = fit(problem, split)
        for name, found in [*fits.items(), *_choose(fits).items()]:
            errors[name][number, split.test] = _errors_by_row(problem, split.test, found.predicted)
            counts[name] += 1
        weight[number, split.test] = 1 if energies else 3 * problem.n_atoms[split.test]
    # A split in which no EIP could be aligned has no errors of EIPs.
    everywhere = [name for name, count in counts.items() if count == len(scheme.splits)]
    mae = {name: float(errors[name].sum() / weight.sum()) for name in everywhere}
    gains = _resampled_gains(errors[WITHOUT], errors[WITH], scheme, rng)
    gain = _gain(mae[WITHOUT], mae[WITH])
    low, high = np.quantile(gains, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Comparison(
        quantity=quantity,
        where=scheme.where,
        n_train=int(np.median([len(split.train) for split in scheme.splits])),
        n_test=int(weight.any(axis=0).sum()),
        errors={name: value for name, value in mae.items() if name not in (WITHOUT, WITH)},
        without=mae[WITHOUT],
        with_eips=mae[WITH],
        gain=gain,
        low=float(low),
        high=float(high),
        answer=_answer(gain, float(low), float(high)),
    )


def _choose(fits: dict[str, Fit]) -> dict[str, Fit]:
    """Return what does best on the training labels, without EIPs and with them.

    EIPs are used where they do better by more than a standard error: of many predictors that say
    nothing, one always seems to do a little better.
    """
    names = list(fits)
    plain = fits[_best_of(fits, names[:N_WITHOUT])]
    informed = fits[_best_of(fits, names)]
    better = plain.held_out - informed.held_out
    clear = better.mean() > better.std() / np.sqrt(len(better))
    return {WITHOUT: plain, WITH: informed if clear else plain}


def _best_of(fits: dict[str, Fit], names: Sequence[str]) -> str:
    return min(names, key=lambda name: fits[name].held_out.mean())


def _errors_by_row(problem: LabelledSet, test: IntArray, predicted: FloatArray) -> FloatArray:
    """Return the absolute error of each test configuration, of forces the sum over components."""
    if predicted.ndim == 1:
        return np.abs(predicted - problem.energy[test])
    errors = np.abs(predicted - problem.forces[problem.atoms(test)]).sum(axis=1)
    starts = np.concatenate([[0], np.cumsum(problem.n_atoms[test])[:-1]])
    return np.add.reduceat(errors, starts)


def _sample(configurations: Configurations, rows: IntArray, rng: np.random.Generator) -> IntArray:
    """Return the rows that take part: all, or a sample of as many as there is time for."""
    order = rng.permutation(rows)
    fits = np.cumsum(configurations.n_atoms[order]) <= MAX_ATOMS
    return np.sort(order[fits][:MAX_CONFIGURATIONS])


def _resampled_gains(
    without: FloatArray, with_eips: FloatArray, scheme: _Scheme, rng: np.random.Generator
) -> FloatArray:
    """Return the gain on resampled groups of resampled configurations. Shape ``(RESAMPLES,)``.

    Errors are of shape ``(n_splits, n)``. Where training sets were drawn, the draws are resampled
    too: another 25 labels might have said something else.
    """
    tested = np.unique(np.concatenate([split.test for split in scheme.splits]))
    without, with_eips = without[:, tested], with_eips[:, tested]
    n_splits, n = without.shape
    groups = np.zeros(n, dtype=np.int64)
    if scheme.groups is not None:
        groups = np.unique(scheme.groups[tested], return_inverse=True)[1]
    n_groups = int(groups.max()) + 1
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=RESAMPLES)
    counts = np.zeros((RESAMPLES, n))
    for group in range(n_groups):
        size = int((groups == group).sum())
        counts[:, groups == group] = rng.multinomial(
            drawn[:, group] * size, np.full(size, 1 / size)
        )
    redrawn = rng.multinomial(n_splits, np.full(n_splits, 1 / n_splits), size=RESAMPLES)
    splits = redrawn if scheme.drawn else np.ones_like(redrawn)
    totals = [((splits @ errors) * counts).sum(axis=1) for errors in (without, with_eips)]
    return np.array([_gain(*pair) for pair in zip(*totals, strict=True)])


def _gain(without: float, with_eips: float) -> float:
    return 1.0 - with_eips / without if without > 0 else 0.0


def _answer(gain: float, low: float, high: float) -> Answer:
    if high < RELEVANT_GAIN:
        return Answer.NO_HELP
    return Answer.HELP if low > 0 and gain >= RELEVANT_GAIN else Answer.UNKNOWN


def _combine(answers: Sequence[Answer]) -> Answer:
    if Answer.HELP in answers:
        return Answer.HELP
    return Answer.NO_HELP if set(answers) == {Answer.NO_HELP} else Answer.UNKNOWN


def _cannot_tell(why: str, n: int) -> Worth:
    return Worth(answer=Answer.UNKNOWN, text=why, comparisons=(), n_configurations=n)


def _reason(answer: Answer, comparisons: Sequence[Comparison]) -> str:
    """Say what decided, for energies and for forces, and where it came out otherwise."""
    texts = []
    for quantity in Quantity:
        same = [row for row in comparisons if row.quantity is quantity and row.answer is answer]
        if same:
            texts.append(_numbers(max(same, key=lambda item: item.gain)))
    exceptions = []
    for other in Answer:
        places = [
            f"{row.quantity} with {row.n_train} labels, {row.where}"
            for row in comparisons
            if row.answer is other is not answer
        ]
        if places:
            exceptions.append(f"{OTHERWISE[other]} ({'; '.join(places)})")
    if exceptions:
        texts.append(f"elsewhere they {' and '.join(exceptions)}")
    return "; ".join(texts)


def _numbers(item: Comparison) -> str:
    unit = "meV/atom" if item.quantity is Quantity.ENERGY else "meV/Å"
    return (
        f"with {item.n_train} labels to learn from, the {item.quantity} of held-out configurations "
        f"({item.where}) is off by {1000 * item.with_eips:.3g} {unit} with EIPs and by "
        f"{1000 * item.without:.3g} without, a gain of {100 * item.gain:.0f} % (95 % interval "
        f"{100 * item.low:.0f} to {100 * item.high:.0f} %)"
    )
