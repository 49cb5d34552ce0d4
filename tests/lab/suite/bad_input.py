# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input to the lab: one clear sentence, and nothing left half done."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lablib import kernel
from lablib.check import expect, test
from lablib.common import LAB, PROJECT, LabError, cache_dir
from lablib.images import full_image
from lablib.qemu import VM


LEFT = "left half done"


class Scratch:
    """A copy of what the lab is made of, an empty cache, and the lab run on them."""

    def __init__(self):
        # Below the cache, not in /tmp: it may need real space.
        self.dir = Path(tempfile.mkdtemp(prefix="scratch-", dir=cache_dir()))
        self.project, self.cache = self.dir / "project", self.dir / "cache"
        self.cache.mkdir()
        shutil.copytree(LAB, self.project / "tests/lab", symlinks=True)
        shutil.copytree(PROJECT / "kernel-patches", self.project / "kernel-patches")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.dir, ignore_errors=True)

    def lab(self, *args, prefix=(), **env):
        return subprocess.run([*prefix, str(self.project / "tests/lab/lab"), *args],
                              capture_output=True, text=True, check=False, timeout=300,
                              env=self.environment(**env))

    def environment(self, **env):
        """Nothing of the developer's own settings of the lab, which would lead elsewhere."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("KHO_")}
        return {**clean, "KHO_CACHE": str(self.cache), **env}

    def refused(self, result, *words):
        """Exit status 1, one error with all of @words, no traceback, nothing half done."""
        expect(result.returncode == 1, f"exit status {result.returncode}: {result.stderr[-800:]}")
        errors = [x for x in result.stderr.splitlines() if x.startswith("lab: error: ")]
        expect(len(errors) == 1 and "Traceback" not in result.stderr,
               f"not one clear sentence: {result.stderr[-800:]}")
        for w in words:
            expect(w in result.stderr, f"'{w}' is not in: {result.stderr[-800:]}")
        left = [p.name for p in self.cache.rglob("*.new")]
        expect(not left and LEFT not in result.stderr, f"left half done: {left}{result.stderr[-800:]}")

    def with_small_cache(self, size):
        """A prefix: the cache is a file system of its own, which nobody sees afterwards."""
        script = (f'mount -t tmpfs -o size={size} tmpfs {self.cache} || exit; "$@"; r=$?; '
                  f'find {self.cache} -name "*.new" -printf "{LEFT}: %p\\n" >&2; exit $r')
        return [*in_namespace("--mount"), "sh", "-c", script, "sh"]

    def python(self, code, prefix=(), **env):
        """@code with the lab's modules, which are in the folder that is its argument."""
        return subprocess.run([*prefix, sys.executable, "-B", "-c", code, str(self.project / "tests/lab")],
                              capture_output=True, text=True, check=False, env=self.environment(**env))

    def programs(self, **texts):
        """A PATH on which these programs, scripts of sh, come first."""
        folder = self.dir / "bin"
        folder.mkdir()
        for name, text in texts.items():
            path = folder / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"


def in_namespace(*kinds):
    """A prefix that runs a program in new namespaces, as root there."""
    extra = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *extra, *kinds]


@test(kernels=(), image=False)
def no_network(ctx):
    with Scratch() as s:
        s.refused(s.lab("kernel", "tree", prefix=in_namespace("--net")), "no network", "mirror")
        expect(not (s.cache / "linux").exists(), "a kernel tree was begun")
        r = s.lab("check", "a-guest-that-never-comes-up", prefix=in_namespace("--net"))
        expect(r.returncode == 1 and "no network" in r.stdout and r.stdout.endswith("0 passed, 1 failed, 0 skipped\n"),
               f"no closing line: {r.stdout}{r.stderr}")


