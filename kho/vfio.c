/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* The host's linux/stddef.h may be older than the tree's vfio.h. */
#ifndef __counted_by
#define __counted_by(m)
#endif
#include <linux/pci_regs.h>
#include <linux/vfio.h>

#include "util.h"

int kho_vfio_open(struct kho *kho, const char *path, struct kho_error **err)
{
	int fd = kho_op(kho, open, path, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		return kho_error_new(err, fd, path, "open: %s", strerror(-fd));
	return fd;
}

/* One line of it says where the device is in sysfs. */
#define FDINFO_KEY "vfio-device-syspath:"

int kho_vfio_name(struct kho *kho, int dev, char name[KHO_DEVICE_NAME_MAX + 1],
		  struct kho_error **err)
{
	char path[64], text[1024], *p, *end;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", dev);
	fd = kho_op(kho, open, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return kho_error_new(err, fd, path, "open: %s", strerror(-fd));
	n = kho_op(kho, pread, fd, text, sizeof(text) - 1, 0);
	kho_close(kho, fd);
	if (n < 0)
		return kho_error_new(err, (int)n, path, "read: %s", strerror((int)-n));
	text[n] = 0;
	p = strstr(text, FDINFO_KEY);
	if (!p)
		return kho_error_new(err, ENODEV, path,
				     "does not tell which device it is (a kernel without " FDINFO_KEY ")");
	end = p + strcspn(p, "\n");
	*end = 0;
	p = strrchr(p, '/');
	if (!p || !p[1] || (size_t)(end - p) > KHO_DEVICE_NAME_MAX)
		return kho_error_new(err, ENODEV, path, "has an unexpected path of a device");
	strcpy(name, p + 1);
	return 0;
}

int kho_vfio_bind(struct kho *kho, int dev, int iommufd, uint32_t *dev_id,
		  struct kho_error **err)
{
	struct vfio_device_bind_iommufd arg = { .argsz = sizeof(arg), .iommufd = iommufd };
	int r = kho_op(kho, ioctl, dev, VFIO_DEVICE_BIND_IOMMUFD, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL, "cannot bind the device: %s", strerror(-r));
	*dev_id = arg.out_devid;
	return 0;
}

int kho_vfio_attach(struct kho *kho, int dev, uint32_t *pt_id, bool must_equal,
		    struct kho_error **err)
{
	struct vfio_device_attach_iommufd_pt arg = {
		.argsz = sizeof(arg),
		.flags = must_equal ? VFIO_DEVICE_ATTACH_MUST_EQUAL : 0,
		.pt_id = *pt_id,
	};
	int r = kho_op(kho, ioctl, dev, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL, "cannot attach the device to %" PRIu32 ": %s", *pt_id,
				     r == -EBADE ? "it does not translate as the current one does" :
						   strerror(-r));
	*pt_id = arg.pt_id;
	return 0;
}

int kho_vfio_region(struct kho *kho, int dev, uint32_t index, uint64_t *offset, uint64_t *size,
		    struct kho_error **err)
{
	struct vfio_region_info arg = { .argsz = sizeof(arg), .index = index };
	int r = kho_op(kho, ioctl, dev, VFIO_DEVICE_GET_REGION_INFO, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL, "no information on region %" PRIu32 ": %s", index,
				     strerror(-r));
	*offset = arg.offset;
	*size = arg.size;
	return 0;
}

int kho_vfio_set_liveupdate(struct kho *kho, int dev, bool may_lose_irq, uint32_t deadline_msec,
			    struct kho_error **err)
{
	const struct vfio_device_feature_liveupdate body = {
		.flags = may_lose_irq ? VFIO_DEVICE_LIVEUPDATE_MAY_LOSE_IRQ : 0,
		.deadline_ms = deadline_msec,
	};
	union {
		struct vfio_device_feature head;
		uint8_t all[sizeof(struct vfio_device_feature) + sizeof(body)];
	} arg = {
		.head = {
			.argsz = sizeof(arg),
			.flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LIVEUPDATE,
		},
	};
	int r;

	memcpy(arg.head.data, &body, sizeof(body));
	r = kho_op(kho, ioctl, dev, VFIO_DEVICE_FEATURE, &arg);
	if (r < 0)
		return kho_error_new(err, r, NULL, "cannot say how to treat the device in a live update: %s",
				     strerror(-r));
	return 0;
}

/* Little endian, whatever the host is. */
static int config_word(struct kho *kho, int dev, uint64_t at, uint32_t *ret)
{
	uint8_t b[2];
	ssize_t n = kho_op(kho, pread, dev, b, sizeof(b), (off_t)at);

	if (n != sizeof(b))
		return n < 0 ? (int)n : -EIO;
	*ret = b[0] | (uint32_t)b[1] << 8;
	return 0;
}

int kho_vfio_msix_enabled(struct kho *kho, int dev, struct kho_error **err)
{
	uint64_t config, size;
	uint32_t word = 0, pos;
	int r;

	r = kho_vfio_region(kho, dev, VFIO_PCI_CONFIG_REGION_INDEX, &config, &size, err);
	if (r < 0)
		return r;
	r = config_word(kho, dev, config + PCI_STATUS, &word);
	if (r >= 0 && !(word & PCI_STATUS_CAP_LIST))
		return 0;
	if (r >= 0)
		r = config_word(kho, dev, config + PCI_CAPABILITY_LIST, &word);
	/* Each of them once: what a device says may have a loop in it. */
	for (int i = 0; r >= 0 && i < (256 - PCI_STD_HEADER_SIZEOF) / 4; i++) {
		pos = word & 0xfc;
		if (pos < PCI_STD_HEADER_SIZEOF)
			return 0;
		r = config_word(kho, dev, config + pos, &word);
		if (r >= 0 && (word & 0xff) == PCI_CAP_ID_MSIX) {
			r = config_word(kho, dev, config + pos + PCI_MSIX_FLAGS, &word);
			if (r >= 0)
				return !!(word & PCI_MSIX_FLAGS_ENABLE);
		}
		word >>= 8;
	}
	return r < 0 ? kho_error_new(err, r, NULL, "the device's configuration cannot be read: %s",
				     strerror(-r)) : 0;
}
