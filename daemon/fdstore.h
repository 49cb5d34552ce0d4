/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOD_FDSTORE_H
#define KHOD_FDSTORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kho/error.h>

/** FDSTORE_NAME_MAX - size of a name with its NUL (systemd allows 255 characters) */
#define FDSTORE_NAME_MAX 256

/**
 * struct fdstore - systemd's descriptor store of this service
 * @available: there is one
 * @batch: between fdstore_batch() and fdstore_confirm() or fdstore_unbatch()
 * @used: descriptors of ours in it
 * @max: room; systemd drops what exceeds it without telling, so khod counts
 * @unconfirmed: of what was removed in a batch nobody knows yet if it is gone
 * @removed_usec: when the last one was removed, CLOCK_MONOTONIC; 0: never
 */
struct fdstore {
	bool available;
	bool batch;
	bool unconfirmed;
	unsigned int used;
	unsigned int max;
	uint64_t removed_usec;
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
 * systemd closes it in a process of its own, perhaps a moment later: fdstore_closing().
 *
 * Return: 0, -ETIMEDOUT, -errno.
 */
int fdstore_remove(struct fdstore *fs, const char *name, struct kho_error **err);

/**
 * fdstore_batch() - do not wait for the changes that follow
 *
 * systemd takes its time at boot, and one wait is enough for all that nothing relies on yet.
 */
void fdstore_batch(struct fdstore *fs);

/**
 * fdstore_confirm() - wait until all changes since fdstore_batch() have been made
 * @what: whose they are, for the error
 *
 * Return: 0, -ETIMEDOUT, -errno. The batch has ended in any case.
 */
int fdstore_confirm(struct fdstore *fs, const char *what, struct kho_error **err);

/** fdstore_unbatch() - wait again for each change from here on, and not for those of the batch */
void fdstore_unbatch(struct fdstore *fs);

/** fdstore_room() - so many places are free */
size_t fdstore_room(const struct fdstore *fs);

/** fdstore_closing() - may systemd still have to close what was removed? It is waited for. */
bool fdstore_closing(struct fdstore *fs);

#endif
