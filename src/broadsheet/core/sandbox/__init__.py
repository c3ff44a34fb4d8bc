"""Runs code that a model wrote: `run(source, tests) -> Outcome`.

Every program gets a process and a session of its own, an empty temporary folder to stand in, an empty environment (but for a
fixed hash seed and UTF-8), no standard input, and limits of wall time, CPU time, address space and open files. Whatever it
does, `run` returns: what is still there at the wall limit is killed with its process group, and output is read but kept only
up to a limit. A program passes when its tests have run to their end; ending early, with whatever exit code, is no pass.

What else it cannot do depends on the guard, see `guard`:

- ``seccomp`` (Linux on x86-64 and arm64, no privileges and no namespaces needed, so inside ordinary containers too): the
  kernel refuses it sockets of every kind, new processes (threads are allowed), signals to and tracing of others, every
  change to the file system, and raising its limits; it has no capabilities, even when started by root.
- ``audit`` (elsewhere): an audit hook refuses Python's own ways to sockets, processes, foreign functions and files for
  writing. This stops accidents and not intent; use a container or another machine for code that you have reason to
  distrust. Java is not run under this guard.

Under both it can read what the user can read (but send it nowhere), and Python code shares its process with the tests, so
code that searches the stack for the verdict's mark can forge a pass. This is meant for code written by models, and not for
an attacker. Python code sees the standard library alone.
"""

from __future__ import annotations

import os
import re
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

from .child import MACHINES

Status = Literal["passed", "failed", "error", "timeout", "memory", "crashed"]
LANGUAGES = ("python", "java")
#: Characters of output and of a message that are kept.
KEPT = 10_000
_CHILD = Path(__file__).with_name("child.py")
_JAVAC_SECONDS = 60.0


class ExecutorMissing(ValueError):
    """A language cannot be run on this machine; the message is one line and says what to do."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    ``status``: ``passed``; ``failed`` (an assertion did not hold); ``error`` (it raised, does not compile, or left before
    its tests had run); ``timeout``; ``memory``; ``crashed`` (a signal ended it). ``message``: the exception or the
    compiler's first words. ``output``: standard output and error, cut. ``seconds`` on the wall, with the interpreter's
    start.
    """

    status: Status
    message: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(source: str, tests: str = "", language: str = "python", seconds: float = 2.0, memory: int = 512 << 20) -> Outcome:
    """Runs ``source`` followed by ``tests``.

    ``language``: "python", or "java", where both together are one file in which a class has a ``main`` that runs the tests
    by ``assert``. ``seconds``: wall time, for Java without compiling. ``memory``: bytes of address space, of heap for Java.
    Raises `ExecutorMissing` for a language that this machine cannot run and ValueError for limits that cannot be meant.
    """
    check_language(language)
    if seconds <= 0 or memory < 64 << 20:
        raise ValueError(f"give a program more than 0 seconds and at least 64 MiB, got {seconds} and {memory} bytes")
    with tempfile.TemporaryDirectory(prefix="broadsheet-") as folder:
        if language == "java":
            return _run_java(f"{source}\n{tests}\n", Path(folder), seconds, memory)
        job = {"mode": "python", "source": source, "tests": tests, "memory": memory}
        return _supervise(job, Path(folder), seconds)


def check_language(language: str) -> None:
    """Raises `ExecutorMissing` when programs in ``language`` cannot be run here."""
    if language not in LANGUAGES:
        raise ExecutorMissing(f"no executor for the language '{language}'; there is one for {' and '.join(LANGUAGES)}")
    if os.name != "posix":
        raise ExecutorMissing("programs are run in a sandbox on Linux and macOS alone; use one of these or WSL")
    if language == "java" and not (shutil.which("java") and shutil.which("javac")):
        raise ExecutorMissing("Java tasks need a JDK: install one (java and javac on the PATH) or leave Java out")
    if language == "java" and guard() != "seccomp":
        raise ExecutorMissing(
            "Java tasks need Linux on x86-64 or arm64, where the kernel can confine the JVM; leave Java out"
        )


@cache
def guard() -> Literal["seccomp", "audit"]:
    """Which guard holds on this machine (see above), tried once."""
    if sys.platform != "linux" or os.uname().machine not in MACHINES:
        return "audit"
    with tempfile.TemporaryDirectory(prefix="broadsheet-") as folder:
        job = {"mode": "python", "source": "", "tests": "", "memory": None, "guard": "seccomp"}
        return "seccomp" if _supervise(job, Path(folder), 10.0).passed else "audit"


# --- one process ------------------------------------------------------------------------------------------------------


