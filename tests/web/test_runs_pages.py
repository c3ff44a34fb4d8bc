"""The pages of runs: who may do what, what hostile forms get, and what a finished run shows without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from queues import client_of, csrf_of, seen, settings_of, start

from broadsheet.web import owner, queue, runs, usage
from broadsheet.web.db import open_database, session

OWNER = {"url": "https://papers.example.org", "owner_token": "wrench-and-lamp"}


@pytest.fixture
def browser(tmp_path):
    return client_of(tmp_path)


def post(browser, address, form_at="/papers/gear/run", **data):
    """Sends a form as a browser would."""
    csrf = csrf_of(browser.get(form_at).text)
    return browser.post(address, data={"csrf": csrf, **data})


def finished(engine, **result):
    run_id = start(engine)
    run = queue.claim(engine)
    queue.finish(engine, run.id, run.attempt, "done", log="done in 1.0 s", **result)
    return run_id


def test_a_run_is_started_watched_and_cancelled_without_javascript(browser):
    answer = post(browser, "/papers/gear/run", options='bits=4\n\n rank_prefill = 2 \ntasks=["kv"]', model="")
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/1")
    run = seen(browser.app.state.engine, 1)
    assert run.options == {"model": "pocket-2m", "bits": 4, "rank_prefill": 2, "tasks": ["kv"]}
    html = browser.get("/runs/1").text
    assert '<noscript><meta http-equiv="refresh"' in html
    assert "waiting for a worker: none is running" in html
    command = "broadsheet run gear --model pocket-2m -o bits=4 -o rank_prefill=2 -o &#39;tasks=[&#34;kv&#34;]&#39;"
    assert command in html
    queue.beat(browser.app.state.engine)
    assert "waiting; it is next" in browser.get("/runs/1").text
    answer = post(browser, "/runs/1/cancel", form_at="/runs/1")
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/1")
    html = browser.get("/runs/1").text
    assert 'is <b id="run-state">cancelled</b>' in html
    assert "refresh" not in html
    assert 'action="/runs/1/cancel"' not in html


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"options": "bits"}, "an option is a line NAME=VALUE"),
        ({"options": "Bits!=4"}, "an option is a line NAME=VALUE"),
        ({"options": "model=x"}, "field of its own"),
        ({"options": "bits=NaN"}, "must be finite"),
        ({"options": "colour=red"}, "gear has no option &#39;colour&#39;; it has "),
        ({"options": "text=" + 5000 * "1"}, "longer than 4000 characters"),
        ({"model": "nobody"}, "no model &#39;nobody&#39;: give a built-in one (pocket-2m"),
        ({"model": "../../etc/nothing"}, "no model"),
        ({"model": "https://example.org/v1"}, "no model"),
        ({"model": "a\0b"}, "line of at most 300"),
        ({"model": "<script>alert(1)</script>"}, "no model &#39;&lt;script&gt;"),
    ],
)
def test_a_form_that_cannot_be_comes_back_with_the_reason(browser, data, says):
    answer = post(browser, "/papers/gear/run", **data)
    assert answer.status_code == 400
    assert says in answer.text
    assert "<script>alert" not in answer.text
    assert queue.claim(browser.app.state.engine) is None


@pytest.mark.slow
def test_the_form_knows_the_options_that_runs_have():
    from dataclasses import fields

    from broadsheet.catalogue import papers
    from broadsheet.lab.compare import bench

    for slug, paper in papers().items():
        if paper.method and slug not in runs.COMMANDS and usage.options(slug):
            module = bench(paper.family)
            names = {field.name for made in (module.Workload, module.methods()[slug]) for field in fields(made)}
            extra = {"method", "size"} if hasattr(module, "at_size") else {"method"}
            assert usage.options(slug) == names | extra, slug


def test_odd_values_are_values(browser):
    deep, long = 1900 * "[", "9" * 3000
    for value in (deep, long, "\ud7ff\U0001f600", "'; drop table run; --", '"\\u0000"'):
        assert post(browser, "/papers/gear/run", options=f"text={value}").status_code == 303
    assert browser.get("/runs").status_code == 200
    for run_id in range(1, 6):
        assert browser.get(f"/runs/{run_id}").status_code == 200


def test_what_does_not_run_says_so(browser):
    assert post(browser, "/papers/nobody/run").status_code == 404
    assert browser.get("/papers/nobody/run").status_code == 404
    answer = post(browser, "/papers/glan/run")
    assert answer.status_code == 400
    assert "does not run yet" in answer.text
    answer = post(browser, "/papers/crash/run")
    assert "broadsheet crash --help" in answer.text
    for address in ("/runs/7", "/runs/7/state", "/runs/7.json", "/runs/7/plot.svg", "/runs/x", "/runs/7.xml"):
        assert browser.get(address).status_code == 404
    assert browser.get(f"/runs/{2**31}").status_code == 422
    assert browser.get("/runs/7/events").status_code == 204
    assert post(browser, "/runs/7/cancel").status_code == 404
    assert browser.post("/papers/gear/run", data={"csrf": "forged"}).status_code == 403


def test_the_full_queue_says_so(browser, monkeypatch):
    monkeypatch.setattr(queue, "LONGEST", 1)
    assert post(browser, "/papers/gear/run").status_code == 303
    answer = post(browser, "/papers/gear/run")
    assert answer.status_code == 400
    assert "1 runs are waiting already" in answer.text


def test_a_public_page_asks_for_the_owners_token(tmp_path):
    browser = client_of(tmp_path, **OWNER)
    start(browser.app.state.engine)
    answer = browser.get("/papers/gear/run")
    assert (answer.status_code, answer.headers["location"]) == (303, "/owner?then=/papers/gear/run")
    there = answer.headers["location"]
    assert post(browser, "/papers/gear/run", form_at=there).status_code == 403
    assert post(browser, "/runs/1/cancel", form_at=there).status_code == 403
    assert browser.get("/runs/1").status_code == browser.get("/runs").status_code == 200  # everybody may watch
    assert "Cancel" not in browser.get("/runs/1").text
    assert post(browser, "/owner", form_at=there, token="wrong", then="/papers/gear/run").status_code == 403
    assert browser.post("/owner", data={"token": OWNER["owner_token"]}).status_code == 403  # not from our page
    answer = post(browser, "/owner", form_at=there, token=OWNER["owner_token"], then="/papers/gear/run")
    assert (answer.status_code, answer.headers["location"]) == (303, "/papers/gear/run")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "Secure" in cookie
    assert "SameSite=lax" in cookie
    assert OWNER["owner_token"] not in cookie
    assert post(browser, "/papers/gear/run").status_code == 303
    assert post(browser, "/runs/1/cancel").status_code == 303
    assert seen(browser.app.state.engine, 1).state == "cancelled"
    assert post(browser, "/owner/leave", form_at="/owner").status_code == 303
    assert browser.get("/papers/gear/run").status_code == 303


def test_forged_and_old_cookies_are_none(tmp_path):
    browser = client_of(tmp_path, **OWNER)
    state = browser.app.state
    for made in (
        "x",
        state.signer.sign("owner", "wrench-and-lamp"),
        state.signer.sign("csrf", owner._mark(state.settings)),
        owner._mark(state.settings),
    ):
        browser.cookies.set(owner.COOKIE, made)
        assert browser.get("/papers/gear/run").status_code == 303
    browser.cookies.set(owner.COOKIE, state.signer.sign("owner", owner._mark(state.settings)))
    assert browser.get("/papers/gear/run").status_code == 200
    other = client_of(tmp_path, **{**OWNER, "owner_token": "a new one"})  # the same secret
    other.cookies.set(owner.COOKIE, state.signer.sign("owner", owner._mark(state.settings)))
    assert other.get("/papers/gear/run").status_code == 303


def test_without_a_token_nobody_may(tmp_path):
    browser = client_of(tmp_path, url="https://papers.example.org")
    assert "Nobody may start runs here" in browser.get("/owner").text
    start(browser.app.state.engine)
    csrf = browser.get("/runs")  # has no form of its own
    assert csrf.status_code == 200
    for token in ("", " ", "x"):
        browser.cookies.set(owner.COOKIE, browser.app.state.signer.sign("owner", owner.hashed(token)))
        assert browser.get("/papers/gear/run").status_code == 303


def test_guessing_is_slow(tmp_path):
    browser = client_of(tmp_path, **OWNER)
    csrf = csrf_of(browser.get("/owner").text)
    answers = [browser.post("/owner", data={"csrf": csrf, "token": f"guess {n}"}).status_code for n in range(7)]
    assert answers == [403] * 5 + [429] * 2
    answer = browser.post("/owner", data={"csrf": csrf, "token": OWNER["owner_token"]})
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 61


@pytest.mark.parametrize(
    "then", ["https://evil.example", "//evil.example", "/\\evil.example", "/runs/../x?y", "javascript:1"]
)
def test_the_way_back_stays_inside(tmp_path, then):
    browser = client_of(tmp_path, **OWNER)
    answer = post(browser, "/owner", form_at="/owner", token=OWNER["owner_token"], then=then)
    assert answer.headers["location"] == "/runs"


def test_a_strange_name_for_this_machine_is_no_owner(browser):
    good = browser.get("/papers/gear/run")
    assert good.status_code == 200
    csrf = csrf_of(good.text)
    for host in ("evil.example:8000", "evil.example", "127.0.0.1.evil.example"):
        answer = browser.post("/papers/gear/run", data={"csrf": csrf}, headers={"host": host})
        assert answer.status_code in (400, 403), host
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert browser.post("/papers/gear/run", data={"csrf": csrf}, headers={"host": host}).status_code == 303


def test_from_another_machine_nobody_is_owner(tmp_path):
    browser = client_of(tmp_path)
    browser._transport.client = ("192.0.2.7", 4711)
    assert browser.get("/papers/gear/run").status_code == 303


def test_the_history(browser):
    engine = browser.app.state.engine
    for number in range(runs.A_PAGE + 3):
        start(engine, number=number)
    finished(engine)  # the oldest
    with session(engine) as db:
        queue.add(db, "h2o", {"model": "<b>"})
    html = browser.get("/runs").text
    assert html.count('<th scope="row">') == runs.A_PAGE
    assert "&lt;b&gt;" in html
    assert "<b>" not in html.split("<table>")[1]
    assert "Older" in html
    older = browser.get(html.split('">Older')[0].rpartition('"')[2].replace("&amp;", "&")).text
    assert older.count('<th scope="row">') == 5
    assert browser.get("/runs?state=done").text.count('<th scope="row">') == 1
    assert browser.get("/runs?paper=h2o").text.count('<th scope="row">') == 1
    for query in ("paper=%00", "paper=';--", "state=x", "before=0", "paper=" + 3000 * "x"):
        assert browser.get(f"/runs?{query}").status_code == 200
    assert browser.get("/runs?before=-1").status_code == 422


def test_what_a_finished_run_shows(browser):
    sheet = {
        "heads": ["method", "budget", "bytes", "accuracy"],
        "rows": [["", ["full", "–", "1.000", "50.0 %"]], ["out", ["gear<", "0.1", "cannot go below 0.2"]]],
        "note": "A <note>.",
        "about": "model pocket-2m; 1 seed; cpu",
    }
    record = {"paper": "gear", "method": "gear", "metric": "accuracy", "value": 0.5, "unit": ""}
    run_id = finished(browser.app.state.engine, records=[record], sheet=[sheet], plot="<svg><style>a{}</style></svg>")
    html = browser.get(f"/runs/{run_id}").text
    for part in ("50.0 %", "gear&lt;", 'colspan="2"', "A &lt;note&gt;.", "/plot.svg", "All 1 records", "done in 1.0 s"):
        assert part in html
    answer = browser.get(f"/runs/{run_id}.json")
    assert json.loads(answer.text) == [record]
    assert answer.headers["content-disposition"] == f'attachment; filename="gear-run-{run_id}.json"'
    answer = browser.get(f"/runs/{run_id}/plot.svg")
    assert answer.headers["content-type"] == "image/svg+xml"
    assert "script" not in answer.headers["content-security-policy"]
    plain = finished(browser.app.state.engine, records=[record])  # no table could be made
    assert "accuracy" in browser.get(f"/runs/{plain}").text
    assert browser.get(f"/runs/{plain}/plot.svg").status_code == 404
    with session(browser.app.state.engine) as db:
        failed = queue.add(db, "gear", {"model": "pocket-2m"}).id
    run = queue.claim(browser.app.state.engine)
    queue.finish(browser.app.state.engine, run.id, run.attempt, "failed", "<i>no</i>")
    assert '<p class="error">&lt;i&gt;no&lt;/i&gt;</p>' in browser.get(f"/runs/{failed}").text


def test_a_run_without_a_sign_of_life_does_not_seem_to_run(browser):
    from datetime import timedelta

    from broadsheet.web.tables import Run, utcnow

    run_id = start(browser.app.state.engine)
    queue.claim(browser.app.state.engine)
    assert ">running</b>" in browser.get(f"/runs/{run_id}").text
    with session(browser.app.state.engine) as db:
        db.get_one(Run, run_id).beat = utcnow() - timedelta(minutes=5)
    assert "interrupted: its worker is gone" in browser.get(f"/runs/{run_id}").text
    assert post(browser, f"/runs/{run_id}/cancel", form_at=f"/runs/{run_id}").status_code == 303
    assert seen(browser.app.state.engine, run_id).state == "cancelled"


def test_the_command_line_does_the_same():
    from broadsheet.cli.common import options_of

    options = {"model": "a/b c", "bits": 4, "name": "x", "text": "it's", "digits": "12", "tasks": ["kv"], "fresh": True}
    words = runs.command("gear", options)
    assert words.startswith("broadsheet run gear --model 'a/b c' -o bits=4 --model-name x")
    import shlex

    pairs = [word for before, word in zip(shlex.split(words), shlex.split(words)[1:], strict=False) if before == "-o"]
    assert options_of(pairs) == {"bits": 4, "text": "it's", "digits": "12", "tasks": ("kv",)}
    assert runs.command("decrim", {"model": "http://h/v1"}) == "broadsheet run decrim --chat http://h/v1"


def test_pages_of_runs_load_no_torch(tmp_path):
    engine = open_database(settings_of(tmp_path).database)
    sheet = {"heads": ["method", "budget"], "rows": [["", ["full", "–"]]], "note": "", "about": ""}
    finished(engine, records=[{"method": "full", "metric": "m", "value": 1, "unit": ""}], sheet=[sheet], plot="<svg/>")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from queues import client_of; from pathlib import Path\n"
        "browser = client_of(Path(sys.argv[2]))\n"
        "for path in ('/runs', '/runs/1', '/runs/1.json', '/runs/1/plot.svg', '/papers/gear/run'):\n"
        "    assert browser.get(path).status_code == 200, path\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    here = str(__file__).rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", script, here, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
