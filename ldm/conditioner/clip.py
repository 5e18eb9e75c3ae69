"""CLIP's text tower (Radford et al. 2021), frozen, through open_clip: the text encoder of Stable Diffusion."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.conditioner.tokens import TextFeatures, Truncation
from ldm.errors import ConfigError
from ldm.io.download import AssetNotFoundError
from ldm.io.extras import extra
from ldm.tensors import derive_seed, hash_state_dict


class CLIP(nn.Module):
    """CLIP's frozen text tower: B texts -> TextFeatures, float32, without gradient.

    context: hidden state (B, L, D) after ln_final.  mask: all True, as those networks were trained to read padding like
    any other token.  vector: pooled and projected, (B, V).
    model: an open_clip name with CLIP's own tokenizer, or the .json file of a config.
    weights: a file (.pt, .safetensors) or an open_clip tag.
    hub: whether a tag that is not in the hub's local cache may be downloaded.
    layer: -1 for the last hidden state (SD 1), -2 for the penultimate (SD 2).
    pad_token_id: token after the end: 0 as in open_clip and SD 2, 49407 as in SD 1.
    random: random weights with seed 0 instead, for tests.
    Raises AssetNotFoundError without weights, ValueError for an invalid option or file.
    """

    clip: Any  # open_clip's model without its image tower

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        weights: str | None = None,
        hub: bool = False,
        layer: int = -1,
        pad_token_id: int = 0,
        random: bool = False,
    ):
        super().__init__()
        model = register_model_config(model)
        self.clip, self.config = build_clip(model, weights, hub, random)
        import open_clip

        self.clip.visual = None
        self.eval().requires_grad_(False)
        tower = getattr(self.clip, "text", self.clip)
        depth = len(tower.transformer.resblocks)
        if not -depth <= layer <= -1:
            raise ConfigError(f"layer={layer}: expected -{depth} (the first) to -1 (the last) of {model}")
        self.tokenizer = open_clip.get_tokenizer(model)
        self.truncation = Truncation()
        self.length, self.layer, self.pad = int(tower.context_length), layer, pad_token_id
        self.context_dim, self.vector_dim = tower.transformer.width, self.config["embed_dim"]

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of the text tower's weights, independent of the file that contains them."""
        return hash_state_dict(self.clip.state_dict())

    @property
    def fingerprint(self) -> str:
        """All that decides the features: weights, architecture, tokenizer, layer and padding."""
        words = self.tokenizer.encoder, list(self.tokenizer.bpe_ranks)
        return f"CLIP {self.identity} {self.config} {derive_seed(repr(words))} {self.layer} {self.pad}"

    def tokenize(self, text: str) -> list[str]:
        """Split the text into the words that are cut into tokens, in CLIP's lower case."""
        return self.tokenizer.pat.findall(self.tokenizer.clean_fn(text))

    @property
    def embedding(self) -> nn.Embedding:
        """The table that maps ids (B, L) to vectors."""
        return getattr(self.clip, "text", self.clip).token_embedding

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without start and end tokens."""
        return list(self.tokenizer.encode(text))

    @torch.no_grad()
    def forward(self, texts: Sequence[str], length: int | None = None) -> TextFeatures:
        return self.features(texts, length)

    def features(self, texts: Sequence[str], length: int | None = None) -> TextFeatures:
        """Encode texts as `forward` does, but with gradients."""
        limit = min(length or self.length, self.length)
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        device = self.clip.logit_scale.device
        ids = torch.full((len(texts), self.length), self.pad)
        for row, text in zip(ids, texts, strict=True):
            cut = self.truncation(text, [start, *self.tokenizer.encode(text), end], limit)
            row[: len(cut)] = torch.tensor(cut)
        with torch.autocast(device.type, enabled=False):
            out = self.clip.forward_intermediates(
                text=ids.to(device), text_indices=-self.layer, normalize=False, normalize_intermediates=True
            )
        context = out["text_intermediates"][0][:, :limit]  # (B, L, D), first of the last -layer states
        return TextFeatures(
            context, torch.ones(context.shape[:2], dtype=torch.bool, device=device), out["text_features"]
        )


def clean_text(text: str) -> str | None:
    """Return the text after OpenAI's cleaning (ftfy and HTML entities), or None if that changes only spaces and case.

    The cleaning straightens typographic quotes, resolves entities and ligatures and repairs wrong encodings. CLIP was
    trained on cleaned texts; open_clip and transformers 4 clean too. transformers 5 keeps the characters, which are
    other tokens.
    """
    from open_clip.tokenizer import basic_clean

    after, before = (" ".join(part.split()) for part in (basic_clean(text), unicodedata.normalize("NFC", text)))
    return None if after.lower() == before.lower() else after


def register_model_config(model: str) -> str:
    """Return open_clip's name of a model; for a .json file, register that config with open_clip first.

    Raises AssetNotFoundError if there is no such file.
    """
    if not model.endswith(".json"):
        return model
    if not (file := Path(model).expanduser()).is_file():
        raise AssetNotFoundError(
            f"model={model}: no such file; expected one of open_clip's names or the .json of a model's config"
        )
    with extra("clip", f"CLIP {model}"):
        from open_clip import add_model_config

    add_model_config(file)
    return file.stem


def build_clip(model: str, weights: str | None, hub: bool, random: bool) -> tuple[Any, dict[str, Any]]:
    """Build open_clip's model, both towers, on the CPU in float32; return it and its config.

    Options and errors: see CLIP.
    """
    if random and weights is not None:
        raise ConfigError(f"weights={weights} and random=true: choose one")
    file = None if random else local_weights(model, weights)  # before open_clip is imported, which takes seconds
    with extra("clip", f"CLIP {model}"):
        import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(f"model={model}: open_clip has no such model; open_clip.list_models() names them")
    if other := {"hf_model_name", "hf_tokenizer_name"} & config["text_cfg"].keys():
        raise ConfigError(
            f"model={model} has another text model or tokenizer ({min(other)}); "
            f"expected one with CLIP's own, as ViT-L-14"
        )
    if not random and file is None:
        file = tagged_weights(model, str(weights), hub)
    # a random state of its own, so that the weights of other networks do not depend on the draws for these
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(model, file), config


class Towers(NamedTuple):
    """open_clip's model, and its tokenizer: texts -> ids (B, length) int64."""

    clip: Any
    tokenize: Callable[[Sequence[str]], Tensor]


