/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The client's side of the control protocol: one request, its replies, in order. News of a
 * handover may come between; they wait until they are asked for.
 * A transport error ends the connection; a refusal by khod does not.
 */
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "timeline-log.h"
#include "wire.h"

/* khod answers a registration when the kernel has pinned every page of it. */
#define TIMEOUT_MSEC (10 * 60 * 1000)

struct news {
	struct news *next;
	struct kho_event event;
};

struct kho_client {
	struct kho *kho;
	int sock;
	uint64_t serial;
	uint32_t max_fds;
	bool has_owner;
	uint32_t owner;		/* of what is claimed and released, if root says so */
	uint8_t *buf;
	struct news *news;	/* oldest first */
};

struct kho_client *kho_client_free(struct kho_client *client)
{
	if (client) {
		kho_close(client->kho, client->sock);
		while (client->news) {
			struct news *n = client->news;

			client->news = n->next;
			free(n);
		}
		free(client->buf);
		free(client);
	}
	return NULL;
}

static void client_freep(struct kho_client **c)
{
	kho_client_free(*c);
}

static void replyp(Kho__Control__Reply **r)
{
	kho_wire_reply_free(*r);
}

static void hang_up(struct kho_client *c)
{
	c->sock = kho_close(c->kho, c->sock);
}

static void close_fds(struct kho *kho, int *fds, size_t n)
{
	while (n > 0)
		kho_close(kho, fds[--n]);
}

static int transport(struct kho_client *c, int r, const char *what, struct kho_error **err)
{
	hang_up(c);
	if (r == -EAGAIN || r == -EWOULDBLOCK)
		return kho_error_new(err, ETIMEDOUT, "khod", "%s: no answer within %d s", what,
				     TIMEOUT_MSEC / 1000);
	if (r == -EPIPE || r == -ECONNRESET || r == 0)
		return kho_error_new(err, ECONNRESET, "khod",
				     "%s: khod closed the connection (see its journal)", what);
	return kho_error_new(err, r, "khod", "%s: %s", what, strerror(-r));
}

static int send_request(struct kho_client *c, Kho__Control__Request *q, const int *fds,
			size_t n_fds, struct kho_error **err)
{
	size_t size;
	int r;

	if (c->sock < 0)
		return kho_error_new(err, ENOTCONN, "khod", "the connection is closed");
	q->serial = c->serial;
	size = kho__control__request__get_packed_size(q);
	if (size > KHO_WIRE_PACKET_MAX)
		return kho_error_new(err, EMSGSIZE, "request", "larger than %d bytes",
				     KHO_WIRE_PACKET_MAX);
	kho__control__request__pack(q, c->buf);
	r = kho_wire_send(c->kho, c->sock, c->buf, size, fds, n_fds);
	/* khod may have said why before it hung up: that answer is still to be read. */
	if (r == -EPIPE)
		return 0;
	if (r < 0)
		return transport(c, r, "cannot send", err);
	return 0;
}

/* 0: it is an answer; 1: it was news. */
static int take_news(struct kho_client *c, const Kho__Control__Reply *a, struct kho_error **err)
{
	struct news **tail = &c->news, *n;

	if (a->body_case != KHO__CONTROL__REPLY__BODY_PREPARE &&
	    a->body_case != KHO__CONTROL__REPLY__BODY_ABORTED)
		return 0;
	n = calloc(1, sizeof(*n));
	if (!n)
		return kho_error_new(err, ENOMEM, "khod", "out of memory");
	if (a->body_case == KHO__CONTROL__REPLY__BODY_PREPARE) {
		n->event.kind = KHO_EVENT_PREPARE;
		snprintf(n->event.workload, sizeof(n->event.workload), "%s", a->prepare->name);
		n->event.handover = a->prepare->handover;
		n->event.msec = a->prepare->msec;
	} else {
		n->event.kind = KHO_EVENT_ABORTED;
		snprintf(n->event.workload, sizeof(n->event.workload), "%s", a->aborted->name);
		n->event.handover = a->aborted->handover;
		snprintf(n->event.reason, sizeof(n->event.reason), "%s", a->aborted->reason);
	}
	while (*tail)
		tail = &(*tail)->next;
	*tail = n;
	return 1;
}

/* One packet of khod's, of any kind. Descriptors are the caller's. */
static int recv_any(struct kho_client *c, Kho__Control__Reply **ret, int *fds, size_t *n_fds,
		    struct kho_error **err)
{
	ssize_t n;

