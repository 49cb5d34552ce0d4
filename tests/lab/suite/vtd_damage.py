# SPDX-License-Identifier: GPL-2.0-or-later
"""VT-d cannot be taken over: what the next kernel is told of it is wrong, or setting it up fails.

The device must not reach any memory from then on, and is stopped. Translation is never off before: the
device's IOVAs would be taken for physical addresses.
"""

from lablib.check import expect, test
from .dma import ENABLE, Run, faults, quiesced
from .vtd import MODES, OTHER, says

ROOT = "vtd_reg_dmar_root"      # another root table, and whether it is a scalable one

# What is wrong, by the mode of dma-guest
UNIT = {
    "unitroot": "another root table",
    "unitmode": "another mode",
    "unitcap": "other capabilities",
    "unitlist": "a list that is none",
    "unitversion": "another version",
    "unitbase": "other registers",
}
# Of liveupdate_test_fail=
STEPS = {
    "vtd-root": "No memory for a root table",
    "vtd-interrupt": "No vector for its faults",
    "vtd-scope": "Its devices cannot be listed",
}


def always_on(run):
    """Until the device is stopped; and in one mode, which the specification wants while it is on."""
    end = run.lines("QUIESCED")[0].wall
    switched = [e.text for e in run.trace({ENABLE}) if e.when < end]
    expect(len(switched) == 1, f"translation was switched {len(switched)} times: {switched}")
    modes = [e.text.split()[-1] for e in run.trace({ROOT}) if e.when < end]
    expect(len(set(modes)) == 1, f"root tables, scalable or not, while it was on: {modes}")


def not_as_described(ctx, damage, mode, options=""):
    """All of the unit is blocked, the device is stopped, and another one is translated anew."""
    run = quiesced(ctx, damage, machine=MODES[mode], arguments=OTHER, options=options, trace=(ROOT,))
    says(run, "is not as the previous kernel|DMA of its devices is blocked")
    always_on(run)
    ctx.figure("refused", f"{faults(run)} DMA requests, until the device was stopped")


def not_set_up(ctx, step, mode):
    """There is no IOMMU for the kernel, and the unit lets nothing through, for good."""
    run = Run(ctx, mode="blocked", machine=MODES[mode], trace=(ROOT,),
              options=f"dma.next=liveupdate_test_fail={step}")
    says(run, "DMA of all devices is blocked")
    expect(len(run.lines("ok filled memory")) == 2, "free memory was not looked at twice")
    lost, refused = len(run.sent) - run.result()["received"], faults(run)
    expect(min(lost, refused) > 100, f"{lost} packets lost, {refused} DMA requests refused")
    always_on(run)
    at = run.lines("QUIESCED")[0].wall
    expect(not run.dma(at + 0.1, at + 2.5), "packets were written after the device was quiesced")
    going = "on" if run.lines("BLOCKED master=1") else "off"
    ctx.figure("refused", f"{refused} DMA requests, {lost} packets lost, bus mastering {going} meanwhile")


def add_damage(mode, damage, what):
    @test(f"quiesced-if-the-iommu-is-said-to-have-{what.replace(' ', '-')}-{mode}", part="vtd-damage")
    def wrong(ctx):
        not_as_described(ctx, damage, mode)
    wrong.__doc__ = not_as_described.__doc__


def add_step(mode, step, why):
    @test(f"quiesced-if-the-iommu-cannot-be-set-up-{step}-{mode}", part="vtd-damage")
    def failing(ctx):
        not_set_up(ctx, step, mode)
    failing.__doc__ = f"{not_set_up.__doc__} {why}."


def add_off(mode):
    @test(f"quiesced-if-the-iommu-is-not-known-and-to-be-off-{mode}", part="vtd-damage")
    def off(ctx):
        """The next kernel is told to do without it, besides: it stays on until nobody needs it."""
        not_as_described(ctx, "unitversion", mode, "dma.next=intel_iommu=off")


for name in MODES:
    for row in UNIT.items():
        add_damage(name, *row)
    for row in STEPS.items():
        add_step(name, *row)
    add_off(name)