def load_towers(
    model: str = "ViT-L-14-quickgelu", weights: str | None = None, hub: bool = False, random: bool = False
) -> Towers:
    """Load both towers of CLIP, for metrics. Options and errors: see CLIP."""
    model = register_model_config(model)
    clip, _ = build_clip(model, weights, hub, random)
    from open_clip import get_tokenizer

    return Towers(clip, get_tokenizer(model))


def init_towers(model: str) -> tuple[Any, Callable[[Sequence[str]], Tensor]]:
    """open_clip's model, both towers, with weights drawn now, and what makes ids (B, length) int64 of texts; model as
    CLIP's.
    """
    with extra("clip", f"CLIP {model}"):
        from open_clip import get_tokenizer

    model = register_model_config(model)
    return create_model(model, None), get_tokenizer(model)


def local_weights(model: str, weights: str | None) -> Path | None:
    """Return the file that `weights` names, or None if it looks like a tag.

    Raises AssetNotFoundError for a missing file, and if weights is None.
    """
    if weights is not None:
        file = Path(weights).expanduser()
        if file.is_file():
            return file
        if file.name == weights and not file.suffix:
            return None
    reason = "weights=null" if weights is None else f"weights={weights} is not a file"
    raise AssetNotFoundError(
        f"CLIP {model} has no weights ({reason}): put open_clip's .pt or .safetensors somewhere and name it, "
        f"weights=FILE; or name one of open_clip's tags, such as weights=openai, with hub=true to fetch it"
    )


def tagged_weights(model: str, tag: str, hub: bool) -> Path:
    """Return the file of an open_clip tag from the hub's cache, or download it if `hub`.

    Raises ConfigError for an unknown tag, AssetNotFoundError if the file is not available.
    """
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model
    from open_clip.pretrained import download_pretrained

    source = get_pretrained_cfg(model, tag)
    if not source:
        tags = ", ".join(list_pretrained_tags_by_model(model)) or "none"
        raise ConfigError(f"weights={tag} is neither a file nor a tag of {model} (tags: {tags})")
    reason = "hub=false"
    for online in [False, True] if hub else [False]:
        if not online and not source.get("hf_hub"):
            continue
        try:
            with hub_access(online):
                return Path(download_pretrained(source))
        except Exception as error:
            reason = " ".join(str(error).split()) if online else reason
    raise AssetNotFoundError(
        f"CLIP {model}, tag {tag}, is not in the Hugging Face hub's cache and was not fetched ({reason}): "
        f"fetch it with hub=true on a machine that reaches the hub, or name a file, weights=FILE"
    )


@contextmanager
def hub_access(online: bool) -> Iterator[None]:
    """Restrict the hub's client to its local cache within the block, unless `online`.

    The client reads $HF_HUB_OFFLINE only when it is imported, so the constant itself is set.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not online
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def create_model(model: str, file: Path | None) -> Any:
    """Create open_clip's model in float32 on the default device, with the weights in `file`, else random ones.

    Raises ConfigError if the file has other weights or is damaged.
    """
    from open_clip import create_model

    try:
        device = torch.get_default_device()
        return create_model(
            model, pretrained=str(file) if file else None, require_pretrained=file is not None, device=device
        )
    except Exception as error:
        if file is None:
            raise
        raise ConfigError(
            f"weights={file}: damaged, or not open_clip weights of {model}: {' '.join(str(error).split())[:300]}"
        ) from error
