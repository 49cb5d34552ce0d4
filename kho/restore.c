/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A context of the previous kernel becomes one of this kernel.
 *
 * The plan is the difference between what is wanted and what is there. Whoever does it may
 * die after any step: the next one reads the context again, and the difference is what
 * was still to do. Nothing is kept but the context itself, and no step is done twice.
 *
 * Barriers: no device moves before every mapping and every HWPT is there, so that what is
 * there when a device has moved is complete. No frozen HWPT goes before every device
 * has moved, so that until then each can go back.
 */
#include <inttypes.h>
#include <string.h>

#include <kho/iommufd.h>
#include <kho/restore.h>
#include <kho/vfio.h>

#include "util.h"

/* Ids in this kernel, 0: not there yet; for devices also what they are attached to. */
struct kho_plan {
	const struct kho_context *want;
	const struct kho_context *have;
	uint32_t *ioas;		/* as want->ioas */
	size_t *mapped;		/* areas that are there, as want->ioas */
	uint32_t *hwpts;	/* as want->hwpts */
	uint32_t *devices;	/* as want->devices */
	uint32_t *attached;	/* as want->devices */
	uint32_t *frozen;	/* of this kernel's HWPT of the previous one; as want->hwpts; 0: gone */
};

struct kho_plan *kho_plan_free(struct kho_plan *plan)
{
	if (plan) {
		free(plan->ioas);
		free(plan->mapped);
		free(plan->hwpts);
		free(plan->devices);
		free(plan->attached);
		free(plan->frozen);
		free(plan);
	}
	return NULL;
}

static void plan_freep(struct kho_plan **p)
{
	kho_plan_free(*p);
}

static bool same_area(const struct kho_area *a, const struct kho_area *b)
{
	return a->iova == b->iova && a->length == b->length && a->offset == b->offset &&
	       a->backing == b->backing && a->flags == b->flags;
}

static int unclean(struct kho_error **err, const char *what, uint32_t id)
{
	return kho_error_new(err, EUCLEAN, NULL,
			     "the context has %s %" PRIu32 ", which its image does not have", what, id);
}

static int match_ioas(struct kho_plan *p, struct kho_error **err)
{
	const struct kho_context *want = p->want, *have = p->have;

	for (size_t i = 0; i < have->n_ioas; i++) {
		const struct kho_ioas *w = &want->ioas[i], *h = &have->ioas[i];

		if (i >= want->n_ioas)
			return unclean(err, "IOAS", h->id);
		/* They are mapped in this order. */
		for (size_t k = 0; k < h->n_areas; k++)
			if (k >= w->n_areas || !same_area(&h->areas[k], &w->areas[k]))
				return kho_error_new(err, EUCLEAN, NULL,
						     "IOAS %" PRIu32 " has an area at IOVA 0x%" PRIx64 " that its image does not have",
						     h->id, h->areas[k].iova);
		p->ioas[i] = h->id;
		p->mapped[i] = h->n_areas;
	}
	return 0;
}

/* The next one of @want that the client had allocated itself. */
static size_t next_explicit(const struct kho_context *want, size_t i)
{
	while (i < want->n_hwpts && want->hwpts[i].flags & KHO_HWPT_AUTO)
		i++;
	return i;
}

static int match_hwpts(struct kho_plan *p, struct kho_error **err)
{
	const struct kho_context *want = p->want, *have = p->have;
	size_t next = 0;

	for (size_t i = 0; i < have->n_hwpts; i++) {
		const struct kho_hwpt *h = &have->hwpts[i];

		if (h->frozen) {
			uint32_t w = kho_context_find_hwpt(want, h->old_id);

			if (w == KHO_NONE || p->frozen[w])
				return unclean(err, "the frozen HWPT", h->id);
			p->frozen[w] = h->id;
			continue;
		}
		/* Those that were made automatically are found by their devices. */
		if (h->flags & KHO_HWPT_AUTO)
			continue;
		next = next_explicit(want, next);
		if (next == want->n_hwpts || h->ioas != want->hwpts[next].ioas)
			return unclean(err, "HWPT", h->id);
		p->hwpts[next++] = h->id;
	}
	return 0;
}