	if (c->sock < 0)
		return kho_error_new(err, ENOTCONN, "khod", "the connection is closed");
	n = kho_wire_recv(c->kho, c->sock, c->buf, fds, n_fds);
	/* The kernel reports a reset once, before what khod still said. */
	if (n == -ECONNRESET)
		n = kho_wire_recv(c->kho, c->sock, c->buf, fds, n_fds);
	if (n <= 0) {
		close_fds(c->kho, fds, *n_fds);
		return transport(c, (int)n, "no answer", err);
	}
	*ret = kho_wire_reply_unpack(c->buf, n);
	if (!*ret) {
		close_fds(c->kho, fds, *n_fds);
		hang_up(c);
		return kho_error_new(err, EPROTO, "khod", "its answer cannot be understood");
	}
	return 0;
}

/*
 * One reply of kind @want. Descriptors are handed out only with @fds; a reply
 * that is not an answer to what was asked ends the connection.
 */
static int recv_reply(struct kho_client *c, Kho__Control__Reply__BodyCase want,
		      Kho__Control__Reply **ret, int *fds, size_t *n_fds,
		      struct kho_error **err)
{
	_cleanup_(replyp) Kho__Control__Reply *a = NULL;
	int got[KHO_WIRE_FDS_MAX], r;
	size_t n_got;

	for (;;) {
		r = recv_any(c, &a, got, &n_got, err);
		if (r < 0)
			return r;
		if (n_got > 0 && !fds) {
			close_fds(c->kho, got, n_got);
			hang_up(c);
			return kho_error_new(err, EPROTO, "khod", "its answer cannot be understood");
		}
		r = take_news(c, a, err);
		if (r == 0)
			break;
		close_fds(c->kho, got, n_got);
		kho_wire_reply_free(TAKE_PTR(a));
		if (r < 0)
			return r;
	}
	if (a->body_case == KHO__CONTROL__REPLY__BODY_ERROR) {
		const Kho__Control__Error *e = a->error;
		int errnum = e->error > 0 && e->error < 4096 ? e->error : EPROTO;

		close_fds(c->kho, got, n_got);
		if (e->fatal)
			hang_up(c);
		return kho_error_new(err, errnum, e->object[0] ? e->object : NULL, "%s",
				     e->reason);
	}
	if (a->body_case != want || a->serial != c->serial) {
		close_fds(c->kho, got, n_got);
		hang_up(c);
		return kho_error_new(err, EPROTO, "khod", "its answer is not to what was asked");
	}
	if (fds) {
		memcpy(fds, got, n_got * sizeof(int));
		*n_fds = n_got;
	}
	*ret = TAKE_PTR(a);
	return 0;
}

int kho_client_connect(struct kho *kho, const char *path, struct kho_client **ret,
		       struct kho_error **err)
{
	_cleanup_(client_freep) struct kho_client *c = NULL;
	_cleanup_(replyp) Kho__Control__Reply *a = NULL;
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Hello hello = KHO__CONTROL__HELLO__INIT;
	int r;

	if (!path)
		path = KHO_SOCKET;
	c = calloc(1, sizeof(*c));
	if (!c)
		return kho_error_new(err, ENOMEM, path, "out of memory");
	c->kho = kho;
	c->sock = -1;
	c->buf = malloc(KHO_WIRE_PACKET_MAX);
	if (!c->buf)
		return kho_error_new(err, ENOMEM, path, "out of memory");

	r = kho_op(kho, connect, path, TIMEOUT_MSEC);
	if (r == -ENOENT || r == -ECONNREFUSED)
		return kho_error_new(err, r, path,
				     "khod does not listen here: systemctl start khod.socket");
	if (r < 0)
		return kho_error_new(err, r, path, "cannot connect: %s", strerror(-r));
	c->sock = r;

	hello.min_version = KHO_WIRE_VERSION;
	hello.max_version = KHO_WIRE_VERSION;
	hello.client = (char *)"libkho " KHO_VERSION;
	q.body_case = KHO__CONTROL__REQUEST__BODY_HELLO;
	q.hello = &hello;
	c->serial = 1;
	r = send_request(c, &q, NULL, 0, err);
	if (r < 0)
		return r;
	r = recv_reply(c, KHO__CONTROL__REPLY__BODY_HELLO, &a, NULL, NULL, err);
	if (r < 0)
		return r;
	if (a->hello->version != KHO_WIRE_VERSION || a->hello->max_fds_per_packet == 0)
		return kho_error_new(err, EPROTO, path, "khod speaks version %" PRIu32 ", this library %d",
				     a->hello->version, KHO_WIRE_VERSION);
	c->max_fds = a->hello->max_fds_per_packet;
	if (c->max_fds > KHO_WIRE_FDS_MAX)
		c->max_fds = KHO_WIRE_FDS_MAX;
	*ret = TAKE_PTR(c);
	return 0;
}

