"""Does every training engine do what one process does? python experiments/engines/matrix.py [rows] [K/N]

A combination is a trainer, an optimizer, a feature and what a run is resumed into. Its training on synthetic data (6
steps, a checkpoint every second) is stopped after step 4 by SIGTERM, resumed by the same command, or under another
trainer or number of processes, and compared with one process that was never stopped: losses and gradient norms of every
step, final weights and averages, scores, and which checkpoints remain. In float64, and in float32 where FSDP2 takes
part, for which Lightning has no float64; Muon's bfloat16 products are taken in float32 there. One row of matrix.csv
per combination, a pairwise cover of all combinations first; existing rows are not repeated. K/N: the K-th of N parts of
what is left, for N commands at once. Exits with 1 if a combination disagrees.
"""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "faults"))
from training_processes import run  # noqa: E402  beside the other experiment on whole trainings

TABLE = HERE / "matrix.csv"
WORK = Path("runs/engines").absolute()
STEPS, STOP = 6, 4
WAIT = 900  # seconds after which a training that has not ended is killed
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SIZES = (
    *("budget=smoke", f"training.steps={STEPS}", "training.save_every=2", "training.log_every=1"),
    *("training.sample_every=100", "training.lr_schedule.warmup=1", "training.score.guidance_scales=[1.0]"),
)
ENGINES = {  # an option of conf/trainer, and the number of processes
    "cpu": ("cpu", 1),
    "cpu x2": ("cpu", 2),
    "ddp": ("ddp", 2),
    "ddp x1": ("ddp", 1),
    "fsdp": ("fsdp", 2),
    "fsdp x1": ("fsdp", 1),
}
RESUMED = {  # trainer -> into what a run of it is resumed
    "cpu": {"same": "cpu", "other world size": "cpu x2", "other trainer": "fsdp"},
    "ddp": {"same": "ddp", "other world size": "ddp x1", "other trainer": "fsdp"},
    "fsdp": {"same": "fsdp", "other world size": "fsdp x1", "other trainer": "cpu"},
}
OPTIMIZERS = {"default": (), **{f.stem: (f"optimizer={f.stem}",) for f in sorted(ROOT.glob("conf/optimizer/*.yaml"))}}
FEATURES = {  # {base}, {words}: trained runs, told by label and by CLIP
    "none": ("metrics=none",),
    "accumulate": ("metrics=none", "trainer.accumulate_grad_batches=2"),
    "score": ("training.score.eval_every=2", "training.score.eval_num=20", "keep_best=val/fd_fashion_20"),
    "snapshots": ("metrics=none", "training.snapshot_every=2"),
    "lora": ("metrics=none", "adapter=lora", "init={base}"),
    "distillation": (
        *(
            "metrics=none",
            "objective=consistency",
            "objective.teacher.run={base}",
            "init={base}",
            "training.cond_drop_prob=0",
        ),
        *("sampler=consistency", "timestep_spacing=uniform"),
    ),
    "textual inversion": ("metrics=none", "adapter=textual_inversion", "adapter.placeholder_token=of", "init={words}"),
}
BOUNDS = {  # the largest difference that rounding explains: of losses, of weights and averages, of scores
    "64": (1e-9, 1e-6, 1e-6),
    "32": (1e-4, 1e-2, 1e-2),
}


class Case(NamedTuple):
    """A combination; resume: a key of RESUMED[trainer]."""

    trainer: str
    optimizer: str
    feature: str
    resume: str

    @property
    def into(self) -> str:
        return RESUMED[self.trainer][self.resume]

    @property
    def precision(self) -> str:
        return "32" if "fsdp" in self.trainer + self.into else "64"

    @property
    def bounds(self) -> tuple[float, float, float]:
        return BOUNDS[self.precision]

    @property
    def prepare(self) -> Callable[[], None] | None:
        """What each of its training processes does first."""
        return full_precision_muon if (self.precision, self.optimizer) == ("32", "muon") else None


CASES = [
    Case(*one)
    for one in itertools.product(RESUMED, OPTIMIZERS, FEATURES, ("same", "other world size", "other trainer"))
]


def cover(cases: Sequence[Case]) -> list[Case]:
    """Few of the cases in which each pair of values that occurs in any occurs, in the order of choice."""
    open_, chosen = {pair for case in cases for pair in pairs(case)}, list[Case]()
    while open_:
        chosen.append(max(cases, key=lambda case: len(open_ & pairs(case))))
        open_ -= pairs(chosen[-1])
    return chosen


def pairs(case: Case) -> set[tuple]:
    return set(itertools.combinations(enumerate(case), 2))


def full_precision_muon() -> None:
    """Take Muon's Newton-Schulz products in the gradient's type, as torch's function does in bfloat16.

    A gradient's last bit decides how an entry is rounded to bfloat16, and the iteration enlarges the difference.
    """
    import torch.optim._muon

    def orthogonalize(grad: Any, coefficients: tuple[float, float, float], steps: int, eps: float) -> Any:
        a, b, c = coefficients
        x = grad.T if grad.size(0) > grad.size(1) else grad
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if grad.size(0) > grad.size(1) else x

    torch.optim._muon._zeropower_via_newtonschulz = orthogonalize


