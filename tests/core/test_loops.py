"""Policies over scripted functions: what is called, how often, in which order, and what comes back."""

import asyncio

import pytest

from broadsheet.core.chat.protocol import Usage
from broadsheet.core.loops import Draft, Judgement, Loop, Node, best_of, bfs, chain, dfs


class Script:
    """Texts are paths ("a.0.1": second refinement of the first refinement of a); values come from ``value``."""

    def __init__(self, value, same=(), blank=(), undecided=()):
        self.value, self.same, self.blank, self.undecided = value, set(same), set(blank), set(undecided)
        self.judged: list[str] = []
        self.refined: list[str] = []

    async def generate(self, number):
        return Draft("" if f"g{number}" in self.blank else f"g{number}", Usage(1))

    async def judge(self, text):
        await asyncio.sleep(0)
        self.judged.append(text)
        value = self.value(text)
        return Judgement(value, value > 0.5, f"on {text}", Usage(1), decided=text not in self.undecided)

    async def refine(self, text, said, number):
        assert said.feedback == f"on {text}"
        await asyncio.sleep(0.001 * (3 - number % 3))  # later ones come back earlier
        self.refined.append(f"{text}.{number}")
        new = f"{text}.{number}"
        return Draft("" if new in self.blank else text if text in self.same else new, Usage(1), raw=f"raw {new}")

    def loop(self, **limits):
        return Loop(self.judge, self.generate, self.refine, **limits)


def search(policy, script, root="r", loop=None, **shape):
    loop = loop or script.loop()

    async def go():
        [said] = await loop.judge([root])
        return await policy(loop, Node(root, said), **{"branch": 3, "keep": 2, "depth": 3, **shape})

    return asyncio.run(go()), loop


def test_chain_refines_until_accepted_and_judges_the_last():
    script = Script(lambda text: len(text.split(".")) / 4)
    loop = script.loop()
    found = asyncio.run(chain(loop, 10))
    assert (found.best.text, found.stopped, found.accepted) == ("g0.0.0", "accepted", True)
    answer = loop.answer(found)
    assert [step.kind for step in answer.steps] == ["generate", "judge", "refine", "judge", "refine", "judge"]
    assert (answer.generations, answer.judgements, answer.usage.calls) == (3, 3, 6)
    short = asyncio.run(chain(script.loop(), 1))
    assert (short.best.text, short.stopped, short.best.judgement.value) == ("g0.0", "budget", 0.5)


def test_chain_ends_where_nothing_changes_or_can_be_read():
    assert asyncio.run(chain(Script(lambda _: 0, same=["g0.0"]).loop(), 5)).stopped == "no_change"
    assert asyncio.run(chain(Script(lambda _: 0, blank=["g0.0"]).loop(), 5)).stopped == "error"
    assert asyncio.run(chain(Script(lambda _: 0, blank=["g0"]).loop(), 5)).stopped == "error"
    found = asyncio.run(chain(Script(lambda _: 0, undecided=["g0.0"]).loop(), 5))
    assert (found.stopped, found.best.text, found.accepted) == ("unparsed", "g0.0", False)


def test_a_cycle_is_no_change():
    async def refine(text, said, number):
        return Draft({"a": "b", "b": "c", "c": "a"}[text])

    async def judge(text):
        return Judgement(0.0, False)

    loop = Loop(judge, refine=refine)
    found = asyncio.run(chain(loop, 50, start="a"))
    assert (found.stopped, found.best.text, len(loop.steps)) == ("no_change", "c", 6)


def test_the_best_is_the_earliest_of_equals():
    values = {"g0": 0.1, "g0.0": 0.4, "g0.0.0": 0.4, "g0.0.0.0": 0.2}
    script = Script(values.get)
    assert asyncio.run(chain(script.loop(), 3)).best.text == "g0.0.0.0"
    assert asyncio.run(chain(script.loop(), 3, return_best=True)).best.text == "g0.0"


