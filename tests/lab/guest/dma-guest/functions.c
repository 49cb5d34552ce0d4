// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The device has a second function, which is in the same IOMMU group if there is an IOMMU.
 *
 * Both are bound to one context and attached to one HWPT, and each has a ring in a memfd of
 * its own, at a place of its own in the IOAS. What drives a device knows of one: turn() makes
 * the other function the one that all globals are about, and a driver that looks like one
 * drives both.
 */

#include "guest.h"
#include <linux/iommufd.h>

#define BDF_SIBLING	"0000:01:00.1"
#define IOVA_SIBLING	(1ull << 32)	/* from the memory of the one to that of the other */

struct function {
	uint8_t *mem;
	struct state *st;
	int memfd;
	uint64_t iova;
	int dev;
	uint32_t dev_id;
	volatile uint8_t *bar;
};

static struct function other = { .memfd = -1, .dev = -1 };
static const struct driver *one;
static struct driver both;

static void turn(void)
{
	struct function f = {
		.mem = mem, .st = st, .memfd = memfd, .iova = mem_iova,
		.dev = dev, .dev_id = dev_id, .bar = bar,
	};

	mem = other.mem;
	st = other.st;
	memfd = other.memfd;
	mem_iova = other.iova;
	dev = other.dev;
	dev_id = other.dev_id;
	bar = other.bar;
	other = f;
}

static bool used(void)
{
	return !strncmp(mode->name, "functions", strlen("functions"));
}

static uint64_t take_both(bool give)
{
	uint64_t n;

	driver = one;
	n = driver->take(give);
	turn();
	if (mem)
		n += driver->take(give);
	turn();
	driver = &both;
	return n;
}

static void resume_both(void)
{
	driver = one;
	driver->resume();
	turn();
	driver->resume();
	turn();
	driver = &both;
}

static void report_both(void)
{
	driver = one;
	driver->report();
	turn();
	driver->report();
	turn();
	driver = &both;
}

static void drive_both(void)
{
	one = driver;
	both = *one;
	both.take = take_both;
	both.resume = resume_both;
	both.report = report_both;
	driver = &both;
}

/* Before the first function is bound to a context: their group is VFIO's as a whole or not at all. */
void functions_prepare(void)
{
	if (used())
		bind_vfio_pci(BDF_SIBLING);
}

void functions_first(void)
{
	other.iova = mem_iova + IOVA_SIBLING;
	other.memfd = new_memfd("sibling", MEM_SIZE);
	turn();
	map_mem();
	memset(mem, 0, MEM_SIZE);
	dev = open_dev(1);
	check(dev, "open second function");
	must(try_bind(), "bind second function");
	must(try_map_file(ioas_id, memfd, 0, MEM_SIZE, mem_iova), "map second memfd");
	must(try_attach(ioas_id), "attach second function");
	map_bar();
	bus_master(dev);
	note_pages();
	driver->start(false);
	turn();
	drive_both();
	say("BOTH");
	run_for(1);
}

/* Somebody else uses the second function, which can be reset with all that is on its bus only. */
static int sibling;

static void open_sibling(int ctx)
{
	bind_vfio_pci(BDF_SIBLING);
	must(put(PCI_DEVICE BDF_SIBLING "/reset_method", "\n"), "reset_method");
	sibling = open_dev(1);
	check(sibling, "open second function");
	must(bind_dev(sibling, ctx), "bind second function");
}

static void reset_by_sibling(const char *what)
{
	int ret = try_hot_reset(sibling);

	verdict(ret == -ENODEV, what, ret);
}

/* In one context, so that VFIO lets the one reset the other. */
void sibling_first(void)
{
	open_sibling(iommufd);
}

void sibling_last(void)
{
	reset_by_sibling("hot reset while preserved");
}

/* When it is closed VFIO would reset both, as nobody else has either open. */
void sibling_waiting(void)
{
	int ctx = open("/dev/iommu", O_RDWR);

	check(ctx, "/dev/iommu");
	open_sibling(ctx);
	reset_by_sibling("hot reset before retrieve");
	close(sibling);
	close(ctx);
}

/* With that of the device, before the context. */
void functions_preserve_memory(void)
{
	if (used() && other.memfd >= 0)
		must(try_preserve(other.memfd, TOK_MEM2), "preserve second memfd");
}

void functions_last(void)
{
	must(try_preserve(other.dev, TOK_DEV2), "preserve second function");
}

/* A function that is attached and would not go along, nor be detached from what does. */
void functions_left_first(void)
{
	int ret;

	functions_first();
	load_kernel(2, 0, "");
	create_session("dma");
	preserve_all();
	failing_reboot("reboot with a function that is not preserved", EBUSY);
	verdict(refusal() == IOMMU_LIVEUPDATE_DEVICE_NOT_PRESERVED, "the reason for that", 0);
	functions_last();
	run_for(0.5);
	end_session();

	create_session("dma");
	preserve_all();
	ret = try_detach(other.dev);
	verdict(ret == -EBUSY, "detach while the context is preserved", ret);
	end_session();
	run_for(1);
}

static void retrieve_memory(void)
{
	other.iova = mem_iova + IOVA_SIBLING;
	other.memfd = try_retrieve(TOK_MEM2);
	must(other.memfd, "retrieve second memfd");
}

