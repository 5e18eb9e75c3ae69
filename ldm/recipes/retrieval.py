"""The databases of a retrieval conditioner and the neighbours of the data: computed once, and cached."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from torch import Tensor, nn

from ldm.conditioner.features import hash_texts
from ldm.conditioner.retrieval import Retrieval, nearest_rows
from ldm.config.build import to_container
from ldm.config.tree import iter_nodes
from ldm.data.captions import known_captions
from ldm.data.latents import batches
from ldm.data.neighbours import NeighbourDataset
from ldm.data.stream import length_of
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.download import cache_dir
from ldm.io.progress import ProgressBar
from ldm.tensors import hash_state_dict


def check_retrieval(cfg: Any, data: Any) -> None:
    """Raise UserError if the data cannot be the database of the config's conditioner."""
    parts = []
    for path, node in iter_nodes({"conditioner": to_container(cfg.conditioner)}):
        target = get_object(node["_target_"])
        if inspect.isclass(target) and issubclass(target, Retrieval):
            parts.append((path, node.get("database", "images"), node.get("k", 4)))
    for path, database, k in parts:
        if length_of(data) is None:
            raise UserError(
                f"{path}: these data have no length, and all {database} are embedded before the first step; "
                "choose another conditioner"
            )
        captions = known_captions(data) if database == "captions" else []
        if captions is None:
            raise UserError(f"{path}.database=captions: these data do not list their captions; choose images")
        most = len(data) - 1 if database == "images" else len(captions) - 1  # without itself; without the empty one
        if k > most and not cfg.get("adapter"):
            raise UserError(f"{path}.k={k}: expected at most {most}, the {database} that a sample can have near")
    if len({database for _, database, _ in parts}) < len(parts):
        raise UserError(f"{parts[-1][0]}.database={parts[-1][1]}: another retrieval has this database; choose another")


def retrieval_parts(conditioner: nn.Module) -> list[Retrieval]:
    """Return the retrieval conditioners in a conditioner."""
    return [part for part in conditioner.modules() if isinstance(part, Retrieval)]


def load_databases(conditioner: nn.Module, data: Any, folder: Path | None) -> None:
    """Give each retrieval conditioner without a database that of the data, and write it into a run folder.

    An adapter's base has its own.  folder: None for none.
    """
    for part in retrieval_parts(conditioner):
        if part.embeddings is None:
            part.load_database(database_of(part, data), data.fingerprint)
            if folder is not None:
                part.write_files(folder)


def add_neighbours(conditioner: nn.Module, data: Any) -> Any:
    """Return the data set with the rows of the nearest neighbours in the databases in its batches.

    An image of which the database has the embedding is not its own neighbour.
    """
    tables = {part.rows_key: neighbours_of(part, data) for part in retrieval_parts(conditioner)}
    return NeighbourDataset(data, tables) if tables else data


def database_of(part: Retrieval, data: Any) -> Tensor:
    """Return the embeddings (N, V) of all images of the data, or of all captions but the empty one."""
    if part.database == "images":
        return image_embeddings(part, data)
    captions = [text for text in known_captions(data) or [] if text]

    def embed() -> Tensor:
        return torch.cat([part.embed_texts(captions[i : i + 100], device()) for i in range(0, len(captions), 100)])

    return cached(f"captions-{hash_texts(captions)[:16]}-{part.identity[:16]}", embed)


def image_embeddings(part: Retrieval, data: Any) -> Tensor:
    """Return the embeddings (N, V) of all images of the data."""

    def embed() -> Tensor:
        bar, vectors, count = ProgressBar("embedding", len(data), unit="images"), [], 0
        for image in batches(data, 1 if hasattr(data, "shapes") else 100):
            vectors.append(part.embed_images(image, device()))
            count += len(image)
            bar.update(count)
        return torch.cat(vectors)

    return cached(f"images-{data.fingerprint}-{part.identity[:16]}", embed)


def neighbours_of(part: Retrieval, data: Any) -> Tensor:
    """Return the rows (N, k) of the database that are nearest to each image of the data."""
    if part.embeddings is None:
        raise ValueError("the database is loaded before neighbours are searched in it")
    database = part.embeddings
    is_own = part.database == "images" and part.source == data.fingerprint

    def search() -> Tensor:
        queries = image_embeddings(part, data).to(device())
        exclude = torch.arange(len(queries), device=queries.device) if is_own else None
        return nearest_rows(queries, database.to(queries.device), part.k, exclude)

    name = f"{hash_state_dict({'embeddings': database})[:16]}-k{part.k}"
    return cached(f"nearest-{data.fingerprint}-{part.identity[:16]}-{name}{'-others' if is_own else ''}", search)


def cached(name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Return a tensor from the cache, computed now if it is not there or damaged; other processes wait."""
    from filelock import FileLock

    path = cache_dir() / "retrieval" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            state: Mapping[str, Tensor] = atomic.read_tensors(path)
        except (FileNotFoundError, atomic.CorruptFileError):
            state = {"value": compute().cpu()}
            atomic.write_tensors(path, state)
    return state["value"]


def device() -> torch.device:
    """Return the device on which embeddings and neighbours are computed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
