/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * At start: from whatever systemd held, to the resting state.
 *
 * khod keeps no state of its own, so this is all the recovery there is: after a
 * crash, after a kexec, after a crash in the middle of the work of either. Every
 * step looks at what is there, does what is missing, and can be repeated.
 *
 * After a kexec a workload's session is *incoming*: its files can be retrieved, but a
 * second kexec would not carry it. It cannot wait for somebody to claim it, since the
 * next `systemctl kexec` may come first, and khod may be killed before it can prepare
 * for that. So each workload is moved to a new *outgoing* session right away, and
 * survives any number of kexecs with nobody claiming it.
 *
 * The difficulty: LUO knows a memfd by its inode, and one inode is in one session
 * only. Preserving it in the new session is refused (EBUSY) until the incoming one is
 * finished, and from then on nothing but open descriptors keeps its memory. Hence:
 *
 *	1  retrieve image and files (repeatable, the kernel returns the same files)
 *	2  each of them into systemd's fd store: "transit"
 *	3  new outgoing session, into the store
 *	4  finish the incoming session           from here on: transit keeps the memory
 *	5  incoming session out of the store
 *	6  preserve each file in the new session (a token in use: done before)
 *	7  preserve the image: commit            from here on: the new session keeps it
 *	8  transit out of the store
 *
 * Workloads may be started after 1, and khod says that it is ready: their outage does not grow by
 * the rest, which is for the next kexec. 2 and 3 follow at once, so that nothing of what is missing
 * then needs PID 1. The rest would compete with them for the machine, and is put off until that has
 * started, mostly (adopt_rest_later()), or a kexec is announced, khod is stopped, or a client needs
 * it. Who claims a workload before gets it as it is, and instead of 4 to 8 its incoming session is
 * finished and all of it given up.
 *
 * Died before 4: the incoming session still has everything. Between 4 and 7: transit
 * has, and each file is in the new session or only in transit, which a probe for its
 * token tells. After 7: the image in an outgoing session says that it is complete,
 * and whatever else there is of the workload is left over.
 *
 * A kexec in the middle loses nothing either once step 4 is reached: systemd preserves
 * what is in transit in a session of its own, unless it is in the new session already,
 * and then that one, incoming now and without an image, has it. So every file is looked
 * for in both places. What does get lost: an incoming session at the next kexec if khod
 * had no time to go on, because the kernel carries outgoing sessions only. It has: logind waits
 * for it (inhibit.c), and so does systemd, which stops it before.
 *
 * A workload with devices: its devices do DMA under frozen HWPTs of the previous kernel.
 * In step 1 they are restored (restore.c): bound, and moved to page tables of this
 * kernel. Each step of that is to be seen in the context itself, so that it is continued
 * after a crash. The image that goes into transit is the one that will be preserved: it has
 * the ids of this kernel, and its being there says that this has been done. Step 1 is done in
 * three parts, each for all of those workloads: the kernel stops a device that nobody retrieves in
 * time, and none has to wait for memory of others, or that no IOAS maps.
 *
 * If it fails, all of it is undone, and the workload is *quiesced*: an image without
 * devices, with the reason, goes into transit (from here on: decided); devices and
 * iommufds are closed, and the incoming session is given up instead of finished, which
 * together stops the devices; the memfds are moved like those of any other workload, or given
 * up with the session, after the devices, if that is the workload's policy. There
 * is no third end for a workload with devices: if some of its memory cannot be retrieved, it
 * is quiesced, too, and what is left of its memory is kept.
 *
 * A kexec that comes between restore and step 7 finds devices that no session has: the old
 * kernel stops them, and the next khod, which finds the image and the memfds in transit,
 * quiesces the workload.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <systemd/sd-daemon.h>
#include <time.h>

#include "fault.h"
#include "khod.h"
#include "log.h"

#define TRANSIT_PREFIX "transit+"
/* Token of the image of a workload that is quiesced: goes before the other one. */
#define TOKEN_QUIESCED (UINT64_MAX - 1)
#define MAX_SESSIONS 8

/* How far a workload was brought. */
enum {
	IN_CUSTODY,
	GONE,
	BROUGHT,
	GOES_ON,	/* there are more parts of step 1 to do */
};

/* Files of a workload, in the order in which they are needed. */
enum part {
	DEVICES,	/* VFIO and iommufd files */
	MAPPED,		/* memory that an IOAS maps */
	UNMAPPED,	/* other memory */
};

struct session {
	int fd;
	bool outgoing;
	bool committed;		/* outgoing: has an image */
	char origin;
	char name[KHO_LUO_NAME_MAX];
	char fdname[FDSTORE_NAME_MAX];
};

struct transit {
	int fd;
	uint64_t token;
	char fdname[FDSTORE_NAME_MAX];
};

/* Everything found of one workload. Descriptors are owned by workload->stored. */
struct group {
	struct group *next;
	struct workload *w;
	struct session sessions[MAX_SESSIONS];
	size_t n_sessions;
	struct transit *transits;
	size_t n_transits;
	struct session *committed;	/* the outgoing one with an image, if there is one */
	struct session *target;		/* the outgoing one without, if there is one */
	int found;			/* what find_image() returned, and @err why */
	struct kho_error *err;
	bool secured;			/* steps 2 and 3 are done */
	bool empty;			/* @target has been made just now: there is nothing in it */
	bool prepared;			/* its image is the one to be preserved */
	bool quiesced;			/* its devices have been given up */
	bool expired;			/* because nobody claimed it; said already */
	bool doomed;			/* its devices cannot go on: a file is not there, or restore() failed */
	struct kho_error *lost;		/* why; NULL if there was no memory for the words */
	bool memory_lost;		/* @lost is about the first of these: */
	bool missing[KHO_IMAGE_FILES_MAX];	/* memfds that are lost, by their place in the image */
};

static void transit_fdname(const char *workload, uint64_t token, char ret[FDSTORE_NAME_MAX])
{
	snprintf(ret, FDSTORE_NAME_MAX, TRANSIT_PREFIX "%s+%" PRIu64, workload, token);
}

static bool transit_parse(const char *fdname, char name[KHO_NAME_MAX + 1], uint64_t *token)
{
	const char *p, *plus;
	char *end;

	if (strncmp(fdname, TRANSIT_PREFIX, strlen(TRANSIT_PREFIX)) != 0)
		return false;
	p = fdname + strlen(TRANSIT_PREFIX);
	plus = strchr(p, '+');
	if (!plus || plus == p || plus - p > KHO_NAME_MAX || plus[1] < '0' || plus[1] > '9')
		return false;
	memcpy(name, p, plus - p);
	name[plus - p] = 0;
	errno = 0;
	*token = strtoull(plus + 1, &end, 10);
	return errno == 0 && *end == 0 && kho_name_valid(name);
}

