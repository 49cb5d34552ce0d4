// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * kho-bench - what preserved memory costs, and whether it comes back: the guest's
 * half of lablib/memory.py, as PID 1
 *
 * Stage 1 (cold boot) builds a memfd whose pages lie in physical memory in a
 * chosen pattern, loads the kernel /lab/next on the share with the host for kexec,
 * preserves the memfd in a LUO session and reboots into the new kernel.  Stage 2 retrieves it, verifies
 * every byte by the seed, finishes the session and powers off.
 *
 * Nothing is inferred: the number of physically contiguous runs is read from
 * /proc/self/pagemap after the preserve, so that a pattern that did not come
 * about shows in the result.
 *
 * Everything is reported through /dev/kmsg, one "khobench: key=value" a line,
 * so that the lines carry the kernel's timestamps and do not interleave with
 * its own on the serial port.  Times are CLOCK_MONOTONIC, in microseconds.
 *
 * Parameters, on the kernel command line:
 *   khobench.mib=N        size of the memfd in MiB; 0: nothing is preserved
 *   khobench.pattern=P    contig: one page after the other
 *                         hole:   a page of somebody else after every 99
 *                         second: every second page is somebody else's
 *                         mixed:  a folio of 16 KiB and one of 4 KiB in turn, with
 *                                 somebody else's pages between them
 *   khobench.huge=0|1     2 MiB folios (shmem_enabled is set to advise)
 *   khobench.seed=N       seed of the contents
 *   khobench.evict=0|1    first fill the movable memory in KHO's scratch areas
 *                         so that preserving has nothing to migrate (default 1)
 *   khobench.cache=N      first read a file of N MiB, which stays in the page cache
 *   khobench.refill=0|1   write to what is free before the pages are looked at (default 1)
 *   khobench.fill=1       use up free memory before the memfd is retrieved, and
 *                         look at the end that nobody wrote to it
 *   khobench.expect=E     ok (default); enomem: preserving must fail with
 *                         ENOMEM and leave the guest usable; refused: see damage
 *   khobench.damage=D     before the reboot damage the map of preserved memory
 *                         in memory: node (a pointer to nowhere), range (pages
 *                         outside of memory), scratch (pages in scratch), hole (a
 *                         folio of 2 MiB at 512 MiB), overlap (one in which there is
 *                         a page that is preserved by itself) or loop (every pointer
 *                         of a table leads to the same one);
 *                         with expect=refused the next kernel must come up
 *                         without the session and with working memory
 *   khobench.next=ARG     one more argument for the next kernel
 *   khobench.rounds=N     handovers in a row (default 1)
 *   khobench.stage=N      set by stage N - 1
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <linux/kernel-page-flags.h>
#include <linux/kexec.h>

/* linux/liveupdate.h: spelled out, the build host's headers may be older */
#define LU_NAME_LEN 64
struct lu_session_arg {
	uint32_t size;
	int32_t fd;
	uint8_t name[LU_NAME_LEN];
};
struct lu_fd_arg {
	uint32_t size;
	int32_t fd;
	uint64_t token;
};
struct lu_finish_arg {
	uint32_t size;
	uint32_t reserved;
};
#define LU_CREATE_SESSION	_IO(0xBA, 0x00)
#define LU_RETRIEVE_SESSION	_IO(0xBA, 0x01)
#define LU_PRESERVE_FD		_IO(0xBA, 0x40)
#define LU_RETRIEVE_FD		_IO(0xBA, 0x41)
#define LU_FINISH		_IO(0xBA, 0x42)

#define SESSION		"khobench"
#define TOKEN		0x4b484f42ULL
#define PAGE		4096UL
#define HUGE		(2UL << 20)
#define KERNEL		"/lab/next"

static int kmsg = -1;
static char cmdline[4096];

static void __attribute__((format(printf, 1, 2))) say(const char *fmt, ...)
{
	char buf[900];
	int n = snprintf(buf, sizeof(buf), "khobench: ");
	va_list ap;

	va_start(ap, fmt);
	n += vsnprintf(buf + n, sizeof(buf) - n - 1, fmt, ap);
	va_end(ap);
	buf[n++] = '\n';
	if (kmsg < 0 || write(kmsg, buf, n) != n)
		(void)!write(1, buf, n);
}

/* Goes on counting over a kexec, from one kernel to the next. */
static unsigned long long counter(void)
{
	return __builtin_ia32_rdtsc();
}

