"""`broadsheet serve`: the web page, and the process that works off its runs."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import socket
    import subprocess


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    worker: Annotated[bool, typer.Option(help="Also start the process that works off the queue of runs.")] = True,
    proxy: Annotated[
        str, typer.Option(metavar="ADDRESSES", help="Proxies whose X-Forwarded-For is believed, comma-separated.")
    ] = "",
) -> None:
    """Open the page: the day's papers, search, votes, a digest by mail, and runs; until ctrl-C.

    Everything is kept under BROADSHEET_HOME, in SQLite unless BROADSHEET_DATABASE names another database. BROADSHEET_URL is
    the address that mails and feeds link to. Where others than this machine's users see the page, starting runs takes
    BROADSHEET_OWNER_TOKEN. docs/deploy.md shows systemd, nginx and a container.

    Examples:

      broadsheet serve

      BROADSHEET_URL=https://papers.example.org broadsheet serve --port 8100 --proxy 127.0.0.1
    """
    import os
    import signal
    import threading
    from dataclasses import replace

    try:
        import uvicorn

        from broadsheet.web import facts
        from broadsheet.web.app import create_app
        from broadsheet.web.settings import Settings
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'broadsheet[web]'") from None

    with _listening(host, port) as listening:
        own = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        settings = Settings.from_environment(url=os.environ.get("BROADSHEET_URL", "") or own)
        if not _loopback(host) and not settings.public:  # an address of this machine's own, but others can come in
            settings = replace(settings, url=own)
        app = create_app(settings)
        os.environ["BROADSHEET_URL"] = settings.url  # the worker's too
        _log()
        typer.echo(f"Broadsheet at {own}{'' if settings.url == own else f', for {settings.url}'} (ctrl-C stops)")
        if settings.public:
            _tell_public(settings.url, bool(settings.owner_token))
        sys.stdout.flush()
        threading.Thread(target=facts.warm, args=(settings.home,), daemon=True).start()
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(proxy),
                forwarded_allow_ips=proxy,
                timeout_graceful_shutdown=5,
            )
        )
        child = Worker() if worker else None
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # both end here, and the worker with us
        try:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has ended, mostly
                server.run([listening])
            typer.echo("stopped")
        finally:
            if child:
                child.stop()


class Worker:
    """The one process that works off the queue, started again when it dies. Where this server is killed it goes too."""

    #: Seconds that it has to put down what it does.
    PATIENCE = 10

    def __init__(self, command: tuple[str, ...] = ("worker",)):
        import threading

        self.command = [sys.executable, "-c", "from broadsheet.cli import main; main()", *command]
        self.process: subprocess.Popen[bytes] | None = None
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._keep, daemon=True)
        self.thread.start()

    def _keep(self) -> None:
        import subprocess
        import time

        wait = 1.0
        while not self.stopping.is_set():
            begun = time.monotonic()
            self.process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=_die_with_parent)
            code = self.process.wait()
            if self.stopping.is_set():
                return
            if code == 2:  # it said why in a line: another try would say the same
                typer.echo("the worker does not run, so runs stay in the queue; the page goes on", err=True)
                return
            wait = 1.0 if time.monotonic() - begun > 60 else min(60.0, 2 * wait)
            self.stopping.wait(wait)

    def stop(self) -> None:
        """Ends it, at first politely."""
        import subprocess

        self.stopping.set()
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(self.PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.thread.join(1)


def _die_with_parent() -> None:
    """On Linux: the worker is told to stop when the thread that started it is gone, even by kill -9."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _listening(host: str, port: int) -> "socket.socket":
    import socket

    try:
        made = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port (0: a free one)") from None
    # Connections take this over. asyncio sets it only on sockets whose protocol is named, and without it an answer in two
    # parts waits 40 ms for the acknowledgement of the first.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _loopback(host: str) -> bool:
    from ipaddress import ip_address

    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tell_public(url: str, has_token: bool) -> None:
    how = (
        "is asked for BROADSHEET_OWNER_TOKEN"
        if has_token
        else "is refused: set BROADSHEET_OWNER_TOKEN to allow it to yourself"
    )
    typer.echo(f"others can see this page: whoever starts a run {how}", err=True)
    if "://0.0.0.0" in url or "://[::]" in url:
        typer.echo(f"mails and feeds will link to {url}: set BROADSHEET_URL to the address that others use", err=True)


def _log() -> None:
    import logging

    from broadsheet.web.health import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("broadsheet", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
