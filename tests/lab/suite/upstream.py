# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own suites give what they give on the unpatched kernel.

What fails or is skipped there too is listed with its reason; anything else that
does not pass fails the run, and so does a listed failure that passes, so that the list
stays true.
"""

import re
import time

from lablib.check import expect, tap, test

SELFTESTS = "/usr/lib/kselftest"

# Pattern of a case's name -> why it does not pass on the unpatched 7.3 either.
KNOWN_FAILURES = {"iommu/iommufd": {
    r"dmabuf_(simple|revoke)$": "iommufd_test_dmabuf_get() of 7.3's selftest returns 0 instead of the fd",
}}
KNOWN_SKIPS = {"iommu/iommufd": {
    r"iommufd_viommu\.no_viommu\.": "cases of the variant that has no vIOMMU",
}, "iommu/iommufd_liveupdate": {
    r"noiommu\.(refuse_(dirty_tracking|fault|nested|pasid|not_hitless|several_iommus)"
    r"|list_objects_of_all_types|group)$":
        "what a device without an IOMMU cannot have",
}}
# What a case of VFIO's programs says when it is skipped -> why it is, on the unpatched kernel, too.
VFIO_SKIPS = {
    r"mmap\(\) failed": "the guest has no huge pages of 1 GiB",
    r"BAR too small": "the case takes a BAR of more than QEMU's devices have",
    r"Driver does not support send_msi": "the suite's driver of that device has no way to ask for an interrupt",
    r"MSI(-x)?: not supported": "a kind of interrupts that QEMU's device does not have",
}
VFIO_PROGRAMS = ("vfio_dma_mapping_test", "vfio_dma_mapping_mmio_test", "vfio_iommufd_setup_test",
                 "vfio_pci_device_test", "vfio_pci_driver_test")
VFIO_DEVICES = {"igb": "0000:01:00.0", "nvme": "0000:02:00.0"}
KEXEC_PROGRAMS = (("luo_kexec_simple", 2), ("luo_multi_session", 2), ("luo_stress_sessions", 2),
                  ("luo_stress_files", 2))


def quiet(vm, start=0):
    """Nothing in the kernel's log since line @start that means trouble."""
    bad = [x for x in list(vm.console.lines)[start:]
           if re.search(r"WARNING:|BUG:|Oops|KASAN:|possible .*deadlock|suspicious RCU|"
                        r"unreferenced object|general protection", x)]
    expect(not bad, f"the kernel complains: {bad[:3]} (see {vm.dir}/console.log)")


def suite(ctx, vm, path, timeout, options=""):
    """Run one kselftest program and judge each of its cases."""
    log = f"/lab/{path.replace('/', '-')}.tap"
    r = vm.run(f"cd {SELFTESTS}/$(dirname {path}) && ./$(basename {path}) {options} > {log} 2>&1",
               timeout, check=False)
    text = (vm.share / log.removeprefix("/lab/")).read_text(errors="replace")
    passed, failed, skipped = tap(text)
    expect(re.search(r"^(# Totals|1\.\.\d+)", text, re.M) and passed,
           f"{path} did not run to its end (status {r.status}): {text[-600:]}")
    for what, cases, known in (("failed", failed, KNOWN_FAILURES.get(path, {})),
                               ("were skipped", skipped, KNOWN_SKIPS.get(path, {}))):
        unknown = [c for c in cases if not any(re.search(k, c) for k in known)]
        expect(not unknown, f"{path}: {len(unknown)} cases {what}: {unknown[:8]}; see {vm.dir}/share")
        gone = [k for k in known if not any(re.search(k, c) for c in cases)]
        expect(not gone, f"{path}: known that they {what}, but none did: {gone}; correct the list")
    ctx.figure(path.rsplit("/", 1)[-1], f"{len(passed)} ok, {len(failed)} known failures, "
                                        f"{len(skipped)} skipped")


