# SPDX-License-Identifier: GPL-2.0-or-later
"""The series as a maintainer gets it: patch by patch."""

from lablib import patches
from lablib.check import expect, test


@test(part="patches", kernels=(), image=False)
def each_patch_is_checkpatch_clean(ctx):
    found = patches.checkpatch()
    expect(not found, "; ".join(found[:10]))


@test(part="patches", kernels=(), image=False)
def each_patch_builds_with_live_update(ctx):
    count, wrong = patches.walk(live_update=True)
    ctx.figure("patches", count)
    expect(not wrong, "; ".join(wrong[:10]))


@test(part="patches", kernels=(), image=False)
def each_patch_builds_without_live_update(ctx):
    count, wrong = patches.walk(live_update=False)
    ctx.figure("patches", count)
    expect(not wrong, "; ".join(wrong[:10]))