int kho_client_register(struct kho_client *client, const char *name,
			const struct kho_client_file *files, size_t n_files, const void *secret,
			size_t secret_size, struct kho_error **err)
{
	return kho_client_register_policy(client, name, files, n_files, secret, secret_size, NULL, err);
}

static void policy_to_wire(const struct kho_policy *policy, Kho__Control__Policy *w)
{
	kho__control__policy__init(w);
	w->keep = policy->keep == KHO_KEEP_LEASE ? KHO__CONTROL__KEEP_MODE__KEEP_LEASE :
						   KHO__CONTROL__KEEP_MODE__KEEP_HOLD;
	w->prepare = policy->prepare;
	w->survival = policy->survival == KHO_SURVIVAL_BEST_EFFORT ?
			      KHO__CONTROL__SURVIVAL__SURVIVAL_BEST_EFFORT :
			      KHO__CONTROL__SURVIVAL__SURVIVAL_MUST;
	w->restore_failure = policy->restore_failure == KHO_RESTORE_FAILURE_RELEASE ?
				     KHO__CONTROL__RESTORE_FAILURE__RESTORE_FAILURE_RELEASE :
				     KHO__CONTROL__RESTORE_FAILURE__RESTORE_FAILURE_QUIESCE;
	w->prepare_msec = policy->prepare_msec;
	w->claim_sec = policy->claim_sec;
	w->may_lose_irq = policy->may_lose_irq;
}

static int register_files(struct kho_client *client, const char *name,
			  const struct kho_client_file *files, size_t n_files, const void *secret,
			  size_t secret_size, const struct kho_policy *policy, bool update,
			  struct kho_error **err)
{
	static const struct kho_policy none;
	_cleanup_(replyp) Kho__Control__Reply *a = NULL;
	Kho__Control__FileSpec specs[KHO_WIRE_FDS_MAX];
	Kho__Control__FileSpec *specp[KHO_WIRE_FDS_MAX];
	int fds[KHO_WIRE_FDS_MAX];
	int r;

	if (!kho_name_valid(name))
		return kho_error_new(err, EINVAL, "workload",
				     "a name has 1 to %d of A-Z a-z 0-9 _ . @ - and does not begin with . or -",
				     KHO_NAME_MAX);
	if (n_files == 0 || n_files > KHO_IMAGE_FILES_MAX)
		return kho_error_new(err, n_files ? E2BIG : EINVAL, name,
				     "a workload has 1 to %d files", KHO_IMAGE_FILES_MAX);

	client->serial++;
	for (size_t done = 0; done < n_files;) {
		Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
		Kho__Control__Register reg = KHO__CONTROL__REGISTER__INIT;
		Kho__Control__Policy wanted;
		size_t n = n_files - done;

		if (n > client->max_fds)
			n = client->max_fds;
		for (size_t i = 0; i < n; i++) {
			kho__control__file_spec__init(&specs[i]);
			specs[i].name = (char *)files[done + i].name;
			specp[i] = &specs[i];
			fds[i] = files[done + i].fd;
		}
		reg.name = (char *)name;
		reg.files = specp;
		reg.n_files = n;
		reg.more = done + n < n_files;
		if (done == 0) {
			policy_to_wire(policy ? policy : &none, &wanted);
			reg.policy = &wanted;
			reg.claim_secret.data = (uint8_t *)secret;
			reg.claim_secret.len = secret ? secret_size : 0;
			reg.update = update;
		}
		q.body_case = KHO__CONTROL__REQUEST__BODY_REGISTRATION;
		q.registration = &reg;
		r = send_request(client, &q, fds, n, err);
		if (r < 0)
			return r;
		done += n;
	}
	return recv_reply(client, KHO__CONTROL__REPLY__BODY_REGISTERED, &a, NULL, NULL, err);
}

int kho_client_register_policy(struct kho_client *client, const char *name,
			       const struct kho_client_file *files, size_t n_files,
			       const void *secret, size_t secret_size,
			       const struct kho_policy *policy, struct kho_error **err)
{
	return register_files(client, name, files, n_files, secret, secret_size, policy, false, err);
}

int kho_client_update(struct kho_client *client, const char *name,
		      const struct kho_client_file *files, size_t n_files, const void *secret,
		      size_t secret_size, const struct kho_policy *policy, struct kho_error **err)
{
	return register_files(client, name, files, n_files, secret, secret_size, policy, true, err);
}

int kho_client_fd(const struct kho_client *client)
{
	return client->sock;
}

static int64_t now_msec(void)
{
	return (int64_t)(monotonic_usec() / 1000);
}

