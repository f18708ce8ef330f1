"""Two "hosts" on one machine: network namespaces with a hostname each, and a wire between them that can be slow or cut.

A wire is a pair of virtual Ethernet devices. A slow one is made of two tunnels whose packets this process passes on later:
not every kernel has the queue of ``tc`` that delays. Needs root and ``ip``.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.training.distributed.launchers import TRAIN, start

ADDRESSES = ("10.213.7.1", "10.213.7.2")
DEVICE = "wire0"
PORT = 29_417
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000


class TwoHosts:
    """The namespaces; make them by :func:`two_hosts`.

    Args:
        folder: For a file that says which host has which address.
    """

    def __init__(self, folder: Path) -> None:
        self.names = tuple(f"qvgen{os.getpid()}{side}" for side in "ab")
        self._started: list[subprocess.Popen[bytes]] = []
        self._hosts_file = folder / "hosts"
        known = ("127.0.0.1 localhost", f"{ADDRESSES[0]} host-a", f"{ADDRESSES[1]} host-b")
        self._hosts_file.write_text("".join(f"{line}\n" for line in known))

    def ip(self, side: int, *words: str) -> None:
        """Run ``ip`` on a host."""
        subprocess.run(["ip", "-n", self.names[side], *words], check=True)

    def cut(self) -> None:
        """Pull the wire out."""
        self.ip(1, "link", "set", DEVICE, "down")

    def mend(self) -> None:
        """Put it back."""
        self.ip(1, "link", "set", DEVICE, "up")

    def start(self, side: int, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        shell = f'mount --bind {self._hosts_file} /etc/hosts && hostname host-{"ab"[side]} && exec "$@"'
        inside = ["ip", "netns", "exec", self.names[side], "unshare", "--uts", "--mount"]
        process = start([*inside, "sh", "-c", shell, "sh", *command], log, {"GLOO_SOCKET_IFNAME": DEVICE})
        self._started.append(process)
        return process

    def end(self) -> None:
        """End what still runs there."""
        for process in self._started:
            process.terminate()
            process.wait()

    def torchrun(self, folder: Path, *words: str) -> list[subprocess.Popen[bytes]]:
        """An agent on each host, which starts one process of ``train.py``; logs as of ``launchers.torchrun``."""
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}"]
        return [
            self.start(
                side,
                [*agent, *endpoint, "--local-addr", address, "--no-python", *TRAIN, *words],
                folder / f"torchrun{side}.log",
            )
            for side, address in enumerate(ADDRESSES)
        ]


@contextmanager
def two_hosts(folder: Path, *, delay_s: float = 0.0) -> Iterator[TwoHosts]:
    """Make two hosts for the time of a block; the test is skipped where that is not possible."""
    hosts = TwoHosts(folder)
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", hosts.names[0]], check=False).returncode:
        pytest.skip("no network namespaces here: they need root, and ip")
    try:
        subprocess.run(["ip", "netns", "add", hosts.names[1]], check=True)
        with _slow_wire(hosts, delay_s) if delay_s else _fast_wire(hosts):
            for side, address in enumerate(ADDRESSES):
                hosts.ip(side, "link", "set", "lo", "up")
                hosts.ip(side, "addr", "add", f"{address}/24", "dev", DEVICE)
                hosts.ip(side, "link", "set", DEVICE, "up")
            yield hosts
    finally:
        hosts.end()
        for name in hosts.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@contextmanager
def _fast_wire(hosts: TwoHosts) -> Iterator[None]:
    peer = ["peer", "name", DEVICE, "netns", hosts.names[1]]
    hosts.ip(0, "link", "add", DEVICE, "type", "veth", *peer)
    yield


@contextmanager
def _slow_wire(hosts: TwoHosts, delay_s: float) -> Iterator[None]:
    if not Path("/dev/net/tun").exists():
        pytest.skip("no tunnels here, of which a slow wire is made")
    ends = [_tunnel(f"qvt{os.getpid() % 100_000}{side}", name) for side, name in zip("ab", hosts.names, strict=True)]
    stop = threading.Event()
    thread = threading.Thread(target=_pass_on, args=(ends, delay_s, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for end in ends:
            os.close(end)


def _tunnel(device: str, namespace: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    subprocess.run(["ip", "link", "set", device, "name", DEVICE, "netns", namespace], check=True)
    return end


def _pass_on(ends: Sequence[int], delay_s: float, stop: threading.Event) -> None:
    """Give every packet to the other end, so much later, until told to stop."""
    under_way: deque[tuple[float, int, bytes]] = deque()
    while not stop.is_set():
        wait = min(0.2, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.2
        for end in select.select(ends, [], [], wait)[0]:
            under_way.append((time.monotonic() + delay_s, ends[1 - ends.index(end)], os.read(end, 65_536)))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, packet = under_way.popleft()
            os.write(end, packet)
