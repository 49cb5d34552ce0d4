/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What happened when, for khoctl timeline.
 *
 * The marks of both kernels are in one memfd, mapped here and held by systemd, which carries it
 * over the kexec: what was written is there whatever becomes of khod. Nothing depends on it,
 * so that nothing here fails: without the log a handover goes as well.
 *
 * When units began to be stopped, when the old kernel was left, and when userspace began, only
 * PID 1 knows. It is asked by its private socket, as there may be no message bus that early; and
 * only when somebody wants to see the timeline, as a machine that starts has other things to do.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "khod.h"
#include "log.h"

#define PID1_ADDRESS "unix:path=/run/systemd/private"
#define PID1_USEC (5 * 1000000ULL)

/* Properties of PID 1, in us of CLOCK_MONOTONIC of the kernel they happened in. */
static const struct {
	const char *property;
	enum kho_timeline_what what;
} of_pid1[] = {
	{ "PreviousShutdownStartTimestampMonotonic", KHO_MARK_REQUESTED },
	{ "PreviousShutdownFinishTimestampMonotonic", KHO_MARK_UNITS_STOPPED },
	{ "PreviousShutdownLateFinishTimestampMonotonic", KHO_MARK_REBOOT },
	{ "UserspaceTimestampMonotonic", KHO_MARK_USERSPACE },
};

static void copy_text(char *to, size_t size, const char *from)
{
	snprintf(to, size, "%s", from);
}

static void fill(struct kho_timeline_mark *m, enum kho_timeline_what what, const char *workload,
		 struct kho_timeline_time at)
{
	*m = (struct kho_timeline_mark){ .what = what, .at = at };
	copy_text(m->workload, sizeof(m->workload), workload ? workload : "");
}

static void append(struct kho_timeline_bank *b, enum kho_timeline_what what, const char *workload,
		   struct kho_timeline_time at)
{
	if (b->n == KHO_TIMELINE_MARKS) {
		b->dropped++;
		return;
	}
	fill(&b->marks[b->n], what, workload, at);
	__atomic_store_n(&b->n, b->n + 1, __ATOMIC_RELEASE);
}

static struct kho_timeline_mark *find(struct kho_timeline_bank *b, enum kho_timeline_what what,
				      const char *workload)
{
	for (uint32_t i = 0; i < b->n; i++)
		if (b->marks[i].what == what &&
		    strcmp(b->marks[i].workload, workload ? workload : "") == 0)
			return &b->marks[i];
	return NULL;
}

/* This kernel's bank, instead of that of the kernel before the last. */
static void open_bank(struct khod *k)
{
	struct kho_timeline_log *log = k->timeline.log;
	int newest = kho_timeline_newest(log);
	struct kho_timeline_bank *b = &log->banks[newest < 0 ? 0 : newest];
	uint64_t generation = b->generation + 1;

	if (newest >= 0 && strcmp(b->boot_id, k->boot_id) == 0) {
		k->timeline.bank = b;
		k->timeline.ready = find(b, KHO_MARK_READY, NULL) != NULL;
		return;
	}
	if (newest >= 0)
		b = &log->banks[!newest];
	__atomic_store_n(&b->generation, 0, __ATOMIC_RELEASE);
	memset(b, 0, offsetof(struct kho_timeline_bank, marks));
	copy_text(b->boot_id, sizeof(b->boot_id), k->boot_id);
	copy_text(b->release, sizeof(b->release), k->kernel_release);
	b->opened = k->timeline.started;
	__atomic_store_n(&b->generation, generation, __ATOMIC_RELEASE);
	k->timeline.bank = b;
}

