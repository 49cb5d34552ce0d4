/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Phases from marks of two kernels, with clocks of every quality. */
#include "common.h"
#include "timeline-log.h"

#define SEC UINT64_C(1000000000)
#define TICKS 2		/* of the counter, per ns */

static struct kho_timeline_log *log_new;

/* @true_ns: a clock that nobody has. The old kernel began at 0, the new one at 110 s. */
static struct kho_timeline_time at(uint64_t true_ns, uint64_t kernel)
{
	return (struct kho_timeline_time){
		.monotonic = true_ns - kernel,
		.counter = 1000 + true_ns * TICKS,
		.realtime = 1000 * SEC + true_ns,
	};
}

static void add(int bank, uint32_t what, const char *workload, struct kho_timeline_time when)
{
	struct kho_timeline_bank *b = &log_new->banks[bank];
	struct kho_timeline_mark *m = &b->marks[b->n++];

	m->what = what;
	m->at = when;
	strcpy(m->workload, workload);
}

static void add_pid1(uint32_t what, uint64_t monotonic)
{
	add(1, what, "", (struct kho_timeline_time){ .monotonic = monotonic });
}

/*
 * Requested at 100 s, workloads stopped at 101 and 102, khod at 103, reboot(2) at 105, the
 * new kernel's clock begins at 110, its userspace at 112, khod at 114; a takes 114 to 118.
 */
static void setup(void)
{
	const uint64_t new = 110 * SEC;

	log_new = calloc(1, sizeof(*log_new));
	memcpy(log_new->magic, KHO_TIMELINE_MAGIC, 8);
	log_new->bank_size = sizeof(log_new->banks[0]);
	for (int i = 0; i < 2; i++) {
		log_new->banks[i].generation = 5 + i;
		snprintf(log_new->banks[i].release, 72, "7.3.%d", i);
	}
	log_new->banks[0].opened = at(10 * SEC, 0);
	add(0, KHO_MARK_STOPPED, "early", at(50 * SEC, 0));
	add(0, KHO_MARK_STOPPED, "a", at(101 * SEC, 0));
	add(0, KHO_MARK_STOPPED, "b", at(102 * SEC, 0));
	add(0, KHO_MARK_KHOD_STOPPED, "", at(103 * SEC, 0));
	log_new->banks[1].opened = at(114 * SEC, new);
	add(1, KHO_MARK_KHOD_STARTED, "", at(114 * SEC, new));
	add(1, KHO_MARK_RETRIEVED, "a", at(115 * SEC, new));
	add(1, KHO_MARK_BUILT, "a", at(116 * SEC, new));
	add(1, KHO_MARK_REPLACED, "a", at(117 * SEC, new));
	add(1, KHO_MARK_PRESERVED, "a", at(118 * SEC, new));
	add(1, KHO_MARK_RETRIEVED, "b", at(120 * SEC, new));
	add(1, KHO_MARK_RETRIEVED, "early", at(121 * SEC, new));
	add(1, KHO_MARK_READY, "", at(122 * SEC, new));
	add_pid1(KHO_MARK_REQUESTED, 100 * SEC);
	add_pid1(KHO_MARK_UNITS_STOPPED, 104 * SEC);
	add_pid1(KHO_MARK_REBOOT, 105 * SEC);
	add_pid1(KHO_MARK_USERSPACE, 2 * SEC);
	add(1, KHO_MARK_CLAIMED, "a", at(125 * SEC, new));
	add(1, KHO_MARK_CLAIMED, "early", at(130 * SEC, new));
}

static void teardown(void)
{
	free(log_new);
}

TestSuite(timeline, .init = setup, .fini = teardown, .timeout = 60);

static struct kho_timeline *made(void)
{
	struct kho_timeline *t = NULL;
	struct kho_error *err = NULL;

	cr_assert(kho_timeline_log_valid(log_new));
	cr_assert(kho_timeline_from_log(log_new, &t, &err) == 0, "%s",
		  err ? kho_error_message(err) : "");
	return t;
}

static void is(uint64_t got, double seconds, const char *what)
{
	double d = (double)got / 1e9 - seconds;

	cr_assert(d > -0.001 && d < 0.001, "%s: %f s, not %f", what, (double)got / 1e9, seconds);
}

