"""LDM's own transformer: the published sizes, the published layout of boxes, captions in BERT's words, and nulls."""

import logging

import pytest
import torch

from ldm.conditioner.transformer import Layout, Transformer, WordPiece
from ldm.io.download import AssetNotFoundError


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ((30522, 77, 1280, 32), 581_994_042),  # LDM-8 text to image: 872.30M + this = the paper's 1.45B
        ((30522, 77, 640, 32), 186_154_682),
        ((8192, 92, 512, 16), 58_858_496),  # layout to image
    ],
)
def test_transformer_has_published_parameter_count(sizes, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(*sizes, logits=True).parameters()) == count


def test_transformer_matches_manual_stack():
    torch.manual_seed(0)
    net = Transformer(50, 6, 16, 2, heads=2, head_channels=4).double()
    ids = torch.randint(0, 50, (3, 5))
    x = net.token.weight[ids] + net.position.weight[:5]
    for layer in net.layers:
        y, heads = layer.norm1(x), []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            q, k, v = (y @ f.weight[part].T for f in (layer.attention.q, layer.attention.k, layer.attention.v))
            heads.append((q @ k.transpose(1, 2) / 4**0.5).softmax(-1) @ v)
        x = x + layer.attention.out(torch.cat(heads, -1))
        x = x + layer.mlp(layer.norm2(x))
    torch.testing.assert_close(net(ids), net.norm(x), atol=1e-6, rtol=1e-5)
    assert net(ids).shape == (3, 5, 16)


@pytest.fixture(scope="module")
def words(minilm):
    return WordPiece(dim=8, layers=1, num_heads=1, num_head_channels=4, max_length=12)


def test_wordpiece_matches_bert_tokens_and_padding(words):
    assert words.transformer.token.num_embeddings == 30522
    assert words.ids("a bag") == (101, 1037, 4524, 102, *[0] * 8)
    cond = words({"caption": ["a bag", "an ankle boot"]})
    assert cond.context.shape == (2, 12, words.context_dim)
    assert cond.mask is None
    assert torch.equal(words.null({"label": torch.zeros(2)}).context, words({"caption": ["", ""]}).context)
    assert not torch.allclose(cond.context, words.null({"caption": ["a"] * 2}).context)
    assert words.tokenize("Ankle-boot!") == ["Ankle", "-", "boot", "!"]
    cond.context.sum().backward()
    assert words.transformer.token.weight.grad[4524].any()


def test_wordpiece_truncates_long_caption_with_warning(words, caplog):
    with caplog.at_level(logging.WARNING):
        words({"caption": ["bag " * 10]})
        assert not caplog.text
        words({"caption": ["bag " * 13]})
    assert "text of 15 tokens cut to 12, 3 tokens dropped" in caplog.text
    assert words.ids("bag " * 13)[-1] == 102


def test_wordpiece_reports_missing_vocabulary():
    with pytest.raises(AssetNotFoundError, match=r"vocabulary=nowhere\.json: no such file"):
        WordPiece(8, 1, vocabulary="nowhere.json")


@pytest.fixture
def layout():
    return Layout(dim=8, layers=1, num_heads=1, num_head_channels=4)


def test_layout_encodes_boxes_as_92_tokens(layout):
    """Grid of 90 x 90, row by row; 8191 is nothing; the crop is the whole image."""
    ids = layout.ids([(3, 0.0, 0.0, 1.0, 0.5)])
    assert len(ids) == 92
    assert ids[:3] == [3, 0, 44 * 90 + 89]
    assert set(ids[3:90]) == {8191}
    assert ids[90:] == [0, 8099]
    cond = layout({"boxes": [[(3, 0.0, 0.0, 1.0, 0.5)], torch.tensor([[1.0, 0.2, 0.2, 0.4, 0.4]])]})
    assert cond.context.shape == (2, 92, 8)
    assert torch.equal(layout.null({"caption": ["a"]}).context, layout({"boxes": [[]]}).context)


def test_layout_warns_about_too_many_boxes(layout, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(layout.ids([(0, 0, 0, 1, 1)] * 33)) == 92
    assert "layout of 33 boxes cut to 30, 3 boxes dropped" in caplog.text


@pytest.mark.parametrize(
    "box",
    [(8191, 0, 0, 1, 1), (-1, 0, 0, 1, 1), (0.5, 0, 0, 1, 1), (0, 0, 0, 1), (0, 0, 0, 1, 1.1), (0, -0.1, 0, 1, 1)],
)
def test_layout_rejects_invalid_box(layout, box):
    with pytest.raises(ValueError, match=r"expected (\(class|fractions of)"):
        layout({"boxes": [[box]]})
