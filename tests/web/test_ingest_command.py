"""`broadsheet ingest` as it is typed."""

from __future__ import annotations

import json
import sqlite3

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError
from typer import Typer
from typer.testing import CliRunner

from broadsheet import catalogue
from broadsheet.cli import _explain
from broadsheet.cli.ingest import ingest
from broadsheet.web.db import open_database, reading
from broadsheet.web.settings import Settings
from broadsheet.web.tables import Paper

app = Typer(rich_markup_mode=None)
app.command()(ingest)


def run(*arguments):
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def papers(tmp_path):
    path = tmp_path / "papers.jsonl"
    path.write_text("".join(json.dumps({"title": f"Paper {i} of the file", "authors": ["Ada"]}) + "\n" for i in range(20)))
    return path


def test_a_file_twice_and_a_source_that_fails(papers, tmp_path):
    done = run(str(papers))
    assert done.exit_code == 0, done.output
    assert "20 new, 0 changed, 0 known" in done.output
    broken = tmp_path / "broken.xml"
    broken.write_text("<!DOCTYPE x [<!ENTITY e 'x'>]><x/>")
    done = run(str(broken), str(papers))
    assert done.exit_code == 1  # one failed, the other was read all the same
    assert "refused" in done.output
    assert "0 new" in done.output
    engine = open_database(Settings.from_environment().database)
    with reading(engine) as db:
        assert db.scalar(select(func.count()).select_from(Paper)) == 20 + len(catalogue.papers())


def test_a_private_address_is_one_line(papers):
    done = run("http://127.0.0.1:9/feed.xml", str(papers))
    assert done.exit_code == 1
    assert "BROADSHEET_ALLOW_HOSTS=127.0.0.1 would allow it" in done.output
    assert "20 new" in done.output


def test_a_database_that_refuses_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        _explain(OperationalError("insert into paper", {}, sqlite3.OperationalError("database or disk is full")))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "broadsheet: the database refuses: database or disk is full; what was stored is kept, the same command goes on\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "no file"),
        (("--since", "soon", "hf-daily"), "a day such as"),
        (("--kind", "x", "hf-daily"), "unknown kind"),
    ],
)
def test_what_cannot_be_asked(arguments, says):
    done = run(*arguments)
    assert isinstance(done.exception, ValueError)
    assert says in str(done.exception)


def test_the_help_teaches():
    text = run("--help").output
    for words in ("arxiv:cs.AR", "hf-daily", "ctrl-C loses nothing", "--since"):
        assert words in text


def test_limit_and_embeddings(papers, monkeypatch):
    monkeypatch.setenv("BROADSHEET_EMBEDDINGS", "lsa")
    done = run(str(papers), "--limit", "12")
    assert "12 new" in done.output
    assert f"embeddings of {12 + len(catalogue.papers())} papers" in done.output
