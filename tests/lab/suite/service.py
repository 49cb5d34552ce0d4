# SPDX-License-Identifier: GPL-2.0-or-later
"""khod in the guest: memory over `systemctl kexec`, kills at every fault point, bad input."""

import re
import time

from lablib.check import expect, load, test

PAGES = "/usr/lib/khod/tests/memfd-pages"
MIB = 1 << 20
ARMED = ("d=/etc/systemd/system/khod.service.d; mkdir -p $d; "
         "ln -s /usr/lib/khod-lab/khod-faults.conf $d/; systemctl daemon-reload")


class Khod:
    """khod as the test sees it, in the guest @vm."""

    def __init__(self, vm):
        self.vm = vm
        self.made = {}      # name -> the line memfd-pages printed of it
        self.armed = False

    def points(self, *phases):
        """The named fault points of @phases, as khod itself lists them."""
        rows = [x.split() for x in self.vm.run("/usr/lib/khod/khod --list-fault-points").out.splitlines()]
        return [r[0] for r in rows if r[1] in phases]

    def arm(self, points, restart=True):
        """The next starts of khod kill themselves at @points, one each."""
        text = "".join(f"{p}\\n" for p in points)
        if not self.armed:
            self.vm.run(ARMED)
            self.armed = True
        self.vm.run(f"printf '{text}' > /var/lib/lab/khod-faults; sync")
        if restart:
            self.vm.run("systemctl reset-failed khod; systemctl restart khod", check=False)

    def register(self, name, size=4 * MIB, seed=1, check=True):
        """A workload with one memfd; what is in it and where is remembered."""
        # The pages are looked at last: preserving may move them out of KHO's scratch memory.
        r = self.vm.run(f"{PAGES} --create {size} --seed {seed} -- "
                        f"sh -c 'khoctl register {name} --fd 3; s=$?; "
                        f"{PAGES} > /lab/{name}.pages; exit $s'",
                        120, check=check)
        self.made[name] = digests((self.vm.share / f"{name}.pages").read_text())
        return r

    def claim(self, name, check=True):
        """Claim @name; contents and pages must be those that were registered."""
        r = self.vm.run(f"khoctl claim {name} -- {PAGES} > /lab/{name}.back", 120, check=check)
        got = digests((self.vm.share / f"{name}.back").read_text())
        if r.status == 0:
            expect(got == self.made[name],
                   f"{name} came back as {got}, not as {self.made[name]}")
        return r

    def held(self):
        """Names of the workloads that khod holds."""
        rows = self.vm.run("khoctl list").out.splitlines()
        return [r.split()[0] for r in rows[1:] if not r.startswith(" ")]

    def settled(self, timeout=100):
        """Wait until khod runs, after all the starts at which it killed itself."""
        self.vm.run(f"for i in $(seq {timeout}); do systemctl is-active -q khod && exit 0; sleep 1; "
                    "done; exit 1", 2 * timeout)

    def stored(self):
        """What is in the fd store, but for what is nobody's: khod's notes, and its locks with logind."""
        rows = [r for r in self.vm.run("systemd-analyze fdstore khod.service").out.splitlines()[1:] if r.strip()]
        own = [m.group(1) for r in rows if (m := re.match(r"(timeline|manifest|inhibit-\w+) ", r))]
        expect(len(set(own)) == len(own), f"khod's own things are there more than once: {own}")
        return rows if not own else [r for r in rows if r.split()[0] not in own]

    def in_transit(self):
        """How much of that is there until it has been preserved again."""
        return sum(r.startswith("transit+") for r in self.stored())

    def only_sessions(self, timeout=60):
        """In the fd store there come to be LUO sessions, one a workload, and what is nobody's."""
        end = time.monotonic() + timeout
        while self.in_transit() and time.monotonic() < end:
            time.sleep(0.5)
        rows = self.stored()
        for r in rows:
            expect("anon_inode:[luo_session]" in r, f"not a session in the fd store: {r}")
        expect(len(rows) == len(self.held()), f"{len(rows)} descriptors for {self.held()}")

    def keeps_no_device(self):
        """khod has descriptors open, and /dev/liveupdate, which can be open once, is not among them."""
        opened = self.vm.run("ls -l /proc/$(systemctl show -P MainPID khod)/fd").out
        expect("socket:" in opened and "/dev/liveupdate" not in opened, f"khod has open: {opened}")

    def kills(self, since, points, timeout=60):
        """The fault points at which khod killed itself since line @since of the journal, which
        may be behind: waits until all of @points are there."""
        end = time.monotonic() + timeout    # some things khod puts off
        while True:
            found = [m.group(1) for x in list(self.vm.journal.lines)[since:]
                     if (m := re.search(r"khod: fault point (\S+): killing myself", x))]
            if set(points) <= set(found) or time.monotonic() > end:
                return found
            time.sleep(0.2)


