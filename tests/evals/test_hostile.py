"""Programs that a model should not have written. Each has its own way out; none may find it, and each must be reported
as what it was."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evals.boxed import box, need_sandbox, processes_saying


@pytest.fixture(autouse=True)
def _sandbox() -> None:
    need_sandbox()


@pytest.fixture
def mark() -> Iterator[str]:
    """A word for command lines, and the promise that no process carries it when the program has ended."""
    word = f"hostile-{os.getpid()}-{time.monotonic_ns()}"
    yield word
    assert processes_saying(word) == []


# ------------------------------------------------------------------------------------------------ processes


def test_fork_bomb(mark: str) -> None:
    """Every process forks for ever and ignores that it can't; the time limit takes all of them."""
    outcome = box(
        f"""
        import os
        mark = "{mark}"
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
        wall_seconds=1.0,
        cpu_seconds=60,
    )
    assert outcome.ending in ("time", "memory", "processes")
    assert processes_saying("/sandbox/program.py") == []


def test_forks_are_counted() -> None:
    outcome = box(
        """
        import os, time
        made = 0
        try:
            while made < 200:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
                made += 1
        except BlockingIOError:
            print(made)
        """,
        processes=8,
    )
    assert outcome.ok
    assert int(outcome.stdout) == 7


def test_threads_are_counted() -> None:
    outcome = box(
        """
        import threading, time
        made = 0
        try:
            while made < 200:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                made += 1
        except RuntimeError:
            print(made, flush=True)
            import os
            os._exit(3)
        """,
        processes=8,
        memory_bytes=1 << 30,
    )
    assert (outcome.ending, outcome.code) == ("exit", 3)
    assert int(outcome.stdout) == 7


def test_a_daemon_dies_with_the_program(mark: str) -> None:
    """Twice forked, a session of its own, no terminal, stdout closed: it still belongs to the box."""
    started = time.monotonic()
    outcome = box(
        f"""
        import os, sys
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in (0, 1, 2):
                    os.close(fd)
                os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "{mark}"])
            os._exit(0)
        os.wait()
        print("parent leaves")
        """
    )
    assert outcome.ok
    assert outcome.stdout == "parent leaves\n"
    assert time.monotonic() - started < 10


def test_a_child_that_holds_stdout_open_holds_nobody_up() -> None:
    started = time.monotonic()
    outcome = box(
        """
        import os, time
        if os.fork() == 0:
            time.sleep(60)
        print("done")
        """
    )
    assert outcome.ok
    assert time.monotonic() - started < 10


def test_it_dies_with_its_caller(tmp_path: Path) -> None:
    """The caller is killed by SIGKILL, so nobody is left to clean up: the kernel does."""
    word = f"orphan_{os.getpid()}_{time.monotonic_ns()}"
    caller = tmp_path / "caller.py"
    command = f"[sys.executable, '-c', 'import time; time.sleep(60)', '{word}']"
    program = f"import os, sys\nos.execv(sys.executable, {command})"
    caller.write_text(f"from qwenlet.evals import sandbox\nsandbox.run({program!r})\n")
    process = subprocess.Popen([sys.executable, caller])
    try:
        until(lambda: any("python" in Path(f"/proc/{pid}/exe").resolve().name for pid in processes_saying(word)))
    finally:
        process.kill()
        process.wait()
    until(lambda: not processes_saying(word))


def until(holds: object, seconds: float = 20.0) -> None:
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ signals


def test_killing_everybody_reaches_nobody_outside() -> None:
    outcome = box(
        """
        import os, signal, time
        child = os.fork()
        if child == 0:
            time.sleep(60)
        os.kill(-1, signal.SIGKILL)
        print(os.waitpid(child, 0)[1])
        """
    )
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == "9\n"


def test_signals_to_the_parent() -> None:
    """Its parent is the box's init, which takes no signals from inside; our pid names nobody there."""
    outcome = box(
        f"""
        import os, signal
        for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP, signal.SIGINT):
            os.kill(os.getppid(), number)
        try:
            os.kill({os.getpid()}, signal.SIGKILL)
        except ProcessLookupError:
            print("nobody", os.getppid())
        """
    )
    assert outcome.ok
    assert outcome.stdout == "nobody 1\n"


def test_a_loop_that_ignores_sigterm() -> None:
    outcome = box(
        """
        import signal
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
        """,
        cpu_seconds=1,
    )
    assert outcome.ending == "cpu"
    assert outcome.code is None
    assert outcome.seconds < 10


def test_sleeping_for_ever() -> None:
    outcome = box("import time\ntime.sleep(3600)", wall_seconds=0.5)
    assert outcome.ending == "time"
    assert 0.5 <= outcome.seconds < 5


