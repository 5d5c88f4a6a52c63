"""What the paper claims of its law, and whether the runs bear it out.

A claim holds where its 95 % interval, over resamples of the (N, D, seed) cells, is on its side,
does not hold where it is on the other, and is not decided in between, or by too few or too small
runs.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable

from asymq.experiments.common.verdict import Verdict
from asymq.experiments.scaling_law.estimates import Estimate, law_of
from asymq.experiments.scaling_law.runs import Difference
from asymq.scaling_law import bootstrap

MAIN, WEIGHTS, INPUTS, FC2 = "W4A4", "W4A16", "W16A4", "W4A4-FC2A8"
FEWEST_CELLS, FEWEST_VALUES, FEWEST_TOKENS = 4, 3, 2.6  # the last: a parameter
RIGHT_ORDER = {"params": 0.9, "tokens": 0.75, "group": 0.9}
SUM_WITHIN, LARGEST_ERROR = 0.3, 0.1
NEVER = 1e9  # tokens a parameter
UNDECIDED = "not decided"


def too_small(found: Iterable[Difference]) -> str | None:
    """Why the runs show no law, if they do not."""
    for name, what in (("params", "sizes"), ("tokens", "numbers of tokens")):
        values = {getattr(run, name) for run in found}
        if len(values) < FEWEST_VALUES:
            return f"needs {FEWEST_VALUES} {what}"
    if min(run.tokens / run.params for run in found) < FEWEST_TOKENS:
        return f"needs {FEWEST_TOKENS} tokens a parameter"
    return None


def judge(found: list[Difference], estimates: dict[str, Estimate]) -> list[Verdict]:
    """Of all claims, in the order of the paper's abstract."""
    verdicts = [_costs(found, name) for name in dict.fromkeys(run.precision for run in found)]
    small = too_small(found) if found else "needs runs"
    return [*verdicts, *(_unless(small, verdict) for verdict in _of_law(found, estimates))]


def summary(verdicts: list[Verdict]) -> str:
    """Whether the law is confirmed as a whole."""
    wrong = [v.sentence for v in verdicts if v.holds is False]
    open_ = [v.sentence for v in verdicts if v.holds is None]
    if wrong:
        return f"The runs contradict the paper in: {'; '.join(wrong)}."
    if open_:
        return f"The runs do not decide the paper's law: {len(open_)} of {len(verdicts)} claims."
    return "The runs confirm the paper's law."


def _unless(small: str | None, verdict: Verdict) -> Verdict:
    if small is None:
        return verdict
    return Verdict(verdict.sentence, verdict.measured, None, f"{UNDECIDED}: {small}")


def _of_law(found: list[Difference], estimates: dict[str, Estimate]) -> list[Verdict]:
    main = [run for run in found if run.precision == MAIN]
    return [
        *_exponents(estimates.get(MAIN)),
        *(_order(main, axis, what) for axis, what in (
            ("params", "δ falls from one size to the next"),
            ("tokens", "δ rises from one number of tokens to the next"),
            ("group", "δ rises from one group size to the next"),
        )),
        _error(estimates.get(MAIN)),
        _sum_of_parts(found),
        _last_input(found),
        _faster(found),
        _passes(found),
    ]  # fmt: skip


# ---- one claim each ----------------------------------------------------------------------------


def _decide(
    sentence: str,
    found: list[Difference],
    measure: Callable[[list[Difference]], float],
    form: Callable[[float], str],
    margin: Callable[[float], float] = lambda value: value,
) -> Verdict:
    """By a number measured of runs, whose margin is positive where the claim holds."""
    cells = {run.cell for run in found}
    try:
        value = measure(found)
    except ValueError as error:
        return Verdict(sentence, "", None, f"{UNDECIDED}: {_reason(error)}")
    if len(cells) < FEWEST_CELLS:
        return Verdict(sentence, form(value), None, f"{UNDECIDED}: needs {FEWEST_CELLS} cells")
    try:
        resampled = bootstrap(
            [run.cell for run in found],
            lambda chosen: {"value": measure([found[i] for i in chosen])},
        )["value"]
    except ValueError as error:
        return Verdict(sentence, form(value), None, f"{UNDECIDED}: {_reason(error)}")
    low, high = resampled
    measured = f"{form(value)} [{form(low)}, {form(high)}]"
    margins = margin(low), margin(high)
    if min(margins) > 0:
        return Verdict(sentence, measured, True)
    return Verdict(sentence, measured, False if max(margins) < 0 else None, UNDECIDED)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _reason(error: Exception) -> str:
    return str(error).removeprefix("fit_law: ")


