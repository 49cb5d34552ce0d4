/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What systemctl kexec has to do with us: it goes through logind (with --force it does not),
 * and logind knows two kinds of locks.
 *
 * block	while the next kexec would lose something: a workload that must survive has failed,
 *		or the loaded kernel would not take over what is held (reboot(2) refuses that one,
 *		with all units stopped, and systemd then reboots by the firmware). The kexec is
 *		refused before any unit is stopped.
 * delay	while anything is held: logind says that it is about to kexec
 *		(PrepareForShutdownWithMetadata) and waits for the lock to be closed, for
 *		InhibitDelayMaxSec= at most. In that time everybody gets ready, or nobody. The
 *		loaded kernel is looked at once more: systemctl loads one itself just before it asks
 *		logind, and what is in sysfs does not tell when it changes, so that it is looked at
 *		once a second.
 *
 * logind has no way to be told "no" in the delay. So kexec.target is masked, the lock is
 * closed, logind fails to start the target, says that it is over (the same signal with false),
 * and the mask goes again. It is a runtime mask, and a file beside our socket says that it is
 * ours, so that it goes also if we die in between.
 *
 * A lock is a descriptor: it ends when its last copy is closed. systemd has one in our fd store,
 * so that a khod that dies takes no lock with it. The next one finds it, and if logind waits
 * for a kexec by then, it cannot know whom its predecessor had asked: the kexec is refused.
 * (Not the lock because of the loaded kernel: that one has to end at once when another kernel is
 * loaded, and the next khod sees by itself what is loaded.)
 *
 * khod is started long before logind, and does without it: what cannot be asked for now is
 * asked for again, every few seconds, as long as it is wanted.
 */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <systemd/sd-bus.h>

#include "khod.h"
#include "log.h"

#define RETRY_USEC (3 * 1000000ULL)
/* How often the loaded kernel is looked at, and how much later it may be. */
#define LOOK_USEC 1000000ULL
#define LOOK_ACCURACY_USEC 250000ULL
#define CALL_USEC (10 * 1000000ULL)
/* What logind waits if it does not say: its default. */
#define DELAY_MSEC 5000

#define LOGIND "org.freedesktop.login1", "/org/freedesktop/login1"
#define LOGIND_MANAGER "org.freedesktop.login1.Manager"
#define SYSTEMD                                                                \
	"org.freedesktop.systemd1", "/org/freedesktop/systemd1",               \
	"org.freedesktop.systemd1.Manager"
#define TARGET "kexec.target"
#define LOGIND_STARTED                                                         \
	"type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus'," \
	"member='NameOwnerChanged',arg0='org.freedesktop.login1'"

/* One that has failed, whether or not a client is about to claim it. */
const struct workload *inhibit_obstacle(const struct khod *k)
{
	for (const struct workload *w = k->workloads; w; w = w->next)
		if ((w->state == WORKLOAD_FAILED || (w->state == WORKLOAD_CLAIMING && w->reason)) &&
		    workload_must(w))
			return w;
	return NULL;
}

/* Is there, or will there be, a session for the next kexec? The kernel asks no more than that. */
static bool holds(const struct khod *k)
{
	for (const struct workload *w = k->workloads; w; w = w->next)
		if (w->session >= 0 || w->client)
			return true;
	return false;
}

/* Would reboot(2) refuse the loaded kernel, with what is held? As kho_luo_image_refuses(). */
static int loaded_refuses(const struct khod *k, const char **why)
{
	bool devices = false;

	if (!holds(k))
		return 0;
	for (const struct workload *w = k->workloads; w && !devices; w = w->next)
		devices = w->image && kho_image_has_devices(w->image);
	return kho_luo_image_refuses(k->kho, devices, why);
}

/*
 * Why a kexec is to be refused, into @why. @w: the workload that it is about; NULL: it is the
 * loaded kernel. Return: 1, 0: it is not, -EBUSY: a kernel is just being loaded.
 */
static int refusal(const struct khod *k, char why[INHIBIT_WHY_MAX], const struct workload **w)
{
	const char *text;
	int r;

	*w = inhibit_obstacle(k);
	if (*w) {
		snprintf(why, INHIBIT_WHY_MAX, "Workload %s would be lost: %s", (*w)->name,
			 workload_reason(*w));
		return 1;
	}
	r = loaded_refuses(k, &text);
	if (r > 0)
		snprintf(why, INHIBIT_WHY_MAX, "The loaded kernel would not take over what is held: %s",
			 text);
	return r;
}

