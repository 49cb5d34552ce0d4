// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Modes: what is tried instead of, or beside, the plain run. Each ends in a state that
 * the live update defines: the device restored, the device quiesced, or a refusal.
 */

#include "guest.h"
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <linux/falloc.h>
#include <linux/iommufd.h>
#include <linux/kexec.h>
#include <linux/liveupdate.h>
#include <linux/reboot.h>
#include <linux/vfio.h>

#ifndef VFIO_DEVICE_FEATURE_LIVEUPDATE
#define VFIO_DEVICE_FEATURE_LIVEUPDATE 14
struct vfio_device_feature_liveupdate {
	__u32 flags;
	__u32 deadline_ms;
};
#endif

/* The device does nothing any more; memory that it could reach may be used by others. */
void __attribute__((noreturn)) quiesced(void)
{
	say("QUIESCED");
	fill_memory();
	sleep(3);
	check_filler();
	power_off();
}

/*
 * The control: memory alone is preserved, as on an unpatched kernel. The packets
 * that did not land are what everything else here is for.
 */
static void control_first(void)
{
	load_kernel(2, 0, "");
	create_session("dma");
	must(try_preserve(memfd, TOK_MEM), "preserve memfd");
	run_for(0.5);
	do_kexec();
	die("kexec");
}

/* Look at the memory, and leave everything else as it is. */
static void control_next(int stage)
{
	retrieve_session("dma");
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	map_mem();
	say("BLACKOUT %d found=%llu", stage, (unsigned long long)driver->take(false));
	say("STOP");
	run_until_quiet(1);
	driver->report();
	power_off();
}

/* A kernel that cannot go on with the device, or was told not to, has stopped it. */
static void stopped_next(int stage)
{
	int ret;

	show_driver();
	say("%s the device is stopped", is_master(BDF) ? "FAIL" : "ok");
	retrieve_session("dma");
	ret = try_retrieve(TOK_DEV);
	verdict(ret == -ENODEV, "retrieve a device that was stopped", ret);
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve its memory");
	map_mem();
	say("BLACKOUT %d found=%llu", stage, (unsigned long long)driver->take(false));
	sleep(2);
	say("STOP");
	run_until_quiet(1);
	driver->report();
	end_session();
	quiesced();
}

/* What must not be done to a device that has to keep running. */
static void disturb(const char *when)
{
	static const struct {
		const char *path, *value;
		int error;
	} files[] = {
		{ PCI_DEVICE BDF "/remove", "1", EBUSY },
		{ PCI_DEVICE BDF "/reset", "1", EBUSY },
		{ PCI_DEVICE BDF "/sriov_numvfs", "2", EBUSY },
		{ PCI_DEVICE "0000:00:10.0/remove", "1", EBUSY },
		{ PCI_DEVICE "0000:00:10.0/reset_subordinate", "1", ENOTTY },
		{ "/sys/power/state", "freeze", EBUSY },
	};
	char what[128];
	int ret;

	for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
		if (access(files[i].path, F_OK)) {
			say("note: no %s", files[i].path);
			continue;
		}
		ret = put(files[i].path, files[i].value);
		snprintf(what, sizeof(what), "%s %s", files[i].path, when);
		verdict(ret == -files[i].error, what, ret);
	}
	say("%s D3hot %s", goes_to_d3hot() ? "FAIL" : "ok no", when);
}

/* Preserve, then abort: the device goes on as if nothing had happened. */
static void abort_first(void)
{
	int ret;

	create_session("dma");
	preserve_all();
	ret = try_attach(ioas_id);
	verdict(ret == -EBUSY, "attach while preserved", ret);
	ret = ioctl(dev, VFIO_DEVICE_RESET) ? -errno : 0;
	verdict(ret == -EBUSY, "reset while preserved", ret);
	if (has_flr()) {
		ret = try_flr();
		verdict(ret == -EBUSY, "FLR while preserved", ret);
	}
	disturb("while preserved");
	run_for(1);
	end_session();
	say("aborted");
	run_for(1);
	ret = try_attach(ioas_id);
	verdict(ret == 0, "attach after abort", ret);
}

/* Within ten seconds, on a host that may be busy. */
void dma_goes_on(void)
{
	bool on = false;

	for (int i = 0; i < 2000 && !on; i++) {
		on = driver->take(true);
		if (!on)
			usleep(5000);
	}
	say("%s DMA after that", on ? "ok" : "FAIL no");
}

/* reboot(2) that must fail, with the device going on as if nothing had happened. */
void failing_reboot(const char *why, int error)
{
	int ret;

	driver->take(true);
	ret = reboot(LINUX_REBOOT_CMD_KEXEC) ? -errno : 0;
	verdict(ret == -error, why, ret);
	dma_goes_on();
	run_for(1);
}

/* An image that kexec_load(2) has loaded gets no handover data. */
static void kexecload_first(void)
{
	static char page[PAGE] __attribute__((aligned(PAGE)));
	struct kexec_segment segment = {
		.buf = page, .bufsz = PAGE, .mem = (void *)(128ul << 20), .memsz = PAGE,
	};

	create_session("dma");
	preserve_all();
	check(syscall(SYS_kexec_load, segment.mem, 1, &segment, KEXEC_ARCH_DEFAULT),
	      "kexec_load");
	failing_reboot("reboot, loaded by kexec_load(2)", ENOEXEC);
	end_session();
}

