"""Fusion by rewritten methods: what can be merged, and that the classes behave as those they were
made from."""

from __future__ import annotations

import abc
import copy
import functools
import inspect
import pickle
import traceback
import types

import pytest
import torch
import torch.nn.functional as F
from fresh import CHOOSES, run_fresh
from helpers import assert_close_in_norm, merged, outputs_and_gradients, randomize_, runs_fused
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from frozen_bn import convert_frozen_bn, frozen_batch_norm, fused_source, unfreeze_bn

#: All of it by the steps and the autograd node in C++, and by Python's.
pytestmark = pytest.mark.usefixtures("node")

C = 4
IMAGE = (2, C, 5, 6)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.list = nn.ModuleList([nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)])
        self.dict = nn.ModuleDict({"conv": nn.Conv2d(C, C, 1), "bn": nn.BatchNorm2d(C)})
        self.inner = nn.Module()
        self.inner.deep = nn.ModuleDict({"conv": nn.Conv2d(C, C, 1), "bn": nn.BatchNorm2d(C)})
        self.name, self.with_cp = "bn1", False

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.name)

    @property
    def norm2(self) -> nn.Module:
        return self.bn2


class AnotherMethod(Parts):
    def stem(self, x, scale=1.0):
        x = self.conv1(x)
        x = self.bn1(x)
        return self.relu(x) * scale

    def forward(self, x):
        return self.stem(x, scale=2.0)


class Trying(Parts):
    def forward(self, x):
        try:
            y = self.conv1(x)
            y = self.bn1(y)
            y = self.relu(y)
        except RuntimeError:
            y = x
        finally:
            x = x + 1
        return y + x


class Within(Parts):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            y = self.conv1(x)
            y = self.bn1(y)
            y = self.relu(y)
        return y


class Looping(Parts):
    def forward(self, x):
        for _ in range(2):
            x = self.conv1(x)
            x = self.bn1(x)
            x = self.relu(x)
        return x


class ByData(Parts):
    def forward(self, x, *, flip=True):
        if x.sum() > 0 and flip:
            return self.relu(self.bn1(self.conv1(x)))
        x = self.bn1(self.conv1(-x))
        return self.relu(x)


class Items(Parts):
    def forward(self, x):
        x = self.relu(self.list[1](self.list[0](x)))
        x = F.relu(self.dict["bn"](self.dict["conv"](x)))
        return F.silu(self.inner.deep.bn(self.inner.deep.conv(x)))


class OfMmdetection(Parts):
    """The block of its ResNets, in all but names."""

    def forward(self, x):
        def _inner_forward(x):
            identity = x
            out = self.conv1(x)
            out = self.norm1(out)
            out = self.relu(out)
            out = self.conv2(out)
            out = self.norm2(out)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = checkpoint.checkpoint(_inner_forward, x, use_reentrant=False)
        else:
            out = _inner_forward(x)
        out = self.relu(out)
        return out


class Walrus(Parts):
    def forward(self, x):
        if (y := self.relu(self.bn1(self.conv1(x)))) is not None:
            return y
        return x


