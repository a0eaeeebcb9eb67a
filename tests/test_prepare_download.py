"""Download LFW from a server in this process, complete and checked, or fail in one line."""

import contextlib
import hashlib
import io
import shutil
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from applications.prepare import download, lfw
from applications.prepare.download import Remote, fetch, unpack
from util.errors import DataError, RunError


class Server:
    """A server. `files`: {path: content, or a list with the answer to each request: content, a status, or a part}."""

    def __init__(self):
        self.files: dict[str, object] = {}
        self.requests: list[str] = []
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(handler.path)
        answer = self.files.get(handler.path, 404)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, int):
            handler.send_error(answer)
            return
        content, sent = answer if isinstance(answer, tuple) else (answer, len(answer))
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:sent])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    served.url = f"http://127.0.0.1:{http.server_port}"
    yield served
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def remote(server: Server) -> Callable[..., Remote]:
    """Return remote(b"content"), which puts a file with that content on the server."""

    def make(content: bytes, name: str = "file.bin") -> Remote:
        server.files[f"/{name}"] = content
        return Remote(name, f"{server.url}/{name}", hashlib.sha256(content).hexdigest())

    return make


def test_fetch_downloads_once(server, remote, tmp_path):
    file = remote(b"12345" * 1000)
    for _ in range(2):
        assert fetch(file, tmp_path / "raw").read_bytes() == b"12345" * 1000
    assert server.requests == ["/file.bin"]


def test_fetch_replaces_damaged_file_and_leftovers(server, remote, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"123")
    (tmp_path / "file.bin.0a1b.partial").write_bytes(b"1")
    assert fetch(remote(b"whole"), tmp_path).read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_fetch_wrong_checksum_is_an_error_after_three_tries(server, remote, tmp_path, capsys):
    file = remote(b"right")
    server.files["/file.bin"] = b"wrong"
    with pytest.raises(RunError, match=rf"{file.url}: cannot be downloaded \(invalid hash .*{file.sha256}.*--source"):
        fetch(file, tmp_path)
    assert server.requests == ["/file.bin"] * 3 and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.count("trying again") == 2


def test_fetch_retries_interrupted_download(server, remote, tmp_path):
    file = remote(b"whole content")
    server.files["/file.bin"] = [503, (b"whole content", 5), b"whole content"]
    assert fetch(file, tmp_path).read_bytes() == b"whole content"


def test_fetch_missing_file_is_not_retried(server, tmp_path):
    with pytest.raises(RunError, match=r"HTTP Error 404.*put gone\.bin \(SHA-256 00\) into"):
        fetch(Remote("gone.bin", f"{server.url}/gone.bin", "00"), tmp_path)
    assert len(server.requests) == 1


def test_fetch_without_network_is_one_line(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(RunError, match=r"cannot be downloaded .*refused"):
        fetch(Remote("a", f"http://127.0.0.1:{port}/a", "00"), tmp_path)


# --- Archives.


def archive(path: Path, members: dict[str, bytes | str | int]) -> Path:
    """Write a .tgz with files, with links for values that are strings, and with declared sizes for integers."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            elif isinstance(content, int):
                member.size = content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_unpack_unpacks_once(tmp_path):
    file = archive(tmp_path / "lfw.tgz", {"lfw/A/A_0001.jpg": b"1", "lfw/B/B_0001.jpg": b"2"})
    assert unpack(file, "lfw", tmp_path) == tmp_path / "lfw"
    assert (tmp_path / "lfw/A/A_0001.jpg").read_bytes() == b"1"
    file.unlink()
    assert unpack(file, "lfw", tmp_path) == tmp_path / "lfw"


@pytest.mark.parametrize(
    "members",
    [
        {"lfw/a": b"1", "../outside": b"2"},
        {"lfw/a": b"1", "lfw/link": "/etc", "lfw/link/outside": b"2"},
        {"lfw/a": b"1", "lfw/link": "../../outside"},
        {"lfw/a": b"1", "lfw/link": "../sibling", "sibling": b"2"},
        {"/outside": b"2"},
        {"lfw/a": b"1", "lfw": "."},
        {"other/a": b"1"},
        {},
    ],
)
def test_unpack_refuses_files_outside_its_folder(tmp_path, members):
    folder = tmp_path / "raw"
    folder.mkdir()
    with pytest.raises(DataError, match=r"lfw\.tgz: cannot be unpacked into .* Remove it and run the same command"):
        unpack(archive(folder / "lfw.tgz", members), "lfw", folder)
    assert [path.name for path in folder.iterdir()] == ["lfw.tgz"]
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_unpack_truncated_archive_is_an_error(tmp_path):
    file = archive(tmp_path / "lfw.tgz", {f"lfw/{i}": bytes(range(256)) * i for i in range(50)})
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(file, "lfw", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lfw.tgz"]


def test_unpack_damaged_archive_is_an_error(tmp_path):
    whole = archive(tmp_path / "lfw.tgz", {f"lfw/{i}": bytes(range(256)) * i for i in range(50)}).read_bytes()
    for position in range(0, len(whole) - 8, len(whole) // 40):
        spoilt = bytearray(whole)
        spoilt[position] ^= 0xFF
        (tmp_path / "lfw.tgz").write_bytes(spoilt)
        with contextlib.suppress(DataError):  # a name or a date in the header may be anything
            shutil.rmtree(unpack(tmp_path / "lfw.tgz", "lfw", tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["lfw.tgz"]


@pytest.mark.parametrize("error", [KeyError("linkname 'a' not found"), ValueError("negative size"), MemoryError()])
def test_unpack_errors_of_any_type_are_one_line(tmp_path, monkeypatch, error):
    def extract(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(tarfile.TarFile, "extract", extract)
    with pytest.raises(DataError, match=r"lfw\.tgz: cannot be unpacked into .* Remove it"):
        unpack(archive(tmp_path / "lfw.tgz", {"lfw/a": b"1"}), "lfw", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lfw.tgz"]


@pytest.mark.parametrize("sizes", [[2**31 + 1], [2**43], [0] * 30])
def test_unpack_refuses_declared_sizes_at_once(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(download, "MAX_FILES", 20)
    file = archive(tmp_path / "lfw.tgz", {f"lfw/{number}": size for number, size in enumerate(sizes)})
    with pytest.raises(DataError, match=r"lfw\.tgz: .*declares more than 2147483648 bytes or 20 files"):
        unpack(file, "lfw", tmp_path)


def test_lfw_download_and_unpack(server, remote, tmp_path, monkeypatch):
    packed = archive(tmp_path / "packed", {"lfw/A/A_0001.jpg": b"1"}).read_bytes()
    monkeypatch.setattr(lfw, "ARCHIVE", remote(packed, "lfw.tgz"))
    monkeypatch.setattr(lfw, "PAIRS", remote(b"A\t1\t1\n", "pairs.txt"))
    for _ in range(2):
        source = lfw.download(tmp_path / "raw")
        assert lfw.find_list(source).read_bytes() == b"A\t1\t1\n" and (source / "lfw/A/A_0001.jpg").is_file()
    assert sorted(server.requests) == ["/lfw.tgz", "/pairs.txt"]