/* There is nothing to lose, so that any kernel can be booted. */
static void nofiles_first(void)
{
	create_session("nofiles");
	load_kernel(2, 0, "kho=off");
	do_kexec();
	die("kexec");
}

static void nofiles_next(int stage)
{
	say("ok kernel %d runs", stage);
	say("STOP");
	power_off();
}

struct second {
	int memfd, ctx, dev;
};

/* The other device, with a context and memory of its own; no DMA, but a bus master. */
static struct second second_device(void)
{
	int first_ctx = iommufd;
	struct second s;
	uint32_t ioas;

	bind_vfio_pci(BDF2);
	s.memfd = new_memfd("second", MEM_SIZE);
	s.dev = open_dev(1);
	check(s.dev, "open second device");
	s.ctx = iommufd = open("/dev/iommu", O_RDWR);
	check(s.ctx, "/dev/iommu");
	must(bind_dev(s.dev, s.ctx), "bind second device");
	ioas = alloc_ioas();
	must(try_map_file(ioas, s.memfd, 0, MEM_SIZE, mem_iova), "map second memfd");
	must(attach_dev(s.dev, ioas), "attach second device");
	bus_master(s.dev);
	iommufd = first_ctx;
	return s;
}

static void preserve_second(const struct second *s)
{
	int ret;

	ret = try_preserve(s->dev, TOK_DEV);
	verdict(ret == -ENOENT, "preserve the device without its context", ret);
	ret = try_preserve(s->ctx, TOK_IOMMUFD);
	verdict(ret == -EOPNOTSUPP, "preserve the context without its memory", ret);
	must(try_preserve(s->memfd, TOK_MEM), "preserve second memfd");
	must(try_preserve(s->ctx, TOK_IOMMUFD), "preserve second iommufd");
	must(try_preserve(s->dev, TOK_DEV), "preserve second device");
}

static void low_power(uint32_t feature)
{
	struct vfio_device_feature f = {
		.argsz = sizeof(f), .flags = VFIO_DEVICE_FEATURE_SET | feature,
	};

	check(ioctl(dev, VFIO_DEVICE_FEATURE, &f), "low power");
}

/*
 * A freeze that fails. The user asks for low power after the preserve. The device of a second
 * session starts to use INTx after it was preserved, so that its freeze refuses, after the first
 * session was frozen.
 */
static void freezefail_first(void)
{
	int first, second, ret;
	struct second s;

	create_session("dma");
	preserve_all();
	first = session;

	load_kernel(2, 0, "liveupdate=off");
	failing_reboot("reboot, next kernel without liveupdate", ENOEXEC);
	load_kernel(2, 0, "kho=off");
	failing_reboot("reboot, next kernel without kho", ENOEXEC);
	load_kernel(2, 0, "elfcorehdr=0x1000");
	failing_reboot("reboot, next kernel as a crash kernel", ENOEXEC);
	load_kernel(2, 0, "movablecore=64M");
	failing_reboot("reboot, next kernel with ZONE_MOVABLE", ENOEXEC);
	load_unaware_kernel();
	failing_reboot("reboot, next kernel that knows nothing of devices", ENOEXEC);

	load_kernel(2, 0, "");
	low_power(VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY);
	ret = reboot(LINUX_REBOOT_CMD_KEXEC) ? -errno : 0;
	verdict(ret == -EOPNOTSUPP, "reboot in low power", ret);
	low_power(VFIO_DEVICE_FEATURE_LOW_POWER_EXIT);
	dma_goes_on();

	s = second_device();
	create_session("second");
	preserve_second(&s);
	second = session;
	set_irqs(s.dev, VFIO_PCI_INTX_IRQ_INDEX, 1);
	load_kernel(2, 0, "");
	use_while_frozen();
	for (int i = 0; i < 30 && !used_while_frozen(); i++)
		failing_reboot("reboot, INTx in the second session", EOPNOTSUPP);
	was_used_while_frozen();
	close(second);
	close(first);
	session = -1;
	first = try_attach(ioas_id);
	verdict(first == 0, "attach after abort", first);
}

static int shorter(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x > y) - (x < y);
}

/*
 * Go to and fro between two equal HWPTs, under DMA all the time: as often as asked for, and for
 * a second at least, as packets come at a rate of their own. Of the times the median is told,
 * too: now and then the host has something else to do.
 */
static void replace_first(void)
{
	enum { TIMES = 1 << 18 };
	static float times[TIMES];
	uint32_t hwpt[2] = { alloc_hwpt(dev_id, 0), alloc_hwpt(dev_id, 0) };
	uint32_t want = atoi(param("dma.replaces", "1000")), n, timed;
	double t0, spent = 0, t;

	show_hitless();
	say("REPLACING");
	t0 = now();
	for (n = 0; n < want || now() - t0 < 1; n++) {
		t = now();
		must(try_attach(hwpt[n & 1]), "replace");
		t = now() - t;
		spent += t;
		times[n % TIMES] = t;
		driver->take(true);
	}
	t = now() - t0;
	timed = n < TIMES ? n : TIMES;
	qsort(times, timed, sizeof(times[0]), shorter);
	say("REPLACED n=%u ms=%.0f replace_us=%.1f median_us=%.1f", n, t * 1e3, spent * 1e6 / n,
	    times[timed / 2] * 1e6);
}

