"""What each tab asks for, as values of sample.py: a form is a function (session, limits, its fields) -> Asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ldm.app import keep
from ldm.app.limits import Limits, whole
from ldm.app.session import Session
from ldm.errors import UserError


@dataclass(frozen=True)
class Asked:
    """An option of conf/task with its values, and the (height, width) of the images it comes to."""

    task: str
    values: Mapping[str, Any]
    size: tuple[int, int]


def words(session: Session, limits: Limits, height: Any, width: Any) -> Asked:
    """From noise, at a size in pixels."""
    size = (whole("height", height), whole("width", width))
    return Asked("generate", {"size": list(size)}, size)


def restyle(session: Session, limits: Limits, file: str | None, strength: float) -> Asked:
    """From a picture with noise up to `strength`."""
    return Asked("img2img", {"image": picture(session, limits, file), "strength": float(strength)}, square(session))


def repaint(session: Session, limits: Limits, painted: Mapping[str, Any] | None) -> Asked:
    """What was painted over drawn anew. painted: the `background` and `layers`, Pillow images of one size."""
    ground = layer(limits, painted, "background", "a picture")
    image, mask = (
        png(ground.convert("RGB" if session.card.channels == 3 else "L")),
        png(covered(ground, (painted or {}).get("layers") or [])),
    )
    values = {"image": str(keep.given(session.home, image, ".png")), "mask": str(keep.given(session.home, mask, ".png"))}
    return Asked("inpaint", values, square(session))


def widen(session: Session, limits: Limits, file: str | None, left: Any, right: Any, top: Any, bottom: Any) -> Asked:
    """A picture with so many pixels added on each side."""
    sides = {name: whole(name, side) for name, side in {"left": left, "right": right, "top": top, "bottom": bottom}.items()}
    height, width = square(session)
    size = (height + sides["top"] + sides["bottom"], width + sides["left"] + sides["right"])
    return Asked("outpaint", {"image": picture(session, limits, file), **sides}, size)


def enlarge(session: Session, limits: Limits, file: str | None) -> Asked:
    """A picture as many times as large as the model was trained to make it."""
    low_res = picture(session, limits, file)
    scale = part(session, "low_res").scale
    height, width = limits.picture("the picture", Path(low_res))
    return Asked("super_resolution", {"low_res": low_res, "scale": scale}, (scale * height, scale * width))


def colour_map(session: Session, limits: Limits, painted: Mapping[str, Any] | None) -> Asked:
    """From a map that was painted in the colours of the classes."""
    shown = layer(limits, painted, "composite", "a map")
    values = classes_of(shown, palette(part(session, "map").classes))
    return Asked("semantic", {"map": str(keep.given(session.home, png(values), ".png"))}, square(session))


def hinted(session: Session, limits: Limits, file: str | None, extract: bool) -> Asked:
    """From noise, along a hint; extract: the picture is what the hint is made of, at any size."""
    return Asked("generate", {"hints": picture(session, limits, file), "extract": bool(extract)}, square(session))


def told(session: Session, prompt: str | None, negative: str | None, label: str | None) -> dict[str, Any]:
    """What the model is told, of what it listens to. Raises UserError for an empty prompt where it listens to nothing else."""
    keys = session.model.conditioner.keys
    prompt, negative = (text.strip() if text else "" for text in (prompt, negative))
    if "caption" in keys and prompt:
        return {"prompt": prompt, **({"negative": negative} if negative else {})}
    if "label" in keys:
        return {"label": label} if label else {}
    if "caption" in keys:
        raise UserError("the prompt is empty: write what is to be drawn")
    return {}


def picture(session: Session, limits: Limits, file: str | None) -> str:
    """Where a picture that was given is kept. Raises UserError without one, or for one that is too large."""
    if not file:
        raise UserError("no picture was given: drop one into its field")
    path = Path(file)
    limits.picture("the picture", path)
    return str(keep.given(session.home, path.read_bytes(), path.suffix.lower() or ".png"))


def covered(ground: Any, strokes: Sequence[Any]) -> Any:
    """The mask of all strokes over a picture, Pillow images, white where there is any. Raises UserError without one."""
    from PIL import Image, ImageChops

    mask = Image.new("L", ground.size, 0)
    for stroke in strokes:
        alpha = stroke.convert("RGBA").getchannel("A").point(lambda value: 255 if value > 127 else 0)
        mask = ImageChops.lighter(mask, alpha if alpha.size == mask.size else alpha.resize(mask.size, Image.Resampling.NEAREST))
    if mask.getbbox() is None:
        raise UserError("nothing was painted: paint over what is to be drawn anew")
    return mask


def layer(limits: Limits, painted: Mapping[str, Any] | None, name: str, what: str) -> Any:
    """An image of what was painted, laid on white. Raises UserError where there is none, or for one that is too large."""
    from ldm.data.decode import composite_alpha

    if painted is None or painted.get(name) is None:
        raise UserError(f"{what} is missing: drop one into its field")
    limits.area("the picture", *painted[name].size)
    return composite_alpha(painted[name])


def palette(classes: int) -> list[tuple[int, int, int]]:
    """A colour (red, green, blue) for each class, the first white."""
    from colorsys import hls_to_rgb

    ring = [hls_to_rgb((0.58 + i * 0.618) % 1, (0.5, 0.36, 0.64)[i % 3], 0.6) for i in range(classes - 1)]
    return [(255, 255, 255), *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in ring)]


def classes_of(shown: Any, colours: Sequence[tuple[int, int, int]]) -> Any:
    """The map of a painted Pillow image: at each pixel the class of the nearest colour, as a grey Pillow image."""
    import torch
    from PIL import Image

    wide, high = shown.size
    pixels = torch.frombuffer(bytearray(shown.convert("RGB").tobytes()), dtype=torch.uint8).reshape(-1, 3).float()
    nearest = torch.cdist(pixels, torch.tensor(colours).float()).argmin(1).byte()
    return Image.frombytes("L", (wide, high), bytes(nearest.tolist()))


def part(session: Session, key: str) -> Any:
    """The conditioner, of those the model has, that listens to a key of the batch."""
    whole = session.model.conditioner
    return next(one for one in getattr(whole, "conditioners", {"": whole}).values() if key in one.keys)


def square(session: Session) -> tuple[int, int]:
    """(height, width) of the images that a run was trained on."""
    return session.card.size, session.card.size


def png(image: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