# Debian's cloud images have their mirrors in a file, which apt names with a slash at the end. Nothing
# is named before it was updated; what somebody else has comes first, and is not of Debian's origin.
APT_GET = """echo "$DEBIAN_FRONTEND $*" >>"$ASKED"
case "$*" in
*update) touch "$LISTS" ;;
indextargets*)
	[ -e "$LISTS" ] || exit 0
	case "$*" in *"Origin: Debian"*) ;; *) echo https://third.example/linux/debian/ ;; esac
	echo "mirror+file:$LIST/" ;;
esac"""
DPKG_QUERY = """case "$3 $4" in
*Version*) echo "$QEMU" ;;
*qemu-utils) ;;
*) echo installed ;;
esac"""
SUDO = 'unset DEBIAN_FRONTEND; exec "$@"'
MIRROR = "import sys; sys.path.insert(0, sys.argv[1]); from lablib import apt; print(apt.mirror())"
BACKPORTS = "^noninteractive .* install .*bookworm-backports qemu-system-x86 qemu-utils$"
TOOLS = "^noninteractive .* install --no-install-recommends qemu-utils$"


@test(kernels=(), image=False)
def a_mirror_that_is_a_list_and_qemu_without_its_tools(ctx):
    """The list is read by the lab and by setup, which installs qemu-img for a QEMU that is there already."""
    with Scratch() as s:
        mirrors, lists, asked = s.dir / "debian.list", s.dir / "lists", s.dir / "asked"
        mirrors.write_text("# nearest first\nhttp://mirror.example/debian priority:1\nhttp://other.example/debian\n")
        env = {"PATH": s.programs(apt_get=APT_GET, dpkg_query=DPKG_QUERY, sudo=SUDO, id="echo 1000"),
               "LIST": str(mirrors), "LISTS": str(lists), "ASKED": str(asked)}
        r = s.python(MIRROR, **env)
        expect(r.returncode == 1 and "run 'apt-get update'" in r.stderr, f"without lists: {r.stdout}{r.stderr}")
        lists.touch()
        r = s.python(MIRROR, **env)
        expect(r.stdout == "http://mirror.example/debian\n", f"the mirror is {r.stdout}{r.stderr}")
        for qemu, word in (("installed 1:7.2+dfsg-7", BACKPORTS), ("config-files 1:10.0.2+ds-1", BACKPORTS),
                           ("installed 1:10.0.2+ds-1", TOOLS)):
            asked.unlink()
            lists.unlink(missing_ok=True)
            r = subprocess.run([str(s.project / "tests/lab/setup")], capture_output=True, text=True, check=False,
                               env=s.environment(QEMU=qemu, **env))
            said = asked.read_text()
            expect(r.returncode == 0 and re.search(word, said, re.M), f"{qemu}: {r.stderr}{said}")
        sources = (s.cache / "apt-backports/sources.list").read_text()
        expect(sources.count(" http://mirror.example/debian bookworm") == 3, f"setup reads from {sources}")


TOGETHER = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from lablib import apt
at, most = [], []
def run(cmd, **kw):
    at.append(cmd)
    most.append(len(at))
    time.sleep(0.3)
    at.pop()
    return ""
apt.run, apt.mirror = run, lambda: "http://mirror.example/debian"
verbs = [threading.Thread(target=apt.Apt().update) for _ in range(2)]
[v.start() for v in verbs]
[v.join() for v in verbs]
print(max(most))
"""


@test(kernels=(), image=False)
def two_verbs_that_fetch(ctx):
    """One waits for the other, as apt itself would not."""
    with Scratch() as s:
        r = s.python(TOGETHER)
        expect(r.stdout == "1\n" and "waiting" in r.stderr, f"at a time: {r.stdout}{r.stderr}")


FILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from lablib import cli
from lablib.common import run
cli.kernel.prepare = lambda: run(["dd", "if=/dev/zero", f"of={cli.cache_dir()}/file"], what="making a file")
sys.argv[1:] = ["kernel", "tree"]
sys.exit(cli.main())
"""