/* Finish without retrieving: the device has to be stopped. */
static void noretrieve_next(int stage)
{
	int ret;

	(void)stage;
	retrieve_session("dma");
	ret = try_finish();
	verdict(ret == -EBUSY, "finish without retrieving", ret);
	end_session();
	quiesced();
}

/* Retrieved, never bound, everything closed. */
static void lastclose_next(int stage)
{
	(void)stage;
	retrieve_session("dma");
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	retrieve_device();
	close(dev);
	close(memfd);
	end_session();
	quiesced();
}

static int try_abandon(void)
{
	struct liveupdate_ioctl_abandon_session abandon = {
		.size = sizeof(abandon), .name = "dma",
	};
	int fd = luo(), ret;

	ret = ioctl(fd, LIVEUPDATE_IOCTL_ABANDON_SESSION, &abandon) ? -errno : 0;
	close(fd);
	return ret;
}

/* Given up without having been retrieved. */
static void abandon_next(int stage)
{
	int fd;

	(void)stage;
	must(try_abandon(), "ABANDON_SESSION");
	fd = try_abandon();
	verdict(fd == -ENOENT, "abandon again", fd);
	fd = open_dev(0);
	verdict(fd >= 0, "open after that", fd < 0 ? -errno : 0);
	quiesced();
}

static void retrieve_workload(void)
{
	retrieve_session("dma");
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	retrieve_iommufd();
	retrieve_device();
}

/* Its user is in control of the device again, and nothing is finished. */
static void take_control(void)
{
	retrieve_workload();
	map_mem();
	must(try_bind(), "bind");
	dma_goes_on();
}

/* Another kexec, with the session of the first one not retrieved. */
static void second_next(int stage)
{
	if (stage == 2) {
		load_kernel(3, 0, "");
		do_kexec();
		die("kexec");
	}
	show_driver();
	say("%s the device is stopped", is_master(BDF) ? "FAIL" : "ok");
	quiesced();
}

static void second_retrieved_next(int stage)
{
	if (stage == 2)
		retrieve_workload();
	second_next(stage);
}

/* What is not finished cannot be handed on. */
static void second_bound_next(int stage)
{
	int incoming, ret;

	if (stage == 2) {
		take_control();
		incoming = session;
		create_session("again");
		ret = try_preserve(memfd, TOK_MEM);
		verdict(ret == -EBUSY, "preserve memory again before the finish", ret);
		end_session();
		session = incoming;
	}
	second_next(stage);
}

/* How long the next kernel waits for somebody to come for the device. */
void set_deadline(uint32_t ms)
{
	char buf[sizeof(struct vfio_device_feature) +
		 sizeof(struct vfio_device_feature_liveupdate)];
	struct vfio_device_feature_liveupdate lu = { .deadline_ms = ms };
	struct vfio_device_feature *f = (void *)buf;

	*f = (struct vfio_device_feature) {
		.argsz = sizeof(buf),
		.flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LIVEUPDATE,
	};
	memcpy(f->data, &lu, sizeof(lu));
	check(ioctl(dev, VFIO_DEVICE_FEATURE, f), "FEATURE");
}

static void deadline_first(void)
{
	set_deadline(15000);
}

void deadline_next(int stage)
{
	(void)stage;
	say("waiting for the deadline");
	sleep(20);
	quiesced();
}

/* Who cannot be told the answer has not retrieved the session, either. */
static void retrieve_unheard(void)
{
	struct liveupdate_ioctl_retrieve_session *get;
	int fd = luo(), ret;

	get = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (get == MAP_FAILED)
		die("mmap");
	*get = (struct liveupdate_ioctl_retrieve_session) { .size = sizeof(*get), .name = "dma" };
	check(mprotect(get, PAGE, PROT_READ), "mprotect");
	ret = ioctl(fd, LIVEUPDATE_IOCTL_RETRIEVE_SESSION, get) ? -errno : 0;
	verdict(ret == -EFAULT, "retrieve the session, with no room for the answer", ret);
	munmap(get, PAGE);
	close(fd);
}

/* While it waits, others try to get at the device. */
static void hostile_waiting(void)
{
	int ret;

	disturb("before retrieve");
	retrieve_unheard();
	ret = put(PCI_DEVICE BDF "/enable", "0");
	say("note: disable before retrieve: %s", ret ? strerror(-ret) : "done");
	must(put("/sys/bus/pci/rescan", "1"), "rescan");
	must(put(PCI_DEVICE BDF "/driver/unbind", BDF), "unbind");
	must(put("/sys/bus/pci/drivers_probe", BDF), "drivers_probe");
	ret = put(PCI_DEVICE BDF "/driver_override", "pcieport");
	say("note: driver_override before retrieve: %s", ret ? strerror(-ret) : "done");
}

/* The new owner of the memory cannot take it away from under the frozen HWPT. */
static void hostile_bound(void)
{
	int ret;

	ret = ftruncate(memfd, PAGE) ? -errno : 0;
	verdict(ret == -EPERM, "truncate under a frozen HWPT", ret);
	ret = fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, MEM_SIZE) ?
		-errno : 0;
	verdict(ret == -EPERM, "punch under a frozen HWPT", ret);
	ret = madvise(mem + BUF_OFF, BUF_SIZE, MADV_REMOVE) ? -errno : 0;
	verdict(ret == -EPERM, "madvise under a frozen HWPT", ret);
}

