"""The life of a converted model, as far as its state goes: copies, files, checkpoints of others.
See test_life_training.py for what happens to it in training, and test_life_processes.py for
threads and processes. test_convert.py and test_fuse_guards.py have copies of parts."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import (
    VECTORS,
    assert_close_in_norm,
    assert_same_bits,
    outputs_and_gradients,
    randomize_,
    snapshot,
)
from nets import EVERY_CONVERSION, images, live_network, network
from torch import Tensor, nn

from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn, unfreeze_bn


def assert_computes_the_same(net: nn.Module, other: nn.Module) -> None:
    """To the last bit: both are converted alike. Without gradients folded weights are kept."""
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(net(images()), other(images()))
    assert_same_bits(outputs_and_gradients(net, images()), outputs_and_gradients(other, images()))


def through_a_file(value: object, weights_only: bool) -> object:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=weights_only)


# Copies and files

CLONES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "file": lambda net: through_a_file(net, weights_only=False),
}


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
@EVERY_CONVERSION
def test_a_copy_is_whole_and_on_its_own(options, clone):
    net = network(**options)
    with torch.no_grad():
        net(images())
    twin = clone(net)
    before = snapshot(net)
    assert_computes_the_same(twin, net)
    assert_same_bits(snapshot(twin), before)
    twin.load_state_dict(live_network(seed=1).state_dict())
    assert_same_bits(snapshot(net), before)
    assert_computes_the_same(twin, network(seed=1, **options))
    assert_computes_the_same(net, network(**options))
    assert_same_bits(snapshot(unfreeze_bn(twin)), snapshot(live_network(seed=1)))


@EVERY_CONVERSION
def test_a_state_dict_is_read_with_weights_only(options):
    state = through_a_file(network(seed=1, **options).state_dict(), weights_only=True)
    net = network(**options)
    with torch.no_grad():
        net(images())
    net.load_state_dict(state, strict=True)
    assert_computes_the_same(net, network(seed=1, **options))


def test_a_whole_module_is_refused_with_weights_only():
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        through_a_file(network(fuse=True), weights_only=True)


# Meta tensors


@EVERY_CONVERSION
def test_made_on_meta_and_filled_by_assignment(options):
    with torch.device("meta"):
        net = network(**options)
    assert net(images().to("meta")).is_meta
    net.load_state_dict(live_network().state_dict(), strict=True, assign=True)
    trained = {name for name, _ in net.named_parameters()}
    assert trained == {name for name, _ in network(**options).named_parameters()}
    assert_computes_the_same(net, network(**options))


@EVERY_CONVERSION
def test_assignment_replaces_what_was_folded(options):
    net = network(**options)
    with torch.no_grad():
        net(images())
    net.load_state_dict(live_network(seed=1).state_dict(), assign=True)
    assert_computes_the_same(net, network(seed=1, **options))


@EVERY_CONVERSION
def test_to_empty_then_filled(options):
    net = network(**options).to("meta").to_empty(device="cpu")
    assert not any(value.is_meta for value in net.state_dict().values())
    net.load_state_dict(network(seed=1).state_dict())
    assert_computes_the_same(net, network(seed=1, **options))
    assert_same_bits(snapshot(unfreeze_bn(net)), snapshot(live_network(seed=1)))


# Hooks of state_dict


def hooked(kind: str, layer: nn.Module, seen: list[nn.Module]) -> object:
    register = getattr(layer, f"register_{kind}")
    return register(lambda module, *_: seen.append(module))


STATE_HOOKS = ["state_dict_pre_hook", "state_dict_post_hook"]
STATE_HOOKS += ["load_state_dict_pre_hook", "load_state_dict_post_hook"]


@pytest.mark.parametrize("kind", STATE_HOOKS)
@EVERY_CONVERSION
def test_hooks_of_state_dict_get_the_layer_that_is_there(options, kind):
    net, seen = live_network(), []
    live = net[1]
    handle = hooked(kind, live, seen)

    def called() -> list[nn.Module]:
        seen.clear()
        net.load_state_dict(net.state_dict())
        return seen

    assert called() == [live]
    convert_frozen_bn(net, **options)
    assert called() == [net[1]] and net[1] is not live
    twin = copy.deepcopy(net)
    seen.clear()
    twin.load_state_dict(twin.state_dict())
    assert seen == [twin[1]]
    unfreeze_bn(net)
    assert called() == [live]
    handle.remove()
    assert called() == []


def test_a_conversion_that_fails_leaves_the_hooks_alone():
    net, seen = live_network(), []
    hooked("load_state_dict_pre_hook", net[1], seen)
    net[3].bn2.running_var.fill_(-1)
    with pytest.raises(RuntimeError, match="running_var >= 0"):
        convert_frozen_bn(net)
    net.load_state_dict(net.state_dict())
    assert seen == [net[1]]


def test_a_hook_may_rename_keys():
    net = network(fuse=True)
    expected = snapshot(net)

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        state[prefix + "weight"] = state.pop(prefix + "gamma")

    net[1].register_load_state_dict_pre_hook(rename)
    state = snapshot(net)
    state["1.gamma"] = state.pop("1.weight")
    net.load_state_dict(state, strict=True)
    assert_same_bits(snapshot(net), expected)


# Checkpoints of others


def detectron2_checkpoint(version: int | None) -> dict[str, Tensor]:
    """Four vectors a layer; the metadata may have a version of its own, or there is none."""
    state = {k: v for k, v in live_network(seed=1).state_dict().items() if "num_batches" not in k}
    if version is not None:
        checkpoint = live_network().state_dict()
        metadata = checkpoint._metadata
        checkpoint.clear()
        checkpoint.update(state)
        checkpoint._metadata = {name: {"version": version} for name in metadata}
        return checkpoint
    return state


@pytest.mark.parametrize("version", [None, 1, 2, 3])
@EVERY_CONVERSION
def test_checkpoints_without_counts_and_of_any_version(options, version):
    """Also, no version has its variances rescaled."""
    net = network(**options)
    net.load_state_dict(detectron2_checkpoint(version), strict=True)
    assert_computes_the_same(net, network(seed=1, **options))


@EVERY_CONVERSION
def test_checkpoints_of_live_layers_and_back(options):
    net, live = network(**options), live_network(seed=1)
    net.load_state_dict(live.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(net(images()), live.eval()(images()))
    other = live_network()
    other.load_state_dict(net.state_dict(), strict=True)
    assert_same_bits(snapshot(unfreeze_bn(net)), snapshot(live))
    assert torch.equal(other[1].running_mean, live[1].running_mean)


def frozen_by_timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.layers.freeze_batch_norm_2d(live_network(seed=1))


def frozen_by_torchvision() -> nn.Module:
    ops = pytest.importorskip("torchvision.ops")
    net = live_network(seed=1)
    for parent in [*net.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = ops.FrozenBatchNorm2d(8)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen)
    return net


@pytest.mark.parametrize("source", [frozen_by_timm, frozen_by_torchvision])
@EVERY_CONVERSION
def test_checkpoints_of_frozen_layers_of_other_libraries(options, source):
    theirs, net = source(), network(**options)
    net.load_state_dict(theirs.state_dict(), strict=True)
    expected = network(seed=1, **options)
    assert_computes_the_same(net, expected)
    torch.testing.assert_close(net(images()), theirs(images()))
    theirs.load_state_dict(network(seed=2, **options).state_dict(), strict=True)
    torch.testing.assert_close(theirs(images()), network(seed=2)(images()))


@EVERY_CONVERSION
def test_frozen_layers_of_other_libraries_are_converted_with_their_state(options):
    theirs = frozen_by_torchvision()
    before = snapshot(theirs)
    expected = outputs_and_gradients(theirs, images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = convert_frozen_bn(theirs, **options)
    actual = outputs_and_gradients(net, images())
    assert_close_in_norm({name: actual[name] for name in expected}, expected, 1e-5)
    assert_same_bits(snapshot(net), {name: before[name] for name in net.state_dict()})


@pytest.mark.parametrize("freeze_affine", [True, False])
def test_timms_frozen_layer_with_an_activation(freeze_affine):
    norm_act = pytest.importorskip("timm.layers.norm_act")
    theirs = randomize_(norm_act.FrozenBatchNormAct2d(8))
    ours = FrozenBatchNorm2d(8, freeze_affine=freeze_affine, activation="relu")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x.clone()))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert [*ours.state_dict()] == VECTORS
