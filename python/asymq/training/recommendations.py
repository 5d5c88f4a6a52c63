"""Settings to begin with, by recipe, and what speaks for each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from torch import nn

from asymq.quantizers import QuantSpec, named_quantizers

FILE = Path(__file__).with_suffix(".json")
FIELDS = ("loss", "link", "ranges", "weights", "steps", "calibration")  # of the evidence


@dataclass(frozen=True)
class Recommended:
    """Settings of a recipe of QuantConfig.

    loss: "ce", the model's own; "kl", `SelfDistillation`; or "ce+kl", the latter with
    cross_entropy=1. link: of the ranges' factors. rates: of Adam, for "ranges" and, where they
    learn, too, "weights" (None: not known). steps: of training. calibration: `calibrate`'s method
    and weight_method. evidence: what speaks for each of these, by name and, of rates, by their
    keys: models, tables and numbers, or that it was not measured.
    """

    recipe: str
    loss: str
    link: str
    rates: Mapping[str, float | None]
    steps: int
    calibration: str
    evidence: Mapping[str, str]

    def __str__(self) -> str:
        values = vars(self) | dict(self.rates)
        lines = [f"{name}: {values[name]} ({self.evidence[name]})" for name in FIELDS]
        return "\n".join([self.recipe, *lines])


def recommended(recipe: str) -> Recommended:
    """Settings to begin with for a recipe, such as "w4a8": those that a record speaks for, the
    defaults of the library elsewhere.

    ValueError: there is no such recipe.
    """
    if recipe not in _read():
        raise ValueError(f"asymq.recommended: no recipe {recipe!r}; there are {', '.join(_read())}")
    return _read()[recipe]


@cache
def _read() -> Mapping[str, Recommended]:
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        recipe: Recommended(
            recipe,
            **values | {key: MappingProxyType(values[key]) for key in ("rates", "evidence")},
        )
        for recipe, values in entries.items()
    }


# ---- which recipe a model has ------------------------------------------------------------------

# By kind: bits, symmetric, all codes, and what has a range.
_ROW, _GROUP = (4, True, False, "channel"), (4, True, False, "group")
_QUANTIZERS = {
    "table2": [{"weight": _ROW, "activation": (12, False, False, "tensor")}],
    "npu": [{"weight": _ROW, "activation": (16, False, False, "tensor")}],
    "w4a16": [{"weight": _GROUP}],
    "w4a8": [{"weight": _GROUP, "input": (8, False, False, "token")}],
    "w8a8": [{"weight": (8, True, False, "channel"), "input": (8, True, False, "token")}],
    "w4a4": [
        {"weight": (4, True, True, per), "input": (4, False, False, "token")}
        for per in ("channel", "group")
    ],
}


def rate_of_ranges(model: nn.Module) -> float:
    """What is recommended for the ranges of a prepared model. ValueError: most of its quantizers
    are not those of a recipe, or learn ranges otherwise than its are recommended to."""
    specs: dict[str, Counter[QuantSpec]] = {}
    for _, quantizer in named_quantizers(model):
        specs.setdefault(quantizer.kind, Counter())[quantizer.spec] += 1
    usual = {kind: found.most_common(1)[0][0] for kind, found in specs.items()}
    deciding = {kind: usual[kind] for kind in ("weight", "activation", "input") if kind in usual}
    found = {kind: _outline(spec) for kind, spec in deciding.items()}
    recipe = next((name for name, outlines in _QUANTIZERS.items() if found in outlines), None)
    way_out = "pass a number, or None for the optimizer's own"
    if recipe is None:
        raise ValueError(
            'asymq.range_parameters: lr="recommended" is for the recipes '
            f"{', '.join(_QUANTIZERS)}, and this model's quantizers are of none: {way_out}"
        )
    known = recommended(recipe)
    for kind, spec in deciding.items():
        if (spec.parameterization, spec.link, spec.gradient_scale) != (
            "beta_gamma",
            known.link,
            None,
        ):
            raise ValueError(
                f'asymq.range_parameters: lr="recommended" of {recipe} is for beta_gamma with link '
                f"{known.link}, and the {kind} quantizers are {spec}: {way_out}"
            )
    rate = known.rates["ranges"]
    assert rate is not None
    return rate


def _outline(spec: QuantSpec) -> tuple[int, bool, bool, str]:
    return spec.bits, spec.symmetric, spec.full_range, spec.granularity.per
