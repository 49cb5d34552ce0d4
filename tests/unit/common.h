/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef TEST_COMMON_H
#define TEST_COMMON_H

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sim.h"
#include "util.h"

/*
 * Criterion's own assert talks to its runner at each pass, too, over a queue that now and
 * then loses a message, and then the runner waits for ever; these tests assert by the
 * thousand, and in processes of their own. This one speaks only when it fails.
 */
#undef cr_assert
#define cr_assert(condition, ...)                                                    \
	do {                                                                         \
		if (!(condition))                                                    \
			test_fail(__FILE__, __LINE__, #condition, " " __VA_ARGS__); \
	} while (0)

__attribute__((format(printf, 4, 5), noreturn))
static inline void test_fail(const char *file, int line, const char *what, const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "%s:%d: failed: %s:", file, line, what);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	abort();
}

static inline void raise_limits(void)
{
	struct rlimit l;

	if (getrlimit(RLIMIT_NOFILE, &l) == 0) {
		l.rlim_cur = l.rlim_max;
		(void)setrlimit(RLIMIT_NOFILE, &l);
	}
}

/* Start khod, with no fault, and see it ready. */
static inline void must_start(struct sim *s)
{
	raise_limits();
	sim_start(s, NULL, NULL);
	cr_assert(sim_ready(s), "khod did not start:\n%s", sim_log(s));
}

/* Whatever a test did to it, khod ends well. */
static inline void must_stop(struct sim *s)
{
	int status = sim_stop(s);

	cr_assert(status == 0, "khod ended with status 0x%x:\n%s", status, sim_log(s));
}

/* A connection to it, or NULL if it cannot be had. */
static inline struct kho_client *dial(struct kho *kho, struct sim *s)
{
	struct kho_client *c = NULL;

	(void)kho_client_connect(kho, sim_socket(s), &c, NULL);
	return c;
}

/* A memfd whose bytes follow from the seed. */
static inline int make_memfd(size_t size, unsigned int seed)
{
	int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	cr_assert(fd >= 0);
	for (size_t i = 0; i < size; i += 4) {
		unsigned int v = seed = seed * 1664525u + 1013904223u;

		cr_assert(pwrite(fd, &v, size - i < 4 ? size - i : 4, i) > 0);
	}
	return fd;
}

static inline bool check_memfd(int fd, size_t size, unsigned int seed)
{
	struct stat st;

	if (fstat(fd, &st) < 0 || (size_t)st.st_size != size)
		return false;
	for (size_t i = 0; i < size; i += 4) {
		unsigned int v = 0, want = seed = seed * 1664525u + 1013904223u;
		size_t n = size - i < 4 ? size - i : 4;

		if (pread(fd, &v, n, i) != (ssize_t)n || memcmp(&v, &want, n) != 0)
			return false;
	}
	return true;
}

/* All fault points of khod, to be read by next_fault_point() and closed by pclose(). */
static inline FILE *fault_points(void)
{
	char cmd[512];
	FILE *f;

	snprintf(cmd, sizeof(cmd), "%s --list-fault-points", getenv("KHOD_SIM"));
	f = popen(cmd, "r");
	cr_assert(f);
	return f;
}

static inline bool next_fault_point(FILE *f, char name[64], char phase[64])
{
	char line[512];

	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "%63s %63s", name, phase) == 2)
			return true;
	return false;
}

static inline ino_t ino_of(int fd)
{
	struct stat st = {};

	fstat(fd, &st);
	return st.st_ino;
}

static inline size_t count_fds(void)
{
	size_t n = 0;

	for (int fd = 0; fd < 1024; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

#endif
