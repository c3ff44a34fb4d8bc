"""The sandbox: nothing that a program does outlives it, leaves it or counts as a pass; in every backend of this machine."""

import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from broadsheet.core import sandbox
from broadsheet.core.sandbox import ExecutorMissing, Sandbox, Verdict, backend, check_language, run, run_many

BACKENDS = ("bubblewrap", "namespaces", "seccomp", "rlimits")
pytestmark = pytest.mark.filterwarnings("ignore:UNSAFE")


#: The backend that this machine takes is always tested in whole, the others in whole when there is time.
PARAMS = [pytest.param(name, marks=() if name == backend() else pytest.mark.slow) for name in BACKENDS]


def _here(name):
    if not sandbox._try(name):
        pytest.skip(f"no {name} here")
    return name


@pytest.fixture(params=PARAMS)
def name(request):
    return _here(request.param)


@pytest.fixture
def box(name):
    """A sandbox in which nothing can be written."""
    return Sandbox(backend=name, disk_mb=0, allow_unsafe=True)


@pytest.fixture(params=BACKENDS)
def every(request):
    """The same, once in each backend that works here."""
    return Sandbox(backend=_here(request.param), disk_mb=0, allow_unsafe=True)


@pytest.fixture
def confined(box):
    """The same, where the kernel confines."""
    if box.backend == "rlimits":
        pytest.skip("rlimits alone stop accidents and not intent")
    return box


def writing(name, **settings):
    """A sandbox with a folder to write into, or skipped."""
    made = Sandbox(backend=name, allow_unsafe=True, **settings)
    try:
        made._machine()
    except ExecutorMissing as error:
        pytest.skip(str(error))
    return made


# --- hostile programs -----------------------------------------------------------------------------------------------------

SPIN = "while True: pass"
HOSTILE = {
    "an endless loop": (SPIN, {"timeout"}),
    "a loop that catches everything": (
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        {"timeout"},
    ),
    "endless sleep": ("import time; time.sleep(99)", {"timeout"}),
    "endless output": ("while True: print('x' * 9999)", {"timeout"}),
    "closing its output and spinning": ("import os\nos.close(1); os.close(2)\n" + SPIN, {"timeout"}),
    "closing all files": ("import os; os.closerange(0, 99)\n" + SPIN, {"timeout"}),
    "blocking on input": ("input()", {"fail"}),
    "a fork bomb": ("import os\nwhile True: os.fork()", {"fail"}),
    "a fork bomb that ignores refusals": (
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        {"timeout"},
    ),
    "forking and leaving": ("import os\nif not os.fork():\n  while True: pass", {"fail"}),
    "a new process": ("import subprocess; subprocess.run(['true'])", {"fail"}),
    "a process pool": ("import multiprocessing as m; print(m.Pool(2).map(abs, [1]))", {"fail"}),
    "8 GiB": ("x = bytearray(8 << 30)", {"oom"}),
    "memory bit by bit": ("x = []\nwhile True: x.append('y' * 10**6)", {"oom"}),
    "endless recursion": ("f = lambda: f()\nf()", {"fail"}),
    "leaving early": ("raise SystemExit(0)", {"fail"}),
    "sys.exit(0)": ("import sys; sys.exit(0)", {"fail"}),
    "leaving at once": ("import os; os._exit(0)", {"fail"}),
    "forging a mark": ("import os\nprint('pass'); os.write(1, b'ready pass')\nos._exit(0)", {"fail"}),
    "forging a mark in every file": (
        "import os\nfor i in range(99):\n  try: os.write(i, b'0' * 16 + b'pass ')\n  except OSError: pass\nos._exit(0)",
        {"fail"},
    ),
    "aborting": ("import os; os.abort()", {"killed"}),
    "a wrong answer": ("assert 1 + 1 == 3", {"fail"}),
    "bad syntax": ("def f(:", {"fail"}),
}