static int match_device(struct kho_plan *p, size_t i, const struct kho_device *h,
			struct kho_error **err)
{
	const struct kho_context *want = p->want, *have = p->have;
	const struct kho_device *w = &want->devices[i];
	const struct kho_hwpt *on;

	p->devices[i] = h->id;
	if (h->hwpt == KHO_NONE) {
		if (w->hwpt == KHO_NONE)
			return 0;
		return kho_error_new(err, EUCLEAN, w->name, "is attached to nothing any more");
	}
	on = &have->hwpts[h->hwpt];
	p->attached[i] = on->id;
	if (w->hwpt == KHO_NONE || (on->frozen && on->id != p->frozen[w->hwpt]) ||
	    (!on->frozen && on->ioas != want->hwpts[w->hwpt].ioas))
		return kho_error_new(err, EUCLEAN, w->name,
				     "is attached to HWPT %" PRIu32 ", where its image does not have it",
				     on->id);
	if (on->frozen)
		return 0;
	if (!(want->hwpts[w->hwpt].flags & KHO_HWPT_AUTO) != !(on->flags & KHO_HWPT_AUTO) ||
	    (p->hwpts[w->hwpt] && p->hwpts[w->hwpt] != on->id))
		return kho_error_new(err, EUCLEAN, w->name,
				     "is attached to another HWPT of its IOAS than its image has it");
	p->hwpts[w->hwpt] = on->id;
	return 0;
}

/* Only who has the descriptor could bind it. */
static bool wanted(const struct kho_device *d)
{
	return d->token != 0;
}

static int match_devices(struct kho_plan *p, struct kho_error **err)
{
	const struct kho_context *want = p->want, *have = p->have;

	for (size_t i = 0; i < have->n_devices; i++) {
		uint32_t w = kho_context_find_device(want, have->devices[i].name);
		int r;

		if (w == KHO_NONE || !wanted(&want->devices[w]))
			return unclean(err, "device", have->devices[i].id);
		r = match_device(p, w, &have->devices[i], err);
		if (r < 0)
			return r;
	}
	for (size_t i = 0; i < want->n_devices; i++) {
		const struct kho_device *w = &want->devices[i];

		if (wanted(w) && (w->hwpt == KHO_NONE || (!p->devices[i] && !p->frozen[w->hwpt])))
			return kho_error_new(err, EUCLEAN, w->name,
					     "has no page table of the previous kernel");
	}
	return 0;
}

int kho_plan_new(const struct kho_context *want, const struct kho_context *have,
		 struct kho_plan **ret, struct kho_error **err)
{
	_cleanup_(plan_freep) struct kho_plan *p = calloc(1, sizeof(*p));
	int r;

	if (p) {
		*p = (struct kho_plan){
			.want = want,
			.have = have,
			.ioas = calloc(want->n_ioas + 1, sizeof(uint32_t)),
			.mapped = calloc(want->n_ioas + 1, sizeof(size_t)),
			.hwpts = calloc(want->n_hwpts + 1, sizeof(uint32_t)),
			.frozen = calloc(want->n_hwpts + 1, sizeof(uint32_t)),
			.devices = calloc(want->n_devices + 1, sizeof(uint32_t)),
			.attached = calloc(want->n_devices + 1, sizeof(uint32_t)),
		};
	}
	if (!p || !p->ioas || !p->mapped || !p->hwpts || !p->frozen || !p->devices || !p->attached)
		return kho_error_new(err, ENOMEM, NULL, "out of memory");
	r = match_ioas(p, err);
	if (r >= 0)
		r = match_hwpts(p, err);
	if (r >= 0)
		r = match_devices(p, err);
	if (r < 0)
		return r;
	*ret = TAKE_PTR(p);
	return 0;
}

static bool is_moved(const struct kho_plan *p, size_t i)
{
	uint32_t hwpt = p->want->devices[i].hwpt;

	return p->attached[i] && p->attached[i] != p->frozen[hwpt];
}

size_t kho_plan_n_steps(const struct kho_plan *p)
{
	const struct kho_context *want = p->want;
	size_t n = 0;

	for (size_t i = 0; i < want->n_ioas; i++)
		n += !p->ioas[i] + want->ioas[i].n_areas - p->mapped[i];
	for (size_t i = 0; i < want->n_hwpts; i++)
		n += (!(want->hwpts[i].flags & KHO_HWPT_AUTO) && !p->hwpts[i]) + !!p->frozen[i];
	for (size_t i = 0; i < want->n_devices; i++)
		if (wanted(&want->devices[i]))
			n += !p->devices[i] + !is_moved(p, i);
	return n;
}

