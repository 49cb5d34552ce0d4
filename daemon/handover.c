/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Getting everybody ready for a kexec, or nobody.
 *
 *	idle ----- begin: PREPARE to each client that is connected -----> asking
 *	asking --- READY: that workload is preserved, then its client is answered
 *	asking --- all are ready -------------------------------------------> idle, done(0)
 *	asking --- VETO, no answer in time, client died, cannot be preserved:
 *		     best effort, or forced: left behind, and it goes on
 *		     must survive: everything is undone ---------------------> idle, done(error)
 *	idle ----- abort: everything is undone -------------------------------> idle
 *
 * What "preserved" means is in workload.c: a lease gets committed, what is held is already. It
 * stays so after done(0), until the kexec or an abort; a second begin asks only who is not ready.
 *
 * A client that has been answered may exit: nothing of its workload needs it any more, and if
 * the handover is undone later the workload stays held, for whoever claims it.
 *
 * Nothing of this is kept over a crash of khod: leases end with it (their clients register
 * again), and those that were committed are held.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "fault.h"
#include "khod.h"
#include "log.h"

static void left_clear(struct handover *h)
{
	while (h->n_left > 0)
		free(h->left[--h->n_left].reason);
	free(h->left);
	h->left = NULL;
}

static void left_add(struct handover *h, const char *name, const char *reason)
{
	struct left_behind *l = reallocarray(h->left, h->n_left + 1, sizeof(*l));

	/* Without memory the journal still has it. */
	if (!l)
		return;
	h->left = l;
	l += h->n_left;
	snprintf(l->name, sizeof(l->name), "%s", name);
	l->reason = strdup(reason);
	h->n_left += l->reason != NULL;
}

static void finish(struct khod *k, int r, const char *object, const char *reason)
{
	struct handover *h = &k->handover;
	handover_done_t done = h->done;

	h->asking = false;
	h->done = NULL;
	(void)sd_event_source_set_enabled(h->timer, SD_EVENT_OFF);
	if (r >= 0) {
		timeline_note(k, KHO_MARK_PREPARED);
		FAULT(HANDOVER_DONE);
		log_event(LOG_NOTICE, MSG_PREPARED, NULL,
			  "Handover %" PRIu64 " is prepared%s: a kexec may come.", h->number,
			  h->n_left > 0 ? ", but workloads are left behind" : "");
	} else {
		log_event(LOG_WARNING, MSG_NOT_PREPARED, kho_name_valid(object) ? object : NULL,
			  "Handover %" PRIu64 " is given up, everything is as before: %s: %s.",
			  h->number, object, reason);
	}
	if (done)
		done(k, h->userdata, r, object, reason);
	inhibit_handover_ended(k, r);
}

/* One workload is as it was before the handover. */
static int undo_one(struct khod *k, struct workload *w, const char *reason,
		    struct kho_error **err)
{
	enum prepare was = w->prepare;
	int r = 0;

	if (was == PREPARE_READY && w->lease && w->client && w->state == WORKLOAD_HELD)
		r = workload_uncommit(k, w, err);
	/* It can be tried again, and until then it would come through a kexec. */
	if (r < 0)
		return r;
	w->prepare = PREPARE_NONE;
	if (w->client && was != PREPARE_NONE)
		server_aborted(w->client, w, k->handover.number, reason);
	return 0;
}

static int undo(struct khod *k, const char *reason, struct kho_error **err)
{
	struct kho_error *e = NULL;
	int r = 0, r1;

	timeline_note(k, KHO_MARK_ABORTED);
	FAULT(ABORT_BEGIN);
	for (struct workload *w = k->workloads; w; w = w->next) {
		r1 = undo_one(k, w, reason, &e);
		if (r1 < 0 && r == 0 && err) {
			*err = e;
			e = NULL;
		}
		r = r1 < 0 ? r1 : r;
		e = kho_error_free(e);
	}
	khod_idle(k);
	khod_status_line(k);
	return r;
}

/* @w will not be ready, for @reason. The caller goes on with handover_step(). */
static void not_ready(struct khod *k, struct workload *w, const char *reason)
{
	struct handover *h = &k->handover;
	char text[KHO_NAME_MAX + 2 + KHO_REASON_MAX + 1];
	_cleanup_error_ struct kho_error *err = NULL;
	char name[KHO_NAME_MAX + 1];

	strcpy(name, w->name);
	snprintf(text, sizeof(text), "%s: %s", name, reason);
	if (h->force || !workload_must(w)) {
		log_event(LOG_WARNING, MSG_LEFT_BEHIND, name,
			  "Handover %" PRIu64 " goes on without workload %s: %s.", h->number, name, reason);
		left_add(h, name, reason);
		(void)undo_one(k, w, reason, &err);
		return;
	}
	(void)undo(k, text, &err);
	finish(k, -ECANCELED, name, reason);
}

/*
 * An answer that is here in time counts, even if khod had no time to read it: what has been waiting when
 * the time is up is heard before the time is up for a second time. (Not by a low priority, with which
 * a client that always has something to say could put it off for ever.)
 */
static int on_deadline(sd_event_source *s, uint64_t usec, void *userdata)
{
	struct khod *k = userdata;
	uint64_t now = monotonic_usec();

	if (!k->handover.overdue) {
		k->handover.overdue = true;
		return sd_event_source_set_enabled(s, SD_EVENT_ONESHOT);
	}
	for (struct workload *w = k->workloads; k->handover.asking && w; w = w->next)
		if (w->prepare == PREPARE_ASKED && w->deadline <= now)
			not_ready(k, w, "its client did not answer in time");
	handover_step(k);
	return 0;
}

