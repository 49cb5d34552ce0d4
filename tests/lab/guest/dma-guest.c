// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * dma-guest: the guest's half of the DMA tests, PID 1 instead of an init
 *
 * Drives the receive ring of an e1000e (82574) from userspace through VFIO in
 * no-IOMMU mode. Ring, buffers and this program's own counters live in one memfd
 * that is mapped into an IOAS by IOMMU_IOAS_MAP_FILE. Numbered packets come from a
 * sender outside of the machine. At a chosen moment memfd, iommufd and device are
 * preserved in one LUO session and the kernel is replaced by kexec; the program
 * starts again as PID 1 of the next kernel, takes all of it back, and looks at
 * what the device wrote while nobody was there.
 *
 * What it prints (on ttyS1) is judged by suite/dma.py; lines start with "DMA: ". The kernel
 * that comes next is /lab/next, on the share with the host.
 *
 * Parameters (kernel command line): dma.kexecs=N how many to do in a row,
 * dma.left=M how many are left (set by itself), dma.stage=K (set by itself),
 * dma.mode= what to do instead of the plain run: abort, freezefail, noretrieve,
 * lastclose, abandon, second, deadline, dma.irq=1 use an
 * MSI-X vector, dma.fill=1 fill free memory before anything is retrieved.
 */

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
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

#define NDESC		32768u		/* 16 bytes each, one contiguous piece */
#define BUF		256u
#define RING_SIZE	(2u << 20)
#define BUF_SIZE	(NDESC * BUF)
#define STATE_OFF	(RING_SIZE + BUF_SIZE)
#define STATE_SIZE	(2u << 20)
#define MEM_SIZE	(STATE_OFF + STATE_SIZE)
#define IOVA		0x100000000ull
#define MAGIC		0x6b686f642d646d61ull
#define NPAGES		(MEM_SIZE / 4096)

enum { TOK_MEM = 1, TOK_IOMMUFD = 2, TOK_DEV = 3 };

/* 82574 registers */
enum {
	CTRL = 0x0000, STATUS = 0x0008, CTRL_EXT = 0x0018, ICR = 0x00c0,
	ICS = 0x00c8, IMS = 0x00d0, IMC = 0x00d8, IVAR = 0x00e4, RCTL = 0x0100,
	RDBAL = 0x2800, RDBAH = 0x2804, RDLEN = 0x2808, RDH = 0x2810,
	EIAC = 0x00dc, RDT = 0x2818, RXDCTL = 0x2828, RXCSUM = 0x5000, RFCTL = 0x5008,
};

struct desc {
	uint64_t addr;
	uint16_t len;
	uint16_t csum;
	uint8_t status;
	uint8_t errors;
	uint16_t special;
};

/* As tests/lab/lablib/sender.py makes them. */
struct packet {
	uint8_t destination[6];
	uint8_t source[6];
	uint16_t ethertype;	/* big-endian, as what follows */
	uint64_t number;
	uint64_t time_ns;
} __attribute__((packed));

#define ETHERTYPE 0x88b5

/* Survives in the memfd. */
struct state {
	uint64_t magic;
	uint32_t next;		/* descriptor to look at next */
	uint32_t tail;		/* what RDT was set to last */
	uint64_t expect;	/* next sequence number */
	uint64_t received;
	uint64_t lost;
	uint64_t doubled;
	uint64_t bad;
	uint64_t incomplete;
	uint64_t blackout[64];	/* packets found first thing in stage n */
	uint64_t pa[NPAGES];
};

static uint8_t *mem;
static struct desc *ring;
static struct state *st;
static volatile uint8_t *bar;
static int memfd = -1, iommufd = -1, dev = -1, session = -1;
static uint32_t ioas_id;
static int irqfd = -1;

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_BOOTTIME, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static void say(const char *fmt, ...)
{
	char line[512];
	va_list ap;
	int n;

	n = snprintf(line, sizeof(line), "DMA: [%.3f] ", now());
	va_start(ap, fmt);
	n += vsnprintf(line + n, sizeof(line) - n - 1, fmt, ap);
	va_end(ap);
	line[n++] = '\n';
	if (write(1, line, n) != n)
		_exit(3);
}

