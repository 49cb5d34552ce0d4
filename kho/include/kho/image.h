/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_IMAGE_H
#define KHO_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kho/error.h>
#include <kho/graph.h>
#include <kho/ops.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KHO_IMAGE_MAGIC "KHOIMAGE"
/** KHO_IMAGE_VERSION - format version written by this library */
#define KHO_IMAGE_VERSION 1
/** KHO_IMAGE_HEADER_SIZE - bytes before the payload */
#define KHO_IMAGE_HEADER_SIZE 128
/** KHO_IMAGE_PAYLOAD_MAX - bytes; a longer payload is refused before anything is allocated */
#define KHO_IMAGE_PAYLOAD_MAX (64u << 20)
/** KHO_IMAGE_FILES_MAX - files in one workload */
#define KHO_IMAGE_FILES_MAX 512
/** KHO_NAME_MAX - bytes in the name of a workload or a file, without the NUL */
#define KHO_NAME_MAX 48
/** KHO_IMAGE_UNIT_MAX - bytes in a unit's name, without the NUL (systemd's own limit) */
#define KHO_IMAGE_UNIT_MAX 255
/** KHO_SECRET_MIN and KHO_SECRET_MAX - bytes in a claim secret */
#define KHO_SECRET_MIN 16
#define KHO_SECRET_MAX 64
/** KHO_TOKEN_IMAGE - LUO token of the image in its session; files count from 1 */
#define KHO_TOKEN_IMAGE 0

enum kho_file_kind {
	KHO_FILE_MEMFD = 1,
	KHO_FILE_IOMMUFD = 2,
	KHO_FILE_VFIO = 3,		/* a device's cdev */
};

/** KHO_REASON_MAX - bytes in the reason of an outcome, without the NUL; longer ones are cut */
#define KHO_REASON_MAX 511

/**
 * enum kho_outcome - how a workload's devices came out of the last handover
 * @KHO_OUTCOME_NONE: there was none, or no devices
 * @KHO_OUTCOME_RESTORED: under new page tables, DMA never stopped
 * @KHO_OUTCOME_QUIESCED: stopped; the memory is all that is left, and not with
 *	KHO_RESTORE_FAILURE_RELEASE
 */
enum kho_outcome {
	KHO_OUTCOME_NONE = 0,
	KHO_OUTCOME_RESTORED = 1,
	KHO_OUTCOME_QUIESCED = 2,
};

/**
 * enum kho_survival - what a workload means to a handover
 * @KHO_SURVIVAL_MUST: nobody is handed over without it
 * @KHO_SURVIVAL_BEST_EFFORT: a handover goes on without it
 */
enum kho_survival {
	KHO_SURVIVAL_MUST = 0,
	KHO_SURVIVAL_BEST_EFFORT = 1,
};

/**
 * enum kho_restore_failure - what becomes of devices that cannot be restored in the next kernel
 * @KHO_RESTORE_FAILURE_QUIESCE: they are stopped, the memory is kept
 * @KHO_RESTORE_FAILURE_RELEASE: they are stopped, then the memory is freed: for whoever can make
 *	no use of it without the devices. Name and reason are kept for whoever claims
 *
 * The same becomes of devices and memory that nobody has claimed in time (kho_image_claim_sec()).
 */
enum kho_restore_failure {
	KHO_RESTORE_FAILURE_QUIESCE = 0,
	KHO_RESTORE_FAILURE_RELEASE = 1,
};

/** kho_file_kind_name() - "memfd" etc.; NULL for an unknown kind; static */
const char *kho_file_kind_name(enum kho_file_kind kind);

/**
 * kho_name_valid() - may this be the name of a workload or of a file?
 *
 * 1 to KHO_NAME_MAX of A-Z a-z 0-9 _ . @ -, not beginning with a dot or a dash.
 */
bool kho_name_valid(const char *name);

/**
 * struct kho_image - what is known about one workload
 *
 * In memory it is a plain model; on disk and in a memfd it is a fixed header and
 * a protobuf payload (docs/formats/image.md). Strings returned by accessors are
 * owned by the image.
 */
struct kho_image;

