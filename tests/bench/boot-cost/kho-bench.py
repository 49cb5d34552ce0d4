#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot-cost benchmark of a kexec handover: what preserved memory costs.

Runs the guest program kho_bench (see kho_bench.c) as init of a bare QEMU guest
for every combination of kernel, size and pattern asked for, in alternation, and
prints one row a run.  Times are taken by the host when a console line arrives
(earlycon is on, so lines arrive as they are printed); what the guest itself
measured (preserve, retrieve) is in its own clock.  Guest memory is preallocated:
first touch on the host would look like boot cost.

  to_kernel   "Starting new kernel" to the first line of the new kernel
  to_console  "Starting new kernel" to the real console being enabled
  to_init     "Starting new kernel" to the first line of the new init
  preserve    LIVEUPDATE_SESSION_PRESERVE_FD
  retrieve    LIVEUPDATE_SESSION_RETRIEVE_FD

A run counts only if every page's contents were verified in the new kernel.

Example:
  kho-bench.py --kernel base=bzImage.base --kernel new=bzImage \\
      --case 0:contig --case 256:second --case 1024:contig --repeat 3
"""
import argparse
import gzip
import json
import os
import re
import selectors
import statistics
import subprocess
import sys
import tempfile
import time


def cpio_entry(name, mode, data=b"", rdev=(0, 0)):
    """One newc record, padded; @mode includes the file type."""
    name = name.encode() + b"\0"
    head = "070701" + "".join("%08X" % v for v in (
        0, mode, 0, 0, 1, 0, len(data), 0, 0, rdev[0], rdev[1], len(name), 0))
    out = head.encode() + name
    out += b"\0" * (-len(out) % 4)
    out += data + b"\0" * (-len(data) % 4)
    return out


def cpio(files):
    """A newc archive with the usual directories, /dev/console and @files."""
    out = b"".join(cpio_entry(d, 0o40755)
                   for d in ("dev", "proc", "sys", "debugfs"))
    out += cpio_entry("dev/console", 0o20600, rdev=(5, 1))
    for name, mode, data in files:
        out += cpio_entry(name, 0o100000 | mode, data)
    return out + cpio_entry("TRAILER!!!", 0)


def make_initrd(path, program, kernel, next_kernel):
    """Write an initrd whose init kexecs @next_kernel into the same init."""
    with open(program, "rb") as f:
        init = f.read()
    with open(next_kernel or kernel, "rb") as f:
        image = f.read()
    chain = [("init", 0o755, init), ("kernel", 0o644, image)]
    # one more level than there are handovers with a kernel to load
    inner = gzip.compress(cpio([("init", 0o755, init)]), 1)
    if path.endswith(".deep"):
        inner = cpio(chain + [("initrd.img", 0o644, inner)])
    with open(path, "wb") as f:
        f.write(cpio(chain + [("initrd.img", 0o644, inner)]))


class Line:
    """A console line, the host's time it was complete, the guest's stamp."""

    STAMP = re.compile(r"^\[\s*(\d+\.\d+)\](?:\[[^]]*\])? ?(.*)$")

    def __init__(self, when, text):
        self.when, self.raw = when, text
        m = self.STAMP.match(text)
        self.stamp = float(m.group(1)) if m else None
        self.text = m.group(2) if m else text


def run_guest(opts, kernel, initrd, append, log):
    """Run one guest until it ends; return its console lines."""
    mem = opts.mem
    cmd = [opts.qemu, "-accel", "tcg", "-machine", "q35", "-cpu", opts.cpu,
           "-smp", str(opts.smp), "-m", str(mem), "-nodefaults", "-display", "none",
           "-no-reboot", "-serial", "stdio", "-kernel", kernel,
           "-initrd", initrd, "-append", append]
    if opts.nodes == 1:
        cmd += ["-object", f"memory-backend-ram,id=m0,size={mem}M,prealloc=on",
                "-machine", "memory-backend=m0"]
    else:
        part = mem // opts.nodes
        for n in range(opts.nodes):
            cmd += ["-object",
                    f"memory-backend-ram,id=m{n},size={part}M,prealloc=on",
                    "-numa", f"node,nodeid={n},memdev=m{n}"]
    lines, buf = [], b""
    start = time.monotonic()
    deadline = time.monotonic() + opts.timeout
    with open(log, "wb") as out:
        proc = subprocess.Popen(cmd, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)
        try:
            sel = selectors.DefaultSelector()
            sel.register(proc.stdout, selectors.EVENT_READ)
            os.set_blocking(proc.stdout.fileno(), False)
            while time.monotonic() < deadline:
                if not sel.select(0.5):
                    continue
                data = proc.stdout.read()
                when = time.monotonic()
                if data == b"":
                    break
                if data is None:
                    continue
                buf += data
                *done, buf = buf.split(b"\n")
                for d in done:
                    lines.append(Line(when, d.decode("utf-8", "replace")
                                      .rstrip("\r")))
                    out.write(f"{when - start:9.4f} {lines[-1].raw}\n".encode())
            else:
                lines.append(Line(time.monotonic(), "TIMEOUT"))
        finally:
            proc.kill()
            proc.wait()
    return lines


def find(lines, needle, start=0):
    for i in range(start, len(lines)):
        if needle in lines[i].text:
            return i
    return None


def analyse(lines):
    """Turn console lines into the result of one run."""
    res = {"ok": False}
    kexec = find(lines, "Starting new kernel")
    values = {}
    for i, line in enumerate(lines):
        m = re.match(r"khobench: (.*)", line.text)
        if not m:
            continue
        where = "old" if kexec is None or i <= kexec else "new"
        for k, v in re.findall(r"(\w+)=(\S+)", m.group(1)):
            values[f"{where}.{k}"] = v
        if m.group(1).startswith(("FAIL", "BAD")):
            res.setdefault("error", m.group(1))
    res["values"] = values
    for needle in ("Kernel panic", "BUG:", "WARNING:", "Oops", "TIMEOUT",
                   "refused", "disabling KHO"):
        hits = [x.text for x in lines
                if needle in x.text and "ommand line:" not in x.text]
        if hits:
            res.setdefault("notes", []).append(hits[0][:110])
    if kexec is not None:
        t0 = lines[kexec].when
        for key, needle in (("to_kernel", "Linux version"),
                            ("to_memory", "Memory: "),
                            ("to_console", "console [ttyS0] enabled"),
                            ("to_init", "khobench: init")):
            i = find(lines, needle, kexec)
            if i is not None:
                res[key] = round(lines[i].when - t0, 4)
                res[key + "_stamp"] = lines[i].stamp
    for key, name in (("preserve", "old.preserve_us"),
                      ("retrieve", "new.retrieve_us"),
                      ("load", "old.load_us"), ("finish", "new.finish_us")):
        if name in values:
            res[key] = int(values[name]) / 1e6
    res["runs"] = int(values.get("old.runs", 0))
    res["migrated"] = int(values.get("old.in_scratch", 0))
    done = find(lines, "khobench: DONE") is not None
    bad = values.get("new.bad", values.get("old.bad", "0"))
    res["ok"] = done and "error" not in res and bad == "0" and \
        not any("WARNING" in n or "panic" in n or "BUG" in n
                for n in res.get("notes", []))
    return res


COLUMNS = ("preserve", "to_kernel", "to_console", "to_init", "retrieve")


def show(name, case, res):
    cols = " ".join(f"{k}={res[k]:.3f}" if isinstance(res.get(k), float)
                    else f"{k}=-" for k in COLUMNS)
    print(f"{name:10} {case:22} {'ok  ' if res['ok'] else 'FAIL'} {cols} "
          f"runs={res['runs']} {res.get('error', '')} "
          f"{' | '.join(res.get('notes', []))}", flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--kernel", action="append", required=True,
                    metavar="NAME=BZIMAGE")
    ap.add_argument("--next-kernel", help="the kernel to kexec, if another")
    ap.add_argument("--case", action="append", metavar="MIB:PATTERN[:huge]",
                    help="MiB of memfd and contig, hole or second")
    ap.add_argument("--repeat", type=int, default=1)
    ap.add_argument("--mem", type=int, default=4096, help="guest MiB")
    ap.add_argument("--smp", type=int, default=1)
    ap.add_argument("--nodes", type=int, default=1)
    ap.add_argument("--cpu", default="max")
    ap.add_argument("--append", default="")
    ap.add_argument("--timeout", type=float, default=240)
    ap.add_argument("--qemu", default="qemu-system-x86_64")
    here = os.path.dirname(os.path.abspath(__file__))
    ap.add_argument("--program", default=os.path.join(here, "kho_bench"))
    ap.add_argument("--logs", default="logs", help="folder for console logs")
    ap.add_argument("--json", help="append every result to this file")
    opts = ap.parse_args()

    os.makedirs(opts.logs, exist_ok=True)
    kernels = [k.split("=", 1) for k in opts.kernel]
    cases = opts.case or ["0:contig"]
    results, failed = {}, 0
    with tempfile.TemporaryDirectory() as tmp:
        for name, image in kernels:
            make_initrd(os.path.join(tmp, name), opts.program, image,
                        opts.next_kernel)
            make_initrd(os.path.join(tmp, name + ".deep"), opts.program, image,
                        opts.next_kernel)
        for rep in range(opts.repeat):
            for case in cases:
                order = kernels if rep % 2 == 0 else kernels[::-1]
                mib, pattern, *rest = case.split(":")
                huge = 1 if "huge" in rest else 0
                deep = ".deep" if "khobench.rounds=2" in opts.append else ""
                for name, image in order:
                    append = ("console=ttyS0 earlycon=uart8250,io,0x3f8,115200 "
                              "printk.devkmsg=on panic=-1 liveupdate=on kho=on "
                              f"khobench.mib={mib} khobench.pattern={pattern} "
                              f"khobench.huge={huge} "
                              f"khobench.seed={1000 + rep} {opts.append}")
                    log = os.path.join(opts.logs, f"{name}-{mib}-{pattern}"
                                       f"{'-huge' if huge else ''}-{rep}.log")
                    res = analyse(run_guest(opts, image,
                                            os.path.join(tmp, name) + deep,
                                            append, log))
                    show(name, case, res)
                    failed += not res["ok"]
                    results.setdefault((case, name), []).append(res)
                    if opts.json:
                        with open(opts.json, "a") as f:
                            json.dump({"kernel": name, "case": case,
                                       "rep": rep, **res}, f)
                            f.write("\n")
    if opts.repeat > 1:
        print("\nmedian (min..max) of", opts.repeat)
        for (case, name), rs in results.items():
            row = []
            for k in COLUMNS:
                v = [r[k] for r in rs if r["ok"] and isinstance(r.get(k), float)]
                if v:
                    row.append(f"{k}={statistics.median(v):.3f} "
                               f"({min(v):.3f}..{max(v):.3f})")
            print(f"{name:10} {case:22} {'  '.join(row)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
