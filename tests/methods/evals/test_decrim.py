"""DeCRIM: against its exact chain in a world of known rates, and against every way in which such loops cheat."""

import json
import os
import statistics
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from broadsheet.core import replies
from broadsheet.core.chat import Chat
from broadsheet.core.chat.protocol import Choice, Usage
from broadsheet.core.chat.simulated import Draw, SimulatedChat
from broadsheet.core.constraints import Constraint, verified
from broadsheet.core.constraints.ifeval import load_ifeval
from broadsheet.methods.evals.checkable import make_requests
from broadsheet.methods.evals.decrim import BestOf, DeCRIM, RepeatConstraints, SelfRefine
from broadsheet.methods.evals.decrim.markov import Rates, break_even
from broadsheet.methods.evals.decrim.prompts import parse_decomposition, parse_verdicts, request_text
from broadsheet.methods.evals.decrim.requests import RealRequests, load_requests
from broadsheet.methods.evals.decrim.world import SimCritic, SimWriter, stage_of
from broadsheet.methods.evals.ifeval_world import checker_as_critic, prompts

CRITICS = {"oracle": (1.0, 0.0), "strong": (0.9, 0.03), "weak": (0.6, 0.15), "coin": (0.5, 0.5), "inverted": (0.1, 0.6)}
#: critic -> all constraints met after 1, 3 and 10 rounds, constraints met after 10 (k=4)
TABLE = {
    "oracle": (0.759, 0.944, 1.000, 1.000),
    "strong": (0.716, 0.874, 0.926, 0.981),
    "weak": (0.586, 0.661, 0.711, 0.919),
    "coin": (0.453, 0.400, 0.379, 0.784),
    "inverted": (0.357, 0.192, 0.068, 0.507),
}


def world(rates, count, seed=0, invented=0.0):
    requests = make_requests(count, rates.constraints, seed)
    writer = Chat(SimulatedChat(SimWriter(requests, rates, invented), "sim:writer", seed))
    return requests, writer, Chat(SimulatedChat(SimCritic(requests, rates), "sim:critic", seed))


def solved(rates, count, method=DeCRIM(), seed=0, invented=0.0):  # noqa: B008  # frozen
    """Requests and their answers."""
    requests, writer, critic = world(rates, count, seed, invented)

    async def one(request):
        given = {"constraints": [f.statement for f in request.features]} if isinstance(method, BestOf) else {}
        return await method.asolve(writer, request.prompt, critic, **given)

    return requests, writer.map(one, requests)


def shares(requests, answers, rounds=None):
    """Share of requests with all constraints met, share of constraints met; of the answers after ``rounds`` rounds."""
    texts = [answer.text if rounds is None else answer.rounds[: rounds + 1][-1].text for answer in answers]
    states = [request.state(text) for request, text in zip(requests, texts, strict=True)]
    return statistics.fmean(map(all, states)), statistics.fmean(ok for state in states for ok in state)


def near(found, expected, n, errors=3.0):
    """Within so many standard errors of a share of n."""
    return abs(found - expected) <= errors * (expected * (1 - expected) / n) ** 0.5 + 0.5 / n


class Replies:
    """A backend that says what a function of the last message and the sample's number says."""

    name = identity = "scripted"

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    async def send(self, request, samples):
        self.asked.append(request)
        return [Choice(self.reply(request.messages[-1]["content"], sample), usage=Usage(1)) for sample in samples]

    async def close(self):
        pass


# --- 1: the exact chain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_check1_the_chain_gives_the_table(critic):
    rates = Rates(4, *CRITICS[critic])
    assert [round(rates.decrim(rounds).instruction, 3) for rounds in (1, 3, 10)] == list(TABLE[critic][:3])
    assert round(rates.decrim(10).constraint, 3) == TABLE[critic][3]


@pytest.mark.parametrize(
    ("constraints", "critic", "loop", "calls", "best", "best_calls"),
    [
        (4, "weak", 0.712, 2.7, 0.726, 2.7), (4, "strong", 0.926, 2.0, 0.931, 2.0), (8, "weak", 0.513, 5.6, 0.495, 5.8),
        (8, "strong", 0.885, 3.2, 0.837, 3.9), (12, "weak", 0.311, 8.3, 0.298, 8.5), (12, "strong", 0.844, 4.3, 0.646, 6.2),
    ],
)  # fmt: skip
def test_the_chain_gives_the_table_of_rivals(constraints, critic, loop, calls, best, best_calls):
    rates = Rates(constraints, *CRITICS[critic])
    ours, rival = rates.decrim(10), rates.best_of(11)
    assert ours.instruction == pytest.approx(loop, abs=0.006)  # the prototype was a simulation
    assert ours.generations == pytest.approx(calls, abs=0.1)
    assert rival.instruction == pytest.approx(best, abs=0.006)
    assert rival.generations == pytest.approx(best_calls, abs=0.1)


