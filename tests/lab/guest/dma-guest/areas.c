// SPDX-License-Identifier: GPL-2.0-or-later
/* An IOAS of very many areas, and how it is listed: in pieces, and all of it or not at all. */

#include "guest.h"
#include <stdlib.h>
#include <sys/ioctl.h>
#include <linux/iommufd.h>

#define PIECE	1024	/* areas a call */

static struct iommu_ioas_list_areas start_list(uint32_t ioas)
{
	static struct iommu_ioas_area area[PIECE];

	return (struct iommu_ioas_list_areas) {
		.size = sizeof(struct iommu_ioas_list_areas), .ioas_id = ioas,
		.entries = (uintptr_t)area, .entry_size = sizeof(*area),
	};
}

/* Each is a page, with a hole behind it. */
static bool is_area(const struct iommu_ioas_area *area, uint64_t i)
{
	return area->iova == 2 * i * PAGE && area->length == PAGE &&
	       area->backing == IOMMU_AREA_FILE && (area->flags & IOMMU_AREA_OFFSET_VALID) &&
	       area->offset == i % NPAGES * PAGE;
}

static int next_piece(struct iommu_ioas_list_areas *list)
{
	list->num = PIECE;
	return ioctl(iommufd, IOMMU_IOAS_LIST_AREAS, list) ? -errno : 0;
}

/* Returns how many there are, up to the first one that is not as it was mapped. */
static uint64_t list_areas(uint32_t ioas)
{
	struct iommu_ioas_list_areas list = start_list(ioas);
	const struct iommu_ioas_area *area = (void *)(uintptr_t)list.entries;
	uint64_t n = 0;

	do {
		must(next_piece(&list), "IOAS_LIST_AREAS");
		for (uint32_t i = 0; i < list.num; i++, n++)
			if (!is_area(&area[i], n))
				return n;
	} while (list.num == PIECE);
	return n;
}

static void unmap_area(uint32_t ioas, uint64_t i)
{
	struct iommu_ioas_unmap unmap = {
		.size = sizeof(unmap), .ioas_id = ioas, .iova = 2 * i * PAGE, .length = PAGE,
	};

	check(ioctl(iommufd, IOMMU_IOAS_UNMAP, &unmap), "IOAS_UNMAP");
}

void areas_first(void)
{
	uint64_t n = atoi(param("dma.count", "1000000")), listed;
	struct iommu_ioas_list_areas list;
	uint32_t ioas = alloc_ioas();
	double t0 = now(), mapped;
	int ret;

	for (uint64_t i = 0; i < n; i++)
		must(try_map_file(ioas, memfd, i % NPAGES * PAGE, PAGE, 2 * i * PAGE), "map an area");
	mapped = now() - t0;
	t0 = now();
	listed = list_areas(ioas);
	say("%s %llu areas listed, mapped in %.1f s, listed in %.2f s", listed == n ? "ok" : "FAIL",
	    (unsigned long long)listed, mapped, now() - t0);

	/* The last one goes when the first piece was read. */
	list = start_list(ioas);
	must(next_piece(&list), "IOAS_LIST_AREAS");
	unmap_area(ioas, n - 1);
	ret = next_piece(&list);
	verdict(ret == -EAGAIN, "go on with a list after a change", ret);
	listed = list_areas(ioas);
	verdict(listed == n - 1, "list it again", 0);
}
