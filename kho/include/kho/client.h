/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_CLIENT_H
#define KHO_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kho/error.h>
#include <kho/image.h>
#include <kho/ops.h>
#include <kho/timeline.h>

#ifdef __cplusplus
extern "C" {
#endif

/** KHO_SOCKET - where khod listens */
#define KHO_SOCKET "/run/khod/khod.sock"

/**
 * struct kho_client - a connection to khod
 *
 * Calls block until khod has answered or its deadline has passed (-ETIMEDOUT).
 * A refusal by khod has khod's errno, and an error that names the object and the
 * reason. One that breaks the protocol (a secret of a wrong size, a policy that khod does
 * not know) ends the connection, as every error of the transport does, and being idle for
 * longer than khod(8) allows: it is dead then (-ENOTCONN).
 */
struct kho_client;

/**
 * kho_client_connect() - connect and agree on a version
 * @kho: handle, must outlive the client
 * @path: socket; NULL: KHO_SOCKET
 * @ret: the client, freed with kho_client_free()
 * @err: error
 *
 * Return: 0, -ENOENT or -ECONNREFUSED (khod does not listen), -EPROTO (no common
 * version), -errno.
 */
int kho_client_connect(struct kho *kho, const char *path, struct kho_client **ret,
		       struct kho_error **err);
/** kho_client_free() - disconnect; NULL is allowed. Return: NULL. */
struct kho_client *kho_client_free(struct kho_client *client);

/**
 * struct kho_client_file - a descriptor to register
 * @name: its name, unique in the workload
 * @fd: the descriptor, borrowed: khod gets its own
 */
struct kho_client_file {
	const char *name;
	int fd;
};

/**
 * kho_client_register() - give descriptors into khod's custody
 * @client: connection
 * @name: name of the workload
 * @files: what to keep
 * @n_files: 1 to KHO_IMAGE_FILES_MAX
 * @secret: claim secret, so that whoever knows it may claim; NULL: uid and unit decide
 * @secret_size: KHO_SECRET_MIN to KHO_SECRET_MAX bytes, 0 without a secret
 * @err: error
 *
 * When this returns 0 every descriptor is preserved in the workload's own LUO
 * session, and survives the client, khod, and the kernel. From then until the
 * claim is acknowledged a memfd's contents may change but not its size.
 * Return: 0, -EEXIST (name in use), -EBUSY (a memfd is preserved already),
 * -EDQUOT (a limit), -errno. -ECONNRESET: unknown, ask kho_client_list().
 */
int kho_client_register(struct kho_client *client, const char *name,
			const struct kho_client_file *files, size_t n_files, const void *secret,
			size_t secret_size, struct kho_error **err);

enum kho_keep {
	KHO_KEEP_HOLD = 0,
	KHO_KEEP_LEASE = 1,
};

/**
 * struct kho_policy - what a client asks for when it registers; all 0: as kho_client_register()
 * @keep: KHO_KEEP_HOLD: preserved from the answer on, whatever becomes of the client.
 *	KHO_KEEP_LEASE: mappings and attachments can be changed, only memfds must keep their
 *	size; all is preserved when a handover is prepared. Until then the lease ends with the
 *	connection, or with khod: khod drops its descriptors, the client has its own
 * @prepare: ask on this connection before a handover (kho_client_event()); a lease is always
 *	asked
 * @survival: what becomes of a handover for which the workload is not ready
 * @restore_failure: what becomes of devices that cannot be restored in the next kernel
 * @prepare_msec: how long kho_client_ready() may be waited for, at most 60000; 0: 10000. A
 *	plain systemctl kexec may have to cut it to what logind grants
 * @claim_sec: how many seconds a claim is waited for after a handover; 0: for ever. It counts
 *	from when khod has everything in order, in each kernel anew. Then the devices are
 *	stopped, and the memory is kept or freed as @restore_failure says; who claims it later
 *	gets KHO_OUTCOME_QUIESCED and the reason. Memory that has no devices and is kept anyway
 *	is not affected
 * @may_lose_irq: its devices may use interrupts that they cannot keep pending while the kernel
 *	is replaced: INTx, and MSI other than MSI-X. Without it a device that uses them is refused.
 *	kho_claim_may_have_lost_irq() tells which it concerns. It takes the place of what
 *	VFIO_DEVICE_FEATURE_LIVEUPDATE has set
 */
struct kho_policy {
	enum kho_keep keep;
	bool prepare;
	enum kho_survival survival;
	enum kho_restore_failure restore_failure;
	uint32_t prepare_msec;
	uint32_t claim_sec;
	bool may_lose_irq;
};

/**
 * kho_client_register_policy() - as kho_client_register(), with a policy
 * @policy: borrowed; NULL: the default
 *
 * With a lease, or with @policy->prepare, the connection has to be kept, and
 * kho_client_event() called whenever kho_client_fd() is readable.
 *
 * A connection that is lost (-ECONNRESET) means that khod has ended, and the lease with it:
 * connect and register again. -EEXIST then says that khod had preserved it before: release it
 * first, which leaves the client's own descriptors as they are.
 * Return: as kho_client_register(); -EBUSY also while a handover is prepared.
 */
int kho_client_register_policy(struct kho_client *client, const char *name,
			       const struct kho_client_file *files, size_t n_files,
			       const void *secret, size_t secret_size,
			       const struct kho_policy *policy, struct kho_error **err);

/**
 * kho_client_update() - other files, or another policy, for a lease of this connection
 * @client: connection
 * @name: what it leases
 * @files: all files that it is to have from now on, descriptors stay the caller's
 * @n_files: how many
 * @secret: claim secret that it is to have from now on, or NULL
 * @secret_size: its size in bytes
 * @policy: borrowed; a lease, too
 * @err: error
 *
 * At once: a handover takes along what was leased before or what is now. If this is refused it is what
 * was leased before.
 * Return: as kho_client_register_policy(); -ENOENT: no lease of that name on this connection.
 */
int kho_client_update(struct kho_client *client, const char *name,
		      const struct kho_client_file *files, size_t n_files, const void *secret,
		      size_t secret_size, const struct kho_policy *policy, struct kho_error **err);

/** kho_client_fd() - to wait on until it is readable; owned by the client; -1: disconnected */
int kho_client_fd(const struct kho_client *client);

/**
 * enum kho_event_kind - what khod tells without being asked
 * @KHO_EVENT_NONE: nothing
 * @KHO_EVENT_PREPARE: a handover begins. Change no mapping and no attachment any more, write
 *	what the next kernel needs into memfds of the workload, and call kho_client_ready() or
 *	kho_client_veto() in time
 * @KHO_EVENT_ABORTED: it goes on without the workload, or not at all: all may be changed again
 */
enum kho_event_kind {
	KHO_EVENT_NONE = 0,
	KHO_EVENT_PREPARE = 1,
	KHO_EVENT_ABORTED = 2,
};

/**
 * struct kho_event - one piece of news
 * @kind: which
 * @workload: its name
 * @handover: number of the handover
 * @msec: KHO_EVENT_PREPARE: how long the answer may take
 * @reason: KHO_EVENT_ABORTED: why, one sentence
 */
struct kho_event {
	enum kho_event_kind kind;
	char workload[KHO_NAME_MAX + 1];
	uint64_t handover;
	uint32_t msec;
	char reason[KHO_REASON_MAX + 1];
};

/**
 * kho_client_event() - the next piece of news, also one that came while a call waited
 * @client: connection
 * @timeout_msec: how long to wait for one; 0: not at all; -1: for ever
 * @event: receives it; its kind is KHO_EVENT_NONE if none came in time
 * @err: error
 *
 * Return: 0, -ECONNRESET (khod has ended), -errno.
 */
int kho_client_event(struct kho_client *client, int timeout_msec, struct kho_event *event,
		     struct kho_error **err);

/**
 * kho_client_ready() - answer KHO_EVENT_PREPARE: nothing will be changed any more
 * @client: the connection that registered
 * @event: what is answered
 * @err: error
 *
 * When this returns 0 all of the workload is preserved, and the client may exit.
 * Return: 0; -ESTALE: that handover is not waited for any more; -errno: it cannot be
 * preserved, for the reason given. With any error everything may be changed again.
 */
int kho_client_ready(struct kho_client *client, const struct kho_event *event,
		     struct kho_error **err);
/**
 * kho_client_veto() - answer KHO_EVENT_PREPARE: not now
 * @client: the connection that registered
 * @event: what is answered
 * @reason: one sentence for the operator; what is not printable ASCII is replaced
 * @err: error
 *
 * Return: 0, -ESTALE, -errno.
 */
int kho_client_veto(struct kho_client *client, const struct kho_event *event, const char *reason,
		    struct kho_error **err);

/**
 * kho_client_preserve() - prepare a handover, and preserve everything now; for root
 * @client: connection; what was done is undone if it ends before the answer
 * @force: go on without workloads that are not ready, whatever their policy
 * @left_behind: called with the name of each workload that is left behind, and why; may be NULL
 * @userdata: for @left_behind
 * @err: error
 *
 * Return: how many workloads the next kexec carries. -EBUSY: a handover is being prepared
 * already. -ECANCELED: @err names the workload that is not ready and the reason; everything
 * is as before.
 */
int kho_client_preserve(struct kho_client *client, bool force,
			void (*left_behind)(const char *name, const char *reason, void *userdata),
			void *userdata, struct kho_error **err);
/**
 * kho_client_abort() - undo kho_client_preserve(), or break it off; for root
 * @client: connection
 * @err: error
 *
 * What has nothing to undo is a success. Workloads without a client stay preserved.
 * Return: 0, -errno.
 */
int kho_client_abort(struct kho_client *client, struct kho_error **err);

/**
 * kho_client_set_owner() - whose workloads are claimed and released on this connection; for root
 * @client: connection
 * @uid: the user that they were registered by, from whatever unit
 *
 * Names are one space for all users. Without this root gets what it registered itself, from
 * the same unit if that was a service; with it, what is another user's than @uid is refused.
 */
void kho_client_set_owner(struct kho_client *client, uint32_t uid);

/** struct kho_claim - descriptors received for a claim, until acknowledged still in custody */
struct kho_claim;

/**
 * kho_client_claim() - ask for the descriptors of a workload
 * @client: connection
 * @name: name of the workload
 * @secret: claim secret, or NULL
 * @secret_size: its size in bytes
 * @ret: the claim, freed with kho_claim_free()
 * @err: error
 *
 * Nothing changes until kho_client_claim_ack(): a client that dies before it can
 * claim again.
 * Return: 0, -ENOENT, -EPERM, -EBUSY (being claimed, or leased, by another client),
 * -EOPNOTSUPP (it cannot be read before the next kexec), -EIO (it has failed), -errno.
 */
int kho_client_claim(struct kho_client *client, const char *name, const void *secret,
		     size_t secret_size, struct kho_claim **ret, struct kho_error **err);
/**
 * kho_client_claim_ack() - end khod's custody
 * @client: the connection that claimed
 * @claim: the claim, its descriptors stay the caller's
 * @err: error
 *
 * Return: 0: nothing of the workload is preserved any more. -ECONNRESET: the
 * descriptors are good, whether custody ended is unknown.
 */
int kho_client_claim_ack(struct kho_client *client, struct kho_claim *claim,
			 struct kho_error **err);
/**
 * kho_client_claim_lease() - lease what was claimed, instead of ending khod's custody
 * @client: the connection that claimed, which has to be kept
 * @claim: the claim, its descriptors stay the caller's
 * @policy: borrowed; taken for a lease whatever its keep says
 * @err: error
 *
 * No handover can come between, as it could between kho_client_claim_ack() and
 * kho_client_register_policy(). Mappings and attachments can be changed from then on.
 * Return: 0. -EINVAL (no policy), -EPERM (claimed as another user's), -EBUSY (a handover is
 * being prepared), -errno: it is held as before, and can be claimed again. -ECONNRESET: unknown.
 */
int kho_client_claim_lease(struct kho_client *client, struct kho_claim *claim,
			   const struct kho_policy *policy, struct kho_error **err);
/** kho_claim_free() - closes the descriptors that were not taken; NULL is allowed. Return: NULL. */
struct kho_claim *kho_claim_free(struct kho_claim *claim);
size_t kho_claim_n_files(const struct kho_claim *claim);
/** kho_claim_handovers() - how many kernels it has been carried into */
uint32_t kho_claim_handovers(const struct kho_claim *claim);
/** kho_claim_uid() - the user that registered it */
uint32_t kho_claim_uid(const struct kho_claim *claim);
/** kho_claim_unit() - the systemd unit that it was registered from, or ""; owned by the claim */
const char *kho_claim_unit(const struct kho_claim *claim);
/**
 * kho_claim_outcome() - how its devices came out of the last handover
 *
 * With KHO_OUTCOME_QUIESCED there are only memfds, those that were not lost; with
 * KHO_RESTORE_FAILURE_RELEASE nothing.
 */
enum kho_outcome kho_claim_outcome(const struct kho_claim *claim);
/** kho_claim_reason() - why the outcome is not better, "" if there is no reason; owned by the claim */
const char *kho_claim_reason(const struct kho_claim *claim);
/**
 * kho_claim_id() - what an id in an iommufd has become
 * @claim: the claim
 * @name: the client's name of the iommufd
 * @id: of an IOAS, HWPT or device, when it was registered
 *
 * Return: its id now; 0: there is no such object.
 */
uint32_t kho_claim_id(const struct kho_claim *claim, const char *name, uint32_t id);
/** kho_claim_name() - the client's name of the @index-th file, NULL if none; owned by the claim */
const char *kho_claim_name(const struct kho_claim *claim, size_t index);
/** kho_claim_fd() - the @index-th descriptor, still owned by the claim; -1 if none or taken */
int kho_claim_fd(const struct kho_claim *claim, size_t index);
/**
 * kho_claim_may_have_lost_irq() - may the device have lost an interrupt since it was registered?
 * @claim: the claim
 * @index: of the file
 *
 * Only with kho_policy.may_lose_irq: true unless the device used MSI-X when it came over. Look at the
 * device as if each of its interrupts had come.
 */
bool kho_claim_may_have_lost_irq(const struct kho_claim *claim, size_t index);
/** kho_claim_take_fd() - the @index-th descriptor (close-on-exec), now the caller's; -1 if none */
int kho_claim_take_fd(struct kho_claim *claim, size_t index);

/**
 * kho_client_release() - discard a workload
 * @client: connection
 * @name: name of the workload
 * @secret: claim secret, or NULL
 * @secret_size: its size in bytes
 * @err: error
 *
 * Return: 0, -ENOENT, -EPERM, -EBUSY, -errno.
 */
int kho_client_release(struct kho_client *client, const char *name, const void *secret,
		       size_t secret_size, struct kho_error **err);

enum kho_workload_state {
	KHO_WORKLOAD_HELD = 1,
	KHO_WORKLOAD_CLAIMING = 2,
	KHO_WORKLOAD_UNREADABLE = 3,
	KHO_WORKLOAD_FAILED = 4,
	KHO_WORKLOAD_LEASED = 6,
};
/** kho_workload_state_name() - "held" etc.; "unknown" for what this library does not know */
const char *kho_workload_state_name(enum kho_workload_state state);

/**
 * struct kho_workload_file - one file of a listed workload
 * @name: the client's name
 * @kind: "memfd" etc.
 * @token: LUO token
 * @size: bytes
 * @may_have_lost_irq: of a device: in a handover since it was registered
 */
struct kho_workload_file {
	const char *name;
	const char *kind;
	uint64_t token;
	uint64_t size;
	bool may_have_lost_irq;
};

/**
 * enum kho_memory - when memory is preserved, and pages that lie in KHO's scratch are moved out of it
 * @KHO_MEMORY_UNKNOWN: this khod does not tell
 * @KHO_MEMORY_PRESERVED: it has been: none is moved when the kernel is replaced
 * @KHO_MEMORY_SOON: it came over the last kexec, and is preserved for the next one in a moment, at the
 *	latest when a kexec is announced; its pages lie where they can stay
 * @KHO_MEMORY_AT_HANDOVER: when a handover is prepared, before any unit is stopped: to do so ahead has failed
 */
enum kho_memory {
	KHO_MEMORY_UNKNOWN = 0,
	KHO_MEMORY_PRESERVED = 1,
	KHO_MEMORY_SOON = 2,
	KHO_MEMORY_AT_HANDOVER = 3,
};

/**
 * struct kho_workload - one listed workload
 * @name: its name
 * @unit: systemd unit it was registered from, or ""
 * @session: name of its LUO session
 * @reason: why it is not simply held, or ""
 * @outcome: how its devices came out of the last handover
 * @outcome_reason: why that is not better, or ""
 * @state: where it stands
 * @uid: its owner
 * @handovers: kernels it has been carried into
 * @registered_usec: CLOCK_REALTIME
 * @secret: a claim secret is set
 * @survival: what it means to a handover
 * @restore_failure: what becomes of devices that cannot be restored
 * @prepare: a client is connected that is asked before a handover
 * @claim_sec: how long a claim is waited for after a handover; 0: for ever
 * @claim_left_sec: of that, in this kernel; 0: nothing ends by itself
 * @may_lose_irq: interrupts that its devices cannot keep pending may get lost
 * @obstacle: of a leased one, from kho_client_show() by root: why a handover would not take it along
 *	if it came now, or ""
 * @memory: when it is preserved
 * @n_files: files in it
 * @bytes: sum of their sizes
 * @files: @n_files of them; NULL unless from kho_client_show()
 */
struct kho_workload {
	const char *name;
	const char *unit;
	const char *session;
	const char *reason;
	enum kho_outcome outcome;
	const char *outcome_reason;
	enum kho_workload_state state;
	uint32_t uid;
	uint32_t handovers;
	uint64_t registered_usec;
	bool secret;
	enum kho_survival survival;
	enum kho_restore_failure restore_failure;
	bool prepare;
	uint32_t claim_sec;
	uint32_t claim_left_sec;
	bool may_lose_irq;
	const char *obstacle;
	enum kho_memory memory;
	size_t n_files;
	uint64_t bytes;
	const struct kho_workload_file *files;
};

/** struct kho_workloads - an answer with workloads in it */
struct kho_workloads;
/** kho_workloads_free() - NULL is allowed. Return: NULL. */
struct kho_workloads *kho_workloads_free(struct kho_workloads *workloads);
size_t kho_workloads_n(const struct kho_workloads *workloads);
/** kho_workloads_get() - the @index-th, owned by @workloads; NULL if none */
const struct kho_workload *kho_workloads_get(const struct kho_workloads *workloads, size_t index);

/** kho_client_list() - the caller's workloads (root: all), without their files. Return: 0 or -errno. */
int kho_client_list(struct kho_client *client, struct kho_workloads **ret,
		    struct kho_error **err);
/**
 * kho_client_show() - one workload with its files
 * @client: connection
 * @name: name of the workload
 * @ret: receives it, freed with kho_workloads_free()
 * @image: receives its image without the claim secret, freed with kho_image_free(), NULL if
 *	khod cannot read it; NULL: nobody is interested
 * @err: error
 *
 * Return: 0, -ENOENT, -EPERM or -errno.
 */
int kho_client_show(struct kho_client *client, const char *name, struct kho_workloads **ret,
		    struct kho_image **image, struct kho_error **err);

/**
 * struct kho_status - how khod is
 * @server: program and version
 * @liveupdate: the kernel can carry files over
 * @liveupdate_reason: if not: why, and what to do
 * @retrieve_outgoing: what is held can be given back before a kexec
 * @fdstore: systemd keeps khod's sessions
 * @fault_points: a test build
 * @fdstore_used: descriptors in systemd's store
 * @fdstore_max: room in it
 * @workloads: how many are known
 * @workloads_failed: how many of them failed
 * @connections: clients connected
 * @bytes: sum over all workloads
 * @boot_id: of the running kernel
 * @kernel_release: of the running kernel
 */
struct kho_status {
	const char *server;
	const char *liveupdate_reason;
	const char *boot_id;
	const char *kernel_release;
	bool liveupdate;
	bool retrieve_outgoing;
	bool fdstore;
	bool fault_points;
	uint32_t fdstore_used;
	uint32_t fdstore_max;
	uint32_t workloads;
	uint32_t workloads_failed;
	uint32_t connections;
	uint64_t bytes;
};

/**
 * kho_client_status() - how khod is
 * @ret: receives it, freed with kho_status_free(); strings belong to it
 *
 * Return: 0 or -errno.
 */
int kho_client_status(struct kho_client *client, struct kho_status **ret,
		      struct kho_error **err);
/** kho_status_free() - NULL is allowed. Return: NULL. */
struct kho_status *kho_status_free(struct kho_status *status);

/**
 * kho_client_timeline() - what happened when in the last handover
 * @client: connection of root
 * @ret: receives it, freed with kho_timeline_free()
 * @err: error
 *
 * Return: 0, -EPERM, -ENODATA (none is recorded), -errno.
 */
int kho_client_timeline(struct kho_client *client, struct kho_timeline **ret,
			struct kho_error **err);

#ifdef __cplusplus
}
#endif
#endif
