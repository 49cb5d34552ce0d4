# SPDX-License-Identifier: GPL-2.0-or-later
"""Intel VT-d: IO page tables are replaced under DMA, and go over a kexec.

The guest's half is guest/dma-guest.c. With dma.mode=replace an e1000e that packets
are sent to all the time goes to and fro between two HWPTs of one IOAS. Otherwise
the kernel is replaced, and the device, translated all the time, goes from the frozen
HWPT to one of the new kernel. Packets that were not written, and DMA that QEMU's
IOMMU refused, are counted.
"""

import re

from lablib.check import expect, test
from .dma import (DEVICE as DEVICE_SLOT, ENABLE, FAULT, PORT, REQUESTERS, Functions, Run, faults,
                  quiesced, requester)
from .upstream import quiet

MODES = {"legacy": "vtd-legacy", "second-stage": "vtd-scalable", "first-stage": "vtd-first-stage"}
FILL = "vtd_iotlb_page_update"
KDUMP = ("kdump", False, "")
MINIMAL, UNPATCHED = ("minimal", False, ""), ("minimal", True, "")
DEVICE = REQUESTERS[0]


def says(run, text):
    """Any of it, and little: the console loses a character now and then."""
    expect(any(re.search(text, x) for x in run.vm.console.lines), f"the kernel does not say '{text}'")


class Replaces:
    """A run of @count replaces in @mode, more if they take less than a second, and what came of it."""

    def __init__(self, ctx, mode, count, *, rate=2000, kernel=None, icount=False):
        run = Run(ctx, mode="replace", rate=rate, options=f"dma.replaces={count}", kernel=kernel,
                  machine=MODES.get(mode, mode), timeout=120 + count / 20, icount=icount)
        said, got = run.lines("REPLACED"), run.result()
        expect(said, f"the replaces did not come to their end; see {run.vm.dir}")
        self.hitless = bool(run.lines("hitless 1"))
        self.count, self.each, self.median = (
            float(re.search(rf"\b{k}=([\d.]+)", said[0]).group(1))
            for k in ("n", "replace_us", "median_us"))
        # By the host's clocks
        begin, end = run.lines("REPLACING")[0], said[0]
        self.meanwhile = run.dma(begin.wall, end.wall)
        self.seconds = end.when - begin.when
        self.sent, self.lost = len(run.sent), len(run.sent) - got["received"]
        self.damaged = got["bad"] + got["doubled"] + got["incomplete"]
        self.faults = faults(run)
        if icount:          # the times are numbers of instructions
            return
        ctx.figure(mode, f"{self.count:.0f} replaces in {self.seconds:.1f} s ({self.each:.0f} us each), "
                         f"{self.sent} packets, {self.meanwhile} written meanwhile, {self.lost} lost, "
                         f"{self.damaged} damaged, {self.faults} faults")

    def judge(self):
        expect(self.meanwhile > 100, f"only {self.meanwhile} packets were written while replacing")
        expect(not self.lost, f"{self.lost} of {self.sent} packets lost")
        expect(not self.damaged, f"{self.damaged} packets damaged, doubled or incomplete")
        expect(not self.faults, f"{self.faults} DMA requests refused")
        expect(self.hitless, "IOMMU_GET_HW_INFO does not say that replacing is hitless")


def add(mode):
    @test(f"replace-under-dma-{mode}")
    def quick(ctx):
        """No packet lost and no fault in 2,000 replaces and more between two equal HWPTs."""
        Replaces(ctx, mode, 2000).judge()

    @test(f"replace-100000-times-{mode}", part="vtd")
    def full(ctx):
        """The same, 100,000 times."""
        Replaces(ctx, mode, 100000).judge()

    @test(f"control-unpatched-replace-loses-packets-{mode}", part="vtd", kernels=(UNPATCHED,))
    def control(ctx):
        """The unpatched driver loses packets in the same test, or faults."""
        old = Replaces(ctx, mode, 10000, kernel=ctx.kernel(unpatched=True))
        expect(old.lost, f"nothing of {old.sent} packets was lost: the test cannot fail")
        expect(old.faults, "no fault counted")
        expect(not old.hitless, "the unpatched kernel says that replacing is hitless")


