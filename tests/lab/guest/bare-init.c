// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * bare-init: the smallest PID 1 that the lab can talk to.
 *
 * With init=/usr/lib/khod-lab/bare-init a guest is ready in a fraction of the
 * time that systemd takes, so that a kexec cycle costs seconds. It mounts what
 * tests use (proc, sys, dev, run, tmp, debugfs, tracefs, cgroup2 and the
 * host's share on /lab), leaves the root file system as the kernel mounted it,
 * prints "lab: bare init ready" on the console, and keeps qemu-ga running on
 * the virtio port named org.qemu.guest_agent.0, without udev. A kernel that
 * lacks one of the file systems costs one line on the console, no more.
 *
 * It is linked statically: under TCG each dynamic program costs tens of
 * milliseconds, and this one runs inside of what tests measure.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define AGENT_PORT "org.qemu.guest_agent.0"
#define PORTS "/sys/class/virtio-ports"
#define AGENT "/usr/sbin/qemu-ga"
#define PAUSE_US 100000

struct mount_point {
	const char *type;
	const char *source;
	const char *where;
	const char *options;
	bool mkdir;
	bool optional; /* no word about a kernel without it */
};

static const struct mount_point mounts[] = {
	{ .type = "devtmpfs", .source = "dev", .where = "/dev", .options = "mode=0755" },
	{ .type = "proc", .source = "proc", .where = "/proc" },
	{ .type = "sysfs", .source = "sys", .where = "/sys" },
	{ .type = "tmpfs", .source = "run", .where = "/run", .options = "mode=0755" },
	{ .type = "tmpfs", .source = "tmp", .where = "/tmp", .options = "mode=1777" },
	{ .type = "devpts", .source = "devpts", .where = "/dev/pts",
	  .options = "mode=0620,gid=5,ptmxmode=0666", .mkdir = true },
	{ .type = "tmpfs", .source = "shm", .where = "/dev/shm", .options = "mode=1777",
	  .mkdir = true },
	{ .type = "debugfs", .source = "debugfs", .where = "/sys/kernel/debug" },
	{ .type = "tracefs", .source = "tracefs", .where = "/sys/kernel/tracing",
	  .optional = true },
	{ .type = "cgroup2", .source = "cgroup2", .where = "/sys/fs/cgroup" },
	{ .type = "9p", .source = "lab", .where = "/lab",
	  .options = "trans=virtio,version=9p2000.L,msize=524288" },
};

static void complain(const char *what, const char *object)
{
	printf("lab: bare init: %s %s: %s\n", what, object, strerror(errno));
}

static void mount_all(void)
{
	for (size_t i = 0; i < sizeof(mounts) / sizeof(mounts[0]); i++) {
		const struct mount_point *m = &mounts[i];

		if (m->mkdir && mkdir(m->where, 0755) < 0 && errno != EEXIST)
			complain("cannot create", m->where);
		/* EBUSY: the kernel has mounted it there itself (DEVTMPFS_MOUNT) */
		if (mount(m->source, m->where, m->type, 0, m->options) < 0 && errno != EBUSY &&
		    !(m->optional && errno == ENOENT))
			complain("cannot mount", m->where);
	}
}

static void links(void)
{
	static const char *const pairs[][2] = {
		{ "/proc/self/fd", "/dev/fd" },		 { "/proc/self/fd/0", "/dev/stdin" },
		{ "/proc/self/fd/1", "/dev/stdout" }, { "/proc/self/fd/2", "/dev/stderr" },
	};

	for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++) {
		if (symlink(pairs[i][0], pairs[i][1]) < 0 && errno != EEXIST)
			complain("cannot create", pairs[i][1]);
	}
}

/* As 50-lab.conf and lab.conf set it for systemd. */
static void core_dumps(void)
{
	static const char pattern[] = "/var/lib/systemd/coredump/core.%e.%p.%t";
	const struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	int fd = open("/proc/sys/kernel/core_pattern", O_WRONLY | O_CLOEXEC);

	if (fd < 0 && errno == ENOENT)
		return; /* no CONFIG_COREDUMP */
	if (fd < 0 || write(fd, pattern, strlen(pattern)) < 0)
		complain("cannot set", "core_pattern");
	if (fd >= 0)
		close(fd);
	if (setrlimit(RLIMIT_CORE, &unlimited) < 0)
		complain("cannot lift", "RLIMIT_CORE");
}

static void loopback_up(void)
{
	struct ifreq ifr = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &ifr) < 0)
		complain("cannot bring up", "lo");
	if (fd >= 0)
		close(fd);
}

/* The device node of the agent's port in @path, or false if there is none yet. */
static bool find_port(char *path, size_t size)
{
	DIR *dir = opendir(PORTS);
	bool found = false;
	struct dirent *d;

	if (!dir)
		return false;
	while (!found && (d = readdir(dir))) {
		char file[512], name[64] = "";
		ssize_t n;
		int fd;

		if (d->d_name[0] == '.')
			continue;
		snprintf(file, sizeof(file), PORTS "/%s/name", d->d_name);
		fd = open(file, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		n = read(fd, name, sizeof(name) - 1);
		close(fd);
		if (n <= 0)
			continue;
		name[strcspn(name, "\n")] = '\0';
		found = strcmp(name, AGENT_PORT) == 0;
		if (found)
			snprintf(path, size, "/dev/%s", d->d_name);
	}
	closedir(dir);
	return found;
}

static pid_t start_agent(const char *port)
{
	pid_t pid = fork();

	if (pid != 0)
		return pid;
	setsid();
	execl(AGENT, AGENT, "--method=virtio-serial", "--path", port, "--statedir=/run", NULL);
	complain("cannot run", AGENT);
	_exit(127);
}

int main(void)
{
	bool told = false;
	int fd;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (getpid() != 1) {
		fprintf(stderr, "bare-init: this is PID 1 of a lab guest, not a program to run\n");
		return 2;
	}
	mount_all();
	/* Without DEVTMPFS_MOUNT the kernel found no console for us. */
	if (fcntl(STDOUT_FILENO, F_GETFD) < 0) {
		fd = open("/dev/console", O_RDWR);
		for (int i = 0; fd >= 0 && i <= STDERR_FILENO; i++)
			dup2(fd, i);
	}
	links();
	core_dumps();
	loopback_up();
	if (sethostname("lab", strlen("lab")) < 0)
		complain("cannot set", "the host name");
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/root", 1);
	if (chdir("/root") < 0)
		complain("cannot enter", "/root");
	printf("lab: bare init ready\n");

	for (;;) {
		char port[300];
		pid_t agent, pid;
		int status = 0;

		if (!find_port(port, sizeof(port))) {
			if (!told)
				printf("lab: bare init: no virtio port named " AGENT_PORT
				       " yet; waiting for one\n");
			told = true;
			usleep(PAUSE_US);
			continue;
		}
		agent = start_agent(port);
		if (agent < 0)
			complain("cannot fork for", AGENT);
		/* PID 1 also reaps what others leave behind. */
		while (agent > 0 && (pid = wait(&status)) != agent) {
			if (pid < 0 && errno == ECHILD)
				break;
		}
		if (agent > 0)
			printf("lab: bare init: " AGENT " ended (wait status 0x%x), starting it again\n",
			       (unsigned int)status);
		usleep(PAUSE_US);
	}
}
