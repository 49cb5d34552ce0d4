# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's root file system, and what is built against its libraries.

    base("run")    Debian with systemd >= 262: what a guest boots
    base("build")  the same with compilers: what our package and upstream's
                   selftests are built in
    package()      this project as a .deb, built in the build root
    selftests()    upstream's liveupdate, iommu, vfio and kho selftests
    image()        an ext4 image of the run root with all of these

Everything lands in the cache under a key of what it was made from, and is never
changed afterwards.

All of it works without privileges: mmdebstrap's unshare mode makes the roots,
and whatever needs root over their files (unpacking, chrooting, mke2fs,
removing) runs in a user namespace through privileged(). That needs
unprivileged user namespaces and a range for the user in /etc/subuid and
/etc/subgid, as Debian's useradd sets up. Run as root, only a mount and a PID
namespace are made.
"""

import contextlib
import hashlib
import os
import re
import shlex
import stat
import subprocess
import tempfile
import time
from pathlib import Path

from .apt import KEYRING, Apt, mirror
from .common import (LAB, PROJECT, LabError, cache_dir, digest, last_lines, lock, need_program,
                     need_space, run, say, step)

SYSTEMD_AT_LEAST = "262~"
GUEST = LAB / "guest"
RUN_PACKAGES = ("systemd", "systemd-sysv", "dbus", "udev", "kexec-tools", "qemu-guest-agent",
                "kmod", "procps", "iproute2", "pciutils", "strace", "util-linux", "libprotobuf-c1",
                "libarchive13t64", "libkmod2", "libkeyutils1", "libcap2", "libssl3t64",
                "libuuid1")
BUILD_PACKAGES = ("gcc", "libc6-dev", "make", "meson", "ninja-build", "pkgconf",
                  "protobuf-c-compiler", "protobuf-compiler", "libprotobuf-c-dev", "libsystemd-dev",
                  "libarchive-dev", "libkmod-dev",
                  "libcap-dev", "libkeyutils-dev", "libssl-dev", "uuid-dev", "linux-libc-dev",
                  "dpkg-dev", "rsync")
PACKAGES = {"run": RUN_PACKAGES, "build": RUN_PACKAGES + BUILD_PACKAGES}
DPKG_OPTIONS = ("path-exclude=/usr/share/man/*", "path-exclude=/usr/share/locale/*",
                "path-exclude=/usr/share/doc/*", "path-include=/usr/share/doc/*/copyright",
                "path-exclude=/usr/share/info/*", "path-exclude=/usr/share/lintian/*",
                "force-unsafe-io")
APT_OPTIONS = ('Acquire::Check-Valid-Until "false"', 'Acquire::Languages "none"',
               'Acquire::Retries "2"')
SOURCES = ("kho", "daemon", "proto", "systemd", "examples", "docs", "tests", "meson.build",
           "meson_options.txt", "meson.options", ":(exclude)tests/lab")
# The clone may be another user's than root's.
GIT = ("git", "-c", f"safe.directory={PROJECT}", "-C", PROJECT)
MKE2FS = ("mke2fs", "-q", "-t", "ext4", "-L", "lab-root", "-m", "0", "-J", "size=16",
          "-E", "lazy_itable_init=1,root_owner=0:0")
IMAGE_SIZE = "2G"
KEEP_IMAGES = 4
IN_USE = 300        # seconds: a guest opens its image soon after it was asked for, and keeps it open


def privileged(cmd, *, isolate=False) -> list:
    """@cmd (a list) with root's rights over the files of the roots.

    As root that is @cmd itself, or with @isolate in a mount and PID namespace
    of its own. As anybody else it is a user namespace in which the caller is
    root and the ids of /etc/subuid are the other users.
    """
    cmd = [str(c) for c in cmd]
    space = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    if os.geteuid() == 0:
        return space + cmd if isolate else cmd
    return space + ["--user", "--map-auto", "--map-root-user"] + cmd


def check_privileges() -> None:
    """One sentence, instead of a failure in the middle, if namespaces are not to be had."""
    probe = subprocess.run(privileged(["true"], isolate=True), stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if probe.returncode == 0:
        return
    reason = probe.stderr.decode(errors="replace").strip()
    if os.geteuid() == 0:
        raise LabError(f"root may not make a mount and a PID namespace here ({reason}); "
                       "run the lab outside of this container, or give it CAP_SYS_ADMIN")
    raise LabError(f"unprivileged user namespaces do not work here ({reason}); allow them "
                   "(sysctl user.max_user_namespaces, a range for the user in /etc/subuid and "
                   "/etc/subgid, the package uidmap), or run the lab as root")


ENTER = """set -eu
root=$1; shift
mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
mount -t tmpfs -o mode=755 dev "$root/dev"
for n in null zero full random urandom tty; do
	: >"$root/dev/$n"
	mount --bind "/dev/$n" "$root/dev/$n"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mount -t tmpfs -o mode=755 run "$root/run"
