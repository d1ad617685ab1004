"""DistributedDataParallel over two processes. See test_sharded.py for FSDP and checkpoints."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from helpers import assert_close_in_norm, assert_same_bits, snapshot
from nets import CONVERSIONS, images, live_network, network
from ranks import WORLD, Checks, Results
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from frozen_bn import convert_frozen_bn, unfreeze_bn

checks = Checks()


def work(rank: int, folder: Path) -> None:
    checks.work(rank, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return checks.run(work, tmp_path_factory.mktemp("ranks"))


def share(batch: Tensor, rank: int) -> Tensor:
    return batch.chunk(WORLD)[rank]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters()}  # AttributeError if unused


def buffers(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def two_forwards(net: nn.Module, first: Tensor, second: Tensor) -> None:
    net.zero_grad()
    (net(first).square().mean() + net(second).square().mean()).backward()


def trains_as_one_process(rank: int, *, conversion: str, **ddp: bool) -> None:
    """Two forwards before each backward; the other process has the other half of the batch."""
    net = network(**CONVERSIONS[conversion])
    alone = copy.deepcopy(net)
    parallel = DDP(net, **ddp)
    before = buffers(net)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (net, alone)]
    for step in range(3):
        batches = images(2 * step), images(2 * step + 1)
        two_forwards(parallel, *(share(batch, rank) for batch in batches))
        two_forwards(alone, *batches)
        assert_close_in_norm(gradients(net), gradients(alone), 1e-4)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits(buffers(net), before)
    assert_close_in_norm(snapshot(net), snapshot(alone), 1e-4)


for _conversion in CONVERSIONS:
    for _options in ({"broadcast_buffers": True}, {"broadcast_buffers": False}):
        checks.add(
            f"trains_as_one_process, {_conversion}, {_options}",
            functools.partial(trains_as_one_process, conversion=_conversion, **_options),
        )
for _options in ({"static_graph": True}, {"gradient_as_bucket_view": True}):
    checks.add(
        f"trains_as_one_process, {_options}",
        functools.partial(trains_as_one_process, conversion="fused, affine trained", **_options),
    )


@checks
def everybody_starts_with_what_rank_0_has(rank: int) -> None:
    for options in CONVERSIONS.values():
        net = network(seed=rank, **options)
        DDP(net)
        assert_same_bits(snapshot(net), snapshot(network(seed=0, **options)))


@checks
def what_rank_0_writes_to_a_buffer_reaches_folded_weights(rank: int) -> None:
    """Folded weights are kept where nothing trains, and a broadcast does not count as a change."""
    net = network(fold_conv=True).requires_grad_(False)
    net[4].requires_grad_()
    parallel = DDP(net, broadcast_buffers=True)
    for shift in (0, 1):
        if rank == 0:
            net[1].running_mean.add_(shift)
        outputs = parallel(images()), net(images())
        plain = network()
        plain[1].running_mean.copy_(net[1].running_mean)
        for output in outputs:
            torch.testing.assert_close(output, plain(images()))
        torch.testing.assert_close(net[1].running_mean, network()[1].running_mean + shift)


@checks
def accumulating_without_synchronization(rank: int) -> None:
    net = network(freeze_affine=False, fuse=True)
    alone, parallel = copy.deepcopy(net), DDP(net)
    with parallel.no_sync():
        parallel(share(images(0), rank)).square().mean().backward()
    parallel(share(images(1), rank)).square().mean().backward()
    two_forwards(alone, images(0), images(1))
    assert_close_in_norm(gradients(net), gradients(alone), 1e-4)


@checks
def freezing_after_wrapping_with_a_trained_affine(rank: int) -> None:
    """The reducer knows the Parameters, and they stay the same objects."""
    parallel, alone = DDP(live_network()), network(freeze_affine=False)
    convert_frozen_bn(parallel, freeze_affine=False)
    for step in range(2):
        two_forwards(parallel, *(share(images(i), rank) for i in (step, step + 5)))
        two_forwards(alone, images(step), images(step + 5))
        assert_close_in_norm(gradients(parallel.module), gradients(alone), 1e-4)


@checks
def freezing_the_affine_after_wrapping_is_told_by_the_reducer(rank: int) -> None:
    parallel = convert_frozen_bn(DDP(live_network()))
    x = share(images(), rank)
    with pytest.raises(RuntimeError, match="parameters that were not used in producing loss"):
        for _ in range(2):
            parallel(x).square().mean().backward()


@checks
def synchronized_layers_are_frozen_and_come_back(rank: int) -> None:
    """A live one would raise on the CPU, and wait for the other process on a GPU."""
    live = nn.SyncBatchNorm.convert_sync_batchnorm(live_network())
    kinds = [type(module) for module in live.modules()]
    assert kinds.count(nn.SyncBatchNorm) == 4
    net = DDP(convert_frozen_bn(live, fuse=True))
    torch.testing.assert_close(net(images(rank)), network()(images(rank)))
    assert [type(module) for module in unfreeze_bn(live).modules()] == kinds


@checks
def frozen_layers_are_not_made_synchronized(rank: int) -> None:
    net = network(fuse=True)
    modules, expected = [*net.modules()], net(images())
    assert nn.SyncBatchNorm.convert_sync_batchnorm(net) is net
    assert [*net.modules()] == modules
    assert torch.equal(net(images()), expected)


@pytest.mark.parametrize("name", checks.names())
def test_in_two_processes(results, name):
    results.assert_passed(name)


def test_synchronized_layers_are_frozen_without_a_process_group():
    assert not torch.distributed.is_initialized()
    live = nn.SyncBatchNorm.convert_sync_batchnorm(live_network())
    net = convert_frozen_bn(live, fuse=True)
    torch.testing.assert_close(net(images()), network()(images()))