class Mangled(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.__scale = 2.0

    def forward(self, x):
        return self.__scaled(self.relu(self.bn1(self.conv1(x))))

    def __scaled(self, x):
        return super().extra_repr() == "" and x * self.__scale


class Returning(Parts):
    def normalized(self, x):
        return self.bn1(self.conv1(x))

    def forward(self, x):
        x = self.normalized(x)
        return self.relu(x)


CASES: dict[type[nn.Module], dict[str, str]] = {
    AnotherMethod: {"bn1": "relu"},
    Trying: {"bn1": "relu"},
    Within: {"bn1": "relu"},
    Looping: {"bn1": "relu"},
    ByData: {"bn1": "relu"},
    Items: {"list.1": "relu", "dict.bn": "relu", "inner.deep.bn": "silu"},
    OfMmdetection: {"bn1": "relu", "bn2": "add + relu"},
    Walrus: {"bn1": "relu"},
    Mangled: {"bn1": "relu"},
    Returning: {"bn1": "relu"},
}


def both(kind: type[nn.Module], **options: bool) -> tuple[nn.Module, nn.Module]:
    """Not fused, and fused."""
    torch.manual_seed(0)
    plain = convert_frozen_bn(randomize_(kind()), fuse=False)
    return plain, convert_frozen_bn(copy.deepcopy(plain), **options)


@pytest.mark.parametrize("kind", CASES)
def test_what_is_merged(kind):
    plain, fused = both(kind)
    x = torch.randn(IMAGE)
    assert merged(fused, x) == CASES[kind]
    for net in (fused, convert_frozen_bn(copy.deepcopy(plain), fold_conv=True)):
        expected = outputs_and_gradients(plain, x)
        assert_close_in_norm(outputs_and_gradients(net, x), expected, 1e-5)


def test_an_inner_function_that_is_checkpointed():
    plain, fused = both(OfMmdetection)
    x = torch.randn(IMAGE)
    for net in (plain, fused):
        net.with_cp = True
    assert runs_fused(fused.bn1, lambda: fused(x.requires_grad_()))
    expected = outputs_and_gradients(plain, x.detach())
    assert_close_in_norm(outputs_and_gradients(fused, x.detach()), expected, 1e-6)


class Dropping(Parts):
    def body(self, x):
        return self.drop(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x):
        return checkpoint.checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.parametrize("options", [{}, {"fold_conv": True}], ids=str)
def test_checkpointing_draws_the_same_dropout_again(options):
    plain, fused = both(Dropping, **options)
    expected = outputs_and_gradients(plain.train(), torch.ones(IMAGE))
    actual = outputs_and_gradients(fused.train(), torch.ones(IMAGE))
    assert_close_in_norm(actual, expected, 1e-5)
    assert (expected["output 0"] == 0).any()


# The text


def test_the_text_of_what_runs():
    _, fused = both(AnotherMethod)
    text = fused_source(fused)
    assert "test_fusion.AnotherMethod" in text and "x = steps.call(self.bn1, x)" in text
    assert fused_source(nn.Sequential(fused, fused)) == text
    assert fused_source(unfreeze_bn(fused)) == ""


def test_a_traceback_shows_the_lines_as_they_were_written():
    _, fused = both(AnotherMethod)
    with pytest.raises(RuntimeError) as error:
        fused(torch.randn(2, C + 1, 5, 6))
    lines = [f for f in traceback.extract_tb(error.value.__traceback__) if f.filename == __file__]
    first = inspect.getsourcelines(AnotherMethod.stem)[1]
    assert {first + 1, first + 2} & {line.lineno for line in lines}
    assert any("self.conv1(x)" in line.line or "self.bn1(x)" in line.line for line in lines)


# Classes


class Registry(abc.ABCMeta):
    made: list[str] = []  # noqa: RUF012

    def __new__(cls, name, bases, namespace, **options):
        cls.made.append(name)
        return super().__new__(cls, name, bases, namespace, **options)

    def __init__(cls, name, bases, namespace, **options):
        cls.made.append(name)
        super().__init__(name, bases, namespace)


class Registered(Parts, metaclass=Registry):
    subclasses: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, needed: int, **options: object) -> None:
        cls.subclasses.append(cls)

    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))


class Sub(Registered, needed=1):
    pass


@pytest.mark.parametrize("kind", [Registered, Sub])
def test_registries_do_not_notice(kind):
    before = [*Registry.made], [*Registered.subclasses]
    _, fused = both(kind)
    assert merged(fused) == {"bn1": "relu"}
    assert ([*Registry.made], [*Registered.subclasses]) == before
    assert type(type(fused)) is Registry and isinstance(fused, kind)


