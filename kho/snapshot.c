/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Kernel to graph.
 *
 * The kernel tells objects and areas piece by piece, with a generation by which it refuses
 * to go on (EAGAIN) when something has changed in between; then all is read again.
 *
 * It does not tell which file an area maps, only whether it is the one that was asked for.
 * So an IOAS is read once for each memfd, but only from its first to its last area whose
 * memfd is not known yet. A memfd is usually mapped in one piece.
 */
#include <inttypes.h>
#include <string.h>

#include <linux/iommufd.h>

#include <kho/snapshot.h>

#include "util.h"

#define BATCH_OBJECTS 256
#define BATCH_AREAS 1024
#define RETRIES 16

_Static_assert((int)KHO_HWPT_AUTO == (int)IOMMU_HWPT_INFO_AUTO &&
	       (int)KHO_HWPT_NEST_PARENT == (int)IOMMU_HWPT_INFO_NEST_PARENT &&
	       (int)KHO_HWPT_DIRTY == (int)IOMMU_HWPT_INFO_DIRTY &&
	       (int)KHO_HWPT_DIRTY_TRACKING == (int)IOMMU_HWPT_INFO_DIRTY_TRACKING &&
	       (int)KHO_HWPT_ENFORCE_CC == (int)IOMMU_HWPT_INFO_ENFORCE_CC &&
	       (int)KHO_HWPT_PASID == (int)IOMMU_HWPT_INFO_PASID &&
	       (int)KHO_HWPT_FAULT == (int)IOMMU_HWPT_INFO_FAULT &&
	       (int)KHO_HWPT_NOIOMMU == (int)IOMMU_HWPT_INFO_NOIOMMU, "flags of an HWPT");
_Static_assert((int)KHO_AREA_READABLE == (int)IOMMU_AREA_READABLE &&
	       (int)KHO_AREA_WRITEABLE == (int)IOMMU_AREA_WRITEABLE, "flags of an area");

static const char *const type_names[] = {
	[IOMMU_OBJECT_HWPT_NESTED] = "a nested page table",
	[IOMMU_OBJECT_ACCESS] = "an IOAS that is used from inside of the kernel",
	[IOMMU_OBJECT_VIOMMU] = "a virtual IOMMU",
	[IOMMU_OBJECT_VDEVICE] = "a device of a virtual IOMMU",
	[IOMMU_OBJECT_VEVENTQ] = "an event queue of a virtual IOMMU",
	[IOMMU_OBJECT_HW_QUEUE] = "a hardware queue of a virtual IOMMU",
};

/* What the kernel listed, before it is looked at one by one. */
struct objects {
	struct iommu_object_entry *entries;
	size_t n;
	uint64_t generation;
};

static int nomem(struct kho_error **err)
{
	return kho_error_new(err, ENOMEM, NULL, "out of memory");
}

static int failed(int r, const char *what, uint32_t id, struct kho_error **err)
{
	return kho_error_new(err, r, NULL, "cannot read %s %" PRIu32 " of the context: %s", what, id,
			     strerror(-r));
}

static int list_objects(struct kho *kho, int iommufd, struct objects *o, struct kho_error **err)
{
	struct iommu_list_objects arg = {
		.size = sizeof(arg),
		.entry_size = sizeof(struct iommu_object_entry),
	};
	int r;

	o->n = 0;
	do {
		struct iommu_object_entry *e;

		if (o->n > KHO_GRAPH_OBJECTS_MAX)
			return kho_error_new(err, EFBIG, NULL, "the context has more than %d objects",
					     KHO_GRAPH_OBJECTS_MAX);
		e = reallocarray(o->entries, o->n + BATCH_OBJECTS, sizeof(*e));
		if (!e)
			return nomem(err);
		o->entries = e;
		arg.entries = (uintptr_t)(e + o->n);
		arg.num = BATCH_OBJECTS;
		r = kho_op(kho, ioctl, iommufd, IOMMU_LIST_OBJECTS, &arg);
		if (r == -EAGAIN)
			return r;
		if (r < 0)
			return kho_error_new(err, r, NULL, "cannot list the objects of the context: %s",
					     r == -ENOTTY ? "the kernel does not tell (Linux with this project's series does)" :
							    strerror(-r));
		if (arg.num > BATCH_OBJECTS)
			return kho_error_new(err, EPROTO, NULL, "the kernel listed more than was asked for");
		o->n += arg.num;
	} while (arg.cursor != 0);
	o->generation = arg.generation;
	return 0;
}

