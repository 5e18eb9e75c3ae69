"""Trained runs, each loaded once, and what is drawn from them: what sample.py does, by the same code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from ldm.app import compose
from ldm.checkpoint.load import open_model
from ldm.errors import UserError
from ldm.model import LatentDiffusion
from ldm.runs.data_card import DataCard
from ldm.runs.folder import find_run, list_runs
from ldm.sampling.monitor import SamplerMonitor
from ldm.sampling.request import SampleRequest
from ldm.sampling.run import compare_with_file, generate_images, save_results


@dataclass(frozen=True, eq=False)
class Session:
    """A run that is loaded. run: as it was named.  home: the folder where its files go."""

    run: str
    home: Path
    card: DataCard
    model: LatentDiffusion

    @staticmethod
    def open(run: str) -> "Session":
        """Load a run. Raises UserError, CorruptFileError."""
        source = open_model(run)
        return Session(run, output_dir(source.folder), source.data_card, source.load())

    def request(self, choices: Mapping[str, str], values: Mapping[str, Any]) -> SampleRequest:
        """The request of sample.py with these choices and values. Raises UserError.

        Images of a step within a run are kept apart from the run's own.
        """
        request = SampleRequest.from_config(compose.compose_request(choices, {"run": self.run, **values}))
        if self.home.absolute() in Path(self.run).expanduser().absolute().parents and "reproduce" not in values:
            return replace(request, output_dir=Path(f"{request.output_dir}-{Path(self.run).stem}"))
        return request

    def draw(self, request: SampleRequest, watch: SamplerMonitor) -> list[Path]:
        """The files of the images that were asked for. Raises UserError, and Stopped when it was."""
        images = generate_images(self.model, request, watch.wrap(self.model.decode))
        save_results(request, images, {})
        return [request.output_dir / f"{seed:06d}.png" for seed in images]

    def repeat(self, file: Path, watch: SamplerMonitor) -> tuple[Path, str]:
        """An image of this run made once more, with its whole batch: its file, and in words how it compares with what it was."""
        request = self.request({}, {"reproduce": str(file)})
        (image,) = generate_images(self.model, request, watch.wrap(self.model.decode)).values()
        save_results(request, {int(file.stem): image}, {})
        return request.output_dir / file.name, compare_with_file(file, image)


def output_dir(folder: Path) -> Path:
    """Where a run's images go: into its folder, or beside its file."""
    return folder if folder.is_dir() else folder.with_suffix("")


class SessionCache:
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


def expand_runs(named: Sequence[str]) -> list[str]:
    """The runs that were named, a folder of runs as all in it, the newest first. Raises UserError."""
    found: list[str] = []
    for run in named:
        folder = find_run(run)
        home = Path(run).expanduser()
        found += list(map(str, list_runs(home))) if folder.parent == home else [str(run)]
    return list(dict.fromkeys(found))
