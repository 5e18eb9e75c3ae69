import copy
import logging

import pytest
import torch
from torch import nn

from ldm.conditioner import features as features_module
from ldm.conditioner.features import grow
from ldm.conditioner.text import Text, nearest_caption
from ldm.conditioner.tokens import TextFeatures, Truncation

AWKWARD = [
    "it's a bag",
    "a bag, red, and a shoe",
    "a=b",
    "[a, b] {c: d} (e)",
    "stop!",
    "über schön",
    "a bag 😀",
    "3",
    "null",
    "~ 'quoted' \"twice\" \\ $x ${y}",
    "#1: 50% & more; `x` | y > z * ?",
    "true,false",
    "日本の靴",
    "word " * 300,
]


class Letters(nn.Module):
    """An encoder whose every token is a letter: context (B, L, 3) holds its code, vector the mean of them."""

    context_dim, vector_dim, length, identity = 3, 3, 64, "letters"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.truncation, self.seen = Truncation(), []

    def tokenize(self, text):
        return list(text)

    def forward(self, texts, length=None):
        self.seen += texts
        ids = [self.truncation(t, [1, *map(ord, t), 2], length or self.length) for t in texts]
        rows = [torch.tensor(row)[:, None] * self.weight for row in ids]
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], batch_first=True)
        return TextFeatures(
            nn.utils.rnn.pad_sequence(rows, batch_first=True), mask, torch.stack([row.mean(0) for row in rows])
        )


def told(*captions):
    return {"caption": list(captions)}


def test_text_returns_tokens_mask_and_vector():
    cond = Text(Letters(), 16)(told("ab", "abcdefgh", ""))
    assert cond.context.shape == (3, 16, 3)  # 10 tokens, rounded up to a multiple of 8
    assert cond.mask.sum(1).tolist() == [4, 10, 2]
    assert cond.context[0, :4, 0].tolist() == [1, ord("a"), ord("b"), 2]
    assert not cond.context[~cond.mask].any()
    torch.testing.assert_close(cond.vector.norm(dim=1), torch.full((3,), 3**0.5))
    assert Text(Letters(), 10)(told("abcdefgh")).context.shape[1] == 10


def test_text_encodes_each_caption_once_and_caches_it():
    text = Text(Letters())
    first = text(told("b", "a", "b"))
    again = text(told("c", "b", "a"))
    assert text.cache.encoder.seen == ["b", "a", "c"]
    assert torch.equal(first.context[0], again.context[1])
    assert torch.equal(first.context[0], first.context[2])
    assert torch.equal(first.vector[1], again.vector[2])


def test_text_cache_returns_features_of_each_caption():
    text, captions = Text(Letters()), [chr(60 + i % 50) * (1 + i % 7) for i in range(200)]
    for start in range(0, 200, 9):
        text(told(*captions[start : start + 9]))
    cond = text(told(*captions))
    for row, (context, mask) in enumerate(zip(cond.context, cond.mask, strict=True)):
        assert context[mask][1:-1, 0].tolist() == [ord(c) for c in captions[row]]


def test_text_cache_resets_when_full(monkeypatch):
    monkeypatch.setattr(features_module, "MAX_CACHE_VALUES", 30)
    text = Text(Letters())
    for caption in ("abcd", "efgh", "ijkl", "abcd"):
        assert text(told(caption)).context[0, 1:5, 0].tolist() == [ord(c) for c in caption]
    assert len(text.cache.row) < 3


def test_text_null_is_empty_caption():
    text = Text(Letters())
    null, empty = text.null(told("ab", "c")), text(told("", ""))
    assert torch.equal(null.context, empty.context)
    assert torch.equal(null.vector, empty.vector)
    mixed = text(told("abcdefghijk", "c")).where(torch.tensor([True, False]), null)
    assert mixed.mask.sum(1).tolist() == [13, 2]


def test_text_cached_in_inference_mode_is_trainable():
    text, layer = Text(Letters()), nn.Linear(3, 3)
    with torch.inference_mode():
        text(told("ab", "c", "d"))
    layer(text(told("ab", "e")).context).sum().backward()
    assert layer.weight.grad is not None


