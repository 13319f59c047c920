"""A small HTTP server that nobody can block: bounded connections, bodies and times."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
MAX_BODY_BYTES = 4096
SILENCE_S = 10.0  # of a client, while it is read from or written to
CLOSE_S = 0.7
REQUEST_S = 15.0  # for a whole request, however slowly it drips, and between two

_ON_EVERY_ANSWER = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asks for.

    Attributes:
        method: "GET" or "POST".
        path: Without the query, not decoded.
        query: The last value of each name.
        address: Of the client.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    body: bytes
    address: str


@dataclass(kw_only=True)
class Answer:
    """What it gets."""

    status: HTTPStatus = HTTPStatus.OK
    kind: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def text(cls, status: HTTPStatus, text: str) -> Answer:
        return cls(status=status, kind="text/plain; charset=utf-8", body=text.encode())

    @classmethod
    def json(cls, data: Any) -> Answer:
        """`data` without NaN and infinity."""
        return cls(kind="application/json", body=json.dumps(data, allow_nan=False).encode())


class Server:
    """Has its port from the moment it is made and answers from `start` on, each connection in a thread.

    Attributes:
        port: It listens on this one.
    """

    def __init__(self, host: str, port: int) -> None:
        """
        Raises:
            OSError: The address cannot be had.
        """
        self._server = _Server((host, port), _Handler)
        self.port: int = self._server.server_address[1]
        self._thread: threading.Thread | None = None

    def start(self, answer: Callable[[Request], Answer]) -> None:
        """`answer` is called by many threads."""
        self._server.answer = answer
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="edgead status", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Ends within a second; may be repeated."""
        if self._thread is not None and self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        # A thread that is inside of OpenCV when the interpreter ends would abort the process.
        self._server.wait_until_idle(CLOSE_S)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    answer: Callable[[Request], Answer]

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Condition()
        self._since_s: dict[socket.socket, float] = {}  # open connections: waiting for a request since
        super().__init__(address, handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would ask the name server, which may take long
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            self.waits(request)
            super().process_request(request, client_address)
        else:
            request.settimeout(0.1)  # this is the thread that accepts
            try:
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            except OSError:
                pass
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._since_s.pop(request, None)
                self._lock.notify_all()
            self._free.release()

    def waits(self, connection: socket.socket) -> None:
        """A request is to be read from it."""
        with self._lock:
            self._since_s[connection] = time.monotonic()

    def has_read(self, connection: socket.socket) -> None:
        """It is being answered."""
        with self._lock:
            self._since_s[connection] = float("inf")

    def service_actions(self) -> None:
        self.hang_up(older_than_s=REQUEST_S)

    def hang_up(self, older_than_s: float | None = None) -> None:
        """Ends connections that have waited for a request for longer than this; None: all."""
        now_s = time.monotonic()
        with self._lock:
            for connection, since_s in self._since_s.items():
                if older_than_s is None or now_s - since_s > older_than_s:
                    try:
                        connection.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass  # it has just ended by itself

    def wait_until_idle(self, timeout_s: float) -> None:
        """Waits for the connections to end."""
        with self._lock:
            self._lock.wait_for(lambda: not self._since_s, timeout_s)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            logger.debug("%s hung up", client_address)
        else:
            logger.exception("request of %s", client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SILENCE_S
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edgead", ""
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for head and body

    def handle_one_request(self) -> None:
        self.server.waits(self.connection)
        super().handle_one_request()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self._read_body()
        self.server.has_read(self.connection)
        if isinstance(body, HTTPStatus):
            self._refuse(body)
            return
        try:
            parts = urlsplit(self.path)
            query = dict(parse_qsl(parts.query, keep_blank_values=True, max_num_fields=10))
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        request = Request(
            method=self.command,
            path=parts.path,
            query=query,
            headers=self.headers,
            body=body,
            address=self.client_address[0],
        )
        try:
            answer = self.server.answer(request)
        except Exception:
            logger.exception("%s %s", self.command, parts.path)
            answer = Answer.text(HTTPStatus.INTERNAL_SERVER_ERROR, "an error, see the log of the line")
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def _read_body(self) -> bytes | HTTPStatus:
        lengths = self.headers.get_all("Content-Length", [])
        if self.headers.get("Transfer-Encoding") is not None:
            return HTTPStatus.LENGTH_REQUIRED
        if not lengths and self.command == "GET":
            return b""
        if len(lengths) != 1:
            return HTTPStatus.LENGTH_REQUIRED
        length = lengths[0]
        if not (length.isascii() and length.isdecimal()):
            return HTTPStatus.BAD_REQUEST
        if len(length) > 9 or int(length) > MAX_BODY_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        body = self.rfile.read(int(length))
        return body if len(body) == int(length) else HTTPStatus.BAD_REQUEST

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # the rest of the request was not read
        self.send_error(status)

    def end_headers(self) -> None:
        for name, value in _ON_EVERY_ANSWER.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s " + format, self.client_address[0], *args)
