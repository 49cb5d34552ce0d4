/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_IOMMUFD_H
#define KHO_IOMMUFD_H

#include <stddef.h>
#include <stdint.h>

#include <kho/error.h>
#include <kho/graph.h>
#include <kho/ops.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * The ioctls of an iommufd that a workload needs to set up its mappings, and to set
 * them up again after a kexec: one function each, nothing remembered. What the calls
 * mean is told by the kernel's Documentation/userspace-api/iommufd.rst.
 */

/** KHO_IOMMUFD_DEVICE - where a new context is opened */
#define KHO_IOMMUFD_DEVICE "/dev/iommu"

/**
 * kho_iommufd_open() - a new, empty context
 * @kho: handle
 * @err: error
 *
 * Return: its descriptor, owned by the caller; -ENOENT (no iommufd), -errno.
 */
int kho_iommufd_open(struct kho *kho, struct kho_error **err);

/**
 * kho_iommufd_ioas_alloc() - a new, empty IOAS
 * @kho: handle
 * @iommufd: the context, borrowed
 * @ioas_id: receives its id
 * @err: error
 *
 * Return: 0; -EBUSY (the context is preserved), -errno.
 */
int kho_iommufd_ioas_alloc(struct kho *kho, int iommufd, uint32_t *ioas_id,
			   struct kho_error **err);

/**
 * kho_iommufd_map_file() - map a piece of a memfd at a fixed IOVA
 * @kho: handle
 * @iommufd: the context, borrowed
 * @ioas_id: the IOAS
 * @memfd: the memfd, borrowed; the mapping holds its pages, pinned
 * @offset: in the memfd, bytes
 * @length: bytes
 * @iova: where
 * @flags: enum kho_area_flags
 * @err: error
 *
 * Return: 0; -EBUSY (the context is preserved), -EEXIST (something is mapped there), -errno.
 */
int kho_iommufd_map_file(struct kho *kho, int iommufd, uint32_t ioas_id, int memfd,
			 uint64_t offset, uint64_t length, uint64_t iova, uint32_t flags,
			 struct kho_error **err);

/**
 * kho_iommufd_noiommu_pa() - the physical address behind an IOVA, for a device without an IOMMU
 * @kho: handle
 * @iommufd: the context, borrowed
 * @ioas_id: the IOAS, used by a no-IOMMU device
 * @iova: the IOVA
 * @pa: receives the physical address
 * @err: error
 *
 * Good for one page of 4096 bytes: the next may be anywhere.
 * Return: 0, -ENOENT (not mapped), -errno.
 */
int kho_iommufd_noiommu_pa(struct kho *kho, int iommufd, uint32_t ioas_id, uint64_t iova,
			   uint64_t *pa, struct kho_error **err);

/**
 * kho_iommufd_destroy() - destroy an object of a context
 * @kho: handle
 * @iommufd: the context, borrowed
 * @id: the object
 * @err: error
 *
 * Return: 0, -ENOENT, -EBUSY (in use, or the context is preserved), -errno.
 */
int kho_iommufd_destroy(struct kho *kho, int iommufd, uint32_t id, struct kho_error **err);

/**
 * kho_iommufd_hwpt_alloc() - a new HWPT with the mappings of an IOAS
 * @kho: handle
 * @iommufd: the context, borrowed
 * @dev_id: a device that it is to be used for
 * @ioas_id: the IOAS
 * @flags: of enum kho_hwpt_flags: NEST_PARENT, DIRTY, PASID; others say nothing here
 * @hwpt_id: receives its id
 * @err: error
 *
 * Return: 0, -EBUSY (the context is preserved), -errno.
 */
int kho_iommufd_hwpt_alloc(struct kho *kho, int iommufd, uint32_t dev_id, uint32_t ioas_id,
			   uint32_t flags, uint32_t *hwpt_id, struct kho_error **err);

/**
 * kho_iommufd_translation() - how does the IOMMU translate DMA of a device now?
 * @kho: handle
 * @iommufd: the context, borrowed; may be preserved
 * @dev_id: the device
 * @translation: receives it; its mode is unknown if there is no IOMMU, or if it is of a
 *	kind that this library does not know; hitless is kho_iommufd_hitless()'s to tell
 * @err: error
 *
 * Return: 0; -ENOENT (attached to nothing, or blocked), -ENOTTY (a kernel that does not
 * tell), -errno.
 */
int kho_iommufd_translation(struct kho *kho, int iommufd, uint32_t dev_id,
			    struct kho_translation *translation, struct kho_error **err);

/**
 * kho_iommufd_hitless() - can a device be moved to another page table with no DMA discarded?
 * @kho: handle
 * @iommufd: the context, borrowed; may be preserved
 * @dev_id: the device, which has an IOMMU
 * @err: error
 *
 * IOMMU_HW_CAP_HITLESS_REPLACE of IOMMU_GET_HW_INFO. A device that cannot is refused at preserve.
 * Return: 1 it can, 0, -ENOENT, -errno.
 */
int kho_iommufd_hitless(struct kho *kho, int iommufd, uint32_t dev_id, struct kho_error **err);

/**
 * kho_iommufd_obstacle() - why could a context not be preserved, or a device not be moved?
 * @kho: handle
 * @iommufd: the context, borrowed
 * @err: receives a cause with the reason the kernel gives, the object and the IOVA;
 *	untouched if the kernel gives none
 *
 * Return: 1 if there was a reason, 0 if not, -errno.
 */
int kho_iommufd_obstacle(struct kho *kho, int iommufd, struct kho_error **err);

#ifdef __cplusplus
}
#endif
#endif
