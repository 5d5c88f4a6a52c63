"""What calibration makes of data: ends of ranges, from all values seen.

An observer is given the data of some ranges as *rows*, [ranges, elements of each], as often as
there are some, and reads nothing back from the device until it is asked for the ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from asymq import ops
from asymq.quantizers.spec import QuantSpec

# Values that are kept as they are; more of them are counted in bins.
EXACT = 2**20
BINS = 2**13
# Values that are copied to float64 at a time.
_PART = 2**22


class Observer:
    """Keeps the extrema, and makes them the ends (method "min_max").

    spec: of the ranges. force_zero: whether an asymmetric range shall contain 0. percentile: in
    (50, 100].
    """

    def __init__(self, spec: QuantSpec, force_zero: bool = True, percentile: float = 99.99):
        self.spec, self.force_zero, self.percentile = spec, force_zero, percentile
        self._extrema: tuple[Tensor, Tensor] | None = None

    def see(self, rows: Tensor, counted: Tensor | None = None) -> None:
        """counted: bool, of the rows' shape, False where an element does not count."""
        if rows.numel() == 0:
            return
        if counted is None:
            low, high = _extrema(rows)
        else:
            low = rows.masked_fill(~counted, math.inf).amin(1)
            high = rows.masked_fill(~counted, -math.inf).amax(1)
        if self._extrema is not None:
            low, high = (
                torch.minimum(low, self._extrema[0]),
                torch.maximum(high, self._extrema[1]),
            )
        self._extrema = low, high
        self._keep(rows, counted)

    def extrema(self) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest element of each range, NaN in both where there was one; None: there
        were no elements that count."""
        if self._extrema is None or bool((self._extrema[0] > self._extrema[1]).any()):
            return None
        return self._extrema

    def ends(self) -> tuple[Tensor, Tensor]:
        """Of each range, for elements that were all finite."""
        assert self._extrema is not None
        return self._extrema

    def _keep(self, rows: Tensor, counted: Tensor | None) -> None:
        """What the method needs to know beside the extrema."""


class _Moments(Observer):
    """Method "lsq": the first values of LSQ (Esser et al. 2020), s = 2·mean|x|/sqrt(Q), Q =
    (k - 1)/2, and of LSQ+ (Bhalgat et al. 2020), mean ± 3 standard deviations within the
    extrema."""

    _sums: Tensor | None = None  # of 1, x, x² and |x|: [4, ranges]

    def _keep(self, rows: Tensor, counted: Tensor | None) -> None:
        for part in _parts(rows, counted):
            powers = (~part.isnan()).double(), part, part.square(), part.abs()
            sums = torch.stack([power.nansum(1) for power in powers])
            self._sums = sums if self._sums is None else self._sums + sums

    def ends(self) -> tuple[Tensor, Tensor]:
        assert self._sums is not None
        count, *sums = self._sums
        mean, square, absolute = (total / count for total in sums)
        if self.spec.symmetric:
            scale = 2 * absolute / math.sqrt((self.spec.steps - 1) / 2)
            end = scale * self.spec.end_in_steps
            return -end, end
        low, high = (end.double() for end in super().ends())
        reach = 3 * (square - mean.square()).clamp(min=0).sqrt()
        return torch.maximum(low, mean - reach), torch.minimum(high, mean + reach)


class _Sample(Observer):
    """Keeps all values while they are few, and their histogram from then on."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._rows: list[Tensor] = []
        self._count = 0
        self._histogram: _Histogram | None = None

    def _keep(self, rows: Tensor, counted: Tensor | None) -> None:
        self._count += rows.numel()
        if self._count <= EXACT:
            # A copy: a model may overwrite its activations.
            self._rows.append(rows.clone() if counted is None else _hide(rows, counted))
            return
        low, high = (end.double() for end in super().ends())
        if self._histogram is None:
            self._histogram = _Histogram(low, high)
        self._histogram.widen(low, high)
        for kept in self._rows:
            self._histogram.add(kept, None)
        self._rows.clear()
        self._histogram.add(rows, counted)

    def _sample(self) -> _Values | _Histogram:
        return self._histogram or _Values(torch.cat(self._rows, 1))


