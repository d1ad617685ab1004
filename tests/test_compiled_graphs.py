"""What a compiler is given to make kernels of: no more than of torchvision's layers, but for the
subtraction that keeps the digits of large means; and nothing else of ``F.batch_norm``.

What inductor makes of these graphs is one loop a layer with what is around it, in any case.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from nets import CONVERSIONS, IMAGES, images, live_network
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from frozen_bn import convert_frozen_bn

LAYERS = 4


class Graphs(NamedTuple):
    """Of a compiled step: how often each operator has a result of the size of an activation, and
    the bytes that the forward graph returns, which the backward graph is given."""

    forward: Counter[str]
    backward: Counter[str]
    kept: int


def _operators(graph: fx.Graph) -> Counter[str]:
    found: Counter[str] = Counter()
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(value, Tensor):
            continue
        if value.dim() == 4 and value.shape[0] == IMAGES[0]:  # no weight is of that shape
            found[node.target._schema.name.split("::")[1]] += 1
    # Which only tell autograd of a tensor, or widen and narrow what stays in a register.
    for name in ("alias", "convert_element_type", "le"):
        found.pop(name, None)
    return found


def step(net: nn.Module, autocast: bool) -> Graphs:
    """By what inductor does before it makes kernels."""
    found: dict[str, fx.Graph] = {}

    def keep(name: str) -> Callable[..., object]:
        def compile(module: fx.GraphModule, _: object) -> object:
            found[name] = module.graph
            return make_boxed_func(module.forward)

        return compile

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = torch.compile(net, backend=backend, fullgraph=True)(images()).float().square().mean()
    loss.backward()
    (output,) = (node for node in found["forward"].nodes if node.op == "output")
    values = (n.meta["val"] for n in output.args[0] if n is not None and n.op != "placeholder")
    kept = sum(value.nbytes for value in values if isinstance(value, Tensor))
    return Graphs(_operators(found["forward"]), _operators(found["backward"]), kept)


def _torchvisions(net: nn.Module) -> nn.Module:
    ops = pytest.importorskip("torchvision").ops
    for parent in [*net.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = ops.FrozenBatchNorm2d(child.num_features, child.eps)
                frozen.load_state_dict(child.state_dict())
                parent._modules[name] = frozen
    return net


def _in_eval_mode(net: nn.Module) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval().requires_grad_(False)
    return net


@functools.cache
def graphs(name: str, autocast: bool) -> Graphs:
    others = {"torchvision": _torchvisions, "eval": _in_eval_mode}
    net = live_network()
    if name in others:
        return step(others[name](net), autocast)
    return step(convert_frozen_bn(net, **CONVERSIONS[f"{name}, affine frozen"]), autocast)


OURS = pytest.mark.parametrize(
    "name",
    [
        "fused",
        pytest.param("plain", marks=pytest.mark.long),
        pytest.param("folded", marks=pytest.mark.long),
    ],
)


@pytest.mark.parametrize(
    "autocast",
    [
        pytest.param(False, id="float32"),
        pytest.param(True, id="autocast", marks=pytest.mark.long),
    ],
)
@OURS
def test_the_graphs_are_those_of_torchvisions_layers(name, autocast):
    ours, theirs = graphs(name, autocast), graphs("torchvision", autocast)
    assert ours.forward - theirs.forward == {"sub": LAYERS}
    assert not theirs.forward - ours.forward
    assert ours.backward == theirs.backward
    assert ours.kept <= theirs.kept
    # Theirs are float32 under autocast, and so are the convolutions' inputs that are kept of them.
    assert autocast or ours.kept == theirs.kept


@OURS
def test_the_operator_compiles_to_no_less(name):
    """Which is why it is not used there."""
    ours, operator = graphs(name, False), graphs("eval", False)
    assert not ours.forward - operator.forward
    assert operator.forward - ours.forward == {"mul": LAYERS}
    assert ours.backward == operator.backward and ours.kept == operator.kept
