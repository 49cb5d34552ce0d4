# SPDX-License-Identifier: GPL-2.0-or-later
"""Which QEMU runs a guest: the installed one, or Debian 12's own 7.2 beside it.

Some things work in one series only: first-stage translation of VT-d needs QEMU 10, the AMD
IOMMU translates for an e1000e in 7.2 and not in 10.0. QEMU 7.2 is bookworm's own package,
unpacked with its libraries and its firmware into the cache; what is installed is not
touched. KHO_QEMU names any other binary, and wins.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from .apt import Apt
from .common import LabError, building, cache_dir, lock, need_program, need_space, run, step

OLD = "7.2"
PROGRAM = "qemu-system-x86_64"
# The firmware and the option ROMs are packages of their own; the rest are libraries.
OLD_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios", "ipxe-qemu")
LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass
class Emulator:
    """A QEMU: its binary, and what its environment needs."""
    program: str
    env: dict = field(default_factory=dict)


def need_series(version: str) -> None:
    if version not in ("", OLD):
        raise LabError(f"no QEMU {version}; there are {OLD} (Debian 12's own, fetched when it is "
                       "needed) and the installed one (without --qemu)")


def emulator(version: str = "") -> Emulator:
    """The QEMU of series @version; "" is the installed one."""
    need_series(version)
    forced = os.environ.get("KHO_QEMU")
    if forced or not version:
        return Emulator(need_program(forced or PROGRAM))
    root = old_qemu()
    # It finds its firmware by its own place.
    return Emulator(str(root / "usr/bin" / PROGRAM), {"LD_LIBRARY_PATH": str(root / LIBRARIES)})


def old_qemu() -> Path:
    """Folder with QEMU 7.2 unpacked; fetched if the cache has none."""
    target = cache_dir() / f"qemu-{OLD}"
    with lock(cache_dir() / f"qemu-{OLD}.lock", f"QEMU {OLD}"):
        if target.exists():
            return target
        need_space(cache_dir(), 1, f"QEMU {OLD}")
        # The system's own status: what QEMU 7.2 needs and is installed is not fetched again.
        apt = Apt(("bookworm",), name="apt-qemu", status=Path("/var/lib/dpkg/status"))
        apt.update()
        found = [v for v in apt.versions("qemu-system-x86") if v.startswith(f"1:{OLD}")]
        if not found:
            raise LabError(f"Debian's mirror has no QEMU {OLD} in {', '.join(apt.suites)}")
        with step(f"fetching QEMU {found[0]}"), building(target) as tmp:
            for deb in apt.download_all([f"{p}/bookworm" for p in OLD_PACKAGES]):
                run(["dpkg-deb", "--extract", deb, tmp], what=f"unpacking {deb.name}")
            said = run([tmp / "usr/bin" / PROGRAM, "--version"], what=f"starting QEMU {OLD}",
                       env={"LD_LIBRARY_PATH": str(tmp / LIBRARIES)})
            if f"version {OLD}" not in said:
                raise LabError(f"what was fetched as QEMU {OLD} calls itself: {said.splitlines()[0]}")
    return target
