"""Medians over a fixed span of time."""

import statistics
import time
from collections.abc import Callable


def median_seconds(sample: Callable[[], float], span: float) -> float:
    """The median of sample() over `span` seconds: at least 5 calls, fewer if they are very slow."""
    samples: list[float] = []
    start, elapsed = time.perf_counter(), 0.0
    while elapsed < span or (len(samples) < 5 and elapsed < 10 * span):
        samples.append(sample())
        elapsed = time.perf_counter() - start
    return statistics.median(samples)