void functions_retrieve_memory(void)
{
	if (!used())
		return;
	retrieve_memory();
	turn();
	map_mem();
	turn();
	drive_both();
}

void functions_map(uint32_t ioas)
{
	if (used() && other.memfd >= 0)
		must(try_map_file(ioas, other.memfd, 0, MEM_SIZE, other.iova), "map second memfd");
}

/* The first function is bound, and would take the other one along. */
static void move_one(void)
{
	int ret;

	if (!iommu)
		return;
	make_ioas();
	ret = try_attach(ioas_id);
	verdict(ret == -EBUSY && refusal() == IOMMU_LIVEUPDATE_GROUP,
		"replace with a function that is not bound", ret);
	try_destroy(ioas_id, 0, "destroy the IOAS");
}

void functions_bind(bool claim)
{
	if (!used())
		return;
	move_one();
	other.dev = try_retrieve(TOK_DEV2);
	must(other.dev, "retrieve second function");
	move_one();
	turn();
	must(try_bind(), "bind second function");
	if (claim)
		map_bar();
	turn();
}

/* Behind an IOMMU both have moved with the first one, and go back and forth with the other. */
void functions_replaced(void)
{
	uint32_t frozen = find_frozen();

	must(attach_dev(other.dev, ioas_id), "attach second function");
	turn();
	check_pages();
	turn();
	run_for(0.2);
	if (!iommu)
		return;
	must(attach_dev(other.dev, frozen), "move both back");
	run_for(0.2);
	try_destroy(frozen, -EBUSY, "destroy the frozen HWPT in use");
	must(try_attach(ioas_id), "move both again");
}

static void retrieve_memories(void)
{
	retrieve_session("dma");
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	retrieve_memory();
}

/* With the session. */
static void end_memories(void)
{
	close(memfd);
	close(other.memfd);
	end_session();
}

/* One function is bound, the other one never: both have to be stopped. */
void functions_unbound_next(int stage)
{
	(void)stage;
	retrieve_memories();
	retrieve_iommufd();
	retrieve_device();
	must(try_bind(), "bind");
	move_one();
	say("%s the second function runs", is_master(BDF_SIBLING) ? "ok" : "FAIL");
	close(dev);
	close(iommufd);
	end_memories();
	say("%s the first function is stopped", is_master(BDF) ? "FAIL" : "ok");
	say("%s the second function is stopped", is_master(BDF_SIBLING) ? "FAIL" : "ok");
	quiesced();
}

/*
 * Opening the first function fails when it is bound already, and what is undone then takes the
 * translation from both. The second one was never opened, and has to be stopped before.
 */
void functions_fail_next(int stage)
{
	int ret;

	(void)stage;
	retrieve_memories();
	retrieve_iommufd();
	retrieve_device();
	ret = fail_in("vfio_config_init", try_bind);
	verdict(ret == -ENOMEM, "bind with no memory for it", ret);
	say("%s the second function is stopped", is_master(BDF_SIBLING) ? "FAIL" : "ok");
	say("%s the first function is stopped", is_master(BDF) ? "FAIL" : "ok");
	close(dev);
	close(iommufd);
	end_memories();
	quiesced();
}

static void not_there(uint64_t token, const char *bdf)
{
	int ret = try_retrieve(token);

	say("%s %s is stopped", is_master(bdf) ? "FAIL" : "ok", bdf);
	verdict(ret == -ENODEV, "retrieve a function that was stopped", ret);
}

/* One function cannot be taken over by the IOMMU: both have to be stopped. */
void functions_stopped_next(int stage)
{
	(void)stage;
	retrieve_memories();
	not_there(TOK_DEV, BDF);
	not_there(TOK_DEV2, BDF_SIBLING);
	end_memories();
	quiesced();
}

/* The other function was stopped when it was found: the first goes on, and moves alone. */
void functions_lost_next(int stage)
{
	retrieve_memories();
	map_mem();
	say("BLACKOUT %d found=%llu", stage, (unsigned long long)driver->take(false));
	not_there(TOK_DEV2, BDF_SIBLING);
	retrieve_iommufd();
	retrieve_device();
	must(try_bind(), "bind");
	make_ioas();
	must(try_attach(ioas_id), "attach");
	map_bar();
	driver->resume();
	try_destroy(find_frozen(), 0, "destroy the frozen HWPT");
	must(try_finish(), "finish");
	end_session();
	run_for(2);
}

void functions_deadline_first(void)
{
	functions_first();
	set_deadline(20000);
	turn();
	set_deadline(5000);
	turn();
}

/* Nobody comes, and the second function is stopped first. The other one is, much later. */
void functions_deadline_next(int stage)
{
	(void)stage;
	for (int i = 0; i < 1500 && is_master(BDF_SIBLING); i++)
		usleep(10000);
	say("ONE is stopped: %s the second, %s the first runs", is_master(BDF_SIBLING) ? "FAIL" : "ok",
	    is_master(BDF) ? "ok" : "FAIL");
	for (int i = 0; i < 2500 && is_master(BDF); i++)
		usleep(10000);
	say("%s the first function is stopped", is_master(BDF) ? "FAIL" : "ok");
	quiesced();
}
