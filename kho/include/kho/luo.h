/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_LUO_H
#define KHO_LUO_H

#include <stdbool.h>
#include <stdint.h>

#include <kho/error.h>
#include <kho/ops.h>

#ifdef __cplusplus
extern "C" {
#endif

/** KHO_LUO_DEVICE - the orchestrator's device; exclusive, so it is opened only for one request */
#define KHO_LUO_DEVICE "/dev/liveupdate"
/** KHO_LUO_IMAGE - what the loaded kexec image does with a handover, in a word */
#define KHO_LUO_IMAGE "/sys/kernel/kexec/kho_image"
/** KHO_LUO_NAME_MAX - size of a session name with its terminating NUL */
#define KHO_LUO_NAME_MAX 64

/**
 * enum kho_luo_direction - where a session stands
 * @KHO_LUO_OUTGOING: created in this kernel; what is preserved in it goes to the next
 * @KHO_LUO_INCOMING: came from the previous kernel; what is in it can be retrieved
 */
enum kho_luo_direction {
	KHO_LUO_OUTGOING = 1,
	KHO_LUO_INCOMING = 2,
};

/**
 * kho_luo_available() - does this kernel have a live update orchestrator?
 * @kho: handle
 * @err: error
 *
 * Opens and closes the device. A device that somebody else has open counts.
 * Return: 0, or -errno with a sentence that says what is missing and what to do.
 */
int kho_luo_available(struct kho *kho, struct kho_error **err);

/**
 * kho_luo_image_refuses() - would reboot(2) refuse the loaded kexec image?
 * @kho: handle
 * @devices: are devices preserved, or memory alone?
 * @why: receives the reason, a static string, if it returns 1
 *
 * It does as soon as anything is preserved, and when all units are stopped already; systemd then
 * reboots by the firmware, and what is preserved is lost. The kernel tells it in
 * Documentation/ABI/testing/sysfs-kernel-kexec-kho; it does not notify of changes.
 * Return: 1 yes; 0 no, nothing is loaded, or nothing is known; -EBUSY: one is just being loaded.
 */
int kho_luo_image_refuses(struct kho *kho, bool devices, const char **why);

/**
 * kho_luo_session_create() - create an outgoing session
 * @kho: handle
 * @name: 1 to 63 bytes, unique among outgoing sessions
 * @err: error
 *
 * Opens the device for this one request. Closing the last descriptor of the
 * session unpreserves what is in it.
 * Return: the session's descriptor (close-on-exec, owned by the caller);
 * -EEXIST, -EBUSY (somebody else has the device open), -ENOENT (no device), ...
 */
int kho_luo_session_create(struct kho *kho, const char *name, struct kho_error **err);

/**
 * kho_luo_session_retrieve() - get a session that came from the previous kernel
 * @kho: handle
 * @name: its name
 * @err: error
 *
 * Closing the last descriptor of a retrieved session *finishes* it.
 * Return: the session's descriptor, owned by the caller; -ENOENT, -EINVAL
 * (already retrieved), ...
 */
int kho_luo_session_retrieve(struct kho *kho, const char *name, struct kho_error **err);

/**
 * kho_luo_session_name() - full name of a session
 * @kho: handle
 * @session: descriptor of the session, borrowed
 * @name: receives the name, always terminated
 * @err: error
 *
 * Return: 0, -ENOTTY if @session is no session, -errno.
 */
int kho_luo_session_name(struct kho *kho, int session, char name[KHO_LUO_NAME_MAX],
			 struct kho_error **err);

/**
 * kho_luo_session_direction() - is a session outgoing or incoming?
 * @kho: handle
 * @session: descriptor of the session, borrowed
 * @err: error
 *
 * Asks by a preserve request for descriptor -1, which changes nothing in either.
 * Return: an enum kho_luo_direction, or -errno.
 */
int kho_luo_session_direction(struct kho *kho, int session, struct kho_error **err);

/**
 * kho_luo_session_has() - is a token in use in an outgoing session?
 * @kho: handle
 * @session: descriptor of an outgoing session, borrowed
 * @token: the token
 * @err: error
 *
 * Asks by a preserve request for descriptor -1, which changes nothing.
 * Return: 1 yes, 0 no, -EINVAL for an incoming session, -errno.
 */
int kho_luo_session_has(struct kho *kho, int session, uint64_t token, struct kho_error **err);

/**
 * kho_luo_preserve() - preserve a file in an outgoing session
 * @kho: handle
 * @session: descriptor of the session, borrowed
 * @fd: the file, borrowed; the session holds its own reference
 * @token: the name it is retrieved by
 * @err: error
 *
 * Return: 0; -EEXIST (token in use), -EBUSY (the file is preserved already,
 * here or in another session), -ENOENT (no handler for this kind of file),
 * -EINVAL (the session is incoming), -errno.
 */
int kho_luo_preserve(struct kho *kho, int session, int fd, uint64_t token,
		     struct kho_error **err);

/**
 * kho_luo_retrieve() - get a preserved file
 * @kho: handle
 * @session: descriptor of the session, borrowed
 * @token: the token it was preserved under
 * @err: error
 *
 * May be repeated until the session is finished. A retrieve that failed is final
 * for its token. On an outgoing session kernels without support answer -EINVAL.
 * Return: a descriptor (close-on-exec, owned by the caller); -ENOENT (no such
 * token), -EINVAL, -errno.
 */
int kho_luo_retrieve(struct kho *kho, int session, uint64_t token, struct kho_error **err);

/**
 * kho_luo_finish() - end an incoming session
 * @kho: handle
 * @session: descriptor of the session, borrowed
 * @err: error
 *
 * Files that were not retrieved are discarded.
 * Return: 0, -EBUSY (a file refuses to be let go), -EINVAL (outgoing), -errno.
 */
int kho_luo_finish(struct kho *kho, int session, struct kho_error **err);

#ifdef __cplusplus
}
#endif
#endif