/* Has anything changed since the objects were listed? */
static int still_same(struct kho *kho, int iommufd, const struct objects *o)
{
	struct iommu_object_entry entry;
	struct iommu_list_objects arg = {
		.size = sizeof(arg),
		.generation = o->generation,
		.entries = (uintptr_t)&entry,
		.num = 1,
		.entry_size = sizeof(entry),
	};

	return kho_op(kho, ioctl, iommufd, IOMMU_LIST_OBJECTS, &arg);
}

static int backing_refused(const struct iommu_ioas_area *a, uint32_t ioas_id,
			   struct kho_error **err)
{
	return kho_error_new(err, EOPNOTSUPP, NULL,
			     "%" PRIu64 " bytes at IOVA 0x%" PRIx64 " of IOAS %" PRIu32 " map %s",
			     (uint64_t)a->length, (uint64_t)a->iova, ioas_id,
			     a->flags & IOMMU_AREA_ACCESSED ?
				     "memory that is used from inside of the kernel" :
			     a->backing == IOMMU_AREA_USER ?
				     "memory by address: map a memfd with IOMMU_IOAS_MAP_FILE" :
			     a->backing == IOMMU_AREA_DMABUF ?
				     "a DMABUF, which cannot be carried over: unmap it" :
				     "a memfd that is not in the workload: register it, too");
}

/*
 * All areas from @from on, asking for memfd @backing. The first reading appends them, later
 * ones only fill in what was not known. @todo: the first area whose memfd is not known.
 */
static int read_areas(struct kho *kho, int iommufd, struct kho_ioas *ioas, const int *memfds,
		      size_t n_memfds, size_t backing, uint64_t *generation, size_t *todo,
		      struct kho_error **err)
{
	struct iommu_ioas_list_areas arg = {
		.size = sizeof(arg),
		.flags = n_memfds > 0 && memfds[backing] >= 0 ? IOMMU_IOAS_LIST_AREAS_FD : 0,
		.generation = *generation,
		.ioas_id = ioas->id,
		.entry_size = sizeof(struct iommu_ioas_area),
		.fd = n_memfds > 0 ? memfds[backing] : -1,
	};
	_cleanup_free_ struct iommu_ioas_area *batch = malloc(BATCH_AREAS * sizeof(*batch));
	bool first = backing == 0;
	size_t at = first ? 0 : *todo, next = SIZE_MAX;
	int r;

	if (!batch)
		return nomem(err);
	arg.cursor = first ? 0 : ioas->areas[at].iova;
	arg.entries = (uintptr_t)batch;
	do {
		arg.num = BATCH_AREAS;
		r = kho_op(kho, ioctl, iommufd, IOMMU_IOAS_LIST_AREAS, &arg);
		if (r == -EAGAIN)
			return r;
		if (r < 0)
			return failed(r, "IOAS", ioas->id, err);
		if (arg.num > BATCH_AREAS || (first && ioas->n_areas + arg.num > KHO_GRAPH_AREAS_MAX))
			return kho_error_new(err, EFBIG, NULL, "IOAS %" PRIu32 " has more than %u areas",
					     ioas->id, KHO_GRAPH_AREAS_MAX);
		if (first && arg.num > 0 && !kho_ioas_add_areas(ioas, arg.num))
			return nomem(err);
		for (size_t i = 0; i < arg.num; i++, at++) {
			const struct iommu_ioas_area *a = &batch[i];
			struct kho_area *area = &ioas->areas[at];

			if (at >= ioas->n_areas || (!first && area->iova != a->iova))
				return -EAGAIN;
			if (first) {
				if (a->backing != IOMMU_AREA_FILE || a->flags & IOMMU_AREA_ACCESSED ||
				    !(a->flags & IOMMU_AREA_OFFSET_VALID))
					return backing_refused(a, ioas->id, err);
				*area = (struct kho_area){
					.iova = a->iova,
					.length = a->length,
					.offset = a->offset,
					.backing = KHO_NONE,
					.flags = a->flags & (KHO_AREA_READABLE | KHO_AREA_WRITEABLE),
				};
			}
			if (a->flags & IOMMU_AREA_MATCH)
				area->backing = backing;
			if (area->backing == KHO_NONE) {
				if (next == SIZE_MAX)
					next = at;
				if (backing + 1 >= n_memfds)
					return backing_refused(a, ioas->id, err);
			}
		}
		/* 0 after a full batch: it ended at the last IOVA there is. */
	} while (arg.num == BATCH_AREAS && arg.cursor != 0);
	*generation = arg.generation;
	*todo = next;
	return 0;
}

