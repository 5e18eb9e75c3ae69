"""Nearest neighbours as the condition: CLIP's embeddings of the images, or captions, most like the one in question."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ldm.condition import Condition
from ldm.conditioner.clip import load_towers
from ldm.conditioner.clip_image import preprocess
from ldm.conditioner.rows import num_rows
from ldm.errors import ConfigError, UserError
from ldm.io import atomic
from ldm.tensors import hash_state_dict

GRID = 2.0**30  # similarities are rounded to multiples of 1 / GRID: equal rows are equal whatever the order of sums


class Retrieval(nn.Module):
    """The k nearest rows of a database of CLIP embeddings as context (RDM: Blattmann et al. 2022, section 3.1).

    context (B, k, V): nearest first, each with norm sqrt(V).  The null condition is zero.
    The query is batch["nearest_images"] or batch["nearest_captions"] (B, k), rows of the database that were found
    before; without it the image, (B, C, H, W) in [-1, 1]; without one the caption.
    database: of what it is, the training images or their captions.  Until it is loaded, every condition is the null.
    Other options: see CLIP.  Both towers are frozen; they and the database are not part of this module's state.
    Raises ConfigError for k below 1.
    """

    needs = ()  # no key is required: without a query it gives its null
    query_keys = ("image",)  # what a request may give besides `keys`
    vector_dim = None
    concat_channels = 0
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(
        self,
        k: int = 4,
        database: Literal["images", "captions"] = "images",
        model: str = "ViT-L-14-quickgelu",
        weights: str | None = None,
        hub: bool = False,
        random: bool = False,
    ):
        super().__init__()
        if k < 1:
            raise ConfigError(f"conditioner.k={k}: expected 1 neighbour or more")
        towers = load_towers(model, weights, hub, random)
        towers.clip.eval().requires_grad_(False)
        self.towers = [towers]  # in a list, so that it is not trained, saved or averaged
        self.k, self.database, self.rows_key = k, database, f"nearest_{database}"
        self.keys = ("caption", self.rows_key)
        self.context_dim = int(towers.clip.text_projection.shape[-1])
        self.embeddings: Tensor | None = None  # (N, V), of norm 1
        self.source = ""  # fingerprint of the data that they are of
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of the weights of both towers."""
        return hash_state_dict(self.towers[0].clip.state_dict())

    @property
    def file(self) -> str:
        """The name of the file in a run folder that has the database."""
        return f"{self.rows_key}-{self.identity[:8]}.safetensors"

    def forward(self, batch: dict[str, Any]) -> Condition:
        if self.embeddings is None:
            return self.null(batch)
        device = self.device_anchor.device
        if self.embeddings.device != device:
            self.embeddings = self.embeddings.to(device)
        if self.rows_key in batch:
            rows = batch[self.rows_key].to(device)
        elif "image" in batch:
            rows = nearest_rows(self.embed_images(batch["image"], device), self.embeddings, self.k)
        elif "caption" in batch:
            rows = nearest_rows(self.embed_texts(batch["caption"], device), self.embeddings, self.k)
        else:
            return self.null(batch)
        return Condition(context=self.embeddings[rows] * self.context_dim**0.5)

    def null(self, batch: dict[str, Any]) -> Condition:
        return Condition(context=self.device_anchor.new_zeros(num_rows(batch), self.k, self.context_dim))

    @torch.no_grad()
    def embed_images(self, image: Tensor, device: torch.device) -> Tensor:
        """Embed images (B, C, H, W) in [-1, 1]: (B, V) float32 of norm 1."""
        clip = self.towers[0].clip.to(device)
        with torch.autocast(device.type, enabled=False):
            return normalize(clip.encode_image(preprocess(clip.visual, image.to(device).float())), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Embed B texts: (B, V) float32 of norm 1."""
        clip, tokenize = self.towers[0].clip.to(device), self.towers[0].tokenize
        with torch.autocast(device.type, enabled=False):
            return normalize(clip.encode_text(tokenize(list(texts)).to(device)), dim=1)

    def write_files(self, folder: Path) -> None:
        """Write the database into a run folder, so that the run is complete without its data."""
        if self.embeddings is not None:
            atomic.write_tensors(folder / self.file, {"embeddings": self.embeddings}, {"data": self.source})

    def load_files(self, folder: Path) -> None:
        """Read the database from a run folder. Raises UserError naming the file."""
        path = folder / self.file
        if not path.is_file():
            raise UserError(f"{path} is missing: the database of conditioner=retrieval; put it back from the run")
        self.load_database(atomic.read_tensors(path)["embeddings"], atomic.read_metadata(path)["data"])

    def load_database(self, embeddings: Tensor, source: str) -> None:
        """Take embeddings (N, V) of norm 1 as the database; source: the fingerprint of the data that they are of.

        Raises ConfigError if there are fewer than k.
        """
        if len(embeddings) < self.k:
            raise ConfigError(f"conditioner.k={self.k}: expected at most {len(embeddings)}, the rows of the database")
        self.embeddings, self.source = embeddings, source


@torch.no_grad()
def nearest_rows(
    queries: Tensor, database: Tensor, k: int, exclude: Tensor | None = None, size: tuple[int, int] = (1024, 8192)
) -> Tensor:
    """Return the k rows (Q, k) int64 of a database (N, V) with the largest inner products with queries (Q, V).

    The largest come first, of equal ones the lower row.  Exact: all products are computed, in float64, in blocks of
    `size` (queries, rows), on which the result does not depend.
    exclude: (Q,) int64, a row that is not a neighbour of each query.
    Raises ConfigError if the database has not k rows to choose from.
    """
    choice = len(database) - (exclude is not None)
    if k > choice:
        others = " other" if exclude is not None else ""
        raise ConfigError(f"conditioner.k={k}: expected at most {choice}, the{others} rows of the database")
    found = [
        _nearest(queries[i : i + size[0]], database, k, None if exclude is None else exclude[i : i + size[0]], size[1])
        for i in range(0, len(queries), size[0])
    ]
    return torch.cat([torch.empty(0, k, dtype=torch.int64, device=database.device), *found])


def _nearest(queries: Tensor, database: Tensor, k: int, exclude: Tensor | None, size: int) -> Tensor:
    """Return the nearest rows of one block of queries; see `nearest_rows`."""
    best = queries.new_empty(len(queries), 0, dtype=torch.float64)  # the largest so far, in the order of their rows
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(database), size):
        part = database[start : start + size]
        products = (queries.double() @ part.double().T).mul_(GRID).round_()
        if exclude is not None:
            query = ((exclude >= start) & (exclude < start + len(part))).nonzero()[:, 0]
            products[query, exclude[query] - start] = -torch.inf
        number = torch.arange(start, start + len(part), device=rows.device).expand(len(queries), -1)
        best, rows = torch.cat([best, products], 1), torch.cat([rows, number], 1)
        columns = largest_columns(best, min(k, best.shape[1]))
        best, rows = best.gather(1, columns), rows.gather(1, columns)
    return rows.gather(1, best.argsort(dim=1, descending=True, stable=True))


def largest_columns(values: Tensor, k: int) -> Tensor:
    """Return the columns (Q, k) of the k largest of each row of values (Q, N), in ascending order.

    Of equal values at the limit, the first ones are chosen.
    """
    least = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > least, values == least
    room = k - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].reshape(len(values), k)
