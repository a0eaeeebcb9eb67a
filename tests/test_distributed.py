"""The place of a process among others, its GPU, and its messages at the end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from util.console import logger
from util.distributed import LOST, DistEnv, broadcast_from_main, distributed_session, local_gpu_ids
from util.errors import RunError, UsageError, run_script

ROOT = Path(__file__).parents[1]
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
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr("util.distributed.Watchdog.run", lambda self: None)

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


def terminate(record: object = None) -> bool:
    os.kill(os.getpid(), signal.SIGTERM)
    return True


def lose_connection() -> None:
    raise RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer")


def test_session_reports_a_lost_rank_after_sigterm(session_exit_code, capsys) -> None:
    assert session_exit_code(TORCHRUN, terminate) == 143
    assert capsys.readouterr().err == f"[rank 5] error: torchrun was stopped, or {LOST}\n"


def test_session_reports_a_lost_rank_after_an_error_of_gloo(session_exit_code, capsys) -> None:
    assert session_exit_code(TORCHRUN | {"RANK": "0"}, lose_connection) == 1
    assert capsys.readouterr().err == f"error: {LOST}\n"


def test_session_keeps_the_message_of_a_run_error(session_exit_code, capsys) -> None:
    def fail() -> None:
        raise RunError("the loss became nan in gloo")

    assert session_exit_code(TORCHRUN, fail) == 1
    assert capsys.readouterr().err == "[rank 5] error: the loss became nan in gloo\n"


def test_session_of_one_process_names_the_signal(session_exit_code, capsys) -> None:
    assert session_exit_code({}, terminate) == 143
    assert capsys.readouterr().err == "Interrupted (SIGTERM).\n"


def test_half_an_environment_ends_in_one_line(session_exit_code, capsys) -> None:
    assert session_exit_code({"LOCAL_RANK": "0"}, terminate) == 2
    assert capsys.readouterr().err.startswith("error: LOCAL_RANK is set, but RANK")


RANK = """
import os, sys, time
import torch.distributed as dist
from util.distributed import DistEnv, Watchdog
rank, port = int(sys.argv[1]), int(sys.argv[2])
os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
watchdog = Watchdog(DistEnv(rank, 2, rank, 2), silence=3)
watchdog.start()
print("started", flush=True)
time.sleep(float(sys.argv[3]))
watchdog.stop()
print("ended by itself", flush=True)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def start_rank(rank: int, port: int, seconds: int, *parent: str) -> subprocess.Popen:
    command = [sys.executable, "-c", *parent, RANK, str(rank), str(port), str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    return process


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_watchdog_ends_a_rank_whose_neighbor_hangs() -> None:
    port = free_port()
    first = start_rank(0, port, 60)
    second = start_rank(1, port, 60)
    time.sleep(2)
    second.send_signal(signal.SIGSTOP)
    try:
        _, errors = first.communicate(timeout=30)
    finally:
        second.kill()
    assert first.returncode == 1
    name = f"rank 1 (process {second.pid} on {socket.gethostname()})"
    assert errors == f"error: {name} has not answered for 3 s. Start the same command again.\n"


@pytest.mark.slow
def test_watchdog_ends_a_rank_whose_torchrun_is_killed() -> None:
    parent = start_rank(0, free_port(), 60, PARENT)
    time.sleep(1.5)
    parent.kill()
    output, errors = parent.communicate(timeout=20)  # until the rank has closed the pipes, too
    assert output == ""
    assert errors == (f"error: torchrun (process {parent.pid}) has ended. This rank saves a checkpoint and stops.\n")


@pytest.mark.slow
def test_watchdog_leaves_ranks_that_answer_alone() -> None:
    port = free_port()
    first = start_rank(0, port, 60)  # has the store, as torchrun has
    second = start_rank(1, port, 6)
    assert second.communicate(timeout=30) == ("ended by itself\n", "")
    assert second.returncode == 0 and first.poll() is None
    first.kill()
    first.communicate()
