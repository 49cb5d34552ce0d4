/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A NIC driven from userspace whose DMA does not stop while the kernel is replaced.
 *
 * It receives numbered packets (ethertype 0x88B5, a 64-bit number behind the Ethernet
 * header) with an 82574 (QEMU's e1000e) that has no IOMMU, and counts what came and what
 * did not. Ring, buffers and its own counters are in one memfd, so that all it has to give
 * to khod are three descriptors: the memfd, the iommufd in which the memfd is mapped, and
 * the device. Then it may be stopped, and the kernel replaced: the device goes on writing
 * into the ring, and the next instance of this program takes the ring up where it was.
 *
 * Start:	claim the workload from khod;
 *  nothing	memfd, context, IOAS, HWPT, device, ring: all new;
 *  restored	khod has the device under page tables of this kernel already: look up what the
 *		IOAS is called now, and go on with the ring;
 *  quiesced	khod could not, and has stopped the device: the memfd is what is left, so go on
 *		counting in it with a new ring;
 *		acknowledge; then register, for the next kexec or crash of this program.
 * With several devices (--device more than once) each has a part of the memfd for its ring,
 * buffers and counters, and all are in one IOAS: the first one with a page table of its own, the
 * others with the one that the kernel makes by itself. With --group it is this one for all, as the
 * devices of an IOMMU group can have but one.
 *
 * --claim-within S: the device is not to run on for longer than that without this program.
 * --interrupts intx|msix: interrupts are set up, too, though nothing waits for one, to see what khod
 *		makes of them; --may-lose-irq: they may get lost.
 * --alone: without khod, to see what gets lost then.
 * --lease: registered so that mappings can be changed until khod asks to be ready for a
 *		handover. To show that, it maps a page of its memory once more every second until
 *		then, and the next instance looks if these came over, too. A claim is acknowledged by
 *		a lease then.
 * SIGTERM:	write the counts, exit. The device goes on: khod has it.
 *
 * The device's registers are not touched after a claim, but for the tail of the ring.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <kho/kho.h>
#include <linux/vfio.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "e1000e.h"

#define MIB (UINT64_C(1) << 20)
#define PAGE 4096u
#define N_DESC 65528u		/* the most there can be: RDLEN has 20 bits */
#define BUF_SIZE 256u

/* What is where in a device's part of the memfd. The ring has to be contiguous where there is no IOMMU: one huge page. */
#define RING_OFF UINT64_C(0)
#define BUF_OFF (2 * MIB)
#define STATE_OFF (18 * MIB)
#define PART_SIZE (20 * MIB)
#define N_PAGES (STATE_OFF / PAGE)
#define IOVA UINT64_C(0x100000000)
#define EXTRA_IOVA UINT64_C(0x200000000)
#define EXTRA_MAX 256u

/* The first device that VFIO has, with an IOMMU or without. */
#define VFIO "/dev/vfio/devices/vfio0"
#define VFIO_NOIOMMU "/dev/vfio/devices/noiommu-vfio0"

#define STATE_MAGIC UINT64_C(0x3363696e646f686b)
#define MAX_PORTS 4
#define REGION_BAR0 0
#define REGION_CONFIG 7

_Static_assert(N_DESC * sizeof(struct e1000e_rxd) <= 2 * MIB, "the ring fits one huge page");
_Static_assert(BUF_OFF + N_DESC * BUF_SIZE <= STATE_OFF, "the buffers fit");

/* Behind ring and buffers, and so carried over with them. */
struct state {
	uint64_t magic;
	uint64_t starts;	/* of this program on this ring */
	uint64_t seen;		/* packets, each number once */
	uint64_t lost;		/* numbers left out */
	uint64_t duplicates;	/* numbers that came again, or late */
	uint64_t foreign;	/* other packets */
	uint64_t expect;	/* the next number */
	uint64_t in_ring;	/* packets found in the ring by the last start */
	uint32_t next;		/* the descriptor to look at next */
	uint32_t tail;		/* what RDT was set to */
	uint32_t ioas;		/* its id when this was registered last */
	uint32_t extra;		/* of the first port: pages mapped once more, from EXTRA_IOVA on */
	uint32_t noiommu;	/* the device is told physical addresses, not IOVAs */
	uint64_t at[N_PAGES];	/* where the device was told that the pages are */
};
_Static_assert(sizeof(struct state) <= PART_SIZE - STATE_OFF, "the state fits");

/* One device. */
struct port {
	int dev;
	uint64_t iova;		/* of its part of the memfd */
	uint8_t *mem;
	struct e1000e_rxd *ring;
	struct state *state;
	volatile uint8_t *bar;
};

struct nic {
	struct kho *kho;
	struct kho_client *client;
	const char *workload;
	const char *status_path;
	const char *socket_path;
	const char *devices[MAX_PORTS];
	int memfd, iommufd;
	uint32_t ioas;
	struct port ports[MAX_PORTS];
	size_t n_ports;
	uint32_t handovers;
	bool lease, group;
	bool registered;	/* with the acknowledgement of its claim */
	uint32_t claim_sec;
	int irq_index;		/* VFIO_PCI_*_IRQ_INDEX; -1: none are set up */
	bool may_lose_irq;
	bool ready;		/* khod has preserved all: nothing can be changed */
};

/* The client's names of the devices' files. */
static const char *const names[MAX_PORTS] = { "device", "device1", "device2", "device3" };

static volatile sig_atomic_t stop;

static void on_signal(int sig)
{
	stop = 1;
}

/* Says what went wrong and ends. What khod has, it keeps. */
static _Noreturn void die(const char *what, int r, struct kho_error *err)
{
	char *text = kho_error_format(err, r);

	fprintf(stderr, "nic: %s: %s\n", what, text ? text : strerror(-r));
	exit(EXIT_FAILURE);
}

static void reg_write(struct port *p, uint32_t reg, uint32_t value)
{
	*(volatile uint32_t *)(p->bar + reg) = value;
}

static uint32_t reg_read(struct port *p, uint32_t reg)
{
	return *(volatile uint32_t *)(p->bar + reg);
}

/* At an address at which huge pages can be used: the ring must be one. */
static void map_memory(struct nic *n)
{
	size_t size = n->n_ports * PART_SIZE;
	uint8_t *mem = mmap(NULL, size + 2 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (mem == MAP_FAILED)
		die("mmap", -errno, NULL);
	mem = (uint8_t *)(((uintptr_t)mem + 2 * MIB - 1) & ~(uintptr_t)(2 * MIB - 1));
	mem = mmap(mem, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, n->memfd, 0);
	if (mem == MAP_FAILED)
		die("mmap", -errno, NULL);
	(void)madvise(mem, size, MADV_HUGEPAGE);
	for (size_t i = 0; i < n->n_ports; i++) {
		struct port *p = &n->ports[i];

		p->mem = mem + i * PART_SIZE;
		p->iova = IOVA + i * PART_SIZE;
		p->ring = (struct e1000e_rxd *)(p->mem + RING_OFF);
		p->state = (struct state *)(p->mem + STATE_OFF);
	}
}

static void new_memory(struct nic *n)
{
	n->memfd = memfd_create("nic", MFD_CLOEXEC);
	if (n->memfd < 0 || ftruncate(n->memfd, n->n_ports * PART_SIZE) < 0)
		die("memfd", -errno, NULL);
	map_memory(n);
	for (size_t i = 0; i < n->n_ports; i++) {
		memset(n->ports[i].mem, 0, PART_SIZE);
		n->ports[i].state->magic = STATE_MAGIC;
	}
}

static void map_bar(struct nic *n, struct port *p)
{
	struct kho_error *err = NULL;
	uint64_t offset, size;
	int r = kho_vfio_region(n->kho, p->dev, REGION_BAR0, &offset, &size, &err);

	if (r < 0)
		die("BAR 0", r, err);
	p->bar = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, p->dev, offset);
	if (p->bar == MAP_FAILED)
		die("BAR 0", -errno, NULL);
}

/* The memfd, at the one IOVA, in a new IOAS. */
static void new_ioas(struct nic *n)
{
	struct kho_error *err = NULL;
	int r;

	r = kho_iommufd_ioas_alloc(n->kho, n->iommufd, &n->ioas, &err);
	if (r >= 0)
		r = kho_iommufd_map_file(n->kho, n->iommufd, n->ioas, n->memfd, 0,
					 n->n_ports * PART_SIZE, IOVA,
					 KHO_AREA_READABLE | KHO_AREA_WRITEABLE, &err);
	if (r < 0)
		die("mappings", r, err);
}

/* Under a page table of its own, or the one that comes with the IOAS. */
static void attach(struct nic *n, struct port *p, uint32_t dev_id, bool own)
{
	struct kho_error *err = NULL;
	uint32_t pt = n->ioas;
	int r = 0;

	if (own)
		r = kho_iommufd_hwpt_alloc(n->kho, n->iommufd, dev_id, n->ioas, 0, &pt, &err);
	if (r >= 0)
		r = kho_vfio_attach(n->kho, p->dev, &pt, false, &err);
	if (r < 0)
		die("page table", r, err);
}

/* Where the device finds a page of its part of the memfd. */
static uint64_t dma_address(struct nic *n, struct port *p, uint64_t page)
{
	uint64_t iova = p->iova + page * PAGE, pa;
	struct kho_error *err = NULL;
	int r;

	if (!p->state->noiommu)
		return iova;
	r = kho_iommufd_noiommu_pa(n->kho, n->iommufd, n->ioas, iova, &pa, &err);
	if (r < 0)
		die("physical addresses", r, err);
	return pa;
}

static uint64_t extra_address(struct nic *n, uint32_t i)
{
	struct kho_error *err = NULL;
	uint64_t pa;
	int r = kho_iommufd_noiommu_pa(n->kho, n->iommufd, n->ioas, EXTRA_IOVA + (uint64_t)i * PAGE, &pa,
				       &err);

	if (r < 0)
		die("physical addresses", r, err);
	return pa;
}

/* Once more the first page of the memory. Return: 0, -EBUSY: it is preserved. */
static int map_extra(struct nic *n)
{
	struct state *s = n->ports[0].state;
	struct kho_error *err = NULL;
	int r = kho_iommufd_map_file(n->kho, n->iommufd, n->ioas, n->memfd, 0, PAGE,
				     EXTRA_IOVA + (uint64_t)s->extra * PAGE, KHO_AREA_READABLE, &err);

	if (r < 0 && r != -EBUSY)
		die("mappings", r, err);
	kho_error_free(err);
	s->extra += r >= 0;
	return r;
}

static void start_device(struct nic *n, struct port *p)
{
	struct kho_error *err = NULL;
	uint64_t offset, size;
	uint16_t command;
	int r;

	r = kho_vfio_region(n->kho, p->dev, REGION_CONFIG, &offset, &size, &err);
	if (r < 0)
		die("configuration space", r, err);
	if (pread(p->dev, &command, 2, offset + 4) != 2)
		die("configuration space", -errno, NULL);
	command |= 6;	/* memory, bus master */
	if (pwrite(p->dev, &command, 2, offset + 4) != 2)
		die("configuration space", -errno, NULL);

	for (uint64_t i = 0; i < N_PAGES; i++)
		p->state->at[i] = dma_address(n, p, i);
	for (uint64_t i = 1; i < N_DESC * sizeof(struct e1000e_rxd) / PAGE; i++)
		if (p->state->at[i] != p->state->at[i - 1] + PAGE)
			die("the ring is not contiguous in physical memory; allow huge pages in /sys/kernel/mm/transparent_hugepage/shmem_enabled",
			    -ENOMEM, NULL);
	for (uint32_t i = 0; i < N_DESC; i++) {
		uint64_t at = BUF_OFF + (uint64_t)i * BUF_SIZE;

		p->ring[i] = (struct e1000e_rxd){ .addr = p->state->at[at / PAGE] + at % PAGE };
	}

	reg_write(p, E1000E_IMC, UINT32_MAX);
	reg_write(p, E1000E_RCTL, 0);
	reg_write(p, E1000E_CTRL, reg_read(p, E1000E_CTRL) | E1000E_CTRL_SLU);
	reg_write(p, E1000E_RFCTL, 0);
	reg_write(p, E1000E_RDBAL, (uint32_t)p->state->at[0]);
	reg_write(p, E1000E_RDBAH, p->state->at[0] >> 32);
	reg_write(p, E1000E_RDLEN, N_DESC * sizeof(struct e1000e_rxd));
	reg_write(p, E1000E_RDH, 0);
	p->state->tail = N_DESC - 1;
	reg_write(p, E1000E_RDT, p->state->tail);
	reg_write(p, E1000E_RCTL, E1000E_RCTL_EN | E1000E_RCTL_UPE | E1000E_RCTL_MPE |
		  E1000E_RCTL_BAM | E1000E_RCTL_BSIZE_256 | E1000E_RCTL_SECRC);
}

static void count(struct state *s, const struct e1000e_rxd *d, const uint8_t *frame)
{
	uint64_t number = 0;

	if (d->errors || d->length < 30 || frame[12] != 0x88 || frame[13] != 0xb5) {
		s->foreign++;
		return;
	}
	for (int i = 14; i < 22; i++)
		number = number << 8 | frame[i];
	if (number < s->expect) {
		s->duplicates++;
		return;
	}
	s->lost += number - s->expect;
	s->expect = number + 1;
	s->seen++;
}

/* Take every packet out of the ring; give the descriptors back if there is a BAR. */
static uint64_t receive_one(struct port *p)
{
	struct state *s = p->state;
	uint64_t taken = 0;

	while (taken < N_DESC) {
		struct e1000e_rxd *d = &p->ring[s->next];
		uint8_t *frame = p->mem + BUF_OFF + (uint64_t)s->next * BUF_SIZE;

		if (!(__atomic_load_n(&d->status, __ATOMIC_ACQUIRE) & E1000E_RXD_DD))
			break;
		count(s, d, frame);
		memset(frame, 0, 30);	/* so that no packet is counted that was not written */
		d->status = 0;
		s->tail = s->next;
		s->next = (s->next + 1) % N_DESC;
		taken++;
	}
	if (taken > 0 && p->bar) {
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		reg_write(p, E1000E_RDT, s->tail);
	}
	return taken;
}

static void receive(struct nic *n)
{
	for (size_t i = 0; i < n->n_ports; i++)
		(void)receive_one(&n->ports[i]);
}

/* The sum of what all devices received. */
static void write_status(struct nic *n, const char *what)
{
	struct state sum = {};
	struct utsname uts = {};
	char tmp[256];
	FILE *f;

	for (size_t i = 0; i < n->n_ports; i++) {
		const struct state *s = n->ports[i].state;

		sum.seen += s->seen;
		sum.lost += s->lost;
		sum.duplicates += s->duplicates;
		sum.foreign += s->foreign;
		sum.expect += s->expect;
		sum.in_ring += s->in_ring;
	}
	(void)uname(&uts);
	snprintf(tmp, sizeof(tmp), "%s.new", n->status_path);
	f = fopen(tmp, "we");
	if (!f)
		die(tmp, -errno, NULL);
	fprintf(f, "status=%s\nkernel=%s\nstarts=%" PRIu64 "\nhandovers=%" PRIu32 "\nseen=%" PRIu64
		"\nlost=%" PRIu64 "\nduplicates=%" PRIu64 "\nforeign=%" PRIu64 "\nnext=%" PRIu64
		"\nin_ring=%" PRIu64 "\nextra=%" PRIu32 "\nready=%d\n", what, uts.release, n->ports[0].state->starts, n->handovers,
		sum.seen, sum.lost, sum.duplicates, sum.foreign, sum.expect, sum.in_ring,
		n->ports[0].state->extra, n->ready);
	if (fclose(f) != 0 || rename(tmp, n->status_path) < 0)
		die(n->status_path, -errno, NULL);
}

static int take(struct kho_claim *claim, const char *name)
{
	for (size_t i = 0; i < kho_claim_n_files(claim); i++)
		if (strcmp(kho_claim_name(claim, i), name) == 0)
			return kho_claim_take_fd(claim, i);
	die(name, -ENOENT, NULL);
}

static void take_memory(struct nic *n, struct kho_claim *claim)
{
	struct stat st;

	n->memfd = take(claim, "memory");
	if (fstat(n->memfd, &st) < 0 || (size_t)st.st_size != n->n_ports * PART_SIZE)
		die("the claimed memory is of another number of devices", -EINVAL, NULL);
	map_memory(n);
	for (size_t i = 0; i < n->n_ports; i++)
		if (n->ports[i].state->magic != STATE_MAGIC)
			die("the claimed memory is not this program's", -EINVAL, NULL);
	n->handovers = kho_claim_handovers(claim);
}

static struct kho_policy policy_of(const struct nic *n)
{
	return (struct kho_policy){
		.keep = n->lease ? KHO_KEEP_LEASE : KHO_KEEP_HOLD,
		.claim_sec = n->claim_sec,
		.may_lose_irq = n->may_lose_irq,
	};
}

/* @lease: khod goes on to have it, as a lease: no kexec can come before the next registration. */
static void acknowledge(struct nic *n, struct kho_claim *claim, bool lease)
{
	struct kho_policy policy = policy_of(n);
	struct kho_error *err = NULL;
	int r = lease ? kho_client_claim_lease(n->client, claim, &policy, &err) :
			kho_client_claim_ack(n->client, claim, &err);

	if (r < 0)
		die("acknowledge", r, err);
	n->registered = lease;
	kho_claim_free(claim);
}

/* The first one of each device, to an eventfd that ends with this program. */
static void set_irqs(struct nic *n)
{
	for (size_t i = 0; n->irq_index >= 0 && i < n->n_ports; i++) {
		union {
			struct vfio_irq_set set;
			char all[sizeof(struct vfio_irq_set) + sizeof(int32_t)];
		} arg = {
			.set = {
				.argsz = sizeof(arg),
				.flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
				.index = (uint32_t)n->irq_index,
				.count = 1,
			},
		};
		int32_t fd = eventfd(0, EFD_CLOEXEC);

		memcpy(arg.set.data, &fd, sizeof(fd));
		if (fd < 0 || ioctl(n->ports[i].dev, VFIO_DEVICE_SET_IRQS, &arg) < 0)
			die("interrupts", -errno, NULL);
	}
}

/* Take up the device where it is. It receives packets while this runs. */
static void resume(struct nic *n, struct kho_claim *claim)
{
	take_memory(n, claim);
	n->iommufd = take(claim, "iommufd");
	n->ioas = kho_claim_id(claim, "iommufd", n->ports[0].state->ioas);
	if (!n->ioas)
		die("the IOAS is not there any more", -ENOENT, NULL);
	for (size_t i = 0; i < n->n_ports; i++) {
		struct port *p = &n->ports[i];

		for (size_t k = 0; k < kho_claim_n_files(claim); k++)
			if (strcmp(kho_claim_name(claim, k), names[i]) == 0 &&
			    kho_claim_may_have_lost_irq(claim, k))
				fprintf(stderr, "nic: %s may have lost interrupts\n", names[i]);
		p->dev = take(claim, names[i]);
		p->state->in_ring = receive_one(p);
		for (uint64_t k = 0; k < N_PAGES; k++)
			if (dma_address(n, p, k) != p->state->at[k])
				die("a page under the device has moved", -EFAULT, NULL);
	}
	for (uint32_t i = 0; n->ports[0].state->noiommu && i < n->ports[0].state->extra; i++)
		if (extra_address(n, i) != n->ports[0].state->at[0])
			die("what was mapped later has not come over", -EFAULT, NULL);
	/* Until here nothing has changed, and the next one could claim it. */
	acknowledge(n, claim, n->lease);
	for (size_t i = 0; i < n->n_ports; i++) {
		struct port *p = &n->ports[i];

		p->state->ioas = n->ioas;
		map_bar(n, p);
		reg_write(p, E1000E_RDT, p->state->tail);
	}
	set_irqs(n);
}

/* drivers/vfio/vfio_main.c names the nodes of devices without an IOMMU like this. */
static bool is_noiommu(const char *device)
{
	return strstr(device, "/noiommu-") != NULL;
}

/* The memory is there; the rest is new. */
static void start(struct nic *n)
{
	struct kho_error *err = NULL;
	uint32_t id;
	int r;

	n->iommufd = kho_iommufd_open(n->kho, &err);
	if (n->iommufd < 0)
		die("iommufd", n->iommufd, err);
	new_ioas(n);
	for (size_t i = 0; i < n->n_ports; i++) {
		struct port *p = &n->ports[i];

		p->dev = kho_vfio_open(n->kho, n->devices[i], &err);
		if (p->dev < 0)
			die("device", p->dev, err);
		r = kho_vfio_bind(n->kho, p->dev, n->iommufd, &id, &err);
		if (r < 0)
			die("device", r, err);
		attach(n, p, id, i == 0 && !n->group);
		p->state->ioas = n->ioas;
		p->state->extra = 0;
		p->state->noiommu = is_noiommu(n->devices[i]);
		p->state->next = 0;
		map_bar(n, p);
		start_device(n, p);
	}
	set_irqs(n);
}

static void registration(struct nic *n)
{
	struct kho_client_file files[2 + MAX_PORTS] = {
		{ .name = "memory", .fd = n->memfd },
		{ .name = "iommufd", .fd = n->iommufd },
	};
	struct kho_policy policy = policy_of(n);
	struct kho_error *err = NULL;
	int r;

	for (size_t i = 0; i < n->n_ports; i++)
		files[2 + i] = (struct kho_client_file){ .name = names[i], .fd = n->ports[i].dev };
	r = kho_client_register_policy(n->client, n->workload, files, 2 + n->n_ports, NULL, 0, &policy,
				       &err);
	/* The khod before had preserved it; the descriptors here are as good. */
	if (r == -EEXIST && n->lease) {
		err = kho_error_free(err);
		r = kho_client_release(n->client, n->workload, NULL, 0, &err);
		if (r >= 0)
			r = kho_client_register_policy(n->client, n->workload, files, 2 + n->n_ports, NULL, 0,
						       &policy, &err);
	}
	if (r < 0)
		die("register", r, err);
	n->ready = false;
}

static void connect_khod(struct nic *n)
{
	struct kho_error *err = NULL;
	int r = kho_client_connect(n->kho, n->socket_path, &n->client, &err);

	if (r < 0)
		die("khod", r, err);
}

/* What khod wants to know of who has a lease. */
static void hear(struct nic *n)
{
	struct kho_error *err = NULL;
	struct kho_event event;
	int r = kho_client_event(n->client, 0, &event, &err);

	if (r == -ECONNRESET || r == -ENOTCONN) {
		/* khod has ended, and the lease with it. The device and all else is here. */
		kho_error_free(err);
		n->client = kho_client_free(n->client);
		connect_khod(n);
		registration(n);
		return;
	}
	if (r < 0)
		die("khod", r, err);
	if (event.kind == KHO_EVENT_ABORTED)
		n->ready = false;
	if (event.kind != KHO_EVENT_PREPARE)
		return;
	r = kho_client_ready(n->client, &event, &err);
	if (r < 0) {
		fprintf(stderr, "nic: not ready for handover %" PRIu64 ": %s\n", event.handover,
			kho_error_message(err));
		kho_error_free(err);
		return;
	}
	n->ready = true;
	if (map_extra(n) != -EBUSY)
		die("a mapping was changed after READY", -EINVAL, NULL);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "alone", no_argument, NULL, 'a' },
		{ "claim-within", required_argument, NULL, 'c' },
		{ "device", required_argument, NULL, 'd' },
		{ "group", no_argument, NULL, 'g' },
		{ "interrupts", required_argument, NULL, 'i' },
		{ "lease", no_argument, NULL, 'l' },
		{ "may-lose-irq", no_argument, NULL, 'm' },
		{ "name", required_argument, NULL, 'n' },
		{ "socket", required_argument, NULL, 's' },
		{ "status", required_argument, NULL, 'o' },
		{},
	};
	struct nic n = { .workload = "nic", .status_path = "/run/nic.status", .memfd = -1,
			 .iommufd = -1, .irq_index = -1 };
	struct sigaction sa = { .sa_handler = on_signal };
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;
	unsigned int round = 0;
	bool alone = false;
	int c, r;

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (c) {
		case 'a':
			alone = true;
			break;
		case 'c':
			n.claim_sec = (uint32_t)strtoul(optarg, NULL, 10);
			break;
		case 'd':
			if (n.n_ports == MAX_PORTS)
				die("--device", -E2BIG, NULL);
			n.devices[n.n_ports++] = optarg;
			break;
		case 'g':
			n.group = true;
			break;
		case 'i':
			if (strcmp(optarg, "msix") != 0 && strcmp(optarg, "intx") != 0)
				die("--interrupts is msix or intx", -EINVAL, NULL);
			n.irq_index = strcmp(optarg, "msix") == 0 ? VFIO_PCI_MSIX_IRQ_INDEX :
								     VFIO_PCI_INTX_IRQ_INDEX;
			break;
		case 'm':
			n.may_lose_irq = true;
			break;
		case 'l':
			n.lease = true;
			break;
		case 'n':
			n.workload = optarg;
			break;
		case 's':
			n.socket_path = optarg;
			break;
		case 'o':
			n.status_path = optarg;
			break;
		default:
			return 2;
		}
	}
	if (n.n_ports == 0)
		n.devices[n.n_ports++] = access(VFIO_NOIOMMU, F_OK) == 0 ? VFIO_NOIOMMU : VFIO;
	(void)sigaction(SIGTERM, &sa, NULL);
	(void)sigaction(SIGINT, &sa, NULL);

	r = kho_new(&n.kho, NULL, NULL);
	if (r < 0)
		die("libkho", r, NULL);
	if (alone) {
		r = -ENOENT;
	} else {
		connect_khod(&n);
		r = kho_client_claim(n.client, n.workload, NULL, 0, &claim, &err);
	}
	if (r == 0 && kho_claim_outcome(claim) == KHO_OUTCOME_QUIESCED) {
		fprintf(stderr, "nic: the device was stopped by the handover: %s\n",
			kho_claim_reason(claim));
		take_memory(&n, claim);
		for (size_t i = 0; i < n.n_ports; i++)
			n.ports[i].state->in_ring = receive_one(&n.ports[i]);
		acknowledge(&n, claim, false);
		start(&n);
	} else if (r == 0) {
		resume(&n, claim);
	} else if (r == -ENOENT) {
		err = kho_error_free(err);
		new_memory(&n);
		start(&n);
	} else {
		die("claim", r, err);
	}
	for (size_t i = 0; i < n.n_ports; i++)
		n.ports[i].state->starts++;
	if (!alone && !n.registered)
		registration(&n);
	if (!n.lease)
		n.client = kho_client_free(n.client);

	while (!stop) {
		if (n.client)
			hear(&n);
		if (n.client && !n.ready && round % 250 == 0 && n.ports[0].state->extra < EXTRA_MAX)
			(void)map_extra(&n);
		if (round++ % 50 == 0)
			write_status(&n, "running");
		receive(&n);
		usleep(4000);
	}
	receive(&n);
	write_status(&n, "stopped");
	kho_client_free(n.client);
	kho_free(n.kho);
	return EXIT_SUCCESS;
}