/* Killed at one of three points: the kernel closes everything, in its own order. */
static void killed_retrieved(void)
{
	raise(SIGKILL);
}

static void killed_bound(void)
{
	if (!bar)
		return;
	raise(SIGKILL);
}

/* In the old kernel there is nothing to come back to: an ordinary last close. */
static void killed_preserved(void)
{
	create_session("dma");
	preserve_all();
	raise(SIGKILL);
}

/*
 * Others use the pages that were the buffers of the memory @fd, if they are free. What counts
 * is whether the device, which goes on or not, writes into memory of others.
 */
static void __attribute__((noreturn)) reuse_buffers(int fd)
{
	fill_freed_memory(fd);
	sleep(3);
	say("QUIESCED");	/* or not: the words about memory tell */
	check_filler();
	power_off();
}

/* The owner of the memory @fd takes the buffers away, if that can be done. */
static void __attribute__((noreturn)) take_buffers_away(int fd)
{
	int ret = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, BUF_OFF, BUF_SIZE) ?
		-errno : 0;

	say("note: punch: %s", strerror(-ret));
	reuse_buffers(fd);
}

static void punched_next(int stage)
{
	(void)stage;
	retrieve_session("dma");
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	take_buffers_away(memfd);
}

/* Compaction may not move what the device uses: before the bind, and after it. */
static void compacted_next(int stage)
{
	(void)stage;
	retrieve_workload();
	compact_memory();
	must(try_bind(), "bind");
	compact_memory();
	reuse_buffers(memfd);
}

/*
 * The frozen HWPT is to be replaced by one that leads elsewhere, and the buffers that it
 * led to are to be let go. What does not work is only said: what counts is whether the
 * device then writes into memory of others.
 */
static void unequal_next(int stage)
{
	struct iommu_destroy d = { .size = sizeof(d) };
	int old, ret;

	retrieve_workload();
	must(try_bind(), "bind");
	d.id = find_frozen();

	old = memfd;
	memfd = new_memfd("elsewhere", MEM_SIZE);
	make_ioas();
	ret = try_attach(ioas_id);
	say("UNEQUAL %d", ret);
	if (iommu)
		watch_ring(old);
	ret = ioctl(iommufd, IOMMU_DESTROY, &d) ? -errno : 0;
	say("note: destroy the frozen HWPT of stage %d: %s", stage, strerror(-ret));
	ret = try_finish();
	say("note: finish: %s", strerror(-ret));
	take_buffers_away(old);
}

/* Nothing in flight but these reads: their interrupts come in the blackout, or never. */
static void pending_first(void)
{
	stopping = true;
	run_until_quiet(2);
}

static void pending_last(void)
{
	/* In turn, and with time for QEMU, which serves one queue to its end. */
	for (uint32_t n = 1; n <= NVME_PENDING; n++) {
		nvme_post(n);
		usleep(2000);
	}
}

uint32_t refusal(void)
{
	struct iommu_liveupdate_status status = { .size = sizeof(status) };

	check(ioctl(iommufd, IOMMU_LIVEUPDATE_STATUS, &status), "LIVEUPDATE_STATUS");
	return status.out_reason;
}

/* Preserving the context must be refused for @reason; the memfd @also goes along. */
static void refused(const char *what, int also, uint32_t reason)
{
	uint32_t got;
	int ret;

	create_session("dma");
	must(try_preserve(memfd, TOK_MEM), "preserve memfd");
	if (also >= 0)
		must(try_preserve(also, TOK_DEV + 1), "preserve other memfd");
	ret = try_preserve(iommufd, TOK_IOMMUFD);
	got = refusal();
	say("%s preserve with %s: %s, reason %u", ret == -EOPNOTSUPP && got == reason ?
	    "ok" : "FAIL", what, ret ? strerror(-ret) : "done", got);
	end_session();
}

static void unmap(uint64_t iova, uint64_t length)
{
	struct iommu_ioas_unmap unmap = {
		.size = sizeof(unmap), .ioas_id = ioas_id, .iova = iova, .length = length,
	};

	check(ioctl(iommufd, IOMMU_IOAS_UNMAP, &unmap), "IOAS_UNMAP");
}

static void refuse_user_memory(uint64_t iova)
{
	struct iommu_ioas_map map = {
		.size = sizeof(map),
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE |
			 IOMMU_IOAS_MAP_WRITEABLE,
		.ioas_id = ioas_id, .length = PAGE, .iova = iova,
	};
	void *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	map.user_va = (uintptr_t)p;
	check(ioctl(iommufd, IOMMU_IOAS_MAP, &map), "IOAS_MAP");
	refused("user memory", -1, IOMMU_LIVEUPDATE_BACKING_USER);
	unmap(iova, PAGE);
	munmap(p, PAGE);
}

static void refuse_other_memfd(uint64_t iova)
{
	/* Two huge pages: what is punched is a whole folio, a part of one is only zeroed. */
	const uint64_t size = 4u << 20;
	int fd = new_memfd("other", size);

	must(try_map_file(ioas_id, fd, 0, size, iova), "map other memfd");
	refused("a memfd that is not in the session", -1,
		IOMMU_LIVEUPDATE_BACKING_NOT_PRESERVED);
	must(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, size / 2) ?
	     -errno : 0, "punch a hole");
	refused("a hole punched after it was mapped", fd, IOMMU_LIVEUPDATE_BACKING_STALE);
	unmap(iova, size);
	close(fd);
}

