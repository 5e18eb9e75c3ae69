"""Forecasts of a chaotic field by three models: python experiments/kuramoto_sivashinsky/measure.py [runs=runs]
[seeds=0,1,2] [models=regression,diffusion,refiner] [steps=5000] ...

Trains what is missing, then rolls every kept checkpoint out over the held-out trajectories.  Writes, as soon as a row
is known, results.csv (a row for each model and seed), curve.csv (for each checkpoint) and solver.csv (the solver from
a wrong initial state), then figure.png and fields.png.  Started again it goes on with what is missing.  Other words go
to train.py.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ldm import plotting
from ldm.checkpoint.load import load_model
from ldm.data.kuramoto_sivashinsky import UNITS, solve
from ldm.diffusion import grids, sampler
from ldm.io import atomic
from ldm.metrics import forecast
from ldm.report import rows
from ldm.runs.folder import find_run
from ldm.sampling.forecast import Draw, change_sampler, rollout
from ldm.sampling.request import load_held_out
from ldm.tensors import KeyedNoise

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# model -> options of train.py, the sampler, and its evaluations of the network in one step of time
MODELS: Mapping[str, tuple[Sequence[str], Any, int]] = {
    "regression": (("process=regression",), sampler.ddpm, 1),
    "diffusion": (("process=cosine_v", "sampler=ddim"), sampler.ddim, 8),
    "refiner": (("process=pde_refiner",), sampler.ddpm, 4),
}
COLOURS = {"regression": plotting.BLUE, "diffusion": plotting.RED, "refiner": plotting.GREEN}
ERRORS = (1e-2, 1e-3, 1e-4)  # of the solver's initial state
MEMBERS, LEADS = 5, (10, 30, 60)  # of an ensemble; states after its start at which it is scored
SENSORS = (4, 8, 16)  # points at which each next state is known
OBSERVED = 60  # states of a rollout with sensors, of which the second half is scored
EVERY = 1000  # steps between checkpoints that are scored
LOW_WAVES = 30  # wave numbers of the spectrum error that have more than rounding noise
MakeDraw = Callable[..., Draw]  # (seeds, vector=..., observe=...) -> draw


def main(*words: str) -> None:
    torch.set_num_threads(1)
    options = {"runs": "runs", "seeds": "0,1,2", "models": ",".join(MODELS), "steps": "5000"}
    more = [word for word in words if word.partition("=")[0] not in options]
    options |= dict(word.split("=", 1) for word in words if word.partition("=")[0] in options)
    seeds, models, steps = options["seeds"].split(","), options["models"].split(","), options["steps"]
    for seed in seeds:
        shown = {}
        for name in models:
            folder = Path(options["runs"]) / f"kuramoto_sivashinsky-{name}-{seed}"
            often = (f"training.steps={steps}", f"training.sample_every={steps}")
            shown[name] = train(name, folder, [f"seed={seed}", *often, *more])
            data = load_held_out(shown[name])
            solver_times(data)
            measure_run(name, int(seed), shown[name], data)
        if seed == seeds[0]:
            fields({name: rolled_out(run) for name, run in shown.items()}, data).savefig(
                HERE / "fields.png", metadata={"Software": None}
            )
            drawn = {name: rolled_out(run) for name, run in shown.items()}
        figure(drawn, data).savefig(HERE / "figure.png", metadata={"Software": None})


def train(name: str, folder: Path, arguments: Sequence[str]) -> Path:
    """Train a model, in a folder of its own, unless it is trained; return its run.

    `seconds.json` in the run has the steps and the CPU seconds of the last command that trained it.
    """
    overrides, _, evaluations = MODELS[name]
    words = ["experiment=kuramoto_sivashinsky", *overrides, f"training.score.steps={evaluations}", f"runs={folder}"]
    words += arguments
    done, before = step_of(folder), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = find_run(folder)
    if (new := step_of(folder) - done) > 0:
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        atomic.write_json(run / "seconds.json", {"steps": new, "cpu_seconds": spent})
    return run


def step_of(folder: Path) -> int:
    """Return the last checkpoint's step of the run in a folder of runs, 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("*/checkpoints/step-*")), default=0)


