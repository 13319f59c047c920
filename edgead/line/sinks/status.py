"""The status page as a sink: shows the pictures of the parts, and what the line knows of itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from edgead.errors import LineError
from edgead.line.interfaces import Controls, Picture
from edgead.line.status.access import Access, is_loopback
from edgead.line.status.pictures import Pictures
from edgead.line.status.server import Server
from edgead.line.status.site import Site
from edgead.line.verdicts import Record

logger = logging.getLogger(__name__)

MIN_TOKEN_CHARS = 16
MIN_PASSWORD_CHARS = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """Serves the status page to browsers.

    Attributes:
        host: Address to listen on. Anything but this machine's own (127.0.0.1, ::1, localhost) needs a
            token.
        port: Port to listen on; 0 takes a free one.
        token: What a browser has to show before it sees anything, 16 characters or more. Better in the
            environment than in this file.
        token_env: Environment variable that holds the token, if it is not here.
        password_env: Environment variable that holds the password for changes (threshold, recipe), 8
            characters or more. Without it the page is read-only.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = None
    token_env: str = "EDGEAD_STATUS_TOKEN"
    password_env: str = "EDGEAD_STATUS_PASSWORD"

    def __post_init__(self) -> None:
        if not self.host:
            raise LineError('host is empty, expected an address such as "127.0.0.1"')
        if not 0 <= self.port <= 65535:
            raise LineError(f"port is {self.port}, expected 0 to 65535")
        if self.token is not None and len(self.token) < MIN_TOKEN_CHARS:
            raise LineError(
                f"token has {len(self.token)} characters, expected {MIN_TOKEN_CHARS} or more"
            )


def open_sink(config: Config, *, controls: Controls) -> StatusPage:
    """Starts the server.

    Raises:
        LineError: The port is taken, or other machines could see the page without a token.
    """
    token = config.token or _secret(config.token_env, MIN_TOKEN_CHARS)
    if token is None and not is_loopback(config.host):
        raise LineError(
            f"host is {config.host}, which other machines reach, and there is no token: set the"
            f" environment variable {config.token_env} to {MIN_TOKEN_CHARS} characters or more, or"
            ' write host = "127.0.0.1"'
        )
    password = _secret(config.password_env, MIN_PASSWORD_CHARS)
    try:
        server = Server(config.host, config.port)
    except OSError as error:
        raise LineError(
            f"the status page cannot listen on {config.host}:{config.port}: {error.strerror}; choose"
            " another port, or end the program that holds it"
        ) from error
    pictures = Pictures(controls.cameras)
    access = Access(config.host, server.port, token=token, password=password)
    server.start(Site(controls, pictures, access).answer)
    host = f"[{config.host}]" if ":" in config.host else config.host
    logger.info("status page: http://%s:%d", host, server.port)
    return StatusPage(server, pictures)


def _secret(variable: str, min_chars: int) -> str | None:
    secret = os.environ.get(variable, "")
    if secret and len(secret) < min_chars:
        raise LineError(
            f"the environment variable {variable} has {len(secret)} characters, expected {min_chars} or"
            " more"
        )
    return secret or None


class StatusPage:
    """The sink.

    Attributes:
        port: The server listens on this one.
        wants_pictures: Yes.
    """

    wants_pictures = True

    def __init__(self, server: Server, pictures: Pictures) -> None:
        self._server, self._pictures = server, pictures
        self.port = server.port

    def write(self, record: Record, picture: Picture | None) -> None:
        """Keeps the picture while it is the latest, or among the last NG ones."""
        if picture is not None:
            self._pictures.add(record, picture)

    def write_late(self, record: Record) -> None:
        """Does nothing."""

    def knows(self, part_id: int) -> bool:
        """It keeps nothing."""
        return True

    def counters(self) -> Mapping[str, int]:
        """None."""
        return {}

    def close(self) -> None:
        """Ends the server and its connections."""
        self._server.close()