def test_vague_refinement_and_omissions_in_the_chain():
    rates = Rates(4, *CRITICS["strong"])
    assert rates.vague(1).instruction == pytest.approx(0.458, abs=0.006)
    assert rates.vague(10).instruction == pytest.approx(0.280, abs=0.006)
    gains = [Rates(4, 0.9, 0.03, omitted=o).gain(10) for o in (0, 0.1, 0.3, 1)]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] == pytest.approx(0, abs=1e-12)
    assert Rates(4, 1, 0, omitted=0.0).decrim(200).instruction == pytest.approx(1)


@pytest.mark.parametrize("critic", ["strong", "weak", "coin"])
def test_check1_engine_and_chain_agree_in_short(critic):
    rates = Rates(4, *CRITICS[critic])
    requests, answers = solved(rates, 160)
    for rounds in (1, 3, 10):
        assert near(shares(requests, answers, rounds)[0], rates.decrim(rounds).instruction, 160)


@pytest.mark.slow
@pytest.mark.parametrize("critic", CRITICS)
def test_check1_every_cell(critic):
    """All cells of the table within 3 standard errors at 2,000 instructions. Constraints of one answer are not
    independent of each other after refinement, so that their share is held to the error of its mean over instructions."""
    rates = Rates(4, *CRITICS[critic])
    requests, answers = solved(rates, 2000)
    for rounds in (1, 3, 10):
        instruction, constraint = shares(requests, answers, rounds)
        expected = rates.decrim(rounds)
        assert near(instruction, expected.instruction, 2000)
        means = [statistics.fmean(q.state(a.rounds[: rounds + 1][-1].text)) for q, a in zip(requests, answers, strict=True)]
        assert abs(constraint - expected.constraint) <= 3 * statistics.stdev(means) / 2000**0.5 + 1e-3
    calls = [answer.generations for answer in answers]
    assert abs(statistics.fmean(calls) - rates.decrim(10).generations) <= 3 * statistics.stdev(calls) / 2000**0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "rates", [Rates(8, 0.9, 0.03), Rates(8, 0.6, 0.15), Rates(4, 0.9, 0.03, 0.7), Rates(4, 0.6, 0.15, 0.7)]
)
def test_check1_other_worlds(rates):
    requests, answers = solved(rates, 2000)
    assert near(shares(requests, answers)[0], rates.decrim(10).instruction, 2000)


def test_fewer_rounds_are_the_beginning_of_more():
    rates = Rates(4, *CRITICS["weak"])
    _, many = solved(rates, 40)
    _, few = solved(rates, 40, DeCRIM(max_rounds=3))
    assert [a.text for a in few] == [a.rounds[:4][-1].text for a in many]


# --- 2, 4, 5: the loop's promises -----------------------------------------------------------------------------------


def test_check2_an_accepted_answer_is_untouched():
    text = "  An answer \n with odd\tspace. "

    def reply(prompt, sample):
        return text if stage_of(prompt) == "generate" else '[{"constraint": 1, "met": true}, {"constraint": 2, "met": true}]'

    backend = Replies(reply)
    answer = DeCRIM(decomposer=["One.", "Two."]).solve(Chat(backend), "Do it.")
    assert answer.text == text
    assert (answer.accepted, answer.stopped, answer.verdicts) == (True, "accepted", (True, True))
    assert [stage_of(request.messages[-1]["content"]) for request in backend.asked] == ["generate", "critique"]
    assert backend.asked[0].messages == ({"role": "user", "content": "Do it."},)


def test_check4_the_best_is_never_flagged_more_than_the_last():
    rates = Rates(6, 0.6, 0.3)
    _, last = solved(rates, 60)
    _, best = solved(rates, 60, DeCRIM(return_best=True))
    flags = [[a.verdicts.count(False) for a in answers] for answers in (best, last)]
    assert all(a <= b for a, b in zip(*flags, strict=True))
    assert sum(flags[0]) < sum(flags[1])


