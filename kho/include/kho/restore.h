/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_RESTORE_H
#define KHO_RESTORE_H

#include <kho/error.h>
#include <kho/graph.h>
#include <kho/ops.h>

#ifdef __cplusplus
extern "C" {
#endif

/**
 * enum kho_step - what is done to a context that was retrieved, in this order
 * @KHO_STEP_BIND: bind a device; it comes attached to its frozen HWPT
 * @KHO_STEP_IOAS: allocate an IOAS
 * @KHO_STEP_MAP: map an area
 * @KHO_STEP_HWPT: allocate an HWPT that the client had allocated
 * @KHO_STEP_REPLACE: move a device from its frozen HWPT to the new one
 * @KHO_STEP_DESTROY: destroy a frozen HWPT; from here on there is no way back
 */
enum kho_step {
	KHO_STEP_BIND,
	KHO_STEP_IOAS,
	KHO_STEP_MAP,
	KHO_STEP_HWPT,
	KHO_STEP_REPLACE,
	KHO_STEP_DESTROY,
};

/**
 * struct kho_restore_files - the descriptors that a context is restored with, all borrowed
 * @iommufd: the context, retrieved
 * @memfds: by the index that areas have as backing
 * @n_memfds: how many
 * @devices: one per device of the wanted context; -1 where its token is 0
 */
struct kho_restore_files {
	int iommufd;
	const int *memfds;
	size_t n_memfds;
	const int *devices;
};

/** struct kho_plan - the steps that are missing between what a context is and what it shall be */
struct kho_plan;

/**
 * kho_plan_new() - compare
 * @want: what the context was in the previous kernel, checked; must outlive the plan
 * @have: what it is now, from kho_snapshot(); must outlive the plan
 * @ret: the plan, freed with kho_plan_free()
 * @err: error
 *
 * What is there already, from an earlier attempt that was cut off, is not done again. As
 * ids are given out in ascending order, the n-th IOAS of one is the n-th of the other, and
 * so are HWPTs; that it is, is checked by everything that is known of them.
 * Return: 0, -EUCLEAN (there is something that was not wanted, or a device is not where
 * it should be), -ENOMEM.
 */
int kho_plan_new(const struct kho_context *want, const struct kho_context *have,
		 struct kho_plan **ret, struct kho_error **err);
/** kho_plan_free() - NULL is allowed. Return: NULL. */
struct kho_plan *kho_plan_free(struct kho_plan *plan);
/** kho_plan_n_steps() - how many are missing; each area is one */
size_t kho_plan_n_steps(const struct kho_plan *plan);

/**
 * kho_plan_run() - do all steps but the last kind
 * @kho: handle
 * @plan: the plan
 * @files: the descriptors
 * @passed: called after each step; NULL: nobody is interested
 * @userdata: its first argument
 * @err: error, names the object
 *
 * A device is at every moment attached to a table with its translations. On failure
 * kho_plan_undo() is the caller's to call.
 * Return: 0: every device is under its new page table. -errno.
 */
int kho_plan_run(struct kho *kho, struct kho_plan *plan, const struct kho_restore_files *files,
		 void (*passed)(void *userdata, enum kho_step step), void *userdata,
		 struct kho_error **err);

/**
 * kho_plan_undo() - back to where it was: devices on their frozen HWPTs, what was built gone
 * @kho: handle
 * @plan: a plan that ran, to whatever end, and was not committed
 * @files: the descriptors
 * @err: error
 *
 * Devices stay bound. Goes on after an error: a device that cannot be moved back keeps the
 * new table.
 * Return: 0, -EBUSY (an earlier attempt has begun to commit: there is no way back), -errno.
 */
int kho_plan_undo(struct kho *kho, struct kho_plan *plan, const struct kho_restore_files *files,
		  struct kho_error **err);

/**
 * kho_plan_commit() - destroy what is left of the previous kernel
 * @kho: handle
 * @plan: a plan that ran
 * @files: the descriptors
 * @passed: called after each step; NULL: nobody is interested
 * @userdata: its first argument
 * @err: error
 *
 * May be repeated. What fails here leaves the devices restored, but the context cannot be
 * preserved again before it has been done.
 * Return: 0, -errno.
 */
int kho_plan_commit(struct kho *kho, struct kho_plan *plan,
		    const struct kho_restore_files *files,
		    void (*passed)(void *userdata, enum kho_step step), void *userdata,
		    struct kho_error **err);

/**
 * kho_plan_apply() - give a context the ids of this kernel
 * @plan: a plan that ran
 * @context: what was wanted; its ids change, its client's ids do not
 */
void kho_plan_apply(const struct kho_plan *plan, struct kho_context *context);

#ifdef __cplusplus
}
#endif
#endif
