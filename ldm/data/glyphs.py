"""Emoji images in several styles and their annotations: Fluent 3-D renders, Noto's flat drawings, OpenMoji's texts."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.data import decode
from ldm.data.image_cache import cached
from ldm.io.download import fetch, from_debian, from_npm

if TYPE_CHECKING:
    from PIL.Image import Image

FLUENT = {"lobehub-fluent-emoji-3d-1.1.0.tgz": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"}
OPENMOJI = {"openmoji-17.0.0.tgz": "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"}
NOTO = {"NotoColorEmoji.ttf": "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"}
GROUPS = (  # without OpenMoji's own additions, and without parts and skin tones
    "smileys-emotion",
    "people-body",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "symbols",
    "flags",
)
READER = 1  # raise it when reading changes pixels or rows, so that cached ones are not used
STRIKE, WIDTH = 109, 136  # the only size in which Noto's bitmaps can be drawn, and their width in pixels


@dataclass(frozen=True)
class Glyph:
    """An emoji: code points in hex, those without skin tone, the text that renders it, OpenMoji's annotation."""

    code: str
    base: str
    text: str
    annotation: str
    tags: Sequence[str]
    group: str


def glyphs(size: int, styles: Sequence[str], skin_tones: bool) -> tuple[Tensor, list[Glyph]]:
    """Load the emoji that exist in every style, from the cache if possible.

    Returns images (N, styles, 3, size, size) uint8 on white, and N glyphs in OpenMoji's order.
    Raises AssetNotFoundError.
    """
    from PIL import features

    key = (READER, size, tuple(styles), skin_tones, FLUENT, OPENMOJI, NOTO, features.check("raqm"))
    images, rows = cached("emoji", key, partial(_render, size, styles, skin_tones))
    return images, [Glyph(**row) for row in rows]


def _render(size: int, styles: Sequence[str], skin_tones: bool) -> tuple[Tensor, list[dict]]:
    """Render the emoji that exist in every style; return images and glyphs (as dictionaries)."""
    listed = annotated(open_archive(openmoji(), "openmoji.json")["openmoji.json"], skin_tones)
    artists = [ARTISTS[style]() for style in styles]
    rendered = []
    with ThreadPoolExecutor() as pool:
        for glyph, images in zip(
            listed, pool.map(lambda glyph: [artist(glyph) for artist in artists], listed), strict=True
        ):
            if all(images):
                rendered.append((asdict(glyph), torch.stack([pixels(image, size) for image in images if image])))
    return torch.stack([images for _, images in rendered]), [row for row, _ in rendered]


def pixels(image: "Image", size: int) -> Tensor:
    """Composite an image on white and scale it: (3, size, size) uint8."""
    from PIL import Image

    scaled = (
        decode.composite_alpha(image).convert("RGB").resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    )
    return decode.to_tensor(scaled, 3)


def annotated(content: bytes, skin_tones: bool) -> list[Glyph]:
    """Return the glyphs of openmoji.json in its order; skin tone variants get the tags of the plain emoji."""
    rows = [row for row in json.loads(content) if row["group"] in GROUPS and (skin_tones or not row["skintone"])]
    tags = {row["hexcode"]: [tag.strip() for tag in row["tags"].split(",") if tag.strip()] for row in rows}
    return [
        Glyph(
            code(row["hexcode"]),
            code(base := row["skintone_base_hexcode"] or row["hexcode"]),
            row["emoji"],
            row["annotation"],
            tags[row["hexcode"]] or tags.get(base, []),
            row["group"],
        )
        for row in rows
    ]


def code(hexcode: str) -> str:
    """Normalise code points: upper case, without leading zeros and without FE0F, which only requests colour."""
    points = hexcode.upper().replace("_", "-").split("-")
    return "-".join(point.lstrip("0") for point in points if point != "FE0F")


Renderer = Callable[[Glyph], "Image | None"]  # a square RGBA image, or None for an emoji that the source lacks


def fluent() -> Renderer:
    """Return the renderer of Microsoft's 3-D Fluent emoji (MIT). Raises AssetNotFoundError."""
    from PIL import Image

    files = {code(Path(name).stem): content for name, content in open_archive(fluent_archive(), ".webp").items()}

    def render(glyph: Glyph) -> "Image.Image | None":
        return Image.open(io.BytesIO(files[glyph.code])).convert("RGBA") if glyph.code in files else None

    return render


def noto() -> Renderer:
    """Return the renderer of Noto's flat drawings (OFL); without Raqm in Pillow only single code points.

    Raises AssetNotFoundError.
    """
    from PIL import Image, ImageDraw, ImageFont

    path = noto_font()

    def render(glyph: Glyph) -> "Image.Image | None":
        font = ImageFont.truetype(path, STRIKE)  # per call: FreeType's faces are not thread-safe
        if abs(font.getlength(glyph.text) - WIDTH) > 12:  # several images: a sequence that the font lacks
            return None
        image = Image.new("RGBA", (WIDTH, WIDTH), (255, 255, 255, 0))
        ImageDraw.Draw(image).text((0, (WIDTH - 128) // 2), glyph.text, font=font, embedded_color=True)
        return image if image.getbbox() else None

    return render


def pencil() -> Renderer:
    """Return a renderer of outlines of Noto's flat drawings, as with a soft pencil. Raises AssetNotFoundError."""
    from PIL import ImageChops, ImageFilter, ImageOps

    flat = noto()

    def render(glyph: Glyph) -> "Image | None":
        image = flat(glyph)
        if image is None:
            return None
        grey = decode.composite_alpha(image).convert("L").filter(ImageFilter.GaussianBlur(1.0))
        thick, thin = grey.filter(ImageFilter.MaxFilter(5)), grey.filter(ImageFilter.MinFilter(3))
        lines = ImageChops.difference(thick, thin).point(lambda value: min(255, 3 * value))
        return ImageOps.invert(lines).convert("RGBA")

    return render


ARTISTS: Mapping[str, Callable[[], Renderer]] = {"3d": fluent, "flat": noto, "pencil": pencil}


def open_archive(archive: Path, ending: str) -> dict[str, bytes]:
    """Read the files in a tar archive whose names end with `ending`: {file name: content}."""
    with tarfile.open(archive) as tar:
        return {
            Path(m.name).name: file.read()
            for m in tar
            if m.name.endswith(ending) and (file := tar.extractfile(m)) is not None
        }


def fluent_archive() -> Path:
    """Return the published archive of the 3-D renders. Raises AssetNotFoundError."""
    return _archive("fluent-emoji-3d", FLUENT, "@lobehub/fluent-emoji-3d@1.1.0")


def openmoji() -> Path:
    """Return the published archive of OpenMoji (CC BY-SA). Raises AssetNotFoundError."""
    return _archive("openmoji", OPENMOJI, "openmoji@17.0.0")


def _archive(name: str, files: Mapping[str, str], package: str) -> Path:
    """Return a package's archive, downloaded if needed. Raises AssetNotFoundError."""
    return fetch(name, files, sources={f"the package {package}": partial(from_npm, package)}) / next(iter(files))


def noto_font() -> Path:
    """Return Noto's emoji font, version 2.042. Raises AssetNotFoundError."""
    folder = "usr/share/fonts/truetype/noto"
    sources = {"the Debian package": partial(from_debian, "fonts-noto-color-emoji", folder)}
    return fetch("noto-color-emoji", NOTO, [Path("/", folder)], sources) / next(iter(NOTO))
