"""What a paper's page says of its method is true of the method."""

from __future__ import annotations

import ast
import inspect
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import broadsheet
from broadsheet.catalogue import papers
from broadsheet.web.usage import usage

RUNNING = [slug for slug, paper in papers().items() if paper.method]


@pytest.mark.parametrize("slug", RUNNING)
def test_parameters_are_the_dataclass_s_own(slug):
    method, found = broadsheet.method(slug), usage(slug)
    assert found.name == method.__name__
    expected = {p.name: p.default for p in inspect.signature(method).parameters.values() if not p.name.startswith("_")}
    assert {one.name for one in found.parameters} == set(expected)
    assert {one.name for one in found.parameters if not one.default} == {
        n for n, d in expected.items() if d is inspect._empty
    }
    assert inspect.cleandoc(method.__doc__).startswith(found.text[:40])


def test_sources_are_parsed_one_at_a_time(monkeypatch):
    """Two at once are a SystemError now and then (CPython 3.11), which a visitor of a server that just started would see."""
    parse, at_once, most = ast.parse, [], []

    def watched(*given):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.002)
        at_once.pop()
        return parse(*given)

    monkeypatch.setattr("broadsheet.web.usage.ast.parse", watched)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(usage.__wrapped__, RUNNING[:4]))
    assert [one.name for one in found] == [usage(slug).name for slug in RUNNING[:4]]
    assert max(most) == 1


@pytest.mark.parametrize("slug", RUNNING)
def test_the_snippet_compiles_and_names_what_is_there(slug):
    """Imports resolve, and every verb called on the method, with every keyword, exists."""
    found, method = usage(slug), broadsheet.method(slug)
    tree = ast.parse(found.code)
    assert f'method("{slug}")' in found.code
    assert len([line for line in found.code.splitlines() if line]) <= 10
    assert all(len(line) <= 110 for line in found.code.splitlines())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                broadsheet.resolve(f"{node.module}:{alias.name}")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == found.name]
    assert made
    for call in made:
        assert {keyword.arg for keyword in call.keywords} <= {one.name for one in found.parameters}
    names = {found.name} | {
        node.targets[0].id for node in ast.walk(tree) if isinstance(node, ast.Assign) and node.value in made
    }
    verbs = [
        call for call in calls
        if isinstance(call.func, ast.Attribute)
        and (call.func.value in made or (isinstance(call.func.value, ast.Name) and call.func.value.id in names))
    ]  # fmt: skip
    assert verbs
    for call in verbs:
        signature = inspect.signature(getattr(method, call.func.attr))
        signature.bind(None, *call.args, **{keyword.arg: None for keyword in call.keywords if keyword.arg})


#: What a test can wait for; and no clock of a shared machine is quiet.
LESS = {
    "limit=10": "limit=2",
    "BitStack()": "BitStack(n_iter=2)",
    "n_init=6": "n_init=6, n_domain=300, n_eval=100",
    "ENAMEL()": "ENAMEL(allow_noise=True)",
    "MELT()": "MELT(conversations=1, repetitions=1, max_gen=4, idle=0, tail=0, max_busy=1)",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("slug", RUNNING)
def test_the_snippet_runs(slug, tmp_path, monkeypatch):
    """On the built-in models, as it stands; only with less to do."""
    import json

    monkeypatch.chdir(tmp_path)
    from broadsheet.core.microworld.tasks import make_sessions

    (tmp_path / "text.txt").write_text("\n".join(json.dumps(s.to_json()) for s in make_sessions("kv", 12, 256)))
    rows = [{"input": f"Give {n}.", "output": str(n)} for n in range(60)]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    program = "module @m {\n  func.func public @main(%a: tensor<8xf32>) -> tensor<8xf32> {\n"
    program += "    %0 = stablehlo.add %a, %a : tensor<8xf32>\n    return %0 : tensor<8xf32>\n  }\n}\n"
    (tmp_path / "program.mlir").write_text(program)
    code = usage(slug).code
    for whole, part in LESS.items():
        code = code.replace(whole, part)
    exec(compile(code, slug, "exec"), {"__name__": "snippet"})
