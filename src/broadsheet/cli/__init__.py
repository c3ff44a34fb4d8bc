"""The command line. Commands import what they need when they run: listing papers must not wait for torch.

Annotations of commands are no strings (no ``annotations`` of ``__future__``): typer would compile every one of them at every
start.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: every foreseeable failure is one line on standard error and exit code 2."""
    import logging
    import warnings

    from .app import app

    for chatty in ("torchao", "torch.utils._pytree"):  # where torchao is installed: of kernels that are not for this machine
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        app(standalone_mode=False)
    except KeyboardInterrupt:
        _stop("stopped; finished cells are kept, the same command goes on from here", 130)
    except Exception as error:
        _explain(error)


def _explain(error: Exception) -> None:
    import click

    if isinstance(error, click.exceptions.Exit):
        sys.exit(error.exit_code)
    if isinstance(error, click.exceptions.Abort):
        _stop("stopped; finished cells are kept, the same command goes on from here", 130)
    if isinstance(error, click.ClickException):
        error.show()
        sys.exit(error.exit_code)
    from broadsheet.core.records import StorageError

    if isinstance(error, ValueError | StorageError):
        _stop(f"broadsheet: {' '.join(str(error).split())}", 2)
    if "sqlalchemy" in sys.modules:
        from sqlalchemy.exc import OperationalError

        if isinstance(error, OperationalError):  # locked, full or away
            said = " ".join(str(error.orig).split())
            _stop(f"broadsheet: the database refuses: {said}; what was stored is kept, the same command goes on", 2)
    raise error


def _stop(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
