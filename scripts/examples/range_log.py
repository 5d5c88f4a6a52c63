"""Ranges while they learn, with every operation of a language model quantized, in TensorBoard.

range_log.py --model HuggingFaceTB/SmolLM2-135M --text train.txt --out runs
tensorboard --logdir runs
"""

import argparse

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

import asymq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder, or name on the hub")
parser.add_argument("--text", required=True, help="text file")
parser.add_argument("--out", required=True, help="folder of the log")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=1024)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
tokenizer = AutoTokenizer.from_pretrained(args.model)
with open(args.text, encoding="utf-8") as file:
    tokens = tokenizer(file.read(), return_tensors="pt").input_ids[0]
windows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length).to(device)
batches = windows[torch.arange(args.steps * args.batch) % len(windows)].split(args.batch)

asymq.prepare(model, asymq.QuantConfig.table2("beta_gamma", activation_bits=8))
asymq.calibrate(model, batches[:4])
asymq.freeze_weights(model)
optimizer = torch.optim.Adam(asymq.range_parameters(model), lr=1e-3)
with SummaryWriter(args.out) as writer:
    logger = asymq.RangeLogger(model, writer, every=10)
    for step, ids in enumerate(batches):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        logger.step(step)  # ranges, the share that collapsed, norms of their gradients
        writer.add_scalar("loss", loss.item(), step)
        optimizer.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:4}  loss {loss.item():.4f}")
