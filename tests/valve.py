"""A link that can be cut, as a proxy before a leader's endpoint."""

import socket
import threading
from contextlib import suppress


class Valve:
    """Before a leader's endpoint: lets everything through, or nothing, as a cut link does."""

    def __init__(self, port: int) -> None:
        self.open = threading.Event()
        self.open.set()
        self.port = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self.listener.accept()
                threading.Thread(target=self._join, args=(here,), daemon=True).start()

    def _join(self, here: socket.socket) -> None:
        self.open.wait()
        try:
            there = socket.create_connection(("127.0.0.1", self.port))
        except OSError:
            here.close()
            return
        for end in (here, there):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or every small update waits 40 ms for an acknowledgement
        for one, other in ((here, there), (there, here)):
            threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                self.open.wait()
                other.sendall(data)
        for end in (one, other):
            end.close()

    def close(self) -> None:
        self.open.set()
        self.listener.close()