/* Wait for a packet. Return: 1, 0 (none came), -errno. */
static int wait_packet(struct kho_client *c, int64_t until, struct kho_error **err)
{
	struct pollfd p = { .fd = c->sock, .events = POLLIN };
	int n;

	if (c->sock < 0)
		return kho_error_new(err, ENOTCONN, "khod", "the connection is closed");
	for (;;) {
		int64_t left = until < 0 ? -1 : until - now_msec();

		n = poll(&p, 1, until < 0 ? -1 : left > 0 ? (int)left : 0);
		if (n >= 0)
			return n;
		if (errno != EINTR)
			return kho_error_new(err, errno, "khod", "poll: %s", strerror(errno));
	}
}

int kho_client_event(struct kho_client *client, int timeout_msec, struct kho_event *event,
		     struct kho_error **err)
{
	int64_t until = timeout_msec < 0 ? -1 : now_msec() + timeout_msec;
	int fds[KHO_WIRE_FDS_MAX], r;
	size_t n_fds;

	*event = (struct kho_event){};
	while (!client->news) {
		_cleanup_(replyp) Kho__Control__Reply *a = NULL;

		r = wait_packet(client, until, err);
		if (r <= 0)
			return r;
		r = recv_any(client, &a, fds, &n_fds, err);
		if (r < 0)
			return r;
		close_fds(client->kho, fds, n_fds);
		r = take_news(client, a, err);
		if (r < 0)
			return r;
		if (r == 0) {
			hang_up(client);
			return a->body_case == KHO__CONTROL__REPLY__BODY_ERROR ?
				kho_error_new(err, ECONNRESET, "khod", "%s", a->error->reason) :
				kho_error_new(err, EPROTO, "khod", "it answers what was not asked");
		}
	}
	if (client->news) {
		struct news *n = client->news;

		*event = n->event;
		client->news = n->next;
		free(n);
	}
	return 0;
}

/* What takes no descriptors, and whose reply says no more than that it is of kind @want. */
static int ask(struct kho_client *client, Kho__Control__Request *q,
	       Kho__Control__Reply__BodyCase want, struct kho_error **err)
{
	_cleanup_(replyp) Kho__Control__Reply *a = NULL;
	int r;

	client->serial++;
	r = send_request(client, q, NULL, 0, err);
	if (r < 0)
		return r;
	return recv_reply(client, want, &a, NULL, NULL, err);
}

/* A request that is answered by Done, or refused. */
static int ask_done(struct kho_client *client, Kho__Control__Request *q, struct kho_error **err)
{
	return ask(client, q, KHO__CONTROL__REPLY__BODY_DONE, err);
}

int kho_client_ready(struct kho_client *client, const struct kho_event *event,
		     struct kho_error **err)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Ready body = KHO__CONTROL__READY__INIT;

	body.name = (char *)event->workload;
	body.handover = event->handover;
	q.body_case = KHO__CONTROL__REQUEST__BODY_READY;
	q.ready = &body;
	return ask_done(client, &q, err);
}

int kho_client_veto(struct kho_client *client, const struct kho_event *event, const char *reason,
		    struct kho_error **err)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Veto body = KHO__CONTROL__VETO__INIT;

	body.name = (char *)event->workload;
	body.handover = event->handover;
	body.reason = (char *)reason;
	q.body_case = KHO__CONTROL__REQUEST__BODY_VETO;
	q.veto = &body;
	return ask_done(client, &q, err);
}

int kho_client_preserve(struct kho_client *client, bool force,
			void (*left_behind)(const char *name, const char *reason, void *userdata),
			void *userdata, struct kho_error **err)
{
	_cleanup_(replyp) Kho__Control__Reply *a = NULL;
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Preserve body = KHO__CONTROL__PRESERVE__INIT;
	int r;

	body.force = force;
	q.body_case = KHO__CONTROL__REQUEST__BODY_PRESERVE;
	q.preserve = &body;
	client->serial++;
	r = send_request(client, &q, NULL, 0, err);
	if (r < 0)
		return r;
	r = recv_reply(client, KHO__CONTROL__REPLY__BODY_PRESERVED, &a, NULL, NULL, err);
	if (r < 0)
		return r;
	for (size_t i = 0; left_behind && i < a->preserved->n_left_behind; i++)
		left_behind(a->preserved->left_behind[i]->name, a->preserved->left_behind[i]->reason,
			    userdata);
	return (int)(a->preserved->workloads & INT_MAX);
}

int kho_client_abort(struct kho_client *client, struct kho_error **err)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Abort body = KHO__CONTROL__ABORT__INIT;

	q.body_case = KHO__CONTROL__REQUEST__BODY_ABORT;
	q.abort = &body;
	return ask_done(client, &q, err);
}