def digests(text):
    """(contents, pages) of each line of memfd-pages; the names differ, these must not."""
    return [tuple(line.split()[2:]) for line in text.splitlines()]


def booted(ctx, **kw):
    return ctx.vm(**{"memory": "1G", **kw})


@test()
def a_memfd_comes_through_systemctl_kexec(ctx):
    """The same bytes in the same pages, held by a session only, and by khod's own; a file's, too."""
    with booted(ctx) as vm:
        khod = Khod(vm.ready())
        systemd = vm.run("systemctl --version; test -f /usr/lib/systemd/system/khod.service").out.split()[1]
        expect(int(systemd) >= 262, f"systemd {systemd} runs in the guest")
        khod.register("mem", 64 * MIB)
        vm.run("seq 100000 > /var/lib/lab/file; sync; khoctl register file /var/lib/lab/file")
        expect(khod.in_transit() == 0, khod.stored())       # which only_sessions() would wait for
        khod.only_sessions()
        khod.keeps_no_device()
        security = vm.run("systemd-analyze security --no-pager khod.service | tail -n 2").out
        expect(re.search(r"exposure level.*: \d\.\d OK", security), f"sandbox: {security}")
        vm.kexec()
        vm.run("systemctl stop khod.service")
        expect(khod.held() == ["file", "mem"], f"after the kexec khod, started by its socket, holds {khod.held()}")
        khod.only_sessions()
        khod.keeps_no_device()
        khod.claim("mem")
        khod.keeps_no_device()
        vm.run("khoctl claim file -o - | cmp - /var/lib/lab/file")
        expect(khod.held() == [], "claimed, and still held")
        khod.only_sessions()


BEFORE, LEASE = "killed-at-every-fault-point-before-the-kexec", "packets-land-while-khod-is-killed-with-a-lease"
# Phase of khod's fault points -> the test in which khod is killed at each of them.
KILLED_IN = {
    "register": BEFORE, "start-outgoing": BEFORE, "claim": BEFORE, "release": BEFORE,
    "start-incoming": "killed-at-every-fault-point-after-the-kexec",
    "restore": "packets-land-while-khod-is-killed-at-every-point", "quiesce": "a-restore-that-fails-stops-the-device",
    "register-devices": LEASE, "handover": LEASE, "abort": LEASE,
    "expire": "a-device-that-nobody-claims-in-time-is-stopped-while-khod-is-killed",
}