def _supervise(job: dict[str, Any], folder: Path, seconds: float) -> Outcome:
    """Starts the child with a job, and sees it to its end."""
    nonce = job.get("nonce") or secrets.token_hex(16)
    job = {"guard": job.get("guard") or guard(), "seconds": seconds, **job, "nonce": nonce}
    reading, writing = os.pipe()
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-s", "-S", "-B", "-P", "-X", "utf8", str(_CHILD), str(writing)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(writing,),
        cwd=folder,
        env={"PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    os.close(writing)
    try:
        _send(process, repr(job).encode("utf-8", "backslashreplace"))
        with os.fdopen(reading, "rb", buffering=0) as report:
            assert process.stdout is not None
            output, verdict, late = _listen(process.stdout, report, start + seconds)
    finally:
        _kill(process)
    spent = time.monotonic() - start
    text = output.decode("utf-8", "replace")
    mark, _, rest = verdict.decode("utf-8", "replace").partition(" ")
    if mark == nonce and not late:
        status, _, message = rest.partition(" ")
        return Outcome(status, message, text, spent)  # type: ignore[arg-type]  # the child's words are ours
    if late or process.returncode == -signal.SIGXCPU:
        return Outcome("timeout", f"not done after {seconds:g} s", text, spent)
    if process.returncode < 0:
        return Outcome("crashed", signal.Signals(-process.returncode).name, text, spent)
    lines = text.strip().splitlines()
    return Outcome("error", lines[-1][:500] if lines else "it left before its tests had run", text, spent)


def _send(process: subprocess.Popen[bytes], job: bytes) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died at once; its output says why
        process.stdin.write(job)
        process.stdin.close()


def _listen(output: IO[bytes], report: IO[bytes], until: float) -> tuple[bytes, bytes, bool]:
    """Reads both pipes to their ends, or to the time ``until``: (output, report, whether time ran out)."""
    kept = {output: bytearray(), report: bytearray()}
    with selectors.DefaultSelector() as selector:
        for opened in kept:
            selector.register(opened, selectors.EVENT_READ)
        while selector.get_map():
            left = until - time.monotonic()
            if left <= 0:
                return bytes(kept[output]), bytes(kept[report]), True
            for key, _ in selector.select(left):
                pipe: Any = key.fileobj
                chunk = os.read(pipe.fileno(), 65536)
                if not chunk:
                    selector.unregister(pipe)
                kept[pipe] += chunk
                del kept[pipe][:-KEPT]  # of a flood, the end
    return bytes(kept[output]), bytes(kept[report]), False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends whatever is left of the child and its group, and takes its exit status."""
    with suppress(ProcessLookupError, PermissionError):  # macOS says the second when only a zombie is left
        os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
    process.wait()
    if process.stdout:
        process.stdout.close()


# --- Java -------------------------------------------------------------------------------------------------------------

#: Calls the ``main`` of whichever class has one and then prints the mark that says that it came back.
_RUNNER = """
class BroadsheetRunner {
    public static void main(String[] names) throws Throwable {
        for (int index = 1; index < names.length; index++) {
            String name = names[index];
            Class<?> type = Class.forName(name, true, BroadsheetRunner.class.getClassLoader());
            java.lang.reflect.Method main;
            try { main = type.getDeclaredMethod("main", String[].class); } catch (NoSuchMethodException none) { continue; }
            main.setAccessible(true);
            try { main.invoke(null, (Object) new String[0]); }
            catch (java.lang.reflect.InvocationTargetException error) { throw error.getCause(); }
            System.out.flush();
            System.out.println("\\n" + names[0]);
            System.out.flush();
            Runtime.getRuntime().halt(0);
        }
        throw new NoSuchMethodException("no class with a main(String[]) that runs the tests");
    }
}
"""


def _run_java(program: str, folder: Path, seconds: float, memory: int) -> Outcome:
    """Compiles (no code of the program runs then) and runs under the guard. A JVM's address space cannot be bounded: its
    heap is."""
    start = time.monotonic()
    public = re.search(r"\bpublic\s+(?:(?:final|abstract|strictfp)\s+)*(?:class|interface|enum|record)\s+(\w+)", program)
    files = {f"{public[1] if public else 'Program'}.java": program, "BroadsheetRunner.java": _RUNNER}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", errors="replace")
    java, javac = str(shutil.which("java")), str(shutil.which("javac"))
    try:
        made = subprocess.run(
            [javac, "-J-Xmx512m", "-J-XX:+UseSerialGC", "-J-XX:TieredStopAtLevel=1", "-proc:none", "-nowarn", *files],
            cwd=folder, env={"LC_ALL": "C.UTF-8"}, stdin=subprocess.DEVNULL, capture_output=True, timeout=_JAVAC_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome("error", f"javac was not done after {_JAVAC_SECONDS:g} s", "", time.monotonic() - start)
    if made.returncode:
        said = made.stderr.decode("utf-8", "replace")
        return Outcome("error", said.strip().partition("\n")[0][:500], said[-KEPT:], time.monotonic() - start)
    classes = sorted(
        path.stem for path in folder.glob("*.class") if "$" not in path.stem and path.stem != "BroadsheetRunner"
    )
    nonce = secrets.token_hex(16)
    flags = ["-ea", f"-Xmx{memory >> 20}m", "-Xss4m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
    argv = [java, *flags, "-cp", str(folder), "BroadsheetRunner", nonce, *classes]
    ended = _supervise({"mode": "exec", "argv": argv, "memory": None, "nonce": nonce}, folder, seconds)
    if ended.status == "timeout":
        return ended
    text, mark, _ = ended.output.partition(f"\n{nonce}")
    if mark:
        return Outcome("passed", "", text, ended.seconds)
    thrown = re.search(r"^Exception in thread .*? ([\w.$]+(?:Error|Exception)\b.*)$", text, re.M)
    message = thrown[1] if thrown else ended.message
    kinds: dict[str, Status] = {"java.lang.AssertionError": "failed", "java.lang.OutOfMemoryError": "memory"}
    status = next((kind for name, kind in kinds.items() if message.startswith(name)), ended.status)
    return Outcome(status, message[:500], text, ended.seconds)
