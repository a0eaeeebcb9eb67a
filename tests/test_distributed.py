"""The place of a process among others, its GPU, and its messages at the end."""

import os
import signal
import sys
from collections.abc import Callable

import pytest
import torch.distributed as dist

from util.console import logger
from util.distributed import LOST, DistEnv, broadcast_from_main, distributed_session, local_gpu_ids
from util.errors import RunError, UsageError, run_script

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_dist_env_of_a_single_process() -> None:
    assert DistEnv.from_environ({}) == DistEnv(0, 1, 0, 1)
    assert DistEnv.from_environ({"RANK": "3", "WORLD_SIZE": "8"}) == DistEnv()  # other launchers set these
    assert DistEnv().is_main_process and not DistEnv().is_distributed
    assert broadcast_from_main(lambda: "result", DistEnv()) == "result"


def test_dist_env_reads_the_variables_of_torchrun() -> None:
    env = DistEnv.from_environ(TORCHRUN)
    assert env == DistEnv(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert not env.is_main_process and env.is_distributed


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"WORLD_SIZE": ""}])
def test_dist_env_refuses_half_an_environment(change: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="LOCAL_RANK is set, but RANK, WORLD_SIZE"):
        DistEnv.from_environ(TORCHRUN | change)


def test_local_gpu_ids_returns_the_gpu_of_the_local_rank() -> None:
    env = DistEnv.from_environ(TORCHRUN)
    assert local_gpu_ids((0,), env) == (1,)
    assert local_gpu_ids((4, 7, 5, 6), env) == (7,)
    assert local_gpu_ids((), env) == ()
    assert local_gpu_ids((0, 1), DistEnv()) == (0, 1)


@pytest.mark.parametrize("gpu_num", [(1,), (0, 1), (0, 1, 2, 3, 4)])
def test_local_gpu_ids_refuses_a_list_of_another_length(gpu_num: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"--gpu_num=.*starts 4 processes .* each has one GPU"):
        local_gpu_ids(gpu_num, DistEnv.from_environ(TORCHRUN))


@pytest.fixture
def session_exit_code(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """session_exit_code(environment, work): the exit code of a process that calls work() in its session.

    The process gets a SIGTERM while it reports its error.
    """
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)

    def run(environment: dict[str, str], work: Callable[[], None]) -> int:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def main(arguments: list[str]) -> None:
            with distributed_session((), DistEnv.from_environ()):
                work()

        with pytest.raises(SystemExit) as end:
            run_script(main)
        return end.value.code

    logger.addFilter(terminate)
    yield run
    logger.removeFilter(terminate)
    signal.signal(signal.SIGTERM, before)


def terminate(record: object = None) -> bool:
    os.kill(os.getpid(), signal.SIGTERM)
    return True


def lose_connection() -> None:
    raise RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer")


def test_session_reports_a_lost_rank_after_sigterm(session_exit_code, capsys) -> None:
    assert session_exit_code(TORCHRUN, terminate) == 143
    assert capsys.readouterr().err == f"[rank 5] error: {LOST}\n"


def test_session_reports_a_lost_rank_after_an_error_of_gloo(session_exit_code, capsys) -> None:
    assert session_exit_code(TORCHRUN | {"RANK": "0"}, lose_connection) == 1
    assert capsys.readouterr().err == f"error: {LOST}\n"


def test_session_keeps_the_message_of_a_run_error(session_exit_code, capsys) -> None:
    def fail() -> None:
        raise RunError("the loss became nan in gloo")

    assert session_exit_code(TORCHRUN, fail) == 1
    assert capsys.readouterr().err == "[rank 5] error: the loss became nan in gloo\n"


def test_session_of_one_process_ends_silently(session_exit_code, capsys) -> None:
    assert session_exit_code({}, terminate) == 143
    assert capsys.readouterr().err == ""


def test_half_an_environment_ends_in_one_line(session_exit_code, capsys) -> None:
    assert session_exit_code({"LOCAL_RANK": "0"}, terminate) == 2
    assert capsys.readouterr().err.startswith("error: LOCAL_RANK is set, but RANK")
