/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * dma-guest: the guest's half of the DMA tests, PID 1 instead of an init
 *
 * Drives a device from userspace through VFIO, behind an IOMMU if there is one and in
 * no-IOMMU mode otherwise. Queues, buffers and this program's own counters live in
 * one memfd that is mapped into an IOAS by IOMMU_IOAS_MAP_FILE. At a chosen moment
 * memfd, iommufd and device are preserved in one LUO session and the kernel is
 * replaced by kexec; the program starts again as PID 1 of the next kernel, takes all of
 * it back, and looks at what the device wrote while nobody was there.
 *
 * What it prints (on ttyS1) is judged by suite/dma.py; lines start with "DMA: ". The
 * kernel that comes next is /lab/next, or /lab/next-K for stage K, on the share with the
 * host, and /lab/initrd is its initrd.
 *
 * Parameters (kernel command line):
 *   dma.device=  e1000e (default), igb or nvme
 *   dma.mode=    what to do instead of the plain run, see modes.c
 *   dma.kexecs=N how many to do in a row
 *   dma.irq=1    use interrupts: one MSI-X vector of a NIC, one a queue of an nvme
 *   dma.badirq=1 the first time that a new owner sets them up it fails
 *   dma.fewirq=1 the first time it sets up one vector only, and turns MSI-X off again
 *   dma.cpus=MASK which CPUs the first kernel directs them to
 *   dma.unclaimed=1 the kernels between the first and the last take everything back as an
 *                agent does: no interrupts are set up, the BAR is not mapped
 *   dma.fill=1   fill free memory before anything is retrieved
 *   dma.more=1   preserve memory that the device does not need, and retrieve it after
 *                the device
 *   dma.memonly=1 the modes that damage the handover preserve memory alone
 *   dma.replaces=N how often the mode "replace" does it
 *   dma.iova=N   where in the IOAS the memory is
 *   dma.areas=N  so many areas more in the IOAS, of a page each
 *   dma.large=N  N MiB of memory more, in the IOAS as so many areas as dma.pieces=M says,
 *                see large.c; of 4 KiB folios with dma.small=1
 *   dma.outside=N every N-th packet is to be written to an IOVA that is not mapped
 *   dma.next=ARG one more argument for each next kernel
 *   dma.modules=root modules are to be loaded from the root file system, see modules.c
 *   dma.leaks=1  look for memory that the kernel leaked, where it can tell, in each kernel
 *   dma.stage=K, dma.left=M, dma.mark=ADDRESS are set by itself,
 *   and so are dma.step=I and dma.point=J, which allocation is to fail
 */
#ifndef DMA_GUEST_H
#define DMA_GUEST_H

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAGE		4096u
#define QUEUE_SIZE	(2u << 20)	/* one contiguous piece, for queues */
#define BUF_SIZE	(8u << 20)
#define BUF_OFF		QUEUE_SIZE
#define STATE_OFF	(BUF_OFF + BUF_SIZE)
#define STATE_SIZE	(2u << 20)
#define MEM_SIZE	(STATE_OFF + STATE_SIZE)
#define NPAGES		(MEM_SIZE / PAGE)
#define MAX_VECTORS	16

#define BDF		"0000:01:00.0"
#define BDF2		"0000:02:00.0"
#define PCI_DEVICE	"/sys/bus/pci/devices/"

enum { TOK_MEM = 1, TOK_IOMMUFD = 2, TOK_DEV = 3, TOK_MORE = 5, TOK_DEV2 = 6,
       TOK_MEM2 = 7, TOK_LARGE = 16 /* and the seven that follow */ };

struct nic_state {
	uint32_t next;		/* descriptor to look at next */
	uint32_t tail;		/* what the tail register was set to last */
	uint64_t expect;	/* next sequence number */
	uint64_t received;
	uint64_t lost;
	uint64_t doubled;
	uint64_t bad;
	uint64_t incomplete;
};

#define NVME_QUEUES	8u
#define NVME_DEPTH	125u		/* commands in flight in each queue */

struct nvme_state {
	struct nvme_queue {
		uint32_t tail, head, phase;
		struct nvme_read {
			uint32_t chunk;	/* of the disk */
			bool busy;
		} read[NVME_DEPTH];
	} queue[NVME_QUEUES];
	uint32_t next_chunk;
	uint64_t completed;
	uint64_t failed;	/* with an error of the device */
	uint64_t bad;		/* with wrong data */
};

