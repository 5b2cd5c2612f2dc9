"""Small sets, and trainings on them."""

from dataclasses import replace

import numpy as np
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.analytic import LennardJones
from aiida_eipnn.science.eip.selection import SelectionParameters
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.network import NetworkParameters
from aiida_eipnn.science.nn.stage import StageSettings
from aiida_eipnn.science.nn.stages import STAGES, prepare
from aiida_eipnn.science.nn.training import TrainingParameters, fit, start_training

SMALL = {"n_radial": 5, "l_max": 2, "width": 16}
SOFT, HARD = LennardJones(epsilon=0.4, sigma=2.1), LennardJones(epsilon=0.6, sigma=2.15)


def pool_of(n, seed=0, strain=0.06, amplitude=0.15):
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = bulk("Si", cubic=True)
        atoms.set_cell(atoms.cell * (1 + rng.uniform(-strain, strain)), scale_atoms=True)
        atoms.positions += rng.normal(0, rng.uniform(0.02, amplitude), atoms.positions.shape)
        frames.append(atoms)
    return Configurations.from_atoms(frames, "rattled")


def labels_of(configurations, potentials, shift=0.0):
    """Label with potentials, by source; ``shift`` in eV/atom."""
    frames = [configurations.atoms(row) for row in range(len(configurations))]
    results = [[potential.label(atoms) for atoms in frames] for potential in potentials.values()]
    missing = Labels.missing(configurations, list(potentials))
    return replace(
        missing,
        energy=np.array([[label.energy for label in row] for row in results]).T
        + shift * configurations.n_atoms[:, None],
        forces=np.array([np.concatenate([label.forces for label in row]) for row in results]),
        stress=np.array([[label.stress for label in row] for row in results]).transpose(1, 0, 2),
        status=np.zeros_like(missing.status),
    )


def settings_for(name, network=SMALL, tolerance=0.05, **training):
    return StageSettings(
        network=NetworkParameters(**network),
        training=TrainingParameters.from_dict(training, STAGES[name].defaults),
        selection=SelectionParameters(tolerance=tolerance),
    )


def train(name, inputs, settings, seed=0):
    stage = prepare(name, inputs, settings)
    state = start_training(stage.network(seed, 0), settings.training, seed)
    assert fit(state, stage, settings.training)
    stage.finish(state.network, seed)
    return stage, state


def committee_of(*networks, stage="finetune", eips=()):
    return Committee(members=networks, stage=stage, seeds=tuple(range(len(networks))), eips=eips)
