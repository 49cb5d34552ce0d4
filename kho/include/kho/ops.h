/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_OPS_H
#define KHO_OPS_H

#include <stddef.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/**
 * struct kho_ops - everything libkho asks of the kernel
 * @size: sizeof(struct kho_ops) of the caller. New members come at the end: a table that is
 *	shorter than the library's is filled up with kho_ops_kernel()'s
 * @open: open(2) with O_CLOEXEC already in @flags
 * @close: close(2)
 * @ioctl: ioctl(2)
 * @memfd_create: memfd_create(2)
 * @ftruncate: ftruncate(2)
 * @pread: pread(2)
 * @pwrite: pwrite(2)
 * @fstat: fstat(2)
 * @fcntl: fcntl(2) with an integer argument
 * @readlink: readlink(2)
 * @connect: a connected, close-on-exec SOCK_SEQPACKET socket to the AF_UNIX
 *	path, on which sends and receives give up with EAGAIN after
 *	@timeout_msec
 * @sendmsg: sendmsg(2)
 * @recvmsg: recvmsg(2)
 * @getrandom: getrandom(2)
 *
 * Each returns what the system call returns, but a failure as the negative
 * errno. @userdata is what was given to kho_new().
 */
struct kho_ops {
	size_t size;
	int (*open)(void *userdata, const char *path, int flags);
	int (*close)(void *userdata, int fd);
	int (*ioctl)(void *userdata, int fd, unsigned long request, void *arg);
	int (*memfd_create)(void *userdata, const char *name, unsigned int flags);
	int (*ftruncate)(void *userdata, int fd, off_t length);
	ssize_t (*pread)(void *userdata, int fd, void *buf, size_t count, off_t offset);
	ssize_t (*pwrite)(void *userdata, int fd, const void *buf, size_t count, off_t offset);
	int (*fstat)(void *userdata, int fd, struct stat *st);
	int (*fcntl)(void *userdata, int fd, int cmd, long arg);
	ssize_t (*readlink)(void *userdata, const char *path, char *buf, size_t size);
	int (*connect)(void *userdata, const char *path, int timeout_msec);
	ssize_t (*sendmsg)(void *userdata, int fd, const struct msghdr *msg, int flags);
	ssize_t (*recvmsg)(void *userdata, int fd, struct msghdr *msg, int flags);
	ssize_t (*getrandom)(void *userdata, void *buf, size_t count);
};

/** kho_ops_kernel() - the table that makes the real system calls; never NULL, static */
const struct kho_ops *kho_ops_kernel(void);

/**
 * struct kho - a handle on libkho
 *
 * Holds the table of operations and nothing else; it has no global state, opens
 * nothing, and may be used by one thread at a time.
 */
struct kho;

/**
 * kho_new() - make a handle
 * @ret: the handle; freed with kho_free()
 * @ops: the operations, copied; NULL: kho_ops_kernel()
 * @userdata: first argument of every operation
 *
 * Return: 0, -EINVAL for a table that is shorter than that of version 0.1 or has a NULL member, -ENOMEM.
 */
int kho_new(struct kho **ret, const struct kho_ops *ops, void *userdata);

/** kho_free() - free a handle; NULL is allowed. Return: NULL. */
struct kho *kho_free(struct kho *kho);

#ifdef __cplusplus
}
#endif
#endif
