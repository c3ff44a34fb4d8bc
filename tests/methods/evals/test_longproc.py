"""LongProc: official traces and scores, own scores, generators against solvers of other makes, the instrument's closed
forms."""

import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
from fractions import Fraction
from pathlib import Path

import pytest

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import Draw, Faults, SimulatedChat
from broadsheet.methods.evals import longproc
from broadsheet.methods.evals.longproc import (
    GENERATED,
    TASKS,
    Item,
    LongProc,
    countdown,
    evaluate,
    generate,
    load_longproc,
    make_countdown,
    make_html,
    make_path_traversal,
    make_tom,
    make_travel,
    score,
    tom_tracking,
    travel_planning,
)
from broadsheet.methods.evals.longproc.world import LineByLine, accuracy, line_share, prefix_share, spoiled

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "longproc_official.json").read_text(encoding="utf-8"))
SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[4] / "shared")) / "data" / "longproc"
needs_files = pytest.mark.skipif(not SHARED.exists(), reason=f"the official files are not at {SHARED}")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def whole(task: str, item: Item) -> str:
    """The reference answer as a model would write it."""
    head, lines, tail = TASKS[task].parts(item)
    return head + "\n".join(lines) + tail


# --- 1: official traces ---------------------------------------------------------------------------------------------------


def test_check1_countdown_demonstrations():
    for name, wanted in GOLDEN["countdown_demonstrations"].items():
        nums, target = re.fullmatch(r"demo \[(.*)\] (\d+)", name).groups()
        made = countdown.trace([int(n) for n in nums.split(",")], int(target))
        assert (len(made), sha(made)) == (wanted["length"], wanted["sha256"])
        assert made.split("<Solution>\n")[1].splitlines()[:3] == wanted["solution"]
    assert len(countdown.trace([9, 16, 6, 18], 12)) == 12892


@needs_files
@pytest.mark.parametrize("name", GOLDEN["files"])
def test_official_files_give_the_official_prompts_and_references(name):
    rows = load_longproc(name, SHARED)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["input_prompt"].encode() + b"\0" + row["reference_output"].encode() + b"\0")
    assert (len(rows), digest.hexdigest()) == (GOLDEN["files"][name]["n"], GOLDEN["files"][name]["sha256"])


@needs_files
def test_travel_traces_equal_the_official_ones():
    rows = json.loads((SHARED / "travel_planning" / "travel_planning_icl_examples.json").read_text(encoding="utf-8"))
    assert [sha(travel_planning.trace(row)) for row in rows] == GOLDEN["travel_demonstrations"]
    assert all(len(travel_planning.plans(row)) >= 1 for row in rows)


@needs_files
@pytest.mark.parametrize("name", ["tom_tracking_0.5k", "tom_tracking_2k"])
def test_beliefs_equal_the_official_ones_on_all_stories(name):
    for row in load_longproc(name, SHARED):
        assert tom_tracking.track(row["item"]["story"], row["item"]["question"]) == row["reference_output"].strip()


# --- 2: scores ------------------------------------------------------------------------------------------------------------


def case(entry) -> tuple[Item, str]:
    held = GOLDEN["items"][entry["task"]]
    return Item("", held["reference"], held["data"]), entry["text"]


@pytest.mark.parametrize("entry", GOLDEN["cases"], ids=lambda entry: f"{entry['task']}: {entry['name']}")
def test_check2_official_scores(entry):
    item, text = case(entry)
    wanted, one = entry["official"], score(entry["task"], item, text, compat=True)
    if "raises" in wanted:  # eval: the whole run stops there
        assert one.accuracy == 0
        return
    assert one.accuracy == wanted.get("accuracy", wanted.get("f1"))
    assert one.extracted == (wanted["extraction_rate"] == 1)
    if "partial_accuracy" in wanted:
        assert one.partial == wanted["partial_accuracy"]
    else:
        assert one.values == {name: wanted[name] for name in ("precision", "recall")}


