#!/usr/bin/env python
"""Learns ranges for some steps, exports to ONNX, and measures what onnxruntime makes of it.

to_onnx.py MODEL --train-text FILE --test-text FILE --out FOLDER [--config table2|w8a8|npu]

MODEL is a folder of transformers. Prints a row of table.md.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import asymq
from asymq.experiments.common import text
from asymq.export.grids import Grid

CONFIGS = {
    "table2": lambda: asymq.QuantConfig.table2("min_max"),
    "w8a8": lambda: asymq.QuantConfig.table2("min_max", weight_bits=8, activation_bits=8),
    "npu": asymq.QuantConfig.npu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train-text", required=True, type=Path)
    parser.add_argument("--test-text", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--config", choices=CONFIGS, default="table2")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, test = (
        text.windows(text.tokenize(tokenizer, part.content[:2_000_000]), options.context, "text")
        for part in text.read(None, options.train_text, options.test_text)
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model = learned(model, train, options)
    test = test[: options.windows]

    path = options.out / f"{Path(options.model).name}-{options.config}.onnx"
    start = time.perf_counter()
    report = asymq.export_onnx(model, test[:2], path)
    seconds = time.perf_counter() - start
    path.with_suffix(".txt").write_text(f"{report}\n")

    session = onnx_session(path)
    own = torch.cat([logits_of(model, row) for row in test.split(1)])
    theirs = torch.cat([run(session, row) for row in test.split(1)])
    step = model.lm_head.output_quantizer.scale_offset()[0]
    equal, codes = equal_codes(model, path)
    row = [
        f"ONNX, {Path(options.model).name}, {options.config}",
        f"{equal:,} of {codes:,}",
        f"{((own - theirs).abs() / step).max():.0f} ({(own != theirs).float().mean():.1%})",
        f"{loss_of(own, test):.4f}",
        f"{loss_of(theirs, test):.4f}",
        f"{loss_of(theirs, test) - loss_of(own, test):+.4f}",
        f"{sum(file.stat().st_size for file in report.files) / 1e6:.1f} MB",
        f"{seconds:.0f} s",
    ]
    print("| " + " | ".join(row) + " |")


def learned(model, train, options):
    """Ranges after calibration and some steps of Adam, the weights as they were."""
    asymq.freeze_weights(asymq.prepare(model, CONFIGS[options.config]()))
    batches = [text.batch_of(train, step, 2, seed=0) for step in range(options.steps)]
    asymq.calibrate(model, [text.batch_of(train, step, 2, seed=1) for step in range(4)])
    optimizer = torch.optim.Adam(asymq.range_parameters(model), lr=1e-3)
    for step, batch in enumerate(batches):
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: {loss.item():.4f}", file=sys.stderr)
    return model


def onnx_session(path):
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    file = onnx.load(path, load_external_data=False)
    (config,) = (p.value for p in file.metadata_props if p.key == "asymq.session_config")
    for key, value in json.loads(config).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(path, options)


def run(session, ids):
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


@torch.no_grad()
def logits_of(model, ids):
    return model(ids, use_cache=False).logits


def loss_of(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def equal_codes(model, path):
    """How many of the file's integers are those of asymq.quantize, and of how many."""
    import onnx

    held = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    quantizers = dict(asymq.named_quantizers(model))
    equal = count = 0
    for name, parameter in model.named_parameters():
        quantizer = quantizers.get(f"{name}_quantizer")
        if quantizer is None or f"{name}_quantized" not in held:
            continue
        stored = onnx.numpy_helper.to_array(held[f"{name}_quantized"]).astype("int32")
        grid = Grid.of(quantizer)
        expected = grid.codes(parameter) + grid.container(constant=True).zero_point
        stored = torch.from_numpy(stored)
        if stored.shape != expected.shape or isinstance(
            model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear
        ):
            stored = stored.t()
        equal += int((stored == expected).sum())
        count += stored.numel()
    return equal, count


if __name__ == "__main__":
    main()