@test()
def killed_at_every_fault_point_before_the_kexec(ctx):
    """A registration is answered or leaves nothing; a claim is answered or can be repeated.

    And what is held after all of that comes through the kexec.
    """
    with booted(ctx) as vm:
        khod, since, done = Khod(vm.ready()), len(vm.journal.lines), 0
        phases = {x.split()[1] for x in vm.run("/usr/lib/khod/khod --list-fault-points").out.splitlines()}
        expect(phases == KILLED_IN.keys(), f"phases without a test: {phases ^ KILLED_IN.keys()}")
        gone = set(KILLED_IN.values()) - {t.name for t in load()}
        expect(not gone, f"no such tests: {gone}")
        for point in khod.points("register"):
            khod.arm([point])
            name = point.replace("register-", "r-")
            r = khod.register(name, check=False)
            held = name in khod.held()
            expect(held or r.status != 0, f"{point}: answered with success, and lost")
            if not held:
                khod.register(name)     # nothing half done stands in its way
            khod.only_sessions()
            done += 1
        registered = khod.held()
        khod.claim(registered.pop())
        for point in khod.points("start-outgoing"):
            # Remains of a registration that was cut off are found, and this start dies too.
            khod.arm(["register-session-stored", point])
            expect(khod.register("rest", check=False).status != 0, "cut off, and yet registered")
            expect(khod.held() == registered, f"{point}: half a registration is held")
            khod.only_sessions()
            done += 1
        for point in khod.points("claim"):
            khod.register("claimed", seed=7)
            khod.arm([point])
            r = khod.claim("claimed", check=False)
            again = "claimed" in khod.held()
            got = digests((vm.share / "claimed.back").read_text())
            expect(again or got == khod.made["claimed"],
                   f"{point}: the memory is neither with the client nor held (status {r.status}: {r.err})")
            if again:
                khod.claim("claimed")
            khod.only_sessions()
            done += 1
        for point in khod.points("release"):
            khod.register("released")
            khod.arm([point])
            vm.run("khoctl release released", check=False)
            if "released" in khod.held():
                vm.run("khoctl release released")
            khod.only_sessions()
            done += 1
        points = khod.points("register", "start-outgoing", "claim", "release")
        kills = khod.kills(since, points)
        missing = set(points) - set(kills)
        expect(not missing, f"never reached: {missing}")
        vm.kexec()
        khod.settled()
        expect(khod.held() == registered, f"held after the kexec: {khod.held()}, not {registered}")
        for name in registered:
            khod.claim(name)
        ctx.figure("kills", f"{len(kills)} at {done} points")


@test()
def killed_at_every_fault_point_after_the_kexec(ctx):
    """One kexec; each start of khod after it dies at the next point; all is there at the end."""
    with booted(ctx) as vm:
        khod = Khod(vm.ready())
        points = khod.points("start-incoming")
        for i, _ in enumerate(points):
            khod.register(f"w{i}", seed=100 + i)
        khod.arm(points, restart=False)
        since = len(vm.journal.lines)
        vm.kexec()
        khod.settled()
        kills = khod.kills(since, points)
        expect(set(kills) == set(points), f"never reached: {set(points) - set(kills)}")
        expect(sorted(khod.held()) == sorted(khod.made), f"lost: {set(khod.made) - set(khod.held())}")
        khod.only_sessions()
        for name in list(khod.made):
            khod.claim(name)
        ctx.figure("kills", f"{len(kills)} at {len(points)} points")


@test()
def bad_input_to_khod(ctx):
    """Each refusal is a sentence that names the object, and at most one of what to do; what is held stays held."""
    with booted(ctx, init="systemd") as vm:
        khod = Khod(vm.ready())
        khod.register("taken")

        def refused(command, *words):
            r = vm.run(command, check=False)
            expect(r.status not in (0, 127), f"'{command}' was not refused: {r.out}")
            lines = [x for x in r.err.splitlines() if x.strip()]
            expect(len(lines) <= 2, f"'{command}' gives more than a sentence: {r.err}")
            for w in words:
                expect(re.search(w, r.err), f"'{command}': '{w}' is not in: {r.err}")

        refused("/usr/lib/khod/khod", "Another khod .pid [0-9]+. is running")
        refused("khoctl register taken /etc/hostname", "taken", "in use|held|exists")
        refused("khoctl register zero --fd 3 3</dev/zero", "fd ?3|/dev/zero", "memfd|preserv")
        refused("khoctl register a/b /etc/hostname", "a/b")
        refused("khoctl register x /no/such/file", "/no/such/file", "No such file")
        refused("khoctl claim nobody -- true", "nobody")
        refused("khoctl release nobody", "nobody")
        refused("head -c 100 /dev/urandom > /tmp/junk; khoctl inspect /tmp/junk", "/tmp/junk", "image")
        expect(khod.held() == ["taken"], "a refusal changed what is held")
        khod.claim("taken")


