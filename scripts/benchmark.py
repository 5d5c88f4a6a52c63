#!/usr/bin/env python
"""Measures asymq: `benchmark.py ops --help` and `benchmark.py step --help` list the choices."""

import argparse
import sys
from pathlib import Path

import torch

from asymq.experiments.benchmark import ops, recipes, step
from asymq.experiments.common.command import Parser, integer
from asymq.experiments.common.files import BadInput, need_writable
from asymq.experiments.common.recipes import FORM, Recipe

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
        # Which of them a run has, and its defaults, depends on --recipe.
        {"only": (*step.METHODS, *recipes.METHODS[1:]), "precision": step.PRECISIONS},
    ),
}


def module_of(args):
    """What runs the command. BadInput: options that do not go together."""
    if args.command != "step":
        return COMMANDS[args.command][0]
    module = recipes if args.recipe else step
    if args.generate and not args.recipe:
        raise BadInput("--generate: measures recipes: give --recipe too")
    needs_gpu = [] if args.device == "cuda" else step.CAPTURED
    args.only = args.only or [name for name in module.METHODS if name not in needs_gpu]
    for method in args.only:
        if method in needs_gpu:
            raise BadInput(f"--only {method}: is a CUDA graph, which needs a GPU: leave it out")
        if method not in module.METHODS:
            raise BadInput(
                f"--only {method}: {'with' if args.recipe else 'without'} --recipe there are "
                f"{', '.join(module.METHODS)}"
            )
    args.precision = args.precision or list(module.DEFAULT_PRECISIONS[args.device])
    if args.device == "cpu" and "tf32" in args.precision:
        raise BadInput("--precision tf32: is a GPU's alone; the CPU has float32 and bfloat16")
    return module


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
            command.set_defaults(only=None, precision=None)
            command.add_argument(
                "--model",
                choices=step.MODELS,
                help="its shape (default gpt2, with --recipe llama-1b, on the CPU quickstart)",
            )
            command.add_argument(
                "--recipe",
                nargs="+",
                type=Recipe.parse,
                metavar=FORM,
                help="such as w4a8:group=32,cache=8, beside the float model with SDPA, eager and "
                "compiled; weights and ranges learn, in bfloat16 (default: the paper's setting)",
            )
            command.add_argument(
                "--generate", action="store_true", help="with --recipe: tokens a second, too"
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
        module = module_of(args)
        need_writable(args.out)
        module.run(args)
    except ModuleNotFoundError as error:
        parser.error(f"needs {error.name}: pip install 'asymq[experiments]'")
    except (BadInput, OSError, torch.OutOfMemoryError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")


if __name__ == "__main__":
    sys.exit(main())
