// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Every allocation of preserving and of taking back fails once, and each step of early boot
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
#include <sys/mman.h>
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
		if (mem)
			driver->take(true);
		undo();
	}
}

static void check_dma(void)
{
	driver->take(true);
	dma_goes_on();
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
	if (mem)
		munmap(mem, MEM_SIZE);
	mem = NULL;
	if (session >= 0)
		end_session();
	else
		wait_for_deadline();
	say("%s quiesced when it was given up", is_master(BDF) ? "FAIL not" : "ok");
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

static int op_retrieve_session(void)
{
	session = try_retrieve_session("dma");
	return session;
}

static int op_retrieve_memfd(void)
{
	memfd = try_retrieve(TOK_MEM);
	return memfd;
}

static int op_retrieve_iommufd(void)
{
	iommufd = try_retrieve(TOK_IOMMUFD);
	return iommufd;
}

static int op_retrieve_device(void)
{
	dev = try_retrieve(TOK_DEV);
	return dev;
}

static int op_replace(void)
{
	return try_attach(ioas_id);
}

/* It failed, and nothing has happened: the next try starts from there. */
static void undo_nothing(void)
{
}

/* For a replace that was done all the same there is a way back, as nothing is finished yet. */
static uint32_t old_hwpt;

static void undo_replace(void)
{
	must(try_attach(old_hwpt), "replace, and back");
}

/* Where the code of @function is, from @begin to @end. */
static void find_function(const char *function, unsigned long long *begin, unsigned long long *end)
{
	char line[256], name[128];
	FILE *f = fopen("/proc/kallsyms", "r");

	*begin = 0;
	while (f && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%llx %*c %127s", end, name) != 2)
			continue;
		if (*begin && *end > *begin)
			break;
		if (!strcmp(name, function))
			*begin = *end;
	}
	if (f)
		fclose(f);
	errno = ENOENT;
	check(*begin ? 0 : -1, function);
}

/* Of what @function asks for, and what it calls, nothing fails ("reject"), or nothing else ("require"). */
static void filter(const char *how, const char *function)
{
	unsigned long long at[2];

	find_function(function, &at[0], &at[1]);
	for (const char *const *dir = (const char *const []) { "failslab", "fail_page_alloc", NULL };
	     *dir; dir++) {
		char path[128], text[32];

		snprintf(path, sizeof(path), FAIL "%s/stacktrace-depth", *dir);
		must(put(path, "32"), path);
		for (int i = 0; i < 2; i++) {
			snprintf(path, sizeof(path), FAIL "%s/%s-%s", *dir, how, i ? "end" : "start");
			snprintf(text, sizeof(text), "%#llx", at[i]);
			must(put(path, text), path);
		}
	}
}

/*
 * Binding a device switches it on, for which ACPI's interpreter looks up its interrupt: it allocates
 * a thousand times and more, none of them on behalf of this series. Its allocations are not counted.
 */
static void leave_out_acpi(void)
{
	filter("reject", "pcibios_enable_device");
}

int fail_in(const char *function, int (*op)(void))
{
	int ret;

	enable();
	filter("require", function);
	arm(1);
	ret = op();
	verdict(disarm(), function, ret);
	return ret;
}

/* With all of it bound. */
static void sweep_bound(void)
{
	map_bar();
	driver->resume();
	old_hwpt = find_frozen();
	make_ioas();
	sweep("replace", op_replace, undo_replace);
	check_dma();
	check_pages();
	try_destroy(old_hwpt, 0, "destroy the frozen HWPT");
	sweep("finish", try_finish, undo_nothing);
	end_session();
	check_dma();
}

/*
 * What is done once with a device, so that a failure needs a kernel of its own, but for steps
 * that can be done @again.
 */
static const struct {
	const char *name;
	int (*op)(void);
	bool again;
} once[] = {
	{ .name = "retrieve-session", .op = op_retrieve_session, .again = true },
	{ .name = "retrieve-memfd", .op = op_retrieve_memfd },
	{ .name = "retrieve-iommufd", .op = op_retrieve_iommufd },
	{ .name = "retrieve-device", .op = op_retrieve_device },
	{ .name = "bind", .op = try_bind, .again = true },
};

#define NR_ONCE	(sizeof(once) / sizeof(once[0]))

/* The step @step with the allocation @point failing, or the next ones, too. Returns the next one. */
static unsigned int fail_once(unsigned int step, unsigned int point, int *ret)
{
	bool fired;

	do {
		arm(point);
		*ret = once[step].op();
		fired = disarm();
		if (!fired)
			return 0;
		say("FAULT %s %u: %s, the device %s", once[step].name, point++,
		    *ret < 0 ? strerror(-*ret) : "done", is_master(BDF) ? "goes on" : "is stopped");
		if (mem)
			driver->take(true);
	} while (*ret < 0 && once[step].again);
	return point;
}

/* A bind that came after one that failed has a device that was stopped; one may lack the BARs. */
static bool can_be_used(void)
{
	return can_map_bar() && is_master(BDF);
}

/* Set everything up anew, and hand it over to a kernel in which the next allocation fails. */
static void __attribute__((noreturn)) once_more(int stage, unsigned int step, unsigned int point)
{
	char add[64];

	/* QEMU's e1000e keeps its rings when it is reset by power management. */
	must(put(PCI_DEVICE BDF "/reset_method", "bus"), "reset_method");
	first(false);
	check_dma();
	snprintf(add, sizeof(add), "dma.step=%u dma.point=%u", step, point);
	load_kernel(stage + 1, 1, add);
	create_session("dma");
	preserve_all();
	do_kexec();
	die("kexec");
}

static void say_counts(bool taken)
{
	struct counts c = count_other_pages();
	char line[128];
	long total = 0;
	FILE *f = fopen("/proc/meminfo", "r");

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "MemTotal: %ld", &total) == 1)
			break;
	if (f)
		fclose(f);
	say("LEFT taken=%d pinned=%ld tables=%ld files=%ld total=%ld", taken, c.pinned, c.tables,
	    c.files, total / 4);
}