@pytest.mark.parametrize("rounds", [1, 4])
def test_check5_calls_are_within_the_budget_and_all_logged(rounds):
    rates = Rates(4, *CRITICS["coin"])
    requests, writer, critic = world(rates, 40)
    method = DeCRIM(max_rounds=rounds)
    answers = writer.map(lambda request: method.asolve(writer, request.prompt, critic), requests)
    assert max(a.generations for a in answers) == max(a.judgements for a in answers) == 1 + rounds
    used = {tag.removeprefix("decrim."): usage.calls for chat in (writer, critic) for tag, usage in chat.used.items()}
    assert used["generate"] + used.get("refine", 0) == sum(a.generations for a in answers)
    assert used["critique"] == sum(a.judgements for a in answers)
    assert used["decompose"] == 40
    assert sum(a.usage.calls for a in answers) == sum(used.values())


# --- 3, 6: what helps and what harms --------------------------------------------------------------------------------


def test_check3_the_gain_grows_with_recall_and_a_coin_harms():
    recalls = (0.1, 0.3, 0.5, 0.7, 0.9)
    exact = [Rates(4, recall, 0.1).gain(10) for recall in recalls]
    assert spearmanr(recalls, exact).statistic == pytest.approx(1)
    found = []
    for recall in recalls:
        requests, answers = solved(Rates(4, recall, 0.1), 130)
        found.append(shares(requests, answers)[0])
    assert spearmanr(recalls, found).statistic == pytest.approx(1)
    coin = Rates(4, *CRITICS["coin"])
    requests, answers = solved(coin, 130)
    assert shares(requests, answers)[0] < shares(requests, answers, 0)[0]
    assert coin.gain(10) < -0.1


def test_where_it_stops_helping():
    """The accuracy of verdicts at which the chain's gain is zero; a little above it the engine gains, below it loses."""
    at = break_even(Rates(4))
    assert at == pytest.approx(0.589, abs=0.001)
    assert Rates(4, at, 1 - at).gain(10) == pytest.approx(0, abs=1e-4)
    assert break_even(Rates(8)) > at  # more constraints ask for a better critic
    assert Rates(4, at + 0.1, 0.9 - at).gain(10) > 0.05 > -0.05 > Rates(4, at - 0.1, 1.1 - at).gain(10)
    assert break_even(Rates(4, break_other=1.0, fix=0.0)) != break_even(Rates(4, break_other=1.0, fix=0.0))  # nan: never


def test_check6_at_equal_calls_in_the_chain():
    """Exact numbers; the study measures the same cells with the engine."""
    weak, strong = CRITICS["weak"], CRITICS["strong"]
    assert Rates(4, *weak).decrim(10).instruction - Rates(4).vague(10).instruction >= 0.20
    margins = {k: Rates(k, *strong).decrim(10).instruction - Rates(k, *strong).best_of(11).instruction for k in (4, 8, 12)}
    assert margins[8] >= 0.03
    assert margins[12] >= 0.15
    assert abs(margins[4]) <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("constraints", "critic", "least", "most"), [
    (4, "weak", -0.03, 0.03), (4, "strong", -0.03, 0.03), (8, "strong", 0.03, 1), (12, "strong", 0.15, 1),
])  # fmt: skip
def test_check6_engine_against_best_of_n(constraints, critic, least, most):
    """Where the exact margin is .3 points, 2,000 instructions show it only to within ±1 or 2."""
    rates = Rates(constraints, *CRITICS[critic])
    ours = shares(*solved(rates, 2000))[0]
    rival = shares(*solved(rates, 2000, BestOf()))[0]
    assert near(rival, rates.best_of(11).instruction, 2000)
    assert least <= ours - rival <= most


def test_check6_vague_refinement_harms():
    rates = Rates(4, *CRITICS["weak"])
    requests, vague = solved(rates, 100, SelfRefine())
    assert {a.generations for a in vague} == {11}
    assert near(shares(requests, vague)[0], rates.vague(10).instruction, 100)
    _, ours = solved(rates, 100)
    assert shares(requests, ours)[0] - shares(requests, vague)[0] >= 0.2


