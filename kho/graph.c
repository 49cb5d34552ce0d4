/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The model of what a workload has in its iommufds, and what must hold of it. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include <kho/graph.h>

#include "util.h"

struct kho_graph *kho_graph_new(void)
{
	return calloc(1, sizeof(struct kho_graph));
}

void kho_context_clear(struct kho_context *context)
{
	for (size_t i = 0; i < context->n_ioas; i++)
		free(context->ioas[i].areas);
	free(context->ioas);
	free(context->hwpts);
	free(context->devices);
	*context = (struct kho_context){ .token = context->token };
}

struct kho_graph *kho_graph_free(struct kho_graph *graph)
{
	if (graph) {
		for (size_t i = 0; i < graph->n_contexts; i++)
			kho_context_clear(&graph->contexts[i]);
		free(graph->contexts);
		free(graph->backings);
		free(graph);
	}
	return NULL;
}

size_t kho_graph_n_areas(const struct kho_graph *graph)
{
	size_t n = 0;

	for (size_t i = 0; i < graph->n_contexts; i++)
		for (size_t k = 0; k < graph->contexts[i].n_ioas; k++)
			n += graph->contexts[i].ioas[k].n_areas;
	return n;
}

/* Room for @more elements, doubled at powers of two so that no step is quadratic. */
static void *grow(void *array, size_t *n, size_t more, size_t size)
{
	size_t have = 0, want = 1;
	uint8_t *p = *(void **)array;

	if (*n + more < *n || *n + more > SIZE_MAX / 2 / size)
		return NULL;
	for (have = *n ? 1 : 0; have && have < *n;)
		have *= 2;
	while (want < *n + more)
		want *= 2;
	if (want > have) {
		p = realloc(p, want * size);
		if (!p)
			return NULL;
		*(void **)array = p;
	}
	p += *n * size;
	memset(p, 0, more * size);
	*n += more;
	return p;
}

struct kho_context *kho_graph_add_context(struct kho_graph *graph, uint64_t token)
{
	struct kho_context *c = grow(&graph->contexts, &graph->n_contexts, 1, sizeof(*c));

	if (c)
		c->token = token;
	return c;
}

int kho_graph_add_backing(struct kho_graph *graph, uint64_t token)
{
	uint64_t *p = grow(&graph->backings, &graph->n_backings, 1, sizeof(*p));

	if (!p)
		return -ENOMEM;
	*p = token;
	return 0;
}

struct kho_ioas *kho_context_add_ioas(struct kho_context *context)
{
	return grow(&context->ioas, &context->n_ioas, 1, sizeof(struct kho_ioas));
}

struct kho_hwpt *kho_context_add_hwpt(struct kho_context *context)
{
	return grow(&context->hwpts, &context->n_hwpts, 1, sizeof(struct kho_hwpt));
}

struct kho_device *kho_context_add_device(struct kho_context *context)
{
	return grow(&context->devices, &context->n_devices, 1, sizeof(struct kho_device));
}

struct kho_area *kho_ioas_add_areas(struct kho_ioas *ioas, size_t n)
{
	return grow(&ioas->areas, &ioas->n_areas, n, sizeof(struct kho_area));
}

uint32_t kho_context_find_ioas(const struct kho_context *context, uint32_t id)
{
	for (size_t i = 0; i < context->n_ioas; i++)
		if (context->ioas[i].id == id)
			return i;
	return KHO_NONE;
}

uint32_t kho_context_find_hwpt(const struct kho_context *context, uint32_t id)
{
	for (size_t i = 0; i < context->n_hwpts; i++)
		if (context->hwpts[i].id == id)
			return i;
	return KHO_NONE;
}

uint32_t kho_context_find_device(const struct kho_context *context, const char *name)
{
	for (size_t i = 0; i < context->n_devices; i++)
		if (strcmp(context->devices[i].name, name) == 0)
			return i;
	return KHO_NONE;
}

