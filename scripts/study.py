#!/usr/bin/env python
"""Finds the settings that a quantized language model learns best with, by recipe: rate, loss,
parameterization and link, calibration, steps, joint training. A tree of questions, each of whose
cells is stated in plan.md before it runs and takes over the answers before it.

run: runs what is not there yet (the same command continues after an interruption, several commands
share the cells) and reports. plan: prints what is to be run, and runs nothing. report: of a folder.
recommend: writes what it found, of the recipes given, into the file of asymq.recommended. peers:
the same training by torchao and AIMET, as far as they are installed.
"""

import argparse
import sys
from pathlib import Path

from asymq.experiments.common.command import (
    Parser,
    add_options,
    integer,
    number,
    options_of,
)
from asymq.experiments.common.intervals import MOST_SEEDS
from asymq.experiments.common.recipes import FORM, Recipe
from asymq.experiments.study.subject import Protocol
from asymq.experiments.study.tree import STAGES, Grid
from asymq.experiments.table2.protocol import PAPERS_SETTING

COMMANDS = ("run", "plan", "report", "recommend", "peers")
RECIPES = (PAPERS_SETTING, "w4a16:group=64", "w4a8:group=32", "w8a8", "w4a4:group=64", "npu")


def recipe(text):
    return text if text == PAPERS_SETTING else Recipe.parse(text, besides=(PAPERS_SETTING,)).slug


def parse(arguments):
    parser = Parser(
        "study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", nargs="?", choices=COMMANDS, default="run", help="default run")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    add(
        "--model",
        default="smollm2",
        help="as table2.py's: folder, GGUF file, name of the hub, or smollm2 (default smollm2)",
    )
    add("--data", help="folder with wiki.train.raw and wiki.test.raw, or dataset of the hub")
    add("--train-text", type=Path, metavar="FILE", help="text to learn from instead")
    add("--test-text", type=Path, metavar="FILE", help="text to evaluate on instead")
    add(
        "--recipes",
        nargs="+",
        type=recipe,
        metavar=FORM,
        help=f"default {' '.join(RECIPES)}, of recommend all that the folder has",
    )
    add(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        metavar="NAME",
        help=f"of {', '.join(STAGES)}, in this order (default all)",
    )
    groups = {name: parser.add_argument_group(name) for name in ("tree", "protocol", "running")}
    add = groups["tree"].add_argument
    add("--rates", nargs="+", type=number, metavar="LR", help="of ranges (default 1e-4 to 3e-2)")
    add("--weight-rates", nargs="+", type=number, metavar="LR", help="default 1e-6 1e-5 1e-4")
    add("--steps", nargs="+", type=integer(1), metavar="N", help="tried (default 50 200 1000)")
    add("--base-steps", type=integer(1), metavar="N", help="of all other cells (default 200)")
    add(
        "--seeds",
        type=integer(1, MOST_SEEDS),
        metavar="N",
        help="of candidates that are close to the best (default 3)",
    )
    add_options(groups, Protocol)
    add = groups["running"].add_argument
    add(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="such as cuda:0 cuda:1 (default all GPUs, else cpu)",
    )
    add("--processes", type=integer(1), default=1, metavar="N", help="of each device (default 1)")
    args = parser.parse_args(arguments)
    if args.recipes is not None or args.command != "recommend":
        args.recipes = list(dict.fromkeys(args.recipes or map(recipe, RECIPES)))
    given = {
        name: tuple(dict.fromkeys(value)) if isinstance(value, list) else value
        for name in Grid.__dataclass_fields__
        if (value := getattr(args, name)) is not None
    }
    args.grid = Grid(**given)
    return parser, args


def main(arguments=None):
    parser, args = parse(arguments)
    try:
        import transformers

        from asymq.experiments.common.spread import FAILURES
        from asymq.experiments.study import peers, recommend, run, table
    except ModuleNotFoundError as error:
        parser.error(f"needs {error.name}: pip install 'asymq[experiments]'")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = run.Options.__dataclass_fields__
    options = run.Options(**{name: getattr(args, name) for name in names})
    protocol = options_of(Protocol, args)
    try:
        if args.command == "run":
            run.run(options, protocol)
        elif args.command == "plan":
            run.print_plan(options, protocol)
        elif args.command == "report":
            table.report(args.out)
        elif args.command == "recommend":
            recommend.recommend(args.out, args.recipes)
        else:
            peers.run(options, protocol)
    except FAILURES as error:
        return parser.error(error)
    except KeyboardInterrupt:
        return parser.exit(130, "\ninterrupted; the same command continues\n")


if __name__ == "__main__":
    sys.exit(main())
