# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices over `systemctl kexec`: a userspace NIC driver that never loses a packet."""

from lablib import nic
from lablib.check import expect, test

A_AND_B = (("minimal", False, ""), ("minimal", False, "-b"))


def booted(ctx, **kw):
    return ctx.vm(memory="1G", machine="noiommu", devices=["e1000e"], append="lab.nic",
                  trace=nic.EVENTS, **kw)


def judge(c):
    """What must hold of a kexec under traffic; a sentence for what does not."""
    wrong = []
    if len(c.dma) != c.sent:
        wrong.append(f"{c.sent} packets sent, {len(c.dma)} written by DMA")
    if c.seen != c.sent or c.lost or c.duplicates or c.foreign:
        wrong.append(f"{c.sent} packets sent, the driver saw {c.seen}, {c.lost} lost, "
                     f"{c.duplicates} twice, {c.foreign} of others")
    if not c.dma_in(c.dark):
        wrong.append(f"no DMA in the blackout, in which {c.sent_in(c.dark)} packets were sent")
    if any(c.absent[0] <= t < c.absent[1] for t in c.masters):
        wrong.append("bus mastering was turned off")
    return wrong


def figures(ctx, c):
    ctx.figure("packets", f"{c.sent} sent, {len(c.dma)} by DMA, {c.seen} seen")
    ctx.figure("in the blackout", f"{c.dma_in(c.dark)} in {c.dark[1] - c.dark[0]:.1f} s")
    ctx.figure("without a driver", f"{c.dma_in(c.absent)} in {c.absent[1] - c.absent[0]:.1f} s")


@test(kernels=A_AND_B)
def packets_land_through_systemctl_kexec(ctx):
    """Each packet sent is in the ring, by the driver's count and by QEMU's; none is lost."""
    with booted(ctx) as vm:
        vm.ready()
        c = nic.over_kexec(vm, ctx.kernel(release="-b"))
        figures(ctx, c)
        expect(not judge(c), "; ".join(judge(c)))
        held = vm.run("khoctl list").out
        expect("nic" in held and "held" in held, f"the driver did not register again: {held}")


@test(part="nic", kernels=A_AND_B)
def packets_are_lost_without_khod(ctx):
    """Negative control: the same driver that keeps its descriptors to itself."""
    with booted(ctx) as vm:
        vm.ready()
        c = nic.over_kexec(vm, ctx.kernel(release="-b"), alone=True)
        figures(ctx, c)
        expect(judge(c), "nothing of the device was preserved, and yet nothing was lost")
        expect(c.dma_in(c.dark) == 0 and c.lost > 0,
               f"it fails, but not on packets: {'; '.join(judge(c))}")
