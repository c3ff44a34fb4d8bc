"""The IFEval benchmark on prompts of our own, and on the official ones."""

import os
from pathlib import Path

import pytest

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.core.constraints.ifeval import accuracies, joint_witness
from broadsheet.methods.evals.ifeval import IFEval

SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[4] / "shared"))
DATA = SHARED / "data" / "ifeval"


class Obedient:
    """Obeys everything, or with ``sloppy`` everything but strictly: it says a line first."""

    def __init__(self, bench, sloppy=False):
        self.answers = {
            item.prompt: joint_witness(list(zip(item.instruction_ids, item.kwargs, strict=True))) for item in bench.items()
        }
        self.sloppy = sloppy

    def reply(self, request, draw):
        answer = self.answers[request.messages[-1]["content"]] or ""
        return f"Sure, here it is:\n{answer}" if self.sloppy else answer


def test_prompts_of_our_own_can_be_obeyed():
    bench = IFEval(count=60)
    report = bench.evaluate(Chat(SimulatedChat(Obedient(bench), name="sim:obedient")))
    for metric in ("prompt_strict", "prompt_loose", "inst_strict", "inst_loose", "verifiable"):
        assert report.get(metric).value == 1
    assert [item.prompt for item in bench.items()] == [item.prompt for item in IFEval(count=60).items()]


def test_the_loose_check_forgives_a_first_line():
    bench = IFEval(count=60)
    report = bench.evaluate(Chat(SimulatedChat(Obedient(bench, sloppy=True), name="sim:sloppy")))
    assert report.get("prompt_strict").value < 1
    assert report.get("prompt_loose").value == 1


def test_benchmark_and_plain_accuracies_agree():
    bench = IFEval(count=45)
    chat = Chat(SimulatedChat(Obedient(bench, sloppy=True), name="sim:sloppy"))
    report = bench.evaluate(chat)
    plain = accuracies([item.checkers for item in bench.items()], [one.answers[0].text for one in report.scored])
    for metric in ("prompt_strict", "prompt_loose", "inst_strict", "inst_loose"):
        assert report.get(metric).value == pytest.approx(plain[metric])


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the official IFEval prompts at {DATA}; set BROADSHEET_SHARED")
def test_the_official_prompts_run():
    bench = IFEval(path=str(DATA))
    items = bench.items()
    assert len(items) == 541
    joint = [joint_witness(list(zip(item.instruction_ids, item.kwargs, strict=True))) for item in items[:150]]
    assert sum(text is None for text in joint) < 10


def test_bad_settings():
    with pytest.raises(ValueError, match="count"):
        IFEval(count=0)
    with pytest.raises(ValueError, match="cannot read"):
        IFEval(path="/nowhere/x.jsonl").samples()
