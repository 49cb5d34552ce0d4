/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The last handover, from marks that were made in two kernels.
 *
 * Each kernel has a CLOCK_MONOTONIC of its own, from its own start, and what lies between
 * the two is in neither. A counter of the CPU that kexec does not reset tells it: how fast it
 * runs is known from the marks themselves, each of which has both. Without one there is
 * CLOCK_REALTIME, which the next kernel takes from an RTC with a resolution of a second.
 */
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#if defined(__x86_64__) || defined(__i386__)
#include <x86intrin.h>
#endif

#include "timeline-log.h"
#include "util.h"

#define MSEC UINT64_C(1000000)
/* A rate from less is not worth much. */
#define RATE_SPAN (100 * MSEC)

static uint64_t counter(void)
{
#if defined(__x86_64__) || defined(__i386__)
	return __rdtsc();
#elif defined(__aarch64__)
	uint64_t v;

	asm volatile("isb; mrs %0, cntvct_el0" : "=r"(v));
	return v;
#else
	return 0;
#endif
}

static uint64_t clock_ns(clockid_t id)
{
	struct timespec ts;

	return clock_gettime(id, &ts) < 0 ? 0 : ts.tv_sec * UINT64_C(1000000000) + ts.tv_nsec;
}

struct kho_timeline_time kho_timeline_now(void)
{
	return (struct kho_timeline_time){
		.monotonic = clock_ns(CLOCK_MONOTONIC),
		.counter = counter(),
		.realtime = clock_ns(CLOCK_REALTIME),
	};
}

static bool terminated(const char *s, size_t size)
{
	return memchr(s, 0, size) != NULL;
}

bool kho_timeline_log_valid(const struct kho_timeline_log *log)
{
	if (memcmp(log->magic, KHO_TIMELINE_MAGIC, sizeof(log->magic)) != 0 ||
	    log->bank_size != sizeof(log->banks[0]))
		return false;
	for (int i = 0; i < 2; i++) {
		const struct kho_timeline_bank *b = &log->banks[i];

		if (b->n > KHO_TIMELINE_MARKS || !terminated(b->boot_id, sizeof(b->boot_id)) ||
		    !terminated(b->release, sizeof(b->release)))
			return false;
		for (uint32_t k = 0; k < b->n; k++)
			if (!terminated(b->marks[k].workload, sizeof(b->marks[k].workload)) ||
			    (b->marks[k].workload[0] && !kho_name_valid(b->marks[k].workload)))
				return false;
	}
	return true;
}

int kho_timeline_newest(const struct kho_timeline_log *log)
{
	uint64_t a = log->banks[0].generation, b = log->banks[1].generation;

	return a == 0 && b == 0 ? -1 : b > a;
}

/* The workloads of the public struct, and what it points to. */
struct timeline {
	struct kho_timeline pub;
	const struct kho_timeline_bank *old, *new;
	char old_release[72], new_release[72];
	struct kho_timeline_phase *phases;
	struct kho_timeline_span *spans;
	struct kho_timeline_workload *workloads;
	uint64_t request;	/* in the old kernel's clock */
	int64_t origin;		/* the same, or when what led to it began to be prepared */
	int64_t shift;		/* from the new kernel's clock to the old one's */
};

struct kho_timeline *kho_timeline_free(struct kho_timeline *timeline)
{
	if (timeline) {
		struct timeline *t = (struct timeline *)timeline;

		free(t->phases);
		free(t->spans);
		free(t->workloads);
		free(t);
	}
	return NULL;
}

static void timeline_freep(struct timeline **t)
{
	if (*t)
		kho_timeline_free(&(*t)->pub);
}

static const struct kho_timeline_mark *find(const struct kho_timeline_bank *b, uint32_t what,
					    const char *workload)
{
	for (uint32_t i = 0; i < b->n; i++)
		if (b->marks[i].what == what && strcmp(b->marks[i].workload, workload) == 0)
			return &b->marks[i];
	return NULL;
}

/* The moment of a bank that is farthest from when it was opened. */
static const struct kho_timeline_time *last_time(const struct kho_timeline_bank *b)
{
	const struct kho_timeline_time *last = &b->opened;

	for (uint32_t i = 0; i < b->n; i++)
		if (b->marks[i].at.counter && b->marks[i].at.monotonic > last->monotonic)
			last = &b->marks[i].at;
	return last;
}