static void __attribute__((noreturn)) power_off(void)
{
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void __attribute__((noreturn, format(printf, 1, 2)))
die(const char *fmt, ...)
{
	int err = errno;
	char buf[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(buf, sizeof(buf), fmt, ap);
	va_end(ap);
	say("FAIL %s: %s", buf, strerror(err));
	power_off();
}

static uint64_t now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000ULL + ts.tv_nsec / 1000;
}

static const char *param(const char *name, const char *fallback)
{
	static char val[8][128];
	static int slot;
	char key[64], *p, *out = val[slot++ % 8];
	size_t n;

	snprintf(key, sizeof(key), "khobench.%s=", name);
	p = strstr(cmdline, key);
	if (!p)
		return fallback;
	p += strlen(key);
	n = strcspn(p, " \n");
	if (n >= sizeof(val[0]))
		n = sizeof(val[0]) - 1;
	memcpy(out, p, n);
	out[n] = 0;
	return out;
}

static ssize_t slurp(const char *path, char *buf, size_t len)
{
	int fd = open(path, O_RDONLY);
	size_t got = 0;
	ssize_t n;

	if (fd < 0)
		return -1;
	/* A file of /proc may come in several pieces. */
	while ((n = read(fd, buf + got, len - 1 - got)) > 0)
		got += n;
	close(fd);
	if (n < 0)
		return -1;
	buf[got] = 0;
	return got;
}

static void spit(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		die("write %s", path);
	close(fd);
}

static unsigned long meminfo_kib(const char *key)
{
	char buf[4096], *p;

	if (slurp("/proc/meminfo", buf, sizeof(buf)) < 0)
		return 0;
	p = strstr(buf, key);
	return p ? strtoul(p + strlen(key), NULL, 10) : 0;
}

/* Pages that the kernel moved so far: compaction's, above all. */
static size_t count_moved(void)
{
	static char buf[65536];
	char *p = slurp("/proc/vmstat", buf, sizeof(buf)) < 0 ? NULL : strstr(buf, "pgmigrate_success ");

	if (!p)
		die("vmstat");
	return strtoul(strchr(p, ' '), NULL, 10);
}

/*
 * Free memory with the pages that wait on the lists of the CPUs, which MemFree leaves out: tens
 * of MiB if huge pages were freed before.
 */
static long free_kib(void)
{
	static char buf[65536];
	long pages = 0;

	if (slurp("/proc/zoneinfo", buf, sizeof(buf)) < 0)
		die("zoneinfo");
	for (char *p = buf; (p = strstr(p, " count:")); p += 7)
		pages += strtol(p + 7, NULL, 10);
	return (long)meminfo_kib("MemFree:") + pages * (long)(PAGE >> 10);
}

/* -- scratch areas, from debugfs --------------------------------------- */

static struct { uint64_t start, end; } scratch[64];
static int nr_scratch;

static void read_scratch(void)
{
	char a[2048], l[2048], *pa = a, *pl = l;

	if (slurp("/sys/kernel/debug/kho/out/scratch_phys", a, sizeof(a)) < 0 ||
	    slurp("/sys/kernel/debug/kho/out/scratch_len", l, sizeof(l)) < 0)
		die("scratch areas in debugfs");
	while (*pa && *pl && nr_scratch < 64) {
		char *ea, *el;
		uint64_t s = strtoull(pa, &ea, 16), n = strtoull(pl, &el, 16);

		if (ea == pa || el == pl)
			break;
		scratch[nr_scratch].start = s;
		scratch[nr_scratch++].end = s + n;
		say("scratch=%d start=0x%llx kib=%llu", nr_scratch - 1,
		    (unsigned long long)s, (unsigned long long)n >> 10);
		pa = ea + (*ea == '\n');
		pl = el + (*el == '\n');
	}
}

static int in_scratch(uint64_t phys)
{
	for (int i = 0; i < nr_scratch; i++)
		if (phys >= scratch[i].start && phys < scratch[i].end)
			return 1;
	return 0;
}

/*
 * Read the pfns of @n pages mapped at @p into @pfn (0 where not present).
 */
static void read_pfns(void *p, size_t n, uint64_t *pfn)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	off_t off = (uintptr_t)p / PAGE * 8;
	size_t done = 0, want = n * 8;

	if (fd < 0)
		die("pagemap");
	while (done < want) {
		ssize_t r = pread(fd, (char *)pfn + done, want - done,
				  off + done);

		if (r <= 0)
			die("read pagemap");
		done += r;
	}
	close(fd);
	for (size_t i = 0; i < n; i++)
		pfn[i] = pfn[i] >> 63 ? pfn[i] & ((1ULL << 55) - 1) : 0;
}

