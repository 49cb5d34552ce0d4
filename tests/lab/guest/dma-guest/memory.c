// SPDX-License-Identifier: GPL-2.0-or-later
/* The memory that the device writes to, and all other memory of the guest. */

#include "guest.h"
#include <sys/mman.h>

uint8_t *mem;
struct state *st;
int memfd = -1;

static uint8_t *filler;
static size_t filler_len;

/* Whether memfds are made of them, from now on. */
void huge_pages(bool on)
{
	must(put("/sys/kernel/mm/transparent_hugepage/shmem_enabled", on ? "force" : "never"),
	     "huge pages");
}

void compact_memory(void)
{
	must(put("/proc/sys/vm/compact_memory", "1"), "compact memory");
}

int new_memfd(const char *name, size_t size)
{
	int fd = memfd_create(name, 0);

	check(fd, "memfd_create");
	check(ftruncate(fd, size), "ftruncate");
	return fd;
}

void map_mem(void)
{
	mem = mmap(NULL, MEM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	if (mem == MAP_FAILED)
		die("mmap memfd");
	st = (void *)(mem + STATE_OFF);
}

/* Where the device finds the byte at @off of the memory. */
uint64_t dma_addr(uint32_t off)
{
	return iommu ? mem_iova + off : st->pa[off / PAGE] + off % PAGE;
}

/* Where the pages are: by the IOAS if the device uses that, else by this program's own table. */
static void find_pages(uint64_t *pa)
{
	uint64_t entry;
	int fd;

	if (!iommu) {
		for (uint32_t i = 0; i < NPAGES; i++)
			pa[i] = get_pa(mem_iova + (uint64_t)i * PAGE);
		return;
	}
	fd = open("/proc/self/pagemap", O_RDONLY);
	check(fd, "pagemap");
	for (uint32_t i = 0; i < NPAGES; i++) {
		volatile uint8_t *page = mem + (size_t)i * PAGE;

		(void)*page;		/* it is in the table when it was read */
		check(pread(fd, &entry, sizeof(entry), (uintptr_t)page / PAGE * sizeof(entry)),
		      "pagemap");
		pa[i] = (entry & ((1ull << 55) - 1)) * PAGE;
	}
	close(fd);
}

/*
 * Write down where the pages are, and say where the device finds them: DMA elsewhere is an
 * error. Without an IOMMU the queues have to be contiguous.
 */
void note_pages(void)
{
	uint32_t first = 0;

	find_pages(st->pa);
	if (iommu) {
		say("MEMORY at=%#llx pages=%u", (unsigned long long)mem_iova, NPAGES);
		return;
	}
	for (uint32_t i = 0; i < NPAGES; i++) {
		if (i && st->pa[i] != st->pa[i - 1] + PAGE) {
			if (i < QUEUE_SIZE / PAGE) {
				errno = ENOMEM;
				die("memory for the queues is not contiguous");
			}
			say("MEMORY at=%#llx pages=%u",
			    (unsigned long long)st->pa[first], i - first);
			first = i;
		}
	}
	say("MEMORY at=%#llx pages=%u", (unsigned long long)st->pa[first],
	    NPAGES - first);
}

/* They must be where they were: behind an IOMMU, too, as its tables go on leading there. */
void check_pages(void)
{
	static uint64_t pa[NPAGES];
	uint32_t moved = 0;

	find_pages(pa);
	for (uint32_t i = 0; i < NPAGES; i++)
		moved += pa[i] != st->pa[i];
	say("%s pages: %u of %u moved", moved ? "FAIL" : "ok", moved, NPAGES);
}

/* The rest of a workload's memory: preserved with the device, not mapped for it. */
#define MORE_SIZE	(32u << 20)
#define MORE_WORDS	(MORE_SIZE / sizeof(uint64_t))
#define MORE_FACTOR	0x6b686f642d646d61ull

static int more = -1;

static uint64_t *map_more(void)
{
	uint64_t *p = mmap(NULL, MORE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, more, 0);

	if (p == MAP_FAILED)
		die("mmap more memory");
	return p;
}

void preserve_more(void)
{
	uint64_t *p;

	if (more < 0) {
		more = new_memfd("more", MORE_SIZE);
		p = map_more();
		for (size_t i = 0; i < MORE_WORDS; i++)
			p[i] = i * MORE_FACTOR;
		munmap(p, MORE_SIZE);
	}
	must(try_preserve(more, TOK_MORE), "preserve more memory");
}

/* The device has been back for a while: it does not wait for this memory. */
void retrieve_more(void)
{
	size_t bad = 0;
	uint64_t *p;

	more = try_retrieve(TOK_MORE);
	must(more, "retrieve more memory");
	p = map_more();
	for (size_t i = 0; i < MORE_WORDS; i++)
		bad += p[i] != i * MORE_FACTOR;
	munmap(p, MORE_SIZE);
	say("%s memory retrieved after the device: %zu words changed", bad ? "FAIL" : "ok", bad);
}

static size_t available(void)
{
	FILE *f = fopen("/proc/meminfo", "r");
	char line[128];
	long kb = 0;

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "MemAvailable: %ld", &kb) == 1)
			break;
	if (f)
		fclose(f);
	return (size_t)kb * 1024;
}

