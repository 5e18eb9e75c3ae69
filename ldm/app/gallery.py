"""The gallery tab: earlier images, their settings, and a button that reproduces them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ldm.app import storage, style
from ldm.app.controller import AppController
from ldm.cli.errors import user_error_message
from ldm.media.files import player_html, sample_files


@dataclass(frozen=True)
class Gallery:
    """The components of the tab; files: State of the images shown, chosen: State of the selected file."""

    desk: AppController
    listed: Any
    files: Any
    chosen: Any
    message: Any
    button: Any
    stage: Any
    both: Any

    def connect_events(self, run: Any, shown: Sequence[Any]) -> None:
        """Connect the handlers: an image is selected, the button is pressed, or an event in `shown` shows the tab."""
        for event in shown:
            event(self._list, run, [self.listed, self.files, self.chosen], show_progress="hidden")
        self.listed.select(self._choose(), self.files, [self.chosen, self.message], show_progress="hidden")
        self.button.click(
            self._reproduce(),
            [run, self.chosen],
            [self.stage, self.both],
            show_progress="hidden",
            concurrency_limit=None,
        )

    def _list(self, run: str) -> tuple[Any, ...]:
        try:
            files = self.desk.list_images(run)
        except Exception:  # a run that cannot be loaded, reported elsewhere
            files = []
        return with_captions(files), [str(file) for file in files], None

    def _choose(self) -> Any:
        import gradio as gr

        def choose(event: gr.SelectData, files: Sequence[str]) -> tuple[str | None, str]:
            try:
                picture = Path(files[event.index])
                return str(picture), style.table(storage.image_settings(picture)) + players([picture])
            except Exception as error:
                return None, style.error(user_error_message(error) or repr(error))

        return choose

    def _reproduce(self) -> Any:
        import gradio as gr

        def reproduce(request: gr.Request, run: str, file: str | None) -> Iterator[tuple[Any, ...]]:
            if file is None:
                yield style.error("choose an image first"), gr.update()
                return
            for view in self.desk.repeat(str(request.session_hash), run, Path(file)):
                if view.images is None:
                    yield view.stage, gr.update()
                else:
                    both = gr.update(value=_pair(view.images[0]), visible=True)
                    yield view.stage + players(view.images[0]), both

        return reproduce


def build_gallery(desk: AppController) -> Gallery:
    """Create the components in their layout."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=5, min_width=380):
            listed = gallery("made", columns=6)
        with gr.Column(scale=4, min_width=380):
            message = gr.HTML(style.note("Choose an image to see how it was made."), elem_id="settings")
            button = gr.Button("Make it again", variant="primary", elem_id="again")
            stage = gr.HTML("", elem_id="again-said")
            both = gallery("both", columns=2, visible=False)
    return Gallery(desk, listed, gr.State([]), gr.State(None), message, button, stage, both)


def gallery(name: str, columns: int = 4, visible: bool = True) -> Any:
    """Create a gallery of images in rows; a click shows one large."""
    import gradio as gr

    return gr.Gallery(
        show_label=False,
        columns=columns,
        object_fit="contain",
        height="auto",
        interactive=False,
        buttons=["download", "fullscreen"],
        visible=visible,
        elem_id=name,
        elem_classes=["crisp"],
    )


def with_captions(files: Sequence[Path], name: str = "") -> list[tuple[str, str]]:
    """Pair image files with captions: the seed, and the name of the run if there are several."""
    return [(str(file), f"seed {int(file.stem)}{', ' if name else ''}{name}") for file in files]


def players(pictures: Sequence[Path], name: str = "") -> str:
    """Return the HTML that plays samples whose pictures are given; "" for images, whose pictures are all there is."""
    shown = [(caption, player_html(sample_files(Path(file)), _url)) for file, caption in with_captions(pictures, name)]
    figures = "".join(f"<figure>{html}<figcaption>{escape(text)}</figcaption></figure>" for text, html in shown if html)
    return f"<div class='players'>{figures}</div>" if figures else ""


def _url(path: Path) -> str:
    return f"/gradio_api/file={quote(str(path.absolute()))}"


def _pair(files: Sequence[Path]) -> list[tuple[str, str]]:
    return [(str(file), caption) for file, caption in zip(files, ("as it was", "made again"), strict=True)]
