"""Model-written Python in a box: bubblewrap's namespaces, limits of the kernel, and a watch from outside.

    run        one program -> Outcome
    run_all    many, several at a time, in order
    check      the same box with a program of ours: SandboxError says why there can't be one

Inside there is no network, the system is read-only and holds nothing of its user, /tmp is private and bounded, the
environment is empty, and no process outlives the run or its caller. What one process may take the kernel limits
(memory, CPU time, file size, open files, processes); what all of them take together is looked at 40 times a second.
A caller that is root runs the box as nobody: the kernel doesn't count root's processes.

Left out: proof that a program passed its tests. Code that wants to can print whatever a judge looks for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwenlet.errors import SandboxError
from qwenlet.evals.seccomp import filter_program

Ending = Literal["exit", "signal", "time", "cpu", "memory", "processes", "files", "output"]
INSTALL = "apt-get install bubblewrap (or your system's package of that name), Linux only"

_MIB = 1 << 20
_NOBODY = 65534
_PROGRAM = "/sandbox/program.py"
_LOOK_EVERY = 0.025  # seconds
_SIGNAL_BASE = 128  # as shells report a death by signal

# Runs inside, before the program: the kernel counts processes per namespace, so this limit can't be set outside. The
# init is of the same user and could be taken over, so that it gets the same limits.
_LAUNCH = """
import json, os, resource, sys
for name, (soft, hard) in json.loads(sys.argv[1]).items():
    which = getattr(resource, name)
    most = resource.getrlimit(which)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    for process in (1, 0):
        resource.prlimit(process, which, (soft, hard))
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
        wall_seconds: from start to end.
        cpu_seconds: of all processes together.
        memory_bytes: address space of each process, and what all processes hold together.
        tmp_bytes: of /tmp, and again of /dev/shm. It is memory, beside `memory_bytes`.
        file_bytes: of one file.
        output_bytes: of stdout, and again of stderr.
        processes: at once, threads counted too.
        open_files: of each process.
        files: files and folders in /tmp.
    """

    wall_seconds: float = 20.0
    cpu_seconds: int = 8
    memory_bytes: int = 512 * _MIB
    tmp_bytes: int = 16 * _MIB
    file_bytes: int = 8 * _MIB
    output_bytes: int = 64 << 10
    processes: int = 16
    open_files: int = 64
    files: int = 1000


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        ending: "exit" by itself, "signal" by a signal (`code` is its number), else the limit that ended it.
        code: exit code or signal; None where the box was torn down.
        stdout: what was written before the end, at most the limit, undecodable bytes replaced.
        stderr: the same.
        seconds: wall time.
        cpu_seconds: the most that was seen, of all processes.
        memory_bytes: the most that was seen in use, 0 where it ended before anybody looked.
    """

    ending: Ending
    code: int | None
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    memory_bytes: int

    @property
    def ok(self) -> bool:
        return self.ending == "exit" and self.code == 0

    @property
    def summary(self) -> str:
        """One line for people: "exit 1: AssertionError", "time limit"."""
        if self.ending == "exit":
            last = self.stderr.strip().rsplit("\n", 1)[-1][:200]
            return f"exit {self.code}: {last}" if self.code and last else f"exit {self.code}"
        return f"signal {self.code}" if self.ending == "signal" else f"{self.ending} limit"


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Runs one Python program and waits for its end. Nothing of it is left when this returns.

    Args:
        program: source text. It finds itself in /sandbox/program.py, starts in an empty /tmp, and has no input.
        limits: the default suits a HumanEval problem.
    Raises:
        SandboxError: bubblewrap is missing or can't start, with its words.
    """
    return _run(program, limits or Limits(), interpreter())


def run_all(programs: Iterable[str], limits: Limits | None = None, workers: int = 2) -> Iterator[Outcome]:
    """The outcomes of many programs, in their order, `workers` at a time."""
    check()
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda program: run(program, limits), programs)


def check() -> None:
    """Raises SandboxError, saying why, where model-written code can't be run."""
    interpreter()


@functools.cache
def interpreter() -> str:
    """The Python that runs inside: the one we run on, or the system's where that is out of the box's reach.

    A caller that is root may have its Python where nobody can't read it.
    """
    own = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    system = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    said = []
    for python in dict.fromkeys(path for path in (own, system and os.path.realpath(system)) if path):
        try:
            outcome = _run("print('inside')", Limits(), python)
        except SandboxError as error:
            if _command() is None:
                raise
            said.append(error.message)
            continue
        if outcome.ok and outcome.stdout == "inside\n":
            return python
        said.append(f"{python}: {outcome.summary}")
    raise SandboxError(
        f"the sandbox can't start: {'; '.join(said)}",
        hint="bubblewrap needs version 0.7, user namespaces (see sysctl user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns) and, in a container, the "
        "permission to make them and to mount /proc",
    )