def test_an_omitting_and_inventing_decomposer():
    rates = Rates(4, 0.9, 0.03, omitted=0.3)
    with pytest.warns(UserWarning, match="no constraints"):
        requests, answers = solved(rates, 300)
    assert near(shares(requests, answers)[0], rates.decrim(10).instruction, 300)
    rates = Rates(4, 0.9, 0.03)
    requests, answers = solved(rates, 150, invented=1.0)
    assert {len(answer.constraints) for answer in answers} == {5}
    # A false alarm on the invented one is a refinement in which nothing that was asked for is mended.
    assert near(shares(requests, answers)[0], rates.decrim(10).instruction, 150, errors=4)


# --- 7: the parser --------------------------------------------------------------------------------------------------

VERDICTS = [
    ("Met", True), ("met.", True), ("Not met", False), ("NOT MET", False), ("unmet", False), ("Yes", True), ("No", False),
    ("The constraint is satisfied.", True), ("The constraint is not satisfied.", False), ("This isn't satisfied", False),
    ("It isn’t fully satisfied", False), ("is not entirely fulfilled", False), ("Violated", False), ("not violated", True),
    ("No violation was found", True), ("No constraint is violated", True), ("fails to meet the limit", False),
    ("The response fails this constraint", False), ("does not fail", True), ("Partially met", False), ("✓", True),
    ("❌", False),
    ("only partly satisfied", False), ("No, the word is missing", False), ("There are no commas => MET", True),
    ("There are 3 commas => NOT MET", False), ("No commas are used, so it is satisfied", True), ("never satisfied", False),
    ("is not, however, met", False), ("It is far from satisfied.", False), ("unsatisfied", False), ("not unsatisfied", True),
    ("**Verdict**: not met", False), ("Verdict: Met", True), ("The response does not comply with it.", False),
    ("non-compliant", False), ("It says yes twice. Final verdict: no", False),
    ("The response no longer satisfies it", False),
    ("The word count is 120, which satisfies the limit.", True), ("The requirement was ignored.", False),
    ("hardly met", False),
    ("It is unclear whether it is satisfied", None), ("Not met: it would be satisfied with two more words", None),
    ("", None),
    ("maybe", None), ("The first half is met but the second is not met", None), ("Cannot be determined", None),
    ("met?", None),
    ("is neither met nor violated", None), ("It may or may not be met", None), ("I counted 120 words.", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), VERDICTS)
def test_check7_verdicts(text, said):
    assert replies.verdict(text) is said
    assert parse_verdicts(f"1. {text}\n2. Verdict: met", 2)[0] == [said, True]
    assert parse_verdicts(json.dumps([{"constraint": 2, "met": text}, {"constraint": 1, "met": False}]), 2)[0] == [
        False,
        said,
    ]


@pytest.mark.parametrize(
    ("reply", "count", "verdicts"),
    [
        ('[{"constraint": 1, "met": true}, {"constraint": 3, "met": false}]', 3, [True, None, False]),
        ('```json\n[{"constraint": 1, "reason": "x", "met": false}]\n```', 1, [False]),
        ('{"verdicts": [{"constraint": "1", "met": "no"}, {"constraint": "Constraint 2", "met": "yes"}]}', 2, [False, True]),
        ('[{"met": true}, {"met": false}]', 2, [True, False]),
        ('[{"met": true}, {"met": false}]', 3, [None, None, None]),  # whose they are is not known
        ("[true, false]", 2, [True, False]),
        ('[{"constraint": 1, "met": true}, {"constraint": 1, "met": false}]', 1, [None]),
        ('[{"constraint": 9, "met": true}]', 2, [None, None]),
        ('[{"constraint": 1, "met": null}, {"constraint": 2, "met": 1}]', 2, [None, None]),
        ("1. The word is there. Verdict: met\n2) It ends wrongly. Verdict: not met", 2, [True, False]),
        ("**Constraint 1:** satisfied\n**Constraint 2:** not satisfied", 2, [True, False]),
        ("All constraints are satisfied.", 2, [None, None]),
        ("", 2, [None, None]),
    ],
)
def test_check7_critiques(reply, count, verdicts):
    assert parse_verdicts(reply, count)[0] == verdicts


def test_an_unread_verdict_neither_accepts_nor_refines():
    def reply(prompt, sample):
        said = '[{"constraint": 1, "met": true}, {"constraint": 2, "met": "hm"}]'
        return said if stage_of(prompt) == "critique" else "text"

    answer = DeCRIM(decomposer=["One.", "Two."]).solve(Chat(Replies(reply)), "x")
    assert (answer.stopped, answer.accepted, answer.verdicts) == ("unparsed", False, (True, None))


# --- 8: the score ---------------------------------------------------------------------------------------------------


