# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices over `systemctl kexec`: a userspace NIC driver that never loses a packet."""

import json
import re
import time
from xml.etree import ElementTree

from lablib import nic, trace
from lablib.check import expect, test
from lablib.sender import Sender

from .service import Khod, journal_says, put_off

A_AND_B = (("minimal", False, ""), ("minimal", False, "-b"))


NIC = "/usr/lib/khod/tests/nic"
FILL = "vtd_iotlb_page_update"


def booted(ctx, machine="noiommu", **kw):
    return ctx.vm(**{"memory": "1G", **kw}, machine=machine, devices=["e1000e"], append="lab.nic",
                  trace=(*nic.EVENTS, FILL))


def judge(c):
    """What must hold of a kexec under traffic; a sentence for what does not."""
    wrong = []
    if len(c.dma) != c.sent:
        wrong.append(f"{c.sent} packets sent, {len(c.dma)} written by DMA")
    if c.seen != c.sent or c.lost or c.duplicates or c.foreign:
        wrong.append(f"{c.sent} packets sent, the driver saw {c.seen}, {c.lost} lost, "
                     f"{c.duplicates} twice, {c.foreign} of others")
    if not c.dma_in(c.dark):
        wrong.append(f"no DMA in the blackout, in which {c.sent_in(c.dark)} packets were sent")
    if any(c.absent[0] <= t < c.absent[1] for t in c.masters):
        wrong.append("bus mastering was turned off")
    return wrong


def figures(ctx, c):
    ctx.figure("packets", f"{c.sent} sent, {len(c.dma)} by DMA, {c.seen} seen")
    ctx.figure("in the blackout", f"{c.dma_in(c.dark)} in {c.dark[1] - c.dark[0]:.1f} s")
    ctx.figure("without a driver", f"{c.dma_in(c.absent)} in {c.absent[1] - c.absent[0]:.1f} s")


PHASES = ["units stop", "systemd-shutdown", "one kernel to the other", "new kernel boots",
          "systemd starts", "khod: retrieve", "khod: rebuild", "khod: replace", "khod: until ready",
          "workloads start"]


def far(own, host):
    """The host sees a line on the console when it is not too busy."""
    return abs(own - host) > 2.5 + host / 5


def own_timeline(vm, c):
    """khod's account of the handover must be complete, and that of the host's stamps."""
    t = json.loads(vm.run("khoctl timeline --json --svg /lab/timeline.svg").out)
    expect((t["old_release"], t["new_release"]) == (c.old, c.new), t)
    expect(t["clock"] == "counter" and t["dropped_marks"] == 0, t)
    # Whether it is prepared first is up to who asks for it.
    names = [p["name"] for p in t["phases"] if p["name"] != "khod: prepare"]
    expect(names == PHASES, names)
    expect([w["name"] for w in t["workloads"]] == ["nic"], t["workloads"])
    w = t["workloads"][0]
    expect(0 < w["stopped_ns"] < w["restored_ns"] < w["claimed_ns"], w)
    for what, own, host in (("blackout", t["blackout_ns"], c.timeline.blackout),
                            ("service gap", t["service_gap_ns"], c.timeline.service_gap)):
        expect(not far(own / 1e9, host), f"{what}: khod has {own / 1e9:.2f} s, the host {host:.2f} s")
    text = vm.run("khoctl timeline").out
    expect(all(p in text for p in PHASES) and "service gap" in text, text)
    ElementTree.parse(vm.share / "timeline.svg")
    return t


# What `khoctl show` says of the page tables
WITHOUT = "no IOMMU, AMD v1 tables, pages of 4 KiB to "
TABLES = {"noiommu": WITHOUT,
          "uefi": WITHOUT,
          "vtd-legacy": "second-stage tables, pages of 4 KiB, 2 MiB and 1 GiB",
          "vtd-scalable": "second-stage tables, pages of 4 KiB, 2 MiB and 1 GiB",
          "vtd-first-stage": "first-stage tables, pages of 4 KiB, 2 MiB and 1 GiB"}


