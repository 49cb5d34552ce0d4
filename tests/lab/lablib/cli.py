# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: one function per verb, thin over the modules."""

import argparse
import contextlib
import errno
import itertools
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from . import bench, check, demo, kernel, rootfs, trace
from .common import LabError, cache_dir, more_space, say
from .emulator import need_series
from .images import full_image
from .profiles import DEBUG_GUEST, DEVICES, PROFILES, SLOW, device_args, profile
from .qemu import VM, kill_all
from .sender import Sender


MINIMAL = "minimal"


def verb_kernel(a):
    if a.action != "build" and (a.config != MINIMAL or a.as_is or a.unpatched or a.release):
        raise LabError(f"'lab kernel {a.action}' takes no options: they are for 'lab kernel build'")
    if a.as_is and a.unpatched:
        raise LabError("--as-is builds the tree as it stands, --unpatched the source without the series: give one")
    if a.action == "build":
        print(kernel.build(a.config, as_is=a.as_is, unpatched=a.unpatched, release=a.release))
        return
    with kernel.tree_lock():
        {"tree": kernel.prepare, "export": kernel.export, "discard": kernel.discard,
         "headers": kernel.headers}[a.action]()
    if a.action == "tree":
        print(kernel.tree())


def verb_rootfs(a):
    print(rootfs.base(a.part) if a.part in ("run", "build") else
          rootfs.package() if a.part == "package" else full_image())


def traced(a) -> list:
    """The trace events asked for; with --send those, too, by which the first NIC's DMA is counted."""
    if not a.send:
        return a.trace
    kinds = (k.lstrip("+") for k in a.device)
    nic = next((k for k in kinds if k in DEVICES and DEVICES[k][1]), None)
    if nic not in trace.BUFFER_WRITES:
        raise LabError(f"--send needs a NIC whose DMA is counted, {' or '.join(trace.BUFFER_WRITES)}, as the first "
                       f"one of --device, not {nic or 'none'}")
    return [*a.trace, trace.BUFFER_WRITES[nic], "pci_cfg_write"]


def need_names(a):
    """Refuse what there is no such thing of, before anything is fetched or built."""
    traced(a)
    need_series(a.qemu or profile(a.machine)[2])
    device_args(a.device, itertools.repeat("netdev"), itertools.repeat("disk"))
    for config in filter(None, (a.kernel, vars(a).get("next"))):
        kernel.fragments(config)


@contextlib.contextmanager
def guest(a):
    """The guest that the options of `run` and `loop` describe, up; with --send while it gets packets."""
    debug = "debug" in (a.kernel, vars(a).get("next"))
    needs = {**(DEBUG_GUEST if debug else {}), **({"memory": a.memory} if a.memory else {})}
    events = traced(a)
    with VM(kernel.build(a.kernel, as_is=a.as_is), full_image(a.as_is), name=a.verb, machine=a.machine,
            devices=a.device, init=a.init, cpus=a.cpus, append=a.append, pressure=a.pressure, qemu=a.qemu,
            trace=events, boot_timeout=SLOW if debug else None, **needs) as vm:
        vm.ready()
        with sending(vm, a.send):
            yield vm


@contextlib.contextmanager
def sending(vm, rate):
    """@rate packets a second to the first NIC; at the end what was sent, and what it wrote to memory."""
    if not rate:
        yield
        return
    sender = Sender(vm.senders[0], rate, vm.dir / "sent")
    try:
        yield
    finally:
        sent = sender.stop()
    time.sleep(1)       # what is on its way
    landed = sum(length > 0 for *_, length in trace.dma_writes(vm.dir / "trace.log"))
    say(f"{len(sent)} packets sent, {landed} written to memory by DMA ('lab trace {vm.dir}' tells more)")


