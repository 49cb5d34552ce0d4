# SPDX-License-Identifier: GPL-2.0-or-later
"""Where packages come from: apt itself on a mirror in a folder, which is old, changed or signed by nobody known.

The mirror has one suite with two versions of the kernel's source. It was signed in 2020 and expired a day
later. The secret key is gone: what is signed cannot be edited, only made anew (gpg --clearsign).
"""

import hashlib
import shutil

from lablib import apt, kernel
from lablib.check import expect, test
from suite.bad_input import Scratch

KEY = """\
-----BEGIN PGP PUBLIC KEY BLOCK-----

mDMEXgvhABYJKwYBBAHaRw8BAQdAylZ3vjUUgFWGHK+YbeYQ6nE0JWKcOEG8uYwO
aTeMpxa0K2EgbWlycm9yIG9mIHRoZSB0ZXN0cyA8bm9ib2R5QGtob2QuaW52YWxp
ZD6IkAQTFggAOBYhBMN1GU2yAVsoFNyqdYdki7Mm7N59BQJeC+EAAhsDBQsJCAcC
BhUKCQgLAgQWAgMBAh4BAheAAAoJEIdki7Mm7N59k70BAMxtJ4aSMgIhMGwggGBX
XJFxTWyNHvf51W8ewJqOp//DAQDwKP7ay2bb/RhhkSfKZ7icwggJAISkcj/x5VMO
kXeWAA==
=Ls1U
-----END PGP PUBLIC KEY BLOCK-----
"""
IN_RELEASE = """\
-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA512

Codename: sid
Date: Wed, 01 Jan 2020 00:00:00 UTC
Valid-Until: Thu, 02 Jan 2020 00:00:00 UTC
Architectures: amd64
Components: main
SHA256:
 1df31220be42294355a41c7ac28a4f76b3c3cfb77acca94a9a8813d2237ea26f 334 main/binary-amd64/Packages
-----BEGIN PGP SIGNATURE-----

iHUEARYKAB0WIQTDdRlNsgFbKBTcqnWHZIuzJuzefQUCXgvhAAAKCRCHZIuzJuze
fZH8AQCCNuI37pDURdcComd2xq8IOSeJxbPJXkU9Ze4c0IsH0QEA93PG9iDC9YX+
FLS12add9gMR7fwwoduaBwtXQXFjwQ0=
=fiDx
-----END PGP SIGNATURE-----
"""
DEB = b"the source of Linux\n"
OLD, NEW = "7.3.8-1", "7.3.10-1"
PACKAGES = "".join(f"""\
Package: {kernel.PACKAGE}
Version: {v}
Architecture: all
Filename: {v}.deb
Size: {len(DEB)}
SHA256: {hashlib.sha256(DEB).hexdigest()}

""" for v in (OLD, NEW))