static int cmp_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/*
 * Movable pages may lie in scratch (it is CMA) and preserving migrates them,
 * which would both cost time and undo the pattern.  Touch memory until scratch
 * is full, keep what lies in it and give the rest back.
 */
static void evict_scratch(int huge)
{
	size_t chunk = 8UL << 20, n = chunk / PAGE, max = 1UL << 34, used = 0;
	uint64_t *pfn = malloc(n * sizeof(*pfn));
	char *hog = mmap(NULL, max, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (!pfn || hog == MAP_FAILED)
		die("hog");
	/* In 2 MiB pages as long as there are some at once: page by page it takes minutes under TCG. */
	if (huge)
		spit("/sys/kernel/mm/transparent_hugepage/defrag", "never");
	madvise(hog, max, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	/* The kernel itself can not use scratch: leave it memory outside. */
	while (used < max && meminfo_kib("CmaFree:") > 16384 &&
	       meminfo_kib("MemFree:") > meminfo_kib("CmaFree:") + 98304) {
		for (size_t i = 0; i < n; i++)
			hog[used + i * PAGE] = 1;
		used += chunk;
	}
	for (size_t off = 0; off < used; off += chunk) {
		size_t from = 0;

		read_pfns(hog + off, n, pfn);
		for (size_t i = 0; i <= n; i++) {
			if (i < n && !in_scratch(pfn[i] * PAGE))
				continue;
			if (i > from)
				madvise(hog + off + from * PAGE,
					(i - from) * PAGE, MADV_DONTNEED);
			from = i + 1;
		}
	}
	free(pfn);
	if (huge)
		spit("/sys/kernel/mm/transparent_hugepage/defrag", "madvise");
	say("evict cma_free_kib=%lu mem_free_kib=%lu", meminfo_kib("CmaFree:"),
	    meminfo_kib("MemFree:"));
}

/* Page cache of a file, movable unlike that of a disk; where it lies is the kernel's choice. */
static void read_file(size_t mib)
{
	static char buf[1 << 20];
	int fd = open("/var/tmp/hole", O_RDWR | O_CREAT, 0600);

	if (fd < 0 || ftruncate(fd, mib << 20))
		die("/var/tmp/hole");
	for (size_t i = 0; i < mib; i++)
		if (read(fd, buf, sizeof(buf)) != (ssize_t)sizeof(buf))
			die("read /var/tmp/hole");
	close(fd);
	say("cached_kib=%lu cma_free_kib=%lu mem_free_kib=%lu", meminfo_kib("\nCached:"),
	    meminfo_kib("CmaFree:"), meminfo_kib("MemFree:"));
}

/* What the kernel says about the size of scratch, if it does */
static void report_need(void)
{
	char size[32], need[32];

	if (slurp("/sys/kernel/kexec/kho_scratch_size", size, sizeof(size)) < 0 ||
	    slurp("/sys/kernel/kexec/kho_scratch_needed", need, sizeof(need)) < 0)
		return;
	say("scratch_size_kib=%llu scratch_needed_kib=%llu",
	    strtoull(size, NULL, 10) >> 10, strtoull(need, NULL, 10) >> 10);
}

/* Where the kernel is: with KASLR at another address each time. */
static void report_place(void)
{
	char buf[8192], *p;

	if (slurp("/proc/iomem", buf, sizeof(buf)) < 0)
		die("/proc/iomem");
	p = strstr(buf, " : Kernel code");
	if (!p)
		die("no kernel in /proc/iomem");
	while (p > buf && p[-1] != '\n')
		p--;
	say("kernel_at=0x%llx", strtoull(p, NULL, 16));
}

/* -- contents ----------------------------------------------------------- */

static inline uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ULL;
	x ^= x >> 27;
	return x;
}

static void fill_page(char *page, uint64_t seed, uint64_t index)
{
	uint64_t *w = (uint64_t *)page, v = mix(seed + index * 0x9e3779b97f4a7c15ULL);

	for (size_t i = 0; i < PAGE / 8; i++)
		w[i] = v + i * 0x0123456789abcdefULL;
}

static size_t check_pages(const char *p, size_t n, uint64_t seed)
{
	size_t bad = 0;

	for (size_t k = 0; k < n; k++) {
		const uint64_t *w = (const uint64_t *)(p + k * PAGE);
		uint64_t v = mix(seed + k * 0x9e3779b97f4a7c15ULL);
		size_t i;

		for (i = 0; i < PAGE / 8; i++)
			if (w[i] != v + i * 0x0123456789abcdefULL)
				break;
		if (i < PAGE / 8) {
			if (bad++ < 8)
				say("BAD page=%zu word=%zu", k, i);
		}
	}
	return bad;
}

static char *map_memfd(int fd, size_t len)
{
	char *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (p == MAP_FAILED)
		die("mmap memfd");
	return p;
}

static int make_memfd(const char *name, size_t len, char **p, int huge)
{
	int fd = memfd_create(name, MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, len))
		die("memfd %s", name);
	*p = map_memfd(fd, len);
	madvise(*p, len, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	return fd;
}

/*
 * Physical memory in blocks of eight pages of which the first four and the sixth are free, @n of
 * them, and little else that is free in as small pieces. The others stay with the hog.
 */
static void make_gaps(size_t n)
{
	const size_t span = n * 8 * PAGE * 9 / 8 + (16UL << 20), pages = span / PAGE;
	uint64_t *pfn = malloc(pages * sizeof(*pfn));
	char *hog = mmap(NULL, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	size_t made = 0;

	if (!pfn || hog == MAP_FAILED)
		die("hog");
	madvise(hog, span, MADV_NOHUGEPAGE);	/* Parts of a huge page would not be free at once. */
	memset(hog, 1, span);
	read_pfns(hog, pages, pfn);
	for (size_t i = 0; i + 8 <= pages && made < n; i++) {
		size_t run = 1;

		if (!pfn[i] || pfn[i] % 8 || in_scratch(pfn[i] * PAGE))
			continue;
		while (run < 8 && pfn[i + run] == pfn[i] + run)
			run++;
		if (run < 8)
			continue;
		madvise(hog + i * PAGE, 4 * PAGE, MADV_DONTNEED);
		madvise(hog + (i + 5) * PAGE, PAGE, MADV_DONTNEED);
		made++;
		i += 7;
	}
	free(pfn);
	say("gaps=%zu", made);
}

/* Four of five pages in folios of 16 KiB, the others on their own. */
static int build_mixed(size_t len, uint64_t seed, char **out)
{
	size_t n = len / PAGE, large = n / 5 * 4;
	char *p;
	int fd;

	spit("/sys/kernel/mm/transparent_hugepage/hugepages-16kB/shmem_enabled", "advise");
	make_gaps(n / 5);
	fd = make_memfd("khobench", len, &p, 0);
	munmap(p, len);
	/* A large folio has to be aligned in the mapping, too. */
	p = mmap(NULL, len + 4 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	p = mmap((char *)(((uintptr_t)p + 4 * PAGE - 1) & ~(4 * PAGE - 1)), len, PROT_READ | PROT_WRITE,
		 MAP_SHARED | MAP_FIXED, fd, 0);
	if (p == MAP_FAILED)
		die("mmap memfd");
	madvise(p, large * PAGE, MADV_HUGEPAGE);
	madvise(p + large * PAGE, len - large * PAGE, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < n; i++)
		fill_page(p + i * PAGE, seed, i);
	*out = p;
	return fd;
}

/*
 * Build the memfd to preserve.  The pages between those of the pattern belong
 * to a second memfd that stays allocated until the kexec, so that the holes
 * are memory in use, as on a host.
 */
static int build(size_t len, const char *pattern, int huge, uint64_t seed,
		 char **out)
{
	size_t n = len / PAGE, unit = huge ? HUGE / PAGE : 1, every = 0, h = 0;
	char *p, *q = NULL;
	int fd;

	if (!strcmp(pattern, "mixed"))
		return build_mixed(len, seed, out);
	if (!strcmp(pattern, "hole"))
		every = 99 * unit;
	else if (!strcmp(pattern, "second"))
		every = unit;
	else if (strcmp(pattern, "contig")) {
		errno = EINVAL;
		die("pattern %s", pattern);
	}

	fd = make_memfd("khobench", len, &p, huge);
	if (every)
		make_memfd("holes", (n / every + 1) * unit * PAGE, &q, huge);
	for (size_t i = 0; i < n; i++) {
		fill_page(p + i * PAGE, seed, i);
		if (every && i % every == every - 1)
			q[h++ * unit * PAGE] = 1;
	}
	*out = p;
	return fd;
}

/* How many of the @n pages, sorted, belong to whole folios of 2 MiB. */
static size_t count_huge(const uint64_t *pfn, size_t n)
{
	int fd = open("/proc/kpageflags", O_RDONLY);
	const size_t whole = HUGE / PAGE;
	uint64_t flags[HUGE / PAGE];
	size_t found = 0, tails;

	if (fd < 0)
		die("kpageflags");
	for (size_t i = 0; i + whole <= n; i++) {
		if (pfn[i] % whole || pfn[i + whole - 1] != pfn[i] + whole - 1)
			continue;
		if (pread(fd, flags, sizeof(flags), pfn[i] * 8) != sizeof(flags))
			die("read kpageflags");
		for (tails = 0; tails + 1 < whole && flags[tails + 1] >> KPF_COMPOUND_TAIL & 1; tails++)
			;
		if (flags[0] >> KPF_COMPOUND_HEAD & 1 && tails == whole - 1)
			found += whole;
	}
	close(fd);
	return found;
}

/* How many of the @n pages at @p lie on node 1; 0 without NUMA. */
static size_t count_node1(char *p, size_t n)
{
	void **at = malloc(n * sizeof(*at));
	int *node = malloc(n * sizeof(*node));
	size_t found = 0;

	if (!at || !node)
		die("pages");
	for (size_t i = 0; i < n; i++)
		at[i] = p + i * PAGE;
	if (!syscall(SYS_move_pages, 0, n, at, NULL, node, 0))
		for (size_t i = 0; i < n; i++)
			found += node[i] == 1;
	free(at);
	free(node);
	return found;
}

/* How many of @n pages are the first one of a folio of more than one. */
static size_t count_large(const uint64_t *pfn, size_t n)
{
	int fd = open("/proc/kpageflags", O_RDONLY);
	uint64_t flags;
	size_t large = 0;

	if (fd < 0)
		die("kpageflags");
	for (size_t i = 0; i < n; i++) {
		if (pread(fd, &flags, sizeof(flags), pfn[i] * sizeof(flags)) != sizeof(flags))
			die("read kpageflags");
		large += flags >> KPF_COMPOUND_HEAD & 1;
	}
	close(fd);
	return large;
}

static void report_runs(char *p, size_t n)
{
	uint64_t *pfn = malloc(n * sizeof(*pfn));
	size_t runs = 0, scratched = 0, absent = 0;

	if (!pfn)
		die("pfn array");
	for (size_t i = 0; i < n; i++)		/* fault in what migrated */
		*(volatile char *)(p + i * PAGE);
	read_pfns(p, n, pfn);
	qsort(pfn, n, sizeof(*pfn), cmp_u64);
	for (size_t i = 0; i < n; i++) {
		if (!pfn[i])
			absent++;
		if (!i || pfn[i] != pfn[i - 1] + 1)
			runs++;
		if (in_scratch(pfn[i] * PAGE))
			scratched++;
	}
	say("pages=%zu runs=%zu in_scratch=%zu absent=%zu huge=%zu node1=%zu large=%zu moved=%zu", n, runs,
	    scratched, absent, count_huge(pfn, n), count_node1(p, n), count_large(pfn, n), count_moved());
	free(pfn);
}

static size_t count_in_scratch(char *p, size_t n)
{
	uint64_t *pfn = malloc(n * sizeof(*pfn));
	size_t in = 0;

	if (!pfn)
		die("pfn array");
	read_pfns(p, n, pfn);
	for (size_t i = 0; i < n; i++)
		in += in_scratch(pfn[i] * PAGE);
	free(pfn);
	return in;
}

/* -- memory pressure ------------------------------------------------------ */

static unsigned char *filler;
static size_t filler_len;

/* Everything that is free, but 48 MiB and what the kernel needs to retrieve @len bytes. */
static void fill_memory(size_t len, int huge)
{
	unsigned long reserve = 49152 + (len >> 10) / 64;
	const size_t chunk = 4UL << 20;

	filler = mmap(NULL, 1UL << 34, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (filler == MAP_FAILED)
		die("mmap filler");
	if (!huge && madvise(filler, 1UL << 34, MADV_NOHUGEPAGE) && errno != EINVAL)
		die("madvise filler");
	filler_len = 0;
	while (meminfo_kib("MemFree:") > meminfo_kib("CmaFree:") + reserve) {
		memset(filler + filler_len, 0xa5, chunk);
		filler_len += chunk;
	}
	say("filled_mib=%zu", filler_len >> 20);
}

static void check_filler(void)
{
	size_t bad = 0;

	for (size_t i = 0; i < filler_len; i++)
		bad += filler[i] != 0xa5;
	say("filler_changed=%zu", bad);
	if (bad) {
		errno = EIO;
		die("memory of this kernel was written to");
	}
	munmap(filler, 1UL << 34);
}

/*
 * Each page goes back to the zone that its struct page says. One that was never initialized says
 * another one, which then has more free pages than it ever had.
 */
static void check_zones(void)
{
	static char buf[65536];
	unsigned long free, managed;
	char name[32], *p = buf;
	int node;

	if (slurp("/proc/zoneinfo", buf, sizeof(buf)) < 0)
		die("zoneinfo");
	while ((p = strstr(p, "Node "))) {
		char *f = strstr(p, "pages free"), *m = strstr(p, "managed");

		if (sscanf(p, "Node %d, zone %31s", &node, name) != 2 || !f || !m ||
		    sscanf(f, "pages free %lu", &free) != 1 || sscanf(m, "managed %lu", &managed) != 1)
			die("zoneinfo");
		if (free > managed) {
			errno = ERANGE;
			die("node %d, zone %s: %lu pages are free of %lu", node, name, free, managed);
		}
		say("zone %s free=%lu managed=%lu", name, free, managed);
		p = m;
	}
	say("zones_ok=1");
}

/* -- damage --------------------------------------------------------------- */

static uint32_t be32(const char *p)
{
	const unsigned char *u = (const unsigned char *)p;

	return (uint32_t)u[0] << 24 | u[1] << 16 | u[2] << 8 | u[3];
}

/*
 * Physical address of the map's root, from KHO's own device tree: the first
 * property of eight bytes of the root node.  (debugfs shows as many bytes as the
 * tree had when the file was made, so the names may be cut off.)
 */
static uint64_t map_root(void)
{
	static char fdt[8192];
	ssize_t n = slurp("/sys/kernel/debug/kho/out/fdt", fdt, sizeof(fdt));
	uint32_t at, end;

	if (n < 40)
		die("fdt");
	at = be32(fdt + 8);
	end = n;
	while (at + 12 <= end) {
		uint32_t token = be32(fdt + at);

		if (token == 1) {		/* begin node: skip its name */
			at += 4 + ((strlen(fdt + at + 4) + 4) & ~3U);
		} else if (token == 3) {	/* property */
			uint32_t len = be32(fdt + at + 4);

			if (len == sizeof(uint64_t)) {
				uint64_t root;

				memcpy(&root, fdt + at + 12, sizeof(root));
				return root;
			}
			at += 12 + ((len + 3) & ~3U);
		} else {
			at += 4;
		}
	}
	errno = ENOENT;
	die("no map in fdt");
}

static uint64_t *map_phys(int mem, uint64_t phys)
{
	void *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, mem, phys);

	if (p == MAP_FAILED)
		die("map 0x%llx of /dev/mem", (unsigned long long)phys);
	return p;
}

/* A page that stays where it is, not in scratch. */
static uint64_t *own_page(uint64_t *phys)
{
	for (;;) {
		uint64_t *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);

		if (p == MAP_FAILED)
			die("mmap page");
		memset(p, 0, PAGE);
		read_pfns(p, 1, phys);
		*phys *= PAGE;
		if (*phys && !in_scratch(*phys))
			return p;
	}
}

/*
 * Put tables of our own below @root, down to a leaf, and return that. Each has one pointer, at
 * the place that @key says, or is full of pointers.
 */
static uint64_t *add_path(uint64_t *root, uint64_t key, int full)
{
	uint64_t *t = root, phys;

	for (int level = 5; level >= 1; level--) {
		uint64_t *next = own_page(&phys);

		for (size_t i = 0; i < 512; i++)
			if (full || i == (key >> (15 + 9 * (level - 1))) % 512)
				t[i] = phys;
		t = next;
	}
	return t;
}

/*
 * The map is a tree of five levels of 512 pointers over leaves of 32768 bits.
 * Follow it to the lowest table of order 0 and damage a pointer there, or put
 * something else into its root.
 */
static void damage_map(const char *how, char *preserved)
{
	int mem = open("/dev/mem", O_RDWR | O_SYNC), level;
	uint64_t phys = map_root(), *t = NULL;
	size_t i = 0, to;

	if (mem < 0)
		die("/dev/mem");
	if (!strcmp(how, "hole") || !strcmp(how, "overlap") || !strcmp(how, "loop")) {
		/* The order's bit, and the address in units of it. */
		uint64_t at = 512UL << 20, key;

		if (!strcmp(how, "overlap")) {
			read_pfns(preserved, 1, &at);
			at *= PAGE;
		}
		key = 1ULL << (64 - 21) | at >> 21;
		t = add_path(map_phys(mem, phys), key, !strcmp(how, "loop"));
		if (strcmp(how, "loop"))
			t[key % 32768 / 64] |= 1ULL << key % 64;
		say("damaged=%s", how);
		return;
	}
	for (level = 5; level >= 1; level--) {
		t = map_phys(mem, phys);
		/* keys of order 0 are the largest: take the last pointer */
		for (i = 511; i > 0 && !t[i]; i--)
			;
		if (!t[i])
			die("empty table at level %d", level);
		if (level > 1)
			phys = t[i];
	}
	if (!strcmp(how, "node"))
		t[i] = 0x7ffdeadbe000ULL;
	else if (!strcmp(how, "range"))
		t[500] = t[i];			/* 128 MiB each: 62 GiB up */
	else if (!strcmp(how, "scratch")) {
		to = scratch[nr_scratch - 1].start >> 27;
		t[to] = t[i];
	} else {
		die("damage %s", how);
	}
	say("damaged=%s table=0x%llx index=%zu", how, (unsigned long long)phys,
	    i);
}

/* -- kexec and sessions ------------------------------------------------- */

static void load_kernel(int next_stage)
{
	char next[sizeof(cmdline) + 128], *p;
	int k = open(KERNEL, O_RDONLY);

	if (k < 0)
		die("open " KERNEL);
	snprintf(next, sizeof(next), "%s", cmdline);
	p = strstr(next, " khobench.stage=");
	if (p)
		*p = 0;
	snprintf(next + strlen(next), 32, " khobench.stage=%d", next_stage);
	if (*param("next", ""))
		snprintf(next + strlen(next), sizeof(next) - strlen(next), " %s", param("next", ""));
	if (syscall(SYS_kexec_file_load, k, -1, strlen(next) + 1, next,
		    KEXEC_FILE_NO_INITRAMFS))
		die("kexec_file_load");
	close(k);
}

static int lu_open(void)
{
	int fd = open("/dev/liveupdate", O_RDWR | O_CLOEXEC);

	if (fd < 0)
		die("/dev/liveupdate");
	return fd;
}

static int session(int lu, unsigned long cmd)
{
	struct lu_session_arg arg = { .size = sizeof(arg), .fd = -1 };

	memcpy(arg.name, SESSION, sizeof(SESSION));
	if (ioctl(lu, cmd, &arg))
		return -1;
	return arg.fd;
}

static void hand_over(int fd, char *p, size_t len, int next_stage)
{
	struct lu_fd_arg arg = { .size = sizeof(arg), .fd = fd, .token = TOKEN };
	const char *expect = param("expect", "ok");
	long before;
	uint64_t t;
	int s;

	t = now_us();
	load_kernel(next_stage);
	say("load_us=%llu", (unsigned long long)(now_us() - t));

	if (len) {
		say("before_preserve to_move=%zu free_kib=%lu cma_free_kib=%lu",
		    count_in_scratch(p, len / PAGE), meminfo_kib("MemFree:"),
		    meminfo_kib("CmaFree:"));
		s = session(lu_open(), LU_CREATE_SESSION);
		if (s < 0)
			die("create session");
		before = free_kib();
		t = now_us();
		if (ioctl(s, LU_PRESERVE_FD, &arg)) {
			int err = errno;

			say("preserve_failed=%s us=%llu free_kib=%lu", strerror(err),
			    (unsigned long long)(now_us() - t),
			    meminfo_kib("MemFree:"));
			if (strcmp(expect, "enomem") || err != ENOMEM)
				die("preserve");
			close(s);
			say("verify bad=%zu", check_pages(p, len / PAGE,
				strtoull(param("seed", "1"), NULL, 0)));
			say("DONE");
			power_off();
		}
		t = now_us() - t;
		say("preserve_us=%llu kho_kib=%ld", (unsigned long long)t,
		    before - free_kib());
		if (!strcmp(expect, "enomem"))
			die("preserve was not refused");
		report_runs(p, len / PAGE);
		report_need();
	}
	if (*param("damage", "") && next_stage == 2)
		damage_map(param("damage", ""), p);
	say("reboot counter=%llu", counter());
	reboot(RB_KEXEC);
	die("reboot");
}

int main(void)
{
	unsigned long long begin = counter();
	size_t len;
	int stage, rounds, fd = -1, s;
	uint64_t seed, t;
	char *p = NULL;
	int lu;

	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/lab", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	kmsg = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	say("init counter=%llu", begin);
	if (mount("proc", "/proc", "proc", 0, NULL) ||
	    mount("sysfs", "/sys", "sysfs", 0, NULL) ||
	    mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL) ||
	    mount("lab", "/lab", "9p", 0, "trans=virtio,version=9p2000.L"))
		die("mount");
	if (slurp("/proc/cmdline", cmdline, sizeof(cmdline)) < 0)
		die("cmdline");
	cmdline[strcspn(cmdline, "\n")] = 0;

	stage = atoi(param("stage", "1"));
	rounds = atoi(param("rounds", "1"));
	len = strtoull(param("mib", "0"), NULL, 0) << 20;
	seed = strtoull(param("seed", "1"), NULL, 0);
	say("stage=%d mem_total_kib=%lu mem_free_kib=%lu cma_total_kib=%lu",
	    stage, meminfo_kib("MemTotal:"), meminfo_kib("MemFree:"),
	    meminfo_kib("CmaTotal:"));
	read_scratch();
	report_need();
	report_place();

	if (stage == 1) {
		int huge = atoi(param("huge", "0"));

		if (huge)
			spit("/sys/kernel/mm/transparent_hugepage/shmem_enabled",
			     "advise");
		if (atoi(param("evict", "1")))
			evict_scratch(1);
		if (atoi(param("cache", "0")))
			read_file(atoi(param("cache", "0")));
		if (len)
			fd = build(len, param("pattern", "contig"), huge, seed, &p);
		hand_over(fd, p, len, 2);
	}

	if (len) {
		struct lu_fd_arg arg = {
			.size = sizeof(arg), .fd = -1, .token = TOKEN,
		};
		struct lu_finish_arg fin = { .size = sizeof(fin) };
		struct stat st;
		size_t bad;

		lu = lu_open();
		s = session(lu, LU_RETRIEVE_SESSION);
		if (!strcmp(param("expect", "ok"), "refused")) {
			if (s >= 0)
				die("a damaged map was accepted");
			say("refused session=%s", strerror(errno));
			evict_scratch(0);
			say("DONE");
			power_off();
		}
		if (s < 0)
			die("retrieve session");
		close(lu);
		/* Memory that lies as the pattern says is what compaction is for. */
		spit("/proc/sys/vm/compaction_proactiveness", "0");
		if (atoi(param("fill", "0")))
			fill_memory(len, 1);
		t = now_us();
		if (ioctl(s, LU_RETRIEVE_FD, &arg))
			die("retrieve");
		say("retrieve_us=%llu", (unsigned long long)(now_us() - t));
		if (fstat(arg.fd, &st) || (size_t)st.st_size != len)
			die("size %lld", (long long)st.st_size);
		say("blocks_kib=%lld shmem_kib=%lu", (long long)st.st_blocks / 2,
		    meminfo_kib("Shmem:"));
		t = now_us();
		if (ioctl(s, LU_FINISH, &fin))
			die("finish");
		say("finish_us=%llu", (unsigned long long)(now_us() - t));
		close(s);
		p = map_memfd(arg.fd, len);
		/* At once: when large blocks are short compaction moves pages that no device uses. */
		if (filler)
			report_runs(p, len / PAGE);
		/*
		 * Fill what is free before looking: a page that was handed out
		 * by mistake is then overwritten and not merely unused. Page by
		 * page: huge ones would leave single pages, such as these, for last.
		 */
		if (filler)
			check_filler();
		if (atoi(param("refill", "1")))
			evict_scratch(0);
		bad = check_pages(p, len / PAGE, seed);
		say("verify pages=%zu bad=%zu", len / PAGE, bad);
		if (bad)
			die("contents");
		if (stage <= rounds)
			hand_over(arg.fd, p, len, stage + 1);
		munmap(p, len);
		close(arg.fd);
		say("after_close mem_free_kib=%lu shmem_kib=%lu",
		    meminfo_kib("MemFree:"), meminfo_kib("Shmem:"));
		/* What was the memfd's is given out and taken back page by page. */
		if (filler) {
			fill_memory(0, 0);
			check_filler();
			check_zones();
		}
	}
	say("DONE");
	power_off();
}
