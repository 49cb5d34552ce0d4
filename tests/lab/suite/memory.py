# SPDX-License-Identifier: GPL-2.0-or-later
"""Preserved memory comes back, whatever its shape, and a bad handover has a defined end.

Every handover here ends with all pages compared with what was written before the kexec, after
all memory that is free in the next kernel was written to.
"""

import re
import shutil

from lablib import kernel
from lablib.check import expect, tap, test
from lablib.common import run
from lablib.images import full_image
from lablib.initrd import empty_initrd
from lablib.memory import Shape, hand_over, numa
from lablib.profiles import DEBUG_GUEST
from lablib.qemu import VM
from suite.upstream import quiet, suite

SHAPES = (Shape(0), Shape(256), Shape(256, "hole"), Shape(256, "second"), Shape(256, "mixed"),
          Shape(256, huge=True))
NUMA = (("numa", False, ""),)
EAGER = (("eager", False, ""),)
DEBUG = (("debug", False, ""),)
RUNS = {"second": 90, "mixed": 20}      # a MiB, at least
MAP = ("runs", "huge", "node1")     # how the pages lie, before the kexec and after it


def come_back(ctx, config, shapes=SHAPES, **kw) -> list:
    """Each of @shapes on the kernel @config, with all free memory used up before the retrieve.

    Returns what each kernel said of each.
    """
    every = []
    for shape in shapes:
        got = hand_over(ctx.kernel(config), shape, name=f"memory-{config}",
                        options="khobench.fill=1", **kw)
        if shape.mib:
            expect(int(got.old["in_scratch"]) == 0, f"{shape}: pages lie in scratch")
            expect(int(got.old["runs"]) > shape.mib * RUNS.get(shape.pattern, 0),
                   f"{shape}: only {got.old['runs']} runs: it is not what it was to be")
            expect(shape.pattern != "mixed" or int(got.old["large"]) > shape.mib * 40,
                   f"{shape}: only {got.old['large']} large folios")
            expect(int(got.new["filled_mib"]) > 64, f"only {got.new['filled_mib']} MiB were filled")
            expect(got.new.get("zones_ok") == "1", "nobody looked whether pages went back to their zones")
            old, new = ({k: int(said[k]) for k in MAP} for said in (got.old, got.new))
            # Those that compaction moved before they were looked at may lie alone now, or no longer.
            changed, moved = abs(old.pop("runs") - new.pop("runs")), int(got.new["moved"])
            expect(old == new and changed <= min(2 * moved, int(got.old["runs"]) // 10),
                   f"{shape}: before the kexec {old}, after it {new}, and {changed} runs more or less"
                   f" with {moved} pages moved")
            expect(old["huge"] >= shape.mib * 230 if shape.huge else not old["huge"],
                   f"{shape}: {old['huge']} pages are in folios of 2 MiB")
        ctx.figure(str(shape), f"{got.old.get('runs', 0)} runs, all pages right,"
                               f" {got.new.get('moved', 0)} moved before they were looked at")
        every.append(got)
    return every


@test()
def memory_of_two_shapes_comes_back(ctx):
    """Every second page, which has most of the cases; huge folios stay whole."""
    come_back(ctx, "minimal", (Shape(128, "second"), Shape(128, huge=True)), memory="1G")


@test()
def memory_in_large_folios_goes_back_to_its_zone(ctx):
    """Initialized late, each struct page says where its page belongs; guests of less have no such zone."""
    come_back(ctx, "minimal", (Shape(1024, huge=True),), memory="4G", timeout=900)


@test(part="memory")
def memory_of_every_shape_comes_back(ctx):
    """struct pages initialized late (CONFIG_DEFERRED_STRUCT_PAGE_INIT), as distributions have it."""
    come_back(ctx, "minimal")


@test(part="memory", kernels=EAGER)
def memory_comes_back_without_deferred_struct_pages(ctx):
    come_back(ctx, "eager")


@test(part="memory", kernels=NUMA)
def memory_comes_back_on_two_nodes(ctx):
    come_back(ctx, "numa", memory="2G", arguments=numa(2, 2))
    mib = 1100              # more than either node has
    both = come_back(ctx, "numa", (Shape(mib), Shape(mib, huge=True)), memory="2G", arguments=numa(2, 2))
    for got in both:
        there = int(got.new["node1"])
        expect(64 * 256 < there < (mib - 64) * 256, f"{there} of {mib * 256} pages are on node 1")


@test(part="memory", kernels=DEBUG)
def memory_comes_back_on_the_debug_kernel(ctx):
    """With CONFIG_KEXEC_HANDOVER_DEBUG, lockdep and KASAN, which stay silent."""
    come_back(ctx, "debug", (Shape(64, "second"), Shape(64, huge=True)), timeout=1800,
              **DEBUG_GUEST)


@test(part="memory")
def memory_comes_back_twice_in_a_row(ctx):
    """The second kernel hands over what it retrieved itself."""
    got = hand_over(ctx.kernel(), Shape(128, "second"), options="khobench.rounds=2")
    expect(got.says("stage=3"), "there was no second handover")


@test(part="memory")
def memory_comes_back_ten_times_with_uefi_and_kaslr(ctx):
    """Each kernel is at another place, in scratch; without an initrd, of which the first one's stub left a table."""
    with empty_initrd() as initrd:
        got = hand_over(ctx.kernel(), Shape(400), memory="1G", machine="uefi", timeout=900,
                        options="khobench.rounds=10", arguments=("-initrd", initrd))
    expect(got.says("stage=11"), "there were no ten handovers")
    places = {m.group(1) for x in got.lines if (m := re.search(r"kernel_at=(\w+)", x))}
    expect(len(places) > 3, f"the kernels were at {places}")
    ctx.figure("places", len(places))


@test(part="memory", kernels=(("debug", False, ""), ("minimal", False, "")))
def memory_comes_back_from_the_debug_kernel(ctx):
    hand_over(ctx.kernel("debug"), Shape(64, "hole"), next_kernel=ctx.kernel(), timeout=1800,
              **DEBUG_GUEST)


@test(part="memory")
def too_much_memory_is_refused_at_preserve(ctx):
    """What does not fit outside of scratch: -ENOMEM, and not the end of the machine.

    With scratch that is large, with that of default size, and with memory above 4 GiB that is movable.
    """
    for mib, memory, scratch, append in ((900, "2G", "64M,1000M,64M", ""), (3400, "4G", "", ""),
                                         (2600, "9G", "", "kernelcore=2G")):
        got = hand_over(ctx.kernel(), Shape(mib), memory=memory, kho_scratch=scratch,
                        options=f"khobench.expect=enomem khobench.evict=0 {append}")
        expect(got.old.get("preserve_failed") == "Cannot", f"preserve: {got.old.get('preserve_failed')}")


@test(part="memory")
def page_cache_in_scratch_is_not_room_for_memory(ctx):
    """Dropping it makes no memory free that preserved pages can lie in: refused, or preserved if there is room."""
    for mib, expected in ((900, "enomem"), (400, "ok")):
        got = hand_over(ctx.kernel(), Shape(mib), memory="2G", kho_scratch="64M,1000M,64M",
                        options=f"khobench.cache=900 khobench.expect={expected} khobench.evict=0")
        expect(int(got.old["cached_kib"]) > 800 << 10, f"only {got.old['cached_kib']} KiB of page cache")
        expect(("preserve_failed" in got.old) == (expected == "enomem"), f"{mib} MiB: not {expected}")
        ctx.figure(f"{mib} MiB", f"{got.old['to_move']} pages in scratch, {expected}")


@test(part="memory")
def scratch_that_cannot_be_reserved_leaves_memory_alone(ctx):
    """KHO is off then, and no memory is CMA."""
    with ctx.vm(memory="2G", kho_scratch="64M,10G,64M", init="bare") as vm:
        vm.ready()
        expect(vm.console.find("disabling kexec handover") is not None, "scratch was reserved")
        expect(vm.run("grep CmaFree: /proc/meminfo").out.split()[1] == "0",
               vm.run("grep Cma /proc/meminfo").out)


@test(part="memory")
def scratch_needed_grows_with_what_is_preserved(ctx):
    """By an element of memblock's array for each run of pages, and room to enlarge the array."""
    got = hand_over(ctx.kernel(), Shape(64, "second"), memory="1G", options="khobench.refill=0")
    needed = [int(m.group(1)) for x in got.lines if (m := re.search(r"scratch_needed_kib=(\d+)", x))]
    more = (needed[1] - needed[0]) << 10
    expect(more >= 36 * int(got.old["runs"]), f"{more} bytes more for {got.old['runs']} runs")
    expect(needed[2] - needed[0] < 1 << 10, f"what it took the next kernel counts for the one after it: {needed}")
    ctx.figure("64 MiB, every second page", f"{more >> 10} KiB for {got.old['runs']} runs")


def refused(ctx, how, options=""):
    """The next kernel says what is wrong, forgets the handover and has all of its memory."""
    got = hand_over(ctx.kernel(), Shape(128, "second"), memory="1G",
                    options=f"khobench.damage={how} khobench.expect=refused {options}")
    expect(got.says("preserved memory map has an invalid"), f"{how}: the kernel says no reason")
    expect(got.says("disabling KHO revival"), f"{how}: the handover was not refused")
    old, new = (int(said["mem_total_kib"]) for said in (got.old, got.new))
    expect(abs(old - new) < 1024, f"{how}: {new} KiB of memory, {old} KiB before")


@test(part="memory")
def a_damaged_map_of_memory_is_refused(ctx):
    """A pointer to nowhere; pages outside of memory; pages in scratch; pointers in circles."""
    for how in ("node", "range", "scratch", "loop"):
        refused(ctx, how)


@test(part="memory")
def a_map_that_overlaps_is_refused(ctx):
    """Seen when some of it is reserved already, which stays so; the machine goes on with the rest."""
    got = hand_over(ctx.kernel(), Shape(128, "second"), memory="1G",
                    options="khobench.damage=overlap khobench.expect=refused")
    expect(got.says("has an overlapping key"), "the kernel says no reason")
    old, new = (int(said["mem_total_kib"]) for said in (got.old, got.new))
    expect(-1024 < old - new < 140 << 10, f"{new} KiB of memory, {old} KiB before")
    ctx.figure("lost", f"{(old - new) >> 10} MiB of 1 GiB")


@test(part="memory", kernels=EAGER)
def memory_that_the_next_kernel_reserves_is_refused(ctx):
    """By its command line, where memory is preserved; what was reserved before that stays so."""
    got = hand_over(ctx.kernel("eager"), Shape(300), memory="1G",
                    options="khobench.expect=refused khobench.next=cma=16M@512M")
    expect(got.says("failed to reserve .* (-16|-EBUSY)"), "the kernel says no reason")
    expect(got.says("disabling KHO revival"), "the handover was not refused")


@test(part="memory")
def memory_in_which_there_is_to_be_an_initrd_is_refused(ctx):
    """By the next kernel's command line, which is read when an initrd has been reserved."""
    got = hand_over(ctx.kernel(), Shape(300), memory="1G",
                    options="khobench.expect=refused khobench.next=initrdmem=512M,16M")
    expect(got.says("failed to reserve .* (-16|-EBUSY)"), "the kernel says no reason")
    expect(got.says("disabling KHO revival"), "the handover was not refused")


@test(part="memory")
def a_folio_with_a_hole_in_its_memory_is_refused(ctx):
    """Of which the first and the last page are there."""
    refused(ctx, "hole", "memmap=4K$513M")


@test(part="memory")
def a_damaged_map_is_refused_if_scratch_is_not_extended(ctx):
    """There is no memory to note which parts of memory are busy, long before the damage is reached."""
    refused(ctx, "range", "liveupdate_test_fail=extend-scratch:1")


@test(part="memory")
def memory_comes_back_if_scratch_is_not_extended(ctx):
    """No memory to note which parts are busy, or to mark those that are not: scratch alone has to do."""
    for step in ("extend-scratch", "mark-scratch"):
        got = hand_over(ctx.kernel(), Shape(128, "second"), memory="6G",
                        options=f"khobench.fill=1 liveupdate_test_fail={step}:1")
        expect(got.says("Failed to extend scratch: (-12|-ENOMEM)"), f"{step} did not fail")


@test(part="memory")
def memory_comes_back_if_the_next_kernel_is_told_to_test_memory(ctx):
    """What memblock takes for free is filled, or zeroed, long before it knows of what is preserved."""
    got = hand_over(ctx.kernel(), Shape(128, "second"), memory="1G", options="memtest=1")
    tested = [x for x in got.lines if "early_memtest: # of tests: 1" in x]
    expect(len(tested) == 1, f"the first kernel has no memtest, or the next one has done it: {tested}")
    expect(got.says("memtest= ignored"), "the next kernel does not say that it was not done")
    got = hand_over(ctx.kernel(), Shape(128, "second"), memory="1G",
                    options="memory_corruption_check_size=900M khobench.next=memory_corruption_check=1")
    expect(got.says("no check for low memory corruption"), "the next kernel does not say that it was not done")


@test(part="memory")
def memory_comes_back_if_the_next_kernel_looks_for_room_itself(ctx):
    """For hugetlb_cma=, of which no free range is large enough as long as preserved memory is not to be used."""
    got = hand_over(ctx.kernel(), Shape(512, "second"), memory="8G",
                    options="khobench.next=hugetlb_cma=5G")
    expect(got.says("hugetlb_cma: reserve"), "the next kernel looks for no room")


def revived(got, name) -> int:
    return sum(f"Revived memory reservation '{name}'" in x for x in got.lines)


@test(part="memory")
def reserved_memory_by_name_comes_back(ctx):
    """Over two kexecs, though the second kernel is to reserve more, for which there is none outside of scratch."""
    for memory, found in (("1G", 0), ("6G", 1)):
        got = hand_over(ctx.kernel(), Shape(64, "second"), memory=memory,
                        options="khobench.rounds=2 reserve_mem=2M:4096:kept khobench.next=reserve_mem=2M:4096:more")
        expect(revived(got, "kept") == 2 and revived(got, "more") == found,
               f"{memory}: revived {revived(got, 'kept')} and {revived(got, 'more')} times")


@test(part="memory")
def reserved_memory_of_a_refused_handover_is_forgotten(ctx):
    """What was to be revived is free memory then."""
    got = hand_over(ctx.kernel(), Shape(64, "second"), memory="1G",
                    options="reserve_mem=2M:4096:kept liveupdate_test_fail=reserve-memory:1 khobench.expect=refused")
    expect(revived(got, "kept") == 1 and got.says("disabling KHO revival"), "it was not to be revived, or not refused")
    expect(got.says("memory reservation 'kept' is lost"), "whoever asks for it writes to memory of others")


def loaded_counts(vm, line, scratch):
    """Of what is loaded preflight says the same, and khoctl after loading; what is too large even for that is not."""
    r = vm.run("kexec -s -l /lab/next --reuse-cmdline", check=False)
    if r.status:
        expect("Cannot assign requested address" in r.err and line.startswith("OBSTACLE"), f"{scratch}: {r.err}")
        return
    image = int(vm.run("cat /sys/kernel/kexec/kho_image_size").out)
    expect(image > 12 << 20, f"a kernel of {image} bytes")
    loaded = vm.run("khoctl preflight | grep ' scratch '; kexec -u").out
    expect(loaded.split()[0] == line.split()[0], f"{scratch}, loaded: {loaded}")
    if line.startswith("OBSTACLE"):
        r = vm.run("khoctl kexec --kernel /lab/next --force --load", check=False)
        expect("of scratch memory" in r.err, f"{scratch}: {r.out}{r.err}")


@test()
def preflight_finds_scratch_that_is_too_small(ctx):
    """What the next kernel cannot come up with is an obstacle; the default size is not."""
    for scratch, memory, status in (("12M,12M,12M", "1G", 5), ("16M,16M,16M", "2G", 5), ("", "1G", 0),
                                    ("", "10G", 0)):
        with ctx.vm(memory=memory, kho_scratch=scratch) as vm:
            vm.ready()
            shutil.copy(ctx.kernel() / "bzImage", vm.share / "next")
            r = vm.run("khoctl preflight --kernel /lab/next", check=False)
            line = next((x for x in r.out.splitlines() if " scratch " in x), "")
            expect(line.startswith("OBSTACLE" if status else "ok"), f"{scratch or 'default'}: {r.out}")
            expect(r.status == status or not status, f"{scratch}: status {r.status}: {r.out}")
            loaded_counts(vm, line, scratch or "default")
            ctx.figure(scratch or f"default of {memory}", re.sub(r"\s+", " ", line))
            if not scratch:     # two areas of twice what is needed, rounded up, and none counts the other
                size, needed = (int(x) >> 20 for x in vm.run(
                    "cat /sys/kernel/kexec/kho_scratch_size /sys/kernel/kexec/kho_scratch_needed").out.split())
                expect(size <= 4 * (needed + 1) + 12, f"{size} MiB of scratch, and {needed} MiB are needed")


@test(part="memory", kernels=(), image=False)
def upstream_memblock(ctx):
    """tools/testing/memblock, with the series' cases, with and without NUMA."""
    with kernel.tree_lock():
        kernel.prepare()
        where = kernel.tree() / "tools/testing/memblock"
        for options in ([], ["NUMA=1"]):
            run(["make", "-s", "clean", "main", *options], cwd=where, what="building memblock's suite")
            out = run(["./main", "-v"], cwd=where, what="memblock's suite")
            passed, failed, _ = tap(out)
            expect(passed and not failed, f"memblock {options}: {failed[:3]} {out[-300:]}")
            ctx.figure(" ".join(["memblock", *options]), f"{len(passed)} ok")
        run(["make", "-s", "clean"], cwd=where)


@test(part="memory", kernels=DEBUG)
def upstream_kho_and_liveupdate_on_the_debug_kernel(ctx):
    """liveupdate's suite and KHO's own test in the kernel, which stay silent."""
    with VM(ctx.kernel("debug"), full_image(), name="memory-suites", init="bare",
            **DEBUG_GUEST) as vm:
        vm.ready(1200)
        suite(ctx, vm, "liveupdate/liveupdate", 1200)
        vm.kexec(timeout=1200)
        expect(vm.console.find("KHO restore succeeded", vm.mark) is not None,
               "the kernel's KHO test did not find its data again")
        quiet(vm)