def test_the_class_has_the_name_of_the_one_that_it_was_made_from():
    plain, fused = both(AnotherMethod)
    assert type(fused) is not AnotherMethod and isinstance(fused, AnotherMethod)
    names = ("__name__", "__qualname__", "__module__", "__doc__")
    assert all(getattr(type(fused), n) == getattr(AnotherMethod, n) for n in names)
    assert inspect.signature(fused.stem) == inspect.signature(plain.stem)
    assert inspect.getsource(fused.stem) == inspect.getsource(plain.stem)
    assert repr(fused) == repr(plain)
    again = convert_frozen_bn(copy.deepcopy(plain))
    assert type(again) is type(fused), "one a class"
    assert type(unfreeze_bn(fused)) is AnotherMethod


def other_stem(self, x, scale=1.0):
    return x * 3


@pytest.mark.parametrize("of", [AnotherMethod, "its own"])
def test_a_class_that_is_patched_later_is_obeyed(of, monkeypatch):
    _, fused = both(AnotherMethod)
    x = torch.randn(IMAGE)
    before = fused(x)
    monkeypatch.setattr(type(fused) if of == "its own" else of, "stem", other_stem)
    assert torch.equal(fused(x), x * 3)
    monkeypatch.undo()
    assert torch.equal(fused(x), before)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ReLU])
def test_layers_of_a_class_that_is_patched_later(kind, monkeypatch):
    plain, fused = both(AnotherMethod)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 2)
    torch.testing.assert_close(fused(torch.ones(IMAGE)), plain(torch.ones(IMAGE)))


def test_different_instances_of_a_class_are_converted_one_after_the_other():
    """The second has what the first had not."""

    class Block(Parts):
        def forward(self, x):
            out = self.norm(self.conv1(x))
            if self.branch is not None:
                x = self.branch(x)
            return self.relu(out + x)

    nets = []
    for branch in (None, nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))):
        net = Block()
        net.norm, net.branch = nn.BatchNorm2d(C), branch
        nets.append(convert_frozen_bn(randomize_(net)))
    assert merged(nets[0]) == {"norm": "add + relu"}
    assert {*merged(nets[1], torch.randn(IMAGE)).values()} == {"two branches + relu"}
    assert type(nets[0]) is type(nets[1])


# Life


FRESH = """
import torch
with open({file!r}, "rb") as file:
    net, x, expected = torch.load(file, weights_only=False)
from helpers import runs_fused
assert torch.equal(net(x), expected)
assert runs_fused(net.bn1, lambda: net(x)) is {fused}
assert type(net).__name__ == "AnotherMethod"
"""


@pytest.mark.parametrize("off", [False, True])
def test_a_whole_model_is_loaded_in_a_fresh_process(off, node, tmp_path):
    _, fused = both(AnotherMethod)
    x, file = torch.randn(IMAGE), str(tmp_path / "net.pt")
    torch.save((fused, x, fused(x)), file)
    environment = {"FROZEN_BN_FUSE": "0" if off else "1", "FROZEN_BN_NODE": CHOOSES[node]}
    run_fresh(FRESH.format(file=file, fused=not off), **environment)


def test_it_can_be_turned_off_for_the_process(monkeypatch):
    monkeypatch.setenv("FROZEN_BN_FUSE", "0")
    _, fused = both(AnotherMethod, fold_conv=True)
    assert type(fused) is AnotherMethod and fused_source(fused) == ""


class WithState(AnotherMethod):
    """Says itself how it is pickled."""

    def __getstate__(self):
        return {**vars(self), "told": True}

    def __setstate__(self, state):
        vars(self).update(state)


def pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", [AnotherMethod, WithState])
def test_copies_are_fused(kind, clone):
    _, fused = both(kind)
    other, x = clone(fused), torch.randn(IMAGE)
    assert type(other) is type(fused) and getattr(other, "told", False) is (kind is WithState)
    assert runs_fused(other.bn1, lambda: other(x)) and torch.equal(other(x), fused(x))


