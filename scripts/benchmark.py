#!/usr/bin/env python
"""Measures asymq: `benchmark.py ops --help` and `benchmark.py step --help` list the choices."""

import argparse
import sys
from pathlib import Path

import torch

from asymq.experiments.benchmark import ops, step
from asymq.experiments.common.command import Parser, integer
from asymq.experiments.common.files import BadInput, need_writable

ROOT = Path(__file__).resolve().parents[1]


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
        ops,
        "one fake-quantize, forward and backward, against baselines",
        {
            "only": ops.METHODS,
            "dtype": ops.DTYPES,
            "granularity": ops.GRANULARITIES,
        },
    ),
    "step": (
        step,
        "a training step of a model, against the float model and other quantizers",
        {"only": step.METHODS, "precision": step.PRECISIONS},
    ),
}


def main(arguments=None):
    parser = Parser("benchmark.py", description=__doc__)
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
        command.add_argument("--threads", type=integer(1), default=2, help="on the CPU (default 2)")
        command.add_argument("--quick", action="store_true", help="less, and less exact")
        command.add_argument(
            "--out",
            type=Path,
            default=ROOT / "build" / "benchmark",
            metavar="DIR",
            help="where the CSV file and the table go (default build/benchmark)",
        )
        command.add_argument(
            "--against",
            type=Path,
            metavar="FILE.csv",
            help="results of the same command to compare with",
        )
        if name == "step":
            command.add_argument(
                "--model",
                choices=step.MODELS,
                help="its shape (default gpt2, on the CPU quickstart)",
            )
            command.add_argument(
                "--checkpointing", action="store_true", help="recompute the blocks' activations"
            )
            command.add_argument(
                "--profile", action="store_true", help="where time, traffic and memory go"
            )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    try:
        need_writable(args.out)
        COMMANDS[args.command][0].run(args)
    except ModuleNotFoundError as error:
        parser.error(f"needs {error.name}: pip install 'asymq[experiments]'")
    except (BadInput, OSError, torch.OutOfMemoryError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")


if __name__ == "__main__":
    sys.exit(main())
