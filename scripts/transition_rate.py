#!/usr/bin/env python
"""Compares what steers quantized weights: learning rates, a scheduled share of changing codes
(asymq.TransitionRateScheduler), and holding weights that oscillate (asymq.OscillationObserver).

The same command continues what was interrupted. With several devices every one takes runs of its
own, and several commands with the same --out share them.
"""

import argparse
import sys
from pathlib import Path

from asymq.experiments.common.command import (
    Parser,
    add_options,
    bit_width,
    integer,
    number,
    options_of,
)
from asymq.experiments.common.intervals import MOST_SEEDS
from asymq.experiments.transition_rate.protocol import (
    FACTORS,
    METHODS,
    OPTIMIZERS,
    Protocol,
    share,
)


def factor(text):
    share(text)
    return number(text)


def parse(arguments):
    parser = Parser(
        "transition_rate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--task",
        default="digits",
        help="digits or digits-conv (scikit-learn's; a linear or a convolutional network), text (a "
        "small GPT-2 on Python's help topics), or a language model as table2.py's --model: folder, "
        "GGUF file or smollm2 (default digits)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    add("--data", help="text of a language model, as table2.py's --data (default help topics)")
    add("--seeds", type=integer(1, MOST_SEEDS), default=5, metavar="N", help="how many (default 5)")
    add("--bits", nargs="+", type=bit_width, default=[2], help="of weights (default 2)")
    add(
        "--optimizers",
        nargs="+",
        choices=OPTIMIZERS,
        default=None,
        help=f"of {', '.join(OPTIMIZERS)} (default all of digits, else adamw)",
    )
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help="; ".join(f"{name}: {what}" for name, what in METHODS.items()) + " (default all)",
    )
    add("--rates", nargs="+", type=number, metavar="LR", help="default three an optimizer")
    add(
        "--factors",
        nargs="+",
        type=factor,
        default=list(FACTORS),
        metavar="X",
        help=f"of the scheduler (default {' '.join(FACTORS)})",
    )
    groups = {"protocol": parser.add_argument_group("protocol")}
    add_options(groups, Protocol)
    add = parser.add_argument_group("running").add_argument
    add(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="such as cuda:0 cuda:1, one process each (default all GPUs, else cpu, for digits once "
        "a core)",
    )
    add(
        "--checkpoint-every",
        type=integer(1),
        default=1000,
        metavar="N",
        help="steps (default 1000)",
    )
    args = parser.parse_args(arguments)
    if args.optimizers is None:
        digits = args.task in ("digits", "digits-conv")
        args.optimizers = list(OPTIMIZERS) if digits else ["adamw"]
    for name in ("bits", "optimizers", "methods", "rates", "factors"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or ())))
    return parser, args


def main(arguments=None):
    parser, args = parse(arguments)
    try:
        import transformers

        from asymq.experiments.common.spread import FAILURES
        from asymq.experiments.transition_rate import run
    except ModuleNotFoundError as error:
        parser.error(f"needs {error.name}: pip install 'asymq[experiments]'")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        names = run.Options.__dataclass_fields__
        run.run(
            run.Options(**{name: getattr(args, name) for name in names}), options_of(Protocol, args)
        )
    except FAILURES as error:
        return parser.error(error)
    except KeyboardInterrupt:
        return parser.exit(130, "\ninterrupted; the same command continues\n")


if __name__ == "__main__":
    sys.exit(main())
