"""Train with live BatchNorms first, freeze them when their statistics have settled, and thaw them
again: the same optimizer all along.

python examples/freeze_and_thaw.py
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision

import frozen_bn

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="resnet18")
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--freeze", type=int, default=2, help="before this epoch, counted from 0")
parser.add_argument("--thaw", type=int, default=4)
parser.add_argument("--steps", type=int, default=20, help="an epoch")
parser.add_argument("--size", type=int, default=64)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    model.train()
    for _ in range(args.steps):
        labels = torch.randint(10, (16,), device=device)
        images = torch.randn(16, 3, args.size, args.size, device=device)
        images += labels.view(-1, 1, 1, 1) / 5  # to be told by their brightness
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


model = torchvision.models.get_model(args.model, num_classes=10).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)

for epoch in range(args.epochs):
    if epoch == args.freeze:
        # freeze_affine=False keeps weight and bias trained, and the same Parameters, which the
        # optimizer holds. Frozen too, they would be buffers, and wait in the optimizer untouched.
        frozen_bn.convert_frozen_bn(model, freeze_affine=False)
    if epoch == args.thaw:
        frozen_bn.unfreeze_bn(model)  # the original layers, with the values of now
    before = model.bn1.running_mean.clone()
    loss = train(model, optimizer)
    moved = (model.bn1.running_mean - before).abs().sum().item()
    print(f"epoch {epoch}: {type(model.bn1).__name__}, loss {loss:.3f}, mean moved {moved:.4f}")
