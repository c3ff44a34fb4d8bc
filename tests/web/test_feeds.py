"""What goes out for other programs."""

from __future__ import annotations

import feedparser
import made
import pytest
from defusedxml.ElementTree import fromstring
from opened import open_site

ATOM = "{http://www.w3.org/2005/Atom}"
MAP = "{http://www.sitemaps.org/schemas/sitemap/0.9}"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return open_site(tmp_path_factory.mktemp("feeds"), 120, url="https://papers.example.org")


@pytest.mark.parametrize("path", ["/feeds/new.atom", "/feeds/tag/cs.CL.atom", "/feeds/search.atom?q=cache"])
def test_feeds_are_valid_atom(client, path):
    """All that RFC 4287 demands: ids, titles, updated, authors; ids are absolute and unique; a strict parser is content."""
    answer = client.get(path)
    assert answer.headers["content-type"].startswith("application/atom+xml")
    root = fromstring(answer.content)
    assert root.tag == f"{ATOM}feed"
    entries = root.findall(f"{ATOM}entry")
    assert 1 <= len(entries) <= 50
    for node in (root, *entries):
        for name in ("id", "title", "updated"):
            assert len(node.findall(f"{ATOM}{name}")) == 1
            assert node.find(f"{ATOM}{name}").text
    ids = [entry.find(f"{ATOM}id").text for entry in entries]
    assert len(set(ids)) == len(ids)
    assert all(one.startswith("https://papers.example.org/papers/") for one in ids)
    assert all(entry.findall(f"{ATOM}author/{ATOM}name") for entry in entries)
    (own,) = [link for link in root.findall(f"{ATOM}link") if link.get("rel") == "self"]
    assert own.get("href") == f"https://papers.example.org{path}"
    parsed = feedparser.parse(answer.content)
    assert not parsed.bozo
    assert len(parsed.entries) == len(entries)


def test_the_feed_of_a_tag_has_that_tag_s_newest(client):
    parsed = feedparser.parse(client.get("/feeds/tag/cs.CL.atom").content)
    assert all("cs.CL" in [tag.term for tag in entry.tags] for entry in parsed.entries)
    rows = [row for row in made.papers(120) if "cs.CL" in row["tags"]]
    assert parsed.entries[0].title == rows[-1]["title"]
    assert client.get("/feeds/tag/no-such-tag.atom").status_code == 404
    assert client.get("/feeds/search.atom").status_code == 422


def test_an_unchanged_feed_costs_nothing(client):
    tag = client.get("/feeds/new.atom").headers["etag"]
    assert client.get("/feeds/new.atom", headers={"if-none-match": tag}).status_code == 304


def test_pages_tell_of_their_feeds(client):
    assert 'type="application/atom+xml"' in client.get("/").text
    assert "/feeds/search.atom?q=cache" in client.get("/search?q=cache").text
    assert "/feeds/tag/cs.CL.atom" in client.get("/search?tag=cs.CL").text


def test_the_sitemap_names_every_paper_once(client, monkeypatch):
    from broadsheet.web import feeds

    monkeypatch.setattr(feeds, "A_PART", 50)
    index = fromstring(client.get("/sitemap.xml?fresh").content)
    parts = [node.text for node in index.iter(f"{MAP}loc")]
    assert parts == [f"https://papers.example.org/sitemap-{n}.xml" for n in (1, 2, 3, 4)]
    pages = [node.text for part in parts for node in fromstring(client.get(f"{part}?fresh").content).iter(f"{MAP}loc")]
    assert len(pages) == len(set(pages)) == 120 + 72
    assert "https://papers.example.org/papers/gear" in pages
    assert client.get("/sitemap-5.xml?fresh").status_code == 404
    assert client.get(pages[0].removeprefix("https://papers.example.org")).status_code == 200


def test_robots_are_told_what_is_endless(client):
    text = client.get("/robots.txt").text
    assert "Disallow: /search" in text
    assert "Sitemap: https://papers.example.org/sitemap.xml" in text