static struct group *group_get(struct khod *k, struct group **groups, const char *name)
{
	struct group *g;

	for (g = *groups; g; g = g->next)
		if (strcmp(g->w->name, name) == 0)
			return g;
	g = calloc(1, sizeof(*g));
	if (!g)
		return NULL;
	g->w = workload_new(k, name);
	if (!g->w) {
		free(g);
		return NULL;
	}
	g->next = *groups;
	*groups = g;
	return g;
}

static struct transit *transit_find(struct group *g, uint64_t token)
{
	for (size_t i = 0; i < g->n_transits; i++)
		if (g->transits[i].token == token)
			return &g->transits[i];
	return NULL;
}

static int transit_add(struct group *g, uint64_t token, const char *fdname, int fd)
{
	struct transit *t = reallocarray(g->transits, g->n_transits + 1, sizeof(*t));

	if (!t)
		return -ENOMEM;
	g->transits = t;
	t += g->n_transits++;
	t->fd = fd;
	t->token = token;
	snprintf(t->fdname, sizeof(t->fdname), "%s", fdname);
	return 0;
}

/*
 * Sort one descriptor. Takes ownership of @p->fd in every case. What is not known
 * stays in the store: another version of khod may know it.
 */
static void sort_one(struct khod *k, struct group **groups, struct passed *p)
{
	char session[KHO_LUO_NAME_MAX], name[KHO_NAME_MAX + 1];
	_cleanup_error_ struct kho_error *err = NULL;
	_cleanup_free_ char *text = NULL;
	struct group *g;
	uint64_t token;
	char origin;
	int r;

	k->fdstore.used++;
	if (transit_parse(p->fdname, name, &token)) {
		g = group_get(k, groups, name);
		if (!g || workload_add_stored(g->w, p->fdname, p->fd) < 0)
			goto nomem;
		if (transit_find(g, token))
			return;	/* the same object twice: stored under one name, removed by it */
		if (transit_add(g, token, p->fdname, p->fd) < 0)
			workload_fail(g->w, NULL, -ENOMEM);
		return;
	}

	r = kho_luo_session_name(k->kho, p->fd, session, &err);
	if (r < 0 || !session_parse(session, name, &origin)) {
		log_event(LOG_WARNING, MSG_FOREIGN, NULL,
			  "The fd store holds a descriptor that this khod does not know; it is left alone.");
		p->fd = kho_close(k->kho, p->fd);
		return;
	}
	g = group_get(k, groups, name);
	if (!g)
		goto nomem;
	for (size_t i = 0; i < g->n_sessions; i++)
		if (strcmp(g->sessions[i].name, session) == 0 &&
		    strcmp(g->sessions[i].fdname, p->fdname) == 0) {
			/* The same session twice: names are unique in the kernel. */
			p->fd = kho_close(k->kho, p->fd);
			return;
		}
	if (workload_add_stored(g->w, p->fdname, p->fd) < 0)
		goto nomem;
	r = kho_luo_session_direction(k->kho, p->fd, &err);
	if (r >= 0 && g->n_sessions == MAX_SESSIONS)
		r = kho_error_new(&err, E2BIG, name, "more than %d sessions", MAX_SESSIONS);
	if (r >= 0) {
		struct session *s = &g->sessions[g->n_sessions++];

		*s = (struct session){
			.fd = p->fd,
			.outgoing = r == KHO_LUO_OUTGOING,
			.origin = origin,
		};
		strcpy(s->name, session);
		snprintf(s->fdname, sizeof(s->fdname), "%s", p->fdname);
		if (s->outgoing) {
			r = kho_luo_session_has(k->kho, s->fd, KHO_TOKEN_IMAGE, &err);
			s->committed = r > 0;
		}
	}
	if (r < 0)
		workload_fail(g->w, &err, r);
	return;

nomem:
	/* systemd keeps it; the next start sees it again. */
	text = kho_error_format(err, -ENOMEM);
	log_event(LOG_ERR, MSG_FAILED, NULL, "A descriptor from the fd store could not be examined: %s.",
		  text ? text : "out of memory");
	p->fd = kho_close(k->kho, p->fd);
}

static int session_drop(struct khod *k, struct group *g, struct session *s,
			struct kho_error **err)
{
	int r = workload_unstore(k, g->w, s->fdname, err);

	if (r < 0)
		return r;
	/* Order matters to the caller, the array's does not. */
	*s = g->sessions[--g->n_sessions];
	return 0;
}

static int transits_drop(struct khod *k, struct group *g, struct kho_error **err)
{
	while (g->n_transits > 0) {
		struct transit *t = &g->transits[g->n_transits - 1];
		int r = workload_unstore(k, g->w, t->fdname, err);

		if (r < 0)
			return r;
		g->n_transits--;
		FAULT(START_INCOMING_TRANSIT_REMOVED);
	}
	return 0;
}

/* A complete outgoing session: the resting state, once the rest is tidied away. */
static int rest(struct khod *k, struct group *g, struct session *committed,
		struct kho_error **err)
{
	struct workload *w = g->w;
	char name[KHO_LUO_NAME_MAX];
	int r, fd;

	strcpy(name, committed->name);
	w->session = committed->fd;
	strcpy(w->session_name, name);

	for (size_t i = 0; i < g->n_sessions;) {
		struct session *s = &g->sessions[i];

		if (strcmp(s->name, name) == 0) {
			i++;
			continue;
		}
		if (!s->outgoing) {
			/* Finished long ago by our own order; if not, it is not ours to discard. */
			fd = kho_luo_retrieve(k->kho, s->fd, KHO_TOKEN_IMAGE, NULL);
			if (fd != -ENOENT) {
				kho_close(k->kho, fd);
				return kho_error_new(err, EBUSY, s->name,
						     "unfinished beside a complete session of the same workload");
			}
		}
		r = session_drop(k, g, s, err);
		if (r < 0)
			return r;
	}
	r = transits_drop(k, g, err);
	if (r < 0)
		return r;

	if (!w->image) {
		fd = kho_luo_retrieve(k->kho, w->session, KHO_TOKEN_IMAGE, err);
		if (fd == -EINVAL) {
			*err = kho_error_free(*err);
			k->retrieve_outgoing = false;
			w->state = WORKLOAD_UNREADABLE;
			return 0;
		}
		if (fd < 0)
			return fd;
		k->retrieve_outgoing = true;
		r = kho_image_read_fd(k->kho, fd, true, &w->image, err);
		kho_close(k->kho, fd);
		if (r < 0)
			return r;
	}
	if (strcmp(kho_image_name(w->image), w->name) != 0)
		return kho_error_new(err, EBADMSG, w->name, "its session holds the image of '%s'",
				     kho_image_name(w->image));
	w->state = WORKLOAD_HELD;
	return 0;
}

