"""A conditioner that is told captions and writes down, word for word, what it was told."""

import json
import os
from typing import Any

import torch

from ldm.condition import Condition
from ldm.conditioner.label import Label


class Spy(Label):
    """As Label, every caption being class 0; the captions of a batch go to the file $LDM_SPY, one JSON text a line."""

    keys = ("caption",)

    def forward(self, batch: dict[str, Any]) -> Condition:
        if place := os.environ.get("LDM_SPY"):
            with open(place, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(caption) + "\n" for caption in batch["caption"])
        return super().forward({"label": torch.zeros(len(batch["caption"]), dtype=torch.long)})