static const struct kho_timeline_phase *phase(const struct kho_timeline *t, const char *name)
{
	for (size_t i = 0; i < t->n_phases; i++)
		if (strcmp(t->phases[i].name, name) == 0)
			return &t->phases[i];
	cr_assert(false, "there is no phase %s", name);
	return NULL;
}

Test(timeline, phases_of_both_kernels)
{
	struct kho_timeline *t = made();
	const struct kho_timeline_phase *p;

	cr_assert_str_eq(t->clock, "counter");
	cr_assert_str_eq(t->old_release, "7.3.0");
	cr_assert_str_eq(t->new_release, "7.3.1");
	is(t->blackout, 7, "blackout");
	is(t->total, 30, "total");
	is(phase(t, "units stop")->total, 4, "units stop");
	is(phase(t, "systemd-shutdown")->total, 1, "systemd-shutdown");
	p = phase(t, "one kernel to the other");
	is(p->total, 5, "between the kernels");
	is(p->spans[0].start, 5, "reboot");
	cr_assert(p->blackout);
	is(phase(t, "new kernel boots")->total, 2, "boot");
	is(phase(t, "systemd starts")->total, 2, "systemd");
	p = phase(t, "khod: retrieve");
	cr_assert(p->n_spans == 3 && !p->blackout);
	is(p->spans[1].start, 18, "the second retrieve");
	is(p->total, 4, "retrieve");
	is(phase(t, "khod: rebuild")->total, 1, "rebuild");
	is(phase(t, "khod: replace")->total, 1, "replace");
	is(phase(t, "khod: until ready")->total, 1, "ready");
	is(phase(t, "workloads start")->total, 3, "until the first claim");
	kho_timeline_free(t);
}

Test(timeline, gaps_of_workloads)
{
	struct kho_timeline *t = made();

	cr_assert(t->n_workloads == 3);
	cr_assert_str_eq(t->workloads[0].name, "a");
	is(t->workloads[0].stopped, 1, "a stopped");
	is(t->workloads[0].restored, 17, "a restored");
	is(t->workloads[0].claimed, 25, "a claimed");
	is(t->workloads[0].gap, 24, "a's gap");
	cr_assert_str_eq(t->workloads[1].name, "b");
	is(t->workloads[1].restored, 20, "b has no devices");
	cr_assert(t->workloads[1].claimed == KHO_TIME_UNKNOWN &&
		  t->workloads[1].gap == KHO_TIME_UNKNOWN);
	cr_assert_str_eq(t->workloads[2].name, "early");
	cr_assert(t->workloads[2].stopped == KHO_TIME_UNKNOWN &&
		  t->workloads[2].gap == KHO_TIME_UNKNOWN, "it had ended before the request");
	is(t->service_gap, 24, "the longest");
	kho_timeline_free(t);
}

/* What was prepared right before begins it; what was given up, or is long past, does not. */
Test(timeline, prepared)
{
	struct kho_timeline *t;

	add(0, KHO_MARK_PREPARING, "", at(96 * SEC, 0));
	add(0, KHO_MARK_PREPARED, "", at(98 * SEC, 0));
	t = made();
	is(phase(t, "khod: prepare")->total, 2, "prepare");
	is(phase(t, "units stop")->spans[0].start, 4, "request");
	is(phase(t, "units stop")->total, 4, "units stop");
	is(t->blackout, 7, "blackout");
	is(t->service_gap, 24, "gap");
	kho_timeline_free(t);
	add(0, KHO_MARK_ABORTED, "", at(99 * SEC, 0));
	t = made();
	is(phase(t, "units stop")->spans[0].start, 0, "it was given up");
	kho_timeline_free(t);
	log_new->banks[0].n--;
	log_new->banks[0].marks[log_new->banks[0].n - 1].at = at(30 * SEC, 0);
	log_new->banks[0].marks[log_new->banks[0].n - 2].at = at(29 * SEC, 0);
	t = made();
	is(phase(t, "units stop")->spans[0].start, 0, "it is long past");
	kho_timeline_free(t);
}

