"""Write run folders as one HTML page that opens without a server.

python -m ldm.report.browse RUNS... [out=runs.html] [points=400]

RUNS: run folders, or folders that contain them. The page has loss curves, those of validation also by noise level,
sample grids over training, with sounds and clips of the last, a sortable table of metrics, and the config keys that
differ. Images, sounds and clips are embedded in the file; it loads nothing from a network.

  out=runs.html    the file to write
  points=400       maximum points per curve; a longer one is thinned, keeping its first and last point
"""

import json
import math
import sys
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ldm.cli.errors import run_guarded
from ldm.config import serialize
from ldm.config.overrides import did_you_mean
from ldm.config.tree import flatten
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.parse import parse_json
from ldm.io.progress import ProgressBar
from ldm.report.html import SORT_SCRIPT, STYLE, TOGGLE_SCRIPT, chart, swatch
from ldm.report.noise_levels import is_level, render_levels
from ldm.report.sample_files import read_grids, read_players
from ldm.runs import identity
from ldm.runs.metrics_log import read_metrics_log

KEYS = ("out", "points")
IGNORED_KEYS = ("runs", "name", "logger")  # keys that do not affect the result


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder as far as it can be read; problems: one line for everything that cannot."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    metrics_log: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Any] | None = None
    grids: Sequence[tuple[str, bytes]] = ()
    players: Sequence[str] = ()  # HTML of each sample whose files are beside the last grid
    problems: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.folder.name


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; problems with its content are recorded, not raised."""
    problems: list[str] = []

    def read_part(name: str, read: Any, default: Any, kind: type, required: bool) -> Any:
        if not required and not (folder / name).is_file():
            return default
        try:
            value = read(folder / name)
            if not isinstance(value, kind):
                raise ValueError(f"holds {type(value).__name__}, expected {kind.__name__}")
            return value
        except (OSError, ValueError) as error:
            message = " ".join(str(error).split())
            problems.append(message if name in message else f"{name}: {message}")
            return default

    config = read_part("config.yaml", serialize.load_config, {}, dict, True)
    choices = read_part("choices.json", _json, {}, dict, False)
    log = read_part("metrics.jsonl", read_metrics_log, [], list, False)
    metrics = read_part("metrics.json", _json, None, dict, False)
    if not log:
        problems.append("metrics.jsonl: no row yet")
    if metrics is None and not any(problem.startswith("metrics.json:") for problem in problems):
        problems.append("metrics.json: missing, the run has not finished")
    return RunRecord(
        folder, config, choices, log, metrics, read_grids(folder, problems), read_players(folder, problems), problems
    )


def _json(path: Path) -> Any:
    return parse_json(path.read_text(encoding="utf-8"))


def find_runs(paths: Sequence[str]) -> list[Path]:
    """List the run folders that the paths are or contain, at any depth, but not inside other runs.

    Raises UserError for a path without any.
    """
    folders: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if not path.is_dir():
            raise UserError(f"{name}: no such folder; expected a run folder of train.py, or a folder of runs")
        runs = _runs_below(path)
        if not runs:
            raise UserError(f"{name}: no run in it (no folder with config.yaml or metrics.jsonl)")
        folders += [folder for folder in runs if folder not in folders]
    return folders


def _runs_below(path: Path) -> list[Path]:
    if (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file():
        return [path]
    return [
        run
        for inner in sorted(path.iterdir())
        if inner.is_dir() and not inner.name.startswith(".")
        for run in _runs_below(inner)
    ]


def metric_curves(log: Sequence[Mapping[str, Any]], points: int) -> dict[str, list[tuple[float, float]]]:
    """Return name -> [(step, value)] of every finite number that a log has at least twice, thinned to `points`."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in log:
        for name, value in row.items():
            if name not in ("step", "wall") and is_finite_number(value) and is_finite_number(row["step"]):
                curves.setdefault(name, []).append((row["step"], value))
    return {name: _downsample(sorted(line), points) for name, line in curves.items() if len(line) > 1}