def test_text_cache_reset_in_inference_mode_is_correct(monkeypatch):
    monkeypatch.setattr(features_module, "MAX_CACHE_VALUES", 0)
    text = Text(Letters())
    with torch.inference_mode():
        text(told("ab"))
    assert text(told("c")).context[0, 1, 0] == ord("c")


def test_text_encoder_is_not_a_submodule():
    text = Text(Letters())
    assert not list(text.parameters())
    assert not text.state_dict()
    assert not text.double()(told("a")).context.requires_grad
    assert text.identity == "letters"
    assert torch.equal(copy.deepcopy(text)(told("a")).context, text(told("a")).context)


def test_text_truncates_long_caption_with_warning(caplog):
    text = Text(Letters(), 8)
    with caplog.at_level(logging.WARNING):
        cond = text(told("abcdefghijkl"))
        text(told("abcdefghijkl"))
    assert cond.context[0, :, 0].tolist() == [1, *map(ord, "abcdef"), 2]
    assert caplog.text.count("14 tokens cut to 8, 6 tokens dropped: 'abcdefghijkl'") == 1


def test_truncation_warns_ever_less_often(caplog):
    cut = Truncation()
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            cut("abc", [1, 2, 3], 2)
    assert (cut.texts, cut.dropped) == (1000, 1000)
    first, *later = (record.message for record in caplog.records)
    assert first == "text of 3 tokens cut to 2, 1 tokens dropped: 'abc'"
    assert later == [
        f"{first}; {n} texts cut so far, {n} tokens dropped" for n in (*range(2, 11), 16, 32, 64, 128, 256, 512)
    ]


@pytest.mark.parametrize("captions", ["a bag", [3], [None]])
def test_text_rejects_captions_that_are_not_strings(captions):
    with pytest.raises(ValueError, match="expected a list of texts"):
        Text(Letters())({"caption": captions})


@pytest.mark.parametrize("length", [1, 65])
def test_text_rejects_length_beyond_encoder(length):
    with pytest.raises(ValueError, match=f"max_length={length}: expected 2 to 64"):
        Text(Letters(), length)


def test_text_accepts_empty_batch():
    assert Text(Letters())(told()).vector.shape == (0, 3)


def test_grow_doubles_and_preserves_rows():
    table = torch.arange(3.0)[:, None]
    assert grow(table, 3) is table
    assert grow(table, 4).shape == (6, 1)
    assert grow(table, 9).flatten().tolist() == [0, 1, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("prompt", AWKWARD)
def test_text_tokenizes_awkward_prompts_unchanged(minilm, prompt):
    text = Text(minilm)
    assert "".join(text.tokenize(prompt)) == "".join(prompt.split())


def test_text_features_are_independent_of_batch(minilm):
    alone, company = Text(minilm)(told("a bag")), Text(minilm)(told("a photo of a boot", "a bag", "x"))
    assert torch.equal(alone.context[0], company.context[1])
    assert torch.equal(alone.vector[0], company.vector[1])
    torch.testing.assert_close(alone.vector.norm(), torch.tensor(384**0.5))
    assert alone.context.shape == (1, 8, 384)


def test_nearest_caption_matches_synonyms(minilm):
    captions = [["a sneaker", "a sports shoe"], ["a bag", "a handbag"], ["trousers", "long pants"]]
    assert nearest_caption(minilm, ["jeans", "a purse", "a running shoe"], captions) == [2, 1, 0]


def test_nearest_caption_uses_best_single_caption():
    encoder = Letters()
    encoder.forward = lambda texts: TextFeatures(None, None, torch.tensor([[float(t[0]), float(t[1])] for t in texts]))
    assert nearest_caption(encoder, ["10", "91"], [["01", "11"], ["40", "02"]]) == [1, 1]
    assert nearest_caption(encoder, ["11", "02"], [["01", "11"], ["40", "13"]]) == [0, 0]