struct claim_file {
	char *name;
	uint64_t token;
	bool may_have_lost_irq;
	int fd;
};

struct claim_id {
	uint64_t token;
	uint32_t old_id, id;
};

struct kho_claim {
	struct kho *kho;
	char *name;
	uint32_t handovers;
	struct claim_file *files;
	size_t n_files;
	enum kho_outcome outcome;
	char *reason;
	uint32_t uid;
	char *unit;
	struct claim_id *ids;
	size_t n_ids;
};

struct kho_claim *kho_claim_free(struct kho_claim *claim)
{
	if (claim) {
		for (size_t i = 0; i < claim->n_files; i++) {
			kho_close(claim->kho, claim->files[i].fd);
			free(claim->files[i].name);
		}
		free(claim->files);
		free(claim->ids);
		free(claim->reason);
		free(claim->unit);
		free(claim->name);
		free(claim);
	}
	return NULL;
}

static void claim_freep(struct kho_claim **c)
{
	kho_claim_free(*c);
}

size_t kho_claim_n_files(const struct kho_claim *claim)
{
	return claim->n_files;
}

uint32_t kho_claim_handovers(const struct kho_claim *claim)
{
	return claim->handovers;
}

const char *kho_claim_name(const struct kho_claim *claim, size_t index)
{
	return index < claim->n_files ? claim->files[index].name : NULL;
}

int kho_claim_fd(const struct kho_claim *claim, size_t index)
{
	return index < claim->n_files ? claim->files[index].fd : -1;
}

bool kho_claim_may_have_lost_irq(const struct kho_claim *claim, size_t index)
{
	return index < claim->n_files && claim->files[index].may_have_lost_irq;
}

int kho_claim_take_fd(struct kho_claim *claim, size_t index)
{
	return index < claim->n_files ? TAKE_FD(claim->files[index].fd) : -1;
}

enum kho_outcome kho_claim_outcome(const struct kho_claim *claim)
{
	return claim->outcome;
}

const char *kho_claim_reason(const struct kho_claim *claim)
{
	return claim->reason ? claim->reason : "";
}

uint32_t kho_claim_uid(const struct kho_claim *claim)
{
	return claim->uid;
}

const char *kho_claim_unit(const struct kho_claim *claim)
{
	return claim->unit ? claim->unit : "";
}

uint32_t kho_claim_id(const struct kho_claim *claim, const char *name, uint32_t id)
{
	for (size_t i = 0; i < claim->n_files; i++) {
		if (strcmp(claim->files[i].name, name) != 0)
			continue;
		for (size_t k = 0; k < claim->n_ids; k++)
			if (claim->ids[k].token == claim->files[i].token && claim->ids[k].old_id == id)
				return claim->ids[k].id;
	}
	return 0;
}

/* What the last packet says of the whole. */
static int claim_end(struct kho_claim *claim, const Kho__Control__ClaimReply *a,
		     struct kho_error **err)
{
	claim->outcome = (enum kho_outcome)a->outcome;
	claim->reason = strdup(a->reason);
	claim->uid = a->owner_uid;
	claim->unit = strdup(a->unit);
	claim->ids = calloc(a->n_ids + 1, sizeof(*claim->ids));
	if (!claim->reason || !claim->unit || !claim->ids)
		return kho_error_new(err, ENOMEM, claim->name, "out of memory");
	for (size_t i = 0; i < a->n_ids; i++)
		claim->ids[i] = (struct claim_id){ a->ids[i]->token, a->ids[i]->old_id, a->ids[i]->id };
	claim->n_ids = a->n_ids;
	return 0;
}

/* Takes ownership of @fds, also on error. */
static int claim_add(struct kho_claim *claim, const Kho__Control__ClaimReply *a, int *fds,
		     size_t n_fds, struct kho_error **err)
{
	struct claim_file *files;

	if (a->n_files != n_fds || claim->n_files + n_fds > KHO_IMAGE_FILES_MAX) {
		close_fds(claim->kho, fds, n_fds);
		return kho_error_new(err, EPROTO, claim->name,
				     "khod sent %zu descriptors for %zu files", n_fds,
				     a->n_files);
	}
	files = reallocarray(claim->files, claim->n_files + n_fds + 1, sizeof(*files));
	if (!files) {
		close_fds(claim->kho, fds, n_fds);
		return kho_error_new(err, ENOMEM, claim->name, "out of memory");
	}
	claim->files = files;
	for (size_t i = 0; i < n_fds; i++) {
		files[claim->n_files].name = strdup(a->files[i]->name);
		files[claim->n_files].token = a->files[i]->token;
		files[claim->n_files].may_have_lost_irq = a->files[i]->may_have_lost_irq;
		files[claim->n_files].fd = fds[i];
		claim->n_files++;
		if (!files[claim->n_files - 1].name) {
			close_fds(claim->kho, fds + i + 1, n_fds - i - 1);
			return kho_error_new(err, ENOMEM, claim->name, "out of memory");
		}
	}
	return 0;
}