# Mode and stage, in the tree and as JSON
TRANSLATIONS = {"vtd-legacy": ("legacy", "legacy"),
                "vtd-scalable": ("scalable mode, second-stage", "second-stage"),
                "vtd-first-stage": ("scalable mode, first-stage", "first-stage")}


def domain_ids(vm) -> list:
    """With which QEMU's IOMMU looked up translations for the NIC, one after the other."""
    fills = (re.search(r"sid 0x0*100 .*domain (0x[0-9a-f]+)", e.text)
             for e in trace.read(vm.dir / "trace.log", {FILL}))
    return [int(m.group(1), 16) for m in fills if m]


def judge_translation(ctx, vm, machine):
    """What `khoctl show` says of the IOMMU must be what the IOMMU does."""
    text = vm.run("khoctl show nic").out
    expect(TABLES[machine] in text, f"khoctl show does not say '{TABLES[machine]}': {text}")
    t = shown(vm)["contexts"][0]["devices"][0]["translation"]
    if TABLES[machine] == WITHOUT:
        expect(t is None and "domain id" not in text, f"there is no IOMMU: {t}, {text}")
        return
    used = domain_ids(vm)
    said, mode = TRANSLATIONS[machine]
    expect(len(set(used)) > 1, f"one domain id before and after the replace: {set(used)}")
    expect(t == {"mode": mode, "iommu": "dmar0", "domain_id": used[-1], "hitless": True},
           f"{t}, and QEMU's IOMMU translates with domain id {used[-1]}")
    preflight = vm.run("khoctl preflight", check=False).out
    expect("behind dmar0: its page table is replaced without a gap" in preflight, preflight)
    said = f"by dmar0 in {said}{' mode' if mode == 'legacy' else ''}, domain id {used[-1]}"
    expect(said in text, f"khoctl show does not say '{said}': {text}")
    ctx.figure("translated", said)


def through_systemctl_kexec(ctx, machine):
    with booted(ctx, machine) as vm:
        vm.ready()
        c = nic.over_kexec(vm, ctx.kernel(release="-b"))
        figures(ctx, c)
        expect(not judge(c), "; ".join(judge(c)))
        t = own_timeline(vm, c)
        ctx.figure("blackout", f"{t['blackout_ns'] / 1e9:.2f} s by khod, {c.timeline.blackout:.2f} s by the host")
        held = vm.run("khoctl list").out
        expect("nic" in held and "held" in held, f"the driver did not register again: {held}")
        judge_translation(ctx, vm, machine)
        journal_says(vm, "Workload nic is restored", 0)


@test(kernels=A_AND_B)
def packets_land_through_systemctl_kexec(ctx):
    """Each packet sent is in the ring, by the driver's count and by QEMU's; none is lost."""
    through_systemctl_kexec(ctx, "noiommu")


@test(kernels=A_AND_B)
def packets_land_through_systemctl_kexec_second_stage(ctx):
    """The same behind VT-d: translated all the time, and moved to new tables by khod."""
    through_systemctl_kexec(ctx, "vtd-scalable")


@test(part="nic", kernels=A_AND_B)
def packets_land_through_systemctl_kexec_uefi(ctx):
    through_systemctl_kexec(ctx, "uefi")


@test(part="nic", kernels=A_AND_B)
def packets_land_through_systemctl_kexec_legacy(ctx):
    through_systemctl_kexec(ctx, "vtd-legacy")


@test(part="nic", kernels=A_AND_B)
def packets_land_through_systemctl_kexec_first_stage(ctx):
    through_systemctl_kexec(ctx, "vtd-first-stage")


def shown(vm):
    """What khod says of the workload."""
    return json.loads(vm.run("khoctl show nic --json").out)


def killed_at(ctx, khod, since, points, timeout=60):
    """Wait until khod has killed itself at each of @points."""
    kills = khod.kills(since, points, timeout)
    expect(set(kills) == set(points), f"never reached: {set(points) - set(kills)}")
    ctx.figure("kills", f"{len(kills)} at {len(points)} points")


