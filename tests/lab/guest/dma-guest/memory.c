// SPDX-License-Identifier: GPL-2.0-or-later
/* The memory that the device writes to, and all other memory of the guest. */

#include "guest.h"
#include <sys/mman.h>

uint8_t *mem;
struct state *st;
int memfd = -1;

static uint8_t *filler;
static size_t filler_len;

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

/*
 * Write down, and say, where the device finds the pages: DMA elsewhere is an error.
 * Without an IOMMU the queues have to be contiguous.
 */
void note_pages(void)
{
	uint32_t first = 0;

	if (iommu) {
		say("MEMORY at=%#llx pages=%u", (unsigned long long)mem_iova, NPAGES);
		return;
	}
	for (uint32_t i = 0; i < NPAGES; i++) {
		st->pa[i] = get_pa(mem_iova + (uint64_t)i * PAGE);
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

/* Behind an IOMMU the kernel's own comparison has to do. */
void check_pages(void)
{
	uint32_t moved = 0;

	if (iommu)
		return;
	for (uint32_t i = 0; i < NPAGES; i++)
		moved += get_pa(mem_iova + (uint64_t)i * PAGE) != st->pa[i];
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

/* How many pages of the device's buffers, which the memfd @fd has noted, are in the filler. */
static uint32_t filled_buffers(int fd)
{
	int flags = open("/proc/kpageflags", O_RDONLY);
	uint64_t pa[NPAGES], flag;
	uint32_t n = 0;

	check(flags, "/proc/kpageflags");
	check(pread(fd, pa, sizeof(pa), STATE_OFF + offsetof(struct state, pa)), "pread");
	for (uint32_t i = BUF_OFF / PAGE; i < STATE_OFF / PAGE; i++) {
		check(pread(flags, &flag, sizeof(flag), pa[i] / PAGE * sizeof(flag)), "pread");
		n += flag >> KPF_ANON & 1;
	}
	close(flags);
	return n;
}

#define STEP	(16u << 20)

/*
 * The same, until it has all of the buffers that were just freed, should they have been.
 * They are huge pages, which the kernel keeps apart for whoever wants a huge page next.
 */
void fill_freed_memory(int fd)
{
	size_t len = available() / 4 * 3;
	uint32_t n;

	must(put("/sys/kernel/mm/transparent_hugepage/enabled", "always"), "huge pages");
	map_filler(len);
	do {
		fill(STEP);
		n = filled_buffers(fd);
	} while (n < BUF_SIZE / PAGE && filler_len + STEP <= len);
	say("filled %zu MiB, with %u pages of buffers", filler_len >> 20, n);
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