def verb_trace(a):
    """What the devices of a run did, by QEMU's trace."""
    path = Path(a.run_dir) / "trace.log"
    if not path.exists():
        raise LabError(f"there is no {path}; give the folder of a run's logs")
    for name, count in sorted(trace.count(path).items()):
        print(f"{count:9} {name}")
    writes = [(when, length) for when, _, length in trace.dma_writes(path) if length > 0]
    if writes:
        longest = max((b[0] - a[0] for a, b in zip(writes, writes[1:])), default=0)
        print(f"{len(writes)} packets, {sum(n for _, n in writes)} bytes, were written to memory by DMA in "
              f"{writes[-1][0] - writes[0][0]:.3f} s, at most {longest:.3f} s apart")
    for when, device, slot, offset, value in trace.config_writes(path) if a.config else ():
        print(f"{when:.6f} {device} {slot} configuration: {offset:#x} <- {value:#x}")


def verb_run(a):
    need_names(a)
    with guest(a) as vm:
        say(f"{vm.release()} is up; logs: {vm.dir}")
        if a.command:
            r = vm.run(shlex.join(a.command) if len(a.command) > 1 else a.command[0], a.timeout,
                       check=False)
            sys.stdout.write(r.out)
            sys.stderr.write(r.err)
            return r.status
        say("a line is a command for the guest; 'kexec' replaces its kernel; end with ctrl-D")
        for line in sys.stdin:
            if line.strip() == "kexec":
                say(f"now {vm.kexec().release()}")
                continue
            r = vm.run(line, a.timeout, check=False)
            sys.stdout.write(r.out + r.err)
            sys.stdout.flush()
    return 0


def verb_loop(a):
    """N kexecs in a row; the first failure ends it, with the logs of that run kept."""
    need_names(a)
    other = kernel.build(a.next, as_is=a.as_is) if a.next else None
    with guest(a) as vm:
        for i in range(1, a.count + 1):
            start = len(vm.console.lines)
            vm.kexec(other if i % 2 and other else None)
            if a.command:
                vm.run(shlex.join(a.command) if len(a.command) > 1 else a.command[0], a.timeout)
            took = vm.console.lines[-1].when - vm.console.lines[start].when
            print(f"kexec {i} of {a.count}: {vm.release()} up, {took:.1f} s", flush=True)
    return 0


def verb_check(a):
    return list_tests(a.names) if a.list else check.check(a.names, a.jobs, a.with_unit_tests)


def verb_check_long(a):
    return list_tests(a.parts) if a.list else check.check_long(a.parts, a.fresh)


def list_tests(words):
    if words:
        raise LabError(f"--list lists all tests and takes no names: {' '.join(words)}")
    for t in check.load():
        print(f"{t.part or 'check':10} {t.name}")
    return 0


def verb_demo(a):
    return demo.main(a.machine)


def verb_bench(a):
    return bench.main(a.names, a.pairs, a.minutes)


def verb_cache(_a):
    print(cache_dir())


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def duration(unit):
    """A parser of numbers of @unit."""
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < float(text) < math.inf:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text} is not a number of {unit}, more than 0")
    return parse


def memory(text: str) -> str:
    if not re.fullmatch("[1-9][0-9]*[MG]", text):
        raise argparse.ArgumentTypeError(f"{text} is not a size like 512M or 4G")
    return text