def while_nobody_claims(ctx, machine):
    with booted(ctx, machine) as vm:
        khod = Khod(vm.ready())
        nic.wait_running(vm)
        vm.run("systemctl disable lab-nic; sync")

        def unclaimed():
            khod.settled()
            w = shown(vm)
            expect(w["state"] == "held" and w["outcome"] == "restored" and w["handovers"] == 1, w)
            khod.only_sessions()
            r = vm.run("khoctl kexec --kernel /etc/hostname", check=False)
            expect(r.status == 5 and "cannot be read as a kernel" in r.err, f"{r.status}: {r.err}")
            expect(vm.run("cat /sys/kernel/kexec_loaded").out.strip() == "0", "loaded all the same")
            path = vm.put_kernel(ctx.kernel())
            vm.mark = len(vm.console.lines)
            vm.start_command(f"khoctl kexec --kernel {path} --cmdline '{vm.cmdline()}' "
                             "> /lab/kexec.out 2>&1")
            vm.next_boot("khoctl kexec", 240)
            khod.settled()
            w = shown(vm)
            expect(w["outcome"] == "restored" and w["handovers"] == 2, w)
            vm.run("systemctl start lab-nic")
        c = nic.over_kexec(vm, ctx.kernel(), between=unclaimed)
        figures(ctx, c)
        expect(not judge(c), "; ".join(judge(c)))


@test()
def packets_land_while_nobody_claims(ctx):
    """Two kexecs, the second by khoctl, and no driver in between: khod restores it by itself."""
    while_nobody_claims(ctx, "noiommu")


@test(part="nic")
def packets_land_while_nobody_claims_legacy(ctx):
    """The same behind VT-d."""
    while_nobody_claims(ctx, "vtd-legacy")


@test()
def packets_land_while_khod_is_killed_at_every_point(ctx):
    """After the kexec khod dies at each step of the restore and of the move, in turn."""
    with booted(ctx) as vm:
        khod = Khod(vm.ready())
        nic.wait_running(vm)
        # First the one after which the device is retrieved: that ends the kernel's deadline,
        # which all these starts together may not meet.
        points = sorted(khod.points("restore", "start-incoming"),
                        key=lambda p: p != "start-incoming-file-retrieved")
        put_off(vm, 0)      # the driver would claim it before the last of them
        khod.arm(points, restart=False)
        since = len(vm.journal.lines)

        def killed():
            khod.settled(20 * len(points))      # a start takes seconds on a busy host
            killed_at(ctx, khod, since, points)
        c = nic.over_kexec(vm, ctx.kernel(), between=killed)
        figures(ctx, c)
        expect(not judge(c), "; ".join(judge(c)))
        steps = [x for x in list(vm.journal.lines)[since:] if "Workload nic is restored" in x]
        expect(len(steps) == 1, f"restored {len(steps)} times: {steps}")