@test()
def upstream_liveupdate(ctx):
    """liveupdate, and the programs that carry files over a kexec; the kernel's KHO test beside it."""
    with ctx.vm(init="bare") as vm:
        vm.ready()
        suite(ctx, vm, "liveupdate/liveupdate", 120)
        vm.run(f"cd {SELFTESTS}/liveupdate && ./luo_kexec_simple -s 1 > /lab/stage1 2>&1")
        vm.kexec()
        vm.run(f"cd {SELFTESTS}/liveupdate && ./luo_kexec_simple -s 2 > /lab/stage2 2>&1")
        expect(vm.console.find("KHO restore succeeded", vm.mark) is not None,
               "the kernel's KHO test did not find its data again")
        quiet(vm)


@test()
def upstream_kho(ctx):
    """kho's program, as its vmtest.sh has it run: it kexecs, and the kernel's own test finds its data again.

    The next kernel has no root file system, so that this is all that it does.
    """
    with ctx.vm(init="bare") as vm:
        vm.ready()
        start, kernel = len(vm.console.lines), vm.put_kernel(vm.kernel)
        vm.run(f"mkdir -p /tmp/kho/proc /tmp/kho/debugfs && cp {SELFTESTS}/kho/init /tmp/kho/ && "
               f"cp {kernel} /tmp/kho/kernel && grep -q kho=on /proc/cmdline")
        vm.start_command("chroot /tmp/kho /init")
        expect(vm.console.wait("KHO restore succeeded", start, time.monotonic() + 120, vm.alive) is not None,
               f"the kernel's KHO test did not find its data again; see {vm.dir}/console.log")


@test()
def upstream_iommufd(ctx):
    with ctx.vm(init="bare", memory="2G") as vm:
        vm.ready()
        vm.run("echo 512 > /proc/sys/vm/nr_hugepages", check=False)
        suite(ctx, vm, "iommu/iommufd", 560)


@test()
def upstream_iommufd_fail_nth(ctx):
    with ctx.vm(init="bare", memory="2G") as vm:
        vm.ready()
        suite(ctx, vm, "iommu/iommufd_fail_nth", 560)


@test(part="suites")
def upstream_kexec_programs(ctx):
    """All four programs that carry sessions and files over a kexec."""
    for program, stages in KEXEC_PROGRAMS:
        with ctx.vm(init="bare", memory="2G", name=program) as vm:
            vm.ready()
            for stage in range(1, stages + 1):
                vm.run(f"cd {SELFTESTS}/liveupdate && ./{program} -s {stage} "
                       f"> /lab/{program}-{stage} 2>&1", 300)
                if stage < stages:
                    vm.kexec()
            quiet(vm)
        ctx.figure(program, "ok")


@test()
def series_iommufd_liveupdate(ctx):
    """The series' own cases: what preserve refuses, what is immutable, inspection."""
    with ctx.vm(init="bare", memory="1G") as vm:
        vm.ready()
        suite(ctx, vm, "iommu/iommufd_liveupdate", 300)
        quiet(vm)


@test()
def series_iommufd_kexec(ctx):
    """A context over a kexec with the mock device; memory is used up in between."""
    with ctx.vm(init="bare", memory="1G", pressure=True) as vm:
        vm.ready()
        vm.run(f"cd {SELFTESTS}/iommu && (setsid ./iommufd_kexec pre > /lab/pre 2>&1 &) ; "
               "for i in $(seq 60); do grep -q . /lab/pre && break; sleep 0.5; done; sleep 1; "
               "! grep 'not ok' /lab/pre", 120)
        vm.kexec()
        r = vm.run(f"cd {SELFTESTS}/iommu && ./iommufd_kexec post", 120, check=False)
        expect(r.status == 0 and "not ok" not in r.out, f"after the kexec: {r.out[-800:]}{r.err[-300:]}")
        quiet(vm)


