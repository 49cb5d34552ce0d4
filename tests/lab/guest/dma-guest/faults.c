// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Every allocation of preserving fails once, and each step of the next kernel's early boot
 *
 * By /proc/self/fail-nth: preserving is done with its first allocation failing, then its
 * second, and so on until there is none left to fail. Each time it ends in an error after
 * which it can be tried again, or it succeeds all the same. The kernel says where it was.
 *
 * It leaves as many pages preserved, pinned, in page tables and in files as there were before,
 * see counts.c. What else was allocated, and nobody knows any more, the kernel's own detector
 * finds, where it is configured.
 */

#include "guest.h"
#include <sys/mount.h>

#define FAIL	"/sys/kernel/debug/"

#define DEADLINE_MS	40000

/* Open all the time, as opening it allocates. */
static int fail_nth = -1;

static void arm(unsigned int n)
{
	char text[16];

	snprintf(text, sizeof(text), "%u", n);
	check(pwrite(fail_nth, text, strlen(text), 0), "fail-nth");
}

/* Whether the failure happened. */
static bool disarm(void)
{
	char text[16] = "";

	check(pread(fail_nth, text, sizeof(text) - 1, 0), "fail-nth");
	check(pwrite(fail_nth, "0", 1, 0), "fail-nth");
	return atoi(text) == 0;
}

/* Pages as well as objects, and those that may wait. */
static void enable(void)
{
	fail_nth = open("/proc/self/fail-nth", O_RDWR);
	check(fail_nth, "fail-nth");
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	must(put(FAIL "failslab/ignore-gfp-wait", "N"), "failslab");
	if (access(FAIL "fail_page_alloc", F_OK))
		return;			/* this kernel lets objects fail only */
	must(put(FAIL "fail_page_alloc/ignore-gfp-wait", "N"), "fail_page_alloc");
	must(put(FAIL "fail_page_alloc/min-order", "0"), "fail_page_alloc");
}

/* Do @op with allocation after allocation failing, until none is left; what it did is undone. */
static void sweep(const char *name, int (*op)(void), void (*undo)(void))
{
	for (unsigned int n = 1;; n++) {
		bool fired;
		int ret;

		arm(n);
		ret = op();
		fired = disarm();
		if (!fired) {
			must(ret, name);
			say("SWEPT %s points=%u", name, n - 1);
			return;
		}
		say("FAULT %s %u: %s", name, n, ret < 0 ? strerror(-ret) : "done");
		driver->take(true);
		undo();
	}
}

static void check_dma(void)
{
	driver->take(true);
	say("%s DMA after that", dma_goes_on() ? "ok" : "FAIL no");
}

static int op_session(void)
{
	return try_create_session("dma");
}

static int op_memfd(void)
{
	return try_preserve(memfd, TOK_MEM);
}

static int op_iommufd(void)
{
	return try_preserve(iommufd, TOK_IOMMUFD);
}

static int op_device(void)
{
	return try_preserve(dev, TOK_DEV);
}

static void undo_session(void)
{
	if (session >= 0)
		end_session();
}

static void undo_memfd(void)
{
	end_session();
	create_session("dma");
}

static void undo_iommufd(void)
{
	undo_memfd();
	must(op_memfd(), "preserve memfd");
}

static void undo_device(void)
{
	undo_iommufd();
	must(op_iommufd(), "preserve iommufd");
}

static void sweep_preserve(void)
{
	struct counts before;

	/* Once without a failure: what is allocated at the first use stays. */
	create_session("dma");
	preserve_all();
	end_session();
	before = count_pages();

	sweep("create-session", op_session, undo_session);
	sweep("preserve-memfd", op_memfd, undo_memfd);
	sweep("preserve-iommufd", op_iommufd, undo_iommufd);
	sweep("preserve-device", op_device, undo_device);
	end_session();
	check_counts(&before);
	check_dma();
}

/* This alone, in one kernel. */
void faults_preserve_first(void)
{
	enable();
	sweep_preserve();
	check_leaks();
}

/* Longer than any boot takes on a busy machine. */
static void wait_for_deadline(void)
{
	for (int i = 0; i < 2 * DEADLINE_MS / 100 && is_master(BDF); i++)
		usleep(100000);
}

/*
 * The device is stopped with the session. If sessions cannot be had in this kernel it is
 * stopped at its deadline.
 */
static void give_up(void)
{
	int *fds[] = { &dev, &iommufd, &memfd };

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
	if (session >= 0)
		end_session();
	else
		wait_for_deadline();
	say("%s quiesced after a failure", is_master(BDF) ? "FAIL not" : "ok");
}

/* From bound to finished. */
static void take_over(void)
{
	uint32_t frozen;

	map_bar();
	frozen = find_frozen();
	make_ioas();
	must(try_attach(ioas_id), "replace");
	check_pages();
	driver->resume();
	try_destroy(frozen, 0, "destroy the frozen HWPT");
	must(try_finish(), "finish");
	end_session();
}

void faults_boot_first(void)
{
	set_deadline(DEADLINE_MS);
}

/* From the kernel's own log: on its console characters get lost. */
static void show_steps(void)
{
	static const char mark[] = "liveupdate test: step ";
	char line[1024];
	ssize_t n;
	int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);

	check(fd, "/dev/kmsg");
	while ((n = read(fd, line, sizeof(line) - 1)) > 0) {
		char *p;

		line[n] = 0;
		line[strcspn(line, "\n")] = 0;
		p = strstr(line, mark);
		if (p)
			say("STEP %s", p + strlen(mark));
	}
	close(fd);
}

static bool everything_is_back(void)
{
	session = try_retrieve_session("dma");
	if (session < 0)
		return false;
	memfd = try_retrieve(TOK_MEM);
	iommufd = try_retrieve(TOK_IOMMUFD);
	dev = try_retrieve(TOK_DEV);
	return memfd >= 0 && iommufd >= 0 && dev >= 0 && try_bind() >= 0;
}

/* A step of early boot has failed. Either it did not matter, or the device is stopped. */
void faults_boot_next(int stage)
{
	(void)stage;
	show_steps();
	if (!everything_is_back()) {
		give_up();
		quiesced();
	}
	map_mem();
	take_over();
	run_for(1);
	finish_run();
}