@test()
def a_restore_that_fails_stops_the_device(ctx):
    """khod may not pin the memory: undone, device stopped, memory and reason for the client.

    And it is killed at each step of that.
    """
    with booted(ctx) as vm:
        khod = Khod(vm.ready())
        nic.wait_running(vm)
        vm.run("systemctl disable lab-nic; d=/etc/systemd/system/khod.service.d; mkdir -p $d; "
               "printf '[Service]\nLimitMEMLOCK=1M\n' > $d/little.conf; sync")
        points, since = khod.points("quiesce"), len(vm.journal.lines)
        khod.arm(points, restart=False)
        sender = Sender(vm.senders[0], 500, vm.dir / "sent")
        time.sleep(2)
        vm.kexec()
        killed_at(ctx, khod, since, points)
        khod.settled()
        stopped = time.time()
        w = shown(vm)
        expect(w["outcome"] == "quiesced" and "Cannot allocate memory" in w["outcome_reason"], w)
        expect([f["name"] for f in w["files"]] == ["memory"], w)
        status = vm.run("khoctl status").out
        expect("nic  devices quiesced by the last handover: " in status, status)
        said = vm.run("khoctl claim --of root nic --keep -o /dev/null").err
        expect(re.search("the devices of nic have been stopped: .*Cannot allocate memory", said), said)
        khod.only_sessions()
        time.sleep(3)
        late = [t for t in nic.dma_times(vm) if t > stopped + 0.1]
        expect(not late, f"{len(late)} packets were written after the device was stopped")
        before = [t for t in nic.dma_times(vm) if t < stopped]
        expect(before, "no DMA before either")
        vm.run("systemctl start lab-nic")
        got = nic.wait_running(vm)
        time.sleep(3)
        sender.stop()
        now = nic.status(vm)
        expect(now["seen"] > got["seen"], f"it does not receive: {got}, {now}")
        journal_says(vm, "the device was stopped by the handover: ", 0)
        ctx.figure("packets", f"{len(before)} before, {now['seen']} seen in the end, {now['lost']} lost")


CLAIM_WITHIN = 60      # the machine may be busy


def restart_driver(vm, options):
    """The driver once more, with @options and nothing of its past."""
    vm.run("d=/etc/systemd/system/lab-nic.service.d; mkdir -p $d; printf '[Service]\\nExecStart=\\n"
           f"ExecStart={NIC} {options} --status {nic.STATUS}\\n' > $d/options.conf; sync; "
           "systemctl daemon-reload; systemctl stop lab-nic; ! khoctl show nic > /dev/null 2>&1 || "
           "khoctl release --of root nic; systemctl start lab-nic", 120)
    return nic.wait_running(vm)


def not_claimed_in_time(ctx, machine, *killed):
    """@killed: phases at whose fault points khod kills itself meanwhile, the workloads' one after the other."""
    with booted(ctx, machine) as vm:
        khod = Khod(vm.ready())
        nic.wait_running(vm)
        restart_driver(vm, f"--claim-within {CLAIM_WITHIN}")
        vm.run("systemctl disable lab-nic; head -c 1M /dev/urandom > /tmp/blob; khoctl register blob "
               f"/tmp/blob --on-failure release --claim-within {CLAIM_WITHIN}; sync")
        sender = Sender(vm.senders[0], 500, vm.dir / "sent")
        time.sleep(2)
        since = len(vm.journal.lines)
        vm.kexec()
        khod.settled()
        w = shown(vm)
        expect(w["outcome"] == "restored" and 0 < w["claim_left_sec"] <= CLAIM_WITHIN, w)
        # A khod that is killed does not begin to count again.
        vm.run("systemctl kill -s KILL khod; sleep 1; systemctl start khod")
        expect(shown(vm)["claim_left_sec"] < w["claim_left_sec"], shown(vm))
        if killed:
            points = khod.points(*killed)
            khod.arm(points)
            killed_at(ctx, khod, since, points, 3 * CLAIM_WITHIN)
            khod.settled()
        else:
            said = "Nobody has claimed workload %s within " + f"{CLAIM_WITHIN} s of the handover: "
            journal_says(vm, said % "nic" + "its devices have been stopped, its memory is kept", since,
                         2 * CLAIM_WITHIN)
            journal_says(vm, said % "blob" + "its memory is freed, as it asked for", since)
        stopped = time.time()
        expect("to be claimed within" not in vm.run("khoctl list").out, vm.run("khoctl list").out)
        w = shown(vm)
        expect(w["outcome"] == "quiesced" and "nobody has claimed it within" in w["outcome_reason"], w)
        expect([f["name"] for f in w["files"]] == ["memory"], w)
        blob = json.loads(vm.run("khoctl show blob --json").out)
        expect(blob["outcome"] == "quiesced" and not blob["files"], blob)
        khod.only_sessions()
        r = vm.run("lspci -s 01:00.0 -vv | grep Control:")
        expect("BusMaster-" in r.out, r.out)
        time.sleep(3)
        dma = nic.dma_times(vm)
        late = [t for t in dma if t > stopped + 0.1]
        expect(not late, f"{len(late)} packets were written after the device was stopped")
        vm.run("systemctl start lab-nic")
        got = nic.wait_running(vm)
        journal_says(vm, "the device was stopped by the handover: nobody has claimed it within", since)
        time.sleep(3)
        sent = len(sender.stop())
        now = nic.status(vm)
        expect(now["seen"] > got["seen"], f"it does not receive: {got}, {now}")
        ctx.figure("packets", f"{sent} sent, {len(dma)} by DMA until it was stopped, {now['lost']} lost then")


