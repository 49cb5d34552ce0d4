// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Modes that show what becomes of a device behind an IOMMU: while nothing is preserved, when
 * nobody translates its IOVAs any more, when nothing is let through.
 */

#include "guest.h"

/* The device is used to the last moment, and nothing is preserved. */
static void plain_kexec(int stage)
{
	int left = atoi(param("dma.left", param("dma.kexecs", "1")));

	if (!left)
		return;
	driver->report();
	load_kernel(stage + 1, left - 1, param("dma.next", ""));
	run_for(0.5);
	do_kexec();
	die("kexec");
}

void plain_first(void)
{
	plain_kexec(1);
}

/* It was stopped with its kernel, and is opened as for the first time. */
void plain_next(int stage)
{
	say("%s the device is stopped", is_master(BDF) ? "FAIL" : "ok");
	fill_memory();
	sleep(1);
	check_filler();
	/* QEMU's e1000e keeps its rings when it is reset by power management. */
	must(put(PCI_DEVICE BDF "/reset_method", "bus"), "reset_method");
	first(atoi(param("dma.irq", "0")));
	wait_for_dma();
	run_for(2);
	plain_kexec(stage);
}

/*
 * Nobody comes for the device, which goes on. The memory that has its IOVAs as physical
 * addresses is others' now: it changes if nothing translates.
 */
void __attribute__((noreturn)) iovas_next(int stage)
{
	(void)stage;
	fill_iovas();
	sleep(3);
	say("QUIESCED");	/* or not: the words about memory tell */
	check_filler();
	power_off();
}

/* The kernel has no IOMMU, and the unit lets nothing through: the device goes on for nothing. */
void __attribute__((noreturn)) blocked_next(int stage)
{
	(void)stage;
	fill_memory();
	sleep(2);
	say("BLOCKED master=%d", is_master(BDF));
	check_filler();
	retrieve_session("dma");
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	map_mem();
	driver->take(false);
	sleep(1);
	verdict(!driver->take(false), "nothing is written to the memory", 0);
	say("STOP");
	driver->report();
	end_session();
	say("%s the device is stopped", is_master(BDF) ? "FAIL" : "ok");
	quiesced();
}

/* Nothing comes in the ring that the device had if it was moved to where it has none. */
void __attribute__((noreturn)) watch_ring(int fd)
{
	memfd = fd;
	map_mem();
	map_bar();
	driver->resume();
	run_for(2);
	finish_run();
}
