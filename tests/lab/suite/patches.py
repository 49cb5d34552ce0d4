# SPDX-License-Identifier: GPL-2.0-or-later
"""The series as a maintainer gets it: patch by patch."""

from lablib import patches
from lablib.check import expect, test


@test(part="patches", kernels=(), image=False)
def each_patch_is_checkpatch_clean(ctx):
    found = patches.checkpatch()
    expect(not found, "; ".join(found[:10]))


def nothing_new(check):
    found = patches.new_findings(check)
    expect(not found, "; ".join(found[:10]))


@test(part="patches", kernels=(), image=False)
def kernel_doc_finds_nothing_new(ctx):
    nothing_new(patches.kernel_doc)


def walk(ctx, live_update):
    count, wrong = patches.walk(live_update)
    ctx.figure("patches", count)
    expect(not wrong, "; ".join(wrong[:10]))


@test(part="patches-on", kernels=(), image=False)
def each_patch_builds_with_live_update(ctx):
    walk(ctx, live_update=True)


@test(part="patches-on", kernels=(), image=False)
def sparse_finds_nothing_new(ctx):
    nothing_new(patches.sparse)


@test(part="patches-off", kernels=(), image=False)
def each_patch_builds_without_live_update(ctx):
    walk(ctx, live_update=False)
