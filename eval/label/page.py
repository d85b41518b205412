"""The page: one Gradio component of our own markup, and what it asks of the session.

Nothing is fetched from elsewhere: no fonts, no analytics, no share link. Prompts reach the page as
JSON and are set as text, never as markup. An image's address tells neither its file nor its run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from eval.label.session import Item, Session
from flux2.errors import InputError
from flux2.files import digest, write_json
from rewards.http.service import bound, is_loopback, port_taken

TEMPLATES: Final = Path(__file__).parent / "templates"
GRACE: Final = 2
"""Seconds that open connections (the page's heartbeat) are waited for at the end."""


def serve(
    session: Session,
    standing: Callable[[], Mapping[str, Any]],
    host: str,
    port: int,
    folder: Path,
) -> None:
    """Serves the page until the rater ends it, or a signal does.

    Args:
        standing: numbers of all raters, as `eval.label.stage.Board.standing`.
        host, port: where; port 0 takes a free one.
        folder: gets address.json while the page is up.

    Raises:
        InputError: Gradio is not installed, or the port is taken.
    """
    gradio, uvicorn = gradio_modules()
    sock = bound(host, port)
    address = folder / "address.json"
    try:
        try:
            sock.listen(128)
        except OSError as error:
            raise port_taken(host, port, error) from None
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{sock.getsockname()[1]}"
        server: Any = None

        def stop() -> None:
            server.should_exit = True

        app = application(gradio, session, standing, stop, host)
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, ws="none", http="h11",
            loop="asyncio", server_header=False, timeout_graceful_shutdown=GRACE,
        )  # fmt: skip
        server = uvicorn.Server(config)
        done, every = session.progress
        print(f"{session.file.rater}: {done} of {every} answered; the page is at {url}", flush=True)
        if not is_loopback(host):
            print(f"warning: whoever reaches {url} can answer as {session.file.rater}", flush=True)
        write_json(address, {"url": url, "rater": session.file.rater})
        server.run(sockets=[sock])  # a signal is raised again after it
    finally:
        sock.close()
        address.unlink(missing_ok=True)


def gradio_modules() -> tuple[Any, Any]:
    """(gradio, uvicorn), with Gradio's telemetry off. Raises InputError where Gradio is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return import_module("gradio"), import_module("uvicorn")
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed: pip install -e '.[label]' for the labelling page"
        ) from None


def application(
    gradio: Any,
    session: Session,
    standing: Callable[[], Mapping[str, Any]],
    stop: Callable[[], None],
    host: str,
) -> Any:
    """The ASGI application: the images, and Gradio's page at /."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route

    files = pictures(session)

    async def picture(request: Any) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            return Response(status_code=404)
        return FileResponse(file, headers={"Cache-Control": "private, max-age=3600"})

    # A name is its content, so the browser may keep it. A foreign host name that leads here
    # (DNS rebinding) is refused where only this machine is meant.
    own = [host, "localhost", "127.0.0.1"] if is_loopback(host) and ":" not in host else ["*"]
    app = Starlette(
        routes=[Route("/picture/{name}", picture)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=own)],
    )
    with gradio.Blocks(title="Which is better?", analytics_enabled=False) as blocks:
        gradio.HTML(
            html_template=_template("label.html"),
            js_on_load=_template("label.js"),
            apply_default_css=False,
            server_functions=_functions(session, standing, stop),
        )
    plain = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return gradio.mount_gradio_app(
        app, blocks, path="/", footer_links=[], run_history=False, ssr_mode=False, theme=plain,
        head=f"<style>{_template('label.css')}</style>", show_error=False,
    )  # fmt: skip


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _functions(
    session: Session, standing: Callable[[], Mapping[str, Any]], stop: Callable[[], None]
) -> list[Callable[[Any], Any]]:
    """What the page's script can call; each takes one JSON value, and gives one."""

    def current(_: Any = None) -> dict[str, Any]:
        return shown(session)

    def answer(given: Any) -> dict[str, Any]:
        try:
            session.answer(str(given["token"]), str(given["choice"]), given.get("seconds"))
        except OSError as error:
            return {"failed": f"The answer could not be stored: {error.strerror or error}"}
        return shown(session)

    def undo(_: Any = None) -> dict[str, Any]:
        try:
            session.undo()
        except OSError as error:
            return {"failed": f"The answer could not be taken back: {error.strerror or error}"}
        return shown(session)

    def numbers(_: Any = None) -> list[list[str]]:
        return lines(standing())

    def end(_: Any = None) -> None:
        stop()

    return [current, answer, undo, numbers, end]


# ---------------------------------------------------------------- what the page is told


def pictures(session: Session) -> dict[str, Path]:
    """Name in addresses → file."""
    return {
        _name(item, part): file for item in session.items for part, file in _parts(item).items()
    }


def _parts(item: Item) -> dict[str, Path]:
    pair = item.pair
    return {"a": pair.a, "b": pair.b} | {f"r{n}": f for n, f in enumerate(pair.references)}


def _name(item: Item, part: str) -> str:
    return digest([item.pair.id, part])[:20]


def shown(session: Session) -> dict[str, Any]:
    """The state of the page, in JSON's types; `token` is null where all is answered."""
    done, every = session.progress
    upcoming = session.upcoming(2)
    state: dict[str, Any] = {
        "rater": session.file.rater, "done": done, "all": every,
        "undo": bool(session.file.answers), "token": None,
    }  # fmt: skip
    for k, item in enumerate(upcoming):
        sides = ("a", "b") if item.left == "a" else ("b", "a")
        urls = [f"picture/{_name(item, part)}" for part in sides]
        given = [f"picture/{_name(item, part)}" for part in _parts(item) if part[0] == "r"]
        if k:
            state["next"] = [*urls, *given]
        else:
            state |= {"token": item.token, "prompt": item.pair.prompt, "images": urls,
                      "references": given, "next": []}  # fmt: skip
    return state


def lines(standing: Mapping[str, Any]) -> list[list[str]]:
    """The numbers of all raters as rows of text: [what, value]."""
    out = []
    for rater, own in standing["raters"].items():
        parts = [f"answers {own['answers']}", f"equal {own['ties']}", f"skipped {own['skips']}"]
        if not math.isnan(own["left"]):
            parts.append(f"left {own['left']:.0%}")
        if own["repeated"]:
            parts.append(f"repeated {own['same']} of {own['repeated']} alike")
        if not math.isnan(own["seconds"]):
            parts.append(f"{own['seconds']:.1f} s")
        out.append([rater, " · ".join(parts)])
    if both := standing["agreement"]:
        value = "not defined yet" if math.isnan(both["value"]) else f"{both['value']:.2f}"
        same = "" if math.isnan(both["same"]) else f" · {both['same']:.0%} alike"
        out.append([both["measure"], f"{value} on {both['pairs']} pairs{same}"])
    return out
