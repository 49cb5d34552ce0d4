# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks whose content is known, so that what a guest has read can be judged.

Word i of sector s is s * A + i * B modulo 2^64, little-endian: no two of its sectors
are alike, and guest/dma-guest/nvme.c computes the same.
"""

import sys
from array import array
from pathlib import Path

A, B, MASK = 0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f, (1 << 64) - 1
SECTOR = 512
PATTERN = 8 << 20       # of the disk's beginning
SIZE = 256 << 20


def make(path: Path) -> None:
    """A raw disk of SIZE bytes, of which the first PATTERN bytes are not zero."""
    words = array("Q", (s * A + i * B & MASK
                        for s in range(PATTERN // SECTOR) for i in range(SECTOR // 8)))
    if sys.byteorder == "big":
        words.byteswap()
    with open(path, "wb") as f:
        words.tofile(f)
        f.truncate(SIZE)
