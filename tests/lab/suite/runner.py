# SPDX-License-Identifier: GPL-2.0-or-later
"""The runner of the tests itself: what it keeps, what it counts, what it lets pass."""

import re

from lablib.check import expect, test
from suite.bad_input import Scratch, git

LAB = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from lablib import check, kernel, qemu
Test, expect = check.Test, check.expect
def run(name, fn, part=""):
    return check.run_one(Test(name, fn, part, (), False))
"""


def passes(s, code, prefix=(), **env):
    """Run @code on the lab's modules; what it prints."""
    r = s.python(LAB + code, prefix, **env)
    expect(r.returncode == 0, r.stdout + r.stderr)
    return r.stdout


DISKS = """
def kept(error):
    vm = qemu.VM(Path("kernel"), "image", name="disks")
    for name in ("disk.qcow2", "nvme0.raw"):
        (vm.dir / name).touch()
    vm.__exit__(type(error), error, None)
    return sorted(p.name for p in vm.dir.iterdir() if p.suffix in (".qcow2", ".raw"))
print(kept(None), kept(KeyboardInterrupt()), kept(kernel.LabError("it hangs")))
"""


@test(kernels=(), image=False)
def the_disks_of_a_guest_that_failed_are_kept(ctx):
    """With its logs, and only of such a guest; where they are is said."""
    with Scratch() as s:
        r = s.python(LAB + DISKS, KHO_LAB_ACCEL="tcg")
        expect(r.stdout == "[] [] ['disk.qcow2', 'nvme0.raw']\n", r.stdout + r.stderr)
        expect(re.search(r"logs of this guest are in /\S+, and its disk.qcow2, an overlay over image\n", r.stderr),
               f"not said where: {r.stderr}")


LOGS = """
made = []
def guest(name):
    vm = qemu.VM(Path("kernel"), "image", name=name)
    made.append(vm.dir)
    vm.stop()
def fails(_):
    guest("fails")
    raise AssertionError("as it has to")
def many(_):
    del made[:]
    for _ in range(qemu.KEEP + 5):
        guest("passes")
    expect(all(d.exists() for d in made), "logs of a test that is not over are gone")
run("fails", fails)
kept = made[0]
for _ in range(2):
    expect(run("many", many).state == "ok", "see above")
guest("last")
expect(kept.exists(), "the logs of the failure are gone")
count = len(list(kept.parent.iterdir()))
expect(count <= qemu.KEEP + 3, f"{count} logs are kept")
for _ in range(qemu.KEEP_FAILED + 1):
    run("fails", fails)
expect(not kept.exists(), "logs of failures are kept for ever")
"""


@test(kernels=(), image=False)
def logs_of_a_failure_are_kept(ctx):
    with Scratch() as s:
        passes(s, LOGS, KHO_LAB_ACCEL="tcg")


@test(kernels=(), image=False)
def a_tree_is_known_by_all_that_is_in_it(ctx):
    """New files count; in a clone of somebody else git is asked all the same; without git nothing passes."""
    with Scratch() as s:
        def state():
            return passes(s, "print(check.tree_state())", GIT_TEST_ASSUME_DIFFERENT_OWNER="1").strip()
        s.refused(s.lab("check-long", "units"), "not a git repository")
        for cmd in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            git(s.project, *cmd)
        seen = [state()]
        (s.project / "docs/results").mkdir(parents=True)
        for name in ("results/part.md", "results/part.json", "blackout.svg", "lab.md", "../README.md"):
            (s.project / "docs" / name).write_text("a result, or what it is")
        expect(seen == [state()] and seen[0].isalnum(), f"what no test reads counts: {seen}, {state()}")
        git(s.project, "add", ".")
        git(s.project, "commit", "-q", "-m", "results")
        expect(seen == [state()], "a commit of what no test reads counts")
        for name, text in (("new.c", "1"), ("new.c", "2"), ("docs/man.8", "a page of the package")):
            (s.project / name).write_text(text)
            seen.append(state())
        expect(len(set(seen)) == 4, f"a new file does not count: {seen}")


PARTS = """
def works(_):
    check.passed_parts({"other@1": {"date": "", "outcomes": []}})
check.TESTS = [Test("works", works, "part", (), False)]
check.tree_state = lambda: "1"
check.write_result = lambda *a: None
expect(check.check_long(["part"]) == 0, "the part failed")
expect(set(check.passed_parts()) == {"part@1", "other@1"}, "what another clone wrote meanwhile is gone")
check.PART_MINUTES = 0
expect(check.check_long(["part"], fresh=True) == 1, "the part took too long, and passed")
"""


@test(kernels=(), image=False)
def a_part_that_takes_too_long(ctx):
    """It fails; and two clones that run parts at the same time keep each other's results."""
    with Scratch() as s:
        expect("more than 0 minutes" in passes(s, PARTS), "no reason")


