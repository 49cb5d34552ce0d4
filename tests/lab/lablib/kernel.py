# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel: Debian's source, our series on it as commits, cached builds.

The tree lives in the cache and is a git repository: the branch `base` is the
source as Debian ships it, `series` is base plus one commit per patch of
kernel-patches/. Whoever works on the kernel edits commits on `series` there and
`lab kernel export` writes them back. A build never touches commits that were
not exported: it refuses, and says what to do. If it is there already, it warns.

The build folders (build-CONFIG) lie inside of the tree, so that the compiler
sees relative paths only and ccache finds its objects whatever the cache's path.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .apt import Apt
from .common import (LAB, PROJECT, LabError, building, cache_dir, changes, digest, forget_half_done,
                     if_unlocked, last_lines, lock, need_program, need_space, note, run, say, step)

PACKAGE = "linux-source-7.3"
PATCHES = PROJECT / "kernel-patches"
CONFIGS = LAB / "config"
GIT = ["git", "-c", "user.name=khod maintainers", "-c", "user.email=maintainers@khod.invalid",
       "-c", "gc.auto=0", "-c", "core.looseCompression=0", "-c", "commit.gpgSign=false"]

# Without these a guest of the lab does not come up, or no kexec carries anything.
REQUIRED = ("KEXEC_FILE", "KEXEC_HANDOVER", "LIVEUPDATE", "LIVEUPDATE_MEMFD", "RELOCATABLE",
            "VIRTIO_BLK", "EXT4_FS", "DEVTMPFS", "SERIAL_8250_CONSOLE", "VIRTIO_CONSOLE",
            "NET_9P_VIRTIO", "9P_FS", "PCI_MMCONFIG", "COMPACTION", "PROC_PAGE_MONITOR")


def tree() -> Path:
    return Path(os.environ.get("KHO_LINUX") or cache_dir() / "linux")


def need_tree() -> None:
    if not (tree() / ".git").exists():
        raise LabError(f"there is no kernel tree {tree()} yet; 'lab kernel tree' makes it")


def tree_lock_file() -> Path:
    return tree().with_name(tree().name + ".lock")


def tree_lock():
    """One at a time in a tree; developers with trees of their own do not wait for each other."""
    return lock(tree_lock_file(), f"the kernel tree {tree()}")


def patches() -> list:
    return sorted(PATCHES.glob("[0-9][0-9][0-9][0-9]-*.patch"), key=lambda p: p.name)


def patches_of(names) -> str:
    return digest(*names) if names else "unpatched"


def recorded_version() -> str:
    path = PATCHES / "BASE"
    return path.read_text().split()[-1] if path.exists() else ""


def source_version() -> str:
    """The version that is built: the recorded one, or what was taken when that was gone."""
    try:
        return instead().read_text().strip()
    except OSError:
        return recorded_version()


def instead() -> Path:
    """A note in the cache of which version stands in for the recorded one."""
    return cache_dir() / "packages" / f"instead-of-{recorded_version()}"


# --- the source -------------------------------------------------------------

def fetch() -> Path:
    """The source package: the recorded version, or the newest 7.3 with a warning."""
    store = cache_dir() / "packages"
    store.mkdir(exist_ok=True)
    want = source_version()
    deb = store / f"{PACKAGE}_{want.replace(':', '%3a')}_all.deb"
    if want and deb.exists():
        return deb
    need_space(store, 1, "the kernel's source package")
    apt = Apt()
    unread = apt.update()
    have = apt.versions(PACKAGE)
    if want not in have and unread:
        raise LabError(f"Debian's mirror has no {PACKAGE} {want} in what it gave, and could not give "
                       f"{', '.join(unread)}; try again later")
    if not have:
        raise LabError(f"Debian's mirror has no {PACKAGE} in any of {', '.join(apt.suites)}")
    tested = recorded_version()
    take = next((v for v in (want, tested) if v in have), have[0])
    if take not in (want, tested):
        say(f"WARNING: {PACKAGE} {tested}, with which the series was tested, is gone from the "
            f"mirror; taking {take}")
    deb = apt.download(PACKAGE, take, store)
    if take != want:
        note(instead(), take + "\n")
    return deb


def git(*args, cwd=None, **kw) -> str:
    return run([*GIT, *args], cwd=cwd or tree(), **kw).rstrip()


