#!/usr/bin/env python
"""Makes the paper's figures and tables with this library, and checks the paper's claims.

Figures 3, 5, 6, 7, 8 and 9 are trained here, with their settings; the same settings can be changed
below. Figure 4 is drawn from results of scripts/table2.py.
"""

import argparse
import sys
from pathlib import Path

from asymq.experiments.common.command import (
    Parser,
    bit_width,
    distinct_rates,
    integer,
    learning_rate,
    positive,
)
from asymq.experiments.common.files import BadInput
from asymq.experiments.figures import SEEDS, STEPS


def parse(arguments):
    parser = Parser(
        "figures.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="NAME",
        help="figure3 to figure9, links, drift, offsets, gradients, table1, table3 (default all)",
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
    add("--seeds", type=integer(1), default=SEEDS, help=f"default {SEEDS}")
    add(
        "--steps",
        type=integer(1),
        default=STEPS,
        help=f"default {STEPS}; with fewer most claims are not decided",
    )
    add("--lr", nargs="+", type=learning_rate, metavar="LR")
    add("--bits", nargs="+", type=bit_width, metavar="N", help="2 to 16")
    add("--std", type=positive, help="standard deviation of the samples")
    add("--params", nargs="+", metavar="NAME", help="parameterizations and step rules to draw")
    return parser, parser.parse_args(arguments)


def main(arguments=None):
    parser, args = parse(arguments)
    try:
        from asymq.experiments.figures import definitions, run
    except ModuleNotFoundError as error:
        parser.error(f"needs {error.name}: pip install 'asymq[experiments]'")
    try:
        settings = definitions.Settings(
            seeds=args.seeds,
            steps=args.steps,
            lrs=args.lr and tuple(distinct_rates(args.lr)),
            bits=args.bits and tuple(dict.fromkeys(args.bits)),
            std=args.std,
            names=args.params and tuple(dict.fromkeys(args.params)),
        )
        run.run(list(dict.fromkeys(args.names)), args.out, settings, args.table2)
    except (BadInput, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")


if __name__ == "__main__":
    sys.exit(main())