def test_acceptance_2_and_7_hostile_programs_end_with_the_right_verdict(every):
    def one(source, statuses):
        limit = 0.5 if "timeout" in statuses else 4.0
        return {"source": source, "tests": "assert True", "seconds": limit}

    begin = time.monotonic()
    verdicts = run_many([one(*program) for program in HOSTILE.values()], workers=4, sandbox=every)
    wrong = {
        name: verdict
        for (name, (_, statuses)), verdict in zip(HOSTILE.items(), verdicts, strict=True)
        if verdict.status not in statuses
        or verdict.wall_s > 2 + (0.5 if "timeout" in statuses else 4.0)
        or max(len(verdict.stdout), len(verdict.stderr)) > sandbox.KEPT
    }
    assert not wrong
    assert time.monotonic() - begin < 2 * len(HOSTILE)


def test_the_harness_survives(box):
    assert run("x = 1", "assert x == 1", seconds=10, sandbox=box).passed


@pytest.mark.parametrize(
    "call",
    [
        "socket.create_connection(('127.0.0.1', {port}), timeout=1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
        "socket.socket(socket.AF_UNIX).connect('/tmp/x')",
        "__import__('urllib.request').request.urlopen('http://127.0.0.1:{port}', timeout=1)",
    ],
)
def test_acceptance_2_no_program_reaches_the_network(call, box):
    with socket.create_server(("127.0.0.1", 0)) as server:  # something that would answer
        server.settimeout(0.2)
        verdict = run("import socket\n" + call.format(port=server.getsockname()[1]), seconds=10, sandbox=box)
        assert verdict.status == "fail"
        assert "not permitted" in verdict.message
        with pytest.raises(TimeoutError):
            server.accept()


def test_it_changes_no_file(every, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("all")
    codes = (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, {str(kept) + '2'!r})",
        f"import os; os.chmod({str(kept)!r}, 0)",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.truncate({str(kept)!r}, 0)",
        "open('here', 'w')",
    )
    verdicts = run_many([{"source": code, "seconds": 10} for code in codes], workers=2, sandbox=every)
    assert [verdict.status for verdict in verdicts] == ["fail"] * len(codes)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "all"


def test_acceptance_2_it_writes_into_its_folder_alone(name, tmp_path):
    box = writing(name, disk_mb=2)
    outside = tmp_path / "outside"
    for place in (str(outside), "/usr/x", "/x", "/tmp/x", "/dev/shm/x", "../x"):
        verdict = box.run({"main.py": f"open({place!r}, 'w').write('x')"}, ["python", "main.py"])
        assert verdict.status == "fail", (place, verdict)
    assert not outside.exists()
    code = "open('a/b.txt', 'a').write('more'); import tempfile; tempfile.TemporaryFile().write(b'x')"
    verdict = box.run({"main.py": code, "a/b.txt": "some "}, ["python", "main.py"], collect=("a/b.txt", "none"))
    assert verdict.passed, verdict
    assert verdict.files == {"a/b.txt": b"some more"}
    full = box.run({"main.py": "open('x', 'wb').write(bytes(99 << 20))"}, ["python", "main.py"])
    assert full.status in ("fail", "killed"), full  # too large for the folder or for a file


def test_symbolic_links_lead_nowhere(name, tmp_path):
    box = writing(name)
    if name == "rlimits":
        pytest.skip("rlimits alone stop accidents and not intent")
    secret = tmp_path / "secret"
    secret.write_text("of the user")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:3]:
        folder.chmod(folder.stat().st_mode | 0o055)
    link = f"import os\nos.symlink({str(secret)!r}, 'link')\n"
    read = box.run({"main.py": link + "print(open('link').read())"}, ["python", "main.py"])
    assert read.status == "fail", read
    assert box.run({"main.py": link + "open('link', 'w')"}, ["python", "main.py"]).status == "fail"
    assert secret.read_text() == "of the user"
    collected = box.run({"main.py": link}, ["python", "main.py"], collect=("link",))
    assert collected.passed
    assert collected.files == {}


