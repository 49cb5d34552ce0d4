# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk image that guests boot: the root, this project, and the series' selftests."""

from pathlib import Path

from . import kernel, rootfs
from .common import cache_dir, digest, note


def full_image(as_is=False) -> Path:
    return rootfs.image(selftests(as_is))


def selftests(as_is=False) -> Path:
    """Upstream's selftests with the series' own; with @as_is those of the kernel tree as it stands.

    Which folder a series led to is remembered, so that a guest can be started while
    somebody builds in the kernel tree.
    """
    if as_is:
        with kernel.tree_lock():
            return rootfs.selftests(kernel.tree())
    key = digest(kernel.source_version(), kernel.patches_of(kernel.patches()),
                 rootfs.base("build").name, rootfs.BUILD_SELFTESTS)
    known = cache_dir() / "selftests" / f"{key}.of-series"
    if known.exists():
        folder = known.with_name(known.read_text())
        if folder.is_dir():
            return folder
    with kernel.tree_lock():
        kernel.prepare()
        folder = rootfs.selftests(kernel.tree())
    note(known, folder.name)
    return folder
