"""The command line, called in this process: importing torch anew for each call would take most of the time."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from broadsheet.cli import main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def broadsheet(*arguments, check=True):
    """Runs ``broadsheet`` with these arguments; ``check``: it must succeed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", ["broadsheet", *arguments]):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    done = Done(code, out.getvalue(), err.getvalue())
    if check:
        assert done.returncode == 0, done.stderr
    return done
