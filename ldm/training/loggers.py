"""Loggers: where numbers and images go besides the run folder."""

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ldm import compat
from ldm.errors import UserError
from ldm.runs.metrics_log import read_metrics_log
from ldm.training import tensorboard_files


class Logger(Protocol):
    """A mirror of what a run writes to its folder; `close` is always the last call, even without `finish`.

    log_file: of a picture or another file of a sample, whose suffix says what it is; a logger leaves out what it has no
    type for.
    """

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None: ...
    def log_metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def log_file(self, step: int, name: str, path: Path) -> None: ...
    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def finish(self, summary: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class NoLogger:
    """No mirror: the run folder alone."""

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        pass

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def log_file(self, step: int, name: str, path: Path) -> None:
        pass

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class WandB:
    """Weights & Biases: config and group choices, curves, images, tables; one W&B run per folder, continued on resume.

    group: by default the name of the sweep that the run belongs to.  tags: besides the study and the paper of the
    config.  mode: online, offline, or None: online if there is a key, else offline, because W&B would prompt or wait.
    patience: seconds that it may send after the end of the run; the rest stays on disk.  Its failures never end a run.
    """

    patience = 60.0

    def __init__(
        self, project: str = "ldm", group: str | None = None, tags: Sequence[str] = (), mode: str | None = None
    ):
        require_package("wandb")
        self.project, self.group, self.tags, self.mode = project, group, list(tags), mode
        self.folder = Path()
        self.run: Any = None

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        mode: Any = self.mode or os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        os.environ["WANDB_MODE"] = mode  # before the import, so that nothing prompts
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self.folder = folder
        limits: dict[str, Any] = {"init_timeout": 20, "finish_timeout": self.patience, "finish_timeout_raises": True}
        settings = wandb.Settings(console="off", x_disable_stats=True, **limits)
        group = self.group or os.environ.get("LDM_SWEEP")
        tags = [*self.tags, *run_tags(config, choices)]
        options: dict[str, Any] = dict(project=self.project, group=group, tags=tags, dir=str(folder), name=folder.name)
        options |= dict(id=folder.name, resume="allow", config={**config, "choice": dict(choices)}, settings=settings)
        try:
            self.run = wandb.init(mode=mode, **options)
        except Exception as error:
            print(f"W&B did not answer ({first_line(error)}); writing offline, `wandb sync` sends it later")
            try:
                self.run = wandb.init(mode="offline", **options)
            except Exception as second_error:
                print(f"W&B is off for this run: {first_line(second_error)}")

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._send(lambda run: run.log(dict(values), step=step))

    def log_file(self, step: int, name: str, path: Path) -> None:
        def send(run: Any) -> None:
            import wandb

            types: dict[str, Callable[[str], Any]] = {
                ".png": lambda file: wandb.Image(file),
                ".mp4": lambda file: wandb.Video(file, format="mp4"),
                ".wav": lambda file: wandb.Audio(file),
                ".smi": lambda file: wandb.Molecule.from_smiles(read_smiles(Path(file))),
            }
            if path.suffix not in types:
                return
            try:
                value = types[path.suffix](str(path))
            except Exception as error:  # a drawn molecule that has no structure in space, or none at all
                print(f"W&B is not sent {path}: {first_line(error)}")
            else:
                run.log({name: value}, step=step)

        self._send(send)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})

        if rows:
            self._send(send)

    def finish(self, summary: Mapping[str, Any]) -> None:
        def send(run: Any) -> None:
            run.summary.update(dict(summary))
            run.finish()

        self._end(send)

    def close(self) -> None:
        self._end(lambda run: run.finish(exit_code=1))  # a run that has not finished was interrupted

    def _end(self, send: Callable[[Any], None]) -> None:
        if self.run is not None:
            last = threading.Thread(target=self._send, args=(send,), daemon=True)
            last.start()
            last.join(2 * self.patience)  # W&B's own limit comes first
            if last.is_alive():
                self.run = None
            if self.run is None:
                print(
                    f"W&B was not sent all of this run; `wandb sync {self.folder / 'wandb' / '*run-*'}` sends it later",
                    flush=True,
                )
        self.run = None

    def _send(self, send: Callable[[Any], None]) -> None:
        if self.run is not None:
            try:
                send(self.run)
            except Exception as error:
                print(f"W&B stopped taking records: {first_line(error)}")
                self.run = None