def _command() -> str | None:
    return shutil.which("bwrap") if sys.platform == "linux" else None


def _run(program: str, limits: Limits, python: str) -> Outcome:
    bwrap = _command()
    if bwrap is None:
        raise SandboxError(
            "model-written code runs in a sandbox only, and bubblewrap (bwrap) is not installed", hint=INSTALL
        )
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_file_of(program.encode("utf-8", "replace")))
        denied = stack.enter_context(_file_of(filter_program()))
        read, write = os.pipe()
        stack.callback(os.close, read)
        with os.fdopen(write, "wb") as status:
            options = _box(python, limits)
            options += ["--json-status-fd", str(status.fileno()), "--seccomp", str(denied.fileno())]
            options += ["--perms", "0444", "--ro-bind-data", str(source.fileno()), _PROGRAM, "--remount-ro", "/"]
            launch = [python, "-I", "-S", "-c", _LAUNCH, json.dumps(_rlimits(limits)), python, "-I", "-B", _PROGRAM]
            root = os.geteuid() == 0
            process = subprocess.Popen(
                [bwrap, *options, "--", *launch],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                pass_fds=(source.fileno(), denied.fileno(), status.fileno()),
                user=_NOBODY if root else None,
                group=_NOBODY if root else None,
                extra_groups=[] if root else None,
            )
        return _Watch(process, read, limits).outcome()


@contextlib.contextmanager
def _file_of(content: bytes) -> Iterator[Any]:
    """A file without a name, for bubblewrap to read from its start."""
    with os.fdopen(os.memfd_create("sandbox"), "w+b") as file:
        file.write(content)
        file.seek(0)
        yield file


