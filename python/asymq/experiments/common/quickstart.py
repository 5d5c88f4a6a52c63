"""What the quick start learns from: a small GPT-2 and text that every Python installation has.

``python -m asymq.experiments.common.quickstart FOLDER`` trains a tokenizer and a model from nothing
on the help topics of Python and leaves FOLDER/gpt2-topics, a folder as transformers saves it, and
FOLDER/text with wiki.train.raw and wiki.test.raw, as scripts/table2.py takes them.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from asymq.experiments.common import text
from asymq.experiments.common.command import Parser, integer
from asymq.experiments.common.files import write

NAME, CONTEXT, VOCABULARY, END = "gpt2-topics", 128, 2048, "<|endoftext|>"
STEPS = 900


def read_topics(characters: int | None = None) -> tuple[str, str]:
    """Python's help topics, every tenth held out for evaluation, of which no more than so many
    `characters` are kept."""
    names = sorted(topics)
    test = "\n".join(topics[name] for name in names[::10])[:characters]
    return "\n".join(topics[name] for i, name in enumerate(names) if i % 10), test


def write_text(folder: Path, characters: int | None = None) -> tuple[str, str]:
    """The same in files, as scripts/table2.py takes them."""
    train, test = read_topics(characters)
    write(folder / text.TRAIN, train)
    write(folder / text.TEST, test)
    return train, test


def byte_level_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """As GPT-2's, with its END."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(train: str, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    tokenizer = byte_level_bpe(train.splitlines(keepends=True), vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END
    )


def train_model(windows: torch.Tensor, steps: int, batch: int = 8, lr: float = 1.5e-3):
    """A GPT-2 of 4 layers and 1.07 million weights after `steps` of AdamW."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4,
        n_embd=128,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    bar = tqdm(range(steps), desc="training GPT-2", unit="step", disable=None)
    for step in bar:
        ids = text.batch_of(windows, step, batch, seed=0)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    return model.eval()


def make(folder: Path, steps: int = STEPS) -> None:
    """Leaves model and text in `folder`, complete or not at all, unless they are there."""
    target = folder / NAME
    if target.exists():
        print(f"{target} is there already")
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train, test = write_text(folder / "text")
    tokenizer = train_tokenizer(train)
    rows = [text.windows(text.tokenize(tokenizer, t), CONTEXT, "topics") for t in (train, test)]
    print(f"{len(train) + len(test)} characters, {rows[0].numel()} tokens to learn from")
    start = time.perf_counter()
    model = train_model(rows[0], steps)
    seconds = time.perf_counter() - start
    # Complete or not at all.
    partial = folder / f".{NAME}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.2f} M weights, {steps} steps in {seconds:.0f} s, "
        f"perplexity {text.perplexity(model, rows[1], 16):.1f}"
    )


def main() -> None:
    parser = Parser("quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=integer(1), default=STEPS, help=f"default {STEPS}")
    parser.add_argument(
        "--text-alone",
        type=integer(1),
        metavar="N",
        help="no model; and of the text for evaluation the first N characters",
    )
    args = parser.parse_args()
    if args.text_alone is not None:
        write_text(args.folder / "text", args.text_alone)
        return
    make(args.folder, args.steps)


if __name__ == "__main__":
    main()
