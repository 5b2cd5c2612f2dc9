"""Potentials that misbehave on purpose, opened by name in the processes of the engine."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from ase import Atoms

from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.eip.potential import Label, PotentialDescription


@dataclass(frozen=True)
class Misbehaving:
    """Lennard-Jones, except on configurations with an odd number of atoms."""

    act: Callable[[], Label]
    name: str = "misbehaving"
    elements: frozenset[int] = frozenset({14})
    cutoff: float = 5.0
    description: PotentialDescription = field(
        default_factory=lambda: PotentialDescription(name="misbehaving", species=("Si",))
    )

    def label(self, atoms: Atoms) -> Label:
        return self.act() if len(atoms) % 2 else LennardJones().label(atoms)


def aborts() -> Misbehaving:
    return Misbehaving(os.abort)


def exits() -> Misbehaving:
    return Misbehaving(lambda: os._exit(7))


def hangs() -> Misbehaving:
    return Misbehaving(lambda: time.sleep(600))


def eats_memory() -> Misbehaving:
    return Misbehaving(lambda: _eat())


def _eat() -> Label:
    eaten = [np.ones(2**24) for _ in range(100)]
    return Label(float(len(eaten)), np.zeros((7, 3)), np.zeros(6))


def raises() -> Misbehaving:
    return Misbehaving(lambda: 1 / 0)


def returns_nan() -> Misbehaving:
    return Misbehaving(lambda: Label(float("nan"), np.zeros((7, 3)), np.zeros(6)))


def pushes_hard() -> Misbehaving:
    return Misbehaving(lambda: Label(0.0, np.full((7, 3), 1e6), np.zeros(6)))


def dies_when_opened() -> Misbehaving:
    os.abort()


def is_slow() -> Misbehaving:
    @dataclass(frozen=True)
    class Slow(Misbehaving):
        def label(self, atoms: Atoms) -> Label:
            time.sleep(0.3)
            return LennardJones().label(atoms)

    return Slow(os.abort)
