"""Reads pickles of plain data without trusting them: nothing that a file names is ever called.

A pickle is a program that may call any function. `SafeUnpickler` runs a small part of that language: text, bytes,
numbers, lists, tuples and dicts, and the few functions of a table, which are stand-ins defined here or by the caller
and never the functions that the file means. Whatever else is in the file ends in one DataError:

    with path.open("rb") as file:
        value = SafeUnpickler(file, path, NUMPY_GLOBALS).load()      # arrays are PickledArray: value.numpy()
"""

import math
import operator
import pickle
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from util.errors import DataError

Globals = Mapping[tuple[str, str], object]

_DEEPEST = 100  # open marks: lists within lists; data has two or three
_MOST_READS = 10_000_000  # each is an object at most: a file of nothing but empty lists must not fill the memory
_LARGE = 4096  # reads of more than this are compared with what the file still has
_DTYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))

# What data needs of the pickle machine. Left out: persistent objects, extension codes, sets, the older and the keyword
# ways of making instances (INST, OBJ, NEWOBJ_EX), buffers outside of the file, and moving things on the stack.
_OPERATIONS = (
    *("proto", "frame", "stop", "mark", "none", "false", "true"),
    *("int", "binint", "binint1", "binint2", "long", "long1", "long4", "float", "binfloat"),
    *("string", "binstring", "short_binstring", "binbytes", "short_binbytes", "binbytes8", "bytearray8"),
    *("unicode", "binunicode", "short_binunicode", "binunicode8"),
    *("tuple", "empty_tuple", "tuple1", "tuple2", "tuple3", "empty_list", "list", "append", "appends"),
    *("empty_dictionary", "dict", "setitem", "setitems"),
    *("get", "binget", "long_binget", "put", "binput", "long_binput", "memoize"),
    *("global", "stack_global", "reduce", "newobj", "build"),
)


class StandIn(ABC):
    """What a pickle gets instead of an object of a class that it names, and may give a state to."""

    @abstractmethod
    def __setstate__(self, state: object) -> None:
        """Takes the state, which may be anything; ValueError says what is wrong with it."""


class _Operations(dict):
    """{code: operation}. Those of `_OPERATIONS`, looked up by name, so that subclasses can override them."""

    def __missing__(self, code: int) -> None:
        raise ValueError(f"operation 0x{code:02x} has no place in a file of data")


class SafeUnpickler(pickle._Unpickler):
    """Reads one pickle from `file`, open and seekable, for which `source` stands in messages.

    `globals` is {(module, name): stand-in}, with the names as they are written in the file. A stand-in is a function
    or class that is called with what the file gives; ValueError and TypeError in it say that this is no good. Objects
    that take a state (BUILD) derive from StandIn. Text of Python 2 stays bytes with encoding "bytes".

    A subclass may override `read_data`, which gets long byte strings, and any load_… of pickle._Unpickler. Frames are
    not read ahead: within those, `self.read(n)` gives the n bytes of the file that follow, and `self.skip(n)` passes
    over them.
    """

    dispatch = _Operations(
        (code, operator.methodcaller(load.__name__))
        for code, load in pickle._Unpickler.dispatch.items()
        if load.__name__.removeprefix("load_") in _OPERATIONS
    )

    def __init__(self, file: BinaryIO, source: Path, globals: Globals, encoding: str = "bytes"):
        self.source, self._globals, self._file = source, globals, _Bounded(file)
        super().__init__(self._file, fix_imports=False, encoding=encoding)

    def load(self) -> Any:
        """What the file holds. Raises DataError, and nothing else, whatever the file is."""
        try:
            return super().load()
        except DataError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"{self.source}: not a pickle of plain data ({reason}); copy or download it again"
            ) from None

    def read_data(self, size: int) -> Any:
        """The next `size` bytes of the file, as they shall stand in the result."""
        return self.read(size)

    def skip(self, size: int) -> int:
        """Passes over the next `size` bytes of the file without reading them; where they begin."""
        return self._file.skip(size)

    def find_class(self, module: str, name: str) -> object:
        try:
            return self._globals[module, name]
        except KeyError:
            raise DataError(
                f"{self.source}: wants to use {f'{module}.{name}'[:100]!r}, which data of this kind does not need, and "
                f"which may be made to run programs; nothing was run. Take the file from where it was published"
            ) from None

    def load_frame(self) -> None:
        self.read(8)  # the frame's length is for those who read ahead

    def load_mark(self) -> None:
        if len(self.metastack) >= _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        super().load_mark()

    def load_binbytes(self) -> None:
        self.append(self.read_data(self._number("<I")))

    def load_binbytes8(self) -> None:
        self.append(self.read_data(self._number("<Q")))

    load_bytearray8 = load_binbytes8

    def load_binstring(self) -> None:
        self.append(self._decode_string(self.read_data(self._number("<i"))))

    def _number(self, form: str) -> int:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("appends to what is no list")
        self.stack[-1].extend(items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list) -> None:
        """Keys are text, bytes or numbers: to hash a tuple of tuples of tuples … can end the process."""
        target, keys, values = self.stack[-1], items[::2], items[1::2]
        if type(target) is not dict or not all(type(key) in (str, bytes, int, float, bool) for key in keys):
            raise ValueError("sets an item of what is no dict, or with a key that is neither text nor a number")
        target.update(zip(keys, values, strict=True))

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or not any(function is known for known in self._globals.values()):
            raise ValueError("calls what is no function of the table")
        self.append(function(*arguments))

    load_newobj = load_reduce

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StandIn):
            raise ValueError("gives a state to what takes none")
        self.stack[-1].__setstate__(state)


