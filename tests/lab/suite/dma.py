# SPDX-License-Identifier: GPL-2.0-or-later
"""DMA through a kexec: an e1000e in no-IOMMU mode, judged from outside of the guest.

The guest's half is guest/dma-guest.c, which runs as PID 1: it drives the receive ring
from userspace, preserves memfd, iommufd and device, and takes them back in the
next kernel. Judged is what the sender sent, what QEMU says the device wrote to
memory, and which configuration writes reached the device and its port. Two
devices, because some tests need a second one.
"""

import re
import shutil
import time

from lablib import trace
from lablib.check import expect, test
from lablib.sender import Sender

DEVICE = "e1000e"
# The device that is preserved and the port above it; the other device is not.
PATH = {"01:00.0", "00:10.0"}
EVENTS = ("pci_cfg_write", "e1000e_rx_written_to_guest")
COMMAND, MEMORY_AND_MASTER = 0x04, 0x06


def forbidden(device, offset, value):
    """Whether a configuration write would disturb a device under live DMA.

    Offsets as QEMU's pcie-root-port has them: MSI-X at 0x48, PCIe at 0x54, AER at 0x100.
    """
    if offset == COMMAND:
        return value & MEMORY_AND_MASTER != MEMORY_AND_MASTER
    if device == DEVICE:
        return True
    return not (offset in (0x06, 0x1e, 0x3c) or     # status, interrupt line
                0x48 <= offset < 0x54 or            # MSI-X
                offset in (0x5e, 0x66) or           # device and link status
                0x6c <= offset < 0x78 or            # slot, root control and status
                0x100 <= offset < 0x148)            # AER


