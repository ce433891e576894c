"""Whether freed memory is kept for the next tensor or given back to the system."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST, _DEFAULT = 2**31 - 1, 2**17


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed, for the whole process and for good.

    By default it gives large blocks back at once and asks for new ones, which the system fills with zeros page by page:
    a tenth to a quarter of an update of a small model on two cores. The process does not shrink between peaks, and its peak
    is higher: what is kept does not always fit.

    Returns:
        Whether it has an effect: on Linux with glibc. Elsewhere nothing is done.
    """
    return _give_back_from(_LARGEST)


def give_back_freed_memory() -> bool:
    """Undoes `keep_freed_memory`: every large block that is freed is given back at once, where memory is what is short.

    Left to itself, glibc begins to keep blocks of up to 32 MiB once some have been freed.

    Returns:
        Whether it has an effect, as there.
    """
    return _give_back_from(_DEFAULT)


def _give_back_from(num_bytes: int) -> bool:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, num_bytes)) and bool(mallopt(_TRIM_THRESHOLD, num_bytes))