void kho_client_set_owner(struct kho_client *client, uint32_t uid)
{
	client->has_owner = true;
	client->owner = uid;
}

int kho_client_claim(struct kho_client *client, const char *name, const void *secret,
		     size_t secret_size, struct kho_claim **ret, struct kho_error **err)
{
	_cleanup_(claim_freep) struct kho_claim *claim = NULL;
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Claim body = KHO__CONTROL__CLAIM__INIT;
	Kho__Control__Owner owner = KHO__CONTROL__OWNER__INIT;
	bool more = true;
	int r;

	claim = calloc(1, sizeof(*claim));
	if (!claim)
		return kho_error_new(err, ENOMEM, name, "out of memory");
	claim->kho = client->kho;
	claim->name = strdup(name);
	if (!claim->name)
		return kho_error_new(err, ENOMEM, name, "out of memory");

	body.name = (char *)name;
	body.claim_secret.data = (uint8_t *)secret;
	body.claim_secret.len = secret ? secret_size : 0;
	owner.uid = client->owner;
	body.owner = client->has_owner ? &owner : NULL;
	q.body_case = KHO__CONTROL__REQUEST__BODY_CLAIM;
	q.claim = &body;
	client->serial++;
	r = send_request(client, &q, NULL, 0, err);
	if (r < 0)
		return r;

	while (more) {
		_cleanup_(replyp) Kho__Control__Reply *a = NULL;
		int fds[KHO_WIRE_FDS_MAX];
		size_t n_fds;

		r = recv_reply(client, KHO__CONTROL__REPLY__BODY_CLAIM, &a, fds, &n_fds, err);
		if (r < 0)
			return r;
		more = a->claim->more;
		claim->handovers = a->claim->handovers;
		r = claim_add(claim, a->claim, fds, n_fds, err);
		if (r >= 0 && !more)
			r = claim_end(claim, a->claim, err);
		if (r < 0) {
			/* The rest of the answer would be taken for the next one. */
			hang_up(client);
			return r;
		}
	}
	*ret = TAKE_PTR(claim);
	return 0;
}

/* @policy: NULL ends custody */
static int acknowledge(struct kho_client *client, struct kho_claim *claim,
		       const struct kho_policy *policy, struct kho_error **err)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__ClaimAck body = KHO__CONTROL__CLAIM_ACK__INIT;
	Kho__Control__Policy wanted;

	if (policy) {
		policy_to_wire(policy, &wanted);
		wanted.keep = KHO__CONTROL__KEEP_MODE__KEEP_LEASE;
		body.policy = &wanted;
	}
	body.name = claim->name;
	q.body_case = KHO__CONTROL__REQUEST__BODY_CLAIM_ACK;
	q.claim_ack = &body;
	/* A khod that does not know of leases by claim would say that it is done. */
	return ask(client, &q, policy ? KHO__CONTROL__REPLY__BODY_REGISTERED : KHO__CONTROL__REPLY__BODY_DONE,
		   err);
}

int kho_client_claim_ack(struct kho_client *client, struct kho_claim *claim,
			 struct kho_error **err)
{
	return acknowledge(client, claim, NULL, err);
}

int kho_client_claim_lease(struct kho_client *client, struct kho_claim *claim,
			   const struct kho_policy *policy, struct kho_error **err)
{
	if (!policy)
		return kho_error_new(err, -EINVAL, claim->name, "a lease needs a policy");
	return acknowledge(client, claim, policy, err);
}

int kho_client_release(struct kho_client *client, const char *name, const void *secret,
		       size_t secret_size, struct kho_error **err)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Release body = KHO__CONTROL__RELEASE__INIT;
	Kho__Control__Owner owner = KHO__CONTROL__OWNER__INIT;

	body.name = (char *)name;
	body.claim_secret.data = (uint8_t *)secret;
	body.claim_secret.len = secret ? secret_size : 0;
	owner.uid = client->owner;
	body.owner = client->has_owner ? &owner : NULL;
	q.body_case = KHO__CONTROL__REQUEST__BODY_RELEASE;
	q.release = &body;
	return ask_done(client, &q, err);
}

