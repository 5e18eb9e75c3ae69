"""The files of a drawn sample: written whole or not at all, and shown in a browser by their suffixes."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from ldm.io import atomic
from ldm.io.images import encode_png, to_uint8

MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".wav": "audio/wav"}  # by suffix, of what a browser shows
MAX_TEXT = 2000  # characters of a text that a page shows


def write_sample(stem: Path, contents: Mapping[str, bytes], picture: Tensor, metadata: Mapping[str, str]) -> list[Path]:
    """Write the files of one sample, whole or not at all, and return their paths, the picture's last.

    contents: suffix, as ".wav", -> the content of the file STEM.wav.
    picture: (C, H, W) in [-1, 1], C = 1, 3 or 4, of STEM.png, which is written last: where it is, the others are.
    metadata: stored in the picture, where `sample.py reproduce=` and the web page read it.
    Raises OSError.
    """
    written = {stem.with_name(stem.name + suffix): data for suffix, data in contents.items()}
    written[picture_of(stem)] = encode_png(to_uint8(picture), metadata)
    try:
        for path, data in written.items():
            atomic.write_bytes(path, data)
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return list(written)


def picture_of(stem: Path) -> Path:
    """Return the path of a sample's picture."""
    return stem.with_name(stem.name + ".png")


def sample_files(picture: Path) -> list[Path]:
    """List all files of a sample whose picture is given, the picture last."""
    others = (file for file in picture.parent.glob(f"{picture.stem}.*") if file != picture)
    return [*sorted(others), picture]


def player_html(paths: Sequence[Path], url: Callable[[Path], str]) -> str:
    """Return the HTML that plays the video and sound among the files of a sample, and has its text as text.

    url: path -> where the page finds the file.  "" if the files are pictures and arrays.
    """
    return "".join(_player(path, url) for path in paths)


def sample_html(picture: Path, url: Callable[[Path], str]) -> str:
    """Return the HTML of the picture of a sample and, below it, of what `player_html` plays of its other files."""
    source = escape(url(picture), quote=True)
    return f'<img alt="{escape(picture.stem)}" src="{source}">{player_html(sample_files(picture), url)}'


def _player(path: Path, url: Callable[[Path], str]) -> str:
    kind = MEDIA_TYPES.get(path.suffix, "").partition("/")[0]
    if kind == "video":
        return (
            f'<video controls loop muted playsinline preload="metadata" src="{escape(url(path), quote=True)}"></video>'
        )
    if kind == "audio":
        return f'<audio controls preload="metadata" src="{escape(url(path), quote=True)}"></audio>'
    if path.suffix == ".smi":
        with path.open(encoding="utf-8", errors="replace") as file:
            return f"<code>{escape(file.read(MAX_TEXT).strip())}</code>"
    return ""
