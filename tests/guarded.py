"""Arrays whose neighbouring pages may not be touched: a read or write past either end kills the process."""

import ctypes
import math
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
PROT_NONE = 0

libc = ctypes.CDLL(None, use_errno=True)
keep = []  # the maps live as long as the process


def _forbid(memory, start, length):
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + start
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(array, end, readable=None):
    """Copy array to where it touches a forbidden page: after its last byte if end, else before its first.

    With readable, only that many bytes from its start may be read: the rest of the array is forbidden too,
    from the next page on.
    """
    nbytes = math.prod(array.shape) * array.dtype.itemsize
    data = -(-max(nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, data + 2 * PAGE)
    keep.append(memory)
    offset = PAGE + (data - nbytes if end else 0)
    view = np.frombuffer(memory, np.uint8, nbytes, offset).view(array.dtype).reshape(array.shape)
    view[...] = array
    _forbid(memory, 0, PAGE)
    _forbid(memory, PAGE + data, PAGE)
    if readable is not None:
        assert (offset + readable) % PAGE == 0, "the forbidden part starts on a page"
        _forbid(memory, offset + readable, data + PAGE - offset - readable)
    return view
