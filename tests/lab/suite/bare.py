# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab itself: guests with a bare init, kexecs in a row, DMA counted from outside."""

from lablib.check import expect, test
from lablib.common import LabError
from lablib.profiles import PROFILES


def boot_id(vm):
    return vm.run("cat /proc/sys/kernel/random/boot_id").out.strip()


def kexec_loop(ctx, count):
    """@count kexecs in a row; each must be a new boot of a kernel that got KHO data."""
    with ctx.vm(init="bare") as vm:
        vm.ready()
        seen = {boot_id(vm)}
        start = vm.console.lines[vm.console.find("Linux version")].when
        for i in range(1, count + 1):
            vm.kexec()
            seen.add(boot_id(vm))
            expect(len(seen) == i + 1, f"kexec {i} did not give a new boot id")
            # Two lines say so: on a busy host the serial port loses a character now and then.
            expect(vm.console.find(r"found kexec handover data|KHO: exec from", vm.mark) is not None,
                   f"kernel {i} says nothing of data handed over by the one before")
        end = vm.console.lines[vm.mark].when
        ctx.figure("cycle", f"{(end - start) / count:.1f} s")


@test()
def three_bare_kexecs_in_a_row(ctx):
    kexec_loop(ctx, 3)


@test(part="kexec")
def forty_bare_kexecs_in_a_row(ctx):
    kexec_loop(ctx, 40)


@test(part="kexec")
def control_memory_pressure_that_fails_is_noticed(ctx):
    """Whichever init is to use up the memory."""
    for init in ("bare", "systemd"):
        with ctx.vm(init=init, pressure=True, name=f"pressure-{init}") as vm:
            vm.ready()
            vm.run("ln -sf /bin/false /usr/lib/khod-lab/memory-pressure; sync")
            try:
                vm.kexec()
                text = ""
            except LabError as e:
                text = str(e)
            expect(vm.boots == 2 and "memory-pressure" in text, f"{init}: {vm.boots} boots, {text or 'no error'}")


def comes_up(ctx, machine, devices, *words, can=None):
    """The machine boots with these devices below root ports, the kernel says @words, VT-d's unit can do @can."""
    with ctx.vm(init="bare", machine=machine, devices=devices, name=machine) as vm:
        vm.ready()
        pci = vm.run("lspci -n").out
        for kind in devices:
            expect(PCI_IDS[kind] in pci, f"{machine}: no {kind} ({PCI_IDS[kind]}) in: {pci}")
        ports = vm.run("lspci -n | grep -c '^00:1.*1b36:000c'", check=False).out.strip()
        expect(int(ports) == len([d for d in devices if d != "edu"]), f"{machine}: {ports} root ports for {devices}")
        for w in words:
            expect(vm.console.find(w) is not None, f"{machine}: the kernel does not say '{w}'")
        if can is not None:
            cap, ecap = (int(x, 16) for x in vm.run("cd /sys/class/iommu/dmar0/intel-iommu; cat cap ecap").out.split())
            got = {name for name, (of, bit) in UNIT.items() if {"cap": cap, "ecap": ecap}[of] >> bit & 1}
            expect(got == set(can), f"{machine}: VT-d's unit can do {got}")
    ctx.figure(machine, "up")


PCI_IDS = {"e1000e": "8086:10d3", "igb": "8086:10c9", "nvme": "1b36:0010", "edu": "1234:11e8",
           "virtio-net": "1af4:1041"}

# Bits of VT-d's capability registers (specification, 11.4.2 and 11.4.3) in which the profiles differ.
UNIT = {"caching": ("cap", 7), "device-tlb": ("ecap", 2), "snoop": ("ecap", 7), "scalable": ("ecap", 43),
        "second-stage": ("ecap", 46), "first-stage": ("ecap", 47)}
ON, SCALABLE, LEGACY = "DMAR: IOMMU enabled", "Enable scalable mode", "Scalable mode is disallowed"


@test()
def every_machine_comes_up(ctx):
    """Each profile, and each kind of device in at least one of them."""
    comes_up(ctx, "noiommu", ["e1000e", "igb", "nvme", "edu"])
    comes_up(ctx, "vtd-legacy", ["e1000e"], ON, LEGACY, can=())
    comes_up(ctx, "vtd-caching", ["igb"], ON, LEGACY, can=("caching",))
    comes_up(ctx, "vtd-scalable", ["virtio-net"], ON, SCALABLE, can=("scalable", "second-stage"))
    comes_up(ctx, "vtd-first-stage", ["nvme"], ON, SCALABLE, can=("scalable", "first-stage"))
    comes_up(ctx, "vtd-snoop", ["e1000e"], ON, SCALABLE, can=("scalable", "first-stage", "snoop"))
    comes_up(ctx, "vtd-ats", ["virtio-net"], ON, LEGACY, can=("device-tlb",))
    comes_up(ctx, "vtd-intremap", ["e1000e"], ON, LEGACY, "DMAR-IR: Enabled IRQ remapping", can=())
    comes_up(ctx, "vtd-off", ["igb"], "DMAR: IOMMU disabled")
    comes_up(ctx, "uefi", ["e1000e"], "efi: EFI v")
    came = set(ctx.figures) | {"amd-vi"}        # in the-older-qemu
    expect(came == set(PROFILES), f"not tried: {set(PROFILES) - came}")


@test()
def the_older_qemu(ctx):
    """Debian 12's own QEMU, by --qemu and by the profile of AMD's IOMMU; both kexec."""
    for machine, qemu, word in (("noiommu", "7.2", None), ("amd-vi", "", "AMD-Vi: ")):
        with ctx.vm(init="bare", machine=machine, qemu=qemu, devices=["e1000e"], name=machine) as vm:
            vm.ready()
            version = vm.qmp_do("query-version")["qemu"]
            expect((version["major"], version["minor"]) == (7, 2), f"QEMU is {version}")
            expect(not word or vm.console.find(word) is not None, f"no '{word}' on {machine}")
            before = boot_id(vm)
            vm.kexec()
            expect(boot_id(vm) != before, f"{machine}: no new boot after the kexec")
            expect(PCI_IDS["e1000e"] in vm.run("lspci -n").out, f"{machine}: the e1000e is gone")
