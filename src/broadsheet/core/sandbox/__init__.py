"""Runs programs that a model wrote: `run(source, tests) -> Verdict`, `Sandbox(...).run(files, entry) -> Verdict`.

Every program gets a process, an empty work folder and an empty environment (but for a fixed hash seed and UTF-8) of its own,
and limits of wall time, CPU time, address space, processes, file sizes, open files and output. Whatever it does, `run`
returns, and nothing of it is left. Python programs see the standard library alone.

How a program ends is one of six (`Verdict.status`): ``pass`` (a Python program has run to its end: leaving early, with
whatever exit code and whatever it printed, is no pass; a command has left with exit code 0), ``fail``, ``timeout``, ``oom``,
``killed`` (a signal ended it), and ``sandbox_error`` (it could not be run at all), which is never a pass or a fail.

What else it cannot do depends on the backend, chosen by trying in this order (`backend()` tells which; so does
``broadsheet doctor``):

- ``bubblewrap``: namespaces made by bubblewrap (Debian's package of this name), the seccomp filter within.
- ``namespaces``: the same namespaces, made here, where the kernel lets ordinary users have them (5.12 or later). In both the
  program sees a read-only system (``/usr`` and the like, no home, no other files, no other processes) and, where it may
  write, a work folder in memory of limited size; it has a network of its own without a way out.
- ``seccomp`` (no privileges and no namespaces needed, so inside ordinary containers too): the kernel refuses it sockets of
  every kind, new processes (threads are allowed), signals to and tracing of others, every change to the file system, and
  raising its limits. Where the kernel has Landlock, it reads only what the namespaces would show it and may write into its
  folder; without Landlock it can read what the user can read (but send it nowhere) and cannot be allowed to write.
- ``rlimits`` (elsewhere, macOS): limits, and an audit hook that refuses Python's own ways to sockets, processes, foreign
  functions and files. This stops accidents and not intent, so it is never chosen unless asked for, by
  ``Sandbox(allow_unsafe=True)`` or the environment variable ``BROADSHEET_UNSAFE_SANDBOX=1``, and warns.

Linux on x86-64 and arm64 has the first three. The filter of all three refuses sockets, powers, tracing and namespaces, and a
program has no capabilities; where root starts it, it runs as a user of its own. Under all four, Python code shares its
process with the tests, so code that searches the stack can forge a pass. This is meant for code written by models, and not
for an attacker.

C++ (``language="cpp"``) is compiled with g++ and Java with javac, in the sandbox too.
"""

from __future__ import annotations

import contextlib
import marshal
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
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from glob import glob
from itertools import count
from pathlib import Path
from typing import Any, Literal

from . import child as child
from . import confine as confine

Status = Literal["pass", "fail", "timeout", "oom", "killed", "sandbox_error"]
Backend = Literal["bubblewrap", "namespaces", "seccomp", "rlimits"]
LANGUAGES = ("python", "java", "cpp")
#: Bytes of standard output, and of standard error, that `run` keeps.
KEPT = 64_000
_COMPILE_SECONDS = 60.0
#: Users that systemd, too, gives out for the length of a program; in turn, so that programs at once share none.
_DYNAMIC_USERS = range(61184, 65520)
_turn = count(secrets.randbelow(len(_DYNAMIC_USERS)))


class ExecutorMissing(ValueError):
    """A language or a setting cannot be had on this machine; the message is one line and says what to do."""


