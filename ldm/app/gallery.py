"""What was drawn before: looked at, with how it was made, and made again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.app import storage, style
from ldm.app.controller import AppController
from ldm.cli.errors import user_error_message


@dataclass(frozen=True)
class Gallery:
    """The components of the tab; files: a State of what the gallery shows, chosen: one of the file that is looked at."""

    desk: AppController
    listed: Any
    files: Any
    chosen: Any
    message: Any
    button: Any
    stage: Any
    both: Any

    def connect_events(self, run: Any, opened: Sequence[Any]) -> None:
        """Say what happens when an image is chosen, when the button is pressed, and at the events that show the tab."""
        for event in opened:
            event(self._list, run, [self.listed, self.files, self.chosen], show_progress="hidden")
        self.listed.select(self._choose(), self.files, [self.chosen, self.message], show_progress="hidden")
        self.button.click(
            self._again(), [run, self.chosen], [self.stage, self.both], show_progress="hidden", concurrency_limit=None
        )

    def _list(self, run: str) -> tuple[Any, ...]:
        try:
            files = self.desk.list_images(run)
        except Exception:  # a run that cannot be loaded, which is said elsewhere
            files = []
        return with_captions(files), [str(file) for file in files], None

    def _choose(self) -> Any:
        import gradio as gr

        def choose(event: gr.SelectData, files: Sequence[str]) -> tuple[str | None, str]:
            try:
                return files[event.index], style.table(storage.image_settings(Path(files[event.index])))
            except Exception as error:
                return None, style.error(user_error_message(error) or repr(error))

        return choose

    def _again(self) -> Any:
        import gradio as gr

        def again(request: gr.Request, run: str, file: str | None) -> Iterator[tuple[Any, ...]]:
            if file is None:
                yield style.error("choose an image first"), gr.update()
                return
            for view in self.desk.repeat(str(request.session_hash), run, Path(file)):
                yield (
                    view.stage,
                    gr.update() if view.images is None else gr.update(value=_pair(view.images[0]), visible=True),
                )

        return again


def build_gallery(desk: AppController) -> Gallery:
    """The components, where they stand."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=5, min_width=380):
            listed = gallery("made", columns=6)
        with gr.Column(scale=4, min_width=380):
            said = gr.HTML(style.note("Choose an image to see how it was made."), elem_id="settings")
            button = gr.Button("Make it again", variant="primary", elem_id="again")
            stage = gr.HTML("", elem_id="again-said")
            both = gallery("both", columns=2, visible=False)
    return Gallery(desk, listed, gr.State([]), gr.State(None), said, button, stage, both)


def gallery(name: str, columns: int = 4, visible: bool = True) -> Any:
    """Images in rows; a click shows one large."""
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
    """Images with their seeds, and the name of their run where there are several."""
    return [(str(file), f"seed {int(file.stem)}{', ' if name else ''}{name}") for file in files]


def _pair(files: Sequence[Path]) -> list[tuple[str, str]]:
    return [(str(file), said) for file, said in zip(files, ("as it was", "made again"), strict=True)]