struct run {
	struct kho *kho;
	const struct kho_restore_files *files;
	void (*passed)(void *userdata, enum kho_step step);
	void *userdata;
	struct kho_error **err;
};

static void pass(const struct run *run, enum kho_step step)
{
	if (run->passed)
		run->passed(run->userdata, step);
}

static int bind_devices(struct kho_plan *p, const struct run *run)
{
	for (size_t i = 0; i < p->want->n_devices; i++) {
		const struct kho_device *d = &p->want->devices[i];
		int r;

		if (!wanted(d) || p->devices[i])
			continue;
		r = kho_vfio_bind(run->kho, run->files->devices[i], run->files->iommufd,
				  &p->devices[i], run->err);
		if (r < 0)
			return kho_error_new(run->err, r, d->name, "the device");
		p->attached[i] = p->frozen[d->hwpt];
		pass(run, KHO_STEP_BIND);
	}
	return 0;
}

static int build_ioas(struct kho_plan *p, size_t i, const struct run *run)
{
	const struct kho_ioas *ioas = &p->want->ioas[i];
	int r;

	if (!p->ioas[i]) {
		r = kho_iommufd_ioas_alloc(run->kho, run->files->iommufd, &p->ioas[i], run->err);
		if (r < 0)
			return r;
		pass(run, KHO_STEP_IOAS);
	}
	for (; p->mapped[i] < ioas->n_areas; p->mapped[i]++) {
		const struct kho_area *a = &ioas->areas[p->mapped[i]];

		r = kho_iommufd_map_file(run->kho, run->files->iommufd, p->ioas[i],
					 run->files->memfds[a->backing], a->offset, a->length,
					 a->iova, a->flags, run->err);
		if (r < 0)
			return r;
		pass(run, KHO_STEP_MAP);
	}
	return 0;
}

/* A device that an HWPT can be allocated for: one that it was attached to, else any. */
static uint32_t device_for(const struct kho_plan *p, size_t hwpt)
{
	uint32_t any = 0;

	for (size_t i = 0; i < p->want->n_devices; i++) {
		if (!p->devices[i])
			continue;
		if (p->want->devices[i].hwpt == hwpt)
			return p->devices[i];
		if (!any)
			any = p->devices[i];
	}
	return any;
}

static int build_hwpts(struct kho_plan *p, const struct run *run)
{
	const struct kho_context *want = p->want;

	for (size_t i = next_explicit(want, 0); i < want->n_hwpts; i = next_explicit(want, i + 1)) {
		uint32_t dev = device_for(p, i);
		int r;

		if (p->hwpts[i])
			continue;
		if (!dev)
			return kho_error_new(run->err, ENODEV, NULL,
					     "HWPT %" PRIu32 " has no device that it could be made for",
					     want->hwpts[i].id);
		r = kho_iommufd_hwpt_alloc(run->kho, run->files->iommufd, dev,
					   p->ioas[want->hwpts[i].ioas], want->hwpts[i].flags,
					   &p->hwpts[i], run->err);
		if (r < 0)
			return r;
		pass(run, KHO_STEP_HWPT);
	}
	return 0;
}

static int move_devices(struct kho_plan *p, const struct run *run)
{
	const struct kho_context *want = p->want;

	for (size_t i = 0; i < want->n_devices; i++) {
		const struct kho_device *d = &want->devices[i];
		uint32_t pt;
		int r;

		if (!wanted(d) || is_moved(p, i))
			continue;
		/* By its IOAS it gets the automatic one, which the first makes for all. */
		pt = want->hwpts[d->hwpt].flags & KHO_HWPT_AUTO ?
			     p->ioas[want->hwpts[d->hwpt].ioas] : p->hwpts[d->hwpt];
		r = kho_vfio_attach(run->kho, run->files->devices[i], &pt, true, run->err);
		if (r < 0) {
			(void)kho_iommufd_obstacle(run->kho, run->files->iommufd, run->err);
			return kho_error_new(run->err, r, d->name, "cannot be moved to its new page table");
		}
		p->attached[i] = p->hwpts[d->hwpt] = pt;
		pass(run, KHO_STEP_REPLACE);
	}
	return 0;
}