/* The image from transit or from any incoming session. -ENOENT: there is none. */
static int find_image(struct khod *k, struct group *g, int *ret, struct kho_error **err)
{
	struct transit *t = transit_find(g, TOKEN_QUIESCED);
	int fd = -1, r;

	g->quiesced = t != NULL;
	if (!t)
		t = transit_find(g, KHO_TOKEN_IMAGE);
	g->prepared = t != NULL;
	if (t) {
		r = kho_image_read_fd(k->kho, t->fd, true, &g->w->image, err);
	} else {
		r = -ENOENT;
		for (size_t i = 0; i < g->n_sessions && fd < 0; i++) {
			struct kho_error *e = NULL;

			if (g->sessions[i].outgoing)
				continue;
			fd = kho_luo_retrieve(k->kho, g->sessions[i].fd, KHO_TOKEN_IMAGE, &e);
			if (fd < 0 && fd != -ENOENT) {
				*err = e;
				return kho_error_new(err, fd, g->w->name, "the image");
			}
			kho_error_free(e);
		}
		if (fd < 0)
			return r;
		FAULT(START_INCOMING_IMAGE_RETRIEVED);
		r = kho_image_read_fd(k->kho, fd, true, &g->w->image, err);
	}
	if (r >= 0 && strcmp(kho_image_name(g->w->image), g->w->name) != 0)
		r = kho_error_new(err, EBADMSG, g->w->name, "its session holds the image of '%s'",
				  kho_image_name(g->w->image));
	if (r < 0) {
		g->w->image = kho_image_free(g->w->image);
		kho_close(k->kho, fd);
		/* -ENOENT is our own answer; the kernel's would be taken for it. */
		return r == -ENOENT ? -EIO : r;
	}
	*ret = fd;
	return 0;
}

/* One file into w->fds, see find_files(). */
static int find_file(struct khod *k, struct group *g, struct session *target, size_t i,
		     const struct kho_image_file *f, struct kho_error **err)
{
	struct workload *w = g->w;
	struct transit *t = transit_find(g, f->token);
	int r = -ENOENT;

	if (t) {
		r = kho_op(k->kho, fcntl, t->fd, F_DUPFD_CLOEXEC, 3);
		if (r < 0)
			return kho_error_new(err, r, f->name, "%s", strerror(-r));
		w->fds[i] = r;
		return 0;
	}
	khod_busy(k, f->size);
	for (size_t j = 0; j < g->n_sessions && r == -ENOENT; j++) {
		if (g->sessions[j].outgoing)
			continue;
		*err = kho_error_free(*err);
		r = kho_luo_retrieve(k->kho, g->sessions[j].fd, f->token, err);
	}
	if (r >= 0) {
		w->fds[i] = r;
		FAULT(START_INCOMING_FILE_RETRIEVED);
		return 0;
	}
	if (r == -ENOENT && target) {
		*err = kho_error_free(*err);
		r = kho_luo_session_has(k->kho, target->fd, f->token, err);
		if (r > 0)
			return 0;
		if (r == 0)
			r = kho_error_new(err, ENOENT, w->name, "nothing is preserved under token %" PRIu64,
					  f->token);
	}
	if (r == -ENOENT && !*err)
		kho_error_new(err, ENOENT, w->name, "no session holds it");
	kho_error_new(err, r, f->name, "is missing");
	if (f->kind == KHO_FILE_MEMFD)
		return r;
	g->doomed = true;
	if (!g->lost)
		g->lost = TAKE_PTR(*err);
	*err = kho_error_free(*err);
	return 0;
}

static int no_files(struct workload *w, struct kho_error **err)
{
	size_t n = workload_n_files(w);

	w->fds = malloc((n + 1) * sizeof(int));
	if (!w->fds)
		return kho_error_new(err, ENOMEM, w->name, "out of memory");
	for (size_t i = 0; i < n; i++)
		w->fds[i] = -1;
	return 0;
}

/*
 * The files that are @part into w->fds, from transit or an incoming session; -1 where the new session
 * has it already and nothing else does, or where a device is lost (g->doomed).
 */
static int find_files(struct khod *k, struct group *g, struct session *target, enum part part,
		      struct kho_error **err)
{
	/* Of the devices first what the kernel waits for. */
	static const enum kho_file_kind order[] = { KHO_FILE_VFIO, KHO_FILE_IOMMUFD, KHO_FILE_MEMFD };
	bool mapped[KHO_IMAGE_FILES_MAX];
	struct workload *w = g->w;
	size_t n = workload_n_files(w);
	int r;

	graph_mapped(w->image, mapped);
	for (size_t i = 0; i < ARRAY_SIZE(order) * n; i++) {
		struct kho_image_file f = {};

		kho_image_file(w->image, i % n, &f);
		if (f.kind != order[i / n] || w->fds[i % n] >= 0)
			continue;
		if (part != (f.kind != KHO_FILE_MEMFD ? DEVICES : mapped[i % n] ? MAPPED : UNMAPPED))
			continue;
		r = find_file(k, g, target, i % n, &f, err);
		if (r >= 0)
			continue;
		if (!kho_image_has_devices(w->image))
			return r;
		/*
		 * Whoever has devices cannot wait until somebody looks after it: they write into
		 * that memory. What the kernel could not restore it will not restore the next time
		 * either; if that was not it, it will.
		 */
		*err = kho_error_free(*err);
		r = find_file(k, g, target, i % n, &f, err);
		if (r >= 0)
			continue;
		/* Of all that is lost, that is what its client has to know. */
		if (!g->memory_lost) {
			kho_error_free(g->lost);
			g->lost = TAKE_PTR(*err);
		}
		*err = kho_error_free(*err);
		g->missing[i % n] = g->memory_lost = g->doomed = true;
	}
	return 0;
}

static int into_transit(struct khod *k, struct group *g, uint64_t token, int fd,
			struct kho_error **err)
{
	char fdname[FDSTORE_NAME_MAX];
	int copy, r;

	if (transit_find(g, token))
		return 0;
	transit_fdname(g->w->name, token, fdname);
	copy = kho_op(k->kho, fcntl, fd, F_DUPFD_CLOEXEC, 3);
	if (copy < 0)
		return kho_error_new(err, copy, g->w->name, "%s", strerror(-copy));
	r = fdstore_push(&k->fdstore, fdname, copy, err);
	if (r < 0) {
		kho_close(k->kho, copy);
		return r;
	}
	if (workload_add_stored(g->w, fdname, copy) < 0) {
		kho_close(k->kho, copy);
		return kho_error_new(err, ENOMEM, g->w->name, "out of memory");
	}
	if (transit_add(g, token, fdname, copy) < 0)
		return kho_error_new(err, ENOMEM, g->w->name, "out of memory");
	FAULT(START_INCOMING_TRANSIT_STORED);
	return 0;
}

