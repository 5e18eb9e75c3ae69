"""What a study says of itself in its study.yaml: what is asked, what the paper found, and which numbers of ours answer it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config.overrides import did_you_mean, format_choices
from ldm.errors import UserError
from ldm.io.parse import parse_yaml
from ldm.report import rows

FILE = "study.yaml"
SCALES = ("full", "reduced")
Arm = tuple[str, ...]  # what stands in a table's cells for the value of each axis


@dataclass(frozen=True)
class Study:
    """title, question, paper, setting: words.

    axes: groups or dotted keys of a job's config, or of a point, whose values make an arm.  metrics: ours -> the paper's name of its
    own, or null.  published: the paper's numbers, each with the axes of its arm.  baseline: the arm that the others are compared with.
    scale: full, at the paper's own, or reduced.  differs: what of the protocol may differ between arms, being what is asked.
    sweeps: yaml files of the folder, of which jobs are the cells; none for a study of points.  names: what an arm is called.
    figure: x and y, and what makes a line; without, the arms side by side.
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
    def is_sampling_study(self) -> bool:
        """Whether its rows are the frontier's."""
        return (self.folder / "points.yaml").is_file()

    def arm(self, value: Mapping[str, Any]) -> Arm:
        """The arm of a row, or of anything else that has the axes."""
        return tuple(rows.format_cell(value.get(axis)) for axis in self.axes)


def read(folder: Path) -> Study:
    """The study of a folder. Raises UserError naming its study.yaml and the key."""
    path = folder / FILE
    if not path.is_file():
        studies = sorted(one.parent.name for one in folder.absolute().parent.glob(f"*/{FILE}"))
        raise UserError(f"{folder}: no {FILE} in it{did_you_mean(folder.name, studies)}{format_choices(studies)}")
    try:
        said = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    kinds = {
        name: (list if one.startswith("Seq") else dict if one.startswith("Map") else str)
        for name, one in _annotations().items()
    }
    if not isinstance(said, dict):
        raise UserError(f"{path}: expected {', '.join(kinds)}")
    for key, value in said.items():
        if key not in kinds:
            raise UserError(f"{path}: no key {key!r}{did_you_mean(key, kinds)}{format_choices(kinds)}")
        if not isinstance(value, kinds[key]):
            raise UserError(
                f"{path}: {key}={value}: expected {({list: 'a list', dict: 'keys with values', str: 'text'})[kinds[key]]}"
            )
    if missing := [name for name in ("title", "question", "axes", "metrics", "baseline", "scale") if name not in said]:
        raise UserError(f"{path}: {missing[0]} is missing")
    study = Study(folder, **said)
    if study.scale not in SCALES:
        raise UserError(f"{path}: scale={study.scale}: expected {' or '.join(SCALES)}")
    for one in (study.baseline, *study.published):
        if not isinstance(one, dict) or (unknown := set(study.axes) - one.keys()):
            raise UserError(
                f"{path}: {one} does not say {', '.join(sorted(unknown)) if isinstance(one, dict) else 'its arm'}"
            )
    return study


def _annotations() -> dict[str, str]:
    return {
        name: str(kind).replace("collections.abc.", "")
        for name, kind in Study.__annotations__.items()
        if name != "folder"
    }


def all_studies(root: Path) -> list[Study]:
    """The studies below a folder, by name."""
    return [read(path.parent) for path in sorted(root.glob(f"*/{FILE}"))]