/**
 * struct kho_image_file - one descriptor of a workload
 * @name: the client's name
 * @kind: what it is
 * @token: LUO token, unique in the image, never KHO_TOKEN_IMAGE
 * @size: bytes of a memfd; else 0
 * @seals: F_SEAL_* at registration, of a memfd; else 0
 */
struct kho_image_file {
	const char *name;
	enum kho_file_kind kind;
	uint32_t seals;
	uint64_t token;
	uint64_t size;
};

/**
 * kho_image_new() - an empty image of a workload
 * @ret: the image, freed with kho_image_free()
 * @name: name of the workload
 * @uid: its owner
 * @unit: systemd unit of its owner; NULL or "": none
 * @err: error
 *
 * Return: 0, -EINVAL, -EFBIG (too long), -ENOMEM.
 */
int kho_image_new(struct kho_image **ret, const char *name, uint32_t uid, const char *unit,
		  struct kho_error **err);
/** kho_image_free() - NULL is allowed. Return: NULL. */
struct kho_image *kho_image_free(struct kho_image *image);

const char *kho_image_name(const struct kho_image *image);
uint32_t kho_image_uid(const struct kho_image *image);
const char *kho_image_unit(const struct kho_image *image);
uint32_t kho_image_handovers(const struct kho_image *image);
uint64_t kho_image_registered_usec(const struct kho_image *image);
const char *kho_image_writer(const struct kho_image *image);
const char *kho_image_boot_id(const struct kho_image *image);
const char *kho_image_kernel_release(const struct kho_image *image);
uint64_t kho_image_written_usec(const struct kho_image *image);
bool kho_image_has_secret(const struct kho_image *image);
size_t kho_image_n_files(const struct kho_image *image);
/** kho_image_has_devices() - is there anything but memfds, so that a device may do DMA into them? */
bool kho_image_has_devices(const struct kho_image *image);
/** kho_image_bytes() - sum of the sizes of all files */
uint64_t kho_image_bytes(const struct kho_image *image);

/**
 * kho_image_file() - the @index-th file
 * @file: receives it; its name is owned by the image
 *
 * Return: 0, or -ENOENT.
 */
int kho_image_file(const struct kho_image *image, size_t index, struct kho_image_file *file);

/**
 * kho_image_add_file() - append a file
 * @image: the image
 * @file: copied; names and tokens must be unique in the image
 * @err: error
 *
 * Return: 0, -EEXIST, -E2BIG (KHO_IMAGE_FILES_MAX), -EINVAL, -ENOMEM.
 */
int kho_image_add_file(struct kho_image *image, const struct kho_image_file *file,
		       struct kho_error **err);

/** kho_image_graph() - what is in the workload's iommufds; NULL if nothing is; owned by the image */
const struct kho_graph *kho_image_graph(const struct kho_image *image);

/**
 * kho_image_set_graph() - say what is in the workload's iommufds
 * @image: with all of its files
 * @graph: owned by the image on success; NULL: nothing
 * @err: error
 *
 * Return: 0, -EINVAL (it refers to files that the workload does not have), else as
 * kho_graph_check().
 */
int kho_image_set_graph(struct kho_image *image, struct kho_graph *graph,
			struct kho_error **err);

enum kho_outcome kho_image_outcome(const struct kho_image *image);
/** kho_image_reason() - why the outcome is not better; "" if there is no reason */
const char *kho_image_reason(const struct kho_image *image);
/** kho_image_set_outcome() - @reason: one sentence, copied; NULL: none */
void kho_image_set_outcome(struct kho_image *image, enum kho_outcome outcome, const char *reason);
/**
 * kho_image_drop_file() - of a memfd that is lost nothing is said any more
 * @image: image
 * @index: which one; the later ones move up. A graph that has it must be dropped, too
 */
void kho_image_drop_file(struct kho_image *image, size_t index);
/** kho_image_drop_devices() - only the memfds are left: no iommufd, no device, no graph */
void kho_image_drop_devices(struct kho_image *image);

/** kho_image_survival() - what its client asked for when it registered, as the next one */
enum kho_survival kho_image_survival(const struct kho_image *image);
enum kho_restore_failure kho_image_restore_failure(const struct kho_image *image);
void kho_image_set_policy(struct kho_image *image, enum kho_survival survival,
			  enum kho_restore_failure restore_failure);