LAB = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from lablib import apt, cli, kernel
apt.KEYRING, apt.mirror = Path(os.environ["KEY"]), lambda: os.environ["MIRROR"]
kernel.Apt = lambda: apt.Apt(os.environ["SUITES"].split())
"""
TREE = LAB + "sys.argv[1:] = ['kernel', 'tree']; sys.exit(cli.main())"
FETCH = LAB + "print(kernel.fetch().name, kernel.source_version())"


class Mirror(Scratch):
    """With the mirror, and @base as the version with which the series was tested."""

    def __init__(self, base):
        super().__init__()
        (self.project / "kernel-patches/BASE").write_text(f"{kernel.PACKAGE} {base}\n")
        self.mirror, self.key = self.dir / "debian", self.dir / "key.asc"
        self.key.write_text(KEY)
        # What apt does by itself, whatever this machine's is told.
        (self.dir / "apt.conf").write_text('Dir::Etc::Parts "/dev/null"; Dir::Etc::Main "/dev/null";\n')
        self.restore()

    def restore(self):
        """The mirror as it was signed."""
        shutil.rmtree(self.mirror, ignore_errors=True)
        self.suite = self.mirror / "dists/sid"
        self.packages = self.suite / "main/binary-amd64/Packages"
        self.packages.parent.mkdir(parents=True)
        (self.suite / "InRelease").write_text(IN_RELEASE)
        self.packages.write_text(PACKAGES)
        for v in (OLD, NEW):
            (self.mirror / f"{v}.deb").write_bytes(DEB)

    def environment(self, **env):
        return super().environment(**{"APT_CONFIG": str(self.dir / "apt.conf"), "KEY": str(self.key),
                                      "MIRROR": f"file:{self.mirror}", "SUITES": "sid", **env})


def taken(result, version, warnings):
    """@result is of FETCH: it gave @version, with so many warnings."""
    expect(result.stdout.split() == [f"{kernel.PACKAGE}_{version}_all.deb", version]
           and result.stderr.count("WARNING") == warnings, f"{result.stdout}{result.stderr}")


@test(kernels=(), image=False)
def a_mirror_that_is_not_what_debian_signed(ctx):
    """It is refused, for what it is and not for the network: changed, signed by somebody else, not signed."""
    with Mirror(NEW) as s:
        def refused(**env):
            r = s.python(TREE, **env)
            s.refused(r, f"mirror file:{s.mirror} is refused", "signed")
            expect("no network" not in r.stderr, r.stderr)
            s.restore()
        refused(KEY=str(apt.KEYRING))
        (s.suite / "InRelease").write_text(IN_RELEASE.replace("2020", "2021"))
        refused()
        (s.suite / "InRelease").rename(s.suite / "Release")
        refused()
        s.packages.write_text(PACKAGES.replace(NEW, "7.3.11-1"))
        refused()


@test(kernels=(), image=False)
def a_mirror_that_is_no_longer_updated(ctx):
    """Its Release file has expired, which is tolerated; of two versions that which was tested is taken."""
    with Mirror(OLD) as s:
        taken(s.python(FETCH), OLD, warnings=0)


@test(kernels=(), image=False)
def a_mirror_that_lacks_a_suite(ctx):
    """The source is in another one; the lack is told, and no excuse for what is not signed."""
    with Mirror(OLD) as s:
        s.refused(s.python(TREE, SUITES="trixie forky"), "could not be read", "trixie", "forky")
        (s.suite / "InRelease").write_text(IN_RELEASE.replace("2020", "2021"))
        s.refused(s.python(TREE, SUITES="trixie sid"), "is refused", "signed")
        s.restore()
        r = s.python(FETCH, SUITES="trixie sid experimental")
        taken(r, OLD, warnings=1)
        expect("nothing of trixie, experimental:" in r.stderr, r.stderr)


@test(kernels=(), image=False)
def a_suite_that_cannot_be_read_for_now(ctx):
    """What is not in the others may be in it: nothing stands in for that, as it would for what is gone."""
    for base, found in ((OLD, True), ("7.3.0-0", False)):
        with Mirror(base) as s:
            (s.mirror / "dists/trixie").mkdir()
            (s.mirror / "dists/trixie/InRelease").write_text(IN_RELEASE)
            r = s.python(FETCH if found else TREE, SUITES="trixie sid")
            if found:
                taken(r, OLD, warnings=1)
            else:
                s.refused(r, "7.3.0-0", "trixie; try again later")


@test(kernels=(), image=False)
def a_source_that_is_gone_from_the_mirror(ctx):
    """The newest is taken, with a warning, and kept: the mirror is not asked again.

    Nothing stands in for what was tested before it is there.
    """
    with Mirror("7.3.0-0") as s:
        (s.mirror / f"{NEW}.deb").write_bytes(b"something else")
        s.refused(s.python(TREE), "Hash Sum mismatch")
        expect(s.python(LAB + "print(kernel.source_version())").stdout == "7.3.0-0\n", "what was not fetched is built")
        expect(not list((s.cache / "packages").iterdir()), "something is left of what was not fetched")
        s.restore()
        r = s.python(FETCH)
        taken(r, NEW, warnings=1)
        expect("7.3.0-0" in r.stderr, f"not said what is gone: {r.stderr}")
        shutil.rmtree(s.mirror)
        taken(s.python(FETCH), NEW, warnings=0)


@test(kernels=(), image=False)
def a_source_that_stood_in_and_is_gone(ctx):
    """What was tested is taken if it is back; else it is that, and not what stood in, which is said to be gone."""
    for base, version, warnings in ((OLD, OLD, 0), ("7.3.0-0", NEW, 1)):
        with Mirror(base) as s:
            (s.cache / "packages").mkdir()
            (s.cache / f"packages/instead-of-{base}").write_text("7.3.1-1\n")
            r = s.python(FETCH)
            taken(r, version, warnings)
            expect("7.3.1-1" not in r.stderr and r.stderr.count("7.3.0-0") == warnings, r.stderr)
