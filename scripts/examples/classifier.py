"""A BERT classifier of sentences: 8-bit weights and activations, weights and ranges learn.

    classifier.py --model google-bert/bert-base-uncased --data reviews.csv --out quantized

reviews.csv: lines of label,text, the labels numbers from 0.
"""

import argparse
import csv

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import asymq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder, or name on the hub")
parser.add_argument("--data", required=True, help="CSV file of label,text")
parser.add_argument("--out", required=True, help="folder to write")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch", type=int, default=16)
args = parser.parse_args()

with open(args.data, encoding="utf-8", newline="") as file:
    rows = [(int(label), text) for label, text in csv.reader(file)]
classes = 1 + max(label for label, _ in rows)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
model.to(device)
tokenizer = AutoTokenizer.from_pretrained(args.model)


def batches():
    order = torch.randperm(len(rows)).split(args.batch)
    for chosen in ([rows[i] for i in indices] for indices in order):
        inputs = tokenizer([text for _, text in chosen], padding=True, truncation=True)
        labels = [label for label, _ in chosen]
        yield {k: torch.tensor(v).to(device) for k, v in {**inputs, "labels": labels}.items()}


weight = asymq.QuantSpec(bits=8, symmetric=True, granularity=asymq.PerChannel())
activation = asymq.QuantSpec(bits=8, parameterization="beta_gamma")
asymq.prepare(model, asymq.QuantConfig(weight, activation, norm_weight=None))
model.eval()
asymq.calibrate(model, [batch for batch, _ in zip(batches(), range(8), strict=False)])
model.train()
weights = {"params": asymq.weight_parameters(model), "weight_decay": 0.01}
optimizer = torch.optim.AdamW([weights, *asymq.range_parameters(model, lr=1e-3)], lr=2e-5)
for epoch in range(args.epochs):
    right = 0
    for batch in batches():
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        right += (output.logits.argmax(-1) == batch["labels"]).sum().item()
    print(f"epoch {epoch}  training accuracy {right / len(rows):.1%}")
asymq.save(model, args.out)