static void die(const char *what)
{
	say("FAIL %s: %s", what, strerror(errno));
	sync();
	sleep(1);
	reboot(LINUX_REBOOT_CMD_POWER_OFF);
	_exit(1);
}

static void check(long ret, const char *what)
{
	if (ret < 0)
		die(what);
}

static void put(const char *path, const char *val)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0 || write(fd, val, strlen(val)) < 0)
		say("note: %s <- %s: %s", path, val, strerror(errno));
	if (fd >= 0)
		close(fd);
}

static char cmdline[4096];

static const char *param(const char *name, const char *dflt)
{
	static char val[8][64];
	static int turn;
	char *p = strstr(cmdline, name);
	char *v = val[turn++ & 7];

	if (!p || p[strlen(name)] != '=')
		return dflt;
	sscanf(p + strlen(name) + 1, "%63[^ \n]", v);
	return v;
}

static uint32_t rd(int reg)
{
	return *(volatile uint32_t *)(bar + reg);
}

static void wr(int reg, uint32_t val)
{
	*(volatile uint32_t *)(bar + reg) = val;
}

#define BDF "0000:01:00.0"

static void bind_vfio_pci(void)
{
	put("/sys/bus/pci/devices/" BDF "/driver/unbind", BDF);
	put("/sys/bus/pci/devices/" BDF "/driver_override", "vfio-pci");
	put("/sys/bus/pci/drivers_probe", BDF);
}

static void show_driver(void)
{
	char link[256] = "none";
	ssize_t n = readlink("/sys/bus/pci/devices/" BDF "/driver", link,
			     sizeof(link) - 1);

	if (n > 0)
		link[n] = 0;
	say("driver %s", strrchr(link, '/') ? strrchr(link, '/') + 1 : link);
}

