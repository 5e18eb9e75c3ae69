"""Emoji as pictures in two styles, and what is said of them: Fluent 3-D renders, Noto's flat drawings, OpenMoji's annotations."""

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
GROUPS = (  # OpenMoji's own additions, parts and skin tones aside
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
READER = 1  # raise when the same files come to give other pixels or rows
STRIKE, WIDTH = 109, 136  # the one size in which Noto's bitmaps can be drawn, and their width in pixels


@dataclass(frozen=True)
class Glyph:
    """An emoji: its code points in hex, those of it without skin tone, the text that draws it, and what OpenMoji says of it."""

    code: str
    base: str
    text: str
    annotation: str
    tags: Sequence[str]
    group: str


def glyphs(size: int, styles: Sequence[str], skin_tones: bool) -> tuple[Tensor, list[Glyph]]:
    """Pictures (N, styles, 3, size, size) uint8 on white, and N glyphs in OpenMoji's order, of the emoji that have every style.

    From the cache but for the first time. Raises AssetNotFoundError.
    """
    from PIL import features

    made_of = (READER, size, tuple(styles), skin_tones, FLUENT, OPENMOJI, NOTO, features.check("raqm"))
    pictures, rows = cached("emoji", made_of, partial(_draw, size, styles, skin_tones))
    return pictures, [Glyph(**row) for row in rows]


def _draw(size: int, styles: Sequence[str], skin_tones: bool) -> tuple[Tensor, list[dict]]:
    listed = annotated(open_archive(openmoji(), "openmoji.json")["openmoji.json"], skin_tones)
    artists = [ARTISTS[style]() for style in styles]
    drawn = []
    with ThreadPoolExecutor() as pool:
        for glyph, images in zip(
            listed, pool.map(lambda glyph: [artist(glyph) for artist in artists], listed), strict=True
        ):
            if all(images):
                drawn.append((asdict(glyph), torch.stack([pixels(image, size) for image in images if image])))
    return torch.stack([images for _, images in drawn]), [row for row, _ in drawn]


def pixels(image: "Image", size: int) -> Tensor:
    """A picture with transparency on white, scaled: (3, size, size) uint8."""
    from PIL import Image

    scaled = (
        decode.composite_alpha(image).convert("RGB").resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    )
    return decode.to_tensor(scaled, 3)


def annotated(content: bytes, skin_tones: bool) -> list[Glyph]:
    """The glyphs of openmoji.json in its order; variants in a skin tone, if wanted, have the tags of the emoji without."""
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
    """Code points as every source means them: upper case, without leading zeros and without FE0F, which only asks for colour."""
    points = hexcode.upper().replace("_", "-").split("-")
    return "-".join(point.lstrip("0") for point in points if point != "FE0F")


Renderer = Callable[[Glyph], "Image | None"]  # a square RGBA picture, or None of what it does not have


def fluent() -> Renderer:
    """The 3-D renders of Microsoft's Fluent emoji (MIT). Raises AssetNotFoundError."""
    from PIL import Image

    held = {code(Path(name).stem): content for name, content in open_archive(fluent_archive(), ".webp").items()}

    def picture(glyph: Glyph) -> "Image.Image | None":
        return Image.open(io.BytesIO(held[glyph.code])).convert("RGBA") if glyph.code in held else None

    return picture


def noto() -> Renderer:
    """Noto's flat drawings (OFL); without Raqm in Pillow only those of a single code point. Raises AssetNotFoundError."""
    from PIL import Image, ImageDraw, ImageFont

    path = noto_font()

    def picture(glyph: Glyph) -> "Image.Image | None":
        font = ImageFont.truetype(path, STRIKE)  # one for each call: FreeType's faces are not for several threads
        if abs(font.getlength(glyph.text) - WIDTH) > 12:  # not one picture: a sequence that the font lacks
            return None
        image = Image.new("RGBA", (WIDTH, WIDTH), (255, 255, 255, 0))
        ImageDraw.Draw(image).text((0, (WIDTH - 128) // 2), glyph.text, font=font, embedded_color=True)
        return image if image.getbbox() else None

    return picture


def pencil() -> Renderer:
    """Outlines of Noto's flat drawings, as a soft pencil would draw them. Raises AssetNotFoundError."""
    from PIL import ImageChops, ImageFilter, ImageOps

    flat = noto()

    def picture(glyph: Glyph) -> "Image.Image | None":
        drawn = flat(glyph)
        if drawn is None:
            return None
        grey = decode.composite_alpha(drawn).convert("L").filter(ImageFilter.GaussianBlur(1.0))
        thick, thin = grey.filter(ImageFilter.MaxFilter(5)), grey.filter(ImageFilter.MinFilter(3))
        lines = ImageChops.difference(thick, thin).point(lambda value: min(255, 3 * value))
        return ImageOps.invert(lines).convert("RGBA")

    return picture


ARTISTS: Mapping[str, Callable[[], Renderer]] = {"3d": fluent, "flat": noto, "pencil": pencil}


def open_archive(archive: Path, ending: str) -> dict[str, bytes]:
    """File name -> content of the files in a tar archive whose names end so."""
    with tarfile.open(archive) as tar:
        return {
            Path(m.name).name: file.read()
            for m in tar
            if m.name.endswith(ending) and (file := tar.extractfile(m)) is not None
        }


def fluent_archive() -> Path:
    """The archive of the 3-D renders, as it is published. Raises AssetNotFoundError."""
    return _archive("fluent-emoji-3d", FLUENT, "@lobehub/fluent-emoji-3d@1.1.0")


def openmoji() -> Path:
    """The archive of OpenMoji (CC BY-SA), as it is published. Raises AssetNotFoundError."""
    return _archive("openmoji", OPENMOJI, "openmoji@17.0.0")


def _archive(name: str, files: Mapping[str, str], package: str) -> Path:
    return fetch(name, files, sources={f"the package {package}": partial(from_npm, package)}) / next(iter(files))


def noto_font() -> Path:
    """Noto's emoji font in version 2.042. Raises AssetNotFoundError."""
    inside = "usr/share/fonts/truetype/noto"
    sources = {"the Debian package": partial(from_debian, "fonts-noto-color-emoji", inside)}
    return fetch("noto-color-emoji", NOTO, [Path("/", inside)], sources) / next(iter(NOTO))
