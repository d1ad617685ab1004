"""What the CUDA kernels move and launch, counted in the emulator; what is used instead moves, from
the operators that are dispatched.

A 32-byte sector counts once a warp and launch: the warp's next access to it finds it in the L1
cache. A sector that two warps touch counts twice. The unavoidable ones are those of every
activation once, and of one bit an element for the ReLU.
"""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from covering import covering

traffic = pytest.importorskip(
    "benchmarks.traffic", reason="needs timm and torchvision, and the repository's root as cwd"
)
cases = pytest.importorskip("benchmarks.cases")
dispatched = pytest.importorskip("benchmarks.dispatched")

MOST_ELEMENTS = 1 << 16
MOST_SECTORS = 1.02
LAUNCHES = {"forward": 1, "backward": 1, "backward, affine": 2}
#: Packs of three channels; 5 elements beyond the last pack; a pack a channel in part; maps of one
#: element, of fewer channels than a pack and of many; one channel; as many as a pack.
ODD_SHAPES = (
    (1, 3, 200, 304), (1, 37, 7, 7), (1, 64, 2, 2), (64, 37, 1, 1), (3, 2048, 1, 1), (9, 1, 25, 38),
    (513, 8, 1, 1), (2, 8, 25, 38),
)  # fmt: skip
SHAPES = {
    "residual+relu": (*traffic.SHAPES, *ODD_SHAPES),
    # A few: those of ResNet-50's and Mask R-CNN's blocks that downsample.
    cases.PAIR: (*traffic.SHAPES[2:3], *traffic.SHAPES[5:], *ODD_SHAPES),
}
KINDS = [
    (dtype, layout, operation, shape)
    for operation, shapes in SHAPES.items()
    for dtype, layout, shape in itertools.product(cases.DTYPES, cases.LAYOUTS, shapes)
]


def _name(kind: tuple) -> str:
    *words, shape = kind
    return "-".join((*words, "x".join(map(str, shape))))


@pytest.fixture(scope="module")
def count():
    """Counts a case once, for all tests."""
    counted: dict = {}

    def of(emulator, case, affine=False):
        shape = case.shape
        if math.prod(shape) > MOST_ELEMENTS:
            shape = traffic.emulated_shape(shape, case.layout, MOST_ELEMENTS)
        key = (case.dtype, case.layout, case.operation, shape, affine)
        if key not in counted:
            counted[key] = traffic.emulate(emulator, case, shape, affine)
        return counted[key]

    return of


#: Small maps, which are the most difficult, and the odd shapes; the others are marked `long`. So is
#: bfloat16, which differs from float16 in how it is converted and in nothing else; and of the rest
#: all beyond what shows each two of dtype, layout, operation and shape together.
SOON = ((16, 2048, 7, 7), *ODD_SHAPES)


def _params(kinds: list[tuple]) -> list:
    soon = [kind for kind in kinds if kind[-1] in SOON and kind[0] != "bf16"]
    soon = [soon[number] for number in covering(soon, 2)]
    return [
        pytest.param(kind, id=_name(kind), marks=() if kind in soon else pytest.mark.long)
        for kind in kinds
    ]