static int new_target(struct khod *k, struct group *g, struct session **ret,
		      struct kho_error **err)
{
	struct session *s;
	char name[KHO_LUO_NAME_MAX];
	int fd, r;

	if (g->n_sessions == MAX_SESSIONS)
		return kho_error_new(err, E2BIG, g->w->name, "more than %d sessions",
				     MAX_SESSIONS);
	fd = session_new(k, g->w->name, 't', name, err);
	if (fd < 0)
		return fd;
	FAULT(START_INCOMING_SESSION_CREATED);

	s = &g->sessions[g->n_sessions];
	*s = (struct session){ .fd = fd, .outgoing = true, .origin = 't' };
	strcpy(s->name, name);
	session_fdname(name, s->fdname);
	r = fdstore_push(&k->fdstore, s->fdname, fd, err);
	if (r < 0) {
		kho_close(k->kho, fd);
		return r;
	}
	if (workload_add_stored(g->w, s->fdname, fd) < 0) {
		(void)fdstore_remove(&k->fdstore, s->fdname, NULL);
		kho_close(k->kho, fd);
		return kho_error_new(err, ENOMEM, g->w->name, "out of memory");
	}
	g->n_sessions++;
	FAULT(START_INCOMING_SESSION_STORED);
	*ret = s;
	return 0;
}

/* What is in transit and not in the image any more: closing it stops a device. */
static int drop_given_up(struct khod *k, struct group *g, struct kho_error **err)
{
	for (size_t i = 0; i < g->n_transits;) {
		struct transit *t = &g->transits[i];
		bool keep = t->token == KHO_TOKEN_IMAGE || t->token == TOKEN_QUIESCED;
		int r;

		for (size_t j = 0; !keep && j < workload_n_files(g->w); j++) {
			struct kho_image_file f = {};

			kho_image_file(g->w->image, j, &f);
			keep = f.token == t->token;
		}
		if (keep) {
			i++;
			continue;
		}
		r = workload_unstore(k, g->w, t->fdname, err);
		if (r < 0)
			return r;
		g->transits[i] = g->transits[--g->n_transits];
	}
	return 0;
}

/*
 * A session in which devices were preserved already would keep them running. The memfds are
 * in transit, too, as long as it has no image.
 */
static int drop_targets(struct khod *k, struct group *g, struct kho_error **err)
{
	for (size_t i = 0; i < workload_n_files(g->w); i++)
		if (g->w->fds[i] < 0)
			return kho_error_new(err, ENOENT, g->w->name, "a memfd is in an unfinished session only");
	for (size_t i = 0; i < g->n_sessions;) {
		int r;

		if (!g->sessions[i].outgoing) {
			i++;
			continue;
		}
		r = session_drop(k, g, &g->sessions[i], err);
		if (r < 0)
			return r;
	}
	return 0;
}

/* The devices cannot be restored, for @why: decide so, and stop them. */
static int quiesce(struct khod *k, struct group *g, struct kho_error *why, struct kho_error **err)
{
	struct workload *w = g->w;
	size_t n = workload_n_files(w), kept = 0;
	_cleanup_free_ char *text = kho_error_format(why, EIO);
	_cleanup_free_ int *fds = calloc(n + 1, sizeof(int));
	bool release = kho_image_restore_failure(w->image) == KHO_RESTORE_FAILURE_RELEASE;
	enum kho_file_kind kinds[KHO_IMAGE_FILES_MAX];
	int fd, r;

	if (!fds)
		return kho_error_new(err, ENOMEM, w->name, "out of memory");
	for (size_t i = 0; i < n; i++) {
		struct kho_image_file f = {};

		kho_image_file(w->image, i, &f);
		kinds[i] = f.kind;
	}
	for (size_t i = n; i > 0; i--)
		if (g->missing[i - 1] || (release && kinds[i - 1] == KHO_FILE_MEMFD))
			kho_image_drop_file(w->image, i - 1);
	kho_image_drop_devices(w->image);
	kho_image_set_outcome(w->image, KHO_OUTCOME_QUIESCED, text);
	if (!g->prepared)
		kho_image_set_handovers(w->image, kho_image_handovers(w->image) + 1);
	/* w->fds goes with the files of the image. */
	memcpy(fds, w->fds, n * sizeof(int));
	for (size_t i = 0; i < n; i++)
		if (kinds[i] == KHO_FILE_MEMFD && !g->missing[i] && !release)
			w->fds[kept++] = fds[i];

	fd = kho_image_write_memfd(k->kho, w->image, err);
	r = fd < 0 ? fd : into_transit(k, g, TOKEN_QUIESCED, fd, err);
	kho_close(k->kho, fd);
	if (r >= 0)
		FAULT(QUIESCE_DECIDED);
	/* Devices first; a device that is closed is bound to nothing any more. */
	for (size_t i = 0; i < n; i++)
		if (kinds[i] == KHO_FILE_VFIO)
			kho_close(k->kho, fds[i]);
	for (size_t i = 0; i < n; i++)
		if (kinds[i] == KHO_FILE_IOMMUFD)
			kho_close(k->kho, fds[i]);
	/* The incoming session has it until the devices have been stopped. */
	for (size_t i = 0; release && i < n; i++)
		if (kinds[i] == KHO_FILE_MEMFD)
			kho_close(k->kho, fds[i]);
	if (r < 0)
		return r;
	timeline_ended(k, KHO_MARK_QUIESCED, w->name);
	g->prepared = g->quiesced = true;
	return 0;
}

/* Restored, or to be quiesced (g->doomed). */
static void restore(struct khod *k, struct group *g)
{
	struct workload *w = g->w;
	struct kho_error *why = NULL;
	size_t steps = 0;

	if (g->doomed)
		return;
	if (workload_restore(k, w->image, w->fds, &steps, &why) < 0) {
		g->doomed = true;
		g->lost = why;
		return;
	}
	if (g->prepared)
		return;
	kho_image_set_outcome(w->image, KHO_OUTCOME_RESTORED, NULL);
	log_event(LOG_INFO, MSG_RESTORED, w->name,
		  "Workload %s is restored: its devices are under new page tables (%zu steps, %zu areas).",
		  w->name, steps, kho_graph_n_areas(kho_image_graph(w->image)));
}

/* The image as it will be preserved; that it is in transit says that we have been here. */
static int prepare(struct khod *k, struct group *g, struct kho_error **err)
{
	int fd, r;

	if (g->prepared)
		return 0;
	kho_image_set_handovers(g->w->image, kho_image_handovers(g->w->image) + 1);
	fd = kho_image_write_memfd(k->kho, g->w->image, err);
	if (fd < 0)
		return fd;
	r = into_transit(k, g, KHO_TOKEN_IMAGE, fd, err);
	kho_close(k->kho, fd);
	g->prepared = r >= 0;
	return r;
}

