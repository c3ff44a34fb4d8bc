"""The second decision of a cost model: how far a loop is unrolled, so that its values still fit into the registers.

A `Kernel` is a loop over vectors of 8 floats that streams through arrays. It is written twice from the same operations: as
affine text, which the model reads, and as LLVM IR, which is compiled and run. Unrolling by u puts u copies of the body
side by side, each with accumulators of its own: that hides the latency of the arithmetic, until values spill to the stack.
The rule: the largest factor whose predicted spills are none.

Labels are those of `labels.compile_llvm` (llvmlite, which needs no XLA): spills and instructions for a processor's name.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .corpus import Row
from .labels import compile_llvm
from .stablehlo import parse
from .tokens import program_id

#: elements of an array that are read (a kernel's arrays stay in the cache), from one array to the next; lanes of a vector
LENGTH, STRIDE, LANES = 1024, 2048, 8
FACTORS = (1, 2, 4, 8, 16)
VECTOR, ARRAY = f"vector<{LANES}xf32>", f"memref<{STRIDE}xf32>"


@dataclass(frozen=True)
class Kernel:
    """``arrays``: that it reads (it has one more to write); ``sums``: accumulators; ``constants``: values that are held
    through the loop; ``body``: writes one copy of the loop's body."""

    template: str
    arrays: int
    sums: int
    constants: tuple[float, ...]
    body: Callable[[Body], None]

    def write(self, factor: int) -> Body:
        """The loop's operations for ``factor`` copies, stage by stage: all copies' first operation, then all second, ..."""
        copies = []
        for copy in range(factor):
            body = Body(self, copy)
            self.body(body)
            copies.append(body)
        together = Body(self, 0)
        together.steps = [body.steps[place] for place in range(len(copies[0].steps)) for body in copies]
        together.new = [new for body in copies for new in body.new]
        return together

    def text(self, factor: int) -> str:
        """Affine."""
        body, step = self.write(factor), LANES * factor
        names = [f"%s{copy}_{n}" for copy in range(factor) for n in range(self.sums)]
        lines = [f"func.func @kernel({', '.join(f'%a{n}: {ARRAY}' for n in range(self.arrays + 1))}) {{"]
        lines += [f"  %c{n} = arith.constant dense<{value}> : {VECTOR}" for n, value in enumerate(self.constants)]
        loop = f"affine.for %i = 0 to {LENGTH} step {step}"
        if names:
            lines.append(f"  %z = arith.constant dense<0.0> : {VECTOR}")
            loop = (
                f"%r:{len(names)} = {loop} iter_args({', '.join(f'{name} = %z' for name in names)})"
                f" -> ({', '.join([VECTOR] * len(names))})"
            )
        lines.append(f"  {loop} {{")
        lines += [f"    {_affine(*one)}" for one in body.steps]
        if names:
            lines.append(f"    affine.yield {', '.join(body.new)} : {', '.join([VECTOR] * len(names))}")
        lines.append("  }")
        for place in range(len(names)):
            lines.append(f"  affine.vector_store %r#{place}, %a{self.arrays}[{place * LANES}] : {ARRAY}, {VECTOR}")
        return "\n".join([*lines, "  return", "}"])

    def llvm(self, factor: int) -> str:
        """The arrays stand one after the other behind one pointer, so that addresses take no registers of their own."""
        body, kind = self.write(factor), f"<{LANES} x float>"
        sums = [f"%s{copy}_{n}" for copy in range(factor) for n in range(self.sums)]
        known = {f"%c{n}": _splat(value) for n, value in enumerate(self.constants)}
        lines = [
            f"declare {kind} @llvm.fma.v{LANES}f32({kind}, {kind}, {kind})",
            f"declare {kind} @llvm.maxnum.v{LANES}f32({kind}, {kind})",
            "define void @kernel(ptr %a) {", "entry:", "  br label %loop", "loop:",
            "  %i = phi i64 [0, %entry], [%next, %loop]",
        ]  # fmt: skip
        lines += [
            f"  {name} = phi {kind} [zeroinitializer, %entry], [{known.get(new, new)}, %loop]"
            for name, new in zip(sums, body.new, strict=True)
        ]
        for place, (op, result, operands) in enumerate(body.steps):
            lines += [f"  {line}" for line in _llvm(op, result, [known.get(one, one) for one in operands], place)]
        lines += [f"  %next = add i64 %i, {LANES * factor}", f"  %more = icmp ult i64 %next, {LENGTH}"]
        lines += ["  br i1 %more, label %loop, label %done", "done:"]
        for place, new in enumerate(body.new):
            lines.append(f"  %o{place} = getelementptr float, ptr %a, i64 {self.arrays * STRIDE + place * LANES}")
            lines.append(f"  store {kind} {new}, ptr %o{place}, align 4")
        return "\n".join([*lines, "  ret void", "}"])