def test_stopping_itself() -> None:
    assert box("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", wall_seconds=0.5).ending == "time"


def test_many_processes_share_the_cpu_time() -> None:
    """No one of them reaches the limit that the kernel sets each."""
    outcome = box(
        """
        import os
        for _ in range(3):
            os.fork()
        while True:
            pass
        """,
        cpu_seconds=1,
        wall_seconds=10.0,
    )
    assert outcome.ending == "cpu"
    assert outcome.cpu_seconds < 5


# ------------------------------------------------------------------------------------------------ memory


def test_memory_of_one() -> None:
    outcome = box("x = bytearray(10 << 30)")
    assert (outcome.ending, outcome.code) == ("exit", 1)
    assert "MemoryError" in outcome.summary


def test_memory_bit_by_bit() -> None:
    outcome = box("x = []\nwhile True:\n    x.append(bytearray(1 << 20))")
    assert (outcome.ending, outcome.code) == ("exit", 1)
    assert outcome.memory_bytes < 300 << 20


def test_memory_of_many() -> None:
    """Each stays below its limit."""
    outcome = box(
        """
        import os, time
        for _ in range(3):
            os.fork()
        held = bytearray(os.urandom(1) * (100 << 20))
        time.sleep(60)
        """
    )
    assert outcome.ending == "memory"
    assert outcome.memory_bytes < 700 << 20


def test_memory_that_no_process_holds() -> None:
    """memfd and System V memory would stand on nobody's account, /dev/shm is as small as /tmp."""
    outcome = box(
        """
        import ctypes, errno, os
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.memfd_create(b"hoard", 0) == -1 and ctypes.get_errno() == errno.EPERM
        assert libc.shmget(0, 1 << 24, 0o1666) == -1 and ctypes.get_errno() == errno.EPERM
        written = 0
        try:
            for n in range(64):
                with open(f"/dev/shm/{n}", "wb", buffering=0) as file:
                    written += file.write(bytes(1 << 20))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        print(written >> 20)
        """,
        tmp_bytes=4 << 20,
    )
    assert outcome.ok, outcome.stderr
    assert int(outcome.stdout) <= 4


def test_a_bomb_that_unpacks_into_memory() -> None:
    outcome = box(
        """
        import zlib
        packer = zlib.compressobj(1)
        zeros = bytes(1 << 20)
        bomb = b"".join(packer.compress(zeros) for _ in range(512)) + packer.flush()
        zlib.decompress(bomb)
        """,
        cpu_seconds=30,
        wall_seconds=40.0,
    )
    assert (outcome.ending, outcome.code) == ("exit", 1)
    assert "MemoryError" in outcome.summary


def test_deep_recursion() -> None:
    """The interpreter's own limit first, then none at all: the stack ends."""
    assert "RecursionError" in box("def f():\n    f()\nf()").summary
    outcome = box(
        """
        import sys
        sys.setrecursionlimit(10**9)
        class Deep:
            def __getattr__(self, name):
                return repr(self)
            def __repr__(self):
                return self.more
        repr(Deep())
        """
    )
    assert not outcome.ok
    assert outcome.ending in ("signal", "exit", "memory")
    if outcome.ending == "signal":
        assert outcome.code == signal.SIGSEGV


# ------------------------------------------------------------------------------------------------ files


def test_writing_outside_tmp(tmp_path: Path) -> None:
    """tmp_path is the host's: the box has no such folder, and /tmp is another one."""
    (tmp_path / "precious").write_text("kept")
    outcome = box(
        f"""
        import os, shutil
        refused = 0
        paths = ["/usr/lib/planted", "/etc/passwd", "/planted", "/dev/planted", "/sandbox/program.py",
                 "{tmp_path}/planted", "/root/planted", "/home/planted", "/proc/sys/kernel/hostname"]
        for path in paths:
            try:
                open(path, "w").write("planted")
            except OSError:
                refused += 1
        shutil.rmtree("{tmp_path}", ignore_errors=True)
        shutil.rmtree("/usr/lib", ignore_errors=True)
        print(refused == len(paths))
        open("/tmp/mine", "w").write("allowed")
        """
    )
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == "True\n"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert not Path("/tmp/mine").exists()


def test_the_private_tmp_is_gone_afterwards() -> None:
    assert box("open('/tmp/left', 'w').write('x')").ok
    outcome = box("import os\nprint(os.listdir('/tmp'), os.listdir('/dev/shm'), os.getcwd())")
    assert outcome.stdout == "[] [] /tmp\n"


