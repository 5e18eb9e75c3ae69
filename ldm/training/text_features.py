"""The callback that prepares the features of captions before the first step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L

from ldm.conditioner.features import CaptionFeatures, FeatureCache, OnlineFeatures, StoredFeatures, replace_caches


class TextFeatures(L.Callback):
    """Give the text encoders of a diffusion model the features of captions that a mode asks for.

    mode: memory, captions are encoded now and kept by every process; disk, they are encoded now into files of `folder`,
    or found there; online, they are encoded in each step.
    captions: those that can be encoded now; in memory, others are encoded when they are first needed.
    The processes share the work, and each caption is encoded once.
    """

    def __init__(self, mode: Literal["memory", "disk", "online"], captions: Sequence[str], folder: Path):
        self.mode, self.captions, self.folder = mode, captions, folder

    def on_train_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        device, rank, ranks = lit.device, trainer.global_rank, trainer.world_size

        def make(features: CaptionFeatures) -> CaptionFeatures:
            if self.mode == "online":
                return OnlineFeatures(features.encoder, features.length)
            if self.mode == "disk":
                stored = StoredFeatures(features.encoder, features.length, self.captions, self.folder)
                stored.write_missing(device, rank, ranks)
                return stored
            cache = FeatureCache(features.encoder, features.length)
            cache.encode_all(self.captions, device)
            return cache

        replace_caches(cast(Any, lit).model.conditioner, make)