def _costs(found: list[Difference], precision: str) -> Verdict:
    own = [run for run in found if run.precision == precision]
    return _decide(
        f"{precision} raises the loss: mean δ > 0",
        own,
        lambda runs: statistics.fmean(run.delta for run in runs),
        "{:.4f}".format,
    )


def _exponents(estimate: Estimate | None) -> list[Verdict]:
    claims = {
        "gamma_N": "δ falls with the size: γN > 0",
        "gamma_D": "δ rises with the tokens: γD > 0",
        "gamma_G": "δ rises with the group size: γG > 0",
    }
    if estimate is None:
        why = f"{UNDECIDED}: no law of {MAIN}"
        return [Verdict(sentence, "", None, why) for sentence in claims.values()]
    verdicts = []
    for name, sentence in claims.items():
        low, high = estimate.intervals[name]
        measured = f"{getattr(estimate.law, name):.4f} [{low:.4f}, {high:.4f}]"
        holds = True if low > 0 else False if high < 0 else None
        verdicts.append(Verdict(sentence, measured, holds, UNDECIDED))
    return verdicts


def _error(estimate: Estimate | None) -> Verdict:
    sentence = f"the law's mean error is below {_percent(LARGEST_ERROR)}"
    if estimate is None:
        return Verdict(sentence, "", None, f"{UNDECIDED}: no law of {MAIN}")
    low, high = estimate.intervals["error"]
    measured = f"{_percent(estimate.fit.error)} [{_percent(low)}, {_percent(high)}]"
    # A resample repeats runs, and is fitted better than all of them.
    worst = max(high, estimate.fit.error)
    holds = True if worst < LARGEST_ERROR else False if low > LARGEST_ERROR else None
    return Verdict(sentence, measured, holds, UNDECIDED)


