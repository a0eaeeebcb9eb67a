"""Read pickles of lists, numbers, bytes and numpy arrays from files that nobody has checked.

A pickle is a program that may call any function. Here every opcode is checked before anything is loaded, and a pickle
gets only the stand-ins of this file instead of the functions that it names. Everything else ends in one DataError.
"""

import io
import math
import pickle
import pickletools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import DataError

_MAX_OPCODES = 5_000_000  # an opcode makes at most one object: a file of empty lists must not fill the memory
_DTYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
# No dicts and sets: the hash of a deeply nested key ends the process. No other ways to make objects, no POP and DUP.
_NAMES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST
    APPEND APPENDS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes if opcode.name in _NAMES.split()}


def load_plain_pickle(content: bytes, source: Path) -> Any:
    """Return what a pickle of plain data holds. Bytes and text of Python 2 are bytes, arrays are PickledArray.

    Raises DataError, which names `source`, if the pickle is damaged or holds or calls anything else.
    """
    try:
        return _Unpickler(_checked(content), source).load()
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{source}: not a pickle of plain data ({reason}). Copy or download the file again.") from None


def _checked(content: bytes) -> bytes:
    """Return the pickle without frames, after a check of its opcodes, their lengths and memo indices."""
    file = io.BytesIO(content)
    pieces = []
    start = 0  # of the piece after the last frame header
    for count in range(_MAX_OPCODES):
        code = file.read(1)
        if code not in _OPCODES:
            raise ValueError(f"the opcode 0x{code.hex()} is not allowed" if code else "it ends too early")
        opcode = _OPCODES[code]
        argument: Any = None
        if opcode.name == "STRING":  # its own reader refuses bytes above 127
            pickletools.read_stringnl(file, decode=False, stripquotes=False)
        elif opcode.arg is not None:
            argument = opcode.arg.reader(file)  # raises ValueError if the file is shorter than a declared length
        # The C unpickler allocates a memo as long as its highest index.
        if "PUT" in opcode.name and not 0 <= argument <= count:
            raise ValueError("a memo index is too high")
        if opcode.name == "FRAME":  # the C unpickler loses bytes of an opcode that crosses the end of its frame
            pieces.append(content[start : file.tell() - 9])
            start = file.tell()
        elif opcode.name == "STOP":
            return b"".join([*pieces, content[start : file.tell()]])
    raise ValueError("too many objects")


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, source: Path):
        super().__init__(io.BytesIO(content), fix_imports=False, encoding="bytes")
        self._source = source
        self._functions = _FUNCTIONS | {("_codecs", "encode"): _Function(_encode, [len(content)])}

    def find_class(self, module: str, name: str) -> "_Function":
        try:
            return self._functions[module, name]
        except KeyError:
            raise DataError(
                f"{self._source}: wants to use {f'{module}.{name}'[:100]!r}, which can run programs. Nothing was run. "
                f"Take the file from its publisher."
            ) from None


class _Function(partial[object]):
    """A function that a pickle may call but not change: BUILD would set the attributes of a plain function."""

    def __setstate__(self, state: object) -> None:
        raise ValueError("a state for a function")


class _PickledDtype:
    """Stands for numpy.dtype. Only numbers and booleans."""

    __slots__ = ("dtype",)

    def __init__(self, name: object, align: object = False, copy: object = False):
        name = _text(name)
        if name not in _DTYPES:
            raise ValueError(f"an array of type {name[:20]!r}, and only numbers are read")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: object) -> None:
        if type(state) is not tuple or len(state) < 5 or not state[2] is state[3] is state[4] is None:
            raise ValueError("an array of fields, and only numbers are read")
        order = _text(state[1])
        if order not in ("<", ">", "|", "="):
            raise ValueError("an array of an unknown byte order")
        self.dtype = self.dtype.newbyteorder(order)  # type: ignore[arg-type]


class PickledArray:
    """Stands for a numpy array: `array`, read-only, or None if the pickle never gave its contents."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("an array with a state of an unknown form")
        _, shape, dtype, fortran_order, data = state
        self.fill(data, dtype, shape, bool(fortran_order) if type(fortran_order) in (bool, int) else False)

    def fill(self, data: object, dtype: object, shape: object, fortran_order: bool) -> None:
        """Set the array. Raises ValueError unless the bytes in `data` fill its type and shape exactly."""
        if type(dtype) is not _PickledDtype or not isinstance(data, bytes | bytearray):
            raise ValueError("an array without a type or bytes")
        if type(shape) is not tuple or not all(type(size) is int and 0 <= size < 2**63 for size in shape[:32]):
            raise ValueError("an array without a shape")
        if len(shape) > 32 or math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError("an array whose contents do not fill its shape")
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")
        self.array.flags.writeable = False


def _ndarray(*arguments: object) -> None:
    raise ValueError("an array that is made by its class")


def _reconstruct(kind: object, shape: object, typecode: object) -> PickledArray:
    if kind is not _FUNCTIONS["numpy", "ndarray"]:
        raise ValueError("an array of an unknown class")
    return PickledArray()


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> PickledArray:
    array = PickledArray()
    array.fill(data, dtype, shape, _text(order) == "F")
    return array


def _scalar(dtype: object, data: object) -> int | float | bool:
    if type(dtype) is not _PickledDtype or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise ValueError("a number without its bytes")
    return np.frombuffer(data, dtype.dtype)[0].item()


def _encode(remaining: list[int], text: object, encoding: object) -> bytes:
    """Stand for codecs.encode, with which Python 3 writes bytes for Python 2 as text in Latin-1."""
    if type(text) is not str or _text(encoding) not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unknown encoding")
    remaining[0] -= len(text)  # a long text that is encoded again and again must not fill the memory
    if remaining[0] < 0:
        raise ValueError("more bytes than the file holds")
    return text.encode("latin-1")


def _text(value: object) -> str:
    if type(value) is bytes:
        return value.decode("latin-1")
    if type(value) is not str:
        raise ValueError("text expected, something else found")
    return value


_FUNCTIONS = {
    ("numpy", "ndarray"): _Function(_ndarray),
    ("numpy", "dtype"): _Function(_PickledDtype),
    ("__builtin__", "bytes"): _Function(lambda: b""),  # how Python 3 writes empty bytes for Python 2
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
    _FUNCTIONS[f"{_core}.multiarray", "_reconstruct"] = _Function(_reconstruct)
    _FUNCTIONS[f"{_core}.multiarray", "scalar"] = _Function(_scalar)
    _FUNCTIONS[f"{_core}.numeric", "_frombuffer"] = _Function(_from_buffer)
