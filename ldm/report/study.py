"""Read a study.yaml: the question of a study, the paper's results, and the metrics of ours that answer it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config import compose
from ldm.config.overrides import did_you_mean, format_choices
from ldm.errors import UserError
from ldm.io.parse import parse_yaml
from ldm.report import rows

FILE = "study.yaml"
SCALES = ("full", "reduced")
Arm = tuple[str, ...]  # table cell of each axis' value


@dataclass(frozen=True)
class Study:
    """A study, as described in its study.yaml.

    title, question, paper, setting: text.
    axes: config groups or dotted keys of a job's config, or of a point; their values identify an arm.
    metrics: our metric -> the paper's name for its own, or null.
    published: the paper's numbers, each with the axes of its arm.
    baseline: the arm that the others are compared with.
    scale: "full" (the paper's) or "reduced".
    differs: protocol entries that may differ between arms, because they are the question.
    sweeps: YAML files of the folder that define the jobs; none for a study of points.
    figure: x and y, and what distinguishes lines; without it the arms are plotted side by side.
    """

    folder: Path
    title: str
    question: str
    axes: Sequence[str]
    metrics: Mapping[str, str | None]
    baseline: Mapping[str, Any]
    scale: str
    paper: str = ""
    setting: str = ""
    published: Sequence[Mapping[str, Any]] = ()
    differs: Sequence[str] = ()
    sweeps: Sequence[str] = ("sweep",)
    figure: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config_dir(self) -> Path | None:
        """The folder of `--config-dir` that has the study as experiments/NAME; None for a study of this repository."""
        parent = self.folder.absolute().parent
        return parent.parent if parent.name == "experiments" and parent.parent != compose.ROOT else None

    @property
    def is_sampling_study(self) -> bool:
        """Whether its rows are written by ldm.report.frontier."""
        return (self.folder / "points.yaml").is_file()

    def arm(self, value: Mapping[str, Any]) -> Arm:
        """Return the arm of a row, or of any mapping with the axes."""
        return tuple(rows.format_cell(value.get(axis)) for axis in self.axes)


def read(folder: Path) -> Study:
    """Read the study in a folder.  Raises UserError naming its study.yaml and the key."""
    path = folder / FILE
    if not path.is_file():
        studies = sorted(file.parent.name for file in folder.absolute().parent.glob(f"*/{FILE}"))
        raise UserError(f"{folder}: no {FILE} in it{did_you_mean(folder.name, studies)}{format_choices(studies)}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    kinds = {
        name: (list if annotation.startswith("Seq") else dict if annotation.startswith("Map") else str)
        for name, annotation in _annotations().items()
    }
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected {', '.join(kinds)}")
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"{path}: no key {key!r}{did_you_mean(key, kinds)}{format_choices(kinds)}")
        if not isinstance(value, kinds[key]):
            kind = {list: "a list", dict: "keys with values", str: "text"}[kinds[key]]
            raise UserError(f"{path}: {key}={value}: expected {kind}")
    if missing := [
        name for name in ("title", "question", "axes", "metrics", "baseline", "scale") if name not in values
    ]:
        raise UserError(f"{path}: {missing[0]} is missing")
    study = Study(folder, **values)
    if study.scale not in SCALES:
        raise UserError(f"{path}: scale={study.scale}: expected {' or '.join(SCALES)}")
    for arm in (study.baseline, *study.published):
        if not isinstance(arm, dict) or (unknown := set(study.axes) - arm.keys()):
            raise UserError(
                f"{path}: {arm} does not specify {', '.join(sorted(unknown)) if isinstance(arm, dict) else 'its arm'}"
            )
    return study


def _annotations() -> dict[str, str]:
    return {
        name: str(kind).replace("collections.abc.", "")
        for name, kind in Study.__annotations__.items()
        if name != "folder"
    }


def all_studies(root: Path) -> list[Study]:
    """Read all studies in a folder, sorted by name."""
    return [read(path.parent) for path in sorted(root.glob(f"*/{FILE}"))]