def test_check2_the_official_faults_are_in_the_fixtures():
    official = {(entry["task"], entry["name"]): entry["official"] for entry in GOLDEN["cases"]}
    assert len(official) >= 30
    assert official["path_traversal", "first line wrong"]["partial_accuracy"] == 0.1
    assert official["path_traversal", "goes on"] == {"accuracy": 0.0, "partial_accuracy": 1.0, "extraction_rate": 1.0}
    assert official["countdown", "one line"]["partial_accuracy"] < 0
    assert official["countdown", "bare solution"]["partial_accuracy"] == 1.0
    assert official["countdown", "name"]["raises"] == "NameError"
    assert official["tom_tracking", "nothing"]["extraction_rate"] == 1.0
    assert official["html_to_tsv", "a row twice"]["precision"] == 1.0
    assert official["travel_planning", "goes on"]["accuracy"] == 1.0


@pytest.mark.parametrize("entry", GOLDEN["cases"], ids=lambda entry: f"{entry['task']}: {entry['name']}")
def test_check2_own_partial_scores(entry):
    item, text = case(entry)
    one = score(entry["task"], item, text)
    assert 0 <= one.partial <= one.prefix / one.lines <= 1
    if entry["name"] in ("first line wrong", "initial state wrong", "nothing", "bare solution", "only the plan"):
        assert one.partial == 0
    if entry["name"] == "exact":
        assert (one.accuracy, one.partial, one.extracted) == (1, 1, True)
    if entry["name"] in ("goes on", "not closed", "stops early", "negative that reaches it", "plan wrong"):
        assert one.accuracy < 1


def test_check2_partial_is_one_only_for_the_exact_trace():
    for task, item in [("path_traversal", make_path_traversal(9, 12, 5)), ("tom_tracking", make_tom(9, seed=5))]:
        head, lines, tail = TASKS[task].parts(item)
        for place in range(len(lines)):
            for changed in (
                lines[:place] + lines[place + 1 :],
                [*lines[:place], spoiled(lines[place]), *lines[place + 1 :]],
                [*lines[:place], spoiled(lines[-1]), *lines[place:]],
            ):
                if task == "tom_tracking" and place == 0 and len(changed) > len(lines):
                    continue  # what stands before "Step 0" is a draft
                one = score(task, item, head + "\n".join(changed) + tail)
                assert (one.accuracy, one.prefix) == (0, place)
                assert one.partial == place / max(len(changed), len(lines)) < 1


def test_drafts_and_thoughts_do_not_count():
    path, tom = make_path_traversal(6, 9, 1), make_tom(6, seed=1)
    draft = "<Route>\nFrom here, take a bus to there.\n</Route>"
    assert score("path_traversal", path, f"<think>{draft}</think>\n{path.reference}").accuracy == 1
    assert score("path_traversal", path, f"{draft} No: {path.reference}").accuracy == 1
    assert score("tom_tracking", tom, "- Step 0: (initial state) {}\nAgain:\n" + tom.reference).accuracy == 1


# --- 3: no evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "equation", ["__import__('os').system('x') = 1", "2 ** 4 = 16", "x = 1", "40 / 0 = 0", "(40) + 19 = 59", "4_0 + 19 = 59",
                 "40 + 19 = 5.9e1", "0x28 + 19 = 59", "40 // 19 = 2", "-40 + 19 = -21", "9" * 40 + " + 1 = 2"],
)  # fmt: skip
def test_check3_only_whole_numbers_and_signs_are_read(equation):
    item = Item("", countdown.trace([40, 19, 23, 7], 29), {"nums": [40, 19, 23, 7], "target": 29})
    text = f"<Solution>\n{equation}\n59 - 23 = 36\n36 - 7 = 29\n</Solution>"
    assert score("countdown", item, text).accuracy == 0
    # Python reads 4_0 as 40, and so does the official evaluator.
    assert score("countdown", item, text, compat=True).accuracy == float(equation.startswith("4_0"))


