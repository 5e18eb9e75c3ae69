"""Run folders as one page to look at, from disk and without a server: python -m ldm.browse RUNS... [out=runs.html] [points=400]

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

from ldm import durable, runs
from ldm.argv import nearest
from ldm.command import guarded
from ldm.config_tree import flatten
from ldm.errors import UserError
from ldm.page import STYLE, TABLE, WATCH, chart, swatch
from ldm.parse import json_of
from ldm.progress import Bar

KEYS = ("out", "points")
PICTURES = 12  # grids of a run at the most, spread over its training
UNSEEN = ("runs", "name", "logger")  # keys that say nothing of a result


@dataclass(frozen=True)
class Run:
    """What a run folder holds, as far as it can be read; faults: what cannot, each in one line."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    journal: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Any] | None = None
    grids: Sequence[tuple[str, bytes]] = ()
    faults: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.folder.name


def read(folder: Path) -> Run:
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

    config = part("config.yaml", runs.load_config, {}, dict, True)
    choices = part("choices.json", _json, {}, dict, False)
    journal = part("metrics.jsonl", runs.read_journal, [], list, False)
    metrics = part("metrics.json", _json, None, dict, False)
    if not journal:
        faults.append("metrics.jsonl: no row yet")
    if metrics is None and not any(fault.startswith("metrics.json:") for fault in faults):
        faults.append("metrics.json: not there, the run has not finished")
    return Run(folder, config, choices, journal, metrics, _grids(folder, faults), faults)


def _json(path: Path) -> Any:
    return json_of(path.read_text(encoding="utf-8"))


def _grids(folder: Path, faults: list[str]) -> list[tuple[str, bytes]]:
    """(name, PNG) of the grids over training, then of the last samples."""
    files = sorted((folder / "grids").glob("*.png"))
    some = [files[round(i * (len(files) - 1) / (PICTURES - 1))] for i in range(PICTURES)] if len(files) > PICTURES else files
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


def found(places: Sequence[str]) -> list[Path]:
    """The run folders that the places are or hold, at any depth but within no run. Raises UserError for a place without any."""
    folders: list[Path] = []
    for place in places:
        path = Path(place).expanduser()
        if not path.is_dir():
            raise UserError(f"{place}: no such folder; expected one that train.py made, or one of such")
        here = _within(path)
        if not here:
            raise UserError(f"{place}: no run in it (no folder with config.yaml or metrics.jsonl)")
        folders += [folder for folder in here if folder not in folders]
    return folders


def _within(path: Path) -> list[Path]:
    if (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file():
        return [path]
    return [run for inner in sorted(path.iterdir()) if inner.is_dir() and not inner.name.startswith(".") for run in _within(inner)]


def curves(journal: Sequence[Mapping[str, Any]], points: int) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) of every finite number that a journal holds twice or more, thinned to `points`."""
    every: dict[str, list[tuple[float, float]]] = {}
    for row in journal:
        for name, value in row.items():
            if name not in ("step", "wall") and _number(value) and _number(row["step"]):
                every.setdefault(name, []).append((row["step"], value))
    return {name: _thinned(sorted(line), points) for name, line in every.items() if len(line) > 1}


def _thinned(line: list[tuple[float, float]], points: int) -> list[tuple[float, float]]:
    if len(line) <= points:
        return line
    return [line[round(i * (len(line) - 1) / (points - 1))] for i in range(points)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def differing(shown: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Each key of the choices and the configs whose value is not the same in all runs that have a config, with its values."""
    flats = [{**{f"choice {k}": v for k, v in run.choices.items()}, **flatten(runs.without(run.config, UNSEEN))} for run in shown]
    keys = sorted({key for one in flats for key in one}, key=lambda key: (not key.startswith("choice "), key))
    rows = [(key, [one.get(key, "absent") for one in flats]) for key in keys]
    return [(key, values) for key, values in rows if len({json.dumps(value, default=str) for value in values}) > 1]