class _Bounded:
    """Reads from a file what is there, or raises EOFError: a length that a file declares is not memory yet."""

    def __init__(self, file: BinaryIO):
        self._file, self._reads = file, 0
        start = file.tell()
        self._end = file.seek(0, 2)
        file.seek(start)

    def read(self, size: int) -> bytes:
        self._reads += 1
        if size < 0 or self._reads > _MOST_READS:
            raise ValueError("a length below zero" if size < 0 else "too many objects")
        if size > _LARGE and size > self._end - self._file.tell():
            raise EOFError("it ends too early")
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError("it ends too early")
        return data

    def skip(self, size: int) -> int:
        start = self._file.tell()
        if not 0 <= size <= self._end - start:
            raise EOFError("it ends too early")
        self._file.seek(start + size)
        return start

    def readline(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError("it ends too early")
        return line


# --- Stand-ins for what numpy writes into pickles.


class PickledDtype(StandIn):
    """Stands for numpy.dtype, which is its `dtype`. The state has the byte order. Only numbers and booleans."""

    def __init__(self, name: object, align: object = False, copy: object = False):
        name = _text(name)
        if name not in _DTYPES:
            raise ValueError(f"an array of type {name[:20]!r}, and only those of numbers are read")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: object) -> None:
        if type(state) is not tuple or len(state) < 5 or not state[2] is state[3] is state[4] is None:
            raise ValueError("an array of fields, and only those of numbers are read")
        order = _text(state[1])
        if order not in ("<", ">", "|", "="):
            raise ValueError("an array of an unknown byte order")
        self.dtype = self.dtype.newbyteorder(order)


class PickledArray(StandIn):
    """Stands for a numpy array: `dtype`, `shape`, and `data`, whatever read_data gave for its bytes."""

    dtype: np.dtype | None = None
    shape: tuple[int, ...] = ()
    fortran_order = False
    data: Any = b""

    def __setstate__(self, state: object) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("an array with a state of an unknown form")
        _, shape, dtype, fortran_order, data = state
        self.fill(data, dtype, shape, bool(fortran_order) if type(fortran_order) in (bool, int) else False)

    def fill(self, data: Any, dtype: object, shape: object, fortran_order: bool) -> None:
        """Takes the contents, whose length has to agree with type and shape."""
        if not isinstance(dtype, PickledDtype):
            raise ValueError("an array without a type")
        whole = type(shape) is tuple and len(shape) <= 32
        if not whole or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
            raise ValueError("an array without a shape")
        if isinstance(data, str | list | tuple | dict) or not hasattr(data, "__len__"):
            raise ValueError("an array whose contents are no bytes")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError("an array whose contents do not fill its shape")
        self.dtype, self.shape, self.fortran_order, self.data = dtype.dtype, shape, fortran_order, data

    def numpy(self) -> np.ndarray:
        """The array, in its own type and not to be written to; ValueError if the file never gave its contents."""
        if self.dtype is None:
            raise ValueError("an array without contents")
        return np.frombuffer(self.data, self.dtype).reshape(self.shape, order="F" if self.fortran_order else "C")


def _ndarray(*arguments: object) -> None:
    raise ValueError("makes an array of its own accord")


def _reconstruct(kind: object, shape: object, typecode: object) -> PickledArray:
    if kind is not _ndarray:
        raise ValueError("an array of an unknown class")
    return PickledArray()


def _from_buffer(data: Any, dtype: object, shape: object, order: object) -> PickledArray:
    array = PickledArray()
    array.fill(data, dtype, shape, _text(order) == "F")
    return array


def _scalar(dtype: object, data: object) -> int | float | bool:
    if not isinstance(dtype, PickledDtype) or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise ValueError("a number whose bytes are missing")
    return np.frombuffer(data, dtype.dtype)[0].item()


def _encode(text: object, encoding: object) -> bytes:
    """How Python 3 writes bytes so that Python 2 can read them: text of the 256 characters of Latin-1."""
    if type(text) is not str or _text(encoding) not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """How Python 3 writes empty bytes for Python 2."""
    return b""


def _text(value: object) -> str:
    if type(value) is bytes:
        return value.decode("latin-1")
    if type(value) is not str:
        raise ValueError("text is expected, and something else found")
    return value


# numpy 1 and numpy 2 have the same functions in modules of different names.
NUMPY_GLOBALS: Globals = {
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): PickledDtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}