def measure_run(name: str, seed: int, run: Path, data: Any) -> None:
    """Add the missing rows of a run: of each checkpoint to curve.csv, of the last to results.csv."""
    seconds = json.loads((run / "seconds.json").read_text()) if (run / "seconds.json").is_file() else None
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    for step in (step for step in steps if step % EVERY == 0 or step == steps[-1]):
        key = {"model": name, "seed": seed, "step": step}
        minutes = None if seconds is None else step * seconds["cpu_seconds"] / seconds["steps"] / 60
        make_draw = None
        for table, score in (("curve.csv", forecast_scores), ("results.csv", partial(all_scores, run=run))):
            if (table == "results.csv" and step != steps[-1]) or has_row(HERE / table, key):
                continue
            make_draw = make_draw or sampler_of(name, run / "checkpoints" / f"step-{step:08d}", data)
            add_row(HERE / table, {**key, "cpu_minutes": minutes, **score(make_draw, data)})


def sampler_of(name: str, checkpoint: Path, data: Any) -> MakeDraw:
    """Return a function that makes `draw` of a checkpoint for the seeds of its rows."""
    model, (_, method, evaluations) = load_model(checkpoint), MODELS[name]
    ts = grids.trailing(model.denoiser.schedule, evaluations)
    return partial(change_sampler, model, data.scale, ts=ts, sampler=method)


