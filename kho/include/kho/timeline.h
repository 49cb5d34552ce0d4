/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_TIMELINE_H
#define KHO_TIMELINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kho/image.h>

#ifdef __cplusplus
extern "C" {
#endif

/** KHO_TIME_UNKNOWN - a time or a length that nobody has recorded */
#define KHO_TIME_UNKNOWN UINT64_MAX

/** struct kho_timeline_span - one stretch of a phase, in ns since the handover began */
struct kho_timeline_span {
	uint64_t start;
	uint64_t end;
};

/**
 * struct kho_timeline_phase - what was going on
 * @name: in a few words
 * @blackout: no userspace runs
 * @spans: @n_spans of them, ascending; more than one if workloads took turns
 * @n_spans: how many
 * @total: sum of their lengths, ns
 */
struct kho_timeline_phase {
	const char *name;
	bool blackout;
	const struct kho_timeline_span *spans;
	size_t n_spans;
	uint64_t total;
};

/**
 * struct kho_timeline_workload - one workload of the handover; times in ns since it began
 * @name: its name
 * @stopped: its client ended; KHO_TIME_UNKNOWN: before the request, or khod does not know
 * @restored: its devices were under new page tables, or there are none and it was retrieved
 * @claimed: a client has it back; KHO_TIME_UNKNOWN: none yet
 * @gap: the service gap, @stopped to @claimed; KHO_TIME_UNKNOWN
 */
struct kho_timeline_workload {
	char name[KHO_NAME_MAX + 1];
	uint64_t stopped;
	uint64_t restored;
	uint64_t claimed;
	uint64_t gap;
};

/**
 * struct kho_timeline - the last handover; it begins when it is prepared, or else with the request
 * @old_release: kernel it began in
 * @new_release: kernel it led to
 * @clock: what time between the kernels was taken from: "counter" (of the CPU), "realtime"
 *	(about a second wrong), "none" (time in which neither kernel kept time is missing)
 * @phases: @n_phases of them, by their start
 * @n_phases: how many
 * @workloads: @n_workloads of them, by name
 * @n_workloads: how many
 * @total: to the last thing recorded, ns
 * @blackout: reboot(2) to the first instruction of userspace, ns; KHO_TIME_UNKNOWN: systemd
 *	does not say
 * @service_gap: the longest of all workloads, ns; KHO_TIME_UNKNOWN: of none it is known
 * @dropped: marks that are missing, as there were too many
 */
struct kho_timeline {
	const char *old_release;
	const char *new_release;
	const char *clock;
	const struct kho_timeline_phase *phases;
	size_t n_phases;
	const struct kho_timeline_workload *workloads;
	size_t n_workloads;
	uint64_t total;
	uint64_t blackout;
	uint64_t service_gap;
	uint32_t dropped;
};

/** kho_timeline_free() - NULL is allowed. Return: NULL. */
struct kho_timeline *kho_timeline_free(struct kho_timeline *timeline);

#ifdef __cplusplus
}
#endif
#endif
