"""Train Faster R-CNN on a handful of images with boxes: here bright rectangles on noise.

python examples/train_faster_rcnn.py                # with a pretrained backbone
python examples/train_faster_rcnn.py --weights none # without a download
"""

import argparse

import torch
from torchvision.models import detection

import frozen_bn

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="fasterrcnn_resnet50_fpn")
parser.add_argument("--weights", default="DEFAULT", help="of the backbone")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--size", type=int, default=320)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def image_with_boxes(size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    image, boxes = 0.3 * torch.rand(3, size, size), []
    for _ in range(2):
        left, top = torch.randint(size // 2, (2,)).tolist()
        width, height = torch.randint(size // 8, size // 2, (2,)).tolist()
        image[:, top : top + height, left : left + width] += 0.7
        boxes.append([left, top, left + width, top + height])
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor([1, 1])}
    return image.to(device), {name: value.to(device) for name, value in target.items()}


data = [image_with_boxes(args.size) for _ in range(4)]
model = detection.__dict__[args.model](
    weights=None,
    weights_backbone=None if args.weights == "none" else args.weights,
    num_classes=2,
    min_size=args.size,
)
# Live layers, and torchvision's frozen ones, which it takes with pretrained weights: all alike.
model = frozen_bn.convert_frozen_bn(model.to(device)).train()

trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.005, momentum=0.9)
for step in range(args.steps):
    images, targets = zip(*(data[(2 * step + k) % len(data)] for k in range(2)), strict=True)
    losses = model(list(images), list(targets))
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

model.eval()  # its dropout, its outputs; the frozen layers do what they did
print(f"{len(model([data[0][0]])[0]['boxes'])} boxes found")
