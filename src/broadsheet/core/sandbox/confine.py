"""What a program's process gives up before the program runs: namespaces, paths, system calls, resources.

Runs inside the sandbox alone, without the package and without site-packages, under the same interpreter as the library.
Everything here is for good: nothing of it can be undone from within.
"""

import ctypes
import os
import resource
import signal
import stat
import struct
import sys

# --- system calls -------------------------------------------------------------------------------------------------------

#: System calls that no program may make: (name, number on x86-64, number on aarch64 or None where it does not exist).
REFUSED = (
    # sockets of any kind (but pairs within the process, which event loops need), and the ring that could open them unseen
    ("socket", 41, 198), ("io_uring_setup", 425, 425),
    # other processes, and whatever outlives this one
    ("ptrace", 101, 117), ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271), ("pidfd_getfd", 438, 438),
    ("pidfd_send_signal", 424, 424), ("rt_sigqueueinfo", 129, 138), ("rt_tgsigqueueinfo", 297, 240), ("tkill", 200, 130),
    ("shmget", 29, 194), ("semget", 64, 190), ("msgget", 68, 186), ("mq_open", 240, 180),
    ("add_key", 248, 217), ("request_key", 249, 218), ("keyctl", 250, 219),
    # new powers
    ("unshare", 272, 97), ("setns", 308, 268), ("bpf", 321, 280), ("userfaultfd", 323, 282), ("perf_event_open", 298, 241),
    # device files and marks beside a file's contents
    ("mknod", 133, None), ("mknodat", 259, 33), ("setxattr", 188, 5), ("lsetxattr", 189, 6), ("fsetxattr", 190, 7),
    ("setxattrat", 463, 463), ("removexattr", 197, 14), ("lremovexattr", 198, 15), ("fremovexattr", 199, 16),
    ("removexattrat", 466, 466),
)  # fmt: skip
#: More processes: refused to a program that may have but one.
FORKING = (("fork", 57, None), ("vfork", 58, None))
#: Refused too to such a program, but a command needs the first once: to become it.
EXECUTE = (("execve", 59, 221), ("execveat", 322, 281))
#: The file system, but for reading: refused to a program that may write nothing.
WRITING = (
    ("creat", 85, None), ("mkdir", 83, None), ("mkdirat", 258, 34),
    ("rmdir", 84, None), ("unlink", 87, None), ("unlinkat", 263, 35), ("link", 86, None), ("linkat", 265, 37),
    ("symlink", 88, None), ("symlinkat", 266, 36), ("rename", 82, None), ("renameat", 264, 38), ("renameat2", 316, 276),
    ("truncate", 76, 45), ("ftruncate", 77, 46), ("fallocate", 285, 47),
    ("chmod", 90, None), ("fchmod", 91, 52), ("fchmodat", 268, 53), ("fchmodat2", 452, 452),
    ("chown", 92, None), ("lchown", 94, None), ("fchown", 93, 55), ("fchownat", 260, 54),
    ("utime", 132, None), ("utimes", 235, None), ("futimesat", 261, None), ("utimensat", 280, 88),
)  # fmt: skip
#: Answered with "no such call", so that the C library falls back to an older one that is judged by its arguments.
ABSENT = (("clone3", 435, 435), ("openat2", 437, 437))
#: AUDIT_ARCH_* by machine, and which column of the tables above it has.
MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}

_LOAD, _JUMP_EQUAL, _JUMP_MASK, _JUMP_FROM, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_NUMBER, _ARCHITECTURE = 0, 4  # places in struct seccomp_data
_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020080
_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _argument(index, high=False):
    """Where half of a system call's argument lies in struct seccomp_data (little-endian)."""
    return 16 + 8 * index + 4 * high


