/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The other end: ioctls as packets to the simulated kernel, calls that fail on demand. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/liveupdate.h>

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

static int op_open(void *u, const char *path, int flags)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	char answer = 0;
	int fd;

	INJECT();
	if (strcmp(path, KHO_LUO_DEVICE) != 0)
		return real->open(NULL, path, flags);
	snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/liveupdate", getenv("KHO_SIM"));
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (connect(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0 || recv(fd, &answer, 1, 0) != 1) {
		close(fd);
		return -ENOENT;
	}
	if (answer != 'k') {
		close(fd);
		return answer == 'b' ? -EBUSY : -ENOENT;
	}
	return fd;
}

static int op_ioctl(void *u, int fd, unsigned long request, void *arg)
{
	struct sim_packet q = { .request = request }, a;
	struct liveupdate_session_preserve_fd *p = arg;
	size_t size = *(const __u32 *)arg;
	int send_fd = -1, got = -1, r;

	INJECT();
	memcpy(q.arg, arg, size < sizeof(q.arg) ? size : sizeof(q.arg));
	if (request == LIVEUPDATE_SESSION_PRESERVE_FD)
		send_fd = p->fd;
	r = sim_send(fd, &q, send_fd);
	if (r == -ENOTSOCK)
		return -ENOTTY;
	if (r < 0)
		return r;
	r = sim_recv(fd, &a, &got);
	if (r <= 0)
		return -ENOTTY;
	if (a.ret < 0)
		return a.ret;
	memcpy(arg, a.arg, size < sizeof(a.arg) ? size : sizeof(a.arg));
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
	INJECT();
	return real->pread(NULL, fd, buf, count, offset);
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
	ops.getrandom = op_getrandom;
	return &ops;
}