@dataclass(frozen=True)
class Verdict:
    """How a program ended; see the module for ``status``.

    ``exit_code``: as the shell has it, or minus the number of the signal that ended it; None when it never began.
    ``stdout``: its beginning; ``stderr``: its end; ``cut``: whether either was longer than was kept. ``wall_s`` from the
    program's start, without the sandbox's; ``cpu_s`` of it and the processes it waited for; ``max_rss``: bytes. ``message``:
    the exception, the compiler's first words, or why it was ended. ``files``: what `Sandbox.run` collected.
    """

    status: Status
    exit_code: int | None = None
    stdout: str = ""
    stderr: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    max_rss: int = 0
    message: str = ""
    cut: bool = False
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def passed(self) -> bool:
        return self.status == "pass"

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@dataclass(frozen=True)
class Sandbox:
    """Runs programs of several files.

    ``backend``: "auto" or one of the four. ``disk_mb``: how much it may write into its work folder; 0: nothing at all.
    ``processes``: how many it may have beside its threads; with 1 the kernel refuses any other (with more, threads count).
    ``readable``: further files and folders that it may read. ``allow_unsafe``: whether "rlimits" may be chosen.
    """

    backend: Literal["auto"] | Backend = "auto"
    disk_mb: int = 64
    processes: int = 1
    readable: tuple[str, ...] = ()
    allow_unsafe: bool = False

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "bubblewrap", "namespaces", "seccomp", "rlimits"):
            raise ValueError(f"there is no backend '{self.backend}'; take auto, bubblewrap, namespaces, seccomp or rlimits")
        if self.disk_mb < 0 or self.processes < 1:
            raise ValueError(f"disk_mb is at least 0 and processes at least 1, got {self.disk_mb} and {self.processes}")

    def run(
        self,
        files: Mapping[str, str | bytes],
        entry: Sequence[str],
        *,
        timeout: float = 10.0,
        memory_mb: int | None = 1024,
        stdin: str | bytes = "",
        max_output: int = KEPT,
        end_marker: bool = True,
        collect: Sequence[str] = (),
    ) -> Verdict:
        """Writes ``files`` (relative name -> contents) into an empty work folder and runs ``entry`` there.

        ``entry``: a command, found on the sandbox's PATH or relative to the folder (``./program``). ``["python", "main.py",
        ...]`` runs one of the files in this interpreter's version; with ``end_marker`` it passes only if it has run to its
        end, else (for programs that are judged by their output) if its exit code is 0. ``timeout``: seconds of wall time.
        ``memory_mb`` of address space, a process; None is no limit. ``max_output``: bytes kept of each stream. ``collect``:
        files to hand back afterwards, by name or as ``*.ending``. Raises ValueError for what cannot be meant.
        """
        if not entry:
            raise ValueError("there is nothing to run: entry is a command, such as ['python', 'main.py']")
        for name in files:
            if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
                raise ValueError(f"names of files are relative to the work folder and stay in it, got '{name}'")
        written = {name: text if isinstance(text, bytes) else _bytes(text) for name, text in files.items()}
        parts, command = [], list(entry)
        if entry[0] in ("python", "python3"):
            if len(entry) > 1 and entry[1] in written:
                parts, command = [(entry[1], written[entry[1]])], []
            else:
                command[:1] = [*_interpreter(), "-s", "-S", "-B", "-P"]
        elif not entry[0].startswith((".", "/")):
            found = shutil.which(entry[0], path=_PATH)
            if not found:
                raise ExecutorMissing(f"there is no command '{entry[0]}' on {_PATH}: install it")
            command[0] = found
        return self._go(
            parts, command, written, timeout, memory_mb and memory_mb << 20, stdin, max_output, list(entry[1:]),
            end_marker, collect,
        )  # fmt: skip

    def _go(
        self,
        parts: Sequence[tuple[str, str | bytes]],
        command: list[str],
        files: Mapping[str, bytes],
        timeout: float,
        memory: int | None,
        stdin: str | bytes = "",
        max_output: int = KEPT,
        arguments: Sequence[str] = ("",),
        end_marker: bool = True,
        collect: Sequence[str] = (),
    ) -> Verdict:
        """Runs Python ``parts``, or a ``command``."""
        if timeout <= 0 or (memory is not None and memory < 64 << 20) or max_output < 0:
            raise ValueError(
                f"give a program more than 0 seconds and at least 64 MiB, got {timeout} and {memory} bytes, and keep at "
                f"least 0 bytes of output, got {max_output}"
            )
        job = {
            "parts": list(parts), "argv": command or None, "arguments": list(arguments), "files": dict(files),
            "seconds": timeout, "cpu": timeout, "memory": memory, "disk": self.disk_mb << 20, "processes": self.processes,
            "collect": list(collect), "most_collected": self.disk_mb << 20, "open_files": 256,
        }  # fmt: skip
        return _supervise(job, self._machine(), self.readable, stdin, max_output, end_marker)

    def _machine(self) -> _Machine:
        """The backend to use, checked against the settings."""
        if os.name != "posix":
            raise ExecutorMissing("programs are run in a sandbox on Linux and macOS alone; use one of these or WSL")
        unsafe = self.allow_unsafe or os.environ.get("BROADSHEET_UNSAFE_SANDBOX") == "1"
        names = _ORDER if self.backend == "auto" else (self.backend,)
        for name in names:
            if name == "rlimits" and not unsafe:
                continue
            machine = _try(name)
            if machine is None:
                continue
            if name == "rlimits":
                warnings.warn(
                    "UNSAFE: nothing but resource limits and an audit hook confines the program; use it only in a container "
                    "or a machine that may be lost",
                    stacklevel=4,
                )
            elif self.disk_mb and name == "seccomp" and not _landlock():
                raise ExecutorMissing(
                    "writing cannot be confined to a folder here: install bubblewrap, or set disk_mb=0 (nothing is written)"
                )
            if self.processes > 1 and os.geteuid() == 0 and not machine.drops and name != "rlimits":
                raise ExecutorMissing("the processes of a program that root runs cannot be limited: run as another user")
            return machine
        if self.backend == "auto" or (self.backend == "rlimits" and not unsafe):
            raise ExecutorMissing(
                "the kernel confines programs on Linux (x86-64, arm64) alone; allow_unsafe=True or "
                "BROADSHEET_UNSAFE_SANDBOX=1 runs them with mere resource limits"
            )
        raise ExecutorMissing(f"the backend '{self.backend}' does not work here; use 'auto'")


