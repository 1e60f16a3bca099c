"""The dashboard's server: NiceGUI's pages in a FastAPI application, behind the guard, on one socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from equipoise.dashboard.access import Access, Guard, check_binding
from equipoise.dashboard.hub import Hub
from equipoise.dashboard.palette import css
from equipoise.dashboard.run_data import Choice
from equipoise.dashboard.runs import check_paths
from equipoise.dashboard.widgets import STATIC, View, el, link, page

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request

FILES = Path(__file__).parent / "static"
FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#0b5cc4"/>'
    '<path d="M7 21V15h4v6zM14 21V9h4v12zM21 21v-9h4v9z" fill="#fff"/></svg>'
)
SHUTDOWN_SECONDS = 3


def serve(
    runs: Sequence[Path],
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    *,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the dashboard until the process is interrupted. Once in a process: NiceGUI keeps its pages in a global.

    runs: run folders, .sqlite files, or folders in which runs are or will be. host: an address of this machine; one
    that others can reach needs a token. port: 0 takes any that is free. token: at least 8 characters; pages are then
    opened with ?token=..., which becomes a cookie. ready: called with the address once the port is bound.
    Raises ValueError for paths that do not exist, a host without a token, a port in use; ImportError without the extra.
    """
    check_paths(runs)
    check_binding(host, port, token)
    uvicorn = _uvicorn()
    with contextlib.closing(bind(host, port)) as bound:
        port = bound.getsockname()[1]
        app = build_app(runs, Access(token, port))
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # a log of addresses would keep the token
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        if ready is not None:
            ready(address(host, port, token))
        with warnings.catch_warnings():
            # NiceGUI looks at every object for its server, torch's deprecated ones too
            warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op", category=FutureWarning)
            uvicorn.Server(config).run(sockets=[bound])


def build_app(runs: Sequence[Path], access: Access) -> FastAPI:
    """The application, for a server of one's own. It must be built once in a process."""
    from fastapi import FastAPI
    from nicegui import app as nicegui_app
    from nicegui import ui
    from starlette.staticfiles import StaticFiles

    hub = Hub(runs)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount(f"{STATIC}/static", StaticFiles(directory=FILES))
    app.add_middleware(Guard, access=access)
    _add_pages(hub)
    _add_head()
    watching: list[asyncio.Task[None]] = []

    async def start() -> None:
        await hub.look()
        watching.append(asyncio.create_task(hub.watch()))

    nicegui_app.on_startup(start)
    nicegui_app.on_shutdown(lambda: [task.cancel() for task in watching] and None)
    ui.run_with(
        app,
        title="equipoise",
        favicon=FAVICON,
        dark=False,  # the themes are the style sheet's own
        language="en-US",
        tailwind=False,
        reconnect_timeout=10.0,
        message_history_length=100,
        show_welcome_message=False,
    )
    return app


def _add_head() -> None:
    """The style sheet and the script; the theme is set before the first paint."""
    from nicegui import ui

    ui.add_head_html(
        f"<style>{css()}</style>"
        f'<link rel="stylesheet" href="{STATIC}/static/dashboard.css">'
        f'<script src="{STATIC}/static/dashboard.js"></script>',
        shared=True,
    )


def _add_pages(hub: Hub) -> None:
    from nicegui import ui
    from starlette.requests import Request

    from equipoise.dashboard.page_compare import compare_page
    from equipoise.dashboard.page_incident import incident_page
    from equipoise.dashboard.page_run import run_page
    from equipoise.dashboard.page_runs import runs_page
    from equipoise.dashboard.page_specialisation import specialisation_page

    async def runs(request: Request) -> None:
        await runs_page(_view(hub, request))

    async def run(request: Request, run_id: str, layer: str = "", step: int | None = None) -> None:
        view = _view(hub, request)
        ref = hub.runs.get(run_id)
        await (run_page(view, ref, Choice(layer, step)) if ref else _unknown(view))

    async def incident(request: Request, run_id: str, key: str = "", since: int = 0) -> None:
        view = _view(hub, request)
        ref = hub.runs.get(run_id)
        await (incident_page(view, ref, key, since) if ref else _unknown(view))

    async def specialisation(request: Request, run_id: str, layer: str = "") -> None:
        view = _view(hub, request)
        ref = hub.runs.get(run_id)
        await (specialisation_page(view, ref, layer) if ref else _unknown(view))

    async def compare(request: Request, a: str = "", b: str = "") -> None:
        await compare_page(_view(hub, request), a, b)

    pages: dict[str, Callable[..., Any]] = {"/": runs, "/run/{run_id}": run, "/compare": compare}
    pages |= {"/run/{run_id}/incident": incident, "/run/{run_id}/specialisation": specialisation}
    for path, function in pages.items():
        function.__annotations__["request"] = Request  # annotations are text here; the router needs the type itself
        ui.page(path, response_timeout=30.0)(function)


def _view(hub: Hub, request: Request) -> View:
    return View(hub, "dark" if request.cookies.get("equipoise_theme") == "dark" else "light")


async def _unknown(view: View) -> None:
    with page(view, "No such run", ""):
        el("p", "card error", "There is no such run here. It may have been moved; its address names its place.")
        link("All runs", "/")


def _uvicorn() -> ModuleType:
    try:
        import nicegui  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(
            "the dashboard needs NiceGUI, which is not installed; pip install 'equipoise[dashboard]'"
        ) from error
    return uvicorn


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ValueError when the port is taken or the host is none of this machine's."""
    bare = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"host: cannot find {host} ({error}); give an address of this machine") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port: {port} is in use; choose another with --port, or 0 for any that is free"
            ) from error
        raise ValueError(f"host: cannot listen on {host} port {port}: {error}; choose another") from error
    bound.listen(socket.SOMAXCONN)  # a browser that is too early waits, and is not refused
    return bound


def address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    shown = f"[{host.strip('[]')}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?{urlencode({'token': token})}" if token else "")
