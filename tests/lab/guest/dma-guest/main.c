// SPDX-License-Identifier: GPL-2.0-or-later
/* PID 1: from nothing to DMA, and in the next kernel back to it. */

#include "guest.h"
#include <poll.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <linux/vfio.h>

const struct driver *driver;
const struct mode *mode;
bool stopping;
uint32_t outside;

/* Count what came on each vector since the last time; the number of vectors with some. */
static unsigned int take_irqs(uint64_t *total)
{
	unsigned int fired = 0;

	for (unsigned int i = 0; i < irqs; i++) {
		uint64_t n = irq_count(i);

		*total += n;
		fired += !!n;
	}
	return fired;
}

void run_for(double seconds)
{
	double end = now() + seconds;
	uint64_t n = 0;

	while (now() < end) {
		struct pollfd p[MAX_VECTORS];

		for (unsigned int i = 0; i < irqs; i++)
			p[i] = (struct pollfd) { .fd = irqfd[i], .events = POLLIN };
		driver->take(true);
		take_irqs(&n);
		poll(p, irqs, 5);
	}
	if (irqs && !stopping)
		say("%s irq: %llu in %.1f s", n ? "ok" : "FAIL", (unsigned long long)n, seconds);
}

void run_until_quiet(double quiet)
{
	double last = now();

	while (now() < last + quiet) {
		if (driver->take(true))
			last = now();
		usleep(5000);
	}
}

void first(bool irq)
{
	double t0;

	bind_vfio_pci(BDF);
	functions_prepare();
	show_driver();
	t0 = now();
	huge_pages(true);
	memfd = new_memfd("dma", MEM_SIZE);
	map_mem();
	memset(mem, 0, QUEUE_SIZE);
	huge_pages(!mode->small);
	memset(mem + QUEUE_SIZE, 0, MEM_SIZE - QUEUE_SIZE);
	make_large();
	iommufd = open("/dev/iommu", O_RDWR);
	check(iommufd, "/dev/iommu");
	dev = open_dev(0);
	check(dev, "open device");
	must(try_bind(), "bind");
	make_ioas();
	must(try_attach(ioas_id), "attach");
	say("SETUP cold=%.1f", (now() - t0) * 1e3);
	map_bar();
	bus_master(dev);
	if (irq) {
		const char *cpus = param("dma.cpus", "");

		if (*cpus)
			must(put("/proc/irq/default_smp_affinity", cpus), "default_smp_affinity");
		set_irqs(dev, VFIO_PCI_MSIX_IRQ_INDEX, driver->vectors);
	}
	note_pages();
	driver->start(irq);
	say("READY");
}

static void retrieve_memfd(int stage)
{
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	map_mem();
	retrieve_large();
	functions_retrieve_memory();
	say("BLACKOUT %d found=%llu", stage, (unsigned long long)driver->take(false));
}

void retrieve_iommufd(void)
{
	iommufd = try_retrieve(TOK_IOMMUFD);
	must(iommufd, "retrieve iommufd");
}

void retrieve_device(void)
{
	dev = try_retrieve(TOK_DEV);
	must(dev, "retrieve device");
}

static void retrieve_all(int stage)
{
	double t0 = now(), t1, t2;

	retrieve_session("dma");
	if (mode->reversed) {
		retrieve_device();
		retrieve_iommufd();
		retrieve_memfd(stage);
	} else {
		retrieve_memfd(stage);
		t1 = now();
		retrieve_iommufd();
		t2 = now();
		retrieve_device();
		say("SETUP memory=%.1f context=%.1f device=%.1f", (t1 - t0) * 1e3,
		    (t2 - t1) * 1e3, (now() - t2) * 1e3);
	}
}

/* The sender begins when it has heard READY. */
void wait_for_dma(void)
{
	double end = now() + 60;

	while (!driver->take(true) && now() < end)
		usleep(5000);
}

/* What is in flight completes with the vectors masked, however short the blackout was. */
static void drain(void)
{
	double last = now();

	while (now() < last + 0.5) {
		if (driver->take(false))
			last = now();
		usleep(5000);
	}
}

/*
 * What became pending in the blackout fires at its eventfd. Whether every queue had
 * something to complete is chance, except where reads were posted on each for that.
 */
static void check_pending(void)
{
	unsigned int used = mode->every_vector ? driver->vectors - 1 : 1, fired;
	uint64_t n = 0;

	usleep(200000);
	fired = take_irqs(&n);
	say("%s irq: %u of %u vectors pending from the blackout, %llu events",
	    fired >= used ? "ok" : "FAIL", fired, used, (unsigned long long)n);
	if (mode->every_vector)
		verdict(!driver->take(false), "nothing came after the vectors were set up", 0);
}

