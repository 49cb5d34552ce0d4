/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A lease: a workload that is preserved for a handover only.
 *
 * Only its memfds are preserved while it is one, which is what takes long; its mappings can be
 * changed. The rest is done when a handover is prepared (handover.c), and undone by a new session,
 * as LUO gives up single files of a session only together. A khod that dies before the commit leaves
 * a session without an image, which the next one discards: the client, without which there is no
 * lease, has all descriptors, and registers again.
 *
 * A lease begins with a registration, or with a claim that is acknowledged so: then nothing
 * comes between the two in which a handover would not take the workload along. What belongs to
 * it can be replaced by others, also at once.
 */
#include <stdlib.h>
#include <string.h>

#include "fault.h"
#include "khod.h"
#include "log.h"

int lease_memory(struct khod *k, struct workload *w, struct kho_error **err)
{
	int r = session_open(k, w, err);

	return r < 0 ? r : workload_preserve_memory(k, w, w->fds, false, err);
}

/* What is in it is not what is leased. */
static int drop_session(struct khod *k, struct workload *w, struct kho_error **err)
{
	int r = session_discard(k, w, err);

	w->stray = r < 0;
	return r;
}

/* The same, and if it does not work out the next handover begins with it. */
static int memory_ahead(struct khod *k, struct workload *w)
{
	_cleanup_error_ struct kho_error *err = NULL;
	_cleanup_free_ char *text = NULL;
	int r = drop_session(k, w, &err);

	if (r >= 0)
		r = lease_memory(k, w, &err);
	if (r >= 0)
		return 0;
	(void)drop_session(k, w, NULL);
	text = kho_error_format(err, r);
	log_event(LOG_WARNING, NULL, w->name, "The memory of %s is not preserved ahead of time: %s.",
		  w->name, text ? text : strerror(-r));
	return r;
}

int workload_uncommit(struct khod *k, struct workload *w, struct kho_error **err)
{
	int r = session_discard(k, w, err);

	if (r < 0)
		return kho_error_new(err, r, w->name, "is still preserved");
	w->state = WORKLOAD_LEASED;
	(void)kho_image_set_graph(w->image, NULL, NULL);
	if (memory_ahead(k, w) >= 0)
		FAULT(ABORT_UNDONE);
	return 0;
}

int workload_commit(struct khod *k, struct workload *w, struct kho_error **err)
{
	int r = w->stray ? drop_session(k, w, err) : 0;

	if (r >= 0 && w->session < 0)
		r = lease_memory(k, w, err);
	if (r >= 0)
		r = workload_preserve_devices(k, w, w->fds, false, err);
	if (r >= 0)
		r = image_commit(k, w->image, w->session, err);
	khod_idle(k);
	if (r < 0) {
		(void)workload_uncommit(k, w, NULL);
		return r;
	}
	FAULT(REGISTER_IMAGE_PRESERVED);
	w->state = WORKLOAD_HELD;
	khod_status_line(k);
	return 0;
}

/* What goes between sessions is dropped by its owner: @image and @fds of @w for what is there. */
static void swap(struct workload *w, struct kho_image **image, int **fds)
{
	struct kho_image *i = w->image;
	int *f = w->fds;

	w->image = *image;
	w->fds = *fds;
	*image = i;
	*fds = f;
}

int lease_update(struct khod *k, struct workload *w, const struct registration *reg,
		 const struct identity *who, struct kho_error **err)
{
	_cleanup_image_ struct kho_image *image = NULL;
	int *fds = NULL, r;
	size_t n;

	r = handover_busy(k, w->name, w, err);
	if (r >= 0)
		r = workload_new_image(k, reg, who, w, &image, err);
	if (r < 0)
		return r;
	kho_image_set_registered_usec(image, kho_image_registered_usec(w->image));
	kho_image_set_handovers(image, kho_image_handovers(w->image));
	fds = workload_dup_fds(k, reg->fds, reg->n, &r);
	if (!fds)
		return kho_error_new(err, r, w->name, "%s", strerror(-r));
	/* A memfd is in one session only: the old one goes first. */
	r = session_discard(k, w, err);
	if (r < 0) {
		workload_close_fds(k, fds, reg->n);
		return kho_error_new(err, r, w->name, "is as before");
	}
	swap(w, &image, &fds);
	r = lease_memory(k, w, err);
	khod_idle(k);
	if (r < 0) {
		(void)drop_session(k, w, NULL);
		swap(w, &image, &fds);
		(void)memory_ahead(k, w);
		workload_close_fds(k, fds, reg->n);
		return r;
	}
	n = kho_image_n_files(image);
	workload_close_fds(k, fds, n);
	w->prepare_msec = reg->prepare_msec;
	log_event(LOG_INFO, MSG_REGISTERED, w->name, "The lease of %s is another one: %zu files instead of %zu.",
		  w->name, workload_n_files(w), n);
	return 0;
}

/* Descriptors of khod's own, of one that has been claimed. */
static int open_files(struct khod *k, struct workload *w, struct kho_error **err)
{
	int *fds, r;

	if (w->fds)
		return 0;
	fds = calloc(workload_n_files(w) + 1, sizeof(*fds));
	if (!fds)
		return kho_error_new(err, ENOMEM, w->name, "out of memory");
	r = workload_open_files(k, w, fds, err);
	if (r < 0) {
		free(fds);
		return r;
	}
	w->fds = fds;
	return 0;
}

int lease_claimed(struct khod *k, struct workload *w, const struct registration *policy,
		  const struct identity *who, struct kho_error **err)
{
	bool had_fds = w->fds;
	int r = handover_busy(k, w->name, w, err);

	if (r < 0)
		return r;
	/* By a secret, or by root: its owner in the next kernel would be another one. */
	r = workload_authorise(w, who, NULL, NULL, 0, err);
	if (r < 0)
		return kho_error_new(err, r, w->name, "acknowledge the claim, and register it");
	/* Preserved in a session of this kernel, of which nothing is in transit any more. */
	adopt_rest_of(k, w);
	if (w->state == WORKLOAD_FAILED)
		return kho_error_new(err, EIO, w->name, "%s", workload_reason(w));
	r = open_files(k, w, err);
	if (r < 0)
		return r;
	r = workload_uncommit(k, w, err);
	khod_idle(k);
	if (r < 0) {
		if (!had_fds) {
			workload_close_fds(k, w->fds, workload_n_files(w));
			w->fds = NULL;
		}
		return r;
	}
	kho_image_set_policy(w->image, policy->survival, policy->restore_failure);
	kho_image_set_claim_sec(w->image, policy->claim_sec);
	kho_image_set_may_lose_irq(w->image, policy->may_lose_irq);
	/* It has been claimed: what the last handover made of it has been told, and nobody is waited for. */
	kho_image_set_outcome(w->image, KHO_OUTCOME_NONE, NULL);
	(void)kho_image_set_arrived(w->image, "", 0, NULL);
	w->prepare_msec = policy->prepare_msec;
	w->lease = true;
	timeline_claimed(k, w->name);
	log_event(LOG_INFO, MSG_CLAIMED, w->name, "Workload %s claimed: it is leased by its client now.", w->name);
	return 0;
}