def test_check3_ten_thousand_texts_never_raise():
    draw = random.Random(11)
    items = {name: (Item("", held["reference"], held["data"]), whole(name, Item("", held["reference"], held["data"])))
             for name, held in GOLDEN["items"].items()}  # fmt: skip
    pieces = [
        "<Solution>",
        "</Solution>",
        "<Route>",
        "</Plan>",
        "<Plan>",
        "```tsv",
        "```",
        "\n",
        "\t",
        '"',
        "- Step 0:",
        "= ",
        "9" * 50,
        "**Day 1-",
        "\x00",
        "\ud800",
        "é",
        " / 0 = 0",
        "__import__('os')",
        "# Search Procedure",
        "{",
        "- Step 99999999999999:",
    ]
    for number in range(10_000):
        name = draw.choice(list(items))
        item, text = items[name]
        start = draw.randrange(len(text))
        part = list(text[start : start + draw.randrange(400)])
        for _ in range(draw.randrange(8)):
            part.insert(draw.randrange(len(part) + 1), draw.choice(pieces))
        one = score(name, item, "".join(part), compat=number % 2 == 1)
        assert 0 <= one.accuracy <= 1
        assert one.partial <= 1


# --- 4: generators --------------------------------------------------------------------------------------------------------

COUNT = 500


def test_check4_routes_are_unique():
    for seed in range(COUNT):
        hops = 3 + seed % 30
        item = make_path_traversal(hops, hops + 1 + seed % 17, seed)
        read = re.findall(
            r"You can travel from (.+?) to (.+?) by (\w+)\.", item.prompt.split("These are the connections")[1]
        )
        leads = {a: (b, by) for a, b, by in read}
        assert len(leads) == len(read) == hops + 1 + seed % 17  # one way out of every city
        assert all(a != b for a, (b, _) in leads.items())
        here, steps = item.data["source"], []
        while here != item.data["target"]:
            there, by = leads[here]
            steps.append(f"From {here}, take a {by} to {there}.")
            here = there
        assert item.reference == "<Route>\n" + "\n".join(steps) + "\n</Route>"
        assert len(steps) == hops


def belief_of(story: str, agent: str, thing: str) -> str | None:
    """Reads a story backwards: the last moment at which both were in one room says what is believed."""
    lines = story.splitlines()
    name = thing.removeprefix("the ")

    def room(upto: int) -> str | None:
        for line in reversed(lines[1 : upto + 1]):
            if re.search(rf": {agent} leaves", line):
                return None
            if went := re.search(rf": {agent} (?:moves to|enters) the ([\w ]+?)(?:,|\.)", line):
                return went[1]
        return re.search(rf"{agent} is in the ([\w ]+)", lines[0])[1]

    def place(upto: int) -> str:
        for line in reversed(lines[1 : upto + 1]):
            if put := re.search(rf"moves the {name} to the ([\w ]+'s [\w ]+)", line):
                return put[1]
        return re.search(rf"the {name} is on the ([\w ]+'s [\w ]+)", lines[0])[1]

    for step in range(len(lines) - 1, -1, -1):
        if room(step) and place(step).split("'s ")[0] == room(step):
            return place(step)
    return None


def test_check4_beliefs():
    for seed in range(COUNT):
        item = make_tom(4 + seed % 20, 2 + seed % 2, 2 + seed % 3, 2 + seed % 2, 2 + seed % 2, seed)
        agent, thing = re.fullmatch(r"Where does (\w+) believe (the .+) is\?", item.data["question"]).groups()
        lines = item.data["story"].splitlines()
        beliefs = [belief_of("\n".join(lines[: step + 1]), agent, thing) for step in range(len(lines))]
        assert re.findall(r"belief on [\w ]+: ([^}]+)\}", item.reference) == [str(belief) for belief in beliefs]
        assert item.reference.endswith("None" if beliefs[-1] is None else f"the {beliefs[-1]}")


