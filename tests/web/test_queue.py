"""The queue's steps, on both databases."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from queues import cheap_worker, seen, settings_of, start, told
from sqlalchemy import text, update

from broadsheet.web import queue
from broadsheet.web.db import open_database, reading, session
from broadsheet.web.locks import Locked, only_one
from broadsheet.web.tables import Run, WorkerBeat, utcnow


def test_runs_are_taken_in_order_and_each_once(engine):
    wanted = [start(engine, number=number) for number in range(12)]
    taken: list[int] = []

    def take():
        while run := queue.claim(engine):
            taken.append(run.id)

    hands = [threading.Thread(target=take) for _ in range(4)]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    assert sorted(taken) == wanted
    first = seen(engine, wanted[0])
    assert (first.state, first.attempt, first.options["number"]) == ("running", 1, 0)
    assert queue.claim(engine) is None


def test_one_who_was_given_up_changes_nothing(engine):
    start(engine)
    old = queue.claim(engine)
    queue.recover(engine)
    new = queue.claim(engine)
    assert (old.id, old.attempt, new.attempt) == (new.id, 1, 2)
    assert not queue.finish(engine, old.id, old.attempt, "done", records=[1])
    assert not queue.tell(engine, old.id, old.attempt, ["late"], {"value": 0.9, "text": "late"})
    queue.give_back(engine, old)
    assert seen(engine, new.id).state == "running"
    assert queue.finish(engine, new.id, new.attempt, "done", log="done", records=[2], sheet=[{"heads": []}])
    assert not queue.finish(engine, new.id, new.attempt, "failed", "too late")
    run = seen(engine, new.id)
    assert (run.state, run.records, run.error) == ("done", [2], "")
    assert run.ended is not None
    assert "late" not in told(engine, new.id)
    assert told(engine, new.id, "state") == ["queued", "running", "queued", "running", "done"]


def test_a_run_that_kills_its_worker_is_tried_three_times(engine):
    run_id = start(engine)
    for attempt in (1, 2, 3):
        assert queue.claim(engine).attempt == attempt
        queue.recover(engine)
    run = seen(engine, run_id)
    assert (run.state, run.lost) == ("failed", 2)
    assert run.error.startswith("its worker was killed 3 times")
    assert queue.claim(engine) is None


def test_stopping_the_worker_does_not_count_against_a_run(engine):
    run_id = start(engine)
    for _ in range(5):
        queue.give_back(engine, queue.claim(engine))
    assert (seen(engine, run_id).state, seen(engine, run_id).lost) == ("queued", 0)


def test_cancelling(engine):
    waiting, working, gone = start(engine), start(engine), start(engine)
    with session(engine) as db:
        queue.cancel(db, waiting)
    assert seen(engine, waiting).state == "cancelled"
    run = queue.claim(engine)
    assert run.id == working
    with session(engine) as db:
        queue.cancel(db, working)
    assert seen(engine, working).state == "running"
    assert queue.beat(engine, run)  # its worker sees it
    queue.recover(engine)  # or the next
    assert seen(engine, working).state == "cancelled"
    assert queue.claim(engine).id == gone
    with session(engine) as db:
        db.execute(update(Run).where(Run.id == gone).values(beat=utcnow() - timedelta(seconds=2 * queue.SILENCE)))
        queue.cancel(db, gone)
    assert seen(engine, gone).state == "cancelled"
    with session(engine) as db:
        queue.cancel(db, gone)  # again: nothing
    assert told(engine, gone, "state") == ["queued", "running", "cancelled"]


def test_of_progress_only_the_newest_is_kept_and_ids_only_grow(engine):
    start(engine)
    run = queue.claim(engine)
    last = 0
    for step in range(5):
        assert queue.tell(engine, run.id, run.attempt, [f"line {step}"], {"value": step / 5, "text": f"{step}"})
        with reading(engine) as db:
            newest = max(event.id for event in db.scalars(text_of(run.id)))
        assert newest > last
        last = newest
    assert told(engine, run.id, "progress") == ["4"]
    assert told(engine, run.id) == [f"line {step}" for step in range(5)]


def text_of(run_id):
    from sqlalchemy import select

    from broadsheet.web.tables import RunEvent

    return select(RunEvent).where(RunEvent.run_id == run_id)


def test_the_queue_has_an_end(engine, monkeypatch):
    monkeypatch.setattr(queue, "LONGEST", 2)
    start(engine), start(engine)
    with pytest.raises(ValueError, match="2 runs are waiting"):
        start(engine)


def test_signs_of_life(engine):
    with reading(engine) as db:
        assert queue.last_beat(db) is None
    assert queue.silent(None)
    queue.beat(engine)
    queue.beat(engine)
    with reading(engine) as db:
        assert not queue.silent(queue.last_beat(db))
        assert len(db.query(WorkerBeat).all()) == 1


def test_a_worker_works_the_queue_off(engine, database_url, tmp_path):
    good, bad = start(engine, bits=4), start(engine, bits=3)
    cheap_worker(settings_of(tmp_path / "home", database=database_url)).run(once=True)
    assert (seen(engine, good).state, len(seen(engine, good).records)) == ("done", 2)
    assert (seen(engine, bad).state, seen(engine, bad).error) == ("failed", "bits must be 2 or 4, got 3")
    with reading(engine) as db:
        assert not queue.silent(queue.last_beat(db))


def test_there_is_one_worker_a_database(engine, database_url, tmp_path):
    settings = settings_of(tmp_path / "home", database=database_url)
    with only_one(engine, settings, "worker") as still_mine:
        assert still_mine()
        with pytest.raises(Locked, match="another worker"), only_one(open_database(database_url), settings, "worker"):
            pass
    stopping = threading.Event()
    with only_one(engine, settings, "worker"), pytest.raises(Locked), only_one(engine, settings, "worker"):
        pass
    with only_one(engine, settings, "worker", wait=True, stopping=stopping) as still_mine:  # it is free again
        assert still_mine()
        if engine.dialect.name == "postgresql":
            with engine.connect() as connection:
                others = "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory'"
                connection.execute(text(others))
            assert not still_mine()