def version_of(deb: Path) -> str:
    return run(["dpkg-deb", "--field", deb, "Version"]).strip()


def unpack(deb: Path) -> None:
    """The branch `base`: one commit with the source as Debian ships it."""
    dest, version = tree(), version_of(deb)
    stamp = dest / ".git" / "lab-version"
    if stamp.exists():
        if stamp.read_text().strip() == version:
            return
        raise LabError(f"the kernel tree {dest} holds {stamp.read_text().strip()}, the series wants "
                       f"{version}; export what you need from it and remove it")
    if dest.exists():
        raise LabError(f"{dest} is there and is not a kernel tree that the lab has unpacked; remove it, or set "
                       "KHO_LINUX to another folder")
    need_space(dest.parent, 12, "the kernel tree with its builds")
    with step(f"unpacking {version}"), building(dest) as tmp:
        tar = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
        run(["tar", "-x", "-C", tmp, "--strip-components=3", "--wildcards", "./usr/src/*.tar.xz"],
            stdin=tar.stdout, what=f"unpacking {deb}")
        tar.wait()
        inner = next(tmp.glob("*.tar.xz"))
        run(["tar", "-xJf", inner, "-C", tmp, "--strip-components=1"], what=f"unpacking {inner}")
        inner.unlink()
        run([*GIT, "init", "-q", "-b", "base"], cwd=tmp)
        for key, value in (("gc.auto", "0"), ("core.looseCompression", "0"),
                           ("user.name", "khod maintainers"),
                           ("user.email", "maintainers@khod.invalid")):
            run(["git", "config", key, value], cwd=tmp)
        run([*GIT, "add", "-A", "-f", "."], cwd=tmp)
        run([*GIT, "commit", "-q", "-m", f"Linux, {PACKAGE} {version}"], cwd=tmp)
        with open(tmp / ".git/info/exclude", "a", encoding="ascii") as f:
            f.write("/build-*/\n")
        (tmp / ".git/lab-version").write_text(version + "\n")


# --- the series ---------------------------------------------------------------

def applied_file() -> Path:
    return tree() / ".git" / "lab-applied"


def applied() -> list:
    """What this tool put on `series`: (digest of the patch, commit) in order."""
    try:
        return [tuple(line.split()) for line in applied_file().read_text().splitlines()]
    except OSError:
        return []


def refs() -> dict:
    """The branches: name -> commit."""
    out = git("for-each-ref", "--format=%(refname:short) %(objectname)", "refs/heads")
    return dict(line.split() for line in out.splitlines())


def elsewhere() -> str:
    """What is checked out instead of `series` (`base` in a new tree), with what to do."""
    folder = Path(git("rev-parse", "--absolute-git-dir"))
    for name, command in (("rebase-merge", "rebase"), ("rebase-apply/applying", "am"),
                          ("rebase-apply", "rebase")):
        if (folder / name).exists():
            return (f"is in the middle of a 'git {command}'; end it with 'git {command} --continue' "
                    f"or 'git {command} --abort'")
    head = (folder / "HEAD").read_text().strip().removeprefix("ref: refs/heads/")
    want = "series" if "series" in refs() else "base"
    return "" if head == want else f"has {head} checked out, not {want}; run 'git checkout {want}' there"


def edited() -> str:
    """Why the tree must not be touched: commits or changes that were not exported."""
    if git("status", "--porcelain", "--untracked-files=no"):
        return "uncommitted changes"
    known, own = refs(), applied()
    last = own[-1][1] if own else known["base"]
    return "" if known.get("series", last) == last else "commits that were not exported"


@functools.cache
def warn_if_edited() -> None:
    """A build from kernel-patches/ is there already: say if the tree is not what it was made from.

    Once in a process, as it takes a moment. Nothing is said while somebody else works in the
    tree, who may be applying patches.
    """
    if not (tree() / ".git/lab-version").exists():
        return
    with if_unlocked(tree_lock_file()) as free:
        why = free and (elsewhere() or edited() and f"has {edited()}")
    if why:
        say(f"WARNING: the kernel tree {tree()} {why}; this kernel is built from kernel-patches/, "
            "without what is in the tree (--as-is builds it as it stands)")