while [ "$1" != -- ]; do
	mkdir -p "$root/tmp/$3"
	mount --bind "$2" "$root/tmp/$3"
	if [ "$1" = ro ]; then mount -o remount,bind,ro "$root/tmp/$3"; fi
	shift 3
done
shift
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \\
	LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"
"""


def inside(root: Path, cmd, *, ro=None, rw=None) -> list:
    """@cmd in a chroot in @root; the folders in @ro and @rw (name: path) appear as /tmp/<name>.

    /tmp and /run are empty and private to the command, /dev holds the usual nodes.
    """
    binds = []
    for mode, folders in (("ro", ro or {}), ("rw", rw or {})):
        for name, path in folders.items():
            binds += [mode, path, name]
    return privileged(["sh", "-c", ENTER, "lab", root, *binds, "--", *cmd], isolate=True)


def remove(path: Path) -> None:
    """Remove a folder that may hold files of the namespace's users."""
    if path.exists():
        run(privileged(["rm", "-rf", "--one-file-system", path]), what=f"removing {path}")


@contextlib.contextmanager
def making(target: Path):
    """A new folder that becomes @target when all went well; like common.building for roots."""
    tmp = target.with_name(target.name + ".new")
    remove(tmp)
    tmp.mkdir(parents=True)
    try:
        yield tmp
    except BaseException:
        remove(tmp)
        raise
    remove(target)
    tmp.rename(target)


def log_for(name: str) -> Path:
    """An empty log; it stays when the step fails."""
    path = cache_dir() / "log" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def base(role: str) -> Path:
    """The root file system for @role, "run" or "build"; made if the cache has none.

    The folder `root` of what is returned belongs to the namespace's root: touch
    it through inside() or privileged() only, and never change it. `packages`
    lists the versions in it, `suite` the Debian suite they come from.
    """
    key = digest(role, *PACKAGES[role], *DPKG_OPTIONS, *APT_OPTIONS, SYSTEMD_AT_LEAST, "format 1")
    target = cache_dir() / "rootfs" / f"{role}-{key}"
    with lock(cache_dir() / "rootfs" / f"{role}.lock", f"the {role} root file system"):
        if not target.exists():
            _make_base(role, target)
    return target


def _make_base(role: str, target: Path) -> None:
    need_program("mmdebstrap")
    check_privileges()
    need_space(cache_dir(), 3, "a Debian root file system")
    need_space(Path(tempfile.gettempdir()), 1, "mmdebstrap", "TMPDIR")
    apt = Apt()
    apt.update()
    suite = apt.suite_with("systemd", SYSTEMD_AT_LEAST)
    uri = mirror()
    log = log_for(f"mmdebstrap-{role}")
    with step(f"making the {role} root file system from Debian {suite}"), making(target) as tmp:
        tar = tmp / "root.tar"
        cmd = ["mmdebstrap", "--mode=root" if os.geteuid() == 0 else "--mode=unshare",
               "--variant=minbase", "--format=tar", "--include=" + ",".join(PACKAGES[role]),
               *(f"--dpkgopt={o}" for o in DPKG_OPTIONS), *(f"--aptopt={o}" for o in APT_OPTIONS),
               suite, "-", f"deb [signed-by={KEYRING}] {uri} {suite} main"]
        try:
            _to_file(cmd, tar, log)
        except LabError as e:
            if re.search("No space left|enough free space|quota exceeded", log.read_text(errors="replace")):
                raise LabError(f"no space: mmdebstrap makes the {role} root file system in {tempfile.gettempdir()} "
                               f"and packs it into {tmp} (the whole log is {log}); remove something, or set TMPDIR "
                               "and KHO_CACHE to larger file systems") from e
            raise LabError(f"mmdebstrap could not make the {role} root file system from {suite} at "
                           f"{uri} (the whole log is {log}):\n{last_lines(log, 6)}\n"
                           "if packages were not found or did not match, the mirror has changed "
                           "meanwhile: try again") from e
        root = tmp / "root"
        root.mkdir()
        run(privileged(["tar", "-C", root, "--numeric-owner", "--xattrs",
                        "--exclude=./dev/*", "-xpf", tar]),
            log=log, what=f"unpacking the {role} root file system")
        tar.unlink()
        (tmp / "suite").write_text(suite + "\n", encoding="utf-8")
        (tmp / "packages").write_text(run(inside(root, ["dpkg-query", "--show"])), encoding="utf-8")