def run(
    source: str,
    tests: str = "",
    language: str = "python",
    seconds: float = 2.0,
    memory: int = 512 << 20,
    stdin: str = "",
    sandbox: Sandbox | None = None,
) -> Verdict:
    """Runs ``source`` followed by ``tests``, in a sandbox in which nothing can be written (or in ``sandbox``).

    ``language``: "python"; "java", where both together are one file in which a class has a ``main`` that runs the tests by
    ``assert``; "cpp", where both together are one file with a ``main``, compiled by g++ as C++17 with ``-O2``, which passes
    with exit code 0. ``stdin``: what it reads; its answer is ``stdout``. A compiled program is kept for the next ``stdin``.
    ``seconds``: wall time, without compiling. ``memory``: bytes of address space, of heap for Java.
    Raises `ExecutorMissing` for a language that this machine cannot run and ValueError for limits that cannot be meant.
    """
    check_language(language)
    box = sandbox or Sandbox(disk_mb=0)
    if language == "python":
        return box._go([("<source>", source), ("<tests>", tests)], [], {}, seconds, memory, stdin)
    if seconds <= 0 or memory < 64 << 20:
        raise ValueError(f"give a program more than 0 seconds and at least 64 MiB, got {seconds} and {memory} bytes")
    if language == "cpp":
        made = _compiled(_compiled_cpp, f"{source}\n{tests}\n", box)
        if not made.passed:
            return made
        ended = box._go([], ["./program"], made.files, seconds, memory, stdin)
        if ended.status == "killed" and "std::bad_alloc" in ended.stderr:
            ended = replace(ended, status="oom", message="std::bad_alloc")
        return ended
    return _run_java(f"{source}\n{tests}\n", box, seconds, memory, stdin)


