"""T5's encoder (Raffel et al. 2020), frozen, through transformers: a text encoder of Imagen and Stable Diffusion 3."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.conditioner.tokens import TextFeatures, Truncation
from ldm.errors import ConfigError
from ldm.io.download import AssetNotFoundError
from ldm.tensors import hash_state_dict


class T5(nn.Module):
    """Frozen T5 encoder: B texts -> TextFeatures, float32, without gradient.

    context: last hidden state (B, L, D).  mask: (B, L).  vector: mean over the real tokens (B, D).
    model: a folder with config.json, weights and tokenizer, or a name on the Hugging Face hub such as
    google/flan-t5-base.
    hub: whether a name that is not in the hub's local cache may be downloaded.
    max_length: maximum number of tokens, including the end token.
    Raises AssetNotFoundError if the model is not available, ValueError for a folder with another or a damaged model.
    """

    net: Any  # encoder of transformers

    def __init__(self, model: str | None = None, hub: bool = False, max_length: int = 256):
        super().__init__()
        if model is None:
            raise AssetNotFoundError(
                "T5 has no weights (model=null): name a folder with its config.json, weights and tokenizer, "
                "or a hub name"
            )
        folder = Path(model).expanduser()
        if not folder.is_dir() and len(Path(model).parts) > 2:
            raise AssetNotFoundError(
                f"model={model}: no such folder; expected one with T5's config.json, weights and tokenizer, "
                f"or a hub name"
            )
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError:
            raise AssetNotFoundError("T5 needs the library transformers: pip install -e '.[text]'") from None
        source, local = str(folder) if folder.is_dir() else model, folder.is_dir() or not hub
        try:
            # the dtype is left open: transformers below 4.56 calls the option torch_dtype, later ones dtype
            net, loading = cast(
                Any, T5EncoderModel.from_pretrained(source, local_files_only=local, output_loading_info=True)
            )
            self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            if folder.is_dir():
                raise ConfigError(f"model={model}: damaged, or not T5's: {reason}") from None
            remedy = "name a folder, model=FOLDER" if hub else "fetch it with hub=true, or name a folder, model=FOLDER"
            raise AssetNotFoundError(
                f"T5 {model} is not in the Hugging Face hub's cache and was not fetched ({reason}): {remedy}"
            ) from None
        if loading["missing_keys"] or loading["mismatched_keys"]:
            raise ConfigError(f"model={model}: not T5's weights, {len(loading['missing_keys'])} are missing")
        self.net = net.float()  # exact, also from half precision, in which transformers 5 leaves weights stored so
        self.eval().requires_grad_(False)
        self.truncation = Truncation()
        self.length = max_length
        self.context_dim = self.vector_dim = int(self.net.config.d_model)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of the encoder's weights, independent of the files that contain them."""
        return hash_state_dict(self.net.state_dict())

    @property
    def fingerprint(self) -> str:
        """All that decides the features: weights, architecture and tokenizer."""
        return f"T5 {self.identity} {self.net.config.to_json_string()} {self.tokenizer.backend_tokenizer.to_str()}"

    def tokenize(self, text: str) -> list[str]:
        """Split the text into the pieces that become tokens."""
        return [piece.replace("▁", " ").strip() for piece in self.tokenizer.tokenize(text)]

    @torch.no_grad()
    def forward(self, texts: Sequence[str], length: int | None = None) -> TextFeatures:
        limit = min(length or self.length, self.length)
        cut = [self.truncation(text, self.tokenizer(text, verbose=False)["input_ids"], limit) for text in texts]
        size = torch.tensor([len(ids) for ids in cut])
        device = self.net.shared.weight.device
        ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in cut], batch_first=True).to(
            device
        )  # (B, L), padded with 0, <pad>
        mask = (torch.arange(ids.shape[1]) < size[:, None]).to(device)
        with torch.autocast(device.type, enabled=False):
            context: Tensor = self.net(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        real = mask[..., None]
        return TextFeatures(context, mask, (context * real).sum(1) / real.sum(1))
