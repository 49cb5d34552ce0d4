/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include <linux/iommufd.h>

#include "util.h"

int kho_iommufd_open(struct kho *kho, struct kho_error **err)
{
	int fd = kho_op(kho, open, KHO_IOMMUFD_DEVICE, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		return kho_error_new(err, fd, KHO_IOMMUFD_DEVICE, "open: %s", strerror(-fd));
	return fd;
}

int kho_iommufd_ioas_alloc(struct kho *kho, int iommufd, uint32_t *ioas_id,
			   struct kho_error **err)
{
	struct iommu_ioas_alloc arg = { .size = sizeof(arg) };
	int r = kho_op(kho, ioctl, iommufd, IOMMU_IOAS_ALLOC, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL, "cannot allocate an IOAS: %s", strerror(-r));
	*ioas_id = arg.out_ioas_id;
	return 0;
}

int kho_iommufd_map_file(struct kho *kho, int iommufd, uint32_t ioas_id, int memfd,
			 uint64_t offset, uint64_t length, uint64_t iova, uint32_t flags,
			 struct kho_error **err)
{
	struct iommu_ioas_map_file arg = {
		.size = sizeof(arg),
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA |
			 (flags & KHO_AREA_READABLE ? IOMMU_IOAS_MAP_READABLE : 0) |
			 (flags & KHO_AREA_WRITEABLE ? IOMMU_IOAS_MAP_WRITEABLE : 0),
		.ioas_id = ioas_id,
		.fd = memfd,
		.start = offset,
		.length = length,
		.iova = iova,
	};
	int r = kho_op(kho, ioctl, iommufd, IOMMU_IOAS_MAP_FILE, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL,
				     "cannot map %" PRIu64 " bytes at IOVA 0x%" PRIx64 " of IOAS %" PRIu32 ": %s",
				     length, iova, ioas_id, strerror(-r));
	return 0;
}

int kho_iommufd_noiommu_pa(struct kho *kho, int iommufd, uint32_t ioas_id, uint64_t iova,
			   uint64_t *pa, struct kho_error **err)
{
	struct iommu_ioas_noiommu_get_pa arg = {
		.size = sizeof(arg),
		.ioas_id = ioas_id,
		.iova = iova,
		.length = 4096,
	};
	int r = kho_op(kho, ioctl, iommufd, IOMMU_IOAS_NOIOMMU_GET_PA, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL,
				     "no physical address for IOVA 0x%" PRIx64 " of IOAS %" PRIu32 ": %s",
				     iova, ioas_id, strerror(-r));
	*pa = arg.out_phys;
	return 0;
}

int kho_iommufd_destroy(struct kho *kho, int iommufd, uint32_t id, struct kho_error **err)
{
	struct iommu_destroy arg = { .size = sizeof(arg), .id = id };
	int r = kho_op(kho, ioctl, iommufd, IOMMU_DESTROY, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL, "cannot destroy object %" PRIu32 ": %s", id,
				     strerror(-r));
	return 0;
}

int kho_iommufd_hwpt_alloc(struct kho *kho, int iommufd, uint32_t dev_id, uint32_t ioas_id,
			   uint32_t flags, uint32_t *hwpt_id, struct kho_error **err)
{
	struct iommu_hwpt_alloc arg = {
		.size = sizeof(arg),
		.flags = (flags & KHO_HWPT_NEST_PARENT ? IOMMU_HWPT_ALLOC_NEST_PARENT : 0) |
			 (flags & KHO_HWPT_DIRTY ? IOMMU_HWPT_ALLOC_DIRTY_TRACKING : 0) |
			 (flags & KHO_HWPT_PASID ? IOMMU_HWPT_ALLOC_PASID : 0),
		.dev_id = dev_id,
		.pt_id = ioas_id,
	};
	int r = kho_op(kho, ioctl, iommufd, IOMMU_HWPT_ALLOC, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL,
				     "cannot allocate an HWPT of IOAS %" PRIu32 " for device %" PRIu32 ": %s",
				     ioas_id, dev_id, strerror(-r));
	*hwpt_id = arg.out_hwpt_id;
	return 0;
}

static const enum kho_translation_mode vtd_modes[] = {
	[IOMMU_ATTACH_INFO_VTD_LEGACY] = KHO_TRANSLATION_LEGACY,
	[IOMMU_ATTACH_INFO_VTD_SECOND_STAGE] = KHO_TRANSLATION_SECOND_STAGE,
	[IOMMU_ATTACH_INFO_VTD_FIRST_STAGE] = KHO_TRANSLATION_FIRST_STAGE,
	[IOMMU_ATTACH_INFO_VTD_NESTED] = KHO_TRANSLATION_NESTED,
};

int kho_iommufd_translation(struct kho *kho, int iommufd, uint32_t dev_id,
			    struct kho_translation *translation, struct kho_error **err)
{
	struct iommu_attach_info_vtd vtd = {};
	struct iommu_attach_info arg = {
		.size = sizeof(arg),
		.dev_id = dev_id,
		.data_uptr = (uintptr_t)&vtd,
		.data_len = sizeof(vtd),
	};
	int r = kho_op(kho, ioctl, iommufd, IOMMU_GET_ATTACH_INFO, &arg);

	*translation = (struct kho_translation){};
	if (r < 0)
		return kho_error_new(err, r, NULL,
				     "cannot read how device %" PRIu32 " is translated: %s", dev_id,
				     strerror(-r));
	if (arg.out_data_type == IOMMU_ATTACH_INFO_TYPE_INTEL_VTD &&
	    vtd.mode < ARRAY_SIZE(vtd_modes))
		*translation = (struct kho_translation){
			.mode = vtd_modes[vtd.mode],
			.unit = vtd.unit,
			.domain_id = vtd.domain_id,
		};
	return 0;
}

int kho_iommufd_hitless(struct kho *kho, int iommufd, uint32_t dev_id, struct kho_error **err)
{
	struct iommu_hw_info arg = { .size = sizeof(arg), .dev_id = dev_id };
	int r = kho_op(kho, ioctl, iommufd, IOMMU_GET_HW_INFO, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL, "cannot read what the IOMMU of device %" PRIu32 " can do: %s",
				     dev_id, strerror(-r));
	return !!(arg.out_capabilities & IOMMU_HW_CAP_HITLESS_REPLACE);
}

static const char *const reasons[] = {
	[IOMMU_LIVEUPDATE_BACKING_USER] = "memory that is mapped by address: map a memfd with IOMMU_IOAS_MAP_FILE",
	[IOMMU_LIVEUPDATE_BACKING_DMABUF] = "a mapped DMABUF, which cannot be carried over: unmap it",
	[IOMMU_LIVEUPDATE_BACKING_NOT_PRESERVED] = "a mapped memfd that is not in the workload: register it, too",
	[IOMMU_LIVEUPDATE_BACKING_STALE] = "a mapped memfd in which a hole was punched: map it again",
	[IOMMU_LIVEUPDATE_BACKING_LOST] = "mapped memory that the previous kernel did not hand over",
	[IOMMU_LIVEUPDATE_OBJECT] = "an object of a kind that cannot be carried over",
	[IOMMU_LIVEUPDATE_FAULT_CAPABLE] = "a page table with a fault queue",
	[IOMMU_LIVEUPDATE_PASID] = "a device with a PASID attached",
	[IOMMU_LIVEUPDATE_ACCESS] = "an IOAS that is used from inside of the kernel",
	[IOMMU_LIVEUPDATE_DIRTY_TRACKING] = "dirty tracking that is on",
	[IOMMU_LIVEUPDATE_GROUP] = "a device of the same IOMMU group that is not attached, or not bound, as it is",
	[IOMMU_LIVEUPDATE_DEVICE_VF] = "a device that is an SR-IOV function",
	[IOMMU_LIVEUPDATE_DEVICE_ATS] = "a device that uses ATS or PRI",
	[IOMMU_LIVEUPDATE_DEVICE_TYPE] = "a device that is not a PCI device",
	[IOMMU_LIVEUPDATE_DEVICE_NOT_PRESERVED] = "an attached device that is not in the workload: register it, too",
	[IOMMU_LIVEUPDATE_DRIVER] = "an IOMMU or page table format that cannot be carried over",
	[IOMMU_LIVEUPDATE_SW_MSI] = "MSI pages that are mapped by software",
	[IOMMU_LIVEUPDATE_COMPAT] = "a context that emulates VFIO's no-IOMMU container",
	[IOMMU_LIVEUPDATE_MEMORY] = "a lack of memory",
	[IOMMU_LIVEUPDATE_CHANGED] = "an attachment that changed meanwhile, or a change that does not end",
	[IOMMU_LIVEUPDATE_NOT_EQUAL] = "a page table that does not translate as the frozen one does",
	[IOMMU_LIVEUPDATE_MOVABLE] = "kernelcore, movablecore or movable_node on the command line of the loaded kernel",
	[IOMMU_LIVEUPDATE_NOT_HITLESS] = "an IOMMU that could discard DMA of a device while its page table is replaced",
	[IOMMU_LIVEUPDATE_SEVERAL_IOMMUS] = "a machine with several IOMMUs, which the kernel's log has the names of",
};

int kho_iommufd_obstacle(struct kho *kho, int iommufd, struct kho_error **err)
{
	struct iommu_liveupdate_status arg = { .size = sizeof(arg) };
	const char *text = NULL;
	char range[80] = "";
	int r;

	r = kho_op(kho, ioctl, iommufd, IOMMU_LIVEUPDATE_STATUS, &arg);
	if (r < 0)
		return r;
	if (arg.out_reason == IOMMU_LIVEUPDATE_OK)
		return 0;
	if (arg.out_reason < ARRAY_SIZE(reasons))
		text = reasons[arg.out_reason];
	if (arg.out_length > 0)
		snprintf(range, sizeof(range), ", %" PRIu64 " bytes at IOVA 0x%" PRIx64,
			 (uint64_t)arg.out_length, (uint64_t)arg.out_iova);
	kho_error_new(err, ECANCELED, NULL, "the obstacle is %s (object %" PRIu32 "%s)",
		      text ? text : "one that this khod does not know", arg.out_object_id, range);
	return 1;
}
