"""The files of a drawn sample: written whole or not at all, and shown in a browser by their suffixes."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from ldm.io import atomic
from ldm.io.images import encode_png, to_uint8

PLAYERS: dict[str, str] = {  # suffix -> media type of what a browser plays
    ".mp4": "video/mp4",
    ".wav": "audio/wav",
}


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
    """Return the HTML that plays what a browser can of a sample's files, and says in words what is text.

    url: path -> where the page finds it.  "" if there is nothing but pictures.
    """
    return "".join(_player(path, escape(url(path), quote=True)) for path in paths)


def _player(path: Path, source: str) -> str:
    kind, _, _ = PLAYERS.get(path.suffix, "").partition("/")
    if kind == "video":
        return f'<video controls loop muted playsinline preload="metadata" src="{source}"></video>'
    if kind == "audio":
        return f'<audio controls preload="metadata" src="{source}"></audio>'
    if path.suffix == ".smi":
        return f"<code>{escape(path.read_text(encoding='utf-8', errors='replace').strip())}</code>"
    return ""
