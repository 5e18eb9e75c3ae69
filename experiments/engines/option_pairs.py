"""Which test compares each pair of options with the simplest reference? python experiments/engines/option_pairs.py

Writes pairs.csv, a row per pair of options of two of AXES. The reference is one process on the CPU, started by a plain
command, without a logger, in float32 (in float64 for a pair with precision 64), on the same samples.
"""

import csv
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE / "pairs.csv"


def options(group: str) -> list[str]:
    """List the options of a group of conf/, without the bases that others name."""
    return sorted(file.stem for file in ROOT.glob(f"conf/{group}/*.yaml") if not file.stem.startswith("_"))


# data of other media than images: tests/test_experiments.py trains each, tests/data/ compares its batches
OTHER_MEDIA = ("clips", "kuramoto_sivashinsky", "moses", "moving", "notes", "qm9", "sounds", "trajectories")
AXES = {
    "trainer": options("trainer"),
    "data": [name for name in options("data") if name not in OTHER_MEDIA],
    "launcher": [*options("hydra/launcher"), "basic", "joblib", "optuna", "submitit_local", "submitit_slurm"],
    "logger": options("logger"),
    "precision": ["auto", "64", "32", "bf16", "fp16"],
}
WORLDS = {"auto": 1, "cpu": 1, "ddp": 2, "fsdp": 2, "slurm": 2}  # trainers that run on CPUs: number of processes
# options that this suite cannot run, and why
NOT_RUN = {
    ("trainer", "gpu"): "needs a GPU",
    ("launcher", "submitit_slurm"): "needs a Slurm cluster",
    ("precision", "fp16"): "needs a GPU",
}
BOUNDS = {  # largest relative difference of a loss from that of one process
    "64": 1e-9,
    "32": 1e-5,
    "bf16": 2**-7,  # from float32: two roundings to 8 bits
}


class Case(NamedTuple):
    """A training: an option of each axis but the launcher's."""

    trainer: str
    data: str
    logger: str
    precision: str

    @property
    def id(self) -> str:
        """Return the name of the test's case."""
        return "-".join(self)

    @property
    def pairs(self) -> set[tuple]:
        """Return the pairs of (axis, option) in it."""
        return set(itertools.combinations(self._asdict().items(), 2))


def cover(cases: Sequence[Case], chosen: Sequence[Case] = ()) -> list[Case]:
    """Add few of the cases to those chosen so that each pair of options that occurs in any occurs in one of them."""
    chosen = list(chosen)
    missing = {pair for case in cases for pair in case.pairs} - {pair for case in chosen for pair in case.pairs}
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing & case.pairs)))
        missing -= chosen[-1].pairs
    return chosen


def product(trainers: Sequence[str], data: Sequence[str]) -> list[Case]:
    """Return the trainings that a CPU can run under some trainers; precision=auto is another name of one of these."""
    every = itertools.product(trainers, data, AXES["logger"], ("64", "32", "bf16"))
    return [case for case in itertools.starmap(Case, every) if (case.trainer, case.precision) != ("fsdp", "64")]


REFERENCES = [Case("cpu", data, "none", "32") for data in AXES["data"]]
SINGLE = cover(product(("auto", "cpu"), AXES["data"]), REFERENCES)  # one process
# two processes, over as many data sets as there are cases; the batches of all are compared without training
PARALLEL = [
    case._replace(data=AXES["data"][i % len(AXES["data"])])
    for i, case in enumerate(cover(product(("ddp", "fsdp", "slurm"), ("",))))
]
# jobs of a sweep, which are composed and not run: each option of each axis in one of them
JOBS = [
    Case(*(AXES[axis][i % len(AXES[axis])] for axis in Case._fields))
    for i in range(max(len(AXES[axis]) for axis in Case._fields))
]


def reference(case: Case) -> Case:
    """Return the training of one process that a case is compared with: in float64 if two processes train in float64."""
    if case in PARALLEL and case.precision == "64":
        return next(one for one in SINGLE if (one.data, one.precision) == (case.data, "64"))
    return Case("cpu", case.data, "none", "32")