@test(part="nic")
def a_device_that_nobody_claims_in_time_is_stopped(ctx):
    """Restored, then its time runs out: stopped, the memory kept; another's memory is freed."""
    not_claimed_in_time(ctx, "noiommu")


@test(part="nic")
def a_device_that_nobody_claims_in_time_is_stopped_legacy(ctx):
    """The same behind VT-d."""
    not_claimed_in_time(ctx, "vtd-legacy")


@test(part="nic")
def a_device_that_nobody_claims_in_time_is_stopped_while_khod_is_killed(ctx):
    """At every point of that: what is decided is done, once."""
    not_claimed_in_time(ctx, "noiommu", "expire")


@test(part="nic")
def interrupts_that_may_get_lost_are_a_policy(ctx):
    """INTx is refused by name unless the workload accepts it, and then its client is told; MSI-X is kept."""
    with booted(ctx) as vm:
        khod = Khod(vm.ready())
        nic.wait_running(vm)
        vm.run("systemctl stop lab-nic; khoctl release --of root nic")
        r = vm.run(f"{NIC} --interrupts intx --status /run/refused", check=False)
        expect(r.status == 1 and "device: cannot be preserved: it uses INTx or MSI" in r.err, f"{r.status}: {r.err}")
        for kind in ("intx", "msix"):
            restart_driver(vm, f"--interrupts {kind} --may-lose-irq")
            expect(shown(vm)["may_lose_irq"], shown(vm))
            since = len(vm.journal.lines)
            vm.kexec()
            khod.settled()
            nic.wait_running(vm, 180)
            journal_says(vm, "Workload nic is restored", since)
            told = [x for x in list(vm.journal.lines)[since:] if "nic: device may have lost interrupts" in x]
            expect(len(told) == (kind == "intx"), f"{kind}: {told}")
            ctx.figure(kind, "the client is told" if told else "kept by the device")


@test(part="nic", kernels=A_AND_B)
def packets_are_lost_without_khod(ctx):
    """Negative control: the same driver that keeps its descriptors to itself."""
    with booted(ctx) as vm:
        vm.ready()
        c = nic.over_kexec(vm, ctx.kernel(release="-b"), alone=True)
        figures(ctx, c)
        expect(judge(c), "nothing of the device was preserved, and yet nothing was lost")
        expect(c.dma_in(c.dark) == 0 and c.lost > 0,
               f"it fails, but not on packets: {'; '.join(judge(c))}")


# Workload: its user and its devices, by slot; "nic" is lab-nic.service's.
OTHERS = {"pair": ("daemon", ("02:00.0", "03:00.0")), "idle": ("games", ("04:00.0",))}


def start_driver(vm, name, others=None, options=""):
    """The driver of @name as a service of its user, in a unit that has the same name each time."""
    user, slots = (others or OTHERS)[name]
    vm.run(f"""chmod 666 /dev/iommu; set --
for s in {' '.join(slots)}; do
	d=/sys/bus/pci/devices/0000:$s
	[ -e $d/driver ] || {{ echo vfio-pci > $d/driver_override; echo 0000:$s > /sys/bus/pci/drivers_probe; }}
	node=/dev/vfio/devices/$(ls $d/vfio-dev)
	chown {user} $node
	set -- "$@" --device $node
done
systemd-run --quiet --collect --unit=lab-{name} -p User={user} -p LimitMEMLOCK=infinity \
	-p RuntimeDirectory=lab-{name} -p After=khod-restored.target \
	{NIC} --name {name} {options} --status /run/lab-{name}/status "$@"
for i in $(seq 300); do grep -qs status=running /run/lab-{name}/status && exit 0; sleep 0.2; done
journalctl --no-pager -n 20 -u lab-{name} >&2; exit 1""", 120)


