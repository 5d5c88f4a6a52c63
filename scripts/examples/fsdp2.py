"""A model sharded over processes by FSDP2, with accelerate around optimizer and data.

    torchrun --nproc-per-node 2 fsdp2.py --model HuggingFaceTB/SmolLM2-135M --text train.txt \\
        --out quantized
"""

import argparse

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import asymq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder, or name on the hub")
parser.add_argument("--text", required=True, help="text file")
parser.add_argument("--out", required=True, help="folder to write")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=4, help="windows of each process")
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--lr", type=float, default=1e-5, help="of the weights")
args = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available())
device = accelerator.device
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
tokenizer = AutoTokenizer.from_pretrained(args.model)
with open(args.text, encoding="utf-8") as file:
    tokens = tokenizer(file.read(), return_tensors="pt").input_ids[0]
windows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)

asymq.prepare(model, asymq.QuantConfig.w4a8())
asymq.calibrate(model, [w.to(device) for w in windows[:16].split(4)])  # the same everywhere
# asymq.shard takes the place of fully_shard, and of accelerate's wrapping of the model.
mesh = torch.distributed.init_device_mesh(device.type, (accelerator.num_processes,))
for layer in model.model.layers:
    asymq.shard(layer, mesh=mesh)
asymq.shard(model, mesh=mesh)

weights = {"params": asymq.weight_parameters(model), "weight_decay": 0.1}
optimizer = torch.optim.AdamW([weights, *asymq.range_parameters(model, lr=1e-3)], lr=args.lr)
loader = torch.utils.data.DataLoader(windows, batch_size=args.batch, shuffle=True, drop_last=True)
optimizer, loader = accelerator.prepare(optimizer, loader)
step = 0
while step < args.steps:
    for ids in loader:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        if step % 10 == 0 or step == args.steps - 1:
            accelerator.print(f"step {step:4}  loss {accelerator.reduce(loss, 'mean'):.4f}")
        step += 1
        if step == args.steps:
            break
asymq.save(model, args.out)  # every process calls it; the first one writes
accelerator.end_training()
