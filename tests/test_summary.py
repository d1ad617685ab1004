"""summary(): what became of every batch normalization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize_, snapshot
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn, summary

C = 8


class Custom(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.branch = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.branch(x))


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) if x.sum() > 0 else x


def model() -> nn.Sequential:
    shared = nn.BatchNorm2d(C)
    return randomize_(
        nn.Sequential(
            nn.Conv2d(C, C, 3, padding=1),
            nn.BatchNorm2d(C),
            nn.ReLU(),
            Block(),
            Dynamic(),
            shared,
            nn.Sigmoid(),
            shared,
            nn.BatchNorm2d(C),
        )
    )


def rows(text: str) -> dict[str, tuple[str, str]]:
    """The class and the state, by name."""
    table, _ = text.split("\n\n")
    cells = (line.split(maxsplit=2) for line in table.split("\n"))
    return {name: (kind, state) for name, kind, state in cells}


def totals(text: str) -> list[str]:
    return text.split("\n\n")[1].split("\n")


def test_a_model_that_was_never_frozen():
    text = summary(model())
    assert rows(text)["name"] == ("class", "state")
    assert rows(text)["1"] == ("BatchNorm2d", "skipped: not converted")
    assert totals(text) == ["0 frozen, 6 skipped"]


def test_a_model_without_batch_norms():
    assert totals(summary(nn.Sequential(nn.ReLU()))) == ["0 frozen, 0 skipped"]


def test_frozen_and_no_more():
    text = summary(convert_frozen_bn(model(), fuse=False))
    assert {*rows(text).values()} == {("class", "state"), ("FrozenBatchNorm2d", "frozen")}
    assert totals(text) == ["6 frozen, 0 skipped"]


@pytest.mark.parametrize("fold_conv", [False, True])
def test_fused(fold_conv):
    text = summary(convert_frozen_bn(model(), fuse=True, fold_conv=fold_conv))
    states = {name: state for name, (_, state) in rows(text).items()}

    def merged(conv: str, with_what: str) -> str:
        if fold_conv:
            return f"frozen, folded into {conv}, merged with {with_what}"
        return f"frozen, merged with {with_what}, in place"

    assert states["1"] == merged("0", "relu")
    assert states["3.bn"] == merged("3.conv", "two branches + relu")
    assert states["3.branch.1"] == merged("3.branch.0", "two branches + relu")
    assert states["4.bn"] == "frozen, merged with relu"
    assert states["5"] == "frozen, not fused: nothing next to it to merge with"
    assert states["8"] == "frozen, not fused: nothing next to it to merge with"
    assert totals(text) == [
        "6 frozen, 0 skipped",
        "2 merged with relu",
        "2 merged with two branches + relu (1 pairs)",
    ]


def test_layers_with_hooks():
    net = model()
    net[1].register_forward_hook(lambda *_: None)
    text = summary(convert_frozen_bn(net, fuse=True))
    assert rows(text)["1"][1] == "frozen, not fused: it has hooks"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm2d(C, track_running_stats=False), "track_running_stats=False"),
        (Custom(C), "Custom is a subclass"),
        (nn.LazyBatchNorm2d(), "it is lazy and not initialized"),
    ],
)
def test_skipped_layers_and_why(layer, reason):
    net = nn.Sequential(randomize_(nn.Sequential(nn.BatchNorm2d(C))), layer)
    with pytest.warns(UserWarning, match=reason):
        convert_frozen_bn(net, fuse=True)
    text = summary(net)
    assert rows(text)["1"][1].startswith(f"skipped: {reason}")
    assert totals(text) == ["1 frozen, 1 skipped"]


def test_a_root_that_is_a_frozen_layer():
    text = summary(convert_frozen_bn(randomize_(nn.BatchNorm2d(C)), fuse=True))
    assert rows(text)["(root)"][0] == "FrozenBatchNorm2d"


def test_bytes_saved_for_the_backward_pass():
    """Before: the inputs of convolution, normalization and ReLU (its output). Now: the input of the
    convolution, and a mask."""
    net = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())
    convert_frozen_bn(randomize_(net), fuse=True)
    x = torch.randn(2, C, 256, 256)  # 4 MiB
    before, generator = snapshot(net), torch.get_rng_state()
    text = summary(net, x)
    assert totals(text)[-1] == "saved for backward: 12.0 MiB before, 4.1 MiB now"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in net.parameters())


def test_bytes_of_a_storage_saved_twice_count_once():
    net = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, C, 1))
    convert_frozen_bn(randomize_(net))
    x = torch.randn(2, C, 256, 256)
    assert totals(summary(net, x))[-1] == "saved for backward: 12.0 MiB before, 8.0 MiB now"


class Downsampled(nn.Module):
    """As timm's HRNet calls its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(3))
        self.downs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(x) if i == 0 else conv(x) + self.downs[i - 1].forward(x)
        return x


def test_layers_of_a_computed_index_whose_forward_is_called():
    net, x = convert_frozen_bn(randomize_(Downsampled())), torch.randn(1, C, 5, 5)
    for told in (summary(net), summary(net, x)):
        states = {name: state for name, (_, state) in rows(told).items() if "downs" in name}
        assert states == dict.fromkeys(
            ("downs.0.1", "downs.1.1"), "frozen, merged with relu, in place"
        )
