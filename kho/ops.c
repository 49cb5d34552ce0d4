/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The one table through which the library reaches the kernel, and its real
 * implementation: each entry is one system call, with errno folded into the
 * return value.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/un.h>

#include "util.h"

#define RET(expr)                               \
	({                                      \
		__auto_type _r = (expr);        \
		_r < 0 ? (__typeof__(_r))-errno : _r; \
	})

static int real_open(void *u, const char *path, int flags)
{
	return RET(open(path, flags));
}

static int real_close(void *u, int fd)
{
	return RET(close(fd));
}

static int real_ioctl(void *u, int fd, unsigned long request, void *arg)
{
	return RET(ioctl(fd, request, arg));
}

static int real_memfd_create(void *u, const char *name, unsigned int flags)
{
	return RET(memfd_create(name, flags));
}

static int real_ftruncate(void *u, int fd, off_t length)
{
	return RET(ftruncate(fd, length));
}

static ssize_t real_pread(void *u, int fd, void *buf, size_t count, off_t offset)
{
	return RET(pread(fd, buf, count, offset));
}

static ssize_t real_pwrite(void *u, int fd, const void *buf, size_t count, off_t offset)
{
	return RET(pwrite(fd, buf, count, offset));
}

/*
 * Of what is known already: a client's file may be in a file system whose server does not answer,
 * or is the client.
 */
static int real_fstat(void *u, int fd, struct stat *st)
{
	struct statx sx;

	if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_BASIC_STATS, &sx) < 0)
		return -errno;
	*st = (struct stat){
		.st_dev = makedev(sx.stx_dev_major, sx.stx_dev_minor),
		.st_ino = sx.stx_ino,
		.st_mode = sx.stx_mode,
		.st_nlink = sx.stx_nlink,
		.st_rdev = makedev(sx.stx_rdev_major, sx.stx_rdev_minor),
		.st_size = (off_t)sx.stx_size,
	};
	return 0;
}

static int real_fcntl(void *u, int fd, int cmd, long arg)
{
	return RET(fcntl(fd, cmd, arg));
}

static ssize_t real_readlink(void *u, const char *path, char *buf, size_t size)
{
	return RET(readlink(path, buf, size));
}

static int real_connect(void *u, const char *path, int timeout_msec)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	struct timeval tv = {
		.tv_sec = timeout_msec / 1000,
		.tv_usec = (timeout_msec % 1000) * 1000,
	};
	_cleanup_close_ int fd = -1;

	if (strlen(path) >= sizeof(sa.sun_path))
		return -ENAMETOOLONG;
	strcpy(sa.sun_path, path);

	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)) < 0 ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)) < 0)
		return -errno;
	if (connect(fd, (const struct sockaddr *)&sa, sizeof(sa)) < 0)
		return -errno;
	return TAKE_FD(fd);
}

static ssize_t real_sendmsg(void *u, int fd, const struct msghdr *msg, int flags)
{
	return RET(sendmsg(fd, msg, flags));
}

static ssize_t real_recvmsg(void *u, int fd, struct msghdr *msg, int flags)
{
	return RET(recvmsg(fd, msg, flags));
}

static ssize_t real_getrandom(void *u, void *buf, size_t count)
{
	return RET(getrandom(buf, count, 0));
}

static const struct kho_ops real_ops = {
	.size = sizeof(struct kho_ops),
	.open = real_open,
	.close = real_close,
	.ioctl = real_ioctl,
	.memfd_create = real_memfd_create,
	.ftruncate = real_ftruncate,
	.pread = real_pread,
	.pwrite = real_pwrite,
	.fstat = real_fstat,
	.fcntl = real_fcntl,
	.readlink = real_readlink,
	.connect = real_connect,
	.sendmsg = real_sendmsg,
	.recvmsg = real_recvmsg,
	.getrandom = real_getrandom,
};

/* The table as it was in version 0.1: a smaller one there never was. */
#define SIZE_V0 (offsetof(struct kho_ops, getrandom) + sizeof(real_ops.getrandom))

const struct kho_ops *kho_ops_kernel(void)
{
	return &real_ops;
}

int kho_new(struct kho **ret, const struct kho_ops *ops, void *userdata)
{
	struct kho *kho;

	if (!ops)
		ops = &real_ops;
	if (ops->size < SIZE_V0 || !ops->open || !ops->close || !ops->ioctl ||
	    !ops->memfd_create || !ops->ftruncate || !ops->pread || !ops->pwrite ||
	    !ops->fstat || !ops->fcntl || !ops->readlink || !ops->connect ||
	    !ops->sendmsg || !ops->recvmsg || !ops->getrandom)
		return -EINVAL;

	kho = calloc(1, sizeof(*kho));
	if (!kho)
		return -ENOMEM;
	/* A caller built with an older, shorter table gets the kernel's for the rest. */
	kho->ops = real_ops;
	memcpy(&kho->ops, ops, ops->size < sizeof(*ops) ? ops->size : sizeof(*ops));
	kho->ops.size = sizeof(*ops);
	kho->userdata = userdata;
	*ret = kho;
	return 0;
}

struct kho *kho_free(struct kho *kho)
{
	free(kho);
	return NULL;
}
