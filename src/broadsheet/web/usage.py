"""A method's parameters and how it is used, read from its source: importing it would load torch into the server."""

from __future__ import annotations

import ast
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import broadsheet
from broadsheet.catalogue import papers

_ROOT = Path(broadsheet.__file__).parent
#: CPython 3.11 counts the depth of all threads' trees together, and takes two at once for an error now and then.
_parsing = threading.Lock()


@dataclass(frozen=True)
class Parameter:
    """A field of a method: its name, type and default as they stand in the source ("": it must be given)."""

    name: str
    type: str
    default: str


@dataclass(frozen=True)
class Usage:
    """``text`` is the class's docstring, ``bases`` the names of its classes, itself first; ``code`` shows its use."""

    name: str
    module: str
    text: str
    parameters: tuple[Parameter, ...]
    bases: tuple[str, ...]
    code: str


@cache
def usage(slug: str) -> Usage:
    """Of a paper that runs. Raises ValueError when its class is not where the catalogue says."""
    module, _, name = papers()[slug].method.partition(":")
    chain = _classes(module, name)
    if not chain:
        raise ValueError(f"catalogue entry {slug}: there is no class {name} in {module}")
    bases = tuple(node.name for node in chain)
    text = ast.get_docstring(chain[0]) or ""
    return Usage(name, module, text, _fields(chain), bases, _code(slug, name, bases))


@cache
def options(slug: str) -> frozenset[str]:
    """Names that a run's options may have: fields of the method and of its family's workload. Empty where the class is no
    method of the family's bench, whose options depend on more."""
    found, family = usage(slug), papers()[slug].family
    if not {"CacheMethod", "WeightMethod", "Benchmark", "Solver"} & set(found.bases):
        return frozenset()
    workload = _fields(_classes(f"broadsheet.methods.{family}.bench", "Workload"))
    more = {"weights": {"size"}}.get(family, set())  # what `lab.run` takes for itself
    return frozenset({parameter.name for parameter in (*found.parameters, *workload)} | more | {"method"})


def _fields(chain: list[ast.ClassDef]) -> tuple[Parameter, ...]:
    found: dict[str, Parameter] = {}
    for node in reversed(chain):  # fields of the bases come first, as in a dataclass
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            found |= {parameter.name: parameter for parameter in map(_parameter, node.body) if parameter}
    return tuple(found.values())


def _classes(module: str, name: str) -> list[ast.ClassDef]:
    """The class and its bases, as far as they are in this package, in the order of inheritance."""
    where = _ROOT.parent.joinpath(*module.split("."))
    package = (where / "__init__.py").is_file()
    file = where / "__init__.py" if package else where.with_suffix(".py")
    if not module.startswith("broadsheet") or not file.is_file():
        return []
    with _parsing:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            return [node, *(found for base in bases for found in _classes(module, base))]
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    parts = module.split(".")
                    up = node.level - package  # a package's own level is itself
                    root = parts[: len(parts) - up] if node.level else []
                    return _classes(".".join([*root, *(node.module or "").split(".")]).strip("."), alias.name)
    return []


def _parameter(node: ast.stmt) -> Parameter | None:
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id.startswith("_"):
        return None
    kind, default = ast.unparse(node.annotation), ast.unparse(node.value) if node.value else ""
    if kind.startswith("ClassVar") or "init=False" in default:
        return None
    made = node.value
    if isinstance(made, ast.Call) and ast.unparse(made.func) == "field":
        given = {keyword.arg: keyword.value for keyword in made.keywords}
        default = ast.unparse(given["default"]) if "default" in given else ""
        if "default_factory" in given:
            default = f"{ast.unparse(given['default_factory'])}()"
    return Parameter(node.target.id, kind, default)


# --- in five lines ----------------------------------------------------------------------------------------------

_CACHE = """\
import broadsheet
from broadsheet.core.models import load

model, tokenizer = load("pocket-2m")  # built in; or a folder, or a hub name
{name} = broadsheet.method("{slug}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
cache = {name}().cache(model)  # a transformers Cache
model.generate(**inputs, past_key_values=cache, max_new_tokens=20)
print(cache.nbytes, cache.report())  # bytes really held, by part
"""

_WEIGHTS = """\
import broadsheet
from broadsheet.core.models import load

model, tokenizer = load("pocket-2m")  # built in; or a folder, or a hub name
ids = tokenizer(open("text.txt").read(), return_tensors="pt").input_ids
calibration = ids.unfold(1, 128, 128)[0]  # [samples, tokens]
{name} = broadsheet.method("{slug}")
small = {name}().compress(model, calibration)
small.save_pretrained("small")  # from_pretrained loads it after: import broadsheet
"""

_LOSSLESS = """\
import broadsheet
import torch
from broadsheet.core.models import load

model, tokenizer = load("pocket-2m", dtype=torch.bfloat16)  # built in; or a folder, or a hub name
{name} = broadsheet.method("{slug}")
same = {name}().compress(model)  # the same logits, bit for bit
same.save_pretrained("same")  # from_pretrained loads it after: import broadsheet
"""

