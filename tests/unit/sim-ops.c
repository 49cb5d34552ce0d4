/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The other end: ioctls as packets to the simulated kernel, calls that fail on demand. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <fcntl.h>
#include <linux/iommufd.h>
#include <linux/liveupdate.h>
#ifndef __counted_by
#define __counted_by(m)
#endif
#include <linux/vfio.h>
#include <poll.h>
#include <sys/mman.h>

#include "sim-wire.h"
#include "sim.h"

static const struct kho_ops *real;
static long fail_at = -1, n_calls;
static int fail_errno;

/* KHO_SIM_FAIL=N:ERRNO makes the N-th call fail, once. */
static int injected(void)
{
	if (fail_at < 0) {
		const char *env = getenv("KHO_SIM_FAIL");

		fail_at = 0;
		if (env)
			(void)sscanf(env, "%ld:%d", &fail_at, &fail_errno);
	}
	if (fail_at > 0 && ++n_calls == fail_at) {
		dprintf(STDERR_FILENO, "sim: call %ld fails\n", n_calls);
		return -fail_errno;
	}
	return 0;
}

#define INJECT()                    \
	do {                        \
		int _i = injected(); \
		if (_i < 0)         \
			return _i;  \
	} while (0)

void sim_fail(long n, int errnum)
{
	fail_at = n;
	fail_errno = errnum;
	n_calls = 0;
}

long sim_calls(void)
{
	return n_calls;
}

static int sim_connect(const char *name)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/%s", getenv("KHO_SIM"), name);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0) {
		close(fd);
		return -ENOENT;
	}
	return fd < 0 ? -errno : fd;
}

static struct sim_packet q, a;

/* What the simulated kernel says of a descriptor of its own. */
static int ask(int fd, unsigned long what)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	int got;

	q.request = what;
	q.data_size = 0;
	if (sim_send(fd, &q, -1) < 0)
		return -EINVAL;
	/* Some other socket: nobody answers. */
	if (poll(&p, 1, 3000) <= 0 || sim_recv(fd, &a, &got) <= 0)
		return -EINVAL;
	return a.ret;
}

static int open_device(const char *path)
{
	int sock = sim_connect("open"), fd = -1;

	if (sock < 0)
		return sock;
	q.request = 0;
	q.data_size = strlen(path) + 1;
	memcpy(q.data, path, q.data_size);
	if (sim_send(sock, &q, -1) < 0 || sim_recv(sock, &a, &fd) <= 0)
		a.ret = -ENOENT;
	close(sock);
	return a.ret < 0 ? a.ret : fd;
}

static int op_open(void *u, const char *path, int flags)
{
	char answer = 0, own[128];
	int fd;

	/* Asked for by the clock, it must not take its turn in what fails. */
	if (strcmp(path, KHO_LUO_IMAGE) == 0) {
		snprintf(own, sizeof(own), "%s/kho_image", getenv("KHO_SIM"));
		return real->open(NULL, own, flags);
	}
	INJECT();
	if (strcmp(path, "/dev/iommu") == 0 || strncmp(path, "/dev/vfio/", 10) == 0)
		return open_device(path);
	if (sscanf(path, "/proc/self/fdinfo/%d", &fd) == 1) {
		int r = ask(fd, SIM_FDINFO);

		if (r < 0)
			return r;
		fd = memfd_create("fdinfo", MFD_CLOEXEC);
		return pwrite(fd, a.data, a.data_size, 0) < 0 ? -errno : fd;
	}
	if (strcmp(path, KHO_LUO_DEVICE) != 0)
		return real->open(NULL, path, flags);
	fd = sim_connect("liveupdate");
	if (fd < 0)
		return fd;
	if (recv(fd, &answer, 1, 0) != 1 || answer != 'k') {
		close(fd);
		return answer == 'b' ? -EBUSY : -ENOENT;
	}
	return fd;
}

static ssize_t op_readlink(void *u, const char *path, char *buf, size_t size)
{
	size_t n;
	int fd;

	INJECT();
	if (sscanf(path, "/proc/self/fd/%d", &fd) != 1 || ask(fd, SIM_WHAT) < 0)
		return real->readlink(NULL, path, buf, size);
	n = strlen((char *)a.data);
	memcpy(buf, a.data, n < size ? n : size);
	return n < size ? n : size;
}

