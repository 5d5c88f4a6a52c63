"""What quantization-aware training costs: the law of a language model's loss by its size, its
tokens, and how many elements share a range.

After "Scaling Law for Quantization-Aware Training" (Chen et al., arXiv 2505.14302): trained from
scratch with weights or inputs of all linear layers at 4 bits, a model of N parameters on D tokens
ends with a loss that is higher by δ(N, D, G). All arithmetic is in float64. N and D are plain
numbers, not millions; G is the number of elements that share a range, which for one range per token
or channel is the model's width. The fits need scipy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

HUBER = 1e-3  # where the loss of a residual of a logarithm turns from its square to its size
# On four or five variables the memory of L-BFGS is all of BFGS's matrix, and scipy's L-BFGS calls a
# BLAS whose threads cost a hundred times what they compute here.
METHOD = "BFGS"


@dataclass(frozen=True)
class Law:
    """δ(N, D, G) = k · D^γD · (log2 G)^γG / N^γN."""

    k: float
    gamma_N: float
    gamma_D: float
    gamma_G: float

    def delta(self, params, tokens, group):
        """By how much quantization raises the loss, in nats a token. Numbers or arrays that
        broadcast. ValueError: N or D is not positive, or G not above 1."""
        n, d = _above(0, "params", params), _above(0, "tokens", tokens)
        g = np.log2(_above(1, "group", group))
        return self.k * d**self.gamma_D * g**self.gamma_G / n**self.gamma_N


@dataclass(frozen=True)
class Chinchilla:
    """loss(N, D) = A / N^α + B / D^β + E, of the model that is not quantized."""

    A: float
    alpha: float
    B: float
    beta: float
    E: float

    def loss(self, params, tokens):
        """In nats a token. Numbers or arrays that broadcast. ValueError: N or D is not positive."""
        n, d = _above(0, "params", params), _above(0, "tokens", tokens)
        return self.A / n**self.alpha + self.B / d**self.beta + self.E


@dataclass(frozen=True)
class Fit:
    """A law, the mean of |δ̂/δ - 1| over the runs it was fitted to, how many they are, and how many
    were dropped because their δ, not being positive, has no logarithm."""

    law: Law
    error: float
    runs: int
    dropped: int


# The published fits; FC2A8 has the input of the MLP's last layer (down_proj) at 8 bits.
PAPER_LAWS = {
    "W4A4": Law(0.1582, 0.2186, 0.0745, 0.7779),
    "W4A16": Law(0.2522, 0.3589, 0.1610, 0.3533),
    "W16A4": Law(0.1004, 0.1816, 0.0331, 0.9812),
    "W4A4-FC2A8": Law(0.3519, 0.2637, 0.0964, 0.3407),
    "W16A4-FC2A8": Law(0.1273, 0.2347, 0.0827, 0.4491),
}
PAPER_CHINCHILLA = Chinchilla(237.7042, 0.3022, 596.2490, 0.3022, 1.9279)


def effective_parameters(params, delta, chinchilla: Chinchilla):
    """The share of its parameters that an unquantized model of the same loss needs:
    (A / (A + δ·N^α))^(1/α).

    ValueError: N is not positive, or δ is so far below 0 that no model has that loss.
    """
    n, a = _above(0, "params", params), chinchilla.A
    whole = a + np.asarray(delta, dtype=np.float64) * n**chinchilla.alpha
    if not (whole > 0).all():
        raise ValueError(
            f"effective_parameters: delta must be above -A / params^alpha, got {delta!r}: no size "
            "of an unquantized model has so low a loss"
        )
    return (a / whole) ** (1 / chinchilla.alpha)


def fit_law(params, tokens, group, delta, *, huber: float = HUBER) -> Fit:
    """The law of least Σ Huber(log δ̂ - log δ), over runs given as four arrays of one length.

    tokens or group may be None: the law then leaves it out, with an exponent of 0. Runs whose δ is
    not positive are dropped and counted. ValueError: δ is not finite, or of what is left N, D or G
    takes one value alone or follows from the others.
    """
    from scipy import optimize, special

    delta = np.asarray(delta, dtype=np.float64)
    if not np.isfinite(delta).all():
        raise ValueError("fit_law: delta must be finite")
    kept = delta > 0
    named = {"params": params, "tokens": tokens, "group": group}
    logs = {
        name: np.log(_above(0, name, values)) if name != "group" else _log_log(values)
        for name, values in named.items()
        if values is not None
    }
    columns = _columns("fit_law", {name: column[kept] for name, column in logs.items()})
    target = np.log(delta[kept])
    mean, spread = columns.mean(0), columns.std(0)
    design = np.column_stack([np.ones(len(target)), (columns - mean) / spread])

    def objective(x):
        residual = design @ x - target
        # In units of the corner, where L-BFGS knows when to stop.
        inside = np.clip(residual / huber, -1, 1)
        return special.huber(huber, residual).sum() / huber**2, design.T @ inside / huber

    start = np.linalg.lstsq(design, target, rcond=None)[0]
    x = optimize.minimize(objective, start, jac=True, method=METHOD, options={"gtol": 1e-9}).x
    slopes = dict(zip(logs, x[1:] / spread, strict=True))
    law = Law(
        float(np.exp(x[0] - (x[1:] / spread) @ mean)),
        float(-slopes["params"]),
        float(slopes.get("tokens", 0.0)),
        float(slopes.get("group", 0.0)),
    )
    error = np.abs(np.exp(design @ x - target) - 1).mean()
    return Fit(law, float(error), int(kept.sum()), int((~kept).sum()))


def fit_chinchilla(
    params,
    tokens,
    loss,
    *,
    tied: bool = True,
    huber: float = HUBER,
    start: Chinchilla | None = None,
) -> Chinchilla:
    """The Chinchilla law of least Σ Huber(log L̂ - log L), over runs given as three arrays of one
    length (Hoffmann et al., arXiv 2203.15556, D.2).

    tied: β = α. start: where to begin, in place of a grid. ValueError: a loss is not positive, or N
    or D takes one value alone or follows from the other.
    """
    from scipy import optimize, special

    target = np.log(_above(0, "loss", loss))
    logs = {n: np.log(_above(0, n, v)) for n, v in (("params", params), ("tokens", tokens))}
    log_n, log_d = _columns("fit_chinchilla", logs).T

    def objective(x):
        a, b, e, alpha = x[:4]
        beta = alpha if tied else x[4]
        terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(target, e)])
        whole = np.logaddexp.reduce(terms)
        residual = whole - target
        slope = np.exp(terms - whole) * np.clip(residual / huber, -1, 1) / huber
        of_alpha, of_beta = -(slope[0] @ log_n), -(slope[1] @ log_d)
        exponents = [of_alpha + of_beta] if tied else [of_alpha, of_beta]
        gradient = np.array([*slope.sum(1), *exponents])
        return special.huber(huber, residual).sum() / huber**2, gradient

    def descend(x, steps):
        options = {"maxiter": steps}
        return optimize.minimize(objective, x, jac=True, method=METHOD, options=options)

    if start is None:
        below = target.min() - np.array([0.1, 0.5, 1.5])  # of log E: the least loss lies above E
        grid = itertools.product((0, 5, 10, 15), (0, 5, 10, 15), below, (0.2, 0.4, 0.8))
        coarse = [descend((*x, x[3])[: 4 if tied else 5], 25) for x in grid]
        starts = [result.x for result in sorted(coarse, key=lambda result: result.fun)[:5]]
    else:
        logs_of = np.log(np.maximum([start.A, start.B, start.E], 1e-300))
        starts = [np.array([*logs_of, start.alpha, start.beta][: 4 if tied else 5])]
    found = [descend(x, 15_000) for x in starts]
    a, b, e, alpha, *beta = min(found, key=lambda result: result.fun).x
    exponent = float(alpha)
    return Chinchilla(
        float(np.exp(a)), exponent, float(np.exp(b)), float(beta[0]) if beta else exponent,
        float(np.exp(e)),
    )  # fmt: skip


def bootstrap(
    cells: Sequence[Hashable],
    statistics: Callable[[np.ndarray], Mapping[str, float]],
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % intervals by name of what `statistics` makes of the indices of runs, over resamples of
    the runs.

    cells: one for each run; runs of one cell are drawn together, as often as the cell is. A
    resample of which `statistics` raises ValueError says nothing and is drawn again. ValueError:
    more than nine of ten do.
    """
    names = list(dict.fromkeys(cells))
    members = [np.flatnonzero([cell == name for cell in cells]) for name in names]
    random = np.random.default_rng(seed)
    found: list[Mapping[str, float]] = []
    for _ in range(10 * resamples):
        drawn = np.concatenate([members[i] for i in random.integers(len(names), size=len(names))])
        try:
            found.append(statistics(drawn))
        except ValueError:
            continue
        if len(found) == resamples:
            break
    else:
        raise ValueError(f"bootstrap: too few cells vary enough to be resampled, of {len(names)}")
    return {name: _interval([values[name] for values in found]) for name in found[0]}


def _interval(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _above(least: float, name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not ((values > least) & np.isfinite(values)).all():
        wrong = values[~((values > least) & np.isfinite(values))].flat[0]
        raise ValueError(f"asymq.scaling_law: {name} must be above {least} and finite, got {wrong}")
    return values


def _log_log(group: Any) -> np.ndarray:
    return np.log(np.log2(_above(1, "group", group)))


def _columns(owner: str, logs: dict[str, np.ndarray]) -> np.ndarray:
    """[runs, columns]. ValueError: no exponents can be told from them."""
    for name, column in logs.items():
        if len(column) == 0 or np.ptp(column) < 1e-12:
            raise ValueError(f"{owner}: {name} takes one value alone: there is no exponent to fit")
    columns = np.column_stack(list(logs.values()))
    design = np.column_stack([np.ones(len(columns)), columns])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(
            f"{owner}: {', '.join(logs)} follow from each other in the {len(columns)} runs: vary "
            "each of them alone"
        )
    return columns