def counted(vm, path, sent):
    """What a driver has counted, once it has seen all that was sent."""
    end = time.monotonic() + 60
    while True:
        got = nic.status(vm, path)
        if got["next"] >= sent or time.monotonic() > end:
            return got
        time.sleep(0.5)


def all_seen(vm, path, sent, name="nic"):
    """What a driver has counted: all that was sent, each once, and nothing else."""
    got = counted(vm, path, sent)
    expect(got["seen"] == sent and not (got["lost"] or got["duplicates"] or got["foreign"]),
           f"{name}: {sent} packets sent, {got}")
    return got


def refused_in_one_failure_domain(vm):
    """What 'pair' has cannot be part of a second workload, be it of the same user: named, one by one."""
    for kind, name in (("memfd", "memory"), ("iommufd", "iommufd"), ("vfio", "device")):
        r = vm.run(f"/usr/lib/khod/tests/borrow $(systemctl show -P MainPID lab-pair) {kind} -- "
                   "/usr/sbin/runuser -u daemon -- khoctl register second --fd 3 --fd-name mine", check=False)
        expect(r.status == 1 and f"it is '{name}' of workload pair; what shares it is one failure domain" in r.err,
               f"{kind}: {r.status}: {r.err}")
    expect("second" not in vm.run("khoctl list").out, "refused, and listed")


@test(part="nic", kernels=A_AND_B)
def several_workloads_of_different_users(ctx):
    """Three users' over two kexecs: claimed at once, late, not before the third kernel, and never.

    One has two devices on one IOAS, under a page table of its own and under the automatic one; a
    second workload with what is in its failure domain is refused before each kexec.
    """
    with ctx.vm(memory="1G", machine="vtd-scalable", devices=["e1000e"] * 4, append="lab.nic",
                trace=nic.EVENTS) as vm:
        khod = Khod(vm.ready())
        nic.wait_running(vm)
        for name in OTHERS:
            start_driver(vm, name)
        vm.run("runuser -u games -- khoctl register never /etc/os-release")
        senders = [Sender(s, 200, vm.dir / f"sent{i}") for i, s in enumerate(vm.senders)]
        time.sleep(2)
        for round_ in (1, 2):
            refused_in_one_failure_domain(vm)
            vm.kexec(ctx.kernel(release="-b" if round_ == 1 else ""))
            khod.settled()
            nic.wait_running(vm, 180)
            for name in OTHERS:
                w = json.loads(vm.run(f"khoctl show {name} --json").out)
                expect(w["outcome"] == "restored", w)
                expect(w["handovers"] == (round_ if name == "idle" else 1), w)
            t = json.loads(vm.run("khoctl timeline --json").out)
            expect([w["name"] for w in t["workloads"]] == ["idle", "never", "nic", "pair"], t["workloads"])
            time.sleep(2)
            refused = vm.run("systemd-run --quiet --wait --pipe -u other -p User=daemon khoctl claim pair -- true",
                             check=False)
            expect(refused.status == 1 and "it belongs to lab-pair.service, and this client runs in other.service"
                   in refused.err, refused.err)
            start_driver(vm, "pair")
            refused = vm.run("runuser -u games -- khoctl claim pair -- true", check=False)
            expect(refused.status == 4 or "another user" in refused.err, refused.err)
        start_driver(vm, "idle")
        time.sleep(2)
        w = json.loads(vm.run("khoctl show never --json").out)
        expect(w["state"] == "held" and w["handovers"] == 2, w)
        vm.run("runuser -u games -- khoctl claim never --keep -o - | cmp - /etc/os-release")
        sent = [len(s.stop()) for s in senders]
        total = 0
        for name, path, n in (("nic", nic.STATUS, sent[0]), ("pair", "/run/lab-pair/status", sent[1] + sent[2]),
                              ("idle", "/run/lab-idle/status", sent[3])):
            all_seen(vm, path, n, name)
            total += n
        dma = nic.dma_times(vm)
        expect(len(dma) == total, f"{total} packets sent, {len(dma)} written by DMA")
        ctx.figure("packets", f"{total} sent to 4 devices, {len(dma)} by DMA, all seen")


