# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian packages from any suite, in a private apt state.

The mirror is the one that the system's own apt configuration names; the
system's lists, cache and configuration are left alone. Signatures are always
verified; a Release file past its Valid-Until date is tolerated, because a lab
may sit behind a mirror that is no longer updated.
"""

import functools
import re
import shutil
from pathlib import Path
from urllib.parse import urlparse

from .common import LabError, cache_dir, lock, run, say

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
UNSIGNED = "is not signed|Hash Sum mismatch"       # as apt-get says it
SUITES = ("trixie", "trixie-backports", "forky", "sid", "experimental")


def mirror() -> str:
    """The URI of the Debian archive in the system's apt configuration; others, too, may end in /debian."""
    out = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"],
              what="reading the system's apt configuration")
    uris = [entry(line).rstrip("/") for line in out.splitlines()]
    found = next((u for u in uris if urlparse(u).path.endswith("/debian")), None)
    if not found:
        raise LabError("the system's apt configuration names no Debian mirror (of Origin Debian, with a URI that "
                       "ends in /debian); add one to /etc/apt/sources.list, or run 'apt-get update' if there is one")
    return found


def entry(uri: str) -> str:
    """@uri, or the first web address of the list of mirrors that it names, as Debian's cloud images have it."""
    path = uri.removeprefix("mirror+file:")
    if path == uri:
        return uri
    try:
        words = [w for line in Path(path.rstrip("/")).read_text().splitlines() for w in line.split()[:1]]
    except OSError as e:
        raise LabError(f"the system's apt configuration names {uri}, which cannot be read: {e.strerror}") from e
    return next((w for w in words if w.startswith(("http:", "https:"))), "")


def locked(method):
    """One process at a time in the folder; between two calls lists may become newer, no more."""
    @functools.wraps(method)
    def call(self, *args):
        with lock(self.dir.with_name(f"{self.dir.name}.lock"), "Debian's packages"):
            return method(self, *args)
    return call


class Apt:
    """apt-get and apt-cache over the suites @suites, in the folder @name of the cache.

    @status is what counts as installed, a file of dpkg's; nothing, if none is given.
    """

    def __init__(self, suites=SUITES, name="apt", status=None):
        self.dir = cache_dir() / name
        self.suites = suites
        self.status = status or self.dir / "status"
        for d in ("etc", "etc/preferences.d", "etc/apt.conf.d", "lists/partial",
                  "archives/partial"):
            (self.dir / d).mkdir(parents=True, exist_ok=True)
        if not status:
            self.status.touch()
        if not KEYRING.exists():
            raise LabError(f"the keyring {KEYRING} is missing; run 'make setup'")

    def options(self):
        d = self.dir
        opts = {"Dir::Etc": d / "etc", "Dir::Etc::SourceList": d / "etc/sources.list",
                "Dir::Etc::SourceParts": "/dev/null", "Dir::State::Lists": d / "lists",
                "Dir::State::status": self.status, "Dir::Cache": d, "Dir::Cache::archives":
                d / "archives", "Acquire::Check-Valid-Until": "false", "APT::Sandbox::User": "root",
                "APT::Get::AllowUnauthenticated": "false", "Acquire::Languages": "none",
                "Acquire::Retries": "2"}
        return [x for k, v in opts.items() for x in ("-o", f"{k}={v}")]

    @locked
    def update(self) -> list:
        """Read the lists of the suites; one that the mirror does not have is told, and done without.

        So is one that it cannot give now. These are returned: what is in no other may be there.
        """
        uri, left, unread = mirror(), list(self.suites), []
        while True:
            (self.dir / "etc/sources.list").write_text("".join(
                f"deb [signed-by={KEYRING}] {uri} {s} main\n" for s in left))
            try:
                run(["apt-get", *self.options(), "-q", "update", "-o", "APT::Update::Error-Mode=any"],
                    what="reading Debian's package lists")
                return unread
            except LabError as e:
                said = "\n".join(re.findall("^E: .*", str(e), re.M))
                lacks = [s for s in left if f" {s} Release' " in said]
                failed = [s for s in left if f"/dists/{s}/" in said]
                left = [s for s in left if s not in lacks + failed]
                if not left or not lacks + failed or re.search(UNSIGNED, str(e)):
                    raise unreadable(uri, e) from e
                say(f"WARNING: Debian's mirror {uri} gives nothing of {', '.join(lacks + failed)}:\n{said}")
                unread += failed

    @locked
    def versions(self, package: str) -> list:
        """The versions that the suites offer, newest first."""
        out = run(["apt-cache", *self.options(), "madison", package])
        seen = []
        for line in out.splitlines():
            fields = [f.strip() for f in line.split("|")]
            if len(fields) == 3 and not fields[2].endswith("Sources") and fields[1] not in seen:
                seen.append(fields[1])
        return seen

    @locked
    def suite_with(self, package: str, at_least: str) -> str:
        """The first of the suites in which @package is at least @at_least."""
        uri = mirror()
        out = run(["apt-cache", *self.options(), "madison", package])
        found = {}
        for line in out.splitlines():
            fields = [f.strip() for f in line.split("|")]
            if len(fields) == 3 and not fields[2].endswith("Sources"):
                found.setdefault(fields[2].split()[1].split("/")[0], fields[1])
        for suite in self.suites:
            version = found.get(suite)
            if version and newer_or_equal(version, at_least):
                return suite
        raise LabError(f"no Debian suite at {uri} has {package} >= {at_least} (seen: {found})")

    @locked
    def download(self, package: str, version: str, into: Path) -> Path:
        """Fetch one package; the file is complete or absent."""
        tmp = into / "partial"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        say(f"fetching {package} {version}")
        try:
            run(["apt-get", *self.options(), "-q", "download", f"{package}={version}"], cwd=tmp,
                what=f"fetching {package} {version}")
            deb = next(tmp.glob("*.deb"))
            return deb.rename(into / deb.name)
        finally:
            shutil.rmtree(tmp)

    @locked
    def download_all(self, packages) -> list:
        """Fetch @packages (NAME or NAME/SUITE), and what they need as far as it is not installed.

        Nothing is installed. The files stay in the folder's archives.
        """
        store = self.dir / "archives"
        for old in store.glob("*.deb"):
            old.unlink()
        run(["apt-get", *self.options(), "-q", "-y", "--download-only", "--reinstall",
             "--allow-downgrades", "--no-install-recommends", "-o", "Debug::NoLocking=1", "install", *packages],
            what=f"fetching {', '.join(packages)}")
        return sorted(store.glob("*.deb"))


def unreadable(uri: str, e: LabError) -> LabError:
    """What to say of the mirror @uri, of which apt-get said @e."""
    if re.search(UNSIGNED, str(e)):
        return LabError(f"Debian's mirror {uri} is refused: what it has is not what was signed with a key of "
                        f"{KEYRING} ({e}); try again later, or use another mirror")
    return LabError(f"no network, or no mirror of what is needed: Debian's mirror {uri} could not be read ({e}); "
                    f"check the connection, or put the packages into the cache {cache_dir()} from another machine")


def newer_or_equal(a: str, b: str) -> bool:
    try:
        run(["dpkg", "--compare-versions", a, "ge", b])
        return True
    except LabError:
        return False