# Who sees each call


def test_a_mode_of_torch_functions_sees_every_call():
    class Seen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.functions: list[object] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.functions.append(func)
            return func(*args, **(kwargs or {}))

    _, fused = both(AnotherMethod)
    with Seen() as seen:
        fused(torch.randn(IMAGE))
    functions = [f for f in seen.functions if f in (torch.conv2d, frozen_batch_norm, F.relu)]
    assert functions == [torch.conv2d, frozen_batch_norm, F.relu]
    with torch.device("cpu"):  # is such a mode too, and only tells where new tensors are made
        assert runs_fused(fused.bn1, lambda: fused(torch.randn(IMAGE)))


def test_a_subclass_of_tensor_sees_every_call():
    class Mine(Tensor):
        seen: list[object] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    plain, fused = both(AnotherMethod)
    x = torch.randn(IMAGE)
    y = fused(x.as_subclass(Mine))
    assert {torch.conv2d, frozen_batch_norm, F.relu} <= {*Mine.seen}
    torch.testing.assert_close(y.as_subclass(Tensor), plain(x))


class InnerDefaults(Parts):
    def forward(self, x):
        def inner(x, factor=[2.0]):  # noqa: B006
            factor[0] += 1
            return self.bn1(self.conv1(x * factor[0]))

        return self.relu(inner(x)) + self.relu(inner(x))


class NamesItself(Parts):
    def forward(self, x):
        return NamesItself.scaled(self.relu(self.bn1(self.conv1(x))))

    @staticmethod
    def scaled(x):
        return x * 2


def test_a_method_that_names_its_class():
    plain, fused = both(NamesItself)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(fused(x), plain(x))


def test_defaults_of_an_inner_function():
    plain, fused = both(InnerDefaults)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(fused(x), plain(x))


# What a reader who had not seen it broke


def logged(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) * 2

    return wrapper


class Odd(Parts):
    def spoil(self, x):
        with torch.no_grad():
            x.detach().mul_(2)
        return x

    def switched(self, x, i):
        self.bn1.running_mean.fill_(i)
        return self.bn1(self.conv1(x))


def other_statistics_for_each_call(self, x):
    a = self.switched(x, 0)
    b = self.switched(x, 3)
    return self.relu(a + b)


def another_eps_in_between(self, x):
    out = self.bn1(self.conv1(x))
    self.bn1.eps = 0.5
    out = self.relu(out)
    return out


def another_weight_in_between(self, x):
    out = self.bn1(self.conv1(x))
    z = self.bn1.weight.data.fill_(2)
    out = self.relu(out)
    return out * z.mean()


def read_by_the_test_of_a_loop(self, x):
    raw, y, n = x, x, 0
    while n < 3 and raw.detach().mean() < 10:
        n += 1
        raw = self.conv1(y)
        y = self.relu(self.bn1(raw))
    return y + raw


def read_by_an_outer_loop(self, x):
    kept, previous = [], None
    for k in range(3):
        if k > 0:
            kept.append(previous)
        for conv in (self.conv1,):
            previous = conv(x)
            z = self.relu(self.bn1(previous))
    return sum(kept) + z


def a_wrapped_inner_function(self, x):
    def inner(y):
        return self.bn1(self.conv1(y))

    inner = logged(inner)
    return self.relu(inner(x))


def a_test_that_is_evaluated_first(self, x):
    y = self.bn1(x)
    return self.relu(y) if self.spoil(x).sum() > -1e9 else y


def a_default_of_a_lambda(self, x):
    out = self.conv1(x)
    y = self.relu(self.bn1(out))
    return y + (lambda a=out: a)()


def a_default_of_a_generator(self, x):
    out = self.conv1(x)

    def generator(a=out):
        yield a

    return self.relu(self.bn1(out)) + next(generator())


