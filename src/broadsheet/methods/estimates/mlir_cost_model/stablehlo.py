"""A tolerant reader of StableHLO text (pretty or generic form, and simple linalg, affine, arith, scf) that needs no MLIR.

`parse` gives one `Function` with its calls inlined: operations in program order with operands, result types and regions.
White space, value names, locations and comments leave no trace in it beyond line numbers. It reads well-formed text and
does not verify it: an MLIR build does that. Every error is a one-line ValueError that starts with the line number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

DIALECTS = frozenset("stablehlo chlo mhlo func builtin sdy arith math linalg tensor memref affine scf vector".split())
_BITS = {"index": 64, "bf16": 16, "tf32": 32, "none": 0}
_SCALAR = re.compile(r"(?:bf16|tf32|index|none|f(?:8\w*|16|32|64)|[su]?i(?:1|2|4|8|16|32|64))$")
_RETURNS = frozenset(
    ("return", "func.return", "stablehlo.return", "mhlo.return", "affine.yield", "scf.yield", "linalg.yield")
)
_CALLS = ("call", "func.call")
_LEXEME = re.compile(  # blanks come with what follows them; the most frequent first
    r"""[ \t]*(?:(?P<value>%[\w$.]+(?:\#\d+)?)
    |(?P<type>(?:tensor|memref|vector)<[\w?]+>)
    |(?P<skip>\s+|//[^\n]*)
    |(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<symbol>@(?:[\w$.]+|"[^"]*"))
    |(?P<open>(?:[\#!]?[A-Za-z_][\w.$]*)<)
    |(?P<attr>[\#!][\w.$]+)
    |(?P<block>\^\w+)
    |(?P<number>-?(?:0x[0-9A-Fa-f]+|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?))
    |(?P<word>[A-Za-z_][\w.$]*)
    |(?P<punct>->|[-(){}\[\]<>,:=*?+/|]))""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class TensorType:
    """``text`` without white space; a scalar has the shape (); what is no data (a token) has 0 bytes."""

    text: str
    dtype: str
    shape: tuple[int, ...] = ()

    @cached_property
    def elements(self) -> int:
        return prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the dense array; types below 8 bits take a byte an element, as XLA's CPU backend stores them."""
        return self.elements * ((_width(self.dtype) + 7) // 8)


@dataclass(frozen=True)
class Operation:
    """``results`` and ``operands`` are value names ("%0", "%1#1"); ``attributes``: what else stood there, a string."""

    name: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    types: tuple[TensorType, ...]
    attributes: str
    regions: tuple[Block, ...]
    line: int

    @cached_property
    def opcode(self) -> str:
        """The name without its dialect, where that is StableHLO: "add", "func.call"."""
        return self.name.removeprefix("stablehlo.")


@dataclass(frozen=True)
class Block:
    arguments: tuple[str, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Function:
    """``types``: the type of every value of the function, those in regions too."""

    name: str
    body: Block
    types: dict[str, TensorType]
    public: bool = True

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.body.arguments

    @property
    def operations(self) -> tuple[Operation, ...]:
        return self.body.operations

    def walk(self) -> Iterator[Operation]:
        """Every operation, those of regions after the one that holds them."""
        return _walk(self.body)

    def __len__(self) -> int:
        return sum(1 for _ in self.walk())


def _walk(block: Block) -> Iterator[Operation]:
    for operation in block.operations:
        yield operation
        for region in operation.regions:
            yield from _walk(region)


def parse(text: str) -> Function:
    """The module's function (``@main``, else the only public one) with calls to its other functions inlined.

    Raises ValueError ("line 3: ...") for text that is no such module, dynamic shapes, unknown dialects, values used
    before their definition, and a module without or with several candidates.
    """
    functions = _Reader(text).module()
    if not functions:
        raise ValueError("line 1: no func.func in the text; give the whole function or module")
    public = [function for function in functions.values() if function.public]
    chosen = functions.get("@main") or (public[0] if len(public) == 1 else None)
    if chosen is None:
        raise ValueError(f"line 1: {len(public)} public functions and none is @main; keep one: {', '.join(functions)}")
    return _inlined(chosen, functions, ())


@lru_cache(maxsize=4096)
def tensor_type(text: str, line: int = 0) -> TensorType:
    """The type "tensor<8x64xf32>", "memref<4xf32>", "f32", ... Raises ValueError for dynamic shapes."""
    if not text.startswith(("tensor<", "memref<", "vector<")):
        return TensorType(text, text if _SCALAR.match(text) else "none")
    inner = text[text.index("<") + 1 : -1]
    if "?" in inner or inner.startswith("*"):
        raise ValueError(f"line {line}: dynamic shape {text} is not supported; lower with static shapes")
    inner = inner.split(",")[0]  # an encoding or memory space may follow
    if inner.startswith("complex<"):
        return TensorType(text, inner)
    parts = inner.split("x")
    sizes = []
    while len(parts) > 1 and parts[0].isdigit():
        sizes.append(int(parts.pop(0)))
    return TensorType(text, "x".join(parts), tuple(sizes))


def _width(dtype: str) -> int:
    if dtype.startswith("complex<"):
        return 2 * _width(dtype[8:-1])
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0


class _Lexeme(NamedTuple):
    kind: str
    text: str
    line: int


def _lex(text: str) -> list[_Lexeme]:
    text = text.rstrip()
    found: list[_Lexeme] = []
    at, line, end, match, add, make = 0, 1, len(text), _LEXEME.match, found.append, _Lexeme
    while at < end:
        hit = match(text, at)
        if hit is None:
            raise ValueError(f"line {line}: cannot read {text[at : at + 20].splitlines()[0].lstrip()!r}")
        kind, at = hit.lastgroup or "", hit.end()
        word = hit[kind]
        if kind == "skip":
            line += word.count("\n")
        elif kind == "open":
            at = _balanced(text, at - 1, line, "<", ">")
            kind = "type" if word in ("tensor<", "memref<", "vector<") else "attr"
            whole = text[hit.start("open") : at]
            add(make(kind, "".join(whole.split()), line))
            line += whole.count("\n")
        elif word == "loc" and text[at : at + 1] == "(":
            start, at = at, _balanced(text, at, line, "(", ")")  # a location says where, not what
            line += text.count("\n", start, at)
        else:
            add(make(kind, word, line))
    return found


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|->|[<>()]')


def _balanced(text: str, at: int, line: int, opening: str, closing: str) -> int:
    """The place after the bracket that closes the one at ``at``; strings and arrows are stepped over."""
    depth, start = 0, at
    if opening == "<":  # the common case, a flat type
        close = text.find(">", at)
        if close > 0 and text.find("<", at + 1, close) < 0 and text[close - 1] != "-" and text.find('"', at, close) < 0:
            return close + 1
    for hit in _BRACKETS.finditer(text, at):
        depth += (hit.group() == opening) - (hit.group() == closing)
        if depth == 0:
            return hit.end()
    raise ValueError(f"line {line}: {text[start : start + 20].splitlines()[0]!r} is never closed")


@dataclass
class _Reader:
    text: str
    lexemes: list[_Lexeme] = field(init=False)
    at: int = 0
    types: dict[str, TensorType] = field(default_factory=dict)
    scope: dict[str, str] = field(default_factory=dict)  #: printed name -> name; regions side by side may print the same

    def __post_init__(self) -> None:
        self.lexemes = _lex(self.text)
        last = self.lexemes[-1].line if self.lexemes else 1
        self.lexemes += [_Lexeme("end", "", last)] * 3

    def peek(self, ahead: int = 0) -> str:
        return self.lexemes[self.at + ahead].text

    def fail(self, what: str) -> ValueError:
        return ValueError(f"line {self.lexemes[self.at].line}: {what}")

    def module(self) -> dict[str, Function]:
        """Every function of the text by name; what is around them (module, attribute aliases) is passed over."""
        found: dict[str, Function] = {}
        depth = 0
        while self.lexemes[self.at].kind != "end":
            text, kind = self.peek(), self.lexemes[self.at].kind
            if text in ("func.func", '"func.func"'):
                if text[0] == '"':
                    raise self.fail(
                        "func.func in generic form; print it in pretty form (mlir-opt without -mlir-print-op-generic)"
                    )
                function = self.function()
                found[function.name] = function
                continue
            if kind == "word" and "." in text and depth == 0 and text != "builtin.module":
                raise self.fail(f"{text} stands outside of a function")
            depth += (text in ("{", "(", "[")) - (text in ("}", ")", "]"))
            depth = 0 if text == "{" and self.at and self._module_opens() else depth
            if kind == "value":
                raise self.fail(f"{text} stands outside of a function")
            self.at += 1
        return found

    def _module_opens(self) -> bool:
        """Is the brace at hand the module's, not that of its attributes?"""
        before = self.lexemes[self.at - 1].text
        return before != "attributes" and not (self.lexemes[self.at + 1].kind == "word" and self.peek(2) == "=")

    def function(self) -> Function:
        self.types, self.scope = {}, {}
        self.at += 1
        public = True
        while self.lexemes[self.at].kind == "word":
            public = public and self.peek() != "private"
            self.at += 1
        name = self.peek()
        if self.lexemes[self.at].kind != "symbol":
            raise self.fail(f"a function's name (@name) was expected, not {name or 'the end'!r}")
        self.at += 1
        arguments = self.arguments()
        depth = 0
        while self.peek() != "{" or depth or self.lexemes[self.at - 1].text == "attributes":
            if self.lexemes[self.at].kind == "end" or self.peek() == "func.func":
                raise self.fail(f"{name} has no body")
            depth += (self.peek() in ("{", "(")) - (self.peek() in ("}", ")"))
            self.at += 1
        body = self.region(arguments)
        return Function(name, body, self.types, public)

    def arguments(self) -> tuple[str, ...]:
        """``(%a: type {attributes}, ...)``."""
        names, depth = [], 0
        while True:
            one = self.lexemes[self.at]
            if one.kind == "end":
                raise self.fail("the list of arguments is never closed")
            depth += (one.text in ("(", "{")) - (one.text in (")", "}"))
            if one.kind == "value" and depth == 1 and self.peek(1) == ":":
                names.append(self.define(one.text, self.type_at(self.at + 2)))
            self.at += 1
            if depth == 0:
                return tuple(names)

    def define(self, printed: str, kind: TensorType) -> str:
        """The name of a new value: as printed, made unique."""
        name = printed
        while name in self.types:
            name += "'"
        self.scope[printed], self.types[name] = name, kind
        return name

    def type_at(self, place: int) -> TensorType:
        return tensor_type(self.lexemes[place].text, self.lexemes[place].line)

    def region(self, arguments: tuple[str, ...] = ()) -> Block:
        """``{ operations }`` from its brace; a ``^bb0(%a: type):`` adds arguments. One block a region."""
        opened, outer = self.lexemes[self.at].line, dict(self.scope)
        self.at += 1
        if self.lexemes[self.at].kind == "block":
            self.at += 1
            if self.peek() == "(":
                arguments += self.arguments()
            self.at += 1  # the colon
        operations = []
        while self.peek() != "}":
            if self.lexemes[self.at].kind == "end":
                raise self.fail(f"the brace of line {opened} is never closed")
            if self.lexemes[self.at].kind == "block":
                raise self.fail("several blocks in a region are not supported; lower to structured control flow")
            operations.append(self.operation())
        self.at += 1
        self.scope = outer
        return Block(arguments, tuple(operations))

    def _starts_operation(self, place: int) -> bool:
        one, after = self.lexemes[place], self.lexemes[place + 1]
        if one.kind == "string":
            return after.text == "("
        if one.kind != "word" or after.text == "=":
            return False
        if one.text in _RETURNS or one.text in _CALLS:
            return True
        return "." in one.text and after.text != "," and self.lexemes[place - 1].text not in ("applies", ",")

    def _starts_results(self, place: int) -> bool:
        """``%a =``, ``%a:2 =`` or ``%a, %b =``."""
        while self.lexemes[place].kind == "value":
            place += 1
            if self.lexemes[place].text == ":" and self.lexemes[place + 1].kind == "number":
                place += 2
            if self.lexemes[place].text == "=":
                return True
            if self.lexemes[place].text != ",":
                return False
            place += 1
        return False

    def _opens_region(self) -> bool:
        one = self.lexemes[self.at + 1]
        if one.kind in ("value", "block"):
            return True
        if one.text == "}":
            return self.lexemes[self.at - 1].text in ("do", "cond", "(")
        return (
            self._starts_operation(self.at + 1) and self.lexemes[self.at + 2].text not in ("}", "=")
        ) or one.text in _RETURNS

    def operation(self) -> Operation:
        results: list[str] = []
        if self._starts_results(self.at):
            while self.peek() != "=":
                if self.lexemes[self.at].kind == "value":
                    name, count = self.peek(), 0
                    if self.peek(1) == ":":
                        count = int(self.peek(2))
                        self.at += 2
                    results += [f"{name}#{place}" for place in range(count)] if count else [name]
                self.at += 1
            self.at += 1
        head = self.lexemes[self.at]
        if not self._starts_operation(self.at):
            raise self.fail(f"an operation was expected, not {head.text or 'the end'!r}")
        name = head.text.strip('"')
        if name in _RETURNS:
            name = name if "." in name else "func.return"
        elif name not in _CALLS and name.split(".")[0] not in DIALECTS:
            raise self.fail(f"dialect '{name.split('.')[0]}' is unknown; known: {', '.join(sorted(DIALECTS))}")
        name = "func.call" if name == "call" else name
        self.at += 1
        return self._rest(name, tuple(results), head.line)

    def _rest(self, name: str, results: tuple[str, ...], line: int) -> Operation:
        """All after the operation's name, up to where the next statement starts."""
        start, depth, outer = self.at, 0, dict(self.scope)
        operands: list[str] = []
        inner: list[str] = []  # arguments that its regions bring in: reducer(%a: type), while(%a = %b), for %a = 0 to
        regions, listed, attributes = [], list[TensorType](), list[str]()
        initial: list[str] = []  # what loop arguments start from
        while True:
            one = self.lexemes[self.at]
            if one.kind == "end":
                raise ValueError(f"line {line}: {name} is not finished when the text ends")
            if depth == 0 and self.at > start and (
                one.text == "}" or one.kind == "block" or self._starts_results(self.at) or self._starts_operation(self.at)
            ):  # fmt: skip
                break
            if depth == 0 and self.at == start and (one.text == "}" or self._starts_operation(self.at)):
                break
            if one.text == "{" and self._opens_region():
                regions.append(self.region(tuple(inner)))
                inner = inner if name.endswith(".while") else []
                continue
            if one.text == ":" and depth == 0:
                listed = self.type_list()
                if initial and name.endswith(".while"):
                    self.types.update(zip(inner, listed, strict=False))
                continue
            if one.text == "->" and depth == 0:
                listed = self.type_list()
                continue
            depth += (one.text in ("(", "[", "{", "<")) - (one.text in (")", "]", "}", ">"))
            if one.kind == "value":
                self.operand(one, depth, start, operands, inner, initial)
            elif one.kind not in ("punct", "type") or one.text in "[]":
                attributes.append(one.text)
            elif one.kind == "type":
                self.type_at(self.at)
            self.at += 1
        types = self.result_types(name, results, listed, line)
        self.scope = outer
        results = tuple(self.define(result, kind) for result, kind in zip(results, types, strict=True))
        return Operation(name, results, tuple(operands), types, " ".join(attributes), tuple(regions), line)

    def operand(
        self, one: _Lexeme, depth: int, start: int, operands: list[str], inner: list[str], initial: list[str]
    ) -> None:
        """Files one value: an operand, or an argument that a region of the operation brings in."""
        name, following = one.text, self.peek(1)
        if name not in self.scope:
            if following == "=" and (depth > 0 or self.at == start):
                inner.append(self.define(name, tensor_type("index")))
                initial.append(name)
                return
            if following == ":" and depth > 0:
                inner.append(self.define(name, self.type_at(self.at + 2)))
                return
            raise ValueError(f"line {one.line}: {name} is used before it is defined")
        operands.append(self.scope[name])

    def type_list(self) -> list[TensorType]:
        """Types after ``:`` or ``->``; of ``(a, b) -> c`` those after the arrow."""
        self.at += 1
        found: list[TensorType] = []
        depth = 0
        while True:
            one = self.lexemes[self.at]
            if one.kind in ("type", "attr") or (one.kind == "word" and _SCALAR.match(one.text)):
                found.append(self.type_at(self.at))
            elif one.text == "->":
                found = []
            elif one.text in ("(", ")") and not (one.text == "(" and self.lexemes[self.at + 1].kind in ("value", "end")):
                depth += 1 if one.text == "(" else -1
            elif one.text == "," and (depth or self.lexemes[self.at + 1].kind in ("type", "word", "attr")):
                pass
            else:
                return found
            if depth < 0:
                raise self.fail("a bracket closes that was never opened")
            self.at += 1

    def result_types(
        self, name: str, results: tuple[str, ...], listed: list[TensorType], line: int
    ) -> tuple[TensorType, ...]:
        if not results:
            return ()
        if not listed:
            if name.startswith(("affine.", "arith.", "scf.", "memref.", "linalg.")):
                return (tensor_type("index"),) * len(results)
            raise ValueError(f"line {line}: {name} has no type")
        if len(listed) == 1:
            return tuple(listed) * len(results)
        return tuple(listed[-len(results) :])


def _inlined(function: Function, functions: dict[str, Function], above: tuple[str, ...]) -> Function:
    """``function`` with every call replaced by the callee's operations under fresh names."""
    if function.name in above:
        raise ValueError(f"line 1: {function.name} calls itself; recursion is not supported")
    types = dict(function.types)
    count = 0

    def block(one: Block, names: dict[str, str]) -> Block:
        nonlocal count
        done: list[Operation] = []
        for operation in one.operations:
            operands = tuple(names.get(name, name) for name in operation.operands)
            if operation.name != "func.call":
                regions = tuple(block(region, names) for region in operation.regions)
                if regions or operands != operation.operands:
                    operation = replace(operation, operands=operands, regions=regions)
                done.append(operation)
                continue
            callee = functions.get(operation.attributes.split(" ")[0])
            if callee is None:
                raise ValueError(f"line {operation.line}: the called function {operation.attributes} is not in the text")
            body = _inlined(callee, functions, (*above, function.name))
            count += 1
            fresh = {name: f"{name}.{count}" for name in body.types}
            types.update((fresh[name], kind) for name, kind in body.types.items())
            bound = fresh | dict(zip(body.arguments, operands, strict=True))
            inner = _renamed(body.body, bound)
            last = inner.operations[-1]
            names.update(zip(operation.results, last.operands, strict=True))
            done += inner.operations[:-1]
        return Block(one.arguments, tuple(done))

    return Function(function.name, block(function.body, {}), types, function.public)


def _renamed(block: Block, names: dict[str, str]) -> Block:
    return Block(
        tuple(names[name] for name in block.arguments),
        tuple(
            replace(
                one,
                results=tuple(names[name] for name in one.results),
                operands=tuple(names[name] for name in one.operands),
                regions=tuple(_renamed(region, names) for region in one.regions),
            )
            for one in block.operations
        ),
    )