static void open_memfd(void)
{
	put("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "force");
	memfd = memfd_create("dma", 0);
	check(memfd, "memfd_create");
	check(ftruncate(memfd, MEM_SIZE), "ftruncate");
}

static void map_mem(void)
{
	mem = mmap(NULL, MEM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	if (mem == MAP_FAILED)
		die("mmap memfd");
	ring = (void *)mem;
	st = (void *)(mem + STATE_OFF);
}

static int try_bind(void)
{
	struct vfio_device_bind_iommufd bind = {
		.argsz = sizeof(bind), .iommufd = iommufd,
	};

	return ioctl(dev, VFIO_DEVICE_BIND_IOMMUFD, &bind) ? -errno : 0;
}

static void make_ioas(void)
{
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };
	struct iommu_ioas_map_file map = {
		.size = sizeof(map),
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE |
			 IOMMU_IOAS_MAP_WRITEABLE,
		.fd = memfd,
		.length = MEM_SIZE,
		.iova = IOVA,
	};

	check(ioctl(iommufd, IOMMU_IOAS_ALLOC, &alloc), "IOAS_ALLOC");
	ioas_id = map.ioas_id = alloc.out_ioas_id;
	check(ioctl(iommufd, IOMMU_IOAS_MAP_FILE, &map), "IOAS_MAP_FILE");
}

static int try_attach(uint32_t id)
{
	struct vfio_device_attach_iommufd_pt attach = {
		.argsz = sizeof(attach), .pt_id = id,
	};

	return ioctl(dev, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach) ? -errno : 0;
}

static uint64_t get_pa(uint64_t iova)
{
	struct iommu_ioas_noiommu_get_pa get = {
		.size = sizeof(get), .ioas_id = ioas_id, .iova = iova,
		.length = 4096,
	};

	check(ioctl(iommufd, IOMMU_IOAS_NOIOMMU_GET_PA, &get), "GET_PA");
	return get.out_phys;
}

static void map_bar(void)
{
	struct vfio_region_info info = {
		.argsz = sizeof(info), .index = VFIO_PCI_BAR0_REGION_INDEX,
	};

	check(ioctl(dev, VFIO_DEVICE_GET_REGION_INFO, &info), "REGION_INFO");
	bar = mmap(NULL, info.size, PROT_READ | PROT_WRITE, MAP_SHARED, dev,
		   info.offset);
	if (bar == MAP_FAILED)
		die("mmap BAR 0");
}

static void bus_master(void)
{
	struct vfio_region_info info = {
		.argsz = sizeof(info), .index = VFIO_PCI_CONFIG_REGION_INDEX,
	};
	uint16_t cmd;

	check(ioctl(dev, VFIO_DEVICE_GET_REGION_INFO, &info), "REGION_INFO");
	check(pread(dev, &cmd, 2, info.offset + 4), "read command");
	cmd |= 6;
	check(pwrite(dev, &cmd, 2, info.offset + 4), "write command");
}

static void set_irqs(int nr)
{
	char buf[sizeof(struct vfio_irq_set) + 5 * sizeof(int)];
	struct vfio_irq_set *set = (void *)buf;
	int fd[5];

	irqfd = fd[0] = eventfd(0, EFD_NONBLOCK);
	for (int i = 1; i < 5; i++)
		fd[i] = i < nr ? eventfd(0, EFD_NONBLOCK) : -1;
	*set = (struct vfio_irq_set) {
		.argsz = sizeof(*set) + nr * sizeof(int),
		.flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
		.index = VFIO_PCI_MSIX_IRQ_INDEX,
		.count = nr,
	};
	memcpy(set->data, fd, nr * sizeof(int));
	check(ioctl(dev, VFIO_DEVICE_SET_IRQS, set), "SET_IRQS");
}

static uint64_t irq_count(void)
{
	uint64_t n = 0;

	if (irqfd < 0 || read(irqfd, &n, sizeof(n)) != sizeof(n))
		return 0;
	return n;
}

/* Physical addresses go to the device, so the ring has to be contiguous. */
static void start_ring(bool irq)
{
	for (uint32_t i = 0; i < NPAGES; i++) {
		st->pa[i] = get_pa(IOVA + i * 4096ull);
		if (i && i < NDESC * 16 / 4096 && st->pa[i] != st->pa[i - 1] + 4096) {
			errno = ENOMEM;
			die("the ring is not contiguous");
		}
	}
	st->magic = MAGIC;
	for (uint32_t i = 0; i < NDESC; i++) {
		uint32_t off = RING_SIZE + i * BUF;

		ring[i] = (struct desc) { .addr = st->pa[off / 4096] + off % 4096 };
	}
	wr(IMC, ~0u);
	wr(RCTL, 0);
	wr(CTRL, rd(CTRL) | 1u << 6);		/* set link up */
	wr(RFCTL, 0);
	wr(RDBAL, (uint32_t)st->pa[0]);
	wr(RDBAH, st->pa[0] >> 32);
	wr(RDLEN, NDESC * 16);
	wr(RDH, 0);
	wr(RDT, st->tail = NDESC - 1);
	if (irq) {
		wr(IVAR, 0x8);			/* receive queue 0: vector 0 */
		/* ... and does not mask it */
		wr(CTRL_EXT, rd(CTRL_EXT) | 1u << 31 | 1u << 27);
		wr(EIAC, 1u << 20);		/* a message clears its cause */
		wr(IMS, 1u << 20);
	}
	/* enable, promiscuous, broadcast, 256 byte buffers, strip CRC */
	wr(RCTL, 1u << 1 | 1u << 3 | 1u << 4 | 1u << 15 | 3u << 16 | 1u << 26);
}

/* Takes every completed descriptor, gives it back if @give. */
static uint64_t consume(bool give)
{
	uint64_t n = 0;

	for (;;) {
		struct desc *d = &ring[st->next];
		struct packet *p = (void *)(mem + RING_SIZE + st->next * BUF);
		uint64_t seq;

		if (!(__atomic_load_n(&d->status, __ATOMIC_ACQUIRE) & 1))
			break;
		if (n > NDESC)
			break;
		/* Not before the descriptor is seen to be done. */
		seq = be64toh(p->number);
		if (d->errors || be16toh(p->ethertype) != ETHERTYPE) {
			st->bad++;
		} else if (seq < st->expect) {
			st->doubled++;
		} else {
			if (seq > st->expect && st->received) {
				say("gap: %llu..%llu at descriptor %u",
				    (unsigned long long)st->expect,
				    (unsigned long long)seq - 1, st->next);
				st->lost += seq - st->expect;
			}
			st->expect = seq + 1;
			st->received++;
		}
		p->ethertype = 0;
		d->status = 0;
		st->tail = st->next;
		st->next = (st->next + 1) % NDESC;
		n++;
	}
	if (n && give && bar)
		wr(RDT, st->tail);
	return n;
}

/* A descriptor that is done behind one that is not was never completed. */
static uint64_t count_incomplete(void)
{
	uint64_t n = 0, hole = 0;

	for (uint32_t i = 0; i < NDESC - 1; i++) {
		if (ring[(st->next + i) % NDESC].status & 1) {
			n += hole;
			hole = 0;
		} else {
			hole++;
		}
	}
	return n;
}

static void run_for(double seconds)
{
	double end = now() + seconds;
	uint64_t irqs = 0;

	while (now() < end) {
		struct pollfd p = { .fd = irqfd, .events = POLLIN };

		consume(true);
		if (irqfd >= 0)
			irqs += irq_count();
		poll(&p, irqfd >= 0, 5);
	}
	if (irqfd >= 0)
		say("%s irq: %llu in %.1f s", irqs ? "ok" : "FAIL",
		    (unsigned long long)irqs, seconds);
}

static void run_until_quiet(double quiet)
{
	double last = now();

	while (now() < last + quiet) {
		if (consume(true))
			last = now();
		usleep(5000);
	}
}

/* The kernel beside us on the share, with this one's command line and something added. */
static void load_kernel(int stage, int left, const char *add)
{
	static char line[2048];
	char *p = strstr(cmdline, " dma.stage=");
	size_t n = p ? (size_t)(p - cmdline) : strcspn(cmdline, "\n");
	int k = open("/lab/next", O_RDONLY);

	check(k, "/lab/next");
	snprintf(line, sizeof(line), "%.*s dma.stage=%d dma.left=%d %s", (int)n, cmdline, stage,
		 left, add);
	if (syscall(SYS_kexec_file_load, k, -1, strlen(line) + 1, line, KEXEC_FILE_NO_INITRAMFS))
		die("kexec_file_load");
	close(k);
}

static int luo(void)
{
	int fd = open("/dev/liveupdate", O_RDWR);

	check(fd, "/dev/liveupdate");
	return fd;
}

static void create_session(const char *name)
{
	struct liveupdate_ioctl_create_session create = { .size = sizeof(create) };
	int fd = luo();

	strcpy((char *)create.name, name);
	check(ioctl(fd, LIVEUPDATE_IOCTL_CREATE_SESSION, &create), "CREATE_SESSION");
	session = create.fd;
	close(fd);
}

static void retrieve_session(const char *name)
{
	struct liveupdate_ioctl_retrieve_session get = { .size = sizeof(get) };
	int fd = luo();

	strcpy((char *)get.name, name);
	check(ioctl(fd, LIVEUPDATE_IOCTL_RETRIEVE_SESSION, &get), "RETRIEVE_SESSION");
	session = get.fd;
	close(fd);
}

static int try_preserve(int fd, uint64_t token)
{
	struct liveupdate_session_preserve_fd arg = {
		.size = sizeof(arg), .fd = fd, .token = token,
	};

	return ioctl(session, LIVEUPDATE_SESSION_PRESERVE_FD, &arg) ? -errno : 0;
}

static int try_retrieve(uint64_t token)
{
	struct liveupdate_session_retrieve_fd arg = {
		.size = sizeof(arg), .token = token,
	};

	return ioctl(session, LIVEUPDATE_SESSION_RETRIEVE_FD, &arg) ? -errno : arg.fd;
}

static int try_finish(void)
{
	struct liveupdate_session_finish arg = { .size = sizeof(arg) };

	return ioctl(session, LIVEUPDATE_SESSION_FINISH, &arg) ? -errno : 0;
}

static void must(int ret, const char *what)
{
	if (ret < 0) {
		errno = -ret;
		die(what);
	}
}

/* Is iommufd preservable in this kernel? Decided at run time, for bisecting. */
static bool preserve_all(void)
{
	double t0 = now(), t1, t2;
	bool ctx;
	int ret;

	must(try_preserve(memfd, TOK_MEM), "preserve memfd");
	t1 = now();
	ret = try_preserve(iommufd, TOK_IOMMUFD);
	if (ret && ret != -ENOENT)
		must(ret, "preserve iommufd");
	ctx = !ret;
	t2 = now();
	must(try_preserve(dev, TOK_DEV), "preserve device");
	say("preserved memfd %.1f ms, iommufd%s %.1f ms, device %.1f ms",
	    (t1 - t0) * 1e3, ctx ? "" : " (not supported)", (t2 - t1) * 1e3,
	    (now() - t2) * 1e3);
	return ctx;
}

static uint8_t *filler;
static size_t filler_len;

static void fill_memory(void)
{
	FILE *f = fopen("/proc/meminfo", "r");
	char line[128];
	long kb = 0;

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "MemAvailable: %ld", &kb) == 1)
			break;
	if (f)
		fclose(f);
	filler_len = (size_t)kb * 1024 / 4 * 3 & ~4095ul;
	filler = mmap(NULL, filler_len, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (filler == MAP_FAILED)
		die("fill memory");
	memset(filler, 0xa5, filler_len);
	say("filled %zu MiB", filler_len >> 20);
}