def _to_file(cmd, out: Path, log: Path) -> None:
    with open(log, "ab") as err, open(out, "wb") as f:
        err.write(f"$ {shlex.join(str(c) for c in cmd)}\n".encode())
        err.flush()
        done = subprocess.run(cmd, stdin=subprocess.DEVNULL, stdout=f, stderr=err, check=False)
        if done.returncode:
            raise LabError(cmd[0])


def tree_digest(paths, top: Path) -> str:
    """A content key of files: their names below @top, contents, execute bits, link targets."""
    h = hashlib.sha256()
    for p in sorted(paths):
        st = p.lstat()
        data = p.read_bytes() if p.is_file() else b""
        if stat.S_ISLNK(st.st_mode):
            data = os.readlink(p).encode() + b"\0" + data
        head = f"{p.relative_to(top)}\0{st.st_mode & 0o100:o}\0{len(data)}\0"
        h.update(head.encode() + data)
    return h.hexdigest()[:20]


def files_below(*folders: Path) -> list:
    """All files and links below @folders; a file stands for itself, what is absent for nothing."""
    found = []
    for folder in folders:
        if folder.is_dir() and not folder.is_symlink():
            found += [p for p in folder.rglob("*") if p.is_symlink() or p.is_file()]
        elif folder.exists():
            found.append(folder)
    return found


def source_files() -> list:
    """The project's own files that the package is made from, committed or not."""
    out = run([*GIT, "ls-files", "-z", "--cached", "--others", "--exclude-standard",
               "--", *SOURCES], what="listing the project's files")
    files = {PROJECT / f for f in out.split("\0") if f}
    return [f for f in files if f.is_symlink() or f.is_file()]


def version() -> str:
    """The package's version: meson's, and what git says of the commit."""
    text = (PROJECT / "meson.build").read_text(encoding="utf-8")
    found = re.search(r"^\s*version:\s*'([^']+)'", text, re.MULTILINE)
    if not found:
        raise LabError(f"{PROJECT}/meson.build names no version in project()")
    try:
        commit = run([*GIT, "describe", "--always", "--tags", "--dirty"]).strip()
    except LabError:
        return found[1]     # no commit yet
    return found[1] + "+" + re.sub(r"[^A-Za-z0-9.~]+", ".", commit)


def meson_options() -> list:
    """The options of the lab's build, as far as the project has them."""
    text = "".join((PROJECT / f).read_text(encoding="utf-8")
                   for f in ("meson.options", "meson_options.txt") if (PROJECT / f).exists())
    wanted = {"lab_tests": "true", "fault_points": "true", "unit_tests": "disabled",
              "fuzz": "disabled"}
    return [f"-D{k}={v}" for k, v in wanted.items() if re.search(rf"option\(\s*'{k}'", text)]


POSTINST = """#!/bin/sh
set -e
if [ "$1" = configure ]; then
	systemd-sysusers
fi
"""