@pytest.fixture(params=_params(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple:
    return request.param


#: The odd shapes are smaller: what a thread does once, and the ends of tensors, weigh too much.
real_layers = pytest.mark.parametrize(
    "kind", _params([kind for kind in KINDS if kind[-1] not in ODD_SHAPES])
)


def _passes(emulator, count, kind):
    """The forward, and both backward passes; a pair has only one, with a frozen affine."""
    case = cases.Case(*kind)
    passes = dict(count(emulator, case))
    if case.operation != cases.PAIR:
        passes["backward, affine"] = count(emulator, case, True)["backward, affine"]
    return case, passes


def test_no_activation_moves_twice(emulator, count, kind):
    case, passes = _passes(emulator, count, kind)
    over = {}
    for which, counted in passes.items():
        needed = traffic.unavoidable_bytes(case, which, counted.shape)
        # Every tensor may end within a sector.
        sectors = needed + len(traffic.ACTIVATIONS) * traffic.SECTOR
        assert counted.activations >= needed, "the counters miss something"
        if counted.activations > max(MOST_SECTORS * needed, sectors):
            over[which] = counted.activations / needed
    assert over == {}


def test_no_element_is_loaded_or_stored_twice(emulator, count, kind):
    """Not even by the warp that has it in its L1 cache."""
    case, passes = _passes(emulator, count, kind)
    needed = {
        which: traffic.unavoidable_bytes(case, which, counted.shape)
        for which, counted in passes.items()
    }
    assert {which: counted.accessed for which, counted in passes.items()} == needed


@real_layers
def test_accesses_of_a_warp_are_coalesced(emulator, count, kind):
    """A pack of floats takes two accesses of 16 bytes, which find the same sectors. Threads whose
    packs span two channels may go apart from the others of their warp."""
    case, passes = _passes(emulator, count, kind)
    accesses = 2 if case.dtype == "fp32" else 1
    apart = 1.3 if case.layout == "contiguous" else 1.0
    for which, counted in passes.items():
        needed = traffic.unavoidable_bytes(case, which, counted.shape)
        assert counted.requested <= MOST_SECTORS * accesses * apart * needed, which


def test_activations_move_16_bytes_at_a_time(emulator, count, kind):
    _, passes = _passes(emulator, count, kind)
    for which, counted in passes.items():
        tail = counted.numel % traffic.PACK
        tensors = 3 + (which == "backward, affine")
        assert counted.narrow <= tensors * tail, which


@real_layers
def test_instructions_of_a_pack(emulator, count, kind):
    case, passes = _passes(emulator, count, kind)
    for which, counted in passes.items():
        most = traffic.MOST_INSTRUCTIONS[case.operation, which][case.layout]
        assert counted.instructions_per_pack <= most, which


def test_launches(emulator, count, kind):
    _, passes = _passes(emulator, count, kind)
    for which, counted in passes.items():
        assert counted.launches == LAUNCHES[which], which


@pytest.mark.parametrize("operation", ["plain", "relu"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 512, 25, 38), (16, 2048, 7, 7)])
def test_without_a_residual_no_activation_moves_twice(emulator, count, operation, layout, shape):
    case = cases.Case("fp16", layout, operation, shape)
    for which, counted in count(emulator, case).items():
        needed = traffic.unavoidable_bytes(case, which, counted.shape)
        assert needed <= counted.activations <= MOST_SECTORS * needed
        assert counted.accessed == needed


def test_a_large_shape_is_cut_where_the_access_pattern_does_not_show_it():
    assert traffic.emulated_shape((2, 256, 200, 304), "contiguous", 1 << 20) == (1, 16, 200, 304)
    assert traffic.emulated_shape((2, 256, 200, 304), "contiguous", 1) == (1, 8, 200, 304)
    assert traffic.emulated_shape((2, 256, 200, 304), "channels_last", 1 << 20) == (1, 256, 13, 304)
    assert traffic.emulated_shape((16, 2048, 7, 7), "channels_last", 1 << 20) == (1, 2048, 7, 7)
    assert traffic.emulated_shape((1, 3, 200, 304), "contiguous", 1 << 10) == (1, 3, 200, 304)


def _peer(name: str, operation: str, dtype: str = "fp32"):
    case = cases.Case(dtype, "contiguous", operation, (2, 64, 25, 38))
    passes = dispatched.dispatch_peers(case)[name]
    numel, itemsize = math.prod(case.shape), cases.DTYPES[dtype].itemsize
    return {which: (round(p.bytes / numel / itemsize), p) for which, p in passes.items()}


@pytest.mark.parametrize("operation", ["plain", "relu", "residual+relu", cases.PAIR])
def test_cuda_is_given_the_same_operators(operation):
    """But for the kind of batch normalization. Of the backward pass only a GPU could tell."""
    case, taken = cases.Case("fp16", "contiguous", operation, (2, 64, 25, 38)), []
    for device in ("cpu", "cuda"):
        with dispatched.FakeTensorMode():
            setup = cases.Setup(case, torch.device(device))
            for name in traffic.COUNTED:
                contender = traffic.contenders(setup.problem)[name]
                with dispatched._Operators() as operators:
                    contender(setup.input, setup.residual)
                    found = operators.taken()
                kinds = [re.sub(r"\w+_batch_norm", "batch_norm", n) for n in found.operators]
                taken.append((device, name, kinds, found.bytes))
    half = len(taken) // 2
    for on_cpu, on_cuda in zip(taken[:half], taken[half:], strict=True):
        assert on_cpu[1:3] == on_cuda[1:3]
        assert on_cpu[3] == pytest.approx(on_cuda[3], rel=0.005)  # vectors of batch norm


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operators_of_the_formula(dtype):
    """Seven forward, two of which pass over the activation; one backward."""
    passes = _peer("torchvision", "plain", dtype)
    (tensors, forward), (tensors_back, backward) = passes["forward"], passes["backward"]
    assert (tensors, tensors_back) == (4, 2)
    assert forward.operators == ("add", "rsqrt", "mul", "mul", "sub", "mul", "add")
    assert backward.operators == ("mul",)


def test_operators_of_batch_norm():
    passes = _peer("batch_norm", "residual+relu")
    assert passes["forward"][0] == 2 + 3 + 2
    assert passes["forward"][1].operators[1:] == ("add", "relu")
    # The ReLU's reads the output and the gradient; batch norm's reads its input again.
    assert passes["backward"][0] == 3 + 3
    assert passes["backward"][1].operators[0] == "threshold_backward"


def test_timm_dispatches_what_torchvision_does():
    timm = pytest.importorskip("timm")

    def contender(problem):
        module = timm.layers.FrozenBatchNormAct2d(
            problem.affine.weight.numel(), act_layer=torch.nn.ReLU, act_kwargs={"inplace": False}
        ).to(problem.affine.weight.device, problem.dtype)
        return lambda input, residual: module(input)

    case = cases.Case("fp16", "contiguous", "relu", (2, 64, 25, 38))
    passes = dispatched.dispatch(case, contender)
    assert passes == dispatched.dispatch_peers(case)["torchvision"]


def test_nothing_is_counted_that_launches_nothing():
    case = cases.Case("fp32", "contiguous", "plain", (2, 64, 25, 38))
    passes = dispatched.dispatch(
        case, lambda _: lambda input, residual: input.reshape(-1).detach().view(case.shape) + input
    )
    numel = math.prod(case.shape)
    assert passes["forward"].launches == 1
    assert passes["forward"].operators == ("add",)
    assert passes["forward"].bytes > 8 * numel


def test_an_expanded_operand_is_read_once():
    case = cases.Case("fp32", "contiguous", "plain", (2, 64, 25, 38))
    numel = math.prod(case.shape)
    passes = dispatched.dispatch(
        case,
        lambda p: lambda input, _: input * p.affine.weight[None, :, None, None].expand(input.shape),
    )
    assert passes["forward"].bytes == 8 * numel + 4 * 64
    assert passes["backward"].bytes == 8 * numel + 4 * 64


def test_a_peer_of_a_pair_is_two_of_its_layers():
    case = cases.Case("fp16", "contiguous", cases.PAIR, (2, 64, 25, 38))
    passes = dispatched.dispatch_peers(case)["batch_norm"]
    names = passes["forward"].operators
    assert len(names) == 4 and names[0] == names[1] and names[2:] == ("add", "relu")
    assert passes["backward"].operators.count("threshold_backward") == 1
    assert passes["backward"].launches == 3
