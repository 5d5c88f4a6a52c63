"""How sure a mean of a few is."""

from __future__ import annotations

import math
import statistics

# Of Student's t with 1, 2, ... degrees of freedom, 97.5 %.
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
MOST_SEEDS = len(T) + 1


def interval(differences: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval; None: a single one has none."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, T[len(differences) - 2] * spread
