// SPDX-License-Identifier: GPL-2.0-or-later
/* What everything else is written with: words on the serial port, errors, parameters. */

#include "guest.h"
#include <stdarg.h>
#include <time.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <linux/reboot.h>

char cmdline[4096];

double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_BOOTTIME, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

/* Goes on counting over a kexec, from one kernel to the next. */
unsigned long long counter(void)
{
	return __builtin_ia32_rdtsc();
}

void say(const char *fmt, ...)
{
	char line[512];
	va_list ap;
	int n;

	n = snprintf(line, sizeof(line), "DMA: [%.3f] ", now());
	va_start(ap, fmt);
	n += vsnprintf(line + n, sizeof(line) - n - 1, fmt, ap);
	va_end(ap);
	line[n++] = '\n';
	if (write(1, line, n) != n)
		_exit(3);
}

void die(const char *what)
{
	say("FAIL %s: %s", what, strerror(errno));
	sync();
	sleep(1);
	reboot(LINUX_REBOOT_CMD_POWER_OFF);
	_exit(1);
}

void check(long ret, const char *what)
{
	if (ret < 0)
		die(what);
}

void must(int ret, const char *what)
{
	if (ret < 0) {
		errno = -ret;
		die(what);
	}
}

/* Say whether something came out as it must. @ret: What it gave, a negative errno or not. */
void verdict(bool ok, const char *what, int ret)
{
	say("%s %s: %s", ok ? "ok" : "FAIL", what, ret < 0 ? strerror(-ret) : "done");
}

/* Write to a file of sysfs or proc; 0 or a negative errno. */
int put(const char *path, const char *val)
{
	int fd = open(path, O_WRONLY);
	int ret = 0;

	if (fd < 0 || write(fd, val, strlen(val)) < 0)
		ret = -errno;
	if (fd >= 0)
		close(fd);
	return ret;
}

const char *param(const char *name, const char *dflt)
{
	static char val[8][64];
	static int turn;
	char *p = strstr(cmdline, name);
	char *v = val[turn++ & 7];

	if (!p || p[strlen(name)] != '=')
		return dflt;
	sscanf(p + strlen(name) + 1, "%63[^ \n]", v);
	return v;
}

/* By the kernel's own detector. What it finds twice is no reference that was passing by. */
void check_leaks(void)
{
	char text[400];
	ssize_t n = 1;

	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	if (access("/sys/kernel/debug/kmemleak", F_OK)) {
		say("note: this kernel cannot tell leaks");
		return;
	}
	for (int i = 0; i < 2 && n > 0; i++) {
		int fd = open("/sys/kernel/debug/kmemleak", O_RDWR);

		check(fd, "kmemleak");
		sleep(6);		/* younger ones are not reported */
		check(write(fd, "scan", 4), "kmemleak");
		n = read(fd, text, sizeof(text) - 1);
		check(n, "kmemleak");
		close(fd);
	}
	text[n] = 0;
	for (char *p = text; *p; p++)
		if (*p == '\n')
			*p = '|';
	say("%s leaks: %s", n ? "FAIL" : "ok", text);
}
