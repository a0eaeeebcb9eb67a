"""Who a process is, which GPU is its own, and what it says in the end."""

import os
import signal
import sys

import pytest

from util import ranks
from util.errors import UsageError
from util.ranks import LOST, Ranks, first_to_say, own_gpus, own_ranks, run_rank_script

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_a_process_that_torchrun_did_not_start_is_alone() -> None:
    assert own_ranks({}) == Ranks(0, 1, 0, 1)
    assert own_ranks({"RANK": "3", "WORLD_SIZE": "8"}) == Ranks()  # as other launchers leave it
    assert Ranks().is_first and not Ranks().several
    assert first_to_say("anything") and first_to_say("anything")


def test_torchrun_says_who_a_process_is() -> None:
    assert own_ranks(TORCHRUN) == Ranks(5, 8, 1, 4)
    assert not own_ranks(TORCHRUN).is_first and own_ranks(TORCHRUN).several


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"WORLD_SIZE": ""}])
def test_half_an_environment_is_named(change: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="LOCAL_RANK is set, but RANK, WORLD_SIZE"):
        own_ranks(TORCHRUN | change)


def test_each_process_takes_the_gpu_of_its_number_or_its_entry() -> None:
    ranks = own_ranks(TORCHRUN)
    assert own_gpus((0,), ranks) == (1,)
    assert own_gpus((4, 7, 5, 6), ranks) == (7,)
    assert own_gpus((), ranks) == ()
    assert own_gpus((0, 1), Ranks()) == (0, 1)


@pytest.mark.parametrize("gpu_num", [(1,), (0, 1), (0, 1, 2, 3, 4)])
def test_a_list_that_does_not_fit_the_processes_is_named(gpu_num: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"--gpu_num=.*starts 4 processes .* each has one GPU"):
        own_gpus(gpu_num, own_ranks(TORCHRUN))


def ending(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> int:
    """The exit code of a process with this environment, which asks for its ranks and then gets two SIGTERMs."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def terminated(line: str = "") -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    def main(arguments: list[str]) -> None:
        monkeypatch.setattr(ranks, "first_to_say", terminated)
        terminated(own_ranks())

    try:
        with pytest.raises(SystemExit) as end:
            run_rank_script(main)
        return end.value.code
    finally:
        signal.signal(signal.SIGTERM, before)


def test_whom_torchrun_ends_says_that_another_process_was_lost(monkeypatch, capsys) -> None:
    assert ending(monkeypatch, TORCHRUN) == 143
    assert capsys.readouterr().err == f"error: {LOST}\n"


def test_a_process_that_is_alone_ends_silently(monkeypatch, capsys) -> None:
    assert ending(monkeypatch, {}) == 143
    assert capsys.readouterr().err == ""


def test_half_an_environment_ends_in_one_line(monkeypatch, capsys) -> None:
    assert ending(monkeypatch, {"LOCAL_RANK": "0"}) == 2
    assert capsys.readouterr().err.startswith("error: LOCAL_RANK is set, but RANK")
