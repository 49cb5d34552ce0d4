# SPDX-License-Identifier: GPL-2.0-or-later
"""DMA through a kexec: a NIC or an NVMe disk in no-IOMMU mode, judged from outside of the guest.

The guest's half is guest/dma-guest/, which runs as PID 1: it drives the device from
userspace, preserves memfd, iommufd and device, and takes them back in the next
kernel. Judged is what the sender sent, what QEMU says the device wrote to
memory and where, and which configuration writes reached the device and its port. Two
devices, because some tests need a second one.
"""

import functools
import re
import shutil
import time

from lablib import trace
from lablib.check import expect, test
from lablib.initrd import empty_initrd
from lablib.sender import Sender

NICS = ("e1000e", "igb")
# The device that is preserved and the port above it; the other device is not, except where it is
# the device's second function.
DEVICE, SIBLING, PORT = "01:00.0", "01:00.1", "00:10.0"
EVENTS = {
    "e1000e": ("e1000e_rx_written_to_guest", "e1000e_rx_desc_buff_write"),
    "igb": ("e1000e_rx_written_to_guest", "igb_rx_desc_buff_write"),
    "nvme": ("pci_nvme_enqueue_req_completion", "pci_nvme_map_addr", "pci_nvme_mmio_stopped",
             "pci_nvme_pci_reset"),
}
# What raises a vector, and what a local APIC gets of it: nothing if the vector is masked.
MESSAGE = ("pci_nvme_irq_msix", "apic_deliver_irq")
# An IOMMU is switched on or off; it refused a request, of bus 1, device 0, function 0 or 1.
ENABLE, FAULT, REQUESTERS = "vtd_dmar_enable", "vtd_dmar_fault", (0x0100, 0x0101)
THROTTLE = "throttling.iops-read=200"       # 1,000 reads are in flight
# Hot-unplug by the port itself, as on real hosts, and not by ACPI. Without ASPM, the lab's
# kernels do not ask the firmware for control.
PCIEHP, NATIVE = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"), "pcie_ports=native"
COMMAND, MEMORY_AND_MASTER = 0x04, 0x06
# What the guest writes, and where, when it has bound the device.
BOUND = ["00:00.0", 0, 0xb0d0]

EVERYWHERE = []


def everywhere(fn):
    """A test of suite/vtd_list.py, too, in each mode of VT-d: it takes arguments of Run()."""
    EVERYWHERE.append(fn)
    return fn


def forbidden(slot, offset, value):
    """Whether a configuration write would disturb a device under live DMA.

    Offsets as QEMU's pcie-root-port has them: MSI-X at 0x48, PCIe at 0x54, AER at 0x100.
    """
    if offset == COMMAND:
        return value & MEMORY_AND_MASTER != MEMORY_AND_MASTER
    if slot in (DEVICE, SIBLING):       # SR-IOV of an igb at 0x160, as long as it has no VFs
        return not (offset == 0x168 and not value & 0x09 or     # control: no VFs, nor their memory
                    offset in (0x170, 0x180) or                 # number, and size of their pages
                    0x184 <= offset < 0x19c)                    # BARs, which are sized
    return not (offset in (0x06, 0x1e, 0x3c) or     # status, interrupt line
                0x48 <= offset < 0x54 or            # MSI-X
                offset in (0x5e, 0x66) or           # device and link status
                0x6c <= offset < 0x78 or            # slot, root control and status
                0x100 <= offset < 0x148)            # AER


def requester(fault):
    return int(re.search(r"sid (0x[0-9a-f]+)", fault.text).group(1), 16)


def faults(run):
    """How many DMA requests of the device, or its second function, QEMU's IOMMU refused."""
    return sum(requester(e) in REQUESTERS for e in run.trace({FAULT}))