static int read_ioas(struct kho *kho, int iommufd, struct kho_ioas *ioas, const int *memfds,
		     size_t n_memfds, struct kho_error **err)
{
	uint64_t generation = 0;
	size_t todo = 0;
	int r;

	/* The last one that is here is the last one to be asked for. */
	while (n_memfds > 0 && memfds[n_memfds - 1] < 0)
		n_memfds--;
	for (size_t b = 0; b == 0 || (b < n_memfds && todo != SIZE_MAX); b++) {
		if (b > 0 && memfds[b] < 0)
			continue;
		r = read_areas(kho, iommufd, ioas, memfds, n_memfds, b, &generation, &todo, err);
		if (r < 0)
			return r;
	}
	return 0;
}

static int read_hwpt(struct kho *kho, int iommufd, const struct iommu_object_entry *e,
		     struct kho_context *c, struct kho_error **err)
{
	struct iommu_hwpt_info arg = { .size = sizeof(arg), .hwpt_id = e->id };
	struct kho_hwpt *h;
	int r;

	r = kho_op(kho, ioctl, iommufd, IOMMU_GET_HWPT_INFO, &arg);
	if (r == -ENOENT)
		return -EAGAIN;
	if (r < 0)
		return failed(r, "HWPT", e->id, err);
	h = kho_context_add_hwpt(c);
	if (!h)
		return nomem(err);
	*h = (struct kho_hwpt){
		.id = e->id,
		.client_id = e->id,
		.ioas = KHO_NONE,
		.flags = arg.out_flags,
		.format = arg.out_format,
		.top_level = arg.out_top_level,
		.page_sizes = arg.out_page_sizes,
		.first_iova = arg.out_first_iova,
		.last_iova = arg.out_last_iova,
		.frozen = e->type == IOMMU_OBJECT_HWPT_FROZEN,
		.old_id = arg.out_old_id,
	};
	if (h->frozen)
		return 0;
	h->ioas = kho_context_find_ioas(c, arg.out_ioas_id);
	return h->ioas == KHO_NONE ? -EAGAIN : 0;
}

static int read_device(struct kho *kho, int iommufd, const struct iommu_object_entry *e,
		       struct kho_context *c, struct kho_error **err)
{
	struct iommu_device_attachment attachments[2] = {};
	struct kho_device *d = kho_context_add_device(c);
	struct iommu_device_info arg = {
		.size = sizeof(arg),
		.dev_id = e->id,
		.attachments = (uintptr_t)attachments,
		.num_attachments = ARRAY_SIZE(attachments),
		.entry_size = sizeof(attachments[0]),
	};
	int r;