def apply_series() -> None:
    """Bring `series` to kernel-patches/; files of unchanged patches stay untouched."""
    want = [(digest(p), p) for p in patches()]
    have = applied()
    other = elsewhere()
    if other:
        raise LabError(f"the kernel tree {tree()} {other}")
    why = edited()
    if why:
        raise LabError(f"the kernel tree {tree()} has {why}; run 'lab kernel export' to write them "
                       "to kernel-patches/, 'lab kernel build --as-is' to build the tree as it "
                       "stands, or 'lab kernel discard' to drop them")
    if "series" not in refs():
        git("checkout", "-q", "-b", "series", "base")
        have = []
    same = 0
    while same < min(len(have), len(want)) and have[same][0] == want[same][0]:
        same += 1
    if same == len(have) == len(want) and git("rev-parse", "HEAD") == \
            (have[-1][1] if have else git("rev-parse", "base")):
        return
    git("reset", "-q", "--hard", have[same - 1][1] if same else "base")
    done = have[:same]
    say(f"applying {len(want) - same} of {len(want)} patches")
    try:
        for key, patch in want[same:]:
            git("am", "-q", "--3way", "--keep-cr", str(patch), what=f"applying {patch.name}")
            done.append((key, git("rev-parse", "HEAD")))
    except LabError as e:
        raise LabError(f"the patch {patch.name} does not apply to {PACKAGE} "
                       f"{(tree() / '.git/lab-version').read_text().strip()}; correct it in kernel-patches/, or take "
                       f"it out\n{e}") from e
    finally:
        if len(done) < len(want):
            subprocess.run(["git", "am", "--abort"], cwd=tree(), check=False, capture_output=True)
        write_applied(done)


def write_applied(rows) -> None:
    applied_file().write_text("".join(f"{k} {c}\n" for k, c in rows))


def export() -> None:
    """Write the commits base..series to kernel-patches/, numbered, with the cover letter."""
    need_tree()
    other = elsewhere()
    if other or "series" not in refs():
        raise LabError(f"the kernel tree {tree()} {other or 'has no series yet'}; nothing was exported")
    if git("status", "--porcelain", "--untracked-files=no"):
        raise LabError(f"the kernel tree {tree()} has uncommitted changes; commit them first")
    if not edited() and [k for k, _ in applied()] != [digest(p) for p in patches()]:
        raise LabError(f"the kernel tree {tree()} holds {len(applied())} patches that were applied there, "
                       f"and nothing new; kernel-patches/ has {len(patches())}, not the same ones: "
                       "nothing was exported; 'lab kernel tree' applies them")
    known = {k for k, _ in applied()}
    strange = [p.name for p in patches() if digest(p) not in known]
    if strange:
        raise LabError(f"kernel-patches/ has what the kernel tree {tree()} never had, and would lose it: "
                       f"{', '.join(strange[:3])}; nothing was exported; keep your commits on a branch of another "
                       "name there, run 'lab kernel discard', and put them on the series again")
    commits = git("rev-list", "--reverse", "base..series").split()
    cover = PATCHES / "0000-cover-letter.txt"
    text = cover_letter(cover.read_text() if cover.exists() else "", len(commits))
    with tempfile.TemporaryDirectory(prefix="export-", dir=PATCHES) as tmp:
        git("format-patch", "--quiet", "--no-signature", "--zero-commit", "--no-base",
            "--abbrev=9",     # whatever else the repository holds
            "--subject-prefix=PATCH 7.3", "-N", "--output-directory", tmp, "base..series")
        files = sorted(p for p in Path(tmp).iterdir() if b"\ndiff --git " in p.read_bytes())
        if len(files) != len(commits):
            raise LabError(f"the series in {tree()} has {len(commits)} commits, of which {len(files)} can be patches, "
                           "as merges and empty ones cannot; nothing was exported; 'git rebase --no-keep-empty "
                           "--force-rebase base' leaves them out")
        for old in patches():
            old.unlink()
        for new in files:
            new.rename(PATCHES / new.name)
    write_applied([(digest(p), c) for p, c in zip(patches(), commits)])
    version, tested = (tree() / ".git/lab-version").read_text().strip(), recorded_version()
    if tested and version != tested:
        say(f"WARNING: the tree is {PACKAGE} {version}, and the series was tested with {tested}; "
            "kernel-patches/BASE names the former now")
    (PATCHES / "BASE").write_text(f"{PACKAGE} {version}\n")
    cover.write_text(text)
    say(f"{len(commits)} patches written to kernel-patches/")