static void check_filler(void)
{
	size_t bad = 0;

	if (!filler)
		return;
	for (size_t i = 0; i < filler_len; i++)
		bad += filler[i] != 0xa5;
	munmap(filler, filler_len);
	filler = NULL;
	say("%s filled memory: %zu bytes changed", bad ? "FAIL" : "ok", bad);
}

static int open_dev(void)
{
	return open("/dev/vfio/devices/noiommu-vfio0", O_RDWR);
}

static void report(void)
{
	say("RESULT next_seq=%llu received=%llu lost=%llu doubled=%llu bad=%llu incomplete=%llu",
	    (unsigned long long)st->expect, (unsigned long long)st->received,
	    (unsigned long long)st->lost, (unsigned long long)st->doubled,
	    (unsigned long long)st->bad, (unsigned long long)st->incomplete);
}

static void power_off(void)
{
	sync();
	usleep(300000);
	reboot(LINUX_REBOOT_CMD_POWER_OFF);
	_exit(0);
}

static void do_kexec(void)
{
	say("KEXEC");
	reboot(LINUX_REBOOT_CMD_KEXEC);
}

/* The first kernel: from nothing to packets landing. */
static void first(bool irq)
{
	bind_vfio_pci();
	show_driver();
	open_memfd();
	map_mem();
	memset(mem, 0, MEM_SIZE);
	iommufd = open("/dev/iommu", O_RDWR);
	check(iommufd, "/dev/iommu");
	dev = open_dev();
	check(dev, "open device");
	must(try_bind(), "bind");
	make_ioas();
	must(try_attach(ioas_id), "attach");
	map_bar();
	bus_master();
	if (irq)
		set_irqs(1);
	start_ring(irq);
	say("READY status=%#x", rd(STATUS));
}