# In the build root: /tmp/src the clone (read-only), /tmp/build meson's folder, /tmp/out the result.
BUILD_PACKAGE = """set -eu
if [ -e /tmp/build/build.ninja ]; then set -- --reconfigure "$@"; fi
meson setup --prefix=/usr --sysconfdir=/etc --localstatedir=/var --libdir=lib \\
	--buildtype=debugoptimized "$@" /tmp/build /tmp/src
ninja -C /tmp/build
DESTDIR=/tmp/out/khod meson install -C /tmp/build --no-rebuild
cd /tmp/out
mkdir -p debian
printf 'Source: khod\\n\\nPackage: khod\\nArchitecture: any\\nDescription: khod\\n' >debian/control
find khod -type f -exec sh -c '
	for f; do
		if [ "$(head -c 4 "$f" | od -An -tx1 | tr -d " ")" = 7f454c46 ]; then
			printf "%s\\n" "$f"
		fi
	done' sh {} + >elf
# What is linked statically or not at all has no dependencies.
xargs -r dpkg-shlibdeps --ignore-missing-info -Skhod -Tsubst <elf
"""


def package() -> Path:
    """This project as a .deb (package khod), built in the build root.

    Keyed by the contents of the sources. Meson's folder is kept beside, so that
    a changed file costs its own compilation only.
    """
    build = base("build")
    options = meson_options()
    key = digest(build.name, tree_digest(source_files(), PROJECT), *options, BUILD_PACKAGE,
                 POSTINST)
    target = cache_dir() / "package" / key
    with lock(cache_dir() / "package" / "lock", "the package"):
        found = list(target.glob("*.deb"))
        if found:
            return found[0]
        check_privileges()
        need_space(cache_dir(), 1, "building the package")
        log = log_for("package")
        work = cache_dir() / "package" / ("meson-" + digest(build.name, str(PROJECT), *options))
        with step("building the package"), making(target) as tmp:
            work.mkdir(exist_ok=True)
            run(inside(build / "root", ["sh", "-c", BUILD_PACKAGE, "lab", *options],
                       ro={"src": PROJECT}, rw={"build": work, "out": tmp}),
                log=log, what="building the package in the guest's build root")
            _pack(tmp, log)
        return next(target.glob("*.deb"))


def _pack(tmp: Path, log: Path) -> None:
    subst = tmp / "subst"
    depends = ""
    if subst.exists():
        found = re.search(r"^shlibs:Depends=(.*)$", subst.read_text(encoding="utf-8"), re.MULTILINE)
        depends = found[1] if found else ""
    arch = run(["dpkg", "--print-architecture"]).strip()
    control = tmp / "control"
    control.mkdir()
    (control / "control").write_text(
        f"Package: khod\nVersion: {version()}\nArchitecture: {arch}\nSection: admin\n"
        "Priority: optional\nMaintainer: the kho project <root@localhost>\n"
        + (f"Depends: {depends}\n" if depends else "") +
        "Description: kexec handover persistence service\n"
        " khod carries the file descriptors of workloads over a kexec.\n", encoding="utf-8")
    postinst = control / "postinst"
    postinst.write_text(POSTINST, encoding="utf-8")
    postinst.chmod(0o755)
    (control / "triggers").write_text("activate-noawait ldconfig\n", encoding="utf-8")
    name = f"khod_{version()}_{arch}.deb"
    run(privileged(["sh", "-ec", 'cd "$1"; mv control khod/DEBIAN; chmod 755 khod khod/DEBIAN; '
                    'dpkg-deb --root-owner-group --build khod "$2"; '
                    'rm -rf khod debian subst elf', "sh", tmp, name]),
        log=log, what="packing the .deb")


SUITES = ("liveupdate", "iommu", "vfio")

