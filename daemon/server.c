/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Clients.
 *
 * Every byte and every descriptor that comes in is charged to a user id and capped;
 * every wait has a deadline; every refusal tells the client what was refused and why,
 * and only names that passed kho_name_valid() reach the journal. A client that breaks
 * the protocol is told so and disconnected, with everything it sent closed.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <systemd/sd-login.h>

#include "closer.h"
#include "fault.h"
#include "khod.h"
#include "log.h"
#include "wire.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

#define QUEUE_MAX 64		/* packets waiting for a client that does not read */
#define VETO_MAX 200		/* bytes of a reason that are kept */
#define REPLY_SOFT_MAX 32768	/* bytes in one packet of a list */

struct packet {
	struct packet *next;
	size_t size;
	size_t n_fds;
	int *fds;		/* owned */
	uint8_t data[];
};

/* A registration that comes in more than one packet. */
struct pending {
	char name[KHO_NAME_MAX + 1];
	bool update;
	struct registration reg;	/* without what is below */
	uint8_t secret[KHO_SECRET_MAX];
	size_t secret_size;
	char **names;
	int *fds;		/* owned */
	size_t n;
};

struct connection {
	struct connection *next;
	struct khod *k;
	int fd;
	int pidfd;		/* the peer; -1: not known */
	struct identity who;
	bool hello;
	bool closing;		/* when the queue is empty */
	struct workload *claiming;
	bool preserving;	/* waits for the answer to Preserve */
	uint64_t preserve_serial;
	struct pending *pending;
	struct packet *queue, **queue_tail;
	unsigned int n_queue;
	sd_event_source *io;
	sd_event_source *timer;
	unsigned int deadline;	/* the one that the timer is set to, in seconds */
};

static void pending_free(uid_t uid, struct pending *p)
{
	if (!p)
		return;
	closer_add(uid, p->fds, p->n);
	for (size_t i = 0; i < p->n; i++)
		free(p->names[i]);
	explicit_bzero(p->secret, sizeof(p->secret));
	free(p->names);
	free(p->fds);
	free(p);
}

static void packet_free(struct khod *k, struct packet *p)
{
	for (size_t i = 0; i < p->n_fds; i++)
		kho_close(k->kho, p->fds[i]);
	free(p->fds);
	free(p);
}

/* The claim did not end: the workload is what it was before. */
static void claim_abandon(struct connection *c)
{
	if (!c->claiming)
		return;
	log_event(LOG_NOTICE, NULL, c->claiming->name,
		  "The client that claimed %s has gone without acknowledging; it stays in custody.",
		  c->claiming->name);
	c->claiming->state = c->claiming->reason ? WORKLOAD_FAILED : WORKLOAD_HELD;
	c->claiming = NULL;
	inhibit_update(c->k);
	deadline_update(c->k);
}

static void connection_free(struct connection *c)
{
	struct khod *k = c->k;

	for (struct connection **p = &k->connections; *p; p = &(*p)->next)
		if (*p == c) {
			*p = c->next;
			k->n_connections--;
			break;
		}
	claim_abandon(c);
	if (c->preserving)
		handover_forget(k, c);
	for (struct workload *w = k->workloads, *next; w; w = next) {
		next = w->next;
		if (w->client == c)
			handover_client_gone(k, w);
	}
	pending_free(c->who.uid, c->pending);
	while (c->queue) {
		struct packet *p = c->queue;

		c->queue = p->next;
		packet_free(k, p);
	}
	sd_event_source_disable_unref(c->io);
	sd_event_source_disable_unref(c->timer);
	closer_end_connection(c->who.uid, c->fd);
	if (c->pidfd >= 0)
		close(c->pidfd);
	free(c);
}

/* Nothing has to come from it for now. */
static bool may_be_silent(const struct connection *c)
{
	if (!c->hello || c->claiming || c->pending || c->closing || c->queue)
		return false;
	if (c->preserving)
		return true;
	for (const struct workload *w = c->k->workloads; w; w = w->next)
		if (w->client == c)
			return true;
	return false;
}

static void deadline(struct connection *c)
{
	unsigned int sec = !c->hello	? DEADLINE_HELLO :
			   c->claiming	? DEADLINE_ACK :
			   c->pending	? DEADLINE_REGISTER :
					  DEADLINE_IDLE;

	/* Other messages do not put off the end of what was begun. */
	if (c->deadline == sec && sec != DEADLINE_IDLE)
		return;
	c->deadline = sec;
	(void)sd_event_source_set_time_relative(c->timer, sec * 1000000ULL);
	(void)sd_event_source_set_enabled(c->timer, may_be_silent(c) ? SD_EVENT_OFF :
								       SD_EVENT_ONESHOT);
}

/* -EAGAIN: the rest waits for EPOLLOUT. Other errors: the peer has gone. */
static int flush(struct connection *c)
{
	struct khod *k = c->k;

	while (c->queue) {
		struct packet *p = c->queue;
		int r = kho_wire_send(k->kho, c->fd, p->data, p->size, p->fds, p->n_fds);

		if (r < 0)
			return r;
		c->queue = p->next;
		if (!c->queue)
			c->queue_tail = &c->queue;
		c->n_queue--;
		packet_free(k, p);
	}
	return 0;
}

/*
 * Queue a reply and send what can be sent. Takes ownership of @fds in every case.
 * Return: 0, or -errno if the connection is of no more use.
 */
static int reply(struct connection *c, uint64_t serial, Kho__Control__Reply *a, int *fds,
		 size_t n_fds)
{
	struct khod *k = c->k;
	struct packet *p;
	size_t size;
	int r;

	a->serial = serial;
	size = kho__control__reply__get_packed_size(a);
	p = size > KHO_WIRE_PACKET_MAX || c->n_queue >= QUEUE_MAX ? NULL :
								    malloc(sizeof(*p) + size);
	if (!p) {
		for (size_t i = 0; i < n_fds; i++)
			kho_close(k->kho, fds[i]);
		return -ENOBUFS;
	}
	*p = (struct packet){ .size = size };
	if (n_fds > 0) {
		p->fds = malloc(n_fds * sizeof(int));
		if (!p->fds) {
			for (size_t i = 0; i < n_fds; i++)
				kho_close(k->kho, fds[i]);
			free(p);
			return -ENOMEM;
		}
		memcpy(p->fds, fds, n_fds * sizeof(int));
		p->n_fds = n_fds;
	}
	kho__control__reply__pack(a, p->data);
	*c->queue_tail = p;
	c->queue_tail = &p->next;
	c->n_queue++;
	r = flush(c);
	return r == -EAGAIN ? 0 : r;
}

