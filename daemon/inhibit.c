/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What systemctl kexec has to do with us: it goes through logind (with --force it does not),
 * and logind knows two kinds of locks.
 *
 * block	while a workload that must survive has failed: the next kexec would lose it, and
 *		is refused before any unit is stopped.
 * delay	while a client is to be asked before a handover: logind says that it is about to
 *		kexec (PrepareForShutdownWithMetadata) and waits for the lock to be closed, for
 *		InhibitDelayMaxSec= at most. In that time everybody gets ready, or nobody.
 *
 * logind has no way to be told "no" in the delay. So kexec.target is masked, the lock is
 * closed, logind fails to start the target, says that it is over (the same signal with false),
 * and the mask goes again. It is a runtime mask, and a file beside our socket says that it is
 * ours, so that it goes also if we die in between.
 *
 * A lock is a descriptor: it ends when it is closed, also with khod. khod is started long
 * before logind, and does without it: what cannot be asked for now is asked for again, every
 * few seconds, as long as it is wanted.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <systemd/sd-bus.h>

#include "khod.h"
#include "log.h"

#define RETRY_USEC (3 * 1000000ULL)
#define CALL_USEC (10 * 1000000ULL)
/* What logind waits if it does not say: its default. */
#define DELAY_MSEC 5000

#define LOGIND "org.freedesktop.login1", "/org/freedesktop/login1"
#define LOGIND_MANAGER "org.freedesktop.login1.Manager"
#define SYSTEMD                                                                \
	"org.freedesktop.systemd1", "/org/freedesktop/systemd1",               \
	"org.freedesktop.systemd1.Manager"
#define TARGET "kexec.target"

/* One that has failed, whether or not a client is about to claim it. */
const struct workload *inhibit_obstacle(const struct khod *k)
{
	for (const struct workload *w = k->workloads; w; w = w->next)
		if ((w->state == WORKLOAD_FAILED || (w->state == WORKLOAD_CLAIMING && w->reason)) &&
		    workload_must(w))
			return w;
	return NULL;
}

static bool somebody_to_ask(const struct khod *k)
{
	for (const struct workload *w = k->workloads; w; w = w->next)
		if (w->client)
			return true;
	return false;
}

static void lock_drop(struct inhibit_lock *l)
{
	l->slot = sd_bus_slot_unref(l->slot);
	if (l->fd >= 0)
		close(l->fd);
	l->fd = -1;
}

