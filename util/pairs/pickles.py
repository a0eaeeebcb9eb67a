"""Load pickles of plain data without trusting them: nothing that a file names is called.

Allowed are lists, tuples, numbers, text, bytes, and the functions that numpy's arrays are made of. Stand-ins take the
place of these functions and check their arguments, so numpy never gets a crafted state.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import DataError

_MAX_OPCODES = 10_000_000  # an opcode makes at most one object
# Left out: dicts and sets (hashing a deeply nested key can end the process), instances, persistent objects, extensions.
_ALLOWED = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST
    LIST APPEND APPENDS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes if opcode.name in _ALLOWED.split()}
# Bytes of the length in front of an argument.
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def load_pickle(content: bytes, source: Path) -> Any:
    """Load a pickle of plain data; numpy arrays in it become `PickledArray`, and text of Python 2 stays bytes.

    Raises DataError, naming `source`, and no other error, whatever the content is.
    """
    try:
        _check_opcodes(content)
        return _Unpickler(content, source).load()
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{source}: not a pickle of plain data ({reason}). Copy or download it again.") from None


def _check_opcodes(content: bytes) -> None:
    """Raise ValueError for everything that could crash the C unpickler or make it allocate more than the file has."""
    position = 0
    for count in range(_MAX_OPCODES):
        if position >= len(content):
            raise ValueError("it ends too early")
        opcode = _OPCODES.get(content[position])
        if opcode is None:
            raise ValueError(f"opcode 0x{content[position]:02x} does not belong in a data file")
        if opcode.name == "STOP":
            return
        start = position + 1
        size = opcode.arg.n if opcode.arg else 0
        if size == pickletools.UP_TO_NEWLINE:
            position = content.index(b"\n", start) + 1
            if opcode.name == "GLOBAL":  # two lines
                position = content.index(b"\n", position) + 1
        elif size in _LENGTH_BYTES:
            first = start + _LENGTH_BYTES[size]
            position = first + int.from_bytes(content[start:first], "little")
        else:
            position = start + size
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            # The unpickler's memo is an array as long as its largest index.
            argument = content[start:position]
            index = int(argument) if opcode.name == "PUT" else int.from_bytes(argument, "little")
            if index > count:
                raise ValueError("a memo index is out of order")
    raise ValueError("too many objects")


class _Unpickler(pickle.Unpickler):
    """Calls stand-ins for functions of numpy and Python 2, and refuses all other functions and classes."""

    def __init__(self, content: bytes, source: Path):
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._source = source
        self._encodable = len(content)  # characters; without a limit, one text could be encoded a million times

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for the function or class that the file names."""
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        name_in_numpy_1 = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if name_in_numpy_1 in _STAND_INS:
            return _STAND_INS[name_in_numpy_1]
        raise DataError(
            f"{self._source}: refused: the pickle references {f'{module}.{name}'[:100]!r}, which could execute code. "
            f"Nothing was run. Download the file from its publisher."
        )

    def _encode(self, text: object, encoding: object) -> bytes:
        """Return the bytes that Python 3 wrote for Python 2 as text of the 256 characters of Latin-1."""
        if type(text) is not str or _text(encoding) not in ("latin1", "latin-1"):
            raise ValueError("bytes in an unknown encoding")
        self._encodable -= len(text)
        if self._encodable < 0:
            raise ValueError("more bytes than the file holds")
        return text.encode("latin-1")


class _PickledDtype:
    """Stands for numpy.dtype: numbers and booleans only."""

    def __init__(self, name: object, align: object = False, copy: object = False):
        name = _text(name)
        if name not in _DTYPES:
            raise ValueError(f"an array of type {name[:20]!r}, which is not a number")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: object) -> None:
        """Take the byte order."""
        if type(state) is not tuple or len(state) < 5 or not state[2] is state[3] is state[4] is None:
            raise ValueError("an array of fields, not of numbers")
        order = _text(state[1])
        if order not in ("<", ">", "|", "="):
            raise ValueError("an array of an unknown byte order")
        self.dtype = self.dtype.newbyteorder(order)  # type: ignore[arg-type]


class PickledArray:
    """Stands for a numpy array: `array`, read-only, and None until the file gives its content."""

    array: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        """Take the content, whose length has to fit type and shape."""
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("an array with a state of an unknown form")
        _, shape, dtype, is_fortran, data = state
        if type(shape) is not tuple or not all(type(size) is int and 0 <= size < 2**63 for size in shape[:33]):
            raise ValueError("an array without a shape")
        if not isinstance(dtype, _PickledDtype) or type(data) not in (bytes, bytearray):
            raise ValueError("an array without type or content")
        if len(shape) > 32 or math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError("an array whose content does not fill its shape")
        values = np.frombuffer(memoryview(data).toreadonly(), dtype.dtype)
        self.array = values.reshape(shape, order="F" if is_fortran else "C")


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> PickledArray:
    array = PickledArray()
    array.__setstate__((1, shape, dtype, _text(order) == "F", data))
    return array


def _scalar(dtype: object, data: object) -> int | float | bool:
    if not isinstance(dtype, _PickledDtype) or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise ValueError("a number without its bytes")
    return np.frombuffer(data, dtype.dtype)[0].item()


def _text(value: object) -> str:
    if type(value) is bytes:
        return value.decode("latin-1")
    if type(value) is not str:
        raise ValueError("something else where text is expected")
    return value


_STAND_INS = {
    "numpy.ndarray": "the class of an array",  # the first argument of _reconstruct
    "numpy.dtype": _PickledDtype,
    "numpy.core.multiarray._reconstruct": lambda kind, shape, typecode: PickledArray(),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "__builtin__.bytes": lambda: b"",  # how Python 3 writes empty bytes for Python 2
}
