# SPDX-License-Identifier: GPL-2.0-or-later
"""Negative controls: a protection is on, and then off by a parameter of test kernels.

What is counted must go wrong without the protection. (The controls without the series, or with
memory alone preserved, are in dma.py, that of a kernel that does not adopt the IOMMU in vtd.py.)
"""

import re

from lablib.check import expect, test
from .dma import Run


def changed(ctx, options=""):
    """How many bytes of other memory changed after the frozen HWPT was let go of."""
    run = Run(ctx, mode="unequal", options=options, judge=False)
    rows = run.lines("filled memory")
    expect(rows, f"free memory was not looked at; see {run.vm.dir}")
    return int(re.search(r"(\d+) bytes changed", rows[0]).group(1))


@test(part="dma")
def control_memory_is_damaged_without_must_equal(ctx):
    """The frozen HWPT is replaced by one that leads elsewhere, if the kernel does not compare."""
    kept, lost = changed(ctx), changed(ctx, "iommufd.test_no_equal=1")
    ctx.figure("changed", f"{kept} bytes with, {lost} without the protection")
    expect(not kept, f"{kept} bytes of others changed")
    expect(lost > 1000, f"only {lost} bytes changed without the protection: the test cannot fail")
