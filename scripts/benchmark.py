#!/usr/bin/env python
"""Measures asymq: `benchmark.py ops --help` and `benchmark.py step --help` list the choices."""

import argparse
import sys
from pathlib import Path

import torch

from asymq.experiments import benchmark_ops, benchmark_step


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def names(choices):
    """An argparse type: a comma-separated selection of choices."""

    def parse(text):
        unknown = set(text.split(",")) - set(choices)
        if unknown:
            raise argparse.ArgumentTypeError(
                f"no {', '.join(sorted(unknown))}: choose from {', '.join(choices)}"
            )
        return [name for name in choices if name in text.split(",")]

    return parse


COMMANDS = {
    "ops": (
        benchmark_ops,
        "one fake-quantize, forward and backward, against baselines",
        {
            "only": benchmark_ops.METHODS,
            "dtype": benchmark_ops.DTYPES,
            "granularity": benchmark_ops.GRANULARITIES,
        },
    ),
    "step": (
        benchmark_step,
        "a training step of a model, against the float model and other quantizers",
        {"only": benchmark_step.METHODS, "precision": benchmark_step.PRECISIONS},
    ),
}


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (_, description, selections) in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument(
            "--device",
            choices=["cuda", "cpu"],
            default="cuda" if torch.cuda.is_available() else "cpu",
        )
        for option, choices in selections.items():
            command.add_argument(
                f"--{option}",
                type=names(choices),
                metavar="NAME,...",
                default=list(choices),
                help=", ".join(choices),
            )
        command.add_argument("--threads", type=int, default=2, help="on the CPU (default 2)")
        command.add_argument("--quick", action="store_true", help="less, and less exact")
        command.add_argument(
            "--out",
            type=Path,
            default=Path(__file__).parent / "results",
            metavar="DIR",
            help="where the CSV file and the table go (default scripts/results)",
        )
        if name == "step":
            command.add_argument(
                "--model",
                choices=benchmark_step.MODELS,
                help="its shape (default gpt2, on the CPU quickstart)",
            )
            command.add_argument(
                "--checkpointing", action="store_true", help="recompute the blocks' activations"
            )
            command.add_argument(
                "--profile", action="store_true", help="where time, traffic and memory go"
            )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    COMMANDS[args.command][0].run(args)


if __name__ == "__main__":
    sys.exit(main())
