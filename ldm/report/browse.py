"""Run folders as one page to look at, from disk and without a server: python -m ldm.report.browse RUNS... [out=runs.html] [points=400]

RUNS: run folders, or folders of them.  The page holds loss curves, sample grids over training, a metrics table that sorts, and the keys in
which the configs differ; pictures and all are inside the file, and it asks no network for anything.

  out=runs.html    the file that is written
  points=400       of a curve at the most; a longer one is thinned, its first and last points kept
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
from ldm.runs import identity
from ldm.runs.metrics_log import read_metrics_log

KEYS = ("out", "points")
MAX_GRIDS = 12  # grids of a run at the most, spread over its training
IGNORED_KEYS = ("runs", "name", "logger")  # keys that say nothing of a result


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds, as far as it can be read; faults: what cannot, each in one line."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    metrics_log: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Any] | None = None
    grids: Sequence[tuple[str, bytes]] = ()
    problems: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.folder.name


def read_run(folder: Path) -> RunRecord:
    """A run folder, never raising for what is in it."""
    faults: list[str] = []

    def part(name: str, how: Any, otherwise: Any, kind: type, needed: bool) -> Any:
        if not needed and not (folder / name).is_file():
            return otherwise
        try:
            value = how(folder / name)
            if not isinstance(value, kind):
                raise ValueError(f"holds {type(value).__name__}, expected {kind.__name__}")
            return value
        except (OSError, ValueError) as error:
            said = " ".join(str(error).split())
            faults.append(said if name in said else f"{name}: {said}")
            return otherwise

    config = part("config.yaml", serialize.load_config, {}, dict, True)
    choices = part("choices.json", _json, {}, dict, False)
    journal = part("metrics.jsonl", read_metrics_log, [], list, False)
    metrics = part("metrics.json", _json, None, dict, False)
    if not journal:
        faults.append("metrics.jsonl: no row yet")
    if metrics is None and not any(fault.startswith("metrics.json:") for fault in faults):
        faults.append("metrics.json: not there, the run has not finished")
    return RunRecord(folder, config, choices, journal, metrics, _grids(folder, faults), faults)


def _json(path: Path) -> Any:
    return parse_json(path.read_text(encoding="utf-8"))


def _grids(folder: Path, faults: list[str]) -> list[tuple[str, bytes]]:
    """(name, PNG) of the grids over training, then of the last samples."""
    files = sorted((folder / "grids").glob("*.png"))
    some = (
        [files[round(i * (len(files) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
        if len(files) > MAX_GRIDS
        else files
    )
    found = []
    for file in [*some, *(last for last in [folder / "samples.png"] if last.is_file())]:
        try:
            data = file.read_bytes()
        except OSError as error:
            faults.append(f"{file.name}: {error}")
            continue
        if data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82"):
            found.append((file.stem, data))
        else:
            faults.append(f"{file.relative_to(folder)}: not a whole PNG")
    return found


def find_runs(places: Sequence[str]) -> list[Path]:
    """The run folders that the places are or hold, at any depth but within no run. Raises UserError for a place without any."""
    folders: list[Path] = []
    for place in places:
        path = Path(place).expanduser()
        if not path.is_dir():
            raise UserError(f"{place}: no such folder; expected one that train.py made, or one of such")
        here = _runs_below(path)
        if not here:
            raise UserError(f"{place}: no run in it (no folder with config.yaml or metrics.jsonl)")
        folders += [folder for folder in here if folder not in folders]
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


def metric_curves(journal: Sequence[Mapping[str, Any]], points: int) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) of every finite number that a journal holds twice or more, thinned to `points`."""
    every: dict[str, list[tuple[float, float]]] = {}
    for row in journal:
        for name, value in row.items():
            if name not in ("step", "wall") and _number(value) and _number(row["step"]):
                every.setdefault(name, []).append((row["step"], value))
    return {name: _downsample(sorted(line), points) for name, line in every.items() if len(line) > 1}