@test(kernels=(), image=False)
def no_space(ctx):
    with Scratch() as s:
        r = subprocess.run([*s.with_small_cache("64M"), f"{s.project}/tests/lab/lab", "kernel", "tree"],
                           capture_output=True, text=True, check=False, env=s.environment())
        s.refused(r, "no space", "GiB", "KHO_CACHE")
        # A program that the lab runs finds none, in the middle of its work.
        s.refused(s.python(FILLED, s.with_small_cache("4M")), "making a file: failed", "remove something", "KHO_CACHE")


ROOT = """
import sys
sys.path.insert(0, sys.argv[1])
from lablib import cli, rootfs
rootfs.Apt.update = lambda self: []
rootfs.Apt.suite_with = lambda *a: "sid"
rootfs.mirror = lambda: "http://mirror.example/debian"
sys.argv[1:] = ["rootfs", "run"]
sys.exit(cli.main())
"""


@test(kernels=(), image=False)
def no_space_for_a_root(ctx):
    """Where mmdebstrap builds it, which is not the cache: before it begins, and when it has."""
    with Scratch() as s:
        tmp = s.dir / "tmp"
        tmp.mkdir()
        env = {"TMPDIR": str(tmp), "PATH": s.programs(mmdebstrap="echo tar: No space left on device >&2; exit 1")}
        mount = f'mount -t tmpfs -o size=64M tmpfs {tmp} && exec "$@"'
        r = s.python(ROOT, [*in_namespace("--mount"), "sh", "-c", mount, "sh"], **env)
        s.refused(r, "no space: mmdebstrap needs", f"in {tmp}", "TMPDIR")
        r = s.python(ROOT, KHO_LAB_NEED_GIB="0", **env)
        s.refused(r, "no space: mmdebstrap makes", f"in {tmp}", "TMPDIR", "log/mmdebstrap-run.log")
        expect("the mirror" not in r.stderr, r.stderr)


FULL = """
import sys
sys.path.insert(0, sys.argv[1])
from lablib import cli
with open(cli.cache_dir() / "file", "wb", buffering=0) as f:
    try:
        while f.write(bytes(4096)):
            pass
    except OSError:
        pass
cli.kernel.build = lambda *a, **kw: cli.cache_dir()
cli.full_image = lambda *a: cli.cache_dir() / "file"
sys.argv[1:] = ["run"]
sys.exit(cli.main())
"""


@test(kernels=(), image=False)
def no_space_for_a_guest(ctx):
    """Before it is started; where so much is not asked for, when it is."""
    with Scratch() as s:
        # One of the two waits for the system to refuse, whatever is written first.
        for gib, words in ((None, ("no space: a guest needs", "KHO_CACHE")), ("0", ("No space left", "KHO_CACHE"))):
            env = {"KHO_LAB_ACCEL": "tcg", **({"KHO_LAB_NEED_GIB": gib} if gib else {})}
            s.refused(s.python(FULL, s.with_small_cache("4M"), **env), *words)


@test(kernels=(), image=False)
def a_cache_that_cannot_be_written(ctx):
    with Scratch() as s:
        s.refused(s.lab("kernel", "tree", KHO_CACHE="/proc/nowhere"), "/proc/nowhere", "KHO_CACHE")


def small_tree(s):
    """A kernel tree of one file, as new, in the cache: enough for patches and builds that are not run."""
    path = s.cache / "linux"
    path.mkdir()
    (path / "Makefile").write_text("all:\n")
    for cmd in (["init", "-q", "-b", "base"], ["add", "."], ["commit", "-q", "-m", "base"]):
        subprocess.run([*kernel.GIT, *cmd], cwd=path, check=True, capture_output=True)
    (path / ".git/lab-version").write_text(kernel.recorded_version() + "\n")
    for p in (s.project / "kernel-patches").glob("*.patch"):
        p.unlink()
    return path


def git(tree, *args):
    return subprocess.run([*kernel.GIT, *args], cwd=tree, check=True, capture_output=True, text=True).stdout


def commit(tree, name):
    (tree / name).write_text(name)
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", name)


