"""Evaluation with samples and metrics that are known: which rows, seeds and scales are asked for, and what is said."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.condition import Condition
from ldm.data.synthetic import Synthetic
from ldm.evaluation import evaluate as evaluation
from ldm.evaluation import evaluator, protocol, samples
from ldm.evaluation.evaluate import CaptionSource, EvaluationConfig
from ldm.io import atomic
from ldm.tensors import choose

CAPTIONS = CaptionSource(["a", "b", "c"], [["a1", "a2"], ["b1"], ["c1", "c2"]], seed=4)


class Suite:
    """Metrics of grey images: how far their mean is from 2, and what they were given."""

    def __init__(self, net=None, reference=None, metrics=None):
        self.net, self.reference, self.given, self.provenance = net, reference, [], {"network": "none"}

    def reset(self):
        self.given = []

    def update(self, image, label, caption):
        self.given.append((image, label, caption))

    def compute(self):
        images = torch.cat([image for image, *_ in self.given])
        return {"n": len(images), "kid_none": 7.0, "fd_none": float((images.mean() - 2).abs())}


@pytest.fixture
def asked(monkeypatch):
    """Samples whose grey level is the guidance scale; what they are asked for."""
    calls = []

    def generate(model, make_batch, rows, seed, batch_size, ts, sampler, guidance, precision):
        calls.append((list(rows), seed, guidance.keywords["scale"]))
        assert (model.name, batch_size, ts, sampler, precision) == ("model", 250, ("grid", "schedule", 5), "ddim", "32")
        for part in (rows[:2], rows[2:]):
            yield torch.full((len(part), 1, 1, 1), guidance.keywords["scale"]), make_batch(part)

    monkeypatch.setattr(evaluation, "generate_samples", generate)
    monkeypatch.setattr(evaluation, "MetricSuite", Suite)
    return calls


MODEL = SimpleNamespace(name="model", denoiser=SimpleNamespace(schedule="schedule"))
HOW = {"sampler": "ddim", "guidance": partial(Condition), "grid": lambda *of: ("grid", *of)}
SHORT = {"num": 4, "steps": 5, "seed": 100, "guidance_num": 3, "guidance_seed": 50, "precision": "32"}


def test_evaluate_chooses_the_scale_of_least_distance_on_other_seeds(asked):
    said = []
    config = EvaluationConfig(**SHORT, guidance_scales=(1.5, 2.25, 3.0))
    values = evaluation.evaluate(MODEL, config, CAPTIONS, Suite, report=said.append, **HOW)
    assert asked == [*(([0, 1, 2], 50, scale) for scale in (1.5, 2.25, 3.0)), ([0, 1, 2, 3], 100, 2.25)]
    assert values == {
        **{"n": 4, "kid_none": 7.0, "fd_none": 0.25, "guidance": 2.25, "steps": 5, "arithmetic": "32", "seed": 100},
        **{"guidance_tried": {"1.5": 0.5, "2.25": 0.25, "3.0": 1.0}, "score/network": "none"},
    }
    assert said[0] == "guidance 1.5: distance 0.50 of 3 samples"
    assert evaluation.evaluate(MODEL, EvaluationConfig(**SHORT, guidance_scales=()), CAPTIONS, Suite, **HOW) == {
        **values,
        **{"fd_none": 1.0, "guidance": 1.0, "guidance_tried": {}},
    }


def test_evaluation_while_training_is_of_the_first_scale(asked):
    config = EvaluationConfig(**SHORT, guidance_scales=(1.5, 2.25), eval_num=1000)
    values = evaluation.evaluate_during_training(MODEL, config, CAPTIONS, Suite(), **HOW)
    assert asked == [([*range(1000)], 50, 1.5)]
    assert values == {"val/kid_none_1k": 7.0, "val/fd_none_1k": 0.5}


def test_evaluation_period_and_number_have_smallest_values():
    assert EvaluationConfig(eval_every=1, eval_num=2).eval_every == 1
    for option in ({"eval_num": 1}, {"eval_every": 0}):
        with pytest.raises(ValueError, match="expected null or a step or more, and 2 or more"):
            EvaluationConfig(**option)


def test_caption_source_has_classes_in_turn_and_keyed_captions():
    batch = CAPTIONS.batch([4, 5, 0])
    assert (batch["index"], batch["label"].tolist()) == ([4, 5, 0], [1, 2, 0])
    assert batch["caption"] == [choose(CAPTIONS.captions[i % 3], 4, "told", i) for i in (4, 5, 0)]


def test_scorer_is_of_own_network_or_of_the_evaluator(tmp_path, monkeypatch):
    cfg = SimpleNamespace(evaluator=SimpleNamespace(net={"_target_": "torch.nn.Linear", "_partial_": True}))
    cfg.evaluator.net |= {"in_features": 2, "out_features": 1}
    node = {"_target_": f"{__name__}.Suite", "_partial_": True}
    assert evaluator.make_scorer(cfg, {}) == (None, {})
    data = Synthetic(num=3, size=4)
    monkeypatch.setattr(evaluator.build, "build_dataset", lambda cfg: data)
    make, baselines = evaluator.make_scorer(cfg, {**node, "net": {"_target_": "ldm.metrics.features.Brightness"}})
    assert baselines == {}
    torch.testing.assert_close(make().reference[:, 0], data.images.float().mean((1, 2, 3)))
    assert not make().net.training
    trained = nn.Linear(2, 1)
    atomic.write_tensors(tmp_path / "weights.safetensors", trained.state_dict())
    atomic.write_tensors(tmp_path / "reference.safetensors", {"features": torch.ones(2, 3)})
    monkeypatch.setattr(evaluator.cache, "ensure_evaluator", lambda cfg: tmp_path)
    make, baselines = evaluator.make_scorer(cfg, node)
    assert torch.equal(make().net.weight, trained.weight)
    assert not make().net.training
    assert not make().net.weight.requires_grad
    assert torch.equal(make().reference, torch.ones(2, 3))
    assert baselines == {}
    (tmp_path / "metrics.json").write_text('{"fd": 1.5}')
    assert evaluator.make_scorer(cfg, node)[1] == {"fd": 1.5}


class Pairs:
    """The mean difference of pairs, as the one metric of reconstruction."""

    def __init__(self):
        self.parts = []

    def update(self, image, made):
        self.parts.append(made - image)

    def compute(self):
        return {"shift": float(torch.cat(self.parts).mean()) if self.parts else None}


def request(**changed):
    options = {"task": {"_target_": "a.generate"}, "sampler": {"_target_": "a.ddim"}, "guidance": {"_target_": "a.cfg"}}
    options |= {"timestep_spacing": {"_target_": "a.trailing"}, "prompt": None, "prompts": None, "label": None}
    data, config = SimpleNamespace(fingerprint="print"), SimpleNamespace(training={})
    batch = lambda rows: {"image": torch.zeros(len(rows), 1, 2, 2), "label": torch.tensor(rows)}  # noqa: E731
    plain = {
        **{"seed": 10, "held_out": None, "inputs": {}, "batch": batch, "steps": 3, "weights": "raw", "tile": None},
        **{"source": SimpleNamespace(data_card=data, latent_space="space", config=config), "precision": "32"},
        "sizes": {},
        **{"reconstruction_metrics": {"_target_": f"{__name__}.Pairs", "_partial_": True}, "metrics": {}},
        **{"options": {**options, "labels": "balanced"}},
    }
    return SimpleNamespace(**plain | changed)


def test_evaluation_of_samples_pairs_them_with_held_out_images(monkeypatch):
    monkeypatch.setattr(samples, "BATCH", 2)
    images = {seed: torch.full((1, 2, 2), 255 * (seed % 2), dtype=torch.uint8) for seed in (10, 11, 13)}
    suite = Suite()
    values = samples.evaluate_with(request(), images, suite)
    assert [label.tolist() for _, label, _ in suite.given] == [[0, 1], [3]]
    assert torch.cat([image for image, *_ in suite.given]).unique(dim=0)[:, 0, 0, 0].tolist() == [-1, 1]
    assert values["fd_none"] == pytest.approx(2 - 1 / 3)
    assert (values["score/n"], values["score/network"]) == (3, "none")
    assert "shift" not in values
    assert samples.evaluate_with(request(held_out=1), images, Suite())["shift"] == pytest.approx(1 / 3)
    assert "shift" not in samples.evaluate_with(request(held_out=1, inputs={"image": 1}), images, Suite())
    other = {seed: torch.zeros(1, 4, 4, dtype=torch.uint8) for seed in images}
    assert samples.evaluate_with(request(held_out=1), other, Suite())["shift"] is None, "of another size"
    nothing = request(batch=lambda rows: {})
    samples.evaluate_with(nothing, images, suite)
    assert [(label.tolist(), caption) for _, label, caption in suite.given] == [([0, 0], None), ([0], None)]


def test_evaluation_of_samples_is_none_without_metrics(monkeypatch):
    made = [(None, {}), (Suite, {})]
    monkeypatch.setattr(evaluator, "make_scorer", lambda cfg, metrics: made.pop(0))
    images = {10: torch.zeros(1, 2, 2, dtype=torch.uint8)}
    assert samples.evaluate_samples(request(), images) == {}
    assert samples.evaluate_samples(request(), images)["fd_none"] == 3


def test_protocol_says_what_samples_are_conditioned_on():
    said = samples.sampling_protocol(request())
    assert said == {
        **{"data": "print", "labels": "balanced", "autoencoder": "space", "task": "generate()", "sampler": "ddim()"},
        **{"grid": "trailing()", "steps": 3, "guidance": "cfg()", "scale": 1.0, "weights": "raw", "arithmetic": "32"},
    }
    assert samples.sampling_protocol(request(tile=8))["tile"] == 8
    assert samples.sampling_protocol(request(held_out=1))["labels"] == "held out"
    assert samples.sampling_protocol(request(sizes={"crop": (1, 2)}))["crop"] == [1, 2]
    for name in ("prompt", "prompts", "label"):
        options = {**request().options, name: "x", "guidance": {"_target_": "a.cfg", "scale": 3}}
        said = samples.sampling_protocol(request(options=options))
        assert (said["labels"], said["scale"]) == (f"{name}=x", 3.0)
    assert protocol.describe_node([True, 0.5, "a/b", "c", None]) == "[True, 0.5, b, c, None]"
