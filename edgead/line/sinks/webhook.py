"""Webhook: each record as an HTTP POST with a body of JSON.

The header Idempotency-Key holds the part id, with "-late" behind it for a result that came too late,
which also has `"late": true` in its body. By it a receiver can tell a record that is sent again because
the answer to it was lost. An answer 2xx means that the record was taken, 4xx (but 408 and 429) that it
will never be: it is counted and left. After anything else it is sent again, and later records wait.
"""

from __future__ import annotations

import logging
import os
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgead.errors import LineError
from edgead.line.interfaces import Controls, Picture
from edgead.line.sinks.payload import encode
from edgead.line.verdicts import Record

logger = logging.getLogger(__name__)

_REPEATED = (408, 429)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Posts each record to a web address, http or https.

    Attributes:
        url: Where to.
        timeout_s: For the connection and for each part of the answer; less than `stall_s` of the line.
        token_env: Environment variable that holds a bearer token.
        ca_file: Certificate of the authority that signed the server's, if the system does not know it.
    """

    url: str
    timeout_s: float = 5.0
    token_env: str = ""
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_good = False
        if not is_good or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise LineError(f"url is {self.url!r}, expected http://... or https://... in ASCII")
        if "@" in parts.netloc:
            raise LineError("url holds a password: give a token by token_env instead")
        if not 0.1 <= self.timeout_s <= 600:
            raise LineError(f"timeout_s is {self.timeout_s:g}, expected 0.1 to 600")
        if self.ca_file is not None and parts.scheme != "https":
            raise LineError("ca_file is for a url with https")


def open_sink(config: Config, *, controls: Controls) -> Webhook:
    """Makes ready to post; sends nothing yet.

    Raises:
        LineError: The token or the certificate cannot be read.
    """
    return Webhook(config)


class Webhook:
    """Implements `edgead.line.interfaces.Sink`."""

    wants_pictures = False

    def __init__(self, config: Config) -> None:
        self._config = config
        self._rejected = 0
        self._last_rejection = 0  # status that was logged
        self._headers = {"Content-Type": "application/json", "User-Agent": "edgead"}
        if config.token_env:
            self._headers["Authorization"] = f"Bearer {_token(config)}"
        try:
            context = ssl.create_default_context(cafile=config.ca_file)
        except OSError as error:
            raise LineError(f"ca_file {config.ca_file}: cannot be used: {error}") from error
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=context), _NoRedirect()
        )

    def write(self, record: Record, picture: Picture | None) -> None:
        """Posts the record."""
        self._post(encode(record), str(record.part_id))

    def write_late(self, record: Record) -> None:
        """Posts what the model said too late."""
        self._post(encode(record, is_late=True), f"{record.part_id}-late")

    def knows(self, part_id: int) -> bool:
        """Always: the sink keeps nothing."""
        return True

    def counters(self) -> dict[str, int]:
        """rejected: records that the server refused for good."""
        return {"rejected": self._rejected}

    def close(self) -> None:
        """There is nothing to close."""

    def _post(self, body: bytes, key: str) -> None:
        url = self._config.url
        headers = {**self._headers, "Idempotency-Key": key}
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._config.timeout_s):
                self._last_rejection = 0
        except urllib.error.HTTPError as error:
            with error:
                self._judge(error, key)
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise LineError(f"{url}: {reason!s:.300}") from error

    def _judge(self, error: urllib.error.HTTPError, key: str) -> None:
        url, status = self._config.url, error.code
        if 300 <= status < 400:
            raise LineError(
                f"{url}: answers that it is at {error.headers.get('Location')}: give that as url"
            )
        if not 400 <= status < 500 or status in _REPEATED:
            raise LineError(f"{url}: answers {status} {error.reason}")
        self._rejected += 1
        if status != self._last_rejection:
            logger.error("%s: refuses record %s: %d %s", url, key, status, error.reason)
        self._last_rejection = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET without a body: the record would be lost."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _token(config: Config) -> str:
    token = os.environ.get(config.token_env, "").strip()
    if not token:
        raise LineError(f"token_env names the variable {config.token_env}, which is not set")
    if not token.isascii() or not token.isprintable():
        raise LineError(f"token_env: the variable {config.token_env} holds what is no token")
    return token