/** kho_image_claim_sec() - how long a claim is waited for after a handover; 0: for ever */
uint32_t kho_image_claim_sec(const struct kho_image *image);
void kho_image_set_claim_sec(struct kho_image *image, uint32_t sec);
/** kho_image_may_lose_irq() - may interrupts get lost that its devices cannot keep pending? */
bool kho_image_may_lose_irq(const struct kho_image *image);
void kho_image_set_may_lose_irq(struct kho_image *image, bool may);
/**
 * kho_image_arrived_usec() - since when a claim is waited for in this kernel
 * @image: image
 * @boot_id: of this kernel
 *
 * Return: CLOCK_BOOTTIME when khod had brought it into order after the kexec; 0: it has not come over
 * one, or came into another kernel than this.
 */
uint64_t kho_image_arrived_usec(const struct kho_image *image, const char *boot_id);
/** kho_image_set_arrived() - it came over a kexec into this kernel. Return: 0, -EINVAL, -EFBIG. */
int kho_image_set_arrived(struct kho_image *image, const char *boot_id, uint64_t usec,
			  struct kho_error **err);
void kho_image_set_handovers(struct kho_image *image, uint32_t handovers);
void kho_image_set_registered_usec(struct kho_image *image, uint64_t usec);

/**
 * kho_image_set_origin() - who writes it, where
 * @boot_id: of the running kernel
 * @kernel_release: of the running kernel
 * @usec: CLOCK_REALTIME
 *
 * Return: 0, -EINVAL, -EFBIG.
 */
int kho_image_set_origin(struct kho_image *image, const char *boot_id,
			 const char *kernel_release, uint64_t usec, struct kho_error **err);

/**
 * kho_image_set_secret() - set a claim secret
 * @kho: handle, for the salt
 * @secret: the secret; only a salted hash of it is kept
 * @size: KHO_SECRET_MIN to KHO_SECRET_MAX bytes
 *
 * Return: 0, -EINVAL, -errno.
 */
int kho_image_set_secret(struct kho *kho, struct kho_image *image, const void *secret,
			 size_t size, struct kho_error **err);
/** kho_image_check_secret() - true if a secret is set and @secret is it; takes constant time */
bool kho_image_check_secret(const struct kho_image *image, const void *secret, size_t size);

/**
 * kho_image_encode() - image to bytes
 * @image: the image
 * @buf: receives the bytes, freed with free()
 * @size: receives their number
 * @err: error
 *
 * Return: 0, -E2BIG, -ENOMEM.
 */
int kho_image_encode(const struct kho_image *image, void **buf, size_t *size,
		     struct kho_error **err);

/**
 * kho_image_decode() - bytes to image
 * @buf: the bytes, trusted in nothing
 * @size: their number
 * @ret: the image; untouched on error
 * @err: error
 *
 * Return: 0; -EBADMSG (magic, checksum, truncated, malformed), -EFBIG (over a
 * cap), -EOPNOTSUPP (a newer format, or a feature that must be understood),
 * -EINVAL (a value that no writer writes), -EEXIST (two files of one name or token),
 * -ENOMEM.
 */
int kho_image_decode(const void *buf, size_t size, struct kho_image **ret,
		     struct kho_error **err);

/**
 * kho_image_write_memfd() - image to a new, sealed memfd
 *
 * Return: the memfd, owned by the caller, or -errno.
 */
int kho_image_write_memfd(struct kho *kho, const struct kho_image *image,
			  struct kho_error **err);

/**
 * kho_image_write_public() - the same, without the hash of the claim secret
 *
 * Return: the memfd, owned by the caller, or -errno.
 */
int kho_image_write_public(struct kho *kho, const struct kho_image *image,
			   struct kho_error **err);

/**
 * kho_image_read_fd() - image from a file
 * @kho: handle
 * @fd: a memfd or regular file, borrowed; its offset is neither used nor moved
 * @require_seals: refuse what is not sealed against any change
 * @ret: the image; untouched on error
 * @err: error
 *
 * Return: 0, -EPERM (not sealed), else as kho_image_decode(), or -errno.
 */
int kho_image_read_fd(struct kho *kho, int fd, bool require_seals, struct kho_image **ret,
		      struct kho_error **err);

#ifdef __cplusplus
}
#endif
#endif