static int map(struct khod *k, int fd)
{
	struct stat st;
	void *p;

	if (fstat(fd, &st) < 0)
		return -errno;
	if (st.st_size != sizeof(struct kho_timeline_log))
		return -EBADMSG;
	p = mmap(NULL, sizeof(struct kho_timeline_log), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return -errno;
	k->timeline.log = p;
	return 0;
}

static void unmap(struct khod *k)
{
	if (k->timeline.log)
		(void)munmap(k->timeline.log, sizeof(*k->timeline.log));
	k->timeline.log = NULL;
	k->timeline.bank = NULL;
}

static void without(const char *why)
{
	log_event(LOG_WARNING, NULL, NULL, "There will be no timeline of handovers: %s.", why);
}

/* A new one, empty, and into the store. */
static int create(struct khod *k, struct kho_error **err)
{
	_cleanup_close_ int fd = memfd_create("khod-timeline", MFD_CLOEXEC);
	int r;

	if (fd < 0 || ftruncate(fd, sizeof(struct kho_timeline_log)) < 0)
		return kho_error_new(err, errno, "timeline", "memfd: %s", strerror(errno));
	r = map(k, fd);
	if (r < 0)
		return kho_error_new(err, r, "timeline", "mmap: %s", strerror(-r));
	k->timeline.log->bank_size = sizeof(k->timeline.log->banks[0]);
	memcpy(k->timeline.log->magic, KHO_TIMELINE_MAGIC, sizeof(k->timeline.log->magic));
	return fdstore_push(&k->fdstore, TIMELINE_FDNAME, fd, err);
}

void timeline_start(struct khod *k, int fd)
{
	int r;

	k->timeline.started = kho_timeline_now();
	if (fd < 0)
		return;
	k->fdstore.used++;
	r = map(k, fd);
	close(fd);
	if (r >= 0 && !kho_timeline_log_valid(k->timeline.log)) {
		unmap(k);
		r = -EBADMSG;
	}
	if (r >= 0) {
		open_bank(k);
		timeline_ended(k, KHO_MARK_KHOD_STARTED, NULL);
		return;
	}
	/* Of another version, or damaged: a new one takes its place when it is needed. */
	without(r == -EBADMSG ? "what the fd store has is not of this version" : strerror(-r));
	(void)fdstore_remove(&k->fdstore, TIMELINE_FDNAME, NULL);
}

void timeline_need(struct khod *k)
{
	_cleanup_error_ struct kho_error *err = NULL;
	_cleanup_free_ char *text = NULL;
	int r;

	if (k->timeline.log || !k->fdstore.available)
		return;
	r = create(k, &err);
	if (r >= 0) {
		open_bank(k);
		timeline_ended(k, KHO_MARK_KHOD_STARTED, NULL);
		return;
	}
	unmap(k);
	text = kho_error_format(err, r);
	without(text ? text : strerror(-r));
}

void timeline_ended(struct khod *k, enum kho_timeline_what what, const char *workload)
{
	struct kho_timeline_bank *b = k->timeline.bank;
	struct kho_timeline_time at = what == KHO_MARK_KHOD_STARTED ? k->timeline.started :
								      kho_timeline_now();
	struct kho_timeline_mark *last;

	if (!b || k->timeline.ready)
		return;
	last = b->n > 0 ? &b->marks[b->n - 1] : NULL;
	if (last && last->what == (uint32_t)what && what != KHO_MARK_KHOD_STARTED &&
	    strcmp(last->workload, workload ? workload : "") == 0)
		last->at = at;
	else
		append(b, what, workload, at);
}

void timeline_note(struct khod *k, enum kho_timeline_what what)
{
	struct kho_timeline_bank *b = k->timeline.bank;
	struct kho_timeline_mark *m = b ? find(b, what, NULL) : NULL;

	if (m)
		m->at = kho_timeline_now();
	else if (b)
		append(b, what, NULL, kho_timeline_now());
}

void timeline_stopped(struct khod *k, const char *workload)
{
	struct kho_timeline_bank *b = k->timeline.bank;
	struct kho_timeline_mark *m;

	if (!b)
		return;
	m = find(b, KHO_MARK_STOPPED, workload);
	/* Names come and go; of those that have gone nobody will ask. */
	for (uint32_t i = 0; !m && i < b->n; i++)
		if (b->marks[i].what == KHO_MARK_STOPPED && !workload_find(k, b->marks[i].workload))
			m = &b->marks[i];
	if (m)
		fill(m, KHO_MARK_STOPPED, workload, kho_timeline_now());
	else
		append(b, KHO_MARK_STOPPED, workload, kho_timeline_now());
}

void timeline_claimed(struct khod *k, const char *workload)
{
	struct kho_timeline_bank *b = k->timeline.bank;

	/* The first time, and of what came over the kexec. */
	if (b && find(b, KHO_MARK_RETRIEVED, workload) && !find(b, KHO_MARK_CLAIMED, workload))
		append(b, KHO_MARK_CLAIMED, workload, kho_timeline_now());
}

/* What it cannot be asked for is not known, and that is for people to see. */
static void ask_pid1(struct kho_timeline_bank *b)
{
	sd_bus *bus = NULL;
	int r = sd_bus_new(&bus);

	if (r >= 0)
		r = sd_bus_set_address(bus, PID1_ADDRESS);
	if (r >= 0)
		r = sd_bus_set_method_call_timeout(bus, PID1_USEC);
	if (r >= 0)
		r = sd_bus_start(bus);
	for (size_t i = 0; r >= 0 && i < ARRAY_SIZE(of_pid1); i++) {
		uint64_t usec = 0;

		r = sd_bus_get_property_trivial(bus, "org.freedesktop.systemd1", "/org/freedesktop/systemd1",
						"org.freedesktop.systemd1.Manager", of_pid1[i].property, NULL,
						't', &usec);
		/* 0 where there was none, as after a cold boot. */
		if (r >= 0 && usec > 0 && !find(b, of_pid1[i].what, NULL))
			append(b, of_pid1[i].what, NULL, (struct kho_timeline_time){ .monotonic = usec * 1000 });
	}
	if (r < 0)
		log_event(LOG_NOTICE, NULL, NULL,
			  "systemd cannot be asked for its part of the timeline: %s.", strerror(-r));
	sd_bus_flush_close_unref(bus);
}

void timeline_ready(struct khod *k)
{
	timeline_ended(k, KHO_MARK_READY, NULL);
	k->timeline.ready = true;
}

uint64_t timeline_ready_usec(const struct khod *k)
{
	const struct kho_timeline_mark *m =
		k->timeline.bank ? find(k->timeline.bank, KHO_MARK_READY, NULL) : NULL;

	return m ? boottime_usec() - (monotonic_usec() - m->at.monotonic / 1000) : 0;
}

static int on_exit_of(sd_event_source *s, int fd, uint32_t revents, void *userdata)
{
	struct workload *w = userdata;

	timeline_stopped(w->khod, w->name);
	w->watch = sd_event_source_disable_unref(w->watch);
	return 0;
}

void timeline_watch(struct khod *k, struct workload *w, int pidfd)
{
	int fd = fcntl(pidfd, F_DUPFD_CLOEXEC, 3);

	/* Who registered it before. */
	w->watch = sd_event_source_disable_unref(w->watch);
	w->khod = k;
	if (fd < 0)
		return;
	if (sd_event_add_io(k->event, &w->watch, fd, EPOLLIN, on_exit_of, w) < 0)
		close(fd);
	else
		(void)sd_event_source_set_io_fd_own(w->watch, true);
}

int timeline_copy(struct khod *k, struct kho_error **err)
{
	_cleanup_close_ int fd = -1;

	if (!k->timeline.log)
		return kho_error_new(err, ENODATA, "timeline", "khod has recorded nothing yet");
	if (k->timeline.bank && !find(k->timeline.bank, KHO_MARK_USERSPACE, NULL))
		ask_pid1(k->timeline.bank);
	fd = memfd_create("khod-timeline-copy", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0 || write(fd, k->timeline.log, sizeof(*k->timeline.log)) !=
			      sizeof(*k->timeline.log) ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) < 0)
		return kho_error_new(err, errno ? errno : EIO, "timeline", "cannot be copied");
	return TAKE_FD(fd);
}

void timeline_stop(struct khod *k)
{
	timeline_note(k, KHO_MARK_KHOD_STOPPED);
	unmap(k);
}
