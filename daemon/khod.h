/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOD_H
#define KHOD_H

#include <stdint.h>
#include <sys/types.h>
#include <systemd/sd-bus.h>
#include <systemd/sd-event.h>

#include "fdstore.h"
#include "timeline.h"
#include "util.h"

/* Limits per user id; root's own are wider, not absent. */
#define MAX_CONNECTIONS 512
#define CONNECTIONS_FOR_ROOT 32	/* of these: an operator can always run khoctl */
#define MAX_CONNECTIONS_UID 16
#define MAX_CONNECTIONS_ROOT 128
#define MAX_WORKLOADS_UID 32
#define MAX_WORKLOADS_ROOT 1024
#define MAX_FILES_UID 1024
#define MAX_FILES_ROOT 16384
/* Descriptors of a user that are still being closed (closer.h): it is not heard with more. */
#define MAX_CLOSING_UID 2048
/*
 * Memory in custody cannot be swapped, and is charged to nobody's cgroup: as large a part of
 * the machine's as a user's runtime directory may take (RuntimeDirectorySize= of logind).
 * KHOD_USER_MEMORY_PERCENT= in the environment of khod sets another one.
 */
#define USER_MEMORY_PERCENT 10
/*
 * After a kexec: how long after READY what came over it is preserved for the next one, in seconds, so that
 * it does not compete with what starts then. KHOD_PRESERVE_DELAY_SEC= sets another time, 0: at once.
 */
#define PRESERVE_DELAY_SEC 10

/* Deadlines of a connection, in seconds. */
#define DEADLINE_HELLO 5
#define DEADLINE_REGISTER 30
#define DEADLINE_ACK 900	/* a client may write much memory to a disk first; one that dies hangs up */
#define DEADLINE_IDLE 300
/* How long a workload's client may take to be ready, in milliseconds. */
#define PREPARE_MSEC 10000
#define PREPARE_MSEC_MAX 60000

enum workload_state {
	WORKLOAD_HELD,		/* committed in an outgoing session */
	WORKLOAD_CLAIMING,	/* descriptors sent, not acknowledged yet */
	WORKLOAD_UNREADABLE,	/* held, but image and files come back only after a kexec */
	WORKLOAD_FAILED,	/* see reason */
	WORKLOAD_LEASED,	/* memory preserved, not committed: ends with its client's connection */
};

