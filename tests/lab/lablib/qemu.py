# SPDX-License-Identifier: GPL-2.0-or-later
"""One guest: started, spoken to, kexec'd, stopped; everything it said is kept.

Commands run in the guest through QEMU's own guest agent. A folder of the run is
shared with it as /lab (9p): kernels go in, results come out. The kernel's
console (ttyS0) and the journal (ttyS1) are read line by line and written with
the host's time to console.log and journal.log; QEMU's trace goes to trace.log.

Runs side by side do not disturb each other: each has its own folder, sockets,
overlay of the disk, and no network of the host.
"""

import base64
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from . import disk
from .common import LabError, cache_dir, digest, last_lines, need_space, note, run, say
from .emulator import Emulator, emulator
from .profiles import device_args, profile

AGENT_TIMEOUT, PROBE_TIMEOUT = 180, 20
SO_SNDBUFFORCE, BUFFER = 32, 64 << 20       # <asm-generic/socket.h>
BOOTED = re.compile(r"Linux version (\S+)")
# Memory is used up, or was by a unit that has ended before the agent could answer.
PRESSURE = {"bare": "/usr/lib/khod-lab/memory-pressure",
            "systemd": "systemctl is-active -q lab-memory-pressure || "
                       "{ systemctl status --no-pager lab-memory-pressure; exit 1; }"}
LIVE = set()        # guests whose QEMU runs
PROBING = threading.Lock()


@dataclass
class Result:
    """What a command in the guest gave."""
    status: int
    out: str
    err: str


class Line(str):
    """A line of a log with the host's time, in seconds.

    Of the monotonic clock for how long something takes, and of the wall clock, which may be set
    at any time, for what is held against QEMU's trace: that has no other.
    """
    when: float = 0.0
    wall: float = 0.0


class Log:
    """A serial port of the guest, read into a file and a list of stamped lines."""

    def __init__(self, path: Path, sock: socket.socket):
        self.path, self.lines, self.cond = path, [], threading.Condition()
        self.sock = sock
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        rest = b""
        with open(self.path, "wb") as f:
            while True:
                try:
                    data = self.sock.recv(65536)
                except OSError:
                    data = b""
                now, wall = time.monotonic(), time.time()
                if not data:
                    break
                *full, rest = (rest + data).split(b"\n")
                for raw in full:
                    line = Line(raw.decode(errors="replace").rstrip("\r"))
                    line.when, line.wall = now, wall
                    f.write(f"{now:.6f} {line}\n".encode())
                    with self.cond:
                        self.lines.append(line)
                        self.cond.notify_all()
                f.flush()
            if rest:
                f.write(f"{time.monotonic():.6f} ".encode() + rest + b"\n")

    def find(self, pattern: str, start: int = 0):
        rx = re.compile(pattern)
        with self.cond:
            for i in range(start, len(self.lines)):
                if rx.search(self.lines[i]):
                    return i
        return None

    def wait(self, pattern: str, start: int, deadline: float, alive):
        """Index of the first line from @start on that matches; None at the deadline."""
        while True:
            i = self.find(pattern, start)
            if i is not None:
                return i
            if time.monotonic() > deadline or not alive():
                return None
            with self.cond:
                self.cond.wait(0.2)


def accelerator(kernel: Path, qemu: Emulator) -> str:
    """KVM if a guest of @qemu really starts with it, else TCG; found once a boot of the host."""
    forced = os.environ.get("KHO_LAB_ACCEL")
    if forced:
        return forced
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    stamp = cache_dir() / f"accel-{boot}-{digest(qemu.program)[:8]}"
    with PROBING:
        if not stamp.exists():
            note(stamp, "kvm" if kvm_works(kernel, qemu) else "tcg")
    return stamp.read_text()


