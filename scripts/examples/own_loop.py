"""A Llama-type model in a training loop of one's own: 4-bit weights, 8-bit inputs of each token.

own_loop.py --model HuggingFaceTB/SmolLM2-135M --text train.txt --out quantized
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import asymq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder, or name on the hub")
parser.add_argument("--text", required=True, help="text file")
parser.add_argument("--out", required=True, help="folder to write")
parser.add_argument("--log", help="folder of a log for TensorBoard")
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


def batch(step):
    """Windows of the text, in order, from the start again at its end."""
    first = step * args.batch
    return windows[torch.arange(first, first + args.batch) % len(windows)]


asymq.prepare(model, asymq.QuantConfig.w4a8())
asymq.calibrate(model, [batch(step) for step in range(4)])
optimizer = torch.optim.AdamW(
    [
        {"params": asymq.weight_parameters(model), "weight_decay": 0.1},
        *asymq.range_parameters(model, lr=1e-3),
    ],
    lr=1e-5,
)
writer = log = None
if args.log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(args.log)
    log = asymq.RangeLogger(model, writer, every=10)
for step in range(args.steps):
    ids = batch(step)
    optimizer.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if log:
        log.step(step)  # ranges, the share that collapsed, norms of their gradients
    optimizer.step()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step:4}  loss {loss.item():.4f}")
if writer:
    writer.close()
asymq.save(model, args.out)