def _box(python: str, limits: Limits) -> list[str]:
    """bubblewrap's options that make the world inside."""
    options = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    options += ["--uid", str(_NOBODY), "--gid", str(_NOBODY), "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        here = Path(name)
        options += ["--symlink", str(here.readlink()), name] if here.is_symlink() else ["--ro-bind-try", name, name]
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        options += ["--ro-bind-try", name, name]
    prefix = Path(python).parent.parent
    if not prefix.is_relative_to("/usr"):
        for name in ("bin", "lib", "lib64"):  # not the prefix, which may be somebody's home
            options += ["--ro-bind-try", str(prefix / name), str(prefix / name)]
    size = ["--size", str(limits.tmp_bytes), "--tmpfs"]
    options += ["--proc", "/proc", "--dev", "/dev", *size, "/dev/shm", "--remount-ro", "/dev", *size, "/tmp"]
    return [*options, "--chdir", "/tmp"]


def _rlimits(limits: Limits) -> dict[str, tuple[int, int]]:
    """Soft and hard limit of every process. CPU time warns with SIGXCPU first, so that the ending can be told."""
    return {
        "RLIMIT_CPU": (limits.cpu_seconds, limits.cpu_seconds + 1),
        "RLIMIT_AS": (limits.memory_bytes, limits.memory_bytes),
        "RLIMIT_FSIZE": (limits.file_bytes, limits.file_bytes),
        "RLIMIT_NOFILE": (limits.open_files, limits.open_files),
        # bubblewrap's init is counted
        "RLIMIT_NPROC": (limits.processes + 1, limits.processes + 1),
        "RLIMIT_STACK": (8 * _MIB, 8 * _MIB),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
        "RLIMIT_MEMLOCK": (0, 0),
    }


class _Watch:
    """One run, from outside: reads what it says, looks at what it takes, ends it.

    Args:
        process: bubblewrap, which waits for the box's init, which waits for the program.
        status: where bubblewrap tells the init's pid, and the exit code once everything was set up and ended.
    """

    def __init__(self, process: subprocess.Popen[bytes], status: int, limits: Limits) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process, self.limits = process, limits
        self.started = time.monotonic()
        self.deadline = self.started + limits.wall_seconds
        self.stdout, self.stderr, self.status = process.stdout.fileno(), process.stderr.fileno(), status
        self.said = {self.stdout: b"", self.stderr: b"", self.status: b""}
        self.broken: Ending | None = None
        self.most_memory = 0
        self.cpu_seconds = 0.0
        self.init: int | None = None
        self.init_handle: int | None = None
        self.inside = False

    def outcome(self) -> Outcome:
        ended = os.pidfd_open(self.process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for fd in (*self.said, ended):
                    selector.register(fd, selectors.EVENT_READ)
                self._until_the_end(selector, ended)
        finally:
            self._end(ended)
            os.close(ended)
            self.process.wait()
            for pipe in (self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()
            self._wait_for_init()
        return self._told()

    def _until_the_end(self, selector: selectors.BaseSelector, ended: int) -> None:
        """Returns once the program ended and all it wrote is read, or a limit is reached."""
        waiting = set(self.said) | {ended}
        look = self.started
        while waiting and self.broken is None:
            now = time.monotonic()
            if now >= self.deadline:
                self.broken = "time"
            elif now >= look:
                self._look()
                look = now + _LOOK_EVERY
            for key, _ in selector.select(min(_LOOK_EVERY, max(0.0, self.deadline - now))):
                if key.fd == ended or not self._read(key.fd):
                    selector.unregister(key.fd)
                    waiting.discard(key.fd)

    def _read(self, fd: int) -> bool:
        piece = os.read(fd, 1 << 16)
        self.said[fd] += piece
        if fd != self.status and len(self.said[fd]) > self.limits.output_bytes:
            self.said[fd] = self.said[fd][: self.limits.output_bytes]
            self.broken = self.broken or "output"
        elif fd == self.status and self.init is None and b"\n" in self.said[fd]:
            self.init = int(self._documents()["child-pid"])
            with contextlib.suppress(ProcessLookupError):
                self.init_handle = os.pidfd_open(self.init)
        return bool(piece)

    def _documents(self) -> dict[str, int]:
        """What bubblewrap has told so far."""
        told: dict[str, int] = {}
        for line in self.said[self.status].split(b"\n")[:-1]:
            told |= json.loads(line)
        return told

    def _look(self) -> None:
        """Breaks the run where all processes together are beyond a limit."""
        if self.init is None:
            return
        root = Path(f"/proc/{self.init}/root")
        try:
            # until the box is set up its root is the host's, whose processes are none of its
            if not (self.inside or (root / _PROGRAM[1:]).exists()):
                return
            self.inside = True
            processes = [entry for entry in (root / "proc").iterdir() if entry.name.isdigit()]
            space = os.statvfs(root / "tmp"), os.statvfs(root / "dev/shm")
        except OSError:
            return  # it just ended
        held, cpu_seconds, threads = 0, 0.0, 0
        for entry in processes:
            with contextlib.suppress(OSError):
                held += _bytes_held((entry / "status").read_bytes())
                used, count = _time_used((entry / "stat").read_bytes())
                cpu_seconds, threads = cpu_seconds + used, threads + count
        self.most_memory = max(self.most_memory, held)
        self.cpu_seconds = max(self.cpu_seconds, cpu_seconds)
        if held > self.limits.memory_bytes:
            self.broken = "memory"
        elif cpu_seconds > self.limits.cpu_seconds:
            self.broken = "cpu"
        elif threads > self.limits.processes + 1:
            self.broken = "processes"
        elif any(one.f_files - one.f_ffree > self.limits.files for one in space):
            self.broken = "files"

    def _end(self, bubblewrap: int) -> None:
        """Kills what is left. The init's death is the death of all its processes."""
        for handle in (self.init_handle, bubblewrap):
            if handle is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)

    def _wait_for_init(self) -> None:
        """The kernel lets the init end only after every other process of its namespace has."""
        if self.init_handle is None:
            return
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.init_handle, selectors.EVENT_READ)
                if not selector.select(10.0):
                    raise SandboxError(f"the sandbox's processes don't end, their init has the pid {self.init}")
        finally:
            os.close(self.init_handle)

    def _told(self) -> Outcome:
        ending, code = self.broken, None
        if ending is None:
            code = self._documents().get("exit-code")
            if code is None:
                words = self.said[self.stderr].decode("utf-8", "replace").strip()
                raise SandboxError(f"bubblewrap did not start the program: {words or 'it said nothing'}")
            ending = "exit"
            if _SIGNAL_BASE < code <= _SIGNAL_BASE + signal.SIGRTMAX:
                ending, code = "signal", code - _SIGNAL_BASE
            if ending == "signal" and code == signal.SIGXCPU:
                ending, code = "cpu", None
        text = {fd: said.decode("utf-8", "replace") for fd, said in self.said.items()}
        seconds = time.monotonic() - self.started
        return Outcome(ending, code, text[self.stdout], text[self.stderr], seconds, self.cpu_seconds, self.most_memory)


def _bytes_held(status: bytes) -> int:
    """What a process holds and no file on a disk backs, from its /proc/PID/status."""
    lines = (line.split() for line in status.split(b"\n") if line.startswith((b"RssAnon:", b"RssShmem:")))
    return sum(int(words[1]) << 10 for words in lines)


def _time_used(stat: bytes) -> tuple[float, int]:
    """(CPU seconds of a process and of those it waited for, its threads), from its /proc/PID/stat."""
    fields = stat.rpartition(b")")[2].split()  # the name before it may hold anything
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"), int(fields[17])