@test()
def a_kernel_without_live_update(ctx):
    """khod runs, and says in one sentence why it cannot hold anything."""
    with booted(ctx, append="liveupdate=off") as vm:
        vm.ready()
        r = vm.run("khoctl register x /etc/hostname", check=False)
        expect(r.status == 1 and len(r.err.strip().splitlines()) == 1, f"{r.status}: {r.err}")
        expect("live update" in r.err and "boot it with kho=on liveupdate=on" in r.err,
               f"not why, or not what to do: {r.err}")
        expect("live update" in vm.run("khoctl status").out, "status says nothing of it")


@test()
def a_kexec_that_would_lose_a_workload_is_refused(ctx):
    """khod cannot move what it holds: systemctl kexec fails, and no unit is stopped."""
    with booted(ctx) as vm:
        khod = Khod(vm.ready())
        khod.register("mem")
        # What reboot(2) would refuse when all units are stopped.
        path = vm.put_kernel(vm.kernel)
        r = vm.run(f"khoctl kexec --kernel {path} --cmdline root=/dev/vda", check=False)
        expect(r.status == 5 and "liveupdate=on" in r.err, f"{r.status}: {r.err}")
        expect("is not loaded any more" in r.err and vm.run("cat /sys/kernel/kexec_loaded").out.strip() == "0", r.err)
        r = vm.run(f"kexec -s -l {path} --command-line=kho=off && khoctl preflight", check=False)
        expect(r.status == 5 and "cold reboot" in r.out, f"{r.status}: {r.out}{r.err}")
        kexec_refused(vm, "kho=off")
        # A kernel that is loaded when logind is asked: seen only when it announces the kexec.
        vm.load()
        locked(vm, "block", False)
        since = len(vm.journal.lines)
        vm.run(f"kexec -s -l {path} --command-line=root=/dev/vda && systemctl kexec", check=False)
        journal_says(vm, "lacks liveupdate=on", since)
        untouched(vm)
        unmasked(vm)
        vm.load()
        locked(vm, "block", False)
        locked(vm, "delay")
        vm.run("d=/etc/systemd/system/khod.service.d; mkdir -p $d; "
               "printf '[Service]\nDeviceAllow=\n' > $d/blind.conf; sync")
        vm.kexec()
        khod.settled()
        expect("failed" in vm.run("khoctl list").out, "khod could move it without the device")
        vm.load()
        kexec_refused(vm, "Workload mem would be lost")
        # The lock does not end with khod.
        vm.run("systemctl kill -s KILL khod")
        kexec_refused(vm, "Workload mem would be lost")
        vm.run("rm /etc/systemd/system/khod.service.d/blind.conf; systemctl daemon-reload; "
               "systemctl restart khod")
        expect(khod.held() == ["mem"] and "held" in vm.run("khoctl list").out, "not held")
        locked(vm, "block", False)
        khod.claim("mem")


def put_off(vm, seconds):
    """How long khod puts off, after each kexec from now on, what is for the next one."""
    vm.run("d=/etc/systemd/system/khod.service.d; mkdir -p $d; "
           f"printf '[Service]\nEnvironment=KHOD_PRESERVE_DELAY_SEC={seconds}\n' > $d/delay.conf; sync")


