"""Compare a study's results with the paper's.

python -m ldm.report [experiments/STUDY | all | compare RUN RUN ...] [key=value ...]

experiments/STUDY  read the run folders of the study's jobs, where `runs=` points to, or results.csv for runs that are
                   not on this machine; write results.csv, the README's table between its marks, and figure.png
all                the same for every study; without arguments, only the table of studies in
                   experiments/README.md
compare RUN RUN    config differences, curves and numbers side by side, also as a page that opens without a server
                   (out=compare.html)
levels RUN         loss and errors by bin of log-SNR on num=256 held-out images, bins=10, to levels.csv and levels.png
                   in the run's folder
bits RUN           the variational bound in bits per dimension on num=256 held-out images, steps=1000, to bits.json in
                   the run's folder

  wandb=PROJECT    read a Weights & Biases project instead of run folders
  key=value        of train.py, for every job of the sweep, such as runs=PATH
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ldm.cli.args import read_signature
from ldm.cli.errors import run_guarded
from ldm.config import compose
from ldm.errors import UserError
from ldm.io import atomic
from ldm.report import collect, rows, study, table

STUDIES = compose.ROOT / "experiments"
HEAD = """# {title}

{question}

```sh
{command}
```
"""
RESULT = """
`python -m ldm.report {folder}` writes the table and the figure.

<!-- table -->
<!-- /table -->

![{title}](figure.png)

## Verdict

Not written yet.
"""


def update_study(spec: study.Study, typed: Sequence[str], project: str | None) -> None:
    """Write a study's results.csv, table and figure; project: a W&B project to read instead of run folders.

    Raises UserError.
    """
    from ldm.report import figure

    measured, missing = collect.collect_results(spec, typed, project)
    # As the csv stores them, digit for digit.
    results = [{name: rows.format_cell(value) for name, value in row.items()} for row in measured]
    planned = dict.fromkeys(spec.arm({axis: job.lookup(axis) for axis in spec.axes}) for job in missing)
    lines = table.comparisons(spec, results, list(planned))
    if results:
        rows.write(spec.folder / "results.csv", results)
    readme = spec.folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else HEAD.format(**readme_fields(spec))
    if table.read_block(text, "table") is None:
        text += RESULT.format(**readme_fields(spec))
    atomic.write_text(readme, table.replace_block(text, "table", table.markdown(spec, lines)))
    figure.write(spec, results, spec.folder / "figure.png")
    print(
        f"{spec.folder}: {len(results)} rows, {len(missing)} jobs without a result; "
        f"differences of the paper that are reproduced: {table.count_verdicts(lines)}"
    )


def readme_fields(spec: study.Study) -> dict[str, str]:
    """Return the fields of the templates for a new README."""
    flags = f"--config-dir {spec.config_dir} " if spec.config_dir else ""
    trained = "\n".join(
        f"python train.py {flags}experiment={spec.name}/{sweep}".removesuffix("/sweep") for sweep in spec.sweeps
    )
    folder = str(spec.folder) if spec.config_dir else f"experiments/{spec.name}"
    command = (
        f"python -m ldm.report.frontier experiments/{spec.name} run=RUN,RUN,RUN" if spec.is_sampling_study else trained
    )
    return {"title": spec.title, "question": spec.question, "command": command, "folder": folder}


def update_overview(root: Path) -> None:
    """Write the table of studies into the README of their folder.  Raises UserError."""
    studies = {
        spec.name: (spec, table.comparisons(spec, rows.read(spec.folder / "results.csv")))
        for spec in study.all_studies(root)
    }
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    atomic.write_text(readme, table.replace_block(text, "studies", table.overview(studies)))
    print(f"{readme}: {len(studies)} studies")


def compare(words: Sequence[str]) -> None:
    """Print a comparison of runs and write it as a page.  Raises UserError."""
    from ldm.report import browse
    from ldm.report.compare import format_comparison

    out = next((Path(word[4:]).expanduser() for word in words if word.startswith("out=")), Path("compare.html"))
    folders = browse.find_runs([word for word in words if not word.startswith("out=")])
    if len(folders) < 2:
        raise UserError("compare: expected two runs or more; python -m ldm.report compare RUN RUN (see --help)")
    records = [browse.read_run(folder) for folder in folders]
    print(format_comparison(records))
    atomic.write_text(out, browse.render_page(records))
    print(f"{out}: the same as a page; open it in a browser")


def levels(
    run: str,  # a run folder of train.py
    num: int = 256,  # held-out images
    bins: int = 10,  # of log-SNR
) -> None:
    """Measure a run's errors by noise level. Raises UserError."""
    from ldm.report import levels as levels_module
    from ldm.report.levels import of_run, plot
    from ldm.runs.folder import find_run

    if num < 1 or bins < 1:
        raise UserError(f"num={num} bins={bins}: expected 1 or more")
    errors, folder = of_run(run, num, bins), find_run(run)
    rows.write(folder / "levels.csv", errors)
    plot(errors, folder / "levels.png")
    print(f"{levels_module.text(errors)}\n{folder / 'levels.csv'}, {folder / 'levels.png'}")


def bits(
    run: str,  # a run folder of train.py
    num: int = 256,  # held-out images
    steps: int | None = None,  # length of the chain; null: all steps of the schedule
    variance: str | None = None,  # small, large or learned; null: learned if the model has it, else small
) -> None:
    """Measure a run's bound on the likelihood of images. Raises UserError."""
    from ldm.report.bits import of_run
    from ldm.runs.folder import find_run

    if num < 1 or (steps is not None and steps < 1):
        raise UserError(f"num={num} steps={steps}: expected 1 or more")
    result = of_run(run, num, steps, variance)
    atomic.write_json(find_run(run) / "bits.json", result)
    print("\n".join(f"{name:<16}{rows.format_cell(value)}" for name, value in result.items()))


MEASURES: Mapping[str, Callable[..., None]] = {"levels": levels, "bits": bits}


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code.  Raises UserError."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    if argv and argv[0] == "compare":
        compare(argv[1:])
        return 0
    if argv and argv[0] in MEASURES:
        signature = read_signature(Path(__file__), argv[0])
        words = [word if "=" in word else f"run={word}" for word in argv[1:]]
        MEASURES[argv[0]](**signature.parse(words))  # type: ignore[union-attr]
        return 0
    folders = [word for word in argv if "=" not in word]
    typed = [word for word in argv if "=" in word and not word.startswith("wandb=")]
    project = next((word.removeprefix("wandb=") for word in argv if word.startswith("wandb=")), None)
    if folders == ["all"]:
        specs = study.all_studies(STUDIES)
    else:
        specs = [study.read(Path(folder).expanduser()) for folder in folders]
    for spec in specs:
        update_study(spec, typed, project)
    if folders in ([], ["all"]) or {spec.folder.absolute().parent for spec in specs} == {STUDIES}:
        update_overview(STUDIES)
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
