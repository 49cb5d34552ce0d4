// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * initrd: /init of an initial RAM disk that loads modules
 *
 * Loads the modules that /modules lists, in that order and with the parameters that the
 * kernel's command line has for them, and goes on with the root file system and the
 * init= given there. Modules thus come before any program of the root file system.
 */

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char cmdline[4096];

static void check(int ret, const char *what)
{
	if (ret >= 0)
		return;
	perror(what);
	exit(1);
}

/* NAME.KEY=VALUE of the command line as KEY=VALUE; dashes and underscores are alike. */
static void parameters(const char *name, char *out, size_t size)
{
	char words[sizeof(cmdline)], *word, *rest = words;
	size_t n = strlen(name);

	strcpy(words, cmdline);
	*out = 0;
	while ((word = strsep(&rest, " \n"))) {
		for (char *p = word; *p && *p != '.'; p++)
			if (*p == '-')
				*p = '_';
		if (strncmp(word, name, n) || word[n] != '.')
			continue;
		strncat(out, word + n + 1, size - strlen(out) - 1);
		strncat(out, " ", size - strlen(out) - 1);
	}
}

static void load(const char *path)
{
	char name[64], options[512];
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	check(fd, path);
	snprintf(name, sizeof(name), "%s", strrchr(path, '/') + 1);
	name[strcspn(name, ".")] = 0;
	for (char *p = name; *p; p++)
		if (*p == '-')
			*p = '_';
	parameters(name, options, sizeof(options));
	check(syscall(SYS_finit_module, fd, options, 0), path);
	close(fd);
}

int main(void)
{
	char path[256], *init;
	FILE *list = fopen("/modules", "r");
	int fd;

	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mkdir("/root", 0755);
	check(mount("proc", "/proc", "proc", 0, NULL), "/proc");
	check(mount("dev", "/dev", "devtmpfs", 0, NULL), "/dev");
	fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	check(fd < 0 ? fd : (int)read(fd, cmdline, sizeof(cmdline) - 1), "/proc/cmdline");
	while (list && fscanf(list, "%255s", path) == 1)
		load(path);

	check(mount("/dev/vda", "/root", "ext4", 0, NULL), "/dev/vda");
	check(umount2("/dev", MNT_DETACH), "/dev");
	check(umount2("/proc", MNT_DETACH), "/proc");
	check(chdir("/root"), "/root");
	check(mount(".", "/", NULL, MS_MOVE, NULL), "moving the root");
	check(chroot("."), "chroot");
	init = strstr(cmdline, " init=");
	if (!init)
		return 1;
	init += strlen(" init=");
	init[strcspn(init, " \n")] = 0;
	execl(init, init, NULL);
	perror(init);
	return 1;
}
