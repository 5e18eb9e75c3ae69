"""From the run of a vocoder to a function from spectrograms to waves."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from torch import Tensor

from ldm.checkpoint.load import load_run_config
from ldm.errors import UserError
from ldm.io import atomic
from ldm.media.medium import Medium
from ldm.runs.folder import find_run

VOCODER_RECIPE = "ldm.recipes.vocoder.VocoderRecipe"  # by name: recipes import this package


@lru_cache(maxsize=2)
def load_vocoder(run: str) -> Callable[[Tensor], Tensor]:
    """Load the vocoder of a run, frozen: log-mel spectrograms (B, 1, bands, T) in [-1, 1] -> waves (B, HOP T).

    Raises UserError for a run of another kind, or one that has not ended.
    """
    folder, config = find_run(run), load_run_config(run)
    if config.get("training", {}).get("_target_") != VOCODER_RECIPE:
        raise UserError(f"vocoder={run}: that run trained no vocoder; expected one made by train.py training=vocoder")
    path = Path(folder) / "weights.safetensors"
    if not path.is_file():
        raise UserError(f"vocoder={run} has no weights yet: the same train.py command goes on with it")
    net = instantiate(config.training.net)()
    net.load_state_dict(atomic.read_tensors(path))
    return net.eval().requires_grad_(False)


def with_vocoder(medium: Medium, run: str) -> Medium:
    """Return the medium of sounds with a run's vocoder in place of Griffin and Lim's iteration.

    Raises UserError for another medium, and as load_vocoder does.
    """
    if medium.name != "sound":
        raise UserError(f"vocoder={run}: these samples are of medium={medium.name}; expected sounds, or no vocoder")
    return replace(medium, write=partial(cast(Any, medium.write), vocoder=load_vocoder(run)))
