"""CLIP's text tower between transformers and open_clip: the same hidden states, the same names to the bit."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
import transformers
from pipelines import IMAGE, PROMPT, TEXT
from seeded import fill

from ldm.conditioner.clip import CLIP, clean_text
from ldm.errors import UserError
from ldm.interop import clip_config
from ldm.interop.text import NOT_TEXT, export_text, import_open_clip, import_text
from ldm.sampling import run

SAID = {
    "vocab_size": 49408,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
SAID |= {"projection_dim": 8, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


@pytest.fixture(params=["quick_gelu", "gelu"])
def act(request):
    return request.param


@pytest.fixture
def theirs(act):
    return fill(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(hidden_act=act, **SAID)))


def ours(tmp_path, act, layer=-1, layers=3):
    file = tmp_path / f"tower-{act}-{layers}.json"
    file.write_text(
        json.dumps(
            {
                "embed_dim": 8,
                "vision_cfg": IMAGE,
                "text_cfg": {**TEXT, "layers": layers},
                "quick_gelu": act == "quick_gelu",
            }
        )
    )
    return CLIP(str(file), layer=layer, pad_token_id=49407, random=True)


def load(clip, state):
    clip.clip.load_state_dict(
        {**{name: value for name, value in clip.clip.state_dict().items() if name in NOT_TEXT}, **state}
    )
    return clip


@torch.no_grad()
def test_text_tower_matches_transformers(theirs, act, tmp_path):
    clip = load(ours(tmp_path, act), import_text(theirs.state_dict()))
    ids = [clip.tokenizer.sot_token_id, *clip.tokenizer.encode(PROMPT), clip.tokenizer.eot_token_id]
    told = theirs(torch.tensor([ids + [49407] * (77 - len(ids))]), output_hidden_states=True)
    features = clip([PROMPT])
    assert torch.allclose(features.context, told.last_hidden_state, atol=1e-5)
    assert torch.allclose(features.vector, told.text_embeds, atol=1e-5)
    other = ours(tmp_path, {"quick_gelu": "gelu", "gelu": "quick_gelu"}[act])
    assert not torch.allclose(
        load(other, import_text(theirs.state_dict()))([PROMPT]).context, told.last_hidden_state, atol=1e-3
    )


@torch.no_grad()
def test_text_tower_penultimate_layer_is_shorter_tower(theirs, act, tmp_path):
    state = import_text(theirs.state_dict())
    shorter = {name: value for name, value in export_text(state, 2, projection=True).items()}
    assert len(shorter) == len(theirs.state_dict()) - 16
    whole = load(ours(tmp_path, act, layer=-2), state)([PROMPT]).context
    assert torch.allclose(load(ours(tmp_path, act, layers=2), import_text(shorter))([PROMPT]).context, whole, atol=1e-6)


def test_text_tower_names_round_trip(theirs):
    state = theirs.state_dict()
    back = export_text(import_text(state), projection=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    plain = export_text(import_text(state))
    assert plain.keys() == state.keys() - {"text_projection.weight"}
    bare = {name.removeprefix("text_model."): value for name, value in plain.items()}  # as transformers 5 writes them
    old = {**plain, "text_model.embeddings.position_ids": torch.arange(77)[None]}  # as transformers 4.30 did
    expected = import_text(plain)
    for other in (bare, old):
        read = import_text(other)
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in read)


def test_text_tower_reads_open_clip_layouts(tmp_path):
    clip = open_clip.create_model(ours_name(tmp_path))
    towers = {**clip.state_dict(), "attn_mask": torch.zeros(77, 77)}
    text = import_open_clip(towers)
    assert text.keys() == {name for name in clip.state_dict() if not name.startswith("visual.")} - {"logit_scale"}
    custom = {
        (name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}"): value
        for name, value in towers.items()
    }
    assert import_open_clip(custom).keys() == text.keys()


def ours_name(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": IMAGE, "text_cfg": TEXT}))
    open_clip.add_model_config(tmp_path / "own.json")
    return "own"


def test_import_text_rejects_other_models(theirs):
    state = theirs.state_dict()
    with pytest.raises(UserError, match=r"CLIP text model: unknown names vision_model\.x"):
        import_text({**state, "vision_model.x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"self_attn\.v_proj\.bias is missing, but"):
        import_text(
            {name: value for name, value in state.items() if not name.endswith("layers.0.self_attn.v_proj.bias")}
        )
    with pytest.raises(UserError, match="no token_embedding"):
        import_open_clip({"visual.proj": torch.zeros(1)})
    with pytest.raises(UserError, match="depth=4: the text tower has 3 layers"):
        export_text(import_text(state), 4)


def test_open_clip_config_rejects_invalid_json(tmp_path):
    (tmp_path / "own.json").write_text('{"embed_dim": 8')
    with pytest.raises(UserError, match=r"own\.json is not a JSON object .*; expected a config of open_clip"):
        clip_config.open_clip_config(str(tmp_path / "own.json"))


@pytest.mark.parametrize(("name", "layers"), [("ViT-L-14-quickgelu", 12), ("ViT-H-14", 24), ("ViT-bigG-14", 32)])
def test_published_text_towers_are_recognized_by_shape(name, layers):
    config = clip_config.open_clip_config(name)
    said = clip_config.to_transformers(config, layers, 49407)
    assert clip_config.known_open_clip_name(clip_config.of_transformers(said)) == (name, -1)
    shorter = clip_config.to_transformers(config, layers - 1, 0)
    assert clip_config.known_open_clip_name(clip_config.of_transformers(shorter)) == (name, -2)
    assert clip_config.known_open_clip_name(clip_config.of_transformers({**said, "hidden_size": 64})) is None


def test_exported_tokenizer_matches_open_clip(tmp_path):
    for file, content in clip_config.tokenizer_files(49407, 77).items():
        (tmp_path / file).write_text(content)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    mine = open_clip.tokenizer.SimpleTokenizer()
    for prompt in (PROMPT, "Ünïcode — naïve café 中文 !!! 123", "it's  a   \t test\n", ""):
        padded = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        ids = [49406, *mine.encode(prompt), 49407]
        assert padded == ids + [49407] * (77 - len(ids))


ODD = ("a “cat”", "it’s", "a &amp; b", "rock &amp;amp; roll", "the ﬁne", "a <b> &lt;c&gt;")
EVEN = ('a "cat"', "it's", "Naïve  café\n", "x — y", "a & b", "")


def test_clean_text_finds_prompts_tokenized_differently(tmp_path):
    for file, content in clip_config.tokenizer_files(49407, 77).items():
        (tmp_path / file).write_text(content)
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(tmp_path), open_clip.tokenizer.SimpleTokenizer()
    assert [clean_text(text) is not None for text in (*ODD, *EVEN)] == [True] * len(ODD) + [False] * len(EVEN)
    assert clean_text(ODD[0]) == 'a "cat"'
    assert clean_text(ODD[3]) == "rock & roll"
    for text in ODD:
        assert ours.encode(text) == ours.encode(clean_text(text))
    if int(transformers.__version__.split(".")[0]) == 5:
        for text in (*ODD, *EVEN):
            assert (theirs(text).input_ids[1:-1] == ours.encode(text)) == (clean_text(text) is None), text


def test_sample_warns_about_prompts_tokenized_differently(tmp_path, monkeypatch, capsys):
    """Of a pipeline folder with CLIP's tower, for the first such prompt; of no other run."""
    monkeypatch.setattr("ldm.checkpoint.external.text_tower", lambda model: model)
    prompts = {0: ("a cat", None), 1: (ODD[0], None), 2: (ODD[2], None)}
    request = SimpleNamespace(source=SimpleNamespace(folder=tmp_path), prompts=prompts, negative=None)
    run.note_cleaned("a tower", request)
    assert capsys.readouterr().err == ""
    (tmp_path / "model_index.json").write_text("{}")
    run.note_cleaned(None, request)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(run, "check_conditions", lambda model, request: None)
    monkeypatch.setattr(run, "hash_model", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # before anything is drawn
        run.generate_images("a tower", request)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(
        "prompt 'a “cat”' is read as 'a \"cat\"', as CLIP was trained; diffusers with transformers 5"
    )
    plain = SimpleNamespace(source=request.source, prompts={0: ("a cat", None)}, negative=EVEN[0])
    run.note_cleaned("a tower", plain)
    assert capsys.readouterr().err == ""
    plain.negative = ODD[1]
    run.note_cleaned("a tower", plain)
    assert "it’s" in capsys.readouterr().err
