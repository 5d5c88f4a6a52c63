"""Recommended settings: every recipe has them, and its models are known by their quantizers."""

import copy
from pathlib import Path

import pytest
from tiny_models import DECODERS, gpt2, tokens

import asymq
from asymq import QuantConfig
from asymq.quantizers.observers import METHODS
from asymq.quantizers.spec import LINKS
from asymq.training.recommendations import FIELDS

ROOT = Path(__file__).parents[2]
RECIPES = ("table2", "w4a16", "w4a8", "w8a8", "w4a4", "npu")


def config(recipe, **more):
    given = {"w4a16": {"group": 16}, "w4a8": {"group": 16}}.get(recipe, {}) | more
    return getattr(QuantConfig, recipe)(*(["beta_gamma"] if recipe == "table2" else []), **given)


def model(settings):
    return asymq.prepare(DECODERS["llama"](), settings)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_settings_and_what_speaks_for_them(recipe):
    found = asymq.recommended(recipe)
    assert found.recipe == recipe
    assert found.loss in ("ce", "kl", "ce+kl") and found.link in LINKS
    assert found.calibration in METHODS and found.steps > 0
    assert 0 < found.rates["ranges"] < 1
    assert found.rates["weights"] is None or found.rates["weights"] > 0
    assert set(found.evidence) == set(FIELDS)
    assert str(found.steps) in str(found) and found.evidence["loss"] in str(found)


def test_evidence_names_records_that_there_are():
    for recipe in RECIPES:
        for text in asymq.recommended(recipe).evidence.values():
            for word in text.replace(":", " ").replace(",", " ").replace(";", " ").split():
                if word.startswith("scripts/"):
                    assert (ROOT / word).exists(), word


def test_evidence_says_with_what_the_rate_was_compared():
    """Of the paper's setting on the one real model, too."""
    found = asymq.recommended("table2")
    assert found.rates["ranges"] == 1e-2 and "27.54 against 83.59" in found.evidence["ranges"]


def test_settings_cannot_be_changed():
    with pytest.raises(TypeError):
        asymq.recommended("w4a8").rates["ranges"] = 1.0


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="no recipe 'w3a3'; there are table2, w4a16"):
        asymq.recommended("w3a3")


@pytest.mark.parametrize("recipe", RECIPES)
def test_rates_of_a_recipe_s_models(recipe):
    group, *others = asymq.range_parameters(model(config(recipe)), lr="recommended")
    assert not others and group["lr"] == asymq.recommended(recipe).rates["ranges"]
    assert group["weight_decay"] == 0


@pytest.mark.parametrize("settings", [QuantConfig.w4a4(group=16), QuantConfig.w4a8(16, cache=8)])
def test_arguments_of_a_recipe_do_not_matter(settings):
    assert asymq.range_parameters(model(settings), lr="recommended")[0]["lr"] > 0


def test_a_loaded_model_is_known(tmp_path):
    prepared = model(config("w8a8"))
    asymq.calibrate(prepared, [tokens(2, 6)])
    asymq.save(prepared, tmp_path)
    (group,) = asymq.range_parameters(asymq.load(tmp_path), lr="recommended")
    assert group["lr"] == asymq.recommended("w8a8").rates["ranges"]
    assert asymq.range_parameters(copy.deepcopy(prepared), lr="recommended")[0]["lr"] == group["lr"]


def test_what_is_no_recipe_s_wants_a_number():
    for settings in (QuantConfig.table2("beta_gamma", weight_bits=3), QuantConfig.npu(weight=8)):
        with pytest.raises(ValueError, match="of none: pass a number, or None"):
            asymq.range_parameters(model(settings), lr="recommended")


def test_other_parameterizations_want_a_number():
    min_max = asymq.prepare(gpt2(), QuantConfig.table2("min_max"))
    with pytest.raises(ValueError, match=r"of table2 is for beta_gamma.*pass a number"):
        asymq.range_parameters(min_max, lr="recommended")
    sigmoid = asymq.prepare(gpt2(), QuantConfig.table2("beta_gamma_sigmoid"))
    with pytest.raises(ValueError, match="with link identity"):
        asymq.range_parameters(sigmoid, lr="recommended")


def test_none_and_numbers_keep_their_meaning():
    prepared = model(config("w8a8"))
    assert "lr" not in asymq.range_parameters(prepared)[0]
    assert asymq.range_parameters(prepared, lr=0.5)[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="\"recommended\", got 'best'"):
        asymq.range_parameters(prepared, lr="best")
