"""Downloading MVTec AD, from a server of our own: what arrives, and what must not happen."""

import errno
import hashlib
import http.server
import io
import lzma
import pathlib
import re
import sys
import tarfile
import threading

import pytest
import requests

from padim_jax.data import download
from padim_jax.errors import UserError

KEPT = f"{download.FOLDER}/{download.ARCHIVE}"
FILES = {
    "bottle/train/good/000.png": b"a normal bottle",
    "bottle/test/broken/000.png": b"a broken bottle",
    "bottle/ground_truth/broken/000_mask.png": b"where it is broken",
    "cable/train/good/000.png": b"a normal cable",
    "license.txt": b"CC BY-NC-SA 4.0",
}


def member(name, content=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o444
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, content


def folder_member(name):
    # Read-only, as the folders in MVTec's archive are.
    return member(name, type=tarfile.DIRTYPE, mode=0o555)


def archive_of(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:xz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


MVTEC = archive_of(
    *map(folder_member, ("bottle", "bottle/train", "bottle/train/good", "cable")),
    *(member(name, content) for name, content in FILES.items()),
)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` and counts the requests."""

    content = MVTEC
    status = 200
    location = None  # redirects there
    ends_after = None  # bytes of the answer

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = 0
        self.url = f"http://127.0.0.1:{self.server_port}/mvtec.tar.xz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert isinstance(self.server, Server)
        self.server.requests += 1
        location = self.server.location
        answer = self.server.content if self.server.status == 200 else b""
        self.send_response(302 if location else self.server.status)
        self.send_header("Content-Length", str(len(answer)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(answer[: self.server.ends_after])

    def log_message(self, format, *args):  # noqa: A002
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(download, "ARCHIVE_URL", served.url)
        serve(monkeypatch, served, MVTEC)
        yield served
        served.shutdown()
        thread.join()


def serve(monkeypatch, server, content):
    server.content = content
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(content).hexdigest())


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data" / "mvtec_ad"


def tree(folder):
    """Every file and folder below, hidden ones too, with the contents of the files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def files(folder):
    return {name: content for name, content in tree(folder).items() if content is not None}


def refusal(root, category="bottle"):
    with pytest.raises(UserError) as info:
        download.mvtec_ad(root, category)
    return str(info.value)


@pytest.mark.parametrize("is_watched", [True, False])
def test_all_categories_arrive_and_nothing_else_stays(
    server, root, capsys, monkeypatch, is_watched
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_watched)
    download.mvtec_ad(root, "bottle")
    assert files(root.parent) == {f"mvtec_ad/{name}": data for name, data in FILES.items()}
    assert server.requests == 1
    printed = capsys.readouterr()
    assert "CC BY-NC-SA 4.0" in printed.out
    assert ("100%" in printed.err) == is_watched  # the progress bar
    # Whoever downloaded it can delete it again.
    assert all(path.stat().st_mode & 0o200 for path in root.rglob("*"))
    assert not any(path.name.startswith(".") for path in root.iterdir())


def test_existing_category_needs_no_download(server, root, capsys):
    (root / "bottle").mkdir(parents=True)
    download.mvtec_ad(root, "bottle")
    assert server.requests == 0
    assert tree(root) == {"bottle": None}
    assert f"{root / 'bottle'}: exists already" in capsys.readouterr().out


def test_folders_that_are_there_are_neither_replaced_nor_merged(server, root, capsys):
    (root / "cable").mkdir(parents=True)
    (root / "cable" / "mine.txt").write_text("my own")
    (root / "license.txt").mkdir()  # even empty, even of another kind
    download.mvtec_ad(root, "bottle")
    assert tree(root / "cable") == {"mine.txt": b"my own"}
    assert tree(root / "license.txt") == {}
    assert files(root / "bottle").keys() == {
        name.removeprefix("bottle/") for name in FILES if name.startswith("bottle/")
    }
    printed = capsys.readouterr().out
    assert f"{root / 'cable'}: exists already" in printed
    assert f"{root / 'license.txt'}: exists already" in printed


@pytest.mark.parametrize("category", ["botle", ""])
def test_unknown_category_is_no_reason_to_download(server, root, category):
    message = refusal(root, category)
    assert repr(category) in message
    assert "bottle, cable" in message
    assert server.requests == 0
    assert not root.exists()


def test_wrong_hash_leaves_nothing_behind(server, root, monkeypatch):
    root.mkdir(parents=True)
    (root / "mine.txt").write_text("my own")
    monkeypatch.setattr(download, "SHA256", "0" * 64)
    message = refusal(root)
    assert hashlib.sha256(MVTEC).hexdigest() in message
    assert "0" * 64 in message
    assert tree(root.parent) == {"mvtec_ad": None, "mvtec_ad/mine.txt": b"my own"}


def test_failure_tells_where_the_data_is_and_what_goes_where(server, root):
    server.status = 404
    message = refusal(root)
    for part in (
        "404",
        server.url,
        str(root),
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
        str(root / "bottle" / "train" / "good"),
        str(root / "bottle" / "test"),
        str(root / "bottle" / "ground_truth"),
    ):
        assert part in message


def test_offline(server, root, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    monkeypatch.setattr(download, "ARCHIVE_URL", f"http://127.0.0.1:{port}/")
    message = refusal(root)
    assert "refused" in message
    assert "\n" not in message
    assert download.FOLDER not in message  # nothing was kept
    assert tree(root.parent) == {"mvtec_ad": None}


def test_connection_that_ends_is_no_end_of_the_archive(server, root):
    server.ends_after = 100
    assert "100 bytes read" in refusal(root)
    assert tree(root) == {}
    server.ends_after = None
    download.mvtec_ad(root, "bottle")
    assert files(root) == FILES


def test_what_a_killed_download_left_is_replaced(server, root):
    (root / download.FOLDER).mkdir(parents=True)
    (root / download.FOLDER / "tmpabc").write_bytes(MVTEC[:100])
    (root / KEPT).write_bytes(b"?" * len(MVTEC))
    download.mvtec_ad(root, "bottle")
    assert files(root) == FILES


def test_full_disk_while_unpacking_costs_no_second_download(server, root, monkeypatch):
    def fill(_, path, *__, **___):
        # Only within one file system can a folder be moved in one step.
        assert pathlib.Path(path).parent == root / download.FOLDER
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", fill)
        message = refusal(root)
    assert "No space left on device" in message
    assert str(root / KEPT) in message
    assert files(root) == {KEPT: MVTEC}
    download.mvtec_ad(root, "bottle")
    assert server.requests == 1
    assert files(root) == FILES


def test_root_that_cannot_be_written_is_found_before_the_download(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for root in (tmp_path / "file", tmp_path / "file" / "mvtec_ad"):
        assert str(root) in refusal(root)
    assert server.requests == 0
    assert tree(tmp_path) == {"file": b"not a folder"}


OUTSIDE = {
    "up": [member("../evil", b"!")],
    "down and up": [member("bottle/../../../evil", b"!")],
    "absolute": [member("{outside}/evil", b"!")],
    "link up": [
        member("bottle", type=tarfile.SYMTYPE, linkname="../../.."),
        member("bottle/evil"),
    ],
    "link": [
        member("bottle", type=tarfile.SYMTYPE, linkname="{outside}"),
        member("bottle/evil"),
    ],
    "hard link": [member("bottle/evil", type=tarfile.LNKTYPE, linkname="../../../mine.txt")],
    "device": [member("bottle/evil", type=tarfile.FIFOTYPE)],
    # Within; but none is needed, and some versions of Python can be led out by them.
    "link within": [member("bottle/evil", type=tarfile.SYMTYPE, linkname="000.png")],
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_archive_that_leads_out_is_refused(server, root, tmp_path, monkeypatch, kind):
    for info, _ in OUTSIDE[kind]:
        monkeypatch.setattr(info, "name", info.name.format(outside=tmp_path))
        monkeypatch.setattr(info, "linkname", info.linkname.format(outside=tmp_path))
    # What precedes it is innocent: it must not remain either.
    content = archive_of(member("cable/train/good/000.png", b"normal"), *OUTSIDE[kind])
    serve(monkeypatch, server, content)
    (tmp_path / "mine.txt").write_text("my own")
    assert re.search("evil|bottle", refusal(root))
    assert files(tmp_path) == {"mine.txt": b"my own", f"data/mvtec_ad/{KEPT}": content}


def test_archive_that_expands_too_far_is_refused(server, root, monkeypatch):
    monkeypatch.setattr(download, "MOST_UNPACKED", 10_000)
    # 20 kB of zeros are 150 bytes of it, and 100 GB of a sparse file are nothing.
    for content in (
        archive_of(member("bottle/a", 5_000 * b"\0"), member("bottle/b", 20_000 * b"\0")),
        sparse_archive(100 * 10**9),
    ):
        serve(monkeypatch, server, content)
        assert "more than 10000 bytes unpacked" in refusal(root)
        assert files(root) == {KEPT: content}


def sparse_archive(size):
    """A file with a hole, as GNU's tar has it (the older format, all in the header)."""
    header = bytearray(member("bottle/hole", b"")[0].tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:398] = header[398:410] = b"00000000000\0"
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = 8 * b" "
    header[148:156] = b"%06o\0 " % sum(header)
    return lzma.compress(bytes(header) + 1024 * b"\0")


def test_the_archive_comes_over_https():
    assert download.ARCHIVE_URL.startswith("https://")


@pytest.mark.parametrize("target", ["http://127.0.0.1:1/", "ftp://127.0.0.1/", "file:///"])
def test_redirect_to_another_scheme_is_not_followed(server, root, target):
    server.location = target
    assert f"redirects to {target}; expected an https address" in refusal(root)
    assert server.requests == 1
    assert tree(root) == {}


@pytest.mark.parametrize("target", ["/moved", "https://elsewhere.org/moved"])
def test_redirect_within_https_is_followed(target):
    response = requests.Response()
    response.url, response.status_code = "https://mvtec.com/a.tar.xz", 302
    response.headers["Location"] = target
    assert response.is_redirect
    download.require_https_redirect(response)