const char *kho_workload_state_name(enum kho_workload_state state)
{
	switch (state) {
	case KHO_WORKLOAD_HELD:
		return "held";
	case KHO_WORKLOAD_CLAIMING:
		return "claiming";
	case KHO_WORKLOAD_UNREADABLE:
		return "unreadable";
	case KHO_WORKLOAD_FAILED:
		return "failed";
	case KHO_WORKLOAD_LEASED:
		return "leased";
	}
	return "unknown";
}

/* The replies themselves are kept; the public structs point into them. */
struct kho_workloads {
	Kho__Control__Reply **replies;
	size_t n_replies;
	struct kho_workload *items;
	size_t n_items;
};

struct kho_workloads *kho_workloads_free(struct kho_workloads *w)
{
	if (w) {
		for (size_t i = 0; i < w->n_items; i++)
			free((void *)w->items[i].files);
		for (size_t i = 0; i < w->n_replies; i++)
			kho_wire_reply_free(w->replies[i]);
		free(w->items);
		free(w->replies);
		free(w);
	}
	return NULL;
}

static void workloads_freep(struct kho_workloads **w)
{
	kho_workloads_free(*w);
}

size_t kho_workloads_n(const struct kho_workloads *workloads)
{
	return workloads->n_items;
}

const struct kho_workload *kho_workloads_get(const struct kho_workloads *workloads, size_t index)
{
	return index < workloads->n_items ? &workloads->items[index] : NULL;
}

static int workloads_add(struct kho_workloads *w, Kho__Control__Reply **reply,
			 struct kho_error **err)
{
	const Kho__Control__ListReply *l = (*reply)->list;
	struct kho_workload *items;
	Kho__Control__Reply **replies;

	replies = reallocarray(w->replies, w->n_replies + 1, sizeof(*replies));
	if (!replies)
		return kho_error_new(err, ENOMEM, "list", "out of memory");
	w->replies = replies;
	items = reallocarray(w->items, w->n_items + l->n_workloads + 1, sizeof(*items));
	if (!items)
		return kho_error_new(err, ENOMEM, "list", "out of memory");
	w->items = items;

	w->replies[w->n_replies++] = TAKE_PTR(*reply);
	for (size_t i = 0; i < l->n_workloads; i++) {
		const Kho__Control__WorkloadInfo *info = l->workloads[i];
		struct kho_workload_file *files = NULL;

		if (info->n_files > 0) {
			files = calloc(info->n_files, sizeof(*files));
			if (!files)
				return kho_error_new(err, ENOMEM, "list", "out of memory");
		}
		items[w->n_items++] = (struct kho_workload){
			.name = info->name,
			.unit = info->unit,
			.session = info->session,
			.reason = info->reason,
			.outcome = (enum kho_outcome)info->outcome,
			.outcome_reason = info->outcome_reason,
			.state = (enum kho_workload_state)info->state,
			.uid = info->owner_uid,
			.handovers = info->handovers,
			.registered_usec = info->registered_realtime_usec,
			.secret = info->secret,
			.survival = info->survival == KHO__CONTROL__SURVIVAL__SURVIVAL_BEST_EFFORT ?
					    KHO_SURVIVAL_BEST_EFFORT : KHO_SURVIVAL_MUST,
			.restore_failure =
				info->restore_failure == KHO__CONTROL__RESTORE_FAILURE__RESTORE_FAILURE_RELEASE ?
					KHO_RESTORE_FAILURE_RELEASE : KHO_RESTORE_FAILURE_QUIESCE,
			.claim_sec = info->claim_sec,
			.claim_left_sec = info->claim_left_sec,
			.may_lose_irq = info->may_lose_irq,
			.obstacle = info->obstacle,
			.memory = (enum kho_memory)info->memory,
			.prepare = info->prepare,
			.n_files = info->n_files > 0 ? info->n_files : info->count,
			.bytes = info->bytes,
			.files = files,
		};
		for (size_t k = 0; k < info->n_files; k++)
			files[k] = (struct kho_workload_file){
				.name = info->files[k]->name,
				.kind = info->files[k]->kind,
				.token = info->files[k]->token,
				.size = info->files[k]->size,
				.may_have_lost_irq = info->files[k]->may_have_lost_irq,
			};
	}
	return 0;
}

/* What came beside the answer to Show. Takes ownership of @fds. */
static int show_image(struct kho_client *c, int *fds, size_t n_fds, struct kho_image **image,
		      struct kho_error **err)
{
	int r = 0;

	if (n_fds == 1 && image)
		r = kho_image_read_fd(c->kho, fds[0], true, image, err);
	close_fds(c->kho, fds, n_fds);
	return r;
}

