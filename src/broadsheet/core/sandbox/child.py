"""What runs in the sandbox: the *keeper*, and the program in a process that the keeper starts, times and ends.

Started by `broadsheet.core.sandbox` without the package and without site-packages. The keeper enters its namespaces (where
nobody did so before it), writes the program's files, starts the program's process, which gives up what it could do harm
with, and reports over a pipe that the program does not have: ``b"ready"`` when it has begun, then how it ended.

A Python program says that it reached its end over a pipe of its own, marked by a token: a program that merely leaves,
whatever its exit code and whatever it printed, has not passed.
"""

import contextlib
import marshal
import os
import resource
import secrets
import signal
import stat
import sys
import time
import types

from . import confine


def keep(job):
    """The keeper. ``job``: see `broadsheet.core.sandbox._supervise`."""
    report, linux = job["report"], sys.platform == "linux"
    if job["backend"] == "namespaces":
        confine.namespaces(job["root"], job["readable"], job["writable"], job["user"] is None)
    os.chdir(job["folder"])
    os.umask(0)  # what is written here is the program's
    if linux:
        confine.control("die with parent", signal.SIGKILL)
        confine.control("subreaper", 1)
        confine.control("dumpable", 0)  # its memory and files are not the program's to read
    for name, text in job["files"].items():
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "wb", opener=lambda path, flags: os.open(path, flags, 0o777)) as file:
            file.write(text)
    reading, writing = os.pipe()
    os.write(report, b"ready")
    token, begin = secrets.token_bytes(16), time.monotonic()
    program = os.fork()
    if not program:
        os.close(report)
        os.close(reading)
        _become(job, writing, token)
    os.close(writing)
    code, used, late = _wait(program, begin + job["seconds"])
    wall = time.monotonic() - begin
    _sweep(program, linux and not job["contained"])
    os.set_blocking(reading, False)  # whatever may still hold its other end
    said = b""
    with contextlib.suppress(BlockingIOError):
        said = os.read(reading, 65536)
    message = said[16:].decode("utf-8", "replace") if said.startswith(token) else ""
    peak = used.ru_maxrss * (1024 if linux else 1)
    kept = {} if late else _collect(job["collect"], job["most_collected"])
    ended = (code, wall, used.ru_utime + used.ru_stime, peak, late, message, kept)
    with os.fdopen(report, "wb") as file:
        marshal.dump(ended, file)
    os._exit(0)


def _wait(program, until):
    """Waits for the program, and kills it at its limit: (exit code or minus a signal, resources, whether it was late)."""
    pause, late = 0.0005, False
    while True:
        ended, status, used = os.wait4(program, 0 if late else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used, late
        if time.monotonic() >= until:
            late = True
            os.kill(program, signal.SIGKILL)
        else:
            time.sleep(min(pause, max(0.0, until - time.monotonic())))
            pause = min(2 * pause, 0.01)


def _sweep(program, through_proc):
    """Ends what the program left behind. In a process namespace the kernel does so when the keeper leaves; elsewhere
    orphans became the keeper's children (it is a subreaper), and theirs will when they are killed."""
    with contextlib.suppress(OSError):
        os.killpg(program, signal.SIGKILL)
    while through_proc:
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                    if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                        os.kill(int(name), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _collect(names, most):
    """The contents of these files, plain ones of the work folder that together fit into ``most`` bytes; ``*.x`` is all of a
    kind."""
    found = {}
    for name in names:
        here = sorted(n for n in os.listdir(".") if n.endswith(name[1:])) if name.startswith("*") else [name]
        for path in here:
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                with os.fdopen(handle, "rb") as file:
                    about = os.fstat(handle)
                    if stat.S_ISREG(about.st_mode) and about.st_size <= most:
                        found[path] = file.read(most)
                        most -= len(found[path])
    return found


# --- the program's process ----------------------------------------------------------------------------------------------


def _become(job, end, token):
    """Gives up everything else and runs the program; never returns."""

    def tell(kind, message=""):
        os.write(end, token + f"{kind} {message[:2000]}".encode("utf-8", "replace"))

    command, forks, writes = job["argv"], job["processes"] > 1, job["disk"] > 0
    try:
        os.setpgid(0, 0)
        os.set_inheritable(end, False)
        os.umask(0o022)
        guarded = job["backend"] != "rlimits"
        # With a filter, one process may have threads; the limit would count them.
        most = job["processes"] + job["extra_processes"] if forks else None if guarded else 0
        if job["user"] is not None:
            os.setgroups([])
            os.setresgid(job["user"], job["user"], job["user"])
            os.setresuid(job["user"], job["user"], job["user"])
        confine.limit(job["cpu"], job["memory"], most, job["disk"], job["open_files"])
        if guarded:
            confine.control("dumpable", 1)
            if job["landlock"]:
                seen = [*job["readable"], job["folder"], f"/proc/{os.getpid()}"]
                confine.landlock(seen, [job["folder"], "/dev/null"] if writes else ["/dev/null"])
            confine.confine(command is not None, writes, forks, forks and job["signals"])
        elif command is None:
            confine.watch(job["folder"] if writes else None)
        if command is not None:
            os.execve(command[0], command, job["environment"])
    except OSError as error:
        tell("sandbox_error", f"{error.strerror or error} {error.filename or ''}".strip())
        os._exit(1)
    kind, message, code = _judge(job)
    with contextlib.suppress(Exception):  # closed, or replaced by something of the program's
        sys.stdout.flush()
    tell(kind, message)
    os._exit(code)


def _judge(job):
    """Runs the parts (name, source) one after the other as one main module: (how it ended, message, exit code).

    The last part may end in ``sys.exit(0)``, as unittest's do, unless what is called there by another part does so.
    """
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = job["arguments"]
    sys.path.insert(0, job["folder"])
    parts = job["parts"]
    if len(parts) == 1:
        main.__file__ = parts[0][0]
    try:
        for name, source in parts:
            exec(compile(source, name, "exec"), main.__dict__)
    except AssertionError as error:
        return "fail", f"AssertionError: {error}", _trace(error)
    except MemoryError as error:
        return "oom", "MemoryError", _trace(error)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            with contextlib.suppress(Exception):
                print(error.code, file=sys.stderr)
        left = len(parts) == 1 or _passes(error.__traceback__, parts[0][0])
        kind = "left" if code == 0 and left else "pass" if code == 0 else "fail"
        return kind, f"SystemExit: {error.code}", code & 0xFF
    except BaseException as error:
        return "fail", f"{type(error).__name__}: {error}", _trace(error)
    return "pass", "", 0


def _trace(error):
    """Prints the traceback as the interpreter would, without our own frame; gives the interpreter's exit code."""
    with contextlib.suppress(Exception):  # whatever the program did to its modules
        import traceback

        trace = error.__traceback__.tb_next
        print("".join(traceback.format_exception(type(error), error, trace)), end="", file=sys.stderr, flush=True)
    return 1


def _passes(trace, name):
    """Whether a traceback goes through code of this name."""
    while trace:
        if trace.tb_frame.f_code.co_filename == name:
            return True
        trace = trace.tb_next
    return False


def start(job):
    """The keeper's life; what goes wrong in it is told on standard error and by the absence of a report."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keep(job)
