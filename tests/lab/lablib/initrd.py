# SPDX-License-Identifier: GPL-2.0-or-later
"""A modular kernel's modules, and an initrd that loads them (guest/initrd.c)."""

import contextlib
import tarfile
import tempfile

from .common import LabError
from .rootfs import guest_programs


def unpack(build, target):
    """The modules of @build, unpacked in @target; the folder is for /lib/modules."""
    tar = build / "modules.tar"
    if not tar.exists():
        raise LabError(f"{build} is no modular kernel: there is no {tar.name}")
    with tarfile.open(tar) as packed:
        packed.extractall(target, filter=lambda m, _: None if m.issym() else m)
    return target / "lib/modules"


def in_order(modules):
    """All modules, each after those that it needs."""
    release = next(modules.iterdir())
    rows = (line.split(":") for line in (release / "modules.dep").read_text().splitlines())
    needs = {name: words.split() for name, words in rows}
    done = []

    def add(name):
        for other in needs[name]:
            add(other)
        if name not in done:
            done.append(name)
    for name in sorted(needs):
        add(name)
    return [release / name for name in done]


def newc(path, name, mode):
    """A file of an initrd: cpio's format "newc"."""
    data = path if isinstance(path, bytes) else path.read_bytes()
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


TRAILER = newc(b"", "TRAILER!!!", 0)


def initrd(modules, target):
    """An initrd in the file @target that loads all of the folder @modules."""
    files = in_order(modules)
    listed = "".join(f"/{m.name}\n" for m in files).encode()
    target.write_bytes(newc(guest_programs() / "initrd", "init", 0o100755) + newc(listed, "modules", 0o100644)
                       + b"".join(newc(m, m.name, 0o100644) for m in files)
                       + TRAILER)
    return target


@contextlib.contextmanager
def empty_initrd():
    """The path of an initrd with nothing in it, which firmware and stub treat like any other."""
    with tempfile.NamedTemporaryFile(prefix="initrd-") as f:
        f.write(TRAILER)
        f.flush()
        yield f.name
