"""Medians over a fixed span of time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    seconds: float  # the median
    spread: float  # of the quartiles, in multiples of the median


def timing(sample: Callable[[], float], span: float) -> Timing:
    """Of sample() over `span` seconds: at least 5 calls, fewer if they are very slow."""
    samples: list[float] = []
    start, elapsed = time.perf_counter(), 0.0
    while elapsed < span or (len(samples) < 5 and elapsed < 10 * span):
        samples.append(sample())
        elapsed = time.perf_counter() - start
    median = statistics.median(samples)
    low, _, high = statistics.quantiles([*samples, median], n=4, method="inclusive")
    return Timing(median, (high - low) / median)


def median_seconds(sample: Callable[[], float], span: float) -> float:
    return timing(sample, span).seconds
