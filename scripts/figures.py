#!/usr/bin/env python
"""Makes the paper's figures and tables with this library, and checks the paper's claims.

Figures 3, 5, 6, 7, 8 and 9 are trained here, with their settings; the same settings can be changed
below. Figure 4 is drawn from results of scripts/table2.py.
"""

import argparse
import math
import sys
from pathlib import Path


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(kind, name):
    def convert(text):
        if not 0 < float(text) < math.inf:
            raise ValueError
        return kind(text)

    convert.__name__ = name
    return convert


def bit_width(text):
    if not 2 <= int(text) <= 16:
        raise ValueError
    return int(text)


def parse(arguments):
    parser = Parser(
        "figures.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    bit_width.__name__ = "bit width of 2 to 16"
    add(
        "names",
        nargs="*",
        metavar="NAME",
        help="figure3 to figure9, drift, offsets, gradients, table1, table3 (default all)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    add(
        "--table2",
        type=Path,
        metavar="DIR",
        help="results of scripts/table2.py, for Figure 4",
    )
    group = parser.add_argument_group("settings of the trained figures (default: each its own)")
    add = group.add_argument
    add("--seeds", type=positive(int, "number of seeds"), default=5, help="default 5")
    add("--steps", type=positive(int, "number of steps"), default=5000, help="default 5000")
    # Kept as typed: curves are named after it.
    add("--lr", nargs="+", type=positive(str, "learning rate"), metavar="LR")
    add("--bits", nargs="+", type=bit_width, metavar="N")
    add("--std", type=positive(float, "standard deviation"), help="of the samples")
    add("--params", nargs="+", metavar="NAME", help="parameterizations and step rules to draw")
    return parser, parser.parse_args(arguments)


def unique(values):
    return None if values is None else tuple(dict.fromkeys(values))


def main(arguments=None):
    parser, args = parse(arguments)
    try:
        from asymq.experiments import figures
        from asymq.experiments.files import BadInput
    except ModuleNotFoundError as error:
        parser.error(f"needs {error.name}: pip install 'asymq[experiments]'")
    try:
        settings = figures.Settings(
            seeds=args.seeds,
            steps=args.steps,
            lrs=unique({float(lr): lr for lr in args.lr}.values() if args.lr else None),
            bits=unique(args.bits),
            std=args.std,
            names=unique(args.params),
        )
        figures.run(list(dict.fromkeys(args.names)), args.out, settings, args.table2)
    except (BadInput, OSError) as error:
        parser.error(str(error).splitlines()[0])
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")


if __name__ == "__main__":
    sys.exit(main())
