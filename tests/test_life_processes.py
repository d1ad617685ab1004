"""The life of a converted model among threads and processes, and under torch's global switches."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from fresh import run_fresh
from helpers import ACTIVATIONS, assert_same_bits, outputs_and_gradients
from nets import EVERY_CONVERSION, images, live_network, network

from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn, unfreeze_bn

# Large enough for the kernels to share it out among threads.
LARGE = (4, 32, 64, 64)


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Threads


@contextmanager
def eager_switching() -> Iterator[None]:
    """Threads take turns at nearly every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(work: Callable[[int], None], count: int = 8) -> None:
    """All at once; raises what the first of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    with eager_switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "it hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@EVERY_CONVERSION
def test_threads_share_one_model(options, mode):
    """From its first call on, which is when a fused forward is compiled and a weight is folded."""
    for attempt in range(3):
        net, inputs = network(seed=attempt, **options), [images(i) for i in range(8)]
        with mode():
            expected = [network(seed=attempt, **options)(x) for x in inputs]

        def infer(number: int, net=net, inputs=inputs, expected=expected) -> None:
            for i in range(number, number + 4):
                with mode():
                    assert torch.equal(net(inputs[i % 8]), expected[i % 8])

        in_threads(infer)


@pytest.mark.parametrize("fold_conv", [True, False])
def test_threads_convert_and_run_at_once(fold_conv):
    """Each a model of its own, of the same classes."""
    expected, live = network(fold_conv=fold_conv)(images()), live_network()

    def work(number: int) -> None:
        for _ in range(4):
            net = convert_frozen_bn(copy.deepcopy(live), fold_conv=fold_conv)
            assert torch.equal(net(images()), expected)
            assert torch.equal(copy.deepcopy(net)(images()), expected)
            unfreeze_bn(net)

    in_threads(work)


@EVERY_CONVERSION
def test_threads_train_one_model(options):
    """The gradients of all add up."""
    net, alone = network(**options), network(**options)
    in_threads(lambda i: net(images(i)).square().mean().backward(), count=4)
    for i in range(4):
        alone(images(i)).square().mean().backward()
    for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("freeze_affine", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_number_of_intra_op_threads(activation, freeze_affine):
    """The output, the gradient of the input and a trained affine's up to the order of a sum."""
    layer = FrozenBatchNorm2d(LARGE[1], activation=activation, freeze_affine=freeze_affine)
    x, results = torch.randn(LARGE), []
    for threads in (1, 2, 3, 7):
        with intra_op_threads(threads):
            results.append(outputs_and_gradients(layer, x))
            assert_same_bits(outputs_and_gradients(layer, x), results[-1])
    for values in results[1:]:
        elementwise = ["output 0", "gradient of input 0"]
        assert_same_bits(*({n: v[n] for n in elementwise} for v in (values, results[0])))
        torch.testing.assert_close(values, results[0])


# Processes

FORKING = """
import sys
import torch, torch.multiprocessing as mp
from nets import images, network
from frozen_bn import FrozenBatchNorm2d

x = torch.randn({shape})
layer = FrozenBatchNorm2d(x.shape[1], activation="relu", freeze_affine=False)
nets = [network(fuse=True), network(fold_conv=True, freeze_affine=False)]

def work(threads):
    torch.set_num_threads(threads)
    for module, input in ((layer, x), *((net, images()) for net in nets)):
        module(input).sum().backward()
        with torch.no_grad():
            module(input)

def forked(threads):
    process = mp.get_context("fork").Process(target=work, args=(threads,))
    process.start()
    process.join(20)
    if process.exitcode is None:
        process.kill()
        sys.exit("it hangs")
    assert process.exitcode == 0

{run}
"""

RUNS = {
    "after import": "forked(threads=2)",
    # Threads of OpenMP do not survive a fork, and torch's own operators hang like ours.
    "after use, as the worker of a DataLoader": "work(threads=2); forked(threads=1)",
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_fork_runs(run):
    # Where there is a GPU, torch refuses autograd in the fork of a process that has run it.
    run_fresh(FORKING.format(shape=LARGE, run=run), CUDA_VISIBLE_DEVICES="")


# Switches of torch


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@EVERY_CONVERSION
def test_deterministic_algorithms(options, deterministic):
    """Fresh memory is full of NaN then, of which nothing may be left."""
    assert torch.empty(3).isnan().all()
    net = network(**options)
    values = outputs_and_gradients(net, images())
    assert_same_bits(outputs_and_gradients(net, images()), values)
    torch.use_deterministic_algorithms(False)
    assert_same_bits(outputs_and_gradients(network(**options), images()), values)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 9, 1, 1), (3, 8, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_of_filled_memory_is_left(activation, dtype, shape, deterministic):
    """With residual, in both memory formats, with tails shorter than a pack."""
    layer = FrozenBatchNorm2d(shape[1], activation=activation, freeze_affine=False)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, residual = (torch.randn(shape).to(dtype, memory_format=memory_format) for _ in range(2))
        values = outputs_and_gradients(layer, x, residual)
        assert len(values) == 5
        assert not any(value.isnan().any() for value in values.values())
        with torch.no_grad():
            assert torch.equal(layer(x, residual), values["output 0"])
