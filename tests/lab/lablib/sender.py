# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbered packets from outside of the guest, and the record of when each was sent.

The frames are Ethernet broadcasts of the local experimental ethertype 0x88B5
with a 64-bit sequence number and the host's time (ns, monotonic), both big-endian, right
after the header, padded with a pattern that depends on the number. They are
written by a process of its own, so that nothing the test does delays them, to the
host end of the device's netdev: a datagram socket with a buffer large enough
that the host never drops one (and a full one makes the sender wait).
"""

import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from .common import LabError

ETHERTYPE = 0x88B5
HEADER = struct.Struct(">6s6sHQQ")
RECORD = struct.Struct("<QQ")       # sequence number, time in ns (wall clock, as QEMU's trace has)
SOURCE = bytes.fromhex("020000000001")
SIZE = 128


def frame(number: int, now: int, size: int = SIZE) -> bytes:
    head = HEADER.pack(b"\xff" * 6, SOURCE, ETHERTYPE, number, now)
    return head + bytes([number * 31 & 0xFF]) * (size - len(head))


def put(fd: int, data: bytes) -> bool:
    """Whether there was room within a moment: a device that was stopped reads no more."""
    try:
        os.write(fd, data)
        return True
    except BlockingIOError:
        select.select([], [fd], [], 0.05)
        return False


def send(fd: int, rate: float, log: str, limit: int) -> None:
    """The sender's own process: @rate packets a second until told to end by SIGTERM."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    os.set_blocking(fd, False)
    start, number = time.monotonic_ns(), 0
    with open(log, "wb", buffering=0) as f:
        while not stop and (not limit or number < limit):
            due = start + int(number * 1e9 / rate)
            wait = due - time.monotonic_ns()
            if wait > 0:
                time.sleep(wait / 1e9)
                if stop:
                    break
            now = time.monotonic_ns()
            # Written down before it is sent: a packet is never seen that was not recorded.
            f.write(RECORD.pack(number, time.time_ns()))
            try:
                while not put(fd, frame(number, now)):
                    if stop:
                        raise BrokenPipeError
            except ConnectionError:
                # The machine is off, or its buffer full to the end: this one was not sent.
                f.truncate(number * RECORD.size)
                break
            number += 1


class Sender:
    """A running sender for the netdev whose host end is @sock."""

    def __init__(self, sock, rate: float, log: Path, limit: int = 0):
        self.log = Path(log)
        code = ("import sys; sys.path.insert(0, sys.argv[1]); from lablib import sender; "
                "sender.send(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], int(sys.argv[5]))")
        self.proc = subprocess.Popen(
            [sys.executable, "-B", "-c", code, str(Path(__file__).resolve().parents[1]),
             str(sock.fileno()), str(rate), str(log), str(limit)],
            pass_fds=[sock.fileno()], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def stop(self) -> list:
        """End it; the packets sent as a list of (number, time in ns, wall clock)."""
        if self.proc.poll() is None:
            self.proc.terminate()
        err = self.proc.communicate(timeout=10)[1].decode(errors="replace")
        if self.proc.returncode not in (0, -signal.SIGTERM):
            raise LabError(f"the packet sender failed: {err[-500:]}")
        return sent(self.log)


def sent(log: Path) -> list:
    """Read a sender's record; it says nothing about what arrived."""
    data = Path(log).read_bytes()
    return list(RECORD.iter_unpack(data[:len(data) // RECORD.size * RECORD.size]))