def test_a_file_beyond_its_limit() -> None:
    outcome = box(
        """
        import errno
        with open("/tmp/big", "wb", buffering=0) as file:
            try:
                for _ in range(1000):
                    file.write(bytes(1 << 20))
            except OSError as error:
                print(errno.errorcode[error.errno], file.tell() >> 20)
        """,
        file_bytes=2 << 20,
    )
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == "EFBIG 2\n"


def test_a_bomb_that_unpacks_onto_the_disk() -> None:
    outcome = box(
        """
        import zipfile
        with zipfile.ZipFile("/tmp/bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
            for n in range(64):
                bomb.writestr(str(n), bytes(1 << 20))
        zipfile.ZipFile("/tmp/bomb.zip").extractall("/tmp/out")
        """,
        tmp_bytes=8 << 20,
    )
    assert (outcome.ending, outcome.code) == ("exit", 1)
    assert "No space left" in outcome.summary


def test_a_million_empty_files() -> None:
    """They fill no disk, but each costs the kernel memory."""
    outcome = box("n = 0\nwhile True:\n    open(f'/tmp/{n}', 'w').close()\n    n += 1", files=500)
    assert outcome.ending == "files"
    assert outcome.seconds < 5


def test_links_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")
    outcome = box(
        f"""
        import os
        os.symlink("{secret}", "/tmp/link")
        os.symlink("/proc/1/root", "/tmp/root")
        os.symlink("/proc/1/cwd", "/tmp/cwd")
        for path in ("/tmp/link", "/tmp/root{secret}", "/tmp/cwd{secret}", "/tmp/root/etc/shadow", "../../..{secret}"):
            try:
                print(open(path).read())
            except OSError as error:
                print(type(error).__name__)
        """
    )
    assert outcome.ok, outcome.stderr
    assert set(outcome.stdout.split()) <= {"FileNotFoundError", "PermissionError"}


def test_open_files_are_counted() -> None:
    outcome = box("held = []\nwhile True:\n    held.append(open('/dev/null'))", open_files=32)
    assert (outcome.ending, outcome.code) == ("exit", 1)
    assert "Too many open files" in outcome.summary


# ------------------------------------------------------------------------------------------------ output


def test_endless_output() -> None:
    outcome = box("while True:\n    print('spam' * 100)", output_bytes=10_000)
    assert outcome.ending == "output"
    assert len(outcome.stdout) == 10_000


def test_endless_complaints() -> None:
    outcome = box("import sys\nwhile True:\n    sys.stderr.write('spam' * 100)", output_bytes=10_000)
    assert outcome.ending == "output"
    assert len(outcome.stderr) == 10_000


def test_bytes_that_are_no_text() -> None:
    outcome = box("import os\nos.write(1, b'\\xff\\x00\\xfe ok')")
    assert outcome.ok
    assert outcome.stdout == "\ufffd\x00\ufffd ok"


def test_closing_stdout_hides_nothing() -> None:
    outcome = box("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(0.2)\nos._exit(7)")
    assert (outcome.ending, outcome.code) == ("exit", 7)
    assert outcome.seconds >= 0.2


def test_closing_stdout_and_staying() -> None:
    outcome = box("import os, time\nos.closerange(0, 64)\nwhile True:\n    time.sleep(1)", wall_seconds=0.5)
    assert outcome.ending == "time"


# ------------------------------------------------------------------------------------------------ looking around


def test_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    outcome = box(
        """
        import os, pathlib
        seen = str(dict(os.environ)) + str(os.environb)
        for process in pathlib.Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    seen += repr((process / "environ").read_bytes())
                except OSError:
                    pass
        print(sorted(set(os.environ) - {"PWD", "LC_CTYPE"}), seen)
        """
    )
    assert outcome.ok, outcome.stderr
    assert "hf_secret" not in outcome.stdout
    assert outcome.stdout.startswith("[] ")


def test_other_processes_are_not_to_be_seen() -> None:
    outcome = box("import os\nprint(sorted(int(name) for name in os.listdir('/proc') if name.isdigit()))")
    assert outcome.stdout == "[1, 2]\n"


def test_the_kernels_files_say_no() -> None:
    outcome = box(
        """
        for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/kcore", "/dev/mem", "/dev/kmsg",
                     "/proc/sys/vm/drop_caches", "/sys/kernel/uevent_helper"):
            try:
                open(path, "r+b", buffering=0).write(b"c")
                print("wrote", path)
            except OSError:
                pass
        """
    )
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == ""


def test_taking_over_the_init_gains_nothing() -> None:
    """It is of the program's user, whose memory the program may write: limits, powers and filter are the same."""
    outcome = box(
        """
        def held(process):
            status = dict(line.split(":", 1) for line in open(f"/proc/{process}/status"))
            powers = [status[name].strip() for name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")]
            return open(f"/proc/{process}/limits").read(), powers
        print(held(1) == held("self"), held(1)[1])
        """
    )
    assert outcome.ok, outcome.stderr
    assert outcome.stdout.startswith("True ")