def test_acceptance_2_another_run_cannot_be_read(name):
    """Two at once: one leaves a secret in its folder and waits, the other looks for it everywhere."""
    box = writing(name)
    if name == "rlimits":
        pytest.skip("rlimits alone stop accidents and not intent")
    hide = {
        "files": {"main.py": "import time; open('secret', 'w').write('S3CRET'); time.sleep(1.5)"},
        "entry": ["python", "main.py"],
    }
    seek = (
        "import os, time\ntime.sleep(0.5)\nfor top in ('/work', '/tmp'):\n"
        "  for folder, _, files in os.walk(top):\n    for file in files:\n"
        "      if file == 'secret':\n        try: text = open(os.path.join(folder, file), 'rb').read(99)\n"
        "        except OSError: continue\n        assert b'S3CRET' not in text, folder\n"
        "try: pids = [p for p in os.listdir('/proc') if p.isdigit()]\nexcept PermissionError: pids = []\n"
        "for p in pids:\n  if int(p) != os.getpid():\n    for what in ('mem', 'environ', 'fd'):\n"
        "      try: (os.listdir if what == 'fd' else open)(f'/proc/{p}/{what}')\n      except OSError: continue\n"
        "      raise AssertionError(f'{p} {what}')\n"
    )
    verdicts = run_many([hide, {"files": {"main.py": seek}, "entry": ["python", "main.py"]}], workers=2, sandbox=box)
    assert [verdict.status for verdict in verdicts] == ["pass", "pass"], verdicts


def test_it_signals_nobody(every):
    codes = [f"import os; os.kill({os.getpid()}, 9)", "import os; os.kill(os.getppid(), 9)", "import os; os.kill(-1, 9)"]
    verdicts = run_many([{"source": code, "seconds": 10} for code in codes], workers=2, sandbox=every)
    assert [verdict.status for verdict in verdicts] == ["fail"] * 3, verdicts


def test_foreign_functions_gain_nothing(confined):
    """What Python's own checks do not see: system calls made directly."""
    libc = "import ctypes, os, resource; libc = ctypes.CDLL(None, use_errno=True)\n"
    calls = (
        "socket(2, 1, 0)",
        "fork()",
        "unshare(0x10000000)",
        "kill(1, 0)",
        "mount(b'a', b'b', b'c', 0, 0)",
        "chroot(b'.')",
    )
    source = libc + "".join(f"assert libc.{call} == -1, {call!r}\n" for call in (*calls, "setuid(12345)"))
    raised = "  try: resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (-1, -1))\n  except Exception: continue\n"
    limits = f"for name in ('AS', 'CPU', 'FSIZE'):\n{raised}  raise AssertionError(name)\n"
    powers = "assert 'CapEff:\\t0000000000000000' in open(f'/proc/{os.getpid()}/status').read()"
    verdict = run(source, limits + powers, seconds=10, sandbox=confined)
    assert verdict.passed, verdict


# --- several processes ----------------------------------------------------------------------------------------------------

MARK = "broadsheet-left-behind"


