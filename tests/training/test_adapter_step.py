"""Three steps of every adapter's training by the code and by hand; all other weights stay as they are."""

from functools import partial
from pathlib import Path

import linear_model as linear
import pytest
import torch
from controlnet_by_hand import RESIDUAL_WEIGHT, ControlByHand, TinyUNet
from formulas import draw, expand, input_factor
from linear_model import Inputs
from objectives_by_hand import Setting, compare, denoising, evaluate, step_of
from steps_by_hand import CLIP, adamw, assert_steps_equal, micro_batches, train, train_by_hand
from test_diffusion_step import denoiser, plain
from torch import nn

from ldm.adapter.controlnet import ControlNet
from ldm.adapter.lora import LoRA
from ldm.adapter.textual_inversion import TextualInversion
from ldm.conditioner.hint import HintConditioner, Relief
from ldm.conditioner.text import Text, TextTokensOnly
from ldm.conditioner.tokens import TextFeatures
from ldm.ema import PowerEMA
from ldm.training.diffusion import LitDiffusion

S = Setting()
EACH = pytest.mark.parametrize(("precision", "accumulate"), [("64", 1), ("64", 2), ("32", 1)])
RANK, ALPHA, TEXT_DROP, DIM, WORD = 2, 3.0, 0.5, 4, "zorbo"
PIECES = ("", "a", "cat", "zor", "bo", "dog", "hat")  # the first ends every text
TEXTS = ("a zorbo", "a dog", "zorbo hat zorbo", "", "cat", "a cat")


def compare_adapter(model, gradients_of, data, folder, precision, accumulate):
    lit = LitDiffusion(model, plain(S), adamw, S.drop, CLIP, linear.SEED)
    weights, average = linear.double_weights(lit), PowerEMA(model, 0.2)
    expected = train_by_hand(weights, micro_batches(data, linear.SEED, accumulate), gradients_of)
    actual = train(lit, average, data, folder, precision, accumulate)
    assert_steps_equal(actual, expected, precision)
    frozen = {n: p for n, p in lit.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p.double(), weights[n]) for n, p in frozen.items())
    assert frozen.keys() | expected[0].weights.keys() == weights.keys()
    return expected


@EACH
def test_lora_step_matches_hand_computation(precision, accumulate, tmp_path):
    """Of W + alpha / rank up down, up has gradient alpha / rank G down^T, down has alpha / rank up^T G."""
    model = linear.make_model(partial(denoiser, S))
    LoRA(RANK, ALPHA, ("mix", "read")).apply_to(model)
    unadapted, scale = step_of(S, denoising), ALPHA / RANK

    def gradients_of(weights, batch):
        effective, parts = dict(weights), {}
        for name in ("mix", "read"):
            prefix = f"{linear.NET}{name}.parametrizations.weight."
            base, up, down = (weights[prefix + part] for part in ("original", "0.up", "0.down"))
            effective[f"{linear.NET}{name}.weight"] = base + scale * up @ down
            parts[f"{linear.NET}{name}.weight"] = prefix, up, down
        terms, gradients = unadapted(effective, batch)
        result = {}
        for name, (prefix, up, down) in parts.items():
            result |= {
                f"{prefix}0.down": scale * up.T @ gradients[name],
                f"{prefix}0.up": scale * gradients[name] @ down.T,
            }
        return terms, result

    steps = compare_adapter(model, gradients_of, linear.Rows("image"), tmp_path, precision, accumulate)
    down = f"{linear.NET}mix.parametrizations.weight.0.down"
    assert [bool(step.gradients[down].any()) for step in steps] == [False, True, True]


@EACH
def test_controlnet_step_matches_hand_computation(precision, accumulate, tmp_path):
    """Three steps reach every weight: the zero convolutions, then what is before them, then the hint's first layers."""
    model = linear.make_model(partial(denoiser, S), net=TinyUNet())
    make_hint = partial(HintConditioner, extractor=Relief(), text_drop_prob=TEXT_DROP)
    torch.manual_seed(1)
    ControlNet(make_hint).apply_to(model, RESIDUAL_WEIGHT)

    def gradients_of(weights, batch):
        z = linear.latent(weights, batch)
        t, eps = S.draw_times(batch), S.draw_eps(batch, z)
        x = expand(input_factor(S.prediction, *S.path.alpha_sigma(t))) * S.path.noised(z, eps, t)
        dropped = draw(torch.rand, linear.SEED, "drop", batch["rows"]) < S.drop
        hint_alone = draw(torch.rand, linear.SEED, "untold/hint", batch["rows"]) < TEXT_DROP
        rows = linear.label_rows(batch, dropped | hint_alone)
        hint = (batch["relief"] / 2 + 0.5).expand(-1, 3, -1, -1) * (~dropped)[:, None, None, None]
        control = ControlByHand(weights)
        table = weights[f"{linear.CONDITIONER}told.embedding.weight"]
        out = control.output(x, S.path.net_time(t), table[rows], hint)
        terms, slope = compare(S, t, out, z, eps)
        return terms, control.gradients(slope)

    steps = compare_adapter(model, gradients_of, linear.Rows("image"), tmp_path, precision, accumulate)
    moving = [sum(bool(g.any()) for g in step.gradients.values()) for step in steps]
    assert moving == [6, 17, 23]