def run_many(
    programs: Iterable[Mapping[str, Any]], workers: int | None = None, sandbox: Sandbox | None = None
) -> list[Verdict]:
    """The verdicts of many programs, in order; each is the arguments of `run`, or of `Sandbox.run` where it has ``files``.

    ``workers``: how many run at once, by default one a core.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is at least 1, got {workers}")

    def one(program: Mapping[str, Any]) -> Verdict:
        if "files" in program:
            return (sandbox or Sandbox()).run(**program)
        return run(**{"sandbox": sandbox, **program})

    with ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="sandbox") as pool:
        return list(pool.map(one, programs))


def check_language(language: str, allow_unsafe: bool = False) -> None:
    """Raises `ExecutorMissing` when programs in ``language`` cannot be run here."""
    if language not in LANGUAGES:
        raise ExecutorMissing(f"no executor for the language '{language}'; there is one for {' and '.join(LANGUAGES)}")
    machine = Sandbox(disk_mb=0, allow_unsafe=allow_unsafe)._machine()
    if language == "java" and not (shutil.which("java") and shutil.which("javac")):
        raise ExecutorMissing("Java tasks need a JDK: install one (java and javac on the PATH) or leave Java out")
    if language == "java" and machine.backend == "rlimits":
        raise ExecutorMissing(
            "Java tasks need Linux on x86-64 or arm64, where the kernel can confine the JVM; leave Java out"
        )
    if language == "cpp" and not shutil.which("g++"):
        raise ExecutorMissing("C++ programs need a compiler: install g++")


# --- backends -----------------------------------------------------------------------------------------------------------

_ORDER: tuple[Backend, ...] = ("bubblewrap", "namespaces", "seccomp", "rlimits")
_PATH = "/usr/local/bin:/usr/bin:/bin"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True)
class _Machine:
    """A backend that works here; ``drops``: whether root is here and gives programs a user of their own."""

    backend: Backend
    drops: bool


def backend() -> str:
    """Which backend programs run in on this machine, tried once: "bubblewrap", "namespaces", "seccomp", or "rlimits" where
    that alone is left, which is used only if asked for."""
    for name in _ORDER:
        if _try(name):
            return name
    raise ExecutorMissing("programs are run in a sandbox on Linux and macOS alone; use one of these or WSL")


@cache
def _try(name: Backend) -> _Machine | None:
    """The backend, if a trivial program passes in it."""
    if name != "rlimits" and (sys.platform != "linux" or os.uname().machine not in confine.MACHINES):
        return None
    if name == "bubblewrap" and not shutil.which("bwrap"):
        return None
    job: dict[str, Any] = {
        "parts": [("<source>", "import json")], "argv": None, "arguments": [""], "files": {}, "seconds": 10.0, "cpu": 10.0,
        "memory": None, "disk": 0, "processes": 1, "collect": [], "most_collected": 0, "open_files": 256,
    }  # fmt: skip
    for drops in (True, False) if os.geteuid() == 0 else (False,):
        machine = _Machine(name, drops)
        if _supervise(job, machine, (), "", 1000, True).passed:
            return machine
    return None


@cache
def _landlock() -> bool:
    return sys.platform == "linux" and confine.landlock_version() >= 3


@cache
def _readable() -> tuple[str, ...]:
    """The system's files that every program may read."""
    paths = [f"/{name}" for name in ("usr", "bin", "sbin", "lib", "lib32", "lib64")]
    paths += ["/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime"]
    paths += [*sorted(glob("/etc/java*")), "/nix/store", *_DEVICES]
    prefix = os.path.realpath(sys.base_prefix)
    paths += [] if prefix.startswith("/usr") else [prefix]
    return tuple(path for path in paths if os.path.lexists(path))


def _interpreter() -> list[str]:
    """Python without the environment that this one may live in."""
    return [os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)]


@cache
def _modules() -> bytes:
    """The code that runs inside, compiled once."""
    return marshal.dumps(
        [
            (name, compile(Path(str(module.__file__)).read_text("utf-8"), f"<{name}>", "exec"))
            for name, module in (("confine", confine), ("child", child))
        ]
    )