def left_behind():
    """Whether a process of a test is still there."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if MARK.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("sleep 9 & exit 0", "pass"),  # forks once and leaves
        ("setsid sleep 9 & exit 1", "fail"),  # the child flees into a session of its own
        ("sleep 9", "timeout"),
        ("f() { f | f & }; f; sleep 9", {"timeout", "fail"}),  # a fork bomb; it may leave the shell no process for sleep
        ("kill -9 $PPID; kill -9 -1; sleep 9", {"timeout", "killed"}),
        ("exec >&- 2>&-; while :; do :; done", "timeout"),
    ],
)
def test_acceptance_2_children_die_too(name, script, status):
    if name == "rlimits":
        pytest.skip("nothing but limits")
    box = writing(name, processes=12)
    verdict = box.run({"run.sh": script}, ["sh", "./run.sh", MARK], timeout=1)
    assert verdict.status in (status if isinstance(status, set) else {status}), verdict
    assert verdict.wall_s < 1 + 2
    for _ in range(20):
        if not left_behind():
            break
        time.sleep(0.05)
    assert not left_behind()


def test_processes_may_be_had(name):
    box = writing(name, processes=8)
    code = "import os, subprocess\nprint(subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout)"
    if name == "rlimits":
        pytest.skip("its hook refuses processes")
    assert box.run({"main.py": code}, ["python", "main.py"]).stdout == "hi\n\n"


# --- what ordinary programs see -------------------------------------------------------------------------------------------


def test_its_world_is_empty(box, monkeypatch):
    monkeypatch.setenv("SECRET", "of the harness")
    code = "import os, sys; print(sorted(os.environ), os.listdir(), repr(sys.stdin.read()), sys.argv)"
    verdict = run(code, seconds=10, sandbox=box)
    assert verdict.passed, verdict
    seen = ["HOME", "LC_ALL", "PATH", *(["PWD"] if box.backend == "bubblewrap" else []), "PYTHONHASHSEED", "TMPDIR"]
    assert verdict.stdout == f"{seen} [] '' ['']\n"
    assert run("import numpy", seconds=10, sandbox=box).status == "fail"
    one, other = (run("print(hash('a'))", seconds=10, sandbox=box).stdout for _ in range(2))
    assert one == other


def test_it_reads_the_system_and_what_it_is_given(confined, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_text("given")
    code = f"print(open({str(tmp_path / 'data' / 'x')!r}).read())"
    shared = Sandbox(backend=confined.backend, disk_mb=0, readable=(str(tmp_path / "data"),))
    if sandbox._try(confined.backend).drops:
        for folder in (tmp_path / "data", *tmp_path.parents[:3], tmp_path):
            folder.chmod(0o755)
    if confined.backend != "seccomp" or sandbox._landlock():
        assert run(code, seconds=10, sandbox=confined).status == "fail"
        assert run("open('/etc/passwd')", seconds=10, sandbox=confined).status == "fail"
    assert run(code, seconds=10, sandbox=shared).stdout == "given\n"


def test_ordinary_programs_run(box):
    source = (
        "from dataclasses import dataclass\nimport math, threading, asyncio, re, heapq\n\n@dataclass\nclass A:\n    x: int\n"
    )
    tests = (
        "assert A(2) == A(2) and math.isqrt(9) == 3\nt = threading.Thread(target=print, args=('hi',)); t.start(); t.join()\n"
        "async def f(): return 'é'\nassert asyncio.run(f()) == 'é'\nassert __name__ == '__main__'"
    )
    if box.backend == "rlimits":  # event loops need sockets, and these are refused in whole
        tests = tests.replace("assert asyncio.run(f()) == 'é'", "")
        tests = tests.replace("t = threading.Thread(target=print, args=('hi',)); t.start(); t.join()", "print('hi')")
    verdict = run(source, tests, seconds=10, sandbox=box)
    assert verdict.passed, verdict
    assert (verdict.stdout, verdict.stderr, verdict.exit_code, verdict.message) == ("hi\n", "", 0, "")
    assert 0 < verdict.cpu_s < verdict.wall_s + 0.5
    assert 5 << 20 < verdict.max_rss < 200 << 20


def test_how_it_ended_is_told_apart(box):
    ends = {
        "x = 1": ("pass", 0),
        "assert 0, 'why'": ("fail", 1),
        "1 / 0": ("fail", 1),
        "while 1: pass": ("timeout", -9),
        "'a' * (1 << 32)": ("oom", 1),
        "import os; os.abort()": ("killed", -6),
        "import os; os._exit(3)": ("fail", 3),
        "import sys; sys.exit(4)": ("fail", 4),
    }
    for code, expected in ends.items():
        verdict = run(code, seconds=1.5, sandbox=box)
        assert (verdict.status, verdict.exit_code) == expected, (code, verdict)
    assert run("assert 0, 'why'", sandbox=box).message == "AssertionError: why"
    divided = run("x = 1\nx / 0", sandbox=box)
    assert divided.message == "ZeroDivisionError: division by zero"
    assert 'File "<source>", line 2' in divided.stderr


def test_tests_may_end_in_exit_zero_and_solutions_may_not():
    suite = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(), 1)\nunittest.main()"
    assert run("def f(): return 1", suite, seconds=10).passed
    assert run("def f(): return 2", suite, seconds=10).status == "fail"
    assert run("import sys\ndef f(): sys.exit(0)", "assert f() == 1", seconds=10).status == "fail"


def test_files_and_an_entry(box):
    files = {
        "main.py": "import sys, other\nprint(other.twice(int(input())), sys.argv[1:])",
        "other.py": "def twice(x): return 2 * x",
    }
    verdict = box.run(files, ["python", "main.py", "a"], stdin="21\n")
    assert (verdict.status, verdict.stdout) == ("pass", "42 ['a']\n"), verdict
    leaves = {"main.py": "print('done')\nraise SystemExit(0)"}
    assert box.run(leaves, ["python", "main.py"]).status == "fail"
    assert box.run(leaves, ["python", "main.py"], end_marker=False).passed
    assert box.run({"main.py": "raise SystemExit(1)"}, ["python", "main.py"], end_marker=False).status == "fail"
    verdict = box.run({"main.py": "print('x' * 100_000)"}, ["python", "main.py"], max_output=1000)
    assert verdict.passed
    assert verdict.cut
    assert verdict.stdout == "x" * 1000
    assert box.run({}, ["true"]).passed
    assert box.run({}, ["sh", "-c", "exit 3"]).exit_code == 3
    assert box.run({"go": "#!/bin/sh\nread x; echo got $x"}, ["./go"], stdin="a").stdout == "got a\n"
    missing = box.run({}, ["./none"])
    assert (missing.status, missing.passed) == ("sandbox_error", False), missing


def test_many_at_once_in_order():
    programs = [{"source": f"print({i})", "tests": f"assert {i} % 2", "seconds": 20} for i in range(20)]
    verdicts = run_many(programs, workers=8)
    assert [verdict.passed for verdict in verdicts] == [False, True] * 10
    assert [verdict.stdout for verdict in verdicts] == [f"{i}\n" for i in range(20)]


def test_a_pool_runs_twenty_small_programs_a_second(name):
    """Counted in CPU seconds of ours and of what we started, unchanged by other load: two cores have two a second."""
    box = Sandbox(backend=name, disk_mb=0, allow_unsafe=True)
    before = os.times()
    verdicts = run_many([{"source": f"x = {i}", "tests": f"assert x == {i}", "seconds": 20} for i in range(20)], 2, box)
    after = os.times()
    assert all(verdict.passed for verdict in verdicts)
    spent = sum(after[:4]) - sum(before[:4])
    assert 20 / (spent / 2) > 20, spent


# --- compiled languages ---------------------------------------------------------------------------------------------------

CPP = "#include <iostream>\n#include <vector>\nint main() { long x; std::cin >> x; %s }"


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
@pytest.mark.parametrize(
    ("body", "status", "stdout"),
    [
        ("std::cout << 2 * x << std::endl;", "pass", "42\n"),
        ("return 3;", "fail", ""),
        ("while (true) {}", "timeout", ""),
        ("std::vector<char> v; while (true) v.resize(v.size() + 100000000);", "oom", ""),
        ("return *(volatile int*)8;", "killed", ""),
        ("return x", "fail", ""),
    ],
)
def test_cpp_with_input(name, body, status, stdout):
    box = writing(name, processes=2)
    verdict = run(
        CPP % body,
        language="cpp",
        stdin="21",
        seconds=1 if status == "timeout" else 20,
        sandbox=Sandbox(backend=box.backend, allow_unsafe=True),
    )
    assert (verdict.status, verdict.stdout) == (status, stdout), verdict
    if body == "return x":
        assert "error" in verdict.message


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
def test_a_compiler_shows_nothing_of_the_machine(name, tmp_path):
    if name == "rlimits":
        pytest.skip("nothing but limits")
    writing(name, processes=2)
    (tmp_path / "secret.h").write_text("int secret = 1;")
    code = f'#include "{tmp_path / "secret.h"}"\nint main() {{ return 0; }}'
    verdict = run(code, language="cpp", sandbox=Sandbox(backend=name, disk_mb=0))
    assert verdict.status == "fail"
    assert "secret.h" in verdict.message


JAVA = """class Problem {
    static int twice(int a) { %s }
    public static void main(String[] args) { assert twice(2) == 4; }
}"""


@pytest.mark.skipif(backend() == "rlimits", reason="Java is confined by the kernel or not at all")
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("return 2 * a;", "pass"),
        ("return a;", "fail"),
        ("while (true) {}", "timeout"),
        ("System.exit(0); return 4;", "fail"),
        ("int[] x = new int[1 << 28]; return 4;", "oom"),
        ("return 2 * a", "fail"),
        (
            'try { new java.net.Socket("127.0.0.1", 1); } catch (Exception e) { throw new RuntimeException(e); } return 4;',
            "fail",
        ),
        (
            'try { Runtime.getRuntime().exec("true"); } catch (Exception e) { throw new RuntimeException(e); } return 4;',
            "fail",
        ),
    ],
)
def test_java(body, status, jdk):
    if not jdk:
        pytest.skip("no JDK here")
    verdict = run(JAVA % body, language="java", seconds=3 if status == "timeout" else 20)
    assert verdict.status == status, verdict


# --- settings -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_run_is_said_in_one_line(monkeypatch):
    with pytest.raises(ExecutorMissing, match="no executor for the language 'cobol'"):
        run("", language="cobol")
    with pytest.raises(ValueError, match="more than 0 seconds"):
        run("", seconds=0)
    for name in ("/etc/passwd", "../x", "a/../../x", ""):
        with pytest.raises(ValueError, match="relative to the work folder"):
            Sandbox().run({name: ""}, ["true"])
    with pytest.raises(ValueError, match="nothing to run"):
        Sandbox().run({}, [])
    with pytest.raises(ValueError, match="no backend 'docker'"):
        Sandbox(backend="docker")
    with pytest.raises(ExecutorMissing, match="no command 'nothing-like-this'"):
        Sandbox(disk_mb=0).run({}, ["nothing-like-this"])
    with pytest.raises(ValueError, match="workers"):
        run_many([], workers=0)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name, path=None: None)
    with pytest.raises(ExecutorMissing, match="Java tasks need a JDK"):
        check_language("java")
    with pytest.raises(ExecutorMissing, match=r"install g\+\+"):
        check_language("cpp")


def test_mere_limits_are_asked_for_and_warn(monkeypatch):
    monkeypatch.delenv("BROADSHEET_UNSAFE_SANDBOX", raising=False)
    with pytest.raises(ExecutorMissing, match="allow_unsafe"):
        run("", sandbox=Sandbox(backend="rlimits", disk_mb=0))
    with pytest.warns(UserWarning, match="UNSAFE"):
        assert run("", seconds=10, sandbox=Sandbox(backend="rlimits", disk_mb=0, allow_unsafe=True)).passed
    real = sandbox._try
    monkeypatch.setattr(sandbox, "_try", lambda name: real(name) if name == "rlimits" else None)
    assert backend() == "rlimits"
    with pytest.raises(ExecutorMissing, match="allow_unsafe"):
        run("")
    monkeypatch.setenv("BROADSHEET_UNSAFE_SANDBOX", "1")
    with pytest.warns(UserWarning, match="UNSAFE"):
        assert run("", seconds=10).passed


def test_a_sandbox_that_cannot_be_set_up_is_neither_a_pass_nor_a_fail(monkeypatch):
    monkeypatch.setattr(sandbox, "_BOOT", "raise SystemExit('broken')")
    verdict = run("x = 1")
    assert verdict.status == "sandbox_error"
    assert verdict.message == "broken"
    assert isinstance(verdict, Verdict)


# --- the filter -----------------------------------------------------------------------------------------------------------


def _answer(rules, arch, number, *arguments):
    """What the filter says to a system call: a small interpreter of the instructions that it uses."""
    data = {0: number, 4: arch}
    for index, value in enumerate(arguments):
        data |= {16 + 8 * index: value & 0xFFFFFFFF, 20 + 8 * index: value >> 32 & 0xFFFFFFFF}
    place, held = 0, 0
    while True:
        code, yes, no, k = rules[place]
        place += 1
        if code == 0x06:
            return k
        if code == 0x20:
            held = data.get(k, 0)
        else:
            place += yes if {0x15: held == k, 0x45: held & k, 0x35: held >= k}[code] else no


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("executes", [False, True])
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("forks", [False, True])
def test_the_filter_refuses_what_it_names_and_nothing_else(machine, executes, writes, forks):
    confine = sandbox.confine
    allow, eperm, enosys, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    arch, column = confine.MACHINES[machine]
    rules = confine.seccomp_filter(machine, executes, writes, forks)

    def answer(number, *arguments):
        return _answer(rules, arch, number, *arguments)

    for calls, allowed in (
        (confine.REFUSED, False), (confine.FORKING, forks), (confine.EXECUTE, executes or forks), (confine.WRITING, writes),
    ):  # fmt: skip
        for call in calls:
            assert call[column] is None or answer(call[column]) == (allow if allowed else eperm), call
    for call in confine.ABSENT:
        assert answer(call[column]) == enosys
    clone, openat, kill_call, tgkill, prlimit = (56, 257, 62, 234, 302) if column == 1 else (220, 56, 129, 131, 261)
    assert answer(clone, 0x11) == (allow if forks else eperm)  # fork
    assert answer(clone, 0x3D0F00) == allow  # a thread
    assert answer(clone, 0x10000011) == eperm  # into a user namespace
    assert answer(openat, 0, 0, os.O_RDONLY | os.O_CLOEXEC) == allow
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT, os.O_RDONLY | os.O_TRUNC):
        assert answer(openat, 0, 0, flags) == (allow if writes else eperm)
    for call in (kill_call, tgkill):
        assert answer(call, os.getpid()) == allow
        assert answer(call, 1) == answer(call, 2**64 - 1) == eperm
        assert _answer(confine.seccomp_filter(machine, forks=True, signals=True), arch, call, 1) == allow
    assert answer(prlimit, 0, 7, 0) == allow  # reads a limit
    assert answer(prlimit, 0, 7, 1 << 40) == eperm
    reading = (0, 1, 3, 9) if column == 1 else (63, 64, 57, 222)  # read, write, close, mmap
    assert {answer(number) for number in reading} == {allow}
    assert _answer(rules, 0x40000003, 1) == kill  # another architecture's calls
    if machine == "x86_64":
        assert answer(41 | 0x40000000) == eperm
        assert answer(2, 0, os.O_WRONLY) == (allow if writes else eperm)
        assert answer(2, 0, os.O_RDONLY) == allow


def test_threads_and_the_pool_may_be_mixed():
    found = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(run(f"assert {i} % 2", seconds=20).passed)) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, False, True, True]
