/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A handover in one go: look for obstacles, load the next kernel, have everybody ready and
 * preserved, and leave the rest to systemd. The kernel is loaded first, as that can fail and
 * disturbs nobody. If systemctl refuses, what was preserved is given back.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/kexec.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "khoctl.h"

static const char help[] =
	"\n"
	"Looks for obstacles as preflight does, loads the kernel, has every workload ready and\n"
	"preserved as preserve does, and runs systemctl kexec. With an obstacle nothing is done,\n"
	"and if a workload is not ready it is undone; exit status 5 (1 if systemctl refuses). What\n"
	"was loaded stays loaded, but for a kernel that would not take over what is held: that is\n"
	"unloaded again, and what was loaded before it is gone then.\n"
	"\n"
	"  --kernel FILE     load this kernel (kexec_file_load); without it one must be loaded\n"
	"                    already, or systemd finds the default one of the boot loader\n"
	"  --initrd FILE     with this initrd\n"
	"  --cmdline STRING  and this command line, instead of the running kernel's\n"
	"  --force           in spite of obstacles: what they name is lost; logind is not asked\n"
	"  --load            load it, and stop there\n";

struct next {
	const char *kernel;
	const char *initrd;
	const char *cmdline;
};

static int failed(const char *object, const char *what, int errnum)
{
	fprintf(stderr, "khoctl: %s: %s: %s\n", object, what, strerror(errnum));
	return EXIT_REFUSED;
}

/* The running kernel's. */
static int own_cmdline(char *buf, size_t size)
{
	FILE *f = fopen("/proc/cmdline", "re");
	size_t n;

	if (!f)
		return -errno;
	n = fread(buf, 1, size - 1, f);
	fclose(f);
	if (n == size - 1)
		return -E2BIG;
	buf[n] = 0;
	buf[strcspn(buf, "\n")] = 0;
	return 0;
}

static int load(const struct next *next)
{
	unsigned long flags = next->initrd ? 0 : KEXEC_FILE_NO_INITRAMFS;
	const char *cmdline = next->cmdline;
	int kernel, initrd = -1, r;
	char own[4096];

	if (!cmdline) {
		r = own_cmdline(own, sizeof(own));
		if (r < 0)
			return failed("/proc/cmdline", "cannot be read", -r);
		cmdline = own;
	}
	kernel = open(next->kernel, O_RDONLY | O_CLOEXEC);
	if (kernel < 0)
		return failed(next->kernel, "open", errno);
	if (next->initrd) {
		initrd = open(next->initrd, O_RDONLY | O_CLOEXEC);
		if (initrd < 0) {
			r = failed(next->initrd, "open", errno);
			goto out;
		}
	}
	/* Only this one hands memory over: kexec_load(2) does not. */
	r = syscall(SYS_kexec_file_load, kernel, initrd, strlen(cmdline) + 1, cmdline, flags) < 0 ?
		    failed(next->kernel,
			   errno == EPERM  ? "loading needs root, and a kernel that is not locked down" :
			   errno == ENOEXEC ? "is no kernel that can be loaded" : "cannot be loaded",
			   errno) : 0;
	if (initrd >= 0)
		close(initrd);
out:
	close(kernel);
	return r;
}

/* Back to a kexec that is refused for want of a kernel: the one that was loaded before is gone. */
static void unload(const char *kernel)
{
	if (syscall(SYS_kexec_file_load, -1, -1, 0UL, NULL, (unsigned long)KEXEC_FILE_UNLOAD) < 0)
		fprintf(stderr, "khoctl: %s stays loaded: %s\n", kernel, strerror(errno));
	else
		fprintf(stderr, "khoctl: %s is not loaded any more, and no other one is\n", kernel);
}

/* --force: logind, which would not let a kexec pass that loses something, is not asked. */
static int systemctl_kexec(bool force)
{
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (pid < 0)
		return failed("systemctl", "cannot be run", errno);
	if (pid == 0) {
		execlp("systemctl", "systemctl", "kexec", force ? "--force" : (char *)NULL, (char *)NULL);
		fprintf(stderr, "khoctl: systemctl cannot be run: %s\n", strerror(errno));
		_exit(EXIT_EXEC);
	}
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return failed("systemctl", "cannot be waited for", errno);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
		return 0;
	return WIFEXITED(status) && WEXITSTATUS(status) == EXIT_EXEC ? EXIT_EXEC : EXIT_REFUSED;
}

static int run(struct khoctl *ctl, int argc, char **argv)
{
	static const struct option options[] = {
		{ "kernel", required_argument, NULL, 'k' },
		{ "initrd", required_argument, NULL, 'i' },
		{ "cmdline", required_argument, NULL, 'c' },
		{ "force", no_argument, NULL, 'f' },
		{ "load", no_argument, NULL, 'l' },
		{},
	};
	struct next next = {};
	bool force = false, only_load = false;
	int c, r;

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (c) {
		case 'k':
			next.kernel = optarg;
			break;
		case 'i':
			next.initrd = optarg;
			break;
		case 'c':
			next.cmdline = optarg;
			break;
		case 'f':
			force = true;
			break;
		case 'l':
			only_load = true;
			break;
		default:
			return EXIT_USAGE;
		}
	}
	if (optind < argc)
		return khoctl_usage(&verb_kexec, "kexec takes no argument");
	if (!next.kernel && (next.initrd || next.cmdline || only_load))
		return khoctl_usage(&verb_kexec, "--initrd, --cmdline and --load need --kernel");

	r = khoctl_obstacles(ctl, next.kernel);
	if (r == EXIT_OBSTACLE && !force)
		return r;
	if (next.kernel) {
		r = load(&next);
		if (r > 0)
			return r;
		/* Of the command line it knows more than we do. */
		if (khoctl_loaded_refuses(ctl) && !force) {
			unload(next.kernel);
			return EXIT_OBSTACLE;
		}
	}
	if (only_load)
		return EXIT_SUCCESS;
	r = khoctl_preserve(ctl, force);
	if (r > 0 && !force)
		return r;
	r = systemctl_kexec(force);
	if (r > 0) {
		fprintf(stderr, "khoctl: no kexec, so that what was preserved is given back\n");
		(void)khoctl_abort(ctl);
	}
	return r;
}

const struct verb verb_kexec = {
	.name = "kexec",
	.args = "[--kernel FILE [--initrd FILE] [--cmdline STRING] [--load]] [--force]",
	.summary = "Hand over to another kernel, if nothing is in the way",
	.help = help,
	.run = run,
};
