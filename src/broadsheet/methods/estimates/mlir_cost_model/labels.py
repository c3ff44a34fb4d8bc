"""What a program costs, found out and not predicted: analysis of the text, XLA's compiler, its object code, the clock.

- `peak_live_bytes`: by linear scan over the text. No compiler.
- `compile_text`: XLA's CPU compiler in this process, one thread. Its report of temporary bytes, FLOPs and bytes
  accessed; fusions and kernels after optimisation; and of the object code that it made for this program (`ObjectCode`):
  instructions, vector share, frame traffic. Calls into libraries (large matrix products, convolutions) are in the time
  but not in that code.
- `measure`: CPU time of a call, of many programs by turns. The process is pinned to one core.

All bytes are bytes, all times microseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .stablehlo import Block, Function, Operation, parse

#: what is learnt: name -> unit
TARGETS = {
    "time": "us", "peak_bytes": "bytes", "temp_bytes": "bytes", "kernels": "count", "fusions": "count",
    "instructions": "count", "spills": "count", "vector_util": "share",
}  # fmt: skip


# --- from the text ------------------------------------------------------------------------------------------------------


def peak_live_bytes(function: Function) -> int:
    """The largest sum of live values' bytes at any operation, by one scan from the end to the start.

    A value lives from the operation that makes it to its last reader, both included; at an operation its operands and its
    results exist together. Arguments are held by the caller from start to end. A region adds its own peak on top of what
    is live around it, and keeps outer values that it reads alive to its end.
    """
    held = sum(function.types[name].nbytes for name in function.arguments)
    return held + _peak(function.body, function, set(function.arguments))


def _peak(block: Block, function: Function, outside: set[str]) -> int:
    """The peak of the values that ``block`` itself defines."""
    live: dict[str, int] = {}
    now = peak = 0
    for operation in reversed(block.operations):
        for name in _reads(operation) - outside:
            if name not in live:  # seen from the end, this is the last reader
                live[name] = function.types[name].nbytes
                now += live[name]
        unread = sum(function.types[name].nbytes for name in operation.results if name not in live)
        # What this block defined is outside for a region; of its own arguments the loop holds them.
        inner = max((_inner(region, function) for region in operation.regions), default=0)
        peak = max(peak, now + unread + inner)
        for name in operation.results:
            now -= live.pop(name, 0)
    return max(peak, now)


def _inner(region: Block, function: Function) -> int:
    defined = {name for one in region.operations for name in one.results}
    reads = {name for one in region.operations for name in _reads(one)}
    arguments = sum(function.types[name].nbytes for name in region.arguments)
    return arguments + _peak(region, function, (reads - defined) | set(region.arguments))


def _reads(operation: Operation) -> set[str]:
    """Values from outside that the operation or its regions read."""
    names = set(operation.operands)
    for region in operation.regions:
        defined = set(region.arguments) | {name for one in region.operations for name in one.results}
        names |= {name for one in region.operations for name in _reads(one)} - defined
    return names


# --- object code --------------------------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(
    r"^\s+[0-9a-f]+:\s+(?:(?:rep|repz|repnz|lock|notrack|data16)\s+)*([a-z][a-z0-9]*)\s*([^#<\n]*)", re.MULTILINE
)
_FRAME = re.compile(r"-?(?:0x[0-9a-f]+)?\(%r[sb]p(?:,[^)]*)?\)")
_MOVES = re.compile(r"v?mov(?!msk|nt|mskp)[a-z0-9]*$")
_FLOAT = re.compile(
    r"v?(?:add|sub|mul|div|min|max|sqrt|rsqrt(?:14)?|rcp(?:14)?|cmp\w*|round|rndscale|fn?m(?:add|sub)(?:132|213|231)|scalef)([ps])[sd]$"
)
_PADDING = frozenset(("nop", "nopw", "nopl", "int3", "xchg", "data16", "cs"))


@dataclass(frozen=True)
class ObjectCode:
    """What x86-64 object code consists of.

    ``spills``: moves between registers and the stack frame, the measure of register pressure: values that found no
    register (and what the code keeps in its frame anyhow, for example arrays of accumulators). Saving the caller's
    registers by push and pop is not among them. ``frame_bytes``: the largest frame. ``vector`` and ``scalar``:
    floating-point arithmetic on packed and on single numbers.
    """

    instructions: int
    spills: int
    frame_bytes: int
    vector: int
    scalar: int

    @property
    def vector_util(self) -> float | None:
        """Packed instructions of all floating-point arithmetic; None where there is none."""
        total = self.vector + self.scalar
        return self.vector / total if total else None


def read_assembly(text: str) -> ObjectCode:
    """Counts instructions of ``objdump -d --no-show-raw-insn`` (AT&T syntax)."""
    count, spills, frame = 0, 0, 0
    kinds: Counter[str] = Counter()
    for name, operands in _INSTRUCTION.findall(text):
        if name in _PADDING:
            continue
        count += 1
        if _MOVES.match(name) and _FRAME.search(operands):
            spills += 1
        if name in ("sub", "subq") and (size := re.match(r"\$0x([0-9a-f]+),%rsp", operands)):
            frame = max(frame, int(size[1], 16))
        if hit := _FLOAT.match(name):
            kinds[hit[1]] += 1
    return ObjectCode(count, spills, frame, kinds["p"], kinds["s"])


def disassemble(objects: Sequence[Path]) -> str:
    """The text of object files. Raises ValueError without objdump (binutils)."""
    tool = shutil.which("objdump")
    if tool is None:
        raise ValueError("object code cannot be read without objdump; install binutils")
    if not objects:
        return ""
    command = [tool, "-d", "--no-show-raw-insn", *map(str, objects)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def compile_llvm(ir: str, cpu: str = "haswell") -> ObjectCode:
    """Object code of LLVM IR for a fixed x86-64 ``cpu`` ("haswell": AVX2 and 16 vector registers), by llvmlite at -O3."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(ir)
    machine = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu=cpu, opt=3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        path.write_bytes(machine.emit_object(module))
        return read_assembly(disassemble([path]))


