"""The pages as a browser without JavaScript gets them."""

from __future__ import annotations

import re
import sys
from datetime import date, timedelta
from html.parser import HTMLParser

import made
import pytest
from opened import open_site
from sqlalchemy import select

from broadsheet import catalogue
from broadsheet.web.db import session
from broadsheet.web.tables import Paper

LAST = date(2026, 11, 29)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return open_site(tmp_path_factory.mktemp("pages"), 100)


class Links(HTMLParser):
    """What a page links to, and its ids; raises for scripts and styles that the security policy forbids."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert "style" not in given, self.get_starttag_text()
        assert not [name for name in given if name.startswith("on")], self.get_starttag_text()
        assert tag not in ("style", "iframe", "object", "embed", "base"), self.get_starttag_text()
        if tag == "script":
            assert given.get("src", "").startswith("/static/"), self.get_starttag_text()
        self.ids += [given["id"]] if given.get("id") else []
        self.found += [given[name] for name in ("href", "src") if given.get(name)]


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_every_link_of_the_page_leads_somewhere(client):
    """From the front page on, everything of ours that is linked answers, and nothing is loaded from elsewhere."""
    seen, todo = set(), ["/", "/days/2026-11-28?page=2", "/search?q=cache&running=", "/about", "/api", "/papers/gear"]
    later = {"/sign-in", "/subscribe", "/account", "/runs"}  # other parts of the page
    while todo and len(seen) < 70:
        path = todo.pop(0)
        seen.add(path)
        answer = client.get(path)
        assert answer.status_code == 200, path
        if not answer.headers["content-type"].startswith("text/html"):
            continue
        links = Links(answer.text)
        assert len(links.ids) == len(set(links.ids)), path
        for link in links.found:
            address = link.partition("#")[0]
            if link.startswith("#"):
                assert link[1:] in links.ids, (path, link)
            elif not address.startswith(("http://", "https://")):
                address = address if address.startswith("/") else path.partition("?")[0] + address
                if address not in seen and address not in todo and address not in later and "plot.svg" not in address:
                    todo.append(address)
    assert len(seen) == 70


def test_the_front_page_is_the_newest_day_and_arrows_turn_it(client):
    front = client.get("/").text
    assert "Sunday, 29 November 2026" in front
    assert 'rel="prev" href="/days/2026-11-28"' in front
    assert 'rel="next"' not in front
    before = client.get("/days/2026-11-28").text
    assert 'rel="next" href="/"' in before
    assert 'rel="prev" href="/days/2026-11-27"' in before


def test_a_day_is_ordered_by_votes_and_paged(client):
    with session(client.app.state.engine) as db:
        expected = db.scalars(select(Paper.id).where(Paper.day == LAST).order_by(Paper.votes.desc(), Paper.id.desc())).all()
    pages = [client.get(f"/?page={number}").text for number in (1, 2)]
    found = [int(number) for page in pages for number in re.findall(r'id="paper-(\d+)"', page)]
    assert found == expected
    assert len(found) == 40
    assert "no such page" in client.get("/?page=3").text


@pytest.mark.parametrize(
    "path", ["/days/2026-02-30", "/days/tomorrow", "/days/0000-00-00", "/calendar/2026-13", "/days/9999-12-31"]
)
def test_days_that_are_none_are_not_found(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "There is no such day." in answer.text


def test_a_day_without_papers_says_where_there_are_some(client):
    answer = client.get("/days/2020-01-01")
    assert answer.status_code == 200
    assert "No papers came on this day" in answer.text
    assert "/calendar/2020-01" in answer.text


def test_the_calendar_counts_papers(client):
    month = client.get("/calendar/2026-11").text
    for day in (27, 28, 29):
        assert f'href="/days/2026-11-{day}"' in month
    counts = dict(re.findall(r'href="/days/2026-11-(\d\d)"><b>\d+</b> <span>(\d+)<', month))
    assert counts == {"27": "20", "28": "40", "29": "40"}
    assert client.get("/calendar?month=2026-10").headers["location"] == "/calendar/2026-10"
    assert client.get("/calendar?month=nonsense").status_code == 404


def test_trending_is_ordered_by_trend_then_newest(client):
    with session(client.app.state.engine) as db:
        papers = db.scalars(select(Paper)).all()
    trend = {
        paper.id: (paper.trend is None, -(paper.trend or 0), -paper.day.toordinal() if paper.trend is None else 0, -paper.id)
        for paper in papers
    }
    expected = [str(number) for number in sorted(trend, key=trend.__getitem__)]
    found = []
    for number in range(1, -(-len(expected) // 30) + 1):
        found += re.findall(r'id="paper-(\d+)"', client.get(f"/trending?page={number}").text)
    assert found == expected


def test_running_lists_the_catalogue_with_filters(client):
    everything = client.get("/running").text
    known = catalogue.papers()
    assert set(re.findall(r'<h3><a href="/papers/([^"]+)"', everything)) == set(known)
    some = client.get("/running?family=caches&status=running").text
    expected = {slug for slug, paper in known.items() if paper.family == "caches" and paper.method}
    assert set(re.findall(r'<h3><a href="/papers/([^"]+)"', some)) == expected
    assert client.get("/running?family=nonsense").status_code == 404
    assert "None of this family is running yet" in client.get("/running?family=robotics&status=running").text


def test_a_running_paper_shows_claims_plot_parameters_and_use(client):
    text = client.get("/papers/gear").text
    from broadsheet.lab.claims import statuses

    paper = catalogue.paper("gear")
    plain = text_of(text).replace("&#39;", "'").replace("&lt;", "<").replace("&gt;", ">")
    for claim, status in zip(paper.claims, statuses(paper), strict=True):
        assert claim.metric in plain
        assert status.status in plain
        assert status.ours in plain
    assert '<img src="/papers/gear/plot.svg"' in text
    assert "GEAR().cache(model)" in text
    assert "rank_prefill" in text
    assert "arxiv.org/abs/2403.05527" in text
    assert 'action="/papers/gear/run"' in text
    assert "Related papers" in text


def test_a_planned_paper_says_so(client):
    text = client.get("/papers/glan").text
    assert "does not run yet" in text
    assert "plot.svg" not in text
    assert '/run"' not in text


def test_a_paper_has_one_address_and_its_other_names_lead_there(client):
    with session(client.app.state.engine) as db:
        gear = db.scalar(select(Paper).where(Paper.slug == "gear"))
        other = db.scalar(select(Paper).where(Paper.slug.is_(None)).limit(1))
    for name in (gear.arxiv_id, str(gear.id), "2403.05527v3"):
        answer = client.get(f"/papers/{name}")
        assert answer.status_code == 308
        assert answer.headers["location"] == "/papers/gear"
    assert client.get(f"/papers/{other.id}").headers["location"] == f"/papers/{other.arxiv_id}"
    assert client.get(f"/papers/{other.arxiv_id}").status_code == 200


def test_old_arxiv_ids_are_found(tmp_path):
    row = made.papers(1)[0] | {"arxiv_id": "cs/0301012", "title": "An old one"}
    client = open_site(tmp_path, rows=[row])
    answer = client.get("/papers/cs/0301012v2")
    assert answer.status_code == 308
    page = client.get(answer.headers["location"])
    assert "An old one" in page.text
    assert "https://arxiv.org/abs/cs/0301012" in page.text


def test_an_empty_page_says_what_to_do(tmp_path):
    from fastapi.testclient import TestClient

    from broadsheet.web.app import create_app
    from broadsheet.web.settings import Settings

    client = TestClient(create_app(Settings.from_environment({"BROADSHEET_HOME": str(tmp_path)})))
    with session(client.app.state.engine) as db:
        for paper in db.scalars(select(Paper)):
            db.delete(paper)
    for path in ("/", "/trending", "/calendar"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "broadsheet ingest" in answer.text, path


def test_search_marks_words_and_filters(client):
    found = client.get("/search?q=cache").text
    assert "<mark>Cache</mark>" in found
    assert "/feeds/search.atom?q=cache" in found
    running = client.get("/search?q=cache&running=1&family=caches").text
    shown = re.findall(r'<article class="paper".*?href="/papers/([^"]+)"', running, re.S)
    assert shown
    assert all(catalogue.paper(slug).family == "caches" for slug in shown)
    assert "Nothing found" in client.get("/search?q=zzzxqy").text
    assert client.get("/search?q=cache&page=junk&day=never&until=2026-99-99").status_code == 200
    since = client.get(f"/search?q=cache&since={LAST - timedelta(days=1)}").text
    assert 'value="2026-11-28"' in since


@pytest.mark.parametrize(
    "query",
    [
        '"',
        "NEAR(",
        "a AND OR",
        "*",
        "col:x",
        "'; drop table paper; --",
        "\x00",
        "\ud800".encode("utf-8", "surrogatepass"),
        "(" * 300,
        "𝔘" * 299,
    ],
)
def test_no_question_is_an_error(client, query):
    for path in ("/search", "/api/search"):
        answer = client.get(path, params={"q": query})
        assert answer.status_code == 200, answer.text


def test_the_plot_is_an_image_of_its_own(client, tmp_path, monkeypatch):
    """Drawn by a process of its own, once; the server loads neither torch nor matplotlib for it."""
    from broadsheet.web import facts

    calls = []

    def draw(command, **_):
        calls.append(command)
        from pathlib import Path

        Path(command[-1]).mkdir(parents=True)
        for slug in facts.drawn_papers():
            (Path(command[-1]) / f"{slug}.svg").write_text(f"<svg>{slug}</svg>")

    monkeypatch.setattr(facts.subprocess, "run", draw)
    first, again, other = (client.get(f"/papers/{slug}/plot.svg") for slug in ("gear", "gear", "xquant"))
    assert first.headers["content-type"] == "image/svg+xml"
    assert "unsafe-inline" in first.headers["content-security-policy"]
    assert "script-src" not in first.headers["content-security-policy"]
    assert (first.text, again.text, other.text) == ("<svg>gear</svg>", "<svg>gear</svg>", "<svg>xquant</svg>")
    assert len(calls) == 1
    assert client.get("/papers/glan/plot.svg").status_code == 404
    assert client.get("/papers/..%2f..%2fetc%2fpasswd/plot.svg").status_code == 404


def test_a_plot_that_cannot_be_drawn_is_tried_once(tmp_path, monkeypatch):
    import subprocess

    from broadsheet.web import facts

    calls = []

    def draw(command, **_):
        calls.append(command)
        raise subprocess.CalledProcessError(1, command, stderr=b"Trace\nOSError: no space left")

    monkeypatch.setattr(facts.subprocess, "run", draw)
    assert facts.plot("gear", tmp_path) is None
    assert facts.plot("gear", tmp_path) is None
    assert len(calls) == 1


@pytest.mark.slow
def test_plots_are_drawn_with_the_paper_set_off(tmp_path):
    from broadsheet.web import facts

    drawn = facts.plot("gear", tmp_path)
    assert drawn.startswith("<?xml")
    assert "#8f1d1d" in drawn
    assert "script" not in drawn
    assert {path.stem for path in tmp_path.glob("plots/*/*.svg")} == facts.drawn_papers()


def test_pages_load_no_torch():
    import subprocess

    code = (
        "import sys; import broadsheet.web.app; from broadsheet.web import facts, usage; "
        "facts.verdicts('gear'); "
        "usage.usage('gear'); print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]", done.stderr
