// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Pages that are in use for what a handover uses them for
 *
 * A preserve that failed, or was undone, leaves as many as there were before. The kernel's
 * detector of leaks does not know pages, nor what is still referred to.
 */

#include "guest.h"
#include <sys/mount.h>

/* include/linux/kho/abi/kexec_handover.h: levels 5 to 1 are tables, level 0 is a bitmap. */
#define KHO_TOP_LEVEL	5

static long count_map(int mem_fd, uint64_t at, int level)
{
	uint64_t node[PAGE / sizeof(uint64_t)];
	long n = 0;

	check(pread(mem_fd, node, sizeof(node), at), "KHO's map of memory");
	for (size_t i = 0; i < PAGE / sizeof(uint64_t); i++) {
		if (!level)
			n += __builtin_popcountll(node[i]);
		else if (node[i])
			n += count_map(mem_fd, node[i], level - 1);
	}
	return n;
}

/* The number behind @name in /proc/vmstat. */
static long vmstat(const char *name)
{
	FILE *f = fopen("/proc/vmstat", "r");
	char key[64];
	long n = -1, val;

	while (f && fscanf(f, "%63s %ld", key, &val) == 2)
		if (!strcmp(key, name))
			n = val;
	if (f)
		fclose(f);
	errno = ENOENT;
	check(n, name);
	return n;
}

/* Without those that are preserved: KHO shows no map of a kernel that has got something itself. */
struct counts count_other_pages(void)
{
	struct counts c = {};

	must(put("/proc/sys/vm/stat_refresh", "1"), "stat_refresh");
	c.pinned = vmstat("nr_foll_pin_acquired") - vmstat("nr_foll_pin_released");
	c.tables = vmstat("nr_iommu_pages");
	c.files = vmstat("nr_shmem");
	return c;
}

struct counts count_pages(void)
{
	struct counts c = count_other_pages();
	int fd = open("/dev/mem", O_RDONLY);

	check(fd, "/dev/mem");
	c.preserved = count_map(fd, kho_map(), KHO_TOP_LEVEL);
	close(fd);
	return c;
}

void check_counts(const struct counts *before)
{
	struct counts now = count_pages();

	say("%s counts: preserved %ld, pinned %ld, in page tables %ld, in files %ld; before %ld, %ld, %ld, %ld",
	    memcmp(&now, before, sizeof(now)) ? "FAIL" : "ok", now.preserved, now.pinned, now.tables,
	    now.files, before->preserved, before->pinned, before->tables, before->files);
}
