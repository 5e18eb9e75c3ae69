"""Convert each tab's fields to values of sample.py; a form is a function (session, limits, fields) -> TaskRequest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ldm.app import storage
from ldm.app.limits import Limits, parse_int
from ldm.app.session import Session
from ldm.errors import UserError


@dataclass(frozen=True)
class TaskRequest:
    """An option of conf/task with its values, and the (height, width) of the resulting images.

    size: None for samples that are no images, which are of the size of the training data.
    """

    task: str
    values: Mapping[str, Any]
    size: tuple[int, int] | None


def generate(session: Session, limits: Limits, height: Any, width: Any) -> TaskRequest:
    """Request samples from noise; images at a size in pixels."""
    if not session.is_image:
        return TaskRequest("generate", {}, None)
    size = (parse_int("height", height), parse_int("width", width))
    return TaskRequest("generate", {"size": list(size)}, size)


def img2img(session: Session, limits: Limits, file: str | None, strength: float) -> TaskRequest:
    """Request variations of an image, with noise up to `strength`."""
    return TaskRequest(
        "img2img", {"image": store_picture(session, limits, file), "strength": float(strength)}, training_size(session)
    )


def inpaint(session: Session, limits: Limits, painted: Mapping[str, Any] | None) -> TaskRequest:
    """Request new content for the painted region.

    painted: `background` and `layers`, Pillow images of one size.
    """
    ground = editor_layer(limits, painted, "background", "a picture")
    image, mask = (
        encode_png(ground.convert("L" if session.card.shape[0] == 1 else "RGB")),
        encode_png(mask_from_strokes(ground, (painted or {}).get("layers") or [])),
    )
    values = {
        "image": str(storage.store_upload(session.home, image, ".png")),
        "mask": str(storage.store_upload(session.home, mask, ".png")),
    }
    return TaskRequest("inpaint", values, training_size(session))


def outpaint(
    session: Session, limits: Limits, file: str | None, left: Any, right: Any, top: Any, bottom: Any
) -> TaskRequest:
    """Request an image extended by so many pixels on each side."""
    sides = {
        name: parse_int(name, side)
        for name, side in {"left": left, "right": right, "top": top, "bottom": bottom}.items()
    }
    height, width = training_size(session)
    size = (height + sides["top"] + sides["bottom"], width + sides["left"] + sides["right"])
    pads = {f"pad_{name}": side for name, side in sides.items()}
    return TaskRequest("outpaint", {"image": store_picture(session, limits, file), **pads}, size)


def super_resolution(session: Session, limits: Limits, file: str | None) -> TaskRequest:
    """Request an image enlarged by the factor that the model was trained for."""
    low_res = store_picture(session, limits, file)
    scale = find_conditioner(session, "low_res").scale
    height, width = limits.image_size("the picture", Path(low_res))
    return TaskRequest("super_resolution", {"low_res": low_res, "scale": scale}, (scale * height, scale * width))


def semantic(session: Session, limits: Limits, painted: Mapping[str, Any] | None) -> TaskRequest:
    """Request an image of a semantic map painted in the colours of the classes."""
    canvas = editor_layer(limits, painted, "composite", "a map")
    values = classes_from_colours(canvas, palette(find_conditioner(session, "map").classes))
    return TaskRequest(
        "semantic", {"map": str(storage.store_upload(session.home, encode_png(values), ".png"))}, training_size(session)
    )


def controlnet(session: Session, limits: Limits, file: str | None, extract: bool) -> TaskRequest:
    """Request images from noise with a hint; extract: compute the hint from the uploaded image, of any size."""
    return TaskRequest(
        "generate",
        {"hints": store_picture(session, limits, file), "preprocess_hints": bool(extract)},
        training_size(session),
    )


def conditions(session: Session, prompt: str | None, negative: str | None, label: str | None) -> dict[str, Any]:
    """Return the conditions that the model accepts.  Raises UserError if it needs a prompt and the prompt is empty."""
    keys = session.model.conditioner.keys
    prompt, negative = (text.strip() if text else "" for text in (prompt, negative))
    if "caption" in keys and prompt:
        return {"prompt": prompt, **({"negative": negative} if negative else {})}
    if "label" in keys:
        return {"label": label} if label else {}
    if "caption" in keys:
        raise UserError("the prompt is empty: write what is to be drawn")
    return {}


def store_picture(session: Session, limits: Limits, file: str | None) -> str:
    """Save an uploaded image and return its path.  Raises UserError if there is none, or if it is too large."""
    if not file:
        raise UserError("no picture was given: drop one into its field")
    path = Path(file)
    limits.image_size("the picture", path)
    return str(storage.store_upload(session.home, path.read_bytes(), path.suffix.lower() or ".png"))


def mask_from_strokes(ground: Any, strokes: Sequence[Any]) -> Any:
    """Return the mask of all strokes, white where any is painted (Pillow).  Raises UserError if nothing is painted."""
    from PIL import Image, ImageChops

    mask = Image.new("L", ground.size, 0)
    for stroke in strokes:
        alpha = stroke.convert("RGBA").getchannel("A").point(lambda value: 255 if value > 127 else 0)
        mask = ImageChops.lighter(
            mask, alpha if alpha.size == mask.size else alpha.resize(mask.size, Image.Resampling.NEAREST)
        )
    if mask.getbbox() is None:
        raise UserError("nothing was painted: paint over the region to generate")
    return mask


def editor_layer(limits: Limits, painted: Mapping[str, Any] | None, name: str, what: str) -> Any:
    """Return a layer of the editor, composited on white.  Raises UserError if it is missing or too large."""
    from ldm.data.decode import composite_alpha

    if painted is None or painted.get(name) is None:
        raise UserError(f"{what} is missing: drop one into its field")
    limits.check_area("the picture", *painted[name].size)
    return composite_alpha(painted[name])


def palette(classes: int) -> list[tuple[int, int, int]]:
    """Return a colour (red, green, blue) for each class; the first is white."""
    from colorsys import hls_to_rgb

    ring = [hls_to_rgb((0.58 + i * 0.618) % 1, (0.5, 0.36, 0.64)[i % 3], 0.6) for i in range(classes - 1)]
    return [(255, 255, 255), *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in ring)]


def classes_from_colours(painted: Any, colours: Sequence[tuple[int, int, int]]) -> Any:
    """Map each pixel of a painted Pillow image to the class with the nearest colour, as a grey Pillow image."""
    import torch
    from PIL import Image

    wide, high = painted.size
    pixels = torch.frombuffer(bytearray(painted.convert("RGB").tobytes()), dtype=torch.uint8).reshape(-1, 3).float()
    nearest = torch.cdist(pixels, torch.tensor(colours).float()).argmin(1).byte()
    return Image.frombytes("L", (wide, high), bytes(nearest.tolist()))


def find_conditioner(session: Session, key: str) -> Any:
    """Return the model's conditioner, or the one of its composed conditioners, that reads `key` from a batch."""
    root = session.model.conditioner
    return next(one for one in getattr(root, "conditioners", {"": root}).values() if key in one.keys)


def training_size(session: Session) -> tuple[int, int]:
    """Return (height, width) of the images that a run was trained on."""
    _, height, width = session.card.shape
    return height, width


def encode_png(image: Any) -> bytes:
    """Encode a Pillow image as PNG."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