def seccomp_filter(machine, executes=False, writes=False, forks=False, signals=False, threads=True):
    """The filter as a list of (code, jump if true, jump if false, k): a small program in classic BPF.

    ``executes``: it may become another program; ``writes``: change files; ``forks``: have processes; ``signals``: signal
    others than itself; ``threads``: have threads.
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

    refused = REFUSED + (() if writes else WRITING) + (() if forks else FORKING) + (() if executes or forks else EXECUTE)
    for names, answer in ((refused, _EPERM), (ABSENT, _ENOSYS)):
        for name_and_numbers in names:
            if name_and_numbers[column] is not None:
                rule(name_and_numbers[column], (_RETURN, 0, 0, answer))
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)
    clone, kill, tgkill, openat, prlimit, setrlimit = {
        "x86_64": (56, 62, 234, 257, 302, 160), "aarch64": (220, 129, 131, 56, 261, 164),
    }[machine]  # fmt: skip
    flags = (_LOAD, 0, 0, _argument(0))
    if not threads:
        rule(clone, refuse)
    elif forks:
        rule(clone, flags, (_JUMP_MASK, 0, 1, _CLONE_NEW), refuse, allow)  # but no namespaces, in which it had powers
    else:
        rule(clone, flags, (_JUMP_MASK, 0, 1, _CLONE_THREAD), allow, refuse)
    if not signals:
        for signalling in (kill, tgkill):  # to itself alone
            rule(signalling, (_LOAD, 0, 0, _argument(0)), (_JUMP_EQUAL, 0, 1, os.getpid()), allow, refuse)
    if not writes:
        rule(openat, (_LOAD, 0, 0, _argument(2)), (_JUMP_MASK, 0, 1, _WRITING_FLAGS), refuse, allow)
        if machine == "x86_64":  # open(2)
            rule(2, (_LOAD, 0, 0, _argument(1)), (_JUMP_MASK, 0, 1, _WRITING_FLAGS), refuse, allow)
    rule(
        prlimit,  # with a null pointer it only reads
        *[(_LOAD, 0, 0, _argument(2)), (_JUMP_EQUAL, 0, 3, 0), (_LOAD, 0, 0, _argument(2, high=True))],
        *[(_JUMP_EQUAL, 0, 1, 0), allow, refuse],
    )
    rule(setrlimit, refuse)
    rules.append(allow)
    return rules


# --- the kernel ---------------------------------------------------------------------------------------------------------


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _checked(result, what):
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


_DIE_WITH_PARENT, _DUMPABLE, _SECCOMP, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 22, 36, 38


def control(option, *arguments):
    """prctl(2), with names for the options that are used here."""
    number = {
        "die with parent": _DIE_WITH_PARENT, "dumpable": _DUMPABLE, "seccomp": _SECCOMP, "subreaper": _SUBREAPER,
        "no new privileges": _NO_NEW_PRIVILEGES,
    }[option]  # fmt: skip
    padded = [*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments), *[ctypes.c_ulong(0)] * 4][:4]
    _checked(_libc().prctl(number, *padded), f"prctl {option}")


def confine(executes=False, writes=False, forks=False, signals=False, threads=True):
    """Gives up all capabilities and, by a seccomp filter, the calls above. Raises OSError when it cannot be done."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    lines = seccomp_filter(os.uname().machine, executes, writes, forks, signals, threads)
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    filters = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(filters))
    control("die with parent", signal.SIGKILL)
    control("no new privileges", 1)
    _checked(_libc().capset(header, nothing), "capset")
    control("seccomp", 2, program)


# --- paths --------------------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read files, read folders
_OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14  # what can be allowed on a file: execute, write, read, truncate


