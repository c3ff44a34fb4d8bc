"""What runs in the sandbox's own process: it gives up what it could do harm with, and then runs the program.

Started by `broadsheet.core.sandbox.run` as a script of its own, without the package and without site-packages. Takes the
job on standard input, a literal: ``mode`` ("python": run ``source`` and then ``tests`` here; "exec": become ``argv``),
``guard``, ``seconds``, ``memory`` in bytes or None, ``nonce``. The verdict goes to the file descriptor in its first
argument, marked by the nonce: a program that merely ends, whatever its exit code, has not passed.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
import types

#: System calls a program is refused: (name, number on x86-64, number on aarch64 or None where it does not exist).
REFUSED = (
    # sockets of any kind (but pairs within the process, which event loops need), and the ring that could open them unseen
    ("socket", 41, 198), ("io_uring_setup", 425, 425),
    # more processes
    ("fork", 57, None), ("vfork", 58, None),
    # other processes, and whatever outlives this one
    ("ptrace", 101, 117), ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271), ("pidfd_getfd", 438, 438),
    ("pidfd_send_signal", 424, 424), ("rt_sigqueueinfo", 129, 138), ("rt_tgsigqueueinfo", 297, 240), ("tkill", 200, 130),
    ("shmget", 29, 194), ("semget", 64, 190), ("msgget", 68, 186), ("mq_open", 240, 180),
    ("add_key", 248, 217), ("request_key", 249, 218), ("keyctl", 250, 219),
    # new powers
    ("unshare", 272, 97), ("setns", 308, 268), ("bpf", 321, 280), ("userfaultfd", 323, 282), ("perf_event_open", 298, 241),
    # the file system, but for reading
    ("creat", 85, None), ("mkdir", 83, None), ("mkdirat", 258, 34), ("mknod", 133, None), ("mknodat", 259, 33),
    ("rmdir", 84, None), ("unlink", 87, None), ("unlinkat", 263, 35), ("link", 86, None), ("linkat", 265, 37),
    ("symlink", 88, None), ("symlinkat", 266, 36), ("rename", 82, None), ("renameat", 264, 38), ("renameat2", 316, 276),
    ("truncate", 76, 45), ("ftruncate", 77, 46), ("fallocate", 285, 47),
    ("chmod", 90, None), ("fchmod", 91, 52), ("fchmodat", 268, 53), ("fchmodat2", 452, 452),
    ("chown", 92, None), ("lchown", 94, None), ("fchown", 93, 55), ("fchownat", 260, 54),
    ("utime", 132, None), ("utimes", 235, None), ("futimesat", 261, None), ("utimensat", 280, 88),
    ("setxattr", 188, 5), ("lsetxattr", 189, 6), ("fsetxattr", 190, 7), ("setxattrat", 463, 463),
    ("removexattr", 197, 14), ("lremovexattr", 198, 15), ("fremovexattr", 199, 16), ("removexattrat", 466, 466),
)  # fmt: skip
#: Refused too, but "exec" needs the first once: to become the program.
EXECUTE = (("execve", 59, 221), ("execveat", 322, 281))
#: Answered with "no such call", so that the C library falls back to an older one that is judged by its arguments.
ABSENT = (("clone3", 435, 435), ("openat2", 437, 437))
#: AUDIT_ARCH_* by machine, and which column of the tables above it has.
MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}

_LOAD, _JUMP_EQUAL, _JUMP_MASK, _JUMP_FROM, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_NUMBER, _ARCHITECTURE = 0, 4  # places in struct seccomp_data
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _argument(index, high=False):
    """Where half of a system call's argument lies in struct seccomp_data (little-endian)."""
    return 16 + 8 * index + 4 * high


def seccomp_filter(machine, executes):
    """The filter as a list of (code, jump if true, jump if false, k): a small program in classic BPF.

    Every rule is "equal to this number, or skip the rule", so no jump leaves its rule.
    """
    architecture, column = MACHINES[machine]
    rules = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER),
    ]  # fmt: skip
    if machine == "x86_64":  # the x32 calls have other numbers
        rules += [(_JUMP_FROM, 0, 1, 0x40000000), (_RETURN, 0, 0, _EPERM)]

    def rule(number, *then):
        rules.extend([(_JUMP_EQUAL, 0, len(then), number), *then])

    for names, answer in ((REFUSED + (() if executes else EXECUTE), _EPERM), (ABSENT, _ENOSYS)):
        for name_and_numbers in names:
            if name_and_numbers[column] is not None:
                rule(name_and_numbers[column], (_RETURN, 0, 0, answer))
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)
    clone, kill, tgkill, openat, prlimit, setrlimit = {
        "x86_64": (56, 62, 234, 257, 302, 160), "aarch64": (220, 129, 131, 56, 261, 164),
    }[machine]  # fmt: skip
    rule(clone, (_LOAD, 0, 0, _argument(0)), (_JUMP_MASK, 0, 1, _CLONE_THREAD), allow, refuse)
    for signalling in (kill, tgkill):  # to itself alone
        rule(signalling, (_LOAD, 0, 0, _argument(0)), (_JUMP_EQUAL, 0, 1, os.getpid()), allow, refuse)
    rule(openat, (_LOAD, 0, 0, _argument(2)), (_JUMP_MASK, 0, 1, _WRITING), refuse, allow)
    if machine == "x86_64":  # open(2)
        rule(2, (_LOAD, 0, 0, _argument(1)), (_JUMP_MASK, 0, 1, _WRITING), refuse, allow)
    rule(
        prlimit,  # with a null pointer it only reads
        *[(_LOAD, 0, 0, _argument(2)), (_JUMP_EQUAL, 0, 3, 0), (_LOAD, 0, 0, _argument(2, high=True))],
        *[(_JUMP_EQUAL, 0, 1, 0), allow, refuse],
    )
    rule(setrlimit, refuse)
    rules.append(allow)
    return rules


