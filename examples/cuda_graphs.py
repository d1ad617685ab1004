"""Train a frozen network with small batches on a GPU, its forward and backward pass each one CUDA
graph: what Python needs to launch the kernels is paid once. Without a GPU it runs as it is.

python examples/cuda_graphs.py --model resnet18 --batch 4
"""

import argparse
import time

import torch
import torch.nn.functional as F
import torchvision

import frozen_bn

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="resnet18")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--weights", default="DEFAULT", help="none: not downloaded")
parser.add_argument("--amp", action="store_true", help="under autocast, bfloat16")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

weights = None if args.weights == "none" else args.weights
model = torchvision.models.get_model(args.model, weights=weights).to(device)
model = model.to(memory_format=torch.channels_last)
# Before graphing: a graph holds on to the memory of the parameters and buffers that it has seen.
frozen_bn.convert_frozen_bn(model).train()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    labels = torch.randint(1000, (args.batch,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


# Weights are cast anew in every graph: autocast's cache would outlive it.
autocast = torch.autocast(device, torch.bfloat16, enabled=args.amp, cache_enabled=False)
if device == "cuda":
    with autocast:
        model = torch.cuda.make_graphed_callables(model, (batch()[0],))

start = time.perf_counter()
for _ in range(args.steps):
    images, labels = batch()  # of one shape: that of the graph
    with autocast:
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(
    f"loss {loss.item():.3f}, {args.steps / (time.perf_counter() - start):.1f} steps/s on {device}"
)
