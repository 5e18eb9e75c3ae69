"""Loggers: where numbers and images go besides the run folder."""

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ldm.errors import UserError
from ldm.runs.metrics_log import read_metrics_log


class Logger(Protocol):
    """A mirror of what a run writes to its folder; `close` is always the last call, even without `finish`."""

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None: ...
    def log_metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def log_image(self, step: int, name: str, path: Path) -> None: ...
    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def finish(self, summary: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class NoLogger:
    """No mirror: the run folder alone."""

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        pass

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def log_image(self, step: int, name: str, path: Path) -> None:
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
        if sys.modules.get("wandb") is None and find_spec("wandb") is None:  # not imported yet, which takes seconds
            raise UserError("logger=wandb needs the package wandb: pip install -e '.[wandb]'")
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

    def log_image(self, step: int, name: str, path: Path) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))}, step=step)

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

    def log_image(self, step: int, name: str, path: Path) -> None:
        def send() -> None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                self.writer.add_image(name, np.array(image.convert("RGB")), step, dataformats="HWC")

        self._send(send)

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