def confine(executes):
    """Gives up all capabilities and, by a seccomp filter, the calls above; for good. Raises OSError when it cannot be
    done."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    code = b"".join(struct.pack("HBBI", *line) for line in seccomp_filter(os.uname().machine, executes))
    filters = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(filters))
    set_seccomp, no_new_privileges, die_with_parent = 22, 38, 1
    steps = (
        ("PR_SET_PDEATHSIG", lambda: libc.prctl(die_with_parent, signal.SIGKILL, 0, 0, 0)),
        ("PR_SET_NO_NEW_PRIVS", lambda: libc.prctl(no_new_privileges, 1, 0, 0, 0)),
        ("capset", lambda: libc.capset(header, nothing)),
        ("PR_SET_SECCOMP", lambda: libc.prctl(set_seccomp, 2, program, 0, 0)),
    )
    for name, step in steps:
        if step() != 0:
            raise OSError(ctypes.get_errno(), name)


def watch(event, arguments):
    """The audit hook of the weaker guard: Python's own ways to sockets, processes, C and files are closed."""
    writing = event == "open" and (set(arguments[1] or "") & set("wxa+") or (arguments[2] or 0) & _WRITING)
    refused = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty.")
    changing = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.ch", "shutil.")
    if writing or event.startswith((*refused, *changing, "ctypes.", "signal.pthread_kill")):
        raise PermissionError(1, "not permitted in the sandbox: " + event)


def limit(seconds, memory, processes):
    """Resource limits, hard ones."""
    wanted = {"RLIMIT_CPU": int(seconds) + 1, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 256}
    if memory:
        wanted["RLIMIT_AS"] = memory
    if not processes:
        wanted["RLIMIT_NPROC"] = 0
    for name, value in wanted.items():
        which = getattr(resource, name)
        _, most = resource.getrlimit(which)
        hard = value + (name == "RLIMIT_CPU")  # a second between the signal that says so and the one that ends it
        if most != resource.RLIM_INFINITY:
            value, hard = min(value, most), min(hard, most)
        resource.setrlimit(which, (value, hard))


def judge(source, tests):
    """Runs both as one main module and says how it ended: (status, message)."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = [""]
    try:
        exec(compile(source, "<source>", "exec"), main.__dict__)
        exec(compile(tests, "<tests>", "exec"), main.__dict__)
    except AssertionError as error:
        return "failed", f"AssertionError: {error}"
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code and not _passes(error.__traceback__, "<source>"):
            return "passed", ""  # tests may end in sys.exit(0), as unittest's do; what they test may not
        return "error", f"{type(error).__name__}: {error}"
    return "passed", ""


def _passes(trace, name):
    """Whether a traceback goes through code of this name."""
    while trace:
        if trace.tb_frame.f_code.co_filename == name:
            return True
        trace = trace.tb_next
    return False


def start():
    report = int(sys.argv[1])
    job = eval(sys.stdin.buffer.read(), {"__builtins__": {}})
    os.set_inheritable(report, False)
    limit(job["seconds"], job["memory"], processes=job["guard"] == "seccomp")  # the filter is finer: it allows threads
    if job["guard"] == "seccomp":
        confine(executes=job["mode"] == "exec")
    else:
        sys.addaudithook(watch)
    if job["mode"] == "exec":
        os.execve(job["argv"][0], job["argv"], {"LC_ALL": "C.UTF-8"})
    status, message = judge(job["source"], job["tests"])
    with contextlib.suppress(Exception):  # closed, or replaced by something of the program's
        sys.stdout.flush()
    os.write(report, f"{job['nonce']} {status} {message[:500]}".encode("utf-8", "replace"))
    os._exit(0)


if __name__ == "__main__":
    start()
