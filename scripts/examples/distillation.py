"""Ranges learn from the float model: the model is its own teacher, no second copy is kept.

distillation.py --model HuggingFaceTB/SmolLM2-135M --text train.txt --out quantized
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import asymq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder, or name on the hub")
parser.add_argument("--text", required=True, help="text file")
parser.add_argument("--out", required=True, help="folder to write")
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

asymq.prepare(model, asymq.QuantConfig.w4a16(group=32))
asymq.calibrate(model, windows[: 4 * args.batch].split(args.batch))
asymq.freeze_weights(model)  # the teacher is the float model as long as they stay
divergence = asymq.SelfDistillation(model)
optimizer = torch.optim.Adam(asymq.range_parameters(model), lr=1e-3)
for step in range(args.steps):
    ids = windows[torch.arange(step * args.batch, (step + 1) * args.batch) % len(windows)]
    optimizer.zero_grad()
    loss = divergence(input_ids=ids)
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step:4}  KL to the float model {loss.item():.3g}")
asymq.save(model, args.out)
