/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * memfd-pages: which bytes in which physical pages.
 *
 *	memfd-pages
 *		One line for each descriptor from 3 on that LISTEN_FDS counts (names from
 *		LISTEN_FDNAMES; LISTEN_PID is not looked at, so that a shell may stand in
 *		between):
 *
 *		NAME size BYTES sha256 HEX pages N pfns-sha256 HEX first PFN,PFN,...
 *
 *	memfd-pages --runs
 *		Of the same descriptors only how their pages lie, which takes less long:
 *
 *		NAME runs N
 *
 *	memfd-pages --create SIZE [--seed N] [--name X] [--huge] [--gap N] [-- CMD...]
 *		A memfd of SIZE bytes (suffix K, M, G) with bytes that follow from the seed, as
 *		descriptor 3, and CMD run with LISTEN_FDS=1. Without CMD: its line. The line of a
 *		memfd that khod has taken says more than one from before, since preserving may
 *		move pages out of the next kernel's way:
 *
 *		memfd-pages --create 8M -- sh -c 'khoctl register vm --fd 3 && memfd-pages'
 *
 *		--huge asks for huge pages, small ones otherwise. With --gap N the physical page after every N
 *		is one of another memfd, which CMD has as another descriptor for as long as it runs.
 *
 * Every page is touched first, then read from /proc/self/pagemap, which needs root.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <openssl/evp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FIRST 8
#define PFN_MASK ((UINT64_C(1) << 55) - 1)
#define PRESENT (UINT64_C(1) << 63)

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif

static void die(const char *what)
{
	fprintf(stderr, "memfd-pages: %s: %s\n", what, strerror(errno));
	exit(EXIT_FAILURE);
}

static void print_hex(const char *before, const unsigned char *p, unsigned int n)
{
	fputs(before, stdout);
	for (unsigned int i = 0; i < n; i++)
		printf("%02x", p[i]);
}

static void print_fd(int fd, const char *name)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE), n;
	unsigned char sum[EVP_MAX_MD_SIZE];
	const volatile unsigned char *touch;
	uint64_t first[FIRST];
	unsigned int len = 0;
	struct stat st;
	EVP_MD_CTX *md;
	void *map = NULL;
	int pagemap;

	if (fstat(fd, &st) < 0)
		die(name);
	n = ((size_t)st.st_size + page - 1) / page;
	if (n > 0) {
		map = mmap(NULL, n * page, PROT_READ, MAP_SHARED, fd, 0);
		if (map == MAP_FAILED)
			die("mmap");
	}
	md = EVP_MD_CTX_new();
	if (!md || EVP_DigestInit_ex(md, EVP_sha256(), NULL) != 1 ||
	    EVP_DigestUpdate(md, map ? map : "", (size_t)st.st_size) != 1 ||
	    EVP_DigestFinal_ex(md, sum, &len) != 1)
		die("SHA-256");
	printf("%s size %jd", name, (intmax_t)st.st_size);
	print_hex(" sha256 ", sum, len);

	touch = map;
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		die("/proc/self/pagemap");
	if (EVP_DigestInit_ex(md, EVP_sha256(), NULL) != 1)
		die("SHA-256");
	for (size_t i = 0; i < n; i++) {
		uint64_t entry;

		(void)touch[i * page];
		if (pread(pagemap, &entry, sizeof(entry),
			  (off_t)(((uintptr_t)map / page + i) * sizeof(entry))) != sizeof(entry))
			die("/proc/self/pagemap");
		if (!(entry & PRESENT) || (entry & PFN_MASK) == 0) {
			fprintf(stderr, "\nmemfd-pages: page %zu has no readable PFN (not root?)\n", i);
			exit(EXIT_FAILURE);
		}
		entry &= PFN_MASK;
		if (i < FIRST)
			first[i] = entry;
		if (EVP_DigestUpdate(md, &entry, sizeof(entry)) != 1)
			die("SHA-256");
	}
	if (EVP_DigestFinal_ex(md, sum, &len) != 1)
		die("SHA-256");
	printf(" pages %zu", n);
	print_hex(" pfns-sha256 ", sum, len);
	fputs(" first ", stdout);
	for (size_t i = 0; i < n && i < FIRST; i++)
		printf("%s%" PRIx64, i ? "," : "", first[i]);
	fputs(n ? "\n" : "-\n", stdout);
	EVP_MD_CTX_free(md);
	close(pagemap);
	if (map)
		munmap(map, n * page);
}

