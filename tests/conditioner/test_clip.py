import json
import logging
import socket
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm.conditioner import clip
from ldm.conditioner.clip import CLIP
from ldm.conditioner.clip_image import CLIPImage
from ldm.io.download import AssetNotFoundError

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 64, "patch_size": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """A small model by the name of `tiny`, known to open_clip for as long as this file's tests run."""
    from open_clip import factory

    known = factory._MODEL_CONFIGS.copy()
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "roberta.json").write_text(json.dumps(TINY | {"text_cfg": {"hf_model_name": "roberta-base"}}))
    factory.add_model_config(folder)
    yield
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(known)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def by_hand(net, ids, depth):
    """The hidden state after `depth` blocks, and the pooled vector, from open_clip's own parts."""
    x = net.token_embedding(ids) + net.positional_embedding
    for number, block in enumerate(net.transformer.resblocks):
        x = block(x, attn_mask=net.attn_mask)
        if number + 1 == depth:
            hidden = net.ln_final(x)
    return hidden, net.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ net.text_projection


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_clip_hidden_states_match_manual_forward(layer):
    from open_clip import tokenize

    encoder, texts = CLIP("tiny", layer=layer, random=True).double(), ["a photo of an ankle boot", ""]
    context, mask, vector = encoder(texts)
    with torch.no_grad():
        hidden, pooled = by_hand(encoder.clip, tokenize(texts), 4 + layer)
    assert context.shape == (2, 77, encoder.context_dim)
    assert vector.shape == (2, encoder.vector_dim)
    assert mask.all()
    torch.testing.assert_close(context, hidden, atol=1e-6, rtol=0)
    torch.testing.assert_close(vector, pooled, atol=1e-6, rtol=0)
    torch.testing.assert_close(vector, encoder.clip.encode_text(tokenize(texts)), atol=1e-6, rtol=0)


def test_clip_pads_with_configured_token():
    end, zero = CLIP("tiny", pad_token_id=49407, random=True)(["a bag"]), CLIP("tiny", random=True)(["a bag"])
    torch.testing.assert_close(end.context[:, :4], zero.context[:, :4])
    assert not torch.allclose(end.context[:, 4:], zero.context[:, 4:])
    torch.testing.assert_close(end.vector, zero.vector)  # pooled at the first end mark


def test_clip_truncates_long_text_with_warning(caplog):
    encoder = CLIP("tiny", random=True)
    with caplog.at_level(logging.WARNING):
        encoder(["bag " * 75])
        assert "tokens dropped" not in caplog.text
        encoder(["bag " * 76])
    assert "78 tokens cut to 77, 1 tokens dropped" in caplog.text
    assert (encoder.truncation.texts, encoder.truncation.dropped) == (1, 1)


def test_clip_through_text_conditioner():
    option = OmegaConf.load(Path(__file__).parents[2] / "conf" / "conditioner" / "clip.yaml")
    text = instantiate(option, encoder={"model": "tiny", "random": True}, max_length=16)
    # alone and in a batch a processor adds in another order; the table rounds to float32, 2^-22 below 8
    text.cache.encoder.double()
    cond = text({"caption": ["a bag", "a photo of a boot"]})
    whole = text.cache.encoder(["a bag", "a photo of a boot"]).context
    assert whole.abs().max() < 8
    torch.testing.assert_close(cond.context.double(), whole[:, :16], atol=2**-22 + 1e-12, rtol=0)
    assert cond.mask.all()
    assert cond.vector.shape == (2, 16)
    assert text.tokenize("It's a BAG 😀, über a=b") == ["it", "'s", "a", "bag", "😀,", "über", "a", "=", "b"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_clip_loads_local_file(tmp_path, suffix, no_network):
    import open_clip
    from safetensors.torch import save_file

    net, file = open_clip.create_model("tiny"), tmp_path / f"tiny.{suffix}"
    torch.save(net.state_dict(), file) if suffix == "pt" else save_file(net.state_dict(), file)
    encoder = CLIP("tiny", weights=str(file))
    ids = open_clip.tokenize(["a bag"])
    torch.testing.assert_close(encoder(["a bag"]).vector, net.encode_text(ids), atol=1e-6, rtol=0)
    assert encoder.identity != CLIP("tiny", random=True).identity
    assert not any(p.requires_grad for p in encoder.parameters())
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"tiny\.[a-z]+: damaged, or not open_clip weights of tiny"):
        CLIP("tiny", weights=str(file))


def test_clip_random_weights_are_reproducible_and_keep_global_rng():
    torch.manual_seed(1)
    first = CLIP("tiny", random=True)
    assert first.identity == CLIP("tiny", random=True).identity
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("weights", [None, "nowhere/clip.pt", "clip.safetensors"])
def test_clip_reports_missing_weights(weights, monkeypatch, no_network):
    monkeypatch.setattr(
        "builtins.__import__", lambda name, *args, imported=__import__: _not_open_clip(name) or imported(name, *args)
    )
    with pytest.raises(
        AssetNotFoundError, match=r"CLIP ViT-L-14-quickgelu has no weights .*weights=FILE.*hub=true"
    ) as error:
        CLIP(weights=weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weights", "said"),
    [(None, r"no weights \(weights=null\)"), ("no/clip.pt", r"\(weights=no/clip.pt is not a file\)")],
)
def test_clip_error_names_missing_weights(weights, said):
    with pytest.raises(AssetNotFoundError, match=said):
        clip.local_weights("ViT-L-14", weights)


