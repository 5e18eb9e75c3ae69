"""Configs of CLIP's text tower (open_clip's model names, transformers' config.json) and its tokenizer files."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.interop.pipeline import require_values
from ldm.io import atomic
from ldm.io.download import cache_dir
from ldm.io.extras import extra
from ldm.io.parse import parse_json

NAMED = ("ViT-L-14-quickgelu", "ViT-H-14", "ViT-bigG-14")  # of Stable Diffusion 1, 2 and XL
# Values that transformers' config must have for open_clip's tower to be equivalent.
REQUIRED_VALUES = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0}
ACT = {"quick_gelu": True, "gelu": False}
END = 49407  # the end-of-text token, whose state is pooled


def open_clip_config(model: str) -> dict[str, Any]:
    """Return open_clip's config of a model, by name or from a .json file.  Raises UserError for an unknown name."""
    if model.endswith(".json"):
        try:
            return dict(parse_json(Path(model).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"model={model} is not a JSON object ({error}); expected a config of open_clip") from None
    with extra("clip", f"CLIP {model}"):
        import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise UserError(f"model={model}: open_clip has no such model; open_clip.list_models() lists them")
    return config


def shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an open_clip config that determines its text tower."""
    text = config["text_cfg"]
    numbers = {name: text[name] for name in ("width", "heads", "layers", "context_length", "vocab_size")}
    quick = bool(config.get("quick_gelu", False))
    return {**numbers, "mlp_ratio": text.get("mlp_ratio", 4.0), "quick_gelu": quick, "embed_dim": config["embed_dim"]}


def to_transformers(config: Mapping[str, Any], depth: int, pad: int) -> dict[str, Any]:
    """Convert an open_clip config to that of transformers' CLIPTextModel.

    depth: number of layers.  pad: id of the padding token.
    """
    tower = shape(config)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tower["vocab_size"],
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": depth,
        "num_attention_heads": tower["heads"],
        "max_position_embeddings": tower["context_length"],
        "projection_dim": tower["embed_dim"],
        "hidden_act": "quick_gelu" if tower["quick_gelu"] else "gelu",
        **REQUIRED_VALUES,
        **{"bos_token_id": END - 1, "eos_token_id": END, "pad_token_id": pad},
    }


def of_transformers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert transformers' CLIPTextModel config to an open_clip config with a tiny image tower.  Raises UserError."""
    require_values(options, REQUIRED_VALUES, "text_encoder/config.json")
    act = options.get("hidden_act", "quick_gelu")
    if act not in ACT:
        raise UserError(f"text_encoder/config.json: hidden_act={act}: expected one of {', '.join(ACT)}")
    width = options.get("hidden_size", 512)
    text = {
        "width": width,
        "heads": options.get("num_attention_heads", 8),
        "layers": options.get("num_hidden_layers", 12),
        "context_length": options.get("max_position_embeddings", 77),
        "vocab_size": options.get("vocab_size", END + 1),
        "mlp_ratio": options.get("intermediate_size", 4 * width) / width,
    }
    image = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 16, "head_width": 16}
    projection = options.get("projection_dim", 512)
    return {"embed_dim": projection, "vision_cfg": image, "text_cfg": text, "quick_gelu": ACT[act]}


def known_open_clip_name(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return (open_clip's name, layer to read) if this is a text tower of Stable Diffusion, else None.

    A folder of Stable Diffusion 2 has 23 of its tower's 24 layers and reads the last: open_clip's layer -2.
    """
    tower = {**shape(config), "embed_dim": 0}
    for name in NAMED:
        known = {**shape(open_clip_config(name)), "embed_dim": 0}
        if known == tower:
            return name, -1
        if {**known, "layers": known["layers"] - 1} == tower:
            return name, -2
    return None


def write_config(config: Mapping[str, Any]) -> str:
    """Write an open_clip config to the cache, named by its hash, and return its path: a `model` for our CLIP."""
    text = json.dumps(config, indent=1, sort_keys=True)
    path = cache_dir() / "clip" / f"clip-{sha256(text.encode()).hexdigest()[:12]}.json"
    atomic.write_text(path, text)
    return str(path)


def tokenizer_files(pad: int, length: int) -> dict[str, str]:
    """Return the files of transformers' CLIPTokenizer by name.

    They are vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json.  pad: id of the padding token.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): number for token, number in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    padding = next(token for token, number in vocabulary.items() if number == pad)
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": padding,
    }
    options = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n",
        "tokenizer_config.json": json.dumps({**options, **special}, indent=1),
        "special_tokens_map.json": json.dumps(special, indent=1),
    }