def test_best_of_stops_at_the_first_accepted():
    script = Script({"g0": 0.1, "g1": 0.4, "g2": 0.9, "g3": 1.0}.get)
    loop = script.loop()
    assert asyncio.run(best_of(loop, 9)).best.text == "g2"
    assert loop.answer(asyncio.run(best_of(script.loop(), 2))).text == "g1"
    assert asyncio.run(best_of(Script(lambda _: 0.4, blank=["g0"]).loop(), 3)).best.text == "g1"
    assert asyncio.run(best_of(Script(lambda _: 0, blank=["g0"]).loop(), 1)).stopped == "error"


@pytest.mark.parametrize(("policy", "nodes"), [(bfs, 3 + 6 + 6), (dfs, 3 + 2 * (3 + 2 * 3))])
def test_nodes_of_a_search_that_fails(policy, nodes):
    found, loop = search(policy, Script(lambda _: 0.2))
    children = list(found.root.walk())[1:]
    assert len(children) == nodes == sum(step.kind == "refine" for step in loop.steps)
    assert found.stopped == "depth"
    assert found.best is children[-1]  # the latest of equals


@pytest.mark.parametrize("policy", [bfs, dfs])
def test_a_level_is_completed_before_it_ends_the_search(policy):
    found, _ = search(policy, Script(lambda text: 1.0 if text == "r.0" else 0.0))
    assert (found.best.text, found.stopped, len(list(found.root.walk()))) == ("r.0", "accepted", 4)


@pytest.mark.parametrize("policy", [bfs, dfs])
@pytest.mark.parametrize("budget", range(12))
def test_no_budget_is_exceeded(policy, budget):
    script = Script(lambda _: 0.2, blank=["r.1", "r.2"])
    _, loop = search(policy, script, loop=script.loop(generations=budget), tries=2)
    assert len(script.refined) == sum(step.kind == "refine" for step in loop.steps) <= budget
    _, loop = search(policy, script := Script(lambda _: 0.2), loop=script.loop(judgements=1 + budget))
    assert len(script.judged) == sum(step.kind == "judge" for step in loop.steps) <= 1 + budget


def test_an_empty_refinement_is_tried_again_and_an_undecided_child_is_dropped():
    script = Script(lambda _: 0.2, blank=["r.0", "r.3"], undecided=["r.1"])
    found, _ = search(bfs, script, depth=1, tries=3)
    assert [child.text for child in found.root.children] == ["r.4", "r.2"]
    found, _ = search(bfs, Script(lambda _: 0.2, blank=[f"r.{n}" for n in range(9)]), tries=3)
    assert (found.stopped, found.best.text) == ("error", "r")


def test_equal_texts_are_judged_once_and_refined_under_new_numbers():
    async def refine(text, said, number):
        asked.append((text, number))
        return Draft("same")

    asked: list[tuple[str, int]] = []
    script = Script(lambda _: 0.2)
    script.refine = lambda text, said, number: refine(text, said, number)
    search(bfs, script, depth=2, loop=Loop(script.judge, refine=refine))
    assert script.judged == ["r", "same"]
    assert asked == [("r", n) for n in range(3)] + [("same", n) for n in range(6)]


def test_the_log_does_not_depend_on_which_reply_comes_first():
    def log(delay):
        class Slow(Script):
            async def judge(self, text):
                await asyncio.sleep(delay(len(self.judged)))
                return await super().judge(text)

        return [(s.kind, s.text) for s in search(bfs, Slow(lambda text: len(text) / 99))[1].steps]

    assert log(lambda n: 0.001 * n) == log(lambda n: 0.002 * (5 - n % 5))


def test_bad_budget_and_missing_functions():
    with pytest.raises(ValueError, match="budget"):
        Loop(Script(lambda _: 0).judge, generations=-1)
    with pytest.raises(ValueError, match="generate"):
        asyncio.run(chain(Loop(Script(lambda _: 0).judge), 1))
