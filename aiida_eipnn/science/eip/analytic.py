"""Analytic potentials in NumPy: for tests, tutorials, and wherever no KIM model is installed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from aiida_eipnn.science.arrays import FloatArray, IntArray
from aiida_eipnn.science.eip.names import (
    LENNARD_JONES,
    STILLINGER_WEBER,
    number_of,
    read_name,
    write_name,
)
from aiida_eipnn.science.eip.potential import (
    Label,
    PotentialDescription,
    refuse_unknown_elements,
    virial_stress,
)
from aiida_eipnn.science.neighbour_list import NeighborList

_Potential = TypeVar("_Potential", "LennardJones", "StillingerWeber")


class Publication(NamedTuple):
    """Where parameters were published."""

    citation: str
    doi: str
    year: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LennardJones:
    r"""Lennard-Jones with energy and force shifted to zero at the cutoff, the same for all pairs.

    :math:`V(r) = u(r) - u(r_c) - (r - r_c)\, u'(r_c)` with
    :math:`u(r) = 4 \epsilon \left[ (\sigma / r)^{12} - (\sigma / r)^6 \right]`.

    Parameters
    ----------
    epsilon
        Depth of the unshifted well, in eV.
    sigma
        Distance at which the unshifted energy is zero, in Å.
    cutoff
        In Å.
    """

    epsilon: float = 0.2
    sigma: float = 2.1
    cutoff: float = 5.0

    def __post_init__(self) -> None:
        if min(self.epsilon, self.sigma, self.cutoff) <= 0:
            raise ValueError(f"epsilon, sigma and cutoff must be positive; got {self}")

    @property
    def name(self) -> str:
        """The name that opens it."""
        return write_name(LENNARD_JONES, _settings_of(self))

    @property
    def elements(self) -> frozenset[int]:
        """Every element: no parameter depends on it."""
        return frozenset(range(1, 119))

    @property
    def description(self) -> PotentialDescription:
        """Where it comes from."""
        return PotentialDescription(
            name=self.name, title="Lennard-Jones potential, shifted force", family="LJ"
        )

    def label(self, atoms: Atoms) -> Label:
        """Return energy, forces and stress of one configuration."""
        pairs = _pairs(atoms, self.cutoff, full_list=False)
        energy, slope = self._pair(pairs.distance)
        gradients = (slope / pairs.distance)[:, None] * pairs.vector
        return _label(atoms, pairs, float(energy.sum()), gradients)

    def _pair(self, r: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return energy and its derivative at each distance."""
        u, slope = self._unshifted(r)
        u_cut, slope_cut = self._unshifted(np.array(self.cutoff))
        return u - u_cut - (r - self.cutoff) * slope_cut, slope - slope_cut

    def _unshifted(self, r: FloatArray) -> tuple[FloatArray, FloatArray]:
        s6 = (self.sigma / r) ** 6
        return 4 * self.epsilon * (s6**2 - s6), 4 * self.epsilon * (6 * s6 - 12 * s6**2) / r