TRAINING = "tests/test_pairs.py::test_training_equals_reference"
BATCHES = "tests/test_pairs.py::test_ranks_share_batches_of_one_process"
LAUNCHED = "tests/test_pairs.py::test_launcher_starts_jobs_of_plain_command"
REFUSED = "tests/training/test_fit.py::test_fit_refuses_what_device_or_strategy_lacks"
NAMED = "tests/training/test_fit.py::test_auto_is_the_precision_that_it_resolves_to"
FLOAT16 = "tests/training/test_precision.py::test_losses_of_precisions_agree_over_200_steps"
WHAT = {
    FLOAT16: "the losses in float64",
    NAMED: "the precision of which it is another name",
    TRAINING: "losses and weights of one process without a logger, and the logger's own files",
    BATCHES: "the batches of one process",
    LAUNCHED: "the config that the plain command composes",
    REFUSED: "one line that names the two, before any compute",
}
# tests from before this table: the option of the axis, named first, that they compare with a reference, and the options
# of other axes under which they do
BEFORE: dict[str, dict[str, tuple[str, ...]]] = {
    "tests/test_ddp.py::test_two_processes_have_losses_of_one": {
        "trainer": ("ddp",), "data": ("synthetic",), "logger": ("none",), "precision": ("64", "32")
    },
    "tests/faults/test_sharded_faults.py::test_sharded_training_matches_one_process_and_resumes_in_any_number": {
        "trainer": ("fsdp",), "data": ("synthetic",), "logger": ("none",), "precision": ("32",)
    },
    "tests/data/test_shards.py::test_shards_are_independent_of_workers_and_ranks": {
        "trainer": ("ddp",), "data": ("webdataset",)
    },
    "tests/data/test_bucket.py::test_bucket_stream_is_function_of_step": {"trainer": ("ddp",), "data": ("buckets",)},
    "tests/faults/test_wandb.py::test_wandb_jobs_of_sweep_share_a_group": {
        "logger": ("wandb",), "trainer": ("auto",), "data": ("synthetic",), "launcher": ("basic",),
        "precision": ("auto",),
    },
}  # fmt: skip


def row_of(first: tuple[str, str], second: tuple[str, str]) -> dict[str, str]:
    """Return the row of a pair of (axis, option)."""
    by_axis = dict((first, second))
    test, what, before = "", "", "no"
    for old, compared in BEFORE.items():
        if next(iter(compared)) in by_axis and all(
            option in compared.get(axis, ()) for axis, option in (first, second)
        ):
            test, what, before = old, "one process" if "trainer" in by_axis else "metrics.jsonl", "yes"
    if not test:
        test, what = new_test(first, second)
    names = ("axis 1", "option 1", "axis 2", "option 2", "test", "reference", "before")
    return dict(zip(names, (*first, *second, test, what, before), strict=True))


def new_test(first: tuple[str, str], second: tuple[str, str]) -> tuple[str, str]:
    """Return the test of a pair and what it compares with; no test and the reason where none can run."""
    by_axis = dict((first, second))
    if "launcher" in by_axis:
        if by_axis["launcher"] == "submitit_slurm":
            return "", NOT_RUN["launcher", "submitit_slurm"]
        return f"{LAUNCHED}[{by_axis['launcher']}]", WHAT[LAUNCHED]
    trainer, precision = by_axis.get("trainer"), by_axis.get("precision")
    if trainer == "fsdp" and precision in ("64", "fp16"):
        return REFUSED, WHAT[REFUSED]
    if trainer in ("auto", "cpu") and precision == "fp16":
        return FLOAT16, WHAT[FLOAT16]
    if precision == "auto" and trainer != "gpu":
        return NAMED, WHAT[NAMED]
    for part in (first, second):
        if part in NOT_RUN:
            return "", NOT_RUN[part]
    for case in (*SINGLE, *PARALLEL):
        if (first, second) in case.pairs and case not in REFERENCES:
            return f"{TRAINING}[{case.id}]", WHAT[TRAINING]
    for case in REFERENCES:  # compared with the training in float64
        if (first, second) in case.pairs:
            in_float64 = next(one for one in SINGLE if (one.data, one.precision) == (case.data, "64"))
            return f"{TRAINING}[{in_float64.id}]", "the same training in float64"
    return f"{BATCHES}[{by_axis['data']}]", WHAT[BATCHES]


def rows() -> list[dict[str, str]]:
    """Return the table."""
    return [
        row_of((one, a), (two, b))
        for one, two in itertools.combinations(AXES, 2)
        for a, b in itertools.product(AXES[one], AXES[two])
    ]


def main() -> int:
    """Write the table and print how many pairs it has."""
    table = rows()
    with TABLE.open("w", newline="") as file:
        out = csv.DictWriter(file, table[0], lineterminator="\n")
        out.writeheader()
        out.writerows(table)
    tested, old = sum(bool(row["test"]) for row in table), sum(row["before"] == "yes" for row in table)
    print(f"{len(table)} pairs, {tested} with a test, {old} of them before this table; {len(table) - tested} not run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
