import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from smoke import ROOT

from ldm.conditioner.size import uncropped
from ldm.config.build import supplied_kwargs
from ldm.config.compose import compose_option
from ldm.config.overrides import ConfigSearchPath
from ldm.tensors import KeyedNoise

KNOWN = {"num_classes": 10, "factor": 2, "image_channels": 3, "z_channels": 3}
KNOWN |= {"encode": lambda image: image[..., ::2, ::2]}
OPTIONS = ConfigSearchPath((ROOT / "conf",), ROOT).groups()["conditioner"]
SMALL = {"wordpiece": {"dim": 16, "layers": 1}, "layout": {"dim": 16, "layers": 1}, "semantic_map": {"classes": 3}}
ELSEWHERE = (  # need weights, or parts: test_OPTION.py, interop/test_pipelines.py
    *("clip", "clip_context", "clip_image", "t5", "compose", "retrieval"),
)


def batch() -> dict:
    return {
        "caption": ["a bag", "a photo of an ankle boot"],
        "label": torch.tensor([8, 9]),
        "map": torch.ones(2, 8, 8, dtype=torch.long),
        "relief": torch.rand(2, 1, 8, 8),
        "before": torch.rand(2, 1, 8, 8),
        "low_res": torch.rand(2, 3, 2, 2),
        "image": torch.rand(2, 3, 8, 8),
        "mask": torch.rand(2, 1, 8, 8).round(),
        "boxes": [[(3, 0.0, 0.0, 0.5, 1.0)], []],
        "source": torch.rand(2, 3, 8, 8),
        "vector": torch.rand(2, 7),
        **uncropped(2, 8, 8),
        "noise": KeyedNoise(0, [0, 1]),
    }


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ELSEWHERE])
def test_conditioner_option_builds_condition_and_null(option):
    config = OmegaConf.merge(compose_option("conditioner", option), SMALL.get(option, {}))
    conditioner = instantiate(config, **supplied_kwargs(config, KNOWN))
    told, null = conditioner(batch()), conditioner.null(batch())
    for cond in (told, null, conditioner.null({"noise": KeyedNoise(0, [0, 1])})):
        for field, dim in ((cond.context, conditioner.context_dim), (cond.vector, conditioner.vector_dim)):
            assert (None if field is None else (len(field), field.shape[-1])) == (None if dim is None else (2, dim))
        assert (0 if cond.concat is None else cond.concat.shape[1]) == conditioner.concat_channels
    assert set(conditioner.keys) <= batch().keys()
    told.where(torch.tensor([True, False]), null)
    told.cat(null.expand_concat(*([] if told.concat is None else told.concat.shape[-2:]) or (4, 4)))
