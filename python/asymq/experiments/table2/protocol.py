"""How every cell of Table 2 is run."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass, replace

import asymq
from asymq.experiments.common.command import bit_width, check_options, integer, option, positive
from asymq.experiments.common.recipes import Recipe
from asymq.quantizers import spec as specs

# All that a table can have, in the order of its columns.
COLUMNS = specs.NAMES
PAPERS = ("scale_offset", "min_max", "beta_gamma")
# What the paper's setting is called among the recipes.
PAPERS_SETTING = "table2"
# Options of the paper's quantizers, of which a recipe has its own.
OF_PAPERS_QUANTIZERS = (
    *("weight_bits", "activation_bits", "norm_bits"),
    *("weight_granularity", "activation_granularity", "eps"),
)


def granularity(text: str) -> asymq.PerTensor | asymq.PerChannel | asymq.PerGroup:
    if text in ("tensor", "channel"):
        return asymq.PerTensor() if text == "tensor" else asymq.PerChannel()
    if not (text.isdigit() and int(text)):
        raise ArgumentTypeError(f"must be tensor, channel or the size of groups, got {text!r}")
    return asymq.PerGroup(int(text))


def _name_of_granularity(text: str) -> str:
    granularity(text)
    return text


def _protocol(*given, **more):
    return option(*given, group="protocol", **more)


def _running(*given, **more):
    return option(*given, group="running", **more)


@dataclass(frozen=True)
class Protocol:
    """The defaults are the paper's, or fill in what it leaves open. BadInput: a value is not
    allowed."""

    steps: int = _protocol(2000, "training steps a cell", integer(1))
    batch: int = _protocol(8, "windows a step", integer(1))
    context: int | None = _protocol(
        None, "tokens a window (default 1024, for GPT2-XL 768, at most the model's)", integer(2)
    )
    seed: int = _protocol(0, "of the order of the windows", integer(0))
    calibration_batches: int = _protocol(10, "", integer(1), metavar="N")
    weight_bits: int = _protocol(4, "", bit_width, metavar="N")
    activation_bits: int = _protocol(12, "", bit_width, metavar="N")
    norm_bits: int = _protocol(12, "LayerNorm weights", bit_width, metavar="N")
    weight_granularity: str = _protocol(
        "channel", "tensor, channel, or the size of groups", _name_of_granularity, metavar="WHICH"
    )
    activation_granularity: str = _protocol(
        "tensor", "as for weights, where all sites allow it", _name_of_granularity, metavar="WHICH"
    )
    force_zero: bool = _protocol(True, "calibrated ranges contain zero (default)")
    eps: float = _protocol(1e-8, "least scale of a range", positive)
    adam_eps: float = _protocol(1e-8, "Adam's", positive, metavar="EPS")
    # Calibration and evaluation are float32.
    tf32: bool = _protocol(True, "TF32 matrix products while learning on a GPU (default)")
    perplexity: str = _protocol(
        "raw", "tokenize the test text at once, or line by line", choices=("raw", "run_clm")
    )
    eval_every: int = _running(500, "steps", integer(1), metavar="N")
    checkpoint_every: int = _running(100, "steps, at most 100", integer(1, 100), metavar="N")

    def __post_init__(self):
        check_options(self)

    def config(self, setting: str) -> asymq.QuantConfig:
        """setting: a parameterization of the paper's setting, or a recipe as file names have it."""
        recipe = Recipe.named(setting)
        if recipe is not None:
            return recipe.config()
        table2 = asymq.QuantConfig.table2(setting)
        assert table2.weight and table2.activation and table2.norm_weight
        return replace(
            table2,
            weight=replace(
                table2.weight,
                bits=self.weight_bits,
                eps=self.eps,
                granularity=granularity(self.weight_granularity),
            ),
            activation=replace(
                table2.activation,
                bits=self.activation_bits,
                eps=self.eps,
                granularity=granularity(self.activation_granularity),
            ),
            norm_weight=replace(table2.norm_weight, bits=self.norm_bits, eps=self.eps),
        )