def parser():
    p = argparse.ArgumentParser(prog="lab", description="Build kernels and root file systems, run guests, "
                                "kexec them, and count what their devices really do.",
                                epilog="'lab VERB --help' explains a verb; docs/lab.md is the manual.")
    verbs = p.add_subparsers(dest="verb", metavar="VERB", required=True)

    k = verbs.add_parser("kernel", help="fetch, patch, build and export the kernel", description="""
tree     unpack Debian's source, apply kernel-patches/ as commits on the branch `series`,
         print the folder; edit the commits there
build    build it (cached by source version, patches, configuration and compiler); prints the folder
export   write the commits back to kernel-patches/, the files' names numbered, with the cover letter's list
discard  drop commits and changes that were not exported
headers  copy the uAPI headers that libkho needs from the tree to kho/uapi/""",
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    k.add_argument("action", choices=("tree", "build", "export", "discard", "headers"))
    k.add_argument("--config", default=MINIMAL, help=", ".join(kernel.configs()) + " (default: minimal)")
    k.add_argument("--unpatched", action="store_true", help="Debian's source without the series")
    k.add_argument("--as-is", action="store_true", help="the tree as it stands, not exported commits too")
    k.add_argument("--release", default="", help="appended to the kernel's version, e.g. --release=-b")
    k.set_defaults(run=verb_kernel)

    r = verbs.add_parser("rootfs", help="build the guest's root file system", description="""
run      the Debian root that guests boot (systemd >= 262)
build    the same with compilers: what runs in the guest is built against its own libraries
package  this project as a Debian package
image    all of it as a disk image (default)""",
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    r.add_argument("part", nargs="?", default="image", choices=("run", "build", "package", "image"))
    r.set_defaults(run=verb_rootfs)

    for name, fn, text, more in (
            ("run", verb_run, "boot a guest and run a command in it, or lines from stdin",
             "Without COMMAND each line of stdin is a command for the guest; the line `kexec` loads the "
             "same kernel once more and replaces the running one by it. With COMMAND its exit status is "
             "the lab's."),
            ("loop", verb_loop, "kexec a guest N times in a row",
             "COMMAND is run in the guest after each kexec. The first kexec that does not come up, or "
             "COMMAND that fails, ends the loop: exit status 1, and the logs are kept.")):
        g = verbs.add_parser(name, help=text, description=f"""{text}. {more} The guest sees the folder
`share` of the run's logs as /lab: what is put there goes in, what it writes there comes
back. The lab says where the logs are.""")
        if name == "loop":
            g.add_argument("count", type=positive, metavar="N")
            g.add_argument("--next", help="alternate with this kernel configuration")
        g.add_argument("--kernel", default=MINIMAL, metavar="CONFIG",
                       help=", ".join(kernel.configs()) + " (default: minimal)")
        g.add_argument("--as-is", action="store_true",
                       help="a kernel from the tree as it stands, not exported commits too")
        g.add_argument("--machine", default="noiommu", metavar="PROFILE",
                       help="; ".join(f"{name}: {p[3]}" for name, p in PROFILES.items()) + " (default: noiommu)")
        g.add_argument("--qemu", default="", metavar="SERIES",
                       help="7.2, fetched when needed; default: the profile's, else the installed one")
        g.add_argument("--device", action="append", default=[],
                       help=", ".join(DEVICES) + "; can be given more than once; +e1000e is "
                       "another function of the device before it, and so with the other NICs")
        g.add_argument("--init", default="systemd" if name == "run" else "bare",
                       choices=("systemd", "bare"), help="PID 1 (default: %(default)s)")
        g.add_argument("--memory", type=memory, metavar="SIZE", help="such as 512M or 4G (default: 1G; 3G with the "
                       "debug kernel)")
        g.add_argument("--cpus", type=positive, default=1, help="default: 1")
        g.add_argument("--append", default="", help="more for the kernel's command line")
        g.add_argument("--trace", action="append", default=[], metavar="EVENT",
                       help="a QEMU trace event, with wildcards; can be given more than once; they are written to "
                       "trace.log in the folder of the logs, which `lab trace` reads")
        g.add_argument("--send", type=positive, metavar="RATE", help="send so many numbered packets a second "
                       "to the first NIC, e1000e or igb, and count those that it writes to memory. The NIC writes "
                       "none before a driver in the guest has set it up: `--init systemd --device e1000e "
                       "--append lab.nic` starts the lab's own")
        g.add_argument("--pressure", action="store_true",
                       help="each new kernel poisons freed memory, uses up all that is free, compacts")
        g.add_argument("--timeout", type=duration("seconds"), default=600,
                       help="of a command, in seconds (default 600)")
        g.add_argument("command", nargs="*", default=(), metavar="COMMAND",
                       help="after --; one word is a line for the guest's shell")
        g.set_defaults(run=fn)

    t = verbs.add_parser("trace", help="what the devices of a run did, by QEMU's trace", description="""
Count the events of a run that --trace or --send asked for, and the DMA of its NICs, whatever the
guest said about it.""")
    t.add_argument("run_dir", metavar="RUN", help="the folder with the logs of a run")
    t.add_argument("--config", action="store_true", help="list writes to configuration space (pci_cfg_write), too")
    t.set_defaults(run=verb_trace)

    t = verbs.add_parser("check", help="the quick tests", description="""
Run the quick tests, all or those whose names contain NAME.""")
    t.add_argument("names", nargs="*", metavar="NAME")
    t.add_argument("--list", action="store_true", help="list all tests and their parts")
    t.add_argument("--jobs", type=positive, default=2, help="so many at a time (default 2)")
    t.add_argument("--with-unit-tests", action="store_true", help="build on this host first")
    t.set_defaults(run=verb_check)

    t = verbs.add_parser("check-long", help="the long tests, in parts", description="""
Run the parts named, or all, one test after the other. A part that has passed on this very
tree is not run again. What each gave is written to docs/results/PART.md.""")
    t.add_argument("parts", nargs="*", metavar="PART")
    t.add_argument("--list", action="store_true", help="list all tests and their parts")
    t.add_argument("--fresh", action="store_true", help="run parts again that passed on this tree")
    t.set_defaults(run=verb_check_long)

    d = verbs.add_parser("demo", help="show a kexec under a device that goes on with DMA", description="""
Boot a guest whose NIC is a workload's under khod, send it packets from outside all the time, type
`systemctl kexec` in it, and print what happened by khod's account and by the host's clock and QEMU's
trace: how many packets were written to memory, and how many while no kernel drove the NIC.""")
    d.add_argument("--machine", default="vtd-scalable", choices=demo.IOMMUS,
                   help="the IOMMU, if any (default: %(default)s)")
    d.set_defaults(run=verb_demo)

    b = verbs.add_parser("bench", help="figures, each with its baseline from the same run",
                         description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    b.add_argument("names", nargs="*", metavar="FIGURE", help="default: all, which takes many hours")
    b.add_argument("--minutes", type=duration("minutes"), default=0,
                   help="begin no pair, or round, of a figure after so long")
    b.add_argument("--pairs", type=positive, default=30, help="at most so many pairs or rounds (default 30); "
                   "some figures take fewer")
    b.set_defaults(run=verb_bench)

    c = verbs.add_parser("cache", help="print the folder of the cache", description="""
Print the folder in which sources, kernels, root file systems and the logs of runs are kept, outside of
the clone. KHO_CACHE moves it; all of it can be removed, and is made again.""")
    c.set_defaults(run=verb_cache)
    return p


def arguments(words):
    """The arguments @words; what follows `--` is COMMAND, which argparse does not find behind N and an option."""
    at = words.index("--") if "--" in words else len(words)
    p = parser()
    a = p.parse_args(words[:at])
    if words[at + 1:]:
        if "command" not in a:
            p.error(f"the verb {a.verb} takes no COMMAND: {' '.join(words[at:])}")
        a.command = [*a.command, *words[at + 1:]]
    return a


def interrupted(_signal, _frame):
    """Guests and half-made folders go when the lab is ended, however that is done."""
    kill_all()
    raise KeyboardInterrupt


def of_system(e: OSError) -> str:
    """A sentence for what the system refused."""
    text = f"{e.filename}: {e.strerror}" if e.filename else str(e.strerror or e)
    return text + (f"; {more_space()}" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "")


def main():
    a = arguments(sys.argv[1:])
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sig) != signal.SIG_IGN:     # nohup
            signal.signal(sig, interrupted)
    try:
        return a.run(a) or 0
    except (LabError, subprocess.SubprocessError) as e:
        print(f"lab: error: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"lab: error: {of_system(e)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
