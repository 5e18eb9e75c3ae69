"""The layout of the web page; each button calls the controller."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ldm.app import components, requests, style
from ldm.app.controller import AppController, Form, Settings, View
from ldm.app.gallery import build_gallery, gallery, players, with_captions
from ldm.cli.errors import user_error_message

ABOUT = "All images are saved in the run's folder, with everything that is needed to reproduce them."


def page(desk: AppController, compare: str | None = None) -> Any:
    """Build the page of a controller as a gradio.Blocks; compare: a second run to sample from, selected initially."""
    import gradio as gr

    runs, session = desk.sessions.runs, desk.sessions[desk.sessions.runs[0]]
    names = [(Path(run).name, run) for run in runs]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    with gr.Blocks(title="ldm", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(style.head("ldm", ABOUT), elem_id="head")
        with gr.Row():
            run = gr.Dropdown(names, value=runs[0], label="Run", elem_id="run")
            other = gr.Dropdown(
                [("none", ""), *names], value=compare or "", label="Compare with, same seeds", elem_id="compare"
            )
        with gr.Tabs():
            with gr.Tab("Draw"), gr.Row():
                with gr.Column(scale=4, min_width=380):
                    settings = components.common_fields(desk.limits, session)
                    with gr.Tabs():
                        tabs, forms = [], []
                        for name, (title, _, make) in components.TABS.items():
                            visible = components.is_available(name, session)
                            with gr.Tab(title, elem_id=f"tab-{name}", visible=visible) as tab:
                                forms.append(make(session))
                            tabs.append(tab)
                with gr.Column(scale=5, min_width=380):
                    stage = gr.HTML(style.note("No images yet."), elem_id="stage")
                    stop = gr.Button("Stop", size="sm", elem_id="stop")
                    first, second = gallery("drawn"), gallery("drawn-compare", visible=bool(compare))
                    sounds = gr.HTML("", elem_id="players")
                    archive = gr.DownloadButton("Download all (zip)", size="sm", visible=False, elem_id="archive")
            with gr.Tab("Gallery") as gallery_tab:
                gallery_view = build_gallery(desk)
        for form in forms:
            inputs, outputs = [run, other, *settings, *form.fields], [stage, first, second, sounds, archive]
            form.button.click(_drawing(desk, form.form), inputs, outputs, concurrency_limit=None, **quiet)
        stop.click(_for_whom(desk.stop), None, None, queue=False, **quiet)
        other.change(lambda name: gr.update(visible=bool(name)), other, second, **quiet)
        run.change(_switching(desk), run, [stage, *settings[:3], *forms[0].fields, *tabs], **quiet)
        gallery_view.connect_events(run, [gallery_tab.select, run.change])
        blocks.unload(_for_whom(desk.disconnect))
    return blocks


def _drawing(desk: AppController, form: Form) -> Callable[..., Iterator[tuple[Any, ...]]]:
    import gradio as gr

    def draw(request: gr.Request, run: str, other: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        settings, own = Settings(*values[:8]), values[8:]
        for view in desk.draw(str(request.session_hash), [run, *([other] if other else [])], form, own, settings):
            yield _shown(view)

    return draw


def _shown(view: View) -> tuple[Any, ...]:
    """Convert a View to the values of the stage, the two galleries, the players and the archive."""
    import gradio as gr

    if view.images is None:
        return view.stage, *[gr.update()] * 4
    names = view.names if len(view.names) > 1 else [""]
    galleries = [
        gr.update(value=with_captions(files, name)) for files, name in zip(view.images, names, strict=True)
    ] + [gr.update()]
    sounds = "".join(players(files, name) for files, name in zip(view.images, names, strict=True))
    return view.stage, galleries[0], galleries[1], sounds, gr.update(value=str(view.archive), visible=True)


def _for_whom(act: Callable[[str], None]) -> Callable[..., None]:
    import gradio as gr

    def handler(request: gr.Request) -> None:
        act(str(request.session_hash))

    return handler


def _switching(desk: AppController) -> Callable[[str], tuple[Any, ...]]:
    """Return the handler for a change of run: it updates the run's conditions and tabs."""
    import gradio as gr

    def switch(run: str) -> tuple[Any, ...]:
        try:
            session = desk.sessions[run]
        except Exception as error:
            return style.error(user_error_message(error) or repr(error)), *[gr.update()] * (5 + len(components.TABS))
        keys = session.model.conditioner.keys
        words = gr.update(visible="caption" in keys)
        label = gr.update(choices=components.classes(session), value="", visible="label" in keys)
        tabs = [gr.update(visible=components.is_available(name, session)) for name in components.TABS]
        sides = requests.training_size(session) if session.is_image else (None, None)
        return (
            style.note(f"{Path(run).name} is loaded."),
            words,
            words,
            label,
            *(gr.update(value=side, visible=session.is_image) for side in sides),
            *tabs,
        )

    return switch
