/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOD_FDSTORE_H
#define KHOD_FDSTORE_H

#include <stdbool.h>

#include <kho/error.h>

/** FDSTORE_NAME_MAX - size of a name with its NUL (systemd allows 255 characters) */
#define FDSTORE_NAME_MAX 256

/**
 * struct fdstore - systemd's descriptor store of this service
 * @available: there is one
 * @used: descriptors of ours in it
 * @max: room; systemd drops what exceeds it without telling, so khod counts
 */
struct fdstore {
	bool available;
	unsigned int used;
	unsigned int max;
};

/** fdstore_init() - look at what systemd says in the environment */
void fdstore_init(struct fdstore *fs);

/**
 * fdstore_push() - put a descriptor into the store and wait until it is there
 * @fs: the store
 * @name: unique among ours
 * @fd: borrowed
 * @err: error
 *
 * Return: 0, -ENOSPC (full), -ENODEV (no store), -ETIMEDOUT, -errno.
 */
int fdstore_push(struct fdstore *fs, const char *name, int fd, struct kho_error **err);

/**
 * fdstore_remove() - take a descriptor out of the store and wait until it is gone
 *
 * Return: 0, -ETIMEDOUT, -errno.
 */
int fdstore_remove(struct fdstore *fs, const char *name, struct kho_error **err);

#endif