@dataclass
class Body:
    """Writes one copy of a body; names carry the copy's number."""

    kernel: Kernel
    copy: int
    steps: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def emit(self, op: str, *operands: str) -> str:
        """add, sub, mul, max, or fma (a * b + c)."""
        name = f"%v{self.copy}_{len(self.steps)}"
        self.steps.append((op, name, operands))
        return name

    def load(self, array: int, shift: int = 0) -> str:
        return self.emit("load", f"%a{array}", str(LANES * self.copy + shift))

    def store(self, value: str) -> None:
        """Into the last array, where the loop stands."""
        self.steps.append(("store", "", (value, f"%a{self.kernel.arrays}", str(LANES * self.copy))))

    def sum(self, place: int) -> str:
        return f"%s{self.copy}_{place}"

    def constant(self, place: int) -> str:
        return f"%c{place}"

    def carry(self, *new: str) -> None:
        self.new += new


def _affine(op: str, result: str, operands: tuple[str, ...]) -> str:
    if op == "load":
        return f"{result} = affine.vector_load {operands[0]}[%i + {operands[1]}] : {ARRAY}, {VECTOR}"
    if op == "store":
        return f"affine.vector_store {operands[0]}, {operands[1]}[%i + {operands[2]}] : {ARRAY}, {VECTOR}"
    name = {"fma": "math.fma", "max": "arith.maximumf"}.get(op, f"arith.{op}f")
    return f"{result} = {name} {', '.join(operands)} : {VECTOR}"


def _splat(value: float) -> str:
    return f"<{', '.join([f'float {_bits(value)}'] * LANES)}>"


def _bits(value: float) -> str:
    """LLVM writes a float as the bits of the double of the same value."""
    return f"0x{np.float64(np.float32(value)).view(np.uint64):016X}"


def _llvm(op: str, result: str, operands: Sequence[str], place: int) -> list[str]:
    kind = f"<{LANES} x float>"
    if op in ("load", "store"):
        offset = int(operands[-2].removeprefix("%a")) * STRIDE + int(operands[-1])
        address = [f"%j{place} = add i64 %i, {offset}", f"%p{place} = getelementptr float, ptr %a, i64 %j{place}"]
        if op == "load":
            return [*address, f"{result} = load {kind}, ptr %p{place}, align 4"]
        return [*address, f"store {kind} {operands[0]}, ptr %p{place}, align 4"]
    if op in ("fma", "max"):
        name = "fma" if op == "fma" else "maxnum"
        return [f"{result} = call {kind} @llvm.{name}.v{LANES}f32({', '.join(f'{kind} {one}' for one in operands)})"]
    return [f"{result} = f{op} {kind} {operands[0]}, {operands[1]}"]


# --- kernels --------------------------------------------------------------------------------------------------------------


def dots(width: int, tail: int) -> Kernel:
    """Products of one array with ``width`` others, as of a matrix with that many rows."""

    def body(b: Body) -> None:
        x = _tail(b, b.load(0), tail)
        b.carry(*[b.emit("fma", x, b.load(1 + n), b.sum(n)) for n in range(width)])

    return Kernel("dots", width + 1, width, _constants(tail), body)


def polynomial(width: int, tail: int) -> Kernel:
    """Sum of a polynomial of degree 2 ``width`` by Horner's rule."""

    def body(b: Body) -> None:
        x = b.load(0)
        value = b.constant(tail)
        for n in range(2 * width):
            value = b.emit("fma", value, x, b.constant(tail + n + 1))
        b.carry(b.emit("add", b.sum(0), _tail(b, value, tail)))

    return Kernel("polynomial", 1, 1, _constants(tail + 2 * width + 1), body)


def stencil(width: int, tail: int) -> Kernel:
    """A weighted sum of ``width`` + 1 neighbours, written back."""

    def body(b: Body) -> None:
        value = b.emit("mul", b.constant(tail), b.load(0))
        for n in range(width):
            value = b.emit("fma", b.constant(tail + n + 1), b.load(0, n + 1), value)
        b.store(_tail(b, value, tail))

    return Kernel("stencil", 1, 0, _constants(tail + width + 1), body)


def moments(width: int, tail: int) -> Kernel:
    """Sums of the first ``width`` powers."""

    def body(b: Body) -> None:
        x = _tail(b, b.load(0), tail)
        power, new = x, [b.emit("add", x, b.sum(0))]
        for n in range(1, width):
            power = b.emit("mul", power, x)
            new.append(b.emit("add", power, b.sum(n)))
        b.carry(*new)

    return Kernel("moments", 1, width, _constants(tail), body)


def distances(width: int, tail: int) -> Kernel:
    """Squared distances from one array to ``width`` others."""

    def body(b: Body) -> None:
        x = _tail(b, b.load(0), tail)
        new = []
        for n in range(width):
            away = b.emit("sub", x, b.load(1 + n))
            new.append(b.emit("fma", away, away, b.sum(n)))
        b.carry(*new)

    return Kernel("distances", width + 1, width, _constants(tail), body)