/* Let the event loop send what could not be sent at once; for what is said unasked. */
static void wait_for_reader(struct connection *c)
{
	(void)sd_event_source_set_io_events(c->io, c->queue ? EPOLLOUT : EPOLLIN);
	deadline(c);
}

/* What nobody has asked for. */
static int tell(struct connection *c, Kho__Control__Reply *a)
{
	int r = c->closing ? -ENOTCONN : reply(c, 0, a, NULL, 0);

	if (r >= 0)
		wait_for_reader(c);
	return r;
}

static int reply_error(struct connection *c, uint64_t serial, int errnum, const char *object,
		       const char *reason, bool fatal)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__Error e = KHO__CONTROL__ERROR__INIT;

	e.error = errnum < 0 ? -errnum : errnum;
	e.object = (char *)object;
	e.reason = (char *)reason;
	e.fatal = fatal;
	a.body_case = KHO__CONTROL__REPLY__BODY_ERROR;
	a.error = &e;
	if (fatal)
		c->closing = true;
	return reply(c, serial, &a, NULL, 0);
}

/* A refusal from below: its object, its sentence, its causes. Consumes @err. */
static int reply_refusal(struct connection *c, uint64_t serial, const char *what,
			 const char *workload, int r, struct kho_error **err)
{
	_cleanup_free_ char *text = NULL;
	const char *object = kho_error_object(*err), *reason;
	bool valid = workload && kho_name_valid(workload);

	text = kho_error_format(*err, r);
	reason = text ? text : strerror(-r);
	log_limited(valid ? workload : NULL, "Refused to %s %s for uid %u%s%s: %s.", what,
		    valid ? workload : workload ? "(a workload with an invalid name)" : "everything",
		    (unsigned int)c->who.uid, c->who.unit[0] ? ", unit " : "", c->who.unit,
		    strerror(-r));
	/* The object has a field of its own; do not say it twice. */
	if (*object && text && strncmp(text, object, strlen(object)) == 0 &&
	    strncmp(text + strlen(object), ": ", 2) == 0)
		reason = text + strlen(object) + 2;
	r = reply_error(c, serial, r, object, reason, false);
	*err = kho_error_free(*err);
	return r;
}

static int garbage(struct connection *c, uint64_t serial, int errnum, const char *reason)
{
	log_limited(NULL, "Client of uid %u%s%s breaks the protocol: %s. Disconnected.",
		    (unsigned int)c->who.uid, c->who.unit[0] ? ", unit " : "", c->who.unit,
		    reason);
	return reply_error(c, serial, errnum, "request", reason, true);
}

static int on_hello(struct connection *c, uint64_t serial, const Kho__Control__Hello *q)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__HelloReply h = KHO__CONTROL__HELLO_REPLY__INIT;
	char text[128];

	if (c->hello)
		return garbage(c, serial, EPROTO, "HELLO twice");
	if (q->min_version > KHO_WIRE_VERSION || q->max_version < KHO_WIRE_VERSION) {
		snprintf(text, sizeof(text),
			 "this khod speaks version %d, the client %" PRIu32 " to %" PRIu32 ": upgrade the older of the two",
			 KHO_WIRE_VERSION, q->min_version, q->max_version);
		return reply_error(c, serial, EPROTO, "version", text, true);
	}
	c->hello = true;
	h.version = KHO_WIRE_VERSION;
	h.server = (char *)"khod " KHO_VERSION;
	h.max_packet = KHO_WIRE_PACKET_MAX;
	h.max_fds_per_packet = KHO_WIRE_FDS_MAX;
	h.max_files_per_workload = KHO_IMAGE_FILES_MAX;
	a.body_case = KHO__CONTROL__REPLY__BODY_HELLO;
	a.hello = &h;
	return reply(c, serial, &a, NULL, 0);
}

/* Append a packet's files. Takes the descriptors; *@n_fds is 0 afterwards. */
static int pending_append(struct pending *p, const Kho__Control__Register *q, int *fds,
			  size_t *n_fds)
{
	size_t total = p->n + q->n_files;
	char **names;
	int *copy;

	names = reallocarray(p->names, total + 1, sizeof(*names));
	if (!names)
		return -ENOMEM;
	p->names = names;
	copy = reallocarray(p->fds, total + 1, sizeof(*copy));
	if (!copy)
		return -ENOMEM;
	p->fds = copy;
	for (size_t i = 0; i < q->n_files; i++) {
		names[p->n + i] = strdup(q->files[i]->name);
		if (!names[p->n + i]) {
			while (i > 0)
				free(names[p->n + --i]);
			return -ENOMEM;
		}
	}
	if (q->n_files > 0)
		memcpy(copy + p->n, fds, q->n_files * sizeof(int));
	p->n = total;
	*n_fds = 0;
	return 0;
}

static int take_policy(const Kho__Control__Policy *p, struct registration *reg)
{
	static const Kho__Control__Policy none = KHO__CONTROL__POLICY__INIT;

	if (!p)
		p = &none;
	if ((unsigned int)p->keep > KHO__CONTROL__KEEP_MODE__KEEP_LEASE ||
	    (unsigned int)p->survival > KHO__CONTROL__SURVIVAL__SURVIVAL_BEST_EFFORT ||
	    (unsigned int)p->restore_failure > KHO__CONTROL__RESTORE_FAILURE__RESTORE_FAILURE_RELEASE ||
	    p->prepare_msec > PREPARE_MSEC_MAX)
		return -EOPNOTSUPP;
	reg->lease = p->keep == KHO__CONTROL__KEEP_MODE__KEEP_LEASE;
	reg->prepare = p->prepare || reg->lease;
	reg->survival = p->survival == KHO__CONTROL__SURVIVAL__SURVIVAL_BEST_EFFORT ?
				KHO_SURVIVAL_BEST_EFFORT : KHO_SURVIVAL_MUST;
	reg->restore_failure =
		p->restore_failure == KHO__CONTROL__RESTORE_FAILURE__RESTORE_FAILURE_RELEASE ?
			KHO_RESTORE_FAILURE_RELEASE : KHO_RESTORE_FAILURE_QUIESCE;
	reg->prepare_msec = p->prepare_msec ? p->prepare_msec : PREPARE_MSEC;
	reg->claim_sec = p->claim_sec;
	reg->may_lose_irq = p->may_lose_irq;
	return 0;
}