def stop(rank: int, step: int) -> None:
    """End the training in order, from its first process."""
    if (rank, step) == (0, STOP):
        os.kill(os.getpid(), signal.SIGTERM)


def trained(
    folder: Path, typed: Sequence[str], world: int = 1, expected: int = 0, after: Any = None, prepare: Any = None
) -> None:
    """Run a training in `folder`. Raises RuntimeError with the last line printed unless every process exits as
    expected.
    """
    codes = run(tuple(typed), folder, world, after, WAIT, prepare)
    if codes != [expected] * world:
        printed = [
            line for file in sorted(folder.glob("said-*.txt")) for line in file.read_text().splitlines() if line.strip()
        ]
        raise RuntimeError(f"exit codes {codes}; {printed[-1][:200] if printed else 'nothing printed'}")


def folder_of(name: str) -> Path:
    """An empty folder that shares the cache of all."""
    folder, cache = WORK / name, WORK / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cache.mkdir(exist_ok=True)
    (folder / "cache").symlink_to(cache)
    return folder


def bases() -> dict[str, str]:
    """Trained runs that features begin from, by the names that FEATURES has for them."""
    found = {}
    model = WORK / "tiny.json"
    words = (
        "conditioner=clip",
        f"conditioner.encoder.model={model}",
        "conditioner.encoder.random=true",
        "metrics=none",
    )
    for name, typed in (("base", ()), ("words", words)):
        if not list(WORK.glob(f"{name}/runs/*/metrics.json")):
            folder = folder_of(name)
            model.write_text(json.dumps(TINY_CLIP))
            trained(folder, (*SIZES, *typed, "trainer=cpu", "training.steps=10", "training.save_every=10"))
        (metrics,) = WORK.glob(f"{name}/runs/*/metrics.json")
        found[name] = str(metrics.parent)
    return found


def reference(case: Case) -> Path:
    """The run folder of one process that was never stopped, started as a person does."""
    name = f"whole/{case.optimizer}-{case.feature}-{case.precision}".replace(" ", "_")
    if not list(WORK.glob(f"{name}/runs/*/metrics.json")):
        feature = [word.format(**bases()) for word in FEATURES[case.feature]]
        typed = (*SIZES, *OPTIMIZERS[case.optimizer], *feature, "trainer=cpu", f"trainer.precision={case.precision}")
        trained(folder_of(name), typed, prepare=case.prepare)
    (metrics,) = WORK.glob(f"{name}/runs/*/metrics.json")
    return metrics.parent


def resumable(case: Case, whole: Path) -> Path:
    """A copy of the folder of a stopped run, which is trained once for all that it is resumed into."""
    name = f"stopped/{case.trainer}-{case.optimizer}-{case.feature}-{case.precision}".replace(" ", "_")
    if not (WORK / name / "stopped").is_file():
        folder = folder_of(name)
        trained(folder, *under(case.trainer, whole, folder), 85, stop, case.prepare)
        (folder / "stopped").touch()
    copy = WORK / f"case-{os.getpid()}"
    shutil.rmtree(copy, ignore_errors=True)
    return shutil.copytree(WORK / name, copy, symlinks=True)


def under(engine: str, whole: Path, folder: Path) -> tuple[tuple[str, ...], int]:
    """The command, as the launcher gives it to a process, of the training of the run `whole` under an engine, and how
    many processes.
    """
    from ldm.config import serialize
    from ldm.config.compose import compose_option

    option, world = ENGINES[engine]
    config = serialize.load_config(whole / "config.yaml")
    trainer = dict(compose_option("trainer", option))
    trainer |= {"accelerator": "cpu", "devices": world} | {
        name: config["trainer"][name] for name in ("accumulate_grad_batches", "precision")
    }
    place = folder / f"config-{engine.replace(' ', '-')}"
    serialize.write_config({**config, "trainer": trainer}, place, json.loads((whole / "choices.json").read_text()))
    return ("--config-path", str(place), "--config-name", "config"), world


