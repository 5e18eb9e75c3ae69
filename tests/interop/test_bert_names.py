"""LDM's own text-to-image: its BERT between CompVis' names, diffusers' and ours, and a pipeline that
LDMTextToImagePipeline opens.
"""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from seeded import fill, numbers
from torch import nn

from ldm.checkpoint import external
from ldm.cli import export
from ldm.config import build
from ldm.diffusion import grids
from ldm.diffusion.sampler import ddim
from ldm.errors import UserError
from ldm.interop import bert, checkpoint, config_nodes
from ldm.interop.pipeline import Pipeline, unknown_data_info

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "##s", "!"]
DIM, HEADS, EACH, DEPTH = 16, 2, 8, 2


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A tokenizer.json as BERT's, of ten words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    cut = Tokenizer(models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    cut.normalizer, cut.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    cut.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    file = tmp_path_factory.mktemp("words") / "tokenizer.json"
    cut.save(str(file))
    return file


@pytest.fixture(scope="module")
def pipeline(vocabulary):
    words = {
        "_target_": "ldm.conditioner.transformer.WordPiece",
        "dim": DIM,
        "layers": DEPTH,
        "num_heads": HEADS,
        "num_head_channels": EACH,
    }
    config = {
        "net": config_nodes.unet(16, (1, 2), 1, (1, 2), config_nodes.transformer(True), heads=2, groups=8),
        "autoencoder": config_nodes.first_stage(4, 8, (1, 1, 1, 1), 1, groups=4),
        "conditioner": {**words, "max_length": 77, "keep_logits_head": True, "vocabulary": str(vocabulary)},
        "schedule": config_nodes.betas("scaled_linear", 1000, 0.0015, 0.0195),
        "prediction": config_nodes.prediction("Eps"),
        "seed": 0,
    }
    built = OmegaConf.create(config)
    card = external.data_card(unknown_data_info(3, 32))
    stage = fill(build.build_autoencoder(built.autoencoder, 3))
    stage.scale.fill_(0.2)
    model = build.build_model(built, stage, card)
    net, told = fill(model.denoiser.net).state_dict(), fill(model.conditioner).state_dict()
    return Pipeline(config, net, stage.state_dict(), unknown_data_info(3, 32), {}, told)


class Attends(nn.Module):
    """x_transformer's Attention."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, HEADS * EACH, bias=False) for _ in range(3))
        self.to_out = nn.Linear(HEADS * EACH, DIM)

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (HEADS, EACH)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(((q @ k.mT / math.sqrt(EACH)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Feeds(nn.Module):
    """x_transformer's FeedForward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU()), nn.Dropout(0), nn.Linear(4 * DIM, DIM)
        )

    def forward(self, x):
        return self.net(x)


class Theirs(nn.Module):
    """x_transformer's TransformerWrapper, as BERTEmbedder makes it."""

    def __init__(self):
        super().__init__()
        self.token_emb, self.pos_emb, self.attn_layers = nn.Embedding(len(WORDS), DIM), nn.Module(), nn.Module()
        self.pos_emb.emb = nn.Embedding(77, DIM)
        kinds = [Attends, Feeds] * DEPTH
        self.attn_layers.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(DIM), kind(), nn.Identity()]) for kind in kinds
        )
        self.norm, self.to_logits = nn.LayerNorm(DIM), nn.Linear(DIM, len(WORDS))

    def forward(self, ids):
        x = self.token_emb(ids) + self.pos_emb.emb.weight
        for norm, layer, _ in self.attn_layers.layers:
            x = x + layer(norm(x))
        return self.norm(x)


@torch.no_grad()
def test_bert_import_matches_compvis(pipeline):
    theirs = fill(Theirs())
    ours = bert.import_bert(theirs.state_dict())
    told = external.build_from_pipeline(Pipeline(**{**vars(pipeline), "conditioner": ours})).conditioner
    ids = torch.tensor([told.ids("a photo of cats!")])
    assert ids[0, :9].tolist() == [2, 4, 5, 6, 7, 8, 9, 3, 0]
    assert torch.allclose(told({"caption": ["a photo of cats!"]}).context, theirs(ids), atol=1e-5)
    back = bert.export_bert(ours)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())
    with pytest.raises(UserError, match="BERTEmbedder: unknown names pooler"):
        bert.import_bert({**theirs.state_dict(), "pooler": torch.zeros(1)})


def test_text_to_image_checkpoint_round_trip(pipeline):
    state = checkpoint.save(pipeline)
    assert "cond_stage_model.transformer.attn_layers.layers.3.1.net.0.0.weight" in state
    back = checkpoint.load(state, {**pipeline.config, "scale": None}, 32)
    again = checkpoint.save(back)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_text_to_image_export_matches_diffusers_pipeline(pipeline, tmp_path):
    from diffusers import LDMTextToImagePipeline

    export.export_diffusers(pipeline, tmp_path / "out")
    theirs = LDMTextToImagePipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    z, prompt = numbers("z", (1, 4, 4, 4)), "a photo of cats!"
    found = theirs([prompt], num_inference_steps=5, guidance_scale=1.0, latents=z.clone(), output_type="np").images
    found = torch.from_numpy(found).permute(0, 3, 1, 2)
    back = external.open_pipeline(tmp_path / "out")
    assert back.config["conditioner"] | {"vocabulary": 0} == pipeline.config["conditioner"] | {"vocabulary": 0}
    for one in (pipeline, back):
        model = external.build_from_pipeline(one)
        cond, schedule = model.condition({"caption": [prompt]}), model.denoiser.schedule
        ts = grids.replace_end(grids.leading(schedule, 5, offset=1), 1 / 1000)
        with torch.inference_mode():
            image = (
                model.decode(ddim(lambda x, t, m=model, c=cond: m.denoiser(x, t, c), schedule, z, ts, lambda x: x)) + 1
            ) / 2
        assert image.std() > 0.05
        assert float((found - image).abs().max()) <= 2e-3
    (tmp_path / "out" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file; expected one for a vocabulary of 10 words"):
        external.open_pipeline(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["bert"] == [
        "latent_diffusion",
        "LDMBertModel",
    ]
