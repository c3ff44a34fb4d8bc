"""Opens a page with made papers for the benchmarks; prints its address.

python benchmarks/_web_page.py FOLDER [--papers 400 | --file papers.jsonl]
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import uvicorn
from fastapi.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "web"))

from opened import open_site

from broadsheet.cli.serve import _listening


def fill(client: TestClient, file: Path) -> None:
    """Reads a file of arXiv's snapshot into the page's database."""
    from broadsheet.web import library
    from broadsheet.web.db import session
    from broadsheet.web.ingest.local import item_of

    with open(file, "rb") as lines, session(client.app.state.engine) as db:
        library.add(db, filter(None, map(item_of, lines)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--papers", type=int, default=400, help="that the tests make")
    parser.add_argument("--file", type=Path, help="of arXiv's snapshot, instead")
    given = parser.parse_args()
    filled = given.folder / "filled"
    client = open_site(given.folder, 0 if given.file or filled.exists() else given.papers)
    if given.file and not filled.exists():
        fill(client, given.file)
    filled.touch()
    logging.basicConfig(level=logging.WARNING)
    with _listening("127.0.0.1", 0) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(client.app, log_config=None, access_log=False)).run([listening])


if __name__ == "__main__":
    main()