/* Everything into transit. */
static int all_into_transit(struct khod *k, struct group *g, struct kho_error **err)
{
	struct workload *w = g->w;
	int r = prepare(k, g, err);

	for (size_t i = 0; r >= 0 && i < workload_n_files(w); i++) {
		struct kho_image_file f = {};

		if (w->fds[i] < 0)
			continue;
		kho_image_file(w->image, i, &f);
		r = into_transit(k, g, f.token, w->fds[i], err);
	}
	return r;
}

/* The new session is the workload's: something is held, whatever comes next. */
static void take_target(struct group *g)
{
	g->w->session = g->target->fd;
	snprintf(g->w->session_name, sizeof(g->w->session_name), "%s", g->target->name);
}

/* Steps 2 and 3, in a batch: nothing may rely on it before systemd has confirmed it. */
static int secure(struct khod *k, struct group *g, struct kho_error **err)
{
	int r = all_into_transit(k, g, err);

	if (r < 0 || g->quiesced)
		return r < 0 ? r : 0;
	if (!g->target) {
		r = new_target(k, g, &g->target, err);
		g->empty = r >= 0;
	}
	if (r >= 0)
		take_target(g);
	return r < 0 ? r : 0;
}

/* Of a workload whose devices were given up: after step 2 is confirmed, and instead of step 3. */
static int secure_quiesced(struct khod *k, struct group *g, struct kho_error **err)
{
	int r = drop_given_up(k, g, err);

	if (r >= 0)
		r = drop_targets(k, g, err);
	return r < 0 ? r : new_target(k, g, &g->target, err);
}

/* Step 4 of one session. */
static int finish_one(struct khod *k, const struct session *s, struct kho_error **err)
{
	int r = kho_luo_finish(k->kho, s->fd, err);

	return r < 0 ? kho_error_new(err, r, s->name, "the incoming session") : 0;
}

/* Steps 4 and 5. */
static int finish(struct khod *k, struct group *g, struct kho_error **err)
{
	int r;

	for (size_t i = 0; i < g->n_sessions;) {
		struct session *s = &g->sessions[i];

		if (s->outgoing) {
			i++;
			continue;
		}
		/* With devices that were given up it is not finished: its last close stops them. */
		r = g->quiesced ? 0 : finish_one(k, s, err);
		if (r < 0)
			return r;
		FAULT(START_INCOMING_FINISHED);
		r = session_drop(k, g, s, err);
		if (r < 0 && g->quiesced)
			return r;
		/* systemd-shutdown may have taken PID 1's place. What is finished is in nobody's way. */
		if (r < 0) {
			*err = kho_error_free(*err);
			i++;
			continue;
		}
		FAULT(START_INCOMING_OLD_REMOVED);
	}
	return 0;
}

/* Steps 6 and 7. */
static int preserve_again(struct khod *k, struct group *g, struct kho_error **err)
{
	int r = workload_preserve(k, g->w, g->w->fds, true, err);

	if (r >= 0)
		r = image_commit(k, g->w->image, g->w->session, err);
	if (r >= 0)
		FAULT(START_INCOMING_IMAGE_PRESERVED);
	return r;
}

/* Step 1, first part: its devices are here, and the kernel's time for them does not run any more. */
static int bring_devices(struct khod *k, struct group *g, struct kho_error **err)
{
	int r = no_files(g->w, err);

	return r < 0 ? r : find_files(k, g, g->target, DEVICES, err);
}

/* Second part: they are under page tables of this kernel, or to be stopped. */
static int bring_back(struct khod *k, struct group *g, struct kho_error **err)
{
	int r = find_files(k, g, g->target, MAPPED, err);

	if (r < 0)
		return r;
	timeline_ended(k, KHO_MARK_RETRIEVED, g->w->name);
	if (kho_image_has_devices(g->w->image))
		restore(k, g);
	return 0;
}

/* Third part: all of its files are here, and its devices are stopped if nobody could make use of them. */
static int bring_rest(struct khod *k, struct group *g, struct kho_error **err)
{
	struct workload *w = g->w;
	int r = find_files(k, g, g->target, UNMAPPED, err);

	/* What is kept of it is decided once, so all of it has to be there. */
	if (r >= 0 && g->doomed && kho_image_has_devices(w->image))
		r = quiesce(k, g, g->lost, err);
	if (r >= 0)
		timeline_ended(k, KHO_MARK_RETRIEVED, w->name);
	/* One from transit has it, unless the kernel was replaced in the middle of all this. */
	if (r >= 0 && !g->quiesced && !(g->prepared && kho_image_arrived_usec(w->image, k->boot_id)))
		r = kho_image_set_arrived(w->image, k->boot_id, boottime_usec(), err);
	return r;
}

/* Step 1 of one alone. */
static int bring(struct khod *k, struct group *g, struct kho_error **err)
{
	int r = bring_devices(k, g, err);

	if (r >= 0)
		r = bring_back(k, g, err);
	return r < 0 ? r : bring_rest(k, g, err);
}

/* Steps 4 to 8, from wherever they were left. */
static int transfer(struct khod *k, struct group *g, struct kho_error **err)
{
	struct workload *w = g->w;
	int r = g->quiesced ? secure_quiesced(k, g, err) : 0;

	if (r < 0)
		return r;
	take_target(g);

	/* Nothing waits for what is removed from here on, but a device that is to be stopped. */
	if (!g->quiesced)
		fdstore_batch(&k->fdstore);
	r = finish(k, g, err);
	if (r < 0)
		goto out;
	timeline_ended(k, KHO_MARK_FINISHED, w->name);
	if (g->quiesced && !g->expired) {
		FAULT(QUIESCE_STOPPED);
		log_event(LOG_ERR, MSG_QUIESCED, w->name,
			  "The devices of workload %s have been stopped%s: %s.", w->name,
			  kho_image_restore_failure(w->image) == KHO_RESTORE_FAILURE_RELEASE ?
				  ", and its memory freed, as it asked for" : "",
			  kho_image_reason(w->image));
	}

	r = preserve_again(k, g, err);
	if (r >= 0)
		r = transits_drop(k, g, err);
	timeline_ended(k, KHO_MARK_PRESERVED, w->name);
out:
	fdstore_unbatch(&k->fdstore);
	return r;
}

/* Steps 2 to 8 of one alone. */
static int transfer_now(struct khod *k, struct group *g, struct kho_error **err)
{
	int r, late;

	fdstore_batch(&k->fdstore);
	r = secure(k, g, err);
	late = fdstore_confirm(&k->fdstore, g->w->name, r < 0 ? NULL : err);
	if (r < 0 || late < 0)
		return r < 0 ? r : late;
	return transfer(k, g, err);
}

/* Are its files all open here? */
static bool all_here(const struct workload *w)
{
	for (size_t i = 0; w->fds && i < workload_n_files(w); i++)
		if (w->fds[i] < 0)
			return false;
	return w->fds != NULL;
}