def vfio_cases(ctx, machine, unpatched) -> dict:
    """What each case of VFIO's programs gave for each device: 'ok', 'not ok', or 'skip'."""
    got = {}
    with ctx.vm(kernel=ctx.kernel(unpatched=unpatched), init="bare", memory="2G", machine=machine,
                devices=VFIO_DEVICES, append="vfio_iommu_type1.allow_unsafe_interrupts=1",
                name=f"{ctx.name}-{'un' if unpatched else ''}patched") as vm:
        vm.ready()
        vm.run("echo 128 > /proc/sys/vm/nr_hugepages", check=False)
        vm.run(f"cd {SELFTESTS}/vfio && bash setup.sh {' '.join(VFIO_DEVICES.values())}")
        for device, address in VFIO_DEVICES.items():
            for program in VFIO_PROGRAMS:
                log = f"/lab/{program}-{device}.tap"
                vm.run(f"cd {SELFTESTS}/vfio && ./{program} {address} > {log} 2>&1", 1800, check=False)
                text = (vm.share / log.removeprefix("/lab/")).read_text(errors="replace")
                passed, failed, skipped = tap(text)
                unknown = [x for x in re.findall(r"# SKIP (.*)", text)
                           if not any(re.search(k, x) for k in VFIO_SKIPS)]
                expect(not unknown, f"{program}: cases were skipped for another reason than those known: {unknown}")
                for state, names in (("ok", passed), ("not ok", failed), ("skip", skipped)):
                    got.update({f"{device} {program} {n}": state for n in names})
        quiet(vm)
    return got


def upstream_vfio(ctx, machine):
    old, new = (vfio_cases(ctx, machine, unpatched) for unpatched in (True, False))
    count = {s: sum(x == s for x in new.values()) for s in ("ok", "not ok", "skip")}
    ctx.figure("vfio", ", ".join(f"{n} {s}" for s, n in count.items()))
    other = [f"{k}: {old.get(k)} on the unpatched kernel, {new.get(k)} on the patched one"
             for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    expect(not other, f"{len(other)} cases of {len(new)} differ: {other[:5]}")
    expect(count["ok"] > 100, f"only {count} cases passed: the programs did not run")


@test(part="vfio", kernels=(("minimal", False, ""), ("minimal", True, "")))
def upstream_vfio_legacy(ctx):
    """VFIO's own suite with an igb and an nvme, in the ways that devices are opened and mapped."""
    upstream_vfio(ctx, "vtd-legacy")


@test(part="vfio", kernels=(("minimal", False, ""), ("minimal", True, "")))
def upstream_vfio_scalable(ctx):
    upstream_vfio(ctx, "vtd-scalable")


@test(part="suites", kernels=(("kunit", False, ""), ("kunit", True, "")))
def kunit_of_io_page_tables(ctx):
    """Every format of generic_pt; what the unpatched kernel passes, and the series' own cases."""
    passed, skipped = {}, {}
    for unpatched in (True, False):
        with ctx.vm(kernel=ctx.kernel("kunit", unpatched), init="bare", memory="1G",
                    append="kunit.autorun=1", cpus=1, name=f"{ctx.name}-{'un' if unpatched else ''}patched") as vm:
            vm.ready(900)
            found = [re.search(r"# Totals: pass:(\d+) fail:(\d+) skip:(\d+)", x) for x in vm.console.lines]
            totals = [tuple(map(int, m.groups())) for m in found if m]
            expect(totals, f"no suite of KUnit ran, see {vm.dir}/console.log")
            expect(not sum(t[1] for t in totals), f"cases fail, see {vm.dir}/console.log")
            passed[unpatched] = sum(t[0] for t in totals)
            skipped[unpatched] = {m.group(1) for x in vm.console.lines
                                  if (m := re.search(r"ok \d+ \S.*? # SKIP (.*)", x))}
            quiet(vm)
    ctx.figure("KUnit", f"{passed[False]} ok, {passed[True]} on the unpatched kernel")
    expect(passed[False] > passed[True], f"fewer cases than before: {passed}")
    # What a format of page tables does not have.
    more = skipped[False] - skipped[True]
    expect(not more, f"cases are skipped for reasons that none has on the unpatched kernel: {sorted(more)}")