def test_no_files_are_inherited() -> None:
    outcome = box("import os\nprint(sorted(os.listdir('/proc/self/fd')))")
    assert outcome.stdout == "['0', '1', '2', '3']\n"  # 3 is the listing itself


# ------------------------------------------------------------------------------------------------ network, kernel


class Asked(http.server.BaseHTTPRequestHandler):
    count = 0

    def do_GET(self) -> None:
        Asked.count += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_network_is_not_there() -> None:
    """Neither the world's, nor the host's loopback, on which a server listens, nor its abstract sockets."""
    Asked.count = 0
    server = http.server.HTTPServer(("127.0.0.1", 0), Asked)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        outcome = box(
            f"""
            import socket, urllib.request
            for address in (("127.0.0.1", {server.server_port}), ("1.1.1.1", 53)):
                try:
                    socket.create_connection(address, timeout=2)
                    print("connected")
                except OSError as error:
                    print(type(error).__name__)
            try:
                socket.getaddrinfo("example.com", 80)
            except OSError:
                print("no names")
            try:
                urllib.request.urlopen("http://127.0.0.1:{server.server_port}/", timeout=2)
            except OSError:
                print("no page")
            """
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == "ConnectionRefusedError\nOSError\nno names\nno page\n"
    assert Asked.count == 0


def test_abstract_sockets_are_not_there() -> None:
    import socket

    name = f"qwenlet-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("\0" + name)
        listening.listen()
        outcome = box(f"import socket\nsocket.socket(socket.AF_UNIX).connect(chr(0) + '{name}')")
    assert "ConnectionRefusedError" in outcome.summary


def test_sockets_that_no_namespace_holds() -> None:
    """vsock is a virtual machine's line to its host; netlink, packets and crypto are lines into the kernel."""
    outcome = box(
        """
        import errno, socket
        for family in (16, 17, 38, 40):
            try:
                socket.socket(family, socket.SOCK_RAW if family < 20 else socket.SOCK_STREAM)
                print("made", family)
            except OSError as error:
                assert error.errno == errno.EAFNOSUPPORT, error
        socket.socketpair()
        print("pair")
        """
    )
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == "pair\n"


@pytest.mark.parametrize(
    "call",
    [
        "ptrace(16, 1, 0, 0)",
        "unshare(0x10000000)",
        "process_vm_readv(1, 0, 0, 0, 0, 0)",
        "mount(b'none', b'/tmp', b'tmpfs', 0, 0)",
        "umount2(b'/tmp', 2)",
        "chroot(b'/tmp')",
        "setns(0, 0)",
    ],
)
def test_calls_into_the_kernel_are_refused(call: str) -> None:
    """Attaching to a process, namespaces with powers of their own, mounts."""
    outcome = box(
        f"""
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.{call} == -1
        print(errno.errorcode[ctypes.get_errno()])
        """
    )
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == "EPERM\n"


def test_cloning_into_a_namespace_is_refused() -> None:
    """clone3 hides its flags, so it isn't there at all; clone with CLONE_NEWUSER is told no."""
    outcome = box(
        """
        import ctypes, errno, platform
        libc = ctypes.CDLL(None, use_errno=True)
        clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
        assert libc.syscall(clone, 0x10000000 | 17, 0, 0, 0, 0) == -1
        print(errno.errorcode[ctypes.get_errno()])
        assert libc.syscall(435, 0, 0) == -1
        print(errno.errorcode[ctypes.get_errno()])
        """
    )
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == "EPERM\nENOSYS\n"


def test_limits_and_powers_can_not_be_raised() -> None:
    outcome = box(
        """
        import os, resource
        for which in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
            try:
                resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                print("raised", which)
            except (ValueError, OSError):
                pass
        try:
            os.setuid(0)
            print("root")
        except OSError:
            pass
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(*[int(status[name], 16) for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")])
        """
    )
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == "0 0 1 2\n"


def test_a_terminal_of_the_callers_is_out_of_reach() -> None:
    """A box with the caller's terminal could type commands into it."""
    outcome = box("import os\nprint(os.getsid(0), [os.isatty(fd) for fd in range(3)])\nopen('/dev/tty')")
    assert not outcome.ok
    assert outcome.stdout.endswith("[False, False, False]\n")
    assert "OSError" in outcome.summary


def test_leaving_early_with_success() -> None:
    """Reported as what it is: whoever wants proof must ask for more than exit 0."""
    assert box("import os\nos._exit(0)\nraise AssertionError").ok
    assert box(textwrap.dedent("raise SystemExit('no')")).summary == "exit 1: no"
