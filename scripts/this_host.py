"""What torchrun must know of this host to meet others: for scripts/launch_torchrun.sh.

Prints three words: whether it is the host where all meet, its address for the others, and that
address's network interface, such as `true 10.0.0.1 eth0`. Asks the system alone; sends nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import ipaddress
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

STOPPED = "stopped; run the same command again to continue"  # as utils/cli.py, without torch
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
INET6 = Path("/proc/net/if_inet6")


class HostError(Exception):
    """What a user can mend; without the project's own class, which would import more."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--rdzv_host", required=True, help="name or address of where all meet")
    result.add_argument("--port", type=int, required=True, help="its port")
    result.add_argument("--node_addr", default=None, help="this host's address, if not found out")
    result.add_argument("--interface", default=None, help="its interface, if not found out")
    return result


def resolve(host: str, port: int) -> str:
    """The first address of `host` that this host has a way to. Raises HostError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise HostError(
            f"RDZV_HOST={host}: cannot be resolved on {socket.gethostname()} ({error}); give an "
            f"address, or enter the name in DNS or /etc/hosts of all hosts"
        ) from error
    for _, _, _, _, target in found:
        if reach(str(target[0]), port):
            return str(target[0])
    raise HostError(
        f"RDZV_HOST={host}: {socket.gethostname()} has no route to {found[0][4][0]}; give an "
        f"address of a network that all hosts share"
    )


def reach(address: str, port: int) -> str:
    """The address from which this host would send to `address`; empty = it cannot."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def is_own(address: str) -> bool:
    """Whether this host has `address`."""
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def interface(address: str) -> str:
    """The name of the network interface that has `address`. Raises HostError."""
    wanted = ipaddress.ip_address(address)
    names = [name for _, name in socket.if_nameindex()]
    if wanted.version == 6:
        for line in INET6.read_text(encoding="ascii").splitlines() if INET6.exists() else []:
            digits, *_, name = line.split()
            if int(digits, 16) == int(wanted):
                return name
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for name in names:
                with contextlib.suppress(OSError):  # it has no IPv4 address
                    asked = struct.pack("256s", name.encode()[:15])
                    answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, asked)
                    if socket.inet_ntoa(answer[20:24]) == address:
                        return name
    raise HostError(
        f"NODE_ADDR={address}: is the first address of no interface of {socket.gethostname()}; "
        f"set GLOO_SOCKET_IFNAME to one of {', '.join(names)}"
    )


def describe(rdzv_host: str, port: int, node_addr: str | None, given: str | None) -> str:
    """The three words; given: the interface. Raises HostError."""
    target = resolve(rdzv_host, port)
    if ipaddress.ip_address(target).is_loopback:
        raise HostError(
            f"RDZV_HOST={rdzv_host}: is {target} on {socket.gethostname()}, which other hosts "
            f"cannot reach; give the address of a network that they share"
        )
    own = is_own(target)
    address = node_addr or (target if own else reach(target, port))
    if not _is_address(address) or not is_own(address):
        raise HostError(f"NODE_ADDR={address}: is no address of {socket.gethostname()}")
    return f"{str(own).lower()} {address} {given or interface(address)}"


def _is_address(word: str) -> bool:
    try:
        ipaddress.ip_address(word)
    except ValueError:
        return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the words; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        print(describe(args.rdzv_host, args.port, args.node_addr, args.interface))
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
