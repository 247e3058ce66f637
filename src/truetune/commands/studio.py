"""`truetune studio`: a local page for the whole story; it starts commands as processes and reads run folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truetune.errors import UserError
from truetune.messages import text

if TYPE_CHECKING:
    from truetune.console import Console


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(host: str, port: int | None, roots: tuple[str, ...], token_file: str | None, no_browser: bool) -> int:
        from truetune.console import Console

        _need_packages()
        return _run(Console(lang), host, port, roots=roots, token_file=token_file, opens_browser=not no_browser)

    return click.Command(
        "studio",
        callback=run,
        help=text("command.studio", lang),
        params=[
            click.Option(["--host"], default="127.0.0.1", metavar="ADDRESS", help=text("help.host", lang)),
            click.Option(["--port"], type=click.IntRange(1, 65535), metavar="N", help=text("help.studio_port", lang)),
            click.Option(["--root", "roots"], multiple=True, metavar="FOLDER", help=text("help.studio_root", lang)),
            click.Option(["--token-file"], metavar="FILE", help=text("help.token_file", lang)),
            click.Option(["--no-browser"], is_flag=True, help=text("help.no_browser", lang)),
        ],
    )


def _run(
    console: Console,
    host: str,
    port: int | None,
    *,
    roots: tuple[str, ...],
    token_file: str | None,
    opens_browser: bool,
) -> int:
    from truetune.serve.guard import is_loopback, read_token
    from truetune.studio.places import Places
    from truetune.studio.running import bind_free, run

    if token_file is None and not is_loopback(host):
        raise UserError("serve_no_token", where=f"--host {host}", fix="serve_no_token")
    for root in roots:
        if not Path(root).is_dir():
            raise UserError("no_folder", where=f"--root {root}", fix="no_folder", folder=root)
    token = read_token(Path(token_file).expanduser()) if token_file else None
    places = Places(Path(), [Path(root) for root in roots])
    with bind_free(host, port) as bound:
        url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/"

        def on_ready() -> None:
            console.say("serve.ready", url=url)
            if opens_browser and console.is_terminal:
                _open(url)

        if token_file:
            console.say("studio.door_token_in", path=token_file)
        return run(places, bound=bound, token=token, lang=console.lang, on_ready=on_ready)


def _open(url: str) -> None:
    """Open the page in a browser with windows; one in the terminal would take it over."""
    import webbrowser

    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if type(browser) is not webbrowser.GenericBrowser:
        browser.open(url)


def _need_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import httpx  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("extra_missing", where="truetune studio", fix="extra_missing", extra="studio") from None