static int list_common(struct kho_client *c, Kho__Control__Request *q,
		       struct kho_workloads **ret, struct kho_image **image,
		       struct kho_error **err)
{
	_cleanup_(workloads_freep) struct kho_workloads *w = NULL;
	bool more = true;
	int r;

	w = calloc(1, sizeof(*w));
	if (!w)
		return kho_error_new(err, ENOMEM, "list", "out of memory");
	c->serial++;
	r = send_request(c, q, NULL, 0, err);
	if (r < 0)
		return r;
	while (more) {
		_cleanup_(replyp) Kho__Control__Reply *a = NULL;

		int fds[KHO_WIRE_FDS_MAX];
		size_t n_fds = 0;

		r = recv_reply(c, KHO__CONTROL__REPLY__BODY_LIST, &a, fds, &n_fds, err);
		if (r < 0)
			return r;
		more = a->list->more;
		r = show_image(c, fds, n_fds, image, err);
		if (r >= 0)
			r = workloads_add(w, &a, err);
		if (r < 0) {
			hang_up(c);
			return r;
		}
	}
	*ret = TAKE_PTR(w);
	return 0;
}

int kho_client_list(struct kho_client *client, struct kho_workloads **ret,
		    struct kho_error **err)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__List body = KHO__CONTROL__LIST__INIT;

	q.body_case = KHO__CONTROL__REQUEST__BODY_LIST;
	q.list = &body;
	return list_common(client, &q, ret, NULL, err);
}

int kho_client_show(struct kho_client *client, const char *name, struct kho_workloads **ret,
		    struct kho_image **image, struct kho_error **err)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Show body = KHO__CONTROL__SHOW__INIT;

	body.name = (char *)name;
	q.body_case = KHO__CONTROL__REQUEST__BODY_SHOW;
	q.show = &body;
	if (image)
		*image = NULL;
	return list_common(client, &q, ret, image, err);
}

struct status {
	struct kho_status pub;
	Kho__Control__Reply *reply;
};

int kho_client_status(struct kho_client *client, struct kho_status **ret,
		      struct kho_error **err)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Status body = KHO__CONTROL__STATUS__INIT;
	const Kho__Control__StatusReply *s;
	struct status *st;
	int r;

	q.body_case = KHO__CONTROL__REQUEST__BODY_STATUS;
	q.status = &body;
	st = calloc(1, sizeof(*st));
	if (!st)
		return kho_error_new(err, ENOMEM, "status", "out of memory");
	client->serial++;
	r = send_request(client, &q, NULL, 0, err);
	if (r >= 0)
		r = recv_reply(client, KHO__CONTROL__REPLY__BODY_STATUS, &st->reply, NULL, NULL,
			       err);
	if (r < 0) {
		free(st);
		return r;
	}
	s = st->reply->status;
	st->pub = (struct kho_status){
		.server = s->server,
		.liveupdate_reason = s->liveupdate_reason,
		.boot_id = s->boot_id,
		.kernel_release = s->kernel_release,
		.liveupdate = s->liveupdate,
		.retrieve_outgoing = s->retrieve_outgoing,
		.fdstore = s->fdstore,
		.fault_points = s->fault_points,
		.fdstore_used = s->fdstore_used,
		.fdstore_max = s->fdstore_max,
		.workloads = s->workloads,
		.workloads_failed = s->workloads_failed,
		.connections = s->connections,
		.bytes = s->bytes,
	};
	*ret = &st->pub;
	return 0;
}

struct kho_status *kho_status_free(struct kho_status *status)
{
	if (status) {
		struct status *st = (struct status *)status;

		kho_wire_reply_free(st->reply);
		free(st);
	}
	return NULL;
}

int kho_client_timeline(struct kho_client *client, struct kho_timeline **ret,
			struct kho_error **err)
{
	_cleanup_(replyp) Kho__Control__Reply *a = NULL;
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Timeline body = KHO__CONTROL__TIMELINE__INIT;
	int fds[KHO_WIRE_FDS_MAX], r;
	size_t n_fds = 0;

	q.body_case = KHO__CONTROL__REQUEST__BODY_TIMELINE;
	q.timeline = &body;
	client->serial++;
	r = send_request(client, &q, NULL, 0, err);
	if (r >= 0)
		r = recv_reply(client, KHO__CONTROL__REPLY__BODY_TIMELINE, &a, fds, &n_fds, err);
	if (r < 0)
		return r;
	r = n_fds == 1 ? kho_timeline_read(client->kho, fds[0], ret, err) :
			 kho_error_new(err, EPROTO, "khod", "its answer cannot be understood");
	close_fds(client->kho, fds, n_fds);
	return r;
}
