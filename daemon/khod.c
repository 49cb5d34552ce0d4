/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * khod: holds workloads' files over a kexec.
 *
 * One process, one event loop, no state of its own: what it holds is in LUO sessions
 * whose descriptors systemd keeps (workload.c says how it gets there, adopt.c how it
 * is found again). It may be killed at any point.
 */
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <systemd/sd-daemon.h>
#include <systemd/sd-id128.h>

#include "fault.h"
#include "khod.h"
#include "log.h"

enum {
	EXIT_USAGE = 2,
	EXIT_SECOND = 3,
};

/* Pinning a page and copying it out of a CMA area: the slowest figure seen, doubled. */
#define USEC_PER_GIB UINT64_C(10000000)

/* What takes less than that is within the time that there is, if it is said again after as long. */
#define BUSY_USEC UINT64_C(1000000)

void khod_busy(struct khod *k, uint64_t bytes)
{
	uint64_t usec = (bytes >> 20) * (USEC_PER_GIB >> 10), now = monotonic_usec();

	/* PID 1 has other things to do while the machine starts. */
	if (usec < BUSY_USEC && k->busy_usec > 0 && now - k->busy_usec < BUSY_USEC)
		return;
	k->busy_usec = now;
	usec += k->watchdog_usec;
	if (k->watchdog_usec > 0)
		sd_notifyf(0, "EXTEND_TIMEOUT_USEC=%" PRIu64 "\nWATCHDOG_USEC=%" PRIu64,
			   usec + UINT64_C(30000000), usec);
	else
		sd_notifyf(0, "EXTEND_TIMEOUT_USEC=%" PRIu64, usec + UINT64_C(30000000));
}

void khod_idle(struct khod *k)
{
	if (k->watchdog_usec > 0 && k->busy_usec > 0)
		sd_notifyf(0, "WATCHDOG_USEC=%" PRIu64 "\nWATCHDOG=1", k->watchdog_usec);
	k->busy_usec = 0;
}

void khod_status_line(struct khod *k)
{
	unsigned int n = 0, failed = 0;
	uint64_t bytes = 0;

	for (struct workload *w = k->workloads; w; w = w->next) {
		n++;
		failed += w->state == WORKLOAD_FAILED;
		bytes += workload_bytes(w);
	}
	if (k->luo_reason)
		sd_notifyf(0, "STATUS=No live update: %s", k->luo_reason);
	else
		sd_notifyf(0, "STATUS=Holding %u workloads, %" PRIu64 " MiB%s", n, bytes >> 20,
			   failed ? "; some FAILED, see khoctl list" : "");
	manifest_write(k);
	inhibit_update(k);
	deadline_update(k);
}

/* What the environment sets, if that is a number up to @max. */
static unsigned long setting(const char *name, unsigned long otherwise, unsigned long max)
{
	const char *env = getenv(name);
	unsigned long n;
	char *end;

	if (!env)
		return otherwise;
	n = strtoul(env, &end, 10);
	if (end != env && !*end && n <= max)
		return n;
	log_event(LOG_WARNING, NULL, NULL, "%s=%s is not a number from 0 to %lu; %lu is used.", name, env,
		  max, otherwise);
	return otherwise;
}

static uint64_t user_bytes(void)
{
	uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);

	return memory / 100 * setting("KHOD_USER_MEMORY_PERCENT", USER_MEMORY_PERCENT, 100);
}

/* One khod at a time, whoever starts it. The lock goes with the process. */
static int take_lock(const char *socket_path)
{
	_cleanup_free_ char *path = NULL;
	const char *slash = strrchr(socket_path, '/');
	char pid[32] = "";
	int fd;

	if (asprintf(&path, "%.*s/lock", slash ? (int)(slash - socket_path) : 1,
		     slash ? socket_path : ".") < 0)
		return -ENOMEM;
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0) {
		fprintf(stderr, "khod: %s: cannot open the lock: %s\n", path, strerror(errno));
		return -errno;
	}
	if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
		ssize_t n = pread(fd, pid, sizeof(pid) - 1, 0);

		pid[n > 0 ? n : 0] = 0;
		pid[strspn(pid, "0123456789")] = 0;
		log_event(LOG_ERR, MSG_SECOND, NULL,
			  "Another khod (pid %s) is running and holds %s; there can be one only. Use systemctl restart khod.service.",
			  pid[0] ? pid : "unknown", path);
		close(fd);
		return -EBUSY;
	}
	snprintf(pid, sizeof(pid), "%d\n", (int)getpid());
	if (ftruncate(fd, 0) < 0 || pwrite(fd, pid, strlen(pid), 0) < 0)
		log_event(LOG_WARNING, NULL, NULL, "%s: cannot be written: %s.", path, strerror(errno));
	return fd;
}