static void check_pages(void)
{
	uint32_t moved = 0;

	for (uint32_t i = 0; i < NPAGES; i++)
		moved += get_pa(IOVA + i * 4096ull) != st->pa[i];
	say("%s pages: %u of %u moved", moved ? "FAIL" : "ok", moved, NPAGES);
}

static uint32_t find_frozen(void)
{
	struct iommu_object_entry e[16];
	struct iommu_list_objects list = {
		.size = sizeof(list), .entries = (uintptr_t)e, .num = 16,
		.entry_size = sizeof(e[0]),
	};

	check(ioctl(iommufd, IOMMU_LIST_OBJECTS, &list), "LIST_OBJECTS");
	for (uint32_t i = 0; i < list.num; i++)
		if (e[i].type == IOMMU_OBJECT_HWPT_FROZEN)
			return e[i].id;
	return 0;
}

static void destroy_frozen(uint32_t id)
{
	struct iommu_destroy d = { .size = sizeof(d), .id = id };
	int ret = ioctl(iommufd, IOMMU_DESTROY, &d) ? -errno : 0;

	say("%s destroy the frozen HWPT: %s", ret ? "FAIL" : "ok",
	    ret ? strerror(-ret) : "done");
}

/* The same IOVAs, but every page one further in the file. */
static void replace_unequal(void)
{
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };
	struct iommu_ioas_map_file map = {
		.size = sizeof(map),
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE |
			 IOMMU_IOAS_MAP_WRITEABLE,
		.fd = memfd, .start = 4096, .length = MEM_SIZE - 4096, .iova = IOVA,
	};
	struct iommu_destroy d = { .size = sizeof(d) };
	int ret;

	check(ioctl(iommufd, IOMMU_IOAS_ALLOC, &alloc), "IOAS_ALLOC");
	d.id = map.ioas_id = alloc.out_ioas_id;
	check(ioctl(iommufd, IOMMU_IOAS_MAP_FILE, &map), "IOAS_MAP_FILE");
	ret = try_attach(d.id);
	say("%s replace by unequal translations: %s",
	    ret == -EBADE ? "ok" : "FAIL", ret ? strerror(-ret) : "done");
	check(ioctl(iommufd, IOMMU_DESTROY, &d), "DESTROY");
}

