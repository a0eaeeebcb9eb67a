"""Loader workers that die, hang, or get signals; and how they end."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from util.data import workers
from util.data.image_folder import ImageFolder
from util.data.loader import Augmentation, TrainLoader
from util.errors import STOP_SIGNALS, RunError


@pytest.fixture(autouse=True)
def impatient_torch(monkeypatch):
    """Let torch look for dead workers every half second, not every five."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))


class SlowImages(ImageFolder):
    """Takes `seconds` for each image, and for ever for the image `stuck`."""

    def __init__(self, root: Path, seconds: float = 0.0, stuck: int = -1):
        super().__init__(root)
        self.seconds = seconds
        self.stuck = stuck

    def image(self, index: int) -> np.ndarray:
        time.sleep(1000 if index == self.stuck else self.seconds)
        return super().image(index)


def loader_of(images: ImageFolder, timeout: float = 50, **options) -> TrainLoader:
    options = {"num_workers": 2, "seed": 3, "steps": 12} | options
    return TrainLoader(images, 2, Augmentation(), worker_timeout=timeout, **options)


def processes_of(loader: TrainLoader) -> list[int]:
    return [worker.pid for worker in loader._made._workers]


def wait_until_idle(loader: TrainLoader) -> None:
    """Wait until the workers have made all batches that they were asked for, so that they are at no image."""
    batches = loader._made._batches
    while batches._worker_result_queue.qsize() < batches._tasks_outstanding:
        time.sleep(0.01)


def assert_gone(pids: list[int], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end, "a worker is left"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("when", ["in an epoch", "between epochs"])
def test_killed_worker_ends_the_run_in_one_line(people_folder, monkeypatch, when):
    monkeypatch.setattr(workers, "_POLL", 0.2)
    loader = loader_of(ImageFolder(people_folder), timeout=2)
    on_child_exit = signal.getsignal(signal.SIGCHLD)
    batches = loader.epoch(0)
    next(batches)
    if when == "between epochs":
        list(batches)
        batches = loader.epoch(1)
    pids = processes_of(loader)
    wait_until_idle(loader)
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(0.3)  # torch's handler of SIGCHLD would raise an error here, outside of the loader
    assert signal.getsignal(signal.SIGCHLD) == on_child_exit
    with pytest.raises(RunError) as caught:
        list(batches)
    assert str(caught.value) == (
        f"loader worker (process {pids[0]}) was killed (signal 9). Often the machine ran out of memory: lower "
        f"--num_workers."
    )
    assert_gone(pids, 1)


@pytest.mark.parametrize("lock", ["done_event", "index_queue", "data_queue"])
def test_worker_killed_with_a_lock_ends_the_run(people_folder, monkeypatch, lock):
    """Nobody else gets a lock of a dead process, so the main process must not need one."""

    def start_and_die(worker: int) -> None:
        workers.init_worker(worker)
        if worker == 0:
            shared = sys._getframe(1).f_locals[lock]  # of torch's worker loop
            for name in ("_cond", "_rlock", "_wlock"):
                if hasattr(shared, name):
                    getattr(shared, name).acquire()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers, "_POLL", 0.2)
    monkeypatch.setattr("util.data.loader.init_worker", start_and_die)
    loader = loader_of(ImageFolder(people_folder), timeout=20)
    with pytest.raises(RunError, match=r"was killed \(signal 9\)"):
        list(loader.epoch(0))
    loader.close()
    assert_gone(processes_of(loader), 1)


def test_stopped_workers_end_the_run_in_one_line(people_folder, monkeypatch):
    monkeypatch.setattr(workers, "_POLL", 0.2)
    loader = loader_of(ImageFolder(people_folder), timeout=0.5)
    batches = loader.epoch(0)
    next(batches)
    pids = processes_of(loader)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(RunError, match=rf"workers hang .*process {pids[0]}.*no image was read for 0\.5 s\. Check"):
        list(batches)
    assert_gone(pids, 1)


@pytest.mark.parametrize("number", [0, 1])
def test_worker_stopped_before_its_first_batch_is_named(people_folder, monkeypatch, number):
    """The other one makes its batches, and then waits."""

    def start_and_stop(worker: int) -> None:
        workers.init_worker(worker)
        if worker == number:
            os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(workers, "_POLL", 0.2)
    monkeypatch.setattr("util.data.loader.init_worker", start_and_stop)
    loader = loader_of(ImageFolder(people_folder), timeout=1)
    with pytest.raises(RunError) as caught:
        list(loader.epoch(0))
    pids = processes_of(loader)
    text = f"loader workers hang (process {pids[number]}, process {pids[1 - number]}): no image was read for 1 s. "
    assert str(caught.value).startswith(text)  # workers that use the CPU may take 6 s
    assert_gone(pids, 1)


def test_slow_start_of_a_worker_ends_no_run(people_folder, monkeypatch):
    """It uses the CPU for longer than it may be idle."""
    monkeypatch.setattr(workers, "_POLL", 0.2)
    monkeypatch.setattr(workers, "_LEAST_WORK", 0.005)  # the machine may be busy

    def start_slowly(worker: int) -> None:
        workers.init_worker(worker)
        while time.process_time() < 1.4:
            pass

    monkeypatch.setattr("util.data.loader.init_worker", start_slowly)
    assert len(list(loader_of(ImageFolder(people_folder), timeout=1, num_workers=1).epoch(0))) == 12