/* Ticks of the counter per ns; 0: not known. */
static double rate(const struct timeline *t)
{
	const struct kho_timeline_bank *banks[] = { t->old, t->new };
	uint64_t longest = RATE_SPAN;
	double r = 0;

	for (int i = 0; i < 2; i++) {
		const struct kho_timeline_time *a = &banks[i]->opened, *b = last_time(banks[i]);
		uint64_t span = b->monotonic - a->monotonic;

		if (span < longest || !a->counter || b->counter <= a->counter)
			continue;
		longest = span;
		r = (double)(b->counter - a->counter) / (double)span;
	}
	return r;
}

/* Where the new kernel's clock began, in the old one's. */
static void join_clocks(struct timeline *t)
{
	const struct kho_timeline_time *a = last_time(t->old), *b = &t->new->opened;
	double r = rate(t), between = -1;

	t->pub.clock = "none";
	if (r > 0 && b->counter > a->counter)
		between = (double)(b->counter - a->counter) / r;
	/* The new kernel has run for a while: a counter that was reset shows less. */
	if (between >= (double)b->monotonic) {
		t->pub.clock = "counter";
	} else if (b->realtime >= a->realtime + b->monotonic) {
		between = (double)(b->realtime - a->realtime);
		t->pub.clock = "realtime";
	} else {
		between = (double)b->monotonic;
	}
	/* A damaged log may say anything; it comes out as nonsense, and no more than that. */
	if (between >= 0x1p63)
		between = 0;
	t->shift = (int64_t)(a->monotonic + (uint64_t)between - b->monotonic);
}

static uint64_t since_request(const struct timeline *t, int64_t when)
{
	return when > t->origin ? (uint64_t)when - (uint64_t)t->origin : 0;
}

static uint64_t of_old(const struct timeline *t, uint32_t what)
{
	const struct kho_timeline_mark *m = find(t->new, what, "");

	return m ? since_request(t, m->at.monotonic) : KHO_TIME_UNKNOWN;
}

static uint64_t of_new(const struct timeline *t, uint64_t monotonic)
{
	return since_request(t, (int64_t)(monotonic + (uint64_t)t->shift));
}

static void phase_add(struct timeline *t, const char *name, bool blackout, uint64_t start,
		      uint64_t end)
{
	struct kho_timeline_phase *p = NULL;
	struct kho_timeline_span *s;

	if (start == KHO_TIME_UNKNOWN || end == KHO_TIME_UNKNOWN || end < start)
		return;
	for (size_t i = 0; i < t->pub.n_phases && !p; i++)
		if (t->phases[i].name == name)
			p = &t->phases[i];
	if (!p) {
		p = &t->phases[t->pub.n_phases++];
		/* Each has room for a span of each mark. */
		*p = (struct kho_timeline_phase){
			.name = name, .blackout = blackout,
			.spans = t->spans + (t->pub.n_phases - 1) * (KHO_TIMELINE_MARKS + 1),
		};
	}
	s = (struct kho_timeline_span *)p->spans + p->n_spans++;
	*s = (struct kho_timeline_span){ start, end };
	p->total += end - start;
	if (end > t->pub.total)
		t->pub.total = end;
}

/* What a mark of khod ends; NULL: nothing that has a name. */
static const char *ended_by(uint32_t what)
{
	switch (what) {
	case KHO_MARK_RETRIEVED:
		return "khod: retrieve";
	case KHO_MARK_BUILT:
		return "khod: rebuild";
	case KHO_MARK_REPLACED:
		return "khod: replace";
	case KHO_MARK_QUIESCED:
		return "khod: quiesce";
	case KHO_MARK_FINISHED:
		return "khod: finish";
	case KHO_MARK_PRESERVED:
		return "khod: preserve again";
	case KHO_MARK_READY:
		return "khod: until ready";
	}
	return NULL;
}

#define MAX_PHASES 16

static const struct kho_timeline_mark *first_claim(const struct timeline *t)
{
	for (uint32_t i = 0; i < t->new->n; i++)
		if (t->new->marks[i].what == KHO_MARK_CLAIMED)
			return &t->new->marks[i];
	return NULL;
}