# /tmp/src the kernel tree (read-only), /tmp/out the result.
BUILD_SELFTESTS = """set -eu
mkdir /tmp/headers
make -s -j"$(nproc)" -C /tmp/src O=/tmp/headers headers
# Their makefiles also write beside their sources, and these include files of
# the whole tree by relative paths: links to all of it around a copy of them.
mkdir -p /tmp/tree/tools/testing
for f in /tmp/src/*; do
	[ "${f##*/}" = tools ] || ln -s "$f" /tmp/tree/
done
for f in /tmp/src/tools/*; do
	[ "${f##*/}" = testing ] || ln -s "$f" /tmp/tree/tools/
done
mkdir /tmp/tree/tools/testing/selftests
cd /tmp/src/tools/testing/selftests
cp -RL lib.mk kselftest*.h kselftest kho "$@" /tmp/tree/tools/testing/selftests/
# Thirty seconds a case are too few for an emulated machine.
sed -i '/define TEST_TIMEOUT_DEFAULT/s/30/600/' /tmp/tree/tools/testing/selftests/kselftest_harness.h
for suite in "$@"; do
	mkdir -p "/tmp/obj/$suite"
	make -j"$(nproc)" -C "/tmp/tree/tools/testing/selftests/$suite" OUTPUT="/tmp/obj/$suite" \\
		KHDR_INCLUDES="-isystem /tmp/headers/usr/include" \\
		INSTALL_PATH="/tmp/out/$suite" all install
done
# kho's and liveupdate's own /init, which kexec without any other program
for suite in kho liveupdate; do
	mkdir -p "/tmp/out/$suite"
	gcc -O2 -static -isystem /tmp/headers/usr/include \\
		-o "/tmp/out/$suite/init" "/tmp/src/tools/testing/selftests/$suite/init.c"
done
"""


def selftests(tree: Path) -> Path:
    """Upstream's selftests of the kernel tree @tree, as a folder for /usr/lib/kselftest.

    One folder a suite: liveupdate, iommu, vfio, and kho's init. Headers come
    from the tree itself (`make headers` into a folder of its own), so that
    neither a configuration nor a build of the kernel is needed.
    """
    tree = Path(tree).resolve()
    tests = tree / "tools/testing/selftests"
    if not (tests / "liveupdate").is_dir():
        raise LabError(f"{tree} is no kernel tree with tools/testing/selftests/liveupdate; "
                       "give the tree that 'lab kernel' has unpacked")
    build = base("build")
    files = files_below(*(tests / s for s in (*SUITES, "kho", "lib.mk", "kselftest")),
                        *tests.glob("kselftest*.h"), tree / "include/uapi",
                        tree / "arch/x86/include/uapi", tree / "tools/include",
                        tree / "drivers/iommu/iommufd/iommufd_test.h")
    key = digest(build.name, tree_digest(files, tree), BUILD_SELFTESTS)
    target = cache_dir() / "selftests" / key
    with lock(cache_dir() / "selftests" / "lock", "the selftests"):
        if not target.exists():
            check_privileges()
            need_space(cache_dir(), 1, "building upstream's selftests")
            log = log_for("selftests")
            with step("building upstream's selftests"), making(target) as tmp:
                run(inside(build / "root", ["sh", "-c", BUILD_SELFTESTS, "lab", *SUITES],
                           ro={"src": tree}, rw={"out": tmp}),
                    log=log, what="building upstream's selftests in the guest's build root")
    return target


GUEST_GCC = ("gcc", "-std=gnu17", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread",
             "-s", "-I/tmp/uapi")


def guest_programs() -> Path:
    """A folder with the lab's own programs in the guest (guest/*.c, and folders there
    with a main.c), linked statically.

    They see the series' uAPI headers, of which libkho keeps copies.

    bare-init is the PID 1 of guests that boot without systemd.
    """
    build = base("build")
    sources = {s.stem: [s] for s in sorted(GUEST.glob("*.c"))}
    sources |= {d.parent.name: sorted(d.parent.glob("*.c")) for d in GUEST.glob("*/main.c")}
    files = sorted([*GUEST.glob("*.c"), *GUEST.glob("*/*.[ch]")])
    uapi = PROJECT / "kho" / "uapi"
    key = digest(build.name, GUEST_GCC, *(str(f.relative_to(GUEST)) for f in files), *files,
                 *sorted(uapi.glob("linux/*.h")))
    target = cache_dir() / "guest-programs" / key
    with lock(cache_dir() / "guest-programs" / "lock", "the guest's programs"):
        if not target.exists():
            check_privileges()
            log = log_for("guest-programs")
            with making(target) as tmp:
                for name, own in sources.items():
                    run(inside(build / "root",
                               [*GUEST_GCC, "-o", f"/tmp/out/{name}",
                                *(f"/tmp/src/{s.relative_to(GUEST)}" for s in own)],
                               ro={"src": GUEST, "uapi": uapi}, rw={"out": tmp}),
                        log=log, what=f"building {name} for the guest")
    return target


