/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How long a claim is waited for.
 *
 * Devices that nobody has claimed go on writing into memory for ever, for a client that will perhaps
 * never come. So a workload may say for how long after a handover it can be claimed; then its
 * devices are stopped, and its memory is kept or freed by the policy for a restore that fails.
 *
 * The time counts from when the workload had been brought into order in this kernel, and khod has begun
 * to listen, as others may take longer. The former is in the workload's image, by CLOCK_BOOTTIME, which nobody
 * can set, the latter in the timeline, so that a khod that is started again goes on
 * counting; each handover begins anew. A claim that has been answered, and not acknowledged yet, is
 * waited for (DEADLINE_ACK): its client has all of it. If it goes away without, the time is up at once.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "khod.h"
#include "log.h"

#define USEC UINT64_C(1000000)
#define RETRY_USEC (10 * USEC)

uint64_t boottime_usec(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_BOOTTIME, &ts);
	return (uint64_t)ts.tv_sec * USEC + (uint64_t)ts.tv_nsec / 1000;
}

/* CLOCK_BOOTTIME; UINT64_MAX: never. */
static uint64_t due(const struct khod *k, const struct workload *w)
{
	uint64_t arrived, ready;
	bool release;

	if (!w->image || kho_image_claim_sec(w->image) == 0)
		return UINT64_MAX;
	/* What could not be brought into order is the operator's. */
	if (w->state != WORKLOAD_HELD && w->state != WORKLOAD_CLAIMING)
		return UINT64_MAX;
	arrived = kho_image_arrived_usec(w->image, k->boot_id);
	release = kho_image_restore_failure(w->image) == KHO_RESTORE_FAILURE_RELEASE;
	/* Is there something to stop, or to free? */
	if (!arrived || !(kho_image_has_devices(w->image) || (release && workload_n_files(w) > 0)))
		return UINT64_MAX;
	ready = timeline_ready_usec(k);
	return (arrived > ready ? arrived : ready) + kho_image_claim_sec(w->image) * USEC;
}

uint64_t deadline_left(const struct khod *k, const struct workload *w)
{
	uint64_t at = due(k, w), now = boottime_usec();

	return at == UINT64_MAX ? at : at > now ? at - now : 0;
}

static void expire(struct khod *k, struct workload *w)
{
	bool release = kho_image_restore_failure(w->image) == KHO_RESTORE_FAILURE_RELEASE;
	bool devices = kho_image_has_devices(w->image);
	uint32_t sec = kho_image_claim_sec(w->image);
	_cleanup_error_ struct kho_error *err = NULL;
	_cleanup_free_ char *text = NULL;
	char why[80];
	int r;

	snprintf(why, sizeof(why), "nobody has claimed it within %" PRIu32 " s of the handover", sec);
	khod_busy(k, workload_bytes(w));
	r = workload_give_up(k, w, why, &err);
	if (r < 0) {
		w->claim_retry = boottime_usec() + RETRY_USEC;
		text = kho_error_format(err, r);
		log_event(LOG_ERR, MSG_EXPIRED, w->name,
			  "Nobody has claimed workload %s within %" PRIu32 " s of the handover, but it cannot be given up, and is held as before: %s. It is tried again in %d s.",
			  w->name, sec, text ? text : strerror(-r), (int)(RETRY_USEC / USEC));
	} else {
		log_event(LOG_WARNING, MSG_EXPIRED, w->name,
			  "Nobody has claimed workload %s within %" PRIu32 " s of the handover: %sits memory is %s.",
			  w->name, sec, devices ? "its devices have been stopped, " : "",
			  release ? "freed, as it asked for" : "kept");
	}
	khod_idle(k);
}

static int on_due(sd_event_source *s, uint64_t usec, void *userdata)
{
	deadline_check(userdata);
	return 0;
}

void deadline_update(struct khod *k)
{
	uint64_t next = UINT64_MAX;

	for (const struct workload *w = k->workloads; w; w = w->next) {
		uint64_t at = w->state == WORKLOAD_CLAIMING ? UINT64_MAX : due(k, w);

		if (at != UINT64_MAX && at < w->claim_retry)
			at = w->claim_retry;
		next = at < next ? at : next;
	}
	sd_event_source_disable_unref(k->deadline);
	k->deadline = NULL;
	if (next != UINT64_MAX &&
	    sd_event_add_time(k->event, &k->deadline, CLOCK_BOOTTIME, next, 1, on_due, k) < 0)
		log_event(LOG_ERR, NULL, NULL, "Out of memory: claims are waited for without an end.");
}

void deadline_check(struct khod *k)
{
	/* None is freed or added on the way. */
	for (struct workload *w = k->workloads; w; w = w->next) {
		bool again = w->claim_retry > boottime_usec();

		if (w->state == WORKLOAD_HELD && !again && deadline_left(k, w) == 0)
			expire(k, w);
	}
	deadline_update(k);
}
