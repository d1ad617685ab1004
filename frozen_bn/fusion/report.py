from typing import NamedTuple
class Fate(NamedTuple):
    """What became of a layer."""

    merged: str = ""  # with what: "relu", "add + relu", "two branches + relu"
    folded_into: str = ""  # the name of the convolution
    in_place: bool = False
    reason: str = ""  # if nothing of it
