"""Fixtures shared by all tests."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

import tests.default_signals  # noqa: F401
from util.errors import STOP_SIGNALS, run_script
from util.pairs.bcolz import write_carray

SHARED = Path(__file__).parents[2] / "shared"
HANDLERS = {number: signal.getsignal(number) for number in STOP_SIGNALS}


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """Give back the handlers of signals. A process that a later test starts would inherit them, and lose a signal."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def end_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Return a function that runs main(arguments) as a program, and returns its exit code and what is on stderr."""
    monkeypatch.chdir(Path(__file__).parents[1])

    def run(main: Callable[[list[str]], None], arguments: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["program.py", *arguments])
        with pytest.raises(SystemExit) as end:
            run_script(main)
        return end.value.code, capsys.readouterr().err

    return run


# These take longest: a worker of xdist that begins one of them last would keep the others waiting.
LONG_FILES = (
    "torchrun",
    "torchrun_faults",
    "train_faults",
    "backbone",
    "train",
    "align_batch",
    "workers",
    "distributed",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    names = {f"test_{name}.py": rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: names.get(item.path.name, len(names)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real faces and reference numbers next to the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder of real faces and reference numbers (../shared), absent here")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Return the folder with numbers of public reference implementations."""
    return shared / "golden"


@pytest.fixture(scope="session")
def time_limit() -> Callable[[float], AbstractContextManager[None]]:
    """Return a function: `with time_limit(SECONDS):` fails if the block takes longer, also if it waits for a file."""

    def expire(signum: int, frame: object) -> None:
        # Not an Exception: readers turn those into their own errors.
        raise KeyboardInterrupt("the time limit of a test")

    @contextmanager
    def limit(seconds: float) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, expire)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        except KeyboardInterrupt:
            raise TimeoutError(f"took longer than {seconds} s") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return limit


@pytest.fixture(scope="session")
def make_people():
    """Return a function that writes ROOT/person_0/image_0.jpg …: noise around one color for each person."""

    def make(root: Path, people: int, images: int) -> Path:
        rng = np.random.default_rng(0)
        for person in range(people):
            folder = root / f"person_{person}"
            folder.mkdir(parents=True)
            color = rng.integers(60, 200, size=3)
            for number in range(images):
                pixels = np.clip(color + rng.normal(0, 20, (112, 112, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / f"image_{number}.jpg"), pixels)
        return root

    return make


def draw_no_plots(patch: pytest.MonkeyPatch) -> None:
    """Draw no plots: they take most of the time of a small run."""
    for name in ("roc_figure", "score_histogram", "training_curves", "save_figure"):
        patch.setattr(f"util.training.log.{name}", lambda *arguments: None)
    patch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", lambda *arguments: None)


@pytest.fixture
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no plots, unless the test has the fixture `plots`."""
    if "plots" not in request.fixturenames:
        draw_no_plots(monkeypatch)


@pytest.fixture
def plots() -> None:
    """Let a test in a module without plots draw them."""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, make_people) -> Path:
    """Return a data folder with 3 people of 4 images, and LFW and AgeDB sets of 20 and 23 pairs of noise."""
    root = tmp_path_factory.mktemp("data")
    make_people(root / "imgs", people=3, images=4)
    rng = np.random.default_rng(1)
    for place, pairs in (("lfw_align_112/lfw", 20), ("AgeDB/agedb_30", 23)):
        images = rng.integers(0, 256, (2 * pairs, 112, 112, 3), dtype=np.uint8)
        write_carray(root / place, images, np.arange(pairs) % 2 == 0)
    return root


@pytest.fixture
def write_image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function: write_image_folder(Ann=3, Bob=2) -> a folder with N different images for each person."""

    def write(size: int = 112, **counts: int) -> Path:
        root = tmp_path / "people"
        rng = np.random.default_rng(5)
        for person, count in counts.items():
            (root / person).mkdir(parents=True)
            for number in range(count):
                coarse = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
                image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
                assert cv2.imwrite(str(root / person / f"{person}_{number:04d}.jpg"), image)
        return root

    return write


@pytest.fixture
def people_folder(write_image_folder: Callable[..., Path]) -> Path:
    """Write seven images of three people."""
    return write_image_folder(Ann=2, Bob=4, Cid=1)


@pytest.fixture(scope="session")
def made_pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write a carray of 23 pairs of noise; return it with its images, (46, 112, 112, 3) RGB uint8, and issame (23,).

    A same pair is one image twice. Copy the folder before changing it.
    """
    path = tmp_path_factory.mktemp("pairs") / "made"
    images = np.random.default_rng(6).integers(0, 256, (46, 112, 112, 3), dtype=np.uint8)
    issame = np.arange(23) % 2 == 0
    images[1::2][issame] = images[0::2][issame]
    write_carray(path, images, issame)
    return path, images, issame


@pytest.fixture
def open_in_chromium(tmp_path: Path) -> Callable[..., str]:
    """Return a function that opens a page in headless Chromium and returns its output. A message of the page fails."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium, absent here")
    unused = ("gpu", "quic", "background-networking", "component-update", "sync")
    quiet = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", *(f"--disable-{it}" for it in unused)]

    def open_page(page: Path, *flags: str) -> str:
        log = ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path}/chromium"]
        command = [program, *quiet, *log, *flags, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
        messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not messages, messages
        return done.stdout

    return open_page