static void drop_fds(struct khod *k, struct workload *w)
{
	for (size_t i = 0; w->fds && i < workload_n_files(w); i++)
		kho_close(k->kho, w->fds[i]);
	free(w->fds);
	w->fds = NULL;
}

/* Where the kernel gives files back there is no need to keep them; elsewhere there is. */
static void settle_fds(struct khod *k, struct workload *w)
{
	bool all = all_here(w);
	int fd;

	fd = kho_luo_retrieve(k->kho, w->session, KHO_TOKEN_IMAGE, NULL);
	if (fd >= 0)
		k->retrieve_outgoing = true;
	else if (fd == -EINVAL)
		k->retrieve_outgoing = false;
	if (fd >= 0 || !all)
		drop_fds(k, w);
	w->state = fd >= 0 || all ? WORKLOAD_HELD : WORKLOAD_UNREADABLE;
	kho_close(k->kho, fd);
}

/*
 * Nothing of it was ever promised to anybody: a registration that was not answered,
 * in this kernel or the previous one. 0 if it is discarded.
 */
static int discard(struct khod *k, struct group *g, struct kho_error **err)
{
	while (g->n_sessions > 0) {
		struct session *s = &g->sessions[0];
		char fdname[FDSTORE_NAME_MAX];
		int fd = s->fd, r;

		/* Keep our own open until it is out of the store, to end it in one place. */
		strcpy(fdname, s->fdname);
		g->w->session = fd;
		r = session_drop(k, g, s, err);
		if (r < 0)
			return r;
		FAULT(START_OUTGOING_REMOVED);
		kho_close(k->kho, fd);
		g->w->session = -1;
		FAULT(START_OUTGOING_DISCARDED);
	}
	return 0;
}

/* Is there nothing any more in an incoming session, as it has been finished? */
static bool is_empty(struct khod *k, const struct session *s)
{
	for (uint64_t token = KHO_TOKEN_IMAGE; token <= KHO_IMAGE_FILES_MAX; token++) {
		int fd = kho_luo_retrieve(k->kho, s->fd, token, NULL);

		kho_close(k->kho, fd);
		if (fd != -ENOENT)
			return false;
	}
	return true;
}

/*
 * Of a workload without an image: has its client got all of it? Then everything that came over the
 * kexec was finished, and the image was the first that was taken out of transit, in this kernel.
 */
static bool remains_of_claim(struct khod *k, const struct group *g)
{
	for (size_t i = 0; i < g->n_sessions; i++)
		if (!g->sessions[i].outgoing && !is_empty(k, &g->sessions[i]))
			return false;
	return manifest_of_this_boot(k);
}

/* What is there of the workload, and its image, unless it is at rest already. */
static void look(struct khod *k, struct group *g)
{
	int fd = -1;

	for (size_t i = 0; i < g->n_sessions; i++) {
		struct session *s = &g->sessions[i];

		if (s->outgoing && s->committed)
			g->committed = s;
		else if (s->outgoing)
			g->target = s;
	}
	if (g->w->state == WORKLOAD_FAILED || g->committed)
		return;
	if (!g->target || g->n_sessions > 1 || g->n_transits > 0)
		FAULT(START_INCOMING_BEGIN);
	else
		FAULT(START_OUTGOING_BEGIN);
	g->found = find_image(k, g, &fd, &g->err);
	kho_close(k->kho, fd);
}

/*
 * What is there decides what is done. Return: GONE, IN_CUSTODY, GOES_ON (the first part of step 1 is
 * done), -errno.
 */
static int first_part(struct khod *k, struct group *g)
{
	struct kho_error **err = &g->err;
	bool only_r = true;
	int r;

	if (g->w->state == WORKLOAD_FAILED)
		return IN_CUSTODY;	/* could not even be sorted; everything is where it was */
	if (g->committed) {
		FAULT(START_OUTGOING_BEGIN);
		return rest(k, g, g->committed, err);
	}
	if (g->found == -ENOENT) {
		/*
		 * No image anywhere. A registration that was not answered leaves only a
		 * session of its own kind; anything else is not understood, and kept.
		 */
		for (size_t i = 0; i < g->n_sessions; i++)
			only_r &= g->sessions[i].origin == 'r';
		if ((g->n_transits == 0 && only_r) || remains_of_claim(k, g)) {
			r = transits_drop(k, g, err);
			if (r >= 0)
				r = discard(k, g, err);
			return r < 0 ? r : GONE;
		}
		return kho_error_new(err, ENOENT, g->w->name,
				     "there is no image, so what it holds cannot be told; release it to discard it");
	}
	/* Whatever it has stays where it is: devices in the session, which nobody can tell from memory. */
	if (g->found < 0)
		return kho_error_new(err, g->found, g->w->name,
				     "nothing of it can be restored; if it has devices the kernel stops them when their time is up");
	r = bring_devices(k, g, err);
	return r < 0 ? r : GOES_ON;
}

static int second_part(struct khod *k, struct group *g)
{
	int r = bring_back(k, g, &g->err);

	return r < 0 ? r : GOES_ON;
}

/* To the end if they have to be stopped. */
static int third_part(struct khod *k, struct group *g)
{
	int r = bring_rest(k, g, &g->err);

	if (r >= 0 && g->quiesced)
		r = transfer_now(k, g, &g->err);
	return r < 0 ? r : BROUGHT;
}

/* A failed workload may still have all its files at hand; then it can be claimed. */
static void drop_partial_fds(struct khod *k, struct workload *w)
{
	if (!all_here(w))
		drop_fds(k, w);
}

static void failed(struct khod *k, struct workload *w)
{
	drop_partial_fds(k, w);
	log_event(LOG_ERR, MSG_FAILED, w->name,
		  "Workload %s could not be brought into order: %s. Nothing of it has been discarded.",
		  w->name, workload_reason(w));
}

static void group_free(struct group *g)
{
	free(g->transits);
	kho_error_free(g->lost);
	kho_error_free(g->err);
	free(g);
}

/* The end of it, as @r says. @g is freed. */
static void settle(struct khod *k, struct group *g, int r)
{
	struct workload *w = g->w;
	bool claiming = w->state == WORKLOAD_CLAIMING;

	if (r < 0)
		workload_fail(w, &g->err, r);
	if (w->state == WORKLOAD_FAILED) {
		failed(k, w);
	} else if (r == BROUGHT) {
		settle_fds(k, w);
		log_event(LOG_INFO, MSG_CARRIED, w->name,
			  "Workload %s was carried into this kernel (handover %" PRIu32 "): %zu files, %" PRIu64 " bytes, now in session %s.",
			  w->name, kho_image_handovers(w->image), workload_n_files(w), workload_bytes(w),
			  w->session_name);
	} else if (r == GONE) {
		log_event(LOG_NOTICE, MSG_DISCARDED, w->name,
			  "What was left of an unfinished registration, a lease or a claim of %s was discarded: its client has all.",
			  w->name);
		workload_free(k, w);
	}
	/* Its client has all of it, and is waited for. */
	if (claiming)
		w->state = WORKLOAD_CLAIMING;
	group_free(g);
	khod_idle(k);
}