/* Sort socket and timeline out of what systemd passed; the rest is for adopt(). */
static int take_passed(struct khod *k, struct passed **ret, size_t *ret_n, int *timeline)
{
	char **names = NULL;
	struct passed *passed;
	size_t n_passed = 0;
	int n;

	n = sd_listen_fds_with_names(1, &names);
	if (n < 0)
		return n;
	passed = calloc(n + 1, sizeof(*passed));
	if (!passed)
		return -ENOMEM;
	for (int i = 0; i < n; i++) {
		int fd = SD_LISTEN_FDS_START + i;

		if (k->listen_fd < 0 && sd_is_socket(fd, AF_UNIX, SOCK_SEQPACKET, 1) > 0) {
			k->listen_fd = fd;
			(void)fcntl(fd, F_SETFL, O_NONBLOCK);
		} else if (*timeline < 0 && names && strcmp(names[i], TIMELINE_FDNAME) == 0) {
			*timeline = fd;
		} else if (k->manifest_fd < 0 && names && strcmp(names[i], MANIFEST_FDNAME) == 0) {
			k->manifest_fd = fd;
			k->fdstore.used++;
		} else if (names && inhibit_passed(k, names[i], fd)) {
			/* it is kept there */
		} else {
			passed[n_passed].fd = fd;
			snprintf(passed[n_passed].fdname, FDSTORE_NAME_MAX, "%s",
				 names && names[i] ? names[i] : "");
			n_passed++;
		}
		free(names[i]);
	}
	free(names);
	*ret = passed;
	*ret_n = n_passed;
	return 0;
}

static void usage(FILE *f)
{
	fputs("Usage: khod [OPTION]...\n"
	      "Hold workloads' file descriptors over a kexec. Started by systemd as khod.service.\n"
	      "\n"
	      "  --socket PATH         listen here when systemd passes no socket (" KHO_SOCKET ")\n"
	      "  --list-fault-points   print the points at which a test build can be made to die\n"
	      "  --help                print this\n"
	      "  --version             print the version\n"
	      "\n"
	      "Exit status: 0 stopped, 1 failure, 2 wrong usage, 3 another khod is running.\n"
	      "See khod(8).\n", f);
}