def test_check8_a_trivial_decomposition_is_worth_nothing():
    """Judged by one trivial constraint everything is accepted; scored on the gold constraints that is the baseline."""
    rates = Rates(4, 1.0, 0.0)
    requests, answers = solved(rates, 300, DeCRIM(decomposer=lambda request: ["Write a text."]))
    assert all(answer.accepted for answer in answers)
    assert shares(requests, answers) == shares(requests, answers, 0)
    assert near(shares(requests, answers)[0], 0.85**4, 300)


# --- the rest -------------------------------------------------------------------------------------------------------


def test_a_checker_can_be_the_critic():
    asked = []

    def checker(text, constraints):
        asked.append(list(constraints))
        return ["rain" in text, len(text) < 30]

    def reply(prompt, sample):
        return "It may rain." if stage_of(prompt) == "refine" else "Snow."

    backend = Replies(reply)
    answer = DeCRIM(decomposer=["Say rain.", "Be short."]).solve(Chat(backend), "x", checker)
    assert (answer.text, answer.accepted, answer.generations) == ("It may rain.", True, 2)
    assert asked[0] == ["Say rain.", "Be short."]
    assert "1. Say rain.\n\nWrite" in backend.asked[-1].messages[0]["content"]
    with pytest.raises(ValueError, match="1 verdicts on 2"):
        DeCRIM(decomposer=["a", "b"]).solve(Chat(Replies(reply)), "x", lambda *_: [True])


def test_no_change_empty_text_and_no_constraints():
    answer = DeCRIM(decomposer=["a"]).solve(Chat(Replies(lambda *_: "same")), "x", lambda *_: [False])
    assert (answer.stopped, answer.generations) == ("no_change", 2)
    answer = DeCRIM(decomposer=["a"]).solve(Chat(Replies(lambda *_: "")), "x", lambda *_: [False])
    assert (answer.stopped, answer.text) == ("error", "")
    with pytest.warns(UserWarning, match="no constraints"):
        answer = DeCRIM().solve(Chat(Replies(lambda *_: "prose")), "x")
    assert (answer.stopped, answer.text, answer.accepted) == ("no_constraints", "prose", False)
    with pytest.raises(ValueError, match="no constraints"):
        DeCRIM(strict=True).solve(Chat(Replies(lambda *_: "prose")), "x")


def test_one_verdict_on_the_whole():
    def reply(prompt, sample):
        if stage_of(prompt) == "critique_whole":
            return "Fine now.\nVerdict: met" if "better" in prompt else "It is dull.\nVerdict: not met"
        return "better" if stage_of(prompt) == "refine_whole" else "text"

    answer = DeCRIM(judge_each=False).solve(Chat(Replies(reply)), "x")
    assert (answer.text, answer.stopped, answer.generations) == ("better", "accepted", 2)
    with pytest.raises(ValueError, match="asks a model"):
        DeCRIM(judge_each=False).solve(Chat(Replies(reply)), "x", lambda *_: [True])


def test_rivals():
    rates = Rates(4, *CRITICS["strong"])
    _, answers = solved(rates, 60, BestOf(n=5))
    assert max(a.generations for a in answers) <= 5
    assert all(set(a.verdicts) == {True} for a in answers if a.accepted)
    chat = Chat(Replies(lambda prompt, _: "ok" if prompt.endswith("1. a\n2. b") else ""))
    assert RepeatConstraints().solve(chat, "x", constraints=["a", "b"]).text == "ok"
    for wrong in (lambda: BestOf(n=0), lambda: BestOf(n=3, temperature=0), lambda: SelfRefine(rounds=0),
                  lambda: DeCRIM(max_rounds=0), lambda: Rates(4, 1.5), lambda: Rates(0)):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()


def test_decompositions():
    reply = "Task: Write a note.\nConstraints:\n1. Use two words.\n2) use  two words\n- Write a note\n4. End with 'x'."
    assert parse_decomposition(reply) == ("Write a note.", ["Use two words.", "End with 'x'."])
    assert parse_decomposition("Task: Sing.\nConstraints:\n1. None") == ("Sing.", [])
    assert parse_decomposition("I cannot.") == ("", [])
    assert request_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"text": "Hi"}]}]) == (
        "system: Be brief.\n\nuser: Hi"
    )


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_texts_carry_their_state(rate):
    from broadsheet.methods.evals.checkable import sheet_of, write

    for request in make_requests(60, 16):
        draw = Draw(f"{request.number}")
        for number in range(10):
            state = [draw.chance(f"{number} {n}", 0.25 + rate / 2) for n in range(16)]
            text = write(request, state, Draw(f"{number}"))
            assert list(request.state(text)) == state
            again = write(request, state, Draw(f"x{number}"), sheet_of(text))
            assert again != text
            assert list(request.state(again)) == state
    with pytest.raises(ValueError, match="1 to 16"):
        make_requests(1, 17)


