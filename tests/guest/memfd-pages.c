// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * memfd-pages: what a memfd holds, and in which physical pages.
 *
 *	memfd-pages
 *		for each descriptor passed by LISTEN_FDS (or, without, for 3): one line
 *		"NAME SIZE SHA256-of-contents SHA256-of-PFNs", so that a test can compare
 *		the line from before a kexec with the one from after it. The size is in bytes.
 *	memfd-pages --create SIZE [--seed N] -- CMD...
 *		make a memfd of SIZE bytes with pseudo-random contents (seed 1 unless told)
 *		and run CMD with it as descriptor 3
 *
 * PFNs are read from /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst)
 * after each page has been touched; that needs CAP_SYS_ADMIN, without it they read as zero,
 * which is an error here.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <openssl/evp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGEMAP_PRESENT (1ULL << 63)
#define PAGEMAP_PFN ((1ULL << 55) - 1)
#define FIRST_FD 3

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif

static int fail(const char *what)
{
	fprintf(stderr, "memfd-pages: %s: %s\n", what, strerror(errno));
	return 1;
}

static void print_hash(EVP_MD_CTX *ctx)
{
	unsigned char digest[EVP_MAX_MD_SIZE];
	unsigned int len = 0;

	EVP_DigestFinal_ex(ctx, digest, &len);
	putchar(' ');
	for (unsigned int i = 0; i < len; i++)
		printf("%02x", digest[i]);
}

/* Hash the PFN of each page of the mapping [p, p + size). */
static int hash_pfns(EVP_MD_CTX *ctx, const volatile char *p, size_t size)
{
	size_t page = sysconf(_SC_PAGESIZE);
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return fail("/proc/self/pagemap");
	EVP_DigestInit_ex(ctx, EVP_sha256(), NULL);
	for (size_t off = 0; off < size; off += page) {
		uint64_t entry;

		(void)p[off];
		if (pread(fd, &entry, sizeof(entry), ((uintptr_t)p + off) / page * sizeof(entry)) !=
		    sizeof(entry)) {
			close(fd);
			return fail("reading /proc/self/pagemap");
		}
		if (!(entry & PAGEMAP_PRESENT) || !(entry & PAGEMAP_PFN)) {
			close(fd);
			errno = EPERM;
			return fail("no page frame number (CAP_SYS_ADMIN is needed)");
		}
		entry &= PAGEMAP_PFN;
		EVP_DigestUpdate(ctx, &entry, sizeof(entry));
	}
	close(fd);
	return 0;
}

static int show(int fd, const char *name)
{
	EVP_MD_CTX *ctx = EVP_MD_CTX_new();
	struct stat st;
	char *p;
	int r;

	if (!ctx)
		return fail("EVP_MD_CTX_new");
	if (fstat(fd, &st) < 0)
		return fail(name);
	p = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (p == MAP_FAILED)
		return fail(name);
	printf("%s %jd", name, (intmax_t)st.st_size);
	EVP_DigestInit_ex(ctx, EVP_sha256(), NULL);
	EVP_DigestUpdate(ctx, p, st.st_size);
	print_hash(ctx);
	r = hash_pfns(ctx, p, st.st_size);
	if (r == 0)
		print_hash(ctx);
	putchar('\n');
	munmap(p, st.st_size);
	EVP_MD_CTX_free(ctx);
	return r;
}

/* xorshift64*: the same contents for the same seed, and no page like another. */
static void fill(uint64_t *p, size_t size, uint64_t seed)
{
	uint64_t x = seed * 0x9e3779b97f4a7c15ULL + 1;

	for (size_t i = 0; i < size / sizeof(*p); i++) {
		x ^= x >> 12;
		x ^= x << 25;
		x ^= x >> 27;
		p[i] = x * 0x2545f4914f6cdd1dULL;
	}
}

static int create(size_t size, uint64_t seed, char **cmd)
{
	int fd = memfd_create("memfd-pages", MFD_ALLOW_SEALING | MFD_EXEC);
	void *p;

	if (fd < 0)
		return fail("memfd_create");
	if (ftruncate(fd, size) < 0)
		return fail("ftruncate");
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return fail("mmap");
	fill(p, size, seed);
	munmap(p, size);
	if (fd != FIRST_FD) {
		if (dup2(fd, FIRST_FD) < 0)
			return fail("dup2");
		close(fd);
	}
	execvp(cmd[0], cmd);
	return fail(cmd[0]);
}

static int show_all(void)
{
	const char *count = getenv("LISTEN_FDS"), *list = getenv("LISTEN_FDNAMES");
	char *names = strdup(list ? list : ""), *save = names;
	int n = count ? atoi(count) : 1, r = 0;

	for (int i = 0; i < n && r == 0; i++) {
		const char *name = names ? strsep(&names, ":") : NULL;

		r = show(FIRST_FD + i, name && *name ? name : "fd");
	}
	free(save);
	return r;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "create", required_argument, NULL, 'c' },
		{ "seed", required_argument, NULL, 's' },
		{ NULL, 0, NULL, 0 },
	};
	uint64_t size = 0, seed = 1;
	int c;

	while ((c = getopt_long(argc, argv, "+", options, NULL)) >= 0) {
		if (c == 'c')
			size = strtoull(optarg, NULL, 0);
		else if (c == 's')
			seed = strtoull(optarg, NULL, 0);
		else
			return 2;
	}
	if (!size)
		return show_all();
	if (optind == argc) {
		fputs("memfd-pages: --create needs a command\n", stderr);
		return 2;
	}
	return create(size, seed, argv + optind);
}
