"""FSDP2 (fully_shard) over two processes, and distributed checkpoints. The affine that is trained
is made of DTensors, as all Parameters; buffers, which is all of a frozen one, are not sharded."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import assert_close_in_norm, assert_same_bits, snapshot
from nets import CONVERSIONS, EVERY_CONVERSION, images, live_network, network
from ranks import WORLD, Checks, Results
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn, unfreeze_bn

checks = Checks()


def work(rank: int, folder: Path) -> None:
    checks.work(rank, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return checks.run(work, tmp_path_factory.mktemp("ranks"))


def shard(net: nn.Module, units: str = "blocks", **options: object) -> nn.Module:
    """In place. The root gathers all parameters at once; ``units`` says what gathers its own."""
    mesh = init_device_mesh("cpu", (WORLD,))
    if units == "layers":
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | FrozenBatchNorm2d):
                fully_shard(layer, mesh=mesh, **options)
    if units != "root":
        fully_shard(net[3], mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


def whole(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the shards. For every process to call, in the same order."""
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in values.items()}


def shared_path() -> str:
    paths = [tempfile.mkdtemp()]
    dist.broadcast_object_list(paths)
    return paths[0]


def full_state(net: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))


def reshard(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def one_training_step(rank: int, *, conversion: str, units: str, param_dtype: torch.dtype) -> None:
    """The other process has the other half of the batch."""
    net = network(**CONVERSIONS[conversion])
    alone, cast = copy.deepcopy(net), copy.deepcopy(net)
    for p in cast.parameters():
        p.data = p.data.to(param_dtype)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    shard(net, units, mp_policy=policy)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    assert not any(isinstance(buffer, DTensor) for buffer in net.buffers())
    assert isinstance(net[1].weight, DTensor) is not CONVERSIONS[conversion]["freeze_affine"]
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}

    mine = images().chunk(WORLD)[rank]
    output = net(mine)
    tolerance = 1e-5 if param_dtype == torch.float32 else 0.02
    torch.testing.assert_close(output, cast(mine.to(param_dtype)), rtol=tolerance, atol=tolerance)
    output.float().square().mean().backward()
    alone(images()).square().mean().backward()
    gradients = whole({name: p.grad for name, p in net.named_parameters()})
    expected = {name: p.grad for name, p in alone.named_parameters()}
    assert_close_in_norm(gradients, expected, 1e-4 if param_dtype == torch.float32 else 0.1)
    for module in (net, alone):
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert_close_in_norm(full_state(net), snapshot(alone), tolerance)
    assert_same_bits(dict(net.named_buffers()), before)


STEPS = [("root", torch.float32), ("blocks", torch.float32), ("layers", torch.float32)]
STEPS += [("blocks", torch.bfloat16)]
for _conversion in CONVERSIONS:
    for _units, _dtype in STEPS:
        checks.add(
            f"one_training_step, {_conversion}, {_units}, {_dtype}",
            functools.partial(
                one_training_step, conversion=_conversion, units=_units, param_dtype=_dtype
            ),
        )


def changed_weights_are_seen_without_gradients(rank: int, *, conversion: str, units: str) -> None:
    """Parameters are gathered into the same tensors, and autograd does not count it as a change:
    folded weights must not be kept."""
    options = CONVERSIONS[conversion]
    plain, net = network(freeze_affine=options["freeze_affine"]), network(**options)
    shard(net, units)
    with torch.no_grad():
        for factor in (1.0, 0.5, 1.5):
            reshard(net)
            for p in (*net.parameters(), *plain.parameters()):
                p.mul_(factor)
            for _ in range(2):
                torch.testing.assert_close(net(images()), plain(images()))


for _conversion in CONVERSIONS:
    for _units in ("root", "blocks", "layers"):
        checks.add(
            f"changed_weights_are_seen_without_gradients, {_conversion}, {_units}",
            functools.partial(
                changed_weights_are_seen_without_gradients, conversion=_conversion, units=_units
            ),
        )


def left_alone(call: functools.partial[nn.Module]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "frozen_bn" in str(w.message)]


@checks
def freezing_after_sharding_is_refused(rank: int) -> None:
    """FSDP would go on gathering into the layer that is gone."""
    net = shard(live_network()).eval()
    expected = net(images())
    texts = left_alone(functools.partial(convert_frozen_bn, net, freeze_affine=False))
    assert len(texts) == 4
    assert texts[0].endswith("'1' is left as it is: FSDP holds on to it, freeze before sharding")
    assert torch.equal(net(images()), expected)


@checks
def unfreezing_after_sharding_is_refused(rank: int) -> None:
    for options in CONVERSIONS.values():
        net = shard(network(**options))
        expected = net(images())
        texts = left_alone(functools.partial(unfreeze_bn, net))
        assert len(texts) == 4
        assert "'1' is left as it is: FSDP holds on to it, unfreeze before sharding" in texts[0]
        torch.testing.assert_close(net(images()), expected)


@checks
def checkpoints_reload_into_any_kind(rank: int) -> None:
    """Saved sharded; loaded sharded, not sharded, frozen otherwise, and live."""
    for options in CONVERSIONS.values():
        path, source = shared_path(), shard(network(seed=1, **options))
        expected = full_state(source)
        dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=path)
        for other in ("plain, affine frozen", "folded, affine trained"):
            for target in (network(**CONVERSIONS[other]), shard(network(**CONVERSIONS[other]))):
                state = get_model_state_dict(target)
                dcp.load({"model": state}, checkpoint_id=path)
                set_model_state_dict(target, state)
                assert_same_bits(full_state(target), expected)
        live = live_network()
        state = get_model_state_dict(live)
        with pytest.raises(
            CheckpointException, match=r"Missing key in checkpoint.*num_batches_tracked"
        ):
            dcp.load({"model": state}, checkpoint_id=path)
        partial = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load({"model": state}, checkpoint_id=path, planner=partial)
        live.load_state_dict(state)
        assert_same_bits({k: v for k, v in snapshot(live).items() if k in expected}, expected)


@checks
def a_checkpoint_of_live_layers_loads(rank: int) -> None:
    path, live = shared_path(), live_network(seed=1)
    dcp.save({"model": live.state_dict()}, checkpoint_id=path)
    for options in CONVERSIONS.values():
        net = shard(network(**options))
        state = get_model_state_dict(net)
        dcp.load({"model": state}, checkpoint_id=path)
        set_model_state_dict(net, state)
        torch.testing.assert_close(net(images()), live.eval()(images()))


@pytest.mark.parametrize("name", checks.names())
def test_in_two_processes(results, name):
    results.assert_passed(name)


@EVERY_CONVERSION
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_of_one_process(options, tmp_path):
    source, target = network(seed=1, **options), network(**options)
    with torch.no_grad():
        target(images())  # folded weights may be kept
        dcp.save(source.state_dict(), checkpoint_id=tmp_path, no_dist=True)
        dcp.load(target.state_dict(), checkpoint_id=tmp_path, no_dist=True)
        assert_same_bits(snapshot(target), snapshot(source))
        assert torch.equal(target(images()), source(images()))
