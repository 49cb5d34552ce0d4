# SPDX-License-Identifier: GPL-2.0-or-later
"""Negative controls: each protection on, and then off by a parameter of test kernels.

What is counted must go wrong without the protection: packets that are lost, bytes of others'
memory that change. (The controls without the series, or with memory alone preserved, are
in dma.py; those of what only an IOMMU does, in vtd_controls.py.)
"""

import re

from lablib.check import expect, test
from .dma import Run, everywhere, pending


def filled(run):
    """How many bytes of other memory changed."""
    rows = run.lines("filled memory")
    expect(rows, f"free memory was not looked at; see {run.vm.dir}")
    return int(re.search(r"(\d+) bytes changed", rows[0]).group(1))


def going_on(ctx, mode, options="", **kw):
    """A run after which other memory was looked at, with the device writing all the time.

    Nobody gives it descriptors any more: they have to last until then.
    """
    run = Run(ctx, mode=mode, options=options, judge=False, rate=400, **kw)
    at = run.lines("QUIESCED")[0].wall
    expect(run.dma(at - 3, at), "the device does not write any more")
    return run


def control_bytes(ctx, mode, parameter, tries=1, **kw):
    """With the protection no byte of others changes, without it many do, in one of so many tries."""
    kept = filled(going_on(ctx, mode, **kw))
    for _ in range(tries):
        lost = filled(going_on(ctx, mode, parameter, **kw))
        if lost > 1000:
            break
    ctx.figure("changed", f"{kept} bytes with, {lost} without the protection")
    expect(not kept, f"{kept} bytes of others changed")
    expect(lost > 1000, f"only {lost} bytes changed without the protection: the test cannot fail")


@everywhere
@test(part="dma")
def control_memory_is_damaged_without_holds(ctx, **kw):
    """The buffers are punched out of the memory while the device writes to them."""
    control_bytes(ctx, "punched", "iommu_liveupdate.test_no_holds=1", **kw)


@everywhere
@test(part="dma")
def control_memory_is_damaged_if_compaction_moves_it(ctx, **kw):
    """From under the device, between the retrieve and the bind, or after it.

    Which pages it moves is the kernel's choice: there are runs in which it moves none of these.
    """
    control_bytes(ctx, "compacted", "iommu_liveupdate.test_no_holds=1", tries=3, **kw)


@test(part="dma")
def control_memory_is_damaged_without_must_equal(ctx):
    """The frozen HWPT is replaced by one that leads elsewhere, and let go of."""
    control_bytes(ctx, "unequal", "iommufd.test_no_equal=1")


def control_packets(ctx, mode, parameter, **kw):
    """With the protection no packet is lost, without it many are."""
    def lost(options):
        run = Run(ctx, mode=mode, options=options, **kw)
        return len(run.sent) - run.result()["received"]
    kept, gone = lost(""), lost(parameter)
    ctx.figure("lost", f"{kept} packets with, {gone} without the protection")
    expect(not kept, f"{kept} packets lost")
    expect(gone > 100, f"only {gone} packets lost without the protection: the test cannot fail")


@test(part="dma", kernels=(("faults", False, ""),))
def control_packets_are_lost_without_the_driver_match(ctx):
    """The kernel has a driver for the device, which resets it."""
    control_packets(ctx, "watch", "pci_liveupdate.test_no_match=1", kernel=ctx.kernel("faults"))


def control_reset(ctx, options="", **kw):
    """The device was quiesced; the kernel's own driver turns bus mastering on, and resets it then."""
    def written(parameter):
        run = Run(ctx, mode="otherdriver", options=f"{options} {parameter}", kernel=ctx.kernel("faults"),
                  judge=False, **kw)
        expect(run.lines("driver e1000e$"), f"the driver was not bound; see {run.vm.dir}")
        at = run.lines("QUIESCED")[0].wall
        return run.dma(at, float("inf")), filled(run)
    kept, gone = written(""), written("pci_liveupdate.test_no_reset=1")
    ctx.figure("written", "%d packets, %d bytes changed with; %d, %d without the protection" % (*kept, *gone))
    expect(kept == (0, 0), f"packets written, bytes of others changed: {kept}")
    expect(min(gone) > 10, f"only {gone} without the protection: the test cannot fail")


@test(part="dma", kernels=(("faults", False, ""),))
def control_memory_is_damaged_without_the_reset(ctx):
    """By a driver of the kernel's, as control_reset() says."""
    control_reset(ctx)


@everywhere
@test(part="dma")
def control_interrupts_are_lost_without_the_masking(ctx, **kw):
    """They are messages to the second CPU, which forgets them when the next kernel starts it.

    The first CPU keeps them, and the next kernel takes them for interrupts of the 8259s, which it
    does not acknowledge to the local APIC: no other ones come any more, and it hangs.
    """
    def run(options, judge=True):
        return pending(ctx, f"dma.cpus=2 {options}", cpus=2, judge=judge, **kw)
    kept, lost = run(""), run("pci_liveupdate.test_no_mask=1", judge=False)
    ctx.figure("fired", "%d vectors, %d messages in the blackout with; %d, %d without the protection"
               % (*kept, *lost))
    expect(kept == (8, 0), f"vectors that fired, messages in the blackout: {kept}")
    expect(lost[0] == 0 and lost[1] >= 8, f"{lost} without the protection: the test cannot fail")
