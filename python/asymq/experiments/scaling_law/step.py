"""What a step of `scaling_law.py run` costs with quantizers, in multiples of its baseline's.

``python -m asymq.experiments.scaling_law.step`` trains each on random tokens for a moment; its
options are those of `run`.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from asymq.experiments.common.command import Parser, add_options, integer, options_of
from asymq.experiments.common.files import BadInput
from asymq.experiments.common.provenance import header
from asymq.experiments.common.spread import need_devices
from asymq.experiments.scaling_law import cells
from asymq.experiments.scaling_law.tokens import Tokens
from asymq.experiments.scaling_law.training import Training

SPANS = 5  # of which the median counts


def milliseconds(
    cell: cells.Cell, settings: cells.Settings, vocabulary: int, device: torch.device, steps: int
) -> float:
    """Of a step of the cell."""
    ids = np.random.default_rng(0).integers(vocabulary, size=cell.tokens, dtype=np.uint16)
    text = Tokens("random", vocabulary, "", ids, ids[: settings.context])
    step, _ = Training(cell, settings, text, device).repeatable()

    def span() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / steps

    span()
    return 1e3 * statistics.median(span() for _ in range(SPANS))


def main() -> None:
    parser = Parser("step", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", type=cells.Size.parse, default=[cells.Size(384, 6)], metavar="WxL"
    )
    parser.add_argument("--groups", nargs="+", type=cells.group, default=[32, cells.TOKEN])
    parser.add_argument("--precisions", nargs="+", choices=cells.PRECISIONS, default=["W4A4"])
    parser.add_argument("--vocabulary", type=integer(2, 65535), default=8192)
    parser.add_argument("--steps", type=integer(1), default=40, help="a span (default 40)")
    parser.add_argument("--device")
    add_options({"training": parser.add_argument_group("training")}, cells.Settings)
    args = parser.parse_args()
    settings = options_of(cells.Settings, args)
    # As many as the warm-up and all spans take.
    count = (args.steps * (SPANS + 1) + 10) * settings.batch * settings.context
    try:
        device = torch.device((need_devices(args.device and [args.device]) or ["cpu"])[0])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        chosen = cells.grid(args.sizes, [count], args.groups, args.precisions, [0])
        cells.need_trainable(chosen, settings, count)
        print("\n".join(header(device.type, f"batch {settings.batch} x {settings.context}")))
        print(
            "| size | precision | group | ms a step | tokens/s | times bf16 |\n" + "|---" * 6 + "|"
        )
        base = 0.0
        for cell in chosen:
            found = milliseconds(cell, settings, args.vocabulary, device, args.steps)
            base = found if cell.group is None else base
            rate = settings.batch * settings.context / found * 1e3
            print(
                f"| {cell.size} | {cell.precision} | {cell.group or ''} | {found:.3f} | "
                f"{rate:,.0f} | {found / base:.3f} |",
                flush=True,
            )
    except (BadInput, torch.OutOfMemoryError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