def instructions(ctx, mode, kernel):
    """How many instructions the guest executes for one replace, the system call included."""
    return 1000 * Replaces(ctx, mode, 2000, rate=100, kernel=kernel, icount=True).median


def add_cost(mode):
    @test(f"a-replace-takes-few-instructions-{mode}", part="vtd", kernels=(MINIMAL, UNPATCHED))
    def cost(ctx):
        """At most a tenth more than the unpatched driver, which blocks the device meanwhile."""
        new, old = (instructions(ctx, mode, ctx.kernel(unpatched=x)) for x in (False, True))
        ctx.figure("instructions", f"{new:.0f} a replace, {old:.0f} on the unpatched kernel")
        expect(old > 1000, "the guest's clock does not count instructions")
        expect(new <= old * 1.1, f"{new / old:.2f} times those of the unpatched kernel")


class Kexec(Run):
    """@kexecs kexecs in @mode; free memory is filled before and compacted after each retrieve."""

    def __init__(self, ctx, mode, kexecs, *, options="", timeout=240, guest="run", **kw):
        super().__init__(ctx, mode=guest, kexecs=kexecs, machine=MODES.get(mode, mode),
                         trace=(FILL,), options=f"dma.fill=1 {options}",
                         timeout=timeout, **kw)

    def judge(self, ctx, kexecs):
        self.nothing_lost(ctx, kexecs)
        # On once, by the first kernel, and never off until the machine is.
        switched = self.switched()
        expect(len(switched) == 1, f"translation was switched {len(switched)} times: {switched}")
        expect(len(self.lines("replaced the frozen HWPT")) == kexecs, "a frozen HWPT was not replaced")
        quiet(self.vm)

    def switched(self):
        """How the IOMMU was switched on and off before the last kernel was up."""
        end = self.blackouts()[-1][1]
        return [e.text for e in self.trace({ENABLE}) if e.when < end]

    def looked_up(self):
        """The entries of page tables by which the IOMMU translated for the device."""
        return [int(re.search(r"slpte (0x[0-9a-f]+)", e.text).group(1), 16)
                for e in self.trace({FILL}) if requester(e) == DEVICE]

    def page_sizes(self):
        """How many translations of 4 KiB and of 2 MiB (with bit 7 set) the IOMMU looked up."""
        entries = self.looked_up()
        large = sum(bool(x & 0x80) for x in entries)
        return len(entries) - large, large


def add_kexec(mode):
    @test(f"dma-through-two-kexecs-{mode}")
    def quick(ctx):
        """Translated all the time: nothing lost, no fault, and translation is never off."""
        Kexec(ctx, mode, 2, options="dma.irq=1").judge(ctx, 2)

    @test(f"dma-through-twenty-kexecs-{mode}", part="vtd")
    def full(ctx):
        """The same, 20 in a row."""
        Kexec(ctx, mode, 20, options="dma.irq=1", timeout=1200).judge(ctx, 20)


for name in MODES:
    add(name)
    add_cost(name)
    add_kexec(name)


@test(part="vtd")
def replace_and_kexec_in_caching_mode(ctx):
    """An IOMMU that caches what is not present, as one that a hypervisor emulates may."""
    Replaces(ctx, "vtd-caching", 20000).judge()
    Kexec(ctx, "vtd-caching", 2).judge(ctx, 2)


@test(part="vtd")
def the_mode_of_the_unit_is_kept(ctx):
    """The next kernel is told to use scalable mode, and the unit is in legacy mode, and back."""
    for first, then in (("sm_off", "sm_on"), ("sm_on", "sm_off")):
        run = Kexec(ctx, "second-stage", 1,
                    options=f"intel_iommu={first} dma.next=intel_iommu={then}")
        run.judge(ctx, 1)
        mode = "legacy" if first == "sm_off" else "scalable"
        says(run, f"going on in {mode[:2]}")


