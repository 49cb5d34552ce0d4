/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Without libFuzzer: each file of the corpus, each of its prefixes, and seeded mutations. */
#include <dirent.h>
#include <stdio.h>
#include <string.h>

#include <criterion/criterion.h>

#include "fuzz.h"

#define MUTATIONS 2000

static uint32_t state = 20261120;
static uint32_t rnd(void)
{
	state ^= state << 13;
	state ^= state >> 17;
	state ^= state << 5;
	return state;
}

Test(corpus, replay, .timeout = 120)
{
	const char *dir = getenv("CORPUS");
	struct dirent *e;
	int n_files = 0;
	DIR *d = opendir(dir);

	cr_assert(d, "%s", dir);
	fprintf(stderr, "seed %u\n", state);
	while ((e = readdir(d))) {
		static uint8_t data[65536];
		char path[1024];
		size_t n;
		FILE *f;

		if (e->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", dir, e->d_name);
		f = fopen(path, "re");
		cr_assert(f);
		n = fread(data, 1, sizeof(data), f);
		fclose(f);
		n_files++;
		for (size_t i = 0; i <= n; i++) {
			uint8_t *copy = malloc(i + 1);

			memcpy(copy, data, i);
			(void)LLVMFuzzerTestOneInput(copy, i);
			free(copy);
		}
		for (int m = 0; n > 0 && m < MUTATIONS; m++) {
			uint8_t *copy = malloc(n);

			memcpy(copy, data, n);
			for (uint32_t k = 0; k <= rnd() % 4; k++)
				copy[rnd() % n] = (uint8_t)rnd();
			(void)LLVMFuzzerTestOneInput(copy, n);
			free(copy);
		}
	}
	closedir(d);
	cr_assert(n_files > 0);
}