/* From now on @c is asked before a handover, and its process is what runs until one. */
static void belongs_to(struct connection *c, struct workload *w, bool prepare)
{
	w->client = prepare ? c : NULL;
	if (c->pidfd >= 0)
		timeline_watch(c->k, w, c->pidfd);
	inhibit_update(c->k);
}

static int update_lease(struct connection *c, const struct pending *p, struct workload **w,
			struct kho_error **err)
{
	*w = workload_find(c->k, p->name);
	if (!*w || (*w)->client != c || !(*w)->lease)
		return kho_error_new(err, ENOENT, p->name[0] ? p->name : "workload",
				     "this connection has no lease of that name");
	if (!p->reg.lease)
		return kho_error_new(err, EINVAL, p->name, "a lease can be replaced by a lease only");
	return lease_update(c->k, *w, &p->reg, &c->who, err);
}

static int reply_registered(struct connection *c, uint64_t serial, const struct workload *w)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__RegisterReply done = KHO__CONTROL__REGISTER_REPLY__INIT;

	done.name = (char *)w->name;
	done.files = workload_n_files(w);
	done.session = (char *)w->session_name;
	a.body_case = KHO__CONTROL__REPLY__BODY_REGISTERED;
	a.registered = &done;
	return reply(c, serial, &a, NULL, 0);
}

static int on_register(struct connection *c, uint64_t serial, const Kho__Control__Register *q,
		       int *fds, size_t *n_fds)
{
	struct kho_error *err = NULL;
	struct workload *w = NULL;
	struct pending *p = c->pending;
	int r;

	if (q->n_files != *n_fds)
		return garbage(c, serial, EPROTO,
			       "REGISTER names another number of files than it brings descriptors");
	if (!p) {
		p = c->pending = calloc(1, sizeof(*p));
		if (!p)
			return reply_error(c, serial, ENOMEM, "khod", "out of memory", true);
		r = take_policy(q->policy, &p->reg);
		if (r < 0)
			return garbage(c, serial, EOPNOTSUPP, "REGISTER asks for a policy that this khod does not know");
		if (q->claim_secret.len > 0 && (q->claim_secret.len < KHO_SECRET_MIN ||
						q->claim_secret.len > KHO_SECRET_MAX))
			return garbage(c, serial, EINVAL, "a claim secret has 16 to 64 bytes");
		/* Its validity is judged below, where the answer names it. */
		snprintf(p->name, sizeof(p->name), "%s", kho_name_valid(q->name) ? q->name : "");
		if (q->claim_secret.len > 0)
			memcpy(p->secret, q->claim_secret.data, q->claim_secret.len);
		p->secret_size = q->claim_secret.len;
		p->update = q->update;
	} else if (strcmp(p->name, q->name) != 0) {
		return garbage(c, serial, EPROTO, "REGISTER goes on under another name");
	}
	if (p->n + q->n_files > KHO_IMAGE_FILES_MAX)
		return garbage(c, serial, E2BIG, "REGISTER with more files than a workload may have");
	r = pending_append(p, q, fds, n_fds);
	if (r < 0)
		return reply_error(c, serial, ENOMEM, "khod", "out of memory", true);
	if (q->more)
		return 0;

	p->reg.name = p->name;
	p->reg.secret = p->secret;
	p->reg.secret_size = p->secret_size;
	p->reg.names = p->names;
	p->reg.fds = p->fds;
	p->reg.n = p->n;
	r = p->update ? update_lease(c, p, &w, &err) :
			workload_register(c->k, &p->reg, &c->who, &w, &err);
	if (r < 0) {
		r = reply_refusal(c, serial, p->update ? "update" : "register", p->name, r, &err);
	} else {
		belongs_to(c, w, p->reg.prepare);
		r = reply_registered(c, serial, w);
		FAULT(REGISTER_ANSWERED);
	}
	pending_free(c->who.uid, c->pending);
	c->pending = NULL;
	return r;
}

/* A workload that the client may have, or a refusal already sent and NULL. */
static struct workload *find_authorised(struct connection *c, uint64_t serial, const char *what,
					const char *name, ProtobufCBinaryData secret,
					const Kho__Control__Owner *owner, int *ret)
{
	struct kho_error *err = NULL;
	struct workload *w;
	int r;

	w = kho_name_valid(name) ? workload_find(c->k, name) : NULL;
	if (!w) {
		r = kho_error_new(&err, ENOENT, kho_name_valid(name) ? name : "workload",
				  "there is no workload of that name");
	} else {
		r = workload_authorise(w, &c->who, owner ? &owner->uid : NULL, secret.data, secret.len,
				       &err);
		/* Whose name it is, is nobody else's business. */
		if (r < 0 && secret.len == 0 && !workload_visible(w, &c->who)) {
			err = kho_error_free(err);
			r = kho_error_new(&err, EPERM, name,
					  "it belongs to another user; root or the claim secret is needed");
		}
	}
	if (r < 0) {
		*ret = reply_refusal(c, serial, what, name, r, &err);
		return NULL;
	}
	return w;
}

static void add_id(Kho__Control__IdMap *m, Kho__Control__ObjectKind kind, uint64_t token,
		   uint32_t old_id, uint32_t id)
{
	kho__control__id_map__init(m);
	m->kind = kind;
	m->token = token;
	m->old_id = old_id;
	m->id = id;
}

/* What the client's ids have become. *@ret: an array, freed with both pointers. */
static int id_map(const struct kho_graph *g, Kho__Control__IdMap **ret,
		  Kho__Control__IdMap ***retp, size_t *n)
{
	size_t k = 0, max = 1;
	Kho__Control__IdMap *m, **mp;

	for (size_t i = 0; g && i < g->n_contexts; i++)
		max += g->contexts[i].n_ioas + g->contexts[i].n_hwpts + g->contexts[i].n_devices;
	m = calloc(max, sizeof(*m));
	mp = calloc(max, sizeof(*mp));
	if (!m || !mp) {
		free(m);
		free(mp);
		return -ENOMEM;
	}
	for (size_t i = 0; g && i < g->n_contexts; i++) {
		const struct kho_context *c = &g->contexts[i];

		for (size_t j = 0; j < c->n_ioas; j++)
			add_id(&m[k++], KHO__CONTROL__OBJECT_KIND__OBJECT_IOAS, c->token,
			       c->ioas[j].client_id, c->ioas[j].id);
		for (size_t j = 0; j < c->n_hwpts; j++)
			add_id(&m[k++], KHO__CONTROL__OBJECT_KIND__OBJECT_HWPT, c->token,
			       c->hwpts[j].client_id, c->hwpts[j].id);
		for (size_t j = 0; j < c->n_devices; j++)
			add_id(&m[k++], KHO__CONTROL__OBJECT_KIND__OBJECT_DEVICE, c->token,
			       c->devices[j].client_id, c->devices[j].id);
	}
	for (size_t i = 0; i < k; i++)
		mp[i] = &m[i];
	*ret = m;
	*retp = mp;
	*n = k;
	return 0;
}

