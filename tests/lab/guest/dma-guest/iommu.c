// SPDX-License-Identifier: GPL-2.0-or-later
/* The IOAS and its HWPTs. */

#include "guest.h"
#include <sys/ioctl.h>
#include <linux/iommufd.h>

/* From the memory to the first of many areas */
#define AREAS_OFF		(1ull << 36)

/* IOMMU_HW_CAP_HITLESS_REPLACE, which an unpatched kernel never sets. */
#define HW_CAP_HITLESS_REPLACE	(1u << 4)

int iommufd = -1;
uint32_t ioas_id;
uint64_t mem_iova;
bool iommu;

uint32_t alloc_ioas(void)
{
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };

	check(ioctl(iommufd, IOMMU_IOAS_ALLOC, &alloc), "IOAS_ALLOC");
	return alloc.out_ioas_id;
}

int try_map_file(uint32_t ioas, int fd, uint64_t start, uint64_t length, uint64_t iova)
{
	struct iommu_ioas_map_file map = {
		.size = sizeof(map),
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE |
			 IOMMU_IOAS_MAP_WRITEABLE,
		.ioas_id = ioas,
		.fd = fd,
		.start = start,
		.length = length,
		.iova = iova,
	};

	return ioctl(iommufd, IOMMU_IOAS_MAP_FILE, &map) ? -errno : 0;
}

/* Areas of a page each, with a hole between any two; what is in them is of no interest. */
static void map_areas(void)
{
	uint32_t n = atoi(param("dma.areas", "0"));
	uint64_t iova = mem_iova + AREAS_OFF;
	double t0 = now();

	if (!n)
		return;
	for (uint32_t i = 0; i < n; i++, iova += 2 * PAGE)
		must(try_map_file(ioas_id, memfd, (uint64_t)(i % NPAGES) * PAGE, PAGE, iova),
		     "map an area");
	say("mapped %u areas in %.1f s", n, now() - t0);
}

void make_ioas(void)
{
	ioas_id = alloc_ioas();
	must(try_map_file(ioas_id, memfd, 0, MEM_SIZE, mem_iova), "IOAS_MAP_FILE");
	map_areas();
	map_large(ioas_id);
	functions_map(ioas_id);
}

uint64_t get_pa(uint64_t iova)
{
	struct iommu_ioas_noiommu_get_pa get = {
		.size = sizeof(get), .ioas_id = ioas_id, .iova = iova, .length = PAGE,
	};

	check(ioctl(iommufd, IOMMU_IOAS_NOIOMMU_GET_PA, &get), "GET_PA");
	return get.out_phys;
}

#define MAX_OBJECTS	16

static uint32_t list_objects(struct iommu_object_entry *e)
{
	struct iommu_list_objects list = {
		.size = sizeof(list), .entries = (uintptr_t)e, .num = MAX_OBJECTS,
		.entry_size = sizeof(*e),
	};

	check(ioctl(iommufd, IOMMU_LIST_OBJECTS, &list), "LIST_OBJECTS");
	return list.num;
}

uint32_t find_frozen(void)
{
	struct iommu_object_entry e[MAX_OBJECTS];
	uint32_t n = list_objects(e);

	for (uint32_t i = 0; i < n; i++)
		if (e[i].type == IOMMU_OBJECT_HWPT_FROZEN)
			return e[i].id;
	return 0;
}

/* What the kernel says of each HWPT of the context. */
void show_hwpts(void)
{
	struct iommu_object_entry e[MAX_OBJECTS];
	uint32_t n = list_objects(e);

	for (uint32_t i = 0; i < n; i++) {
		bool frozen = e[i].type == IOMMU_OBJECT_HWPT_FROZEN;
		struct iommu_hwpt_info info = { .size = sizeof(info), .hwpt_id = e[i].id };

		if (!frozen && e[i].type != IOMMU_OBJECT_HWPT_PAGING)
			continue;
		check(ioctl(iommufd, IOMMU_GET_HWPT_INFO, &info), "GET_HWPT_INFO");
		say("HWPT frozen=%d format=%u coherent=%d pasid=%d", frozen, info.out_format,
		    !!(info.out_flags & IOMMU_HWPT_INFO_ENFORCE_CC),
		    !!(info.out_flags & IOMMU_HWPT_INFO_PASID));
	}
}

void try_destroy(uint32_t id, int expect, const char *what)
{
	struct iommu_destroy d = { .size = sizeof(d), .id = id };
	int ret = ioctl(iommufd, IOMMU_DESTROY, &d) ? -errno : 0;

	verdict(ret == expect, what, ret);
}

/* The same IOVAs, but every page one further in the file. */
void replace_unequal(void)
{
	uint32_t other = alloc_ioas();
	int ret;

	must(try_map_file(other, memfd, PAGE, MEM_SIZE - PAGE, mem_iova), "IOAS_MAP_FILE");
	ret = try_attach(other);
	verdict(ret == -EBADE, "replace by unequal translations", ret);
	/* Should that have been done, the device is on it. */
	if (ret)
		try_destroy(other, 0, "destroy the unequal IOAS");
}

uint32_t alloc_hwpt(uint32_t dev_id, uint32_t flags)
{
	struct iommu_hwpt_alloc alloc = {
		.size = sizeof(alloc), .flags = flags, .dev_id = dev_id, .pt_id = ioas_id,
	};

	check(ioctl(iommufd, IOMMU_HWPT_ALLOC, &alloc), "HWPT_ALLOC");
	return alloc.out_hwpt_id;
}

/* What the kernel says about whether replacing loses DMA of the device. */
void show_hitless(void)
{
	struct iommu_hw_info info = { .size = sizeof(info), .dev_id = dev_id };

	check(ioctl(iommufd, IOMMU_GET_HW_INFO, &info), "GET_HW_INFO");
	say("hitless %d", !!(info.out_capabilities & HW_CAP_HITLESS_REPLACE));
}

/* A register of the VT-d unit, by its name in sysfs. */
uint64_t unit_register(const char *name)
{
	char path[128], text[32] = "";
	int fd;

	snprintf(path, sizeof(path), "/sys/class/iommu/dmar0/intel-iommu/%s", name);
	fd = open(path, O_RDONLY);
	check(fd, path);
	check(read(fd, text, sizeof(text) - 1), path);
	close(fd);
	return strtoull(text, NULL, 16);
}

void show_unit(void)
{
	say("UNIT cap=%#llx ecap=%#llx", (unsigned long long)unit_register("cap"),
	    (unsigned long long)unit_register("ecap"));
}
