# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in the cache is taken again exactly as long as what it was made from is the same."""

import os

from lablib.check import expect, test
from lablib.common import run
from suite.bad_input import Scratch
from suite.runner import passes

# Nothing is built: keys alone are asked for. prepare() stands for a series that adds to the selftests.
KEYS = """
import os
from lablib import images, rootfs
from lablib.common import PROJECT
suite = kernel.tree() / "tools/testing/selftests/liveupdate"
suite.mkdir(parents=True, exist_ok=True)
kernel.prepare = lambda: (suite / "new.c").write_text("".join(p.read_text() for p in kernel.patches()))
kernel.work_tree = lambda *a, **kw: None
kernel.compile_kernel = lambda src, config, frags, release, out: out.mkdir(parents=True)
rootfs._make_base = lambda role, target: target.mkdir(parents=True)
rootfs.inside = lambda *a, **kw: ["true"]
rootfs._pack = lambda tmp, log: (tmp / "khod.deb").write_text(tmp.name)
rootfs._make_image = lambda target, *a: target.touch()
def keys():
    return {"kernel": kernel.build().name, "unpatched": kernel.build(unpatched=True).name,
            "root": rootfs.base("run").name, "programs": rootfs.guest_programs().name,
            "package": rootfs.package().parent.name, "image": images.full_image().name}
before = keys()
print(*before.values())
"""
CHANGES = """
def more(path):
    with open(PROJECT / path, "a") as f:
        f.write("more")
def packages():
    rootfs.PACKAGES = {role: (*names, "more") for role, names in rootfs.PACKAGES.items()}
first = kernel.patches()[0]
for what, change, want in (
        ("the source's version", lambda: more("kernel-patches/BASE"), "kernel unpatched"),
        ("a patch", lambda: more(first), "kernel image"),
        ("a patch is gone", first.unlink, "kernel image"),
        ("the configuration", lambda: more("tests/lab/config/minimal.config"), "kernel unpatched"),
        ("the series' part of it", lambda: more("tests/lab/config/series.config"), "kernel"),
        ("another configuration", lambda: more("tests/lab/config/debug.config"), ""),
        ("the compiler", lambda: os.environ.update(RELEASE="2"), "kernel unpatched"),
        ("a Debian package", packages, "root programs package image"),
        ("a program for guests", lambda: more("tests/lab/guest/initrd.c"), "programs image"),
        ("how guests are set up", lambda: more("tests/lab/guest/configure"), "image"),
        ("khod", lambda: more("daemon/khod.c"), "package image"),
        ("the lab", lambda: more("tests/lab/suite/keys.py"), "")):
    change()
    after = keys()
    got = " ".join(k for k in after if after[k] != before[k])
    expect(got == want, f"{what}: the keys that changed are '{got}', not '{want}'")
    before = after
"""


@test(kernels=(), image=False)
def keys_of_the_cache(ctx):
    """Each changes with all that its object is made from, and with nothing else: no time, no path of the clone."""
    with Scratch() as s:
        env = {"PATH": s.programs(gcc='echo "gcc $RELEASE"'), "RELEASE": "1", "KHO_LAB_NEED_GIB": "0"}
        (s.project / "daemon").mkdir()
        (s.project / "daemon/khod.c").touch()
        run(["git", "init", "-q"], cwd=s.project)
        here = passes(s, KEYS, **env)
        s.project = s.project.rename(s.dir / "clone")
        for path in s.project.rglob("*"):
            os.utime(path, (0, 0), follow_symlinks=False)
        there = passes(s, KEYS + CHANGES, **env)
        expect(here == there, f"keys go by time or place:\n{here}{there}")
