# SPDX-License-Identifier: GPL-2.0-or-later
"""The test runner: finds the tests of tests/lab/suite, runs two at a time, counts.

A test is a function with @test; it takes a Context and raises when something is
not as it must be. `check` runs the quick ones, `check-long` the parts with
their full numbers. A skip passes only if tests/lab/skips.txt names it with a reason.
"""

import importlib
import json
import os
import re
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import kernel
from .common import LAB, PROJECT, LabError, cache_dir, changes, clone_dir, lock, note, run, say
from .images import full_image
from .qemu import VM, runs_ended
from .rootfs import GIT, check_privileges

TESTS = []
PRINTING = threading.Lock()


class Skip(Exception):
    """The test cannot be run here; the text says why."""


@dataclass
class Test:
    """A test function with what the runner must know about it."""
    name: str
    run: object
    part: str           # "" for check, else the part of check-long it belongs to
    kernels: tuple      # the builds it needs: (config, unpatched, release)
    image: bool         # whether it needs the root file system


@dataclass
class Outcome:
    """How a test ended; @counts replaces the one test by what a suite counted itself."""
    name: str
    state: str
    seconds: float
    text: str = ""
    counts: tuple = ()
    figures: dict = field(default_factory=dict)


def test(name=None, part="", kernels=(("minimal", False, ""),), image=True):
    def mark(fn):
        TESTS.append(Test(name or fn.__name__.replace("_", "-"), fn, part, kernels, image))
        return fn
    return mark


class Context:
    """What a test gets: kernels, the image, guests, and a place for figures."""

    def __init__(self, name):
        self.name, self.figures, self.counts = name, {}, ()

    def kernel(self, config="minimal", unpatched=False, release="") -> Path:
        return kernel.build(config, unpatched=unpatched, release=release)

    def vm(self, config="minimal", **kw) -> VM:
        build = kw.pop("kernel", None) or self.kernel(config)
        return VM(build, full_image(), name=kw.pop("name", self.name), **kw)

    def figure(self, name, value):
        """Something measured, to be printed and recorded with the result."""
        self.figures[name] = value


def expect(condition, text):
    if not condition:
        raise AssertionError(text)


def load():
    if not TESTS:
        for path in sorted((LAB / "suite").glob("*.py")):
            importlib.import_module(f"suite.{path.stem}")
    return TESTS


def allowed_skips() -> dict:
    """Name -> reason, by skips.txt."""
    rows = [line.split(None, 1) for line in (LAB / "skips.txt").read_text().splitlines()
            if line.strip() and not line.startswith("#")]
    bare = [row[0] for row in rows if len(row) < 2]
    if bare:
        raise LabError(f"tests/lab/skips.txt gives no reason for {', '.join(bare)}; write one behind the name")
    return {name: reason.strip() for name, reason in rows}


def run_one(t: Test) -> Outcome:
    ctx, start = Context(t.name), time.monotonic()
    try:
        t.run(ctx)
        state, text = "ok", ""
    except Skip as e:
        reason = allowed_skips().get(t.name)
        state, text = ("skip", f"{e} (allowed: {reason})") if reason else \
            ("FAILED", f"skipped, and tests/lab/skips.txt does not allow it: {e}")
    except (LabError, AssertionError) as e:
        state, text = "FAILED", str(e) or traceback.format_exc(limit=3)
    except Exception:       # pylint: disable=broad-except
        state, text = "FAILED", traceback.format_exc()
    runs_ended(failed=state == "FAILED")
    out = Outcome(t.name, state, time.monotonic() - start, text, ctx.counts, ctx.figures)
    report(out)
    return out


def report(out: Outcome) -> None:
    with PRINTING:
        figures = "".join(f"; {k} {v}" for k, v in out.figures.items())
        print(f"{out.state:7}{out.name} ({out.seconds:.0f} s{figures})", flush=True)
        if out.text:
            print("    " + out.text.rstrip().replace("\n", "\n    "), flush=True)


def prepare(tests):
    """Build all that the tests need first, so that their times are their own; first of all read skips.txt."""
    allowed_skips()
    for config, unpatched, release in sorted({k for t in tests for k in t.kernels}):
        kernel.build(config, unpatched=unpatched, release=release)
    if any(t.image for t in tests):
        full_image()