def a_base_of_a_class(self, x):
    out = self.conv1(x)

    class Result(dict if out.numel() > 1 else list):
        pass

    return self.relu(self.bn1(out)) * (1 + issubclass(Result, dict))


def forward_mode_inside(self, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        return forward_ad.unpack_dual(self.relu(self.bn1(self.conv1(dual)))).tangent + 0 * x


def gradients_inside(self, x):
    return torch.func.grad(lambda y: self.relu(self.bn1(self.conv1(y))).square().sum())(x)


def inference_by_hand(self, x):
    mode = torch.inference_mode()
    mode.__enter__()
    y = self.conv1(x)
    mode.__exit__(None, None, None)
    return self.bn1(y) + x


ODD = [other_statistics_for_each_call, another_eps_in_between, another_weight_in_between]
ODD += [read_by_the_test_of_a_loop, read_by_an_outer_loop, a_wrapped_inner_function]
ODD += [a_test_that_is_evaluated_first, a_default_of_a_lambda, a_default_of_a_generator]
ODD += [a_base_of_a_class, forward_mode_inside, gradients_inside, inference_by_hand]


@pytest.mark.parametrize("options", [{}, {"fold_conv": True}], ids=str)
@pytest.mark.parametrize("forward", ODD)
def test_odd_methods(forward, options):
    x = torch.randn(IMAGE)
    for grad in (True, False):
        kind = type("Net", (Odd,), {"forward": forward})
        plain, fused = both(kind, **options)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fused(x.clone()), plain(x.clone()), rtol=1e-4, atol=1e-5)


def doubled(self, x, weight, bias):
    return nn.Conv2d._conv_forward(self, x, weight, bias) * 2


def own_conv_forward(net):
    net.conv1._conv_forward = types.MethodType(doubled, net.conv1)


def bias_of_a_buffer(net):
    del net.conv1.bias
    net.conv1.register_buffer("bias", torch.full((C,), 5.0))


@pytest.mark.parametrize("options", [{}, {"fold_conv": True}], ids=str)
@pytest.mark.parametrize("change", [own_conv_forward, bias_of_a_buffer])
def test_what_is_changed_on_the_instance_or_class_is_obeyed(change, options):
    kind = type("Net", (AnotherMethod,), {})
    plain, fused = both(kind, **options)
    for net in (plain, fused):
        change(net)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_convolution_whose_class_is_patched_deeper(monkeypatch):
    plain, fused = both(AnotherMethod)
    fused(torch.ones(IMAGE))
    original = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *args: original(*args) * 2)
    torch.testing.assert_close(fused(torch.ones(IMAGE)), plain(torch.ones(IMAGE)))


def test_selective_checkpointing_of_convolutions():
    plain, fused = both(Dropping)
    make = checkpoint.create_selective_checkpoint_contexts
    context = functools.partial(make, [torch.ops.aten.convolution.default])
    x = torch.randn(IMAGE)
    for net in (plain, fused):
        net.drop = nn.Identity()
    results = []
    for net in (plain, fused):
        leaf = x.clone().requires_grad_()
        y = checkpoint.checkpoint(net.body, leaf, use_reentrant=False, context_fn=context)
        y.square().sum().backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(results[1], results[0])


class MadeAnew(AnotherMethod):
    def __reduce__(self):
        return type(self), ()


def test_a_class_that_says_how_it_is_made():
    _, fused = both(MadeAnew)
    assert type(pickled(fused)) is type(fused)


class Enumerated(nn.Module):
    """As timm's Res2Net loops over its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):  # noqa: B905
            y = conv(x if i == 0 else x + x)
            y = bn(y)
            x = self.relu(y)
        return x


def test_layers_of_a_loop_that_counts():
    plain, fused = both(Enumerated)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(fused(x), plain(x))
    assert runs_fused(fused.bns[0], lambda: fused(x)) and runs_fused(fused.bns[1], lambda: fused(x))