static void hang_up(struct inhibit *i)
{
	i->block.slot = sd_bus_slot_unref(i->block.slot);
	i->delay.slot = sd_bus_slot_unref(i->delay.slot);
	i->mask = sd_bus_slot_unref(i->mask);
	i->bus = sd_bus_close_unref(i->bus);
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

static int lock_answer(struct khod *k, struct inhibit_lock *l, sd_bus_message *m)
{
	int fd, r = sd_bus_message_read(m, "h", &fd);

	l->slot = sd_bus_slot_unref(l->slot);
	if (!sd_bus_message_is_method_error(m, NULL) && r >= 0)
		l->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (l->fd < 0)
		retry(k);
	return l->fd;
}

static int on_block(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const struct workload *w = inhibit_obstacle(userdata);
	struct khod *k = userdata;

	if (lock_answer(k, &k->inhibit.block, m) < 0)
		return 0;
	if (w)
		log_event(LOG_NOTICE, MSG_INHIBITED, w->name,
			  "A kexec is refused as long as workload %s would be lost by it: %s.", w->name,
			  workload_reason(w));
	inhibit_update(k);	/* it may not be wanted any more */
	return 0;
}

static int on_delay(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct khod *k = userdata;

	if (lock_answer(k, &k->inhibit.delay, m) >= 0)
		inhibit_update(k);
	return 0;
}

static int lock_ask(struct khod *k, struct inhibit_lock *l, const char *mode, const char *why,
		    sd_bus_message_handler_t answer)
{
	return sd_bus_call_method_async(k->inhibit.bus, &l->slot, LOGIND, LOGIND_MANAGER, "Inhibit",
					answer, k, "ssss", "shutdown", "khod", why, mode);
}

/* The file that says that the mask is ours. */
static int marker(const struct khod *k, char *path, size_t size)
{
	const char *slash = strrchr(k->socket_path, '/');
	int n = snprintf(path, size, "%.*s/kexec-refused",
			 slash ? (int)(slash - k->socket_path) : 1, slash ? k->socket_path : ".");

	return n < 0 || (size_t)n >= size ? -ENAMETOOLONG : 0;
}

static bool masked(const struct khod *k)
{
	char path[256];

	return marker(k, path, sizeof(path)) == 0 && access(path, F_OK) == 0;
}

static int on_unmasked(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct khod *k = userdata;
	char path[256];

	k->inhibit.mask = sd_bus_slot_unref(k->inhibit.mask);
	if (sd_bus_message_is_method_error(m, NULL)) {
		retry(k);
		return 0;
	}
	if (marker(k, path, sizeof(path)) == 0)
		(void)unlink(path);
	inhibit_update(k);
	return 0;
}

static int on_masked(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const sd_bus_error *e = sd_bus_message_get_error(m);
	struct khod *k = userdata;

	k->inhibit.mask = sd_bus_slot_unref(k->inhibit.mask);
	if (e)
		log_event(LOG_ERR, NULL, NULL,
			  "The kexec cannot be refused any more, and what is not ready is lost: %s.",
			  e->message ? e->message : e->name);
	else
		log_event(LOG_NOTICE, MSG_KEXEC_REFUSED, NULL, "The kexec is refused.");
	lock_drop(&k->inhibit.delay);
	return 0;
}

static void refuse(struct khod *k)
{
	char path[256];
	int fd, r;

	r = marker(k, path, sizeof(path));
	fd = r < 0 ? r : open(path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd >= 0)
		close(fd);
	r = fd < 0 || !k->inhibit.bus ? -ENOTCONN :
	    sd_bus_call_method_async(k->inhibit.bus, &k->inhibit.mask, SYSTEMD, "MaskUnitFiles",
				     on_masked, k, "asbb", 1, TARGET, true, false);
	if (r >= 0)
		return;
	log_event(LOG_ERR, NULL, NULL,
		  "The kexec cannot be refused any more, and what is not ready is lost: %s.", strerror(-r));
	lock_drop(&k->inhibit.delay);
}

static void on_prepared(struct khod *k, void *userdata, int r, const char *object,
			const char *reason)
{
	if (r < 0)
		refuse(k);
	else
		lock_drop(&k->inhibit.delay);
}

/* The time is shared with what comes after the last answer. */
static void prepare(struct khod *k)
{
	struct kho_error *err = NULL;
	int r = handover_begin(k, k->inhibit.delay_msec / 10 * 6, false, on_prepared, &k->inhibit, &err);

	kho_error_free(err);
	/* The operator's own is under way: when that has ended, the lock goes (handover_ended). */
	k->inhibit.waiting = r == -EBUSY;
}

void inhibit_handover_ended(struct khod *k, int r)
{
	if (!k->inhibit.waiting)
		return;
	k->inhibit.waiting = false;
	on_prepared(k, NULL, r, NULL, NULL);
}

static bool is_kexec(sd_bus_message *m)
{
	const char *key, *type;

	if (sd_bus_message_enter_container(m, 'a', "{sv}") < 0)
		return false;
	while (sd_bus_message_enter_container(m, 'e', "sv") > 0) {
		if (sd_bus_message_read(m, "s", &key) < 0)
			return false;
		if (strcmp(key, "type") == 0)
			return sd_bus_message_read(m, "v", "s", &type) >= 0 && strcmp(type, "kexec") == 0;
		if (sd_bus_message_skip(m, "v") < 0 || sd_bus_message_exit_container(m) < 0)
			return false;
	}
	return false;
}

static int on_shutdown(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct khod *k = userdata;
	bool kexec;
	int active;

	if (sd_bus_message_read(m, "b", &active) < 0)
		return 0;
	kexec = is_kexec(m);
	k->inhibit.shutdown = active;
	if (active && kexec) {
		log_event(LOG_NOTICE, NULL, NULL, "A kexec is announced.");
		prepare(k);
	} else if (active) {
		lock_drop(&k->inhibit.delay);
	} else {
		/* It did not come to it. */
		if (kexec)
			(void)handover_abort(k, "there was no kexec", NULL);
		inhibit_update(k);
	}
	return 0;
}

static int on_delay_max(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct khod *k = userdata;
	uint64_t usec;

	if (!sd_bus_message_is_method_error(m, NULL) && sd_bus_message_read(m, "v", "t", &usec) >= 0)
		k->inhibit.delay_msec = usec / 1000 < UINT32_MAX ? usec / 1000 : UINT32_MAX;
	return 0;
}

/* The bus has gone: a delay lock without the signal would only make logind wait. */
static int on_disconnect(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct khod *k = userdata;

	lock_drop(&k->inhibit.delay);
	retry(k);
	return 0;
}

static int connect_bus(struct khod *k)
{
	struct inhibit *i = &k->inhibit;
	int r;

	if (i->bus && sd_bus_is_open(i->bus) > 0)
		return 0;
	hang_up(i);
	i->delay_msec = DELAY_MSEC;
	r = sd_bus_open_system(&i->bus);
	if (r >= 0)
		r = sd_bus_attach_event(i->bus, k->event, SD_EVENT_PRIORITY_NORMAL);
	if (r >= 0)
		r = sd_bus_set_method_call_timeout(i->bus, CALL_USEC);
	if (r >= 0)
		r = sd_bus_match_signal_async(i->bus, NULL, LOGIND, LOGIND_MANAGER,
					      "PrepareForShutdownWithMetadata", on_shutdown, NULL, k);
	if (r >= 0)
		r = sd_bus_match_signal(i->bus, NULL, NULL, "/org/freedesktop/DBus/Local",
					"org.freedesktop.DBus.Local", "Disconnected", on_disconnect, k);
	if (r >= 0)
		r = sd_bus_call_method_async(i->bus, NULL, LOGIND, "org.freedesktop.DBus.Properties",
					     "Get", on_delay_max, k, "ss", LOGIND_MANAGER,
					     "InhibitDelayMaxUSec");
	if (r < 0)
		hang_up(i);
	return r;
}

void inhibit_update(struct khod *k)
{
	const struct workload *w = inhibit_obstacle(k);
	struct inhibit *i = &k->inhibit;
	/* While logind is at it, no lock can be had, and ours must stay what it is. */
	bool want_delay = !i->shutdown && somebody_to_ask(k);
	bool unmask = !i->shutdown && !i->mask && masked(k);
	char why[300];
	int r = 0;

	if (!w) {
		if (i->block.fd >= 0)
			log_event(LOG_NOTICE, NULL, NULL, "A kexec is not refused any more.");
		lock_drop(&i->block);
	}
	if (!want_delay && !i->shutdown)
		lock_drop(&i->delay);
	if (!w && !want_delay && !unmask)
		return;
	if ((!w || i->block.fd >= 0) && (!want_delay || i->delay.fd >= 0) && !unmask)
		return;
	r = connect_bus(k);
	if (r >= 0 && w && i->block.fd < 0 && !i->block.slot) {
		snprintf(why, sizeof(why), "Workload %s would be lost: %s", w->name, workload_reason(w));
		r = lock_ask(k, &i->block, "block", why, on_block);
	}
	if (r >= 0 && want_delay && i->delay.fd < 0 && !i->delay.slot)
		r = lock_ask(k, &i->delay, "delay", "Workloads are made ready for a kexec", on_delay);
	if (r >= 0 && unmask)
		r = sd_bus_call_method_async(i->bus, &i->mask, SYSTEMD, "UnmaskUnitFiles", on_unmasked, k,
					     "asb", 1, TARGET, true);
	if (r < 0) {
		hang_up(i);
		retry(k);
	}
}

void inhibit_stop(struct khod *k)
{
	struct inhibit *i = &k->inhibit;

	lock_drop(&i->block);
	lock_drop(&i->delay);
	hang_up(i);
	i->timer = sd_event_source_disable_unref(i->timer);
}
