"""Loaded runs, and sampling from them with the same code as sample.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ldm.app import compose
from ldm.checkpoint.load import open_model
from ldm.errors import UserError
from ldm.media import medium as media
from ldm.media.medium import Medium, load_medium
from ldm.model import LatentDiffusion
from ldm.runs.data_card import DataCard
from ldm.runs.folder import find_run, list_runs
from ldm.sampling.monitor import SamplerMonitor
from ldm.sampling.request import SampleRequest
from ldm.sampling.run import compare_with_file, generate_images, save_results

PREVIEW = 16  # samples in the picture of a running sampler, at most


@dataclass(frozen=True, eq=False)
class Session:
    """A loaded run; run: as the user named it, home: the folder for its files, medium: what its samples are."""

    run: str
    home: Path
    card: DataCard
    model: LatentDiffusion
    medium: Medium

    @staticmethod
    def open(run: str) -> "Session":
        """Load a run.  Raises UserError, also for a run whose samples its medium cannot show, or CorruptFileError."""
        source = open_model(run)
        medium = load_medium(source.data_card.medium)
        if fault := medium.fault(source.data_card.shape):
            raise UserError(f"run={run}: {fault}, which the page cannot show; sample.py writes them to a file")
        return Session(run, output_dir(source.folder), source.data_card, source.load(), medium)

    @property
    def is_image(self) -> bool:
        """Return whether the run's samples are images, which have a size that a user can choose."""
        return self.medium.name == media.DEFAULT

    def request(self, choices: Mapping[str, str], values: Mapping[str, Any]) -> SampleRequest:
        """Build the request that sample.py would have for these choices and values.  Raises UserError.

        Images of a checkpoint of a run are stored separately from those of the run itself.
        """
        request = SampleRequest.from_config(compose.compose_request(choices, {"run": self.run, **values}))
        if self.home.absolute() in Path(self.run).expanduser().absolute().parents and "reproduce" not in values:
            return replace(request, output_dir=Path(f"{request.output_dir}-{Path(self.run).stem}"))
        return request

    def draw(self, request: SampleRequest, watch: SamplerMonitor) -> list[Path]:
        """Generate and save the requested samples and return their pictures.  Raises UserError, SamplingCancelled."""
        images = generate_images(self.model, request, watch.wrap(self.picture))
        save_results(request, images, {})
        return [request.output_dir / f"{seed:06d}.png" for seed in images]

    def picture(self, x0: Tensor) -> Tensor:
        """Return a picture (C, H, W) in [-1, 1] of the first PREVIEW of predicted data (B, C, h, w)."""
        with torch.inference_mode():
            samples = list(self.model.decode(x0[:PREVIEW]).float().cpu())
        return self.medium.sheet(samples, max(1, round(len(samples) ** 0.5)))

    def repeat(self, file: Path, watch: SamplerMonitor) -> tuple[Path, str]:
        """Reproduce an image of this run together with its batch; return the new file and a comparison in words."""
        request = self.request({}, {"reproduce": str(file)})
        (image,) = generate_images(self.model, request, watch.wrap(self.picture)).values()
        save_results(request, {int(file.stem): image}, {})
        return request.output_dir / file.name, compare_with_file(file, image, self.medium)


def output_dir(folder: Path) -> Path:
    """Return the folder for a run's images: the run folder, or a folder next to a weights file."""
    return folder if folder.is_dir() else folder.with_suffix("")


class SessionCache:
    """The runs that a user can choose from, loaded on first use; the two used last stay in memory."""

    def __init__(self, runs: Sequence[str]):
        self.runs = list(runs)
        self._open: dict[str, Session] = {}
        self._opening = Lock()

    def __getitem__(self, run: str) -> Session:
        """Return a session.  Raises UserError for a run that is not in the list, or that cannot be loaded."""
        if run not in self.runs:
            raise UserError(f"run={run}: expected one of {', '.join(self.runs)}")
        with self._opening:
            self._open[run] = self._open.pop(run) if run in self._open else Session.open(run)
            for old in list(self._open)[:-2]:
                del self._open[old]
            return self._open[run]


def expand_runs(named: Sequence[str]) -> list[str]:
    """Replace each folder of runs by all runs in it, newest first.  Raises UserError."""
    runs: list[str] = []
    for run in named:
        folder = find_run(run)
        home = Path(run).expanduser()
        runs += list(map(str, list_runs(home))) if folder.parent == home else [str(run)]
    return list(dict.fromkeys(runs))