@test()
def a_kexec_before_khod_has_preserved_again(ctx):
    """Each of many, asked of logind or not, after khod was killed or a claim: carried, the same pages."""
    with booted(ctx) as vm:
        khod = Khod(vm.ready())
        khod.register("mem", 64 * MIB)
        khod.register("small", MIB, seed=2)
        put_off(vm, 3600)
        vm.kexec()
        expect(khod.in_transit() == 4, khod.stored())
        vm.kexec()
        expect(khod.in_transit() == 4, khod.stored())
        vm.run("systemctl kill -s KILL khod")
        khod.settled()
        expect(khod.in_transit() == 4, khod.stored())
        vm.kexec()
        # PID 1 does not take anything any more when khod is stopped.
        for command in ("systemctl kexec --force", "systemctl start kexec.target"):
            vm.load()
            vm.mark = len(vm.console.lines)
            vm.start_command(command)
            vm.next_boot(command)
            expect(states(vm) == {"mem": "held", "small": "held"}, f"{command}: {states(vm)}")
            expect(khod.in_transit() == 4, khod.stored())
        khod.claim("small")
        expect(khod.in_transit() == 2, khod.stored())
        delayed(vm)
        vm.kexec()
        expect(khod.held() == ["mem"], khod.held())
        # khoctl asks for it, and is answered when it has been done.
        vm.run("khoctl preserve")
        expect(khod.in_transit() == 0, khod.stored())
        vm.run("khoctl abort")
        put_off(vm, 10)
        vm.kexec()
        khod.only_sessions()
        khod.claim("mem")


def lease(vm, name, size=4 * MIB, seed=1, *options):
    """A client of its own unit that leases a memfd; returns what memfd-pages says of its contents."""
    vm.run(f"systemd-run -q --unit=lease-{name} {PAGES} --create {size} --seed {seed} -- "
           f"/usr/lib/khod/tests/lease {' '.join(options)} {name}; "
           f"for i in $(seq 300); do khoctl list | grep -q '^{name} ' && exit 0; sleep 0.1; done; "
           f"systemctl status --no-pager lease-{name} >&2; exit 1")
    return digests(vm.run(f"{PAGES} --create {size} --seed {seed}").out)[0][2]


def states(vm):
    """Name and state of each workload."""
    rows = [r.split() for r in vm.run("khoctl list").out.splitlines()[1:] if not r.startswith(" ")]
    return {r[0]: r[1] for r in rows}


def claimed(vm, name, want):
    """Claim @name: the contents must be those with the sum @want."""
    got = digests(vm.run(f"khoctl claim --of root {name} -- {PAGES}").out)
    expect(len(got) == 1 and got[0][2] == want, f"{name} came back as {got}")


def journal_says(vm, pattern, since, timeout=60):
    """Wait for a line of the journal from line @since on."""
    i = vm.journal.wait(pattern, since, time.monotonic() + timeout, vm.alive)
    expect(i is not None, f"the journal never said '{pattern}'")
    return vm.journal.lines[i]


def locked(vm, mode, want=True):
    """Wait until khod has a lock of logind's of that mode, or has none."""
    vm.run(f"for i in $(seq 300); do systemd-inhibit --list --no-pager | grep -q 'khod.*{mode}'; "
           f"[ $? = {0 if want else 1} ] && exit 0; sleep 0.1; done; systemd-inhibit --list >&2; exit 1")


def kexec_refused(vm, why):
    """systemctl kexec fails, says why, and stops nothing."""
    # The reason, too: khod may still have the lock for another one.
    vm.run("for i in $(seq 300); do COLUMNS=300 systemd-inhibit --list --no-pager | grep 'khod.*block' | "
           f"grep -qF '{why}' && exit 0; sleep 0.1; done; systemd-inhibit --list >&2; exit 1")
    r = vm.run("systemctl kexec", check=False)
    expect(r.status != 0 and re.search("inhibit", r.err, re.I), f"{r.status}: {r.err}")
    untouched(vm)


def unmasked(vm):
    """Wait until khod has undone what kept kexec.target from being started."""
    vm.run("for i in $(seq 300); do [ $(systemctl show -P LoadState kexec.target) = loaded ] && "
           "[ ! -e /run/khod/kexec-refused ] && exit 0; sleep 0.1; done; exit 1")


def delayed(vm):
    """Wait until logind would wait for khod before a kexec."""
    locked(vm, "delay")


