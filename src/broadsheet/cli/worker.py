"""`broadsheet worker`: the process that works off the queue of runs."""

from typing import Annotated

import typer


def worker(
    once: Annotated[bool, typer.Option("--once", help="End when the queue is empty.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Where another worker is at work, take over when it ends.")] = False,
    seconds: Annotated[
        float, typer.Option(envvar="BROADSHEET_RUN_SECONDS", help="Time that a run may take; then it has failed.")
    ] = 3600.0,
    memory: Annotated[
        int, typer.Option(metavar="MB", envvar="BROADSHEET_RUN_MEMORY", help="Memory that a run may take; 0: any.")
    ] = 0,
    nice: Annotated[int, typer.Option(min=0, max=19, help="How far a run stands back behind other programs.")] = 10,
) -> None:
    """Work off the runs that people start on the web page, one after the other, until ctrl-C.

    It reads the queue from the page's database (BROADSHEET_DATABASE, or web.sqlite under BROADSHEET_HOME). There is one
    worker a database; a second one says so and ends. Each run has a process of its own, whose output is kept in runs/ID.log
    under BROADSHEET_HOME; what it measured goes where 'broadsheet compare' and 'broadsheet run' keep theirs.

    Ctrl-C, a stop by systemd, even kill -9 lose nothing: the run under way waits in the queue and goes on from its last
    finished part. A run whose worker is killed three times has failed.

    'broadsheet serve' starts a worker of its own, unless told --no-worker.

    Examples:

      broadsheet worker

      broadsheet worker --once

      broadsheet worker --seconds 7200 --memory 8000 --wait
    """
    import logging
    import signal

    try:
        from broadsheet.web.settings import Settings
        from broadsheet.web.worker import Limits, Worker
    except ImportError as error:
        raise ValueError(f"the worker needs {error.name}: pip install 'broadsheet[web]'") from None

    working = Worker(Settings.from_environment(), Limits(seconds, memory, nice))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: working.stop())
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("broadsheet.worker").setLevel(logging.INFO)
    working.run(once, wait)
    if working.stopping.is_set():
        typer.echo("stopped; a run that was under way waits in the queue")
