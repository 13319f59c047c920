"""What the system's service manager wants to hear (systemd's sd_notify), without a library."""

from __future__ import annotations

import logging
import os
import socket

logger = logging.getLogger(__name__)


def is_supervised() -> bool:
    """Whether systemd has started this process, and hears about it."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(state: str) -> None:
    """Tells systemd, if it has started this process: "READY=1", "WATCHDOG=1", "STOPPING=1"."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), address)
    except OSError as error:
        logger.warning("NOTIFY_SOCKET %s: %s", address, error.strerror)


def watchdog_period_s() -> float:
    """How often systemd wants a sign of life: half of the time after which it would act; at most 1 s."""
    try:
        limit_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        limit_s = 0
    return min(limit_s / 2, 1.0) if limit_s > 0 else 1.0


UNIT = """\
# /etc/systemd/system/edgead-line.service: a line that starts with the machine and is watched
[Unit]
Description=edgead inspection line
After=network-online.target
Wants=network-online.target
# Started again however often it fails; by default systemd gives up after five times in ten seconds.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={command} run {recipe}
ExecReload=/bin/kill -HUP $MAINPID
WorkingDirectory={folder}
User={user}
WatchdogSec=5
# A new driver may mean minutes of engine building before the line is ready.
TimeoutStartSec=infinity
Restart=always
RestartSec=1
TimeoutStopSec=5
# Deadlines: ahead of everything that is not an inspection.
Nice=-10
AmbientCapabilities=CAP_NET_BIND_SERVICE CAP_SYS_NICE
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
"""