# --- XLA ----------------------------------------------------------------------------------------------------------------


def _flags() -> None:
    """One thread, whatever the caller set for the rest; must come before JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


@cache
def _backend() -> Any:
    _flags()
    try:
        from jax.extend.backend import get_backend
    except ImportError:
        raise ValueError("compiling needs jax: pip install 'broadsheet[mlir]'") from None
    return get_backend("cpu")


@cache
def machine() -> str:
    """The processor's name and its widest vectors."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", info)
    wide = next((flag for flag in ("avx512f", "avx2", "sse4_2") if re.search(rf"\b{flag}\b", info)), "")
    return " ".join(filter(None, (name[1].strip() if name else platform.machine(), wide)))


def compiler_version() -> str:
    from importlib.metadata import version

    return f"jaxlib {version('jaxlib')}"


def compile_text(text: str, inspect: bool = True) -> Compiled:
    """Compiles StableHLO text with XLA for this CPU and reads what came out.

    ``inspect`` False leaves the object code unread, which is faster and enough for times. Raises ValueError where XLA
    refuses.
    """
    from jax import local_devices
    from jaxlib import xla_client

    backend = _backend()
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(dir=place, prefix="xla-"))
    options = xla_client.CompileOptions()
    options.env_option_overrides = [("xla_dump_to", str(folder))] * inspect
    began = time.perf_counter()
    try:
        devices = xla_client.DeviceList(tuple(local_devices(backend="cpu")[:1]))
        loaded = backend.compile_and_load(text, devices, options)
        seconds = time.perf_counter() - began
        code = read_assembly(disassemble(sorted(folder.glob("*.o"))) if inspect else "")
    except Exception as error:
        if type(error).__module__.startswith(("jax", "xla")):
            raise ValueError(f"XLA refuses the program: {str(error).splitlines()[0]}") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Compiled(parse(text), loaded, code, seconds)


@dataclass(frozen=True)
class Timing:
    """Microseconds of CPU time a call: ``time`` of the even rounds, ``again`` of the odd. ``wall``: the same by the clock on
    the wall, of all rounds. ``noise``: what the two differ by, relative to their mean."""

    time: float
    again: float
    wall: float

    @property
    def noise(self) -> float:
        return abs(self.time - self.again) / ((self.time + self.again) / 2)

    def above(self, dispatch: float) -> Timing:
        """Without what a call costs that computes nothing; at least 0.1 us."""
        return Timing(*(max(value - dispatch, 0.1) for value in (self.time, self.again, self.wall)))


@dataclass(frozen=True)
class Compiled:
    """A program that XLA compiled; ``seconds``: how long that took."""

    function: Function
    loaded: Any
    code: ObjectCode
    seconds: float

    def labels(self) -> dict[str, float | None]:
        """Everything but time. ``flops`` and ``bytes`` are XLA's own analysis, for the roofline."""
        hlo = self.loaded.hlo_modules()[0].to_string()
        cost = self.loaded.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        kernels, fusions = count_kernels(hlo)
        return {
            "peak_bytes": peak_live_bytes(self.function),
            "temp_bytes": self.loaded.get_compiled_memory_stats().temp_size_in_bytes,
            "kernels": kernels, "fusions": fusions, "flops": cost.get("flops", 0.0),
            "bytes": cost.get("bytes accessed", 0.0), **asdict(self.code), "vector_util": self.code.vector_util,
            "compile_ms": self.seconds * 1e3,
        }  # fmt: skip