/* A BAR of the device as a DMABUF, or a negative errno. */
static int export_bar(void)
{
	char buf[sizeof(struct vfio_device_feature) +
		 sizeof(struct vfio_device_feature_dma_buf) +
		 sizeof(struct vfio_region_dma_range)] = {};
	struct vfio_device_feature *f = (void *)buf;
	struct vfio_device_feature_dma_buf *d = (void *)f->data;
	int fd;

	f->argsz = sizeof(buf);
	f->flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF;
	d->region_index = VFIO_PCI_BAR0_REGION_INDEX;
	d->open_flags = O_RDWR | O_CLOEXEC;
	d->nr_ranges = 1;
	d->dma_ranges[0].length = PAGE;
	fd = ioctl(dev, VFIO_DEVICE_FEATURE, f);
	return fd < 0 ? -errno : fd;
}

/* If this mode can map it at all. */
static void refuse_dmabuf(uint64_t iova)
{
	int fd = export_bar(), ret;

	if (fd < 0) {
		say("note: no DMABUF of a BAR: %s", strerror(-fd));
		return;
	}
	ret = try_map_file(ioas_id, fd, 0, PAGE, iova);
	if (ret) {
		say("note: no mapping of a DMABUF: %s", strerror(-ret));
	} else {
		refused("a DMABUF", -1, IOMMU_LIVEUPDATE_BACKING_DMABUF);
		unmap(iova, PAGE);
	}
	create_session("dma");
	must(try_preserve(memfd, TOK_MEM), "preserve memfd");
	must(try_preserve(iommufd, TOK_IOMMUFD), "preserve iommufd");
	ret = try_preserve(dev, TOK_DEV);
	verdict(ret == -EOPNOTSUPP, "preserve a device with a BAR that is exported", ret);
	end_session();
	close(fd);

	create_session("dma");
	preserve_all();
	fd = export_bar();
	must(fd, "export a BAR of a preserved device");
	load_kernel(2, 0, "");
	failing_reboot("reboot with a BAR that was exported since", EOPNOTSUPP);
	end_session();
	close(fd);
}

/*
 * Devices that are refused, by name: all are attached, and the first one goes on with DMA
 * beside them. @bdfs: those that are attached to one IOAS; @vf: virtual functions of the first.
 */
static void refuse_devices(const char *what, const char *const *bdfs, bool vf, uint32_t reason)
{
	static int nr = 1;
	int ctx = iommufd, fds[2], mem_fd = memfd, n = 0;
	uint32_t ioas;

	iommufd = open("/dev/iommu", O_RDWR);
	check(iommufd, "/dev/iommu");
	memfd = new_memfd("refused", PAGE);
	ioas = alloc_ioas();
	must(try_map_file(ioas, memfd, 0, PAGE, mem_iova), "map memfd");
	for (; bdfs[n]; n++) {
		bind_vfio_pci(bdfs[n]);
		fds[n] = open_dev(nr++);
		check(fds[n], bdfs[n]);
		must(vf ? bind_vf(fds[n], iommufd, dev) : bind_dev(fds[n], iommufd), bdfs[n]);
		must(attach_dev(fds[n], ioas), bdfs[n]);
	}
	refused(what, -1, reason);
	while (n)
		close(fds[--n]);
	close(iommufd);
	close(memfd);
	iommufd = ctx;
	memfd = mem_fd;
}

static void refused_devices_first(void)
{
	static const char *const ats[] = { "0000:02:00.0", NULL };
	static const char *const function[] = { "0000:03:00.0", NULL };
	static const char *const alias[] = { "0000:05:01.0", NULL };

	refuse_devices("a device with ATS", ats, false, IOMMU_LIVEUPDATE_DEVICE_ATS);
	refuse_devices("one of two devices of a group", function, false, IOMMU_LIVEUPDATE_GROUP);
	refuse_devices("a device behind a PCI bridge", alias, false, IOMMU_LIVEUPDATE_DRIVER);
	run_for(1);
	create_session("dma");
	preserve_all();
	end_session();
}

static void refuse_pasid(void)
{
	struct vfio_device_attach_iommufd_pt attach = {
		.argsz = sizeof(attach), .flags = VFIO_DEVICE_ATTACH_PASID,
		.pt_id = ioas_id, .pasid = 1,
	};
	int ret = ioctl(dev, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach) ? -errno : 0;

	/* There are none without an IOMMU; where there are, preserving refuses. */
	verdict(ret < 0, "attach a PASID", ret);
}

/* Kept for IOMMUs that cannot switch without a gap. No kernel does it so far. */
static void refuse_adopt(void)
{
	struct vfio_device_attach_iommufd_pt attach = {
		.argsz = sizeof(attach),
		.flags = VFIO_DEVICE_ATTACH_MUST_EQUAL | VFIO_DEVICE_ATTACH_ADOPT,
		.pt_id = ioas_id,
	};
	int ret = ioctl(dev, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach) ? -errno : 0;

	verdict(ret == -EOPNOTSUPP, "adopt a page table", ret);
	attach.flags = VFIO_DEVICE_ATTACH_ADOPT;
	ret = ioctl(dev, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach) ? -errno : 0;
	verdict(ret == -EINVAL, "adopt a page table that is not compared", ret);
}

