"""What is trained for every figure: its curves, data and claims."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from asymq.experiments.common.files import BadInput
from asymq.experiments.figures import SEEDS, STEPS, claims
from asymq.experiments.figures.toy_problem import VARIANTS, Curve, Data
from asymq.experiments.figures.verdict import Claim
from asymq.quantizers import LINKS


@dataclass(frozen=True)
class Experiment:
    """A figure that is trained: a curve for every name, bit width and learning rate (as typed).

    draw: of plots.DRAW. note: what the paper leaves open or says otherwise. chain_rules:
    panels with equal and with scaled learning rates. unseen: curves for claims alone, as (name,
    bits, learning rate).
    """

    title: str
    names: tuple[str, ...]
    bits: tuple[int, ...]
    lrs: tuple[str, ...]
    claims: tuple[Claim, ...]
    data: Data = field(default_factory=Data)
    draw: str = "ranges"
    note: str = ""
    chain_rules: tuple[bool, ...] = (False,)
    unseen: tuple[tuple[str, int, str], ...] = ()

    def curves(self) -> list[Curve]:
        drawn = [
            Curve(name, bits, lr, self.data, rule)
            for bits in self.bits
            for rule in self.chain_rules
            for name in self.names
            for lr in self.lrs
        ]
        unseen = [Curve(name, bits, lr, self.data) for name, bits, lr in self.unseen]
        return list(dict.fromkeys(drawn + unseen))


FIGURES = {
    "figure3": Experiment(
        "Figure 3: scale/offset and min/max",
        ("scale_offset", "min_max"),
        (3, 10),
        ("1e-2", "5e-3"),
        claims.FIGURE3,
        note="The caption gives the learning rates 1e-2 and 1e-3, the text 1e-2 and 5e-3. With "
        "1e-3 Adam cannot travel the distance in 5,000 steps, so 5e-3 is drawn.",
        unseen=(
            *((name, bits, "1e-3") for name in ("scale_offset", "min_max") for bits in (3, 10)),
            ("scale_offset", 16, "1e-2"),
        ),
    ),
    "figure5": Experiment(
        "Figure 5: min/max and beta/gamma on wide data",
        ("min_max", "min_max_plus", "beta_gamma", "beta_gamma_sigmoid"),
        (3, 10),
        ("5e-3", "1e-3"),
        claims.FIGURE5,
        Data(std=50),
        note="The sigmoid's arguments start at 4.",
    ),
    "links": Experiment(
        "Links: what the factors of beta/gamma are of what is learned",
        ("beta_gamma", *(f"beta_gamma_{link}" for link in LINKS[1:])),
        (3, 10),
        ("5e-3", "1e-3"),
        claims.LINKS_OF_FACTORS,
        Data(std=50),
        note="The paper has no figure of this; it is Figure 5's experiment.",
    ),
    "figure6": Experiment(
        "Figure 6: appropriate learning rates for scale/offset",
        (
            *("scale_offset", "kscale_koffset", "naive", "naive_current", "sophisticated"),
            *("min_max", "beta_gamma"),
        ),
        (3, 10),
        ("1e-2", "5e-3"),
        claims.FIGURE6,
        draw="rates",
        note="naive scales the steps by the first |s| and |z|, a variant by the current ones. "
        "min/max and beta/gamma are drawn because the text compares with them.",
    ),
    "figure7": Experiment(
        "Figure 7: symmetric quantization",
        claims.SYMMETRIC,
        (3,),
        ("5e-3",),
        claims.FIGURE7,
        chain_rules=(False, True),
        note="Scaled learning rates: s times 2/k, γ divided by the first θmax.",
    ),
    "figure8": Experiment(
        "Figure 8: data after ReLU",
        ("scale_offset", "min_max", "min_max_frozen"),
        (3, 8),
        ("1e-2", "5e-3"),
        claims.FIGURE8,
        Data(relu=True),
        note='The caption\'s "identical to Figure 5" cannot be meant: at a standard deviation of '
        "50 min/max travels too slowly. This is standard deviation 1 with the learning rates of "
        "Figure 3.",
    ),
    "figure9": Experiment(
        "Figure 9: ranges that start at the extrema of the data",
        ("scale_offset", "min_max", "beta_gamma"),
        (4, 8),
        ("1e-2", "5e-3"),
        claims.FIGURE9,
        Data(reach=1),
        draw="rates",
    ),
    "drift": Experiment(
        "Section 3: a range that changes during training",
        ("min_max", "min_max_plus", "beta_gamma", "beta_gamma_sigmoid", "beta_gamma_dynamic"),
        (4,),
        ("1e-2", "1e-3"),
        claims.DRIFT,
        Data(reach=1, drifting=True),
        draw="drift",
        note="The paper has no figure of this. From a fifth to four fifths of the steps the "
        "samples become ten times as wide; ranges start at the first extrema.",
    ),
    "offsets": Experiment(
        "A.2: scale and offset under scale/offset and min/max",
        ("sophisticated", "min_max"),
        (10,),
        ("1e-2", "5e-3"),
        claims.OFFSETS,
        draw="scale_offset",
        note="The paper has no figure of this. sophisticated scales the steps of s by 2/k, as "
        "min/max moves it (eqs. 5 to 8).",
    ),
}
FIGURE4 = "Figure 4: loss of language models"
GRADIENTS = "Gradients over x"
TITLES = {
    "figure3": FIGURES["figure3"].title,
    "figure4": FIGURE4,
    **{name: figure.title for name, figure in FIGURES.items()},
    "gradients": GRADIENTS,
    "table1": "Table 1: gradients of asymmetric ranges",
    "table3": "Table 3: gradients of symmetric ranges",
}


@dataclass(frozen=True)
class Settings:
    """What the command line changes. None: as the figure has it."""

    seeds: int = SEEDS
    steps: int = STEPS
    lrs: tuple[str, ...] | None = None
    bits: tuple[int, ...] | None = None
    std: float | None = None
    names: tuple[str, ...] | None = None

    def of(self, name: str) -> Experiment:
        """The figure `name` with these settings. BadInput: symmetric and asymmetric ranges are not
        for the same figure."""
        figure = FIGURES[name]
        symmetric = figure.names[0] in claims.SYMMETRIC
        for other in self.names or ():
            if other not in VARIANTS:
                raise BadInput(f"--params {other}: unknown; there are {', '.join(VARIANTS)}")
            if (other in claims.SYMMETRIC) != symmetric:
                kind = "symmetric" if symmetric else "asymmetric"
                raise BadInput(
                    f"--params {other}: {name} is of {kind} ranges; name the figures it is for"
                )
        changed: dict[str, Any] = {"lrs": self.lrs, "bits": self.bits, "names": self.names}
        changed = {key: value for key, value in changed.items() if value is not None}
        if changed:
            # Curves for claims alone go with the figure's own ones.
            changed["unseen"] = ()
        if self.std is not None:
            changed["data"] = replace(figure.data, std=self.std)
        return replace(figure, **changed)