def untouched(vm, *units):
    """No unit was stopped, and every workload that is leased may go on as before."""
    expect(vm.run(f"systemctl is-active {' '.join(units)} systemd-journald khod").out.split()
           == ["active"] * (len(units) + 2), "units were stopped")
    expect(not units or set(states(vm).values()) == {"leased"}, states(vm))


@test()
def a_veto_stops_a_kexec_before_any_unit(ctx):
    """By khoctl and by systemctl: named with its reason, undone; without it both are carried."""
    with booted(ctx) as vm:
        vm.ready()
        a, b = lease(vm, "a", seed=5), lease(vm, "b", 8 * MIB, 6)
        untouched(vm, "lease-a", "lease-b")
        vm.load()
        vm.run("echo 'veto in the middle of a migration' > /run/lease-b")
        r = vm.run("khoctl kexec", check=False)
        expect(r.status == 5 and "b: vetoed: in the middle of a migration" in r.err, f"{r.status}: {r.err}")
        untouched(vm, "lease-a", "lease-b")
        delayed(vm)
        since = len(vm.journal.lines)
        vm.run("systemctl kexec")
        journal_says(vm, "given up, everything is as before: b: vetoed: in the middle of a migration", since)
        journal_says(vm, "The kexec is refused", since)
        delayed(vm)     # logind has given up, and khod waits for the next
        untouched(vm, "lease-a", "lease-b")
        unmasked(vm)
        vm.run("rm /run/lease-b; khoctl preserve")
        expect(states(vm) == {"a": "held", "b": "held"}, states(vm))
        vm.run("khoctl abort")
        untouched(vm, "lease-a", "lease-b")
        vm.reboot_loaded()
        expect(states(vm) == {"a": "held", "b": "held"}, states(vm))
        claimed(vm, "a", a)
        claimed(vm, "b", b)


@test(part="kexec")
def who_is_not_ready_for_systemctl_kexec(ctx):
    """Stalled, dead, of best effort, khod killed: refused and undone, or carried without it."""
    with booted(ctx) as vm:
        vm.ready()
        a = lease(vm, "a", 4 * MIB, 5)
        vm.load()
        for mode, why in (("stall", "b: its client did not answer in time"),
                          ("die", "b: its client died before it was ready")):
            vm.run("rm -f /run/lease-b")
            lease(vm, "b", MIB, 6)
            delayed(vm)
            vm.run(f"echo {mode} > /run/lease-b")
            r = vm.run("khoctl kexec", check=False)
            expect(r.status == 5 and why in r.err, f"{r.status}: {r.err}")
            if mode == "die":
                expect(states(vm) == {"a": "leased"}, states(vm))
                vm.run("systemctl reset-failed lease-b; rm /run/lease-b")
                lease(vm, "b", MIB, 6)
                vm.run("echo die > /run/lease-b")
            since = len(vm.journal.lines)
            vm.run("systemctl kexec")
            journal_says(vm, why, since)
            journal_says(vm, "The kexec is refused", since)
            delayed(vm)
            untouched(vm, "lease-a")
            vm.run("systemctl stop lease-b; systemctl reset-failed lease-b", check=False)
        # Killed while it is asked for: the client comes back, and the next one is carried.
        lease(vm, "c", MIB, 7, "--best-effort")
        vm.run("echo veto no > /run/lease-c")
        expect("c is left behind: vetoed: no" in vm.run("khoctl preserve").err, "not left behind")
        since = len(vm.journal.lines)
        vm.run("systemctl kill -s KILL khod")
        journal_says(vm, "lease: a: taken", since)
        journal_says(vm, "lease: c: taken", since)
        expect(states(vm) == {"a": "leased", "c": "leased"}, states(vm))
        delayed(vm)
        vm.reboot_loaded()
        expect(states(vm) == {"a": "held"}, states(vm))
        claimed(vm, "a", a)