def kvm_works(kernel: Path, qemu: Emulator) -> bool:
    """Whether @kernel boots under KVM until it looks for its root file system.

    A smaller probe is not enough: there are hosts whose KVM runs a boot sector
    and fails in the middle of a kernel.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    cmd = [qemu.program, "-accel", "kvm", "-machine", "q35", "-cpu", "host", "-m", "512",
           "-display", "none", "-nodefaults", "-no-reboot", "-serial", "stdio", "-kernel",
           str(kernel / "bzImage"), "-append", "console=ttyS0 panic=-1 root=/dev/none"]
    try:
        r = subprocess.run(cmd, timeout=PROBE_TIMEOUT, capture_output=True, check=False,
                           stdin=subprocess.DEVNULL, env={**os.environ, **qemu.env})
    except (subprocess.TimeoutExpired, OSError):
        return False
    return b"Unable to mount root fs" in r.stdout


class VM:
    """A guest of the lab.

    @kernel:  folder of a build (kernel.build())
    @image:   root file system (rootfs.image()), used under an overlay
    @profile: name of a machine; @devices: kinds below root ports
    @init:    "systemd", "bare", or another program of /usr/lib/khod-lab that runs as PID 1
              (then there is no agent, and what it says comes in journal.log)
    @append:  more for the kernel's command line
    @qemu:    QEMU's series if not the profile's: "7.2", or "" for the installed one
    @trace:   QEMU trace events
    @disk_options: more for the -drive of each nvme, such as throttling
    @arguments: more for QEMU
    @icount: the guest's clock is the number of its instructions, one a nanosecond: what it
              measures is the same however busy the host is (with TCG, never with KVM)
    @boot_timeout: seconds for a kernel to come up, until its agent answers
    @pressure: each kernel after a kexec clears freed memory, uses up all that is free and
              compacts before anything else (with a bare init: before kexec() returns), and
              finds what it wrote there unchanged
    """

    def __init__(self, kernel: Path, image: Path, *, name="run", machine="noiommu", devices=(),
                 init="systemd", memory="1G", cpus=1, append="", trace=(), prealloc=False,
                 kho_scratch="", pressure=False, qemu="", disk_options="", arguments=(), icount=False,
                 boot_timeout=None):
        self.kernel, self.image, self.name = Path(kernel), image, name
        self.machine, self.devices, self.init = machine, list(devices), init
        self.emulator = emulator(qemu or profile(machine)[2])
        self.memory, self.cpus, self.append = memory, cpus, append
        self.trace, self.prealloc, self.kho_scratch = list(trace), prealloc, kho_scratch
        self.boot_timeout = boot_timeout or AGENT_TIMEOUT
        self.pressure, self.disk, self.arguments = pressure, disk_options, list(arguments)
        runs = Path(os.environ.get("KHO_LAB_RUNS") or cache_dir() / "runs")
        runs.mkdir(parents=True, exist_ok=True)
        prune_runs(runs)
        need_space(runs, 0.5, "a guest")
        self.dir = Path(tempfile.mkdtemp(prefix=f"{time.strftime('%H%M%S')}-{name}-", dir=runs))
        (self.dir / "owner").write_text(f"{os.getpid()}\n")
        started().append(self.dir)
        self.share = self.dir / "share"
        self.share.mkdir()
        self.proc = self.qga = self.qmp = self.console = self.journal = None
        self.senders = []           # host ends of the netdevs, in the order of the devices
        self.cpu_threads = []
        self.boots = 0
        self.resets = 0             # of the machine, as QEMU told so far
        self.mark = 0               # line of the console at which the current boot began
        self.accel = "tcg" if icount else accelerator(self.kernel, self.emulator)
        if icount:
            self.arguments += ["-icount", "shift=0"]
        self._sockdir = tempfile.mkdtemp(prefix="lab-")     # short: a socket's path has 107 bytes

    # --- starting and stopping -----------------------------------------------

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, exc_type, exc, _tb):
        if exc is not None and not isinstance(exc, KeyboardInterrupt):
            say(f"the logs of this guest are in {self.dir}, and its disk.qcow2, an overlay over {self.image}")
            (self.dir / "failed").touch()
        self.stop()

    def cmdline(self, kernel: Path = None) -> str:
        parts = ["console=ttyS0,115200", "root=/dev/vda", "rw", "kho=on", "panic=-1", "printk.time=1",
                 "oops=panic", "TERM=dumb", profile(self.machine)[1]]
        if Path(kernel or self.kernel).name.startswith("debug"):
            # identify_cpu() forgets for a moment that there are five levels; an interrupt then
            # reads addresses that KASAN takes for wild ones.
            parts.append("no5lvl")
        if self.kho_scratch:
            parts.append(f"kho_scratch={self.kho_scratch}")
        if not re.search(r"\bliveupdate=", self.append):
            parts.append("liveupdate=on")
        if self.init != "systemd":
            name = "bare-init" if self.init == "bare" else self.init
            parts.append(f"init=/usr/lib/khod-lab/{name}")
        return " ".join([*parts, self.append]).strip()

    def args(self, fds, serials) -> list:
        d, s = self.dir, self._sockdir
        args = [self.emulator.program, "-name", self.name,
                "-machine", "q35,usb=off,vmport=off", "-accel", self.accel,
                "-cpu", "max" if self.accel == "tcg" else "host",
                "-m", self.memory, "-smp", str(self.cpus), "-display", "none", "-nodefaults",
                "-no-user-config", "-rtc", "base=utc",
                "-kernel", str(self.kernel / "bzImage"), "-append", self.cmdline(),
                # Not by path: QEMU sends byte by byte, of which the default buffer holds 278, and
                # a kernel that may not write any more throws away what it has.
                "-chardev", f"socket,id=con,fd={serials[0]}", "-serial", "chardev:con",
                "-chardev", f"socket,id=jrn,fd={serials[1]}", "-serial", "chardev:jrn",
                "-chardev", f"socket,id=qga,path={s}/qga,server=on,wait=off",
                "-device", "virtio-serial-pci", "-device",
                "virtserialport,chardev=qga,name=org.qemu.guest_agent.0",
                "-qmp", f"unix:{s}/qmp,server=on,wait=off", "-device", "virtio-rng-pci",
                "-drive", f"file={d}/disk.qcow2,if=none,id=root,format=qcow2,cache=unsafe",
                "-device", "virtio-blk-pci,drive=root",
                "-virtfs", f"local,path={self.share},mount_tag=lab,security_model=none",
                "-D", str(d / "trace.log"), "-msg", "timestamp=on"]
        if self.prealloc:
            args += ["-object", f"memory-backend-ram,id=ram,size={self.memory},prealloc=on",
                     "-machine", "memory-backend=ram"]
        args += [*profile(self.machine)[0], *self.arguments]
        args += [x for e in self.trace for x in ("-trace", e)]
        nets, disks = [], []
        for i, fd in enumerate(fds):
            args += ["-netdev", f"dgram,id=net{i},local.type=fd,local.str={fd}"]
            nets.append(f"net{i}")
        for i in range(self.devices.count("nvme")):
            args += ["-drive", f"file={d}/nvme{i}.raw,if=none,id=nvme{i},format=raw"
                     + (f",{self.disk}" if self.disk else "")]
            disk.make(d / f"nvme{i}.raw")
            disks.append(f"nvme{i}")
        return args + device_args(self.devices, iter(nets), iter(disks))

    def start(self):
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.image,
             self.dir / "disk.qcow2"], what="making the guest's disk")
        qemu_ends = []
        for kind in self.devices:
            if kind.lstrip("+") in ("e1000e", "igb", "virtio-net"):
                ours, theirs = buffered_pair(socket.SOCK_DGRAM)
                self.senders.append(ours)
                qemu_ends.append(theirs)
        (console, con), (journal, jrn) = (buffered_pair(socket.SOCK_STREAM) for _ in range(2))
        args = self.args([s.fileno() for s in qemu_ends], [con.fileno(), jrn.fileno()])
        qemu_ends += [con, jrn]
        (self.dir / "command").write_text("\n".join(args) + "\n")
        (self.dir / "trace.log").touch()
        with open(self.dir / "qemu.err", "wb") as err:
            # It ends with the thread that starts it, which may be killed.
            self.proc = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *args],
                                         stdin=subprocess.DEVNULL, stdout=err, stderr=err,
                                         env={**os.environ, **self.emulator.env},
                                         pass_fds=[s.fileno() for s in qemu_ends],
                                         start_new_session=True)
        LIVE.add(self)
        (self.dir / "pid").write_text(f"{self.proc.pid}\n")
        for s in qemu_ends:
            s.close()
        self.console = Log(self.dir / "console.log", console)
        self.journal = Log(self.dir / "journal.log", journal)
        self.qmp_connect()
        unknown = re.findall(r"trace event '(\S+)' does not exist",
                             (self.dir / "qemu.err").read_text(errors="replace"))
        if unknown:
            raise LabError(f"QEMU has no trace event named {', '.join(unknown)}; "
                           f"'{self.emulator.program} -trace help' lists them")

    def connect(self, name: str) -> socket.socket:
        end = time.monotonic() + 20
        s = socket.socket(socket.AF_UNIX)
        while True:
            try:
                s.connect(f"{self._sockdir}/{name}")
                return s
            except OSError:
                if self.proc.poll() is not None or time.monotonic() > end:
                    raise LabError("QEMU did not start: " + last_lines(self.dir / "qemu.err", 5)
                                   + f"\nits command is in {self.dir}/command") from None
                time.sleep(0.02)

    def alive(self) -> bool:
        return self.proc is not None and self.proc.poll() is None

    def stop(self):
        """End the guest; the logs stay, of one that failed the disks, too, the sockets go."""
        if self.alive():
            self.proc.send_signal(signal.SIGTERM)
            try:
                self.proc.wait(5)
            except subprocess.TimeoutExpired:
                self.proc.kill()
                self.proc.wait()
        LIVE.discard(self)
        for log in (self.console, self.journal):
            if log:
                log.thread.join(10)     # until it has read the last words
        for s in (self.qga, self.qmp, *self.senders):
            if s:
                s.close()
        self.senders = []
        (self.dir / "pid").unlink(missing_ok=True)
        if not (self.dir / "failed").exists():
            for path in (*self.dir.glob("disk.qcow2"), *self.dir.glob("nvme*.raw")):
                path.unlink()
        shutil.rmtree(self._sockdir, ignore_errors=True)

    # --- QMP -------------------------------------------------------------------

    def qmp_connect(self):
        self.qmp = self.connect("qmp")
        self.qmp.settimeout(180)        # memory that is allocated at once takes its time
        self.qmp_file = self.qmp.makefile("r")
        try:
            self.qmp_file.readline()
        except TimeoutError:
            raise LabError(f"QEMU does not answer; its command is in {self.dir}/command") from None
        self.qmp_do("qmp_capabilities")

    def qmp_do(self, command: str, **arguments):
        self.qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self.qmp_file.readline() or "{}")
            if "event" in answer:
                self.resets += answer["event"] == "RESET"
                continue
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise LabError(f"QEMU refused {command}: {answer['error'].get('desc')}")
            if not answer:
                raise LabError(f"QEMU ended: {last_lines(self.dir / 'qemu.err', 5)}\n"
                               f"its command is in {self.dir}/command")

    def monitor(self, line: str) -> str:
        """What QEMU's monitor for people answers to @line; nothing, mostly, if it did it."""
        return self.qmp_do("human-monitor-command", **{"command-line": line})

    def drop_translations(self):
        """Let QEMU throw away what it translated of the guest's code (with KVM there is nothing).

        It keeps translations of code that a kexec has overwritten, until it has 1 GiB of them, and
        each write to such a page costs time. It drops all if a CPU stops for a debugger.
        """
        if self.accel != "tcg":
            return
        self.monitor(f"gdbserver unix:{self._sockdir}/gdb,server=on,wait=off")
        try:
            with self.connect("gdb") as gdb, gdb.makefile("rb") as answers:
                gdb.settimeout(60)
                for packet, answer in (b"?", b"$T"), (b"s", b"$T"), (b"D", b"$OK"):
                    gdb.sendall(b"+$%s#%02x" % (packet, sum(packet) % 256))
                    said = b""
                    while not re.search(rb"\$.*#..$", said):
                        c = answers.read(1)
                        if not c:
                            raise ConnectionError(f"it ended after {said}")
                        said += c
                    if answer not in said:
                        raise ConnectionError(f"it answered {said} to {packet}")
        except OSError as e:
            raise LabError(f"QEMU's debugger stub: {e}") from None
        self.monitor("gdbserver none")

    def cpu_time(self) -> float:
        """Seconds of the host's CPUs that the guest's have used."""
        if not self.cpu_threads:
            self.cpu_threads = [c["thread-id"] for c in self.qmp_do("query-cpus-fast")]
        return sum(int(Path(f"/proc/{self.proc.pid}/task/{t}/schedstat").read_text().split()[0])
                   for t in self.cpu_threads) / 1e9

    # --- the guest agent ---------------------------------------------------------

    def panic(self):
        """The line of the console with the panic of the current kernel, or None."""
        return self.console.find(r"Kernel panic - not syncing", self.mark)

    def hang(self, what: str):
        """A guest that does not go on: say so with its last lines, of a kernel that panicked its own."""
        state = "ended" if not self.alive() else "did not go on in time"
        panic = self.panic()
        if panic is None:
            lines = list(self.console.lines)[-12:]
        else:
            what += ": the kernel panicked"
            time.sleep(0.5)     # for what it says of it
            lines = list(self.console.lines)[max(panic - 12, 0):panic + 12]
        tail = "\n".join(lines)
        raise LabError(f"the guest {state}: {what}\n--- last lines of its console ---\n{tail}\n"
                       f"--- the logs are in {self.dir} ---")

    def agent(self, command: str, timeout: float = 30, **arguments):
        """One request to the guest agent; None if there was no answer in time."""
        if self.qga is None:
            self.qga = self.connect("qga")
        self.qga.settimeout(timeout)
        try:
            self.qga.sendall(json.dumps({"execute": command, "arguments": arguments}).encode()
                             + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                more = self.qga.recv(1 << 20)
                if not more:
                    raise OSError("closed")
                data += more
        except OSError:
            self.qga.close()
            self.qga = None
            return None
        answer = json.loads(data)
        if "error" in answer:
            raise LabError(f"the guest agent refused {command}: {answer['error'].get('desc')}")
        return answer["return"]

    def sync(self, timeout: float) -> bool:
        """Whether an agent answers; leftovers of an earlier one are thrown away."""
        token = int.from_bytes(os.urandom(4), "little") & 0x7FFFFFFF
        if self.qga is None:
            self.qga = self.connect("qga")
        self.qga.settimeout(timeout)
        want = json.dumps({"return": token}).replace(" ", "").encode()
        try:
            self.qga.sendall(b"\xff" + json.dumps({"execute": "guest-sync-delimited",
                                                   "arguments": {"id": token}}).encode() + b"\n")
            data = b""
            while want not in data.replace(b" ", b""):
                more = self.qga.recv(65536)
                if not more:
                    raise OSError("closed")
                data += more
            return True
        except OSError:
            self.qga.close()
            self.qga = None
            return False

    def ready(self, timeout: float = None):
        """Wait until the guest of the current boot takes commands."""
        timeout = timeout or self.boot_timeout
        deadline = time.monotonic() + timeout
        if self.console.wait(BOOTED.pattern, self.mark, deadline, self.alive) is None:
            self.hang("no kernel came up")
        while time.monotonic() < deadline:
            if not self.alive():
                self.hang("waiting for its agent")
            if self.panic() is not None:
                self.hang("waiting for its agent")
            if self.sync(1):
                self.boots += 1
                return self
        return self.hang(f"its agent did not answer within {timeout:.0f} s")

    def start_command(self, command: str, env=()) -> int:
        r = self.agent("guest-exec", path="/bin/sh", arg=["-c", command], env=list(env),
                       **{"capture-output": True})
        if r is None:
            self.hang(f"starting '{command}'")
        return r["pid"]

    def run(self, command: str, timeout: float = 120, check=True) -> Result:
        """Run a shell command in the guest; with @check a failure is an error."""
        pid = self.start_command(command)
        deadline, pause = time.monotonic() + timeout, 0.01
        while True:
            try:
                r = self.agent("guest-exec-status", pid=pid)
            except LabError:
                if self.panic() is None:    # else it is of the kernel that was booted after it
                    raise
                r = None
            if r is None:
                self.hang(f"running '{command}'")
            if r["exited"]:
                break
            if time.monotonic() > deadline:
                self.hang(f"'{command}' did not end within {timeout:.0f} s")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        text = [base64.b64decode(r.get(k, "")).decode(errors="replace")
                for k in ("out-data", "err-data")]
        res = Result(r.get("exitcode", 128 + r.get("signal", 0)), *text)
        if check and res.status:
            raise LabError(f"in the guest: '{command}' gave {res.status}\n{res.out[-3000:]}"
                           f"{res.err[-3000:]}\n--- the logs are in {self.dir} ---")
        return res

    # --- kexec ---------------------------------------------------------------------

    def put_kernel(self, kernel: Path) -> str:
        """Make a build visible to the guest; its path there."""
        dest = self.share / f"bzImage-{Path(kernel).name}"
        if not dest.exists():
            shutil.copy(Path(kernel) / "bzImage", dest)
        return f"/lab/{dest.name}"

    def load(self, kernel: Path = None, append: str = ""):
        """kexec_file_load in the guest."""
        path = self.put_kernel(kernel or self.kernel)
        if self.pressure:
            append += " init_on_free=1 lab.pressure"
        cmdline = f"{self.cmdline(kernel)} {append}".strip()
        self.run(f"kexec -s -l {path} --command-line='{cmdline}'")

    def count_resets(self) -> int:
        """How often the machine was reset so far."""
        self.qmp_do("query-status")     # what it said before is read, too
        return self.resets

    def next_boot(self, what: str, timeout: float = None):
        """Wait for the next kernel and its agent after the kexec @what was started. A reset of the machine is none."""
        resets = self.resets
        deadline = time.monotonic() + (timeout or self.boot_timeout)
        i = self.console.wait(BOOTED.pattern, self.mark, deadline, self.alive)
        if i is None:
            self.hang(f"no new kernel after {what}")
        self.mark = i
        self.ready(max(deadline - time.monotonic(), 1))
        if self.count_resets() != resets:
            raise LabError(f"there was no kexec after {what}: the machine was reset, and booted again\n"
                           f"--- the logs are in {self.dir} ---")
        return self

    def kexec(self, kernel: Path = None, append: str = "", timeout: float = None):
        """Load @kernel (default: the same) and kexec into it, by systemd or directly."""
        self.load(kernel, append)
        return self.reboot_loaded(timeout)

    def reboot_loaded(self, timeout: float = None):
        self.mark = len(self.console.lines)
        self.start_command("systemctl kexec" if self.init == "systemd" else "sync; kexec -e")
        self.next_boot("the kexec", timeout)
        if self.pressure:
            self.run(PRESSURE[self.init])
        return self

    def release(self) -> str:
        return self.run("uname -r").out.strip()


def kill_all() -> None:
    """End every guest at once; whoever waits for one of them finds it ended."""
    for vm in list(LIVE):
        vm.proc.kill()


def buffered_pair(kind):
    """A pair of sockets with buffers large enough that the host never drops and QEMU never waits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    for s in (ours, theirs):        # what is under way counts into the buffer of who wrote it
        try:
            s.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
        except PermissionError:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        got = s.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
        if got < BUFFER:
            warn_of_buffers(got)
    return ours, theirs


@functools.cache
def warn_of_buffers(size: int) -> None:
    """Once in a process: an ordinary user gets no larger ones than the host allows."""
    say(f"WARNING: this user's sockets have buffers of {size >> 10} KiB; what a guest says while the host is "
        f"busy may be lost, and packets wait; 'sysctl net.core.wmem_max={BUFFER}', as root, ends that")


THREAD = threading.local()
KEEP, KEEP_FAILED = 60, 40


def started() -> list:
    """Folders of the guests that this thread has started since runs_ended()."""
    if not hasattr(THREAD, "runs"):
        THREAD.runs = []
    return THREAD.runs


def runs_ended(failed) -> None:
    """The test that this thread has run is over: if it failed, its logs are kept longer than others."""
    while started():
        folder = started().pop()
        with contextlib.suppress(OSError):
            if failed:
                (folder / "failed").touch()
            (folder / "owner").unlink()


def prune_runs(runs: Path):
    """The oldest logs go, of failures by a count of their own; never those that somebody is at."""
    def age(p):
        try:
            return p.stat().st_mtime
        except OSError:         # somebody else has removed it
            return 0.0

    def in_use(p):              # by a guest, or by a test that has not ended
        with contextlib.suppress(OSError, ValueError):
            return Path(f"/proc/{int(p.read_text())}").exists()
        return False
    every = sorted((p for p in runs.iterdir() if p.is_dir()), key=age)
    failed = [p for p in every if (p / "failed").exists()]
    for p in [p for p in every if p not in failed][:-KEEP] + failed[:-KEEP_FAILED]:
        if not in_use(p / "pid") and not in_use(p / "owner"):
            shutil.rmtree(p, ignore_errors=True)
