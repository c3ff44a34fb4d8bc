"""In a real browser: nothing that a screen reader stumbles over, keys that turn the page, results while typing."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from opened import open_site

from broadsheet.web import facts

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text()
PAGES = (
    *("/", "/days/2026-11-28", "/days/1999-01-01", "/calendar/2026-11", "/trending", "/running", "/about", "/api", "/nope"),
    *("/papers/gear", "/papers/glan", "/papers/2611.50059", "/search", "/search?q=cache&since=2026-11-01", "/search?q=zzz"),
    *("/sign-in", "/subscribe", "/sign-in/forged", "/runs", "/papers/gear/run"),
)

pytestmark = [pytest.mark.skipif(not CHROMIUM, reason="needs chromium")]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    import uvicorn

    folder = tmp_path_factory.mktemp("browser")
    app = open_site(folder, 100).app
    plots = folder / "plots" / facts._edition()
    plots.mkdir(parents=True)  # drawing is tested elsewhere
    (plots / "gear.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 42"/>')
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def findings(browser, address, paths, **look):
    """What axe finds that is serious, and what the browser complains of, page by page."""
    context = browser.new_context(bypass_csp=True, **look)  # axe is no script of ours
    tab, found = context.new_page(), []
    tab.set_default_timeout(120_000)  # the first look at claims reads all records
    for path in paths:
        tab.goto(address + path)
        wide = tab.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        if wide:
            found.append(f"{path}: wider than the window")
        tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        tab.evaluate(AXE)
        for violation in tab.evaluate("axe.run()")["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found.append(f"{path}: {violation['id']}: {violation['nodes'][0]['html'][:200]}")
    context.close()
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_has_a_serious_finding(browser, address, scheme, width):
    assert findings(browser, address, PAGES, color_scheme=scheme, viewport={"width": width, "height": 844}) == []


@pytest.fixture
def tab(browser):
    context = browser.new_context()
    opened = context.new_page()
    complaints = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    assert complaints == []
    context.close()


def test_arrow_keys_turn_days_and_slash_searches(tab, address):
    tab.goto(address)
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_url("**/days/2026-11-28")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_url(address + "/")
    tab.keyboard.press("/")
    tab.keyboard.type("ca")
    tab.keyboard.press("ArrowLeft")  # in the field it moves the cursor
    assert tab.url == address + "/"
    assert tab.locator("#find").input_value() == "ca"


def test_the_first_tab_is_the_way_to_the_content(tab, address):
    tab.goto(address)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"


def test_results_come_while_typing_and_stay_in_the_address(tab, address):
    tab.goto(f"{address}/search")
    tab.locator("#q").press_sequentially("decoding", delay=20)
    tab.wait_for_selector("#results mark")
    assert tab.locator("#results mark").first.inner_text().lower().startswith("decoding")
    tab.wait_for_url("**/search?*q=decoding*")
    shown = tab.locator("#results .paper").count()
    tab.reload()
    assert tab.locator("#q").input_value() == "decoding"
    assert tab.locator("#results .paper").count() == shown
    assert tab.evaluate("document.activeElement.tagName") == "BODY"


def test_search_and_days_work_without_javascript(browser, address):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(address)
    tab.locator("#find").fill("decoding")
    tab.locator("#find").press("Enter")
    tab.wait_for_url("**/search?q=decoding")
    assert tab.locator("mark").count() > 0
    tab.locator("article.paper h2 a").first.click()
    assert tab.locator("article.one h1").count() == 1
    tab.locator(".masthead .name a").click()
    tab.locator("a[rel=prev]").click()
    tab.wait_for_url("**/days/2026-11-28")
    context.close()