	if (!d)
		return nomem(err);
	arg.name = (uintptr_t)d->name;
	arg.name_len = sizeof(d->name);
	r = kho_op(kho, ioctl, iommufd, IOMMU_GET_DEVICE_INFO, &arg);
	if (r == -ENOENT)
		return -EAGAIN;
	if (r < 0)
		return failed(r, "device", e->id, err);
	if (arg.name_len > sizeof(d->name) || arg.name_len == 0)
		return kho_error_new(err, EFBIG, NULL, "the name of device %" PRIu32 " is longer than %d bytes",
				     e->id, KHO_DEVICE_NAME_MAX);
	d->name[arg.name_len - 1] = 0;
	d->id = d->client_id = e->id;
	d->noiommu = arg.out_flags & IOMMU_DEVICE_INFO_NOIOMMU;
	d->hwpt = KHO_NONE;
	if (arg.num_attachments > 1 || (arg.num_attachments == 1 && attachments[0].pasid != 0))
		return kho_error_new(err, EOPNOTSUPP, d->name,
				     "has a PASID attached, which cannot be carried over");
	if (arg.num_attachments == 0)
		return 0;
	d->hwpt = kho_context_find_hwpt(c, attachments[0].hwpt_id);
	return d->hwpt == KHO_NONE ? -EAGAIN : 0;
}

/* In the order in which objects refer to each other. */
static int read_all(struct kho *kho, int iommufd, const struct objects *o, const int *memfds,
		    size_t n_memfds, struct kho_context *c, struct kho_error **err)
{
	int r = 0;

	for (size_t i = 0; i < o->n; i++) {
		const struct iommu_object_entry *e = &o->entries[i];
		struct kho_ioas *ioas;

		switch (e->type) {
		case IOMMU_OBJECT_IOAS:
			ioas = kho_context_add_ioas(c);
			if (!ioas)
				return nomem(err);
			ioas->id = ioas->client_id = e->id;
			break;
		case IOMMU_OBJECT_HWPT_PAGING:
		case IOMMU_OBJECT_HWPT_FROZEN:
		case IOMMU_OBJECT_DEVICE:
		case IOMMU_OBJECT_FAULT:	/* one that is in use shows at its HWPT */
			break;
		case IOMMU_OBJECT_ACCESS:
			if (e->ref_id == 0)
				break;
			/* fall through */
		default:
			return kho_error_new(err, EOPNOTSUPP, NULL,
					     "object %" PRIu32 " of the context is %s, which cannot be carried over",
					     e->id,
					     e->type < ARRAY_SIZE(type_names) && type_names[e->type] ?
						     type_names[e->type] :
						     "of a kind that this khod does not know");
		}
	}
	for (size_t i = 0; r >= 0 && i < o->n; i++)
		if (o->entries[i].type == IOMMU_OBJECT_HWPT_PAGING ||
		    o->entries[i].type == IOMMU_OBJECT_HWPT_FROZEN)
			r = read_hwpt(kho, iommufd, &o->entries[i], c, err);
	for (size_t i = 0; r >= 0 && i < o->n; i++)
		if (o->entries[i].type == IOMMU_OBJECT_DEVICE)
			r = read_device(kho, iommufd, &o->entries[i], c, err);
	for (size_t i = 0; r >= 0 && i < c->n_ioas; i++)
		r = read_ioas(kho, iommufd, &c->ioas[i], memfds, n_memfds, err);
	return r < 0 ? r : still_same(kho, iommufd, o);
}

int kho_snapshot(struct kho *kho, int iommufd, const int *memfds, size_t n_memfds,
		 struct kho_context *context, struct kho_error **err)
{
	struct objects o = {};
	int r = -EAGAIN;

	for (int try = 0; try < RETRIES && r == -EAGAIN; try++) {
		kho_context_clear(context);
		r = list_objects(kho, iommufd, &o, err);
		if (r >= 0)
			r = read_all(kho, iommufd, &o, memfds, n_memfds, context, err);
	}
	free(o.entries);
	if (r < 0)
		kho_context_clear(context);
	if (r == -EAGAIN)
		return kho_error_new(err, r, NULL, "the context keeps changing while it is read");
	if (r < 0 && err && !*err)
		return kho_error_new(err, r, NULL, "cannot list the objects of the context: %s",
				     strerror(-r));
	return r;
}
