"""The master port of a single node: a busy one is replaced, as nobody else needs to know it."""

from __future__ import annotations

import errno
import socket

from .output import say

_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def choose_port(wanted: int | None) -> int:
    if wanted is None:
        return _free_port()
    if _is_free(wanted):
        return wanted
    port = _free_port()
    say(f"port {wanted} is in use; using {port} instead")
    return port


def _is_free(port: int) -> bool:
    # The store listens on all interfaces, so each family that exists must be free there.
    return all(_can_bind(family, port) for family in (socket.AF_INET, socket.AF_INET6))


def _can_bind(family: socket.AddressFamily, port: int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the store does, so that connections of a run before this one, still in TIME_WAIT, do not
            # count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(("", port))
            probe.listen()
    except PermissionError:
        return False
    except OSError as error:
        return error.errno in _NO_SUCH_FAMILY
    return True


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
