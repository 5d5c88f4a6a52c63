#!/usr/bin/env python
"""The scaling law of quantization-aware training: how much loss 4 bits cost at a size, a number of
tokens and a group size, by the paper's fit, or by one of your own runs.

predict: a table by the paper's constants, or those of --fit. fit: constants, intervals and claims
of a CSV file of runs. run: trains every combination from scratch, continues what was interrupted,
and fits.
"""

import argparse
import json
import sys
from pathlib import Path

from asymq.experiments.common.command import Parser, add_options, integer, options_of
from asymq.experiments.common.spread import FAILURES
from asymq.experiments.scaling_law import cells

COLUMNS = ("precision", "params", "tokens", "group", "delta", "loss", "multiplier")


def precision(text):
    if text not in cells.PRECISIONS:
        known = ", ".join(cells.PRECISIONS)
        raise argparse.ArgumentTypeError(f"unknown precision {text!r}; there are {known}")
    return text


def precision_of_run(text):
    return text if text == cells.FLOAT else precision(text)


def parse(arguments):
    parser = Parser(
        "scaling_law.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    add = _command(commands, "predict", "what quantization costs, by a law").add_argument
    names = ", ".join(cells.PRECISIONS)
    add("--precision", nargs="+", type=precision, required=True, metavar="P", help=names)
    add("--params", type=float, required=True, metavar="N", help="of the blocks, such as 594e6")
    add("--tokens", type=float, required=True, metavar="D", help="trained on, such as 100e9")
    add("--groups", nargs="+", type=float, required=True, metavar="G", help="elements a range")
    add("--fit", type=Path, metavar="DIR", help="of `fit` or `run` (default: the paper's)")
    add("--json", action="store_true", help="a list of objects in place of the table")

    add = _command(commands, "fit", "a law of runs").add_argument
    add(
        "runs",
        type=Path,
        metavar="RUNS.csv",
        help="columns precision (bf16: a baseline, whose group is empty), params, tokens, group, "
        "seed, loss",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")

    command = _command(commands, "run", "trains, then fits")
    add = command.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    add(
        "--sizes",
        nargs="+",
        type=cells.Size.parse,
        default=[cells.Size(32, 2), cells.Size(64, 2)],
        metavar="WIDTHxLAYERS",
        help="of Llamas (default 32x2 64x2)",
    )
    add(
        "--tokens",
        nargs="+",
        type=cells.token_count,
        default=[100_000, 400_000],
        metavar="N",
        help="trained on, each once (default 1e5 4e5)",
    )
    add(
        "--groups",
        nargs="+",
        type=cells.group,
        default=[16, cells.TOKEN],
        metavar="G",
        help="elements a range; token: one a token and row of a weight (default 16 token)",
    )
    add(
        "--precisions",
        nargs="+",
        type=precision_of_run,
        default=["W4A4"],
        metavar="P",
        help=f"of {names}, beside {cells.FLOAT} (default W4A4)",
    )
    add("--seeds", nargs="+", type=integer(0), default=[0], metavar="N", help="default 0")
    add(
        "--data",
        metavar="TEXT|FOLDER",
        help="a file, whose bytes are tokens, or a folder of `python -m "
        "asymq.experiments.scaling_law.corpus` (default: the standard library's sources)",
    )
    add(
        "--devices",
        "--device",
        nargs="+",
        metavar="DEVICE",
        help="such as cuda:0 cuda:1, one process each (default all GPUs, else cpu)",
    )
    add_options({"training": command.add_argument_group("training")}, cells.Settings)
    return parser, parser.parse_args(arguments)


def _command(commands, name, text):
    return commands.add_parser(name, help=text, description=f"{name}: {text}")


def predict(args):
    from asymq.experiments.scaling_law.fit import read_fit
    from asymq.scaling_law import effective_parameters

    laws, chinchilla = read_fit(args.fit)
    rows = []
    for name in dict.fromkeys(args.precision):
        if name not in laws:
            raise ValueError(f"--fit {args.fit}: has no {name}, only {', '.join(laws)}")
        for group in dict.fromkeys(args.groups):
            delta = float(laws[name].delta(args.params, args.tokens, group))
            loss = float(chinchilla.loss(args.params, args.tokens)) + delta
            share = float(effective_parameters(args.params, delta, chinchilla))
            given = (name, args.params, args.tokens, group)
            rows.append(dict(zip(COLUMNS, (*given, delta, loss, share), strict=True)))
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows:
        given = (f"{row[name]:g}" for name in COLUMNS[1:4])
        found = (f"{row['delta']:.4f}", f"{row['loss']:.4f}", f"{row['multiplier']:.3f}")
        print(f"| {' | '.join((row['precision'], *given, *found))} |")


def fit(args):
    from asymq.experiments.scaling_law.fit import fit

    fit(args.runs, args.out)


def run(args):
    import transformers

    from asymq.experiments.scaling_law.fit import fit
    from asymq.experiments.scaling_law.runs import RUNS
    from asymq.experiments.scaling_law.sweep import train

    transformers.utils.logging.set_verbosity_error()
    chosen = cells.grid(args.sizes, args.tokens, args.groups, args.precisions, args.seeds)
    train(chosen, options_of(cells.Settings, args), args.out, args.data, args.devices)
    fit(args.out / RUNS, args.out, enough=False)


def main(arguments=None):
    parser, args = parse(arguments)
    try:
        {"predict": predict, "fit": fit, "run": run}[args.command](args)
    except ModuleNotFoundError as error:
        parser.error(f"needs {error.name}: pip install 'asymq[experiments]'")
    except (ValueError, *FAILURES) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; the same command continues\n")


if __name__ == "__main__":
    sys.exit(main())
