"""What frozen_bn does, on real input: ``python -m benchmarks.demo``.

A ResNet-50 on photographs shows that it computes the same and what it costs; fine-tuning on
handwritten digits shows what freezing is for. Runs on the CPU; downloads nothing.
"""

from __future__ import annotations

import sys

from rich.console import Console

import frozen_bn

from . import demo_digits, demo_resnet50
from .demo_digits import ONE_CLASS, RANDOM

LARGEST_ERROR = 1e-4


def takeaway(resnet50: demo_resnet50.Result, digits: demo_digits.Result) -> str:
    """The numbers in a paragraph."""
    random, one_class = digits.gain(RANDOM), digits.gain(ONE_CLASS)
    frozen = digits.after[ONE_CLASS, demo_digits.FROZEN]
    live = digits.after[ONE_CLASS, demo_digits.LIVE]
    return (
        "[bold]In short:[/bold] one call, convert_frozen_bn(model), leaves what the model computes "
        f"as it is in eval mode (largest relative error {resnet50.worst_error:.0e}). A training "
        f"step of ResNet-50 took {resnet50.time_ratio:.2f} times as long as with "
        f"{demo_resnet50.BASELINE} and kept {resnet50.memory_ratio:.2f} times the memory for its "
        "backward pass. No later model.train() undoes it: fine-tuning in batches of two changed "
        f"{frozen.buffers_changed} of {frozen.buffers} frozen buffers, but {live.buffers_changed} "
        f"of {live.buffers} live ones. Against live BN the frozen net's test accuracy was "
        f"{random[0]:+.1f} points on the new digits and {random[1]:+.1f} on the old ones where "
        f"batches were random, {one_class[0]:+.1f} and {one_class[1]:+.1f} where the two images of "
        "a batch resembled each other, as crops of one photograph do: statistics of two images say "
        "little about the data. Where batches are large and varied, the new data lies far from the "
        "old, or there are few steps to adapt in, live BN may well be the better choice; it also "
        "bears larger learning rates."
    )


def main() -> None:
    """Print everything; exit with an error if frozen_bn computes something else than eval mode."""
    console = Console(highlight=False)
    console.print(frozen_bn.show_config(), "\n", markup=False)
    resnet50 = demo_resnet50.run(console)
    if not resnet50.worst_error <= LARGEST_ERROR:  # NaN fails too
        sys.exit(
            f"benchmarks.demo: frozen_bn differs from {demo_resnet50.BASELINE} by a relative error "
            f"of {resnet50.worst_error:.1e}, expected at most {LARGEST_ERROR:.0e}"
        )
    digits = demo_digits.run(console)
    console.print(takeaway(resnet50, digits))


if __name__ == "__main__":
    main()
