# SPDX-License-Identifier: GPL-2.0-or-later
"""Negative controls of what only an IOMMU does, in each mode of VT-d.

Those that say the same with an IOMMU and without are in controls.py.
"""

from lablib.check import expect, test
from .controls import filled, going_on
from .dma import Run, faults
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


def control_equal(ctx, mode):
    """A HWPT that leads elsewhere: refused, or the device has no descriptors any more."""
    def lost(options=""):
        run = Run(ctx, mode="unequal", options=options, machine=MODES[mode])
        return len(run.sent) - run.result()["received"]
    kept, gone = lost(), lost("iommufd.test_no_equal=1")
    ctx.figure("lost", f"{kept} packets with, {gone} without the protection")
    expect(not kept, f"{kept} packets lost")
    expect(gone > 100, f"only {gone} packets lost without the protection: the test cannot fail")


def control_reset(ctx, mode):
    """A device that was quiesced, and a driver of the kernel's; others' domain maps all to itself."""
    def written(options=""):
        run = Run(ctx, mode="otherdriver", options=f"iommu=pt {AT} {options}", machine=MODES[mode],
                  kernel=ctx.kernel("faults"), judge=False)
        expect(run.lines("driver e1000e$"), f"the driver was not bound; see {run.vm.dir}")
        at = run.lines("QUIESCED")[0].when + run.offset
        return run.dma(at, float("inf")), filled(run)
    kept, gone = written(), written("pci_liveupdate.test_no_reset=1")
    ctx.figure("written", "%d packets, %d bytes changed with; %d, %d without the protection" % (*kept, *gone))
    expect(kept == (0, 0), f"packets written, bytes of others changed: {kept}")
    expect(min(gone) > 10, f"only {gone} without the protection: the test cannot fail")


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
        control_equal(ctx, mode)
    equal.__doc__ = control_equal.__doc__

    @test(f"control-memory-is-damaged-without-the-reset-{mode}", part=part,
          kernels=(("faults", False, ""),))
    def reset(ctx):
        control_reset(ctx, mode)
    reset.__doc__ = control_reset.__doc__


for name in MODES:
    add(name)
