"""Whether the Hub can be reached, found out at once: its client tries five times, for half a minute, to no avail."""

import contextlib
import socket
import threading
from typing import Iterator, List, Optional
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

__all__ = ["promptly", "unreachable"]

WAIT = 2.0  # seconds for an answer; a network that is down says so sooner
PORTS = {"http": 80, "https": 443}


def unreachable() -> Optional[str]:
    """The Hub's host if no connection to it, or to the proxy before it, can be made.

    None if one can, and where none is allowed (HF_HUB_OFFLINE), since then nothing will be tried.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    hub = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(hub.scheme)
    first = urlsplit(proxy if "://" in proxy else f"//{proxy}") if proxy and not proxy_bypass(hub.hostname) else hub
    answered: List[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError):  # whatever it is, there is no connection
            port = first.port or PORTS.get(first.scheme, 80)
            socket.create_connection((first.hostname, port), timeout=WAIT).close()
            answered.append(True)

    # Looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(WAIT)
    return None if answered else hub.hostname


@contextlib.contextmanager
def promptly(needed: bool = True) -> Iterator[Optional[str]]:
    """Within, a Hub that cannot be reached is as if offline: what is cached is found, and what is not fails, at once.

    Args:
        needed: Whether the Hub will be asked at all.

    Yields:
        The host that cannot be reached, or None.
    """
    host = unreachable() if needed else None
    if host is None:
        yield None
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield host
    finally:
        constants.HF_HUB_OFFLINE = False
