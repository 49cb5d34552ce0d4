# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk image that guests boot: the root, this project, and the series' selftests."""

from pathlib import Path

from . import kernel, rootfs
from .common import cache_dir, lock


def full_image() -> Path:
    with lock(cache_dir() / "linux.lock", "the kernel tree"):
        kernel.prepare()
        tests = rootfs.selftests(kernel.tree())
    return rootfs.image(tests)
