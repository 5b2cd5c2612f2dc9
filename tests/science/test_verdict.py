"""When a network that learnt from EIPs gives way to its twin from scratch."""

import math

import pytest

from aiida_eipnn.science.verdict import Verdict


def verdict(score, scratch_score, n_held_out):
    return Verdict(score=score, scratch_score=scratch_score, n_held_out=n_held_out)


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