class Pieces(nn.Module):
    """A text encoder whose context is the embedding of each piece and of the end, and whose vector is their sum."""

    context_dim, vector_dim, length, identity = DIM, DIM, 16, "pieces"

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        table = torch.randn(len(PIECES), DIM, generator=torch.Generator().manual_seed(4))
        table[0] = torch.tensor([1.0, -1.0, 1.0, 1.0])
        self.embedding = nn.Embedding.from_pretrained(table.to(dtype))

    def token_ids(self, text):
        return [PIECES.index(word) for word in text.replace(WORD, "zor bo").split()]

    def features(self, texts, length):
        ids = [torch.tensor([*self.token_ids(text), 0]) for text in texts]
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], batch_first=True)
        context = self.embedding(nn.utils.rnn.pad_sequence(ids, batch_first=True))
        return TextFeatures(context, mask, (context * mask[..., None]).sum(1))

    def forward(self, texts, length=None):
        return self.features(texts, length)


class Captions(linear.Rows):
    captions = TEXTS


@EACH
@pytest.mark.parametrize("has_vector", [True, False])
def test_textual_inversion_step_matches_hand_computation(has_vector, precision, accumulate, tmp_path):
    """The vectors of the word's two pieces learn from each of their occurrences, through context and vector."""
    encoder = Pieces(torch.float64 if precision == "64" else torch.float32)
    net = linear.LinearNet(context=DIM, vector=DIM * has_vector)
    model = linear.make_model(partial(denoiser, S), net=net)
    model.conditioner = (Text if has_vector else TextTokensOnly)(encoder, max_length=16)
    TextualInversion(WORD, "cat dog").apply_to(model)
    table, name, (first, second) = (
        encoder.embedding.weight.double(),
        "model.conditioner.vectors",
        encoder.token_ids(WORD),
    )
    initial = table[encoder.token_ids("cat dog")].mean(0)
    assert torch.allclose(model.conditioner.vectors.detach().double(), initial, rtol=1e-6)

    def gradients_of(weights, batch):
        dropped = draw(torch.rand, linear.SEED, "drop", batch["rows"]) < S.drop
        current = table.clone()
        current[[first, second]] = weights[name]
        ids = [
            [*encoder.token_ids("" if row else text), 0] for row, text in zip(dropped, batch["caption"], strict=True)
        ]
        sums = torch.stack([current[row].sum(0) for row in ids])
        norms, lengths = sums.norm(dim=1, keepdim=True), torch.tensor([[float(len(row))] for row in ids])
        vector = DIM**0.5 * sums / norms
        if not any(WORD in text for text in batch["caption"]):  # of the cache, whose numbers are float32
            vector = vector.float().double()
        cond = Inputs(sums / lengths, vector if has_vector else None)
        z = linear.latent(weights, batch)
        t, eps = S.draw_times(batch), S.draw_eps(batch, z)
        _, _, out = evaluate(S, weights, S.path.noised(z, eps, t), t, cond)
        terms, slope = compare(S, t, out, z, eps)
        by_sample = slope.sum((2, 3))
        by_token = by_sample @ weights[f"{linear.NET}read.weight"] / lengths
        if has_vector:
            by_vector, unit = by_sample @ weights[f"{linear.NET}lift.weight"], sums / norms
            by_token = by_token + DIM**0.5 / norms * (by_vector - unit * (by_vector * unit).sum(1, keepdim=True))
        counts = torch.tensor([[row.count(first), row.count(second)] for row in ids], dtype=torch.float64)
        return terms, {name: counts.T @ by_token}

    compare_adapter(model, gradients_of, Captions("image"), tmp_path, precision, accumulate)


def test_adapters_are_those_of_conf():
    names = {file.stem for file in (Path(__file__).parents[2] / "conf" / "adapter").glob("*.yaml")}
    assert names == {"lora", "controlnet", "textual_inversion"}