CASES = """
#include <criterion/criterion.h>
Test(khoctl, passes) { }
Test(khoctl, real_khod) { cr_skip_test("no"); }
Test(khoctl, unknown) { cr_skip_test("no"); }
"""
SKIPS = """
def skips(_):
    raise check.Skip("it cannot be run here")
check.TESTS = [Test("some-test", skips, "", (), False)]
print(check.check())
"""


@test(kernels=(), image=False)
def a_skip_without_a_reason(ctx):
    """It is told by name before any test, whatever is skipped, and the run has its closing line."""
    with Scratch() as s:
        for line, words, end in (("", "does not allow it", "0 passed, 1 failed, 0 skipped\n1\n"),
                                 ("some-test", "no reason for some-test", "0 passed, 1 failed, 0 skipped\n1\n"),
                                 ("some-test for the test", "for the test", "0 passed, 0 failed, 1 skipped\n1\n")):
            (s.project / "tests/lab/skips.txt").write_text(f"# NAME REASON\n{line}\n")
            out = passes(s, SKIPS)
            expect(words in out and out.endswith(end), f"'{line}': {out}")


OPTIONS = """
option('fault_points', type: 'boolean')
option('unit_tests', type: 'feature', value: 'auto')
"""
MESON = """
project('units', 'c')
criterion = dependency('criterion', required: get_option('unit_tests'))
if not criterion.found()
  subdir_done()
endif
exe = executable('cases', 'cases.c', dependencies: criterion)
foreach c : ['passes', 'real_khod'%s]
  test(c, exe, args: ['--filter', 'khoctl/' + c])
endforeach
"""


@test(kernels=(), image=False)
def cases_of_unit_tests_that_are_skipped(ctx):
    """They count as skipped, and pass only if skips.txt names them; a program without a case fails."""
    with Scratch() as s:
        (s.project / "meson_options.txt").write_text(OPTIONS)
        (s.project / "cases.c").write_text(CASES)
        for more, state, counts, words in (
                ("", "ok", (1, 0, 1), ("khoctl::real_khod",)),
                (", 'unknown', 'absent'", "FAILED", (1, 1, 2), ("khoctl::unknown was skipped", "absent has no case"))):
            (s.project / "meson.build").write_text(MESON % more)
            out = passes(s, "o = check.unit_tests(); print(o.state, o.counts)")
            expect(out.endswith(f"{state} {counts}\n") and all(w in out for w in words), out)


@test(kernels=(), image=False)
def unit_tests_that_cannot_be_built(ctx):
    """They fail by the name of what is missing, and do not count as none; once it is there they are built."""
    with Scratch() as s:
        (s.project / "meson_options.txt").write_text(OPTIONS)
        (s.project / "meson.build").write_text(MESON % "")
        (s.project / "cases.c").write_text(CASES)
        out = passes(s, "check.unit_tests()", PKG_CONFIG_LIBDIR="/nowhere")
        expect("FAILED" in out and "criterion" in out, out)
        out = passes(s, "check.unit_tests()")
        expect("ok " in out, out)


HANGS = """
from lablib import bench_custody, bench_memory
rounds = []
def measure(shape, builds, before):
    if len(rounds) == len(bench_memory.SHAPES):
        raise kernel.LabError("the guest did not go on")
    rounds.append(shape)
    return {k: {"console": 1.0, "retrieve": 1.0, "runs": 1} for k in builds}
def custody(kind, build, memory, end):
    if len(rounds) == 9:
        raise kernel.LabError("the guest did not go on")
    rounds.append(kind)
    return {str(s): {"khod ready": 1.0, "runs": 1} for s in bench_custody.SHAPES}
kernel.build = lambda *a, **kw: None
bench_memory.measure, bench_custody.measure = measure, custody
bench_memory.RESULTS.mkdir(parents=True)
for main in (bench_memory.main, bench_custody.main):
    try:
        main(3, 1000)
    except kernel.LabError:
        rounds.clear()
expect(not rounds, "it did not hang")
for name in ("blackout", "custody"):
    for kind in ("md", "json"):
        expect("contiguous" in (bench_memory.RESULTS / f"{name}.{kind}").read_text(), f"{name}.{kind} lacks figures")
"""


@test(kernels=(), image=False)
def a_bench_whose_guest_hangs_in_a_late_round(ctx):
    """What the rounds before it gave is written down."""
    with Scratch() as s:
        passes(s, HANGS)


