"""A first look at range learning: three parameterizations on 10,000 normal samples.

Every run starts at the range [min(x), 3 max(x)] and minimizes the mean squared quantization error
with Adam. Fixed points of straight-through training lie close to the best range, not on it.
"""

import argparse

import torch

import asymq


def initial_parameters(parameterization, low, high, bits):
    """The (learned, constant) range tensors of a parameterization for the range [low, high]."""
    if parameterization == "min_max":
        return [low, high], []
    if parameterization == "beta_gamma":
        return [torch.ones_like(low), torch.ones_like(high)], [low, high]
    scale, offset = asymq.effective_scale_offset("min_max", low, high, bits=bits)
    return [scale, offset], []


def learn_range(x, parameterization, bits, steps, lr):
    """Trains the range for x and returns its (lower end, upper end)."""
    low, high = x.min().reshape(1), 3 * x.max().reshape(1)
    learned, constant = initial_parameters(parameterization, low, high, bits)
    learned = [p.clone().requires_grad_() for p in learned]
    fake_quantize = getattr(asymq, f"fake_quantize_{parameterization}")
    optimizer = torch.optim.Adam(learned, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (fake_quantize(x, *learned, *constant, bits=bits) - x).square().mean().backward()
        optimizer.step()
    scale, offset = asymq.effective_scale_offset(parameterization, *learned, *constant, bits=bits)
    lower = offset.round()
    return scale * lower, scale * (lower + 2**bits - 1)


def mean_squared_errors(x, lows, highs, bits):
    """MSE of quantizing x to each range [lows[i], highs[i]]."""
    chunks = zip(lows.split(64), highs.split(64), strict=True)
    errors = [
        (asymq.fake_quantize_min_max(x.expand(len(a), -1), a[:, None], b[:, None], bits=bits) - x)
        .square()
        .mean(1)
        for a, b in chunks
    ]
    return torch.cat(errors)


def best_range(x, bits, points=33, zooms=4):
    """The range of least MSE: a grid over both ends, refined around its best point."""
    centers, widths = torch.stack([x.min(), x.max()]) * 0.7, torch.stack([x.min(), x.max()]) * 0.4
    for _ in range(zooms):
        unit = torch.linspace(-1, 1, points)
        lows, highs = (c + w * unit for c, w in zip(centers, widths, strict=True))
        pairs = torch.cartesian_prod(lows, highs)
        errors = mean_squared_errors(x, pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), bits)
        centers, widths = pairs[errors.argmin()], widths * 4 / points
    return centers[0].reshape(1), centers[1].reshape(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args()

    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    print(f"Adam, {args.steps} steps, learning rate {args.lr:g}; ranges start at [min, 3 max] of x")
    print(f"{'bits':>4}  {'parameterization':16}  {'range':>18}  {'MSE':>9}  {'MSE/best':>8}")

    def report(name, bits, low, high, best=None):
        error = mean_squared_errors(x, low, high, bits).item()
        ends = f"[{low.item():.3f}, {high.item():.3f}]"
        print(f"{bits:4}  {name:16}  {ends:>18}  {error:9.3g}  {error / (best or error):8.3f}")
        return error

    for bits in args.bits:
        best = report("brute force", bits, *best_range(x, bits))
        for name in ("scale_offset", "min_max", "beta_gamma"):
            report(name, bits, *learn_range(x, name, bits, args.steps, args.lr), best)


if __name__ == "__main__":
    main()