/* What survives in the memfd, at STATE_OFF. */
struct state {
	uint64_t pa[NPAGES];
	union {
		struct nic_state nic;
		struct nvme_state nvme;
	};
};
_Static_assert(sizeof(struct state) <= STATE_SIZE, "no room for the state");

/*
 * A kind of device.
 *
 * @vectors: How many it uses with dma.irq=1.
 * @start:   From bound, attached and a bus master to doing DMA.
 * @take:    Take what is complete, and if @give (and the BAR is mapped) let the device
 *           use its place again. Returns how much it was.
 * @resume:  The BAR is mapped again, in the next kernel.
 * @report:  Say RESULT, at the very end.
 */
struct driver {
	const char *name;
	unsigned int vectors;
	void (*start)(bool irq);
	uint64_t (*take)(bool give);
	void (*resume)(void);
	void (*report)(void);
};

extern const struct driver *const e1000e, *const igb, *const nvme;
extern const struct driver *driver;

/* nvme.c: so many reads in each queue, two seconds of the throttled disk */
#define NVME_PENDING	40u
void nvme_post(uint32_t each);

extern bool stopping;		/* nothing new is to be started */
extern uint32_t outside;	/* every n-th buffer of a NIC is not in the IOAS */

/* base.c */
extern char cmdline[4096];
double now(void);
unsigned long long counter(void);
void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void __attribute__((noreturn)) die(const char *what);
void check(long ret, const char *what);
void must(int ret, const char *what);
void verdict(bool ok, const char *what, int ret);
void check_leaks(void);
int put(const char *path, const char *val);
const char *param(const char *name, const char *dflt);

/* memory.c */
extern uint8_t *mem;
extern struct state *st;
extern int memfd;
void huge_pages(bool on);
void compact_memory(void);
int new_memfd(const char *name, size_t size);
void map_mem(void);
void note_pages(void);
void check_pages(void);
uint64_t dma_addr(uint32_t off);
void preserve_more(void);
void retrieve_more(void);
void fill_memory(void);
void fill_freed_memory(int fd);
void fill_iovas(void);
void check_filler(void);

/* large.c: all do nothing without dma.large= */
void make_large(void);
void map_large(uint32_t ioas);
void preserve_large(void);
void retrieve_large(void);

/* functions.c: those without a mode's place in their name do nothing in other modes */
void functions_prepare(void);
void functions_first(void);
void functions_left_first(void);
void functions_last(void);
void functions_replaced(void);
void __attribute__((noreturn)) functions_unbound_next(int stage);
void __attribute__((noreturn)) functions_fail_next(int stage);
void __attribute__((noreturn)) functions_stopped_next(int stage);
void functions_lost_next(int stage);
void functions_deadline_first(void);
void sibling_first(void);
void sibling_last(void);
void sibling_waiting(void);
void __attribute__((noreturn)) functions_deadline_next(int stage);
void functions_preserve_memory(void);
void functions_retrieve_memory(void);
void functions_map(uint32_t ioas);
void functions_bind(bool claim);

/* iommu.c */
extern int iommufd;
extern uint32_t ioas_id;
extern uint64_t mem_iova;	/* of the memory */
extern bool iommu;		/* the device uses IOVAs, not physical addresses */
uint32_t alloc_ioas(void);
int try_map_file(uint32_t ioas, int fd, uint64_t start, uint64_t length, uint64_t iova);
void make_ioas(void);
uint64_t get_pa(uint64_t iova);
uint32_t find_frozen(void);
void try_destroy(uint32_t id, int expect, const char *what);
void replace_unequal(void);
uint32_t alloc_hwpt(uint32_t dev_id, uint32_t flags);
void show_hitless(void);
uint64_t unit_register(const char *name);
void show_unit(void);
void show_hwpts(void);

