# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that guests boot, built by an ordinary user from nothing."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

from lablib.check import Skip, expect, test
from lablib.common import PROJECT, need_space, run
from lablib.qemu import VM
from lablib.rootfs import log_for


def ordinary_user():
    """Who runs the lab, or, if that is root, somebody with a range of subordinate ids."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    ranges = {line.split(":")[0] for line in Path("/etc/subuid").read_text().splitlines()}
    for user in pwd.getpwall():
        if 1000 <= user.pw_uid < 60000 and user.pw_name in ranges:
            return user
    raise Skip("root runs this, and there is no ordinary user with a range in /etc/subuid")


@test(part="rootfs", image=False)
def the_image_is_built_without_privileges(ctx):
    """By a user's own hands: two roots, the package, upstream's suites, the image; then it boots."""
    user = ordinary_user()
    # Below /var/tmp: the cache of root is nobody else's to enter.
    home = Path(tempfile.mkdtemp(prefix="lab-unprivileged-", dir="/var/tmp"))
    need_space(home, 10, "a second cache")
    project, cache = home / "project", home / "cache"
    try:
        run(["git", "-c", f"safe.directory={PROJECT}/.git", "clone", "-q", "--no-hardlinks", PROJECT, project])
        cache.mkdir()
        as_user = ["env", "-i", f"PATH={os.environ['PATH']}", f"HOME={home}", f"KHO_CACHE={cache}"]
        if os.geteuid() == 0:
            run(["chown", "-R", f"{user.pw_uid}:{user.pw_gid}", home])
            as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups",
                       *as_user]
        run([*as_user, project / "tests/lab/lab", "rootfs", "image"], log=log_for(ctx.name), cwd=project,
            what=f"building the image as {user.pw_name}")
        image = next((cache / "image").glob("*.ext4"))
        expect(image.stat().st_uid == user.pw_uid, f"{image} belongs to uid {image.stat().st_uid}")
        with VM(ctx.kernel(), image, name=ctx.name) as vm:
            vm.ready()
            owners = vm.run("stat -c '%u %g %a' /usr/bin/su /etc/shadow").out.split("\n")
            expect(owners[:2] == ["0 0 4755", "0 42 640"], f"su and shadow are {owners}")
            vm.run("systemctl is-active khod.service && khoctl status")
        ctx.figure("built by", f"uid {user.pw_uid}")
    finally:
        # What belongs to the namespace's users can be removed in a namespace only, or by root.
        if os.geteuid() != 0 and cache.exists():
            subprocess.run(["unshare", "--user", "--map-auto", "--map-root-user", "rm", "-rf", cache],
                           check=False)
        shutil.rmtree(home, ignore_errors=True)

