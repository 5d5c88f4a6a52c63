"""A claim, and what is found of it.

A claim is a sentence and a function that takes the runs of a figure and gives what was measured and
whether the claim holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from asymq.experiments.common.verdict import Verdict
from asymq.experiments.figures import STEPS

TOO_SHORT = "not decided: too few steps"


class Missing(LookupError):
    """A claim needs a curve that the settings left out. The message names it."""


@dataclass(frozen=True)
class Claim:
    """sentence: the claim. check: gives what was measured and whether the claim holds. steps: how
    many it takes to decide that."""

    sentence: str
    check: Callable[..., tuple[str, bool]]
    steps: int = STEPS


def judge(claim: Claim, runs, steps: int) -> Verdict:
    """Whether a claim holds by runs of so many steps."""
    try:
        measured, holds = claim.check(runs)
    except Missing as missing:
        return Verdict(claim.sentence, f"needs {missing}", None)
    if steps < claim.steps:
        return Verdict(claim.sentence, measured, None, TOO_SHORT)
    return Verdict(claim.sentence, measured, holds)
