"""transformers' Trainer: ranges get a learning rate of their own, and no weight decay.

trainer.py --model HuggingFaceTB/SmolLM2-135M --text train.txt --out quantized
"""

import argparse

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import asymq
from asymq.integrations.transformers import RangeTrainerMixin

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder, or name on the hub")
parser.add_argument("--text", required=True, help="text file")
parser.add_argument("--out", required=True, help="folder to write")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=1024)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
with open(args.text, encoding="utf-8") as file:
    tokens = tokenizer(file.read(), return_tensors="pt").input_ids[0]
windows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)
data = [{"input_ids": window, "labels": window} for window in windows]

asymq.prepare(model, asymq.QuantConfig.w8a8())
asymq.calibrate(model, windows[: 4 * args.batch].split(args.batch))


class QuantTrainer(RangeTrainerMixin, Trainer):
    range_lr = 1e-3


trainer = QuantTrainer(
    model=model,
    args=TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=1e-5,
        weight_decay=0.1,
        logging_steps=10,
        report_to=[],
    ),
    train_dataset=data,
    data_collator=default_data_collator,
)
trainer.train()
trainer.save_model(args.out)  # AutoModelForCausalLM.from_pretrained opens it, with asymq imported