static int compare(const void *a, const void *b)
{
	const uint64_t *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

/* How many runs of consecutive physical pages there are. */
static void print_runs(int fd, const char *name)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE), n, size, done = 0, runs = 0;
	const volatile unsigned char *map;
	struct stat st;
	uint64_t *pfns;
	int pagemap;

	if (fstat(fd, &st) < 0)
		die(name);
	n = ((size_t)st.st_size + page - 1) / page;
	size = n * sizeof(*pfns);
	map = mmap(NULL, n * page, PROT_READ, MAP_SHARED, fd, 0);
	pfns = malloc(size);
	if (map == MAP_FAILED || !pfns)
		die(name);
	for (size_t i = 0; i < n; i++)
		(void)map[i * page];
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		die("/proc/self/pagemap");
	while (done < size) {
		ssize_t r = pread(pagemap, (char *)pfns + done, size - done,
				  (off_t)((uintptr_t)map / page * sizeof(*pfns) + done));

		if (r <= 0)
			die("/proc/self/pagemap");
		done += (size_t)r;
	}
	qsort(pfns, n, sizeof(*pfns), compare);
	for (size_t i = 0; i < n; i++)
		runs += i == 0 || pfns[i] != pfns[i - 1] + 1;
	printf("%s runs %zu\n", name, runs);
	close(pagemap);
	free(pfns);
	munmap((void *)map, n * page);
}

static int print_passed(void (*print)(int, const char *))
{
	const char *count = getenv("LISTEN_FDS"), *list = getenv("LISTEN_FDNAMES");
	char *names = strdup(list ? list : ""), *next = names;
	int n = count ? atoi(count) : 0;

	if (n <= 0) {
		fputs("memfd-pages: LISTEN_FDS passes no descriptors\n", stderr);
		return EXIT_FAILURE;
	}
	for (int i = 0; i < n; i++) {
		char *name = next ? strsep(&next, ":") : NULL, fallback[16];

		if (!name || !*name) {
			snprintf(fallback, sizeof(fallback), "fd%d", 3 + i);
			name = fallback;
		}
		print(3 + i, name);
	}
	free(names);
	return EXIT_SUCCESS;
}

static unsigned char *map_shared(int fd, size_t size, int advice)
{
	void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (map == MAP_FAILED)
		die("mmap");
	/* A kernel without huge pages knows neither advice. */
	if (madvise(map, size, advice) < 0 && advice == MADV_HUGEPAGE)
		die("madvise");
	return map;
}

static int create(uint64_t size, uint64_t seed, const char *name, bool huge, uint64_t gap)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE), n = size / page, holes_size = 0;
	unsigned char *map, *holes = NULL;
	int fd, other;

	fd = memfd_create(name, MFD_ALLOW_SEALING | MFD_EXEC);
	if (fd < 0 && errno == EINVAL)
		fd = memfd_create(name, MFD_ALLOW_SEALING);
	if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
		die("memfd");
	if (size == 0)
		return fd;
	if (gap > 0) {
		holes_size = (n / gap + 1) * page;
		other = memfd_create("holes", 0);
		if (other < 0 || ftruncate(other, (off_t)holes_size) < 0)
			die("holes");
		holes = map_shared(other, holes_size, MADV_NOHUGEPAGE);
	}
	map = map_shared(fd, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	/* xorshift64: every page differs, none is zero */
	for (uint64_t i = 0, x = seed * 2 + 1; i < size / 8; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		memcpy(map + i * 8, &x, 8);
		if (gap > 0 && (i + 1) % (gap * page / 8) == 0)
			holes[i / (gap * page / 8) * page] = 1;
	}
	munmap(map, size);
	if (holes)
		munmap(holes, holes_size);
	return fd;
}

static uint64_t parse_size(const char *s)
{
	char *end;
	uint64_t v = strtoull(s, &end, 10);

	switch (*end) {
	case 'G':
		v <<= 10;
		/* fall through */
	case 'M':
		v <<= 10;
		/* fall through */
	case 'K':
		v <<= 10;
		end++;
	}
	if (*end || end == s) {
		fprintf(stderr, "memfd-pages: '%s' is not a size\n", s);
		exit(2);
	}
	return v;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "create", required_argument, NULL, 'c' },
		{ "seed", required_argument, NULL, 's' },
		{ "name", required_argument, NULL, 'n' },
		{ "huge", no_argument, NULL, 'h' },
		{ "gap", required_argument, NULL, 'g' },
		{ "runs", no_argument, NULL, 'r' },
		{},
	};
	uint64_t size = 0, seed = 1, gap = 0;
	bool make = false, huge = false, runs = false;
	const char *name = "memfd";
	int c, fd;

	while ((c = getopt_long(argc, argv, "+", options, NULL)) >= 0) {
		switch (c) {
		case 'c':
			size = parse_size(optarg);
			make = true;
			break;
		case 's':
			seed = strtoull(optarg, NULL, 10);
			break;
		case 'n':
			name = optarg;
			break;
		case 'h':
			huge = true;
			break;
		case 'g':
			gap = strtoull(optarg, NULL, 10);
			break;
		case 'r':
			runs = true;
			break;
		default:
			return 2;
		}
	}
	if (!make)
		return print_passed(runs ? print_runs : print_fd);

	fd = create(size, seed, name, huge, gap);
	if (fd != 3) {
		if (dup2(fd, 3) < 0)
			die("dup2");
		close(fd);
	}
	if (setenv("LISTEN_FDS", "1", 1) < 0 || setenv("LISTEN_FDNAMES", name, 1) < 0 ||
	    unsetenv("LISTEN_PID") < 0)
		die("setenv");
	if (optind == argc)
		return print_passed(print_fd);
	execvp(argv[optind], argv + optind);
	die(argv[optind]);
}
