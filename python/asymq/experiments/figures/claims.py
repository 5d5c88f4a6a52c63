"""What the paper claims of its controlled experiments, and whether the runs bear it out.

All verdicts are computed from the runs of all seeds: a run is converged if
its error is below 1.1 times that of the best range and its ends moved by less than 2 % of the span
over the last 1,000 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from asymq.experiments.common.verdict import Verdict
from asymq.experiments.figures.toy_problem import (
    NEAR,
    VARIANTS,
    Best,
    Curve,
    Run,
    Target,
)
from asymq.experiments.figures.verdict import Claim, Missing, judge
from asymq.quantizers import LINKS

SAME = 0.02  # of the span: ends no further apart are at the same place


@dataclass(frozen=True)
class Runs:
    """The runs of one figure. lrs and bits: those drawn."""

    names: tuple[str, ...]
    bits: tuple[int, ...]
    lrs: tuple[str, ...]
    runs: dict[Curve, Run]
    best: dict[Target, Best]

    def get(self, name: str, bits: int, lr: str, chain_rule: bool = False) -> Run:
        for curve, run in self.runs.items():
            key = curve.name, curve.bits, float(curve.lr), curve.chain_rule
            if key == (name, bits, float(lr), chain_rule):
                return run
        raise Missing(f"{VARIANTS[name].label} at {bits} bits and {lr}")

    def drawn(self, name: str, bits: int | None = None) -> list[Run]:
        """The drawn runs of a parameterization, of all bit widths or one."""
        widths = self.bits if bits is None else (bits,)
        return [self.get(name, b, lr) for b in widths for lr in self.lrs]

    def need(self, *names: str) -> None:
        for name in names:
            if name not in self.names:
                raise Missing(VARIANTS[name].label)


# ---- words -------------------------------------------------------------------------------------


def label(run: Run, bits: bool = True) -> str:
    curve = run.curve
    rule = ", scaled rates" if curve.chain_rule else ""
    return f"{curve.variant.label} {curve.lr}" + (f" {curve.bits} bits" if bits else "") + rule


def ends(run: Run) -> str:
    """Means over the seeds."""
    low, high = run.low[-1].mean().item(), run.high[-1].mean().item()
    return f"({low:.4g}, {high:.4g})"


def times(values: Tensor) -> str:
    """Mean and worst of the error over that of the best range."""
    mean, worst = values.mean().item(), values.max().item()
    return f"{mean:.4g} x best (worst {worst:.4g})"


def percent(values: Tensor) -> str:
    return f"{100 * values.mean().item():.2g} %"


def span_of(values: Tensor, unit: str = "") -> str:
    """The least and the largest of finite values."""
    low, high = values.min().item(), values.max().item()
    text = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
    return text + unit


def converged(runs: Iterable[Run]) -> tuple[int, int]:
    """How many seeds of how many."""
    flags = torch.cat([run.converged for run in runs])
    return int(flags.sum()), len(flags)


def _each(runs: Iterable[Run], what: Callable[[Run], str]) -> str:
    return "; ".join(f"{label(run)}: {what(run)}" for run in runs)


def _summary(run: Run) -> str:
    n, of = converged([run])
    return f"{n} of {of} converge, {ends(run)}, {times(run.final_ratio)}"


def apart(a: Run, b: Run, steps: slice | int = -1) -> Tensor:
    """How far the ends of two runs are from each other, as a fraction of the second's final span;
    the larger of both ends, and the largest of `steps`."""
    far = [(x[steps] - y[steps]).abs() for x, y in ((a.low, b.low), (a.high, b.high))]
    largest = torch.maximum(*far) / b.span
    return largest.amax(0) if largest.dim() > 1 else largest


# ---- Figure 3 ----------------------------------------------------------------------------------


def _scale_offset_fails(runs: Runs) -> tuple[str, bool]:
    lrs = dict.fromkeys((*runs.lrs, "1e-3"))
    tried = [runs.get("scale_offset", 10, lr) for lr in lrs]
    n, of = converged(tried)
    return f"{n} of {of} runs converge. {_each(tried, _summary)}", n == 0


def _scale_offset_is_sensitive(runs: Runs) -> tuple[str, bool]:
    if len(runs.lrs) < 2:
        raise Missing("two learning rates")
    found = {}
    for name in ("scale_offset", "min_max"):
        pairs = combinations(runs.drawn(name, 10), 2)
        found[name] = torch.stack([apart(*pair) for pair in pairs]).amax(0)
    text = "; ".join(
        f"{VARIANTS[name].label}: final ends {percent(far)} of the span apart"
        for name, far in found.items()
    )
    holds = bool((found["scale_offset"] > SAME).all() and (found["min_max"] < SAME).all())
    return f"10 bits, {' against '.join(runs.lrs)}: {text}", holds


def _min_max_converges(runs: Runs) -> tuple[str, bool]:
    tried = runs.drawn("min_max")
    n, of = converged(tried)
    return f"{n} of {of} runs converge. {_each(tried, _summary)}", n == of


def _min_max_converges_at_caption_rate(runs: Runs) -> tuple[str, bool]:
    tried = [runs.get("min_max", bits, "1e-3") for bits in (3, 10)]
    n, of = converged(tried)
    return f"{n} of {of} runs converge. {_each(tried, _summary)}", n == of


def _scale_turns_negative(runs: Runs) -> tuple[str, bool]:
    run = runs.get("scale_offset", 16, "1e-2")
    least = run.learned["scale"].amin(0)
    offset = run.learned["offset"][-1].abs()
    measured = (
        f"the scale turns negative in {int((least < 0).sum())} of {len(least)} seeds; in the end "
        f"the offset is {span_of(offset)} in size and the error "
        f"{span_of(run.final_ratio)} x best"
    )
    return measured, bool((least < 0).all())


FIGURE3 = (
    Claim("scale/offset fails to converge in the high-bit case.", _scale_offset_fails),
    Claim("scale/offset responds sensitively to the learning rate.", _scale_offset_is_sensitive),
    Claim("min/max converges consistently in all scenarios.", _min_max_converges),
    Claim(
        "The same with the learning rate 1e-3 of the caption.", _min_max_converges_at_caption_rate
    ),
    Claim(
        "At 16 bits scale/offset results in values too large to be shown (judged by whether the "
        "scale turns negative in every seed).",
        _scale_turns_negative,
    ),
)

# ---- Figure 5 ----------------------------------------------------------------------------------


def _beta_gamma_arrives(runs: Runs) -> tuple[str, bool]:
    fast, slow = runs.drawn("beta_gamma"), runs.drawn("min_max")
    (n, of), (m, of_slow) = converged(fast), converged(slow)
    arrivals = _each(
        fast, lambda run: f"{ends(run)} and 1.05 x best after {span_of(run.arrival())} steps"
    )
    return (
        f"beta/gamma converges in {n} of {of} runs, min/max in {m} of {of_slow}. {arrivals}; "
        f"{_each(slow, lambda run: f'{ends(run)}, {times(run.final_ratio)}')}",
        n == of and m == 0,
    )


def _min_max_plus_overlays(runs: Runs) -> tuple[str, bool]:
    pairs = list(zip(runs.drawn("min_max_plus"), runs.drawn("beta_gamma"), strict=True))
    far = [apart(*pair, slice(None)) for pair in pairs]
    text = "; ".join(
        f"{b.curve.lr} {b.curve.bits} bits: {100 * d.max().item():.2g} %"
        for (_, b), d in zip(pairs, far, strict=True)
    )
    measured = f"furthest apart at any step, in % of the final span: {text}"
    return measured, bool(torch.cat(far).max() < SAME)


def _steps_over_those_without(runs: Runs, link: str) -> tuple[str, list[Tensor]]:
    """Of arrival under a link, in words and for each pair of curves."""
    pairs = list(zip(runs.drawn(f"beta_gamma_{link}"), runs.drawn("beta_gamma"), strict=True))
    slower = [a.arrival() / b.arrival() for a, b in pairs]
    text = "; ".join(
        f"{b.curve.lr} {b.curve.bits} bits: {_slower(d)}"
        for (_, b), d in zip(pairs, slower, strict=True)
    )
    return f"steps to 1.05 x best with {link} over those without: {text}", slower


def _sigmoid_is_slower(runs: Runs) -> tuple[str, bool]:
    measured, slower = _steps_over_those_without(runs, "sigmoid")
    return measured, all(bool((d > 1).all()) for d in slower)


def _slower(ratio: Tensor) -> str:
    if not ratio.isfinite().all():
        return f"{int((~ratio.isfinite()).sum())} of {len(ratio)} never arrive"
    return span_of(ratio, " x")


FIGURE5 = (
    Claim(
        "beta/gamma converges quickly, in stark contrast to min/max.",
        _beta_gamma_arrives,
    ),
    Claim("min/max+ overlaps perfectly with beta/gamma without sigmoid.", _min_max_plus_overlays),
    Claim("The sigmoid slows beta/gamma down.", _sigmoid_is_slower),
)


# ---- links of the factors ----------------------------------------------------------------------


def _linked(runs: Runs) -> list[str]:
    names = [f"beta_gamma_{link}" for link in LINKS[1:]]
    runs.need("beta_gamma", *names)
    return names


def _all_links_converge(runs: Runs) -> tuple[str, bool]:
    drawn = [run for name in ("beta_gamma", *_linked(runs)) for run in runs.drawn(name)]
    return _each(drawn, _summary), all(n == of for n, of in (converged([r]) for r in drawn))


def _no_link_is_faster(runs: Runs) -> tuple[str, bool]:
    _linked(runs)
    found = [_steps_over_those_without(runs, link) for link in LINKS[1:]]
    return (
        ". ".join(text for text, _ in found),
        all(bool((d >= 1).all()) for _, slower in found for d in slower),
    )


LINKS_OF_FACTORS = (
    Claim("Whatever the link, beta/gamma converges to the best range.", _all_links_converge),
    Claim("No link arrives earlier than beta/gamma without one.", _no_link_is_faster),
)

# ---- Figure 6 ----------------------------------------------------------------------------------

_ALTERNATIVES = ("kscale_koffset", "naive", "sophisticated")


def _alternatives_are_better(runs: Runs) -> tuple[str, bool]:
    tried = [run for name in _ALTERNATIVES for run in runs.drawn(name, 10)]
    plain = {run.curve.lr: run for run in runs.drawn("scale_offset", 10)}
    better = [bool((r.final_ratio < plain[r.curve.lr].final_ratio).all()) for r in tried]
    text = _each([*plain.values(), *tried], lambda run: times(run.final_ratio))
    return f"final error {text}", all(better)


def _none_is_as_stable(runs: Runs) -> tuple[str, bool]:
    least = []
    for lr in runs.lrs:
        stable = [runs.get(name, 10, lr).oscillation.mean() for name in ("min_max", "beta_gamma")]
        tried = [runs.get(name, 10, lr).oscillation.mean() for name in _ALTERNATIVES]
        least.append(min(tried) > max(stable))
    shown = [r for n in (*_ALTERNATIVES, "min_max", "beta_gamma") for r in runs.drawn(n, 10)]
    text = _each(shown, lambda run: percent(run.oscillation))
    return f"oscillation in % of the span: {text}", all(least)


FIGURE6 = (
    Claim(
        "All alternatives (kscale/koffset, naive, sophisticated) are better than vanilla "
        "scale/offset in 10-bit quantization.",
        _alternatives_are_better,
    ),
    Claim(
        "None of the alternatives shows the stability of min/max and beta/gamma (judged by their "
        "oscillation at 10 bits).",
        _none_is_as_stable,
    ),
)

# ---- Figure 7 ----------------------------------------------------------------------------------

SYMMETRIC = ("symmetric_scale", "symmetric_max", "symmetric_gamma")


def _speeds_differ(runs: Runs) -> tuple[str, bool]:
    found, holds = [], True
    for bits in runs.bits:
        for lr in runs.lrs:
            tried = [runs.get(name, bits, lr) for name in SYMMETRIC]
            same = all(bool((apart(a, b) < SAME).all()) for a, b in combinations(tried, 2))
            speeds = torch.stack([run.arrival() for run in tried])
            order = speeds.argsort(0)
            gaps = speeds.sort(0).values.diff(dim=0)
            holds &= same and bool((gaps > 0).all()) and bool((order == order[:, :1]).all())
            found.append(
                _each(
                    tried,
                    lambda run: (
                        f"{ends(run)}, {times(run.final_ratio)}, 1.05 x best after "
                        f"{span_of(run.arrival())} steps"
                    ),
                )
            )
    return "; ".join(found), holds


def _scaled_rates_coincide(runs: Runs) -> tuple[str, bool]:
    far = []
    for bits in runs.bits:
        for lr in runs.lrs:
            tried = [runs.get(name, bits, lr, chain_rule=True) for name in SYMMETRIC]
            far += [apart(a, b, slice(None)).max() for a, b in combinations(tried, 2)]
    largest = max(far).item()
    return f"furthest apart at any step: {largest:.1g} of the final span", largest < 1e-3


FIGURE7 = (
    Claim(
        "With one learning rate for all, s, θmax and γ reach the same range at different speeds.",
        _speeds_differ,
    ),
    Claim(
        "With appropriately scaled learning rates they behave identically: all lines overlap.",
        _scaled_rates_coincide,
    ),
)

# ---- Figure 8 ----------------------------------------------------------------------------------


_RELU = ("scale_offset", "min_max", "min_max_frozen")


def _oscillates_more(runs: Runs) -> tuple[str, bool]:
    more = []
    for lr in runs.lrs:
        plain, *others = (runs.get(name, 3, lr).oscillation.mean() for name in _RELU)
        more.append(plain > max(others))
    shown = [run for name in _RELU for run in runs.drawn(name, 3)]
    text = _each(shown, lambda run: f"{percent(run.oscillation)}, {_summary(run)}")
    return f"oscillation in % of the span: {text}", all(more)


def _after_arrival(run: Run) -> Tensor:
    """The largest error over the best once it was within 1.05 times; infinite if it never was."""
    steps = torch.arange(run.steps + 1)[:, None]
    arrival = run.arrival()
    later = torch.where(steps >= arrival, run.ratio, 0).amax(0)
    return torch.where(arrival.isfinite(), later, math.inf)


def _leaves_again(runs: Runs) -> tuple[str, bool]:
    more = []
    for lr in runs.lrs:
        plain, *others = (_after_arrival(runs.get(name, 8, lr)).max() for name in _RELU)
        more.append(plain > max(others))
    shown = [run for name in _RELU for run in runs.drawn(name, 8)]
    text = _each(
        shown,
        lambda run: (
            f"up to {_after_arrival(run).max().item():.3g} x best; {_summary(run)}; θmax up to "
            f"{run.high.max().item():.3g}"
        ),
    )
    return f"error once it was within 1.05 x best: {text}", all(more)


def _frozen_minimum(runs: Runs) -> tuple[str, bool]:
    tried = runs.drawn("min_max_frozen")
    n, of = converged(tried)
    still = all(bool((run.low == 0).all()) for run in tried)
    moves = "θmin stays at 0" if still else "θmin moves"
    text = _each(tried, lambda run: f"{ends(run)}, {times(run.final_ratio)}")
    return f"{moves}; {n} of {of} runs converge. {text}", still and n == of


FIGURE8 = (
    Claim(
        "scale/offset is particularly unstable when θmin is at its optimum from the beginning: "
        "left, 3 bits (judged by its oscillation at every learning rate against both min/max).",
        _oscillates_more,
    ),
    Claim(
        "The same on the right, 8 bits (judged by how far it leaves the best range once it was "
        "there).",
        _leaves_again,
    ),
    Claim("min/max can fix θmin at 0 and learn θmax alone.", _frozen_minimum),
)

# ---- Figure 9 ----------------------------------------------------------------------------------


def _all_converge_alike(runs: Runs) -> tuple[str, bool]:
    runs.need("scale_offset", "min_max")
    tried = [run for name in runs.names for run in runs.drawn(name)]
    n, of = converged(tried)
    reference = {(r.curve.bits, r.curve.lr): r for r in runs.drawn("min_max")}
    far = [apart(run, reference[run.curve.bits, run.curve.lr]) for run in tried]
    furthest = 100 * torch.cat(far).max().item()
    text = _each(tried, lambda run: f"{ends(run)}, {times(run.final_ratio)}")
    return (
        f"{n} of {of} runs converge; ends at most {furthest:.2g} % of the span from those of "
        f"min/max. {text}",
        n == of and furthest < 100 * SAME,
    )


FIGURE9 = (
    Claim(
        "θmin and θmax of all parameterizations converge to identical positions.",
        _all_converge_alike,
    ),
)

# ---- the text: drifting data, and A.2 ----------------------------------------------------------


def _worst_after_start(run: Run) -> Tensor:
    """The largest error over the best while the samples widen and after; the first fifth of the
    steps is for finding the range of the samples as they begin."""
    return run.ratio[run.steps // 5 :].amax(0)


def _dynamic_follows(runs: Runs) -> tuple[str, bool]:
    static = [n for n in runs.names if n != "beta_gamma_dynamic"]
    runs.need("beta_gamma_dynamic", "beta_gamma")
    dynamic = runs.drawn("beta_gamma_dynamic")
    follows = all(bool((_worst_after_start(run) < NEAR).all()) for run in dynamic)
    others = [run for name in static for run in runs.drawn(name)]
    smallest = min(runs.lrs, key=float)
    slow = [run for run in others if run.curve.lr == smallest]
    loses = all(bool((_worst_after_start(run) > NEAR).all()) for run in slow)
    text = _each([*dynamic, *others], lambda run: f"{_worst_after_start(run).max().item():.3g}")
    return (
        f"largest error over the best while the samples widen and after: {text}",
        follows and loses,
    )


def _sigmoid_cannot_expand(runs: Runs) -> tuple[str, bool]:
    tried, free = runs.drawn("beta_gamma_sigmoid"), runs.drawn("beta_gamma")

    def growth(run: Run) -> Tensor:
        return ((run.high - run.low).amax(0) / (run.high - run.low)[0]).max()

    most = 1 / torch.tensor(4.0, dtype=torch.float64).sigmoid()
    holds = all(bool(growth(run) <= most * (1 + 1e-9)) for run in tried)
    text = _each([*tried, *free], lambda run: f"{growth(run).item():.4g}")
    return f"largest span over the first: {text}; θ/(σ(4)θ) is {most.item():.4g}", holds


DRIFT = (
    Claim(
        "Dynamic θmin and θmax follow a range that changes during training, where static ones "
        "lose it (judged by whether the error stays below 1.1 x best: with dynamic θ at every "
        "learning rate, with static θ nowhere at the smallest).",
        _dynamic_follows,
    ),
    Claim(
        "The sigmoid keeps the range from expanding beyond its initial value.",
        _sigmoid_cannot_expand,
    ),
)


EQUAL = 0.01  # relative: Adam's eps tells updates of small gradients apart


def _offset_updates_differ(runs: Runs) -> tuple[str, bool]:
    found, holds = [], True
    for bits in runs.bits:
        for lr in runs.lrs:
            a, b = runs.get("sophisticated", bits, lr), runs.get("min_max", bits, lr)
            first = {
                name: [getattr(run, name)[1] - getattr(run, name)[0] for run in (a, b)]
                for name in ("scale", "offset")
            }
            unequal = {
                name: ((x - y).abs() / y.abs()).max().item() for name, (x, y) in first.items()
            }
            holds &= unequal["scale"] < EQUAL and unequal["offset"] > 10 * EQUAL
            found.append(
                f"{lr} {bits} bits: scale {first['scale'][0].mean():.4g} and "
                f"{first['scale'][1].mean():.4g}, offset {first['offset'][0].mean():.4g} and "
                f"{first['offset'][1].mean():.4g}"
            )
    text = "; ".join(found)
    return f"first step under sophisticated scale/offset and under min/max: {text}", holds


def _solutions_differ(runs: Runs) -> tuple[str, bool]:
    found, holds = [], False
    for bits in runs.bits:
        for lr in runs.lrs:
            a, b = runs.get("sophisticated", bits, lr), runs.get("min_max", bits, lr)
            far = 100 * apart(a, b).max().item()
            codes = [run.offset[-1].round() for run in (a, b)]
            different = int((codes[0] != codes[1]).sum())
            holds |= different > 0
            found.append(
                f"{lr} {bits} bits: ends at most {far:.2g} % of the span apart, the code of x = 0 "
                f"differs in {different} of {len(codes[0])} seeds"
            )
    return f"{'; '.join(found)} (x̂ of 0 is 0 under both)", holds


OFFSETS = (
    Claim(
        "Equal updates of the scale go with unequal updates of the offset (A.2).",
        _offset_updates_differ,
        steps=1,
    ),
    Claim(
        "So scale/offset and min/max can quantize x = 0 differently after training (A.2; judged by "
        "whether the code -rint(z) differs in any seed).",
        _solutions_differ,
    ),
)


# ---- Figure 4 ----------------------------------------------------------------------------------

FAR_ABOVE = math.log(1.5)  # nats: a perplexity 1.5 times as high
MODEL_STEPS = 2000  # of the paper's figure


def of_losses(
    model: str, losses: dict[tuple[str, str], tuple[float, float]], steps: int
) -> list[Verdict]:
    """losses: the first and last mean loss, after `steps`, by parameterization and learning
    rate."""

    def cells(name: str) -> dict[str, tuple[float, float]]:
        found = {lr: pair for (other, lr), pair in losses.items() if other == name}
        if not found:
            raise Missing(VARIANTS[name].label)
        return found

    def describe(name: str) -> str:
        pairs = (f"{lr} {first:.3f} to {last:.3f}" for lr, (first, last) in cells(name).items())
        return f"{VARIANTS[name].label} {', '.join(pairs)}"

    def unstable(_) -> tuple[str, bool]:
        others = cells("min_max")
        pairs = [
            (last, others[lr][1]) for lr, (_, last) in cells("scale_offset").items() if lr in others
        ]
        if not pairs:
            raise Missing("scale/offset and min/max at one learning rate")
        above = all(last > other + FAR_ABOVE for last, other in pairs)
        return f"{describe('scale_offset')}; {describe('min_max')}", above

    def consistent(_) -> tuple[str, bool]:
        return describe("min_max"), all(last < first for first, last in cells("min_max").values())

    def lowest(_) -> tuple[str, bool]:
        names = ("beta_gamma", "beta_gamma_sigmoid", "min_max")
        least = [min(last for _, last in cells(name).values()) for name in names]
        return "; ".join(map(describe, names)), least[0] < min(least[1:])

    checks = (
        (
            "scale/offset is unstable (judged by whether it ends with a perplexity more than 1.5 "
            "times that of min/max at every learning rate).",
            unstable,
        ),
        ("min/max reduces the loss consistently, irrespective of the learning rate.", consistent),
        ("beta/gamma without sigmoid finds the lowest loss.", lowest),
    )
    made = (Claim(f"{model}: {text}", check, MODEL_STEPS) for text, check in checks)
    return [judge(claim, None, steps) for claim in made]


def table(runs: Iterable[Run]) -> list[str]:
    """Every run in a line of Markdown."""
    lines = [
        "| curve | converged | ends | error, x best (worst) | oscillation, % of span | "
        "steps to 1.05 x best |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        n, of = converged([run])
        arrival = run.arrival()
        steps = f"{arrival.mean().item():.0f}" if math.isfinite(arrival.max()) else "not all arrive"
        ratio = f"{run.final_ratio.mean().item():.4g} ({run.final_ratio.max().item():.4g})"
        lines.append(
            f"| {label(run)} | {n} of {of} | {ends(run)} | {ratio} | "
            f"{100 * run.oscillation.mean().item():.2g} | {steps} |"
        )
    return lines