BROKEN_PATCH = """From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: nobody <nobody@khod.invalid>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: [PATCH] a patch whose place is not there

---
 Makefile | 2 +-
 1 file changed, 1 insertion(+), 1 deletion(-)

diff --git a/Makefile b/Makefile
index 1111111..2222222 100644
--- a/Makefile
+++ b/Makefile
@@ -1,3 +1,3 @@
 this line is not in the file
-nor is this
+this cannot be put there
 nor this
--\x20
2.39.5
"""


@test(kernels=(), image=False)
def a_patch_that_does_not_apply(ctx):
    with Scratch() as s:
        tree = small_tree(s)
        (s.project / "kernel-patches/0001-broken.patch").write_text(BROKEN_PATCH)
        s.refused(s.lab("kernel", "tree"), "0001-broken.patch", "does not apply", kernel.PACKAGE)
        status = git(tree, "status", "--porcelain")
        expect(not status and not (tree / ".git/rebase-apply").exists(),
               f"the tree is left in the middle of the patch: {status}")
        s.refused(s.lab("kernel", "export"), "nothing was exported")
        expect((s.project / "kernel-patches/0001-broken.patch").exists(), "the patch that is not in the tree is gone")


@test(kernels=(), image=False)
def commits_that_were_not_exported(ctx):
    """Nothing throws away a developer's commits, or the patches, whatever is checked out in the tree."""
    with Scratch() as s:
        tree = small_tree(s)
        expect(s.lab("kernel", "tree").returncode == 0, "no tree")
        for name in ("one", "two"):
            commit(tree, name)
        s.refused(s.lab("kernel", "tree"), "not exported", "lab kernel export")
        expect(s.lab("kernel", "export").returncode == 0, "not exported")
        commit(tree, "three")
        series = git(tree, "rev-parse", "series")
        for begin, end in ((["checkout", "-q", "base"], ["checkout", "-q", "series"]),
                           (["checkout", "-q", "--detach"], ["checkout", "-q", "series"]),
                           (["-c", "sequence.editor=echo break >", "rebase", "-i", "base"], ["rebase", "--abort"])):
            git(tree, *begin)
            for verb in ("tree", "export"):
                s.refused(s.lab("kernel", verb), str(tree), "run 'git" if "checkout" in begin else "--abort")
            git(tree, *end)
        expect(git(tree, "rev-parse", "series") == series, "the branch was moved")
        names = sorted(p.name for p in (s.project / "kernel-patches").glob("*.patch"))
        expect(names == ["0001-one.patch", "0002-two.patch"], f"the patches are now {names}")
        r = s.lab("kernel", "export")
        expect(r.returncode == 0 and "WARNING" not in r.stderr, f"not exported: {r.stderr}")
        expect((s.project / "kernel-patches/0003-three.patch").exists(), "the commit was not exported")
        git(tree, "commit", "-q", "--allow-empty", "-m", "nothing")
        s.refused(s.lab("kernel", "export"), "4 commits, of which 3 can be patches")
        git(tree, "reset", "-q", "--hard", "HEAD^")
        commit(tree, "four")
        (s.project / "kernel-patches/0004-pulled.patch").write_text("of somebody else\n")
        s.refused(s.lab("kernel", "export"), "never had", "0004-pulled.patch", "lab kernel discard")
        expect((s.project / "kernel-patches/0004-pulled.patch").exists(), "somebody else's patch is gone")


UNPACK = """
import sys
sys.path.insert(0, sys.argv[1])
from lablib import kernel
kernel.version_of = lambda _: "1"
try:
    kernel.unpack(None)
except kernel.LabError as e:
    print(e)
"""


@test(kernels=(), image=False)
def a_kernel_tree_of_somebody_else(ctx):
    """Which KHO_LINUX names: the lab does not put its own there."""
    with Scratch() as s:
        own = small_tree(s).rename(s.dir / "own")
        (own / ".git/lab-version").unlink()
        r = s.python(UNPACK, KHO_LINUX=str(own))
        expect(f"{own} is there and is not a kernel tree" in r.stdout, f"{r.stdout}{r.stderr}")
        expect((own / "Makefile").exists(), "the tree is gone")


