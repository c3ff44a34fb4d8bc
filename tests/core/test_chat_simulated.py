"""The instrument: draws with known rates, faults, and an identity that tells worlds apart."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import pytest

from broadsheet.core.chat import Chat, Request
from broadsheet.core.chat.simulated import Draw, Faults, SimulatedChat


@dataclass(frozen=True)
class Constant:
    text: str = "a text of some length"

    def reply(self, request, draw):
        return self.text


class Drawing:
    def reply(self, request, draw):
        return f"{draw.uniform('a'):.9f}"


def draws(count=20_000):
    return [Draw(str(number)) for number in range(count)]


def test_draws_have_the_distributions_that_they_say():
    made = draws()
    uniform = [draw.uniform("u") for draw in made]
    assert all(0 < value < 1 for value in uniform)
    assert statistics.fmean(uniform) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / len(made)))
    assert statistics.variance(uniform) == pytest.approx(1 / 12, abs=0.003)
    hits = sum(draw.chance("c", 0.3) for draw in made) / len(made)
    assert hits == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / len(made)))
    normal = [draw.normal("n", 2.0, 3.0) for draw in made]
    assert statistics.fmean(normal) == pytest.approx(2.0, abs=5 * 3 / math.sqrt(len(made)))
    assert statistics.stdev(normal) == pytest.approx(3.0, rel=0.03)
    picks = [draw.pick("p", "abcd") for draw in made]
    assert all(abs(picks.count(letter) / len(made) - 0.25) < 0.016 for letter in "abcd")
    correlation = statistics.correlation(uniform, [draw.uniform("other") for draw in made])
    assert abs(correlation) < 5 / math.sqrt(len(made))


def test_a_draw_is_a_function_of_its_key_and_kind():
    assert Draw("a").uniform("x") == Draw("a").uniform("x")
    assert len({Draw("a").uniform("x"), Draw("a").uniform("y"), Draw("b").uniform("x")}) == 3
    both = Draw("a")
    both.uniform("y")
    assert both.uniform("x") == Draw("a").uniform("x")  # whatever was drawn before
    assert 0 < Draw("\ud83d").uniform("\ud83d") < 1


def test_faults_come_at_their_rates():
    chat = Chat(SimulatedChat(Constant(), faults=Faults(refuse=0.1, empty=0.2, truncate=0.3)))
    choices = chat.complete("x", n=6000)
    shares = {
        "refuse": sum("can't help" in choice.text for choice in choices),
        "empty": sum(choice.text == "" for choice in choices),
        "truncate": sum(choice.finish_reason == "length" for choice in choices),
    }
    for name, rate in (("refuse", 0.1), ("empty", 0.2), ("truncate", 0.3)):
        assert shares[name] / 6000 == pytest.approx(rate, abs=0.025)
    assert sum(choice.text == Constant().text for choice in choices) / 6000 == pytest.approx(0.4, abs=0.03)
    assert all(choice.ok for choice in choices if choice.text != Constant().text[:10])


def test_replies_end_at_stop_strings_and_max_tokens():
    chat = Chat(SimulatedChat(Constant("one two three " * 10)))
    stopped = chat.complete("x", stop=["three", "two"])[0]
    assert (stopped.text, stopped.finish_reason) == ("one ", "stop")
    cut = chat.complete("x", max_tokens=2)[0]
    assert (cut.text, cut.finish_reason, cut.usage.completion_tokens) == ("one two ", "length", 2)


def test_what_changes_the_answers_changes_the_identity():
    kinds = [
        SimulatedChat(Constant()), SimulatedChat(Constant("other")), SimulatedChat(Drawing()),
        SimulatedChat(Constant(), seed=1), SimulatedChat(Constant(), faults=Faults(empty=0.1)),
    ]  # fmt: skip
    assert len({one.identity for one in kinds}) == len(kinds)
    assert SimulatedChat(Constant()).identity == kinds[0].identity
    assert SimulatedChat(Drawing()).identity == kinds[2].identity


def test_seeds_number_the_samples():
    chat = Chat(SimulatedChat(Drawing()))
    texts = [choice.text for choice in chat.complete("x", n=4)]
    assert len(set(texts)) == 4
    assert [choice.text for choice in chat.complete("x", n=3, seed=1)] == texts[1:]
    other = Chat(SimulatedChat(Drawing(), seed=1)).complete("x", n=4)
    assert not set(texts) & {choice.text for choice in other}


def test_names_and_rates_that_cannot_be():
    with pytest.raises(ValueError, match="begin with sim:"):
        SimulatedChat(Constant(), name="gpt-5")
    for rates in ({"refuse": -0.1}, {"empty": 0.6, "truncate": 0.6}):
        with pytest.raises(ValueError, match="probabilities"):
            Faults(**rates)


def test_usage_is_positive_and_within_the_request():
    request = Request.of([{"role": "user", "content": "é" * 100}], max_tokens=3)
    choice = Chat(SimulatedChat(Constant("ü" * 100))).complete(request.messages, max_tokens=3)[0]
    assert 0 < choice.usage.prompt_tokens <= request.most_tokens
    assert choice.usage.completion_tokens <= 3
