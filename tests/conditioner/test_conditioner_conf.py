from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm.build import plain
from ldm.validate import signature_of, validate

CONF = Path(__file__).parents[2] / "conf" / "conditioner"
CLASSES = {"num_classes": 10}
SUPPLIED = {"ldm.conditioner.label.Label": CLASSES, "ldm.conditioner.label.LabelVector": CLASSES}
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_it_writes_out_every_parameter(option):
    config = plain(OmegaConf.load(CONF / f"{option}.yaml"))
    validate(config, supplied=SUPPLIED)
    for node in filter(None, (config, config.get("encoder"))):
        target = node.pop("_target_")
        wanted = signature_of(target)
        assert node.keys() == (wanted.parameters.keys() if wanted else set()) - SUPPLIED.get(target, {}).keys()


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "clip"])  # which has no weights here; see test_clip.py
def test_it_instantiates_and_tells(option):
    config = OmegaConf.load(CONF / f"{option}.yaml")
    conditioner = instantiate(config, **SUPPLIED.get(config._target_, {}))
    batch = {"caption": ["a bag", "a photo of an ankle boot"], "label": torch.tensor([8, 9])}
    for cond in (conditioner(batch), conditioner.null(batch)):
        for told, dim in ((cond.context, conditioner.context_dim), (cond.vector, conditioner.vector_dim)):
            assert (None if told is None else (len(told), told.shape[-1])) == (None if dim is None else (2, dim))
    assert set(conditioner.keys) <= batch.keys()
