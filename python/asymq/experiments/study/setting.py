"""What a cell of the study is: a model, its quantizers, and how it learns."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace

import asymq
from asymq.config import KINDS, ROLES
from asymq.experiments.common.recipes import Recipe
from asymq.experiments.table2.protocol import PAPERS_SETTING

LOSSES = ("ce", "kl", "ce+kl")
OPTIMIZERS = ("adam", "sgd")
# Scale (and offset) with LSQ's gradient scale and first values: a form beside the names of
# parameterizations.
LSQ = "lsq"
FROZEN = "0"  # the rate of weights that do not learn
_SEPARATOR = "__"


@dataclass(frozen=True)
class Setting:
    """A recipe and how its ranges learn. recipe: as file names have it, or the paper's. form: a
    name of a parameterization and link, or LSQ. rate, weights: learning rates as typed, of ranges
    and of weights. calibration: calibrate's method and weight_method."""

    recipe: str
    form: str = "beta_gamma"
    optimizer: str = "adam"
    loss: str = "kl"
    rate: str = "1e-3"
    steps: int = 200
    calibration: str = "min_max"
    weights: str = FROZEN

    def config(self) -> asymq.QuantConfig:
        """The recipe's, its ranges learned in this setting's form. A range of each token has no
        other than factors: of it the form changes the link alone."""
        recipe = Recipe.named(self.recipe)
        config = asymq.QuantConfig.table2("beta_gamma") if recipe is None else recipe.config()
        own = {
            name: self._learned(spec)
            for name in (*KINDS, *ROLES)
            if isinstance(spec := getattr(config, name), asymq.QuantSpec)
        }
        return config.replace(**own)

    def _learned(self, spec: asymq.QuantSpec) -> asymq.QuantSpec:
        if self.form == LSQ:
            spec = spec.replace(gradient_scale="lsq")
        name = "scale_offset" if self.form == LSQ else self.form
        if spec.granularity.of_tokens and not name.startswith("beta_gamma"):
            return spec
        return spec.with_parameterization(name)

    def replace(self, **changes) -> Setting:
        return replace(self, **changes)

    def __str__(self) -> str:
        values = [str(value) for value in astuple(self)[1:]]
        names = [field.name for field in fields(self)][1:]
        said = [f"{name} {value}" for name, value in zip(names, values, strict=True)]
        recipe = Recipe.named(self.recipe) or PAPERS_SETTING
        return f"{recipe}: {', '.join(said)}"


@dataclass(frozen=True)
class Cell:
    """One training: a file of results is called so. model: its label."""

    model: str
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        parts = [self.model, *map(str, astuple(self.setting)), f"seed{self.seed}"]
        return _SEPARATOR.join(parts)

    @classmethod
    def named(cls, name: str) -> Cell:
        """The inverse of `name`. ValueError: it is no cell's."""
        model, *parts, seed = name.rsplit(_SEPARATOR, len(fields(Setting)) + 1)
        if len(parts) != len(fields(Setting)) or not seed.startswith("seed"):
            raise ValueError(name)
        values = dict(zip((field.name for field in fields(Setting)), parts, strict=True))
        setting = Setting(**values | {"steps": int(values["steps"])})  # type: ignore[arg-type]
        return cls(model, setting, int(seed.removeprefix("seed")))

    def __str__(self) -> str:
        return f"{self.model} {self.setting}, seed {self.seed}"
