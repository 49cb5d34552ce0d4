/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_VFIO_H
#define KHO_VFIO_H

#include <stdbool.h>
#include <stdint.h>

#include <kho/error.h>
#include <kho/graph.h>
#include <kho/ops.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The ioctls of a VFIO device's cdev that tie it to an iommufd; see <kho/iommufd.h>. */

/**
 * kho_vfio_open() - open a device
 * @kho: handle
 * @path: its node below /dev/vfio/devices
 * @err: error
 *
 * Return: its descriptor, owned by the caller; the last close stops and resets the
 * device. -EBUSY (it came from the previous kernel: retrieve it, do not open it), -errno.
 */
int kho_vfio_open(struct kho *kho, const char *path, struct kho_error **err);

/**
 * kho_vfio_name() - which device is it?
 * @kho: handle
 * @dev: the device, borrowed, opened or retrieved
 * @name: receives its name in sysfs, without the bus, terminated
 * @err: error
 *
 * Return: 0, -ENODEV (the kernel does not tell), -errno.
 */
int kho_vfio_name(struct kho *kho, int dev, char name[KHO_DEVICE_NAME_MAX + 1],
		  struct kho_error **err);

/**
 * kho_vfio_bind() - bind a device to a context
 * @kho: handle
 * @dev: the device, borrowed
 * @iommufd: the context, borrowed
 * @dev_id: receives the id of the device in the context
 * @err: error
 *
 * A device that was carried over a kexec has to be bound to the context that was
 * carried over with it, and is attached to its frozen HWPT from then on.
 * Return: 0, -EINVAL (bound already), -EBUSY (another context), -errno.
 */
int kho_vfio_bind(struct kho *kho, int dev, int iommufd, uint32_t *dev_id,
		  struct kho_error **err);

/**
 * kho_vfio_attach() - attach a device to an IOAS or HWPT, in place of what it is attached to
 * @kho: handle
 * @dev: the device, borrowed, bound
 * @pt_id: the IOAS or HWPT; receives the HWPT
 * @must_equal: only replace, and only by the very same translations
 * @err: error
 *
 * Return: 0, -EBADE (not equal), -EBUSY (the device is preserved), -errno.
 */
int kho_vfio_attach(struct kho *kho, int dev, uint32_t *pt_id, bool must_equal,
		    struct kho_error **err);

/**
 * kho_vfio_region() - where a region of a device is in its descriptor
 * @kho: handle
 * @dev: the device, borrowed, bound
 * @index: VFIO_PCI_BAR0_REGION_INDEX etc.
 * @offset: receives the offset for mmap(2) and pread(2)
 * @size: receives its bytes
 * @err: error
 *
 * Return: 0 or -errno.
 */
int kho_vfio_region(struct kho *kho, int dev, uint32_t index, uint64_t *offset, uint64_t *size,
		    struct kho_error **err);

/**
 * kho_vfio_set_liveupdate() - how a device is to be treated when it is preserved
 * @kho: handle
 * @dev: the device, borrowed, bound, not preserved
 * @may_lose_irq: interrupts that it cannot keep pending may get lost; else a device that uses
 *	INTx, or MSI other than MSI-X, is not preserved
 * @deadline_msec: how long the next kernel leaves it running when nobody retrieves it, a day
 *	(86400000) at most; 0: the kernel's default
 * @err: error
 *
 * Replaces what was set before. Return: 0, -EINVAL (deadline), -EBUSY (it is
 * preserved), -ENOTTY (not with this kernel or driver), -errno.
 */
int kho_vfio_set_liveupdate(struct kho *kho, int dev, bool may_lose_irq, uint32_t deadline_msec,
			    struct kho_error **err);

/**
 * kho_vfio_msix_enabled() - does the device signal by MSI-X, which it keeps pending while masked?
 * @kho: handle
 * @dev: the device, borrowed, bound
 * @err: error
 *
 * Return: 1, 0, -errno.
 */
int kho_vfio_msix_enabled(struct kho *kho, int dev, struct kho_error **err);

#ifdef __cplusplus
}
#endif
#endif