/* Any later kernel: take everything back. Without @claim as an agent does for somebody else. */
static void take_back(int stage, bool irq, bool fill, bool claim)
{
	double t0, bind, rebuild;
	uint32_t frozen_id;
	int fd, other;

	show_driver();
	if (fill)
		fill_memory();
	fd = open_dev(0);
	verdict(fd < 0 && errno == (mode->unbound ?: EBUSY), "open before retrieve",
		fd < 0 ? -errno : 0);
	if (fd >= 0)
		close(fd);
	if (mode->waiting)
		mode->waiting();

	retrieve_all(stage);
	fd = try_finish();
	verdict(fd == -EBUSY, "finish before bind", fd);
	other = open("/dev/iommu", O_RDWR);
	fd = bind_dev(dev, other);
	verdict(fd < 0, "bind to another context", fd);
	close(other);
	if (mode->dies)
		mode->bound();
	t0 = now();
	must(try_bind(), "bind");
	bind = now() - t0;
	mark_trace();
	if (claim)
		map_bar();
	functions_bind(claim);
	replace_unequal();
	if (mode->bound)
		mode->bound();
	t0 = now();
	make_ioas();
	rebuild = now() - t0;
	t0 = now();
	must(try_attach(ioas_id), "attach");
	say("replaced the frozen HWPT");
	say("SETUP bind=%.1f rebuild=%.1f replace=%.1f", bind * 1e3, rebuild * 1e3,
	    (now() - t0) * 1e3);
	if (mode->replaced)
		mode->replaced();
	check_pages();
	if (irq && claim) {
		if (mode->every_vector)
			drain();
		if (atoi(param("dma.badirq", "0")))
			fail_to_set_irqs();
		if (atoi(param("dma.fewirq", "0")))
			set_few_irqs();
		set_irqs(dev, VFIO_PCI_MSIX_IRQ_INDEX, driver->vectors);
		check_pending();
	}
	if (claim)
		driver->resume();
	for (int i = 0; i < 2 && (frozen_id = find_frozen()); i++)
		try_destroy(frozen_id, 0, "destroy the frozen HWPT");
	if (atoi(param("dma.more", "0"))) {
		driver->take(true);
		retrieve_more();
	}
	must(try_finish(), "finish");
	end_session();
	compact_memory();
	say("BACK");
}

/* Let the sender stop, take what is on its way, and say what it was. */
void finish_run(void)
{
	say("STOP");
	stopping = true;
	run_until_quiet(3);
	driver->report();
	power_off();
}

static void handover(int stage, int left, bool claimed)
{
	load_kernel(stage + 1, left - 1, param("dma.next", ""));
	create_session("dma");
	preserve_all();
	if (claimed)
		run_for(0.5);
	if (claimed && mode->last)
		mode->last();
	do_kexec();
	die("kexec");
}

static void run(int stage, int left, bool irq, bool fill)
{
	bool claim = stage == 1 || left == 0 || !atoi(param("dma.unclaimed", "0"));

	if (stage == 1) {
		first(irq);
		wait_for_dma();
		run_for(2);
		if (mode->first)
			mode->first();
	} else if (mode->next) {
		mode->next(stage);
	} else {
		take_back(stage, irq, fill, claim);
		if (claim)
			run_for(2);
		check_filler();
		if (atoi(param("dma.leaks", "0")))
			check_leaks();
	}
	if (left > 0 && !mode->stays)
		handover(stage, left, claim);
	if (mode->end)
		mode->end();
	finish_run();
}

static void find_driver(const char *name)
{
	const struct driver *all[] = { e1000e, igb, nvme };

	for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
		if (!strcmp(all[i]->name, name))
			driver = all[i];
	errno = ENODEV;
	if (!driver)
		die(name);
}

static void mount_all(void)
{
	int fd;

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("lab", "/lab", "9p", 0, "trans=virtio,version=9p2000.L");
	fd = open("/dev/ttyS1", O_RDWR);
	if (fd >= 0) {
		dup2(fd, 1);
		dup2(fd, 2);
	}
	fd = open("/proc/cmdline", O_RDONLY);
	check(read(fd, cmdline, sizeof(cmdline) - 1), "cmdline");
	close(fd);
}

/* Wait for the child that does everything, and must not come to its end. */
static void outlive(pid_t child)
{
	int status;

	check(waitpid(child, &status, 0), "waitpid");
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
		say("FAIL the child was not killed: status %#x", status);
		power_off();
	}
	say("QUIESCED");
	fill_memory();
	sleep(3);
	check_filler();
	power_off();
}

int main(void)
{
	unsigned long long begin = counter();
	int stage, left;
	pid_t child;

	if (getpid() != 1)
		modules_hang();
	mount_all();
	if (!access("/proc/vmcore", F_OK))
		crashed();
	stage = atoi(param("dma.stage", "1"));
	left = atoi(param("dma.left", param("dma.kexecs", "1")));
	mode = find_mode(param("dma.mode", "run"));
	find_driver(param("dma.device", "e1000e"));
	iommu = !access("/sys/class/iommu/dmar0", F_OK) ||
		!access("/sys/class/iommu/ivhd0", F_OK);
	mem_iova = strtoull(param("dma.iova", "0x100000000"), NULL, 0);
	outside = atoi(param("dma.outside", "0"));
	say("STAGE %d left %d mode %s device %s counter=%llu", stage, left, mode->name, driver->name,
	    begin);

	if (mode->dies && left == 0) {
		child = fork();
		check(child, "fork");
		if (child)
			outlive(child);
	}
	modules_start(stage);
	run(stage, left, atoi(param("dma.irq", "0")), atoi(param("dma.fill", "0")));
}
