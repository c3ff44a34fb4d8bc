"""Code tasks: the three formats, and where a completion ends, by hand."""

import gzip
import json

import pytest
from tiny import SHARED

from broadsheet.core.codetasks import CodeTask, first_stop, load_tasks, truncate
from broadsheet.core.sandbox import run

F = 'def f(x):\n    """Doc."""\n'
BODY = "    return x + 1"
NESTED = "    def g(y):\n        return y + 1\n    return g(x)"
NESTED_LAST = "    return g()\n    def g():\n        pass"
STRING = '    s = """\ndef g():\n"""\n    return s'

#: (what it shows, prompt, completion, what is left; None: all of it)
PYTHON = [
    ("a body alone", F, BODY, BODY),
    ("a trailing newline goes", F, BODY + "\n", BODY),
    ("another function goes", F, BODY + "\n\ndef g(y):\n    return y\n", BODY),
    ("prints after it go", F, BODY + "\n\nprint(f(1))\n", BODY),
    ("tests after it go", F, BODY + "\nassert f(1) == 2\n", BODY),
    ("a class after it goes", F, BODY + "\n\nclass A:\n    pass\n", BODY),
    ("a comment after it goes", F, BODY + "\n\n# now test it\n", BODY),
    ("half a function after it goes", F, BODY + "\n\ndef g(y", BODY),
    ("prose after it goes", F, BODY + "\n\nThis function returns it's argument (plus one", BODY),
    ("an open string after it goes", F, BODY + '\n\nprint("it', BODY),
    ("an open docstring after it goes", F, BODY + '\n\ndef g():\n    """It', BODY),
    ("code fences after it go", F, BODY + "\n```\nThat is all.", BODY),
    ("nested functions stay", F, NESTED + "\nprint(1)", NESTED),
    ("a nested function at its end stays", F, NESTED_LAST + "\nx = 1", NESTED_LAST),
    ("a decorated function after it goes", F, BODY + "\n\n@cache\ndef g():\n    pass\n", BODY),
    ("a decorated function in the prompt", "@cache\n" + F, BODY + "\n\nprint(f(1))", BODY),
    ("an async function", "async def f(x):\n", BODY + "\n\nprint(1)", BODY),
    ("blank lines within stay", F, "    y = x\n\n\n    return y\n\n\n\nz = 2", "    y = x\n\n\n    return y"),
    ("comments within stay", F, "    # add\n    return x\n# done\n", "    # add\n    return x"),
    ("a comment at the margin within", F, "    y = x\n# odd\n    return y\nprint(1)", "    y = x\n# odd\n    return y"),
    ("brackets over lines", F, "    return [\n1,\nx,\n]\nprint(1)", "    return [\n1,\nx,\n]"),
    ("strings over lines", F, STRING + "\nprint(1)", STRING),
    ("lines that go on", F, "    return x + \\\n1\nprint(1)", "    return x + \\\n1"),
    ("syntax errors within are kept raw", F, "    return x +\n\nprint(1)", None),
    ("a function that does not end is kept raw", F, "    return [x,", None),
    ("bad indentation is kept raw", F, "    y = 1\n  return y\nprint(1)", None),
    ("an empty completion", F, "", ""),
    ("no function at all is kept raw", "# add one\n", "x = 1\nprint(x)", None),
    ("a prompt without a function", "# add one\n", "def f(x):\n    return x\n\nf(1)", "def f(x):\n    return x"),
    ("an import before it", "import math\n\n", "def f(x):\n    return x\nf(1)", "def f(x):\n    return x"),
    ("a helper in the prompt", "def h(x):\n    return x\n\n\n" + F, "    return h(x)\n\nh(2)", "    return h(x)"),
    ("a method", "class A:\n    def f(self):\n", "        return 1\n\n    def g(self", "        return 1"),
    ("a signature that is open", "def f(x", "):\n    return x\nf(1)", "):\n    return x"),
    ("one line", "def f(x):", " return x\nf(1)", " return x"),
    ("a docstring without its newline", 'def f(x):\n    """Doc."""', "\n    return x\n\nf(1)", "\n    return x"),
    ("an if of one line", F, "    if x: return 1; \n    return 2\nf(1)", "    if x: return 1; \n    return 2"),
    ("letters beyond ASCII", F, "    return 'né'  # ü\nprint('ö')", "    return 'né'"),
]  # fmt: skip
M = "class Problem {\n    /** {@code f} */\n    public static int f(int x)"
JAVA = [
    ("a method", M + " {\n", "        return x;\n    }\n    static int g() {", "        return x;\n    }"),
    ("from the signature on", M, " {\n        return x;\n    }\n}", " {\n        return x;\n    }"),
    ("blocks within", M + " {", " if (x > 0) { return 1; } return 2; } }", " if (x > 0) { return 1; } return 2; }"),
    ("braces in strings", M + " {", " char c = '}'; String s = \"}\"; /* } */ return 1; // }\n } }", None),
    ("an array within", M, " { int[] a = {1}; return a[0]; } int g", " { int[] a = {1}; return a[0]; }"),
    ("one that does not end", M + " {", " return (x;", None),
    ("a local class", M + " {", " class B { int b() { return 1; } } } }", " class B { int b() { return 1; } } }"),
]  # fmt: skip


