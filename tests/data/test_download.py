"""Downloading MVTec AD, from a server of our own: what arrives, and what must not happen."""

import errno
import hashlib
import http.server
import io
import lzma
import pathlib
import re
import tarfile
import threading

import pytest

from padim_jax.data import download
from padim_jax.errors import UserError

PART = "mvtec_anomaly_detection.tar.xz.padim_jax.part"
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
    """Serves `content`; every request's Range header is kept in `requests`."""

    content = MVTEC
    status = 200
    location = None  # redirects there
    knows_ranges = True
    ends_after = None  # bytes of the answer

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}/mvtec.tar.xz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert isinstance(self.server, Server)
        asked = self.headers["Range"]
        self.server.requests.append(asked)
        start, status = 0, self.server.status
        location = self.server.location
        if location and location != self.path:
            status = 302
        elif asked and self.server.knows_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(self.server.content) else 416
        answer = self.server.content[start:] if status in (200, 206) else b""
        self.send_response(status)
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
        # The made server has no certificate; whatever the scheme is, it is the only one.
        monkeypatch.setattr(download, "SCHEME", "http")
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


def test_all_categories_arrive_and_nothing_else_stays(server, root, capsys):
    download.mvtec_ad(root, "bottle")
    assert files(root.parent) == {f"mvtec_ad/{name}": data for name, data in FILES.items()}
    assert server.requests == [None]
    printed = capsys.readouterr()
    assert "CC BY-NC-SA 4.0" in printed.out
    assert printed.err == ""  # no progress bar where nobody watches
    # Whoever downloaded it can delete it again.
    assert all(path.stat().st_mode & 0o200 for path in root.rglob("*"))
    assert not any(path.name.startswith(".") for path in root.iterdir())


def test_existing_category_needs_no_download(server, root, capsys):
    (root / "bottle").mkdir(parents=True)
    download.mvtec_ad(root, "bottle")
    assert server.requests == []
    assert tree(root) == {"bottle": None}
    assert f"{root / 'bottle'}: is there already" in capsys.readouterr().out


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
    assert f"{root / 'cable'}: is there already" in printed
    assert f"{root / 'license.txt'}: is there already" in printed


@pytest.mark.parametrize("category", ["botle", ""])
def test_unknown_category_is_no_reason_to_download(server, root, category):
    message = refusal(root, category)
    assert repr(category) in message
    assert "bottle, cable" in message
    assert server.requests == []
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
    assert PART not in message  # nothing has come that could be gone on from
    assert tree(root.parent) == {"mvtec_ad": None}


def test_connection_that_ends_is_no_end_of_the_archive(server, root):
    server.ends_after = 100
    message = refusal(root)
    assert f"100 of {len(MVTEC)} bytes" in message
    assert str(root.parent / PART) in message
    assert tree(root) == {}
    assert (root.parent / PART).read_bytes() == MVTEC[:100]


def test_interrupted_download_goes_on(server, root):
    for size in (100, 50):
        server.ends_after = size
        refusal(root)
    server.ends_after = None
    download.mvtec_ad(root, "bottle")
    assert server.requests == [None, "bytes=100-", "bytes=150-"]
    assert files(root) == FILES
    assert not (root.parent / PART).exists()


def test_redirects_are_followed_and_go_on_too(server, root):
    server.location = "/moved.tar.xz"
    root.mkdir(parents=True)
    (root.parent / PART).write_bytes(MVTEC[:100])
    download.mvtec_ad(root, "bottle")
    assert server.requests == ["bytes=100-"] * 2
    assert files(root) == FILES


def test_server_without_ranges_starts_anew(server, root):
    server.knows_ranges = False
    server.ends_after = 100
    refusal(root)
    server.ends_after = None
    download.mvtec_ad(root, "bottle")
    assert server.requests == [None, "bytes=100-"]
    assert files(root) == FILES


def test_beginning_of_something_else_is_found_out_and_left(server, root):
    root.mkdir(parents=True)
    (root.parent / PART).write_bytes(b"?" * 100)
    assert "SHA-256" in refusal(root)
    assert tree(root) == {}
    download.mvtec_ad(root, "bottle")
    assert server.requests == ["bytes=100-", None]
    assert files(root) == FILES


@pytest.mark.parametrize("surplus", [0, 1])
def test_part_with_nothing_to_add_but_wrong_starts_anew(server, root, surplus):
    root.mkdir(parents=True)
    (root.parent / PART).write_bytes(b"?" * (len(MVTEC) + surplus))
    download.mvtec_ad(root, "bottle")
    assert server.requests[1:] == [None]
    assert files(root) == FILES


def test_full_disk_while_unpacking_costs_no_second_download(server, root, monkeypatch):
    def fill(_, path, *__, **___):
        # Only within one file system can a folder be moved in one step.
        assert pathlib.Path(path).parent == root
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", fill)
        assert "No space left on device" in refusal(root)
    assert tree(root) == {}
    download.mvtec_ad(root, "bottle")
    assert server.requests == [None]
    assert files(root) == FILES


def test_root_that_cannot_be_written_is_found_before_the_download(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for root in (tmp_path / "file", tmp_path / "file" / "mvtec_ad"):
        assert str(root) in refusal(root)
    assert server.requests == []
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
    assert files(tmp_path) == {"mine.txt": b"my own", f"data/{PART}": content}
    assert tree(root) == {}


@pytest.mark.parametrize("stated", [True, False])
def test_archive_that_is_too_large_is_no_more_downloaded_than_that(
    server, root, monkeypatch, stated
):
    monkeypatch.setattr(download, "MOST_BYTES", 100)
    if not stated:
        monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "send_header", lambda *_: None)
    assert "at most 100" in refusal(root)
    assert tree(root.parent) == {"mvtec_ad": None}


def test_archive_that_expands_too_far_is_refused(server, root, monkeypatch):
    monkeypatch.setattr(download, "MOST_UNPACKED", 10_000)
    # 20 kB of zeros are 150 bytes of it, and 100 GB of a sparse file are nothing.
    for content in (
        archive_of(member("bottle/a", 5_000 * b"\0"), member("bottle/b", 20_000 * b"\0")),
        sparse_archive(100 * 10**9),
    ):
        serve(monkeypatch, server, content)
        assert "more than 10000 bytes unpacked" in refusal(root)
        assert tree(root) == {}


def sparse_archive(size):
    """A file with a hole, as GNU's tar has it (the older format, all in the header)."""
    header = bytearray(member("bottle/hole", b"")[0].tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:398] = header[398:410] = b"00000000000\0"
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = 8 * b" "
    header[148:156] = b"%06o\0 " % sum(header)
    return lzma.compress(bytes(header) + 1024 * b"\0")


def test_download_of_somebody_else_is_left(server, root, monkeypatch):
    root.mkdir(parents=True)
    theirs = root.parent / "mvtec_anomaly_detection.tar.xz.part"
    theirs.write_bytes(b"half of it, by a browser")
    monkeypatch.setattr(download, "SHA256", "0" * 64)
    refusal(root)
    assert theirs.read_bytes() == b"half of it, by a browser"


def test_only_https_is_asked(server, root, monkeypatch):
    monkeypatch.undo()  # the scheme as it is outside the tests
    monkeypatch.setattr(download, "ARCHIVE_URL", server.url)
    assert "no https address" in refusal(root)
    assert server.requests == []


@pytest.mark.parametrize("location", ["https://127.0.0.1:1/", "ftp://127.0.0.1/", "file:///"])
def test_redirect_to_another_scheme_is_not_followed(server, root, location):
    server.location = location
    assert location in refusal(root)
    assert tree(root) == {}
