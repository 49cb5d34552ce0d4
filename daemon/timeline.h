/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOD_TIMELINE_H
#define KHOD_TIMELINE_H

#include "timeline-log.h"

struct khod;
struct workload;

/** The log's name in the fd store. */
#define TIMELINE_FDNAME "timeline"

struct timeline_log {
	struct kho_timeline_log *log;	/* mapped; NULL: there is none */
	struct kho_timeline_bank *bank;	/* of this kernel */
	struct kho_timeline_time started;	/* khod */
	bool ready;			/* this kernel's handover is over */
};

/**
 * timeline_start() - go on with the log that systemd kept
 * @fd: it, owned; -1: there is none, one is made when there is something to write down
 *
 * What is wrong with it is logged, and it is done without.
 */
void timeline_start(struct khod *k, int fd);
/** timeline_need() - from here on there is something to write down */
void timeline_need(struct khod *k);
/**
 * timeline_ended() - of a handover: what the mark before began has ended now
 * @workload: NULL: of all
 *
 * Again with the same arguments: it has only ended now.
 */
void timeline_ended(struct khod *k, enum kho_timeline_what what, const char *workload);
/** timeline_ready() - the handover is over but for claims */
void timeline_ready(struct khod *k);
/**
 * timeline_ready_usec() - when khod began to listen in this kernel, whichever khod it was
 *
 * Return: CLOCK_BOOTTIME; 0: it has not, or that is not known.
 */
uint64_t timeline_ready_usec(const struct khod *k);
/** timeline_note() - of the kernel before a handover, not of a workload; the last time counts */
void timeline_note(struct khod *k, enum kho_timeline_what what);
/** timeline_stopped() - the client of a workload has ended */
void timeline_stopped(struct khod *k, const char *workload);
/** timeline_watch() - as timeline_stopped(), as soon as the process of @pidfd (borrowed) ends */
void timeline_watch(struct khod *k, struct workload *w, int pidfd);
/** timeline_claimed() - a workload is with its client again */
void timeline_claimed(struct khod *k, const char *workload);
/** timeline_copy() - a sealed copy for a client, with what PID 1 knows. Return: a descriptor, -ENODATA, -errno. */
int timeline_copy(struct khod *k, struct kho_error **err);
void timeline_stop(struct khod *k);

#endif
