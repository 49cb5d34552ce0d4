/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What makes khod stateless: PID 1 holds a reference on each session, over a
 * crash of khod and over the kexec. sd_notify() only queues a message, so every
 * change, or batch of them, is followed by a barrier; the step after it may rely on it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>

#include "fdstore.h"
#include "log.h"
#include "util.h"

#define BARRIER_USEC (30 * 1000000ULL)
/* systemd before 254 does not say how large the store is. */
#define MAX_UNKNOWN 512
/* How long systemd may take to close what it has removed, on a busy machine. */
#define CLOSING_USEC (2 * 1000000ULL)

void fdstore_init(struct fdstore *fs)
{
	const char *env = getenv("FDSTORE");

	*fs = (struct fdstore){ .available = getenv("NOTIFY_SOCKET") != NULL };
	if (fs->available)
		fs->max = env ? (unsigned int)strtoul(env, NULL, 10) : MAX_UNKNOWN;
	if (fs->max == 0)
		fs->available = false;
}

static int barrier(const struct fdstore *fs, const char *name, const char *what, struct kho_error **err)
{
	int r = fs->batch ? 1 : sd_notify_barrier(0, BARRIER_USEC);

	if (r > 0)
		return 0;
	if (r == 0)
		r = -ENODEV;
	return kho_error_new(err, r, name, "systemd did not confirm that the descriptor is %s: %s",
			     what, strerror(-r));
}

int fdstore_push(struct fdstore *fs, const char *name, int fd, struct kho_error **err)
{
	char msg[FDSTORE_NAME_MAX + 64];
	int r;

	if (!fs->available)
		return kho_error_new(err, ENODEV, "fd store",
				     "there is none: run khod as khod.service with FileDescriptorStoreMax=");
	if (fs->used >= fs->max)
		return kho_error_new(err, ENOSPC, "fd store",
				     "all %u places are taken: raise FileDescriptorStoreMax= of khod.service",
				     fs->max);
	snprintf(msg, sizeof(msg), "FDSTORE=1\nFDPOLL=0\nFDNAME=%s", name);
	r = sd_pid_notify_with_fds(0, 0, msg, &fd, 1);
	if (r <= 0)
		return kho_error_new(err, r ? r : -ENODEV, name, "cannot reach systemd: %s",
				     strerror(r ? -r : ENODEV));
	fs->used++;
	r = barrier(fs, name, "stored", err);
	if (r < 0) {
		(void)fdstore_remove(fs, name, NULL);
		return r;
	}
	return 0;
}

int fdstore_remove(struct fdstore *fs, const char *name, struct kho_error **err)
{
	_cleanup_error_ struct kho_error *late = NULL;
	_cleanup_free_ char *text = NULL;
	char msg[FDSTORE_NAME_MAX + 64];
	int r;

	snprintf(msg, sizeof(msg), "FDSTOREREMOVE=1\nFDNAME=%s", name);
	r = sd_notify(0, msg);
	if (r <= 0)
		return kho_error_new(err, r ? r : -ENODEV, name, "cannot reach systemd: %s",
				     strerror(r ? -r : ENODEV));
	if (fs->used > 0)
		fs->used--;
	/*
	 * From here on it will be removed. To keep it in custody because that was not confirmed
	 * in time would be to rely on a descriptor that PID 1 is about to close.
	 */
	if (barrier(fs, name, "removed", &late) < 0)
		log_event(LOG_WARNING, NULL, NULL, "%s.", text = kho_error_format(late, 0));
	fs->removed_usec = monotonic_usec();
	fs->unconfirmed |= fs->batch;
	return 0;
}

void fdstore_batch(struct fdstore *fs)
{
	fs->batch = true;
}

int fdstore_confirm(struct fdstore *fs, const char *what, struct kho_error **err)
{
	int r;

	fs->batch = false;
	r = barrier(fs, what, "stored", err);
	if (r >= 0)
		fs->unconfirmed = false;
	return r;
}

void fdstore_unbatch(struct fdstore *fs)
{
	fs->batch = false;
}

size_t fdstore_room(const struct fdstore *fs)
{
	return fs->used < fs->max ? fs->max - fs->used : 0;
}

bool fdstore_closing(struct fdstore *fs)
{
	if (fs->unconfirmed) {
		fs->unconfirmed = false;
		(void)barrier(fs, "fd store", "removed", NULL);
		fs->removed_usec = monotonic_usec();
	}
	return fs->removed_usec > 0 && monotonic_usec() - fs->removed_usec < CLOSING_USEC;
}