# $1 the new root, $2 the base's root, $3 the lab's tree, $4 its programs, $5 the selftests or ""
FILL_ROOT = """set -eu
cp -a "$2/." "$1/"
cp -R --no-preserve=ownership "$3/." "$1/"
mkdir -p "$1/usr/lib/khod-lab"
cp -R --preserve=mode "$4/." "$1/usr/lib/khod-lab/"
if [ -n "$5" ]; then
	mkdir -p "$1/usr/lib/kselftest"
	cp -R --preserve=mode "$5/." "$1/usr/lib/kselftest/"
fi
root=$1
shift 5
for tree; do
	cp -R --preserve=mode,links "$tree/." "$root/"
done
"""
INSTALL_DEBS = """set -eu
if [ "$#" -gt 0 ]; then
	dpkg --install "$@"
fi
exec /tmp/lab/configure /tmp/lab
"""


def image(selftests_dir=None, extra_debs=(), trees=()) -> Path:
    """An ext4 image with the run root, our package, the lab's configuration and more.

    @selftests_dir (from selftests()) goes to /usr/lib/kselftest, @extra_debs are
    installed after our package, @trees (for example a kernel's modules, as
    lib/modules/... below /usr) are copied over the root. Guests use the image
    under an overlay: it is read-only and must stay as it is.
    """
    root = base("run")
    programs = guest_programs()
    debs = [package(), *(Path(d) for d in extra_debs)]
    trees = [Path(t) for t in trees]
    parts = [root.name, programs.name, *(digest(d) for d in debs),
             tree_digest(files_below(GUEST), GUEST), FILL_ROOT, INSTALL_DEBS, MKE2FS, IMAGE_SIZE]
    parts += [Path(selftests_dir).name] if selftests_dir else ["no selftests"]
    parts += [tree_digest(files_below(t), t) for t in trees]
    target = cache_dir() / "image" / f"{digest(*parts)}.ext4"
    with lock(cache_dir() / "image" / "lock", "the guest's image"):
        if target.exists():
            os.utime(target)
        else:
            need_program("mke2fs")
            check_privileges()
            need_space(cache_dir(), 2, "the guest's image")
            _make_image(target, root / "root", programs, selftests_dir, debs, trees)
            _forget_old_images(target.parent)
    return target


def _make_image(target: Path, root: Path, programs: Path, selftests_dir, debs, trees) -> None:
    log = log_for("image")
    work = target.with_suffix(".root")
    new = target.with_suffix(".new")
    try:
        with step("making the guest's image"):
            remove(work)
            new.unlink(missing_ok=True)
            work.mkdir()
            run(privileged(["sh", "-c", FILL_ROOT, "lab", work, root, GUEST / "tree", programs,
                            selftests_dir or "", *trees]), log=log, what="filling the guest's root")
            folders = {f"deb{i}": d.parent for i, d in enumerate(debs)}
            names = [f"/tmp/deb{i}/{d.name}" for i, d in enumerate(debs)]
            run(inside(work, ["sh", "-c", INSTALL_DEBS, "lab", *names],
                       ro={"lab": GUEST, **folders}),
                log=log, what="configuring the guest's root")
            run(privileged([*MKE2FS, "-d", work, new, IMAGE_SIZE]),
                log=log, what="making the guest's file system")
            new.chmod(0o444)
            new.rename(target)
    finally:
        new.unlink(missing_ok=True)
        remove(work)


def _forget_old_images(folder: Path) -> None:
    """Keep the newest few, and what somebody may be about to start a guest with."""
    images = sorted(folder.glob("*.ext4"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in images[KEEP_IMAGES:]:
        if time.time() - old.stat().st_mtime > IN_USE:
            say(f"removing the old image {old.name}")
            old.unlink(missing_ok=True)