#: Makes a package of two modules out of the first file descriptor, and starts the keeper with the job that follows.
_BOOT = """
import marshal, sys, types
with open(int(sys.argv[1]), "rb") as file: modules, job = marshal.load(file), marshal.load(file)
package = sys.modules["sandbox"] = types.ModuleType("sandbox")
package.__path__ = []
for name, code in modules:
    module = sys.modules["sandbox." + name] = types.ModuleType("sandbox." + name)
    module.__package__ = "sandbox"
    setattr(package, name, module)
    exec(code, module.__dict__)
module.start(job)
"""


def _bubblewrap(machine: _Machine, readable: Sequence[str], folder: str, size: int) -> list[str]:
    """The command that enters the namespaces; what follows it is run there."""
    words = [str(shutil.which("bwrap")), "--die-with-parent", "--as-pid-1", "--hostname", "sandbox", "--unshare-cgroup-try"]
    words += [f"--unshare-{kind}" for kind in ("ipc", "pid", "net", "uts", *(() if machine.drops else ("user",)))]
    words += ["--cap-drop", "ALL"]
    for power in ("SETUID", "SETGID", "KILL") if machine.drops else ():  # the keeper's, to give the program its user
        words += ["--cap-add", f"CAP_{power}"]
    for parent in sorted({str(parent) for path in readable for parent in Path(path).parents} - {"/"}):
        words += ["--perms", "0755", "--dir", parent]
    for path in readable:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        else:
            words += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    return [
        *words,
        "--proc",
        "/proc",
        "--perms",
        "0777",
        "--size",
        str(size),
        "--tmpfs",
        folder,
        "--remount-ro",
        "/",
        "--chdir",
        folder,
    ]


