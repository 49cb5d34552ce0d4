/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOD_FAULT_H
#define KHOD_FAULT_H

#include <stdio.h>

/*
 * Named places at which khod can be made to die (KHOD_FAULT=name[:N], SIGKILL at
 * the N-th pass), one between every two steps that have an effect outside the
 * process. Only in builds with -Dfault_points=true.
 *
 * X(identifier, name, phase, what has just happened)
 */
#define KHOD_FAULT_POINTS(X)                                                                       \
	X(REGISTER_BEGIN, "register-begin", "register", "request checked, nothing done")           \
	X(REGISTER_SESSION_CREATED, "register-session-created", "register",                        \
	  "outgoing session created")                                                              \
	X(REGISTER_SESSION_STORED, "register-session-stored", "register",                          \
	  "session in the fd store")                                                               \
	X(REGISTER_FILE_PRESERVED, "register-file-preserved", "register",                          \
	  "one file preserved (N-th pass: N-th file)")                                             \
	X(REGISTER_GRAPH_READ, "register-graph-read", "register-devices",                          \
	  "contexts preserved and read")                                                           \
	X(REGISTER_IMAGE_PRESERVED, "register-image-preserved", "register",                        \
	  "image preserved: the workload is committed")                                            \
	X(REGISTER_ANSWERED, "register-answered", "register", "client answered")                   \
	X(START_OUTGOING_BEGIN, "start-outgoing-begin", "start-outgoing",                          \
	  "a session of this kernel found in the fd store")                                        \
	X(START_OUTGOING_REMOVED, "start-outgoing-removed", "start-outgoing",                      \
	  "remains of an unfinished registration taken out of the fd store")                       \
	X(START_OUTGOING_DISCARDED, "start-outgoing-discarded", "start-outgoing",                  \
	  "remains of an unfinished registration discarded")                                       \
	X(START_INCOMING_BEGIN, "start-incoming-begin", "start-incoming",                          \
	  "a session of the previous kernel found in the fd store")                                \
	X(START_INCOMING_IMAGE_RETRIEVED, "start-incoming-image-retrieved", "start-incoming",      \
	  "image retrieved")                                                                       \
	X(START_INCOMING_FILE_RETRIEVED, "start-incoming-file-retrieved", "start-incoming",        \
	  "one file retrieved")                                                                    \
	X(RESTORE_BOUND, "restore-bound", "restore", "a device bound")                             \
	X(RESTORE_IOAS, "restore-ioas", "restore", "an IOAS allocated")                            \
	X(RESTORE_MAPPED, "restore-mapped", "restore", "an area mapped")                           \
	X(RESTORE_HWPT, "restore-hwpt", "restore", "an HWPT allocated")                            \
	X(RESTORE_REPLACED, "restore-replaced", "restore", "a device under its new page table")    \
	X(RESTORE_DESTROYED, "restore-destroyed", "restore", "a frozen HWPT destroyed")            \
	X(QUIESCE_DECIDED, "quiesce-decided", "quiesce",                                           \
	  "restore failed and undone; the image without devices is in the fd store")               \
	X(QUIESCE_STOPPED, "quiesce-stopped", "quiesce", "devices closed and so stopped")          \
	X(EXPIRE_BEGIN, "expire-begin", "expire", "nobody has claimed it in time, nothing done")   \
	X(EXPIRE_DECIDED, "expire-decided", "expire",                                              \
	  "memory that is kept, and the image without devices, in the fd store")                   \
	X(EXPIRE_REMOVED, "expire-removed", "expire", "session out of the fd store")               \
	X(EXPIRE_STOPPED, "expire-stopped", "expire", "session closed: its devices are stopped")   \
	X(START_INCOMING_TRANSIT_STORED, "start-incoming-transit-stored", "start-incoming",        \
	  "image or one file itself in the fd store")                                              \
	X(START_INCOMING_SESSION_CREATED, "start-incoming-session-created", "start-incoming",      \
	  "new outgoing session created")                                                          \
	X(START_INCOMING_SESSION_STORED, "start-incoming-session-stored", "start-incoming",        \
	  "new outgoing session in the fd store")                                                  \
	X(START_INCOMING_FINISHED, "start-incoming-finished", "start-incoming",                    \
	  "incoming session finished")                                                             \
	X(START_INCOMING_OLD_REMOVED, "start-incoming-old-removed", "start-incoming",              \
	  "incoming session out of the fd store")                                                  \
	X(START_INCOMING_FILE_PRESERVED, "start-incoming-file-preserved", "start-incoming",        \
	  "one file preserved in the new session")                                                 \
	X(START_INCOMING_IMAGE_PRESERVED, "start-incoming-image-preserved", "start-incoming",      \
	  "image preserved in the new session: the workload is committed")                         \
	X(START_INCOMING_TRANSIT_REMOVED, "start-incoming-transit-removed", "start-incoming",      \
	  "image or one file itself out of the fd store again")                                    \
	X(HANDOVER_ASKED, "handover-asked", "handover", "a client asked to be ready")               \
	X(HANDOVER_READY, "handover-ready", "handover", "a client is ready, nothing done")          \
	X(HANDOVER_PRESERVED, "handover-preserved", "handover",                                     \
	  "a lease committed, its client not answered")                                            \
	X(HANDOVER_DONE, "handover-done", "handover", "all answered, but for who asked for it")     \
	X(ABORT_BEGIN, "abort-begin", "abort", "handover given up, nothing undone")                 \
	X(ABORT_REMOVED, "abort-removed", "abort", "session of a lease out of the fd store")        \
	X(ABORT_CLOSED, "abort-closed", "abort", "session closed: nothing of the lease is preserved") \
	X(ABORT_UNDONE, "abort-undone", "abort", "memory of the lease preserved again")             \
	X(CLAIM_SENT, "claim-sent", "claim", "descriptors sent")                                   \
	X(CLAIM_ACKED, "claim-acked", "claim", "acknowledgement received")                         \
	X(CLAIM_REMOVED, "claim-removed", "claim", "session out of the fd store")                  \
	X(CLAIM_CLOSED, "claim-closed", "claim", "session closed: nothing is preserved any more")  \
	X(CLAIM_ANSWERED, "claim-answered", "claim", "client answered")                            \
	X(RELEASE_BEGIN, "release-begin", "release", "request checked, nothing done")              \
	X(RELEASE_REMOVED, "release-removed", "release", "session out of the fd store")            \
	X(RELEASE_CLOSED, "release-closed", "release", "session closed: nothing is preserved any more") \
	X(RELEASE_ANSWERED, "release-answered", "release", "client answered")

enum fault_point {
#define X(id, name, phase, what) FAULT_##id,
	KHOD_FAULT_POINTS(X)
#undef X
	FAULT_N,
};

/** fault_init() - read KHOD_FAULT. Return: 0, or -EINVAL for a point that does not exist. */
int fault_init(void);
/** fault_list() - print every point with its phase. */
void fault_list(FILE *f);

#if KHOD_WITH_FAULT_POINTS
void fault_pass(enum fault_point point);
#define FAULT(id) fault_pass(FAULT_##id)
#else
#define FAULT(id) ((void)0)
#endif

#endif
