// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * memory-pressure: use up every free page of a guest, with a pattern, and compact.
 *
 * A page that should have been preserved but was not keeps its old contents until
 * somebody else uses it, so a test that only looks right after a kexec believes too
 * much. This program makes somebody else use it: children fill all memory that is
 * free (less a reserve) with a pattern, memory is compacted while they hold it, and the
 * pattern is checked before it is given back: a device that writes to a page
 * that is not its own any more is found here.
 *
 * Usage: memory-pressure [RESERVE_MIB [ROUNDS]]     (default 48 MiB, 2 rounds)
 * Prints one line per round; exit status 1 if a page changed under it.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PATTERN 0xdbdbdbdbdbdbdbdbULL
#define CHUNK (4UL << 20)
#define MAX_CHUNKS (1UL << 20)

static uint64_t *chunks[MAX_CHUNKS];

/* MemFree of /proc/meminfo in bytes; free, not available: caches are left alone. */
static unsigned long memory_free(void)
{
	unsigned long kib = 0;
	char line[128];
	FILE *f = fopen("/proc/meminfo", "re");

	if (!f)
		return 0;
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "MemFree: %lu kB", &kib) == 1)
			break;
	fclose(f);
	return kib << 10;
}

static int compact(void)
{
	FILE *f = fopen("/proc/sys/vm/compact_memory", "we");
	int r;

	if (!f)
		return -errno;
	r = fputs("1", f) < 0 ? -errno : 0;
	if (fclose(f) && !r)
		r = -errno;
	return r;
}

static void fill(uint64_t *p)
{
	for (size_t i = 0; i < CHUNK / sizeof(*p); i++)
		p[i] = PATTERN;
}

/* Bytes of the chunk that no longer hold the pattern. */
static unsigned long damaged(const uint64_t *p)
{
	unsigned long bad = 0;

	for (size_t i = 0; i < CHUNK / sizeof(*p); i++)
		bad += p[i] != PATTERN ? sizeof(*p) : 0;
	return bad;
}

static int round_of(unsigned int number, unsigned long reserve)
{
	unsigned long bad = 0;
	size_t n = 0;
	int r;

	while (n < MAX_CHUNKS && memory_free() > reserve + CHUNK) {
		void *p = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (p == MAP_FAILED)
			break;
		/* 4 KiB pages reach every free page; huge ones leave the scattered ones alone. */
		madvise(p, CHUNK, MADV_NOHUGEPAGE);
		fill(p);
		chunks[n++] = p;
	}
	r = compact();
	if (r < 0) {
		fprintf(stderr, "memory-pressure: compaction: %s\n", strerror(-r));
		return 2;
	}
	for (size_t i = 0; i < n; i++) {
		bad += damaged(chunks[i]);
		munmap(chunks[i], CHUNK);
	}
	printf("memory-pressure: round %u filled %zu MiB, %lu bytes changed\n", number,
	       n * (CHUNK >> 20), bad);
	fflush(stdout);
	return bad ? 1 : 0;
}

int main(int argc, char **argv)
{
	unsigned long reserve = argc > 1 ? strtoul(argv[1], NULL, 0) : 48;
	unsigned int rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : 2;
	int r = 0;

	/* The kernel kills this program first when memory runs out, not a service. */
	FILE *f = fopen("/proc/self/oom_score_adj", "we");

	if (f) {
		fputs("1000", f);
		fclose(f);
	}
	for (unsigned int i = 1; i <= rounds && r == 0; i++)
		r = round_of(i, reserve << 20);
	return r;
}
