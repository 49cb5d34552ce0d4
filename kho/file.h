/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_FILE_H
#define KHO_FILE_H

#include <sys/stat.h>

#include <kho/image.h>

/**
 * kho_file_device_kind() - is it an iommufd or a VFIO device?
 * @kho: handle
 * @fd: any descriptor, borrowed; nothing is asked of the file itself
 * @st: what fstat(2) says of it
 *
 * This decides about the order and the words; the kernel's handlers have the last word.
 * Return: KHO_FILE_IOMMUFD, KHO_FILE_VFIO, or 0.
 */
enum kho_file_kind kho_file_device_kind(struct kho *kho, int fd, const struct stat *st);

#endif