def cover_letter(old: str, count: int) -> str:
    """The text of @old with the list and the statistics of the series as it is now."""
    text = old or "Subject: [PATCH 7.3 0/0] \n\n"
    text = re.sub(r"\[PATCH 7.3 0/\d+\]", f"[PATCH 7.3 0/{count}]", text, count=1)
    stat = git("diff", "--stat=78", "base..series")
    log = git("log", "--reverse", "--format=  %s", "base..series")
    return text.split("\n-- \n")[0].rstrip() + f"\n\n-- \n{log}\n\n{stat}\n"


def discard() -> None:
    """Drop what was not exported and go back to kernel-patches/."""
    need_tree()
    for command in ("rebase", "am"):
        subprocess.run(["git", command, "--quit"], cwd=tree(), check=False, capture_output=True)
    git("checkout", "-q", "-f", "-B", "series", "base")
    write_applied([])
    apply_series()


def prepare() -> None:
    """Source unpacked and series applied."""
    need_program("git")
    if not (tree() / ".git/lab-version").exists() or \
            (tree() / ".git/lab-version").read_text().strip() != source_version():
        unpack(fetch())
    apply_series()


# --- the build ------------------------------------------------------------------

BUILD_ENV = {"KBUILD_BUILD_USER": "lab", "KBUILD_BUILD_HOST": "lab",
             "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 2026"}

def configs() -> list:
    """The names of the configurations."""
    parts = ("common", "series", "each")
    return sorted(p.stem for p in CONFIGS.glob("*.config") if p.stem not in parts and not p.stem.endswith("-series"))


def fragments(config: str, unpatched=False) -> list:
    path = CONFIGS / f"{config}.config"
    if not path.exists():
        raise LabError(f"no kernel configuration named {config}; there are {', '.join(configs())}, "
                       f"or put tests/lab/config/{config}.config there")
    if unpatched:
        return [CONFIGS / "common.config", path]
    own = CONFIGS / f"{config}-series.config"       # what the series adds to this one alone
    return [CONFIGS / "common.config", CONFIGS / "series.config", path,
            *([own] if own.exists() else [])]


def check_config(dotconfig: Path, frags: list) -> None:
    """Every option asked for must have come out, and the lab's own must be there."""
    text = dotconfig.read_text()
    have = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.M))
    wanted = {}
    for f in frags:
        wanted.update(re.findall(r"^(CONFIG_\w+)=(.*)$", f.read_text(), re.M))
    lost = [f"{k}={v} (is {have.get(k, 'n')})" for k, v in wanted.items()
            if have.get(k, "n") != v]
    missing = [f"CONFIG_{o}" for o in REQUIRED if have.get(f"CONFIG_{o}") not in ("y", "m")]
    if missing:
        raise LabError("the kernel configuration lacks what the lab needs: " + ", ".join(missing)
                       + "; add it, and what it depends on, to one of these in tests/lab/config/: "
                       + ", ".join(f.name for f in frags))
    if lost:
        raise LabError("the kernel configuration did not take: " + ", ".join(lost)
                       + "; a dependency is missing in tests/lab/config/")


def compiler() -> str:
    return run(["gcc", "--version"]).splitlines()[0]


def make_flags(config: str, release: str) -> list:
    """What make is told that a kernel depends on; a part of its key, as BUILD_ENV is."""
    return [f"O=build-{config}", f"LOCALVERSION=-{config}{release}"]


def build(config: str = "minimal", *, as_is=False, unpatched=False, release="") -> Path:
    """Build a kernel; the folder returned has bzImage, config, System.map and modules.tar.

    @release is appended to the version, so that two builds can be told apart.
    """
    frags = fragments(config, unpatched)
    names = [] if unpatched else patches()
    for tool in ("gcc", "make", "flex", "bison", "bc"):
        need_program(tool)
    how = [compiler(), *make_flags(config, release), BUILD_ENV, *frags]
    store = cache_dir() / "kernels"
    out = store / f"{config}-{digest(source_version(), patches_of(names), *how)}"
    if as_is:
        need_tree()
    if out.exists() and not as_is:
        os.utime(out)
        if not unpatched:
            warn_if_edited()
        return out
    with tree_lock():
        if as_is:
            out = store / f"{config}-as-is-{digest(git('rev-parse', 'HEAD'), changes(GIT, tree()), *how)}"
        if out.exists():
            return out
        if not as_is:
            prepare()
        compile_kernel(work_tree("-base", at_base=True) if unpatched else tree(), config, frags, release, out)
    prune(store, keep=24)
    return out


