"""Takes the pictures of the web page in headless Chromium.

python benchmarks/web_pictures.py [--url http://127.0.0.1:8000]

Without an address it opens a page of its own with made papers (they say so) in a folder that goes away.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images" / "web"
#: name -> path, colour scheme, width and height in CSS pixels
PICTURES = {
    "front": ("/", "light", 1280, 860),
    "front-dark": ("/", "dark", 1280, 860),
    "front-phone": ("/", "light", 390, 844),
    "paper": ("/papers/gear", "light", 1100, 2050),
    "paper-dark": ("/papers/gear", "dark", 1100, 1200),
    "search": ("/search?q=kv+cache&running=1", "light", 1280, 860),
    "running": ("/running?status=running", "light", 1280, 860),
    "calendar": ("/calendar", "light", 1280, 860),
}
#: The same of a digest, whose address is a file's.
MAILED = {"digest": ("", "light", 700, 900)}
#: Bytes of a picture, at most.
LARGEST = 150_000


@contextmanager
def own_page():
    """A page with the catalogue's and made papers; its address, and that of a digest as it is mailed."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        command = [sys.executable, str(HERE / "_web_page.py"), folder, "--papers", "400"]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(process.terminate)
        address = process.stdout.readline().strip()
        yield address, mailed(Path(folder))


def mailed(folder: Path) -> str:
    """The HTML of a digest about the newest day, as a file."""
    from broadsheet.web import digest
    from broadsheet.web.db import open_database, reading
    from broadsheet.web.render import templates
    from broadsheet.web.settings import Settings

    settings = Settings.from_environment({"BROADSHEET_HOME": str(folder)})
    with reading(open_database(settings.database)) as db:
        html = digest.html_of(db, settings, templates(), digest.Issue.named("2026-11-29"))
    (folder / "digest.html").write_text(html, encoding="utf-8")
    return (folder / "digest.html").as_uri()


def take(address: str, mail: str = "") -> None:
    from playwright.sync_api import sync_playwright

    IMAGES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (path, scheme, width, height) in (PICTURES | MAILED if mail else PICTURES).items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab = context.new_page()
            tab.set_default_timeout(180_000)  # the first plot is drawn now
            tab.goto(address + path if path else mail, wait_until="load")
            target = IMAGES / f"{name}.png"
            tab.screenshot(path=target)
            context.close()
            smaller(target)
            print(f"{target.relative_to(HERE.parent)}  {target.stat().st_size:,} bytes")
        browser.close()


def smaller(path: Path) -> None:
    """A page has few colours: a palette makes a third of the bytes."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="", help="a page that is open already")
    given = parser.parse_args()
    if given.url:
        take(given.url.rstrip("/"))
        return
    with own_page() as (address, mail):
        take(address, mail)


if __name__ == "__main__":
    main()
