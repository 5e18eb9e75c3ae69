"""Trained runs measured at many points of sampling: python -m ldm.report.frontier [experiments/STUDY] run=RUN[,RUN] [key=value,value] [out=FILE]

A point is what sample.py draws and scores with the same words: sampler, steps, eta, guidance, weights. All have the same seeds, so they
begin at the same noise.  The points are those of the study's points.yaml, every combination of what stands in one of its entries, or of
what is typed; what is typed also takes the place of what the file says.  A row of the csv is added as soon as its point is done, and a
command started again draws what is missing.

  run=RUN,RUN      run folders that train.py made; the table tells them apart by their seeds
  out=FILE         the csv; by default the study's results.csv, or frontier.csv in the (first) run's folder, a figure beside it
  key=value,value  of sample.py, as in: python -m ldm.report.frontier run=runs/a guidance.scale=1,2,4 sampler=ddim,dpmpp_2m steps=8,16
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.errors import run_guarded
from ldm.config import compose
from ldm.errors import UserError
from ldm.io.parse import parse_yaml
from ldm.report import rows
from ldm.runs import provenance
from ldm.runs.folder import find_run
from ldm.runs.identity import hash_config

if TYPE_CHECKING:
    from torch import nn


DEFAULTS = {
    "num": "1000",
    "seed": "3000000",
    "batch_size": "250",
    "metrics": "full",
    "save": "none",
}  # unless a study or a person says else
IRRELEVANT_KEYS = ("run", "output_dir", "save", "batch_size", "trainer")  # of a request: what changes no image and no number


def to_overrides(entry: Mapping[str, Any]) -> dict[str, str]:
    """key -> value as one types it, of plain yaml data."""
    return {key: "null" if value is None else rows.format_cell(value) for key, value in entry.items()}


def sampling_points(place: Path | None, typed: Mapping[str, str]) -> tuple[list[compose.ComposedJob], list[str]]:
    """The points of a points.yaml, None for what is typed alone, and the keys that tell them apart. Raises UserError."""
    try:
        said: Any = {} if place is None else parse_yaml(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{place} cannot be read: {error}") from None
    entries = said.pop("points", [{}]) if isinstance(said, dict) else None
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise UserError(
            f"{place}: expected keys of sample.py and `points`, a list of such keys with their values: steps: 5,10,20"
        )
    every = [{**DEFAULTS, **to_overrides(said), **to_overrides(entry), **typed} for entry in entries]
    keys = list(dict.fromkeys(key for entry in (*entries, typed) for key in entry if key not in DEFAULTS))
    found = [
        job
        for words in every
        for job in compose.compose_jobs("sample", [f"{key}={value}" for key, value in words.items()])
    ]
    return found, keys


def point_id(job: compose.ComposedJob) -> str:
    """What a point is known by, wherever it is drawn: the hash of its words, 12 hex digits."""
    return hash_config(sorted(word for word in job.overrides if word.partition("=")[0] not in IRRELEVANT_KEYS))[:12]


@contextmanager
def count_evaluations(net: "nn.Module") -> Iterator[list[int]]:
    """Within it, a list grows by the images of each evaluation of a network."""
    seen: list[int] = []
    hook = net.register_forward_hook(lambda net, given, out: seen.append(len(given[0])))
    try:
        yield seen
    finally:
        hook.remove()


def evaluate_points(run: str, wanted: Sequence[compose.ComposedJob], keys: Sequence[str], out: Path) -> int:
    """Draw and score a run's points that are not in the csv yet; returns how many that were. Raises UserError."""
    from ldm.checkpoint import weights
    from ldm.evaluation import evaluator, samples
    from ldm.sampling import adapters
    from ldm.sampling.request import SampleRequest
    from ldm.sampling.run import generate_images

    requests = []
    for job in wanted:
        job.cfg.run, job.cfg.save = run, "none"
        requests.append(SampleRequest.from_config(job.cfg))
        if "_target_" not in job.cfg.metrics:
            raise UserError("metrics=none: a point is measured; expected metrics=full or another")
    source, done, made = requests[0].source, 0, {}
    for worn in dict.fromkeys(
        _with_adapters(job) for job in wanted
    ):  # a model is loaded once, and its points are drawn one after another
        some = [(job, request) for job, request in zip(wanted, requests, strict=True) if _with_adapters(job) == worn]
        first = some[0][1]
        model = adapters.apply_adapters(source.load(first.weights), first.adapters, first.weights)
        identity = weights.hash_model(model)[:12]
        for job, request in some:
            point = {"point": point_id(job), "model": identity}
            if any(point.items() <= row.items() for row in rows.read(out)):
                continue
            start = time.monotonic()
            with count_evaluations(model.denoiser.net) as seen:
                images = generate_images(model, request)
            measured = hash_config(job.config["metrics"])
            if measured not in made:
                make, _ = evaluator.make_scorer(source.config, request.metrics)
                made[measured] = make()  # type: ignore[misc]
            values = samples.evaluate_with(request, images, made[measured])
            row = {
                "run": source.folder.name,
                "seed": source.config.seed,
                **{key: job.lookup(key) for key in keys},
                "nfe": sum(seen) / len(images),
            }
            row |= {
                **values,
                "seconds": time.monotonic() - start,
                "commit": provenance.git_commit(Path(__file__).parent),
                **point,
            }
            rows.append(out, row)
            done += 1
            print(
                "  ".join(f"{key} {rows.format_cell(row[key])}" for key in ("run", *keys, "nfe"))
                + f"  {format_numbers(values)}",
                flush=True,
            )
    return done


