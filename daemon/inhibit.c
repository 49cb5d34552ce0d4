/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The next kexec would lose something: so logind is asked to refuse it, before any unit is
 * stopped (systemctl kexec goes through logind; --force and -i do not ask). A lock of mode
 * "block" is a descriptor: it ends when it is closed, also with khod.
 *
 * khod is started long before logind, and does without it: what cannot be asked for now is
 * asked for again, every few seconds, as long as there is an obstacle.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <systemd/sd-bus.h>

#include "khod.h"
#include "log.h"

#define RETRY_USEC (3 * 1000000ULL)
#define CALL_USEC (10 * 1000000ULL)

/* One that has failed, whether or not a client is about to claim it. */
const struct workload *inhibit_obstacle(const struct khod *k)
{
	for (const struct workload *w = k->workloads; w; w = w->next)
		if ((w->state == WORKLOAD_FAILED || (w->state == WORKLOAD_CLAIMING && w->reason)) &&
		    workload_must(w))
			return w;
	return NULL;
}

static void hang_up(struct khod *k)
{
	k->inhibit.slot = sd_bus_slot_unref(k->inhibit.slot);
	k->inhibit.bus = sd_bus_close_unref(k->inhibit.bus);
}

static int on_retry(sd_event_source *s, uint64_t usec, void *userdata)
{
	inhibit_update(userdata);
	return 0;
}

static void retry(struct khod *k)
{
	int r = k->inhibit.timer ?
			sd_event_source_set_time_relative(k->inhibit.timer, RETRY_USEC) :
			sd_event_add_time_relative(k->event, &k->inhibit.timer, CLOCK_MONOTONIC,
						   RETRY_USEC, 0, on_retry, k);

	if (r >= 0)
		(void)sd_event_source_set_enabled(k->inhibit.timer, SD_EVENT_ONESHOT);
}

static int on_answer(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const struct workload *w = inhibit_obstacle(userdata);
	struct khod *k = userdata;
	int fd, r;

	r = sd_bus_message_read(m, "h", &fd);
	if (!sd_bus_message_is_method_error(m, NULL) && r >= 0 && w) {
		k->inhibit.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
		log_event(LOG_NOTICE, MSG_INHIBITED, w->name,
			  "A kexec is refused as long as workload %s would be lost by it: %s.", w->name,
			  workload_reason(w));
	}
	hang_up(k);
	if (k->inhibit.fd < 0 && w)
		retry(k);
	return 0;
}

static int ask(struct khod *k, const struct workload *w)
{
	char why[300];
	int r;

	snprintf(why, sizeof(why), "Workload %s would be lost: %s", w->name, workload_reason(w));
	r = sd_bus_open_system(&k->inhibit.bus);
	if (r >= 0)
		r = sd_bus_attach_event(k->inhibit.bus, k->event, SD_EVENT_PRIORITY_NORMAL);
	if (r >= 0)
		r = sd_bus_set_method_call_timeout(k->inhibit.bus, CALL_USEC);
	if (r >= 0)
		r = sd_bus_call_method_async(k->inhibit.bus, &k->inhibit.slot,
					     "org.freedesktop.login1", "/org/freedesktop/login1",
					     "org.freedesktop.login1.Manager", "Inhibit", on_answer, k,
					     "ssss", "shutdown", "khod", why, "block");
	return r;
}

void inhibit_update(struct khod *k)
{
	const struct workload *w = inhibit_obstacle(k);

	if (!w) {
		if (k->inhibit.fd >= 0)
			log_event(LOG_NOTICE, NULL, NULL, "A kexec is not refused any more.");
		inhibit_stop(k);
		return;
	}
	if (k->inhibit.fd >= 0 || k->inhibit.bus)
		return;
	if (ask(k, w) < 0) {
		hang_up(k);
		retry(k);
	}
}

void inhibit_stop(struct khod *k)
{
	hang_up(k);
	k->inhibit.timer = sd_event_source_disable_unref(k->inhibit.timer);
	if (k->inhibit.fd >= 0)
		close(k->inhibit.fd);
	k->inhibit.fd = -1;
}
