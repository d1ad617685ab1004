"""A timm model under autocast, with an exponential moving average (EMA) of its weights, trained by
two processes (DistributedDataParallel):

torchrun --nproc-per-node 2 examples/timm_ddp_ema.py
"""

import argparse
import os

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import frozen_bn

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="efficientnet_b0")
parser.add_argument("--pretrained", action="store_true", help="downloads the weights")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--size", type=int, default=224)
args = parser.parse_args()

cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
dist.init_process_group("nccl" if cuda else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
torch.manual_seed(0)  # the same model in both

model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=10).to(device)
# Before DistributedDataParallel, so that it does not wait for gradients of what is frozen now. Here
# the statistics are frozen, and weight and bias trained: the same Parameters as before.
model = frozen_bn.convert_frozen_bn(model, freeze_affine=False).train()
norms = frozen_bn.norm_parameters(model)
others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)
ema = ModelEmaV3(model, decay=0.99)
parallel = DistributedDataParallel(model)
statistics = [buffer.clone() for buffer in model.buffers()]

torch.manual_seed(dist.get_rank())  # other data in each
for step in range(args.steps):
    images = torch.randn(4, 3, args.size, args.size, device=device)
    labels = torch.randint(10, (4,), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = F.cross_entropy(parallel(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(model, step=step)
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}")

pairs = zip(statistics, model.buffers(), strict=True)
moved = sum((a - b).abs().sum().item() for a, b in pairs)
print(f"rank {dist.get_rank()}: statistics moved by {moved:.1f}")
dist.destroy_process_group()