def reachable(nums: tuple[Fraction, ...]) -> set[Fraction]:
    """All that can be made of the numbers under the rules, by fractions and sets instead of a search in order."""
    if len(nums) == 1:
        return {nums[0]}
    found = set()
    for i, j in itertools.combinations(range(len(nums)), 2):
        rest = tuple(n for k, n in enumerate(nums) if k not in (i, j))
        a, b = max(nums[i], nums[j]), min(nums[i], nums[j])
        for result in {a + b, a - b, a * b, *([a / b] if b else [])}:
            if result.denominator == 1 and result < 2000:
                found |= reachable((result, *rest))
    return found


def test_check4_countdown_solutions_and_pruning():
    for seed in range(COUNT):
        item = make_countdown((24, 70)[seed % 2], seed)
        nums, target = item.data["nums"], item.data["target"]
        solution = item.reference.split("<Solution>\n")[1].split("\n</Solution>")[0]
        assert countdown.flaw(nums, target, solution) == ""
        lines = item.reference.split("\n\nNow we")[0].splitlines()[1:]
        assert len(lines) == item.data["steps"]
        assert sum("target found" in line for line in lines) == 1
        assert "target found" in lines[-1]
        for line in lines:  # every verdict is right on its own
            if read := re.search(r"Try (\d+) ([-+*/]) (\d+) = ([\d.]+)\. (.*)", line):
                a, sign, b = int(read[1]), read[2], int(read[3])
                exact = {"+": Fraction(a + b), "-": Fraction(a - b), "*": Fraction(a * b)}.get(sign) or (
                    Fraction(a, b) if sign == "/" else Fraction(0)
                )
                assert ("decimal" in read[5]) == (exact.denominator != 1)
                assert ("exceeds" in read[5]) == (exact.denominator == 1 and exact >= 2000)
                assert exact.denominator != 1 or int(read[4]) == exact
                assert a >= b
        if seed < 50:
            assert target in reachable(tuple(Fraction(n) for n in nums))


def test_check4_targets_that_cannot_be_reached_are_refused():
    nums = (1, 1, 1, 2)
    impossible = next(t for t in range(10, 50) if t not in reachable(tuple(Fraction(n) for n in nums)))
    with pytest.raises(ValueError, match="cannot be reached"):
        countdown.trace(nums, impossible)


def test_check4_travel_plans_are_unique():
    for seed in range(COUNT):
        item = make_travel(42 + 18 * (seed % 4), seed)
        days = {c["city"]: c["num_days"] for c in item.data["constraints"] if c["type"] == "duration"}
        fixed = {c["city"]: (c["start_day"], c["end_day"]) for c in item.data["constraints"] if c["type"] == "fixed"}
        flights = {tuple(flight) for flight in item.data["connected_cities"]}
        kept = []
        for order in itertools.permutations(days):
            if any(pair not in flights for pair in itertools.pairwise(order)):
                continue
            ends = list(itertools.accumulate((days[city] - 1 for city in order), initial=1))
            spans = {city: (ends[i], ends[i + 1]) for i, city in enumerate(order)}
            if all(spans[city] == span for city, span in fixed.items()):
                kept.append([(city, *spans[city]) for city in order])
        assert len(kept) == 1
        assert travel_planning.visits(item.reference.split("<Plan>")[1]) == kept[0]
        assert item.data["total_days"] == kept[0][-1][2]


@pytest.mark.parametrize("task", GENERATED)
def test_generated_sets_have_their_length_and_pass_their_own_scores(task):
    tokens = {"0.5k": 500, "2k": 2000, "8k": 8000}
    for level in GENERATED[task]:
        items = [generate(f"{task}_{level}", seed) for seed in range(3)]
        mean = statistics.fmean(len(item.reference) / 4 for item in items)
        assert 0.7 * tokens[level] < mean < 1.6 * tokens[level]
        for item in items:
            for compat in (False, True):
                one = score(task, item, whole(task, item), compat)
                assert (one.accuracy, one.partial) == (1, 1)
            assert item.reference not in item.prompt
    assert generate(f"{task}_2k", 7) == generate(f"{task}_2k", 7) != generate(f"{task}_2k", 8)