@test(part="kexec")
def khod_killed_while_logind_waits(ctx):
    """Its lock stays with systemd: the next khod refuses the kexec; asked for again, both are carried."""
    with booted(ctx) as vm:
        vm.ready()
        # So much time that khod is killed in it, however slow the machine is.
        vm.run("d=/etc/systemd/logind.conf.d; mkdir -p $d; printf '[Login]\nInhibitDelayMaxSec=100\n' > $d/long.conf; "
               "systemctl restart systemd-logind")
        a, b = lease(vm, "a", 4 * MIB, 5), lease(vm, "b", MIB, 6, "--msec", "60000")
        vm.load()
        delayed(vm)
        vm.run("echo stall > /run/lease-b")
        since = len(vm.journal.lines)
        vm.run("systemctl kexec")
        journal_says(vm, "A kexec is announced", since)
        vm.run("systemctl kill -s KILL khod")
        journal_says(vm, "khod has died since", since)
        journal_says(vm, "The kexec is refused", since)
        for name in ("a", "b"):
            journal_says(vm, f"lease: {name}: taken", since)
        untouched(vm, "lease-a", "lease-b")
        unmasked(vm)
        delayed(vm)
        vm.run("rm /run/lease-b")
        vm.reboot_loaded()
        expect(states(vm) == {"a": "held", "b": "held"}, states(vm))
        claimed(vm, "a", a)
        claimed(vm, "b", b)


@test(part="kexec")
def what_does_not_ask_logind(ctx):
    """--force, kexec.target, kexec -e: what is held is carried by the first two, nothing by the last."""
    with booted(ctx) as vm:
        khod = Khod(vm.ready())
        for command in ("systemctl kexec --force", "systemctl start kexec.target", "khoctl kexec --force"):
            lease(vm, "lease", MIB, 3)
            vm.run("echo veto never > /run/lease-lease")
            khod.register("mem")
            vm.load()
            vm.mark = len(vm.console.lines)
            vm.start_command(command)
            vm.next_boot(command)
            expect(states(vm) == {"mem": "held"}, f"{command}: {states(vm)}")
            khod.claim("mem")
        # What was prepared comes over, too.
        a = lease(vm, "a", MIB, 3)
        vm.run("khoctl preserve")
        vm.load()
        vm.mark = len(vm.console.lines)
        vm.start_command("systemctl kexec --force")
        vm.next_boot("systemctl kexec --force")
        claimed(vm, "a", a)
        khod.register("mem")
        vm.load()
        vm.mark = len(vm.console.lines)
        vm.start_command("sync; kexec -e")
        vm.next_boot("kexec -e")
        expect(states(vm) == {}, states(vm))
        khod.only_sessions()
        khod.register("again")
        khod.claim("again")


def handovers(ctx, count):
    """The same memory through @count handovers, with nobody claiming it, under pressure."""
    with booted(ctx, pressure=True) as vm:
        khod = Khod(vm.ready())
        khod.register("mem", 128 * MIB)
        for i in range(count):
            vm.kexec()
            expect(khod.held() == ["mem"], f"after kexec {i + 1}: {khod.held()}")
        khod.claim("mem")
        ctx.figure("handovers", count)


@test(part="kexec")
def twenty_handovers_under_pressure(ctx):
    handovers(ctx, 20)


@test(part="kexec")
def killed_after_a_kexec_of_its_own_for_each_point(ctx):
    """As in check, but each point gets a kexec, and dies at its second pass too."""
    with booted(ctx) as vm:
        khod, done = Khod(vm.ready()), 0
        put_off(vm, 1)
        khod.register("a", seed=1)
        khod.register("b", seed=2)
        for point in khod.points("start-incoming"):
            for which in (point, f"{point}:2"):
                khod.arm([which], restart=False)
                since = len(vm.journal.lines)
                vm.kexec()
                khod.settled()
                kills = khod.kills(since, [point])
                expect(kills == [point], f"{which}: killed at {kills}")
                expect(sorted(khod.held()) == ["a", "b"], f"{which}: {khod.held()}")
                done += 1
        khod.claim("a")
        khod.claim("b")
        ctx.figure("kills", done)