void handover_step(struct khod *k)
{
	struct handover *h = &k->handover;
	uint64_t next = UINT64_MAX, set = 0;
	int r;

	if (!h->asking)
		return;
	for (struct workload *w = k->workloads; w; w = w->next)
		if (w->prepare == PREPARE_ASKED && w->deadline < next)
			next = w->deadline;
	if (next == UINT64_MAX) {
		finish(k, 0, NULL, NULL);
		return;
	}
	r = h->timer ? sd_event_source_get_time(h->timer, &set) :
		       sd_event_add_time(k->event, &h->timer, CLOCK_MONOTONIC, next, 0, on_deadline, k);
	/* Who is only busy does not put it off. */
	if (set != next) {
		h->overdue = false;
		r = r < 0 ? r : sd_event_source_set_time(h->timer, next);
	}
	if (r >= 0)
		r = sd_event_source_set_enabled(h->timer, SD_EVENT_ONESHOT);
	if (r < 0)
		log_event(LOG_ERR, NULL, NULL, "Handover %" PRIu64 " has no deadline: %s.", h->number,
			  strerror(-r));
}

static void ask(struct khod *k, struct workload *w, uint32_t limit_msec)
{
	uint32_t msec = w->prepare_msec;
	int r;

	if (limit_msec > 0 && msec > limit_msec)
		msec = limit_msec;
	w->prepare = PREPARE_ASKED;
	w->deadline = monotonic_usec() + msec * UINT64_C(1000);
	r = server_prepare(w->client, w, k->handover.number, msec);
	FAULT(HANDOVER_ASKED);
	if (r < 0)
		not_ready(k, w, "its client cannot be reached");
}

int handover_begin(struct khod *k, uint32_t limit_msec, bool force, handover_done_t done,
		   void *userdata, struct kho_error **err)
{
	struct handover *h = &k->handover;

	if (h->asking)
		return kho_error_new(err, EBUSY, "handover", "one is being prepared already");
	left_clear(h);
	h->number++;
	h->asking = true;
	h->force = force;
	h->done = done;
	h->userdata = userdata;
	timeline_note(k, KHO_MARK_PREPARING);
	for (struct workload *w = k->workloads; h->asking && w; w = w->next)
		if (w->client && w->prepare == PREPARE_NONE && w->state != WORKLOAD_FAILED)
			ask(k, w, limit_msec);
	handover_step(k);
	return 0;
}

int handover_busy(const struct khod *k, const char *name, const struct workload *w, struct kho_error **err)
{
	if (!k->handover.asking && (!w || w->prepare == PREPARE_NONE))
		return 0;
	return kho_error_new(err, EBUSY, name,
			     "a handover is being prepared just now: try again when it has been given up, or in the next kernel");
}

int handover_abort(struct khod *k, const char *reason, struct kho_error **err)
{
	int r = undo(k, reason, err);

	if (k->handover.asking)
		finish(k, -ECANCELED, "handover", reason);
	return r;
}

void handover_forget(struct khod *k, const void *userdata)
{
	struct handover *h = &k->handover;

	if (!h->asking || h->userdata != userdata)
		return;
	h->done = NULL;
	(void)handover_abort(k, "who asked for it has gone", NULL);
}

/* Is that what this client is being asked? */
static int expected(struct khod *k, const struct workload *w, uint64_t number,
		    struct kho_error **err)
{
	if (k->handover.asking && w->prepare == PREPARE_ASKED && number == k->handover.number)
		return 0;
	return kho_error_new(err, ESTALE, w->name, "handover %" PRIu64 " is not waiting for it", number);
}

int handover_ready(struct khod *k, struct workload *w, uint64_t number, struct kho_error **err)
{
	_cleanup_free_ char *text = NULL;
	int r = expected(k, w, number, err);

	if (r < 0)
		return r;
	FAULT(HANDOVER_READY);
	if (w->state == WORKLOAD_LEASED)
		r = workload_commit(k, w, err);
	if (r < 0) {
		text = kho_error_format(*err, r);
		not_ready(k, w, text ? text : strerror(-r));
		return r;
	}
	FAULT(HANDOVER_PRESERVED);
	w->prepare = PREPARE_READY;
	return 0;
}

int handover_veto(struct khod *k, struct workload *w, uint64_t number, const char *reason,
		  struct kho_error **err)
{
	char text[KHO_REASON_MAX + 1];
	int r = expected(k, w, number, err);

	if (r < 0)
		return r;
	snprintf(text, sizeof(text), "vetoed: %s", reason);
	not_ready(k, w, text);
	return 0;
}

void handover_client_gone(struct khod *k, struct workload *w)
{
	_cleanup_error_ struct kho_error *err = NULL;
	_cleanup_free_ char *text = NULL;
	int r;

	w->client = NULL;
	if (w->prepare == PREPARE_ASKED)
		not_ready(k, w, "its client died before it was ready");
	w->prepare = PREPARE_NONE;
	if (w->state != WORKLOAD_LEASED) {
		w->lease = false;
		handover_step(k);
		inhibit_update(k);
		return;
	}
	r = workload_end(k, w, CUSTODY_LEASE_ENDED, &err);
	handover_step(k);
	if (r >= 0)
		return;
	/* It stays in the store until khod is restarted, and blocks its name until then. */
	text = kho_error_format(err, r);
	workload_fail(w, &err, r);
	log_event(LOG_ERR, MSG_FAILED, w->name, "The lease of %s does not end: %s.", w->name,
		  text ? text : strerror(-r));
}

void handover_stop(struct khod *k)
{
	left_clear(&k->handover);
	k->handover.timer = sd_event_source_disable_unref(k->handover.timer);
}