/* A counter that was reset in between, and one that there is not: the RTC's second is used. */
Test(timeline, without_a_counter)
{
	for (int round = 0; round < 2; round++) {
		struct kho_timeline_bank *b = &log_new->banks[1];
		struct kho_timeline *t;

		b->opened.counter = round ? 0 : 4 * SEC * TICKS;
		for (uint32_t i = 0; i < b->n; i++)
			b->marks[i].at.counter = round ? 0 : b->marks[i].at.monotonic * TICKS;
		b->opened.realtime += SEC / 2;
		t = made();
		cr_assert_str_eq(t->clock, "realtime");
		is(t->blackout, 7.5 + round * 0.5, "blackout");
		kho_timeline_free(t);
	}
	log_new->banks[1].opened.realtime = 5;
	{
		struct kho_timeline *t = made();

		cr_assert_str_eq(t->clock, "none");
		is(phase(t, "new kernel boots")->total, 2, "boot");
		kho_timeline_free(t);
	}
}

/* A systemd that does not say when it left the old kernel. */
Test(timeline, without_pid1)
{
	struct kho_timeline_bank *b = &log_new->banks[1];
	struct kho_timeline *t;

	for (uint32_t i = 0; i < b->n; i++)
		if (b->marks[i].what >= KHO_MARK_REQUESTED && b->marks[i].what <= KHO_MARK_USERSPACE)
			b->marks[i].what = 0;
	t = made();
	cr_assert(t->blackout == KHO_TIME_UNKNOWN);
	is(phase(t, "khod: rebuild")->total, 1, "rebuild");
	is(phase(t, "khod: rebuild")->spans[0].start, 12, "since khod was stopped");
	kho_timeline_free(t);
}

/* Killed and started again: what was between is nobody's, and after READY nothing counts. */
Test(timeline, khod_was_killed)
{
	const uint64_t new = 110 * SEC;
	struct kho_timeline_bank *b = &log_new->banks[1];
	struct kho_timeline *t;

	b->n = 2;
	add(1, KHO_MARK_KHOD_STARTED, "", at(116 * SEC, new));
	add(1, KHO_MARK_RETRIEVED, "a", at(118 * SEC, new));
	add(1, KHO_MARK_READY, "", at(119 * SEC, new));
	add(1, KHO_MARK_KHOD_STARTED, "", at(200 * SEC, new));
	add(1, KHO_MARK_READY, "", at(201 * SEC, new));
	t = made();
	is(phase(t, "khod: retrieve")->total, 3, "retrieve");
	cr_assert(phase(t, "khod: until ready")->n_spans == 1);
	cr_assert(t->n_workloads == 1);
	is(t->workloads[0].restored, 15, "when the second khod had it");
	kho_timeline_free(t);
}

Test(timeline, no_handover)
{
	struct kho_timeline *t = NULL;
	struct kho_error *err = NULL;

	log_new->banks[1].generation = 0;
	cr_assert(kho_timeline_from_log(log_new, &t, &err) == -ENODATA && !t);
	err = kho_error_free(err);
	/* The first kernel that has a bank. */
	log_new->banks[1].generation = 1;
	log_new->banks[0].generation = 0;
	cr_assert(kho_timeline_from_log(log_new, &t, &err) == -ENODATA && !t);
	err = kho_error_free(err);
	log_new->banks[1].generation = 0;
	cr_assert(kho_timeline_from_log(log_new, &t, &err) == -ENODATA && !t);
	kho_error_free(err);
}

/* Whatever bytes there are: refused, or a timeline. */
Test(timeline, damaged)
{
	struct kho_timeline_log *good = malloc(sizeof(*good));
	unsigned int seed = 1, refused = 0;

	memcpy(good, log_new, sizeof(*good));
	for (int i = 0; i < 2000; i++) {
		struct kho_timeline *t = NULL;
		struct kho_error *err = NULL;

		memcpy(log_new, good, sizeof(*good));
		for (int k = 0; k < 8; k++) {
			size_t bank = rand_r(&seed) % 2;
			uint8_t *p = (uint8_t *)&log_new->banks[bank];

			p[(size_t)rand_r(&seed) % (152 + 88 * 20)] = (uint8_t)rand_r(&seed);
		}
		if (!kho_timeline_log_valid(log_new)) {
			refused++;
			continue;
		}
		(void)kho_timeline_from_log(log_new, &t, &err);
		kho_timeline_free(t);
		kho_error_free(err);
	}
	cr_assert(refused > 0 && refused < 2000);
	log_new->banks[0].n = KHO_TIMELINE_MARKS + 1;
	cr_assert(!kho_timeline_log_valid(log_new));
	free(good);
}