def _downsample(line: list[tuple[float, float]], points: int) -> list[tuple[float, float]]:
    if len(line) <= points:
        return line
    return [line[round(i * (len(line) - 1) / (points - 1))] for i in range(points)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def config_differences(shown: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """Each key of the choices and the configs whose value is not the same in all runs that have a config, with its values."""
    flats = [
        {**{f"choice {k}": v for k, v in run.choices.items()}, **flatten(identity.drop_keys(run.config, IGNORED_KEYS))}
        for run in shown
    ]
    keys = sorted({key for one in flats for key in one}, key=lambda key: (not key.startswith("choice "), key))
    rows = [(key, [one.get(key, "absent") for one in flats]) for key in keys]
    return [(key, values) for key, values in rows if len({json.dumps(value, default=str) for value in values}) > 1]


def format_cell_html(value: Any) -> str:
    """A value for people, escaped."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def render_page(shown: Sequence[RunRecord], points: int = 400) -> str:
    """The whole page of some runs, HTML."""
    names = [run.name for run in shown]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>runs</title>'
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head += f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style>'
    count = f"{len(shown)} run{'s' if len(shown) != 1 else ''}"
    body = [
        f"<h1>Runs</h1><p class='soft'>{count} from {format_cell_html(', '.join(sorted({str(run.folder.parent) for run in shown})))}</p>"
    ]
    body += [_table(shown), _differences(shown), _curves(shown, names, points), _sample_grids(shown), _problems(shown)]
    main, script = f"<main>{''.join(body)}</main>", f"<script>{SORT_SCRIPT}{TOGGLE_SCRIPT}</script>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{main}{script}</body></html>\n"


def _table(shown: Sequence[RunRecord]) -> str:
    """Metrics, a row a run; scores first, what was measured beside them after."""
    columns = list(
        dict.fromkeys(key for run in shown for key, value in flatten(run.metrics or {}).items() if _number(value))
    )
    columns.sort(key=lambda key: "/" in key or "." in key)
    heads = "".join(f'<th class="number"><button>{escape(key)}</button></th>' for key in columns)
    rows = []
    for number, run in enumerate(shown):
        values = flatten(run.metrics or {})
        step = max((row["step"] for row in run.metrics_log if _number(row["step"])), default=None)
        cells = "".join(_cell(values.get(key)) for key in columns)
        state = "finished" if run.metrics is not None else "not finished"
        rows.append(
            f"<tr><th scope='row'>{swatch(number)} {format_cell_html(run.name)}</th><td>{state}</td>{_cell(step)}{cells}</tr>"
        )
    first = '<th><button>run</button></th><th><button>state</button></th><th class="number"><button>step</button></th>'
    table = f'<table class="sortable"><thead><tr>{first}{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<h2>Metrics</h2><div class="wide">{table}</div>'


def _cell(value: Any) -> str:
    return (
        f'<td class="number" data-value="{value!r}">{format_cell_html(value)}</td>'
        if _number(value)
        else '<td class="number"></td>'
    )


def _differences(shown: Sequence[RunRecord]) -> str:
    known = [run for run in shown if run.config]
    rows = config_differences(known)
    if len(known) < 2 or not rows:
        return f"<h2>Configs</h2><p class='soft'>{'The runs have one and the same.' if len(known) > 1 else 'One run: nothing to compare.'}</p>"
    heads = "".join(f"<th>{swatch(shown.index(run))} {format_cell_html(run.name)}</th>" for run in known)
    lines = []
    for key, values in rows:
        first = json.dumps(values[0], default=str)
        cells = "".join(
            f"<td{' class=other' if json.dumps(value, default=str) != first else ''}>{format_cell_html(value)}</td>"
            for value in values
        )
        lines.append(f"<tr><th scope='row'>{format_cell_html(key)}</th>{cells}</tr>")
    about = "<p class='soft'>Keys that are not the same in all runs; marked where a run differs from the first.</p>"
    table = f"<table><thead><tr><th>key</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h2>Configs</h2>{about}<div class="wide">{table}</div>'


def _curves(shown: Sequence[RunRecord], names: Sequence[str], points: int) -> str:
    lines: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for number, run in enumerate(shown):
        for name, line in metric_curves(run.metrics_log, points).items():
            lines.setdefault(name, {})[number] = line
    order = sorted(lines, key=lambda name: (name != "train/loss", name.startswith("perf/"), name))
    picks = "".join(
        f'<label>{swatch(i)} <input type="checkbox" data-run="{i}" checked> {format_cell_html(name)}</label>'
        for i, name in enumerate(names)
    )
    charts = "".join(chart(name, lines[name], names) for name in order)
    return f'<h2>Curves</h2><div class="picks">{picks}</div><div class="charts">{charts}</div>'


def _sample_grids(shown: Sequence[RunRecord]) -> str:
    parts = []
    for number, run in enumerate(shown):
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
        caption = f"<figcaption>{swatch(number)} {format_cell_html(run.name)}<br><output>{format_cell_html(run.grids[-1][0])}</output></figcaption>"
        parts.append(f'<figure class="grids">{caption}{slider}{images}</figure>')
    return f'<h2>Samples over training</h2><div class="samples">{"".join(parts)}</div>' if parts else ""


def _problems(shown: Sequence[RunRecord]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{format_cell_html(run.name)}</th><td>{'<br>'.join(map(format_cell_html, run.problems))}</td></tr>"
        for run in shown
        if run.problems
    )
    return (
        f'<h2>Broken or not finished</h2><div class="wide"><table><tbody>{rows}</tbody></table></div>' if rows else ""
    )


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    given, places = {"out": "runs.html", "points": "400"}, []
    for word in argv:
        name, sign, value = word.partition("=")
        if not sign or Path(word).expanduser().is_dir():
            places.append(word)
        elif name not in KEYS:
            raise UserError(f"{word}: no key {name!r}{did_you_mean(name, KEYS)} (one of {', '.join(KEYS)})")
        else:
            given[name] = value
    if not given["points"].isdigit() or int(given["points"]) < 2:
        raise UserError(f"points={given['points']}: expected a whole number, 2 or more")
    if not places:
        raise UserError("which runs? python -m ldm.report.browse RUNS... (see --help)")
    folders, shown = find_runs(places), []
    bar = ProgressBar("browse", len(folders), unit="runs")
    for folder in folders:
        shown.append(read_run(folder))
        bar.update(len(shown))
    out = Path(given["out"]).expanduser()
    atomic.write_text(out, render_page(shown, int(given["points"])))
    print(
        f"{out}: {len(shown)} run{'s' if len(shown) != 1 else ''}, {out.stat().st_size / 1000:.0f} kB; open it in a browser"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
