/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Failure domains. What shares a memfd, an iommufd or a device can only be carried over, or
 * stopped, together: LUO has each of them in one session, and finishes sessions one by one. So
 * they are one workload, and a second one that brings a file of the first is refused. The
 * kernel says no more than that the file is in some session; here is found out in whose.
 *
 * An IOMMU group adds nothing to that: all of it is bound to one iommufd, and a device that is
 * attached there has to be in the workload (restore.c).
 */
#include <fcntl.h>
#include <string.h>

#include "khod.h"

#ifndef F_DUPFD_QUERY
#define F_DUPFD_QUERY 1027
#endif

/* A memfd is its inode, however often it was opened; the others are what was opened. */
static bool same_file(struct khod *k, enum kho_file_kind kind, int a, int b)
{
	struct stat sa, sb;

	if (kind != KHO_FILE_MEMFD)
		return kho_op(k->kho, fcntl, a, F_DUPFD_QUERY, b) == 1;
	return kho_op(k->kho, fstat, a, &sa) >= 0 && kho_op(k->kho, fstat, b, &sb) >= 0 &&
	       sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino;
}

static bool is_file(struct khod *k, struct workload *w, size_t i, enum kho_file_kind kind,
		    uint64_t token, int fd)
{
	int own = w->fds ? w->fds[i] : -1, got = -1;
	bool same;

	if (own < 0 && w->session >= 0)
		own = got = kho_luo_retrieve(k->kho, w->session, token, NULL);
	same = own >= 0 && same_file(k, kind, own, fd);
	kho_close(k->kho, got);
	return same;
}

int domain_explain(struct khod *k, const struct kho_image *image, enum kho_file_kind kind, int fd,
		   struct kho_error **err)
{
	uid_t uid = kho_image_uid(image);

	for (struct workload *o = k->workloads; o; o = o->next)
		for (size_t i = 0; o->image != image && i < workload_n_files(o); i++) {
			struct kho_image_file f = {};

			kho_image_file(o->image, i, &f);
			if (f.kind != kind || !is_file(k, o, i, kind, f.token, fd))
				continue;
			/* Whose name it is, is nobody else's business. */
			if (uid != 0 && uid != kho_image_uid(o->image))
				return kho_error_new(err, EBUSY, NULL,
						     "it is in a workload of another user; what shares it is one failure domain, and has to be one workload");
			return kho_error_new(err, EBUSY, NULL,
					     "it is '%s' of workload %s; what shares it is one failure domain: register all of it as one workload",
					     f.name, o->name);
		}
	return 0;
}