@test(part="vtd")
def the_iommu_stays_on_if_the_next_kernel_is_told_otherwise(ctx):
    Kexec(ctx, "legacy", 1, options="dma.next=intel_iommu=off").judge(ctx, 1)


@test()
def dma_goes_on_after_an_abort_vtd(ctx):
    run = Run(ctx, mode="abort", machine=MODES["legacy"])
    got = run.result()
    expect(len(run.sent) == got["received"] and not got["incomplete"], f"sent {len(run.sent)}: {got}")
    run.none_refused()


# A device with a driver of the kernel's, for which the IOMMU has to translate.
OTHER = ("-global", "virtio-rng-pci.iommu_platform=on", "-global", "virtio-rng-pci.disable-legacy=on")


def others_go_on(ctx, damage, mode, text):
    """The device is stopped before the IOMMU driver starts; other devices are translated."""
    run = quiesced(ctx, damage, machine=MODES[mode], arguments=OTHER)
    says(run, text)


LOST = "a bridge above was not taken over|was preserved and is lost|01:00.0: liveupdate: quiesced"


@test(part="vtd")
def others_go_on_if_a_device_is_lost_legacy(ctx):
    others_go_on(ctx, "bridge", "legacy", LOST)


@test(part="vtd")
def others_go_on_if_a_device_is_lost_first_stage(ctx):
    others_go_on(ctx, "bridge", "first-stage", LOST)


@test(part="vtd")
def others_go_on_if_the_list_of_domains_is_damaged(ctx):
    others_go_on(ctx, "domains", "second-stage", "not described correctly|what it has access to is not known")


@test(part="vtd")
def others_go_on_if_no_record_of_a_device_can_be_read(ctx):
    others_go_on(ctx, "flags", "first-stage", "records of preserved devices are damaged: the flags")


RESETS = ("e1000e_core_ctrl_sw_reset", "e1000e_cb_qdev_reset_hold")