/* vfio.c */
extern volatile uint8_t *bar;
extern int dev;
extern uint32_t dev_id;
extern int irqfd[MAX_VECTORS];
extern unsigned int irqs;	/* eventfds in use */
uint32_t rd(int reg);
void wr(int reg, uint32_t val);
void bind_vfio_pci(const char *bdf);
void show_driver(void);
int open_dev(int nr);
int bind_dev(int fd, int ctx);
int bind_vf(int fd, int ctx, int pf);
int try_bind(void);
int attach_dev(int fd, uint32_t pt);
int try_attach(uint32_t id);
int try_detach(int fd);
void map_bar(void);
bool can_map_bar(void);
void unmap_bar(void);
void bus_master(int fd);
bool is_master(const char *bdf);
void mark_trace(void);
bool goes_to_d3hot(void);
int try_hot_reset(int fd);
bool has_flr(void);
int try_flr(void);
bool can_read_config(void);
int write_by_eventfd(int reg, uint32_t val);
void set_irqs(int fd, uint32_t index, unsigned int nr);
void fail_to_set_irqs(void);
void set_few_irqs(void);
uint64_t irq_count(unsigned int vector);

/* frozen.c */
void use_while_frozen(void);
bool used_while_frozen(void);
void was_used_while_frozen(void);

/* luo.c */
extern int session;
int luo(void);
void keep_luo(void);
void load_kernel(int stage, int left, const char *add);
void load_unaware_kernel(void);
void load_crash_kernel(const char *add);
int try_create_session(const char *name);
void create_session(const char *name);
int try_retrieve_session(const char *name);
void retrieve_session(const char *name);
int try_preserve(int fd, uint64_t token);
int try_retrieve(uint64_t token);
int try_finish(void);
void end_session(void);
void preserve_all(void);
void do_kexec(void);
void __attribute__((noreturn)) power_off(void);

/* main.c */
void first(bool irq);
void retrieve_iommufd(void);
void retrieve_device(void);
void run_for(double seconds);
void run_until_quiet(double quiet);
void wait_for_dma(void);
void __attribute__((noreturn)) finish_run(void);

/* damage.c */
uint64_t kho_map(void);
void damage_first(void);
void damage_next(int stage);
void damage_context_next(int stage);

/* areas.c */
void areas_first(void);

/* crash.c */
void crash_end(void);
void __attribute__((noreturn)) crashed(void);

/* translated.c */
void plain_first(void);
void plain_next(int stage);
void __attribute__((noreturn)) iovas_next(int stage);
void __attribute__((noreturn)) blocked_next(int stage);
void __attribute__((noreturn)) watch_ring(int fd);

/* modes.c: what is tried instead of, or beside, the plain run */
struct mode {
	const char *name;
	/* In the first kernel, under DMA; if it returns, the run goes on. */
	void (*first)(void);
	/* Right before reboot(2). */
	void (*last)(void);
	/* In the next kernel, instead of taking everything back. */
	void (*next)(int stage);
	/* In the last kernel, at the end of the run. */
	void (*end)(void);
	/* Before the retrieve; with all of it bound; with the new HWPT; nothing is finished. */
	void (*waiting)(void);
	void (*bound)(void);
	void (*replaced)(void);
	int unbound;	/* errno of opening the device before the retrieve, EBUSY if 0 */
	bool stays;	/* no kexec follows */
	bool dies;	/* run by a child, that kills itself */
	bool every_vector;	/* each one of an I/O queue has an interrupt pending */
	bool reversed;	/* retrieve the device first and the memfd last */
	bool small;	/* buffers of 4 KiB folios: larger ones are never moved by compaction */
};

/* modules.c */
void modules_start(int stage);
void modules_first(void);
void modules_waiting(void);
void modules_late_waiting(void);
void modules_never_first(void);
void __attribute__((noreturn)) modules_never_next(int stage);
void __attribute__((noreturn)) modules_hang(void);
void __attribute__((noreturn)) modules_hang_next(int stage);

/* counts.c: pages that are in use for what a handover uses them for */
struct counts {
	long preserved;		/* by KHO */
	long pinned;
	long tables;		/* of an IOMMU */
	long files;		/* of memfds */
};
struct counts count_pages(void);
struct counts count_other_pages(void);
void check_counts(const struct counts *before);

/* faults.c */
void faults_preserve_first(void);
void faults_boot_first(void);
void faults_boot_next(int stage);
void faults_retrieve_next(int stage);
/* Do @op with the first allocation failing that @function asks for. Returns what it returned. */
int fail_in(const char *function, int (*op)(void));

void set_deadline(uint32_t ms);
void failing_reboot(const char *why, int error);
uint32_t refusal(void);
void dma_goes_on(void);
void __attribute__((noreturn)) deadline_next(int stage);
void __attribute__((noreturn)) quiesced(void);

const struct mode *find_mode(const char *name);
extern const struct mode *mode;

#endif