static void map_filler(size_t len)
{
	filler = mmap(NULL, len & ~(PAGE - 1ul), PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (filler == MAP_FAILED)
		die("fill memory");
	filler_len = 0;
}

static void fill(size_t len)
{
	len &= ~(PAGE - 1ul);
	memset(filler + filler_len, 0xa5, len);
	filler_len += len;
}

/* Use what is free for a pattern, so that stray DMA hits it. What is left is for retrieving. */
void fill_memory(void)
{
	size_t len = available() / 4 * 3;

	map_filler(len);
	fill(len);
	say("filled %zu MiB", filler_len >> 20);
}

#define KPF_ANON	12	/* of /proc/kpageflags */

/* How many of the @nr pages at @pa are in the filler. */
static uint32_t filled_pages(const uint64_t *pa, uint32_t nr)
{
	int flags = open("/proc/kpageflags", O_RDONLY);
	uint32_t n = 0;
	uint64_t flag;

	check(flags, "/proc/kpageflags");
	for (uint32_t i = 0; i < nr; i++) {
		check(pread(flags, &flag, sizeof(flag), pa[i] / PAGE * sizeof(flag)), "pread");
		n += flag >> KPF_ANON & 1;
	}
	close(flags);
	return n;
}

#define STEP	(16u << 20)

/* The same, until it has all of these pages, as far as they are free. */
static void fill_pages(const uint64_t *pa, uint32_t nr, const char *what)
{
	size_t len = available() / 4 * 3;
	uint32_t n;

	must(put("/sys/kernel/mm/transparent_hugepage/enabled", "always"), "huge pages");
	map_filler(len);
	do {
		fill(STEP);
		n = filled_pages(pa, nr);
	} while (n < nr && filler_len + STEP <= len);
	say("filled %zu MiB, with %u pages of %s", filler_len >> 20, n, what);
}

/*
 * The buffers that were just freed, should they have been, are huge pages, which the kernel
 * keeps apart for whoever wants a huge page next. The memfd @fd has noted where they are.
 */
void fill_freed_memory(int fd)
{
	static uint64_t pa[NPAGES];

	check(pread(fd, pa, sizeof(pa), STATE_OFF + offsetof(struct state, pa)), "pread");
	fill_pages(pa + BUF_OFF / PAGE, BUF_SIZE / PAGE, "buffers");
}

/* Memory whose physical addresses are the IOVAs of the device: hit if nobody translates them. */
void fill_iovas(void)
{
	static uint64_t pa[NPAGES];

	for (uint32_t i = 0; i < NPAGES; i++)
		pa[i] = mem_iova + (uint64_t)i * PAGE;
	fill_pages(pa, NPAGES, "IOVAs");
}

void check_filler(void)
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
