# SPDX-License-Identifier: GPL-2.0-or-later
"""Negative controls of what only an IOMMU does, in each mode of VT-d.

Those that say the same with an IOMMU and without are in controls.py.
"""

from lablib.check import expect, test
from .controls import control_packets, control_reset, filled, going_on
from .dma import faults
from .vtd import MODES, stopped_instead

# IOVAs that are physical addresses of memory as well, free in all kernels
AT = "dma.iova=0x8000000"


def control_iovas(ctx, mode):
    """The next kernel is told to do without the IOMMU, and obeys: what is at the IOVAs is overwritten.

    Nothing refuses the device's requests, and it is nothing that another protection could stop it for.
    """
    def run(options=""):
        got = going_on(ctx, "iovas", f"{AT} dma.next=intel_iommu=off {options}", machine=MODES[mode])
        return filled(got), faults(got)
    kept, lost = run(), run("intel_liveupdate.test_no_adopt=1")
    ctx.figure("changed", "%d bytes, %d faults with; %d, %d without the protection" % (*kept, *lost))
    expect(kept == (0, 0), f"bytes of others changed, faults: {kept}")
    expect(lost[0] > 1000, f"only {lost[0]} bytes changed without the protection: the test cannot fail")
    expect(not lost[1], f"{lost[1]} DMA requests refused: the damage is not a silent one")


def add(mode):
    part = f"vtd-list-{mode}"

    @test(f"control-memory-is-damaged-without-the-adoption-{mode}", part=part)
    def adoption(ctx):
        control_iovas(ctx, mode)
    adoption.__doc__ = control_iovas.__doc__

    if mode != "legacy":        # which is in `check`
        @test(f"control-packets-are-lost-without-the-adoption-{mode}", part=part)
        def packets(ctx):
            """A kernel that does not go on as the previous one loses packets, and stops the device."""
            stopped_instead(ctx, MODES[mode])

    @test(f"control-packets-are-lost-without-must-equal-{mode}", part=part)
    def equal(ctx):
        """A HWPT that leads elsewhere: refused, or the device has no descriptors any more."""
        control_packets(ctx, "unequal", "iommufd.test_no_equal=1", machine=MODES[mode])

    # In scalable mode QEMU goes on to pass a device's requests through when it is moved from there
    # to a page table, on the unpatched kernel, too: with iommu=pt nothing of ours is ever written to.
    if mode == "legacy":
        @test(f"control-memory-is-damaged-without-the-reset-{mode}", part=part,
              kernels=(("faults", False, ""),))
        def reset(ctx):
            """By a driver of the kernel's; the domain that it gets maps all of memory to itself."""
            control_reset(ctx, f"iommu=pt {AT}", machine=MODES[mode])


for name in MODES:
    add(name)
