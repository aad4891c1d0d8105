"""The system calls that model-written code is refused, as a filter program of the kernel (seccomp, classic BPF).

The namespaces already cut it off; this closes doors that limits don't see: memory that belongs to no process (memfd,
System V), other processes' memory, namespaces of its own, sockets that no network namespace holds (a virtual machine's
line to its host), kernel interfaces with a history of holes. Calls fail as where a kernel was built without them. Left
out: a list of what is allowed, which every libc update breaks.
"""

from __future__ import annotations

import platform
import struct

from qwenlet.errors import SandboxError

# (x86_64, aarch64)
DENIED: dict[str, tuple[int, int]] = {
    "shmget": (29, 194),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "perf_event_open": (298, 241),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "pidfd_getfd": (438, 438),
    "memfd_secret": (447, 447),
}
SOCKET = (41, 198)
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: what the box's own network namespace holds
CLONE = (56, 220)
CLONE3 = (435, 435)
NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag that clone takes

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97


def filter_program(machine: str | None = None) -> bytes:
    """The filter in the bytes that bubblewrap's --seccomp reads.

    Args:
        machine: as `platform.machine()` names it; None is this one.
    Raises:
        SandboxError: a machine whose call numbers we don't know.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise SandboxError(
            f"the sandbox knows the system calls of {' and '.join(_ARCHITECTURES)}, this machine is {machine}",
            hint="score the saved answers on another machine",
        )
    column, architecture = _ARCHITECTURES[machine]
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),  # calls of another architecture have other numbers
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        code += [(_JUMP_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERROR | _ENOSYS)]  # x32's numbers
    # clone3 hides its flags behind a pointer: told that there is none, a libc takes clone
    code += [(_JUMP_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ERROR | _ENOSYS)]
    for numbers in DENIED.values():
        code += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERROR | _EPERM)]
    code += [(_JUMP_EQUAL, 0, len(FAMILIES) + 3, SOCKET[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    for left, family in zip(range(len(FAMILIES) - 1, -1, -1), FAMILIES, strict=True):
        code += [(_JUMP_EQUAL, left, 0 if left else 1, family)]  # `left` more to jump over, or the last
    code += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERROR | _EAFNOSUPPORT)]
    code += [
        (_JUMP_EQUAL, 0, 3, CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_BITS, 0, 1, NEW_NAMESPACES),
        (_RETURN, 0, 0, _ERROR | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in code)
