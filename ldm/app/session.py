"""Trained runs, each loaded once, and what is drawn from them: what sample.py does, by the same code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from ldm import drawing
from ldm.app import asked
from ldm.app.watch import Watch
from ldm.errors import UserError
from ldm.load import DataCard, list_runs, load, load_data_card, run_folder
from ldm.model import LatentDiffusion
from ldm.request import Request


@dataclass(frozen=True, eq=False)
class Session:
    """A run that is loaded. run: as it was named.  home: the folder where its files go."""

    run: str
    home: Path
    card: DataCard
    model: LatentDiffusion

    @staticmethod
    def open(run: str) -> "Session":
        """Load a run. Raises UserError, DamagedError."""
        folder = run_folder(run)
        return Session(run, home_of(folder), load_data_card(folder), load(run))

    def request(self, choices: Mapping[str, str], values: Mapping[str, Any]) -> Request:
        """The request of sample.py with these choices and values. Raises UserError.

        Images of a step within a run are kept apart from the run's own.
        """
        request = Request.of(asked.config(choices, {"run": self.run, **values}))
        if self.home.absolute() in Path(self.run).expanduser().absolute().parents and "again" not in values:
            request.cfg.out = f"{request.out}-{Path(self.run).stem}"
        return request

    def draw(self, request: Request, watch: Watch) -> list[Path]:
        """The files of the images that were asked for. Raises UserError, and Stopped when it was."""
        images = drawing.draw(self.model, request, watch.over(self.model.decode))
        drawing.keep(request, images, {})
        return [request.out / f"{seed:06d}.png" for seed in images]

    def again(self, file: Path, watch: Watch) -> tuple[Path, str]:
        """An image of this run made once more, with its whole batch: its file, and in words how it compares with what it was."""
        request = self.request({}, {"again": str(file)})
        (image,) = drawing.draw(self.model, request, watch.over(self.model.decode)).values()
        drawing.keep(request, {int(file.stem): image}, {})
        return request.out / file.name, drawing.difference(file, image)


def home_of(folder: Path) -> Path:
    """Where a run's images go: into its folder, or beside its file."""
    return folder if folder.is_dir() else folder.with_suffix("")


class Sessions:
    """The runs that a person can choose among, loaded when first asked for; the last two stay."""

    def __init__(self, runs: Sequence[str]):
        self.runs = list(runs)
        self._open: dict[str, Session] = {}
        self._opening = Lock()

    def __getitem__(self, run: str) -> Session:
        """Raises UserError for a run that is not among them, or cannot be loaded."""
        if run not in self.runs:
            raise UserError(f"run={run}: expected one of {', '.join(self.runs)}")
        with self._opening:
            self._open[run] = self._open.pop(run) if run in self._open else Session.open(run)
            for old in list(self._open)[:-2]:
                del self._open[old]
            return self._open[run]


def runs_of(named: Sequence[str]) -> list[str]:
    """The runs that were named, a folder of runs as all in it, the newest first. Raises UserError."""
    found: list[str] = []
    for run in named:
        folder = run_folder(run)
        home = Path(run).expanduser()
        found += list(map(str, list_runs(home))) if folder.parent == home else [str(run)]
    return list(dict.fromkeys(found))
