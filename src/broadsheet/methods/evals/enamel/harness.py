"""What runs in the sandbox: times the samples of one problem beside its reference, every run in a fresh process.

The first process (the *judge*) makes the inputs, forks a *starter* for each sample, and only then reads the reference and
the checker from its standard input, so that no process that runs a sample has ever held the answers. For every run a starter
forks a process that takes the strictest filter, defines the sample, and times one call with clocks taken beforehand. Outputs
come back as bytes, which a further process of the judge's compares with the answer; none of them is ever unpickled. At the
end the judge prints all times as one line of JSON.
"""

import contextlib
import gc
import io
import itertools
import json
import marshal
import os
import random
import select
import signal
import string
import struct
import sys
import time

import confine

#: Loaded before the clock runs: an import within a function costs a fresh process what it cost the official evaluator once.
for _name in ("bisect", "collections", "copy", "decimal", "fractions", "functools", "hashlib", "heapq", "math", "operator",
              "re", "statistics", "typing"):  # fmt: skip
    __import__(_name)

#: how a run ended
DONE, MEMORY, OVERFLOW, RAISED, LATE, DIED = b"o", b"m", b"v", b"x", b"t", b"d"
_SETUP_SECONDS, _MOST_OUTPUT = 10.0, 1 << 28
_ASK, _TOLD = struct.Struct(">IIdQ"), struct.Struct(">cI")
_TIMES = struct.Struct(">ddQ")

# --- what the official input generators call ------------------------------------------------------------------------------


def rand_parens(size, valid=True, par="()", sep=""):
    """A balanced sequence of ``size`` brackets (an even number), its groups joined by ``sep``, or listed when that is None;
    or, not ``valid``, one that closes a bracket too early."""
    if not valid:
        half = (size + 1) // 2 - 1
        return rand_parens(half, par=par) + par[::-1] + rand_parens(half, par=par)
    groups, depth = [], 0
    for left in range(size + size % 2, 0, -1):
        if depth == 0 or (depth < left and random.randint(0, 1)):
            if depth == 0:
                groups.append("")
            groups[-1] += par[0]
            depth += 1
        else:
            groups[-1] += par[1]
            depth -= 1
    return groups if sep is None else sep.join(groups)


def miller_rabin(n, k=5):
    """Whether n is probably prime, after k random witnesses."""
    if n < 4 or n % 2 == 0:
        return n in (2, 3)
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1

    def witness(a):
        x = pow(a, odd, n)
        if x in (1, n - 1):
            return False
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                return False
        return True

    return not any(witness(random.randint(2, n - 2)) for _ in range(k))


