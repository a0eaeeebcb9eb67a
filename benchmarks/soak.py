"""Train with one fault after another, and compare the weights with the weights of a run without faults.

python -m benchmarks.soak --minutes 60 --fault_every 60 --seed 1
python -m benchmarks.soak --minutes 1 --fault_every 8 --faults sigterm bit_flip

A small network trains on drawn faces, one of which cannot be read. The first run meets no fault. Its memory, open files
and threads, over all of its processes, must not grow. The second run has as many epochs. It meets a random fault about
every --fault_every seconds, and the same command starts it again. It must end as docs/reliability.md promises: with the
right exit code, in time, without a process left and without a traceback. Both runs must end with the same weights, bit
for bit. The exit code is 1 if a promise is broken. Linux only.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from applications.demo.data_set import make_faces
from benchmarks.timing import to_names
from util.cli.parser import Settings, option, parse
from util.cli.types import POSITIVE, integer
from util.errors import RunError, run_script

SCRIPT = Path(__file__).parents[1] / "train.py"
SAMPLE_EVERY = 0.5  # seconds
RESTART_SECONDS = 10  # about what a fault costs: start again, and train what was lost
END_WITHIN = 100  # a loader worker that does not answer is noticed after 60 s
GONE_WITHIN = 30  # processes of a run that has ended
TRAINING = (
    "--gpu_num=cpu --num_workers=2 --backbone=MobileFaceNet_025 --embedding_size=64 --head=CosFace --s=16 --m=0.2 "
    "--batch_size=16 --warmup_epochs=1 --save_every=5 --keep_last=3 --max_bad=0.05 --resume_dir=auto"
)


@dataclass
class Run:
    """A training whose files go to `folder`, started again by the same command after each fault."""

    data: Path
    folder: Path
    epochs: int
    rng: random.Random
    broken: list[str] = field(default_factory=list)  # promises, in words
    samples: list[tuple[int, int, int]] = field(default_factory=list)  # memory in MB, open files, threads

    def start(self) -> None:
        """Start it in a session of its own, and wait until it prints something."""
        command = [sys.executable, str(SCRIPT), *TRAINING.split(), f"--epochs={self.epochs}"]
        command += [f"--train_data={self.data}/imgs", f"--val_data=drawn={self.data}/pairs.txt:{self.data}/imgs"]
        command += [f"--{name}={self.folder / name}" for name in ("checkpoint_dir", "best_checkpoint_dir", "log_dir")]
        self.output = self.folder.with_suffix(".txt")  # not in the folder, whose disk may be full
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        while not self.output.stat().st_size and self.process.poll() is None:
            time.sleep(0.05)

    def wait(self, seconds: float) -> int | None:
        """Wait for the end, at most so long, and sample the processes. Return the exit code, or None."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(min(left, SAMPLE_EVERY))
            processes = processes_of(self)
            files = [len(list(Path("/proc").glob(f"{process[0]}/fd/*"))) for process in processes]
            memory, threads = (sum(process[index] for process in processes) for index in (2, 3))
            self.samples.append((memory // 1000, sum(files), threads))
        return self.process.poll()

    def check_end(self, fault: str, expected: int) -> float:
        """Wait for the end after a fault, note the promises that it breaks, and return the seconds that it took."""
        started = time.monotonic()
        code = self.wait(END_WITHIN)
        seconds = time.monotonic() - started
        printed = self.output.read_text(errors="replace")
        problems = []
        if code is None:
            problems.append(f"did not end within {END_WITHIN} s")
            send(self, signal.SIGKILL, to_all=True)
            self.process.wait()
        elif code not in (expected, 0):  # 0: it was finished before the fault
            problems.append(f"exit code {code} instead of {expected}")
        if "Traceback" in printed:
            problems.append("a traceback")
        if code == 1 and printed.count("error: ") != 1:
            problems.append(f"{printed.count('error: ')} lines of errors instead of one")
        deadline = time.monotonic() + GONE_WITHIN
        while (left := processes_of(self)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            problems.append(f"{len(left)} processes left after {GONE_WITHIN} s")
            send(self, signal.SIGKILL, to_all=True)
        self.broken += [f"{fault}: {problem} (…{printed[-300:]})" for problem in problems]
        return seconds

    def files(self) -> list[list[Path]]:
        """Return the files of each checkpoint, the newest checkpoint first."""
        checkpoints: dict[str, list[Path]] = {}
        files = self.folder.glob("checkpoint_dir/*/*.pth")
        for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
            checkpoints.setdefault(file.stem.partition("_")[2], []).append(file)  # Backbone_1_20, Head_1_20 …
        return list(checkpoints.values())

    def weights(self, epoch: int) -> dict[str, torch.Tensor]:
        """Return the weights of the backbone and the head after an epoch."""
        found: dict[str, torch.Tensor] = {}
        for file in self.folder.glob(f"checkpoint_dir/*/[BH]*_{epoch}_*.pth"):
            found |= torch.load(file, weights_only=True)
        return found


def processes_of(run: Run) -> list[tuple[int, int, int, int]]:
    """Return (process, its parent, memory in kB, threads) of the live processes of a run."""
    command = ["ps", "-o", "pid=,ppid=,rss=,nlwp=,stat=", "--sid", str(run.process.pid)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    rows = [line.split() for line in lines]
    return [(int(row[0]), int(row[1]), int(row[2]), int(row[3])) for row in rows if row[4][0] not in "ZX"]


def send(run: Run, number: signal.Signals, to_all: bool = False) -> int:
    """Send a signal to the process that was started, or to all, as a terminal does."""
    with suppress(ProcessLookupError):
        (os.killpg if to_all else os.kill)(run.process.pid, number)
    return -number if number == signal.SIGKILL else 128 + number


def send_to_worker(run: Run, number: signal.Signals) -> int | None:
    workers = [process for process, parent, _, _ in processes_of(run) if parent == run.process.pid]
    if not workers:
        return None
    os.kill(run.rng.choice(workers), number)
    return 1


def damage(run: Run, cut: bool) -> int | None:
    """Kill the run. Cut a file of its newest checkpoint short, or flip a bit of it, if there is an older checkpoint."""
    if len(run.files()) < 2:
        return None
    expected = send(run, signal.SIGKILL, to_all=True)
    run.process.wait()
    file = run.rng.choice(run.files()[0])
    content = bytearray(file.read_bytes())
    if content:  # else it was cut before, and no run has continued since
        position = run.rng.randrange(len(content))
        content[position] ^= 1 << run.rng.randrange(8)
        file.write_bytes(content[:position] if cut else content)
    return expected


def fill_disk(run: Run) -> int | None:
    """Fill the disk of a run that has saved something. The caller removes the file after the end."""
    if not run.files():
        return None
    with suppress(OSError), (run.folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    return 1


# Each does its fault and returns the exit code that the run must end with, or None if the fault is not possible now.
FAULTS: dict[str, Callable[[Run], int | None]] = {
    "sigkill": partial(send, number=signal.SIGKILL),
    "sigkill_all": partial(send, number=signal.SIGKILL, to_all=True),
    "sigterm": partial(send, number=signal.SIGTERM),
    "sigint": partial(send, number=signal.SIGINT, to_all=True),
    "sigusr1": partial(send, number=signal.SIGUSR1),
    "kill_worker": partial(send_to_worker, number=signal.SIGKILL),
    "stop_worker": partial(send_to_worker, number=signal.SIGSTOP),
    "bit_flip": partial(damage, cut=False),
    "cut_file": partial(damage, cut=True),
    "full_disk": fill_disk,
}


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of this benchmark."""

    minutes: float = option(default=60.0, type=POSITIVE, help="minutes of the run with faults, about")
    fault_every: float = option(default=60.0, type=POSITIVE, help="mean seconds from a start to a fault")
    seed: int = option(default=1, type=integer(0), help="seed of the faults")
    faults: tuple[str, ...] = option(default=tuple(FAULTS), type=to_names(FAULTS), help="faults to choose from")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.soak", arguments, description=__doc__)
    # A shell that starts this program in the background ignores SIGINT, and the trainings would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        data, plain_folder, faulty_folder = (Path(temporary) / name for name in ("data", "plain", "faults"))
        make_data(data)
        plain, epochs = train_without_faults(data, plain_folder, options)

        faulty_folder.mkdir()
        names = list(options.faults)
        mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(faulty_folder)]
        if subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            stack.callback(subprocess.run, ["umount", str(faulty_folder)], check=True)
        elif "full_disk" in names:
            print("full_disk: left out, because this user cannot mount a small disk")
            names.remove("full_disk")
        faulty = Run(data, faulty_folder, epochs, rng=random.Random(options.seed))
        times = train_with_faults(faulty, names, options)
        ours, theirs = plain.weights(epochs), faulty.weights(epochs)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            faulty.broken.append(f"the weights after epoch {epochs} differ from the run without faults")

    print("\n| fault | times | longest time to the end (s) |\n| --- | --- | --- |")
    for name, seconds in times.items():
        print(f"| {name} | {len(seconds)} | {max(seconds, default=0):.1f} |")
    print("\n| without faults | second quarter | last quarter | |\n| --- | --- | --- | --- |")
    quarter = len(plain.samples) // 4
    for name, values in zip(("memory (MB)", "open files", "threads"), zip(*plain.samples, strict=True), strict=True):
        early, late = max(values[quarter : 2 * quarter]), max(values[-quarter:])
        is_flat = late <= max(1.1 * early, early + 1)
        print(f"| {name} | {early} | {late} | {'flat' if is_flat else 'grows'} |")
        plain.broken += [] if is_flat else [f"{name}: grows from {early} to {late} in the run without faults"]
    broken = plain.broken + faulty.broken
    if broken:
        raise RunError("; ".join([f"{len(broken)} promises are broken", *broken]))
    print(f"\nThe weights after {epochs} epochs and {sum(map(len, times.values()))} faults are those without faults.")


def make_data(data: Path, people: int = 16, images: int = 10) -> None:
    """Draw training images, pair some of them, and make one that is in no pair unreadable."""
    make_faces(data / "imgs", people, images)
    files = sorted(data.glob("imgs/*/*.jpg"))
    files[0].write_bytes(b"not an image")
    names = [file.relative_to(data / "imgs") for file in files]
    lines = []
    for index in range(1, len(names) - images, 5):
        lines += [f"{names[index]} {names[index + 1]} 1", f"{names[index]} {names[index + images]} 0"]
    (data / "pairs.txt").write_text("\n".join(lines) + "\n")


def train_without_faults(data: Path, folder: Path, options: Flags) -> tuple[Run, int]:
    """Train until SIGTERM. Return the run, and the number of its complete epochs."""
    run = Run(data, folder, epochs=1_000_000, rng=random.Random())
    run.start()
    code = run.wait(60 * options.minutes * options.fault_every / (options.fault_every + RESTART_SECONDS))
    if code is not None:
        raise RunError(f"the run without faults ended with exit code {code}: {run.output.read_text()[-500:]}")
    run.check_end("the run without faults", send(run, signal.SIGTERM))
    epochs = [int(file.stem.split("_")[1]) for file in folder.glob("checkpoint_dir/*/Head_[0-9]*.pth")]
    if not epochs or len(run.samples) < 4:
        raise RunError("the run without faults ended before its first epoch. Give more --minutes.")
    return run, max(epochs)


def train_with_faults(run: Run, names: list[str], options: Flags) -> dict[str, list[float]]:
    """Train to the end with the faults, in rounds of random order. Return for each the seconds until the run ended."""
    times: dict[str, list[float]] = {name: [] for name in names}
    left: list[str] = []
    deadline = time.monotonic() + 4 * 60 * options.minutes
    run.start()
    while (code := run.wait(run.rng.uniform(0, 2 * options.fault_every))) is None:
        if time.monotonic() > deadline:
            send(run, signal.SIGKILL, to_all=True)  # its exit code is a broken promise
            continue
        left = left or run.rng.sample(names, len(names))
        for name in left:
            expected = FAULTS[name](run)
            if expected is not None:
                left.remove(name)
                times[name].append(run.check_end(name, expected))
                (run.folder / "filler").unlink(missing_ok=True)
                print(f"{name}: ended after {times[name][-1]:.1f} s", flush=True)
                if run.process.returncode:  # else it was finished before the fault
                    run.start()
                break
    if code:
        run.broken.append(f"ended by itself with exit code {code}: {run.output.read_text()[-500:]}")
    return times


if __name__ == "__main__":
    run_script(main)