def prepared(tests) -> list:
    """The outcome of prepare(), if it failed: then none of @tests can be run."""
    out = run_one(Test("preparation", lambda _: prepare(tests), "", (), False))
    return [out] if out.state == "FAILED" else []


def totals(outcomes):
    passed = failed = skipped = 0
    for o in outcomes:
        p, f, s = o.counts or (o.state == "ok", 0, o.state == "skip")
        passed, skipped = passed + int(p), skipped + int(s)
        failed += int(f) + (o.state == "FAILED" and not f)
    return passed, failed, skipped


def select(tests, names):
    if not names:
        return tests
    unknown = [n for n in names if not any(n in t.name for t in tests)]
    if unknown:
        raise LabError(f"no test named {', '.join(unknown)}; 'lab check --list' lists them")
    return [t for t in tests if any(n in t.name for n in names)]


UNIT_ENV = {"CRITERION_VERBOSITY_LEVEL": "1"}      # or it does not say which cases it skips
UNIT_OPTIONS = ("-Dwerror=true", "-Dunit_tests=enabled")   # and no build without them if something is missing


def meson_test(build, *options) -> list:
    """The command for the unit tests, which want to be root and to become other users.

    For an ordinary user that is root of a user namespace.
    """
    check_privileges()
    space = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-auto", "--map-root-user"]
    return [*space, "meson", "test", "-C", build, "--no-rebuild", *options]


def skipped_cases(build: Path) -> tuple:
    """What the unit tests in @build left out when they last ran.

    ([names], [what is not allowed], how many programs did nothing, though they count as passed):
    a program of criterion that skips its cases, or has none, ends like one that passed.
    """
    log = (build / "meson-logs/testlog.txt").read_text(errors="replace")
    allowed, names, wrong, idle = allowed_skips(), [], [], 0
    for part in re.split(r"^=+ +\d+/\d+ +=+$", log, flags=re.M)[1:]:
        program = re.search(r"^test: +(.*)$", part, re.M)[1]
        # The others are those that --filter leaves out.
        cases = re.findall(r"^\[SKIP\] (\S+): (?!Test is disabled$)", part, re.M)
        if re.search(r"^result: +exit status 77$", part, re.M):
            cases.append(program)
        if "Synthesis: Tested: 0 " in part:
            idle += 1
            wrong += [] if cases else [f"{program} has no case"]
        names += cases
        wrong += [f"{c} was skipped, and tests/lab/skips.txt does not allow it" for c in cases if c not in allowed]
    return names, wrong, idle


def unit_tests() -> Outcome:
    """Build on this host and run meson's tests; each program counts, and each case that is skipped."""
    start, build, log = time.monotonic(), PROJECT / "build-check", clone_dir() / "unit-tests.log"
    names, idle = [], 0
    try:
        log.write_bytes(b"")
        run(["meson", "setup", "--reconfigure" if (build / "build.ninja").exists() else "--buildtype=debugoptimized",
             build, *UNIT_OPTIONS, "-Dfault_points=true"], cwd=PROJECT, log=log, what="configuring the build")
        run(["ninja", "-C", build], log=log, what="building for this host")
        # They wait more than they compute.
        run(meson_test(build, "--print-errorlogs", "--num-processes", 3 * os.cpu_count()), log=log,
            env=UNIT_ENV, what="the unit tests")
        names, wrong, idle = skipped_cases(build)
        state, text = ("FAILED", "\n".join(wrong)) if wrong else ("ok", "")
    except LabError as e:
        state, text = "FAILED", str(e)
    found = dict(re.findall(r"^(Ok|Fail|Timeout):\s+(\d+)", log.read_text(errors="replace"), re.M))
    failed = int(found.get("Fail", 0)) + int(found.get("Timeout", 0))
    out = Outcome("unit-tests", state, time.monotonic() - start, text,
                  (int(found.get("Ok", 0)) - idle, failed or int(state == "FAILED"), len(names)))
    if names:
        out.figures["skipped"] = ", ".join(names)
    report(out)
    return out


def unit_tests_alone() -> Outcome:
    with lock(clone_dir() / "unit-tests.lock", "the unit tests"):
        return unit_tests()