def measure(programs: Sequence[Compiled], rounds: int = 24, block_us: float = 300.0) -> list[Timing]:
    """Times programs by turns: every round runs a block of calls of each, at least 4 and up to ``block_us``.

    Other work on the machine makes a program slower for seconds at a time, by factors of two and more, and a program that
    is timed twice on end looks stable all the same. By turns every program meets the same disturbances, and because these
    only add, the lower quartile over the rounds stands for the program.
    """
    import jax
    import numpy as np

    arguments = [[jax.device_put(one) for one in random_arguments(program.function)] for program in programs]

    def block(place: int, calls: int) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            out = programs[place].loaded.execute_sharded(arguments[place])
        for one in out.disassemble_into_single_device_arrays():
            one[0].block_until_ready()
        return (time.process_time() - cpu) / calls * 1e6, (time.perf_counter() - wall) / calls * 1e6

    calls = []
    for place in range(len(programs)):
        block(place, 2)  # the first call allocates
        calls.append(max(4, min(64, int(block_us / max(block(place, 4)[0], 1.0)))))
    spent = np.array([[block(place, count) for place, count in enumerate(calls)] for _ in range(rounds)])
    cpu, wall = spent[..., 0], spent[..., 1]
    quartiles = zip(*(np.quantile(part, 0.25, 0).tolist() for part in (cpu[::2], cpu[1::2], wall)), strict=True)
    return [Timing(*row) for row in quartiles]


def random_arguments(function: Function, seed: int = 0) -> list[Any]:
    """Standard normal floats and zeros for integers (an index must be in range whatever it indexes)."""
    import numpy as np

    rng, found = np.random.default_rng(seed), []
    for name in function.arguments:
        kind = function.types[name]
        if kind.dtype == "f32":
            found.append(rng.standard_normal(kind.shape, dtype=np.float32))
        elif kind.dtype in ("i1", "i8", "i16", "i32", "i64", "ui8", "ui16", "ui32", "ui64"):
            known = kind.dtype.replace("ui", "uint").replace("i1", "bool") if kind.dtype == "i1" else kind.dtype
            known = known if known == "bool" or known.startswith("u") else known.replace("i", "int")
            found.append(np.zeros(kind.shape, known))
        elif kind.dtype in ("f64", "f16"):
            found.append(rng.standard_normal(kind.shape).astype(kind.dtype.replace("f", "float")))
        else:
            raise ValueError(f"line 1: arguments of type {kind.text} cannot be made up; time the program yourself")
    return found


_COMPUTATION = re.compile(r"^(ENTRY )?%?[\w.-]+ \(.*\) -> .* \{$")
_CALL = re.compile(r"= .*?\s([a-z][a-z0-9-]*)\(")
_FREE = frozenset("parameter constant tuple get-tuple-element bitcast after-all opt-barrier".split())


def count_kernels(hlo: str) -> tuple[int, int]:
    """(kernels, fusions) of optimised HLO text: instructions of the entry that run something, and the fusions among them."""
    kernels = fusions = 0
    entry = False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        elif entry and (hit := _CALL.search(line)) and hit[1] not in _FREE:
            kernels += 1
            fusions += hit[1] in ("fusion", "call")
    return kernels, fusions


def pin() -> int:
    """Keeps this process (and what it starts) on the highest-numbered core it may use; returns that core."""
    if not hasattr(os, "sched_setaffinity"):
        return 0
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


EMPTY = """func.func @main(%arg0: tensor<f32>) -> tensor<f32> {
  return %arg0 : tensor<f32>
}"""


def measure_net(programs: Sequence[Compiled]) -> tuple[list[Timing], float]:
    """(times above what a call costs that computes nothing, that cost), all by turns."""
    *timings, empty = measure([*programs, compile_text(EMPTY, inspect=False)])
    call = min(empty.time, empty.again)
    return [timing.above(call) for timing in timings], call


def label(texts: Sequence[str]) -> list[dict[str, float | None]]:
    """All labels of programs that are timed by turns."""
    compiled = [compile_text(text) for text in texts]
    return [
        {**one.labels(), "time": net.time, "time_again": net.again, "wall": net.wall, "noise": net.noise}
        for one, net in zip(compiled, measure_net(compiled)[0], strict=True)
    ]


def label_for(texts: Sequence[str], isa: str) -> list[dict[str, float | None]]:
    """As `label`, where XLA may use no more than an instruction set ("AVX2", "SSE4_2", ...); in a process of its own,
    because XLA reads that once."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _limit, (isa,)) as pool:
        return pool.submit(label, list(texts)).result()


def _limit(isa: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={isa}".strip()
