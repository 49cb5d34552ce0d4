// SPDX-License-Identifier: GPL-2.0-or-later
/* Sessions of the live update orchestrator, and the way into the next kernel. */

#include "guest.h"
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <linux/kexec.h>
#include <linux/liveupdate.h>
#include <linux/reboot.h>

/* Documentation/arch/x86/boot.rst */
#define XLOADFLAGS 0x236
#define XLF_PCI_LIVEUPDATE 0x8000

int session = -1;

/* The kernel for that stage on the share, or the one for all. */
static int open_kernel(int stage)
{
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/lab/next-%d", stage);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		fd = open("/lab/next", O_RDONLY);
	check(fd, "/lab/next");
	return fd;
}

/* It gets this one's command line and something added, and an initrd if there is one. */
static void load(int k, int stage, int left, const char *add, unsigned long flags)
{
	static char line[2048];
	char *p = strstr(cmdline, " dma.stage=");
	size_t n = p ? (size_t)(p - cmdline) : strcspn(cmdline, "\n");
	int initrd = open("/lab/initrd", O_RDONLY);

	snprintf(line, sizeof(line), "%.*s dma.stage=%d dma.left=%d %s", (int)n, cmdline, stage,
		 left, add);
	if (syscall(SYS_kexec_file_load, k, initrd, strlen(line) + 1, line,
		    flags | (initrd < 0 ? KEXEC_FILE_NO_INITRAMFS : 0)))
		die("kexec_file_load");
	close(initrd);
	close(k);
}

void load_kernel(int stage, int left, const char *add)
{
	load(open_kernel(stage), stage, left, add, 0);
}

/* One that does not say that it can be booted while devices run: xloadflags in its boot header. */
void load_unaware_kernel(void)
{
	int k = open_kernel(2), copy = memfd_create("kernel", 0);
	uint16_t flags;

	check(copy, "memfd");
	for (ssize_t n; (n = sendfile(copy, k, NULL, 1 << 20)) != 0;)
		check(n, "copy of the kernel");
	close(k);
	check(pread(copy, &flags, sizeof(flags), XLOADFLAGS), "xloadflags");
	if (!(flags & XLF_PCI_LIVEUPDATE))
		die("the kernel does not say so either");
	flags &= ~XLF_PCI_LIVEUPDATE;
	check(pwrite(copy, &flags, sizeof(flags), XLOADFLAGS), "xloadflags");
	load(copy, 2, 0, "", 0);
}

/* What is booted at a panic: the kernel of the first stage */
void load_crash_kernel(const char *add)
{
	load(open_kernel(1), 1, 0, add, KEXEC_FILE_ON_CRASH);
}

static int kept = -1;

static int open_luo(void)
{
	return kept < 0 ? open("/dev/liveupdate", O_RDWR) : dup(kept);
}

int luo(void)
{
	int fd = open_luo();

	check(fd, "/dev/liveupdate");
	return fd;
}

/* It can be open once. For those who use it at a time, after a fork. */
void keep_luo(void)
{
	kept = luo();
}

int try_create_session(const char *name)
{
	struct liveupdate_ioctl_create_session create = { .size = sizeof(create) };
	int fd = open_luo(), ret;

	if (fd < 0)
		return -errno;
	strcpy((char *)create.name, name);
	ret = ioctl(fd, LIVEUPDATE_IOCTL_CREATE_SESSION, &create) ? -errno : 0;
	session = ret ? -1 : create.fd;
	close(fd);
	return ret;
}

void create_session(const char *name)
{
	must(try_create_session(name), "CREATE_SESSION");
}

int try_retrieve_session(const char *name)
{
	struct liveupdate_ioctl_retrieve_session get = { .size = sizeof(get) };
	int fd = open_luo(), ret;

	if (fd < 0)
		return -errno;
	strcpy((char *)get.name, name);
	ret = ioctl(fd, LIVEUPDATE_IOCTL_RETRIEVE_SESSION, &get) ? -errno : get.fd;
	close(fd);
	return ret;
}

void retrieve_session(const char *name)
{
	session = try_retrieve_session(name);
	must(session, "RETRIEVE_SESSION");
}

int try_preserve(int fd, uint64_t token)
{
	struct liveupdate_session_preserve_fd arg = {
		.size = sizeof(arg), .fd = fd, .token = token,
	};

	return ioctl(session, LIVEUPDATE_SESSION_PRESERVE_FD, &arg) ? -errno : 0;
}

int try_retrieve(uint64_t token)
{
	struct liveupdate_session_retrieve_fd arg = {
		.size = sizeof(arg), .token = token,
	};

	return ioctl(session, LIVEUPDATE_SESSION_RETRIEVE_FD, &arg) ? -errno : arg.fd;
}

int try_finish(void)
{
	struct liveupdate_session_finish arg = { .size = sizeof(arg) };

	return ioctl(session, LIVEUPDATE_SESSION_FINISH, &arg) ? -errno : 0;
}

/* The last close: a session on its way out is unpreserved, one that came in given up. */
void end_session(void)
{
	close(session);
	session = -1;
}

void preserve_all(void)
{
	double t0 = now(), t1, t2;

	must(try_preserve(memfd, TOK_MEM), "preserve memfd");
	preserve_large();
	functions_preserve_memory();
	if (atoi(param("dma.more", "0")))
		preserve_more();
	t1 = now();
	must(try_preserve(iommufd, TOK_IOMMUFD), "preserve iommufd");
	t2 = now();
	must(try_preserve(dev, TOK_DEV), "preserve device");
	say("preserved memfd %.1f ms, iommufd %.1f ms, device %.1f ms",
	    (t1 - t0) * 1e3, (t2 - t1) * 1e3, (now() - t2) * 1e3);
}

void do_kexec(void)
{
	say("KEXEC counter=%llu", counter());
	reboot(LINUX_REBOOT_CMD_KEXEC);
}

void power_off(void)
{
	sync();
	usleep(300000);
	reboot(LINUX_REBOOT_CMD_POWER_OFF);
	_exit(0);
}
