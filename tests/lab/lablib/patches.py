# SPDX-License-Identifier: GPL-2.0-or-later
"""Each patch of the series by itself: it builds with live update and without, and adds no warning.

The patches are walked in a work tree for each of the two configurations, which can be walked side
by side; each step compiles only what the patch touches, up to a linked vmlinux: the series has
nothing in arch/x86/boot. What a step found is written down by the commit's tree: a walk that is
broken off goes on where it was. What checkers say is asked of the whole series, and of the kernel
without it.
"""

import json
import os
import re
import shutil
import subprocess
from contextlib import contextmanager

from . import kernel
from .common import LabError, cache_dir, lock, run, say

WARNING = re.compile(r"^(?:\.\./)*(?:[Ww]arning: )?([\w./-]+\.[chS]):\d+(?::\d+)?:? (.*)$")
# That of Debian 12 lacks the word, without which the kernel does not call it.
SPARSE = "sparse -D__typeof_unqual__=__typeof__"
NOISE = "error: bad constant expression"        # of each module_param()
NO_KERNEL_DOC = "KERNELDOC=/dev/null"           # which W=1 runs for each object; it has a test of its own
LIVE_UPDATE = re.compile(r"^CONFIG_\w*(LIVEUPDATE)\w*=.*$", re.M)


def warnings_of(log) -> set:
    """File and text of each warning in a log of make; line numbers move with the patches."""
    found = (WARNING.match(x) for x in log.read_text(errors="replace").splitlines()
             if "arning" in x or "error:" in x)
    return {f"{m.group(1)}: {m.group(2)}" for m in found if m}


def make(src, name, log, *args) -> None:
    objs = src / f"build-{name}"
    cc = "ccache gcc" if shutil.which("ccache") else "gcc"
    env = {"CCACHE_DIR": str(cache_dir() / "ccache"), "KCONFIG_ALLCONFIG": str(objs / "lab.config")}
    run(["make", f"O=build-{name}", f"-j{os.cpu_count()}", f"CC={cc}", "W=1", NO_KERNEL_DOC, *args],
        cwd=src, env=env, log=log, what="building the kernel")


def build(src, name, live_update, log) -> set:
    """Build what is checked out, with W=1, and add to @log. Returns the warnings in it."""
    objs = src / f"build-{name}"
    objs.mkdir(exist_ok=True)
    text = "".join(f.read_text() + "\n" for f in kernel.fragments("minimal"))
    text += (kernel.CONFIGS / "each.config").read_text()
    (objs / "lab.config").write_text(text if live_update else LIVE_UPDATE.sub("", text))
    make(src, name, log, "allnoconfig")
    config = (objs / ".config").read_text()
    if ("CONFIG_LIVEUPDATE=y" in config) != live_update:
        raise LabError(f"CONFIG_LIVEUPDATE did not come out as asked for in {objs}/.config")
    make(src, name, log, "vmlinux")
    return warnings_of(log)


def commits_of_series() -> list:
    with kernel.tree_lock():
        kernel.prepare()
        return kernel.git("rev-list", "--reverse", "base..series").split()


@contextmanager
def each_tree(name):
    """The work tree for the configuration @name, for nobody else meanwhile."""
    with lock(cache_dir() / f"patches-{name}.lock", f"the walk over the patches, live update {name}"):
        yield kernel.work_tree(f"-each-{name}")


def walk(live_update) -> tuple:
    """Build each commit of the series. Returns (number of patches, [what is wrong])."""
    name = "on" if live_update else "off"
    commits = commits_of_series()
    wrong = []
    with each_tree(name) as src:
        base = kernel.git("rev-parse", "base^{tree}")
        known = cache_dir() / f"patches-{name}.json"
        done = json.loads(known.read_text()) if known.exists() else {}
        for commit in [kernel.git("rev-parse", "base"), *commits]:
            key = kernel.git("rev-parse", f"{commit}^{{tree}}")
            title = kernel.git("log", "-1", "--format=%s", commit)
            if key not in done:
                kernel.git("checkout", "-q", "--detach", commit, cwd=src)
                log = src / f"{key}.log"    # which a step that was broken off has begun
                try:
                    done[key] = sorted(build(src, name, live_update, log))
                except LabError as e:
                    wrong.append(f"{title}: {e}")
                    continue
                known.write_text(json.dumps(done))
                log.unlink()
                say(f"live update {name}: {title}: {len(done[key])} warnings")
            wrong += [f"{title}: {x}" for x in done[key] if x not in done.get(base, [])]
    return len(commits), wrong


def new_findings(check) -> list:
    """What @check finds in a work tree with the series, and does not without it."""
    commits_of_series()
    with each_tree("on") as src:
        found = []
        for commit in ("base", "series"):
            kernel.git("checkout", "-q", "--detach", commit, cwd=src)
            found.append(check(src))
    return sorted(found[1] - found[0])


def touched(src, *endings) -> list:
    """The kernel's own files that the series changes, as far as they are there."""
    names = kernel.git("diff", "--name-only", "base", "series", "--", *endings, ":!tools").split()
    return [n for n in names if (src / n).exists()]


def kernel_doc(src) -> set:
    log = src / "kernel-doc.log"
    with open(log, "w", encoding="utf-8") as out:
        subprocess.run(["tools/docs/kernel-doc", "-none", "-Wall", *touched(src, "*.c", "*.h")],
                       cwd=src, stdout=out, stderr=out, check=False)
    return warnings_of(log)


def sparse(src) -> set:
    """Of the objects that are built with live update."""
    log = src / "build-on" / "sparse.log"
    build(src, "on", True, log)
    log.write_text("")
    objects = [n.removesuffix("c") + "o" for n in touched(src, "*.c")]
    make(src, "on", log, "C=2", f"CHECK={SPARSE}", *(o for o in objects if (src / "build-on" / o).exists()))
    found = warnings_of(log)
    if not found:       # it has something to say of the kernel without the series, too
        raise LabError(f"sparse did not run, see {log}")
    return {f for f in found if not f.endswith(NOISE)}


def checkpatch() -> list:
    """What checkpatch says of the patches; new files without a MAINTAINERS entry are known."""
    commits_of_series()
    r = subprocess.run(["scripts/checkpatch.pl", "--strict", "--terse", "--no-summary", "--ignore",
                        "FILE_PATH_CHANGES", *kernel.patches()], cwd=kernel.tree(), text=True,
                       capture_output=True, check=False,
                       env={**os.environ, "PATH": "/usr/bin:/bin"})   # Debian's python3 has ply
    return (r.stdout + r.stderr).splitlines()