def landlock_version():
    """The kernel's version of Landlock, 0 without it."""
    return max(0, _libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def landlock(readable, writable):
    """Of the file system leaves ``readable`` to be read and ``writable`` to be changed; signals (since version 6) reach only
    what is confined along with it. Raises OSError without Landlock."""
    libc, version = _libc(), landlock_version()
    everything = (1 << (13 + (version >= 2) + (version >= 3))) - 1
    ruleset = struct.pack("QQQ", everything, 0, 1 << 1) if version >= 6 else struct.pack("Q", everything)
    rules = _checked(libc.syscall(_CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0), "landlock")
    for paths, allowed in ((readable, _READ), (writable, everything)):
        for path in paths:
            try:
                handle = os.open(path, getattr(os, "O_PATH", 0) | os.O_CLOEXEC)
            except OSError:
                continue
            folder = stat.S_ISDIR(os.fstat(handle).st_mode)
            rule = struct.pack("=Qi", allowed if folder else allowed & _OF_FILES, handle)
            _checked(libc.syscall(_ADD_RULE, rules, 1, rule, 0), f"landlock {path}")
            os.close(handle)
    control("no new privileges", 1)
    _checked(libc.syscall(_RESTRICT_SELF, rules, 0), "landlock")
    os.close(rules)


_NEW, _NEW_USER = 0x00020000 | 0x08000000 | 0x04000000 | 0x20000000 | 0x40000000, 0x10000000  # mount ipc uts pid net
_RECURSIVE, _PRIVATE, _BIND, _NOSUID_NODEV, _READ_ONLY = 0x4000, 0x40000, 0x1000, 0x6, 0x1


def namespaces(root, readable, writable, own_user=True):
    """Moves this process into new process, network, mount, IPC and host-name namespaces, in which there are the paths
    ``readable``, and empty folders in memory ``writable``: {path: bytes that fit}. ``root``: an empty folder to build in.
    ``own_user``: into a new user namespace too, which all but root need.

    Returns in the first process of the new namespace; what called waits for it and leaves with its exit status. When that
    process ends, so does every other of its namespace. Raises OSError where it is not allowed.
    """
    libc, user, group = _libc(), os.getuid(), os.getgid()
    _checked(libc.unshare(_NEW | (_NEW_USER if own_user else 0)), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        if own_user:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    control("die with parent", signal.SIGKILL)

    def mount(source, target, kind=None, flags=0, data=None):
        encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
        _checked(libc.mount(*encoded, ctypes.c_ulong(flags), data and data.encode()), f"mount {target}")

    mount("none", "/", None, _RECURSIVE | _PRIVATE)
    mount("tmpfs", root, "tmpfs", _NOSUID_NODEV, "size=1m,mode=755")
    for path in readable:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            mount(path, target, None, _BIND | _RECURSIVE)
            _read_only(libc, target)
        elif os.path.exists(path):
            open(target, "w").close()
            mount(path, target, None, _BIND)
            if not path.startswith("/dev/"):
                _read_only(libc, target)
    for path, size in writable.items():
        os.makedirs(root + path)
        mount("tmpfs", root + path, "tmpfs", _NOSUID_NODEV, f"size={size},mode=777")
    os.makedirs(root + "/proc")
    mount("proc", root + "/proc", "proc", _NOSUID_NODEV | 0x8)
    os.chdir(root)
    pivot_root = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    _checked(libc.syscall(pivot_root, b".", b"."), "pivot_root")
    _checked(libc.umount2(b".", 2), "umount")
    os.chdir("/")
    mount(None, "/", None, 0x20 | _BIND | _READ_ONLY | _NOSUID_NODEV)


def _read_only(libc, path):
    """mount_setattr(2): read-only, without set-uid programs, with all that is mounted below."""
    attributes = struct.pack("QQQQ", 0x1 | 0x2, 0, 0, 0)
    at_here, recursive = -100, 0x8000
    _checked(libc.syscall(442, at_here, os.fsencode(path), recursive, attributes, ctypes.c_size_t(32)), "mount_setattr")


# --- resources ----------------------------------------------------------------------------------------------------------


def limit(seconds, memory, processes, file_bytes, open_files=256):
    """Resource limits, hard ones. ``memory``: bytes of address space or None; ``processes``: threads count, or None."""
    cpu = int(seconds) + 1
    wanted = {"RLIMIT_CPU": cpu, "RLIMIT_FSIZE": file_bytes, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": open_files}
    if memory:
        wanted["RLIMIT_AS"] = memory
    if processes is not None:
        wanted["RLIMIT_NPROC"] = processes
    for name, value in wanted.items():
        which = getattr(resource, name)
        _, most = resource.getrlimit(which)
        hard = value + (name == "RLIMIT_CPU")  # a second between the signal that says so and the one that ends it
        if most != resource.RLIM_INFINITY:
            value, hard = min(value, most), min(hard, most)
        resource.setrlimit(which, (value, hard))


def watch(folder=None):
    """The audit hook of the unsafe backend: Python's own ways to sockets, processes, C and files are closed; but for files
    in ``folder``, if given. This stops accidents and not intent."""
    processes = ("subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty.")
    refused = ("socket.", "ctypes.", "signal.pthread_kill", *processes)
    changing = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.ch", "shutil.")
    inside = folder and os.path.realpath(folder) + os.sep

    def hook(event, arguments):
        if event == "open":
            changes = set(arguments[1] or "") & set("wxa+") or (arguments[2] or 0) & _WRITING_FLAGS
        else:
            changes = event.startswith(changing)
        if changes and inside:
            paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes)][: 1 + (event != "open")]
            changes = not all((os.path.realpath(path) + os.sep).startswith(inside) for path in paths)
        if changes or event.startswith(refused):
            raise PermissionError(1, "not permitted in the sandbox: " + event)

    sys.addaudithook(hook)