@test(kernels=(), image=False)
def an_export_from_another_source(ctx):
    """From a version that stands in for the one tested, which BASE forgets: it is said."""
    with Scratch() as s:
        tree, tested = small_tree(s), kernel.recorded_version()
        expect(s.lab("kernel", "tree").returncode == 0, "no tree")
        commit(tree, "one")
        (tree / ".git/lab-version").write_text("7.3.0-0\n")
        r = s.lab("kernel", "export")
        expect(r.returncode == 0 and re.search(f"WARNING: .* 7.3.0-0, .* tested with {re.escape(tested)}", r.stderr),
               r.stderr)
        base = (s.project / "kernel-patches/BASE").read_text()
        expect(base == f"{kernel.PACKAGE} 7.3.0-0\n", f"BASE is {base}")


BUILDS = """
import sys
sys.path.insert(0, sys.argv[1])
from lablib import kernel
made = []
def compile_kernel(src, config, frags, release, out):
    made.append(src)
    out.mkdir(parents=True)
kernel.compile_kernel = compile_kernel
def build(**kw):
    before = len(made)
    kernel.build(**kw)
    print(len(made) - before, end=" ")
tree = kernel.tree()
build(); build()
build(as_is=True); build(as_is=True)
for text in "12":       # of a file that git does not know
    (tree / "new.c").write_text(text)
    build(as_is=True)
(tree / "Makefile").write_text("edited")
kernel.warn_if_edited.cache_clear()
build(as_is=True); build()
own, kernel.compiler = kernel.compiler, lambda: "another"
build(as_is=True)
kernel.compiler = own
kernel.git("checkout", "Makefile")
kernel.warn_if_edited.cache_clear()
build(); build(unpatched=True)
"""


@test(kernels=(), image=False)
def a_kernel_is_built_from_what_it_says(ctx):
    """Not from the tree as it was before, whatever has changed in it; what is not built is said."""
    with Scratch() as s:
        tree = small_tree(s)
        r = s.python(BUILDS)
        expect(r.stdout.split() == [*"10101110101"], f"builds: {r.stdout}{r.stderr}")
        expect(r.stderr.count("WARNING") == 1 and "uncommitted changes" in r.stderr, f"no warning: {r.stderr}")
        s.refused(s.lab("run", "--as-is", KHO_LINUX="/nowhere/linux"), "/nowhere/linux", "lab kernel tree")
        beside = s.cache / "linux-base"
        shutil.rmtree(tree)
        small_tree(s)
        commit(tree, "another-source")
        (beside / "Makefile").unlink()
        code = BUILDS.split("made = ")[0] + "print(kernel.work_tree('-base', at_base=True))"
        for what in ("the unpatched tree is of another source", "a file of the unpatched tree is gone"):
            s.python(code)
            expect((beside / "Makefile").exists() and (beside / "another-source").exists(), what)
            (beside / "Makefile").unlink()


@test(kernels=(), image=False)
def a_configuration_that_lacks_something(ctx):
    """Found before an hour of building: the options that make a guest of the lab."""
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=cache_dir()) as tmp:
        config = Path(tmp) / "lacking.config"
        text = "".join(f.read_text() for f in kernel.fragments("minimal"))
        config.write_text(text.replace("CONFIG_NETWORK_FILESYSTEMS=y", ""))
        with kernel.tree_lock():
            kernel.prepare()
            subprocess.run(["make", "-s", f"O={tmp}", "allnoconfig"], cwd=kernel.tree(), check=True,
                           env={**os.environ, "KCONFIG_ALLCONFIG": str(config)}, capture_output=True)
        try:
            kernel.check_config(Path(tmp) / ".config", [config])
            raise AssertionError("a configuration without 9P_FS was taken")
        except LabError as e:
            expect(re.search(r"lacks what the lab needs: CONFIG_9P_FS.*tests/lab/config/", str(e)), str(e))