def outcome(made: Path) -> dict[str, Any]:
    """What a finished run leaves: rows of losses and of scores, weights and averages at the last two checkpoints, and
    what is kept.
    """
    from ldm.checkpoint.step import load_checkpoint
    from ldm.io import atomic
    from ldm.runs import metrics_log

    rows = metrics_log.read_metrics_log(made / "metrics.jsonl")
    kept = sorted(path.name for path in (made / "checkpoints").glob("step-*"))
    last, before = (load_checkpoint(made / "checkpoints" / f"step-{step:08d}").tensors for step in (STEPS, STOP))
    average = {f"{name}/{key}": value for name in last if name != "model" for key, value in last[name].items()}
    average |= {
        f"{file.name}/{key}": value
        for file in made.glob("averages/*")
        for key, value in atomic.read_tensors(file).items()
    }
    best = made / "checkpoints" / "best.json"
    return {
        "losses": [{key: row[key] for key in row if key.startswith("train/")} for row in rows if "train/loss" in row],
        "scores": [
            {key: row[key] for key in row if key.startswith("val/")}
            for row in rows
            if any(key.startswith("val/") for key in row)
        ],
        "weights": last["model"],
        "way of weights": before["model"],
        "averages": average,
        "way of averages": {
            f"{name}/{key}": value for name in before if name != "model" for key, value in before[name].items()
        },
        "kept": [*kept, json.loads(best.read_text())["step"] if best.is_file() else None],
    }


def of_rows(one: list[dict], two: list[dict]) -> float:
    """The largest difference of two tables, relative to the number; infinite where rows or names differ or a number is
    not finite.
    """
    if [row.keys() for row in one] != [row.keys() for row in two]:
        return math.inf
    found = [abs(a[key] - b[key]) / max(abs(b[key]), 1e-3) for a, b in zip(one, two, strict=True) for key in a]
    return max(found, default=0.0) if all(map(math.isfinite, found)) else math.inf


def of_tensors(one: dict, two: dict, before: dict) -> float:
    """The 2-norm of the difference relative to the reference's last steps; infinite where names differ."""
    if one.keys() != two.keys():
        return math.inf
    way = norm(two[key] - before[key] for key in before)
    return norm(one[key] - two[key] for key in two) / max(way, 1e-12)


def norm(tensors: Iterable[Any]) -> float:
    return sum(float(one.double().square().sum()) for one in tensors) ** 0.5


def compared(found: dict[str, Any], wanted: dict[str, Any], bounds: tuple[float, float, float]) -> dict[str, Any]:
    """The differences of two outcomes, and whether they are within the bounds."""
    row: dict[str, Any] = {
        "losses": of_rows(found["losses"], wanted["losses"]),
        "weights": of_tensors(found["weights"], wanted["weights"], wanted["way of weights"]),
        "averages": of_tensors(found["averages"], wanted["averages"], wanted["way of averages"]),
        "scores": of_rows(found["scores"], wanted["scores"]),
    }
    limits = dict(zip(row, (bounds[0], bounds[1], bounds[1], bounds[2]), strict=True))
    row["kept"] = "equal" if found["kept"] == wanted["kept"] else "DIFFERENT"
    agree = row["kept"] == "equal" and all(row[name] <= limit for name, limit in limits.items())
    return row | {"agree": "yes" if agree else "NO"}


def measured(case: Case) -> dict[str, Any]:
    """The row of a case."""
    since = time.monotonic()
    row = {**case._asdict(), "into": case.into, "precision": case.precision}
    blank = dict.fromkeys(("losses", "weights", "averages", "scores", "kept"), "")
    try:
        whole = reference(case)
        folder = resumable(case, whole)
        trained(folder, *under(case.into, whole, folder), prepare=case.prepare)
        (made,) = (folder / "runs").iterdir()
        row |= compared(outcome(made), outcome(whole), case.bounds) | {"note": ""}
    except RuntimeError as error:
        row |= blank | {"agree": "NO", "note": str(error)}
    return row | {"seconds": round(time.monotonic() - since, 1)}


def main(most: int | None = None, part: int = 1, parts: int = 1) -> int:
    rows = list(csv.DictReader(TABLE.open())) if TABLE.is_file() else []
    there = {tuple(row[name] for name in Case._fields) for row in rows}
    first = cover(CASES)
    todo = [case for case in (*first, *(case for case in CASES if case not in first)) if case not in there]
    todo = todo if most is None else todo[: max(0, most - len(rows))]
    share = {key: k % parts + 1 for k, key in enumerate(dict.fromkeys(case[1:3] for case in todo))}  # of references
    for case in (case for case in todo if share[case[1:3]] == part):
        row = {
            name: f"{value:.2g}" if isinstance(value, float) and name != "seconds" else value
            for name, value in measured(case).items()
        }
        new = not TABLE.is_file()
        with TABLE.open("a", newline="") as file:
            out = csv.DictWriter(file, row, lineterminator="\n")
            if new:
                out.writeheader()
            out.writerow(row)
        rows.append(row)
        print(" ".join(f"{name}={value}" for name, value in row.items() if value != ""), flush=True)
    wrong = [row for row in rows if row["agree"] != "yes"]
    print(
        f"{len(rows)} of {len(CASES)} combinations, {len(first)} of which are a pairwise cover;"
        f" {len(wrong)} disagree with one process"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    words = sys.argv[1:]
    of = [int(number) for word in words if "/" in word for number in word.split("/")] or [1, 1]
    sys.exit(main(next((int(word) for word in words if "/" not in word), None), *of))
