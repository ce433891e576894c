"""A filter of system calls for the sandbox: no new process, no memory beside the limits, no door to the kernel.

Resource limits alone do not bound a program: the limit on processes does not bind root, the one on memory counts each
process by itself, and neither counts anonymous files and shared segments. One process without those is bounded.
"""

from __future__ import annotations

import platform
import struct

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_NUMBER_AT, _ARCH_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_CLONE_THREAD = 0x10000
_X32 = 0x40000000

# Numbers of system calls: x86-64, and the table that aarch64 shares with all newer machines.
_MACHINES = {
    "x86_64": (0xC000003E, 56),
    "aarch64": (0xC00000B7, 220),
}
_REFUSED = {
    # fork, vfork; then memory that is no process's own: memfd_create, memfd_secret, shmget, msgget, mq_open
    "x86_64": (57, 58, 319, 447, 29, 68, 240)
    # ptrace, process_vm_*; mount, umount2, pivot_root, unshare, setns; keys; bpf, perf, userfaultfd, io_uring, kexec
    + (101, 310, 311, 165, 166, 155, 272, 308, 248, 249, 250, 321, 298, 323, 425, 426, 427, 246),
    "aarch64": (279, 447, 194, 186, 180)
    + (117, 270, 271, 40, 39, 41, 97, 268, 217, 218, 219, 280, 241, 282, 425, 426, 427, 104),
}
_CLONE3 = 435


def filter_program() -> bytes:
    """The filter for this machine, as ``bwrap --seccomp`` takes it (an array of ``struct sock_filter``).

    Raises:
        OSError: If the machine is another.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise OSError(f"the sandbox knows the system calls of {' and '.join(_MACHINES)}, not of {machine}")
    arch, clone = _MACHINES[machine]
    lines = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_JUMP_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_AT_LEAST, 0, 1, _X32),  # the x32 table of x86-64 would be a way around
        (_RETURN, 0, 0, _KILL),
        # clone3 keeps its flags in memory, where a filter cannot look; told that there is none, libc takes clone.
        (_JUMP_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _REFUSE | _ENOSYS),
    ]
    for number in _REFUSED[machine]:
        lines += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | _EPERM)]
    lines += [
        (_JUMP_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD),  # threads may start, processes not
        (_RETURN, 0, 0, _REFUSE | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)
