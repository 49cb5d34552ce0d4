# SPDX-License-Identifier: GPL-2.0-or-later
"""The other kernels: modular and debug come up, kexec, and stay silent."""

from lablib.check import test
from suite.bare import boot_id
from suite.upstream import quiet, suite


def kexec_between(ctx, first, second, **kw):
    with ctx.vm(kernel=ctx.kernel(first), init="bare", memory="2G", **kw) as vm:
        vm.ready(400)
        boot_id(vm)
        vm.kexec(ctx.kernel(second), timeout=400)
        quiet(vm)
        vm.kexec(ctx.kernel(first), timeout=400)
        quiet(vm)


@test(part="kernels", kernels=(("modular", False, ""), ("minimal", False, "")))
def modular_and_minimal_kexec_each_other(ctx):
    kexec_between(ctx, "modular", "minimal")


@test(part="kernels", kernels=(("debug", False, ""), ("minimal", False, "")))
def debug_and_minimal_kexec_each_other(ctx):
    kexec_between(ctx, "debug", "minimal")


@test(part="kernels", kernels=(("debug", False, ""),))
def upstream_suites_on_the_debug_kernel(ctx):
    with ctx.vm(kernel=ctx.kernel("debug"), init="bare", memory="3G") as vm:
        vm.ready(400)
        vm.run("echo 256 > /proc/sys/vm/nr_hugepages", check=False)
        suite(ctx, vm, "liveupdate/liveupdate", 600)
        suite(ctx, vm, "iommu/iommufd_fail_nth", 1800)
        quiet(vm)
