"""Pickles of data are read, and those that would run something are refused with nothing run."""

import array
import codecs
import copyreg
import functools
import os
import pickle
import subprocess
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from util.errors import DataError
from util.pairs.pickles import _NAMES, _OPCODES, PickledArray, load_plain_pickle

SOURCE = Path("set.bin")
# What numpy writes for an array of two bytes, up to its state; and the dtype u1 as it stands in it.
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
U1 = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"


def read(content: bytes):
    return load_plain_pickle(content, SOURCE)


def refusal(content: bytes) -> str:
    """The one line that reading `content` ends in."""
    with pytest.raises(DataError) as caught:
        read(content)
    message = str(caught.value)
    assert message.startswith("set.bin: ") and "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_plain_data_is_read_in_every_protocol(protocol):
    long = bytes(range(256)) * 20
    same = [1, "a"]
    value = [
        None,
        True,
        False,
        0,
        -1,
        255,
        65536,
        2**40,
        -(2**70),
        2**2100,
        1.5,
        "",
        "face é 얼굴 \\ \n",
        b"\xff\x00",
        long,
    ]
    value += [
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        [],
        [[]],
        same,
        same,
        "x" * 300,
    ]
    again = read(pickle.dumps(value, protocol))
    assert again == value
    assert again[-2] is again[-3]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["u1", "b1", "<i8", ">i2", "<f4", ">f8", "f2", "u8"])
def test_pickles_arrays_of_numbers_are_read_in_every_protocol(protocol, dtype):
    numbers = (np.arange(24) % 2 if dtype == "b1" else np.arange(24)).astype(dtype).reshape(2, 3, 4)
    values = [numbers, np.asfortranarray(numbers), numbers[:0], numbers[:1, :1, :1].reshape(()), numbers[1]]
    for read_again, value in zip(read(pickle.dumps(values, protocol)), values, strict=True):
        again = read_again.array
        assert again.dtype == value.dtype and again.shape == value.shape
        np.testing.assert_array_equal(again, value)
        assert not again.flags.writeable


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_numbers_of_numpy_become_those_of_python(protocol):
    values = [np.bool_(True), np.bool_(False), np.float32(0.5), np.int64(-7), np.uint8(200)]
    again = read(pickle.dumps(values, protocol))
    assert again == [True, False, 0.5, -7, 200]
    assert [type(value) for value in again] == [bool, bool, float, int, int]


def test_pickles_of_numpy_1_and_python_2_are_read():
    content = b"(l" + RECONSTRUCT + b"(K\x01(K\x02t" + U1 + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content += b"I00\nU\x02\x07\x08tbaU\x04JPEGaT\x02\x00\x00\x00ab" + b"aI01\na."
    values = read(content)
    assert values[0].array.tolist() == [7, 8]
    assert values[1:] == [b"JPEG", b"ab", True]


# --- Files that would run something.