def _downsample(line: list[tuple[float, float]], points: int) -> list[tuple[float, float]]:
    if len(line) <= points:
        return line
    return [line[round(i * (len(line) - 1) / (points - 1))] for i in range(points)]


def is_finite_number(value: Any) -> bool:
    """Return whether a value is a finite int or float, not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def config_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """List each key of the choices and configs whose value differs between runs, with its values."""
    flat = [
        {**{f"choice {k}": v for k, v in run.choices.items()}, **flatten(identity.drop_keys(run.config, IGNORED_KEYS))}
        for run in runs
    ]
    keys = sorted({key for config in flat for key in config}, key=lambda key: (not key.startswith("choice "), key))
    rows = [(key, [config.get(key, "absent") for config in flat]) for key in keys]
    return [(key, values) for key, values in rows if len({json.dumps(value, default=str) for value in values}) > 1]


def format_cell_html(value: Any) -> str:
    """Format a value for reading, escaped for HTML."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def render_page(runs: Sequence[RunRecord], points: int = 400) -> str:
    """Render the HTML page of some runs; points: maximum per curve."""
    names = [run.name for run in runs]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>runs</title>'
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head += f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style>'
    count = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    folders = format_cell_html(", ".join(sorted({str(run.folder.parent) for run in runs})))
    body = [f"<h1>Runs</h1><p class='soft'>{count} from {folders}</p>"]
    body += [_table(runs), _differences(runs), _curves(runs, names, points), _sample_grids(runs), _problems(runs)]
    main, script = f"<main>{''.join(body)}</main>", f"<script>{SORT_SCRIPT}{TOGGLE_SCRIPT}</script>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{main}{script}</body></html>\n"


def _table(runs: Sequence[RunRecord]) -> str:
    """Render the metrics, one row per run; scores first, other numbers after them."""
    flat = [flatten(run.metrics or {}) for run in runs]
    columns = list(dict.fromkeys(key for row in flat for key, value in row.items() if is_finite_number(value)))
    columns.sort(key=lambda key: "/" in key or "." in key)
    heads = "".join(f'<th class="number"><button>{escape(key)}</button></th>' for key in columns)
    rows = []
    for number, run in enumerate(runs):
        values = flat[number]
        step = max((row["step"] for row in run.metrics_log if is_finite_number(row["step"])), default=None)
        cells = "".join(_cell(values.get(key)) for key in columns)
        state = "finished" if run.metrics is not None else "not finished"
        rows.append(
            f"<tr><th scope='row'>{swatch(number)} {format_cell_html(run.name)}</th>"
            f"<td>{state}</td>{_cell(step)}{cells}</tr>"
        )
    first = '<th><button>run</button></th><th><button>state</button></th><th class="number"><button>step</button></th>'
    table = f'<table class="sortable"><thead><tr>{first}{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<h2>Metrics</h2><div class="wide">{table}</div>'


def _cell(value: Any) -> str:
    return (
        f'<td class="number" data-value="{value!r}">{format_cell_html(value)}</td>'
        if is_finite_number(value)
        else '<td class="number"></td>'
    )


def _differences(runs: Sequence[RunRecord]) -> str:
    known = [run for run in runs if run.config]
    rows = config_differences(known)
    if len(known) < 2 or not rows:
        message = "The configs are equal." if len(known) > 1 else "One run: nothing to compare."
        return f"<h2>Configs</h2><p class='soft'>{message}</p>"
    heads = "".join(f"<th>{swatch(runs.index(run))} {format_cell_html(run.name)}</th>" for run in known)
    lines = []
    for key, values in rows:
        first = json.dumps(values[0], default=str)
        cells = "".join(
            f"<td{' class=other' if json.dumps(value, default=str) != first else ''}>{format_cell_html(value)}</td>"
            for value in values
        )
        lines.append(f"<tr><th scope='row'>{format_cell_html(key)}</th>{cells}</tr>")
    about = "<p class='soft'>Keys that differ between runs; marked where a run differs from the first.</p>"
    table = f"<table><thead><tr><th>key</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h2>Configs</h2>{about}<div class="wide">{table}</div>'


