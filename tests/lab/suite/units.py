# SPDX-License-Identifier: GPL-2.0-or-later
"""The unit tests once more: with sanitizers, with clang, and without fault points."""

import os
import shutil
import subprocess

from lablib.check import UNIT_ENV, UNIT_OPTIONS, expect, meson_test, skipped_cases, test
from lablib.common import PROJECT, clone_dir, last_lines, run


def unit_tests(ctx, name, options, cc):
    """Configure, build with warnings as errors, and test in a folder of its own."""
    build, log = clone_dir() / f"units-{name}", clone_dir() / f"units-{name}.log"
    shutil.rmtree(build, ignore_errors=True)
    log.write_bytes(b"")
    env = {"CC": cc, "ASAN_OPTIONS": f"log_path={build}/asan", "UBSAN_OPTIONS": f"log_path={build}/ubsan"}
    run(["meson", "setup", build, PROJECT, *UNIT_OPTIONS, *options], log=log, env=env, what=f"configuring {name}")
    run(["ninja", "-C", build], log=log, env=env, what=f"building {name}")
    r = subprocess.run(meson_test(build, "--timeout-multiplier", "5"), stdout=open(log, "ab"),
                       stderr=subprocess.STDOUT, check=False, env={**os.environ, **UNIT_ENV, **env})
    expect(r.returncode == 0, f"the unit tests fail ({name}): {last_lines(log, 20)}\nsee {log}")
    skipped, wrong, _ = skipped_cases(build)
    expect(not wrong, "; ".join(wrong))
    if skipped:
        ctx.figure("skipped", ", ".join(skipped))
    found = [p.name for p in build.glob("*san.*")]
    expect(not found, f"a sanitizer complains: {found} in {build}")
    shutil.rmtree(build)


@test(part="units", kernels=(), image=False)
def unit_tests_with_sanitizers(ctx):
    unit_tests(ctx, "asan", ["-Dfault_points=true", "-Db_sanitize=address,undefined", "-Db_lundef=false"],
               "gcc")


@test(part="units", kernels=(), image=False)
def unit_tests_with_clang(ctx):
    unit_tests(ctx, "clang", ["-Dfault_points=true"], "clang")


@test(part="units", kernels=(), image=False)
def unit_tests_as_released(ctx):
    unit_tests(ctx, "released", ["--buildtype=release"], "gcc")