int khod_main(int argc, char **argv, const struct kho_ops *ops, void *userdata)
{
	static const struct option options[] = {
		{ "socket", required_argument, NULL, 's' },
		{ "list-fault-points", no_argument, NULL, 'l' },
		{ "help", no_argument, NULL, 'h' },
		{ "version", no_argument, NULL, 'v' },
		{},
	};
	struct khod k = { .listen_fd = -1, .manifest_fd = -1 };
	struct passed *passed = NULL;
	struct kho_error *err = NULL;
	struct utsname uts;
	sd_id128_t boot;
	size_t n_passed = 0;
	int c, r, lock = -1, timeline = -1, status = EXIT_FAILURE;
	sigset_t mask;

	k.socket_path = (char *)KHO_SOCKET;
	inhibit_init(&k);
	while ((c = getopt_long(argc, argv, "h", options, NULL)) >= 0) {
		switch (c) {
		case 's':
			k.socket_path = optarg;
			break;
		case 'l':
			fault_list(stdout);
			return EXIT_SUCCESS;
		case 'h':
			usage(stdout);
			return EXIT_SUCCESS;
		case 'v':
			puts("khod " KHO_VERSION);
			return EXIT_SUCCESS;
		default:
			return EXIT_USAGE;
		}
	}
	if (optind < argc) {
		fprintf(stderr, "khod: unexpected argument '%s'; see khod --help\n", argv[optind]);
		return EXIT_USAGE;
	}
	r = fault_init();
	if (r < 0) {
		fprintf(stderr, r == -EOPNOTSUPP ?
			"khod: KHOD_FAULT is set, but this build has no fault points (-Dfault_points=true)\n" :
			"khod: KHOD_FAULT is not NAME[:N] of a point that khod --list-fault-points prints\n");
		return EXIT_USAGE;
	}

	lock = take_lock(k.socket_path);
	if (lock < 0)
		return lock == -EBUSY ? EXIT_SECOND : EXIT_FAILURE;

	/* Files in custody are open here while they are moved; do not run out of slots. */
	(void)setrlimit(RLIMIT_NOFILE, &(struct rlimit){ 65536, 65536 });
	sigemptyset(&mask);
	sigaddset(&mask, SIGTERM);
	sigaddset(&mask, SIGINT);
	(void)sigprocmask(SIG_BLOCK, &mask, NULL);
	(void)signal(SIGPIPE, SIG_IGN);

	r = kho_new(&k.kho, ops, userdata);
	if (r < 0)
		goto out;
	if (uname(&uts) == 0)
		snprintf(k.kernel_release, sizeof(k.kernel_release), "%.64s", uts.release);
	if (sd_id128_get_boot(&boot) >= 0)
		snprintf(k.boot_id, sizeof(k.boot_id), SD_ID128_FORMAT_STR, SD_ID128_FORMAT_VAL(boot));
	(void)sd_watchdog_enabled(0, &k.watchdog_usec);
	fdstore_init(&k.fdstore);
	k.user_bytes = user_bytes();
	k.preserve_delay_usec = setting("KHOD_PRESERVE_DELAY_SEC", PRESERVE_DELAY_SEC, 3600) * 1000000ULL;

	r = kho_luo_available(k.kho, &err);
	if (r < 0) {
		k.luo_reason = kho_error_format(err, r);
		err = kho_error_free(err);
		log_event(LOG_WARNING, MSG_NO_LIVEUPDATE, NULL,
			  "Nothing can be carried over a kexec: %s.",
			  k.luo_reason ? k.luo_reason : "out of memory");
	}

	r = sd_event_default(&k.event);
	if (r >= 0)
		r = sd_event_add_signal(k.event, NULL, SIGTERM, NULL, NULL);
	if (r >= 0)
		r = sd_event_add_signal(k.event, NULL, SIGINT, NULL, NULL);
	if (r >= 0)
		r = sd_event_set_watchdog(k.event, 1);
	if (r < 0)
		goto out;

	r = take_passed(&k, &passed, &n_passed, &timeline);
	if (r < 0)
		goto out;
	timeline_start(&k, timeline);
	adopt(&k, passed, n_passed);
	r = server_start(&k, &err);
	if (r < 0)
		goto out;
	/* Workloads may start: the outage of each ends with that. */
	sd_notify(0, "READY=1");
	timeline_ready(&k);
	/* Before anybody is served. SIGTERM waits for it, too. */
	adopt_secure(&k);
	adopt_rest_later(&k);
	khod_status_line(&k);
	log_event(LOG_INFO, MSG_STARTED, NULL, "khod " KHO_VERSION " is ready%s.",
		  KHOD_WITH_FAULT_POINTS ? " (a test build with fault points)" : "");
	/* Before a client is heard: while khod did not run, time may have run out. */
	deadline_check(&k);

	r = sd_event_loop(k.event);
	if (r >= 0)
		status = EXIT_SUCCESS;
	/* If it is for a kexec, that waits for us. */
	adopt_rest(&k);
	sd_notify(0, "STOPPING=1");

out:
	if (status != EXIT_SUCCESS) {
		char *text = kho_error_format(err, r);

		log_event(LOG_ERR, MSG_STOPPED, NULL, "Cannot go on: %s.", text ? text : strerror(-r));
		free(text);
	}
	kho_error_free(err);
	timeline_stop(&k);
	server_stop(&k);
	handover_stop(&k);
	inhibit_stop(&k);
	sd_event_source_disable_unref(k.deadline);
	sd_event_source_disable_unref(k.rest);
	while (k.workloads)
		workload_free(&k, k.workloads);
	free(passed);
	free(k.luo_reason);
	if (k.manifest_fd >= 0)
		close(k.manifest_fd);
	sd_event_unref(k.event);
	kho_free(k.kho);
	close(lock);
	return status;
}