static int on_claim(struct connection *c, uint64_t serial, const Kho__Control__Claim *q)
{
	_cleanup_free_ int *fds = NULL;
	_cleanup_free_ Kho__Control__IdMap *ids = NULL;
	_cleanup_free_ Kho__Control__IdMap **idp = NULL;
	struct khod *k = c->k;
	struct kho_error *err = NULL;
	struct workload *w;
	size_t n, done = 0, n_ids = 0;
	int r;

	if (c->claiming)
		return garbage(c, serial, EPROTO, "CLAIM before the last one was acknowledged");
	w = find_authorised(c, serial, "give back", q->name, q->claim_secret, q->owner, &r);
	if (!w)
		return r;
	n = workload_n_files(w);
	fds = malloc((n + 1) * sizeof(int));
	if (!fds || (w->image && id_map(kho_image_graph(w->image), &ids, &idp, &n_ids) < 0))
		return reply_error(c, serial, ENOMEM, w->name, "khod is out of memory", false);
	r = workload_open_files(k, w, fds, &err);
	if (r < 0)
		return reply_refusal(c, serial, "give back", w->name, r, &err);

	c->claiming = w;
	w->state = WORKLOAD_CLAIMING;
	do {
		Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
		Kho__Control__ClaimReply body = KHO__CONTROL__CLAIM_REPLY__INIT;
		Kho__Control__FileInfo info[KHO_WIRE_FDS_MAX];
		Kho__Control__FileInfo *infop[KHO_WIRE_FDS_MAX];
		size_t now = n - done < KHO_WIRE_FDS_MAX ? n - done : KHO_WIRE_FDS_MAX;

		for (size_t i = 0; i < now; i++) {
			struct kho_image_file f = {};

			kho_image_file(w->image, done + i, &f);
			kho__control__file_info__init(&info[i]);
			info[i].name = (char *)f.name;
			info[i].kind = (char *)kho_file_kind_name(f.kind);
			info[i].token = f.token;
			info[i].size = f.size;
			info[i].may_have_lost_irq = graph_may_have_lost_irq(w->image, f.token);
			infop[i] = &info[i];
		}
		body.name = w->name;
		body.files = infop;
		body.n_files = now;
		body.more = done + now < n;
		body.handovers = kho_image_handovers(w->image);
		/* The last packet has them, and room for as many as a graph may have objects. */
		if (!body.more) {
			body.outcome = (Kho__Control__Outcome)kho_image_outcome(w->image);
			body.reason = (char *)kho_image_reason(w->image);
			body.ids = idp;
			body.n_ids = n_ids;
			body.owner_uid = kho_image_uid(w->image);
			body.unit = (char *)kho_image_unit(w->image);
		}
		a.body_case = KHO__CONTROL__REPLY__BODY_CLAIM;
		a.claim = &body;
		r = reply(c, serial, &a, fds + done, now);
		done += now;
		if (r < 0) {
			while (done < n)
				kho_close(k->kho, fds[done++]);
			return r;
		}
	} while (done < n);
	FAULT(CLAIM_SENT);
	return 0;
}

static int reply_done(struct connection *c, uint64_t serial)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__Done d = KHO__CONTROL__DONE__INIT;

	a.body_case = KHO__CONTROL__REPLY__BODY_DONE;
	a.done = &d;
	return reply(c, serial, &a, NULL, 0);
}

static int on_claim_ack(struct connection *c, uint64_t serial, const Kho__Control__ClaimAck *q)
{
	struct registration reg = {};
	struct kho_error *err = NULL;
	struct workload *w = c->claiming;
	char name[KHO_NAME_MAX + 1];
	int r;

	if (!w || strcmp(w->name, q->name) != 0)
		return garbage(c, serial, EPROTO, "CLAIM_ACK without its CLAIM");
	strcpy(name, w->name);
	r = take_policy(q->policy, &reg);
	if (r < 0)
		return garbage(c, serial, EOPNOTSUPP, "CLAIM_ACK asks for a policy that this khod does not know");
	c->claiming = NULL;
	w->state = w->reason ? WORKLOAD_FAILED : WORKLOAD_HELD;
	if (reg.lease) {
		r = lease_claimed(c->k, w, &reg, &c->who, &err);
		if (r >= 0)
			belongs_to(c, w, true);
		khod_status_line(c->k);
		return r < 0 ? reply_refusal(c, serial, "lease", name, r, &err) :
			       reply_registered(c, serial, w);
	}
	r = workload_end(c->k, w, CUSTODY_CLAIMED, &err);
	if (r < 0)
		return reply_refusal(c, serial, "end the custody of", name, r, &err);
	r = reply_done(c, serial);
	FAULT(CLAIM_ANSWERED);
	handover_step(c->k);
	return r;
}

static int on_release(struct connection *c, uint64_t serial, const Kho__Control__Release *q)
{
	struct kho_error *err = NULL;
	char name[KHO_NAME_MAX + 1];
	struct workload *w;
	int r;

	w = find_authorised(c, serial, "release", q->name, q->claim_secret, q->owner, &r);
	if (!w)
		return r;
	strcpy(name, w->name);
	if (w->state == WORKLOAD_CLAIMING) {
		r = kho_error_new(&err, EBUSY, name, "a client is claiming it");
		return reply_refusal(c, serial, "release", name, r, &err);
	}
	r = workload_end(c->k, w, CUSTODY_RELEASED, &err);
	if (r < 0)
		return reply_refusal(c, serial, "release", name, r, &err);
	r = reply_done(c, serial);
	FAULT(RELEASE_ANSWERED);
	handover_step(c->k);
	return r;
}

