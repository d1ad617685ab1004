"""Export what was trained with frozen layers to ONNX: folded into the convolutions first, so that
the file has none, and nothing of this package.

python examples/export_onnx.py --output model.onnx   # needs onnx and onnxscript
"""

import argparse

import torch
import torchvision

import frozen_bn

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="resnet18")
parser.add_argument("--weights", default="DEFAULT")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--output", default="model.onnx")
args = parser.parse_args()

weights = None if args.weights == "none" else args.weights
model = torchvision.models.get_model(args.model, weights=weights)
model = frozen_bn.convert_frozen_bn(model)
# ... train ...

images = torch.randn(2, 3, args.size, args.size)
# The images are run through both, to compare.
final = frozen_bn.fold_for_inference(model, images)
layers = [type(m).__name__ for m in final.modules() if "BatchNorm" in type(m).__name__]
print(f"{len(layers)} normalization layers left")

torch.onnx.export(
    final,
    (images,),
    args.output,
    input_names=["images"],
    dynamic_shapes=({0: torch.export.Dim("batch")},),
)

try:
    import onnxruntime
except ImportError:
    print(f"wrote {args.output}; install onnxruntime to compare")
else:
    session = onnxruntime.InferenceSession(args.output, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"images": images.numpy()})
    expected = model.eval()(images).detach()
    error = (torch.from_numpy(output) - expected).abs().max() / expected.abs().max()
    print(f"wrote {args.output}: onnxruntime differs by {error.item():.1e}")
