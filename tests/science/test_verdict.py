"""When a network that learnt from EIPs gives way to its twin from scratch."""

import math
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.verdict import MIN_AGREEMENT, Verdict, force_agreement


def verdict(score, scratch_score, n_held_out, agreement=None):
    return Verdict(
        score=score, scratch_score=scratch_score, n_held_out=n_held_out, agreement=agreement
    )


def labels_of(forces, ids):
    """Label cells of two atoms with these forces, by source."""
    n = forces.shape[1] // 2
    sources = [f"source{number}" for number in range(len(forces))]
    frames = [bulk("Si", a=5.4 + 0.01 * number) for number in range(n)]
    missing = Labels.missing(Configurations.from_atoms(frames), sources)
    status = np.where(np.isfinite(forces[:, ::2]).all(axis=2).T, 0, 1)
    energy = np.where(status == 0, 0.0, np.nan)
    return replace(missing, ids=np.array(ids), energy=energy, forces=forces, status=status)


def test_the_better_one_is_used():
    assert verdict(-7.0, -6.0, 4).eips_help
    assert not verdict(-6.0, -7.0, 4).eips_help


def test_few_labels_must_say_it_clearly_and_many_need_not():
    assert verdict(-6.9, -7.0, 4).eips_help
    assert not verdict(-6.9, -7.0, 100).eips_help


def test_the_sentence_says_what_is_used_and_by_how_much_errors_change():
    # Half of both errors.
    helped = verdict(-7.0 - 2 * math.log(2), -7.0, 12)
    assert helped.text.startswith("EIPs help (errors on 12 held-out DFT labels -50 %")
    assert "the twin is used" in verdict(-5.0, -7.0, 12).text


def test_without_labels_there_is_no_verdict():
    with pytest.raises(ValueError, match="at least one label"):
        verdict(-7.0, -7.0, 0)


@pytest.fixture
def true():
    return np.random.default_rng(0).normal(size=(1, 40, 3))


def test_eips_that_know_nothing_of_the_material_never_help():
    assert verdict(-7.0, -6.0, 4, agreement=MIN_AGREEMENT).eips_help
    ignorant = verdict(-7.0, -6.0, 4, agreement=0.05)
    assert not ignorant.eips_help
    assert "no EIP has forces like those of DFT: the best agreement is 0.05" in ignorant.text
    assert not verdict(-6.0, -7.0, 4, agreement=1.0).eips_help


def test_the_agreement_is_that_of_the_best_eip_up_to_a_factor(true):
    ids = [str(number) for number in range(20)]
    rng = np.random.default_rng(1)
    noise = rng.normal(size=true.shape)
    dft = labels_of(true, ids)
    assert force_agreement(dft, labels_of(0.5 * true, ids)) == pytest.approx(1.0)
    assert force_agreement(dft, labels_of(-true, ids)) == pytest.approx(-1.0)
    assert abs(force_agreement(dft, labels_of(noise, ids))) < 0.25
    both = labels_of(np.concatenate([noise, true + noise]), ids)
    assert 0.5 < force_agreement(dft, both) < 0.9


def test_the_agreement_is_of_what_both_labelled(true):
    ids = [str(number) for number in range(20)]
    said = true[:, ::-1].copy()
    said[:, :4] = np.nan
    # In another order, with more of them, and without some.
    eips = labels_of(
        np.concatenate([said, np.random.default_rng(2).normal(size=(1, 2, 3))], axis=1),
        [*ids[::-1], "other"],
    )
    swapped = labels_of(true.reshape(20, 2, 3)[:, ::-1].reshape(1, 40, 3), ids)
    assert force_agreement(swapped, eips) == pytest.approx(1.0)


def test_there_may_be_nothing_to_compare(true):
    ids = [str(number) for number in range(20)]
    assert force_agreement(labels_of(0 * true, ids), labels_of(true, ids)) is None
    other = [f"other{number}" for number in range(20)]
    assert force_agreement(labels_of(true, ids), labels_of(true, other)) is None