_ESTIMATE = """\
import broadsheet

{name} = broadsheet.method("{slug}")
report = {name}().estimate()
for table in report.tables():
    print(table.title, table.columns, *table.rows, sep="\\n")
report.save("{slug}")  # plots, traces, pages
"""

_BENCHMARK = """\
import broadsheet
from broadsheet.core.chat import connect

chat = connect("pocket-2m")  # or connect("http://localhost:8000/v1", "qwen3-8b")
{name} = broadsheet.method("{slug}")
report = {name}().evaluate(chat, limit=10)
for metric in report.metrics:
    print(metric.name, metric.value, metric.ci, metric.n)
"""

_LOOP = """\
import broadsheet
from broadsheet.core.chat import connect

chat = connect("pocket-2m")  # or connect("http://localhost:8000/v1", "qwen3-8b")
{name} = broadsheet.method("{slug}")
answer = {name}().solve(chat, "Describe a lighthouse in 50 words without the letter z.")
print(answer.text, answer.accepted, answer.usage)
"""

_OWN = {
    "scbench": """\
import broadsheet
from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.models import load

GEAR, SessionRunner = broadsheet.method("gear"), broadsheet.method("scbench")
runner = SessionRunner(*load("pocket-2m"), GEAR())
results = runner.run(make_sessions("kv", sessions=2, context_tokens=256))
print(sum(result.score for result in results), "of", len(results))
""",
    "crash": """\
import broadsheet
from broadsheet.core.models import load

model, tokenizer = load("pocket-2m-mha")  # built in; or a folder, or a hub name
ids = tokenizer(open("text.txt").read(), return_tensors="pt").input_ids
calibration = ids.unfold(1, 128, 128)[0]  # [samples, tokens]
CRaSh = broadsheet.method("crash")
plan = CRaSh(n_keep=5, n_adapters=2).plan(model, calibration)
plan.save(model, "emulator")  # for whoever has the data; broadsheet crash plug-in takes the tuned layers back
""",
    "quantizing-code-llms": """\
import broadsheet
from broadsheet.core.microworld.code import make_tasks  # or codetasks.load_tasks("humaneval.jsonl.gz")

Study = broadsheet.method("quantizing-code-llms")
factors = {"model": ["pocket-code"], "method": ["rtn"], "precision": [4], "calibration": ["code"]}
results = Study(factors, make_tasks(4), n_samples=1, max_new_tokens=128).run("study.jsonl")
print(list(results.rows()))
""",
    "mlir-cost-model": """\
import broadsheet

MLIRCostModel = broadsheet.method("mlir-cost-model")
report = MLIRCostModel().estimate("program.mlir")  # StableHLO text: jax.jit(f).lower(x).as_text()
for name, one in report.answer.predictions.items():
    print(name, one.value, one.low, one.high)
""",
    "instinct": """\
import broadsheet
from broadsheet.core.chat import connect
from broadsheet.core.models import load
from broadsheet.methods.evals.instinct import own_task

INSTINCT = broadsheet.method("instinct")
model, tokenizer = load("pocket-2m")  # writes candidates; the chat follows them
task = own_task("examples.jsonl")  # lines of {"input": ..., "output": ...}
found = INSTINCT(budget=12, n_init=6).solve(connect("pocket-2m"), task, model, tokenizer, samples=2)
print(found.best, found.tested)
""",
    "sequential-monitors": """\
import broadsheet
from broadsheet.core.chat import connect

SequentialMonitor = broadsheet.method("sequential-monitors")
monitor = SequentialMonitor(connect("pocket-2m"), threshold=0.5)
for request in ("List the files here.", "Read the newest one.", "Send it to this address."):
    if monitor.step(request).flag:
        break
""",
    "spar": """\
import broadsheet
from broadsheet.core.chat import connect

actor = connect("pocket-2m")  # or connect("http://localhost:8000/v1", "qwen3-8b")
SPaR = broadsheet.method("spar")
answer = SPaR(samples=2).solve(actor, "Describe a lighthouse in 50 words without the letter z.")
pairs = SPaR(samples=2).pairs(actor, ["Name three colours, in capitals."])  # prompt, chosen, rejected
""",
}


def _code(slug: str, name: str, bases: tuple[str, ...]) -> str:
    if slug in _OWN:
        return _OWN[slug]
    shapes = {"CacheMethod": _CACHE, "WeightMethod": _WEIGHTS, "Benchmark": _BENCHMARK, "Solver": _LOOP}
    if papers()[slug].family == "estimates":
        return _ESTIMATE.format(name=name, slug=slug)
    shape = _LOSSLESS if slug == "dfloat11" else next((shapes[base] for base in bases if base in shapes), "")
    return shape.format(name=name, slug=slug)
