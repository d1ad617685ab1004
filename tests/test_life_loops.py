"""The life of a converted model in the training loops of frameworks, written out by hand."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import torch
from helpers import assert_close_in_norm, assert_same_bits, snapshot
from nets import EVERY_CONVERSION, images, live_network, network, plain_twin, train_step
from torch import Tensor, nn

from frozen_bn import unfreeze_bn


def assert_trained_alike(net: nn.Module, options: dict[str, bool], loop: Callable) -> None:
    plain = plain_twin(options)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    torch.manual_seed(0)
    losses = loop(net)
    torch.manual_seed(0)
    torch.testing.assert_close(losses, loop(plain), rtol=1e-3, atol=1e-4)
    assert losses[0] > losses[-1]
    assert_same_bits(dict(net.named_buffers()), before)
    assert_close_in_norm(snapshot(net), snapshot(plain), 1e-3)


@EVERY_CONVERSION
def test_a_loop_like_lightnings(options):
    """It notes every module's mode before a validation and restores it afterwards, and its
    finetuning callback freezes and thaws parts by requires_grad."""

    def loop(net: nn.Module) -> Tensor:
        losses = []
        net.eval()  # the sanity check
        with torch.inference_mode():
            net(images(9))
        for parameter in net[:3].parameters():
            parameter.requires_grad = False
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        for epoch in range(3):
            net.train()
            if epoch == 1:
                for parameter in net[:3].parameters():
                    parameter.requires_grad = True
            losses += [train_step(net, step, optimizer) for step in range(2)]
            modes = {module: module.training for module in net.modules()}
            net.eval()
            with torch.inference_mode():
                losses.append(net(images(0)).square().mean())
            for module, mode in modes.items():
                module.training = mode
        return torch.stack([loss.clone() for loss in losses])

    assert_trained_alike(network(**options), options, loop)


def ema_update(ema: nn.Module, net: nn.Module, decay: float) -> None:
    state = net.state_dict()
    for name, value in ema.state_dict().items():
        if value.dtype.is_floating_point:
            value *= decay
            value += (1 - decay) * state[name].detach()


@EVERY_CONVERSION
def test_a_loop_like_ultralytics(options):
    """model.train() every epoch, frozen layers by name, an EMA that goes through the state_dict in
    place and is validated, and saved whole in half precision."""
    reloaded = []

    def loop(net: nn.Module) -> Tensor:
        losses = []
        for name, parameter in net.named_parameters():
            parameter.requires_grad = not name.startswith("0.")
        groups: list[list[Tensor]] = [[], [], []]
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                live = isinstance(module, nn.BatchNorm2d)
                groups[2 if name == "bias" else 1 if live else 0].append(parameter)
        optimizer = torch.optim.SGD(groups[2], lr=0.05, momentum=0.9, nesterov=True)
        optimizer.add_param_group({"params": groups[0], "weight_decay": 5e-4})
        optimizer.add_param_group({"params": groups[1], "weight_decay": 0.0})
        ema = copy.deepcopy(net).eval().requires_grad_(False)
        for _ in range(3):
            net.train()
            for step in range(2):
                losses.append(train_step(net, step, optimizer))
                ema_update(ema, net, 0.5)
            with torch.no_grad():
                losses.append(ema(images(0)).square().mean())
        stream = io.BytesIO()
        torch.save({"ema": copy.deepcopy(ema).half()}, stream)
        stream.seek(0)
        again = torch.load(stream, weights_only=False)["ema"].float()
        with torch.no_grad():
            torch.testing.assert_close(again(images()), ema(images()), rtol=0.02, atol=0.02)
        reloaded.append(again)
        return torch.stack(losses)

    assert_trained_alike(network(**options), options, loop)
    assert_same_bits(
        dict(unfreeze_bn(reloaded[0]).named_buffers()),
        dict(unfreeze_bn(reloaded[1]).named_buffers()),
    )


@EVERY_CONVERSION
def test_fusing_for_inference_as_ultralytics_and_torch_do(options):
    """From the attributes of a batch normalization, which the frozen layer has too."""
    net = network(**options).eval()
    expected = net(images())
    with torch.no_grad():
        stem = nn.utils.fuse_conv_bn_eval(net[0], net[1])
        net[0], net[1] = stem, nn.Identity()
        torch.testing.assert_close(net(images()), expected, rtol=1e-4, atol=1e-5)


def test_the_loops_move_a_live_layer():
    """What the loops above would show if they did not call train()."""
    net = live_network()
    before = snapshot(net)
    net.train()
    train_step(net, 0)
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])