class Trackio:
    """Trackio: config and group choices, curves, images, tables; one run per folder, continued on resume.

    Written to a database on this machine, in $TRACKIO_DIR or Hugging Face's cache; `trackio show` serves it as a page.
    Nothing is sent unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says where to.
    group: by default the name of the sweep that the run belongs to.  Raises UserError without the package.  Its
    failures never end a run.
    """

    def __init__(self, project: str = "ldm", group: str | None = None):
        require_package("trackio")
        self.project, self.group = project, group
        self.logged: set[tuple[int, str]] = set()  # Trackio appends: what a step has already would be there twice
        self.run: Any = None

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        import trackio

        from ldm.conditioner.clip import hub_access

        past = read_metrics_log(folder / "metrics.jsonl")
        options: dict[str, Any] = dict(name=folder.name, group=self.group or os.environ.get("LDM_SWEEP"))
        options |= dict(resume="allow" if past else "never")  # a run begun anew is a new run, of the same name
        options |= dict(embed=False, auto_log_gpu=False, auto_log_cpu=False)
        remote = any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        try:
            with hub_access(remote):  # init asks the hub for the name of the user whose token it finds
                self.run = trackio.init(self.project, config={**config, "choice": dict(choices)}, **options)
            stored = compat.TrackioStorage.get_logs(self.project, run_id=self.run.id)
            self.logged = {(row["step"], name) for row in stored for name in row}
        except Exception as error:
            print(f"Trackio is off for this run: {first_line(error)}")
            self.run = None
        for row in past:  # a killed process may not have written its last rows
            self._log(row["step"], {name: value for name, value in row.items() if name not in ("step", "wall")})

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def log_file(self, step: int, name: str, path: Path) -> None:
        import trackio

        types: dict[str, Callable[[str], Any]] = {
            ".png": lambda file: trackio.Image(file),
            ".mp4": lambda file: trackio.Video(file),
            ".wav": lambda file: trackio.Audio(file),
            ".smi": lambda file: trackio.Markdown(f"`{read_smiles(Path(file))}`"),
        }
        if path.suffix in types:
            self._log(step, {name: path}, lambda path: types[path.suffix](str(path)))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import trackio

        if rows:
            table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
            self._log(None, {name: table}, lambda table: trackio.Table(**table))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._log(None, {name: value for name, value in summary.items() if isinstance(value, int | float)})

    def close(self) -> None:
        if self.run is not None:
            import trackio

            trackio.finish()  # waits up to 30 s for its thread, and prints what it could not write
        self.run = None

    def _log(
        self, step: int | None, values: Mapping[str, Any], convert: Callable[[Any], Any] = lambda value: value
    ) -> None:
        """Log values that the step does not have yet; step=None is one after the last."""
        missing = {name: value for name, value in values.items() if (step, name) not in self.logged}
        if self.run is not None and missing:
            try:
                self.run.log({name: convert(value) for name, value in missing.items()}, step=step)
            except Exception as error:
                print(f"Trackio stopped taking records: {first_line(error)}")
                self.run = None


class TensorBoard:
    """Curves, images, config and scores as TensorBoard's event files in the run folder: tensorboard --logdir runs.

    Raises UserError without the package.  Its failures never end a run.
    """

    def __init__(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("logger=tensorboard needs the package tensorboard: pip install -e '.[log]'") from None
        self.open = SummaryWriter
        self.writer: Any = None

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        steps = [row["step"] for row in read_metrics_log(folder / "metrics.jsonl")]
        purge = max(steps) + 1 if steps else None  # a resumed run drops what was written after its checkpoint
        self._send(lambda: setattr(self, "writer", self.open(str(folder / "tensorboard"), purge_step=purge)))
        self._send(
            lambda: self.writer.add_text(
                "config", f"```\n{json.dumps({**config, 'choice': dict(choices)}, indent=1)}\n```"
            )
        )

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._send(lambda: [self.writer.add_scalar(name, value, step) for name, value in values.items()])

    def log_file(self, step: int, name: str, path: Path) -> None:
        types: dict[str, Callable[[], None]] = {
            ".png": lambda: self._add_picture(step, name, path),
            ".gif": lambda: self.writer.file_writer.add_summary(tensorboard_files.gif_summary(name, path), step),
            ".wav": lambda: self.writer.file_writer.add_summary(tensorboard_files.wav_summary(name, path), step),
            ".smi": lambda: self.writer.add_text(name, f"`{read_smiles(path)}`", step),
        }
        if path.suffix in types:
            self._send(types[path.suffix])

    def _add_picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.array(image.convert("RGB")), step, dataformats="HWC")

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            lines = [
                "|".join(rows[0]),
                "|".join("-" for _ in rows[0]),
                *("|".join(map(str, row.values())) for row in rows),
            ]
            self._send(lambda: self.writer.add_text(name, "\n".join(lines)))

    def finish(self, summary: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        self._send(lambda: self.writer.close())
        self.writer = None

    def _send(self, send: Callable[[], Any]) -> None:
        try:
            send()
        except Exception as error:
            if self.writer is not None:
                print(f"TensorBoard stopped taking records: {first_line(error)}")
            self.writer = None


def read_smiles(path: Path) -> str:
    """Return the SMILES of a .smi file: the first word, which a name may follow; "" if there is none."""
    return next(iter(path.read_text(encoding="utf-8").split()), "")


def require_package(name: str) -> None:
    """Raise UserError unless the package of a logger of its name is installed; it is not imported, for that is slow."""
    if sys.modules.get(name) is None and find_spec(name) is None:
        raise UserError(f"logger={name} needs the package {name}: pip install -e '.[{name}]'")


def run_tags(config: Mapping[str, Any], choices: Mapping[str, str]) -> list[str]:
    """Return the study, the preset and the paper that a config names, as tags of at most 64 characters, W&B's limit."""
    study = choices.get("experiments", "").removesuffix("/sweep")
    table = (config.get("paper") or {}).get("table")
    return [str(tag)[:64] for tag in (study, choices.get("preset"), table) if tag]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [repr(error)])[0]


def has_wandb_key() -> bool:
    """Return whether a W&B key is set, in the environment or in ~/.netrc."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
