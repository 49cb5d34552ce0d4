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
import subprocess
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import kernel
from .common import LAB, PROJECT, LabError, cache_dir, digest, run, say
from .images import full_image
from .qemu import VM

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
    rows = (line.split(None, 1) for line in (LAB / "skips.txt").read_text().splitlines()
            if line.strip() and not line.startswith("#"))
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
    """Build all that the tests need first, so that their times are their own."""
    for config, unpatched, release in sorted({k for t in tests for k in t.kernels}):
        kernel.build(config, unpatched=unpatched, release=release)
    if any(t.image for t in tests):
        full_image()


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


def unit_tests() -> Outcome:
    """Build on this host and run meson's tests; each case counts."""
    start, build, log = time.monotonic(), PROJECT / "build-check", cache_dir() / "unit-tests.log"
    options = ["-Dwerror=true", "-Dfault_points=true"]
    try:
        log.write_bytes(b"")
        run(["meson", "setup", "--reconfigure" if build.exists() else "--buildtype=debugoptimized",
             build, *options], cwd=PROJECT, log=log, what="configuring the build")
        run(["ninja", "-C", build], log=log, what="building for this host")
        # They wait more than they compute.
        run(["meson", "test", "-C", build, "--no-rebuild", "--print-errorlogs", "--num-processes",
             str(3 * os.cpu_count())], log=log, what="the unit tests")
        state, text = "ok", ""
    except LabError as e:
        state, text = "FAILED", str(e)
    found = dict(re.findall(r"^(Ok|Fail|Skipped|Timeout):\s+(\d+)", log.read_text(errors="replace"), re.M))
    counts = tuple(int(found.get(k, 0)) for k in ("Ok", "Fail", "Skipped"))
    out = Outcome("unit-tests", state, time.monotonic() - start, text,
                  counts if state == "ok" else (counts[0], max(counts[1], 1), counts[2]))
    report(out)
    return out


def check(names=(), jobs=2, unit_tests_too=False) -> int:
    """The quick tests; returns the exit status."""
    tests = select([t for t in load() if not t.part], names)
    start = time.monotonic()
    outcomes = [unit_tests()] if unit_tests_too else []
    prepare(tests)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            outcomes += pool.map(run_one, tests)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    passed, failed, skipped = totals(outcomes)
    print(f"\n{len(tests)} tests of the lab in {time.monotonic() - start:.0f} s")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


def check_long(parts, fresh=False) -> int:
    """Parts of at most an hour each; what passed on this very tree is not run again."""
    tests = [t for t in load() if t.part]
    known = sorted({t.part for t in tests})
    for p in parts:
        if p not in known:
            raise LabError(f"no part named {p}; there are {', '.join(known)}")
    state_file = cache_dir() / "check-long.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    commit = tree_state()
    outcomes = []
    for part in parts or known:
        key = f"{part}@{commit}"
        if key in state and not fresh:
            say(f"{part}: passed already on this tree ({state[key]['date']})")
            outcomes += [Outcome(**o) for o in state[key]["outcomes"]]
            continue
        chosen = [t for t in tests if t.part == part]
        prepare(chosen)
        start = time.monotonic()
        got = [run_one(t) for t in chosen]
        outcomes += got
        write_result(part, commit, got, time.monotonic() - start)
        if totals(got)[1] == 0:
            state[key] = {"date": time.strftime("%Y-%m-%d"), "outcomes": [vars(o) for o in got]}
            state_file.write_text(json.dumps(state))
    passed, failed, skipped = totals(outcomes)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


def tree_state() -> str:
    """The commit, with a digest of what is not committed (results do not count)."""
    def git(*a):
        return subprocess.run(["git", *a], cwd=PROJECT, capture_output=True, text=True,
                              check=False).stdout
    diff = git("diff", "HEAD", "--", ".", ":!docs/results")
    head = git("log", "-1", "--format=%h", "--", ".", ":!docs/results").strip()
    return head + (f"+{digest(diff)[:6]}" if diff else "")


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
