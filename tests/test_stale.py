"""Whatever writes to weights and statistics, and however: the next call computes with it. No
version counter sees most of these, so nothing may be kept that depends on them. On the CPU."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable

import pytest
import torch
from fresh import run_fresh
from nets import EVERY_CONVERSION, images, network
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Write = Callable[[nn.Module], object]


def tensors(net: nn.Module) -> list[Tensor]:
    return [t for t in net.state_dict(keep_vars=True).values() if t.is_floating_point()]


def through_data(net: nn.Module) -> None:
    for tensor in tensors(net):
        tensor.data.mul_(1.5)


def data_replaced(net: nn.Module) -> None:
    """More than once: the address of the first may be taken by the last."""
    for _ in range(4):
        for tensor in tensors(net):
            tensor.data = tensor.data * 1.5


def vector(net: nn.Module) -> None:
    """An evolution strategy, a search along a line: from then on parameters are parts of it."""
    flat = vars(net).setdefault("flat", parameters_to_vector(net.parameters()).detach().clone())
    flat.add_(0.1)
    vector_to_parameters(flat, net.parameters())


def through_numpy(net: nn.Module) -> None:
    for tensor in tensors(net):
        array = tensor.detach().numpy()
        array *= 1.5


def through_memory(net: nn.Module) -> None:
    """As another library that was handed the memory (DLPack, MPI)."""
    for tensor in tensors(net):
        new = (tensor.detach() * 1.5).contiguous()
        ctypes.memmove(tensor.data_ptr(), new.data_ptr(), new.numel() * new.element_size())


def through_dlpack(net: nn.Module) -> None:
    for tensor in tensors(net):
        torch.from_dlpack(tensor.detach()).mul_(1.5)


def through_a_view_of_the_storage(net: nn.Module) -> None:
    for tensor in tensors(net):
        torch.empty(0).set_(tensor.untyped_storage()).mul_(1.5)


def adapter_merged(net: nn.Module) -> None:
    """As LoRA's merge(): ``weight.data += delta``."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            delta = torch.ones_like(module.weight)
            module.weight.data += delta


def swapped(net: nn.Module) -> None:
    """An exponential average that trades places with the weights."""
    for tensor in tensors(net):
        average = tensor.detach() * 1.5
        tensor.data, average.data = average.data, tensor.data


def uncounted(net: nn.Module) -> None:
    for tensor in tensors(net):
        with torch.autograd._unsafe_preserve_version_counter(tensor):
            tensor.mul_(1.5)


def in_inference_mode(net: nn.Module) -> None:
    with torch.inference_mode():
        for tensor in tensors(net):
            tensor.mul_(1.5)


def fused_optimizer(net: nn.Module) -> None:
    """Its writes are not counted."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    with torch.inference_mode(False), torch.enable_grad():
        net(images()).square().mean().backward()
    optimizer.step()


def foreach(net: nn.Module) -> None:
    torch._foreach_mul_([t.detach() for t in tensors(net)], 1.5)


def parameters_replaced(net: nn.Module) -> None:
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.5))


def buffers_replaced(net: nn.Module) -> None:
    for module in net.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer * 1.5)


def loaded(net: nn.Module) -> None:
    net.load_state_dict({name: value * 1.5 for name, value in net.state_dict().items()})


def loaded_by_assignment(net: nn.Module) -> None:
    state = {name: value * 1.5 for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def eps(net: nn.Module) -> None:
    for module in net.modules():
        if hasattr(module, "eps"):
            module.eps = 0.7


WRITES: dict[str, Write] = {
    function.__name__.replace("_", " "): function
    for function in (
        through_data,
        data_replaced,
        vector,
        through_numpy,
        through_memory,
        through_dlpack,
        through_a_view_of_the_storage,
        adapter_merged,
        swapped,
        uncounted,
        in_inference_mode,
        fused_optimizer,
        foreach,
        parameters_replaced,
        buffers_replaced,
        loaded,
        loaded_by_assignment,
        eps,
    )
}


def expected(net: nn.Module) -> Tensor:
    """What a network makes of the same values that has never been called."""
    plain = network()
    plain.load_state_dict(copy.deepcopy(net.state_dict()))
    for layer, other in zip(plain.modules(), net.modules(), strict=True):
        if hasattr(layer, "eps"):
            layer.eps = other.eps
    with torch.no_grad():
        return plain(images())


@pytest.mark.covering(2)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@EVERY_CONVERSION
def test_no_write_goes_unseen(options, write, mode):
    net = network(**options).eval()
    with mode():
        first = net(images())
        for _ in range(2):
            net(images())
            with torch.no_grad():
                write(net)
            actual = net(images())
            torch.testing.assert_close(actual.detach(), expected(net), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, actual), "nothing was written, so this shows nothing"


@EVERY_CONVERSION
def test_values_that_are_lent_for_one_call(options):
    net = network(**options).eval()
    lent = {name: value.detach() * 1.5 for name, value in net.state_dict().items()}
    with torch.no_grad():
        before = net(images())
        actual = functional_call(net, lent, (images(),))
        assert torch.equal(net(images()), before)
        net.load_state_dict(lent)
        torch.testing.assert_close(actual, expected(net), rtol=1e-4, atol=1e-4)


# Two processes

HEAD = """
import torch, torch.distributed as dist, torch.multiprocessing as mp
from nets import CONVERSIONS, images, network
torch.set_num_threads(1)
"""

SHARED = """
def actor(nets, ready, go, outputs):
    with torch.no_grad():
        for net in nets: net(images())
        ready.set(); go.wait(60)
        for net, output in zip(nets, outputs): output.copy_(net(images()))

ctx = mp.get_context("fork")
nets = [network(**options).eval().share_memory() for options in CONVERSIONS.values()]
outputs = [torch.zeros(4, 3).share_memory_() for _ in nets]
ready, go = ctx.Event(), ctx.Event()
process = ctx.Process(target=actor, args=(nets, ready, go, outputs))
process.start(); ready.wait(60)
with torch.no_grad():
    for net in nets:
        for tensor in net.state_dict().values(): tensor.mul_(1.5)    # the learner publishes
    go.set(); process.join(60)
    plain = network(); plain.load_state_dict(nets[0].state_dict())
    expected = plain(images())
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
"""

COLLECTIVE = """
def send(net):
    for tensor in net.state_dict().values(): dist.broadcast(tensor, 0)

def reduce(net):
    for tensor in net.state_dict().values(): dist.all_reduce(tensor)

def coalesced(net):
    dist._broadcast_coalesced(dist.group.WORLD, [*net.state_dict().values()], 1 << 20, 0)

def work(rank, store):
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    for collective in (send, reduce, coalesced):
        for options in CONVERSIONS.values():
            net = network(seed=rank, **options).eval()
            with torch.no_grad():
                net(images())
                collective(net)
                plain = network(); plain.load_state_dict(net.state_dict())
                torch.testing.assert_close(net(images()), plain(images()), rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()

mp.start_processes(work, args=(STORE,), nprocs=2, start_method="fork")
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(SHARED, id="shared memory"),
        pytest.param(COLLECTIVE, id="collectives", marks=pytest.mark.long),
    ],
)
def test_another_process_writes(script, tmp_path):
    store = repr(str(tmp_path / "store"))
    run_fresh(HEAD + script.replace("STORE", store), timeout=120)
