"""Where a run begins: at its newest valid checkpoint, at one that is named, or anew."""

import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ldm import durable, runs
from ldm.errors import UserError

FREE = {  # what may differ from the checkpoint's config: it changes no step
    *("sampler", "guidance", "grid", "metrics", "judge", "training.log_every", "training.grid_every", "training.save_every"),
    *("training.score", "debug", *runs.RUN_ONLY),
} - {"seed"}


def finished(cfg: Any, folder: Path) -> dict[str, Any] | None:
    """The final metrics of a run that is done, unless it is to begin anew."""
    return None if cfg.get("resume") == "never" else runs.finished(folder)


def checkpoint(config: Mapping[str, Any], folder: Path, chief: bool, parts: Collection[str] | None = None) -> durable.Step | None:
    """The checkpoint that the run of `config` in `folder` goes on from, by its `resume`: auto, must, never, or a path; None to begin.

    parts: the top keys of the config that decide its steps; None for all.  What was damaged and passed over is said.  The chief sets aside
    what is overtaken.  Raises UserError if there is none though there must be, or naming the keys in which the one named differs.
    """
    wanted = config.get("resume") or "auto"
    for place in (folder, folder / "checkpoints", folder / "averages") if chief else ():
        durable.sweep(place)  # what a killed process was writing
    if wanted == "never":
        if chief:
            set_aside(folder, [path for path in folder.iterdir() if not path.name.startswith((".lock", "before-", "log.txt"))])
        return None
    if wanted in ("auto", "must"):
        step = newest(folder / "checkpoints", chief)
        if step is None and wanted == "must":
            raise UserError(f"resume=must: no valid checkpoint in {folder / 'checkpoints'}{nearest(config, folder)}")
        return said(step, chief)
    step = named(wanted, chief, (config.get("debug") or {}).get("step"))
    if step.parent != (folder / "checkpoints").absolute():
        own, _ = durable.latest_valid(folder / "checkpoints")  # of an earlier start of the same command
        if own is not None and durable.step_of(own) > durable.step_of(step):
            return said(own, chief)
    if other := differing(runs.load_config(step / "config.yaml"), config, parts):
        raise UserError(
            f"resume={wanted} is a checkpoint of another training: {'; '.join(other)}; choose what it was trained with, "
            "or name in resume_with=[...] the keys that may differ"
        )
    if chief:
        set_aside(folder, [path for path in durable.steps(folder / "checkpoints") if durable.step_of(path) > durable.step_of(step)])
    return said(step, chief)


def differing(old: Mapping[str, Any], new: Mapping[str, Any], parts: Collection[str] | None) -> list[str]:
    """Each key of two configs that decides a step and differs, as `key: old -> new`."""
    free = FREE | set(new.get("resume_with") or ())
    one, two = (runs.without({key: value for key, value in all.items() if parts is None or key in parts}, free) for all in (old, new))
    return runs.differences(one, two)


def newest(folder: Path, chief: bool, before: int | None = None) -> Path | None:
    step, skipped = durable.latest_valid(folder, before)
    for path, reason in skipped if chief else []:
        print(f"skipping checkpoint {path}: {reason}", file=sys.stderr)
    return step


def named(wanted: str, chief: bool, before: int | None = None) -> Path:
    """The step folder that a path names: itself, or the newest valid one of a run, of an earlier step than `before`. Raises UserError."""
    path = Path(wanted).expanduser().absolute()
    if path.name.startswith("step-"):
        durable.verify(path)
        return path
    step = newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path, chief, before)
    if step is None and before is not None and durable.steps(path / "checkpoints"):
        raise UserError(f"resume={wanted}: none of its valid checkpoints is before step {before}; without resume= it begins with the first")
    if step is None:
        raise UserError(f"resume={wanted}: no valid checkpoint there; expected auto, must, never, a step folder, or a run with one")
    return step


def nearest(config: Mapping[str, Any], folder: Path) -> str:
    """In words, how the config of the most similar run beside `folder` differs."""
    found = []
    for path in folder.parent.glob("*/config.yaml"):
        if path.parent != folder and durable.steps(path.parent / "checkpoints"):
            try:
                old, new = (runs.without(one, FREE) for one in (runs.load_config(path), config))
                found.append((runs.differences(old, new), path.parent))
            except UserError:
                continue
    if not found:
        return "; resume=auto begins anew"
    keys, other = min(found, key=lambda one: (len(one[0]), str(one[1])))
    shown = "; ".join(keys[:8]) + ("; ..." if len(keys) > 8 else "")
    return f"; {other.name} has, and differs from what is asked in {shown or 'name'}"


def said(step: Path | None, chief: bool) -> durable.Step | None:
    if step is None:
        return None
    if chief:
        print(f"resuming from step {durable.step_of(step)} ({step})", flush=True)
    return durable.load_step(step)


def set_aside(folder: Path, paths: Collection[Path]) -> None:
    """Move what a run overtakes into before-1, before-2, ... of its folder."""
    if not paths:
        return
    aside = next(path for n in range(1, 10**6) if not (path := folder / f"before-{n}").exists())
    aside.mkdir()
    for path in paths:
        os.replace(path, aside / path.name)
    print(f"what was there is now in {aside}", file=sys.stderr)
