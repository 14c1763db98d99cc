"""Run one untrusted Python program; started by sandbox.py as `python -I sandbox_child.py FD`.

The program comes on stdin, the verdict goes over the socket FD. Every layer below that the system allows is put on
before the program's first line runs, and reported; none of them can be taken off from inside.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

NOBODY = 65534
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
WRITING = 0b1_1111_1111_0010  # create, write, remove
EXECUTING, TRUNCATING = 1, 1 << 14
SCOPE_SIGNALS_AND_SOCKETS = 0b11
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

# What no solution of a programming problem needs; the names are those of Python's audit events.
FORBIDDEN = (
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "os.kill",
    "os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "os.chown", "os.chdir", "os.putenv", "shutil.", "subprocess.", "socket.", "ctypes.", "pty.", "fcntl.", "signal.",
    "tempfile.", "resource.", "syslog.", "urllib.", "http.", "ftplib.", "smtplib.", "telnetlib.", "webbrowser.",
)  # fmt: skip


def become_nobody() -> bool:
    """Give root's rights up, if these are root's.

    Where Python itself lies in root's home, only the real user id changes: it is what the limit of processes goes by.
    """
    if os.geteuid() != 0:
        return False
    os.setgroups([])
    os.seteuid(NOBODY)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0)
    if readable:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    else:
        os.setresuid(NOBODY, 0, 0)
    return readable


def leave_namespaces(libc: Any) -> list[str]:
    """Go where there is no network and no other process; continues in a child, with this process waiting for it."""
    if not sys.platform.startswith("linux") or libc.unshare(CLONE_NEWUSER) != 0:
        return []
    layers = []
    if libc.unshare(CLONE_NEWNET | CLONE_NEWIPC) == 0:
        layers.append("network namespace")
    if libc.unshare(CLONE_NEWPID) == 0:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        layers.append("process namespace")
    return layers


def freeze_files(libc: Any) -> bool:
    """Landlock (Linux 5.13): nothing outside the working directory can be written, nothing at all executed."""
    if not sys.platform.startswith("linux"):
        return False
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    writing = WRITING | (TRUNCATING if version >= 3 else 0)
    scopes = SCOPE_SIGNALS_AND_SOCKETS if version >= 6 else 0
    handled = (ctypes.c_uint64 * 3)(writing | EXECUTING, 0, scopes)
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, handled, 24 if version >= 6 else 8, 0)
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    allowed = writing.to_bytes(8, "little") + here.to_bytes(4, "little")
    done = (
        libc.syscall(LANDLOCK_ADD_RULE, rules, 1, allowed, 0) == 0
        and libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        and libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0
    )
    os.close(here)
    os.close(rules)
    return done


def limit_resources(limits: dict[str, int]) -> list[str]:
    """CPU seconds, bytes of memory and of files, open files, processes; says which limits hold."""
    layers = []
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS knows no address space
            resource.setrlimit(getattr(resource, name), (value, value))
            layers.append(name)
    try:  # root is free of the limit of processes
        child = os.fork()
    except OSError:
        return layers
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return [name for name in layers if name != "RLIMIT_NPROC"]


def forbid_events() -> None:
    """Refuse what Python reports before it does it; an audit hook can't be removed."""

    def refuse(event: str, args: tuple) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is forbidden here")
        if event == "open":
            path, mode, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if isinstance(path, int) or writes:
                raise PermissionError("opening a file to write is forbidden here")

    sys.addaudithook(refuse)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    task = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    libc = ctypes.CDLL(None, use_errno=True)
    layers = ["process group", "empty environment", "temporary directory"]
    layers += ["user nobody"] if become_nobody() else []
    layers += leave_namespaces(libc)
    layers += ["read-only files"] if freeze_files(libc) else []
    layers += limit_resources(task["limits"])
    forbid_events()
    layers.append("audit hook")
    channel.sendall(json.dumps({"layers": layers}).encode() + b"\n")
    receive, send = channel.recv, channel.sendall  # bound now: the program may replace what it likes
    try:
        program = compile(task["program"], "candidate", "exec")
        exec(program, {"__name__": "candidate"})
    except BaseException as error:  # whatever it raises, SystemExit too, it has not passed
        send(json.dumps({"failed": f"{type(error).__name__}: {error}"[:300]}).encode() + b"\n")
        os._exit(0)
    # Only now is the word read that stands for "passed": a program that ends early can't have printed it.
    word = receive(64).decode()
    send(json.dumps({"passed": word}).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
