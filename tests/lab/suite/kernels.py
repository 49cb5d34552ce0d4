# SPDX-License-Identifier: GPL-2.0-or-later
"""The other kernels: modular and debug come up, hand over, take devices over, and stay silent."""

import shutil

from lablib.check import expect, test
from lablib.profiles import DEBUG_GUEST, SLOW
from suite.bare import boot_id
from suite.dma import FULL, Run
from suite.service import MIB, Khod
from suite.upstream import quiet, suite

MINIMAL, MODULAR, DEBUG = (("minimal", False, ""), ("modular", False, ""), ("debug", False, ""))
# Function in the backtrace -> why nobody frees it on the unpatched kernel either.
KNOWN_LEAKS = {
    "rootfs_init_fs_context": "what the first mount of all allocates",
    "iommu_fwspec_init": "if its second allocation is made to fail, dev->iommu of a mock device stays",
}


def leaks(vm):
    """kmemleak, of two scans: what is found in the first may still be on its way."""
    vm.run("echo scan > /sys/kernel/debug/kmemleak; sleep 6; echo scan > /sys/kernel/debug/kmemleak", 600)
    found = vm.run("cat /sys/kernel/debug/kmemleak", 120).out
    (vm.share / "kmemleak").write_text(found)
    new = [x for x in found.split("unreferenced object")[1:]
           if not any(f" {known}+0x" in x for known in KNOWN_LEAKS)]
    expect(not new, f"{len(new)} leaks; see {vm.dir}/share/kmemleak: {new[:2]}")


def kexec_between(ctx, first, second, **kw):
    with ctx.vm(kernel=ctx.kernel(first), init="bare", memory="2G", **kw) as vm:
        vm.ready(SLOW)
        seen = {boot_id(vm)}
        for kernel in (second, first):
            vm.kexec(ctx.kernel(kernel), timeout=SLOW)
            expect(vm.release().endswith(f"-{kernel}"), f"{vm.release()} runs, not {kernel}")
            seen.add(boot_id(vm))
        expect(len(seen) == 3, f"three boots with the ids {seen}")
        quiet(vm)


@test(part="kernels", kernels=(MODULAR, MINIMAL))
def modular_and_minimal_kexec_each_other(ctx):
    kexec_between(ctx, "modular", "minimal")


@test(part="kernels", kernels=(DEBUG, MINIMAL))
def debug_and_minimal_kexec_each_other(ctx):
    kexec_between(ctx, "debug", "minimal")


def handover(ctx, vm):
    """A memfd through `systemctl kexec` into the same build."""
    khod = Khod(vm.ready(SLOW))
    khod.register("mem", 64 * MIB)
    khod.only_sessions()
    vm.kexec(timeout=SLOW)
    khod.settled()
    expect(khod.held() == ["mem"], f"after the kexec khod holds {khod.held()}")
    khod.claim("mem")
    expect(khod.held() == [], "claimed, and still held")


@test(part="kernels", kernels=(MODULAR,))
def a_memfd_comes_through_on_the_modular_kernel(ctx):
    """iommufd and vfio are modules on the disk, as on a distribution, and load before and after."""
    build = ctx.kernel("modular")
    with ctx.vm(kernel=build, memory="1G", devices=["e1000e"]) as vm:
        vm.ready()
        shutil.copy(build / "modules.tar", vm.share)
        vm.run("tar -C / --keep-directory-symlink -xf /lab/modules.tar && modprobe -a iommufd vfio_pci")
        handover(ctx, vm)
        vm.run("modprobe -a iommufd vfio_pci && test -c /dev/iommu")
        quiet(vm)


@test(part="kernels", kernels=(DEBUG,))
def a_memfd_comes_through_on_the_debug_kernel(ctx):
    with ctx.vm(kernel=ctx.kernel("debug"), **DEBUG_GUEST) as vm:
        handover(ctx, vm)
        quiet(vm)
        leaks(vm)


def device_between(ctx, **kw):
    """A device goes from the minimal kernel to the debug one and back, and nothing is leaked."""
    minimal, debug = ctx.kernel(), ctx.kernel("debug")
    # The debug kernel does not fit into the scratch that the minimal one would set aside.
    run = Run(ctx, kexecs=2, rate=200, options=f"{FULL} dma.leaks=1 kho_scratch=64M,320M,320M no5lvl",
              kernel=minimal, nexts=[debug, minimal], memory="2G", timeout=1500, **kw)
    run.nothing_lost(ctx, 2)
    expect(run.lines("ok leaks"), "leaks were not looked for")
    quiet(run.vm)


@test(part="kernels", kernels=(DEBUG, MINIMAL))
def dma_from_minimal_to_debug_and_back(ctx):
    device_between(ctx)


@test(part="kernels", kernels=(DEBUG,))
def upstream_suites_on_the_debug_kernel(ctx):
    with ctx.vm(kernel=ctx.kernel("debug"), init="bare", **DEBUG_GUEST) as vm:
        vm.ready(SLOW)
        vm.run("echo 512 > /proc/sys/vm/nr_hugepages", check=False)
        suite(ctx, vm, "liveupdate/liveupdate", 600)
        suite(ctx, vm, "iommu/iommufd", 1800)
        suite(ctx, vm, "iommu/iommufd_liveupdate", 900)
        suite(ctx, vm, "iommu/iommufd_fail_nth", 1800)
        quiet(vm)
        leaks(vm)
