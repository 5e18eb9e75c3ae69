"""MOSES (Polykovskiy et al. 2020): its molecules, filters and statistics, read out of the wheel and never installed."""

import csv
import io
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io.atomic import CorruptFileError, read_tensors, write_tensors
from ldm.io.download import cache_dir, fetch, from_wheel

SPLITS = ("train", "test", "test_scaffolds")
FILES = {
    "train.csv.gz": "cc9d6e8e9534e25a7a36361529ae739ddda8036e9072b2fc5cea6930a0592144",
    "test.csv.gz": "0248e682a9c29ca7649184dd88a4edc83f48f0e84af6b923990069c3da4501b6",
    "test_scaffolds.csv.gz": "86c298db856515f4b31a90805de16a580c60a6adcc0ad700ae180d88ba0b9bce",
    "test_stats.npz": "ded25073225a895d4ed17bf1d4223d27560e87ff4cb85786346ca1cc8efa03d3",
    "test_scaffolds_stats.npz": "7b7aba6c1474634a019bebf16f389d554cb9dd1021dfc8c1d1e54430a9f0e7f8",
    "mcf.csv": "f4a2bfacb4cb8877295eb2a4b4e61ec9770a26388f1331e5dc9c193d22dd5f89",
    "wehi_pains.csv": "d762e5420ec70f06d7e41d336cae6f67e2feb0eddf05c6171192a332726d296f",
}
FOLDERS = ("dataset/data", "metrics")  # of the wheel
# all that a pickle of arrays, dictionaries and counters names
PICKLED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    ("collections", "Counter"): dict,
}


def moses(root: str | Path | None = None) -> Path:
    """Return the folder with MOSES's FILES.

    root: a folder that may contain them.  Raises AssetNotFoundError.
    """
    places = [Path(root).expanduser()] if root else []
    return fetch("moses", FILES, places, {"the package molsets": partial(_from_wheel, "molsets==0.3.1")})


def _from_wheel(requirement: str, scratch: Path) -> Path:
    inside = from_wheel(requirement, "moses", scratch)
    for folder in FOLDERS:
        for file in (inside / folder).iterdir():
            if file.name in FILES:
                os.replace(file, inside / file.name)
    return inside


def reference_statistics(split: str, root: str | Path | None = None) -> dict[str, Tensor]:
    """Return what MOSES's published scores compare with.

    mu (512,) and sigma (512, 512) float64: mean and covariance of ChemNet's features; fingerprints (N, 128) uint8: the
    Morgan fingerprints of radius 2 as packed bits.
    split: test or test_scaffolds.  root: see `moses`.
    The file is a pickle: it is read once, by an unpickler that knows arrays, dictionaries and counters and calls
    nothing else, and stored in the cache as plain arrays.  Raises AssetNotFoundError.
    """
    path = cache_dir() / "moses" / "statistics" / f"{split}-{FILES[f'{split}_stats.npz'][:16]}.safetensors"
    try:
        return read_tensors(path)
    except (FileNotFoundError, CorruptFileError):
        pass
    with zipfile.ZipFile(moses(root) / f"{split}_stats.npz") as archive:
        statistics = read_object_array(archive.read("stats.npy"))
    mu, sigma = (torch.from_numpy(statistics["FCD"][name].astype(np.float64)) for name in ("mu", "sigma"))
    bits = torch.from_numpy(np.packbits(statistics["SNN"]["fps"], axis=1))
    values = {"mu": mu, "sigma": sigma, "fingerprints": bits}
    write_tensors(path, values)
    return values


def read_object_array(content: bytes) -> dict:
    """Return the dictionary that a .npy file of one object holds.

    Raises UserError for other content, and for a pickle that names anything but the PICKLED.
    """
    start = 10 + int.from_bytes(content[8:10], "little")
    if content[:7] != b"\x93NUMPY\x01" or len(content) < start:
        raise UserError("statistics: expected a .npy file of version 1")
    try:
        value = _Unpickler(io.BytesIO(content[start:]), encoding="latin1").load()
    except (EOFError, IndexError, KeyError, TypeError, AttributeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"statistics: not a pickle of arrays: {' '.join(str(error).split())}") from None
    value = value.item() if isinstance(value, np.ndarray) and value.shape == () else value
    if not isinstance(value, dict):
        raise UserError(f"statistics: a pickle of {type(value).__name__}; expected a dictionary")
    return value


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in PICKLED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return PICKLED[module, name]


def filter_patterns(root: str | Path | None = None) -> list[str]:
    """Return the SMARTS of MOSES's medicinal chemistry filters and of the PAINS (Baell & Holloway 2010).

    root: see `moses`.  Raises AssetNotFoundError.
    """
    folder = moses(root)
    with open(folder / "mcf.csv", newline="", encoding="utf-8") as file:
        patterns = [row["smarts"] for row in csv.DictReader(file)]
    with open(folder / "wehi_pains.csv", newline="", encoding="utf-8") as file:
        return patterns + [row[0].strip() for row in csv.reader(file) if row]