class Run:
    """One run of dma-guest: what it said, what was sent, what the device did."""

    def __init__(self, ctx, *, mode="run", kexecs=1, rate=1000, options="", timeout=240,
                 kernel=None):
        # The host's wall clock less its monotonic one: QEMU's trace has the former.
        self.offset = time.time() - time.monotonic()
        with ctx.vm(kernel=kernel, init="dma-guest", memory="512M", devices=[DEVICE, DEVICE],
                    trace=EVENTS, append=f"dma.mode={mode} dma.kexecs={kexecs} {options}") as vm:
            self.vm, self.deadline = vm, time.monotonic() + timeout
            shutil.copy((kernel or ctx.kernel()) / "bzImage", vm.share / "next")
            self.wait("DMA: .*READY")
            sender = Sender(vm.senders[0], rate, vm.dir / "sent")
            try:
                self.wait("DMA: .*(STOP|QUIESCED)")
                if self.lines("STOP"):
                    self.sent = sender.stop()
                while vm.alive() and time.monotonic() < self.deadline:
                    time.sleep(0.1)
                expect(not vm.alive(), "the guest did not come to its end")
            finally:
                if not self.lines("STOP"):
                    self.sent = sender.stop()
        self.judge_words()

    def wait(self, pattern):
        if self.vm.journal.wait(pattern, 0, self.deadline, self.vm.alive) is None:
            tail = "\n".join(list(self.vm.journal.lines)[-8:])
            self.vm.hang(f"dma-guest did not say '{pattern}'; its last words:\n{tail}")

    def lines(self, pattern):
        return [x for x in list(self.vm.journal.lines) if re.search(rf"DMA: .*{pattern}", x)]

    def judge_words(self):
        """What the guest checked itself; each check must be there as ok or FAIL."""
        bad = self.lines(r"\bFAIL\b")
        expect(not bad, f"{bad[:4]} (see {self.vm.dir})")

    def result(self):
        rows = self.lines("RESULT ")
        expect(rows, f"dma-guest gave no result; see {self.vm.dir}")
        return {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", rows[-1])}

    def blackouts(self):
        """(from, to) of each: from reboot(2) until userspace says it is there, wall clock."""
        begins, ends = self.lines("KEXEC"), self.lines("STAGE")[1:]
        return [(a.when + self.offset, b.when + self.offset) for a, b in zip(begins, ends)]

    def dma(self, begin, end):
        """How many packets the device wrote to memory in that time."""
        path = self.vm.dir / "trace.log"
        return sum(begin <= e.when <= end for e in trace.read(path, {"e1000e_rx_written_to_guest"}))

    def config_writes(self):
        """Those to the device and its port in the blackouts that would have disturbed it."""
        spans = self.blackouts()
        return [f"{device} {slot} @{offset:#x} <- {value:#x}"
                for when, device, slot, offset, value in trace.config_writes(self.vm.dir / "trace.log")
                if slot in PATH and any(a <= when <= b for a, b in spans)
                and forbidden(device, offset, value)]

    def nothing_lost(self, ctx, kexecs):
        got = self.result()
        lost = len(self.sent) - got["received"]
        spans = self.blackouts()
        landed = [self.dma(*s) for s in spans]
        expect(len(spans) == kexecs, f"{len(spans)} kexecs, not {kexecs}")
        expect(lost == 0 and not got["lost"], f"{lost} of {len(self.sent)} packets lost: {got}")
        expect(not (got["bad"] or got["doubled"] or got["incomplete"]), f"damage: {got}")
        expect(all(landed), f"no DMA in a blackout: {landed}")
        expect(not self.config_writes(), f"forbidden: {self.config_writes()[:5]}")
        ctx.figure("packets", f"{len(self.sent)} sent, {got['received']} landed, {lost} lost, "
                              f"{sum(landed)} during {kexecs} blackouts of "
                              f"{min(b - a for a, b in spans):.1f} to {max(b - a for a, b in spans):.1f} s")


@test()
def dma_through_two_kexecs(ctx):
    """Free memory filled before the retrieve and compacted after it; an MSI-X vector used."""
    Run(ctx, kexecs=2, options="dma.fill=1 dma.irq=1").nothing_lost(ctx, 2)


@test()
def dma_goes_on_after_an_abort(ctx):
    run = Run(ctx, mode="abort")
    got = run.result()
    expect(len(run.sent) == got["received"] and not got["incomplete"], f"sent {len(run.sent)}: {got}")


@test()
def dma_goes_on_after_a_freeze_that_fails(ctx):
    """A next kernel without live update, without KHO, and INTx in a second session."""
    run = Run(ctx, mode="freezefail")
    got = run.result()
    expect(len(run.sent) == got["received"] and not got["incomplete"], f"sent {len(run.sent)}: {got}")


def quiesced(ctx, mode):
    """After the guest says so, the device writes nothing any more."""
    run = Run(ctx, mode=mode)
    at = run.lines("QUIESCED")[0].when + run.offset
    before, after = run.dma(0, at), run.dma(at + 0.1, at + 2.5)
    expect(before, "no DMA at all")
    expect(not after, f"{after} packets written after the device was quiesced")


@test()
def quiesced_when_finished_without_being_retrieved(ctx):
    quiesced(ctx, "noretrieve")


@test()
def quiesced_at_the_last_close(ctx):
    quiesced(ctx, "lastclose")


@test()
def quiesced_at_the_deadline(ctx):
    quiesced(ctx, "deadline")


def control(ctx, **kw):
    """Without the device preserved, DMA ends with the kernel, and the packets are lost."""
    run = Run(ctx, mode="control", **kw)
    got, (begin, end) = run.result(), run.blackouts()[0]
    lost, late = len(run.sent) - got["received"], run.dma(begin + 0.5, end)
    expect(lost > 100, f"only {lost} of {len(run.sent)} packets were lost: the tests cannot fail")
    expect(not late, f"{late} packets landed well after the kexec began")
    ctx.figure("lost", f"{lost} of {len(run.sent)}")


@test()
def control_packets_are_lost_if_only_memory_is_preserved(ctx):
    control(ctx)


@test(part="dma", kernels=(("minimal", True, ""),))
def control_packets_are_lost_on_the_unpatched_kernel(ctx):
    control(ctx, kernel=ctx.kernel(unpatched=True))


@test(part="dma")
def dma_through_twenty_kexecs(ctx):
    Run(ctx, kexecs=20, rate=1000, options="dma.fill=1 dma.irq=1", timeout=900).nothing_lost(ctx, 20)