def forecast_scores(make_draw: MakeDraw, data: Any, keep: Path | None = None) -> dict[str, float]:
    """Roll out from the first state of every trajectory, and score the forecasts.

    time: mean over trajectories of the time until the correlation is below 0.8.  time_of_mean: until the mean
    correlation is.  one_step_rmse: from the true states, in units of u.  spectrum_low, spectrum_all: error of the log10
    spectrum in the second half, of the first wave numbers and of all.
    """
    truth = data.states.double()
    num, length = truth.shape[:2]
    drawn = rollout(make_draw(list(range(num))), truth[:, 0], length - 1)
    correlations = forecast.correlation(drawn, truth)
    chosen = range(0, length - 1, max(1, (length - 1) // 10))  # states from which a single step is scored
    before = truth[:, chosen].flatten(0, 1)
    after = before + make_draw(list(range(len(before))))(before, 0)
    late = [x[:, length // 2 :].nan_to_num(0.0, 0.0, 0.0) for x in (drawn, truth)]
    if keep is not None:
        atomic.write_tensors(keep, {"drawn": drawn.nan_to_num().float()})
    return {
        "time": float(forecast.correlation_time(correlations, data.interval).mean()),
        "time_of_mean": float(forecast.correlation_time(correlations.nan_to_num(-1).mean(0, True), data.interval)),
        "one_step_rmse": float(forecast.rmse(after, truth[:, [i + 1 for i in chosen]].flatten(0, 1))),
        "spectrum_low": float(forecast.log_spectrum_error(*late, LOW_WAVES)),
        "spectrum_all": float(forecast.log_spectrum_error(*late)),
    }


def all_scores(make_draw: MakeDraw, data: Any, run: Path) -> dict[str, float]:
    """Return the scores of a forecast, of an ensemble, and of forecasts that sensors correct."""
    scores = forecast_scores(make_draw, data, run / "measured" / "rollout.safetensors")
    return {**scores, **ensemble_scores(make_draw, data), **sensor_scores(make_draw, data)}


def ensemble_scores(make_draw: MakeDraw, data: Any) -> dict[str, float]:
    """Roll MEMBERS forecasts out of each first state; spread over error, error of the mean, fair CRPS, and one
    member's absolute error, named by the time since the start.
    """
    truth = data.states[:, : max(LEADS) + 1].double()
    num, scores = len(truth), {}
    drawn = rollout(make_draw(list(range(MEMBERS * num))), truth[:, 0].repeat(MEMBERS, 1, 1), truth.shape[1] - 1)
    members = drawn.unflatten(0, (MEMBERS, num))
    for lead in LEADS:
        at, exact = members[:, :, lead], truth[:, lead]
        ratio = forecast.spread_over_error(at, exact)
        values = {"spread_over_error": ratio, "crps": forecast.crps(at, exact).mean()}
        values["mean_rmse"] = forecast.rmse(at.mean(0), exact)
        values["absolute_error"] = (at[0] - exact).abs().mean()
        scores |= {f"{name}_{lead * data.interval:g}": float(value) for name, value in values.items()}
    return scores


def sensor_scores(make_draw: MakeDraw, data: Any) -> dict[str, float]:
    """Forecast with sensors at fixed points from a wrong first state, that of another trajectory: rmse late on."""
    truth, scores = data.states[:, : OBSERVED + 1].double(), {}
    num, points = len(truth), truth.shape[-1]
    for sensors in SENSORS:
        known = torch.zeros(num, 1, points, dtype=torch.bool)
        known[..., :: points // sensors] = True
        draw = make_draw(list(range(num)), observe=lambda step, known=known: (truth[:, step + 1], known))
        drawn = rollout(draw, truth[:, 0].roll(1, 0), truth.shape[1] - 1)
        half = truth.shape[1] // 2
        scores[f"rmse_sensors_{sensors}"] = float(forecast.rmse(drawn[:, half:].clamp(-9, 9), truth[:, half:]))
    return scores


def solver_times(data: Any) -> None:
    """Add the missing rows of solver.csv: correlation times of the solver from states with errors of ERRORS."""
    truth = data.states.double()[:, :, 0]
    for error in ERRORS:
        if has_row(HERE / "solver.csv", {"error": error}):
            continue
        noise = KeyedNoise(0, range(len(truth))).normal("solver", truth[:, 0])
        drawn = solved_from(data, truth[:, 0] + error * noise, truth.shape[1] - 1)
        correlations = forecast.correlation(drawn, data.states)
        time = float(forecast.correlation_time(correlations, data.interval).mean())
        of_mean = float(forecast.correlation_time(correlations.mean(0, True), data.interval))
        add_row(HERE / "solver.csv", {"error": error, "time": time, "time_of_mean": of_mean})


def solved_from(data: Any, state: Tensor, states: int) -> Tensor:
    """Solve on from a state (N, points) of each trajectory: (N, states + 1, 1, points)."""
    constants = data.vector.unflatten(0, (len(state), -1))[:, 0].double()
    each = data.solver_steps
    return solve(state, *(constants * torch.tensor(UNITS)).unbind(1), data.time_step, states * each, each)[:, :, None]


def has_row(table: Path, key: Mapping[str, Any]) -> bool:
    """Return whether a csv has a row with these cells."""
    cells = {name: rows.format_cell(value) for name, value in key.items()}
    return any(all(row[name] == cell for name, cell in cells.items()) for row in rows.read(table))


def add_row(table: Path, row: Mapping[str, Any]) -> None:
    print("  ".join(f"{name} {rows.format_cell(value)}" for name, value in row.items()), flush=True)
    rows.append(table, row)


def rolled_out(run: Path) -> Tensor:
    """Return the forecasts (N, T, 1, points) of a run's last checkpoint."""
    return atomic.read_tensors(run / "measured" / "rollout.safetensors")["drawn"]


def figure(drawn: Mapping[str, Tensor], data: Any) -> Any:
    """Draw the scores of all rows, and the spectra of one seed's forecasts."""
    canvas = plotting.canvas(1180, 400)
    times(
        plotting.panel(canvas, 60, 40, 310, 290, "time until the correlation is below 0.8", "CPU minutes of training")
    )
    spreads(plotting.panel(canvas, 450, 40, 290, 290, "ensembles", "error of the mean", "spread"), data)
    spectra(plotting.panel(canvas, 830, 40, 310, 290, "power in the second half", "wave number"), drawn, data)
    return canvas


def times(axes: Any) -> None:
    """Draw the mean correlation time over seeds against training, and the solver's."""
    curve = [row for row in rows.read(HERE / "curve.csv") if row["cpu_minutes"]]
    for name, colour in COLOURS.items():
        steps = sorted({int(row["step"]) for row in curve if row["model"] == name})
        found = [[row for row in curve if row["model"] == name and int(row["step"]) == step] for step in steps]
        x, y = ([mean(float(row[column]) for row in group) for group in found] for column in ("cpu_minutes", "time"))
        axes.plot(x, y, color=colour, marker="o", markersize=3, linewidth=1.2, label=name)
        for row in (row for group in found for row in group):
            axes.plot(float(row["cpu_minutes"]), float(row["time"]), ".", color=colour, markersize=3, alpha=0.5)
    for row in rows.read(HERE / "solver.csv"):
        axes.axhline(float(row["time"]), color=plotting.SOFT, linewidth=0.8, linestyle="--")
        label = f"solver, initial error {float(row['error']):g}"
        axes.text(0.02, float(row["time"]) + 0.8, label, transform=axes.get_yaxis_transform(), fontsize=7)
    axes.set_ylim(0)
    plotting.legend(axes, loc="lower right")


def spreads(axes: Any, data: Any) -> None:
    """Draw an ensemble's spread against its error, at each lead and for each seed; on the diagonal it is calibrated."""
    largest = 0.0
    for row in rows.read(HERE / "results.csv"):
        for lead in LEADS:
            ratio, error = (
                float(row[f"{name}_{lead * data.interval:g}"]) for name in ("spread_over_error", "mean_rmse")
            )
            axes.plot(error, ratio * error, "o", color=COLOURS[row["model"]], markersize=4, alpha=0.7)
            largest = max(largest, error, ratio * error)
    axes.plot([0, largest], [0, largest], color=plotting.SOFT, linewidth=0.8)


def spectra(axes: Any, drawn: Mapping[str, Tensor], data: Any) -> None:
    """Draw the power spectra of the second half of the forecasts and of the truth."""
    half = data.states.shape[1] // 2
    truth = forecast.power_spectrum(data.states[:, half:])
    axes.semilogy(range(1, len(truth)), truth[1:], color=plotting.INK, linewidth=1.6, label="truth")
    for name, states in drawn.items():
        power = forecast.power_spectrum(states[:, half:])[1:]
        axes.semilogy(range(1, len(truth)), power, color=COLOURS[name], linewidth=1, label=name)
    axes.set_ylim(float(truth[1 : 1 + LOW_WAVES].min()) / 1e4)
    plotting.legend(axes)


def fields(drawn: Mapping[str, Tensor], data: Any) -> Any:
    """Draw the first trajectory, space up and time to the right: truth, forecasts and their differences from it."""
    truth, width, height = data.states[0, :, 0], 2 * data.states.shape[1], data.states.shape[-1]
    canvas = plotting.canvas(3 * width + 140, len(drawn) * (height + 40) + 30)
    for i, (name, states) in enumerate(drawn.items()):
        shown = {"truth": truth, name: states[0, :, 0], f"{name} - truth": states[0, :, 0] - truth}
        for k, (title, field) in enumerate(shown.items()):
            axes = plotting.panel(canvas, 50 + k * (width + 35), 24 + i * (height + 40), width, height, title)
            extent = (0, (len(truth) - 1) * data.interval, 0, height)
            axes.imshow(field.T, "RdBu_r", vmin=-4, vmax=4, origin="lower", aspect="auto", extent=extent)
            axes.set_yticks([])
    return canvas


if __name__ == "__main__":
    main(*sys.argv[1:])