/* Places in the fd store that steps 2 and 3 take. */
static size_t places(const struct group *g)
{
	return workload_n_files(g->w) + 2;
}

/* Steps 4 to 8. */
static void rest_of(struct khod *k, struct workload *w)
{
	struct group *g = w->brought;
	int r;

	w->brought = NULL;
	r = transfer(k, g, &g->err);
	settle(k, g, r < 0 ? r : BROUGHT);
}

void adopt_rest_of(struct khod *k, struct workload *w)
{
	if (w->brought)
		rest_of(k, w);
}

/* Those with devices first: a kexec that nobody waits with would stop them. */
static struct workload *next_rest(struct khod *k)
{
	struct workload *next = NULL;

	for (struct workload *w = k->workloads; w; w = w->next)
		if (w->brought && w->brought->secured && (!next || kho_image_has_devices(w->image)))
			next = w;
	return next;
}

void adopt_rest(struct khod *k)
{
	struct workload *w;

	while ((w = next_rest(k)))
		rest_of(k, w);
}

/* What is in transit, and what fails without it. */
static void confirm(struct khod *k)
{
	int late = fdstore_confirm(&k->fdstore, "fd store", NULL);

	for (struct workload *w = k->workloads; late < 0 && w; w = w->next) {
		struct group *g = w->brought;

		if (!g || !g->secured)
			continue;
		w->brought = NULL;
		settle(k, g, kho_error_new(&g->err, late, w->name,
					   "systemd did not confirm that the descriptors are stored: %s",
					   strerror(-late)));
	}
}

/*
 * Steps 2 and 3 of all. systemd is waited for once for as many of them as there are places for: at
 * boot it takes its time. These are moved to the end before others have their turn.
 */
void adopt_secure(struct khod *k)
{
	fdstore_batch(&k->fdstore);
	for (struct workload *w = k->workloads; w; w = w->next) {
		struct group *g = w->brought;
		int r;

		if (!g)
			continue;
		if (fdstore_room(&k->fdstore) < places(g) && next_rest(k)) {
			confirm(k);
			adopt_rest(k);
			fdstore_batch(&k->fdstore);
		}
		r = secure(k, g, &g->err);
		g->secured = r >= 0;
		if (r < 0) {
			w->brought = NULL;
			settle(k, g, r);
		}
	}
	confirm(k);
	/* What only its new session has any more cannot be given to anybody. */
	for (struct workload *w = k->workloads; w; w = w->next)
		if (w->brought && !all_here(w))
			rest_of(k, w);
}

static int on_rest(sd_event_source *s, uint64_t usec, void *userdata)
{
	struct khod *k = userdata;
	struct workload *w = next_rest(k);

	/* One at a time: in between clients are heard. */
	if (!w)
		return 0;
	rest_of(k, w);
	if (!next_rest(k)) {
		khod_status_line(k);
		return 0;
	}
	(void)sd_event_source_set_time(s, 0);
	return sd_event_source_set_enabled(s, SD_EVENT_ONESHOT);
}

void adopt_rest_later(struct khod *k)
{
	uint64_t ready = timeline_ready_usec(k), due = ready + k->preserve_delay_usec;
	int r;

	if (!next_rest(k))
		return;
	/* Not for the first time in this kernel: the machine may have started long ago. */
	r = ready == 0 || due <= boottime_usec() ? -ETIME :
	    sd_event_add_time(k->event, &k->rest, CLOCK_BOOTTIME, due, 0, on_rest, k);
	if (r < 0)
		adopt_rest(k);
}

/*
 * From step 4 on transit would be all there is of it, and its image decides: a khod that dies before that
 * is out of the store leaves the workload in custody, one that dies later leaves nothing but remains.
 */
int adopt_end(struct khod *k, struct workload *w, bool *left, struct kho_error **err)
{
	struct group *g = w->brought;
	struct transit *image = transit_find(g, KHO_TOKEN_IMAGE);
	int r = 0;

	for (size_t i = 0; r >= 0 && i < g->n_sessions; i++)
		r = g->sessions[i].outgoing ? 0 : finish_one(k, &g->sessions[i], err);
	if (r >= 0 && image)
		r = workload_unstore(k, w, image->fdname, err);
	*left = !g->empty;
	return r;
}

void adopt_forget(struct workload *w)
{
	if (w->brought)
		group_free(w->brought);
	w->brought = NULL;
}

/* The image that is left when devices are given up that run: no devices, by its policy no files. */
static int given_up_image(const struct kho_image *image, const char *why, struct kho_image **ret,
			  struct kho_error **err)
{
	_cleanup_image_ struct kho_image *copy = NULL;
	_cleanup_free_ void *buf = NULL;
	size_t size;
	int r;

	r = kho_image_encode(image, &buf, &size, err);
	if (r >= 0)
		r = kho_image_decode(buf, size, &copy, err);
	if (r < 0)
		return r;
	kho_image_drop_devices(copy);
	if (kho_image_restore_failure(copy) == KHO_RESTORE_FAILURE_RELEASE)
		while (kho_image_n_files(copy) > 0)
			kho_image_drop_file(copy, 0);
	kho_image_set_outcome(copy, KHO_OUTCOME_QUIESCED, why);
	*ret = TAKE_PTR(copy);
	return 0;
}

/* The memory that @left has, then @left, which decides: into the fd store, beside the session. */
static int decide(struct khod *k, struct group *g, const struct kho_image *left, struct kho_error **err)
{
	struct workload *w = g->w;
	int fd, r = 0, late;

	fdstore_batch(&k->fdstore);
	for (size_t i = 0; r >= 0 && i < workload_n_files(w); i++) {
		struct kho_image_file f = {};
		bool kept = false;

		kho_image_file(w->image, i, &f);
		for (size_t j = 0; j < kho_image_n_files(left); j++) {
			struct kho_image_file l = {};

			kho_image_file(left, j, &l);
			kept |= l.token == f.token;
		}
		if (!kept)
			continue;
		fd = w->fds ? w->fds[i] : kho_luo_retrieve(k->kho, w->session, f.token, err);
		r = fd < 0 ? fd : into_transit(k, g, f.token, fd, err);
		if (!w->fds)
			kho_close(k->kho, fd);
	}
	fd = r < 0 ? r : kho_image_write_memfd(k->kho, left, err);
	r = fd < 0 ? fd : into_transit(k, g, TOKEN_QUIESCED, fd, err);
	kho_close(k->kho, fd);
	late = fdstore_confirm(&k->fdstore, w->name, r < 0 ? NULL : err);
	return r < 0 ? r : late;
}