def _order(found: list[Difference], axis: str, what: str) -> Verdict:
    """Of neighbours along an axis that have all else in common. It holds where as many as wanted
    have the right order, and more than chance gives in the interval."""
    values = sorted({getattr(run, axis) for run in found})
    others = [name for name in RIGHT_ORDER if name != axis]
    wanted, sign = RIGHT_ORDER[axis], -1 if axis == "params" else 1
    # Groups of whole tokens are as large as the model is wide: only some occur at a size.
    near = axis != "group"

    def pairs(runs: list[Difference]) -> list[bool]:
        lines: dict[tuple, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in runs:
            key = tuple(getattr(run, name) for name in others)
            lines[key][getattr(run, axis)].append(run.delta)
        right = []
        for line in lines.values():
            at = sorted(line)
            for low, high in itertools.pairwise(at):
                if near and values.index(high) != values.index(low) + 1:
                    continue
                means = statistics.fmean(line[low]), statistics.fmean(line[high])
                right.append(sign * (means[1] - means[0]) > 0)
        if not right:
            raise ValueError("no neighbours")
        return right

    sentence = f"{what} in {_percent(wanted)} of neighbours"
    try:
        all_pairs = pairs(found)
    except ValueError as error:
        return Verdict(sentence, "", None, f"{UNDECIDED}: {error}")
    fraction = statistics.fmean(all_pairs)
    low, high = bootstrap(
        [run.cell for run in found],
        lambda chosen: {"right": statistics.fmean(pairs([found[i] for i in chosen]))},
    )["right"]
    measured = f"{sum(all_pairs)} of {len(all_pairs)} [{_percent(low)}, {_percent(high)}]"
    if fraction >= wanted and low > 0.5:
        return Verdict(sentence, measured, True)
    return Verdict(sentence, measured, False if high < wanted else None, UNDECIDED)


def _together(found: list[Difference], *precisions: str) -> list[Difference]:
    """The runs of cells and groups that all these precisions have."""
    have: dict[tuple, set[str]] = defaultdict(set)
    for run in found:
        have[run.cell, run.group].add(run.precision)
    return [
        run
        for run in found
        if run.precision in precisions and have[run.cell, run.group] >= set(precisions)
    ]


def _sum(found: list[Difference], precision: str) -> float:
    return sum(run.delta for run in found if run.precision == precision)


def _share(found: list[Difference], of: str, *among: str) -> float:
    whole = sum(_sum(found, name) for name in among)
    if whole <= 0:
        raise ValueError("the sum of δ is not positive")
    return _sum(found, of) / whole


def _sum_of_parts(found: list[Difference]) -> Verdict:
    return _decide(
        f"weights' and inputs' parts add up: δ({MAIN}) is within {_percent(SUM_WITHIN)} of "
        f"δ({WEIGHTS}) + δ({INPUTS})",
        _together(found, MAIN, WEIGHTS, INPUTS),
        lambda runs: _share(runs, MAIN, WEIGHTS, INPUTS),
        "{:.3f} x".format,
        lambda value: SUM_WITHIN - abs(value - 1),
    )


def _last_input(found: list[Difference]) -> Verdict:
    sentence = "the input of down_proj at 8 bits lowers δ in all cells"
    own = _together(found, MAIN, FC2)
    verdict = _decide(
        sentence,
        own,
        lambda runs: 1 - _share(runs, FC2, MAIN),
        lambda value: f"{_percent(value)} lower",
    )
    means: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in own:
        means[run.params, run.tokens, run.group][run.precision].append(run.delta)
    lower = [statistics.fmean(m[FC2]) < statistics.fmean(m[MAIN]) for m in means.values()]
    if not lower:
        return verdict
    measured = f"{verdict.measured}; in {sum(lower)} of {len(lower)}"
    holds = None if verdict.holds and not all(lower) else verdict.holds
    return Verdict(sentence, measured, holds, verdict.why if verdict.holds is None else UNDECIDED)


def _laws_of_parts(runs: list[Difference]):
    """Of the weights' and the inputs' part."""
    grouped = len({run.group for run in runs}) > 1
    return [
        law_of([run for run in runs if run.precision == name], group=grouped).law
        for name in (WEIGHTS, INPUTS)
    ]


def _faster(found: list[Difference]) -> Verdict:
    def gap(runs: list[Difference]) -> float:
        weights, inputs = _laws_of_parts(runs)
        return weights.gamma_D - inputs.gamma_D

    return _decide(
        f"the weights' part grows faster with the tokens: γD({WEIGHTS}) > γD({INPUTS})",
        _together(found, WEIGHTS, INPUTS),
        gap,
        "{:+.3f}".format,
    )


def _passes(found: list[Difference]) -> Verdict:
    own = _together(found, WEIGHTS, INPUTS)
    sizes = sorted({run.params for run in own})
    params = math.exp(statistics.fmean(map(math.log, sizes))) if sizes else 1.0
    group = statistics.median_low([run.group or 2 for run in own] or [2])

    def ratio(runs: list[Difference]) -> float:
        """Tokens a parameter at which both parts are equal."""
        weights, inputs = _laws_of_parts(runs)
        faster = weights.gamma_D - inputs.gamma_D
        if faster <= 0:
            return NEVER
        behind = math.log(inputs.delta(params, 1.0, group) / weights.delta(params, 1.0, group))
        return min(math.exp(min(behind / faster, 100)) / params, NEVER)

    return _decide(
        "from some number of tokens a parameter on the weights' part is the larger"
        + (f" (at {params:.3g} parameters)" if sizes else ""),
        own,
        ratio,
        lambda value: "never" if value >= NEVER else f"{value:.3g}",
        lambda value: 1 if value < NEVER else -1,
    )