int server_prepare(struct connection *c, const struct workload *w, uint64_t number,
		   uint32_t msec)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__Prepare p = KHO__CONTROL__PREPARE__INIT;

	p.name = (char *)w->name;
	p.handover = number;
	p.msec = msec;
	a.body_case = KHO__CONTROL__REPLY__BODY_PREPARE;
	a.prepare = &p;
	return tell(c, &a);
}

void server_aborted(struct connection *c, const struct workload *w, uint64_t number,
		    const char *reason)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__Aborted p = KHO__CONTROL__ABORTED__INIT;

	p.name = (char *)w->name;
	p.handover = number;
	p.reason = (char *)reason;
	a.body_case = KHO__CONTROL__REPLY__BODY_ABORTED;
	a.aborted = &p;
	(void)tell(c, &a);
}

/* A workload for which this very connection is asked, or a refusal already sent and NULL. */
static struct workload *find_own(struct connection *c, uint64_t serial, const char *what,
				 const char *name, int *ret)
{
	struct workload *w = kho_name_valid(name) ? workload_find(c->k, name) : NULL;
	struct kho_error *err = NULL;
	int r;

	if (w && w->client == c)
		return w;
	/* No word on whether there is one: that is its owner's business. */
	r = kho_error_new(&err, EPERM, kho_name_valid(name) ? name : "workload",
			  "this connection has registered no workload of that name that is asked before a handover");
	*ret = reply_refusal(c, serial, what, name, r, &err);
	return NULL;
}

static int on_ready(struct connection *c, uint64_t serial, const Kho__Control__Ready *q)
{
	struct kho_error *err = NULL;
	struct khod *k = c->k;
	struct workload *w;
	int r;

	w = find_own(c, serial, "take READY of", q->name, &r);
	if (!w)
		return r;
	r = handover_ready(k, w, q->handover, &err);
	r = r < 0 ? reply_refusal(c, serial, "make ready", q->name, r, &err) : reply_done(c, serial);
	handover_step(k);
	return r;
}

static int on_veto(struct connection *c, uint64_t serial, const Kho__Control__Veto *q)
{
	char reason[VETO_MAX + 1];
	struct kho_error *err = NULL;
	struct khod *k = c->k;
	struct workload *w;
	int r;

	w = find_own(c, serial, "take VETO of", q->name, &r);
	if (!w)
		return r;
	/* It goes to terminals and into the journal. */
	snprintf(reason, sizeof(reason), "%s", q->reason[0] ? q->reason : "no reason given");
	for (char *p = reason; *p; p++)
		if (*p < 0x20 || *p > 0x7e)
			*p = '?';
	r = handover_veto(k, w, q->handover, reason, &err);
	r = r < 0 ? reply_refusal(c, serial, "take VETO of", q->name, r, &err) : reply_done(c, serial);
	handover_step(k);
	return r;
}

/* The answer to Preserve. */
static void on_prepared(struct khod *k, void *userdata, int r, const char *object,
			const char *reason)
{
	_cleanup_free_ Kho__Control__LeftBehind *left = NULL;
	_cleanup_free_ Kho__Control__LeftBehind **leftp = NULL;
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__PreserveReply body = KHO__CONTROL__PRESERVE_REPLY__INIT;
	struct handover *h = &k->handover;
	struct connection *c = userdata;

	c->preserving = false;
	if (r < 0) {
		(void)reply_error(c, c->preserve_serial, -r, object, reason, false);
		goto out;
	}
	left = calloc(h->n_left + 1, sizeof(*left));
	leftp = calloc(h->n_left + 1, sizeof(*leftp));
	for (size_t i = 0; left && leftp && i < h->n_left; i++) {
		kho__control__left_behind__init(&left[i]);
		left[i].name = h->left[i].name;
		left[i].reason = h->left[i].reason;
		leftp[body.n_left_behind++] = &left[i];
	}
	for (const struct workload *w = k->workloads; w; w = w->next)
		body.workloads += w->state == WORKLOAD_HELD || w->state == WORKLOAD_UNREADABLE;
	body.left_behind = leftp;
	a.body_case = KHO__CONTROL__REPLY__BODY_PRESERVED;
	a.preserved = &body;
	(void)reply(c, c->preserve_serial, &a, NULL, 0);
out:
	wait_for_reader(c);
}

/* Only root: it concerns everybody. Return: whether a refusal has been sent. */
static bool refuse_user(struct connection *c, uint64_t serial, const char *what, int *ret)
{
	struct kho_error *err = NULL;

	if (c->who.uid == 0)
		return false;
	*ret = reply_refusal(c, serial, what, NULL,
			     kho_error_new(&err, EPERM, "handover", "only root may begin one or give it up"),
			     &err);
	return true;
}

static int on_preserve(struct connection *c, uint64_t serial, const Kho__Control__Preserve *q)
{
	struct kho_error *err = NULL;
	const struct workload *w;
	int r;

	if (refuse_user(c, serial, "preserve", &r))
		return r;
	adopt_rest(c->k);
	/* Another kernel may have been loaded just now, and a kexec comes next. */
	inhibit_update(c->k);
	w = inhibit_obstacle(c->k);
	if (w && !q->force) {
		r = kho_error_new(&err, ECANCELED, w->name, "would be lost: %s", workload_reason(w));
		return reply_refusal(c, serial, "preserve", NULL, r, &err);
	}
	/* A second one is refused below, and must not take the serial of the first. */
	if (!c->preserving)
		c->preserve_serial = serial;
	c->preserving = true;
	r = handover_begin(c->k, 0, q->force, on_prepared, c, &err);
	if (r >= 0)
		return 0;
	c->preserving = c->k->handover.asking && c->k->handover.userdata == c;
	return reply_refusal(c, serial, "preserve", NULL, r, &err);
}

static int on_abort(struct connection *c, uint64_t serial)
{
	struct kho_error *err = NULL;
	int r;

	if (refuse_user(c, serial, "abort", &r))
		return r;
	r = handover_abort(c->k, "given up by the operator", &err);
	return r < 0 ? reply_refusal(c, serial, "undo", NULL, r, &err) : reply_done(c, serial);
}

