/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_UTIL_H
#define KHO_UTIL_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include <kho/kho.h>

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define _cleanup_(fn) __attribute__((cleanup(fn)))
#define _cleanup_free_ _cleanup_(kho_freep)
#define _cleanup_close_ _cleanup_(kho_closep)
#define _cleanup_error_ _cleanup_(kho_error_freep)
#define _cleanup_image_ _cleanup_(kho_image_freep)
#define _printf_(a, b) __attribute__((format(printf, a, b)))
#define _unused_ __attribute__((unused))

#define TAKE_PTR(p)                    \
	({                             \
		__typeof__(p) _p = (p); \
		(p) = NULL;            \
		_p;                    \
	})
#define TAKE_FD(fd)          \
	({                   \
		int _f = (fd); \
		(fd) = -1;   \
		_f;          \
	})

/* CLOCK_MONOTONIC, in microseconds. */
static inline uint64_t monotonic_usec(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * UINT64_C(1000000) + (uint64_t)ts.tv_nsec / 1000;
}

static inline void kho_freep(void *p)
{
	free(*(void **)p);
}

static inline void kho_closep(int *fd)
{
	int saved = errno;

	if (*fd >= 0)
		close(*fd);
	errno = saved;
}

static inline void kho_error_freep(struct kho_error **e)
{
	kho_error_free(*e);
}

static inline void kho_image_freep(struct kho_image **i)
{
	kho_image_free(*i);
}

/* The handle's inside, shared by the files of the library. */
struct kho {
	struct kho_ops ops;
	void *userdata;
};

#define kho_op(kho, name, ...) ((kho)->ops.name((kho)->userdata, ##__VA_ARGS__))

/* Closes through the table, so that a simulated kernel sees every close. */
static inline int kho_close(struct kho *kho, int fd)
{
	if (fd >= 0)
		(void)kho_op(kho, close, fd);
	return -1;
}

#endif
