"""torch.cuda.make_graphed_callables on frozen networks where there is a GPU; and without one, what
a capture rests on: launches that can be run again, and gradients left to who has them."""

from __future__ import annotations

import copy

import pytest
import torch
from emulator import runtime
from emulator.machine import Counters, Launch
from nets import EVERY_CONVERSION, images, network
from torch import Tensor

from frozen_bn import FrozenBatchNorm2d, frozen_batch_norm, ops
from frozen_bn.pair import frozen_batch_norm_pair

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in ops.live, reason="needs a GPU and its kernels"
)


@needs_gpu
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
@EVERY_CONVERSION
def test_a_graphed_network_trains_as_it_does_without(options, autocast):
    plain = network(**options).cuda().train()
    modes = {"enabled": autocast is not None, "dtype": autocast or torch.float16}
    graphed = copy.deepcopy(plain)
    with torch.autocast("cuda", **modes, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(graphed, (images().cuda(),))
    found = []
    for net in (plain, graphed):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for seed in range(5):
            optimizer.zero_grad()
            with torch.autocast("cuda", **modes, cache_enabled=False):
                loss = net(images(seed).cuda()).float().square().mean()
            loss.backward()
            optimizer.step()
            if seed == 2:  # a write to the buffers is seen by the next replay
                net[1].running_mean.add_(0.25)
        found.append([loss.detach(), *(p.detach() for p in net.parameters())])
    tolerance = 1e-4 if autocast is None else 0.05
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


@needs_gpu
def test_the_mode_of_a_frozen_layer_is_no_reason_to_leave_the_graph():
    net = network().cuda().train()
    calls: list[int] = []
    graphed = torch.cuda.make_graphed_callables(net, (images().cuda(),))
    net[0].register_forward_hook(lambda *_: calls.append(1))  # a replay calls no module
    for layer in net.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.eval()
    graphed(images().cuda())
    assert not calls


class Recording:
    """What a CUDA graph does: keeps the launches with their arguments, to run them again."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        recorded = self.launches = []

        class Recorded(Launch):
            def run(self) -> Counters:
                recorded.append(self)
                return super().run()

        patch.setattr(runtime, "Launch", Recorded)

    def replay(self) -> None:
        for launch in self.launches:
            Launch.run(launch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("pair", [False, True], ids=["", "pair"])
def test_launches_run_again_on_other_values_give_what_a_fresh_call_gives(
    pair, activation, dtype, emulator, monkeypatch
):
    shape = (2, 16, 7, 7)
    vectors = [torch.randn(16), torch.rand(16) + 0.5, torch.randn(16), torch.randn(16)]
    x, r = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(shape).to(dtype)
    changing = [x.detach(), r.detach(), grad, *vectors]

    def step() -> tuple[list[Tensor], Tensor]:
        if pair:
            statistics = (*vectors, 1e-5)
            y = frozen_batch_norm_pair(x, statistics, r, statistics, activation=activation)
        else:
            y = frozen_batch_norm(x, *vectors, activation=activation, residual=r)
        # retain_graph: the memory of what is saved is the graph's, and stays.
        return [y.detach(), *torch.autograd.grad(y, (x, r), grad, retain_graph=True)], y

    with emulator.active():
        recording = Recording(monkeypatch)
        captured, _held = step()
        before = [t.clone() for t in captured]
        launches = len(recording.launches)
        assert launches == 2  # forward, backward
        for tensor in changing:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        recording.replay()
        expected, _ = step()
    assert len(recording.launches) == 2 * launches
    for name, replayed, fresh, old in zip(
        ("y", "dx", "dr"), captured, expected, before, strict=True
    ):
        assert torch.equal(replayed, fresh) and not torch.equal(replayed, old), name


@EVERY_CONVERSION
def test_the_gradient_that_a_graph_holds_is_left_alone(options):
    """make_graphed_callables hands the same tensor to the backward pass each time."""
    net = network(**options)
    x = images().requires_grad_()
    y = net(x)
    parameters = [x, *(p for p in net.parameters() if p.requires_grad)]
    held = torch.randn_like(y)
    kept = held.clone()
    for _ in range(2):
        found = torch.autograd.grad([y], parameters, [held], retain_graph=True)
        expected = torch.autograd.grad([y], parameters, [kept.clone()], retain_graph=True)
        assert all(map(torch.equal, found, expected))
    assert torch.equal(held, kept)
