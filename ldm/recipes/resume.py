"""The checkpoint from which a run is resumed: its newest valid one, one that resume= names, or none."""

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

# keys of the config that may differ from the checkpoint's, because no training step depends on them
KEYS_FREE_TO_DIFFER = {
    *("sampler", "guidance", "timestep_spacing", "metrics", "evaluator", "debug"),
    *("training.log_every", "training.sample_every", "training.save_every", "training.score"),
    *identity.NOT_HASHED,
} - {"seed"}


def final_metrics(cfg: Any, folder: Path) -> dict[str, Any] | None:
    """Read the final metrics of a finished run; None if it is not finished, or resume=never starts it again."""
    return None if cfg.get("resume") == "never" else metrics_log.read_final_metrics(folder)


def find_resume_checkpoint(
    config: Mapping[str, Any], folder: Path, chief: bool, parts: Collection[str] | None = None
) -> Checkpoint | None:
    """Return the checkpoint from which the run of `config` in `folder` goes on; None to start at step 0.

    config["resume"]: auto, must, never, or a path.  chief: whether this is the main process, which prints the damaged
    checkpoints that are skipped, and archives the files of the run that are superseded.  parts: top-level keys of the
    config on which the training steps depend; None for all.
    Raises UserError if resume=must finds no checkpoint, or naming the keys in which that of a path differs.
    """
    requested = config.get("resume") or "auto"
    for path in (folder, folder / "checkpoints", folder / "averages") if chief else ():
        atomic.remove_stale_temporaries(path)  # of a process that was killed while it wrote
    if requested == "never":
        if chief:
            archive_run(
                folder, [path for path in folder.iterdir() if not path.name.startswith((".lock", "before-", "log.txt"))]
            )
        return None
    if requested in ("auto", "must"):
        step = newest_valid(folder / "checkpoints", chief)
        if step is None and requested == "must":
            raise UserError(
                f"resume=must: no valid checkpoint in {folder / 'checkpoints'}{describe_nearest_run(config, folder)}"
            )
        return load_and_announce(step, chief)
    step = resolve_resume_path(requested, chief, (config.get("debug") or {}).get("step"))
    if step.parent != (folder / "checkpoints").absolute():
        later, _ = latest_valid_checkpoint(folder / "checkpoints")  # of an earlier start of the same command
        if later is not None and checkpoint_step(later) > checkpoint_step(step):
            return load_and_announce(later, chief)
    if differences := differing_keys(serialize.load_config(step / "config.yaml"), config, parts):
        raise UserError(
            f"resume={requested} is a checkpoint of another training: {'; '.join(differences)}; "
            "choose what it was trained with, or name in resume_allow_changes=[...] the keys that may differ"
        )
    if chief:
        checkpoints = list_checkpoints(folder / "checkpoints")
        archive_run(folder, [path for path in checkpoints if checkpoint_step(path) > checkpoint_step(step)])
    return load_and_announce(step, chief)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], parts: Collection[str] | None) -> list[str]:
    """Return each key that differs in two configs and on which a training step depends, as `key: old -> new`."""
    free = KEYS_FREE_TO_DIFFER | set(new.get("resume_allow_changes") or ())
    before, after = (
        identity.drop_keys({key: value for key, value in config.items() if parts is None or key in parts}, free)
        for config in (old, new)
    )
    return identity.config_diff(before, after)


def newest_valid(folder: Path, chief: bool, before: int | None = None) -> Path | None:
    """Return the newest valid checkpoint in a folder, of a step below `before`; `chief` prints those it skips."""
    step, skipped = latest_valid_checkpoint(folder, before)
    for path, reason in skipped if chief else []:
        print(f"skipping checkpoint {path}: {reason}", file=sys.stderr)
    return step


def resolve_resume_path(requested: str, chief: bool, before: int | None = None) -> Path:
    """Return the step folder that resume= names: itself, or the newest valid one of a run, of a step below `before`.

    Raises UserError without a valid one.
    """
    path = Path(requested).expanduser().absolute()
    if path.name.startswith("step-"):
        verify_checkpoint(path)
        return path
    step = newest_valid(path / "checkpoints" if (path / "checkpoints").is_dir() else path, chief, before)
    if step is None and before is not None and list_checkpoints(path / "checkpoints"):
        raise UserError(
            f"resume={requested}: none of its valid checkpoints is before step {before}; "
            "without resume= it begins with the first"
        )
    if step is None:
        raise UserError(
            f"resume={requested}: no valid checkpoint there; "
            "expected auto, must, never, a step folder, or a run with one"
        )
    return step


def describe_nearest_run(config: Mapping[str, Any], folder: Path) -> str:
    """Return a message with the differences to the most similar run beside `folder` that has a checkpoint."""
    candidates = []
    for path in folder.parent.glob("*/config.yaml"):
        if path.parent != folder and list_checkpoints(path.parent / "checkpoints"):
            try:
                old = identity.drop_keys(serialize.load_config(path), KEYS_FREE_TO_DIFFER)
                new = identity.drop_keys(config, KEYS_FREE_TO_DIFFER)
                candidates.append((identity.config_diff(old, new), path.parent))
            except UserError:
                continue
    if not candidates:
        return "; resume=auto starts from step 0"
    keys, other = min(candidates, key=lambda candidate: (len(candidate[0]), str(candidate[1])))
    shown = "; ".join(keys[:8]) + ("; ..." if len(keys) > 8 else "")
    return f"; {other.name} has, and differs from this config in {shown or 'name'}"


def load_and_announce(step: Path | None, chief: bool) -> Checkpoint | None:
    """Load the checkpoint of a step folder; the main process prints which it is."""
    if step is None:
        return None
    if chief:
        print(f"resuming from step {checkpoint_step(step)} ({step})", flush=True)
    return load_checkpoint(step)


def archive_run(folder: Path, paths: Collection[Path]) -> None:
    """Move superseded files of a run to the first free of before-1, before-2, ... in its folder."""
    if not paths:
        return
    archive = next(path for n in range(1, 10**6) if not (path := folder / f"before-{n}").exists())
    archive.mkdir()
    for path in paths:
        os.replace(path, archive / path.name)
    print(f"what was there is now in {archive}", file=sys.stderr)