PAIRS = """
from lablib import bench, bench_plain, timeline
took = []
def one(vm, setup):
    if len(took) == limit:
        raise kernel.LabError("the guest did not go on")
    took.append(setup)
    return timeline.Timeline([("old kernel", 0, 1.0)], 1.0, 2.0, 3.0)
class Guest:
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def ready(self):
        pass
kernel.build = lambda *a, **kw: None
bench.VM, bench.full_image, bench.one = (lambda *a, **kw: Guest()), (lambda: None), one
bench.drop_memory = lambda vm: None
bench.counted = lambda vm, setup: one(vm, setup).blackout
# Two whole pairs, of four kexecs after three that do not count, and of two after one; and some of a third.
for limit, take in ((14, lambda: bench.measure("idle", 9, 1000)), (6, lambda: bench.gap(9, 1000))):
    del took[:]
    try:
        take()
        raise AssertionError("it did not hang")
    except kernel.LabError:
        pass
bench_plain.blackout = lambda build: 1.0
bench_plain.main(3, 0)
"""


@test(kernels=(), image=False)
def a_bench_whose_guest_hangs_in_a_late_pair(ctx):
    """What the pairs before it come to is printed; and in no time at all there is one pair."""
    with Scratch() as s:
        out = passes(s, PAIRS)
        for line in (r"blackout +1.000 s against +1.000 s: 1.000 \(1.000 to 1.000, 2 pairs\)", "phases, measured: old",
                     r"service gap +2.000 s.* 2 pairs", r"service gap: 1.000 .* 2 pairs", r"plain kexec: .* 1 pairs"):
            expect(re.search(line, out), f"no '{line}' in {out}")
        for minutes in ("0", "-1", "soon"):
            r = s.lab("bench", "plain", "--minutes", minutes, KHO_LAB_NEED_GIB="1000000")
            expect(r.returncode == 2 and "--minutes" in r.stderr and "Traceback" not in r.stderr, r.stderr)


CLOCK_SET = """
import socket, time
guest, host = socket.socketpair()
log = qemu.Log(Path("/dev/null"), host)
real = time.time
guest.send(b"before\\n")
log.wait("before", 0, time.monotonic() + 10, lambda: True)
time.time = lambda: real() + 3600
guest.send(b"after\\n")
log.wait("after", 0, time.monotonic() + 10, lambda: True)
before, after = log.lines
print(0 <= after.when - before.when < 20, 3600 <= after.wall - before.wall < 3620)
"""


@test(kernels=(), image=False)
def a_wall_clock_that_is_set_during_a_run(ctx):
    """What the guest said stays where it belongs in QEMU's trace, which has that clock only."""
    with Scratch() as s:
        expect(passes(s, CLOCK_SET) == "True True\n", "a line's wall clock is not that of when it came")


TRACE = """1@1000.500000:e1000e_rx_desc_buff_write buffer #0, addr: 0x1000, offset: 0, from: 0x7f, length: 128
1@1000.750000:e1000e_rx_desc_buff_write buffer #0, addr: 0x2000, offset: 0, from: 0x7f, length: 128
1@1001.000000:pci_cfg_write e1000e 01:00.0 @0x4 <- 0x6
"""
WORDS = ("        2 e1000e_rx_desc_buff_write", "2 packets, 256 bytes", "0.250 s apart", "configuration: 0x4 <- 0x6")


@test(kernels=(), image=False)
def what_a_run_traced_is_told(ctx):
    with Scratch() as s:
        (s.dir / "trace.log").write_text(TRACE)
        r = s.lab("trace", "--config", str(s.dir))
        expect(r.returncode == 0 and all(w in r.stdout for w in WORDS), r.stdout + r.stderr)
        s.refused(s.lab("trace", "/nowhere"), "/nowhere/trace.log")


WORDS_OF_KERNELS = """
vm = qemu.VM(Path("minimal-1"), "image")
print(*("no5lvl" in vm.cmdline(k) for k in (None, Path("debug-1"))))
vm.stop()
"""


@test(kernels=(), image=False)
def each_kernel_gets_its_own_words(ctx):
    """Of the next kernel, which is another one than the guest's first."""
    with Scratch() as s:
        expect(passes(s, WORDS_OF_KERNELS, KHO_LAB_ACCEL="tcg") == "False True\n", "no5lvl goes by the first kernel")


PRESSURE = """
asked = []
def run(command):
    asked.append(command)
    raise kernel.LabError("it has found a page that changed")
for init in ("bare", "systemd"):
    vm = qemu.VM(Path("minimal-1"), "image", init=init, pressure=True)
    vm.console = type("Console", (), {"lines": [], "thread": type("Thread", (), {"join": lambda *_: None})})
    vm.start_command = vm.next_boot = lambda *_: None
    vm.run = run
    try:
        vm.reboot_loaded()
        raise AssertionError(f"{init}: nobody asked")
    except kernel.LabError:
        vm.stop()
expect(len(asked) == 2 and all("memory-pressure" in a for a in asked), asked)
"""


@test(kernels=(), image=False)
def memory_pressure_that_fails_ends_a_kexec(ctx):
    """With systemd, too, where a unit of its own does it (in guests: bare.py)."""
    with Scratch() as s:
        passes(s, PRESSURE, KHO_LAB_ACCEL="tcg")