static Kho__Control__WorkloadState state_to_wire(enum workload_state state)
{
	switch (state) {
	case WORKLOAD_HELD:
		return KHO__CONTROL__WORKLOAD_STATE__STATE_HELD;
	case WORKLOAD_CLAIMING:
		return KHO__CONTROL__WORKLOAD_STATE__STATE_CLAIMING;
	case WORKLOAD_UNREADABLE:
		return KHO__CONTROL__WORKLOAD_STATE__STATE_UNREADABLE;
	case WORKLOAD_FAILED:
		return KHO__CONTROL__WORKLOAD_STATE__STATE_FAILED;
	case WORKLOAD_LEASED:
		return KHO__CONTROL__WORKLOAD_STATE__STATE_LEASED;
	}
	return KHO__CONTROL__WORKLOAD_STATE__STATE_UNSPECIFIED;
}

static Kho__Control__Memory memory_to_wire(const struct workload *w)
{
	if (w->state == WORKLOAD_FAILED)
		return KHO__CONTROL__MEMORY__MEMORY_UNSPECIFIED;
	if (w->brought)
		return KHO__CONTROL__MEMORY__MEMORY_SOON;
	return w->session >= 0 && !w->stray ? KHO__CONTROL__MEMORY__MEMORY_PRESERVED :
					      KHO__CONTROL__MEMORY__MEMORY_AT_HANDOVER;
}

static void to_info(const struct khod *k, struct workload *w, Kho__Control__WorkloadInfo *info)
{
	uint64_t left = deadline_left(k, w);

	kho__control__workload_info__init(info);
	info->name = w->name;
	info->state = state_to_wire(w->state);
	info->session = w->session_name;
	info->reason = (char *)workload_reason(w);
	info->outcome = KHO__CONTROL__OUTCOME__OUTCOME_NONE;
	info->owner_uid = UINT32_MAX;
	info->prepare = w->client != NULL;
	info->survival = workload_must(w) ? KHO__CONTROL__SURVIVAL__SURVIVAL_MUST :
					    KHO__CONTROL__SURVIVAL__SURVIVAL_BEST_EFFORT;
	info->restore_failure = KHO__CONTROL__RESTORE_FAILURE__RESTORE_FAILURE_QUIESCE;
	if (w->image) {
		info->owner_uid = kho_image_uid(w->image);
		info->unit = (char *)kho_image_unit(w->image);
		info->handovers = kho_image_handovers(w->image);
		info->registered_realtime_usec = kho_image_registered_usec(w->image);
		info->secret = kho_image_has_secret(w->image);
		info->claim_sec = kho_image_claim_sec(w->image);
		info->may_lose_irq = kho_image_may_lose_irq(w->image);
		if (kho_image_restore_failure(w->image) == KHO_RESTORE_FAILURE_RELEASE)
			info->restore_failure = KHO__CONTROL__RESTORE_FAILURE__RESTORE_FAILURE_RELEASE;
		info->outcome = (Kho__Control__Outcome)kho_image_outcome(w->image);
		info->outcome_reason = (char *)kho_image_reason(w->image);
	}
	/* The last moment of it is not "for ever". */
	info->claim_left_sec = left == UINT64_MAX ? 0 : 1 + (uint32_t)(left / 1000000);
	info->memory = memory_to_wire(w);
	info->count = workload_n_files(w);
	info->bytes = workload_bytes(w);
}

/* @fd: goes with it, owned; -1: none. */
static int send_list(struct connection *c, uint64_t serial, Kho__Control__WorkloadInfo **infos,
		     size_t n, bool more, int fd)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__ListReply l = KHO__CONTROL__LIST_REPLY__INIT;

	l.workloads = infos;
	l.n_workloads = n;
	l.more = more;
	a.body_case = KHO__CONTROL__REPLY__BODY_LIST;
	a.list = &l;
	return reply(c, serial, &a, &fd, fd >= 0 ? 1 : 0);
}

static int on_list(struct connection *c, uint64_t serial)
{
	enum { BATCH = 64 };
	Kho__Control__WorkloadInfo info[BATCH], *infop[BATCH];
	size_t n = 0, bytes = 0;
	int r;

	for (struct workload *w = c->k->workloads; w; w = w->next) {
		size_t size;

		if (!workload_visible(w, &c->who))
			continue;
		to_info(c->k, w, &info[n]);
		infop[n] = &info[n];
		size = kho__control__workload_info__get_packed_size(&info[n]);
		n++;
		bytes += size;
		if (n == BATCH || bytes > REPLY_SOFT_MAX) {
			r = send_list(c, serial, infop, n, true, -1);
			if (r < 0)
				return r;
			n = bytes = 0;
		}
	}
	return send_list(c, serial, infop, n, false, -1);
}

static int on_show(struct connection *c, uint64_t serial, const Kho__Control__Show *q)
{
	_cleanup_free_ Kho__Control__FileInfo *files = NULL;
	_cleanup_free_ Kho__Control__FileInfo **filep = NULL;
	Kho__Control__WorkloadInfo info, *infop = &info;
	_cleanup_free_ char *text = NULL;
	struct kho_error *err = NULL;
	struct workload *w;
	bool look;
	size_t n;
	int fd, r;

	/* Root sees everything. */
	w = c->who.uid == 0 && kho_name_valid(q->name) ? workload_find(c->k, q->name) : NULL;
	if (!w)
		w = find_authorised(c, serial, "show", q->name, (ProtobufCBinaryData){}, NULL, &r);
	if (!w)
		return r;
	n = workload_n_files(w);
	files = calloc(n + 1, sizeof(*files));
	filep = calloc(n + 1, sizeof(*filep));
	if (!files || !filep)
		return reply_error(c, serial, ENOMEM, w->name, "khod is out of memory", false);
	to_info(c->k, w, &info);
	for (size_t i = 0; i < n; i++) {
		struct kho_image_file f = {};

		kho_image_file(w->image, i, &f);
		kho__control__file_info__init(&files[i]);
		files[i].name = (char *)f.name;
		files[i].kind = (char *)kho_file_kind_name(f.kind);
		files[i].token = f.token;
		files[i].size = f.size;
		files[i].may_have_lost_irq = graph_may_have_lost_irq(w->image, f.token);
		filep[i] = &files[i];
	}
	info.files = filep;
	info.n_files = n;
	/* What a lease has in it is known for certain only when it is preserved. */
	look = w->state == WORKLOAD_LEASED && w->fds && c->who.uid == 0;
	khod_busy(c->k, workload_bytes(w));
	if (look && (r = graph_look(c->k, w, &err)) < 0) {
		text = kho_error_format(err, r);
		info.obstacle = text ? text : strerror(-r);
		err = kho_error_free(err);
	}
	graph_translations(c->k, w, true);
	fd = w->image ? kho_image_write_public(c->k->kho, w->image, NULL) : -1;
	graph_translations(c->k, w, false);
	if (look)
		(void)kho_image_set_graph(w->image, NULL, NULL);
	khod_idle(c->k);
	return send_list(c, serial, &infop, 1, false, fd);
}

