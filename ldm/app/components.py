"""The form fields of the page: those shared by all tabs, and each tab's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.app import compose, requests, style
from ldm.app.controller import Form
from ldm.app.limits import Limits
from ldm.app.session import Session
from ldm.plotting import RED


@dataclass(frozen=True)
class Tab:
    """A button, the form it sends, and the components that are the form's fields."""

    button: Any
    form: Form
    fields: Sequence[Any]


def common_fields(limits: Limits, session: Session) -> list[Any]:
    """Create the components of controller.Settings, in its order."""
    import gradio as gr

    keys = session.model.conditioner.keys
    prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", visible="caption" in keys)
    negative = gr.Textbox(label="Negative prompt", elem_id="negative", visible="caption" in keys)
    label = gr.Dropdown(classes(session), value="", label="Class", elem_id="class", visible="label" in keys)
    with gr.Row():
        sampler = gr.Dropdown(
            compose.available_samplers(), value="ddim", label="Sampler", elem_id="sampler", min_width=120
        )
        steps = gr.Number(20, label="Steps", precision=0, elem_id="steps", min_width=80)
        scale = gr.Number(4.0, label="Guidance", step=0.5, elem_id="scale", min_width=80)
    with gr.Row():
        seed = gr.Number(0, label="First seed", precision=0, elem_id="seed", min_width=80)
        num = gr.Number(4, label=f"Images (up to {limits.num})", precision=0, elem_id="num", min_width=80)
    return [prompt, negative, label, sampler, steps, scale, seed, num]


def classes(session: Session) -> list[tuple[str, str]]:
    """Return the choices of the class field."""
    return [("all, in turn", ""), *((name, name) for name in session.card.classes)]


def text_tab(session: Session) -> Tab:
    """Create the tab for images from noise."""
    import gradio as gr

    with gr.Row():
        size = requests.training_size(session) if session.is_image else (None, None)
        sides = [
            gr.Number(side, label=label, precision=0, min_width=80, visible=session.is_image)
            for side, label in zip(size, ("Height", "Width"), strict=True)
        ]
    return Tab(_button("words"), requests.generate, sides)


def img2img_tab(session: Session) -> Tab:
    """Create the tab for variations of an image."""
    import gradio as gr

    file = _picture("restyle-file")
    strength = gr.Slider(0.05, 1.0, 0.6, step=0.05, label="Strength: how much is changed", elem_id="strength")
    return Tab(_button("restyle"), requests.img2img, [file, strength])


def inpaint(session: Session) -> Tab:
    """Create the tab for inpainting."""
    brush = max(2, min(session.card.shape[1:]) // 8)  # pixels; `auto` would cover a small image completely
    painted = _editor("inpaint-editor", "Paint over the region to generate", [RED], brush, height=420)
    return Tab(_button("inpaint"), requests.inpaint, [painted])


def outpaint(session: Session) -> Tab:
    """Create the tab for outpainting."""
    import gradio as gr

    file = _picture("outpaint-file")
    with gr.Row():
        directions = ("left", "right", "above", "below")
        sides = [
            gr.Number(0, label=f"Pixels {name}", precision=0, min_width=80, elem_id=f"pixels-{name}")
            for name in directions
        ]
    return Tab(_button("outpaint"), requests.outpaint, [file, *sides])


def super_resolution_tab(session: Session) -> Tab:
    """Create the tab for super-resolution."""
    return Tab(_button("enlarge"), requests.super_resolution, [_picture("enlarge-file")])


def semantic_map_tab(session: Session) -> Tab:
    """Create the tab for a painted semantic map."""
    import gradio as gr

    num_classes = requests.find_conditioner(session, "map").classes if "map" in session.model.conditioner.keys else 2
    colours = requests.palette(num_classes)
    gr.HTML(style.legend(colours))
    hexes = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours]
    label = "Paint with the colours of the classes; the white ground is class 0"
    canvas = _editor("map-editor", label, hexes[1:] + hexes[:1], 48, canvas_size=(384, 384), fixed_canvas=True)
    return Tab(_button("map"), requests.semantic, [canvas])


def hint(session: Session) -> Tab:
    """Create the tab for a ControlNet's hint."""
    import gradio as gr

    file = _picture("hint-file")
    return Tab(
        _button("hint"),
        requests.controlnet,
        [file, gr.Checkbox(True, label="Compute the hint from this image", elem_id="extract")],
    )


# id -> (title, the key of a batch that the conditioner must read, function that creates the tab)
TABS: dict[str, tuple[str, str | None, Callable[[Session], Tab]]] = {
    "words": ("From noise", None, text_tab),
    "restyle": ("Image to image", None, img2img_tab),
    "inpaint": ("Inpaint", None, inpaint),
    "outpaint": ("Outpaint", None, outpaint),
    "enlarge": ("Enlarge", "low_res", super_resolution_tab),
    "map": ("Map", "map", semantic_map_tab),
    "hint": ("Hint", "hint", hint),
}


def is_available(name: str, session: Session) -> bool:
    """Return whether a tab fits a run: its model reads what the tab sends, which is an image from all but the first."""
    key = TABS[name][1]
    return (name == "words" or session.is_image) and (key is None or key in session.model.conditioner.keys)


def _button(name: str) -> Any:
    import gradio as gr

    return gr.Button("Draw", variant="primary", elem_id=f"draw-{name}")


def _editor(name: str, label: str, colours: list[Any], brush: Any, **more: Any) -> Any:
    import gradio as gr

    return gr.ImageEditor(
        type="pil",
        format="png",  # the default, webp, is lossy
        label=label,
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=brush, colors=colours, default_color=colours[0], color_mode="fixed"),
        buttons=[],
        elem_id=name,
        elem_classes=["crisp"],
        **more,
    )


def _picture(name: str) -> Any:
    import gradio as gr

    unchanged: Any = None  # keep the file's mode
    return gr.Image(
        type="filepath",
        image_mode=unchanged,
        sources=["upload", "clipboard"],
        label="Picture",
        buttons=[],
        height=260,
        elem_id=name,
    )