def check(names=(), jobs=2, unit_tests_too=False) -> int:
    """The quick tests; returns the exit status.

    The unit tests, which wait for minutes, run beside what is built and the first guests.
    """
    tests = select([t for t in load() if not t.part], names)
    start = time.monotonic()
    with ThreadPoolExecutor(1) as beside, ThreadPoolExecutor(jobs) as pool:
        units = [beside.submit(unit_tests_alone)] if unit_tests_too else []
        try:
            broken = prepared(tests)
            outcomes = broken or list(pool.map(run_one, tests))
            outcomes += [u.result() for u in units]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    print(f"\n{0 if broken else len(tests)} tests of the lab in {time.monotonic() - start:.0f} s")
    return closing_line(outcomes)


def closing_line(outcomes) -> int:
    passed, failed, skipped = totals(outcomes)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


PART_MINUTES = 60


def check_long(parts, fresh=False) -> int:
    """Parts of at most an hour each; what passed on this very tree is not run again."""
    tests = [t for t in load() if t.part]
    known = sorted({t.part for t in tests})
    for p in parts:
        if p not in known:
            raise LabError(f"no part named {p}; there are {', '.join(known)}")
    commit = tree_state()
    outcomes = []
    for part in parts or known:
        key = f"{part}@{commit}"
        before = passed_parts().get(key)
        if before and not fresh:
            say(f"{part}: passed already on this tree ({before['date']})")
            outcomes += [Outcome(**o) for o in before["outcomes"]]
            continue
        got = run_part(part, [t for t in tests if t.part == part], commit)
        outcomes += got
        if totals(got)[1] == 0:
            passed_parts({key: {"date": time.strftime("%Y-%m-%d"), "outcomes": [vars(o) for o in got]}})
    return closing_line(outcomes)


def passed_parts(more=None) -> dict:
    """The parts of check-long that passed, of all clones that use the cache; with @more written down, too."""
    path = cache_dir() / "check-long.json"
    with lock(cache_dir() / "check-long.lock", "writing down what has passed"):
        known = {**(json.loads(path.read_text()) if path.exists() else {}), **(more or {})}
        if more:
            note(path, json.dumps(known))
    return known


def run_part(part, tests, commit) -> list:
    """The outcomes of a part, written down; one that takes too long has failed."""
    broken = prepared(tests)
    if broken:
        return broken
    start = time.monotonic()
    got = [run_one(t) for t in tests]
    took = time.monotonic() - start
    if took > PART_MINUTES * 60:
        got.append(Outcome(f"{part}-in-time", "FAILED", took, f"it took more than {PART_MINUTES} minutes"))
        report(got[-1])
    write_result(part, commit, got, took)
    return got


# All but what no test of a part reads; man pages are built into the package.
TESTED = (".", ":!docs/results", ":!docs/*.md", ":!docs/*.svg", ":!README.md", ":!LICENSES")


def tree_state() -> str:
    """The last commit of what is TESTED, with a digest of what is not committed."""
    head = run([*GIT, "log", "-1", "--format=%h", "--", *TESTED], cwd=PROJECT,
               what="asking git for the commit to be tested").strip()
    diff = changes(GIT, PROJECT, *TESTED)
    return head + (f"+{diff[:6]}" if diff else "")


def write_result(part, commit, outcomes, seconds):
    """docs/results/PART.md: what the part gave when it last ran, to be committed."""
    path = PROJECT / "docs" / "results" / f"{part}.md"
    path.parent.mkdir(exist_ok=True)
    passed, failed, skipped = totals(outcomes)
    rows = "".join(f"| {o.name} | {o.state} | {o.seconds:.0f} s | "
                   + ", ".join(f"{k} {v}" for k, v in o.figures.items()) + " |\n" for o in outcomes)
    path.write_text(f"# check-long: {part}\n\nCommit {commit}, {time.strftime('%Y-%m-%d')}, "
                    f"{os.cpu_count()} cores, {seconds / 60:.0f} minutes.\n\n"
                    "| test | result | time | figures |\n|---|---|---|---|\n" + rows
                    + f"\n{passed} passed, {failed} failed, {skipped} skipped\n")


def tap(text):
    """Names of the cases in a kselftest's output: (passed, failed, skipped)."""
    passed, failed, skipped = [], [], []
    for line in text.splitlines():
        words = line.split()
        if line.startswith("ok ") and "# SKIP" in line:
            skipped.append(" ".join(words[2:]).split(" # SKIP")[0].strip("- "))
        elif line.startswith("ok "):
            passed.append(" ".join(words[2:]).strip("- "))
        elif line.startswith("not ok "):
            failed.append(" ".join(words[2:]).strip("- ").strip("# "))
    return passed, failed, skipped