static int on_status(struct connection *c, uint64_t serial)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__StatusReply s = KHO__CONTROL__STATUS_REPLY__INIT;
	struct khod *k = c->k;

	s.server = (char *)"khod " KHO_VERSION;
	s.liveupdate = !k->luo_reason;
	s.liveupdate_reason = k->luo_reason ? k->luo_reason : (char *)"";
	s.retrieve_outgoing = k->retrieve_outgoing;
	s.fdstore = k->fdstore.available;
	s.fdstore_used = k->fdstore.used;
	s.fdstore_max = k->fdstore.max;
	for (struct workload *w = k->workloads; w; w = w->next) {
		if (!workload_visible(w, &c->who))
			continue;
		s.workloads++;
		s.workloads_failed += w->state == WORKLOAD_FAILED;
		s.bytes += workload_bytes(w);
	}
	s.connections = k->n_connections;
	s.boot_id = k->boot_id;
	s.kernel_release = k->kernel_release;
	s.fault_points = KHOD_WITH_FAULT_POINTS;
	a.body_case = KHO__CONTROL__REPLY__BODY_STATUS;
	a.status = &s;
	return reply(c, serial, &a, NULL, 0);
}

static int on_timeline(struct connection *c, uint64_t serial)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__TimelineReply t = KHO__CONTROL__TIMELINE_REPLY__INIT;
	struct kho_error *err = NULL;
	int fd;

	/* The names of everybody's workloads are in it. */
	fd = c->who.uid == 0 ? timeline_copy(c->k, &err) :
			       kho_error_new(&err, EPERM, "timeline", "it is for root");
	if (fd < 0) {
		_cleanup_error_ struct kho_error *e = err;

		return reply_error(c, serial, fd, kho_error_object(e), kho_error_message(e), false);
	}
	a.body_case = KHO__CONTROL__REPLY__BODY_TIMELINE;
	a.timeline = &t;
	return reply(c, serial, &a, &fd, 1);
}

/* One packet. *@n_fds is what is left of @fds for the caller to close. */
static int dispatch(struct connection *c, const Kho__Control__Request *q, int *fds,
		    size_t *n_fds)
{
	uint64_t serial = q->serial;

	if (!c->hello && q->body_case != KHO__CONTROL__REQUEST__BODY_HELLO)
		return garbage(c, serial, EPROTO, "the first message is not HELLO");
	if (*n_fds > 0 && q->body_case != KHO__CONTROL__REQUEST__BODY_REGISTRATION)
		return garbage(c, serial, EPROTO, "descriptors with a message that takes none");
	if (c->pending && q->body_case != KHO__CONTROL__REQUEST__BODY_REGISTRATION)
		return garbage(c, serial, EPROTO, "another message in the middle of a REGISTER");

	switch (q->body_case) {
	case KHO__CONTROL__REQUEST__BODY_HELLO:
		return on_hello(c, serial, q->hello);
	case KHO__CONTROL__REQUEST__BODY_REGISTRATION:
		return on_register(c, serial, q->registration, fds, n_fds);
	case KHO__CONTROL__REQUEST__BODY_CLAIM:
		return on_claim(c, serial, q->claim);
	case KHO__CONTROL__REQUEST__BODY_CLAIM_ACK:
		return on_claim_ack(c, serial, q->claim_ack);
	case KHO__CONTROL__REQUEST__BODY_RELEASE:
		return on_release(c, serial, q->release);
	case KHO__CONTROL__REQUEST__BODY_LIST:
		return on_list(c, serial);
	case KHO__CONTROL__REQUEST__BODY_SHOW:
		return on_show(c, serial, q->show);
	case KHO__CONTROL__REQUEST__BODY_STATUS:
		return on_status(c, serial);
	case KHO__CONTROL__REQUEST__BODY_READY:
		return on_ready(c, serial, q->ready);
	case KHO__CONTROL__REQUEST__BODY_VETO:
		return on_veto(c, serial, q->veto);
	case KHO__CONTROL__REQUEST__BODY_PRESERVE:
		return on_preserve(c, serial, q->preserve);
	case KHO__CONTROL__REQUEST__BODY_ABORT:
		return on_abort(c, serial);
	case KHO__CONTROL__REQUEST__BODY_TIMELINE:
		return on_timeline(c, serial);
	default:
		return garbage(c, serial, EOPNOTSUPP, "a message of a kind that this khod does not know");
	}
}

static int on_io(sd_event_source *s, int fd, uint32_t revents, void *userdata)
{
	struct connection *c = userdata;
	struct khod *k = c->k;
	static uint8_t buf[KHO_WIRE_PACKET_MAX];
	bool gone = false;
	int r = 0;

	if (revents & EPOLLOUT) {
		r = flush(c);
		gone = r < 0 && r != -EAGAIN;
	}
	/* While answers are waiting nothing new is read: the client must read first. */
	for (int i = 0; i < 16 && !gone && !c->closing && !c->queue; i++) {
		Kho__Control__Request *q;
		int fds[KHO_WIRE_FDS_MAX];
		size_t n_fds = 0;
		ssize_t n;

		if (closer_pending(c->who.uid) > MAX_CLOSING_UID) {
			log_limited(NULL, "uid %u has sent so many descriptors that cannot be closed yet that it is not heard.",
				    (unsigned int)c->who.uid);
			r = reply_error(c, 0, EDQUOT, "user",
					"too many of the descriptors that it has sent are still being closed", true);
			gone = r < 0;
			break;
		}
		n = kho_wire_recv(k->kho, c->fd, buf, fds, &n_fds);
		if (n == -EAGAIN)
			break;
		if (n == -EMFILE) {
			r = garbage(c, 0, EMFILE,
				    "more descriptors than one packet may bring, or than khod may have open");
		} else if (n == -EMSGSIZE) {
			r = garbage(c, 0, EMSGSIZE, "a packet that is too large");
		} else if (n <= 0) {
			r = -ECONNRESET;
		} else {
			q = kho_wire_request_unpack(buf, n);
			r = q ? dispatch(c, q, fds, &n_fds) :
				garbage(c, 0, EBADMSG, "a packet that is not a message");
			kho_wire_request_free(q);
		}
		closer_add(c->who.uid, fds, n_fds);
		gone = r < 0;
	}
	if (c->closing && !c->queue)
		gone = true;
	if (gone || (revents & EPOLLERR)) {
		connection_free(c);
		return 0;
	}
	deadline(c);
	(void)sd_event_source_set_io_events(c->io, c->queue ? EPOLLOUT : EPOLLIN);
	return 0;
}