/* Its last copy is closed by systemd, a moment later. */
static void lock_close(struct khod *k, struct inhibit_lock *l)
{
	if (l->stored)
		(void)fdstore_remove(&k->fdstore, l->fdname, NULL);
	if (l->fd >= 0)
		close(l->fd);
	l->stored = false;
	l->fd = -1;
}

static void lock_drop(struct khod *k, struct inhibit_lock *l)
{
	l->slot = sd_bus_slot_unref(l->slot);
	lock_close(k, l);
}

/* Instead of the one before. @keep: over the end of khod. Takes ownership of @fd. */
static void lock_take(struct khod *k, struct inhibit_lock *l, int fd, bool keep)
{
	_cleanup_error_ struct kho_error *err = NULL;
	_cleanup_free_ char *text = NULL;
	int old = l->fd, r = -ENODEV;

	if (l->stored)
		(void)fdstore_remove(&k->fdstore, l->fdname, NULL);
	l->fd = fd;
	if (keep && k->fdstore.available)
		r = fdstore_push(&k->fdstore, l->fdname, fd, &err);
	l->stored = r >= 0;
	if (err)
		log_event(LOG_WARNING, NULL, NULL, "A lock of logind will end with khod: %s.",
			  text = kho_error_format(err, r));
	if (old >= 0)
		close(old);
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

static int lock_answer(struct khod *k, struct inhibit_lock *l, sd_bus_message *m, bool keep)
{
	int fd, r = sd_bus_message_read(m, "h", &fd);

	l->slot = sd_bus_slot_unref(l->slot);
	fd = !sd_bus_message_is_method_error(m, NULL) && r >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
	if (fd < 0) {
		l->why[0] = 0;
		retry(k);
		return -ENOLCK;
	}
	lock_take(k, l, fd, keep);
	return 0;
}

static int on_block(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const struct workload *w = inhibit_obstacle(userdata);
	struct khod *k = userdata;

	if (lock_answer(k, &k->inhibit.block, m, w != NULL) < 0)
		return 0;
	log_event(LOG_NOTICE, w ? MSG_INHIBITED : MSG_IMAGE_REFUSES, w ? w->name : NULL,
		  "A kexec is refused. %s.", k->inhibit.block.why);
	inhibit_update(k);	/* it may not be wanted any more */
	return 0;
}

static int on_delay(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct khod *k = userdata;

	if (lock_answer(k, &k->inhibit.delay, m, true) >= 0)
		inhibit_update(k);
	return 0;
}

static int lock_ask(struct khod *k, struct inhibit_lock *l, const char *mode, const char *why,
		    sd_bus_message_handler_t answer)
{
	snprintf(l->why, sizeof(l->why), "%s", why);
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
		log_event(LOG_CRIT, MSG_KEXEC_NOT_REFUSED, NULL,
			  "The kexec cannot be refused any more, and what is not ready is lost: %s.",
			  e->message ? e->message : e->name);
	else
		log_event(LOG_NOTICE, MSG_KEXEC_REFUSED, NULL, "The kexec is refused.");
	lock_drop(k, &k->inhibit.delay);
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
	log_event(LOG_CRIT, MSG_KEXEC_NOT_REFUSED, NULL,
		  "The kexec cannot be refused any more, and what is not ready is lost: %s.", strerror(-r));
	lock_drop(k, &k->inhibit.delay);
}

static void on_prepared(struct khod *k, void *userdata, int r, const char *object,
			const char *reason)
{
	if (r >= 0)
		adopt_rest(k);
	if (r < 0 || (!k->inhibit.known && inhibit_obstacle(k)))
		refuse(k);
	else
		lock_drop(k, &k->inhibit.delay);
}

/* Is there a kernel loaded that must not be booted? A workload that has failed is known already. */
static bool image_refuses(struct khod *k)
{
	const char *why;
	int r = loaded_refuses(k, &why);

	if (r == 0)
		return false;
	log_event(LOG_ERR, MSG_IMAGE_REFUSES, NULL,
		  "The loaded kernel would not take over what is held: %s.",
		  r > 0 ? why : "another one is just being loaded");
	return true;
}

/*
 * The time is shared with what comes after the last answer. What came over the last kexec and has not been
 * preserved again is, in the meantime.
 */
static void prepare(struct khod *k)
{
	struct kho_error *err = NULL;
	int r;

	/* Who goes past the block lock (systemctl kexec -i) knows of this one. */
	k->inhibit.known = inhibit_obstacle(k) != NULL;
	if (image_refuses(k)) {
		refuse(k);
		return;
	}
	r = handover_begin(k, k->inhibit.delay_msec / 10 * 6, false, on_prepared, &k->inhibit, &err);
	kho_error_free(err);
	/* The operator's own is under way: when that has ended, the lock goes (handover_ended). */
	k->inhibit.waiting = r == -EBUSY;
	/* Not while it is being refused, as it would keep the answer from being read. */
	if (!k->inhibit.mask)
		adopt_rest(k);
}

void inhibit_handover_ended(struct khod *k, int r)
{
	if (!k->inhibit.waiting)
		return;
	k->inhibit.waiting = false;
	on_prepared(k, NULL, r, NULL, NULL);
}

/* What logind is about to do: "kexec", "reboot" etc.; "" if that is not said. */
static const char *shutdown_type(sd_bus_message *m)
{
	const char *key, *type;

	if (sd_bus_message_enter_container(m, 'a', "{sv}") < 0)
		return "";
	while (sd_bus_message_enter_container(m, 'e', "sv") > 0) {
		if (sd_bus_message_read(m, "s", &key) < 0)
			return "";
		if (strcmp(key, "type") == 0)
			return sd_bus_message_read(m, "v", "s", &type) >= 0 ? type : "";
		if (sd_bus_message_skip(m, "v") < 0 || sd_bus_message_exit_container(m) < 0)
			return "";
	}
	return "";
}

static int on_shutdown(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct khod *k = userdata;
	bool kexec;
	int active;

	if (sd_bus_message_read(m, "b", &active) < 0)
		return 0;
	kexec = strcmp(shutdown_type(m), "kexec") == 0;
	k->inhibit.shutdown = active;
	k->inhibit.kexec = active && kexec;
	k->inhibit.inherited = false;
	if (active && kexec) {
		log_event(LOG_NOTICE, NULL, NULL, "A kexec is announced.");
		prepare(k);
	} else if (active) {
		lock_drop(k, &k->inhibit.delay);
	} else {
		/* It did not come to it. */
		if (kexec)
			(void)handover_abort(k, "there was no kexec", NULL);
		inhibit_update(k);
	}
	return 0;
}

/*
 * logind was started again. It still has our locks, but knows nothing of a shutdown that it had
 * announced, so that nobody will say that it is over.
 */
static int on_logind(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const char *name, *old, *new;
	struct khod *k = userdata;

	if (sd_bus_message_read(m, "sss", &name, &old, &new) < 0 || !new[0] || !k->inhibit.shutdown)
		return 0;
	log_event(LOG_NOTICE, NULL, NULL,
		  "logind was started again, and what it had announced does not come.");
	k->inhibit.shutdown = k->inhibit.waiting = false;
	/* The one that is being prepared for it has nobody any more who waits for it. */
	handover_forget(k, &k->inhibit);
	if (k->inhibit.kexec)
		(void)handover_abort(k, "logind was started again", NULL);
	k->inhibit.kexec = false;
	inhibit_update(k);
	return 0;
}

/* Is logind waiting for the lock that the khod before this one had? */
static int on_announced(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const char *type = "";
	struct khod *k = userdata;

	if (!k->inhibit.inherited)
		return 0;	/* it has said so itself in the meantime */
	if (sd_bus_message_is_method_error(m, NULL)) {
		retry(k);
		return 0;
	}
	k->inhibit.inherited = false;
	if (sd_bus_message_enter_container(m, 'v', "a{sv}") > 0)
		type = shutdown_type(m);
	k->inhibit.shutdown = type[0] != 0;
	k->inhibit.kexec = strcmp(type, "kexec") == 0;
	if (k->inhibit.kexec) {
		log_event(LOG_ERR, MSG_NOT_PREPARED, NULL,
			  "A kexec is announced, and khod has died since: who was ready for it is not known any more.");
		refuse(k);
	} else if (type[0]) {
		lock_drop(k, &k->inhibit.delay);
	}
	inhibit_update(k);
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

	lock_drop(k, &k->inhibit.delay);
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
		r = sd_bus_add_match_async(i->bus, NULL, LOGIND_STARTED, on_logind, NULL, k);
	if (r >= 0)
		r = sd_bus_match_signal(i->bus, NULL, NULL, "/org/freedesktop/DBus/Local",
					"org.freedesktop.DBus.Local", "Disconnected", on_disconnect, k);
	if (r >= 0)
		r = sd_bus_call_method_async(i->bus, NULL, LOGIND, "org.freedesktop.DBus.Properties",
					     "Get", on_delay_max, k, "ss", LOGIND_MANAGER,
					     "InhibitDelayMaxUSec");
	if (r >= 0 && i->inherited)
		r = sd_bus_call_method_async(i->bus, NULL, LOGIND, "org.freedesktop.DBus.Properties",
					     "Get", on_announced, k, "ss", LOGIND_MANAGER,
					     "PreparingForShutdownWithMetadata");
	if (r < 0)
		hang_up(i);
	return r;
}

static int on_look(sd_event_source *s, uint64_t usec, void *userdata)
{
	inhibit_update(userdata);
	return 0;
}

/* Look at the loaded kernel again, as long as there is something that it could lose. */
static void look_again(struct khod *k)
{
	struct inhibit *i = &k->inhibit;
	int r;

	if (!holds(k)) {
		(void)sd_event_source_set_enabled(i->look, SD_EVENT_OFF);
		return;
	}
	r = i->look ? sd_event_source_set_time_relative(i->look, LOOK_USEC) :
		      sd_event_add_time_relative(k->event, &i->look, CLOCK_MONOTONIC, LOOK_USEC,
						 LOOK_ACCURACY_USEC, on_look, k);
	if (r >= 0)
		(void)sd_event_source_set_enabled(i->look, SD_EVENT_ONESHOT);
}

/* Take and drop the lock that refuses. Return: 1 if logind is to be asked for it, for @why. */
static int want_block(struct khod *k, char why[INHIBIT_WHY_MAX])
{
	struct inhibit_lock *l = &k->inhibit.block;
	const struct workload *w;
	int r = refusal(k, why, &w);

	if (r < 0)
		return 0;	/* for a moment nothing is known: all stays as it is */
	if (r == 0) {
		if (l->fd >= 0)
			log_event(LOG_NOTICE, NULL, NULL, "A kexec is not refused any more.");
		lock_drop(k, l);
		return 0;
	}
	return !l->slot && (l->fd < 0 || strcmp(l->why, why) != 0);
}

void inhibit_update(struct khod *k)
{
	struct inhibit *i = &k->inhibit;
	/* While logind is at it, no lock can be had, and ours must stay what it is. */
	bool want_delay = !i->shutdown && (holds(k) || i->inherited);
	bool unmask = !i->shutdown && !i->mask && masked(k);
	char why[INHIBIT_WHY_MAX];
	bool block;
	int r = 0;

	look_again(k);
	block = want_block(k, why);
	if (!want_delay && !i->shutdown)
		lock_drop(k, &i->delay);
	want_delay = want_delay && i->delay.fd < 0 && !i->delay.slot;
	if (!block && !want_delay && !unmask && !i->inherited)
		return;
	r = connect_bus(k);
	if (r >= 0 && block)
		r = lock_ask(k, &i->block, "block", why, on_block);
	if (r >= 0 && want_delay)
		r = lock_ask(k, &i->delay, "delay", "Workloads are made ready for a kexec", on_delay);
	if (r >= 0 && unmask)
		r = sd_bus_call_method_async(i->bus, &i->mask, SYSTEMD, "UnmaskUnitFiles", on_unmasked, k,
					     "asb", 1, TARGET, true);
	if (r < 0) {
		hang_up(i);
		retry(k);
	}
}

bool inhibit_passed(struct khod *k, const char *fdname, int fd)
{
	struct inhibit_lock *locks[] = { &k->inhibit.block, &k->inhibit.delay };
	struct pollfd p = { .fd = fd };

	for (size_t i = 0; i < ARRAY_SIZE(locks); i++) {
		struct inhibit_lock *l = locks[i];

		if (l->fd >= 0 || strcmp(fdname, l->fdname) != 0)
			continue;
		k->fdstore.used++;
		l->fd = fd;
		l->stored = true;
		/* Nobody at the other end: a logind that is not there any more. */
		if (poll(&p, 1, 0) < 0 || (p.revents & POLLERR))
			lock_close(k, l);
		else if (l == &k->inhibit.delay)
			k->inhibit.inherited = true;
		return true;
	}
	return false;
}

void inhibit_init(struct khod *k)
{
	k->inhibit.block = (struct inhibit_lock){ .fd = -1, .fdname = "inhibit-block" };
	k->inhibit.delay = (struct inhibit_lock){ .fd = -1, .fdname = "inhibit-delay" };
}

void inhibit_stop(struct khod *k)
{
	struct inhibit *i = &k->inhibit;

	lock_drop(k, &i->block);
	lock_drop(k, &i->delay);
	hang_up(i);
	i->timer = sd_event_source_disable_unref(i->timer);
	i->look = sd_event_source_disable_unref(i->look);
}