def _with_adapters(job: compose.ComposedJob) -> str:
    """Which weights a point is drawn with, and which adapters."""
    return rows.format_cell(
        [job.config["weights"], *(rows.format_cell(list(one.values())) for one in job.config["adapters"])]
    )


def format_numbers(values: Mapping[str, Any]) -> str:
    """The numbers for people."""
    numbers = {name: value for name, value in values.items() if isinstance(value, float) and "/" not in name}
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def plot_frontier(keys: Sequence[str], path: Path) -> None:
    """The distance of the points in a csv over their evaluations, or over recall where these are the same, as a PNG beside it."""
    from ldm.report import figure
    from ldm.report.study import Study

    found = rows.read(path)
    distance = next((name for name in found[0] if name.startswith("fd_")), None)
    if distance is None:
        return
    same = len({row["nfe"] for row in found}) == 1
    named = [key for key in keys if any(rows.parse_number(row.get(key)) is None for row in found)]
    shown = {"x": "recall" if same and "recall" in found[0] else "nfe", "y": distance, "line": ",".join(named)}
    metrics = dict.fromkeys((distance, "recall"))
    figure.write(
        Study(path.parent, path.stem, "", keys, metrics, {}, "reduced", figure=shown), found, path.with_suffix(".png")
    )
    print(path.with_suffix(".png"))


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    if {"--help", "-h"} & set(argv) or not argv:
        print(__doc__)
        return 0 if argv else 2
    typed: dict[str, str] = {}
    given: list[str] = []
    place = None
    for word in argv:
        key, sign, value = word.partition("=")
        if not sign:
            place = Path(word).expanduser()
            place = place / "points.yaml" if place.is_dir() else place
            if not place.is_file():
                raise UserError(f"{word}: no points.yaml there; expected a study's folder, or key=value (see --help)")
        elif key == "run":
            given += value.split(",")
        else:
            typed[key] = value
    if not given:
        raise UserError("run=... must be given (see --help)")
    home = typed.pop("out", None)
    wanted, keys = sampling_points(place, typed)
    own = place.parent / "results.csv" if place else find_run(given[0]) / "frontier.csv"
    out = Path(home).expanduser() if home else own
    drawn = [evaluate_points(run, wanted, keys, out) for run in given]
    total = len(wanted) * len(given)
    if place is None:
        plot_frontier(keys, out)
    print(f"{out}: {total} points, {sum(drawn)} of them drawn now, {total - sum(drawn)} before")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
