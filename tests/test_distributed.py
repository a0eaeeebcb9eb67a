"""Who a process is, which GPU is its own, and what it says in the end."""

import os
import signal
import sys

import pytest

from util import distributed
from util.distributed import LOST, DistEnv, first_to_say, local_gpu_ids, run_rank_script
from util.errors import UsageError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_a_process_that_torchrun_did_not_start_is_alone() -> None:
    assert DistEnv.from_environ({}) == DistEnv(0, 1, 0, 1)
    assert DistEnv.from_environ({"RANK": "3", "WORLD_SIZE": "8"}) == DistEnv()  # as other launchers leave it
    assert DistEnv().is_main_process and not DistEnv().is_distributed
    assert first_to_say("anything") and first_to_say("anything")


def test_torchrun_says_who_a_process_is() -> None:
    assert DistEnv.from_environ(TORCHRUN) == DistEnv(5, 8, 1, 4)
    assert not DistEnv.from_environ(TORCHRUN).is_main_process and DistEnv.from_environ(TORCHRUN).is_distributed


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"WORLD_SIZE": ""}])
def test_half_an_environment_is_named(change: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="LOCAL_RANK is set, but RANK, WORLD_SIZE"):
        DistEnv.from_environ(TORCHRUN | change)


def test_each_process_takes_the_gpu_of_its_number_or_its_entry() -> None:
    env = DistEnv.from_environ(TORCHRUN)
    assert local_gpu_ids((0,), env) == (1,)
    assert local_gpu_ids((4, 7, 5, 6), env) == (7,)
    assert local_gpu_ids((), env) == ()
    assert local_gpu_ids((0, 1), DistEnv()) == (0, 1)


@pytest.mark.parametrize("gpu_num", [(1,), (0, 1), (0, 1, 2, 3, 4)])
def test_a_list_that_does_not_fit_the_processes_is_named(gpu_num: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"--gpu_num=.*starts 4 processes .* each has one GPU"):
        local_gpu_ids(gpu_num, DistEnv.from_environ(TORCHRUN))


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
        monkeypatch.setattr(distributed, "first_to_say", terminated)
        terminated(DistEnv.from_environ())

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