def _curves(runs: Sequence[RunRecord], names: Sequence[str], points: int) -> str:
    lines: dict[str, dict[int, list[tuple[float, float]]]] = {}
    curves = [metric_curves(run.metrics_log, points) for run in runs]
    for number, values in enumerate(curves):
        for name, line in values.items():
            if not is_level(name):
                lines.setdefault(name, {})[number] = line
    order = sorted(lines, key=lambda name: (name != "train/loss", name.startswith("perf/"), name))
    picks = "".join(
        f'<label>{swatch(i)} <input type="checkbox" data-run="{i}" checked> {format_cell_html(name)}</label>'
        for i, name in enumerate(names)
    )
    charts = "".join(chart(name, lines[name], names) for name in order)
    page = f'<h2>Curves</h2><div class="picks">{picks}</div><div class="charts">{charts}</div>'
    return page + render_levels(curves, names)


def _sample_grids(runs: Sequence[RunRecord]) -> str:
    parts = []
    for number, run in enumerate(runs):
        if not run.grids:
            continue
        last = len(run.grids) - 1
        images = ""
        for i, (name, data) in enumerate(run.grids):
            source = f"data:image/png;base64,{b64encode(data).decode()}"
            images += f'<img alt="{escape(name)}" src="{source}"{"" if i == last else " hidden"}>'
        slider = (
            f'<input type="range" min="0" max="{last}" value="{last}" aria-label="grid of {escape(run.name)}">'
            if last
            else ""
        )
        output = f"<output>{format_cell_html(run.grids[-1][0])}</output>"
        caption = f"<figcaption>{swatch(number)} {format_cell_html(run.name)}<br>{output}</figcaption>"
        players = "".join(f"<figure>{player}</figure>" for player in run.players)
        players = f'<div class="players">{players}</div>' if players else ""
        parts.append(f'<figure class="grids">{caption}{slider}{images}{players}</figure>')
    return f'<h2>Samples over training</h2><div class="samples">{"".join(parts)}</div>' if parts else ""


def _problems(runs: Sequence[RunRecord]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{format_cell_html(run.name)}</th>"
        f"<td>{'<br>'.join(map(format_cell_html, run.problems))}</td></tr>"
        for run in runs
        if run.problems
    )
    return (
        f'<h2>Broken or not finished</h2><div class="wide"><table><tbody>{rows}</tbody></table></div>' if rows else ""
    )


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code.  Raises UserError."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    options, paths = {"out": "runs.html", "points": "400"}, []
    for word in argv:
        name, sign, value = word.partition("=")
        if not sign or Path(word).expanduser().is_dir():
            paths.append(word)
        elif name not in KEYS:
            raise UserError(f"{word}: no key {name!r}{did_you_mean(name, KEYS)} (one of {', '.join(KEYS)})")
        else:
            options[name] = value
    if not options["points"].isdigit() or int(options["points"]) < 2:
        raise UserError(f"points={options['points']}: expected a whole number, 2 or more")
    if not paths:
        raise UserError("which runs? python -m ldm.report.browse RUNS... (see --help)")
    folders, records = find_runs(paths), []
    bar = ProgressBar("browse", len(folders), unit="runs")
    for folder in folders:
        records.append(read_run(folder))
        bar.update(len(records))
    out = Path(options["out"]).expanduser()
    atomic.write_text(out, render_page(records, int(options["points"])))
    print(
        f"{out}: {len(records)} run{'s' if len(records) != 1 else ''}, {out.stat().st_size / 1000:.0f} kB; "
        "open it in a browser"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