static void close_kind(struct khod *k, struct workload *w, enum kho_file_kind kind)
{
	for (size_t i = 0; w->fds && i < workload_n_files(w); i++) {
		struct kho_image_file f = {};

		kho_image_file(w->image, i, &f);
		if (f.kind == kind)
			w->fds[i] = kho_close(k->kho, w->fds[i]);
	}
}

/*
 * From the resting state to the state that quiesce() leaves behind, and on from there as at start.
 *
 *	1  the memory that is kept into the fd store, and the image without devices: "transit"
 *	2  the session out of the store and closed: the devices are stopped	from here on: given up
 *	3  steps 3 and 6 to 8 of the above
 *
 * Died before 2: the session is complete, so the next khod finds the workload at rest, drops what
 * is in transit, and begins again. After 2: it finds what an interrupted quiesce leaves. The same holds
 * for a kexec, but that before 2 the image in transit decides, and the devices are stopped
 * with the incoming session. The iommufd pins the memory until devices cannot write to it any more.
 */
int workload_give_up(struct khod *k, struct workload *w, const char *why, struct kho_error **err)
{
	struct group g = { .w = w, .prepared = true, .quiesced = true, .expired = true };
	char session[KHO_LUO_NAME_MAX], fdname[FDSTORE_NAME_MAX];
	_cleanup_image_ struct kho_image *left = NULL;
	int r;

	adopt_rest_of(k, w);
	if (w->state == WORKLOAD_FAILED)
		return kho_error_new(err, EIO, w->name, "%s", workload_reason(w));
	FAULT(EXPIRE_BEGIN);
	/* What could not be taken out again when this failed the last time. */
	for (size_t i = 0; i < w->n_stored; i++) {
		char name[KHO_NAME_MAX + 1];
		uint64_t token;

		if (transit_parse(w->stored[i].fdname, name, &token) &&
		    transit_add(&g, token, w->stored[i].fdname, w->stored[i].fd) < 0) {
			free(g.transits);
			return kho_error_new(err, ENOMEM, w->name, "out of memory");
		}
	}
	strcpy(session, w->session_name);
	session_fdname(session, fdname);
	r = given_up_image(w->image, why, &left, err);
	if (r >= 0)
		r = decide(k, &g, left, err);
	if (r >= 0)
		FAULT(EXPIRE_DECIDED);
	if (r >= 0)
		r = workload_unstore(k, w, fdname, err);
	if (r < 0) {
		/* What stays there is dropped by the next khod, or with the workload. */
		(void)transits_drop(k, &g, NULL);
		free(g.transits);
		return r;
	}
	FAULT(EXPIRE_REMOVED);

	close_kind(k, w, KHO_FILE_VFIO);
	close_kind(k, w, KHO_FILE_IOMMUFD);
	w->session = kho_close(k->kho, w->session);
	w->session_name[0] = 0;
	session_await_end(k, session);
	close_kind(k, w, KHO_FILE_MEMFD);
	free(w->fds);
	w->fds = NULL;
	kho_image_free(w->image);
	w->image = TAKE_PTR(left);
	FAULT(EXPIRE_STOPPED);

	r = bring(k, &g, err);
	if (r >= 0)
		r = transfer_now(k, &g, err);
	if (r < 0) {
		workload_fail(w, err, r);
		failed(k, w);
	} else {
		settle_fds(k, w);
	}
	free(g.transits);
	khod_idle(k);
	khod_status_line(k);
	return 0;
}

static int retrieve_session(struct khod *k, const char *session, struct kho_error **err)
{
	int r = kho_luo_session_retrieve(k->kho, session, err);

	/* PID 1 may have the device open just now. */
	for (int try = 0; r == -EBUSY && try < 10; try++) {
		*err = kho_error_free(*err);
		nanosleep(&(struct timespec){ .tv_nsec = 50 * 1000 * 1000 }, NULL);
		r = kho_luo_session_retrieve(k->kho, session, err);
	}
	return r;
}

/*
 * A session that was complete, and of which systemd has nothing: it could not retrieve it, once,
 * early in boot. What was held in this very kernel and is gone has been let go.
 */
static void find_missing(struct khod *k, const char *session, bool same_boot, void *userdata)
{
	_cleanup_error_ struct kho_error *err = NULL;
	char name[KHO_NAME_MAX + 1], origin;
	struct group **groups = userdata, *g;
	struct passed p;

	if (!session_parse(session, name, &origin))
		return;
	for (g = *groups; g; g = g->next)
		if (strcmp(g->w->name, name) == 0)
			return;
	p.fd = retrieve_session(k, session, &err);
	if (p.fd >= 0) {
		/* Into the store first: its last close would be its end. */
		session_fdname(session, p.fdname);
		if (fdstore_push(&k->fdstore, p.fdname, p.fd, &err) >= 0) {
			k->fdstore.used--;	/* counted once more as if it had been passed */
			sort_one(k, groups, &p);
			return;
		}
	}
	if (p.fd == -ENOENT && same_boot)
		return;
	g = group_get(k, groups, name);
	if (!g)
		return;
	/* Not stored, but open as long as khod is. */
	g->w->session = p.fd >= 0 ? p.fd : -1;
	snprintf(g->w->session_name, sizeof(g->w->session_name), "%s", session);
	workload_fail(g->w, &err, p.fd < 0 ? p.fd : -ENOSPC);
}

/* Each of @groups that has devices, or has none, goes on by @part of step 1, and out of them with the last. */
static void adopt_part(struct khod *k, struct group **groups, bool devices,
		       int (*part)(struct khod *k, struct group *g))
{
	for (struct group **p = groups; *p;) {
		struct group *g = *p;
		int r = GOES_ON;

		if (devices == (g->w->image && kho_image_has_devices(g->w->image)))
			r = part(k, g);
		if (r == GOES_ON) {
			p = &g->next;
			continue;
		}
		*p = g->next;
		g->next = NULL;
		if (r == BROUGHT && !g->quiesced)
			g->w->brought = g;
		else
			settle(k, g, r);
	}
}

/* Those with devices first: they do not wait for the memory of others. */
void adopt(struct khod *k, struct passed *passed, size_t n)
{
	static int (*const parts[])(struct khod *k, struct group *g) = {
		first_part, second_part, third_part
	};
	struct group *groups = NULL;

	for (size_t i = 0; i < n; i++)
		sort_one(k, &groups, &passed[i]);
	(void)manifest_each(k, find_missing, &groups);
	for (struct group *g = groups; g; g = g->next)
		look(k, g);

	for (int devices = 1; devices >= 0; devices--)
		for (size_t i = 0; i < ARRAY_SIZE(parts); i++)
			adopt_part(k, &groups, devices, parts[i]);
}
