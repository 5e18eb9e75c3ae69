"""Where a run begins: at its newest valid checkpoint, at one that is named, or anew."""

import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.step import (
    Checkpoint,
    checkpoint_step,
    latest_valid_checkpoint,
    list_checkpoints,
    load_checkpoint,
    verify_checkpoint,
)
from ldm.config import serialize
from ldm.errors import UserError
from ldm.io import atomic
from ldm.runs import identity, metrics_log

KEYS_FREE_TO_DIFFER = {  # what may differ from the checkpoint's config: it changes no step
    *(
        "sampler",
        "guidance",
        "timestep_spacing",
        "metrics",
        "evaluator",
        "training.log_every",
        "training.sample_every",
        "training.save_every",
    ),
    *("training.score", "debug", *identity.NOT_HASHED),
} - {"seed"}


def final_metrics(cfg: Any, folder: Path) -> dict[str, Any] | None:
    """The final metrics of a run that is done, unless it is to begin anew."""
    return None if cfg.get("resume") == "never" else metrics_log.read_final_metrics(folder)


def find_resume_checkpoint(
    config: Mapping[str, Any], folder: Path, chief: bool, parts: Collection[str] | None = None
) -> Checkpoint | None:
    """The checkpoint that the run of `config` in `folder` goes on from, by its `resume`: auto, must, never, or a path; None to begin.

    parts: the top keys of the config that decide its steps; None for all.  What was damaged and passed over is said.  The chief sets aside
    what is overtaken.  Raises UserError if there is none though there must be, or naming the keys in which the one named differs.
    """
    wanted = config.get("resume") or "auto"
    for place in (folder, folder / "checkpoints", folder / "averages") if chief else ():
        atomic.remove_stale_temporaries(place)  # what a killed process was writing
    if wanted == "never":
        if chief:
            archive_run(
                folder, [path for path in folder.iterdir() if not path.name.startswith((".lock", "before-", "log.txt"))]
            )
        return None
    if wanted in ("auto", "must"):
        step = newest_valid(folder / "checkpoints", chief)
        if step is None and wanted == "must":
            raise UserError(
                f"resume=must: no valid checkpoint in {folder / 'checkpoints'}{describe_nearest_run(config, folder)}"
            )
        return load_and_announce(step, chief)
    step = resolve_resume_path(wanted, chief, (config.get("debug") or {}).get("step"))
    if step.parent != (folder / "checkpoints").absolute():
        own, _ = latest_valid_checkpoint(folder / "checkpoints")  # of an earlier start of the same command
        if own is not None and checkpoint_step(own) > checkpoint_step(step):
            return load_and_announce(own, chief)
    if other := differing_keys(serialize.load_config(step / "config.yaml"), config, parts):
        raise UserError(
            f"resume={wanted} is a checkpoint of another training: {'; '.join(other)}; choose what it was trained with, "
            "or name in resume_allow_changes=[...] the keys that may differ"
        )
    if chief:
        archive_run(
            folder,
            [
                path
                for path in list_checkpoints(folder / "checkpoints")
                if checkpoint_step(path) > checkpoint_step(step)
            ],
        )
    return load_and_announce(step, chief)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], parts: Collection[str] | None) -> list[str]:
    """Each key of two configs that decides a step and differs, as `key: old -> new`."""
    free = KEYS_FREE_TO_DIFFER | set(new.get("resume_allow_changes") or ())
    one, two = (
        identity.drop_keys({key: value for key, value in all.items() if parts is None or key in parts}, free)
        for all in (old, new)
    )
    return identity.config_diff(one, two)


def newest_valid(folder: Path, chief: bool, before: int | None = None) -> Path | None:
    step, skipped = latest_valid_checkpoint(folder, before)
    for path, reason in skipped if chief else []:
        print(f"skipping checkpoint {path}: {reason}", file=sys.stderr)
    return step


def resolve_resume_path(wanted: str, chief: bool, before: int | None = None) -> Path:
    """The step folder that a path names: itself, or the newest valid one of a run, of an earlier step than `before`. Raises UserError."""
    path = Path(wanted).expanduser().absolute()
    if path.name.startswith("step-"):
        verify_checkpoint(path)
        return path
    step = newest_valid(path / "checkpoints" if (path / "checkpoints").is_dir() else path, chief, before)
    if step is None and before is not None and list_checkpoints(path / "checkpoints"):
        raise UserError(
            f"resume={wanted}: none of its valid checkpoints is before step {before}; without resume= it begins with the first"
        )
    if step is None:
        raise UserError(
            f"resume={wanted}: no valid checkpoint there; expected auto, must, never, a step folder, or a run with one"
        )
    return step


def describe_nearest_run(config: Mapping[str, Any], folder: Path) -> str:
    """In words, how the config of the most similar run beside `folder` differs."""
    found = []
    for path in folder.parent.glob("*/config.yaml"):
        if path.parent != folder and list_checkpoints(path.parent / "checkpoints"):
            try:
                old, new = (
                    identity.drop_keys(one, KEYS_FREE_TO_DIFFER) for one in (serialize.load_config(path), config)
                )
                found.append((identity.config_diff(old, new), path.parent))
            except UserError:
                continue
    if not found:
        return "; resume=auto begins anew"
    keys, other = min(found, key=lambda one: (len(one[0]), str(one[1])))
    shown = "; ".join(keys[:8]) + ("; ..." if len(keys) > 8 else "")
    return f"; {other.name} has, and differs from what is asked in {shown or 'name'}"


def load_and_announce(step: Path | None, chief: bool) -> Checkpoint | None:
    if step is None:
        return None
    if chief:
        print(f"resuming from step {checkpoint_step(step)} ({step})", flush=True)
    return load_checkpoint(step)


def archive_run(folder: Path, paths: Collection[Path]) -> None:
    """Move what a run overtakes into before-1, before-2, ... of its folder."""
    if not paths:
        return
    aside = next(path for n in range(1, 10**6) if not (path := folder / f"before-{n}").exists())
    aside.mkdir()
    for path in paths:
        os.replace(path, aside / path.name)
    print(f"what was there is now in {aside}", file=sys.stderr)
