"""A real HTTP S3 server for tests: moto, in a process of its own."""

import http.client
import http.server
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import s3fs

BUCKET = "geotrain-tests"


def free_port() -> int:
    """One that no client is given meanwhile: below those that the kernel hands out."""
    for port in random.SystemRandom().sample(range(15_000, 30_000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@contextmanager
def moto() -> Iterator[str]:
    """The endpoint's URL. Credentials and endpoint are in the environment, as on a user's workers."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        with environment(AWS_ENDPOINT_URL_S3=url, **keys):
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None, "moto's server ended"
                    time.sleep(0.1)
            yield url
    finally:
        process.terminate()
        process.wait()


@contextmanager
def environment(**settings: str) -> Iterator[None]:
    """With these variables, until it ends."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    with moto() as url:
        yield url


@pytest.fixture(scope="session")
def bucket(s3_server: str) -> str:
    fs = s3fs.S3FileSystem()
    fs.mkdir(BUCKET)
    return BUCKET


class Flaky:
    """A proxy before the S3 server that fails on purpose: every n-th request is answered `503 SlowDown`, `500`, or late."""

    def __init__(self, url: str) -> None:
        self.target = url.removeprefix("http://")
        self.slow_down = self.broken = self.late = 0
        self.down = False
        """Every request is answered `500`."""
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        flaky = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, content, headers = flaky.answer(self.command, self.path, dict(self.headers), body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)) if self.command != "HEAD" else headers.get("x-length", "0"))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do  # noqa: N815

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        with self._lock:
            self.requests[method] += 1
            number = self.requests.total()
        if self.slow_down and number % self.slow_down == 0:
            return 503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>", {}
        if self.down or (self.broken and number % self.broken == 0):
            return 500, b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>", {}
        if self.late and number % self.late == 0:
            time.sleep(1.0)
        connection = http.client.HTTPConnection(self.target, timeout=30)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        kept = {
            k: v
            for k, v in response.getheaders()
            if k.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date")
        }
        if method == "HEAD":
            kept["x-length"] = response.getheader("Content-Length", "0") or "0"
        connection.close()
        return response.status, content, kept

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@contextmanager
def failing(url: str) -> Iterator[Flaky]:
    """The S3 server of the environment, through a proxy that can be told to fail."""
    proxy = Flaky(url)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with environment(AWS_ENDPOINT_URL_S3=proxy.url):
            yield proxy
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.close()


@pytest.fixture
def flaky(s3_server: str, bucket: str) -> Iterator[Flaky]:
    with failing(s3_server) as proxy:
        yield proxy
