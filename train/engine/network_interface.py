"""The network interface that gloo uses.

By default gloo takes the interface that the machine's own name resolves to, which may be loopback on Debian and Ubuntu.
"""

import os
import socket
from pathlib import Path

import psutil  # a dependency of DeepSpeed


def choose_interface() -> None:
    """If the ranks are on several nodes, set GLOO_SOCKET_IFNAME, unless it is set, to the interface towards
    MASTER_ADDR.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # srun and torchrun; deepspeed
    if "GLOO_SOCKET_IFNAME" in os.environ or local is None or local == os.environ["WORLD_SIZE"]:
        return
    name = interface_to(os.environ["MASTER_ADDR"])
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(host: str) -> str | None:
    """Name of the interface through which packets to `host` leave; None if it cannot be determined.

    If that is loopback, because `host` is this machine, the interface of the default route.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # UDP: sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(one.address.split("%")[0] == own for one in addresses)
    ]
    if names and names[0] != "lo":
        return names[0]
    return _default_route()


def _default_route() -> str | None:
    """Interface of the IPv4 default route with the lowest metric."""
    rows = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    routes = [(int(row[6]), row[0]) for row in rows if row[1] == row[7] == "00000000"]
    return min(routes)[1] if routes else None
