/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOD_H
#define KHOD_H

#include <stdint.h>
#include <sys/types.h>
#include <systemd/sd-event.h>

#include "fdstore.h"
#include "util.h"

/* Limits per user id; root's own are wider, not absent. */
#define MAX_CONNECTIONS 512
#define MAX_CONNECTIONS_UID 16
#define MAX_CONNECTIONS_ROOT 128
#define MAX_WORKLOADS_UID 32
#define MAX_WORKLOADS_ROOT 1024
#define MAX_FILES_UID 1024
#define MAX_FILES_ROOT 16384

/* Deadlines of a connection, in seconds. */
#define DEADLINE_HELLO 5
#define DEADLINE_REGISTER 30
#define DEADLINE_ACK 30
#define DEADLINE_IDLE 300

enum workload_state {
	WORKLOAD_HELD,		/* committed in an outgoing session */
	WORKLOAD_CLAIMING,	/* descriptors sent; not acknowledged, or not finished yet */
	WORKLOAD_UNREADABLE,	/* held, but image and files come back only after a kexec */
	WORKLOAD_INCOMING,	/* with devices, in the session of the previous kernel */
	WORKLOAD_FAILED,	/* see reason */
};

/* One descriptor of ours in systemd's store. */
struct stored {
	char fdname[FDSTORE_NAME_MAX];
	int fd;			/* ours; -1: only systemd has it */
};

/**
 * struct workload - one workload in custody
 * @next: list
 * @name: its name
 * @session_name: of its session, "" if it failed without one
 * @session: its session, owned; -1 if none. Outgoing, but incoming in WORKLOAD_INCOMING
 *	and while such a one is claimed
 * @state: where it stands
 * @incoming: its session is one of the previous kernel, in whatever state it is
 * @reason: for a failed one: why; for others NULL
 * @image: what is known; NULL if it cannot be read
 * @fds: one per file of the image, owned; NULL if the kernel gives them back when asked
 * @stored: everything of this workload in the fd store
 * @n_stored: how many
 */
struct workload {
	struct workload *next;
	char name[KHO_NAME_MAX + 1];
	char session_name[KHO_LUO_NAME_MAX];
	int session;
	enum workload_state state;
	bool incoming;
	char *reason;
	struct kho_image *image;
	int *fds;
	struct stored *stored;
	size_t n_stored;
};

/* A descriptor that systemd passed at start, before it is sorted. */
struct passed {
	int fd;
	char fdname[FDSTORE_NAME_MAX];
};

struct connection;

struct khod {
	struct kho *kho;
	sd_event *event;
	struct fdstore fdstore;
	struct workload *workloads;
	struct connection *connections;
	unsigned int n_connections;
	sd_event_source *listen_source;
	int listen_fd;
	char *socket_path;
	char *luo_reason;	/* why there is no live update; NULL if there is */
	bool retrieve_outgoing;
	uint64_t watchdog_usec;
	char boot_id[37];
	char kernel_release[65];
};

/* A client's identity. Never its pid: that is reused. */
struct identity {
	uid_t uid;
	char unit[KHO_IMAGE_UNIT_MAX + 1];
};

/* workload.c */
struct workload *workload_find(struct khod *k, const char *name);
/** workload_free() - forget it; what is in the fd store stays there */
void workload_free(struct khod *k, struct workload *w);
size_t workload_n_files(const struct workload *w);
uint64_t workload_bytes(const struct workload *w);
const char *workload_reason(const struct workload *w);

/**
 * workload_register() - take files into custody
 * @names: one per file
 * @fds: borrowed
 *
 * All or nothing. Return: 0, -errno.
 */
int workload_register(struct khod *k, const char *name, const struct identity *who,
		      const void *secret, size_t secret_size, char *const *names, const int *fds,
		      size_t n, struct workload **ret, struct kho_error **err);

/** workload_authorise() - may this client claim or release it? Return: 0, -EPERM. */
int workload_authorise(const struct workload *w, const struct identity *who, const void *secret,
		       size_t secret_size, struct kho_error **err);
/** workload_visible() - may this client see it in a list? */
bool workload_visible(const struct workload *w, const struct identity *who);

/**
 * workload_open_files() - descriptors of all files
 * @fds: as many as workload_n_files(); owned by the caller on success
 *
 * Return: 0, -EOPNOTSUPP (not before the kexec), -errno.
 */
int workload_open_files(struct khod *k, struct workload *w, int *fds, struct kho_error **err);

/** workload_handovers() - kernels it was carried into, this one included */
uint32_t workload_handovers(const struct workload *w);

/**
 * workload_finish() - is a claimed workload with devices under its client's control?
 *
 * The kernel decides: it finishes an incoming session only when each device is bound,
 * and attached to something else than its frozen HWPT. May be asked at any time.
 * Return: 0: custody has ended and @w is freed; -EBUSY: not yet; -errno.
 */
int workload_finish(struct khod *k, struct workload *w, struct kho_error **err);

enum custody_end { CUSTODY_CLAIMED, CUSTODY_RELEASED };
/**
 * workload_end() - custody ends: out of the fd store, unpreserved, forgotten
 *
 * @w is freed on success. Return: 0, -errno (then it is FAILED, nothing is discarded).
 */
int workload_end(struct khod *k, struct workload *w, enum custody_end how,
		 struct kho_error **err);

/* adopt.c */
/**
 * adopt() - bring everything systemd passed into the resting state
 * @passed: descriptors and names; ownership of all descriptors goes to adopt()
 */
void adopt(struct khod *k, struct passed *passed, size_t n);

/* shared by both */
struct workload *workload_new(struct khod *k, const char *name);
int workload_add_stored(struct workload *w, const char *fdname, int fd);
/** workload_unstore() - one descriptor out of the fd store and closed */
int workload_unstore(struct khod *k, struct workload *w, const char *fdname,
		     struct kho_error **err);
void workload_fail(struct workload *w, struct kho_error **err, int r);
/** session_new() - create an outgoing session; @origin 'r': register, 't': transfer */
int session_new(struct khod *k, const char *name, char origin, char ret[KHO_LUO_NAME_MAX],
		struct kho_error **err);
/** session_parse() - is @session one of ours? then the workload's name and the origin */
bool session_parse(const char *session, char name[KHO_NAME_MAX + 1], char *origin);
void session_fdname(const char *session, char fdname[FDSTORE_NAME_MAX]);
/** image_commit() - write the image and preserve it: the last step of both */
int image_commit(struct khod *k, struct kho_image *image, int session, struct kho_error **err);
/** khod_busy() - tell the watchdog that @bytes are about to be pinned or copied */
void khod_busy(struct khod *k, uint64_t bytes);
void khod_idle(struct khod *k);
/** khod_status_line() - one line for systemctl status */
void khod_status_line(struct khod *k);

/* server.c */
int server_start(struct khod *k, struct kho_error **err);
void server_stop(struct khod *k);

/**
 * khod_main() - the daemon
 * @ops: the kernel; NULL: the real one
 *
 * Return: exit status.
 */
int khod_main(int argc, char **argv, const struct kho_ops *ops, void *userdata);

#endif