def work_tree(suffix: str, at_base=False) -> Path:
    """A work tree of its own beside the tree, named by @suffix, made again if it belongs to another tree.

    At `base` when it is new; with @at_base always, with all of its files.
    """
    path = tree().with_name(tree().name + suffix)
    common = ("rev-parse", "--path-format=absolute", "--git-common-dir")
    try:
        own = git(*common) == git(*common, cwd=path)
    except LabError:
        own = False
    if not own:
        shutil.rmtree(path, ignore_errors=True)
        git("worktree", "prune")
        git("worktree", "add", "-q", "--detach", str(path), "base")
    elif at_base:
        git("checkout", "-q", "-f", "--detach", "base", cwd=path)
    return path


def compile_kernel(src: Path, config: str, frags: list, release: str, out: Path) -> None:
    need_space(src, 4, f"building the {config} kernel")
    objs = src / f"build-{config}"
    objs.mkdir(exist_ok=True)
    log = objs / "lab.log"
    log.write_text("")
    cc = "ccache gcc" if shutil.which("ccache") else "gcc"
    env = {"CCACHE_DIR": str(cache_dir() / "ccache"), "CCACHE_MAXSIZE": "6G", **BUILD_ENV}
    make = ["make", f"-j{os.cpu_count()}", f"CC={cc}", *make_flags(config, release)]
    allconfig = objs / "lab.config"
    allconfig.write_text("".join(f.read_text() + "\n" for f in frags))
    run([*make, "allnoconfig"], cwd=src, env={**env, "KCONFIG_ALLCONFIG": str(allconfig)}, log=log,
        what="configuring the kernel")
    check_config(objs / ".config", frags)
    modular = "CONFIG_MODULES=y" in (objs / ".config").read_text()
    with step(f"building the {config} kernel (log: {log})"):
        try:
            run([*make, "bzImage", *(["modules"] if modular else [])], cwd=src, env=env, log=log,
                what=f"building the {config} kernel")
        except LabError as e:
            errors = [x for x in last_lines(log, 4000).splitlines() if re.search(r"\berror\b|\*\*\*", x)]
            raise LabError(f"building the {config} kernel failed: "
                           + ("; ".join(errors[:3]) or str(e)) + f"\nthe whole log is {log}") from e
    with building(out) as tmp:
        shutil.copy(objs / "arch/x86/boot/bzImage", tmp / "bzImage")
        shutil.copy(objs / "System.map", tmp / "System.map")
        shutil.copy(objs / ".config", tmp / "config")
        (tmp / "release").write_text((objs / "include/config/kernel.release").read_text())
        if modular:
            run([*make, "modules_install", f"INSTALL_MOD_PATH={tmp}/mods"], cwd=src, env=env, log=log,
                what="installing the modules")
            run(["tar", "-C", tmp / "mods", "-cf", tmp / "modules.tar", "."])
            shutil.rmtree(tmp / "mods")


def prune(store: Path, keep: int) -> None:
    """Builds are small, but not for ever: the least recently used go."""
    forget_half_done(store, "*")
    builds = sorted((p for p in store.iterdir() if not p.name.endswith(".new")),
                    key=lambda p: p.stat().st_mtime)
    for old in builds[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def headers() -> None:
    """Copy the series' uAPI headers that Debian 12 lacks into kho/uapi/."""
    prepare()
    dest = PROJECT / "kho" / "uapi" / "linux"
    dest.mkdir(parents=True, exist_ok=True)
    for name in ("liveupdate.h", "iommufd.h", "vfio.h"):
        text = (tree() / "include/uapi/linux" / name).read_text()
        # What scripts/headers_install.sh does to these files.
        text = re.sub(r"\b__user\b\s?", "", text).replace("#include <linux/compiler.h>\n", "")
        (dest / name).write_text(text)
        say(f"kho/uapi/linux/{name}")
