import pytest

from ldm.data.degrade import DegradedDataset, bicubic
from ldm.data.synthetic import Synthetic
from ldm.errors import UserError
from ldm.recipes.checks import check_keys
from omegaconf import OmegaConf

DATA = Synthetic(num=2, size=16)
SPATIAL = "ldm.conditioner.spatial."


def config(*targets, latents="cached"):
    parts = {f"part{i}": {"_target_": target, **values} for i, (target, values) in enumerate(targets)}
    node = {"_target_": "ldm.conditioner.compose.Compose", **parts}
    return OmegaConf.create({"conditioner": node, "training": {"latents": latents}})


@pytest.mark.parametrize("latents", ["cached", "online"])
@pytest.mark.parametrize(
    ("target", "values", "missing", "remedy"),
    [
        ("LowResolution", {}, "low_res", "degradation=bicubic_x4"),
        ("MaskedImage", {}, "mask", "degradation=mask"),
        ("SemanticMap", {"classes": 3}, "map", "data with semantic maps, as data=blue_marble"),
        ("SpatialMap", {"key": "relief"}, "relief", "data=blue_marble"),
        ("SpatialMap", {"key": "depth"}, "depth", "data that have it"),
    ],
)
def test_a_condition_that_the_data_never_give_is_refused(target, values, missing, remedy, latents):
    with pytest.raises(UserError) as error:
        check_keys(config((SPATIAL + target, values), latents=latents), DATA)
    assert str(error.value) == (
        f"conditioner: {SPATIAL}{target} needs {missing}, which these data do not have; choose {remedy}"
    )


@pytest.mark.parametrize("latents", ["cached", "online"])
def test_conditions_that_the_data_give_are_accepted(latents):
    degraded = DegradedDataset(DATA, low_res=bicubic, mask=lambda size, draw: DATA.pixels([0])[:, :1])
    targets = [(SPATIAL + name, {}) for name in ("LowResolution", "MaskedImage")]
    check_keys(config(*targets, ("ldm.conditioner.label.Label", {}), latents=latents), degraded)
    check_keys(config(("ldm.conditioner.label.Label", {}), ("ldm.conditioner.text.Text", {}), latents=latents), DATA)