def _supervise(
    job: dict[str, Any],
    machine: _Machine,
    readable: Sequence[str],
    stdin: str | bytes,
    max_output: int,
    end_marker: bool,
) -> Verdict:
    """Starts a keeper with a job and sees it to its end.

    The job: Python ``parts`` (name, source) or a command ``argv``; ``files`` to be there; limits ``seconds``, ``cpu``,
    ``memory`` (bytes or None), ``disk`` (bytes), ``processes``, ``open_files``; files to ``collect``.
    """
    contained = machine.backend in ("bubblewrap", "namespaces")
    locked = machine.backend == "seccomp" and _landlock()
    paths = [*_readable(), *(os.path.realpath(path) for path in readable)]
    size = job["disk"] + sum(len(text) + 8192 for text in job["files"].values()) + (1 << 16)
    with contextlib.ExitStack() as stack:
        host = (
            stack.enter_context(tempfile.TemporaryDirectory(prefix="broadsheet-")) if machine.backend != "bubblewrap" else ""
        )
        if host and machine.drops:
            os.chmod(host, 0o711 if contained else 0o777)
        folder = "/work" if contained else host
        report, writing = os.pipe()
        stack.callback(os.close, report)
        job = {
            **job, "backend": machine.backend, "contained": contained, "landlock": locked, "report": writing,
            "signals": contained or (locked and confine.landlock_version() >= 6),
            "root": host, "readable": paths, "writable": {folder: size}, "folder": folder,
            "user": _DYNAMIC_USERS[next(_turn) % len(_DYNAMIC_USERS)] if machine.drops else None,
            "extra_processes": _others(machine) if job["processes"] > 1 else 0,
            "environment": {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "PATH": _PATH, "HOME": folder, "TMPDIR": folder},
        }  # fmt: skip
        command = [*_interpreter(), "-s", "-S", "-B", "-P", "-X", "utf8", "-c", _BOOT]
        if machine.backend == "bubblewrap":
            command = [*_bubblewrap(machine, paths, folder, size), *command]
        given, asked = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        given.write(_modules() + marshal.dumps(job))
        asked.write(stdin if isinstance(stdin, bytes) else _bytes(stdin))
        for file in (given, asked):
            file.seek(0)
        begin = time.monotonic()
        try:
            process = subprocess.Popen(
                [*command, str(given.fileno())], stdin=asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                pass_fds=(writing, given.fileno()), cwd=host or "/", env=job["environment"], start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Verdict("sandbox_error", message=f"{command[0]}: {error.strerror}")
        finally:
            os.close(writing)
        try:
            streams, told, cut = _listen(process, report, job["seconds"], max_output)
        finally:
            _kill(process)
    stdout, stderr = (stream.decode("utf-8", "replace") for stream in streams)
    return _verdict(job, told, stdout, stderr, cut, time.monotonic() - begin, end_marker)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _others(machine: _Machine) -> int:
    """Processes and threads that the limit counts beside the program's: none where it has a user of its own, few in a user
    namespace, which has a count of its own since Linux 5.14, else all of the user's."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if machine.backend in ("bubblewrap", "namespaces") and release and (int(release[1]), int(release[2])) >= (5, 14):
        return 4
    others = 4
    for path in glob("/proc/[0-9]*") if not machine.drops else ():
        with contextlib.suppress(OSError):
            if os.stat(path).st_uid == os.getuid():
                others += len(os.listdir(f"{path}/task"))
    return others


#: Seconds that the sandbox has to be set up, and that a keeper has to say how the program ended.
_SETUP, _GRACE = 30.0, 1.5


def _listen(
    process: subprocess.Popen[bytes], report: int, seconds: float, most: int
) -> tuple[tuple[bytes, bytes], bytes, bool]:
    """Reads the streams and the keeper's report to their ends, or to the limit: ((stdout, stderr), report, whether cut)."""
    assert process.stdout
    assert process.stderr
    output, errors, told, cut = bytearray(), bytearray(), bytearray(), False
    until = time.monotonic() + _SETUP
    with selectors.DefaultSelector() as selector:
        for source, kept in ((process.stdout, output), (process.stderr, errors), (report, told)):
            selector.register(source, selectors.EVENT_READ, kept)
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                    if key.data is told:  # it is over: what was printed is in the pipes already
                        until = time.monotonic() + 0.2
                    continue
                if key.data is told and not told:
                    until = time.monotonic() + seconds + _GRACE
                key.data.extend(chunk)
                if key.data is not told and len(key.data) > most:
                    cut = True
                    del key.data[slice(most, None) if key.data is output else slice(None, len(key.data) - most)]
    return (bytes(output), bytes(errors)), bytes(told), cut


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends whatever is left of the keeper and its group, and takes its exit status."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the second when only a zombie is left
        os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


def _verdict(
    job: Mapping[str, Any], told: bytes, stdout: str, stderr: str, cut: bool, spent: float, end_marker: bool
) -> Verdict:
    """What the keeper's report means."""
    if not told.startswith(b"ready"):
        last = stderr.strip().rpartition("\n")[2][:500]
        return Verdict(
            "sandbox_error", None, stdout, stderr, spent, message=last or "the sandbox could not be set up", cut=cut
        )
    if len(told) == 5:  # the keeper was ended: by the program, or because it overslept
        if spent >= job["seconds"]:
            return Verdict("timeout", None, stdout, stderr, spent, message=f"not done after {job['seconds']:g} s", cut=cut)
        return Verdict("killed", None, stdout, stderr, spent, message="its sandbox was ended", cut=cut)
    code, wall, cpu, peak, late, said, files = marshal.loads(told[5:])
    kind, _, message = said.partition(" ")
    status: Status
    if late or code == -signal.SIGXCPU:
        status, message = "timeout", f"not done after {job['seconds']:g} s"
    elif kind in ("pass", "fail", "oom", "sandbox_error"):
        status = kind
    elif code < 0:
        out_of_memory = job["memory"] is not None and peak >= 0.9 * job["memory"]
        status, message = "oom" if out_of_memory else "killed", _signal_name(-code)
    elif code == 0 and (job["argv"] or (kind == "left" and not end_marker)):
        status, message = "pass", ""
    else:
        last = stderr.strip().rpartition("\n")[2][:500]
        early = f"exit code {code}" if job["argv"] else "it left before its tests had run"
        status, message = "fail", message or last or early
    return Verdict(status, code, stdout, stderr, wall, cpu, peak, message[:500], cut, files)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# --- compiled languages -------------------------------------------------------------------------------------------------


def _compiler(backend_name: Any, unsafe: bool, *readable: str) -> Sandbox:
    """A compiler reads and writes files and is several processes; it may not do more than the program either."""
    return Sandbox(backend=backend_name, disk_mb=256, processes=64, readable=readable, allow_unsafe=unsafe)


def _compiled(compiled: Any, program: str, box: Sandbox) -> Verdict:
    """What a cached compiler says; what failed for our own reasons is not kept."""
    made: Verdict = compiled(program, box.backend, box.allow_unsafe)
    if made.status == "sandbox_error":
        compiled.cache_clear()
    return made


def _first_error(made: Verdict) -> Verdict:
    """A verdict whose message is the compiler's first error."""
    found = re.search(r"^.*\berror\b.*$", made.stderr, re.M)
    return replace(made, message=(found[0] if found else made.message or made.stderr.strip())[:500])


@lru_cache(maxsize=64)
def _compiled_cpp(program: str, backend_name: Any, unsafe: bool) -> Verdict:
    """The verdict on compiling, with the program among its files."""
    words = ["g++", "-std=c++17", "-O2", "-pipe", "-o", "program", "program.cpp"]
    made = _compiler(backend_name, unsafe).run(
        {"program.cpp": program}, words, timeout=_COMPILE_SECONDS, memory_mb=4096, collect=("program",)
    )
    return made if made.passed else _first_error(made)


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


@lru_cache(maxsize=64)
def _compiled_java(program: str, backend_name: Any, unsafe: bool) -> Verdict:
    public = re.search(r"\bpublic\s+(?:(?:final|abstract|strictfp)\s+)*(?:class|interface|enum|record)\s+(\w+)", program)
    files = {f"{public[1] if public else 'Program'}.java": program, "BroadsheetRunner.java": _RUNNER}
    javac, home = _jdk("javac")
    flags = ["-J-Xmx512m", "-J-XX:+UseSerialGC", "-J-XX:TieredStopAtLevel=1", "-J-XX:-UsePerfData", "-proc:none", "-nowarn"]
    made = _compiler(backend_name, unsafe, home).run(
        files, [javac, *flags, *files], timeout=_COMPILE_SECONDS, memory_mb=None, collect=("*.class",)
    )
    return made if made.passed else _first_error(made)


def _jdk(name: str) -> tuple[str, str]:
    """A JDK's command, and the folder that the JDK is in."""
    path = os.path.realpath(str(shutil.which(name)))
    return path, os.path.dirname(os.path.dirname(path))


def _run_java(program: str, box: Sandbox, seconds: float, memory: int, stdin: str) -> Verdict:
    """A JVM's address space cannot be bounded: its heap is."""
    made = _compiled(_compiled_java, program, box)
    if not made.passed:
        return made
    java, home = _jdk("java")
    classes = sorted(name[:-6] for name in made.files if "$" not in name and name != "BroadsheetRunner.class")
    mark = secrets.token_hex(16)
    flags = ["-ea", f"-Xmx{memory >> 20}m", "-Xss4m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
    inside = replace(box, readable=(*box.readable, home))
    ended = inside._go([], [java, *flags, "-cp", ".", "BroadsheetRunner", mark, *classes], made.files, seconds, None, stdin)
    if ended.status in ("timeout", "sandbox_error"):
        return ended
    text, marked, _ = ended.stdout.partition(f"\n{mark}")
    if marked:
        return replace(ended, status="pass", message="", stdout=text)
    thrown = re.search(r"^Exception in thread .*? ([\w.$]+(?:Error|Exception)\b.*)$", ended.stderr, re.M)
    message = thrown[1] if thrown else ended.message or "it left before its tests had run"
    if message.startswith("java.lang.OutOfMemoryError"):
        return replace(ended, status="oom", message=message[:500])
    status: Status = "killed" if ended.status == "killed" else "fail"
    return replace(ended, status=status, message=message[:500])
