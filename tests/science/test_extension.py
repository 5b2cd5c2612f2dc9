"""Who drives the dynamics while the loop runs."""

import pytest

from aiida_eipnn.science.extension import ExtensionParameters, plan

RECIPES = [
    {"config_type": "rattled", "count": 2},
    {"config_type": "md", "count": 3, "max_uncertainty": 0.7},
    {"config_type": "md", "count": 4},
]


def test_an_eip_drives_until_the_committee_is_trusted():
    parameters = ExtensionParameters(trusted_forces_mae=0.2)
    for error in (None, 0.21):
        found = plan(RECIPES, parameters, error, 0.5, has_eip=True)
        assert found.driver == "eip"
        # An EIP does not know how unsure it is.
        assert not any("max_uncertainty" in recipe for recipe in found.recipes)
    assert plan(RECIPES, parameters, 0.2, 0.5, has_eip=True).driver == "committee"
    assert plan(RECIPES, parameters, None, 0.5, has_eip=False).driver == "committee"


def test_dynamics_ends_where_the_window_does_unless_a_recipe_says_otherwise():
    parameters = ExtensionParameters()
    found = plan(RECIPES, parameters, 0.1, 0.5, has_eip=True).recipes
    assert found[0] == RECIPES[0]
    assert [recipe["max_uncertainty"] for recipe in found[1:]] == [0.7, 0.5]
    without = plan(RECIPES, parameters, 0.1, None, has_eip=True).recipes
    assert without == RECIPES


@pytest.mark.parametrize("content", [{"trusted_forces_mae": 0}, {"every": 0}, {"every": 1.5}])
def test_settings_without_meaning_are_refused(content):
    with pytest.raises(ValueError, match=next(iter(content))):
        ExtensionParameters.from_dict(content)
