"""Is it well, and does it say nothing of its visitors?"""

from __future__ import annotations

import json
import logging
from datetime import timedelta

import pytest
from fastapi.testclient import TestClient
from opened import open_site
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import delete

from broadsheet.web.db import session
from broadsheet.web.health import JsonLines
from broadsheet.web.tables import Run, WorkerBeat, utcnow


@pytest.fixture
def client(tmp_path):
    return open_site(tmp_path, 3)


def run(client, **given):
    with session(client.app.state.engine) as db:
        db.add(Run(slug="gear", options={}, **given))


def beat(client, seconds):
    """A worker was last heard of so many seconds ago."""
    with session(client.app.state.engine) as db:
        db.execute(delete(WorkerBeat))
        db.add(WorkerBeat(id=1, time=utcnow() - timedelta(seconds=seconds)))


def test_healthz_says_what_runs_and_when_a_worker_was_last_heard_of(client):
    found = client.get("/healthz").json()
    assert found == {
        "status": "ok", "database": "ok", "papers": 75, "runs": {"queued": 0, "running": 0},
        "worker": {"seconds_since_beat": None},
    }  # fmt: skip
    run(client, state="queued")
    run(client, state="running", beat=utcnow())
    beat(client, 5)
    working = client.get("/healthz")
    assert working.status_code == 200
    assert working.json()["runs"] == {"queued": 1, "running": 1}
    assert 5 <= working.json()["worker"]["seconds_since_beat"] < 25
    beat(client, 3600)
    stuck = client.get("/healthz")
    assert stuck.status_code == 503
    assert stuck.json()["status"] == "failing"


def test_a_worker_is_missed_only_where_there_is_work(client):
    beat(client, 3600)
    assert client.get("/healthz").status_code == 200


def test_healthz_fails_where_the_database_does(client, monkeypatch):
    from sqlalchemy import create_engine

    client.app.state.engine = create_engine("sqlite:////nowhere/at/all.sqlite")
    answer = client.get("/healthz")
    assert answer.status_code == 503
    assert answer.json() == {"status": "failing", "database": "unreachable"}
    assert "nowhere" not in answer.text


def samples(client):
    text = client.get("/metrics").text
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }


def test_metrics_count_by_route_method_and_status(client):
    for path in ("/", "/", "/days/2026-11-29", "/days/2026-11-28", "/nope", "/search?q=secret", "/papers/gear"):
        client.get(path)
    run(client, state="queued")
    found = samples(client)

    def count(route, status, method="GET"):
        return found.get(("broadsheet_requests_total", (("method", method), ("route", route), ("status", status))), 0)

    assert count("/", "200") == 2
    assert count("/days/{day}", "200") == 2
    assert count("none", "404") == 1
    assert count("/search", "200") == 1
    assert found[("broadsheet_runs", (("state", "queued"),))] == 1
    assert found[("broadsheet_papers", ())] == 75
    assert found[("broadsheet_request_seconds_count", (("route", "/"),))] == 2
    assert not [name for name in found if "secret" in str(name) or "2026" in str(name)]


def test_odd_methods_do_not_make_series_without_end(client):
    for name in ("BREW", "X" * 50, "PROPFIND"):
        client.request(name, "/")
    methods = {dict(labels).get("method") for name, labels in samples(client) if name == "broadsheet_requests_total"}
    assert methods <= {"GET", "other"}


def test_the_log_tells_requests_and_no_visitors(client, caplog):
    caplog.set_level(logging.INFO, "broadsheet.requests")
    visitor = TestClient(client.app, client=("203.0.113.77", 4), headers={"cookie": "broadsheet_session=secret-cookie"})
    answer = visitor.get("/search?q=secret-query&token=secret-token")
    visitor.get("/days/2026-11-29")
    line = json.loads(JsonLines().format(caplog.records[0]))
    assert line["route"] == "/search"
    assert line["status"] == 200
    assert line["method"] == "GET"
    assert line["ms"] >= 0
    assert line["id"] == answer.headers["x-request-id"]
    everything = "\n".join(JsonLines().format(record) for record in caplog.records)
    assert "secret" not in everything
    assert "203.0.113" not in everything


def test_a_log_line_is_one_line_whatever_happens():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        import sys

        record = logging.LogRecord("broadsheet", logging.ERROR, "", 1, "it %s", ("broke\nhere",), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    assert "two\\nlines" in line
    assert json.loads(line)["message"] == "it broke\nhere"
