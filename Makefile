# SPDX-License-Identifier: GPL-2.0-or-later
# A thin front: the build is meson's, the machines are tests/lab/lab's.

BUILD ?= build
LAB := tests/lab/lab

all: $(BUILD)/build.ninja
	ninja -C $(BUILD)

$(BUILD)/build.ninja: | setup
	meson setup $(BUILD)

setup:
	@tests/lab/setup

# The main job, shown: a real kexec under systemd, and what came through it.
demo: setup
	@$(LAB) demo $(if $(MACHINE),--machine $(MACHINE))

# Every test of every change: unit tests on this host, then guests.
check: setup
	@$(LAB) check --with-unit-tests

# The same in full numbers, on all kernels: `make check-long PART="kexec suites"`.
check-long: setup
	@$(LAB) check-long $(PART)

# Figures, each with its baseline from the same run: `make bench FIGURE="memory idle"`.
bench: setup
	@$(LAB) bench $(FIGURE)

clean:
	rm -rf $(BUILD) build-check build-demo.svg

.PHONY: all setup demo check check-long bench clean
