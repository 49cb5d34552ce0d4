# SPDX-License-Identifier: GPL-2.0-or-later
"""Negative controls: a protection on, and then off by a parameter of test kernels.

What is counted must go wrong without the protection. (The controls without the series, or
with memory alone preserved, are in dma.py.)
"""

from lablib.check import expect, test
from .dma import Run


@test(part="dma", kernels=(("faults", False, ""),))
def control_packets_are_lost_without_the_driver_match(ctx):
    """The kernel has a driver for the device, which resets it."""
    def lost(options):
        run = Run(ctx, mode="watch", options=options, kernel=ctx.kernel("faults"))
        return len(run.sent) - run.result()["received"]
    kept, gone = lost(""), lost("pci_liveupdate.test_no_match=1")
    ctx.figure("lost", f"{kept} packets with, {gone} without the protection")
    expect(not kept, f"{kept} packets lost")
    expect(gone > 100, f"only {gone} packets lost without the protection: the test cannot fail")
