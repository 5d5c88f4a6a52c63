"""Images in W8A8: a ViT, or any model of transformers that classifies images.

    vision.py --model google/vit-base-patch16-224 --data images.pt --out quantized

images.pt: of torch.save, images [n, channels, height, width], normalized, and labels [n].
"""

import argparse

import torch
from transformers import AutoModelForImageClassification

import asymq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder, or name on the hub")
parser.add_argument("--data", required=True, help="file of (images, labels)")
parser.add_argument("--out", required=True, help="folder to write")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch", type=int, default=16)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
images, labels = (x.to(device) for x in torch.load(args.data, weights_only=True))
model = AutoModelForImageClassification.from_pretrained(args.model).to(device)


@torch.no_grad()
def accuracy():
    model.eval()
    found = [model(pixel_values=x).logits.argmax(-1) for x in images.split(args.batch)]
    return (torch.cat(found) == labels).float().mean().item()


print(f"float       accuracy {accuracy():.1%}")
weight = asymq.QuantSpec(bits=8, symmetric=True, granularity=asymq.PerChannel())
activation = asymq.QuantSpec(bits=8, parameterization="beta_gamma")
asymq.prepare(model, asymq.QuantConfig(weight, activation, norm_weight=None))
asymq.calibrate(model, [{"pixel_values": x} for x in images[:128].split(args.batch)])
print(f"calibrated  accuracy {accuracy():.1%}")
weights = {"params": asymq.weight_parameters(model), "weight_decay": 0.01}
optimizer = torch.optim.AdamW([weights, *asymq.range_parameters(model, lr=1e-3)], lr=1e-4)
for _ in range(args.epochs):
    model.train()
    for chosen in torch.randperm(len(images), device=device).split(args.batch):
        optimizer.zero_grad()
        model(pixel_values=images[chosen], labels=labels[chosen]).loss.backward()
        optimizer.step()
print(f"learned     accuracy {accuracy():.1%}")
asymq.save(model, args.out)