static int on_deadline(sd_event_source *s, uint64_t usec, void *userdata)
{
	struct connection *c = userdata;
	const char *what = !c->hello	? "HELLO" :
			   c->claiming	? "CLAIM_ACK" :
			   c->pending	? "the rest of REGISTER" :
					  "a request";
	char text[96];

	snprintf(text, sizeof(text), "no %s came before the deadline", what);
	if (!c->closing && !c->queue)
		(void)reply_error(c, 0, ETIMEDOUT, "connection", text, true);
	connection_free(c);
	return 0;
}

/*
 * The unit of the peer, and a pidfd of it for the caller, or -1. Its pid may be reused
 * between the credentials and the look at its cgroup; a pidfd from the socket, still alive
 * after the look, proves it was not. That a signal is not permitted says so, too: khod has no
 * capability to send one to others.
 */
static int peer_unit(int fd, pid_t pid, char *unit, size_t size)
{
	_cleanup_free_ char *name = NULL;
	int pidfd = -1;
	socklen_t len = sizeof(pidfd);

	unit[0] = 0;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &len) < 0)
		pidfd = -1;
	if (sd_pid_get_unit(pid, &name) >= 0 && strlen(name) < size &&
	    pidfd >= 0 && (pidfd_send_signal(pidfd, 0, NULL, 0) == 0 || errno == EPERM))
		strcpy(unit, name);
	return pidfd;
}

/* Too early for a connection object: one packet, if it fits, and goodbye. */
static void turn_away(struct khod *k, uid_t uid, int fd, const char *reason)
{
	Kho__Control__Reply a = KHO__CONTROL__REPLY__INIT;
	Kho__Control__Error e = KHO__CONTROL__ERROR__INIT;
	uint8_t buf[512];

	e.error = EDQUOT;
	e.object = (char *)"connection";
	e.reason = (char *)reason;
	e.fatal = true;
	a.serial = 1;
	a.body_case = KHO__CONTROL__REPLY__BODY_ERROR;
	a.error = &e;
	if (kho__control__reply__get_packed_size(&a) <= sizeof(buf)) {
		size_t size = kho__control__reply__pack(&a, buf);

		(void)kho_wire_send(k->kho, fd, buf, size, NULL, 0);
	}
	/* It may have sent something already. */
	closer_end_connection(uid, fd);
}

/* Why a user may not have another connection; NULL: it may. */
static const char *too_many(const struct khod *k, uid_t uid)
{
	unsigned int same = 0, max = MAX_CONNECTIONS - (uid ? CONNECTIONS_FOR_ROOT : 0);

	for (const struct connection *c = k->connections; c; c = c->next)
		same += c->who.uid == uid;
	if (same >= (uid ? MAX_CONNECTIONS_UID : MAX_CONNECTIONS_ROOT)) {
		log_limited(NULL, "uid %u has as many connections as it may; another is refused.",
			    (unsigned int)uid);
		return "this user has as many connections as it may: close one";
	}
	return k->n_connections >= max ? "khod has as many clients as it may" : NULL;
}

static int on_accept(sd_event_source *s, int listen_fd, uint32_t revents, void *userdata)
{
	struct khod *k = userdata;
	struct connection *c;
	struct ucred cred;
	socklen_t len = sizeof(cred);
	const char *why;
	int fd, r;

	fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0) {
		if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR) {
			log_limited(NULL, "Cannot accept a client: %s.", strerror(errno));
			/* Out of descriptors: without a pause this would spin. */
			nanosleep(&(struct timespec){ .tv_nsec = 10 * 1000 * 1000 }, NULL);
		}
		return 0;
	}
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0) {
		close(fd);
		return 0;
	}
	why = too_many(k, cred.uid);
	if (why) {
		turn_away(k, cred.uid, fd, why);
		return 0;
	}

	c = calloc(1, sizeof(*c));
	if (!c) {
		closer_end_connection(cred.uid, fd);
		return 0;
	}
	c->k = k;
	c->fd = fd;
	c->queue_tail = &c->queue;
	c->who.uid = cred.uid;
	c->pidfd = peer_unit(fd, cred.pid, c->who.unit, sizeof(c->who.unit));
	c->next = k->connections;
	k->connections = c;
	k->n_connections++;
	r = sd_event_add_io(k->event, &c->io, fd, EPOLLIN, on_io, c);
	if (r >= 0)
		r = sd_event_add_time_relative(k->event, &c->timer, CLOCK_MONOTONIC,
					       DEADLINE_HELLO * 1000000ULL, 0, on_deadline, c);
	if (r < 0)
		connection_free(c);
	return 0;
}

int server_start(struct khod *k, struct kho_error **err)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	int r;

	if (k->listen_fd < 0) {
		if (strlen(k->socket_path) >= sizeof(sa.sun_path))
			return kho_error_new(err, ENAMETOOLONG, k->socket_path, "the path is too long for a socket");
		strcpy(sa.sun_path, k->socket_path);
		k->listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (k->listen_fd < 0)
			return kho_error_new(err, errno, k->socket_path, "socket: %s", strerror(errno));
		/* The lock is ours, so nobody listens on what is there. */
		(void)unlink(k->socket_path);
		if (bind(k->listen_fd, (struct sockaddr *)&sa, sizeof(sa)) < 0 ||
		    listen(k->listen_fd, 64) < 0)
			return kho_error_new(err, errno, k->socket_path, "cannot listen: %s", strerror(errno));
	}
	r = sd_event_add_io(k->event, &k->listen_source, k->listen_fd, EPOLLIN, on_accept, k);
	if (r < 0)
		return kho_error_new(err, r, "socket", "cannot be watched: %s", strerror(-r));
	return 0;
}

void server_stop(struct khod *k)
{
	while (k->connections)
		connection_free(k->connections);
	sd_event_source_disable_unref(k->listen_source);
	if (k->listen_fd >= 0)
		close(k->listen_fd);
}