static int compare_ids(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

/* One space of ids a context, twice: the kernel's and the client's. */
static int check_ids(const struct kho_context *c, bool client, struct kho_error **err)
{
	size_t n = c->n_ioas + c->n_hwpts + c->n_devices, k = 0;
	_cleanup_free_ uint32_t *ids = calloc(n + 1, sizeof(*ids));

	if (!ids)
		return kho_error_new(err, ENOMEM, "graph", "out of memory");
	for (size_t i = 0; i < c->n_ioas; i++)
		ids[k++] = client ? c->ioas[i].client_id : c->ioas[i].id;
	for (size_t i = 0; i < c->n_hwpts; i++)
		ids[k++] = client ? c->hwpts[i].client_id : c->hwpts[i].id;
	for (size_t i = 0; i < c->n_devices; i++)
		ids[k++] = client ? c->devices[i].client_id : c->devices[i].id;
	qsort(ids, n, sizeof(*ids), compare_ids);
	if (n > 0 && ids[0] == 0)
		return kho_error_new(err, EINVAL, "graph", "an object without an id");
	for (size_t i = 1; i < n; i++)
		if (ids[i] == ids[i - 1])
			return kho_error_new(err, EINVAL, "graph", "two objects with the id %" PRIu32,
					     ids[i]);
	return 0;
}

static int check_areas(const struct kho_graph *graph, const struct kho_ioas *ioas,
		       struct kho_error **err)
{
	uint64_t next = 0;

	for (size_t i = 0; i < ioas->n_areas; i++) {
		const struct kho_area *a = &ioas->areas[i];
		uint64_t last, end;

		/* The last IOVA, not the end, which may be 2^64. */
		if (a->length == 0 || __builtin_add_overflow(a->iova, a->length - 1, &last) ||
		    __builtin_add_overflow(a->offset, a->length, &end))
			return kho_error_new(err, EINVAL, "graph",
					     "area %zu of IOAS %" PRIu32 " has an impossible length", i,
					     ioas->id);
		if (a->iova < next || (i > 0 && next == 0))
			return kho_error_new(err, EINVAL, "graph",
					     "area %zu of IOAS %" PRIu32 " overlaps the one before", i,
					     ioas->id);
		if (a->backing >= graph->n_backings)
			return kho_error_new(err, EINVAL, "graph",
					     "area %zu of IOAS %" PRIu32 " maps a memfd that is not there",
					     i, ioas->id);
		if (a->flags & ~(uint32_t)(KHO_AREA_READABLE | KHO_AREA_WRITEABLE))
			return kho_error_new(err, EINVAL, "graph",
					     "area %zu of IOAS %" PRIu32 " has unknown flags", i,
					     ioas->id);
		next = last + 1;
	}
	return 0;
}

static int check_hwpt(const struct kho_context *c, const struct kho_hwpt *h,
		      struct kho_error **err)
{
	static const uint32_t known = KHO_HWPT_AUTO | KHO_HWPT_NEST_PARENT | KHO_HWPT_DIRTY |
				      KHO_HWPT_ENFORCE_CC | KHO_HWPT_PASID | KHO_HWPT_NOIOMMU;

	if (h->frozen)
		return kho_error_new(err, EOPNOTSUPP, "graph",
				     "HWPT %" PRIu32 " is one of the previous kernel", h->id);
	if (h->flags & ~known)
		return kho_error_new(err, EOPNOTSUPP, "graph",
				     "HWPT %" PRIu32 " has %s, which cannot be carried over", h->id,
				     h->flags & KHO_HWPT_FAULT		? "a fault queue" :
				     h->flags & KHO_HWPT_DIRTY_TRACKING ? "dirty tracking on" :
									  "an unknown property");
	if (h->ioas >= c->n_ioas)
		return kho_error_new(err, EINVAL, "graph", "HWPT %" PRIu32 " without an IOAS", h->id);
	return 0;
}

const char *kho_translation_mode_name(enum kho_translation_mode mode)
{
	static const char *const names[] = {
		[KHO_TRANSLATION_UNKNOWN] = "unknown",
		[KHO_TRANSLATION_LEGACY] = "legacy",
		[KHO_TRANSLATION_SECOND_STAGE] = "second-stage",
		[KHO_TRANSLATION_FIRST_STAGE] = "first-stage",
		[KHO_TRANSLATION_NESTED] = "nested",
	};

	return names[(size_t)mode < ARRAY_SIZE(names) ? mode : KHO_TRANSLATION_UNKNOWN];
}

static int check_device(const struct kho_context *c, const struct kho_device *d,
			struct kho_error **err)
{
	size_t len = strnlen(d->name, sizeof(d->name));

	if (len == 0 || len == sizeof(d->name))
		return kho_error_new(err, EINVAL, "graph", "device %" PRIu32 " without a name", d->id);
	for (size_t i = 0; i < len; i++)
		if ((unsigned char)d->name[i] <= 0x20 || (unsigned char)d->name[i] >= 0x7f)
			return kho_error_new(err, EINVAL, "graph",
					     "the name of device %" PRIu32 " is not printable", d->id);
	if (d->hwpt != KHO_NONE && d->hwpt >= c->n_hwpts)
		return kho_error_new(err, EINVAL, "graph",
				     "device %" PRIu32 " is attached to nothing that is there", d->id);
	return 0;
}

int kho_graph_check(const struct kho_graph *graph, struct kho_error **err)
{
	size_t objects = 0;
	int r;

	if (kho_graph_n_areas(graph) > KHO_GRAPH_AREAS_MAX)
		return kho_error_new(err, EFBIG, "graph", "more than %u areas", KHO_GRAPH_AREAS_MAX);
	for (size_t i = 0; i < graph->n_contexts; i++) {
		const struct kho_context *c = &graph->contexts[i];

		objects += c->n_ioas + c->n_hwpts + c->n_devices;
		if (objects > KHO_GRAPH_OBJECTS_MAX)
			return kho_error_new(err, EFBIG, "graph", "more than %d objects",
					     KHO_GRAPH_OBJECTS_MAX);
		r = check_ids(c, false, err);
		if (r >= 0)
			r = check_ids(c, true, err);
		for (size_t k = 0; r >= 0 && k < c->n_ioas; k++)
			r = check_areas(graph, &c->ioas[k], err);
		for (size_t k = 0; r >= 0 && k < c->n_hwpts; k++)
			r = check_hwpt(c, &c->hwpts[k], err);
		for (size_t k = 0; r >= 0 && k < c->n_devices; k++)
			r = check_device(c, &c->devices[k], err);
		if (r < 0)
			return r;
	}
	return 0;
}