/* The descriptor in an argument, -1: none. */
static int fd_of(unsigned long request, const void *arg)
{
	switch (request) {
	case LIVEUPDATE_SESSION_PRESERVE_FD:
		return ((const struct liveupdate_session_preserve_fd *)arg)->fd;
	case IOMMU_IOAS_MAP_FILE:
		return ((const struct iommu_ioas_map_file *)arg)->fd;
	case IOMMU_IOAS_LIST_AREAS:
		return ((const struct iommu_ioas_list_areas *)arg)->fd;
	case VFIO_DEVICE_BIND_IOMMUFD:
		return ((const struct vfio_device_bind_iommufd *)arg)->iommufd;
	}
	return -1;
}

/* Where pointers in an argument lead to. @before: as it was given to the kernel. */
static void copy_out(unsigned long request, const void *before)
{
	const struct iommu_device_info *d = before;
	size_t n;

	switch (request) {
	case IOMMU_LIST_OBJECTS:
		memcpy((void *)(uintptr_t)((const struct iommu_list_objects *)before)->entries, a.data,
		       a.data_size);
		break;
	case IOMMU_IOAS_LIST_AREAS:
		memcpy((void *)(uintptr_t)((const struct iommu_ioas_list_areas *)before)->entries,
		       a.data, a.data_size);
		break;
	case IOMMU_GET_ATTACH_INFO:
		memcpy((void *)(uintptr_t)((const struct iommu_attach_info *)before)->data_uptr, a.data,
		       a.data_size);
		break;
	case IOMMU_GET_DEVICE_INFO:
		memcpy((void *)(uintptr_t)d->attachments, a.data, sizeof(struct iommu_device_attachment));
		n = a.data_size - sizeof(struct iommu_device_attachment);
		memcpy((void *)(uintptr_t)d->name, a.data + sizeof(struct iommu_device_attachment),
		       n < d->name_len ? n : d->name_len);
		break;
	}
}

static int op_ioctl(void *u, int fd, unsigned long request, void *arg)
{
	unsigned char before[SIM_ARG_MAX];
	size_t size = *(const __u32 *)arg;
	int got = -1, r;

	INJECT();
	if (size > SIM_ARG_MAX)
		return -E2BIG;
	q.request = request;
	q.data_size = 0;
	memcpy(q.arg, arg, size);
	memcpy(before, arg, size);
	r = sim_send(fd, &q, fd_of(request, arg));
	if (r == -ENOTSOCK)
		return -ENOTTY;
	if (r < 0)
		return r;
	r = sim_recv(fd, &a, &got);
	if (r <= 0)
		return -ENOTTY;
	if (a.ret < 0)
		return a.ret;
	memcpy(arg, a.arg, size);
	copy_out(request, before);
	if (got >= 0) {
		if (request == LIVEUPDATE_SESSION_RETRIEVE_FD)
			((struct liveupdate_session_retrieve_fd *)arg)->fd = got;
		else
			((struct liveupdate_ioctl_create_session *)arg)->fd = got;
	}
	return a.ret;
}

static int op_memfd_create(void *u, const char *name, unsigned int flags)
{
	INJECT();
	return real->memfd_create(NULL, name, flags);
}

static int op_ftruncate(void *u, int fd, off_t length)
{
	INJECT();
	return real->ftruncate(NULL, fd, length);
}

static ssize_t op_pread(void *u, int fd, void *buf, size_t count, off_t offset)
{
	ssize_t n;

	INJECT();
	n = real->pread(NULL, fd, buf, count, offset);
	if (n != -ESPIPE || ask(fd, SIM_CONFIG) < 0 || (size_t)offset + count > a.data_size)
		return n;
	memcpy(buf, a.data + offset, count);
	return (ssize_t)count;
}

static ssize_t op_pwrite(void *u, int fd, const void *buf, size_t count, off_t offset)
{
	INJECT();
	return real->pwrite(NULL, fd, buf, count, offset);
}

static int op_fstat(void *u, int fd, struct stat *st)
{
	INJECT();
	return real->fstat(NULL, fd, st);
}

static int op_fcntl(void *u, int fd, int cmd, long arg)
{
	INJECT();
	return real->fcntl(NULL, fd, cmd, arg);
}

static ssize_t op_getrandom(void *u, void *buf, size_t count)
{
	INJECT();
	return real->getrandom(NULL, buf, count);
}

static struct kho_ops ops;

const struct kho_ops *sim_ops(void)
{
	real = kho_ops_kernel();
	ops = *real;
	ops.open = op_open;
	ops.ioctl = op_ioctl;
	ops.memfd_create = op_memfd_create;
	ops.ftruncate = op_ftruncate;
	ops.pread = op_pread;
	ops.pwrite = op_pwrite;
	ops.fstat = op_fstat;
	ops.fcntl = op_fcntl;
	ops.readlink = op_readlink;
	ops.getrandom = op_getrandom;
	return &ops;
}
