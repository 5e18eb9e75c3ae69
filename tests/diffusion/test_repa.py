from functools import partial

import pytest
import torch
from smoke import here, train
from torch import nn

from ldm.checkpoint.step import latest_valid_checkpoint, load_checkpoint
from ldm.condition import Condition
from ldm.diffusion import objective, prediction, schedule, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.repa import REPA, tokens_to_map
from ldm.runs.metrics_log import read_metrics_log
from ldm.tensors import KeyedNoise

PLAIN = objective.Objective(partial(times.stratified, density=times.uniform), weighting.output)
BATCH = {"image": torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1}
Z = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x, time, cond):
        return self.head(self.stem(x).relu())


class Encoder(nn.Module):
    """Two fixed maps of the image, as an image network's stages would be."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(3, 5, 8, 8)

    def features(self, image):
        return [self.first(image), self.second(image)]


def make(layer="stem", **options):
    torch.manual_seed(0)
    d = Denoiser(Net(), schedule.Flow(), prediction.Flow())
    plain = objective.Objective(PLAIN.times, PLAIN.weighting)
    return d, REPA(plain, Encoder(), layer, stage=1, channels=6, features=5, hidden=16, **options)


def test_repa_loss_subtracts_weighted_similarity():
    d, repa = make(weight=0.7)
    terms, plain = (
        repa(d, Z, Condition(), KeyedNoise(0, range(4)), BATCH),
        PLAIN(d, Z, Condition(), KeyedNoise(0, range(4)), BATCH),
    )
    assert torch.allclose(terms["loss"], plain["loss"] - 0.7 * terms["similarity"])
    assert set(terms) == {"loss", "error", "t", "similarity"}
    assert terms["similarity"].abs().max() <= 1
    assert not d.net.stem._forward_hooks


def test_repa_similarity_is_cosine_per_position():
    _, repa = make()
    hidden, wanted = torch.randn(2, 6, 4, 4), torch.randn(2, 5, 4, 4)
    p = repa.project(hidden[1, :, 2, 3])
    want = p @ wanted[1, :, 2, 3] / p.norm() / wanted[1, :, 2, 3].norm()
    assert torch.allclose(repa.similarity(hidden, wanted)[1, 2, 3], want, atol=1e-6)
    tokens = hidden.flatten(2).mT  # (B, h * w, C), row by row
    assert torch.equal(tokens_to_map(tokens), hidden)
    assert tokens_to_map(hidden) is hidden


def test_repa_trains_net_and_projector_not_encoder():
    d, repa = make()
    opt = torch.optim.Adam([p for m in (d, repa) for p in m.parameters() if p.requires_grad], lr=3e-3)
    frozen = [p.clone() for p in repa.encoder.parameters()]
    similarity = []
    for step in range(60):
        terms = repa(d, Z, Condition(), KeyedNoise(0, [(step, i) for i in range(4)]), BATCH)
        opt.zero_grad()
        terms["loss"].mean().backward()
        opt.step()
        similarity.append(float(terms["similarity"].detach().mean()))
    assert similarity[-1] > similarity[0] + 0.3
    assert all(torch.equal(a, b) for a, b in zip(frozen, repa.encoder.parameters(), strict=True))
    assert d.net.stem.weight.grad.abs().max() > 0


class Downloaded(Encoder):
    """In the place of the encoder whose weights are fetched."""

    def __init__(self, size: int, scale: float, weights: str | None):
        super().__init__()

    def features(self, image):
        return super().features(image.expand(-1, 3, -1, -1))


def test_repa_trains_from_command_line_on_cached_latents(smoke, tmp_path):
    typed = ("encoder._target_=test_repa.Downloaded", "stage=1", "channels=32", "features=5", "hidden=16")
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        run = train("objective=repa", *(f"objective.{word}" for word in typed), "metrics=none")
    rows = read_metrics_log(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(
        row["train/loss"] == pytest.approx(row["train/error"] - 0.5 * row["train/similarity"], rel=1e-3) for row in rows
    )
    kept = load_checkpoint(latest_valid_checkpoint(run / "checkpoints")[0]).tensors["model"]
    assert "objective.project.0.weight" in kept  # the projector goes on where it stopped
    assert not any("encoder" in name and name.startswith("objective") for name in kept)


def test_repa_rejects_invalid_layer_or_batch():
    d, repa = make("midle")
    with pytest.raises(ValueError, match=r"no layer 'midle'; REPA can align one of stem, head"):
        repa(d, Z, Condition(), KeyedNoise(0, range(4)), BATCH)
    with pytest.raises(ValueError, match="the batch has no `image`"):
        make()[1](d, Z, Condition(), KeyedNoise(0, range(4)), {})
    with pytest.raises(ValueError, match="channels=6: head has 2 channels; set channels=2"):
        make("head")[1](d, Z, Condition(), KeyedNoise(0, range(4)), BATCH)
    repa.layer, repa.stage = "stem", 0
    with pytest.raises(ValueError, match="features=5: stage 0 of the encoder has 4 channels"):
        repa(d, Z, Condition(), KeyedNoise(0, range(4)), BATCH)


def test_repa_removes_hook_after_error():
    d, repa = make()
    repa.objective.forward = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        repa(d, Z, Condition(), KeyedNoise(0, range(4)), BATCH)
    assert not d.net.stem._forward_hooks