/* Any later kernel: take everything back. */
static void again(int stage, bool irq, bool fill)
{
	uint32_t frozen_id = 0;
	bool frozen;
	uint64_t n;
	int fd;

	show_driver();
	if (fill)
		fill_memory();
	fd = open_dev();
	say("%s open before retrieve: %s",
	    fd < 0 && errno == EBUSY ? "ok" : "FAIL",
	    fd < 0 ? strerror(errno) : "opened");
	if (fd >= 0)
		close(fd);

	retrieve_session("dma");
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	map_mem();
	n = consume(false);
	st->blackout[stage] = n;
	say("BLACKOUT packets=%llu next_seq=%llu", (unsigned long long)n,
	    (unsigned long long)st->expect);

	iommufd = try_retrieve(TOK_IOMMUFD);
	frozen = iommufd >= 0;
	if (!frozen) {
		say("note: no iommufd retrieved (%s), a new one", strerror(-iommufd));
		iommufd = open("/dev/iommu", O_RDWR);
		check(iommufd, "/dev/iommu");
	}
	dev = try_retrieve(TOK_DEV);
	must(dev, "retrieve device");
	fd = try_finish();
	say("%s finish before bind: %s", fd == -EBUSY ? "ok" : "FAIL",
	    fd ? strerror(-fd) : "done");
	if (frozen) {
		int keep = iommufd;

		iommufd = open("/dev/iommu", O_RDWR);
		fd = try_bind();
		say("%s bind to another context: %s", fd ? "ok" : "FAIL",
		    fd ? strerror(-fd) : "done");
		close(iommufd);
		iommufd = keep;
	}
	must(try_bind(), "bind");
	map_bar();
	if (frozen) {
		frozen_id = find_frozen();
		replace_unequal();
	}
	make_ioas();
	must(try_attach(ioas_id), "attach");
	say("%s", frozen ? "replaced the frozen HWPT" : "attached");
	check_pages();
	if (irq) {
		set_irqs(1);
		usleep(200000);
		n = irq_count();
		say("%s irq: %llu pending from the blackout", n ? "ok" : "FAIL",
		    (unsigned long long)n);
	}
	wr(RDT, st->tail);
	if (frozen)
		destroy_frozen(frozen_id);
	must(try_finish(), "finish");
	close(session);
	session = -1;
	put("/proc/sys/vm/compact_memory", "1");
	say("BACK");
}

/* Modes: what is tried instead of the plain run. */

/*
 * The control: memory alone is preserved, as on an unpatched kernel. The packets
 * that did not land are what everything else here is for.
 */
static void mode_control(int stage)
{
	if (stage == 1) {
		load_kernel(2, 0, "");
		create_session("dma");
		must(try_preserve(memfd, TOK_MEM), "preserve memfd");
		run_for(0.5);
		do_kexec();
		die("kexec");
	}
	retrieve_session("dma");
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	map_mem();
	say("BLACKOUT packets=%llu next_seq=%llu", (unsigned long long)consume(false),
	    (unsigned long long)st->expect);
	say("STOP");
	sleep(1);
	report();
	power_off();
}