@test(part="nic", kernels=A_AND_B)
def a_workload_with_a_whole_iommu_group(ctx):
    """Two functions of a slot under one page table over two kexecs, claimed after the second one."""
    group = {"group": ("daemon", ("02:00.0", "02:00.1"))}
    with ctx.vm(memory="1G", machine="vtd-legacy", devices=["e1000e", "e1000e", "+e1000e"],
                append="lab.nic", trace=nic.EVENTS) as vm:
        khod = Khod(vm.ready())
        nic.wait_running(vm)
        start_driver(vm, "group", group, "--group")
        groups = vm.run("for f in 0 1; do readlink /sys/bus/pci/devices/0000:02:00.$f/iommu_group; done")
        expect(len(set(groups.out.split())) == 1, f"not one group: {groups.out}")
        senders = [Sender(s, 300, vm.dir / f"sent{i}") for i, s in enumerate(vm.senders)]
        time.sleep(2)
        for round_ in (1, 2):
            vm.kexec(ctx.kernel(release="-b" if round_ == 1 else ""))
            khod.settled()
            w = json.loads(vm.run("khoctl show group --json").out)
            expect(w["outcome"] == "restored" and w["handovers"] == round_, w)
            nic.wait_running(vm, 180)
        start_driver(vm, "group", group, "--group")
        time.sleep(2)
        sent = [len(s.stop()) for s in senders]
        for name, path, n in (("nic", nic.STATUS, sent[0]),
                              ("group", "/run/lab-group/status", sent[1] + sent[2])):
            all_seen(vm, path, n, name)
        ctx.figure("packets", f"{sum(sent)} sent to 3 devices, all seen")


LEASE = ("d=/etc/systemd/system/lab-nic.service.d; mkdir -p $d; printf '[Service]\\nExecStart=\\n"
         "ExecStart=/usr/lib/khod/tests/nic --lease --status /run/lab-nic.status\\n' > $d/lease.conf; sync; "
         "systemctl daemon-reload; systemctl stop lab-nic; khoctl release --of root nic; systemctl start lab-nic")


def wait_leased(vm, seconds):
    vm.run(f"for i in $(seq {10 * seconds}); do khoctl list | grep -q 'nic *leased' && exit 0; sleep 0.1; done; "
           "exit 1")


@test(part="nic", kernels=A_AND_B)
def packets_land_with_a_lease(ctx):
    """Mappings made while leased come over; khod is killed and a handover undone before; none lost."""
    with booted(ctx) as vm:
        vm.ready()
        nic.wait_running(vm)
        vm.run(LEASE, 60)
        nic.wait_running(vm)

        def extra(more):
            """Wait until the driver has mapped @more pages than now."""
            least = nic.status(vm)["extra"] + more
            vm.run(f"for i in $(seq 300); do [ $(sed -n s/^extra=//p {nic.STATUS}) -ge {least} ] && exit 0; "
                   "sleep 0.1; done; exit 1")
        extra(2)
        expect(shown(vm)["state"] == "leased", shown(vm))
        vm.run("khoctl preserve")
        expect(shown(vm)["state"] == "held", shown(vm))
        vm.run("khoctl abort")
        extra(2)
        vm.run("systemctl kill -s KILL khod")
        extra(2)
        wait_leased(vm, 10)
        mapped = nic.status(vm)["extra"]
        c = nic.over_kexec(vm, ctx.kernel(release="-b"))
        figures(ctx, c)
        expect(not judge(c), "; ".join(judge(c)))
        expect(shown(vm)["state"] == "leased" and nic.status(vm)["extra"] > mapped, shown(vm))


