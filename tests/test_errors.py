import os
import signal
import sys
from pathlib import Path

import pytest

from util.errors import DataError, RunError, UsageError, run_script
from util.files import atomic_write, path_inside


@pytest.fixture(autouse=True)
def restored_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ending(monkeypatch, error: BaseException | None, *arguments: str) -> int:
    """The exit code of a script whose main raises `error`."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])

    def main(given: list[str]) -> None:
        assert given == list(arguments)
        if error is not None:
            raise error

    try:
        run_script(main)
    except SystemExit as end:
        return 0 if end.code is None else end.code
    return 0


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--lr=x: not a number; give one"), 2, "error: --lr=x: not a number; give one\n"),
        (DataError("a.jpg: broken\n  remove it"), 3, "error: a.jpg: broken remove it\n"),
        (RunError("the loss became nan"), 1, "error: the loss became nan\n"),
        (KeyError("x"), 1, "error: KeyError: 'x' (run again with --debug for the traceback)\n"),
        (ValueError("a\nb"), 1, "error: ValueError: a b (run again with --debug for the traceback)\n"),
        (None, 0, ""),
    ],
)
def test_every_failure_ends_in_one_line_and_its_code(monkeypatch, capsys, error, code, line):
    assert ending(monkeypatch, error, "--lr", "x") == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", line)


def test_a_traceback_comes_with_debug_only(monkeypatch):
    with pytest.raises(DataError, match="broken"):
        ending(monkeypatch, DataError("broken"), "--debug")


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    assert ending(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_sigterm_ends_with_143_after_cleaning_up(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def main(arguments: list[str]) -> None:
        with atomic_write(tmp_path / "file.txt") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(RunError("lost"), 1), (KeyboardInterrupt(), 130)])
def test_sigterm_does_not_come_between_a_failure_and_its_line(monkeypatch, capsys, error, code):
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def main(arguments: list[str]) -> None:
        raise error

    def say(line: str) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with pytest.raises(SystemExit) as end:
        run_script(main, say)
    assert end.value.code == code
    assert capsys.readouterr().err == ("error: lost\n" if code == 1 else "\nInterrupted.\n")


def test_an_exit_of_the_command_lines_parser_is_kept(monkeypatch):
    assert ending(monkeypatch, SystemExit(2)) == 2


def test_users_mistakes_are_value_errors():
    assert issubclass(UsageError, ValueError) and issubclass(DataError, ValueError)


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert (partial.parent, partial.suffix) == (tmp_path, ".json")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_fails_midway_leaves_the_old_one(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), atomic_write(path) as partial:
        partial.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_path_inside_takes_names_that_stay_in_the_folder(tmp_path):
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "within").symlink_to(tmp_path / "real" / "inner")
    for name in ("1.png", "a/b/1.png", "a/../b/1.png", "..1.png", "...", "within/1.png", "한 글.png", "\udcff.png"):
        assert path_inside(tmp_path / "link", name) == tmp_path / "link" / os.path.normpath(name)
    assert path_inside(Path(), "a.png") == Path("a.png")


@pytest.mark.parametrize("name", ["..", "../1.png", "a/../../1.png", "/etc/1.png", "//1.png", "out/1.png", "file.png"])
def test_path_inside_refuses_names_that_lead_out(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "file.png").symlink_to(tmp_path / "photo.png")
    with pytest.raises(
        DataError, match=f"^pairs.txt: {os.path.normpath(name)}: would be written into {folder}, but"
    ) as raised:
        path_inside(folder, name, named_in="pairs.txt")
    assert "\n" not in str(raised.value)


def test_path_inside_ends_on_links_in_a_circle(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    path_inside(tmp_path, "circle/1.png")  # writing fails later, and nothing is outside