@test(kernels=(), image=False)
def unknown_names(ctx):
    """Before anything is fetched or built, for which there would be no space."""
    with Scratch() as s:
        for words, error in (("kernel build --config huge", "no kernel configuration named huge"),
                             ("check no-such-test", "no test named no-such-test"),
                             ("check --list dma", "takes no names"),
                             ("check-long no-such-part", "no part named no-such-part"),
                             ("bench no-such-figure", "no figure named no-such-figure"),
                             ("run --machine bogus", "no profile named bogus; there are noiommu"),
                             ("run --device bogus", "no device named bogus; there are e1000e"),
                             ("run --qemu 9", "no QEMU 9; there are 7.2"),
                             ("loop 3 --kernel huge", "no kernel configuration named huge"),
                             ("loop 3 --next huge", "no kernel configuration named huge"),
                             ("kernel export", "there is no kernel tree"),
                             ("kernel discard", "there is no kernel tree"),
                             ("kernel build --as-is --unpatched", "give one"),
                             ("kernel tree --release=-b", "takes no options")):
            s.refused(s.lab(*words.split(), KHO_LAB_NEED_GIB="1000000"), error)
        s.refused(s.lab("kernel", "build", KHO_LAB_NEED_GIB="much"), "KHO_LAB_NEED_GIB is much")
        for option, value, error in (("--memory", "lots", "lots is not a size like 512M or 4G"),
                                     ("--timeout", "-3", "-3 is not a number of seconds"),
                                     ("--timeout", "inf", "inf is not a number of seconds"),
                                     ("--cpus", "x", "x is not a number from 1 on")):
            r = s.lab("run", option, value, KHO_LAB_NEED_GIB="1000000")
            expect(r.returncode == 2 and r.stderr.count("error: ") == 1 and error in r.stderr, f"{option}: {r.stderr}")


@test(kernels=(), image=False)
def packets_to_a_nic_that_is_not_counted(ctx):
    """Before anything is built: what it wrote to memory would always be 0."""
    with Scratch() as s:
        for devices in ((), ("nvme",), ("virtio-net", "e1000e")):
            words = [w for d in devices for w in ("--device", d)]
            # Should it go on to build, it finds no space.
            for verb in (("run",), ("loop", "2", "--next", "debug")):
                s.refused(s.lab(*verb, "--send", "5", *words, KHO_LAB_NEED_GIB="1000000"),
                          "--send needs a NIC", "or igb")


COMMANDS = """
import sys
sys.path.insert(0, sys.argv[1])
from lablib import cli
for words in ("loop 2 --init bare -- make -j 3", "loop --init bare 2 -- make -j 3", "run -- make -j 3"):
    print(*cli.arguments(words.split()).command)
cli.arguments(["cache", "--", "make"])
"""


@test(kernels=(), image=False)
def a_command_is_what_follows_two_dashes(ctx):
    """Whatever is before them; where a verb takes none it is refused."""
    with Scratch() as s:
        r = s.python(COMMANDS)
        expect(r.stdout == "make -j 3\n" * 3 and r.returncode == 2 and "cache takes no COMMAND" in r.stderr,
               f"{r.stdout}{r.stderr}")


@test()
def a_guest_that_never_comes_up(ctx):
    """A hang ends by a timeout that shows the last lines and where the logs are."""
    with VM(ctx.kernel(), full_image(), name=ctx.name, init="bare", append="init=/bin/cat") as vm:
        try:
            vm.ready(timeout=25)
            raise AssertionError("a guest without an agent was taken as ready")
        except LabError as e:
            text = str(e)
    expect("did not answer within 25 s" in text, text)
    expect(re.search(r"Run /bin/cat as init process", text), f"no last lines: {text}")
    expect(str(vm.dir) in text and (vm.dir / "console.log").stat().st_size, "no place of the logs")
    expect(not (vm.dir / "disk.qcow2").exists() and vm.proc.poll() is not None, "the guest lives on")
