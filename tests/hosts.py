"""Two hosts on one machine: network and host names of their own, and a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("unshare", "nsenter", "ip", "hostname")
ADDRESSES = {4: ("10.83.0.1/24", "10.83.0.2/24"), 6: ("fd00:83::1/64", "fd00:83::2/64")}


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    address: str
    keeper: subprocess.Popen[bytes]  # holds its namespaces open

    def words(self, command: Sequence[str]) -> list[str]:
        """`command`, as it is run on this host."""
        into = ["nsenter", "-t", str(self.keeper.pid), "-U", "--preserve-credentials", "-n", "-u"]
        return [*into, "--", *command]

    def do(self, *command: str) -> None:
        """Run a short command there."""
        subprocess.run(self.words(command), check=True, capture_output=True, timeout=20)

    def start(
        self, command: Sequence[str], said: Path, variables: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Begin a long one there; stdout and stderr go to `said`."""
        with said.open("wb") as file:
            return subprocess.Popen(
                self.words(command),
                env={**os.environ, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[int]:
        """All that run there, but for the keeper."""
        own = os.readlink(f"/proc/{self.keeper.pid}/ns/net")
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns" / "net") == own:
                    found.append(int(entry.name))
        return [process for process in found if process != self.keeper.pid]

    def kill(self) -> None:
        """SIGKILL to all that runs there, as a power cut would."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)


def _keep(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process in namespaces of its own; returns when it has them."""
    say = "import sys, time; print('there', flush=True); sys.stdin.read()"
    keeper = subprocess.Popen(
        [*words, sys.executable, "-c", say],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert keeper.stdout is not None
    if not keeper.stdout.readline():
        _, said = keeper.communicate(timeout=20)
        raise OSError(said.decode().strip() or f"{words[0]} failed")
    return keeper


@contextlib.contextmanager
def two_hosts(version: int) -> Iterator[tuple[Host, Host]]:
    """Hosts host-a and host-b, joined by IPv4 or IPv6. Raises OSError where they cannot be."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise OSError(f"no {', '.join(missing)} here")
    with contextlib.ExitStack() as stack:
        a, b = (address.partition("/")[0] for address in ADDRESSES[version])
        first = Host("host-a", a, _keep(["unshare", "-rnu"]))
        stack.callback(_end, first)
        second = Host("host-b", b, _keep(first.words(["unshare", "-nu"])))
        stack.callback(_end, second)
        try:
            _join((first, second), version)
        except subprocess.CalledProcessError as error:
            raise OSError(error.stderr.decode().strip()) from error
        yield first, second


def _join(hosts: tuple[Host, Host], version: int) -> None:
    there = str(hosts[1].keeper.pid)
    cable = ("type", "veth", "peer", "name", "cable", "netns", there)
    hosts[0].do("ip", "link", "add", "cable", *cable)
    for host, address in zip(hosts, ADDRESSES[version], strict=True):
        host.do("hostname", host.name)
        host.do("ip", "link", "set", "lo", "up")
        nodad = ["nodad"] if version == 6 else []
        host.do("ip", "address", "add", address, "dev", "cable", *nodad)
        host.do("ip", "link", "set", "cable", "up")


def _end(host: Host) -> None:
    host.kill()
    host.keeper.kill()
    host.keeper.wait()


def why_not() -> str:
    """Why two hosts cannot be made here; empty = they can."""
    try:
        with two_hosts(4):
            return ""
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces cannot be made here: {error}"
