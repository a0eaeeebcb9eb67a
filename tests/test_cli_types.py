"""Conversions by themselves; what they make of words on a command line and in a file is in test_flags.py."""

from pathlib import Path

import pytest

from util.cli.types import (
    Convert,
    Interval,
    integer,
    integers,
    number,
    one_of,
    to_boolean,
    to_gpus,
    to_interval,
    to_path,
)

EVEN = integers("none", "even numbers", lambda numbers: all(number % 2 == 0 for number in numbers))


@pytest.mark.parametrize(
    ("convert", "given", "converted"),
    [
        (to_path, Path("a/b"), "a/b"),
        (to_boolean, "Yes", True),
        (to_boolean, 0, False),
        (number("a number", lambda value: True), "1e-3", 1e-3),
        (integer(1), "7", 7),
        (integer(1), 7.0, 7),
        (integer(2, 4), "4", 4),
        (EVEN, "[4, 2]", (4, 2)),
        (EVEN, "none", ()),
        (EVEN, [4], (4,)),
        (one_of(("a", "b")), "b", "b"),
        (to_gpus, "CPU", ()),
        (to_gpus, 3, (3,)),
        (to_gpus, " 1  0 ", (1, 0)),
        (to_interval, "15m", Interval("15m", seconds=900)),
        (to_interval, "90s", Interval("90s", seconds=90)),
        (to_interval, "1.5 h", Interval("1.5 h", seconds=5400)),
        (to_interval, 500, Interval("500", steps=500)),
        (to_interval, "500steps", Interval("500steps", steps=500)),
        (to_interval, "1 step", Interval("1 step", steps=1)),
        (to_interval, "0", Interval("0")),
        (to_interval, "0m", Interval("0m")),
        (to_interval, "None", Interval("None")),
    ],
)
def test_a_converted_value_stays_as_it_is(convert: Convert, given, converted):
    for value in (given, converted):
        assert convert(value) == converted and type(convert(value)) is type(converted)


@pytest.mark.parametrize(
    ("convert", "value", "rule"),
    [
        (to_path, " ", "a path"),
        (to_path, 7, "a path"),
        (to_boolean, 2, "True or False"),
        (number("a number below 1", lambda value: value < 1), 1, "a number below 1$"),
        (number("a number", lambda value: True), True, "a number$"),
        (number("a number", lambda value: True), "nan", "a number$"),
        (integer(1), 0, "a whole number, 1 or more$"),
        (integer(1), 1.5, "a whole number, 1 or more$"),
        (integer(2, 4), 5, "a whole number from 2 to 4$"),
        (EVEN, "1", "a list of even numbers, nor the word none$"),
        (EVEN, [True], "a list of even numbers"),
        (EVEN, "cpu", "a list of even numbers"),
        (one_of(("a", "b")), "A", "one of a, b$"),
        (one_of(("a", "b")), ["a"], "one of a, b$"),
        (to_gpus, [0, 0], "a list of different GPU numbers, like 0 or 0,1 or \\[0,1\\], nor the word cpu$"),
        (to_gpus, -1, "a list of different GPU numbers"),
        (to_gpus, None, "a list of different GPU numbers"),
        *(
            (to_interval, value, "a time like 15m, 90s or 2h")
            for value in ("-1", "1.5", "1d", "m", "", 1.5, True, [1], None)
        ),
    ],
)
def test_what_breaks_a_rule_is_told_the_rule(convert: Convert, value, rule):
    with pytest.raises(ValueError, match=f"^{rule}"):
        convert(value)
