"""Where numbers and pictures go besides the run folder."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """A mirror of what a run writes to its folder."""

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, path: Path) -> None: ...
    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def finish(self, summary: Mapping[str, Any]) -> None: ...


class Silent:
    """No mirror: the run folder alone."""

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, path: Path) -> None: ...
    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def finish(self, summary: Mapping[str, Any]) -> None: ...


class WandB:
    """Weights & Biases: config (flat by group choice too), curves, pictures, tables; one run a folder, taken up again on resume.

    mode: online, offline, or None: online where there is a key, else offline, for W&B would ask or wait.  Its failures never end a run.
    """

    def __init__(self, project: str = "ldm", group: str | None = None, tags: Sequence[str] = (), mode: str | None = None):
        self.project, self.group, self.tags, self.mode = project, group, list(tags), mode
        self.run: Any = None

    def start(self, folder: Path, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        mode = self.mode or os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        os.environ["WANDB_MODE"] = mode  # before the import, so that nothing prompts
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        settings = wandb.Settings(init_timeout=20, console="off", x_disable_stats=True)
        options: dict[str, Any] = dict(project=self.project, group=self.group, tags=self.tags, dir=str(folder), name=folder.name)
        options |= dict(id=folder.name, resume="allow", config={**config, "choice": dict(choices)}, settings=settings)
        try:
            self.run = wandb.init(mode=mode, **options)
        except Exception as error:
            print(f"W&B did not answer ({one_line(error)}); writing offline, `wandb sync` sends it later")
            try:
                self.run = wandb.init(mode="offline", **options)
            except Exception as again:
                print(f"W&B is off for this run: {one_line(again)}")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._send(lambda run: run.log(dict(values), step=step))

    def picture(self, step: int, name: str, path: Path) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))}, step=step)

        self._send(send)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})

        if rows:
            self._send(send)

    def finish(self, summary: Mapping[str, Any]) -> None:
        def send(run: Any) -> None:
            run.summary.update(dict(summary))
            run.finish()

        self._send(send)

    def _send(self, send: Callable[[Any], None]) -> None:
        if self.run is not None:
            try:
                send(self.run)
            except Exception as error:
                print(f"W&B stopped taking records: {one_line(error)}")
                self.run = None


def one_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def has_key() -> bool:
    """Whether a W&B key is set, in the environment or in ~/.netrc."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