class _Percentile(_Sample):
    """Method "percentile": the quantiles (100 - percentile) % and percentile %, symmetric that of
    |x|, with linear interpolation."""

    def ends(self) -> tuple[Tensor, Tensor]:
        values = self._sample().ordered(absolute=self.spec.symmetric)
        high = _quantile(values, self.percentile / 100)
        if self.spec.symmetric:
            return -high, high
        low = _quantile(values, (100 - self.percentile) / 100)
        # A bin's share of its values may lie beyond all of them.
        lowest, highest = (end.double() for end in super().ends())
        return torch.maximum(low, lowest), torch.minimum(high, highest)


class _LeastSquares(_Sample):
    """Method "mse": of the ranges [a·min, a·max], a = 0.01, 0.02, ..., 1, that with the least
    squared error."""

    def ends(self) -> tuple[Tensor, Tensor]:
        spec = self.spec
        points, weights = self._sample().points()
        dtype = torch.promote_types(points.dtype, torch.float32)
        low, high = (end.to(dtype) for end in super().ends())
        if spec.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        elif self.force_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        best = torch.ones_like(low)
        size = max(1, EXACT // points.shape[1])
        for i in range(0, len(low), size):
            rows = slice(i, i + size)
            best[rows] = self._factors(
                points[rows].to(dtype),
                None if weights is None else weights[rows],
                low[rows, None],
                high[rows, None],
            )
        return best * low, best * high

    def _factors(self, points: Tensor, weights: Tensor | None, low: Tensor, high: Tensor) -> Tensor:
        spec = self.spec
        options: dict[str, Any] = {"bits": spec.bits, "eps": spec.eps}
        best = torch.ones_like(low[:, 0])
        least = torch.full_like(best, math.inf, dtype=torch.float64)
        for percent in range(1, 101):
            a = percent / 100
            if spec.symmetric:
                quantized = ops.fake_quantize_symmetric_max(
                    points, a * high, full_range=spec.full_range, **options
                )
            else:
                quantized = ops.fake_quantize_min_max(points, a * low, a * high, **options)
            square = (points - quantized).square()
            if weights is not None:
                square = square * weights
            error = square.nansum(1, dtype=torch.float64)
            better = error <= least
            best, least = torch.where(better, a, best), torch.where(better, error, least)
        return best


METHODS: dict[str, type[Observer]] = {
    "min_max": Observer,
    "percentile": _Percentile,
    "mse": _LeastSquares,
    "lsq": _Moments,
}


# ---- all values, or their histogram --------------------------------------------------------------


class _Ordered(Protocol):
    """Values of some ranges by their size."""

    @property
    def count(self) -> Tensor:
        """[ranges]."""

    def value(self, rank: Tensor) -> Tensor:
        """The value with each range's rank, an integer from 0 on, in float64."""


def _quantile(values: _Ordered, q: float) -> Tensor:
    last = values.count - 1
    rank = q * last.double()
    below = rank.floor().long()
    low, high = values.value(below), values.value(torch.minimum(below + 1, last))
    return low + (rank - below) * (high - low)


class _Values:
    """rows: [ranges, n], NaN where there is none."""

    def __init__(self, rows: Tensor):
        self._rows = rows

    @property
    def count(self) -> Tensor:
        return (~self._rows.isnan()).sum(1)

    def ordered(self, absolute: bool) -> _Ordered:
        """The values, or those of |x|."""
        rows = self._rows.abs() if absolute else self._rows
        return _Values(rows.sort(1).values)  # NaN last

    def value(self, rank: Tensor) -> Tensor:
        return self._rows.gather(1, rank[:, None])[:, 0].double()

    def points(self) -> tuple[Tensor, None]:
        """Values, and how often each of them occurs; None: once."""
        return self._rows, None


class _Histogram:
    """Counts of values in BINS bins of each range: bin i of those from `first` on holds the values
    of [i·width, (i + 1)·width). Where they are too few the width doubles, and pairs of counts
    merge, as often as it needs; how often, only the device knows.

    low, high: [ranges], float64, the extrema so far.
    """

    def __init__(self, low: Tensor, high: Tensor):
        # All values may be one, or 0: a least width that rounding can bear.
        least = torch.maximum(low.abs(), high.abs()) * 2.0**-40
        width = torch.maximum(_width(low, high), least).clamp(min=2.0**-200)
        self._empty(width, (low / width).floor())

    def _empty(self, width: Tensor, first: Tensor) -> None:
        self.width, self.first = width, first
        self.counts = torch.zeros(len(width), BINS, dtype=torch.int64, device=width.device)

    @property
    def count(self) -> Tensor:
        return self.counts.sum(1)

    @property
    def _indices(self) -> Tensor:
        """Of all bins, [ranges, BINS]."""
        bins = torch.arange(BINS, dtype=torch.float64, device=self.counts.device)
        return self.first[:, None] + bins

    def widen(self, low: Tensor, high: Tensor) -> None:
        """Makes room for new extrema, which are at least as far apart as those before."""
        doublings = (_width(low, high) / self.width).log2().ceil().clamp(min=0)
        indices = (self._indices * torch.exp2(-doublings)[:, None]).floor()
        counts = self.counts
        width = self.width * torch.exp2(doublings)
        self._empty(width, (low / width).floor())
        self._count(indices, counts)

    def add(self, rows: Tensor, counted: Tensor | None) -> None:
        """Values within the extrema; NaN does not count."""
        for part in _parts(rows, counted):
            self._count((part / self.width[:, None]).floor(), (~part.isnan()).long())

    def _count(self, indices: Tensor, counts: Tensor) -> None:
        bins = (indices - self.first[:, None]).nan_to_num(0).clamp(0, BINS - 1).long()
        bins += torch.arange(len(bins), device=bins.device)[:, None] * BINS
        # Of one axis, as deterministic algorithms want it.
        self.counts.view(-1).scatter_add_(0, bins.flatten(), counts.flatten())

    def ordered(self, absolute: bool) -> _Ordered:
        """The values, or those of |x|: the bins on either side of 0 are alike."""
        if not absolute:
            return self
        indices = self._indices
        indices = torch.where(indices < 0, -1 - indices, indices)
        result = object.__new__(_Histogram)
        result._empty(self.width, indices.amin(1))
        result._count(indices, self.counts)
        return result

    def value(self, rank: Tensor) -> Tensor:
        """As if those of a bin lay in it at equal distances."""
        until = self.counts.cumsum(1)
        bins = torch.searchsorted(until, rank[:, None], right=True)
        count, until = self.counts.gather(1, bins), until.gather(1, bins)
        within = (rank[:, None] - (until - count) + 0.5) / count
        return ((self.first[:, None] + bins + within) * self.width[:, None])[:, 0]

    def points(self) -> tuple[Tensor, Tensor]:
        return (self._indices + 0.5) * self.width[:, None], self.counts


def _width(low: Tensor, high: Tensor) -> Tensor:
    """Of bins that BINS of them reach from the first that has values to the last, whose ends lie
    anywhere within both."""
    return (high - low) / (BINS - 2)


def _extrema(rows: Tensor) -> tuple[Tensor, Tensor]:
    if len(rows) == 1:
        low, high = torch.aminmax(rows)
        return low.view(1), high.view(1)
    return rows.amin(1), rows.amax(1)


def _hide(rows: Tensor, counted: Tensor) -> Tensor:
    """NaN where an element does not count: those of the data show in the extrema."""
    return rows.masked_fill(~counted, math.nan)


def _parts(rows: Tensor, counted: Tensor | None) -> Iterator[Tensor]:
    """All rows in float64, some columns at a time, NaN where an element does not count."""
    columns = max(1, _PART // len(rows))
    for i in range(0, rows.shape[1], columns):
        part = rows[:, i : i + columns].double()
        yield part if counted is None else _hide(part, counted[:, i : i + columns])
