/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_SNAPSHOT_H
#define KHO_SNAPSHOT_H

#include <kho/error.h>
#include <kho/graph.h>
#include <kho/ops.h>

#ifdef __cplusplus
extern "C" {
#endif

/**
 * kho_snapshot() - read from the kernel what is in an iommufd
 * @kho: handle
 * @iommufd: the context, borrowed
 * @memfds: what may be mapped in it, borrowed; the index of one is the backing of its areas;
 *	-1 for one that is not at hand and that no area maps
 * @n_memfds: how many
 * @context: zeroed, or with an earlier result, which is freed; receives it; empty on error;
 *	its token and those of its devices are the caller's
 * @err: error, names the object
 *
 * By the kernel's inspection alone. A context that changes meanwhile is read again, a few
 * times; one that is preserved does not change. Frozen HWPTs are read too. An area that
 * maps something else than @memfds, and an object of a kind that a graph cannot hold, are
 * refused.
 * Return: 0, -EOPNOTSUPP, -EFBIG, -EAGAIN (it keeps changing), -ENOTTY (a kernel that cannot
 * tell), -ENOMEM, -errno.
 */
int kho_snapshot(struct kho *kho, int iommufd, const int *memfds, size_t n_memfds,
		 struct kho_context *context, struct kho_error **err);

#ifdef __cplusplus
}
#endif
#endif
