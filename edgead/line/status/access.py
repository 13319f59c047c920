"""Who may read the status page and who may change the line through it.

A token opens the page where it is asked for (always beyond this machine), a password allows a change.
Neither is ever sent back. The page speaks HTTP: put a TLS proxy in front where others share the network.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import threading
import time
from collections import OrderedDict
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from edgead.line.status.server import Answer, Request

HEADER = "X-EdgeAD"  # that other sites cannot add without being asked first (CORS)

_FREE_ATTEMPTS = 5
_PAUSE_S = 60.0
_MAX_ADDRESSES = 1000


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Attempts:
    """Wrong tokens and passwords by address: after five, it has to wait a minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()  # count, time of the last

    def must_wait(self, address: str) -> bool:
        with self._lock:
            count, last_s = self._wrong.get(address, (0, 0.0))
            if count >= _FREE_ATTEMPTS and time.monotonic() - last_s >= _PAUSE_S:
                del self._wrong[address]
                return False
            return count >= _FREE_ATTEMPTS

    def add(self, address: str) -> None:
        with self._lock:
            count, _ = self._wrong.pop(address, (0, 0.0))
            self._wrong[address] = count + 1, time.monotonic()
            while len(self._wrong) > _MAX_ADDRESSES:
                self._wrong.popitem(last=False)

    def clear(self, address: str) -> None:
        with self._lock:
            self._wrong.pop(address, None)


class Access:
    """Decides about requests.

    Attributes:
        can_change: Whether there is a password.
        cookie: Name of the cookie that stands for the token.
    """

    def __init__(self, host: str, port: int, *, token: str | None, password: str | None) -> None:
        self.can_change = password is not None
        self.cookie = f"edgead-{port}"
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}
        self._token, self._password = token, password
        self._key = secrets.token_bytes(32)
        self._attempts = Attempts()

    def check_host(self, request: Request) -> Answer | None:
        """Refuses names that are not this machine's: with such a one, any site that a browser has open
        could pose as this one (DNS rebinding). Addresses are no names."""
        name = _host_name(request.headers.get("Host", ""))
        if name in self._names or _is_address(name):
            return None
        return Answer.text(
            HTTPStatus.MISDIRECTED_REQUEST,
            "this server does not go by that name: use its address or host name",
        )

    def check_token(self, request: Request) -> Answer | None:
        """Refuses who has not shown the token, in a cookie of `log_in` or as "Authorization: Bearer"."""
        if self._token is None:
            return None
        try:
            morsel = SimpleCookie(request.headers.get("Cookie", "")).get(self.cookie)
        except CookieError:
            morsel = None
        if morsel is not None and _equal(morsel.value, self._cookie_value()):
            return None
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme == "Bearer":
            return self._check_secret(request, given.strip(), self._token, "token")
        return Answer.text(HTTPStatus.UNAUTHORIZED, "the token is missing")

    def log_in(self, request: Request, given: object) -> Answer:
        """Gives the cookie for the token."""
        if self._token is not None:
            refusal = self._check_secret(request, given, self._token, "token")
            if refusal is not None:
                return refusal
        answer = Answer.json({})
        value = f"{self.cookie}={self._cookie_value()}; Path=/; HttpOnly; SameSite=Strict"
        answer.headers["Set-Cookie"] = value
        return answer

    def check_origin(self, request: Request) -> Answer | None:
        """Refuses what another site makes a browser send (CSRF)."""
        origin = request.headers.get("Origin")
        is_same = origin is None or urlsplit(origin).netloc == request.headers.get("Host", "")
        is_same &= request.headers.get("Sec-Fetch-Site", "same-origin") == "same-origin"
        if is_same and request.headers.get(HEADER) is not None:
            return None
        return Answer.text(HTTPStatus.FORBIDDEN, f"not from this page, or without the header {HEADER}")

    def check_password(self, request: Request, given: object) -> Answer | None:
        """Refuses changes without the password."""
        if self._password is None:
            return Answer.text(HTTPStatus.FORBIDDEN, "this page is read-only: no password is set")
        return self._check_secret(request, given, self._password, "password")

    def _check_secret(self, request: Request, given: object, secret: str, what: str) -> Answer | None:
        if self._attempts.must_wait(request.address):
            answer = Answer.text(
                HTTPStatus.TOO_MANY_REQUESTS, f"wrong {what} too often: wait a minute, then try again"
            )
            answer.headers["Retry-After"] = str(round(_PAUSE_S))
            return answer
        if isinstance(given, str) and _equal(given, secret):
            self._attempts.clear(request.address)
            return None
        self._attempts.add(request.address)
        return Answer.text(
            HTTPStatus.UNAUTHORIZED if what == "token" else HTTPStatus.FORBIDDEN, f"wrong {what}"
        )

    def _cookie_value(self) -> str:
        return hmac.new(self._key, (self._token or "").encode(), hashlib.sha256).hexdigest()


def _equal(given: str, secret: str) -> bool:
    """In a time that depends on neither; also of the length nothing is learnt."""
    digests = (
        hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (given, secret)
    )
    return hmac.compare_digest(*digests)


def _host_name(host: str) -> str:
    """Host header without the port; empty if it makes no sense."""
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "") if parts.netloc == host and "@" not in host else ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
