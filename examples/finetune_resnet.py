"""Fine-tune a torchvision ResNet with its BatchNorms frozen: a new head, small batches.

python examples/finetune_resnet.py                # pretrained, on pictures made up here
python examples/finetune_resnet.py --weights none # without a download
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import frozen_bn

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="resnet50")
parser.add_argument("--weights", default="DEFAULT")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--size", type=int, default=224)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright or dark noise. Put your data loader here."""
    labels = torch.randint(2, (size,))
    images = torch.randn(size, 3, args.size, args.size) + 2.0 * labels.view(-1, 1, 1, 1) - 1.0
    return images.to(device), labels.to(device)


weights = None if args.weights == "none" else args.weights
model = torchvision.models.get_model(args.model, weights=weights)
model.fc = nn.Linear(model.fc.in_features, 2)
model = frozen_bn.convert_frozen_bn(model.to(device))
model.train()  # as usual: what is frozen stays frozen
print(frozen_bn.summary(model).split("\n\n")[-1])

# Weight and bias of the frozen layers are constants too, so nothing here has to leave them out.
optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
for step in range(args.steps):
    images, labels = batch()
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

# Names are those of the live model: the checkpoint loads into either.
torchvision.models.get_model(args.model, num_classes=2).load_state_dict(model.state_dict())
