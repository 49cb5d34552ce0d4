# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's trace: what the devices really did, whatever the guest says about it.

QEMU's log backend writes `PID@SECONDS.MICROSECONDS:EVENT TEXT` for each event
switched on by -trace (with -msg timestamp=on), seconds of the wall clock.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"^(?:\d+@(\d+\.\d+):)?([a-z][a-z0-9_]+) (.*)$")
BUFFER = re.compile(r"addr: (0x[0-9a-f]+), offset: (\d+), from: \S+, length: (\d+)")
CONFIG = re.compile(r"^(\S+) (\S+) @(0x[0-9a-f]+) <- (0x[0-9a-f]+)")

# A NIC -> the event that tells of its DMA into guest memory. A virtio-net has none that says where.
BUFFER_WRITES = {"e1000e": "e1000e_rx_desc_buff_write", "igb": "igb_rx_desc_buff_write"}


@dataclass
class Event:
    """One line of the trace; @when in seconds of the host's wall clock."""
    when: float
    name: str
    text: str


def read(path: Path, names=None):
    """The events of @path in order; only those called @names, if given."""
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            m = LINE.match(line)
            if m and (names is None or m.group(2) in names):
                yield Event(float(m.group(1) or 0), m.group(2), m.group(3).rstrip())


def count(path: Path) -> Counter:
    return Counter(e.name for e in read(path))


def dma_writes(path: Path):
    """(time, address as the device issued it, length) of each packet buffer written."""
    for e in read(path, BUFFER_WRITES.values()):
        m = BUFFER.search(e.text)
        if m:
            yield e.when, int(m.group(1), 16) + int(m.group(2)), int(m.group(3))


def config_writes(path: Path):
    """(time, device, slot, offset, value) of each write to a device's configuration space."""
    for e in read(path, {"pci_cfg_write"}):
        m = CONFIG.match(e.text)
        if m:
            yield e.when, m.group(1), m.group(2), int(m.group(3), 16), int(m.group(4), 16)