class Run:
    """One run of dma-guest: what it said, what was sent, what the device did.

    @device is a kind of device; NICs are sent @rate packets a second. @options go to the
    kernel's command line. @nexts are the builds that come after @kernel, if it is another one
    than that; @shared are files and folders for the share with the guest, with their names there.
    The run ends when the guest is off; without @judge it may say that something failed. @second
    is the other device, which gets packets as well if the mode is about functions;
    @arguments are more for QEMU, @icount is that of VM.
    """

    kept = (DEVICE, PORT)       # whose configuration is not written to until the device is bound

    def __init__(self, ctx, *, device="e1000e", mode="run", kexecs=1, rate=1000, options="",
                 timeout=240, kernel=None, nexts=(), machine="noiommu", memory="512M", cpus=1,
                 trace=(), judge=True, second="e1000e", shared=(), arguments=(), icount=False):
        self.device, self.senders, self.sent, self.sibling_sent = device, [], [], []
        native = mode.startswith(("unplug", "error"))
        if native:
            options += f" {NATIVE}"
        with ctx.vm(kernel=kernel, init="dma-guest", memory=memory, cpus=cpus,
                    devices=[device, second], machine=machine, disk_options=THROTTLE,
                    trace=("pci_cfg_write", ENABLE, FAULT, *EVENTS[device], *trace),
                    arguments=PCIEHP if native else arguments, icount=icount,
                    append=f"dma.device={device} dma.mode={mode} dma.kexecs={kexecs} "
                           f"{options}") as vm:
            self.vm, self.deadline = vm, time.monotonic() + timeout
            shutil.copy((kernel or ctx.kernel()) / "bzImage", vm.share / "next")
            for stage, build in enumerate(nexts, 2):
                shutil.copy(build / "bzImage", vm.share / f"next-{stage}")
            for path, name in shared:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, vm.share / name)
            self.wait("READY")
            if device in NICS:
                self.senders = [Sender(vm.senders[0], rate, vm.dir / "sent")]
            try:
                if mode.startswith("functions"):
                    self.wait("BOTH")
                    self.senders.append(Sender(vm.senders[1], rate, vm.dir / "sent-sibling"))
                self.meanwhile(mode)
            finally:
                self.stop_sending()
        if judge:
            self.judge_words()

    def meanwhile(self, mode):
        """From READY until the guest is off."""
        if mode.startswith("unplug"):
            self.wait("UNPLUG")
            self.vm.qmp_do("device_del", id="dev0")
        if mode.startswith("error"):
            self.wait("ERROR")
            # At the port: QEMU's NICs cannot be told to report errors.
            self.vm.monitor("pcie_aer_inject_error rp0 DLP")
        if mode == "panic":
            self.wait("a session after a panic", 2)
            return
        if mode != "faultsboot":
            self.wait("(STOP|QUIESCED)")
        elif not self.reached("(STOP|QUIESCED)"):
            return                      # a panic is an end, too
        if self.lines("STOP"):
            self.stop_sending()
        while self.vm.alive() and time.monotonic() < self.deadline:
            time.sleep(0.1)
        expect(not self.vm.alive(), "the guest did not come to its end")

    def stop_sending(self):
        if self.senders:
            self.sent, self.sibling_sent = ([s.stop() for s in self.senders] + [[]])[:2]
            self.senders = []

    def reached(self, pattern):
        """Whether the guest says it before it is off."""
        return self.vm.journal.wait(rf"DMA: .*{pattern}", 0, self.deadline, self.vm.alive) is not None

    def wait(self, pattern, times=1):
        """Until the guest has said it so many times."""
        at = 0
        for _ in range(times):
            at = self.vm.journal.wait(rf"DMA: .*{pattern}", at, self.deadline, self.vm.alive)
            if at is None:
                tail = "\n".join(list(self.vm.journal.lines)[-8:])
                self.vm.hang(f"dma-guest did not say '{pattern}'; its last words:\n{tail}")
            at += 1

    def lines(self, pattern):
        return [x for x in list(self.vm.journal.lines) if re.search(rf"DMA: .*{pattern}", x)]

    def judge_words(self):
        """What the guest checked itself, and what the kernel complained about."""
        bad = self.lines(r"\bFAIL\b")
        expect(not bad, f"{bad[:4]} (see {self.vm.dir})")
        bad = [x for x in list(self.vm.console.lines) if re.search(r"WARNING:|BUG:|Oops", x)]
        expect(not bad, f"the kernel said {bad[:4]} (see {self.vm.dir})")

    def result(self):
        rows = self.lines("RESULT ")
        expect(rows, f"dma-guest gave no result; see {self.vm.dir}")
        return {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", rows[-1])}

    def blackouts(self):
        """(from, to) of each: from reboot(2) until userspace says it is there, wall clock."""
        begins, ends = self.lines("KEXEC"), self.lines("STAGE")[1:]
        return [(a.wall, b.wall) for a, b in zip(begins, ends)]

    @functools.cached_property
    def writes(self):
        """Those to configuration spaces in the trace, which is whole when the guest is off."""
        return list(trace.config_writes(self.vm.dir / "trace.log"))

    def bound(self):
        """When the device was bound, in each kernel but the first."""
        return [when for when, _, *write in self.writes if write == BOUND]

    def trace(self, names=None):
        return trace.read(self.vm.dir / "trace.log", names)

    def transfers(self):
        """(time, address, length) of all the device wrote: packets, or parts of what is read."""
        if self.device in NICS:
            return list(trace.dma_writes(self.vm.dir / "trace.log"))
        return [(e.when, int(m.group(1), 16), int(m.group(2)))
                for e in self.trace({"pci_nvme_map_addr"})
                if (m := re.search(r"addr (0x[0-9a-f]+) len (\d+)", e.text))]

    def started(self):
        """When the guest began to use the device, which firmware may have used before."""
        return self.lines("MEMORY ")[-1].wall

    def dma(self, begin, end):
        """How many packets the device wrote to memory in that time, or reads it completed."""
        event = EVENTS[self.device][0]
        return sum(begin <= e.when <= end for e in self.trace({event}))

    def ranges(self):
        """(when it was said, address, length) of each piece of the workload's memory."""
        return [(x.when, int(m.group(1), 16), int(m.group(2)) * 4096) for x in self.lines("MEMORY ")
                if (m := re.search(r"at=(0x[0-9a-f]+) pages=(\d+)", x))]

    def strays(self):
        """DMA to addresses that are not the workload's memory."""
        ranges = [r[1:] for r in self.ranges()]
        expect(ranges, "the guest did not say where its memory is")
        begin = self.started()
        return [hex(a) for when, a, n in self.transfers() if when > begin
                and not any(p <= a and a + n <= p + length for p, length in ranges)]

    def config_writes(self):
        """Those to the device and its port that would have disturbed it until it was bound again."""
        bound = self.bound()
        spans = [(a, min((t for t in bound if t > b), default=b)) for a, b in self.blackouts()]
        return [f"{name} {slot} @{offset:#x} <- {value:#x}" for when, name, slot, offset, value in self.writes
                if slot in self.kept and any(a <= when <= b for a, b in spans)
                and forbidden(slot, offset, value)]

    def undisturbed(self, kexecs):
        """What holds for every kind of device; the counts of each blackout."""
        spans, bound = self.blackouts(), self.bound()
        expect(len(spans) == len(bound) == kexecs,
               f"{len(spans)} kexecs, {len(bound)} times bound, not {kexecs}")
        writes = self.config_writes()
        expect(not writes, f"forbidden: {writes[:5]}")
        self.no_strays()
        self.none_refused()
        expect(not any(a < e.when < b for e in self.trace({ENABLE}) for a, b in spans),
               "the IOMMU was switched in a blackout")
        return [self.dma(*s) for s in spans], [b - a for a, b in spans]

    def nothing_lost(self, ctx, kexecs):
        got = self.result()
        lost = len(self.sent) - got["received"]
        landed, spans = self.undisturbed(kexecs)
        # A machine that is too slow runs out of descriptors; that is not the kernel's fault.
        expect(lost == 0 and not got["lost"], f"{lost} of {len(self.sent)} packets lost: {got}; the "
               f"ring's 32,768 descriptors had to last for up to {max(spans):.0f} s")
        expect(not (got["bad"] or got["doubled"] or got["incomplete"]), f"damage: {got}")
        expect(all(landed), f"no DMA in a blackout: {landed}")
        ctx.figure("packets", f"{len(self.sent)} sent, {got['received']} landed, {lost} lost, "
                              f"{sum(landed)} during {kexecs} blackouts of "
                              f"{min(spans):.1f} to {max(spans):.1f} s")

    def no_packet_lost(self, kexecs=0):
        got, done = self.result(), len(self.lines("STAGE ")) - 1
        expect(done == kexecs, f"the kernel was replaced {done} times, not {kexecs}")
        expect(len(self.sent) == got["received"] and not got["incomplete"],
               f"sent {len(self.sent)}: {got}")

    def no_strays(self):
        strays = self.strays()
        expect(not strays, f"DMA outside of the memory: {strays[:5]}")

    def none_refused(self, why=""):
        refused = faults(self)
        expect(not refused, f"{refused} DMA requests of the device refused{why}")

    def stayed_awake(self):
        """Tasks that cannot be frozen give EBUSY, too: what kept the system from sleeping?"""
        expect(self.vm.console.find("keeps running over a live update, cannot sleep") is not None,
               f"it was not the device, or its port, that did not go to sleep; see {self.vm.dir}")

    def all_read(self, ctx, kexecs):
        """NVMe: every read that was posted completed with the right data, and many meanwhile."""
        got = self.result()
        done, spans = self.undisturbed(kexecs)
        ready, end = (self.lines(w)[0].wall for w in ("READY", "RESULT"))
        resets = [e.name for e in self.trace({"pci_nvme_mmio_stopped", "pci_nvme_pci_reset"})
                  if ready < e.when < end]
        expect(not (got["failed"] or got["bad"] or got["lost"]), f"damage: {got}")
        expect(got["completed"] == got["posted"], f"reads are missing: {got}")
        expect(all(n >= 100 for n in done), f"too few reads completed in blackouts of {spans}: {done}")
        expect(not resets, f"it was reset: {resets}")
        ctx.figure("reads", f"{got['completed']} right, of which {sum(done)} during {kexecs} "
                            f"blackouts of {min(spans):.1f} to {max(spans):.1f} s")


class Functions(Run):
    """The same with a device of two functions; each has a ring, memory and a sender of its own."""

    kept = (DEVICE, SIBLING, PORT)

    def __init__(self, ctx, **kw):
        super().__init__(ctx, second="+e1000e", **kw)

    def sides(self):
        """Of each function: what was sent, the counts, and its DMA in each blackout."""
        ready, rows = self.lines("READY")[0].when, self.lines("RESULT ")[-2:]
        expect(len(rows) == 2, f"not two functions: {rows}")
        transfers = self.transfers()
        for second, (sent, row) in enumerate(zip((self.sent, self.sibling_sent), rows)):
            ranges = [r[1:] for r in self.ranges() if (r[0] > ready) == bool(second)]
            yield (sent, {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", row)},
                   [sum(a <= when <= b and any(at <= address < at + n for at, n in ranges)
                        for when, address, _ in transfers) for a, b in self.blackouts()])

    def no_packet_lost(self):
        for sent, got, _ in self.sides():
            expect(len(sent) == got["received"] and not got["incomplete"], f"sent {len(sent)}: {got}")

    def nothing_lost(self, ctx, kexecs):
        for number, (sent, got, landed) in enumerate(self.sides()):
            lost = len(sent) - got["received"]
            expect(lost == 0 and not got["lost"], f"{lost} of {len(sent)} packets lost: {got}")
            expect(not (got["bad"] or got["doubled"] or got["incomplete"]), f"damage: {got}")
            expect(len(landed) == kexecs and all(landed), f"no DMA in a blackout: {landed}")
            ctx.figure(f"function {number}", f"{len(sent)} sent, {got['received']} landed, {lost} lost, "
                                             f"{sum(landed)} during {kexecs} blackouts")
        self.undisturbed(kexecs)


FULL = "dma.fill=1 dma.irq=1"


@test()
def dma_through_two_kexecs(ctx):
    """Free memory filled before the retrieve and compacted after it; an MSI-X vector used.

    A memfd that is not the device's is retrieved when the device is back in use.
    """
    Run(ctx, kexecs=2, options=f"{FULL} dma.more=1").nothing_lost(ctx, 2)


@test()
def dma_through_two_kexecs_with_uefi(ctx):
    """As hosts have it, with KASLR: of what the firmware left, and its stub, each kernel is told."""
    with empty_initrd() as initrd:
        run = Run(ctx, kexecs=2, options=FULL, machine="uefi", arguments=("-initrd", initrd))
    run.nothing_lost(ctx, 2)
    said = [x for x in run.vm.console.lines if re.search(r"efi: .*INITRD=0x", x)]
    expect(len(said) == 3, f"not three kernels know of the table of the stub: {said}")


@everywhere
@test()
def dma_of_an_igb_through_two_kexecs(ctx, **kw):
    """The same with another device, whose descriptors are other ones."""
    Run(ctx, device="igb", kexecs=2, options=FULL, **kw).nothing_lost(ctx, 2)


@everywhere
@test()
def dma_of_an_nvme_through_two_kexecs(ctx, **kw):
    """Reads complete in the blackout, on eight queues, whose eight vectors fire afterwards."""
    Run(ctx, device="nvme", kexecs=2, options=FULL, **kw).all_read(ctx, 2)


@test(part="dma")
def both_functions_of_a_device_through_two_kexecs(ctx):
    """Without an IOMMU they have nothing to do with each other but their slot and their port.

    Behind one they are a group, see vtd.py.
    """
    Functions(ctx, mode="functions", kexecs=2, options=FULL).nothing_lost(ctx, 2)


@everywhere
@test()
def every_vector_pending_in_the_blackout_fires(ctx, **kw):
    """Nothing is in flight but what completes in the blackout, on eight queues of an nvme."""
    expect(pending(ctx, **kw) == (8, 0), "a message was sent in the blackout")


@everywhere
@test(part="dma")
def every_vector_pending_fires_after_two_kexecs(ctx, **kw):
    """Nobody claims the device in the kernel between: what became pending before it is not lost."""
    expect(pending(ctx, "dma.unclaimed=1", kexecs=2, **kw) == (8, 0), "a message was sent in the blackout")


@everywhere
@test(part="dma")
def every_vector_fires_if_it_was_not_set_up_at_once(ctx, **kw):
    """The first time it fails, which takes what is pending: each of the nine is signalled the next time."""
    expect(pending(ctx, "dma.badirq=1", **kw) == (9, 0), "vectors did not fire, or a message was sent")


@everywhere
@test(part="dma")
def every_vector_fires_if_one_was_set_up_before_the_others(ctx, **kw):
    """Who wants more of them turns MSI-X off for that, which takes what is pending for the others."""
    expect(pending(ctx, "dma.fewirq=1", **kw) == (9, 0), "vectors did not fire, or a message was sent")


def messages(run, begin, end):
    """How many of the nvme's interrupts came to a local APIC while it was frozen.

    All is frozen when the old kernel shuts its other devices down, which it writes to. Before
    that each interrupt was seen to be a message; one that is not may be followed by others'.
    """
    frozen = min(e.when for e in run.trace({"pci_cfg_write"}) if begin < e.when < end)
    events = list(run.trace(set(MESSAGE)))
    pairs = [(a.when, (a.text, b.text)) for a, b in zip(events, events[1:]) if (a.name, b.name) == MESSAGE]
    own = {pair for when, pair in pairs if when < begin}
    return sum(frozen < when < end and pair in own for when, pair in pairs)


def pending(ctx, options="", kexecs=1, **kw):
    """How many vectors fired of those that became pending in the first blackout, and nowhere else.

    And how many messages the device sent meanwhile, while it must not.
    """
    run = Run(ctx, device="nvme", mode="pending", options=f"dma.irq=1 {options}", kexecs=kexecs,
              trace=MESSAGE, **kw)
    run.undisturbed(kexecs)
    begin, end = run.blackouts()[0]
    # Each queue has reads for two seconds; how many complete before reboot(2) is chance.
    queues = {m.group(1) for e in run.trace({"pci_nvme_enqueue_req_completion"})
              if begin < e.when < end and (m := re.search(r"cqid ([1-9]\d*)", e.text))}
    expect(len(queues) == 8, f"only the queues {sorted(queues)} completed reads in the blackout")
    m = re.search(r"irq: (\d+) of (\d+) vectors pending", run.lines("vectors pending")[0])
    ctx.figure("vectors", f"{m.group(1)} of {m.group(2)}")
    return int(m.group(1)), messages(run, begin, end)


@everywhere
@test()
def dma_goes_on_after_an_abort(ctx, **kw):
    """And so do interrupts. Meanwhile it is not reset, removed, or put to sleep, nor is the system."""
    run = Run(ctx, mode="abort", options="dma.irq=1", **kw)
    run.no_packet_lost()
    run.stayed_awake()


@test(part="dma")
def dma_of_an_igb_goes_on_after_an_abort(ctx):
    """Of which the user asks for an FLR by its configuration, and is told that there is none."""
    run = Run(ctx, device="igb", mode="abort")
    run.no_packet_lost()
    expect(run.lines("ok FLR while preserved"), f"no FLR was tried; see {run.vm.dir}")


@everywhere
@test()
def dma_goes_on_after_a_freeze_that_fails(ctx, **kw):
    """A next kernel without live update or KHO, a crash kernel, with ZONE_MOVABLE, that knows nothing of devices.

    INTx in a second session: the first one's device was frozen, and was in use all the time.
    """
    Run(ctx, mode="freezefail", options="dma.irq=1", **kw).no_packet_lost()


@test(part="dma")
def a_session_without_files_keeps_no_kernel_from_being_booted(ctx):
    """Not one without KHO, either, which is refused if a session has files."""
    run = Run(ctx, mode="nofiles", judge=False)
    expect(run.lines("ok kernel 2 runs"), f"the next kernel was not booted; see {run.vm.dir}")


@test(part="dma")
def dma_goes_on_if_another_function_does_not_go_along(ctx):
    """It uses the same context, from which it cannot be detached either: looked at again at the freeze."""
    Functions(ctx, mode="functionsleft").no_packet_lost()


@everywhere
@test()
def what_would_be_lost_is_refused_at_preserve(ctx, **kw):
    """User memory, a memfd outside of the session, a hole punched in one, a DMABUF, a PASID."""
    Run(ctx, mode="refusals", **kw).no_packet_lost()


@test(part="dma", kernels=(("faults", False, ""),))
def a_bar_that_is_exported_is_refused_at_preserve(ctx):
    """As a DMABUF, which is in the IOAS, and is not. Only one kernel of the lab can make one."""
    run = Run(ctx, mode="refusals", kernel=ctx.kernel("faults"), machine="vtd-legacy")
    run.no_packet_lost()
    for what in ("preserve with a DMABUF", "preserve a device with a BAR that is exported",
                 "reboot with a BAR that was exported since"):
        expect(run.lines(f"ok {what}"), f"there was no DMABUF; see {run.vm.dir}")


@test(part="dma")
def a_million_areas_are_listed_in_pieces(ctx):
    """Each with what it maps; after a change a list that was begun is not gone on with."""
    run = Run(ctx, mode="areas", memory="2G", rate=20, timeout=900)
    run.no_packet_lost()
    ctx.figure("areas", run.lines("ok .* areas listed")[0].split("ok ")[1])


@everywhere
@test()
def nobody_gets_at_a_device_that_waits(ctx, **kw):
    """Removed, reset, disabled, another driver; memory truncated, punched, zeroed; other order."""
    run = Run(ctx, mode="hostile", options=FULL, **kw)
    run.nothing_lost(ctx, 1)
    run.stayed_awake()


@test(part="dma")
def nobody_gets_at_an_igb_that_waits(ctx):
    """Which could have virtual functions, but for that."""
    Run(ctx, device="igb", mode="hostile", options=FULL).nothing_lost(ctx, 1)


@test(part="dma")
def a_sibling_does_not_reset_the_bus_of_a_device(ctx):
    """The user of another function asks for a hot reset, while preserved and before the retrieve."""
    Run(ctx, mode="sibling", second="+e1000e", options=FULL).nothing_lost(ctx, 1)


@test(part="dma")
def a_sibling_does_not_reset_the_slot_of_a_device(ctx):
    """The same with a port that has a slot of its own."""
    Run(ctx, mode="sibling", second="+e1000e", options=f"{FULL} {NATIVE}",
        arguments=PCIEHP).nothing_lost(ctx, 1)


@everywhere
@test()
def one_of_two_sessions_is_given_up(ctx, **kw):
    """Its device is quiesced, and that of the other goes on."""
    Run(ctx, mode="twosessions", options=FULL, **kw).nothing_lost(ctx, 1)


def quiesced(ctx, mode, **kw):
    """After the guest says so, the device writes nothing any more, into no memory."""
    run = Run(ctx, mode=mode, **kw)
    at = run.lines("QUIESCED")[0].wall
    before, after = run.dma(0, at), run.dma(at + 0.1, at + 2.5)
    expect(before, "no DMA at all")
    expect(not after, f"{after} packets written after the device was quiesced")
    expect(run.lines("ok filled memory"), "free memory was not looked at")
    run.no_strays()
    return run


@everywhere
@test()
def quiesced_when_finished_without_being_retrieved(ctx, **kw):
    quiesced(ctx, "noretrieve", **kw)


@everywhere
@test()
def quiesced_at_the_last_close(ctx, **kw):
    quiesced(ctx, "lastclose", **kw)


@everywhere
@test()
def quiesced_at_the_deadline(ctx, **kw):
    """And not before."""
    run = quiesced(ctx, "deadline", **kw)
    up = run.blackouts()[0][1]
    expect(run.dma(up, up + 2), "it was stopped before its deadline")


@everywhere
@test(part="dma")
def quiesced_when_the_session_is_abandoned(ctx, **kw):
    quiesced(ctx, "abandon", **kw)


@everywhere
@test()
def quiesced_at_a_second_kexec(ctx, **kw):
    """The session of the first one was not finished, not even retrieved."""
    quiesced(ctx, "second", **kw)


@everywhere
@test(part="dma")
def quiesced_at_a_second_kexec_after_the_retrieve(ctx, **kw):
    quiesced(ctx, "secondretrieved", **kw)


@everywhere
@test(part="dma")
def quiesced_at_a_second_kexec_before_the_finish(ctx, **kw):
    """Its user has bound the device, but not replaced what it is attached to; nothing of it can be handed on."""
    quiesced(ctx, "secondbound", **kw)


@everywhere
@test(part="dma")
def quiesced_when_the_owner_is_killed_while_it_is_preserved(ctx, **kw):
    quiesced(ctx, "killedpreserved", kexecs=0, **kw)


@everywhere
@test(part="dma")
def quiesced_when_the_owner_is_killed_after_the_retrieve(ctx, **kw):
    quiesced(ctx, "killedretrieved", **kw)


@everywhere
@test()
def quiesced_when_the_owner_is_killed_before_the_replace(ctx, **kw):
    quiesced(ctx, "killedbound", **kw)


@everywhere
@test()
def quiesced_at_an_unplug_in_the_next_kernel(ctx, **kw):
    quiesced(ctx, "unplug", **kw)


def after_an_error(ctx, mode, **kw):
    """The link is reset: by AER, and by the kernel itself, as the firmware of the lab does nothing."""
    console = quiesced(ctx, mode, **kw).vm.console
    expect(console.find("Uncorrectable .Fatal. Error message received") is not None, "no error was reported")


@everywhere
@test()
def quiesced_at_a_fatal_error_in_the_next_kernel(ctx, **kw):
    after_an_error(ctx, "error", **kw)


@everywhere
@test(part="dma")
def a_fatal_error_resets_a_device_that_is_not_finished(ctx, **kw):
    """It is bound again; its user is told, and the port does what it is asked for."""
    after_an_error(ctx, "errorbound", **kw)


@everywhere
@test()
def a_reset_resets_a_device_that_is_not_finished(ctx, **kw):
    """Of its bus, by its user, who has bound it again."""
    run = quiesced(ctx, "reset", trace=("e1000e_cb_qdev_reset_hold",), **kw)
    end = run.blackouts()[0][1]
    expect(any(e.when > end for e in run.trace({"e1000e_cb_qdev_reset_hold"})), "it was not reset")


@everywhere
@test(part="dma")
def a_kexec_is_refused_after_a_fatal_error(ctx, **kw):
    after_an_error(ctx, "errorold", kexecs=0, **kw)


@everywhere
@test(part="dma")
def an_unplug_while_preserved_waits_for_the_user(ctx, **kw):
    quiesced(ctx, "unplugold", kexecs=0, **kw)


@everywhere
@test(part="dma")
def a_kexec_is_refused_while_an_unplug_is_pending(ctx, **kw):
    """It would wait for the device's user for ever, with the device frozen."""
    quiesced(ctx, "unplugreboot", kexecs=0, **kw)


@everywhere
@test(part="dma")
def a_device_is_preserved_when_its_reset_is_over(ctx, **kw):
    """A reset by sysfs that has begun is waited for; it would hit what is preserved."""
    run = Run(ctx, mode="resetting", kexecs=0, **kw)
    expect(run.lines("ok preserved .* after the reset"), "nothing was reset")


@everywhere
@test(part="dma")
def a_device_with_virtual_functions_is_refused(ctx, **kw):
    """So is one of them, and making some of a preserved device. QEMU's igb drops packets meanwhile."""
    Run(ctx, device="igb", mode="sriov", kexecs=0, options="vfio_pci.enable_sriov=1", **kw)


@everywhere
@test(part="dma")
def a_panic_while_frozen_ends_in_a_reset(ctx, **kw):
    """The machine starts again, and knows no session."""
    run = Run(ctx, mode="panic", **kw)
    expect(run.vm.console.find("Kernel panic - not syncing: sysrq") is not None, "no panic")
    expect(len(run.lines("ok a session after a panic")) == 2, "it did not start again")


# Either will do: lines of the early console can be cut off when the guest is slow.
STOPPED = r"bus mastering turned off|KHO: all devices were"


def quiesced_as_the_handover_is_refused(ctx, mode, **kw):
    """The next kernel refuses it in early boot, and uses the memory for itself.

    Without kho_stop_dma(), the device goes on: packets are written, and change the pattern
    that all free memory is filled with.
    """
    console = quiesced(ctx, mode, **kw).vm.console
    expect(console.find("disabling KHO revival") is not None, "the handover was not refused")
    expect(console.find(STOPPED) is not None, "no device was stopped in early boot")


@everywhere
@test()
def quiesced_if_the_map_of_memory_is_damaged(ctx, **kw):
    quiesced_as_the_handover_is_refused(ctx, "map", **kw)


@everywhere
@test()
def quiesced_if_the_handover_cannot_be_read(ctx, **kw):
    quiesced_as_the_handover_is_refused(ctx, "fdt", **kw)


def quiesced_as_it_is_not_taken_over(ctx, mode, text, **kw):
    """What the old kernel wrote down of the device and its port is damaged."""
    console = quiesced(ctx, mode, **kw).vm.console
    expect(console.find(text) is not None, f"the kernel does not say '{text}'")


@everywhere
@test()
def quiesced_if_it_is_another_device(ctx, **kw):
    quiesced_as_it_is_not_taken_over(ctx, "vendor", "01:00.0: stopped, it cannot be kept running", **kw)


@everywhere
@test()
def quiesced_if_the_records_are_invalid(ctx, **kw):
    quiesced_as_it_is_not_taken_over(ctx, "flags", "01:00.0: stopped, it cannot be kept running", **kw)


@everywhere
@test(part="dma")
def quiesced_if_a_record_names_no_driver(ctx, **kw):
    """It would wait for one that does not exist."""
    quiesced_as_it_is_not_taken_over(ctx, "driver", "records of preserved devices are damaged: the driver", **kw)


@everywhere
@test()
def quiesced_if_the_domains_are_of_another_version(ctx, **kw):
    """Of all that is handed over it is only these that the next kernel does not know."""
    quiesced_as_it_is_not_taken_over(ctx, "flb", "01:00.0: liveupdate: what it has access to is not", **kw)


@everywhere
@test()
def quiesced_if_there_is_no_record(ctx, **kw):
    """The device moved, or the record is damaged: it is still the only one that is running."""
    quiesced_as_it_is_not_taken_over(ctx, "slot", "01:00.0: stopped, it cannot be kept running", **kw)


@everywhere
@test()
def quiesced_if_its_port_is_not_taken_over(ctx, **kw):
    quiesced_as_it_is_not_taken_over(ctx, "bridge", "01:00.0: liveupdate: a bridge above was not", **kw)


@everywhere
@test()
def quiesced_if_the_context_is_damaged(ctx, **kw):
    """The iommufd cannot be retrieved; all packets are in the memory, until nobody has the device."""
    run = quiesced(ctx, "context", rate=200, **kw)
    got = run.result()
    expect(got["received"] and not (got["lost"] or got["bad"] or got["doubled"]), f"damage: {got}")
    expect(run.vm.console.find("flags of a preserved context cannot be right") is not None,
           "the kernel does not say why")


@everywhere
@test()
def memory_alone_is_lost_without_stopping_devices(ctx, **kw):
    """Nothing to stop, nothing to panic for: the machine comes up with all of its memory."""
    console = Run(ctx, mode="map", options="dma.memonly=1", **kw).vm.console
    expect(console.find("disabling KHO revival") is not None, "the handover was not refused")
    expect(console.find(STOPPED) is None, "devices were stopped for no reason")


def control(ctx, **kw):
    """Without the device preserved, DMA ends with the kernel, and the packets are lost."""
    run = Run(ctx, mode="control", **kw)
    got, (begin, end) = run.result(), run.blackouts()[0]
    if run.device in NICS:
        lost, of = len(run.sent) - got["received"], len(run.sent)
        late = run.dma(begin + 0.5, end)
    else:   # QEMU goes on completing what it has read, with nowhere to write it
        lost, of, late = got["lost"] + got["failed"] + got["bad"], got["posted"], 0
    expect(lost > 100, f"only {lost} of {of} were lost: the tests cannot fail")
    expect(not late, f"{late} packets landed well after the kexec began")
    ctx.figure("lost", f"{lost} of {of}")


@everywhere
@test()
def control_packets_are_lost_if_only_memory_is_preserved(ctx, **kw):
    control(ctx, **kw)


@everywhere
@test(part="dma")
def control_reads_are_lost_if_only_memory_is_preserved(ctx, **kw):
    control(ctx, device="nvme", **kw)


@everywhere
@test(part="dma", kernels=(("minimal", True, ""),))
def control_packets_are_lost_on_the_unpatched_kernel(ctx, **kw):
    control(ctx, kernel=ctx.kernel(unpatched=True), **kw)


@test(part="dma")
def dma_through_twenty_kexecs(ctx):
    Run(ctx, kexecs=20, options=FULL, timeout=900).nothing_lost(ctx, 20)


@everywhere
@test(part="dma")
def dma_of_an_igb_through_twenty_kexecs(ctx, **kw):
    Run(ctx, device="igb", kexecs=20, options=FULL, timeout=900, **kw).nothing_lost(ctx, 20)


@everywhere
@test(part="dma")
def dma_of_an_nvme_through_twenty_kexecs(ctx, **kw):
    Run(ctx, device="nvme", kexecs=20, options=FULL, timeout=900, **kw).all_read(ctx, 20)