def complex_products(width: int, tail: int) -> Kernel:
    """Sums of the complex products of ``width`` pairs of arrays with one."""

    def body(b: Body) -> None:
        real, imaginary = _tail(b, b.load(0), tail), b.load(1)
        new = []
        for n in range(width):
            left, right = b.load(2 + 2 * n), b.load(3 + 2 * n)
            cross = b.emit("mul", imaginary, right)
            new.append(b.emit("sub", b.emit("fma", real, left, b.sum(2 * n)), cross))
            new.append(b.emit("fma", imaginary, left, b.emit("fma", real, right, b.sum(2 * n + 1))))
        b.carry(*new)

    return Kernel("complex_products", 2 * width + 2, 2 * width, _constants(tail), body)


def extremes(width: int, tail: int) -> Kernel:
    """Maxima of the products of neighbouring arrays."""

    def body(b: Body) -> None:
        values = [b.load(n) for n in range(width + 1)]
        values[0] = _tail(b, values[0], tail)
        b.carry(*[b.emit("max", b.sum(n), b.emit("mul", values[n], values[n + 1])) for n in range(width)])

    return Kernel("extremes", width + 1, width, _constants(tail), body)


def mixture(width: int, tail: int) -> Kernel:
    """A weighted sum of ``width`` arrays, written back, and the sum of its squares."""

    def body(b: Body) -> None:
        value = b.emit("mul", b.constant(tail), b.load(0))
        for n in range(1, width):
            value = b.emit("fma", b.constant(tail + n), b.load(n), value)
        value = _tail(b, value, tail)
        b.store(value)
        b.carry(b.emit("fma", value, value, b.sum(0)))

    return Kernel("mixture", width, 1, _constants(tail + width), body)


def _tail(b: Body, value: str, count: int) -> str:
    """``count`` further operations with a constant each."""
    for n in range(count):
        value = b.emit("mul" if n % 2 else "add", value, b.constant(n))
    return value


def _constants(count: int) -> tuple[float, ...]:
    return tuple(0.5 + n / 16 for n in range(count))


KERNELS = (dots, polynomial, stencil, moments, distances, complex_products, extremes, mixture)


def kernels() -> list[Kernel]:
    """All of them, 24 of each kind."""
    return [make(width, tail) for make in KERNELS for width in range(1, 7) for tail in range(4)]


# --- labels and decisions -------------------------------------------------------------------------------------------------


def rows(some: Sequence[Kernel], cpu: str = "haswell") -> list[Row]:
    """Rows for `CostModel.fit`: every kernel by every factor, labelled for a processor. "haswell" has 16 vector registers,
    "skylake-avx512" 32."""
    found = []
    for kernel in some:
        for factor in FACTORS:
            text, code = kernel.text(factor), compile_llvm(kernel.llvm(factor), cpu)
            labels = {"spills": code.spills, "instructions": code.instructions, "noise": 0.0}
            found.append(
                {
                    "id": program_id(parse(text)), "template": kernel.template, "factor": factor, "dialect": "affine",
                    "text": text, "labels": labels, "machine": cpu,
                }
            )  # fmt: skip
    return found


def choose(spills: Sequence[float]) -> int:
    """Place in `FACTORS`: the largest before the first that spills (half a spill counts as none)."""
    fit = 0
    for place, value in enumerate(spills):
        if value >= 0.5:
            break
        fit = place
    return fit


EMPTY = "define void @kernel(ptr %a) {\n  ret void\n}"


@dataclass(frozen=True)
class Compiled:
    """Code that can be called; ``engine`` keeps it. ``arrays``: all of the kernel's, one after the other."""

    engine: Any
    function: Any
    arrays: Any

    @classmethod
    def of(cls, ir: str, arrays: int, cpu: str) -> Compiled:
        import llvmlite.binding as llvm

        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        if cpu == "haswell" and not llvm.get_host_cpu_features().get("avx2"):
            raise ValueError("code for haswell cannot run here: this CPU has no AVX2; take the labels alone")
        machine = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu=cpu, opt=3, jit=True)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(ir), machine)
        engine.finalize_object()
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("kernel"))
        values = np.random.default_rng(0).standard_normal(arrays * STRIDE).astype(np.float32)
        return cls(engine, function, values)

    def seconds(self, calls: int) -> float:
        """Of CPU time, a call."""
        pointer, began = self.arrays.ctypes.data, time.process_time()
        for _ in range(calls):
            self.function(pointer)
        return (time.process_time() - began) / calls


def run_times(some: Sequence[tuple[Kernel, int]], cpu: str = "haswell", rounds: int = 24) -> list[tuple[float, float]]:
    """Nanoseconds of CPU time an element above an empty call, of (kernel, factor) by turns as `labels.measure`: (even
    rounds, odd rounds)."""
    compiled = [Compiled.of(kernel.llvm(factor), kernel.arrays + 1, cpu) for kernel, factor in some]
    compiled.append(Compiled.of(EMPTY, 1, cpu))
    spent = np.array([[one.seconds(300) for one in compiled] for _ in range(rounds)])
    even, odd = (np.quantile(part, 0.25, 0) for part in (spent[::2], spent[1::2]))
    net = [(part[:-1] - part[-1]).clip(1e-10) / LENGTH * 1e9 for part in (even, odd)]
    return list(zip(*(part.tolist() for part in net), strict=True))