def test_the_input_may_stay_as_long_while_the_output_grows():
    short, long = make_path_traversal(8, 120, 1), make_path_traversal(96, 120, 1)
    assert abs(len(short.prompt) - len(long.prompt)) < 0.05 * len(long.prompt)
    assert len(long.reference) > 8 * len(short.reference)
    assert make_path_traversal(5, 9, 2, compact=True).data["source"].startswith("c")


# --- 5: the instrument ----------------------------------------------------------------------------------------------------


def simulated(task, make, lines, error, recovery, count):
    """Scores of ``count`` answers, without a chat between."""
    world, found = LineByLine((), error, recovery), []
    items = [make(lines, seed) for seed in range(20)]
    for seed in range(count):
        item = items[seed % len(items)]  # errors are drawn anew for every answer
        found.append(score(task, item, world.answer(TASKS[task], item, Draw(f"{task} {lines} {recovery} {seed}"))))
    return found


def within(values, expected, errors=3.0):
    mean, spread = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    assert abs(mean - expected) <= errors * spread, (mean, expected, spread)


def test_closed_forms_have_the_values_of_the_table():
    table = {24: (0.786, 0.884), 96: (0.381, 0.638), 384: (0.021, 0.252)}
    for lines, wanted in table.items():
        assert (round(accuracy(0.01, lines), 3), round(prefix_share(0.01, lines), 3)) == wanted
    assert line_share(0.1, 0.0, 1) == 0.9
    assert line_share(0.02, 0.3, 10_000) == pytest.approx(0.3 / 0.32, abs=1e-3)


@pytest.mark.parametrize("lines", [24, 96, 384])
def test_check5_simulated_accuracy_and_prefix(lines):
    scores = simulated("path_traversal", lambda n, seed: make_path_traversal(n, n, seed), lines, 0.01, 0.0, 2000)
    within([one.accuracy for one in scores], accuracy(0.01, lines))
    within([one.prefix / one.lines for one in scores], prefix_share(0.01, lines))
    within([one.partial for one in scores], prefix_share(0.01, lines))


def test_check5_recovery_changes_rows_and_not_routes():
    paths = simulated("path_traversal", lambda n, seed: make_path_traversal(n, n, seed), 48, 0.02, 0.3, 2000)
    within([one.accuracy for one in paths], accuracy(0.02, 48))
    rows = {
        q: [one.accuracy for one in simulated("html_to_tsv", lambda n, seed: make_html(n, seed, False), 48, 0.02, q, 400)]
        for q in (0.0, 0.3)
    }
    for recovery, values in rows.items():
        within(values, line_share(0.02, recovery, 48))
    assert statistics.fmean(rows[0.3]) > statistics.fmean(rows[0.0]) + 0.2


# --- 6: rows --------------------------------------------------------------------------------------------------------------


def test_check6_rows():
    item = make_html(12, 3, filtered=True)
    header, *rows = item.reference.splitlines()

    def f1(some):
        return score("html_to_tsv", item, "```tsv\n" + "\n".join([header, *some]) + "\n```")

    for seed in range(20):
        assert f1(random.Random(seed).sample(rows, len(rows))).accuracy == 1
    twice = f1([*rows, rows[4]])
    assert twice.values == {"precision": 12 / 13, "recall": 1.0}
    assert f1(rows[:-2]).values == {"precision": 1.0, "recall": 10 / 12}
    quoted = f1([rows[0].replace(" ", ' "', 1), *rows[1:]])
    assert quoted.accuracy == 1  # a quote is punctuation
    assert f1([]).extracted is False


def test_a_row_that_is_there_twice_may_be_written_twice():
    item = Item("", "a\tb\n1\t2\n1\t2\n3\t4", {})
    assert score("html_to_tsv", item, "```tsv\na\tb\n1\t2\n3\t4\n1\t2\n```").accuracy == 1
    assert score("html_to_tsv", item, "```tsv\na\tb\n1\t2\n3\t4\n```").values == {"precision": 1.0, "recall": 2 / 3}


# --- C++ ------------------------------------------------------------------------------------------------------------------

TWICE = "int main() { int n; cin >> n; cout << 2 * n << endl; return 3; }"