@dataclass(frozen=True, slots=True, kw_only=True)
class StillingerWeber:
    r"""Stillinger-Weber for one element; the defaults are silicon of 1985 [1]_.

    .. math::

        E = \sum_{i<j} A \left[ B (\sigma / r_{ij})^4 - 1 \right] e^{\sigma / (r_{ij} - r_c)}
            + \lambda \sum_i \sum_{j<k} (\cos \theta_{jik} + 1/3)^2 g_{ij} g_{ik},
        \qquad g_{ij} = e^{\gamma / (r_{ij} - r_c)}.

    The numbers are those of the KIM model ``SW_StillingerWeber_1985_Si__MO_405512056662_005`` to
    the last digit, which are in eV and Å; those of LAMMPS' ``Si.sw``, rounded in between, give
    energies that differ by 2e-4 eV/atom.

    Parameters
    ----------
    A
        Strength of the pair term, in eV: the reduced 7.049556277 times epsilon.
    B
        Repulsion over attraction, without unit.
    sigma
        Length of the pair term, in Å.
    lambda_
        Strength of the angular term, in eV: the reduced 21 times epsilon. The name of the
        potential has it as ``lambda``.
    gamma
        Length of the angular term, in Å: the reduced 1.2 times sigma.
    cutoff
        In Å: the reduced 1.8 times sigma.
    element
        Symbol of the element it is for.

    References
    ----------
    .. [1] Stillinger & Weber, Phys. Rev. B 31, 5262 (1985).
    """

    A: float = 15.2848479197914
    B: float = 0.6022245584
    sigma: float = 2.0951
    lambda_: float = 45.5322
    gamma: float = 2.51412
    cutoff: float = 3.77118
    element: str = "Si"

    def __post_init__(self) -> None:
        numbers = (self.A, self.B, self.sigma, self.lambda_, self.gamma, self.cutoff)
        if min(numbers) <= 0:
            raise ValueError(
                f"A, B, sigma, lambda, gamma and cutoff must be positive; got {numbers}"
            )
        if atomic_numbers.get(self.element, 0) < 1:
            raise ValueError(f"{self.element!r} is no element; write a symbol such as Si")

    @property
    def name(self) -> str:
        """The name that opens it: that of the published set where it is one."""
        published = {potential: name for name, (potential, _) in PUBLISHED.items()}
        if self in published:
            return f"{STILLINGER_WEBER}[{published[self]}]"
        return write_name(STILLINGER_WEBER, _settings_of(self))

    @property
    def elements(self) -> frozenset[int]:
        """The one element it is for."""
        return frozenset([atomic_numbers[self.element]])

    @property
    def description(self) -> PotentialDescription:
        """Where it comes from."""
        found = [paper for potential, paper in PUBLISHED.values() if potential == self]
        facts = found[0]._asdict() if found else {}
        return PotentialDescription(
            name=self.name,
            title=f"Stillinger-Weber potential for {self.element}",
            species=(self.element,),
            family="SW",
            **facts,
        )

    def label(self, atoms: Atoms) -> Label:
        """Return energy, forces and stress of one configuration.

        Raises
        ------
        ValueError
            If it holds another element.
        """
        if not (atoms.numbers == atomic_numbers[self.element]).all():
            refuse_unknown_elements(self.name, atoms.numbers, self.elements)
        pairs = _pairs(atoms, self.cutoff, full_list=True)
        energy, slope = self._pair(pairs.distance)
        unit = pairs.vector / pairs.distance[:, None]
        angular_energy, gradients = self._angular(pairs, unit, len(atoms))
        # Each pair is listed from both its ends.
        gradients += (0.5 * slope)[:, None] * unit
        return _label(atoms, pairs, 0.5 * float(energy.sum()) + angular_energy, gradients)

    def _pair(self, r: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the pair energy and its derivative at each distance."""
        beyond = 1.0 / (r - self.cutoff)
        fade = self.A * np.exp(self.sigma * beyond)
        repulsion = self.B * (self.sigma / r) ** 4
        energy = (repulsion - 1.0) * fade
        return energy, -4.0 * repulsion / r * fade - self.sigma * beyond**2 * energy

    def _angular(self, pairs: "_Pairs", unit: FloatArray, n_atoms: int) -> tuple[float, FloatArray]:
        r"""Return the angular energy and its derivative by the vector of each pair.

        Without a list of triplets: with :math:`c` the wanted cosine, :math:`s_i = \sum_j g_{ij}`,
        :math:`v_i = \sum_j g_{ij} u_{ij}` and :math:`M_i = \sum_j g_{ij} u_{ij} u_{ij}^T`, the sum
        over all pairs of neighbours is :math:`M_i : M_i - 2 c\, v_i \cdot v_i + c^2 s_i^2`, and
        those with :math:`j = k` are :math:`(1 - c)^2 \sum_j g_{ij}^2` of it.
        """
        beyond = 1.0 / (pairs.distance - self.cutoff)
        g = np.exp(self.gamma * beyond)
        # The columns of u, and of 1, times those of g u and g: all moments in one sum.
        extended = np.column_stack([unit, np.ones(len(unit))])
        products = (g[:, None] * extended)[:, :, None] * extended[:, None, :]
        moments = _sum_by_atom(products.reshape(-1, 16), pairs.i, n_atoms).reshape(-1, 4, 4)
        # (u u' - c)^2 = (u u')^2 - 2 c u u' + c^2: the weights of M, v and s in the square.
        weighted = moments * _WEIGHTS
        own = (1.0 - _COSINE) ** 2
        energy = 0.5 * self.lambda_ * float((weighted * moments).sum() - own * (g @ g))
        along = (weighted[pairs.i] @ extended[:, :, None])[:, :, 0]
        by_g = (along * extended).sum(axis=1) - own * g
        turn = 2.0 * g[:, None] * along[:, :3]
        turn -= (turn * unit).sum(axis=1)[:, None] * unit
        stretch = -self.gamma * beyond**2 * g * by_g
        return energy, self.lambda_ * (stretch[:, None] * unit + turn / pairs.distance[:, None])


# The cosine of the tetrahedral angle, which every published set has.
_COSINE = -1.0 / 3.0
_WEIGHTS = np.ones((4, 4))
_WEIGHTS[:3, 3] = _WEIGHTS[3, :3] = -_COSINE
_WEIGHTS[3, 3] = _COSINE**2

_LEE = Publication(
    "Lee and Hwang, Force-matching-based parameterization of the Stillinger-Weber potential for "
    "thermal conduction in silicon, Physical Review B 85 125204 (2012)",
    "10.1103/PhysRevB.85.125204",
    2012,
)

# Published sets by name, each with a KIM model of the same numbers.
PUBLISHED: dict[str, tuple[StillingerWeber, Publication]] = {
    "stillinger-1985": (
        StillingerWeber(),
        Publication(
            "Stillinger and Weber, Computer simulation of local order in condensed phases of "
            "silicon, Physical Review B 31 5262 (1985)",
            "10.1103/PhysRevB.31.5262",
            1985,
        ),
    ),
    "balamane-1992": (
        StillingerWeber(A=16.319722781255, lambda_=48.615),
        Publication(
            "Balamane, Halicioglu and Tiller, Comparative study of silicon empirical interatomic "
            "potentials, Physical Review B 46 2250 (1992)",
            "10.1103/PhysRevB.46.2250",
            1992,
        ),
    ),
    "hauch-1999": (
        StillingerWeber(lambda_=91.0644),
        Publication(
            "Hauch, Holland, Marder and Swinney, Dynamic Fracture in Single Crystal Silicon, "
            "Physical Review Letters 82 3823 (1999)",
            "10.1103/PhysRevLett.82.3823",
            1999,
        ),
    ),
    "lee-2012-lda": (
        StillingerWeber(
            A=10.55050691528374,
            sigma=2.0780213,
            lambda_=39.524387242,
            gamma=2.49362556,
            cutoff=3.74043834,
        ),
        _LEE,
    ),
    "lee-2012-gga": (
        StillingerWeber(
            A=10.00980594883784,
            sigma=2.1051937,
            lambda_=41.930805568,
            gamma=2.52623244,
            cutoff=3.78934866,
        ),
        _LEE,
    ),
}


def open_lennard_jones(name: str) -> LennardJones:
    """Open ``lennard-jones`` or ``lennard-jones[epsilon=...,sigma=...,cutoff=...]``.

    Raises
    ------
    ValueError
        If a setting is unknown or not a number.
    """
    kind, words, settings = read_name(name)
    if kind != LENNARD_JONES or words:
        raise ValueError(
            f"cannot read {name!r}; write {LENNARD_JONES}[epsilon=0.2,sigma=2.1,cutoff=5]"
        )
    return _with_settings(name, LennardJones(), settings)


def open_stillinger_weber(name: str) -> StillingerWeber:
    """Open ``stillinger-weber``, ``stillinger-weber[hauch-1999]`` or with settings.

    Settings replace numbers of the published set: ``stillinger-weber[hauch-1999,lambda=80]``.

    Raises
    ------
    ValueError
        If there is no such published set, if a setting is unknown or not a number.
    """
    kind, words, settings = read_name(name)
    if kind != STILLINGER_WEBER or len(words) > 1 or not set(words) <= set(PUBLISHED):
        raise ValueError(
            f"cannot read {name!r}; write {STILLINGER_WEBER}[SET] with one of the published sets "
            f"{', '.join(PUBLISHED)}, or {STILLINGER_WEBER}[lambda=50,...]"
        )
    published = PUBLISHED[words[0]][0] if words else StillingerWeber()
    return _with_settings(name, published, settings)


def _with_settings(name: str, potential: _Potential, settings: Mapping[str, str]) -> _Potential:
    """Return the potential with some of its fields replaced."""
    types = {item.name.rstrip("_"): item for item in fields(potential)}
    if unknown := sorted(set(settings) - set(types)):
        raise ValueError(
            f"cannot open {name!r}: {unknown} are no settings; it has only the settings "
            f"{list(types)}"
        )
    values: dict[str, Any] = {
        types[key].name: number_of(name, key, text) if types[key].type is float else text
        for key, text in settings.items()
    }
    try:
        return replace(potential, **values)
    except ValueError as error:
        raise ValueError(f"cannot open {name!r}: {error}") from error


def _settings_of(potential: LennardJones | StillingerWeber) -> dict[str, object]:
    """Return the fields by the names that settings have: Python keeps ``lambda`` for itself."""
    return {item.name.rstrip("_"): getattr(potential, item.name) for item in fields(potential)}


class _Pairs(NamedTuple):
    """Pairs of atoms within a cutoff: ``vector`` leads from ``i`` to an image of ``j``."""

    i: IntArray
    j: IntArray
    distance: FloatArray
    vector: FloatArray


def _pairs(atoms: Atoms, cutoff: float, *, full_list: bool) -> _Pairs:
    """Return the pairs below the cutoff, once or from both their ends."""
    neighbours = NeighborList(cutoff=cutoff, full_list=full_list)
    # vesin's second name for an ASE cell is "box"; rows are cell vectors there too.
    i, j, distance, vector = neighbours.compute(
        points=atoms.positions,
        box=atoms.cell.complete().array,
        periodic=atoms.pbc,
        quantities="ijdD",
    )
    i, j = i.astype(np.int64), j.astype(np.int64)
    # At the cutoff itself Stillinger-Weber divides by zero.
    if (inside := distance < cutoff).all():
        return _Pairs(i, j, distance, vector)
    return _Pairs(i[inside], j[inside], distance[inside], vector[inside])


def _label(atoms: Atoms, pairs: _Pairs, energy: float, gradients: FloatArray) -> Label:
    """Return the label, given the derivative of the energy by the vector of each pair."""
    n = len(atoms)
    forces = _sum_by_atom(gradients, pairs.i, n) - _sum_by_atom(gradients, pairs.j, n)
    stress = np.full(6, np.nan)
    if atoms.pbc.all():
        stress = virial_stress(pairs.vector, -gradients, atoms.cell.volume)
    return Label(energy, forces, stress)


def _sum_by_atom(values: FloatArray, atom: IntArray, n_atoms: int) -> FloatArray:
    """Sum the rows of each atom. Shape ``(n_pairs, k)`` to ``(n_atoms, k)``."""
    width = values.shape[1]
    # bincount on the flat array is several times as fast as np.add.at on rows.
    places = (atom[:, None] * width + np.arange(width)).ravel()
    sums = np.bincount(places, weights=values.ravel(), minlength=n_atoms * width)
    return np.asarray(sums, dtype=np.float64).reshape(n_atoms, width)
