/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * borrow: run a command with a descriptor of another process, the very same file.
 *
 *	borrow PID memfd|iommufd|vfio -- CMD...
 *		The first descriptor of that kind of process PID becomes descriptor 3 of CMD.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What the link in /proc says of one opened in this kernel, and of one retrieved from the previous. */
static const struct {
	const char *kind, *opened, *retrieved;
} kinds[] = {
	{ "iommufd", "/dev/iommu", "anon_inode:[iommufd]" },
	{ "vfio", "/dev/vfio/devices/", "anon_inode:[vfio-device]" },
};

static int is_kind(const char *kind, int fd)
{
	char path[64], link[256] = "";

	/* A retrieved one has no name. */
	if (strcmp(kind, "memfd") == 0)
		return fcntl(fd, F_GET_SEALS) >= 0;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	if (readlink(path, link, sizeof(link) - 1) < 0)
		return 0;
	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
		if (strcmp(kinds[i].kind, kind) == 0)
			return strncmp(link, kinds[i].opened, strlen(kinds[i].opened)) == 0 ||
			       strncmp(link, kinds[i].retrieved, strlen(kinds[i].retrieved)) == 0;
	return 0;
}

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "borrow: %s: %s\n", what, strerror(errno));
	exit(EXIT_FAILURE);
}

int main(int argc, char **argv)
{
	int pidfd, fd = -1;

	if (argc < 5 || strcmp(argv[3], "--") != 0) {
		fputs("usage: borrow PID memfd|iommufd|vfio -- CMD...\n", stderr);
		return 2;
	}
	pidfd = (int)syscall(SYS_pidfd_open, atoi(argv[1]), 0);
	if (pidfd < 0)
		die(argv[1]);
	for (int i = 0; fd < 0 && i < 256; i++) {
		fd = (int)syscall(SYS_pidfd_getfd, pidfd, i, 0);
		if (fd < 0 && errno != EBADF)
			die("pidfd_getfd");
		if (fd >= 0 && !is_kind(argv[2], fd)) {
			close(fd);
			fd = -1;
		}
	}
	errno = ENOENT;
	if (fd < 0)
		die(argv[2]);
	if (dup2(fd, 3) != 3)
		die("dup2");
	execvp(argv[4], argv + 4);
	die(argv[4]);
}