/* What would be lost is refused by name, and nothing has happened. */
static void refusals_first(void)
{
	const uint64_t iova = mem_iova + 2ull * MEM_SIZE;

	refuse_user_memory(iova);
	refuse_other_memfd(iova);
	refuse_dmabuf(iova);
	refuse_pasid();
	refuse_adopt();
	run_for(1);
	create_session("dma");
	preserve_all();
	end_session();
}

/* Two sessions; the second one is given up in the next kernel, the first goes on. */
static void twosessions_first(void)
{
	struct second s = second_device();
	int ret;

	create_session("second");
	preserve_second(&s);
	/* It stays open; "dma" comes next. */
	create_session("probe");
	ret = try_preserve(s.memfd, TOK_MEM);
	verdict(ret < 0, "preserve a memfd in two sessions", ret);
	end_session();
}

static void twosessions_waiting(void)
{
	say("%s the second device runs", is_master(BDF2) ? "ok" : "FAIL");
	retrieve_session("second");
	end_session();
	say("%s the second device is quiesced", is_master(BDF2) ? "FAIL" : "ok");
	say("%s the first device runs", is_master(BDF) ? "ok" : "FAIL");
}

/*
 * A second device in the same context, attached to a HWPT of its own of the same IOAS,
 * with another property: it may be used with PASIDs.
 */
static int dev2 = -1;
static int dev2_id;

static void pair_attach(void)
{
	must(attach_dev(dev2, alloc_hwpt(dev2_id, IOMMU_HWPT_ALLOC_PASID)), "attach second device");
}

static void pair_first(void)
{
	bind_vfio_pci(BDF2);
	dev2 = open_dev(1);
	check(dev2, "open second device");
	dev2_id = bind_dev(dev2, iommufd);
	must(dev2_id, "bind second device");
	pair_attach();
	bus_master(dev2);
	if (!iommu)
		return;
	show_unit();
	show_hwpts();
}

static void pair_last(void)
{
	must(try_preserve(dev2, TOK_DEV2), "preserve second device");
}

static void pair_bound(void)
{
	say("%s the second device runs", is_master(BDF2) ? "ok" : "FAIL");
	dev2 = try_retrieve(TOK_DEV2);
	must(dev2, "retrieve second device");
	dev2_id = bind_dev(dev2, iommufd);
	must(dev2_id, "bind second device");
	if (iommu)
		show_hwpts();
}

static void pair_replaced(void)
{
	int ret = try_finish();

	verdict(ret == -EBUSY, "finish with a device on its frozen HWPT", ret);
	pair_attach();
	if (iommu)
		show_hwpts();
}

static bool gone(double seconds)
{
	double end = now() + seconds;

	while (now() < end) {
		if (access(PCI_DEVICE BDF, F_OK))
			return true;
		if (mem)
			driver->take(true);
		usleep(10000);
	}
	return false;
}

/* Hot-unplug of a preserved device waits for its user, who has DMA all the time. */
static void unplug_pending(void)
{
	create_session("dma");
	preserve_all();
	say("UNPLUG");
	verdict(!gone(8), "the device is there while preserved", 0);
	dma_goes_on();
}

/* It is done when the user lets go. */
static void __attribute__((noreturn)) let_go(void)
{
	end_session();
	unmap_bar();
	close(dev);
	close(iommufd);
	verdict(gone(10), "the device goes when its user lets go", 0);
	quiesced();
}

static void unplugold_first(void)
{
	unplug_pending();
	let_go();
}

/* The kexec has to fail: it would wait for the removal, which waits for the user. */
static void unplugreboot_first(void)
{
	unplug_pending();
	load_kernel(2, 0, "");
	failing_reboot("reboot with a removal pending", EBUSY);
	let_go();
}

/* What was preserved is lost but for its memory. */
static void __attribute__((noreturn)) lost(void)
{
	int ret;

	say("QUIESCED");
	retrieve_session("dma");
	ret = try_retrieve(TOK_DEV);
	verdict(ret == -ENODEV, "retrieve a device that was stopped", ret);
	ret = try_retrieve(TOK_MEM);
	verdict(ret >= 0, "retrieve its memory", ret);
	end_session();
	sleep(2);
	check_filler();
	power_off();
}

static void unplug_next(int stage)
{
	(void)stage;
	fill_memory();
	say("UNPLUG");
	verdict(gone(20), "the device goes", 0);
	lost();
}

static bool stops(double seconds)
{
	double end = now() + seconds;

	while (is_master(BDF) && now() < end)
		usleep(10000);
	return !is_master(BDF);
}

/* The link is reset after a fatal error, whoever waits for the device. */
static void error_next(int stage)
{
	(void)stage;
	fill_memory();
	say("ERROR");
	verdict(stops(20), "the device is stopped", 0);
	lost();
}

/* When it is bound an error resets the link, as it does at any other time. */
static void error_bound_next(int stage)
{
	(void)stage;
	take_control();
	say("ERROR");
	verdict(stops(20), "the device is reset", 0);
	quiesced();
}