/*
 * The steps from dma.from to dma.upto are swept, point by point, kernel by kernel; what comes before
 * and after is done without a failure. Behind the last one come those that can be swept at once.
 */
void faults_retrieve_next(int stage)
{
	unsigned int step = atoi(param("dma.step", param("dma.from", "0")));
	unsigned int upto = atoi(param("dma.upto", "0")), point = atoi(param("dma.point", "1"));
	unsigned int next = 0;
	bool done;
	int ret = 0;

	enable();
	leave_out_acpi();
	/* Opened once without a failure: what is made of the handover then is not made twice. */
	close(luo());
	for (unsigned int i = 0; i < NR_ONCE && ret >= 0; i++) {
		if (i != step) {
			ret = once[i].op();
		} else {
			next = fail_once(step, point, &ret);
			if (!next) {
				must(ret, once[step].name);
				say("SWEPT %s points=%u", once[step].name, point - 1);
			}
		}
		if (ret >= 0 && once[i].op == op_retrieve_memfd)
			map_mem();
	}
	if (step == NR_ONCE) {
		must(ret, "taking all back");
		sweep_bound();
		check_leaks();
		run_for(1);
		finish_run();
	}
	if (next && ret >= 0 && !can_be_used()) {
		say("BOUND, and cannot be used");
		ret = -EIO;
	}
	done = !next && step == upto;
	if (next) {
		point = next;
	} else {
		step++;
		point = 1;
	}
	if (ret >= 0) {
		take_over();
		check_dma();
		if (done)
			finish_run();
		unmap_bar();
	}
	give_up();
	say_counts(ret >= 0);
	if (ret < 0) {
		fill_memory();
		sleep(1);
		check_filler();
	}
	once_more(stage, step, point);
}