static void add_khod(struct timeline *t, uint64_t userspace)
{
	const struct kho_timeline_mark *before = NULL, *claim;

	for (uint32_t i = 0; i < t->new->n; i++) {
		const struct kho_timeline_mark *m = &t->new->marks[i];

		if (m->what == KHO_MARK_KHOD_STARTED && !before)
			phase_add(t, "systemd starts", false, userspace, of_new(t, m->at.monotonic));
		if (m->what != KHO_MARK_KHOD_STARTED && !ended_by(m->what))
			continue;
		if (before && ended_by(m->what))
			phase_add(t, ended_by(m->what), false, of_new(t, before->at.monotonic),
				  of_new(t, m->at.monotonic));
		before = m;
		if (m->what == KHO_MARK_READY)
			break;
	}
	claim = first_claim(t);
	if (claim)
		phase_add(t, "workloads start", false, before ? of_new(t, before->at.monotonic) : 0,
			  of_new(t, claim->at.monotonic));
}

/* When its last device was moved, or, if it has none, its last file was there. */
static uint64_t restored(const struct timeline *t, const char *workload, uint64_t until)
{
	uint64_t retrieved = 0, replaced = 0;

	for (uint32_t i = 0; i < t->new->n; i++) {
		const struct kho_timeline_mark *m = &t->new->marks[i];

		if (m->at.monotonic > until || strcmp(m->workload, workload) != 0)
			continue;
		if (m->what == KHO_MARK_RETRIEVED)
			retrieved = m->at.monotonic;
		else if (m->what == KHO_MARK_REPLACED)
			replaced = m->at.monotonic;
	}
	return replaced ? replaced : retrieved;
}

/* Of all that were carried: the ones that there is a mark of from before khod was ready. */
static void add_workloads(struct timeline *t)
{
	const struct kho_timeline_mark *ready = find(t->new, KHO_MARK_READY, "");
	uint64_t until = ready ? ready->at.monotonic : UINT64_MAX;

	t->pub.service_gap = KHO_TIME_UNKNOWN;
	for (uint32_t i = 0; i < t->new->n; i++) {
		const struct kho_timeline_mark *m = &t->new->marks[i], *x;
		struct kho_timeline_workload *w;

		if (m->what != KHO_MARK_RETRIEVED || m->at.monotonic > until ||
		    find(t->new, KHO_MARK_RETRIEVED, m->workload) != m)
			continue;
		w = &t->workloads[t->pub.n_workloads++];
		*w = (struct kho_timeline_workload){
			.stopped = KHO_TIME_UNKNOWN, .claimed = KHO_TIME_UNKNOWN,
			.gap = KHO_TIME_UNKNOWN,
		};
		memcpy(w->name, m->workload, KHO_NAME_MAX);
		w->restored = of_new(t, restored(t, w->name, until));
		x = find(t->old, KHO_MARK_STOPPED, w->name);
		/* What had ended before was not stopped by this handover. */
		if (x && (int64_t)x->at.monotonic >= t->origin)
			w->stopped = since_request(t, x->at.monotonic);
		x = find(t->new, KHO_MARK_CLAIMED, w->name);
		if (x)
			w->claimed = of_new(t, x->at.monotonic);
		if (x && w->claimed > t->pub.total)
			t->pub.total = w->claimed;
		if (w->stopped == KHO_TIME_UNKNOWN || w->claimed == KHO_TIME_UNKNOWN)
			continue;
		w->gap = w->claimed - w->stopped;
		if (t->pub.service_gap == KHO_TIME_UNKNOWN || w->gap > t->pub.service_gap)
			t->pub.service_gap = w->gap;
	}
}

/*
 * When the handover was prepared, if it was, and right before the request: then that is where
 * it began.
 */
#define PREPARED_BEFORE (60 * 1000 * MSEC)

static bool prepared(const struct timeline *t, uint64_t request, uint64_t *begin, uint64_t *end)
{
	const struct kho_timeline_mark *a = find(t->old, KHO_MARK_PREPARING, "");
	const struct kho_timeline_mark *b = find(t->old, KHO_MARK_PREPARED, "");
	const struct kho_timeline_mark *c = find(t->old, KHO_MARK_ABORTED, "");

	if (!a || !b || b->at.monotonic < a->at.monotonic || b->at.monotonic > request ||
	    request - b->at.monotonic > PREPARED_BEFORE ||
	    (c && c->at.monotonic >= a->at.monotonic))
		return false;
	*begin = a->at.monotonic;
	*end = b->at.monotonic;
	return true;
}

