"""What a committee says about configurations, and how much its members disagree."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from aiida_eipnn.science.arrays import Arrays, FloatArray, IntArray, StrArray
from aiida_eipnn.science.configurations import join_offsets, pick_fields

# What is not in predictions of older versions, nor of networks that do not tell it.
OF_FEATURES = ("atom_energy_std", "strangeness")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    r"""Predictions of a committee for ``n`` configurations with ``N`` atoms in all.

    Parameters
    ----------
    ids
        The configurations, by geometry hash. Shape ``(n,)``.
    offsets
        The atoms of configuration ``i`` are rows ``offsets[i]`` to ``offsets[i + 1]``.
        Shape ``(n + 1,)``.
    energy
        Total energy, mean of the members, in eV. Shape ``(n,)``.
    forces
        Forces, mean of the members, in eV/Å. Shape ``(N, 3)``.
    stress
        Stress, mean of the members, in eV/Å³, ASE's sign and order; NaN where a configuration is
        not periodic in all directions. Shape ``(n, 6)``.
    energy_std
        Spread of the members' energies per atom, in eV/atom. Shape ``(n,)``.
    forces_std
        Spread of the members' forces on each atom,
        :math:`\sqrt{\langle \lVert F_i - \langle F_i \rangle \rVert^2 \rangle}`, in eV/Å.
        Shape ``(N,)``.
    features
        Mean over atoms of the first member's trunk features, in single precision: they are most of
        what predictions take, and only rank. Shape ``(n, n_features)``.
    atom_energy_std
        Spread of the energy of each atom that labels leave to the last layer, in eV, mean of the
        members; ``None`` where these do not tell. Shape ``(N,)``.
    strangeness
        Mahalanobis distance of each atom's features from those of labelled atoms of its element,
        mean of the members, without unit; ``None`` where these do not tell. Shape ``(N,)``.
    """

    ids: StrArray
    offsets: IntArray
    energy: FloatArray
    forces: FloatArray
    stress: FloatArray
    energy_std: FloatArray
    forces_std: FloatArray
    features: NDArray[np.float32] | FloatArray
    atom_energy_std: NDArray[np.float32] | FloatArray | None = None
    strangeness: NDArray[np.float32] | FloatArray | None = None

    def __post_init__(self) -> None:
        n, n_atoms = len(self.ids), len(self.forces)
        expected = {
            "offsets": (n + 1,),
            "energy": (n,),
            "forces": (n_atoms, 3),
            "stress": (n, 6),
            "energy_std": (n,),
            "forces_std": (n_atoms,),
        }
        expected |= {name: (n_atoms,) for name in OF_FEATURES if getattr(self, name) is not None}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, not {shape}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_atoms(self) -> IntArray:
        """Number of atoms of each configuration. Shape ``(n,)``."""
        return np.diff(self.offsets)

    @property
    def uncertainty(self) -> FloatArray:
        r"""Force disagreement of each configuration, in eV/Å: the largest over its atoms [1]_.

        Shape ``(n,)``.

        References
        ----------
        .. [1] Zhang et al., DP-GEN, arXiv:1810.11890.
        """
        return self.largest("forces_std")

    def largest(self, name: str) -> FloatArray:
        """Return the largest over its atoms of each configuration. Shape ``(n,)``.

        Parameters
        ----------
        name
            ``forces_std``, ``atom_energy_std`` or ``strangeness``.

        Raises
        ------
        ValueError
            If the predictions do not hold it.
        """
        values: FloatArray | None = getattr(self, name)
        if values is None:
            raise ValueError(
                f"these predictions have no {name}: their networks were not fine-tuned on DFT "
                "labels, or by an older version; train and evaluate again, or choose by another"
            )
        return np.maximum.reduceat(values, self.offsets[:-1])

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Build from :meth:`arrays`."""
        return cls(**pick_fields(cls, arrays))

    def arrays(self) -> Arrays:
        """Return every field that is there by name, ready for :func:`~.arrays.save_arrays`."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in every.items() if array is not None}


def join_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Put predictions of one committee, at least one part, one after the other."""
    arrays = [part.arrays() for part in parts]
    together = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    return Predictions(**{**together, "offsets": join_offsets([part.offsets for part in parts])})
