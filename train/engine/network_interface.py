"""Which network interface gloo uses. Its own choice is where the machine's name leads, and on Debian and Ubuntu that may be loopback."""

import os
import socket
from pathlib import Path

import psutil  # DeepSpeed's


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME, where it is not and the ranks are on several nodes, to the interface that leads to MASTER_ADDR."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # srun and torchrun; deepspeed
    if "GLOO_SOCKET_IFNAME" in os.environ or local is None or local == os.environ["WORLD_SIZE"]:
        return
    name = interface_to(os.environ["MASTER_ADDR"])
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(host: str) -> str | None:
    """The interface by which packets to `host` leave; that of the default route where `host` is this machine by way of loopback.

    None where it cannot be determined.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    names = [name for name, addresses in psutil.net_if_addrs().items() if any(one.address.split("%")[0] == own for one in addresses)]
    if names and names[0] != "lo":
        return names[0]
    return _default_route()


def _default_route() -> str | None:
    """Of IPv4: the one of the lowest metric."""
    rows = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    routes = [(int(row[6]), row[0]) for row in rows if row[1] == row[7] == "00000000"]
    return min(routes)[1] if routes else None