/* Preserve, then abort: the device goes on as if nothing had happened. */
static void mode_abort(void)
{
	int ret;

	create_session("dma");
	preserve_all();
	ret = try_attach(ioas_id);
	say("%s attach while preserved: %s", ret == -EBUSY ? "ok" : "FAIL",
	    strerror(-ret));
	ret = ioctl(dev, VFIO_DEVICE_RESET) ? -errno : 0;
	say("%s reset while preserved: %s", ret == -EBUSY ? "ok" : "FAIL",
	    strerror(-ret));
	{
		int fd = open("/sys/bus/pci/devices/" BDF "/remove", O_WRONLY);

		ret = write(fd, "1", 1) < 0 ? -errno : 0;
		say("%s remove while preserved: %s", ret == -EBUSY ? "ok" : "FAIL",
		    strerror(-ret));
		close(fd);
		fd = open("/sys/bus/pci/devices/" BDF "/reset", O_WRONLY);
		ret = write(fd, "1", 1) < 0 ? -errno : 0;
		say("%s sysfs reset while preserved: %s",
		    ret == -EBUSY ? "ok" : "FAIL", strerror(-ret));
		close(fd);
	}
	run_for(1);
	close(session);
	session = -1;
	say("aborted");
	run_for(1);
	ret = try_attach(ioas_id);
	say("%s attach after abort: %s", ret == 0 ? "ok" : "FAIL",
	    ret ? strerror(-ret) : "done");
}

/* reboot(2) that must fail, with the device going on as if nothing had happened. */
static void failing_reboot(const char *why, int error)
{
	uint64_t before = st->received;

	consume(true);
	reboot(LINUX_REBOOT_CMD_KEXEC);
	say("%s reboot, %s: %s", errno == error ? "ok" : "FAIL", why,
	    strerror(errno));
	run_for(1);
	say("%s packets after that: %llu", st->received > before ? "ok" : "FAIL",
	    (unsigned long long)(st->received - before));
	wr(IMS, 1u << 20);
	say("%s registers after that: RCTL %#x", rd(RCTL) & 2 ? "ok" : "FAIL",
	    rd(RCTL));
}

#define BDF2 "0000:02:00.0"

/*
 * A freeze that fails. The device of a second session starts to use INTx after it
 * was preserved, so that its freeze refuses, after the first session was frozen.
 */
static void mode_freezefail(void)
{
	struct vfio_device_bind_iommufd bind = { .argsz = sizeof(bind) };
	struct vfio_device_attach_iommufd_pt attach = { .argsz = sizeof(attach) };
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };
	char buf[sizeof(struct vfio_irq_set) + sizeof(int)];
	struct vfio_irq_set *set = (void *)buf;
	int first, second, dev2, ctx2, fd;

	create_session("dma");
	preserve_all();
	first = session;

	load_kernel(2, 0, "liveupdate=off");
	failing_reboot("next kernel without liveupdate", ENOEXEC);
	load_kernel(2, 0, "kho=off");
	failing_reboot("next kernel without kho", ENOEXEC);

	put("/sys/bus/pci/devices/" BDF2 "/driver_override", "vfio-pci");
	put("/sys/bus/pci/drivers_probe", BDF2);
	dev2 = open("/dev/vfio/devices/noiommu-vfio1", O_RDWR);
	check(dev2, "open second device");
	ctx2 = bind.iommufd = open("/dev/iommu", O_RDWR);
	check(ioctl(dev2, VFIO_DEVICE_BIND_IOMMUFD, &bind), "bind second");
	check(ioctl(ctx2, IOMMU_IOAS_ALLOC, &alloc), "IOAS_ALLOC");
	attach.pt_id = alloc.out_ioas_id;
	check(ioctl(dev2, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach), "attach second");

	create_session("second");
	second = session;
	fd = try_preserve(dev2, TOK_DEV);
	say("%s preserve without the context: %s", fd == -ENOENT ? "ok" : "FAIL",
	    fd ? strerror(-fd) : "done");
	must(try_preserve(ctx2, TOK_IOMMUFD), "preserve second iommufd");
	must(try_preserve(dev2, TOK_DEV), "preserve second device");
	*set = (struct vfio_irq_set) {
		.argsz = sizeof(buf),
		.flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
		.index = VFIO_PCI_INTX_IRQ_INDEX, .count = 1,
	};
	fd = eventfd(0, 0);
	memcpy(set->data, &fd, sizeof(fd));
	check(ioctl(dev2, VFIO_DEVICE_SET_IRQS, set), "INTx");
	load_kernel(2, 0, "");
	failing_reboot("INTx in the second session", EOPNOTSUPP);
	close(second);
	close(first);
	session = -1;
	fd = try_attach(ioas_id);
	say("%s attach after abort: %s", fd ? "FAIL" : "ok",
	    fd ? strerror(-fd) : "done");
}