def code_item(*tests) -> Item:
    if not shutil.which("g++"):
        pytest.skip("pseudo_to_code needs g++")
    return Item("", TWICE, {"testcases": [[[given], [wanted]] for given, wanted in tests]})


def test_programs_are_compiled_and_tested_in_the_sandbox():
    item = code_item(("2", "4"), ("5", "10"))
    assert score("pseudo_to_code", item, f"```cpp\n{TWICE}\n```").accuracy == 1  # the exit code does not matter
    assert score("pseudo_to_code", item, f"```c++\n{TWICE}\n```", compat=True).accuracy == 1
    for code, why in (
        (TWICE.replace("2 *", "3 *"), "test 1: another output"),
        (TWICE.replace("cin >> n", "cin >> m"), "does not compile"),
    ):
        one = score("pseudo_to_code", item, f"```cpp\n{code}\n```")
        assert (one.accuracy, one.extracted) == (0, True)
        assert why in one.evidence
    nothing = score("pseudo_to_code", item, "int main() {}")
    assert (nothing.accuracy, nothing.extracted) == (0, False)


@pytest.mark.slow
@needs_files
@pytest.mark.parametrize("name", ["pseudo_to_code_0.5k", "pseudo_to_code_2k"])
def test_official_programs_pass_their_tests(name):
    code_item()
    items = [Item.of(row) for row in load_longproc(name, SHARED)[:12]]
    assert [score("pseudo_to_code", item, whole("pseudo_to_code", item)).evidence for item in items] == [""] * 12


# --- the benchmark --------------------------------------------------------------------------------------------------------


def simulated_chat(bench: LongProc, error=0.0, recovery=0.0, **setting) -> Chat:
    pairs = [(TASKS[name.rpartition("_")[0]], item) for name, item in bench.problems()]
    return Chat(SimulatedChat(LineByLine(pairs, error, recovery), "sim:lines", **setting))


def test_benchmark_runs_after_install():
    bench = LongProc(items=2)
    report = bench.evaluate(simulated_chat(bench))
    assert report.get("accuracy").value == 1
    assert {metric.value_of for metric in report.metrics if metric.name == "average"} == {
        "0.5k (4 tasks)", "2k (5 tasks)", "8k (5 tasks)",
    }  # fmt: skip
    assert bench.samples() == bench.samples()
    assert len(report.scored) == 2 * 14


def test_benchmark_counts_what_was_cut_off_and_keeps_its_right_lines():
    bench = LongProc(tasks="path_traversal", levels="0.5k", items=40)
    report = bench.evaluate(simulated_chat(bench, faults=Faults(truncate=0.5)))
    cut = report.outcomes["truncated"]
    assert 5 < cut < 35
    assert report.get("accuracy").value == 1 - cut / 40
    assert report.get("prefix").value == pytest.approx(1 - cut / 40 * 0.5, abs=0.05)


def test_benchmark_in_steps_meets_its_closed_form():
    bench = LongProc(tasks="path_traversal,countdown", steps=40, items=150, seed=3)
    chat = simulated_chat(bench, error=0.02)
    report = bench.evaluate(chat)
    lines = [one.sample.data["item"].data["steps"] for one in report.scored]
    expected = statistics.fmean(accuracy(0.02, count) for count in lines)
    low, high = report.get("accuracy").ci
    assert low - 0.03 < expected < high + 0.03
    compat = LongProc(tasks="path_traversal,countdown", steps=40, items=150, seed=3, compat=True)
    assert compat.evaluate(chat).get("partial").value > report.get("partial").value