class Reduced:
    """Pickles itself as a call of `function`, the way every such attack begins."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


GADGETS = {
    "os.system": lambda marker: Reduced(os.system, f"touch {marker}"),
    "eval": lambda marker: Reduced(eval, f"open({str(marker)!r}, 'w').close()"),
    "exec": lambda marker: Reduced(exec, f"open({str(marker)!r}, 'w').close()"),
    "open": lambda marker: Reduced(open, str(marker), "w"),
    "getattr": lambda marker: Reduced(getattr, Reduced(__import__, "os"), "system"),
    "import": lambda marker: Reduced(__import__, "this"),
    "Popen": lambda marker: Reduced(subprocess.Popen, ["touch", str(marker)]),
    "partial": lambda marker: Reduced(functools.partial(os.system, f"touch {marker}")),
    "map": lambda marker: Reduced(list, Reduced(map, os.system, [f"touch {marker}"])),
    "codecs": lambda marker: Reduced(codecs.decode, b"x", "rot13"),
    "object array": lambda marker: np.array([Reduced(os.system, f"touch {marker}"), None], object),
    "in a tuple in a dict": lambda marker: {"a": (1, [Reduced(os.system, f"touch {marker}")])},
    "OrderedDict": lambda marker: OrderedDict(a=1),
    "array.array": lambda marker: array.array("i", [1]),
    "Path": lambda marker: Path("a"),
    "type": lambda marker: Reduced(type, "Name", (), {}),
    "breakpoint": lambda marker: Reduced(breakpoint),
    "structured array": lambda marker: np.zeros(2, [("a", "u1"), ("b", "O")]),
    "array of text": lambda marker: np.array(["a"]),
    "array of dates": lambda marker: np.array(["2024-01-01"], "M8[D]"),
    "dict": lambda marker: {"a": 1},
    "set": lambda marker: {1, 2},
    "frozenset": lambda marker: frozenset([1]),
    "bytearray's class": lambda marker: bytearray,
    "dotted name": lambda marker: os.path.join,
}


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("name", GADGETS)
def test_pickles_that_call_functions_are_refused_unrun(tmp_path, name, protocol):
    marker = tmp_path / "was_run"
    assert refusal(pickle.dumps([GADGETS[name](marker)], protocol))
    assert not marker.exists()


def test_pickles_refusal_has_the_name_and_the_remedy():
    message = refusal(pickle.dumps(Reduced(os.system, "true")))
    assert "'posix.system'" in message or "'nt.system'" in message
    assert "Nothing was run" in message and "Take the file from its publisher" in message


def test_pickles_refused_name_cannot_play_with_the_terminal():
    message = refusal(b"c" + b"\x1b[2J" * 1000 + b"\nsystem\n.")
    assert "\x1b" not in message and r"\x1b[2J" in message


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'true'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\niposix\nsystem\n.",  # INST
        b"(cposix\nsystem\nS'true'\no.",  # OBJ
        b"(cnumpy\ndtype\nU\x02u1o.",
        b"cnumpy\ndtype\n(U\x02u1t}\x92.",  # NEWOBJ_EX
        b"cnumpy\ndtype\n(U\x02u1t\x81.",  # NEWOBJ
        b"cnumpy.core.multiarray\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
        b"\x80\x04\x8c\x05numpyK\x01\x93.",  # a name that is no text
        b"(l)R.",  # calls a list
        b"S'true'\n)R.",
        b"cnumpy\ndtype\n]R.",  # arguments that are no tuple
        b"cnumpy\ndtype\n)R.",  # too few
        b"cnumpy\ndtype\n(U\x02O8tR.",
        b"cnumpy\ndtype\n(ltR.",
        b"cnumpy\nndarray\n(K\x00tR.",
        b"P1\n.",  # PERSID
        b"K\x01Q.",  # BINPERSID
        b"\x97.",  # NEXT_BUFFER
        b"]\x98.",  # READONLY_BUFFER
        b"c_codecs\nencode\n(V\\u0100\nVlatin1\ntR.",
        b"c_codecs\nencode\n(Va\nVrot13\ntR.",
        b"c_codecs\nencode\n(Va\nVutf-8\ntR.",
        b"c_codecs\nencode\n(U\x01aVlatin1\ntR.",
    ],
)
def test_pickles_streams_made_by_hand_are_refused(content):
    assert refusal(content)


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_pickles_with_registered_extensions_are_refused(opcode):
    copyreg.add_extension("os", "getcwd", 1)
    try:
        assert "is not allowed" in refusal(opcode + b")R.")
    finally:
        copyreg.remove_extension("os", "getcwd", 1)


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\ndtype\n}U\x05dtypeK\x01sb.",  # gives a state to the class itself
        b"cnumpy\ndtype\n(N}U\x05dtypeK\x01stb.",
        b"cnumpy\nndarray\n(K\x01K\x02tb.",
        b"c_codecs\nencode\n(K\x01K\x02tb.",
        b"]}b.",
        b"])b.",
        b"K\x01}b.",
        U1 + b"}U\x01aK\x01sb.",
        U1 + b")b.",
        U1 + b"(K\x03U\x01?NNNtb.",
        U1 + b"(K\x03U\x01|(tNNtb.",
        U1 + b"(K\x03U\x01|NU\x01aNtb.",
        RECONSTRUCT + b"Nb.",
        RECONSTRUCT + b"}U\x01aK\x01sb.",
        RECONSTRUCT + b"(K\x01(K\x02tNI00\nU\x02abtb.",
        RECONSTRUCT + b"(K\x01(K\x02t" + U1 + b"I00\n]tb.",
        RECONSTRUCT + b"(K\x01(K\x02t" + U1 + b"I00\nK\x02tb.",
        RECONSTRUCT + b"(K\x01(K\x03t" + U1 + b"I00\nU\x02abtb.",
        RECONSTRUCT + b"(K\x01(J\xff\xff\xff\xfft" + U1 + b"I00\nU\x00tb.",
        RECONSTRUCT + b"(K\x01(L4611686018427387904L\nK\x04t" + U1 + b"I00\nU\x00tb.",
        RECONSTRUCT + b"(K\x01]" + U1 + b"I00\nU\x02abtb.",
        RECONSTRUCT + b"(K\x01(]t" + U1 + b"I00\nU\x02abtb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(c_codecs\nencode\n(K\x00tC\x01btR.",
        b"cnumpy.core.multiarray\nscalar\n(" + U1 + b"U\x02abtR.",
        b"cnumpy.core.multiarray\nscalar\n(U\x02u1U\x01atR.",
    ],
)
def test_pickles_with_crafted_array_states_are_refused(content):
    assert "not a pickle of plain data" in refusal(content)
    assert PickledArray().array is None and not hasattr(PickledArray, "a")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_file_cut_short_anywhere_is_refused(protocol):
    content = pickle.dumps([b"a" * 300, "b" * 300, np.arange(5), True, (1.5,), 2**80], protocol)
    for end in range(len(content)):
        assert refusal(content[:end])


def test_pickles_garbage_is_refused():
    rng = np.random.default_rng(3)
    for size in (1, 2, 10, 100, 1000) * 100:
        assert refusal(rng.bytes(size))


def test_pickles_damaged_are_read_or_refused():
    rng = np.random.default_rng(4)
    for protocol in (0, 2, 4):
        whole = pickle.dumps([b"a" * 300, np.arange(5), True, "text", [(1, 2)]], protocol)
        for _ in range(500):
            damaged = bytearray(whole)
            damaged[rng.integers(len(damaged))] = rng.integers(256)
            try:
                read(bytes(damaged))
            except DataError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    "content",
    [
        b"B\xff\xff\xff\xff",
        b"X\xff\xff\xff\xff",
        b"T\xff\xff\xff\x7f",
        b"T\xff\xff\xff\xff",  # less than nothing
        b"\x8b\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\xff",
        b"\x8e" + b"\xff" * 8,
        b"\x8e" + b"\xff" * 4 + b"\x00" * 4,
        b"\x8d" + b"\xff" * 7 + b"\x7f",
        b"\x96" + b"\xff" * 5 + b"\x00" * 3,
        b"\x95" + b"\xff" * 8,
    ],
)
def test_pickles_huge_declared_length_takes_no_memory(content):
    assert refusal(content + b"abc.")


def test_pickles_deep_nesting_is_refused_or_read_and_ends():
    assert refusal(b"(" * 100_000 + b".")
    deep = read(b"]" * 100_000 + b"a" * 99_999 + b".")
    depth = 0
    while deep:
        deep, depth = deep[0], depth + 1
    assert depth == 99_999
    assert read(b")" + b"\x85" * 100_000 + b".")


@pytest.mark.parametrize("use", [b"}(%bK\x01u.", b"}%bK\x01s.", b"(%bK\x01d."])
def test_pickles_with_a_deep_key_are_refused(use):
    assert "is not allowed" in refusal(use.replace(b"%b", b")" + b"\x85" * 1_000_000))


def test_pickles_with_a_deep_name_are_refused():
    deep = b")" + b"\x85" * 1_000_000
    assert refusal(b"cnumpy\ndtype\n(" + deep + b"tR.")
    assert refusal(b"\x8c\x05numpy" + deep + b"\x93.")


def test_pickles_with_too_many_opcodes_are_refused(monkeypatch):
    monkeypatch.setattr("util.pairs.pickles._MAX_OPCODES", 1000)
    assert "too many objects" in refusal(b"]" * 2000 + b".")


def test_pickles_numbers_of_a_million_digits_are_refused_at_once():
    started = time.perf_counter()
    assert refusal(b"I" + b"9" * 1_000_000 + b"\n.")
    assert refusal(b"L" + b"9" * 1_000_000 + b"L\n.")
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("content", [b"h\x05.", b"g5\n.", b"j\x05\x00\x00\x00.", b"p-1\n.", b"q\x01.", b"\x94."])
def test_pickles_memo_entries_that_are_not_there_are_refused(content):
    assert refusal(content)


@pytest.mark.parametrize(
    "put", [b"r\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"p2147483647\n", b"p99999999999999999999\n"]
)
def test_pickles_huge_memo_index_takes_no_memory(put):
    assert "a memo index is too high" in refusal(b"]" + put + b".")


@pytest.mark.parametrize(
    ("inside", "rest", "value"),
    [
        (b"]", b"", []),
        (b"X\x05\x00", b"\x00\x00abcde", "abcde"),
        (b"X\x05\x00\x00\x00ab", b"cde", "abcde"),
        (b"c_co", b"decs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R", b"a"),
    ],
)
def test_pickles_an_opcode_across_the_end_of_a_frame_is_read(inside, rest, value):
    frame = b"\x95" + len(inside).to_bytes(8, "little")
    assert read(b"\x80\x04" + frame + inside + rest + b".") == value


def test_pickles_text_encoded_again_and_again_is_refused():
    call = b"c_codecs\nencode\nq\x00X\x40\x42\x0f\x00" + b"a" * 1_000_000 + b"X\x06\x00\x00\x00latin1\x86q\x01R"
    assert len(read(call + b".")) == 1_000_000
    tracemalloc.start()
    try:
        assert "more bytes than the file holds" in refusal(b"(" + call + b"h\x00h\x01R" * 1000 + b"l.")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_pickles_list_that_contains_itself_ends():
    itself = read(b"]q\x00h\x00a.")
    assert itself[0] is itself


def test_pickles_opcodes_outside_the_allowed_are_refused():
    assert len(_OPCODES) == len(_NAMES.split())
    for code in (bytes([code]) for code in range(256)):
        if code not in _OPCODES:
            assert f"0x{code.hex()} is not allowed" in refusal(b"]]" + code + b"\x00" * 20)