int main(void)
{
	bool irq, fill;
	const char *mode;
	int stage, left, fd;

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
	stage = atoi(param("dma.stage", "1"));
	left = atoi(param("dma.left", param("dma.kexecs", "1")));
	mode = param("dma.mode", "run");
	irq = atoi(param("dma.irq", "0"));
	fill = atoi(param("dma.fill", "0"));
	say("STAGE %d left %d mode %s", stage, left, mode);

	if (stage == 1) {
		first(irq);
		run_for(2);
		if (!strcmp(mode, "control"))
			mode_control(stage);
		if (!strcmp(mode, "abort"))
			mode_abort();
		if (!strcmp(mode, "freezefail"))
			mode_freezefail();
	} else if (!strcmp(mode, "control")) {
		mode_control(stage);
	} else if (!strcmp(mode, "noretrieve")) {
		/* Finish without retrieving: the device has to be stopped. */
		retrieve_session("dma");
		fd = try_finish();
		say("%s finish without retrieving: %s",
		    fd == -EBUSY ? "ok" : "FAIL", fd ? strerror(-fd) : "done");
		close(session);
		say("QUIESCED");
		sleep(3);
		power_off();
	} else if (!strcmp(mode, "lastclose")) {
		/* Retrieved, never bound, everything closed. */
		retrieve_session("dma");
		memfd = try_retrieve(TOK_MEM);
		must(memfd, "retrieve memfd");
		dev = try_retrieve(TOK_DEV);
		must(dev, "retrieve device");
		close(dev);
		close(memfd);
		close(session);
		say("QUIESCED");
		sleep(3);
		power_off();
	} else if (!strcmp(mode, "abandon")) {
		/* Given up without having been retrieved. */
		struct liveupdate_ioctl_abandon_session abandon = {
			.size = sizeof(abandon), .name = "dma",
		};

		fd = luo();
		check(ioctl(fd, LIVEUPDATE_IOCTL_ABANDON_SESSION, &abandon),
		      "ABANDON_SESSION");
		left = ioctl(fd, LIVEUPDATE_IOCTL_ABANDON_SESSION, &abandon) ?
			errno : 0;
		say("%s abandon again: %s", left == ENOENT ? "ok" : "FAIL",
		    strerror(left));
		close(fd);
		say("QUIESCED");
		fd = open_dev();
		say("%s open after that: %s", fd < 0 ? "FAIL" : "ok",
		    fd < 0 ? strerror(errno) : "done");
		sleep(3);
		power_off();
	} else if (!strcmp(mode, "second") && stage == 2) {
		/* Another kexec, with the session of the first one not retrieved. */
		load_kernel(3, 0, "");
		do_kexec();
		die("kexec");
	} else if (!strcmp(mode, "second")) {
		show_driver();
		fill_memory();
		say("QUIESCED");
		sleep(3);
		check_filler();
		power_off();
	} else if (!strcmp(mode, "deadline")) {
		say("waiting for the deadline");
		sleep(20);
		say("QUIESCED");
		sleep(3);
		power_off();
	} else {
		again(stage, irq, fill);
		run_for(2);
		check_filler();
	}

	if (left > 0 && strcmp(mode, "abort") && strcmp(mode, "freezefail")) {
		load_kernel(stage + 1, left - 1, "");
		if (!strcmp(mode, "deadline")) {
			char buf[64];
			struct vfio_device_feature *f = (void *)buf;
			struct vfio_device_feature_liveupdate lu = {
				.deadline_ms = 15000,
			};

			f->argsz = sizeof(*f) + sizeof(lu);
			f->flags = VFIO_DEVICE_FEATURE_SET |
				   VFIO_DEVICE_FEATURE_LIVEUPDATE;
			memcpy(f->data, &lu, sizeof(lu));
			check(ioctl(dev, VFIO_DEVICE_FEATURE, f), "FEATURE");
		}
		create_session("dma");
		preserve_all();
		run_for(0.5);
		do_kexec();
		die("kexec");
	}

	say("STOP");
	run_until_quiet(3);
	st->incomplete = count_incomplete();
	report();
	power_off();
}