def text(value: Any) -> str:
    """A value for people, escaped."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def page(shown: Sequence[Run], points: int = 400) -> str:
    """The whole page of some runs, HTML."""
    names = [run.name for run in shown]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>runs</title>'
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head += f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style>'
    count = f"{len(shown)} run{'s' if len(shown) != 1 else ''}"
    body = [f"<h1>Runs</h1><p class='soft'>{count} from {text(', '.join(sorted({str(run.folder.parent) for run in shown})))}</p>"]
    body += [_table(shown), _differences(shown), _curves(shown, names, points), _pictures(shown), _faults(shown)]
    main, script = f"<main>{''.join(body)}</main>", f"<script>{TABLE}{WATCH}</script>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{main}{script}</body></html>\n"


def _table(shown: Sequence[Run]) -> str:
    """Metrics, a row a run; scores first, what was measured beside them after."""
    columns = list(dict.fromkeys(key for run in shown for key, value in flatten(run.metrics or {}).items() if _number(value)))
    columns.sort(key=lambda key: "/" in key or "." in key)
    heads = "".join(f'<th class="number"><button>{escape(key)}</button></th>' for key in columns)
    rows = []
    for number, run in enumerate(shown):
        values = flatten(run.metrics or {})
        step = max((row["step"] for row in run.journal if _number(row["step"])), default=None)
        cells = "".join(_cell(values.get(key)) for key in columns)
        state = "finished" if run.metrics is not None else "not finished"
        rows.append(f"<tr><th scope='row'>{swatch(number)} {text(run.name)}</th><td>{state}</td>{_cell(step)}{cells}</tr>")
    first = '<th><button>run</button></th><th><button>state</button></th><th class="number"><button>step</button></th>'
    table = f'<table class="sortable"><thead><tr>{first}{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<h2>Metrics</h2><div class="wide">{table}</div>'


def _cell(value: Any) -> str:
    return f'<td class="number" data-value="{value!r}">{text(value)}</td>' if _number(value) else '<td class="number"></td>'


def _differences(shown: Sequence[Run]) -> str:
    known = [run for run in shown if run.config]
    rows = differing(known)
    if len(known) < 2 or not rows:
        return (
            f"<h2>Configs</h2><p class='soft'>{'The runs have one and the same.' if len(known) > 1 else 'One run: nothing to compare.'}</p>"
        )
    heads = "".join(f"<th>{swatch(shown.index(run))} {text(run.name)}</th>" for run in known)
    lines = []
    for key, values in rows:
        first = json.dumps(values[0], default=str)
        cells = "".join(f"<td{' class=other' if json.dumps(value, default=str) != first else ''}>{text(value)}</td>" for value in values)
        lines.append(f"<tr><th scope='row'>{text(key)}</th>{cells}</tr>")
    about = "<p class='soft'>Keys that are not the same in all runs; marked where a run differs from the first.</p>"
    table = f"<table><thead><tr><th>key</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h2>Configs</h2>{about}<div class="wide">{table}</div>'


def _curves(shown: Sequence[Run], names: Sequence[str], points: int) -> str:
    lines: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for number, run in enumerate(shown):
        for name, line in curves(run.journal, points).items():
            lines.setdefault(name, {})[number] = line
    order = sorted(lines, key=lambda name: (name != "train/loss", name.startswith("perf/"), name))
    picks = "".join(
        f'<label>{swatch(i)} <input type="checkbox" data-run="{i}" checked> {text(name)}</label>' for i, name in enumerate(names)
    )
    charts = "".join(chart(name, lines[name], names) for name in order)
    return f'<h2>Curves</h2><div class="picks">{picks}</div><div class="charts">{charts}</div>'


def _pictures(shown: Sequence[Run]) -> str:
    parts = []
    for number, run in enumerate(shown):
        if not run.grids:
            continue
        last = len(run.grids) - 1
        images = ""
        for i, (name, data) in enumerate(run.grids):
            source = f"data:image/png;base64,{b64encode(data).decode()}"
            images += f'<img alt="{escape(name)}" src="{source}"{"" if i == last else " hidden"}>'
        slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="grid of {escape(run.name)}">' if last else ""
        caption = f"<figcaption>{swatch(number)} {text(run.name)}<br><output>{text(run.grids[-1][0])}</output></figcaption>"
        parts.append(f'<figure class="grids">{caption}{slider}{images}</figure>')
    return f'<h2>Samples over training</h2><div class="samples">{"".join(parts)}</div>' if parts else ""


def _faults(shown: Sequence[Run]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{text(run.name)}</th><td>{'<br>'.join(map(text, run.faults))}</td></tr>" for run in shown if run.faults
    )
    return f'<h2>Broken or not finished</h2><div class="wide"><table><tbody>{rows}</tbody></table></div>' if rows else ""


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
            raise UserError(f"{word}: no key {name!r}{nearest(name, KEYS)} (one of {', '.join(KEYS)})")
        else:
            given[name] = value
    if not given["points"].isdigit() or int(given["points"]) < 2:
        raise UserError(f"points={given['points']}: expected a whole number, 2 or more")
    if not places:
        raise UserError("which runs? python -m ldm.browse RUNS... (see --help)")
    folders, shown = found(places), []
    bar = Bar("browse", len(folders), unit="runs")
    for folder in folders:
        shown.append(read(folder))
        bar.at(len(shown))
    out = Path(given["out"]).expanduser()
    durable.write_text(out, page(shown, int(given["points"])))
    print(f"{out}: {len(shown)} run{'s' if len(shown) != 1 else ''}, {out.stat().st_size / 1000:.0f} kB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
