#!/usr/bin/env python
"""Fills the paper's Table 2: learns the quantization ranges of GPT-2 and OPT models on text.

The same command continues what was interrupted. With several GPUs every one takes cells of its own;
under torchrun or accelerate launch all processes share every cell.
"""

import argparse
import math
import os
import sys
from pathlib import Path

PARAMETERIZATIONS = (
    *("scale_offset", "min_max", "beta_gamma"),  # by default
    *("beta_gamma_sigmoid", "kscale_koffset"),
)
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def learning_rate(text):
    """Kept as typed: results are named after it."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return text


def parse(arguments):
    parser = Parser(
        "table2.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    learning_rate.__name__ = "learning rate"
    add(
        "--model",
        nargs="+",
        default=["gpt2"],
        metavar="MODEL",
        help="name on the hub, or folder with config, weights and tokenizer (default gpt2)",
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
        choices=PARAMETERIZATIONS,
        default=list(PARAMETERIZATIONS[:3]),
        metavar="NAME",
        help=f"of {', '.join(PARAMETERIZATIONS)} (default the first three)",
    )
    add(
        "--lrs",
        nargs="+",
        type=learning_rate,
        default=["1e-2", "1e-3"],
        metavar="LR",
        help="learning rates (default 1e-2 1e-3)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")

    group = parser.add_argument_group("protocol")
    add = group.add_argument
    add("--steps", type=int, default=2000, help="training steps a cell (default 2000)")
    add("--batch", type=int, default=8, help="windows a step (default 8)")
    add(
        "--context",
        type=int,
        help="tokens a window (default 1024, for GPT2-XL 768, at most the model's)",
    )
    add("--seed", type=int, default=0, help="of the order of the windows (default 0)")
    add("--calibration-batches", type=int, default=10, metavar="N", help="default 10")
    add("--weight-bits", type=int, default=4, metavar="N", help="default 4")
    add("--activation-bits", type=int, default=12, metavar="N", help="default 12")
    add("--norm-bits", type=int, default=12, metavar="N", help="LayerNorm weights (default 12)")
    add(
        "--weight-granularity",
        default="channel",
        metavar="WHICH",
        help="tensor, channel, or the size of groups (default channel)",
    )
    add(
        "--activation-granularity",
        default="tensor",
        metavar="WHICH",
        help="tensor or channel (default tensor)",
    )
    add(
        "--force-zero",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="calibrated ranges contain zero (default)",
    )
    add("--eps", type=float, default=1e-8, help="least scale of a range (default 1e-8)")
    add("--adam-eps", type=float, default=1e-8, metavar="EPS", help="Adam's (default 1e-8)")
    add(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="TF32 matrix products while learning on a GPU (default)",
    )
    add(
        "--perplexity",
        choices=("raw", "run_clm"),
        default="raw",
        help="tokenize the test text at once, or line by line (default raw)",
    )

    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--eval-every", type=int, default=500, metavar="N", help="steps (default 500)")
    add(
        "--checkpoint-every",
        type=int,
        default=100,
        metavar="N",
        help="steps, at most 100 (default 100)",
    )
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
    for name in ("model", "parameterizations"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    args.lrs = list({float(lr): lr for lr in args.lrs}.values())
    return parser, args


def main(arguments=None):
    parser, args = parse(arguments)
    rank = int(os.environ.get("RANK", 0))
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if args.fsdp and not together:
        parser.error("--fsdp splits weights among processes: start this with torchrun")
    try:
        import transformers

        from asymq.experiments import range_learning, table2
    except ModuleNotFoundError as error:
        parser.error(f"needs {error.name}: pip install 'asymq[experiments]'")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    protocol = {name: getattr(args, name) for name in range_learning.Protocol.__dataclass_fields__}
    data = args.data
    if data is None and not (args.train_text and args.test_text):
        data = WIKITEXT2
    options = table2.Options(
        models=args.model,
        parameterizations=args.parameterizations,
        lrs=args.lrs,
        out=args.out,
        data=data,
        train_text=args.train_text,
        test_text=args.test_text,
        devices=args.devices,
        shard=args.fsdp,
        together=together,
    )
    try:
        table2.run(options, range_learning.Protocol(**protocol))
    except table2.FAILURES as error:
        message = str(error).splitlines()[0]
        # Under torchrun every process finds the same.
        return parser.error(message) if rank == 0 else 2
    except KeyboardInterrupt:
        return parser.exit(130, "\ninterrupted; the same command continues\n")


if __name__ == "__main__":
    sys.exit(main())
