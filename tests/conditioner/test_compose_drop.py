"""Conditions dropped key by key: at the rates asked for, by keyed noise, and to what the null is."""

import pytest
import torch
import yaml
from smoke import ROOT

from ldm.conditioner.compose import Compose, condition_or_null, drop_condition
from ldm.conditioner.label import Label, LabelVector
from ldm.conditioner.none import Unconditional
from ldm.conditioner.spatial import SemanticMap, SourceImage, SpatialMap
from ldm.tensors import KeyedNoise

DRAWS = 10_000


def batch(n: int, seed: int = 0) -> dict:
    return {
        "label": torch.zeros(n, dtype=torch.long),
        "relief": torch.rand(n, 1, 4, 4) + 1,
        "noise": KeyedNoise(seed, list(range(n))),
    }


def model() -> Compose:
    return Compose({"a": 0.1, "c": 0.5}, a=Label(3, dim=2), b=LabelVector(3, dim=2), c=SpatialMap(2))


def kept(conditioner: Compose, told: dict) -> dict[str, torch.Tensor]:
    """Which rows each conditioner still tells."""
    cond, null = conditioner(told), conditioner.null(told)
    return {
        "a": (cond.context != null.context).flatten(1).any(1),
        "b": (cond.vector != null.vector).any(1),
        "c": (cond.concat != null.concat).flatten(1).any(1),
    }


def test_compose_drops_each_key_at_its_rate():
    rows = kept(model(), batch(DRAWS))
    rates = {name: 1 - float(keep.float().mean()) for name, keep in rows.items()}
    assert rates["b"] == 0
    for name, rate in (("a", 0.1), ("c", 0.5)):
        assert abs(rates[name] - rate) < 4 * (rate * (1 - rate) / DRAWS) ** 0.5, rates
    both = float((~rows["a"] & ~rows["c"]).float().mean())
    assert abs(both - 0.05) < 4 * (0.05 * 0.95 / DRAWS) ** 0.5


def test_drop_condition_drops_all_at_its_rate():
    label, told = Label(3, dim=2), batch(DRAWS)
    cond = drop_condition(label(told), label.null(told), told["noise"], "drop", 0.2)
    rate = float((cond.context == label.null(told).context).flatten(1).all(1).float().mean())
    assert abs(rate - 0.2) < 4 * (0.2 * 0.8 / DRAWS) ** 0.5
    nothing = Unconditional()
    drop_condition(nothing(told), nothing.null(told), told["noise"], "drop", 0.2)


def test_instruct_pix2pix_drops_each_alone_and_both_at_5_percent():
    """Brooks et al. 2023, section 3.2.1, by independent rates and training.cond_drop_prob, for rows keyed by index."""
    config = yaml.safe_load((ROOT / "experiments/instruct_pix2pix/sweep.yaml").read_text())
    rates, every = config["conditioner"]["drop"], config["training"]["cond_drop_prob"]
    text, image = rates["minilm"], rates["source_image"]
    for rate in (
        (1 - every) * text * (1 - image),
        (1 - every) * image * (1 - text),
        every + (1 - every) * text * image,
    ):
        assert rate == pytest.approx(0.05, abs=1e-9)
    source = SourceImage(1, 1, lambda image: image)
    made = Compose({"text": text, "source_image": image}, text=Label(3, dim=2), source_image=source).train()

    def present(rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        told = {"label": torch.zeros(len(rows)).long(), "source": torch.ones(len(rows), 1, 1, 1)}
        told["noise"] = KeyedNoise(0, rows)
        null = made.null(told)
        cond = drop_condition(made(told), null, told["noise"], "drop", every)
        return (cond.context != null.context).flatten(1).any(1), (cond.concat != null.concat).flatten(1).any(1)

    has_text, has_image = present(range(DRAWS))
    for rows in (has_text & ~has_image, ~has_text & has_image, ~has_text & ~has_image):
        assert abs(float(rows.float().mean()) - 0.05) < 4 * (0.05 * 0.95 / DRAWS) ** 0.5
    for whole, part in zip((has_text, has_image), present(range(70, 90)), strict=True):
        assert torch.equal(whole[70:90], part)


def test_compose_drop_depends_on_row_only():
    conditioner, whole = model(), batch(20)
    part = {"label": whole["label"][5:9], "relief": whole["relief"][5:9], "noise": KeyedNoise(0, [5, 6, 7, 8])}
    for name, keep in kept(conditioner, part).items():
        assert torch.equal(keep, kept(conditioner, whole)[name][5:9])
    other = kept(conditioner, {**whole, "noise": KeyedNoise(1, list(range(20)))})
    assert not torch.equal(other["c"], kept(conditioner, whole)["c"])


def test_compose_drops_only_in_training():
    told = batch(50)
    assert all(keep.all() for keep in kept(model().eval(), told).values())


def test_compose_uses_null_for_missing_keys():
    conditioner = model().eval()
    told = batch(3)
    cond = conditioner({"relief": told["relief"]})
    assert torch.equal(cond.context, conditioner.null(told).context)
    assert torch.equal(cond.concat, conditioner(told).concat)
    cond = conditioner({"noise": told["noise"]})
    assert torch.equal(cond.vector, conditioner.null(told).vector)
    assert cond.concat.shape == (3, 2, 1, 1)
    assert cond.expand_concat(5, 6).concat.shape == (3, 2, 5, 6)


def test_condition_or_null_of_compose_uses_available_keys():
    conditioner, told = model().eval(), batch(3)
    cond = condition_or_null(conditioner, {"label": told["label"] + 1})
    assert torch.equal(cond.vector, conditioner({"label": told["label"] + 1}).vector)
    assert not torch.equal(cond.vector, conditioner.null(told).vector)
    assert torch.equal(condition_or_null(conditioner, {"noise": told["noise"]}).vector, conditioner.null(told).vector)


def test_compose_expands_null_to_size_of_others():
    two = Compose(map=SemanticMap(2, 3, channels=1), relief=SpatialMap(2)).eval()
    cond = two({"map": torch.ones(2, 4, 6, dtype=torch.long)})
    assert cond.concat.shape == (2, 3, 2, 3)
    assert not cond.concat[:, 1:].any()
    assert cond.where(torch.tensor([True, False]), two.null({"map": torch.ones(2, 4, 6)})).concat.shape == (2, 3, 2, 3)
    assert cond.cat(two.null({"noise": KeyedNoise(0, [1])})).concat.shape == (3, 3, 2, 3)
    with pytest.raises(ValueError, match="latents of 2x3, those to be sampled are 4x4"):
        cond.expand_concat(4, 4)


@pytest.mark.parametrize("drop", [{"d": 0.1}, {"a": 1.5}, {"a": -0.1}])
def test_compose_rejects_invalid_drop_rate(drop):
    with pytest.raises(ValueError, match=r"drop\.\w="):
        Compose(drop, a=Label(3))


def test_condition_or_null_infers_rows_or_fails():
    label = Label(3, dim=2)
    assert torch.equal(
        condition_or_null(label, {"noise": KeyedNoise(0, [1, 2])}).context, label.null({"caption": ["a", "b"]}).context
    )
    with pytest.raises(ValueError, match="has no rows"):
        label.null({"index": 3})
