/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a descriptor is. Opened in this kernel an iommufd or a VFIO device is a device node,
 * and the kernel tells which by the node's number (a path would be one of the client's
 * mount namespace). Retrieved from the previous kernel it is an anonymous inode with a name.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "file.h"
#include "util.h"

static enum kho_file_kind node_kind(struct kho *kho, dev_t rdev)
{
	char path[64], text[512], *p;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/sys/dev/char/%u:%u/uevent", major(rdev), minor(rdev));
	fd = kho_op(kho, open, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	n = kho_op(kho, pread, fd, text, sizeof(text) - 1, 0);
	kho_close(kho, fd);
	if (n <= 0)
		return 0;
	text[n] = 0;
	p = strstr(text, "DEVNAME=");
	if (!p)
		return 0;
	p += strlen("DEVNAME=");
	p[strcspn(p, "\n")] = 0;
	if (strncmp(p, "vfio/devices/", strlen("vfio/devices/")) == 0)
		return KHO_FILE_VFIO;
	return strcmp(p, "iommu") == 0 ? KHO_FILE_IOMMUFD : 0;
}

enum kho_file_kind kho_file_device_kind(struct kho *kho, int fd, const struct stat *st)
{
	char path[64], text[64];
	ssize_t n;

	if (S_ISCHR(st->st_mode))
		return node_kind(kho, st->st_rdev);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = kho_op(kho, readlink, path, text, sizeof(text) - 1);
	if (n <= 0)
		return 0;
	text[n] = 0;
	if (strcmp(text, "anon_inode:[vfio-device]") == 0)
		return KHO_FILE_VFIO;
	return strcmp(text, "anon_inode:[iommufd]") == 0 ? KHO_FILE_IOMMUFD : 0;
}