int kho_plan_run(struct kho *kho, struct kho_plan *plan, const struct kho_restore_files *files,
		 void (*passed)(void *userdata, enum kho_step step), void *userdata,
		 struct kho_error **err)
{
	const struct run run = { kho, files, passed, userdata, err };
	int r;

	r = bind_devices(plan, &run);
	for (size_t i = 0; r >= 0 && i < plan->want->n_ioas; i++)
		r = build_ioas(plan, i, &run);
	if (r >= 0)
		r = build_hwpts(plan, &run);
	if (r >= 0)
		r = move_devices(plan, &run);
	return r;
}

/* The last error is as good as the first; all of the rest is still tried. */
static int destroy(struct kho *kho, const struct kho_restore_files *files, uint32_t *id, int before,
		   struct kho_error **err)
{
	struct kho_error *e = NULL;
	int r;

	if (!*id)
		return before;
	r = kho_iommufd_destroy(kho, files->iommufd, *id, &e);
	if (r < 0)
		(void)kho_error_new(err, r, NULL, "%s", kho_error_message(e));
	else
		*id = 0;
	kho_error_free(e);
	return r < 0 ? r : before;
}

int kho_plan_undo(struct kho *kho, struct kho_plan *plan, const struct kho_restore_files *files,
		  struct kho_error **err)
{
	const struct kho_context *want = plan->want;
	int result = 0;

	for (size_t i = 0; i < want->n_devices; i++) {
		const struct kho_device *d = &want->devices[i];
		struct kho_error *e = NULL;
		uint32_t pt;
		int r;

		if (!wanted(d) || !is_moved(plan, i))
			continue;
		if (!plan->frozen[d->hwpt]) {
			result = kho_error_new(err, EBUSY, d->name,
					       "its page table of the previous kernel is gone: it stays where it is");
			continue;
		}
		pt = plan->frozen[d->hwpt];
		r = kho_vfio_attach(kho, files->devices[i], &pt, true, &e);
		if (r < 0)
			result = kho_error_new(err, r, d->name, "cannot be moved back: %s",
					       kho_error_message(e));
		else
			plan->attached[i] = pt;
		kho_error_free(e);
	}
	if (result < 0)
		return result;
	/* The automatic ones have gone with their last device. */
	for (size_t i = next_explicit(want, 0); i < want->n_hwpts; i = next_explicit(want, i + 1))
		result = destroy(kho, files, &plan->hwpts[i], result, err);
	for (size_t i = 0; i < want->n_hwpts; i++)
		if (want->hwpts[i].flags & KHO_HWPT_AUTO)
			plan->hwpts[i] = 0;
	for (size_t i = 0; i < want->n_ioas; i++) {
		result = destroy(kho, files, &plan->ioas[i], result, err);
		if (!plan->ioas[i])
			plan->mapped[i] = 0;
	}
	return result;
}

int kho_plan_commit(struct kho *kho, struct kho_plan *plan,
		    const struct kho_restore_files *files,
		    void (*passed)(void *userdata, enum kho_step step), void *userdata,
		    struct kho_error **err)
{
	int r = 0;

	for (size_t i = 0; i < plan->want->n_hwpts; i++) {
		if (!plan->frozen[i])
			continue;
		r = destroy(kho, files, &plan->frozen[i], r, err);
		if (!plan->frozen[i] && passed)
			passed(userdata, KHO_STEP_DESTROY);
	}
	return r;
}

void kho_plan_apply(const struct kho_plan *plan, struct kho_context *context)
{
	size_t n = 0;

	for (size_t i = 0; i < context->n_ioas; i++)
		context->ioas[i].id = plan->ioas[i];
	for (size_t i = 0; i < context->n_hwpts; i++)
		context->hwpts[i].id = plan->hwpts[i];
	/* One that nobody could bind is not there any more; nothing refers to it. */
	for (size_t i = 0; i < context->n_devices; i++) {
		if (!plan->devices[i])
			continue;
		context->devices[n] = context->devices[i];
		context->devices[n++].id = plan->devices[i];
	}
	context->n_devices = n;
}
