"""Estimate the cost of a training without running it.

python -m ldm.plan [arguments of train.py] [paper=PRESET] [throughput=N] [batches=1,8] [json=FILE]

The model is built on the meta device: parameters, FLOPs, memory and disk space follow from the config, and no weight is
allocated.

  paper=PRESET      the preset to compare with; by default that of preset=
  throughput=N      measured training speed of one device in images per second: gives device-hours
  batches=1,8       batch sizes per device to list in addition to the config's own
  json=FILE         write all figures, including those that the table leaves out
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ldm.cli.errors import run_guarded
from ldm.config.overrides import ConfigSearchPath, format_choices
from ldm.errors import UserError
from ldm.io import atomic
from ldm.plan.config import ROOT, composed, differences
from ldm.plan.cost import PlanResult, estimate
from ldm.plan.data_info import card_of
from ldm.plan.table import table

KEYS = ("paper", "throughput", "batches", "json")


def split_args(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the command line into the planner's own keys and the arguments of train.py."""
    pairs = [(word.partition("="), word) for word in argv]
    return {name: value for (name, _, value), _ in pairs if name in KEYS}, [
        word for (name, _, _), word in pairs if name not in KEYS
    ]


def parse_positive(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    """Parse a positive number.  Raises UserError otherwise."""
    try:
        if (value := kind(text)) > 0:
            return value
    except ValueError:
        pass
    raise UserError(f"{name}={text}: expected a number above 0")


def plan(argv: Sequence[str]) -> PlanResult:
    """Compute the figures for a command line.  Raises UserError."""
    options, typed = split_args(argv)
    throughput = parse_positive("throughput", options["throughput"], float) if "throughput" in options else None
    batches = (
        [parse_positive("batches", one, int) for one in options["batches"].split(",")] if "batches" in options else [1]
    )
    chosen = next((word.partition("=")[2] for word in reversed(typed) if word.startswith("preset=")), None)
    paper = options.get("paper", chosen)
    presets = ConfigSearchPath((ROOT / "conf",), ROOT).groups()["preset"]
    if paper not in (None, "null", *presets):
        raise UserError(f"paper={paper}: no such preset{format_choices(presets, 60)}")
    cfg, published = composed(typed)
    result = estimate(cfg, card_of(cfg, published), batches)
    result.throughput = throughput
    result.differences = differences(cfg, paper) if paper not in (None, "null") else []
    if "json" in options:
        atomic.write_json(
            options["json"], {**asdict(result), "images": result.images, "device_hours": result.device_hours}
        )
    return result


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    print(table(plan(argv)))
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # warnings about missing weights, which are intended here
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
