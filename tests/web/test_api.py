"""The JSON API against its own schema and against the data."""

from __future__ import annotations

import made
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from opened import open_site
from schemathesis import GenerationMode

from broadsheet import catalogue


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return open_site(tmp_path_factory.mktemp("api"), 60)


def as_described(client, examples):
    """Asks every endpoint what fits its description and what does not, and checks all that schemathesis can."""
    client.get("/api/claims")  # the first time all records are read
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app).include(path_regex="^/api/")
    asked = 0
    for operation in schema.get_all_operations():
        for mode in GenerationMode:

            @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def check(case):
                nonlocal asked
                asked += 1
                case.call_and_validate(timeout=60)

            try:
                check()
            except Unsatisfiable:  # what takes no parameters cannot be asked wrongly
                assert mode is GenerationMode.NEGATIVE
    return asked


def test_the_api_is_as_described(client):
    assert as_described(client, 4) > 40


@pytest.mark.slow
def test_the_api_is_as_described_at_length(client):
    assert as_described(client, 200) > 1000


def test_lists_are_paged(client):
    whole = client.get("/api/papers?limit=100").json()
    assert whole["total"] == 60 + 72
    assert len(whole["papers"]) == 100
    parts = [
        p["id"] for start in range(0, 140, 20) for p in client.get(f"/api/papers?limit=20&offset={start}").json()["papers"]
    ]
    assert parts[:100] == [p["id"] for p in whole["papers"]]
    assert len(set(parts)) == 132
    days = [p["day"] for p in whole["papers"]]
    assert days == sorted(days, reverse=True)


def test_filters(client):
    found = client.get("/api/papers?family=caches&running=true&limit=100").json()
    assert {p["slug"] for p in found["papers"]} == {
        s for s, p in catalogue.papers().items() if p.family == "caches" and p.method
    }
    tagged = client.get("/api/papers?tag=cs.CL&limit=100").json()
    assert tagged["total"] == sum("cs.CL" in row["tags"] for row in made.papers(60))
    day = client.get("/api/papers?day=2026-11-29&limit=100").json()
    assert day["total"] == 40
    trend = client.get("/api/trending?limit=5").json()
    assert trend["total"] == 132
    assert all(p["votes"] for p in trend["papers"])


def test_one_paper_and_its_claims(client):
    paper = client.get("/api/papers/gear").json()
    assert paper["running"]
    assert paper["page"].endswith("/papers/gear")
    assert client.get(f"/api/papers/{paper['id']}").json() == paper
    claims = client.get("/api/papers/gear/claims").json()
    assert [claim["id"] for claim in claims] == [claim.id for claim in catalogue.paper("gear").claims]
    assert client.get("/api/papers/nope/claims").status_code == 404


def test_days_and_families(client):
    days = client.get("/api/days?limit=2").json()
    assert days["days"] == [{"day": "2026-11-29", "papers": 40}, {"day": "2026-11-28", "papers": 20}]
    families = client.get("/api/families").json()
    assert sum(family["papers"] for family in families) == len(catalogue.papers())
    assert sum(family["running"] for family in families) == sum(bool(p.method) for p in catalogue.papers().values())


def test_every_endpoint_is_on_the_page_for_people(client):
    text = client.get("/api").text
    for path in client.get("/openapi.json").json()["paths"]:
        if path.startswith("/api/"):
            assert path in text.replace("&#123;", "{")