@needs_files
def test_benchmark_reads_official_files():
    bench = LongProc(
        tasks="countdown_0.5k,path_traversal_0.5k,html_to_tsv_0.5k,tom_tracking_0.5k", path=str(SHARED), items=15
    )
    report = bench.evaluate(simulated_chat(bench))
    assert report.get("accuracy").value == 1
    assert len(report.scored) == 60
    rows = load_longproc("countdown_0.5k", SHARED)[:4]
    summary = evaluate(
        "countdown_0.5k", [row["reference_output"] for row in rows[:3]] + ["?"], rows, cut=[False] * 3 + [True]
    )
    assert (summary.accuracy, summary.extraction, summary.truncated) == (0.75, 0.75, 0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_longproc("travel_planning_0.5k", "."), "it comes in 2k, 8k"),
        (lambda: load_longproc("pseudo_to_code_8k", "."), "it comes in 0.5k, 2k"),
        (lambda: load_longproc("needle_2k", "."), "there is no LongProc task"),
        (lambda: load_longproc("countdown_2k", "/nowhere"), "clone princeton-pli/LongProc"),
        (lambda: LongProc(tasks="travel_planning", levels="0.5k"), "nothing to run"),
        (lambda: LongProc(tasks="countdown_16k"), "it comes in"),
        (lambda: LongProc(levels="1k"), "choose from 0.5k, 2k, 8k"),
        (lambda: LongProc(items=0), "items must be at least 1"),
        (lambda: LongProc(steps=10, path="x"), "leave path out"),
        (lambda: LongProc(tasks="pseudo_to_code").samples(), "give path="),
        (lambda: evaluate("countdown_2k", ["a"], []), "1 predictions for 0 references"),
        (lambda: make_path_traversal(10, 5), "needs a city a hop"),
        (lambda: make_path_traversal(10, 10**5), "use compact=True"),
        (lambda: make_tom(5, agents=99), "agents must be in"),
        (lambda: make_countdown(3), "at least 8 lines"),
        (lambda: make_travel(10), "has 38 lines"),
        (lambda: make_html(0), "at least one row"),
        (lambda: LineByLine((), error=2.0), "probabilities"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_damaged_files_are_errors(tmp_path):
    folder = tmp_path / "tom_tracking"
    folder.mkdir()
    (folder / "prompts.yaml").write_text("USER_PROMPT: '{story}'")
    for text, message in (
        ("version https://git-lfs", "is not JSON"),
        ("{}", "is no list"),
        ('[{"story": 1}]', "is no file of"),
    ):
        (folder / "tom_tracking_2k.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_longproc("tom_tracking_2k", tmp_path)
    (folder / "prompts.yaml").write_text("- no prompt")
    with pytest.raises(ValueError, match="no USER_PROMPT"):
        load_longproc("tom_tracking_2k", tmp_path)


def test_pages_outside_the_folder_are_not_read(tmp_path):
    folder = tmp_path / "html_to_tsv"
    folder.mkdir()
    (folder / "prompts.yaml").write_text("USER_PROMPT: '{html_str}'")
    (tmp_path / "secret").write_text("x")
    row = dict.fromkeys(
        ("task_id", "website_id", "task_topic", "task_description", "tsv_header", "filtering_instruction", "gt"), ""
    )
    (folder / "html_to_tsv_2k.json").write_text(json.dumps([{**row, "html_path": "../secret"}]))
    with pytest.raises(ValueError, match="leads out of"):
        load_longproc("html_to_tsv_2k", tmp_path)


def test_the_module_offers_what_users_expect():
    assert all(hasattr(longproc, name) for name in longproc.__all__)


def test_prompts_without_the_procedure_keep_rules_and_format():
    whole, bare = LongProc(items=1, levels="2k").problems(), LongProc(items=1, levels="2k", procedure=False).problems()
    shorter = {name: len(long.prompt) - len(short.prompt) for (name, long), (_, short) in zip(whole, bare, strict=True)}
    assert shorter.pop("html_to_tsv_2k") == 0  # there is nothing but copying
    assert len(shorter) == 4
    assert all(cut > 100 for cut in shorter.values())
    for (_, long), (_, short) in zip(whole, bare, strict=True):
        assert (long.reference, long.data) == (short.reference, short.data)
        start, end = short.prompt[:40], short.prompt[-200:]
        assert long.prompt.startswith(start)
        assert long.prompt.endswith(end)
    with pytest.raises(ValueError, match="generated"):
        LongProc(path="somewhere", procedure=False)