/* And the user can. A reset of the bus needs the port, which other devices may wait below. */
static void reset_next(int stage)
{
	int ret;

	(void)stage;
	take_control();
	must(put(PCI_DEVICE BDF "/reset_method", "bus"), "reset_method");
	/* ENOTTY where QEMU's port says that the link is down, which the trace knows better. */
	ret = ioctl(dev, VFIO_DEVICE_RESET) ? -errno : 0;
	verdict(!ret || ret == -ENOTTY, "reset by the bus before the finish", ret);
	quiesced();
}

/* In the old kernel its driver is told, and there is nothing any more that could go on. */
static void errorold_first(void)
{
	int ret;

	create_session("dma");
	preserve_all();
	say("ERROR");
	verdict(stops(20), "the device is reset", 0);
	load_kernel(2, 0, "");
	ret = reboot(LINUX_REBOOT_CMD_KEXEC) ? -errno : 0;
	verdict(ret == -EIO, "reboot after a fatal error", ret);
	end_session();
	unmap_bar();
	close(dev);
	close(iommufd);
	quiesced();
}

/*
 * Nobody comes for the device. The kernel has a driver of its own for it, which turns
 * bus mastering on before it resets the device, whose rings are memory of others by now.
 * QEMU's e1000e keeps its registers when it is reset by power management.
 */
static void otherdriver_next(int stage)
{
	(void)stage;
	retrieve_session("dma");
	end_session();
	must(put(PCI_DEVICE BDF "/reset_method", "bus"), "reset_method");
	must(put(PCI_DEVICE BDF "/driver/unbind", BDF), "unbind");
	if (iommu)
		fill_iovas();
	else
		fill_memory();
	say("QUIESCED");
	must(put("/sys/bus/pci/drivers/e1000e/bind", BDF), "bind to e1000e");
	show_driver();
	sleep(3);
	check_filler();
	power_off();
}

/* Virtual functions would need their physical function, and be a part of what goes on. */
static void sriov_first(void)
{
	static const char *const vf[] = { "0000:01:10.0", NULL };
	int ret;

	must(put(PCI_DEVICE BDF "/sriov_numvfs", "2"), "sriov_numvfs");
	refused("a device with virtual functions", -1, IOMMU_LIVEUPDATE_DEVICE_VF);
	refuse_devices("a virtual function", vf, true, IOMMU_LIVEUPDATE_DEVICE_VF);
	must(put(PCI_DEVICE BDF "/sriov_numvfs", "0"), "sriov_numvfs");

	create_session("dma");
	preserve_all();
	ret = put(PCI_DEVICE BDF "/sriov_numvfs", "2");
	verdict(ret == -EBUSY, "virtual functions of a preserved device", ret);
	end_session();
	ret = put(PCI_DEVICE BDF "/sriov_numvfs", "2");
	verdict(!ret, "virtual functions after that", ret);
}

static double reset_done;

static void *reset_device(void *arg)
{
	must(put(PCI_DEVICE BDF "/reset", "1"), "reset");
	reset_done = now();
	return arg;
}

/* A reset takes a tenth of a second, in which the device is not preserved. */
static void resetting_first(void)
{
	double preserved;
	pthread_t thread;

	create_session("dma");
	must(try_preserve(memfd, TOK_MEM), "preserve memfd");
	must(try_preserve(iommufd, TOK_IOMMUFD), "preserve iommufd");
	errno = pthread_create(&thread, NULL, reset_device, NULL);
	if (errno)
		die("pthread_create");
	usleep(20000);
	must(try_preserve(dev, TOK_DEV), "preserve device");
	preserved = now();
	pthread_join(thread, NULL);
	/* The thread sees its end a moment after the lock is given up, which may be later than ours. */
	say("%s preserved %.1f ms after the reset was over", preserved > reset_done - 0.005 ? "ok" : "FAIL",
	    (preserved - reset_done) * 1e3);
	say("STOP");
	power_off();
}

static int sysrq = -1;

/* Before all others, look whether VFIO lets nobody in, as it is in the middle of the freeze. */
static void *watch(void *arg)
{
	const struct sched_param param = { .sched_priority = 1 };

	errno = pthread_setschedparam(pthread_self(), SCHED_FIFO, &param);
	if (errno)
		die("SCHED_FIFO");
	while (can_read_config())
		usleep(200);
	if (write(sysrq, "c", 1) != 1)
		_exit(4);
	return arg;
}

/* Panic when the device is frozen: the machine starts again, without any session. */
static void panic_first(void)
{
	pthread_t thread;
	int ret = try_retrieve_session("dma");

	verdict(ret == -ENOENT, "a session after a panic", ret);
	sysrq = open("/proc/sysrq-trigger", O_WRONLY);
	check(sysrq, "sysrq-trigger");
	load_kernel(2, 0, "");
	create_session("dma");
	preserve_all();
	errno = pthread_create(&thread, NULL, watch, NULL);
	if (errno)
		die("pthread_create");
	run_for(0.2);
	do_kexec();
	die("kexec");
}

