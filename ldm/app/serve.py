"""Serve the page on a port of this machine, without requests to other hosts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ldm.app import style
from ldm.app.controller import AppController
from ldm.errors import UserError

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'"
)


@contextmanager
def serve(desk: AppController, host: str = "127.0.0.1", port: int = 7860, compare: str | None = None) -> Iterator[str]:
    """Serve the page while the block runs and yield its address; port 0 is any free port.

    Raises UserError if gradio is missing or the port is in use.
    """
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_TELEMETRY", "GRADIO_RUN_HISTORY"):
        os.environ[name] = "False"
    os.environ.setdefault("GRADIO_TEMP_DIR", desk.scratch.name)
    try:
        import gradio as gr
    except ImportError:
        raise UserError("the page needs gradio: pip install -e '.[web]'") from None

    from ldm.app.page import page

    blocks: Any = page(desk, compare).queue(default_concurrency_limit=None, api_open=False)
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port or free_port(host),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=True,
            footer_links=[],
            allowed_paths=[str((session_home / "samples").absolute()) for session_home in image_dirs(desk)],
            max_file_size="64mb",
            app_kwargs={"middleware": [_policy()]},
            theme=gr.themes.Base(
                primary_hue="blue",
                neutral_hue="zinc",
                font=["system-ui", "sans-serif"],
                font_mono=["ui-monospace", "monospace"],
            ),
            css=style.STYLE,
        )
    except OSError as error:
        raise UserError(
            f"host={host} port={port} cannot be served ({error}); choose another port=, or 0 for any free port"
        ) from None
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def image_dirs(desk: AppController) -> list[Any]:
    """Return the folders that contain the runs' images."""
    from ldm.app.session import output_dir
    from ldm.runs.folder import find_run

    return [output_dir(find_run(run)) for run in desk.sessions.runs]


def free_port(host: str) -> int:
    """Return a port that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _policy() -> Any:
    """Return middleware with a policy that keeps the browser from contacting other hosts."""
    from starlette.middleware import Middleware

    class Policy:
        def __init__(self, app: Any):
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def sent(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                await send(message)

            await self.app(scope, receive, sent)

    return Middleware(Policy)