def rand_probably_prime(low, high=None):
    """A random prime of [low, high]; of [n/2, n] when given one number."""
    low, high = (max(low, 3) // 2, max(low, 3)) if high is None else (max(low, 0), max(2 * low, high, 3))
    while True:
        n = random.randint(low, high)
        if miller_rabin(n):
            return n


def rand_primality(size, lid, cid):
    """A number to be tested: fixed hard ones at first, then primes, their squares and products of two."""
    fixed = (2 * 3 * 5 * 7 * 11 * 13 + 1, 561, 2, 125)
    if lid == 0 and cid < len(fixed):
        return fixed[cid]
    size = max(size, 4)
    root = int(size**0.5 + 1)
    if cid % 3 == 0:
        return rand_probably_prime(size)
    first = rand_probably_prime(root)
    return first * (first if cid % 3 == 1 else rand_probably_prime(root))


GENERATING = {
    "random": random, "string": string, "time": time, "rand_parens": rand_parens, "miller_rabin": miller_rabin,
    "rand_probably_prime": rand_probably_prime, "rand_primality": rand_primality,
}  # fmt: skip


def make_inputs(problem, seed, number, n_tests):
    """Every case's arguments as bytes, by level; the seed of a case is seed ^ problem ^ (seed of its place)."""
    scope: dict = dict(GENERATING)
    exec(problem["prompt"] + "\n" + problem["input_generator"], scope)
    levels, place = [], 0
    for level, (size, tests) in enumerate(zip(problem["levels"], n_tests)):
        cases = []
        for case in range(tests):
            random.seed(seed ^ number ^ (place + case))
            cases.append(marshal.dumps(scope["generate_input"](size=size, lid=level, cid=case)))
        place += tests
        levels.append(cases)
    return levels


# --- a run ----------------------------------------------------------------------------------------------------------------


def run_sample(source, entry, given, warm, count, out, quiet, most):
    """In a process of its own: defines the sample, calls it ``count`` times, writes what came of it, and is gone. ``warm``:
    another input, for a call before, or None; ``most``: how many instructions it may execute, 0 uncounted."""
    wall, cpu, write, leave, pack = time.perf_counter, time.thread_time, os.write, os._exit, _TIMES.pack
    dump, load = marshal.dumps, marshal.loads

    def send(data):
        view = memoryview(data)
        while view:
            view = view[write(out, view) :]

    def late():
        send(_TOLD.pack(LATE, 0))
        leave(0)

    start, stop, executed = _counter(most, late) if most else (int, int, int)  # int() does nothing

    def defined():
        scope: dict = {"__name__": "sample", "time": time}
        if quiet:
            scope |= {"print": None, "input": None}  # the official evaluator's: a solution neither prints nor asks
        exec(compile(source, "<sample>", "exec"), scope)
        return scope[entry]

    times, outputs = [], []
    try:
        if warm is not None:  # or the first touch of shared pages, tens of microseconds, would be timed
            with contextlib.suppress(Exception):
                defined()(*load(warm))
        for _ in range(count):
            function, arguments = defined(), load(given)
            write(out, b"b")
            start()
            c0 = cpu()
            t0 = wall()
            output = function(*arguments)
            t1 = wall()
            c1 = cpu()
            stop()
            times.append(pack(t1 - t0, c1 - c0, executed()))
            outputs.append(dump(output, 2))
    except MemoryError:
        outcome, message = MEMORY, b""
    except OverflowError:
        outcome, message = OVERFLOW, b""
    except BaseException as error:
        outcome, message = RAISED, f"{type(error).__name__}: {error}"[:200].encode("utf-8", "replace")
    else:
        outcome, message = DONE, b""
    lengths = b"".join(struct.pack(">Q", len(one)) + one for one in outputs)
    body = b"".join(times) + lengths if outcome == DONE else message
    send(_TOLD.pack(outcome, len(body)) + body)
    leave(0)


def _counter(most, late):
    """(start, stop, how many byte-code instructions were executed in the last span); after ``most``: ``late()``.

    By `sys.monitoring` (Python 3.12), before that by the trace function. The sample can reach neither: one is taken away,
    and a change of the other is refused.
    """
    executed = 0

    def one(code, offset):
        nonlocal executed
        executed += 1
        if executed > most:
            late()

    if sys.version_info >= (3, 12):
        monitoring, mine = sys.monitoring, sys.monitoring.PROFILER_ID
        del sys.monitoring
        sys.modules.pop("sys.monitoring", None)
        event, choose = monitoring.events.INSTRUCTION, monitoring.set_events
        monitoring.use_tool_id(mine, "instructions")
        monitoring.register_callback(mine, event, one)

        def start():
            nonlocal executed
            executed = 0
            choose(mine, event)

        return start, lambda: choose(mine, 0), lambda: executed

    allowed: list[bool] = []
    settrace = sys.settrace

    def keep(event, arguments):
        if event in ("sys.settrace", "sys.setprofile") and not (allowed and allowed.pop()):
            raise PermissionError(1, "a sample may not change how it is counted")

    def trace(frame, event, argument):
        if event == "opcode":
            one(None, None)
        elif event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace

    def set_to(function):
        allowed.append(True)
        settrace(function)

    def begin():
        nonlocal executed
        executed = 0
        set_to(trace)

    sys.addaudithook(keep)
    return begin, lambda: set_to(None), lambda: executed


class Starter:
    """A process that starts runs of one program, and the judge's ends of the pipes to it."""

    def __init__(self, source, entry, inputs, quiet, clock):
        command, self.command = os.pipe()
        self.result, result = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _only(command, result)
            _serve(command, result, source, entry, inputs, quiet, clock)
        os.close(command)
        os.close(result)

    def run(self, case, count, seconds, most):
        """(how it ended, its times, its outputs as bytes or the message)."""
        os.write(self.command, _ASK.pack(case, count, seconds, most))
        kind, size = _TOLD.unpack(_exactly(self.result, _TOLD.size))
        body = _exactly(self.result, size)
        if kind != DONE:
            return kind, [], body.decode("utf-8", "replace")
        place, times, outputs = 0, [], []
        try:
            for _ in range(count):
                times.append(_TIMES.unpack_from(body, place))
                place += _TIMES.size
            for _ in range(count):
                (length,) = struct.unpack_from(">Q", body, place)
                outputs.append(body[place + 8 : place + 8 + length])
                place += 8 + length
        except struct.error:
            return DIED, [], "what it sent cannot be read"
        if place != len(body) or any(not (t >= 0 and c >= 0) for t, c, _ in times):
            return DIED, [], "what it sent cannot be read"
        return DONE, times, outputs


def _only(*kept):
    """Closes every file but these; standard ones are empty and take nothing; Python's keep what is printed."""
    low = 0
    for handle in sorted(kept):
        os.closerange(low, handle)
        low = handle + 1
    os.closerange(low, 4096)
    for _ in range(3):
        os.open("/dev/null", os.O_RDONLY)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()


def _serve(command, result, source, entry, inputs, quiet, clock):
    """The life of a starter."""
    given, untimed = list(itertools.chain.from_iterable(inputs)), len(inputs[0])
    gc.collect()
    gc.freeze()
    gc.disable()  # while a run is timed, as in the official evaluator
    while asked := os.read(command, _ASK.size):
        case, count, seconds, most = _ASK.unpack(asked)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            for handle in (command, result, reading):
                os.close(handle)
            confine.confine(threads=clock == "wall")  # another thread's work would not be counted
            warm = given[untimed - 1] if case >= untimed and not most else None
            run_sample(source, entry, given[case], warm, count, writing, quiet, most)
        os.close(writing)
        told = _hear(reading, count, seconds)
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        view = memoryview(told)
        while view:
            view = view[os.write(result, view) :]
    os._exit(0)


def _hear(reading, count, seconds):
    """What a run sends, up to its limits: every call may take so many seconds from when it says that it begins."""
    told, begun, until = bytearray(), 0, time.monotonic() + _SETUP_SECONDS
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return _TOLD.pack(LATE, 0)
        chunk = os.read(reading, 1 << 20)
        if not chunk:
            break
        if begun < count and not told:
            while begun < count and chunk[:1] == b"b":
                chunk, begun, until = chunk[1:], begun + 1, time.monotonic() + seconds
        told += chunk
        if told:
            until = max(until, time.monotonic() + seconds)
        if len(told) > _MOST_OUTPUT:
            return _TOLD.pack(MEMORY, 0)
    if len(told) >= _TOLD.size:
        kind, size = _TOLD.unpack_from(told)
        if len(told) == _TOLD.size + size and kind in (DONE, MEMORY, OVERFLOW, RAISED, LATE):
            return bytes(told)
    return _TOLD.pack(DIED, 0)


def _exactly(handle, size):
    data = bytearray()
    while len(data) < size:
        chunk = os.read(handle, min(size - len(data), 1 << 20))
        if not chunk:
            raise SystemExit("a starter is gone")
        data += chunk
    return bytes(data)


# --- the judge -------------------------------------------------------------------------------------------------------------


def accepted(check, given, answer, output):
    """Whether the checker, in a process of its own, takes an output: reading it must harm nobody."""
    child = os.fork()
    if not child:
        verdict = 1
        try:
            confine.confine()
            verdict = 0 if check(marshal.loads(given), marshal.loads(answer), marshal.loads(output)) else 1
        finally:
            os._exit(verdict)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def judge():
    confine.control("dumpable", 0)  # no process here may look into another
    with open("public", "rb") as file:
        job = marshal.load(file)
    problem, hardness, clock = job["problem"], job["hardness"], job["clock"]
    prompt, entry = problem["prompt"], problem["entry_point"]
    inputs = make_inputs(problem, job["seed"], job["number"], job["n_tests"])
    samples = [Starter(f"{prompt}\n{code}", entry, inputs, True, clock) for code in job["codes"]]
    secret = marshal.loads(sys.stdin.buffer.read())
    reference = Starter(f"{prompt}\n{secret['reference']}", entry, inputs, False, clock)
    again = Starter(f"{prompt}\n{secret['reference']}", entry, inputs, False, clock)
    scope: dict = {}
    exec(f"{prompt}\n    pass\n{secret['checker']}", scope)
    check = scope["__check"]

    # A first round gives the answers, warms up, and says for how long samples may run.
    which = {"wall": 0, "cpu": 1, "instructions": 2}[clock]
    answers, longest, slowest = {}, 0.0, 0.0
    unlimited = 1 << 62 if clock == "instructions" else 0
    places = [(level, case) for level, cases in enumerate(inputs) for case in range(len(cases))]
    for number, (level, _) in enumerate(places):
        kind, times, outputs = reference.run(number, 1, 60.0, unlimited)
        if kind != DONE:
            raise SystemExit(f"the reference failed at level {level}: {kind.decode()} {outputs}")
        answers[number] = outputs[0]
        if hardness[level]:
            longest, slowest = max(longest, times[0][0]), max(slowest, times[0][which])
    # By the wall clock a run is cut a little after its limit; by another clock load must not cut it.
    patience = 1.25 * job["alpha"] * longest + job["tol"] + 0.05
    if clock != "wall":
        patience = 4 * patience + 1.0
    limit = job["alpha"] * slowest + job["tol"] * (job["instructions_a_second"] if unlimited else 1.0)
    most = unlimited and int(limit) + 1

    base: list = [[[] for _ in cases] for cases in inputs]
    runners = [again, *samples]
    found: list[dict] = [{"outcome": "done", "level": len(inputs), "message": "", "times": []} for _ in runners]
    for one in found:
        one["times"] = [[[] for _ in cases] for cases in inputs]
    agreed: list[dict] = [{} for _ in runners]
    for number, (level, case) in enumerate(places):
        repeats = job["repeats"] if hardness[level] else 1
        # A case's first run is always alone: what is far too slow is not waited for again.
        for batch in [1] * repeats if job["isolate"] else [1, repeats - 1]:
            if not batch:
                continue
            if hardness[level]:
                kind, times, outputs = reference.run(number, batch, 60.0, unlimited)
                if kind != DONE:
                    raise SystemExit(f"the reference failed at level {level}: {kind.decode()} {outputs}")
                base[level][case] += [one[which] for one in times]
            for index, runner in enumerate(runners):
                one = found[index]
                if one["outcome"] != "done":
                    continue
                kind, times, outputs = runner.run(number, batch, patience * batch, most)
                if kind != DONE:
                    name = {MEMORY: "memory", OVERFLOW: "overflow", LATE: "timeout"}.get(kind, "error")
                    one.update(outcome=name, level=level, message=outputs or "")
                    continue
                for output in outputs:
                    if agreed[index].get(number) != output:
                        if not accepted(check, inputs[level][case], answers[number], output):
                            one.update(outcome="wrong", level=level, message=f"wrong output in case {case}")
                            break
                        agreed[index][number] = output
                else:
                    one["times"][level][case] += [t[which] for t in times]
                    if max(t[which] for t in times) > 1.25 * limit:
                        one.update(outcome="timeout", level=level)
    print(json.dumps({"reference": base, "again": found[0], "samples": found[1:]}))
    sys.stdout.flush()


if __name__ in ("__main__", "main"):
    judge()
