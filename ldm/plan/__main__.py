"""Say what a training would cost before anything runs: python -m ldm.plan [what train.py takes] [paper=PRESET] [throughput=N] [json=FILE]

The model is built on the meta device: parameters, FLOPs, memory and disk are those of the config, and no weight exists.

  paper=PRESET      the preset to compare with; by default the one that preset= names
  throughput=N      images per second that one device trains on, measured by you: gives device-hours
  batches=1,8       batch sizes per device to list beside the config's own
  json=FILE         all figures, also those that the table leaves out
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

OWN = ("paper", "throughput", "batches", "json")


def split_args(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The plan's own keys, and what train.py takes."""
    pairs = [(word.partition("="), word) for word in argv]
    return {name: value for (name, _, value), _ in pairs if name in OWN}, [
        word for (name, _, _), word in pairs if name not in OWN
    ]


def parse_positive(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    """Raises UserError for what is no positive number."""
    try:
        if (value := kind(text)) > 0:
            return value
    except ValueError:
        pass
    raise UserError(f"{name}={text}: expected a number above 0")


def plan(argv: Sequence[str]) -> PlanResult:
    """The figures of a command line. Raises UserError."""
    asked, typed = split_args(argv)
    throughput = parse_positive("throughput", asked["throughput"], float) if "throughput" in asked else None
    batches = (
        [parse_positive("batches", one, int) for one in asked["batches"].split(",")] if "batches" in asked else [1]
    )
    chosen = next((word.partition("=")[2] for word in reversed(typed) if word.startswith("preset=")), None)
    paper = asked.get("paper", chosen)
    presets = ConfigSearchPath((ROOT / "conf",), ROOT).groups()["preset"]
    if paper not in (None, "null", *presets):
        raise UserError(f"paper={paper}: no such preset{format_choices(presets, 60)}")
    cfg, published = composed(typed)
    found = estimate(cfg, card_of(cfg, published), batches)
    found.throughput = throughput
    found.differences = differences(cfg, paper) if paper not in (None, "null") else []
    if "json" in asked:
        atomic.write_json(asked["json"], {**asdict(found), "images": found.images, "device_hours": found.device_hours})
    return found


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    print(table(plan(argv)))
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # that weights are missing: here they are to be
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