def _not_open_clip(name):
    assert not name.startswith("open_clip"), "open_clip takes seconds to import; the error must not wait for it"


def test_clip_tag_uses_cache_only_by_default(no_network, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        AssetNotFoundError,
        match=r"tag laion2b_s34b_b79k, is not in .* cache and was not fetched \(hub=false\).*hub=true",
    ):
        CLIP("ViT-B-32", weights="laion2b_s34b_b79k")
    assert not constants.HF_HUB_OFFLINE  # as it was


def test_clip_tag_downloads_when_hub_is_allowed(monkeypatch):
    import open_clip.pretrained

    asked = []

    def download(source):
        from huggingface_hub import constants

        asked.append(constants.HF_HUB_OFFLINE)
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(AssetNotFoundError, match=r"was not fetched \(no route to the hub\)"):
        clip.tagged_weights("ViT-B-32", "laion2b_s34b_b79k", hub=True)
    assert asked == [True, False]


def test_clip_unknown_tag_lists_known_ones():
    from open_clip import list_pretrained_tags_by_model

    with pytest.raises(ValueError, match=r"weights=opanai .* tag of tiny \(tags: none\)"):
        clip.tagged_weights("tiny", "opanai", hub=False)
    tags = list_pretrained_tags_by_model("ViT-B-32")
    assert "laion2b_s34b_b79k" in tags
    with pytest.raises(ValueError, match=rf"\(tags: {', '.join(tags)}\)"):
        clip.tagged_weights("ViT-B-32", "opanai", hub=False)


def test_clip_tag_of_address_is_fetched_only_when_hub_is_allowed(monkeypatch):
    """A tag that is not on the hub has no cache to look in."""
    import open_clip.pretrained
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: {"url": "https://example.org/clip.pt"})
    monkeypatch.setattr(
        open_clip.pretrained, "download_pretrained", lambda source: asked.append(constants.HF_HUB_OFFLINE) or "clip.pt"
    )
    with pytest.raises(AssetNotFoundError, match=r"was not fetched \(hub=false\)"):
        clip.tagged_weights("tiny", "own", hub=False)
    assert asked == []
    assert clip.tagged_weights("tiny", "own", hub=True) == Path("clip.pt")
    assert asked == [False]


def test_clip_model_config_is_registered_from_file(tmp_path, monkeypatch):
    from open_clip import list_models

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.json").write_text(json.dumps(TINY))
    assert clip.register_model_config("~/own.json") == "own"
    assert "own" in list_models()
    assert clip.register_model_config("ViT-B-32") == "ViT-B-32"
    with pytest.raises(AssetNotFoundError, match=r"model=~/none\.json: no such file"):
        clip.register_model_config("~/none.json")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A  bag ", None),
        ("don\u2019t", "don't"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("\ufb01ne  \u201cbag\u201d", 'fine "bag"'),
    ],
)
def test_clip_cleans_text_as_its_training_captions(text, cleaned):
    assert clip.clean_text(text) == cleaned


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "ViT-Z"}, "no such model"),
        ({"model": "roberta"}, "another text model"),
        ({"layer": 0}, r"layer=0: expected -3 .* to -1"),
        ({"layer": -4}, "layer=-4"),
        ({"weights": "openai"}, "choose one"),
        ({"weights": "opanai", "random": False}, "neither a file nor a tag of tiny"),
    ],
)
def test_clip_rejects_invalid_options(options, said):
    with pytest.raises(ValueError, match=said):
        CLIP(**{"model": "tiny", "random": True} | options)


def test_clip_image_is_independent_of_default_dtype():
    """trainer.precision=64 makes float64 the default dtype within a step; the frozen encoder remains float32."""
    conditioner, image = CLIPImage("tiny", random=True), torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    expected = conditioner({"image": image}).vector
    torch.set_default_dtype(torch.float64)
    try:
        vectors = [conditioner.embedding(image.to(dtype)) for dtype in (torch.float32, torch.float64)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(vector, expected) for vector in vectors)


def test_clip_image_matches_open_clip():
    from open_clip import image_transform
    from torchvision.transforms.functional import to_pil_image

    conditioner = CLIPImage("tiny", random=True)
    visual = conditioner.encoders[0]
    pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = image_transform(8, is_train=False, mean=visual.image_mean, std=visual.image_std)(to_pil_image(pixels))
    with torch.no_grad():
        expected = visual(own[None])
    cond = conditioner({"image": pixels[None] / 127.5 - 1})
    torch.testing.assert_close(cond.vector, 4 * expected / expected.norm(), atol=1e-5, rtol=0)
    assert cond.vector.shape == (1, conditioner.vector_dim) == (1, 16)
    assert torch.equal(cond.context[:, 0], cond.vector)
    assert not conditioner.null({"image": pixels[None]}).vector.any()
    assert not list(conditioner.parameters())
    grey = conditioner({"image": torch.zeros(2, 1, 20, 30)})
    assert grey.vector.shape == (2, 16)


def test_clip_fingerprint_tells_what_decides_features():
    options = [{}, {"pad_token_id": 49407}, {"layer": -2}]
    prints = [CLIP("tiny", random=True, **one).fingerprint for one in options]
    assert len(set(prints)) == 3
    other = CLIP("tiny", random=True)
    assert other.fingerprint == prints[0]
    del other.tokenizer.encoder["dog</w>"]
    assert other.fingerprint != prints[0]
