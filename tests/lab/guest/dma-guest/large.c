// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Memory that is in the IOAS for its size and its number of areas only: the benchmarks'.
 *
 * One memfd if it is one area, else up to eight. Lengths of areas and the gaps between their
 * IOVAs are random and the same in each kernel.
 */

#include "guest.h"
#include <sys/mman.h>

#define MAX_FILES	8u
#define HUGE		(2ull << 20)
#define SEED		0x6b686f64u

/* From the memory of the device, which is in the same IOAS */
#define LARGE_OFF	(1ull << 37)

static int files[MAX_FILES];
static uint32_t nr_files;
static uint64_t file_size;

/* What the parameters ask for; false if there is to be none. */
static bool large(uint32_t *areas)
{
	uint64_t size = strtoull(param("dma.large", "0"), NULL, 0) << 20;

	*areas = atoi(param("dma.pieces", "1"));
	nr_files = *areas < MAX_FILES ? *areas : MAX_FILES;
	if (size)
		file_size = size / nr_files / HUGE * HUGE;
	return size;
}

/* In pages, from 1 to @most: a linear congruential generator is good enough for lengths. */
static uint64_t random_pages(uint32_t *state, uint64_t most)
{
	*state = *state * 1664525u + 1013904223u;
	return 1 + (*state >> 8) % most;
}

void make_large(void)
{
	uint32_t areas;
	uint8_t *p;

	if (!large(&areas))
		return;
	if (atoi(param("dma.small", "0")))
		huge_pages(false);
	for (uint32_t i = 0; i < nr_files; i++) {
		files[i] = new_memfd("large", file_size);
		p = mmap(NULL, file_size, PROT_READ | PROT_WRITE, MAP_SHARED, files[i], 0);
		if (p == MAP_FAILED)
			die("mmap large memory");
		for (uint64_t off = 0; off < file_size; off += PAGE)
			p[off] = 1;
		munmap(p, file_size);
	}
	huge_pages(true);
}

/*
 * One area a file begins where huge pages can. More of them are of up to twice the mean length,
 * with a page for each that is still to come, and the last one has the rest.
 */
void map_large(uint32_t ioas)
{
	uint64_t pages = file_size / PAGE, iova = mem_iova + LARGE_OFF;
	uint32_t areas, each, state = SEED;

	if (!large(&areas))
		return;
	each = areas / nr_files;
	for (uint32_t i = 0; i < nr_files; i++) {
		uint64_t at = 0, n, left;

		for (uint32_t k = each; k; k--, at += n) {
			left = pages - at - (k - 1);
			n = random_pages(&state, 2 * (pages - at) / k);
			if (k == 1 || n > left)
				n = left;
			must(try_map_file(ioas, files[i], at * PAGE, n * PAGE, iova),
			     "map large memory");
			iova += (n + random_pages(&state, 16)) * PAGE;
		}
		iova = (iova + HUGE - 1) / HUGE * HUGE;
	}
}

void preserve_large(void)
{
	uint32_t areas;

	if (!large(&areas))
		return;
	for (uint32_t i = 0; i < nr_files; i++)
		must(try_preserve(files[i], TOK_LARGE + i), "preserve large memory");
}

void retrieve_large(void)
{
	uint32_t areas;

	if (!large(&areas))
		return;
	for (uint32_t i = 0; i < nr_files; i++) {
		files[i] = try_retrieve(TOK_LARGE + i);
		must(files[i], "retrieve large memory");
	}
}
