"""Opens a page with made papers for the benchmarks; prints its address.

python benchmarks/_web_page.py FOLDER --papers 100000
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "web"))

import made
import uvicorn
from opened import open_site


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--papers", type=int, default=400)
    parser.add_argument("--a-day", type=int, default=40)
    given = parser.parse_args()
    new = not (given.folder / "web.sqlite").exists()
    rows = made.papers(given.papers, a_day=given.a_day) if new else []
    app = open_site(given.folder, rows=rows).app if new else open_site(given.folder, count=0, rows=[]).app
    logging.basicConfig(level=logging.WARNING)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run([listening])


if __name__ == "__main__":
    main()