@test(part="nic", kernels=A_AND_B)
def packets_land_while_khod_is_killed_with_a_lease(ctx):
    """At each step of preserving a device, of a handover, and of its undoing; then it is carried."""
    with booted(ctx) as vm:
        khod = Khod(vm.ready())
        nic.wait_running(vm)
        vm.run(LEASE, 60)
        nic.wait_running(vm)
        points, since = khod.points("register-devices", "handover", "abort"), len(vm.journal.lines)
        sender = Sender(vm.senders[0], 300, vm.dir / "sent")
        for point in points:
            khod.settled()      # or that start, which knows nothing of the point, is taken for the one to come
            khod.arm([point])
            wait_leased(vm, 60)
            vm.run("khoctl preserve && khoctl abort", 90, check=False)
        killed_at(ctx, khod, since, points)
        wait_leased(vm, 60)
        vm.kexec(ctx.kernel(release="-b"))
        khod.settled()
        nic.wait_running(vm, 180)
        sent = len(sender.stop())
        got, dma = all_seen(vm, nic.STATUS, sent), nic.dma_times(vm)
        expect(len(dma) == sent, f"{sent} packets sent, {len(dma)} written by DMA")
        ctx.figure("packets", f"{sent} sent, {len(dma)} by DMA, {got['seen']} seen")


def under_pressure(vm, since):
    """What was filled before anything was retrieved, in MiB: nothing of it was written to meanwhile."""
    line = journal_says(vm, r"memory-pressure: round 2 filled \d+ MiB, \d+ bytes changed", since)
    filled, changed = (int(x) for x in re.search(r"filled (\d+) MiB, (\d+)", line).groups())
    expect(filled and not changed, line)
    return filled


def handovers(ctx, count):
    """The driver's unit through @count handovers in a row, two builds in turn, under pressure."""
    builds, dark, filled = (ctx.kernel(release="-b"), ctx.kernel()), [], []
    # Filling what is free takes longer than anything else.
    with booted(ctx, memory="512M", pressure=True) as vm:
        khod = Khod(vm.ready())
        nic.wait_running(vm)
        sender = Sender(vm.senders[0], 300, vm.dir / "sent")
        began = time.time()
        for i in range(count):
            start, since = len(vm.console.lines), len(vm.journal.lines)
            vm.kexec(builds[i % 2])
            khod.settled()
            got = nic.wait_running(vm, 180)
            expect(got["starts"] == i + 2 and got["handovers"] == 1 and not got["lost"],
                   f"after handover {i + 1}: {got}")
            nic.wait_said(vm, start)
            dark.append(nic.spans(vm, start)[0])
            filled.append(under_pressure(vm, since))
        sent = len(sender.stop())
        got, dma = all_seen(vm, nic.STATUS, sent), nic.dma_times(vm)
        expect(len(dma) == sent, f"{sent} packets sent, {len(dma)} written by DMA")
        landed = [sum(a <= t < b for t in dma) for a, b in dark]
        expect(all(landed), f"no DMA in a blackout: {landed}")
        expect(not [t for t in nic.masters_off(vm) if t > began], "bus mastering was turned off")
        spans = [b - a for a, b in dark]
        ctx.figure("packets", f"{sent} sent, {len(dma)} by DMA, {got['seen']} seen, {got['lost']} lost")
        ctx.figure("handovers", f"{count}, {sum(landed)} packets in blackouts of {min(spans):.1f} to "
                                f"{max(spans):.1f} s, at least {min(filled)} MiB filled each time")


@test(part="nic", kernels=A_AND_B)
def twenty_handovers_of_a_nic_under_pressure(ctx):
    """One unit, `systemctl kexec` after `systemctl kexec`, packets all the time, none lost."""
    handovers(ctx, 20)
