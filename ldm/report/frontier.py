"""Evaluate trained runs at many sampling settings (points).

python -m ldm.report.frontier [experiments/STUDY] run=RUN[,RUN] [key=value,value] [out=FILE]

A point is what sample.py generates and scores with the same arguments: sampler, steps, eta, guidance, weights. All
points use the same seeds, hence the same initial noise. The points are every combination of the values in each entry of
the study's points.yaml, or of the typed values, which also replace those of the file. A row is added to the csv as soon
as its point is done; a command that is started again computes only the missing points.

  run=RUN,RUN      run folders of train.py, distinguished by their seeds in the table
  out=FILE         the csv; by default the study's results.csv, or frontier.csv in the (first) run's folder; a figure is
                   written next to it
  key=value,value  keys of sample.py, as in:
                   python -m ldm.report.frontier run=runs/a guidance.scale=1,2,4 sampler=ddim,dpmpp_2m steps=8,16
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


# Unless a study or the command line sets them.
DEFAULTS = {
    "num": "1000",
    "seed": "3000000",
    "batch_size": "250",
    "metrics": "full",
    "save": "none",
}
IRRELEVANT_KEYS = (
    "run",
    "output_dir",
    "save",
    "batch_size",
    "trainer",
)  # of a request: they change neither images nor scores


def to_overrides(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return plain YAML data as command-line overrides, key -> value."""
    return {key: "null" if value is None else rows.format_cell(value) for key, value in entry.items()}


def sampling_points(path: Path | None, typed: Mapping[str, str]) -> tuple[list[compose.ComposedJob], list[str]]:
    """Compose the points of a points.yaml (None: only of the typed keys).

    Returns the points and the keys that distinguish them.  Raises UserError.
    """
    try:
        spec: Any = {} if path is None else parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    entries = spec.pop("points", [{}]) if isinstance(spec, dict) else None
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise UserError(
            f"{path}: expected keys of sample.py and `points`, a list of such keys with their values: steps: 5,10,20"
        )
    every = [{**DEFAULTS, **to_overrides(spec), **to_overrides(entry), **typed} for entry in entries]
    keys = list(dict.fromkeys(key for entry in (*entries, typed) for key in entry if key not in DEFAULTS))
    points = [
        job
        for words in every
        for job in compose.compose_jobs("sample", [f"{key}={value}" for key, value in words.items()])
    ]
    return points, keys


def point_id(job: compose.ComposedJob) -> str:
    """Return the id of a point, the same for every run: 12 hex digits of the hash of its overrides."""
    return hash_config(sorted(word for word in job.overrides if word.partition("=")[0] not in IRRELEVANT_KEYS))[:12]


@contextmanager
def count_evaluations(net: "nn.Module") -> Iterator[list[int]]:
    """Record the batch size of each forward pass of a network in the yielded list."""
    sizes: list[int] = []
    hook = net.register_forward_hook(lambda net, inputs, output: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def evaluate_points(run: str, points: Sequence[compose.ComposedJob], keys: Sequence[str], out: Path) -> int:
    """Generate and score a run's points that are not in the csv yet; return their number.

    keys: columns that distinguish the points.  Raises UserError.
    """
    from ldm.checkpoint import weights
    from ldm.evaluation import evaluator, samples
    from ldm.sampling import adapters
    from ldm.sampling.request import SampleRequest
    from ldm.sampling.run import generate_images

    requests = []
    for job in points:
        job.cfg.run, job.cfg.save = run, "none"
        requests.append(SampleRequest.from_config(job.cfg))
        if "_target_" not in job.cfg.metrics:
            raise UserError("metrics=none: a point must be scored; expected metrics=full or another option")
    source, done, scorers = requests[0].source, 0, {}
    for setup in dict.fromkeys(map(_model_setup, points)):  # load each model once
        group = [(job, request) for job, request in zip(points, requests, strict=True) if _model_setup(job) == setup]
        first = group[0][1]
        model = adapters.apply_adapters(source.load(first.weights), first.adapters, first.weights)
        identity = weights.hash_model(model)[:12]
        for job, request in group:
            point = {"point": point_id(job), "model": identity}
            if any(point.items() <= row.items() for row in rows.read(out)):
                continue
            start = time.monotonic()
            with count_evaluations(model.denoiser.net) as sizes:
                images = generate_images(model, request)
            metrics_key = hash_config(job.config["metrics"])
            if metrics_key not in scorers:
                make_scorer, _ = evaluator.make_scorer(source.config, request.metrics)
                scorers[metrics_key] = make_scorer()  # type: ignore[misc]
            values = samples.evaluate_with(request, images, scorers[metrics_key])
            row = {
                "run": source.folder.name,
                "seed": source.config.seed,
                **{key: job.lookup(key) for key in keys},
                "nfe": sum(sizes) / len(images),
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


def _model_setup(job: compose.ComposedJob) -> str:
    """Return the weights and adapters that a point is sampled with, as a key."""
    return rows.format_cell(
        [job.config["weights"], *(rows.format_cell(list(one.values())) for one in job.config["adapters"])]
    )


def format_numbers(values: Mapping[str, Any]) -> str:
    """Format the scores for printing."""
    numbers = {name: value for name, value in values.items() if isinstance(value, float) and "/" not in name}
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def plot_frontier(keys: Sequence[str], path: Path) -> None:
    """Plot a csv's distance over the number of evaluations (over recall if that is constant) as a PNG next to it."""
    from ldm.report import figure
    from ldm.report.study import Study

    results = rows.read(path)
    distance = next((name for name in results[0] if name.startswith("fd_")), None)
    if distance is None:
        return
    same = len({row["nfe"] for row in results}) == 1
    named = [key for key in keys if any(rows.parse_number(row.get(key)) is None for row in results)]
    axes = {"x": "recall" if same and "recall" in results[0] else "nfe", "y": distance, "line": ",".join(named)}
    metrics = dict.fromkeys((distance, "recall"))
    figure.write(
        Study(path.parent, path.stem, "", keys, metrics, {}, "reduced", figure=axes), results, path.with_suffix(".png")
    )
    print(path.with_suffix(".png"))


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code.  Raises UserError."""
    if {"--help", "-h"} & set(argv) or not argv:
        print(__doc__)
        return 0 if argv else 2
    typed: dict[str, str] = {}
    runs: list[str] = []
    points_file = None
    for word in argv:
        key, sign, value = word.partition("=")
        if not sign:
            points_file = Path(word).expanduser()
            points_file = points_file / "points.yaml" if points_file.is_dir() else points_file
            if not points_file.is_file():
                raise UserError(f"{word}: no points.yaml in it; expected a study's folder, or key=value (see --help)")
        elif key == "run":
            runs += value.split(",")
        else:
            typed[key] = value
    if not runs:
        raise UserError("run=... must be given (see --help)")
    out = typed.pop("out", None)
    points, keys = sampling_points(points_file, typed)
    default = points_file.parent / "results.csv" if points_file else find_run(runs[0]) / "frontier.csv"
    path = Path(out).expanduser() if out else default
    count = sum(evaluate_points(run, points, keys, path) for run in runs)
    total = len(points) * len(runs)
    if points_file is None:
        plot_frontier(keys, path)
    print(f"{path}: {total} points, {count} evaluated now, {total - count} before")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
