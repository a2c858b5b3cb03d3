"""A mirror on the loopback interface, which notes what it was asked for and fails on request."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "no_proxy")


class Mirror(NamedTuple):
    """What is served, by path; a test changes it between two loads.

    Attributes:
      url: of the root, with a slash at its end.
      files: path below the root to content.
      cut: paths of which the second half is not sent, though announced.
      requests: paths asked for, in order.
      encodings: the Accept-Encoding of each of them.
    """

    url: str
    files: dict[str, bytes]
    cut: set[str]
    requests: list[str]
    encodings: list[str]

    def base(self, folder: str) -> str:
        return f"{self.url}{folder}/"

    def put(self, folder: str, files: dict[str, bytes]) -> str:
        """Serve these files in a folder; returns its address."""
        self.files.update({f"{folder}/{name}": data for name, data in files.items()})
        return self.base(folder)


@contextmanager
def serve() -> Iterator[Mirror]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.removeprefix("/")
            mirror.requests.append(path)
            mirror.encodings.append(self.headers.get("Accept-Encoding", ""))
            data = mirror.files.get(path)
            if data is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if path in mirror.cut else data)

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        mirror = Mirror(f"http://127.0.0.1:{server.server_port}/", {}, set(), [], [])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield mirror
        finally:
            server.shutdown()
            thread.join()


def closed_address() -> str:
    """An address on which nothing listens, so that a connection is refused at once."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/"


def use_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback addresses are reached directly, whatever proxies the environment names."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def files_below(folder: Path) -> list[str]:
    """Paths of all files, temporary ones too."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