const struct mode *find_mode(const char *name)
{
	static const struct mode modes[] = {
		{ .name = "run" },
		{ .name = "control", .first = control_first, .next = control_next },
		{ .name = "stopped", .next = stopped_next },
		{ .name = "abort", .first = abort_first, .stays = true },
		{ .name = "freezefail", .first = freezefail_first, .stays = true },
		{ .name = "kexecload", .first = kexecload_first, .stays = true },
		{ .name = "nofiles", .first = nofiles_first, .next = nofiles_next },
		{ .name = "replace", .first = replace_first, .stays = true },
		{ .name = "areas", .first = areas_first, .stays = true },
		{ .name = "refusals", .first = refusals_first, .stays = true },
		{ .name = "refused-devices", .first = refused_devices_first, .stays = true },
		{ .name = "pair", .first = pair_first, .last = pair_last, .bound = pair_bound,
		  .replaced = pair_replaced },
		{ .name = "functions", .first = functions_first, .last = functions_last,
		  .replaced = functions_replaced },
		{ .name = "functionsleft", .first = functions_left_first, .stays = true },
		{ .name = "functionsunbound", .first = functions_first, .last = functions_last,
		  .next = functions_unbound_next },
		{ .name = "functionsfail", .first = functions_first, .last = functions_last,
		  .next = functions_fail_next },
		{ .name = "functionsstopped", .first = functions_first, .last = functions_last,
		  .next = functions_stopped_next },
		{ .name = "functionsdeadline", .first = functions_deadline_first,
		  .last = functions_last, .next = functions_deadline_next },
		{ .name = "functionslost", .first = functions_first, .last = functions_last,
		  .next = functions_lost_next },
		{ .name = "sibling", .first = sibling_first, .last = sibling_last,
		  .waiting = sibling_waiting },
		{ .name = "noretrieve", .next = noretrieve_next },
		{ .name = "lastclose", .next = lastclose_next },
		{ .name = "abandon", .next = abandon_next },
		{ .name = "second", .next = second_next },
		{ .name = "secondretrieved", .next = second_retrieved_next },
		{ .name = "secondbound", .next = second_bound_next },
		{ .name = "deadline", .first = deadline_first, .next = deadline_next },
		{ .name = "hostile", .waiting = hostile_waiting, .bound = hostile_bound,
		  .reversed = true },
		{ .name = "twosessions", .first = twosessions_first, .waiting = twosessions_waiting },
		{ .name = "killedretrieved", .bound = killed_retrieved, .dies = true },
		{ .name = "killedbound", .bound = killed_bound, .dies = true },
		{ .name = "killedpreserved", .first = killed_preserved, .dies = true, .stays = true },
		{ .name = "watch", .next = control_next },
		{ .name = "plain", .first = plain_first, .next = plain_next, .stays = true },
		{ .name = "iovas", .next = iovas_next },
		{ .name = "blocked", .next = blocked_next },
		{ .name = "punched", .next = punched_next },
		{ .name = "compacted", .next = compacted_next, .small = true },
		{ .name = "unequal", .next = unequal_next },
		{ .name = "pending", .first = pending_first, .last = pending_last,
		  .every_vector = true },
		{ .name = "modules", .first = modules_first, .waiting = modules_waiting },
		{ .name = "moduleslate", .first = modules_first, .waiting = modules_late_waiting,
		  .unbound = ENOENT },
		{ .name = "modulesnever", .first = modules_never_first, .next = modules_never_next },
		{ .name = "moduleshang", .first = modules_never_first, .next = modules_hang_next },
		{ .name = "faultspreserve", .first = faults_preserve_first, .stays = true },
		{ .name = "faultsboot", .first = faults_boot_first, .next = faults_boot_next },
		{ .name = "faultsretrieve", .next = faults_retrieve_next },
		{ .name = "unplugold", .first = unplugold_first, .stays = true },
		{ .name = "unplugreboot", .first = unplugreboot_first, .stays = true },
		{ .name = "unplug", .next = unplug_next },
		{ .name = "error", .next = error_next },
		{ .name = "errorbound", .next = error_bound_next },
		{ .name = "reset", .next = reset_next },
		{ .name = "otherdriver", .next = otherdriver_next },
		{ .name = "errorold", .first = errorold_first, .stays = true },
		{ .name = "resetting", .first = resetting_first, .stays = true },
		{ .name = "sriov", .first = sriov_first, .stays = true },
		{ .name = "panic", .first = panic_first },
		{ .name = "crash", .end = crash_end },
		{ .name = "map", .first = damage_first, .next = damage_next },
		{ .name = "fdt", .first = damage_first, .next = damage_next },
		{ .name = "vendor", .first = damage_first, .next = damage_next },
		{ .name = "flags", .first = damage_first, .next = damage_next },
		{ .name = "driver", .first = damage_first, .next = damage_next },
		{ .name = "flb", .first = damage_first, .next = damage_next },
		{ .name = "bridge", .first = damage_first, .next = damage_next },
		{ .name = "slot", .first = damage_first, .next = damage_next },
		{ .name = "domains", .first = damage_first, .next = damage_next },
		{ .name = "unitroot", .first = damage_first, .next = damage_next },
		{ .name = "unitmode", .first = damage_first, .next = damage_next },
		{ .name = "unitcap", .first = damage_first, .next = damage_next },
		{ .name = "unitlist", .first = damage_first, .next = damage_next },
		{ .name = "unitbase", .first = damage_first, .next = damage_next },
		{ .name = "unitversion", .first = damage_first, .next = damage_next },
		{ .name = "context", .first = damage_first, .next = damage_context_next },
	};

	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++)
		if (!strcmp(modes[i].name, name))
			return &modes[i];
	errno = EINVAL;
	die(name);
}