@pytest.mark.parametrize(("shows", "prompt", "completion", "left"), PYTHON, ids=[case[0] for case in PYTHON])
def test_acceptance_8_a_completion_ends_with_its_function(shows, prompt, completion, left):
    assert truncate(prompt, completion) == (completion if left is None else left)


def test_acceptance_8_there_are_thirty_cases():
    assert len({case[2] for case in PYTHON}) >= 30


@pytest.mark.parametrize(("shows", "prompt", "completion", "left"), JAVA, ids=[case[0] for case in JAVA])
def test_a_java_completion_ends_with_its_method(shows, prompt, completion, left):
    wanted = completion.rpartition(" }")[0] if shows == "braces in strings" else completion if left is None else left
    assert truncate(prompt, completion, "java") == wanted


def test_the_first_stop_counts():
    assert first_stop("a\n#b\ndef", ("\ndef", "\n#")) == 1
    assert first_stop("abc", ("\ndef",)) == 3


def mceval(task_id, entry_point, prompt, solution, test):
    """A record in McEval's form."""
    return {
        "task_id": task_id,
        "prompt": prompt.strip("\n"),
        "canonical_solution": solution,
        "test": test.strip("\n"),
        "entry_point": entry_point,
    }


MCEVAL = {
    "Python": [
        mceval(
            *("Python/1", "spread"),
            '''
from typing import List

def spread(xs: List[int]) -> int:
    """ How far apart the ends are.
    >>> spread([3, 1])
    2
    """
''',
            "    return max(xs) - min(xs)",
            """
def check(spread):
    assert spread([3, 1]) == 2
    assert spread([-1, 5, 2]) == 6

check(spread)
""",
        ),
        mceval(
            *("Python/2", "evens"),
            'def evens(n: int) -> list:\n    """ Even numbers below n. """',
            "    return [i for i in range(n) if i % 2 == 0]",
            """
def check_evens():
    assert evens(5) == [0, 2, 4]
    assert evens(0) == []

check_evens()
""",
        ),
    ],
    "Java": [
        mceval(
            *("Java/1", "total"),
            """
import java.util.*;

class Solution {
    /** The sum. */
    public static int total(List<Integer> xs)
""",
            "    {\n        int sum = 0;\n        for (int x : xs) { sum += x; }\n        return sum;\n    }",
            """
    public static void main(String[] args) {
        assert total(Arrays.asList(1, 2, 3)) == 6;
    }
}
""",
        ),
    ],
}
#: The first that fits makes a right solution wrong.
MUTATIONS = (("min(", "max("), ("== 0", "== 1"), ("sum += x", "sum -= x"), ("return", "return -"))


def _solved(task: CodeTask, solution: str) -> str:
    """Run as the study runs it: a line break, the completion cut, the tests."""
    completion = truncate(task.prompt, "\n" + solution, task.language)
    return run(task.source(completion), task.tests, task.language, seconds=20 if task.language == "java" else 5).status


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("language", MCEVAL)
def test_acceptance_9_mceval_tasks_run(language, tmp_path, jdk):
    if language == "Java" and not jdk:
        pytest.skip("no JDK here")
    tasks = load_tasks(_write(tmp_path / "tasks.jsonl", MCEVAL[language]))
    assert [task.language for task in tasks] == [language.lower()] * len(MCEVAL[language])
    for task in tasks:
        assert _solved(task, task.solution) == "pass"
        mutated = next(task.solution.replace(a, b) for a, b in MUTATIONS if a in task.solution)
        assert _solved(task, mutated) == "fail"


@pytest.mark.parametrize(("language", "count"), [("py", 42), ("java", 53)])
def test_acceptance_9_the_papers_files_load(language, count):
    path = SHARED / "data" / "mceval" / f"mceval_{language}.jsonl"
    if not path.is_file():
        pytest.skip("the study's McEval files are not here; set BROADSHEET_SHARED")
    tasks = load_tasks(path)
    assert len(tasks) == count
    assert {task.language for task in tasks} == {"python" if language == "py" else "java"}


@pytest.mark.skipif(not (SHARED / "data" / "humaneval").is_dir(), reason="shared data is not here; set BROADSHEET_SHARED")
def test_humaneval_loads_and_its_solutions_pass():
    tasks = load_tasks(SHARED / "data" / "humaneval" / "HumanEval.jsonl.gz")
    assert len(tasks) == 164
    for task in tasks[::20]:
        assert _solved(task, task.solution) == "pass", task.name
        assert _solved(task, "    return None") != "pass", task.name


def test_multipl_e_rows_lists_and_gzip(tmp_path):
    row = {
        "name": "a",
        "language": "py",
        "prompt": F,
        "tests": "assert f(1) == 2",
        "stop_tokens": ["\ndef"],
        "doctests": "x",
    }
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps([row]), encoding="utf-8")
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert load_tasks(listed) == load_tasks(packed) == [CodeTask("a", "python", F, "assert f(1) == 2", ("\ndef",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "a"}\n', "record 1 has no text 'task_id'"),
        ('{"name": "a", "tests": "", "prompt": ""}', "has no text 'language'"),
        ('{"name"', "line 1 is not JSON"),
        ("[3]", "is not an object"),
    ],
)
def test_bad_files_are_said_in_one_line(text, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_tasks(path)
    with pytest.raises(ValueError, match="no file"):
        load_tasks(tmp_path / "missing.jsonl")