static int by_name(const void *a, const void *b)
{
	const struct kho_timeline_workload *x = a, *y = b;

	return strcmp(x->name, y->name);
}

static void add_kernels(struct timeline *t)
{
	const struct kho_timeline_mark *m = find(t->new, KHO_MARK_USERSPACE, "");
	uint64_t request = of_old(t, KHO_MARK_REQUESTED), begin, end;
	uint64_t stopped = of_old(t, KHO_MARK_UNITS_STOPPED), reboot = of_old(t, KHO_MARK_REBOOT);
	uint64_t began = of_new(t, 0), userspace = m ? of_new(t, m->at.monotonic) : KHO_TIME_UNKNOWN;

	if (prepared(t, t->request, &begin, &end))
		phase_add(t, "khod: prepare", false, since_request(t, begin), since_request(t, end));
	phase_add(t, "units stop", false, request, stopped);
	phase_add(t, "systemd-shutdown", false, stopped, reboot);
	phase_add(t, "one kernel to the other", true, reboot, began);
	phase_add(t, "new kernel boots", true, began, userspace);
	t->pub.blackout = reboot == KHO_TIME_UNKNOWN || userspace == KHO_TIME_UNKNOWN ||
			  userspace < reboot ? KHO_TIME_UNKNOWN : userspace - reboot;
	add_khod(t, userspace);
}

int kho_timeline_from_log(const struct kho_timeline_log *log, struct kho_timeline **ret,
			  struct kho_error **err)
{
	_cleanup_(timeline_freep) struct timeline *t = calloc(1, sizeof(*t));
	int newest = kho_timeline_newest(log);
	const struct kho_timeline_mark *m;
	uint64_t begin, end;

	if (!t)
		return kho_error_new(err, ENOMEM, "timeline", "out of memory");
	if (newest < 0 || log->banks[!newest].generation == 0 ||
	    log->banks[!newest].generation + 1 != log->banks[newest].generation)
		return kho_error_new(err, ENODATA, "timeline",
				     "no handover is recorded: nothing was carried into this kernel by khod");
	t->old = &log->banks[!newest];
	t->new = &log->banks[newest];
	t->phases = calloc(MAX_PHASES, sizeof(*t->phases));
	t->spans = calloc((size_t)MAX_PHASES * (KHO_TIMELINE_MARKS + 1), sizeof(*t->spans));
	t->workloads = calloc(t->new->n + 1, sizeof(*t->workloads));
	if (!t->phases || !t->spans || !t->workloads)
		return kho_error_new(err, ENOMEM, "timeline", "out of memory");
	memcpy(t->old_release, t->old->release, sizeof(t->old_release));
	memcpy(t->new_release, t->new->release, sizeof(t->new_release));
	t->pub.old_release = t->old_release;
	t->pub.new_release = t->new_release;
	t->pub.dropped = t->old->dropped + t->new->dropped;

	join_clocks(t);
	m = find(t->new, KHO_MARK_REQUESTED, "");
	t->request = m ? m->at.monotonic : last_time(t->old)->monotonic;
	t->origin = (int64_t)(prepared(t, t->request, &begin, &end) ? begin : t->request);
	add_kernels(t);
	add_workloads(t);
	qsort(t->workloads, t->pub.n_workloads, sizeof(*t->workloads), by_name);
	t->pub.phases = t->phases;
	t->pub.workloads = t->workloads;
	*ret = &TAKE_PTR(t)->pub;
	return 0;
}

int kho_timeline_read(struct kho *kho, int fd, struct kho_timeline **ret, struct kho_error **err)
{
	_cleanup_free_ struct kho_timeline_log *log = malloc(sizeof(*log));
	ssize_t n;

	if (!log)
		return kho_error_new(err, ENOMEM, "timeline", "out of memory");
	n = kho_op(kho, pread, fd, log, sizeof(*log), 0);
	if (n < 0)
		return kho_error_new(err, (int)n, "timeline", "cannot be read: %s", strerror((int)-n));
	if (n != sizeof(*log) || !kho_timeline_log_valid(log))
		return kho_error_new(err, EBADMSG, "timeline", "is not of this version");
	return kho_timeline_from_log(log, ret, err);
}
