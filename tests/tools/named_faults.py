"""Faults of the training and sampling path that are more than one flipped sign, each with the text that it replaces."""

import csv
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """name: what is wrong with it.  file: relative to ldm/.  function: with its class.  old: once in the function."""

    name: str
    file: str
    function: str
    old: str
    new: str


with (Path(__file__).parent / "named_faults.csv").open(newline="") as file:
    FAULTS = tuple(Fault(**row) for row in csv.DictReader(file))