# --- real requests ------------------------------------------------------------------------------------------------------


def test_our_requests_can_be_met_and_missed():
    requests = load_requests()
    assert (len(requests), sum(len(request.constraints) for request in requests)) == (24, 95)
    for request in requests:
        for gold in request.constraints:
            assert isinstance(verified(gold.check), Constraint), gold
    assert {gold.type for request in requests for gold in request.constraints} == {"content", "style", "format", "quantity"}


def test_requests_are_marked_on_the_gold_list():
    benchmark = RealRequests()
    samples = benchmark.samples()
    note = "Thank you for looking after my tomatoes. They never looked better. See you at the fence!"
    assert benchmark.mark(samples[0], note).values == {"instruction_level": 1.0, "constraint_level": 1.0}
    mark = benchmark.mark(samples[0], note.replace("Thank you", "Well, thank you"))
    assert mark.values == {"instruction_level": 0.0, "constraint_level": 0.75}
    assert "comma" in mark.evidence
    report = benchmark.evaluate(Chat(Replies(lambda *_: note)), limit=2)
    assert report.get("instruction_level").value == 0.5
    listed = [gold.text for gold in samples[0].data["request"].constraints]
    answer = DeCRIM(decomposer=listed).solve(Chat(Replies(lambda *_: note)), samples[0].messages, load_requests()[0].critic)
    assert answer.accepted
    with pytest.raises(ValueError, match="no check for"):
        load_requests()[0].critic("x", ["else"])


def test_requests_of_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Do it.", "task": "Do", "constraints": ["Be short.", {"text": "No commas.", "check": '
                    '"punctuation:no_comma"}]}\n')  # fmt: skip
    [request] = load_requests(path)
    assert [(gold.text, gold.check is None) for gold in request.constraints] == [("Be short.", True), ("No commas.", False)]
    with pytest.raises(ValueError, match="has no check"):
        RealRequests(path=str(path)).samples()
    for number, row in enumerate(("{", "[]", '{"prompt": "x"}', '{"prompt": "x", "constraints": []}',
                                  '{"prompt": "x", "constraints": [{"text": "y", "check": "no:such"}]}')):  # fmt: skip
        bad = tmp_path / f"bad{number}.jsonl"
        bad.write_text(row)
        with pytest.raises(ValueError):
            load_requests(bad)
    with pytest.raises(ValueError, match="cannot read"):
        load_requests(tmp_path / "none")


# --- IFEval -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ifeval():
    folder = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[4] / "shared")) / "data" / "ifeval"
    if not folder.exists():
        pytest.skip("IFEval's prompts are not here; set BROADSHEET_SHARED")
    return prompts(load_ifeval(folder)[:80:2])


def test_ifeval_answers_have_the_state_that_they_are_written_for(ifeval):
    assert len(ifeval) > 25
    for prompt in ifeval:
        for state in prompt.texts:
            assert prompt.state(prompt.write(state, Draw("x"))) == state


def test_on_ifeval_an_oracle_mends_nearly_all_and_an_inverted_critic_harms(ifeval):
    right = {}
    for name, rates in (("oracle", (1.0, 0.0)), ("inverted", (0.1, 0.6))):
        chat = Chat(SimulatedChat(SimWriter(ifeval), "sim:writer"))

        async def one(prompt, rates=rates, chat=chat):
            listed = [feature.statement for feature in prompt.features]
            return await DeCRIM(decomposer=listed).asolve(chat, prompt.prompt, checker_as_critic(prompt, *rates))

        answers = chat.map(one, ifeval)
        right[name] = statistics.fmean(all(p.state(a.text)) for p, a in zip(ifeval, answers, strict=True))
        right["one answer"] = statistics.fmean(all(p.state(a.rounds[0].text)) for p, a in zip(ifeval, answers, strict=True))
    assert right["oracle"] > 0.95 > 0.85 > right["one answer"] > right["inverted"] + 0.1