/* Where a workload stands in the handover (handover.c). */
enum prepare {
	PREPARE_NONE,
	PREPARE_ASKED,
	PREPARE_READY,		/* preserved, and its client knows */
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
 * @session: its session, outgoing, owned; -1 if none
 * @state: where it stands
 * @reason: for a failed one: why; for others NULL
 * @lease: as long as @client is there it is preserved for a handover only
 * @stray: its session is to be given up, and could not be: nothing in it counts
 * @client: connection that is asked before a handover, NULL if none
 * @prepare: what its client has answered
 * @prepare_msec: how long it may take to answer
 * @deadline: while it is asked: until when, CLOCK_MONOTONIC
 * @claim_retry: it could not be given up when its time had run out: not again before this, CLOCK_BOOTTIME
 * @image: what is known; NULL if it cannot be read
 * @fds: one per file of the image, owned; NULL if the kernel gives them back when asked
 * @stored: everything of this workload in the fd store
 * @n_stored: how many
 * @brought: what is left to do to preserve it for the next kexec (adopt.c), all of @fds are there;
 *	NULL: nothing
 * @watch: on the process that registered it; NULL: not known, or it has ended
 * @khod: for @watch
 */
struct workload {
	struct workload *next;
	char name[KHO_NAME_MAX + 1];
	char session_name[KHO_LUO_NAME_MAX];
	int session;
	enum workload_state state;
	char *reason;
	bool lease;
	bool stray;
	struct connection *client;
	enum prepare prepare;
	uint32_t prepare_msec;
	uint64_t deadline;
	uint64_t claim_retry;
	struct kho_image *image;
	int *fds;
	struct stored *stored;
	size_t n_stored;
	struct group *brought;
	sd_event_source *watch;
	struct khod *khod;
};

/* A descriptor that systemd passed at start, before it is sorted. */
struct passed {
	int fd;
	char fdname[FDSTORE_NAME_MAX];
};

struct connection;
struct group;
struct khod;

/* A workload that a handover goes on without. */
struct left_behind {
	char name[KHO_NAME_MAX + 1];
	char *reason;
};

/**
 * handover_done_t - everything is preserved, or it is not and all is as before
 * @r: 0, or -errno; then @object and @reason say what was in the way
 *
 * What is left behind is in khod->handover until the next one begins.
 */
typedef void (*handover_done_t)(struct khod *k, void *userdata, int r, const char *object,
				const char *reason);

/**
 * struct handover - see handover.c
 * @number: of the last one
 * @asking: clients are being waited for
 * @force: who is not ready is left behind, whatever its policy
 * @done: who wants to know
 * @userdata: for @done; also its identity
 * @timer: the next deadline
 * @left: left behind
 * @n_left: how many
 */
struct handover {
	uint64_t number;
	bool asking;
	bool force;
	bool overdue;		/* the time is up: who has answered is heard once more */
	handover_done_t done;
	void *userdata;
	sd_event_source *timer;
	struct left_behind *left;
	size_t n_left;
};

#define INHIBIT_WHY_MAX 300

/* A lock of logind's, or the question for it. */
struct inhibit_lock {
	int fd;			/* -1: not held */
	const char *fdname;	/* in systemd's store */
	bool stored;		/* it is there */
	char why[INHIBIT_WHY_MAX];	/* what logind was told; "": not known */
	sd_bus_slot *slot;	/* while logind is asked */
};

/**
 * struct inhibit - see inhibit.c
 * @bus: NULL: not connected
 * @block: a kexec is refused
 * @delay: a kexec waits for us
 * @mask: while systemd is asked to mask kexec.target, or to unmask it
 * @timer: to try again what did not work
 * @look: to look at the loaded kernel again
 * @delay_msec: how long logind waits for @delay
 * @shutdown: logind has announced one, and has not said that it is over
 * @kexec: it is a kexec
 * @known: an obstacle was there when it was announced
 * @waiting: it waits for a handover that somebody else has begun
 * @inherited: @delay is from the khod before this one: what logind is about to do is not known
 */
struct inhibit {
	sd_bus *bus;
	struct inhibit_lock block, delay;
	sd_bus_slot *mask;
	sd_event_source *timer;
	sd_event_source *look;
	uint32_t delay_msec;
	bool shutdown;
	bool known;
	bool kexec;
	bool waiting;
	bool inherited;
};

struct khod {
	struct kho *kho;
	sd_event *event;
	struct fdstore fdstore;
	struct inhibit inhibit;
	struct handover handover;
	struct timeline_log timeline;
	struct workload *workloads;
	sd_event_source *rest;		/* adopt.c: when all is preserved again */
	sd_event_source *deadline;	/* deadline.c: of the claim that has the least time */
	struct connection *connections;
	unsigned int n_connections;
	sd_event_source *listen_source;
	int listen_fd;
	char *socket_path;
	char *luo_reason;	/* why there is no live update; NULL if there is */
	bool retrieve_outgoing;
	uint64_t watchdog_usec;
	uint64_t busy_usec;	/* when khod_busy() said so last; 0: it is idle */
	int manifest_fd;	/* manifest.c; -1: there is none yet */
	uint64_t user_bytes;	/* what one user other than root may have in custody */
	uint64_t preserve_delay_usec;
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

/* What a client registers. */
struct registration {
	const char *name;
	const void *secret;
	size_t secret_size;
	bool lease;
	bool prepare;		/* ask its client before a handover; a lease: always */
	enum kho_survival survival;
	enum kho_restore_failure restore_failure;
	uint32_t prepare_msec;
	uint32_t claim_sec;
	bool may_lose_irq;
	char *const *names;	/* one per file */
	const int *fds;		/* borrowed */
	size_t n;
};

/** workload_register() - take files into custody, all or nothing. Return: 0, -errno. */
int workload_register(struct khod *k, const struct registration *reg, const struct identity *who,
		      struct workload **ret, struct kho_error **err);

/**
 * workload_new_image() - may it be registered, and the image that it will have
 * @old: the lease that it replaces; NULL: none
 *
 * Return: 0, -errno.
 */
int workload_new_image(struct khod *k, const struct registration *reg, const struct identity *who,
		       const struct workload *old, struct kho_image **ret, struct kho_error **err);
/** workload_dup_fds() - descriptors of khod's own; NULL: *@ret says why */
int *workload_dup_fds(struct khod *k, const int *fds, size_t n, int *ret);
/** workload_close_fds() - and free the array; NULL is allowed */
void workload_close_fds(struct khod *k, int *fds, size_t n);

/* lease.c */
/** lease_memory() - what a lease holds between handovers, in a session that it has not yet. Return: 0, -errno. */
int lease_memory(struct khod *k, struct workload *w, struct kho_error **err);
/**
 * lease_update() - other files, and another policy, for a lease
 * @w: leased
 * @reg: as if it were registered now
 *
 * Return: 0, -EBUSY (a handover is being prepared), -errno: it is what it was.
 */
int lease_update(struct khod *k, struct workload *w, const struct registration *reg,
		 const struct identity *who, struct kho_error **err);
/**
 * lease_claimed() - instead of the end of custody: a lease of who has claimed it
 * @w: at rest, and its client has all of it
 * @policy: what belongs to files in it is not looked at
 *
 * Return: 0, -EPERM, -EBUSY, -errno: it is held as before.
 */
int lease_claimed(struct khod *k, struct workload *w, const struct registration *policy,
		  const struct identity *who, struct kho_error **err);
/**
 * workload_commit() - preserve all of a leased workload: it is held then
 *
 * Return: 0, or -errno: then it is leased as before.
 */
int workload_commit(struct khod *k, struct workload *w, struct kho_error **err);
/**
 * workload_uncommit() - a lease is what it was: nothing but its memory is preserved
 *
 * Return: 0, or -errno: then it is held still.
 */
int workload_uncommit(struct khod *k, struct workload *w, struct kho_error **err);
/** workload_must() - does a kexec have to wait for it? */
bool workload_must(const struct workload *w);

/**
 * workload_authorise() - may this client claim or release it?
 * @owner: the user that root says it belongs to; NULL: it says nothing
 *
 * Root is judged as everybody is, unless it says whose workload it wants: names are one space
 * for all users, and a service is not to take another's for its own. Return: 0, -EPERM.
 */
int workload_authorise(const struct workload *w, const struct identity *who, const uid_t *owner,
		       const void *secret, size_t secret_size, struct kho_error **err);
/** workload_visible() - may this client see it in a list? */
bool workload_visible(const struct workload *w, const struct identity *who);

/**
 * workload_open_files() - descriptors of all files
 * @fds: as many as workload_n_files(); owned by the caller on success
 *
 * Return: 0, -EOPNOTSUPP (not before the kexec), -errno.
 */
int workload_open_files(struct khod *k, struct workload *w, int *fds, struct kho_error **err);

enum custody_end { CUSTODY_CLAIMED, CUSTODY_RELEASED, CUSTODY_LEASE_ENDED };
/**
 * workload_end() - custody ends: out of the fd store, unpreserved, forgotten
 *
 * @w is freed on success. Return: 0, -errno (then it is FAILED, nothing is discarded).
 */
int workload_end(struct khod *k, struct workload *w, enum custody_end how,
		 struct kho_error **err);

/* Its memfds; and what comes after them. As workload_preserve(). */
int workload_preserve_memory(struct khod *k, struct workload *w, const int *fds, bool again,
			     struct kho_error **err);
int workload_preserve_devices(struct khod *k, struct workload *w, const int *fds, bool again,
			      struct kho_error **err);
/**
 * workload_preserve() - all of its files into its session, memory before what maps it
 * @fds: one per file, borrowed
 * @again: after a kexec: some may be in it already, and the image has its graph
 *
 * Without @again the graph is read on the way, as soon as it cannot change any more.
 * Return: 0, -errno.
 */
int workload_preserve(struct khod *k, struct workload *w, const int *fds, bool again,
		      struct kho_error **err);

/* domain.c */
/**
 * domain_explain() - a file is somebody else's already: in which workload?
 * @image: of the one that it was to become part of
 * @kind: of the file
 * @fd: the file, borrowed
 * @err: gets a cause that names it, if it is found
 *
 * Return: 0: in none that khod knows; -EBUSY.
 */
int domain_explain(struct khod *k, const struct kho_image *image, enum kho_file_kind kind, int fd,
		   struct kho_error **err);

/* restore.c */
/**
 * graph_read() - what the workload's iommufds hold, from the kernel into its image
 * @fds: one per file of the image, borrowed
 *
 * Return: 0, -EOPNOTSUPP (something cannot be carried over, or is not in the workload), -errno.
 */
int graph_read(struct khod *k, struct kho_image *image, const int *fds, struct kho_error **err);
/**
 * graph_look() - graph_read() of a lease, and what else the kernel would refuse to preserve
 * @w: has descriptors of its own; what was read is in its image even if this fails
 *
 * Return: 0, -EOPNOTSUPP, -errno.
 */
int graph_look(struct khod *k, struct workload *w, struct kho_error **err);
/**
 * graph_translations() - how devices are translated at the moment, from the kernel into @w's graph
 * @ask: false: forget it, it is not for the next kernel
 *
 * What cannot be found out is not known, and no error: it is for people to see.
 */
void graph_translations(struct khod *k, struct workload *w, bool ask);
/**
 * graph_mapped() - which memfds do the areas of the workload's iommufds map?
 * @mapped: receives it, one per file of the image; false for all if it has no graph
 */
void graph_mapped(const struct kho_image *image, bool *mapped);
/** graph_may_have_lost_irq() - may the device whose file has that token have lost an interrupt? */
bool graph_may_have_lost_irq(const struct kho_image *image, uint64_t token);
/**
 * workload_restore() - move the devices of a workload under page tables of this kernel
 * @image: with the graph of the previous kernel, or already of this one; gets the ids of this
 *	one on success
 * @fds: one per file of the image, retrieved, borrowed; -1 for a memfd that no area maps
 * @steps: receives how many were missing
 *
 * Goes on where an earlier khod was cut off. Return: 0, or -errno: then the devices are on
 * their frozen page tables, as far as they could be moved back.
 */
int workload_restore(struct khod *k, struct kho_image *image, const int *fds, size_t *steps,
		     struct kho_error **err);

/* manifest.c */
#define MANIFEST_FDNAME "manifest"
/** manifest_write() - what is held has changed */
void manifest_write(struct khod *k);
/** manifest_of_this_boot() - has a khod come as far as writing it in this kernel? */
bool manifest_of_this_boot(struct khod *k);
/**
 * manifest_each() - whom the previous khod held, by name of session
 * @same_boot: whether that was in this kernel
 *
 * Return: 0, -EBADMSG (it cannot be read).
 */
int manifest_each(struct khod *k, void (*each)(struct khod *k, const char *session,
					       bool same_boot, void *userdata), void *userdata);

/* adopt.c */
/**
 * adopt() - bring everything systemd passed into order, so that workloads can be started
 * @passed: descriptors and names; ownership of all descriptors goes to adopt()
 *
 * The devices of each workload are under page tables of this kernel afterwards, or stopped, and
 * its files are here.
 */
void adopt(struct khod *k, struct passed *passed, size_t n);
/**
 * adopt_secure() - make sure that whatever comes, what adopt() brought back can be preserved again
 *
 * Workloads do not wait for that. They can be claimed afterwards.
 */
void adopt_secure(struct khod *k);
/** adopt_rest_of() - preserve it once more, for the next kexec, if it has not been yet; it may fail */
void adopt_rest_of(struct khod *k, struct workload *w);
/** adopt_rest() - preserve once more, for the next kexec, what has not been yet */
void adopt_rest(struct khod *k);
/** adopt_rest_later() - the same, when this machine has started; what needs it does not wait for that */
void adopt_rest_later(struct khod *k);
/**
 * adopt_end() - instead of preserving @w again: it is with a client, or nobody wants it
 * @left: receives whether something of it may be preserved until its session ends
 *
 * From then on nothing but what is in the fd store has its files. Return: 0, -errno.
 */
int adopt_end(struct khod *k, struct workload *w, bool *left, struct kho_error **err);
/** adopt_forget() - what was left to do of @w is not */
void adopt_forget(struct workload *w);
/**
 * workload_give_up() - stop the devices of a workload at rest, keep or free its memory by its policy
 * @why: one sentence, for its image
 *
 * What a client gets from then on is what a failed restore would have left.
 * Return: 0; -errno: it is held as before, or failed, with nothing of it discarded.
 */
int workload_give_up(struct khod *k, struct workload *w, const char *why, struct kho_error **err);

/* deadline.c */
/** boottime_usec() - CLOCK_BOOTTIME */
uint64_t boottime_usec(void);
/**
 * deadline_left() - how long a claim of the workload is still waited for
 *
 * Return: us; 0: its time is up; UINT64_MAX: nothing ends by itself.
 */
uint64_t deadline_left(const struct khod *k, const struct workload *w);
/** deadline_check() - give up what nobody has claimed in time, and wait for the next one */
void deadline_check(struct khod *k);
/** deadline_update() - what is held has changed */
void deadline_update(struct khod *k);

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
/** session_discard() - the session of a workload with all that is in it, which is unpreserved. Return: 0, -errno. */
int session_discard(struct khod *k, struct workload *w, struct kho_error **err);
/** session_await_end() - after the last close of our own: wait until nothing has it any more */
void session_await_end(struct khod *k, const char *session);
/** session_open() - an outgoing session for the workload, in the fd store */
int session_open(struct khod *k, struct workload *w, struct kho_error **err);
/** image_commit() - write the image and preserve it: the last step of both */
int image_commit(struct khod *k, struct kho_image *image, int session, struct kho_error **err);
/** khod_busy() - tell the watchdog that @bytes are about to be pinned or copied */
void khod_busy(struct khod *k, uint64_t bytes);
void khod_idle(struct khod *k);
/** khod_status_line() - workloads have changed: one line for systemctl status, and inhibit_update() */
void khod_status_line(struct khod *k);

/* inhibit.c */
/** inhibit_obstacle() - a workload that must survive and would not survive a kexec; NULL: none */
const struct workload *inhibit_obstacle(const struct khod *k);
/** inhibit_update() - take and drop locks, as what is held asks for it */
void inhibit_update(struct khod *k);
/** inhibit_handover_ended() - everybody is ready, or nobody: a kexec may wait for that */
void inhibit_handover_ended(struct khod *k, int r);
void inhibit_init(struct khod *k);
/** inhibit_passed() - if @fdname is a lock's: it goes on. Return: whether @fd has been taken. */
bool inhibit_passed(struct khod *k, const char *fdname, int fd);
void inhibit_stop(struct khod *k);

/* handover.c */
/**
 * handover_begin() - ask every workload that has a client, preserve those that are ready
 * @limit_msec: none may take longer; 0: no limit
 * @force: leave behind who is not ready, whatever its policy
 * @done: called once, perhaps before this returns, but not if this fails
 *
 * Return: 0, -EBUSY (there is one already).
 */
int handover_begin(struct khod *k, uint32_t limit_msec, bool force, handover_done_t done,
		   void *userdata, struct kho_error **err);
/**
 * handover_busy() - must what changes a workload that is asked before a handover wait for one?
 * @name: the workload, for @err
 * @w: it, if there is one: what it has promised counts, too; NULL
 *
 * Return: 0: no, -EBUSY.
 */
int handover_busy(const struct khod *k, const char *name, const struct workload *w, struct kho_error **err);
/** handover_abort() - everything is as before. Return: 0, -errno (not everything). */
int handover_abort(struct khod *k, const char *reason, struct kho_error **err);
/** handover_forget() - if @userdata waits for the handover: it has gone, so abort it */
void handover_forget(struct khod *k, const void *userdata);
/** handover_ready() - its client has changed the last thing. Return: 0 (preserved), -ESTALE, -errno. */
int handover_ready(struct khod *k, struct workload *w, uint64_t number, struct kho_error **err);
/** handover_veto() - @reason: printable. Return: 0, -ESTALE. */
int handover_veto(struct khod *k, struct workload *w, uint64_t number, const char *reason,
		  struct kho_error **err);
/** handover_client_gone() - the connection of @w->client ends; a lease with it: @w may be freed */
void handover_client_gone(struct khod *k, struct workload *w);
/** handover_step() - after any of these two, or the end of a workload: is it complete? */
void handover_step(struct khod *k);
void handover_stop(struct khod *k);

/* server.c */
/** server_prepare() - ask a client. Return: 0, -errno: it cannot be reached. */
int server_prepare(struct connection *c, const struct workload *w, uint64_t number,
		   uint32_t msec);
/** server_aborted() - tell a client, if it can be reached */
void server_aborted(struct connection *c, const struct workload *w, uint64_t number,
		    const char *reason);
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