class Plain(Run):
    """Two kexecs with DMA until each of them, and nothing preserved: the device is opened anew."""

    def __init__(self, ctx, mode, kernel):
        super().__init__(ctx, mode="plain", kexecs=2, machine=MODES[mode], kernel=kernel,
                         options="dma.irq=1", trace=RESETS)

    def judge(self):
        """In each kernel packets come in, all of them, from when the device was opened."""
        rows = [{k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", x)} for x in self.lines("RESULT ")]
        expect(len(rows) == 3, f"not three kernels: {rows}")
        bad = [x for x in rows if x["received"] < 500 or any(
            x[k] for k in ("lost", "bad", "doubled", "incomplete"))]
        expect(not bad, f"packets are missing in one of three kernels: {rows}")
        expect(len(self.lines("ok filled memory")) == 2, "free memory was not looked at in both kernels")

    def seen(self):
        """How the device, its port, and the IOMMU were treated from each kexec until packets come in."""
        spans = [(a.wall, b.wall) for a, b in zip(self.lines("KEXEC"), self.lines("READY")[1:])]
        def within(when):
            return any(a < when < b for a, b in spans)
        return {
            "configuration": [row[2:] for row in self.writes
                              if row[2] in (DEVICE_SLOT, PORT) and within(row[0])],
            "resets": [e.name for e in self.trace(set(RESETS)) if within(e.when)],
            "switched": [e.text for e in self.trace({ENABLE}) if within(e.when)],
        }


def add_plain(mode):
    @test(f"a-plain-kexec-is-as-on-the-unpatched-kernel-{mode}", part="vtd", kernels=(MINIMAL, UNPATCHED))
    def plain(ctx):
        """With translation on, and the device in use until the kexec: reset and opened anew, and no fault."""
        new, old = (Plain(ctx, mode, ctx.kernel(unpatched=x)) for x in (False, True))
        new.judge()
        old.judge()
        for what, now in new.seen().items():
            before = old.seen()[what]
            expect(now == before, f"{what}: {now}, on the unpatched kernel {before}")
            expect(now, f"nothing was seen of {what}: the test cannot fail")
        ctx.figure("faults", f"{faults(new)}, on the unpatched kernel {faults(old)}")
        expect(faults(new) <= faults(old), f"{faults(new)} DMA requests refused, {faults(old)} before")


for name in MODES:
    add_plain(name)


def stopped(ctx, mode):
    """Every 16th packet is to go to where nothing is mapped; the IOMMU stops it in both kernels."""
    run = Run(ctx, kexecs=1, machine=MODES[mode], options="dma.outside=16")
    got, sent = run.result(), len(run.sent)
    # Not "lost": a last packet that went astray is followed by none that would show it.
    expect(sent - got["received"] == got["bad"], f"sent {sent}: {got}")
    hits = [e.when for e in run.trace({FAULT}) if requester(e) == DEVICE]
    (begin, end), = run.blackouts()
    phases = [sum(a <= t < b for t in hits) for a, b in ((0, begin), (begin, end), (end, float("inf")))]
    expect(all(phases), f"faults before, during and after the blackout: {phases}")
    expect(sum(phases) >= got["bad"], f"{phases} faults for {got['bad']} packets")
    ctx.figure("stopped", f"{got['bad']} of {sent} packets, faults {phases} before, during and after "
                          f"the blackout")


@test()
def dma_outside_of_the_mappings_is_stopped(ctx):
    stopped(ctx, "legacy")


@test(part="vtd")
def dma_outside_of_the_mappings_is_stopped_first_stage(ctx):
    stopped(ctx, "first-stage")


def stopped_instead(ctx, machine, options=""):
    """A kernel that does not go on as the previous one loses packets, and stops the device."""
    run = Run(ctx, mode="stopped", kexecs=1, machine=machine,
              options=f"{options} intel_liveupdate.test_no_adopt=1")
    got, end = run.result(), run.blackouts()[0][1]
    looked = run.lines("ok filled memory")
    expect(looked, "free memory was not looked at")
    lost, late = len(run.sent) - got["received"], run.dma(end, looked[0].wall)
    expect(lost > 100, f"only {lost} of {len(run.sent)} packets were lost: the tests cannot fail")
    expect(not late, f"{late} packets were written after the device was stopped")
    expect(run.vm.console.find("nobody can take the device over") is not None,
           "the kernel does not say why it stops the device")
    ctx.figure("lost", f"{lost} of {len(run.sent)}")
    return run


@test()
def control_packets_are_lost_without_the_adoption(ctx):
    stopped_instead(ctx, MODES["legacy"])


@test()
def an_iommu_that_was_off_stays_off(ctx):
    """The device uses physical addresses, and the next kernel is told to turn the IOMMU on."""
    run = Run(ctx, kexecs=2, machine="vtd-off",
              options="dma.fill=1 dma.irq=1 dma.next=intel_iommu=on")
    run.nothing_lost(ctx, 2)
    expect(not list(run.trace({ENABLE})), "the IOMMU was turned on")
    expect(run.vm.console.find("off, whatever the command line says") is not None,
           "the kernel does not say that it leaves the IOMMU off")


@test(part="vtd")
def control_packets_are_lost_if_the_iommu_is_turned_on(ctx):
    """The same with a kernel that obeys: the device is not blocked for long, but stopped."""
    run = stopped_instead(ctx, "vtd-off", "dma.next=intel_iommu=on")
    expect(list(run.trace({ENABLE})), "the IOMMU was not turned on")


@test(part="vtd")
def dma_and_interrupts_with_interrupt_remapping(ctx):
    """The remapping table is not handed over: vectors are masked until they are set up again."""
    run = Kexec(ctx, "vtd-intremap", 2, options="dma.irq=1")
    run.judge(ctx, 2)
    expect(run.vm.console.find("Enabled IRQ remapping") is not None, "interrupts are not remapped")


class Group(Kexec, Functions):
    """Both functions are sent packets; without ACS, they are one IOMMU group."""

    def __init__(self, ctx, mode, kexecs, **kw):
        super().__init__(ctx, mode, kexecs, guest="functions", **kw)


def two_functions(ctx, mode, **kw):
    run = Group(ctx, mode, 2, options="dma.irq=1", **kw)
    run.judge(ctx, 2)
    return run


@test(part="vtd")
def two_devices_of_a_group_through_two_kexecs_legacy(ctx):
    """None is moved before both are bound; the first moves both, and the other moves both back."""
    two_functions(ctx, "legacy")


@test(part="vtd")
def two_devices_of_a_group_through_two_kexecs_first_stage(ctx):
    two_functions(ctx, "first-stage")


@test(part="vtd")
def two_devices_of_a_group_through_twenty_kexecs(ctx):
    run = Group(ctx, "second-stage", 20, options="dma.irq=1", timeout=1500)
    run.judge(ctx, 20)


@test(part="vtd")
def two_devices_in_a_group_with_their_port_go_through_two_kexecs(ctx):
    """The port has no ACS either, and is in the group. It has an entry of its own."""
    run = two_functions(ctx, "second-stage", arguments=("-global", "pcie-root-port.disable-acs=on"))
    expect(run.vm.console.find("goes on translating for 3 requester ids") is not None,
           "the port was not in the group")


@test(part="vtd")
def a_group_of_which_one_device_is_never_bound_is_quiesced(ctx):
    """It is not moved alone, and when everything is closed nothing of either is refused before it stops."""
    run = quiesced(ctx, "functionsunbound", machine=MODES["legacy"], second="+e1000e")
    run.none_refused(": it was blocked and not stopped")


@test(part="vtd", kernels=(("faults", False, ""),))
def a_group_is_stopped_if_opening_a_bound_device_fails(ctx):
    """Both lose their translation with it. The other device was never opened, and is stopped before."""
    run = quiesced(ctx, "functionsfail", machine=MODES["legacy"], second="+e1000e",
                   kernel=ctx.kernel("faults"))
    gone = "01:00.1: liveupdate: the devices of its IOMMU group that were bound are gone"
    expect(run.vm.console.find(gone) is not None, "the second function was not stopped for this")
    run.none_refused(": it was blocked and not stopped")


@test(part="vtd")
def a_device_of_a_group_goes_on_after_the_deadline_of_another(ctx):
    """Nobody comes for either. The first that is stopped does not take the page table away."""
    run = quiesced(ctx, "functionsdeadline", machine=MODES["legacy"], second="+e1000e", timeout=300)
    one, both = (run.lines(x)[0].wall for x in ("ONE", "QUIESCED"))
    landed = run.dma(one + 0.1, both)
    expect(landed > 1000, f"{landed} packets of the first function after the second was stopped")
    run.none_refused()
    ctx.figure("packets", f"{landed} in {both - one:.0f} s after the second function was stopped")


def group_stopped(ctx, mode, step):
    quiesced(ctx, "functionsstopped", machine=MODES[mode], second="+e1000e",
             options=f"dma.next=liveupdate_test_fail={step}:2")


@test(part="vtd")
def a_group_is_stopped_if_one_device_cannot_be_taken_over_legacy(ctx):
    """By the IOMMU driver, which blocks the second function. The first one could go on."""
    group_stopped(ctx, "legacy", "vtd-entry")


@test(part="vtd")
def a_group_is_stopped_if_one_device_cannot_be_taken_over_first_stage(ctx):
    group_stopped(ctx, "first-stage", "pasid-table")


@test(part="vtd")
def a_device_goes_on_if_another_of_its_group_is_lost(ctx):
    """There is no memory to take over the second function; the port and the first one came before."""
    run = Run(ctx, mode="functionslost", machine=MODES["legacy"], second="+e1000e",
              options="dma.next=liveupdate_test_fail=pci-device:3")
    got, lost = run.result(), len(run.sent) - run.result()["received"]
    expect(not (lost or got["bad"] or got["doubled"] or got["incomplete"]), f"{lost} lost: {got}")
    writes = run.config_writes()
    expect(not writes, f"forbidden: {writes[:5]}")
    run.no_strays()
    run.none_refused()
    ctx.figure("packets", f"{len(run.sent)} sent, {lost} lost")


@test(part="vtd")
def a_group_of_which_one_device_is_not_preserved_is_refused(ctx):
    """At reboot(2), with the name of the device; DMA of both goes on."""
    run = Functions(ctx, mode="functionsleft", machine=MODES["legacy"])
    run.no_packet_lost()
    run.none_refused()


# 03:00.0 and .1, without ACS, are one group; 05:01.0 has the bridge's requester id.
REFUSED = ("-device", "pcie-root-port,id=rpf,slot=8,chassis=8,bus=pcie.0,addr=0x1a",
           "-device", "e1000e,bus=rpf,addr=0.0,multifunction=on", "-device", "e1000e,bus=rpf,addr=0.1",
           "-device", "pcie-root-port,id=rpb,slot=9,chassis=9,bus=pcie.0,addr=0x1b",
           "-device", "pcie-pci-bridge,id=ppb,bus=rpb", "-device", "e1000,bus=ppb,addr=1")


@test(part="vtd")
def devices_with_ats_parts_of_groups_and_aliases_are_refused(ctx):
    """Each by name, with DMA of another device going on, which is preserved after that."""
    run = Run(ctx, mode="refused-devices", machine="vtd-ats", second="virtio-net",
              arguments=REFUSED)
    run.no_packet_lost()
    for text in ("03:00.1: liveupdate: is not attached as the devices of its IOMMU group",
                 "05:01.0: .*its DMA has the requester id of another device"):
        says(run, text)


def crash(ctx, mode, kexecs):
    """A panic under DMA; the crash kernel copies the IOMMU's tables, and reads all of the dump."""
    run = Run(ctx, mode="crash", kexecs=kexecs, machine=MODES[mode], kernel=ctx.kernel("kdump"),
              memory="1G", arguments=("-no-reboot",),
              # The next kernel has no other memory than scratch to reserve any for a crash kernel.
              options="crashkernel=256M kho_scratch=16M,384M,16M")
    for said in ("the dump is an ELF file", "the memory of the device is in it", "the dump was read",
                 "filled memory"):
        expect(run.lines(f"ok {said}"), f"not said: {said}; see {run.vm.dir}")
    begin, up, end = (run.lines(f"{w}$")[0].wall for w in ("CRASH", "CRASHED", "STOP"))
    before, since = run.dma(begin, up), run.dma(up, end)
    ctx.figure("dump", f"{run.lines('the dump was read')[0].split(': ')[-1]}, {before} packets written "
                       f"while the crash kernel started and {since} since")
    # Only with the tables of the kernel that is gone.
    expect(since > 100, f"only {since} packets were written with the crash kernel up")
    run.none_refused()
    run.no_strays()


def add_crash(mode):
    @test(f"a-crash-kernel-writes-a-dump-after-an-adoption-{mode}", part="vtd", kernels=(KDUMP,))
    def adopted(ctx):
        """The kernel that panics goes on with tables that are its predecessor's."""
        crash(ctx, mode, 1)

    @test(f"a-crash-kernel-writes-a-dump-{mode}", part="vtd", kernels=(KDUMP,))
    def plain(ctx):
        """The same with nothing preserved."""
        crash(ctx, mode, 0)


for name in MODES:
    add_crash(name)