def test_hung_worker_is_named_with_its_image(people_folder, monkeypatch):
    monkeypatch.setattr(workers, "_POLL", 0.2)
    images = SlowImages(people_folder, stuck=6)
    loader = loader_of(images, timeout=0.5)
    with pytest.raises(RunError, match=rf"workers hang \(process \d+ at {images.where(6)}") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_slow_images_end_no_run(people_folder, monkeypatch):
    monkeypatch.setattr(workers, "_POLL", 0.1)
    images = SlowImages(people_folder, seconds=0.3)
    loader = TrainLoader(images, 6, Augmentation(), num_workers=1, steps=2, worker_timeout=0.7)
    start = time.monotonic()
    assert len(list(loader.epoch(0))) == 2
    assert time.monotonic() - start > 3


def test_suspended_job_does_not_count_as_hung(monkeypatch):
    """A scheduler may stop all processes of a job for hours between two looks at the workers."""
    watched = workers.WatchedLoader(None, [5], str, timeout=8)
    watched._is_blocked = True
    watched._workers = [None]
    killed = []
    monkeypatch.setattr(watched, "_end_workers", killed.append)
    work = itertools.count()  # the workers are busy
    monkeypatch.setattr(workers, "_cpu_seconds", lambda worker: next(work))
    hours = iter(range(0, 36000, 3600))
    monkeypatch.setattr(time, "monotonic", lambda: next(hours))

    class Done:
        looks = 4

        def wait(self, timeout: float) -> bool:
            self.looks -= 1
            return self.looks < 0

    watched._watch(Done())
    assert not killed
    Done.looks = 26  # two seconds each, and 6 times 8 seconds are the limit
    watched._watch(Done())
    assert killed == [48]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_workers_leave_signals_to_the_main_process(people_folder, number):
    images = ImageFolder(people_folder)
    expected = torch.cat([pixels for pixels, _ in loader_of(images, num_workers=0).epoch(0)])
    loader = loader_of(images)
    pixels = []
    for batch, _ in loader.epoch(0):
        pixels.append(batch)
        for pid in processes_of(loader):
            os.kill(pid, number)
    assert torch.equal(torch.cat(pixels), expected)


def test_workers_survive_a_signal_while_they_start(people_folder, monkeypatch):
    def start_slowly(worker: int) -> None:
        time.sleep(1)
        workers.init_worker(worker)

    monkeypatch.setattr("util.data.loader.init_worker", start_slowly)
    loader = loader_of(ImageFolder(people_folder))
    start = workers.WatchedLoader._start

    def start_and_signal(watched: workers.WatchedLoader) -> None:
        start(watched)
        for pid in processes_of(loader):
            for number in STOP_SIGNALS:
                os.kill(pid, number)

    monkeypatch.setattr(workers.WatchedLoader, "_start", start_and_signal)
    assert len(list(loader.epoch(0))) == 12


@pytest.mark.parametrize("error", [ConnectionResetError(), BrokenPipeError(), EOFError(), ValueError("real")])
def test_worker_reports_errors_but_no_lost_connection(error, capsys):
    workers.report_unless_disconnected(type(error), error, None)
    assert capsys.readouterr().err == ("ValueError: real\n" if isinstance(error, ValueError) else "")


def test_worker_is_silent_when_a_transfer_is_cut(people_folder):
    """The thread that hands over batches reports to sys.excepthook when the main process is interrupted just then."""
    process = start(CUT_TRANSFERS, people_folder)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_close_ends_hung_workers_within_seconds(people_folder):
    loader = loader_of(ImageFolder(people_folder))
    next(loader.epoch(0))
    pids = processes_of(loader)
    os.kill(pids[0], signal.SIGSTOP)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 8
    assert_gone(pids, 1)


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from util.data.loader import Augmentation, TrainLoader
from util.data.image_folder import ImageFolder
loader = TrainLoader(ImageFolder(Path(sys.argv[1])), 2, Augmentation(), num_workers=2, steps=50)
sys.kept = batches = loader.epoch(0)  # like the traceback of an error would keep it
next(batches)
pids = [worker.pid for worker in loader._made._workers]
print(*pids, flush=True)
"""


SLOW_START = """
import util.data.loader
init = util.data.loader.init_worker
util.data.loader.init_worker = lambda worker: (time.sleep(2), init(worker))
"""


CUT_TRANSFERS = """
from multiprocessing import connection, resource_sharer
connect = resource_sharer._ResourceSharer.get_connection
def cut_first(identity):
    connection.SocketClient(identity[0]).close()
    return connect(identity)
resource_sharer._ResourceSharer.get_connection = staticmethod(cut_first)
assert len(list(batches)) == 49
"""


def start(program: str, root: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM + program, str(root)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_workers_end_when_the_main_process_is_killed(people_folder):
    process = start("time.sleep(100)", people_folder)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_running, pids))
    process.kill()
    assert_gone(pids, 30)
    assert process.communicate() == ("", "")


def test_worker_that_starts_after_the_end_of_the_main_process_ends(people_folder):
    code = PROGRAM.replace("loader = ", SLOW_START + "loader = ").replace("next(batches)", "loader._made._start()")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(people_folder)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    assert len(pids) == 2
    assert_gone(pids, 30)
    process.communicate()


def test_program_ends_although_a_worker_hangs(people_folder):
    process = start("os.kill(pids[0], signal.SIGSTOP)\nsys.exit(5)", people_folder)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (5, "")
    assert_gone([int(pid) for pid in output.split()], 1)
