/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The graph as part of the image. Objects are few, areas may be a million, so these are
 * four columns of differences in units of the largest power of two that divides all
 * of them: 8 to 14 bytes an area for anything that a workload does in pages. Both ways
 * are one pass.
 */
#include <inttypes.h>
#include <string.h>

#include "graph-codec.h"
#include "util.h"

#define DEVICE_NOIOMMU 1u
#define SHIFT_MAX 52

static int nomem(struct kho_error **err)
{
	return kho_error_new(err, ENOMEM, "graph", "out of memory");
}

/* id and client_id: 0 says that both are the same. */
static uint32_t client_to_wire(uint32_t id, uint32_t client_id)
{
	return client_id == id ? 0 : client_id;
}

static uint32_t client_from_wire(uint32_t id, uint32_t client_id)
{
	return client_id ? client_id : id;
}

static uint32_t areas_shift(const struct kho_ioas *ioas)
{
	uint64_t bits = UINT64_C(1) << SHIFT_MAX;

	for (size_t i = 0; i < ioas->n_areas; i++)
		bits |= ioas->areas[i].iova | ioas->areas[i].length | ioas->areas[i].offset;
	return __builtin_ctzll(bits);
}

static int areas_to_message(const struct kho_graph *graph, const struct kho_ioas *ioas,
			    Kho__Image__Areas *a, struct kho_error **err)
{
	uint32_t shift = areas_shift(ioas);
	_cleanup_free_ uint64_t *ends = NULL;
	size_t n = ioas->n_areas;
	uint64_t next = 0;

	ends = calloc(graph->n_backings + 1, sizeof(*ends));
	a->gap = malloc(n * sizeof(*a->gap));
	a->length = malloc(n * sizeof(*a->length));
	a->offset = malloc(n * sizeof(*a->offset));
	a->backing = malloc(n * sizeof(*a->backing));
	if (!ends || !a->gap || !a->length || !a->offset || !a->backing)
		return nomem(err);
	a->n_gap = a->n_length = a->n_offset = a->n_backing = n;
	a->shift = shift;
	for (size_t i = 0; i < n; i++) {
		const struct kho_area *p = &ioas->areas[i];

		a->gap[i] = (p->iova - next) >> shift;
		a->length[i] = p->length >> shift;
		a->offset[i] = (int64_t)(p->offset - ends[p->backing]) >> shift;
		a->backing[i] = p->backing << 2 | p->flags;
		next = p->iova + p->length;
		ends[p->backing] = p->offset + p->length;
	}
	return 0;
}

static int areas_from_message(const Kho__Image__Areas *a, size_t n_backings,
			      struct kho_ioas *ioas, struct kho_error **err)
{
	_cleanup_free_ uint64_t *ends = NULL;
	size_t n = a->n_gap;
	struct kho_area *p;
	uint64_t next = 0;

	if (a->n_length != n || a->n_offset != n || a->n_backing != n)
		return kho_error_new(err, EINVAL, "graph",
				     "the columns of the areas of IOAS %" PRIu32 " differ in length",
				     ioas->id);
	if (a->shift > SHIFT_MAX)
		return kho_error_new(err, EINVAL, "graph", "areas in units of 2^%" PRIu32 " bytes",
				     a->shift);
	if (n > KHO_GRAPH_AREAS_MAX)
		return kho_error_new(err, EFBIG, "graph", "more than %u areas", KHO_GRAPH_AREAS_MAX);
	if (n == 0)
		return 0;
	ends = calloc(n_backings + 1, sizeof(*ends));
	p = kho_ioas_add_areas(ioas, n);
	if (!ends || !p)
		return nomem(err);
	for (size_t i = 0; i < n; i++, p++) {
		uint32_t b = a->backing[i] >> 2;

		if (b >= n_backings || (a->gap[i] << a->shift) >> a->shift != a->gap[i] ||
		    (a->length[i] << a->shift) >> a->shift != a->length[i] ||
		    __builtin_add_overflow(next, a->gap[i] << a->shift, &p->iova))
			return kho_error_new(err, EINVAL, "graph",
					     "area %zu of IOAS %" PRIu32 " is impossible", i, ioas->id);
		p->length = a->length[i] << a->shift;
		p->offset = ends[b] + ((uint64_t)a->offset[i] << a->shift);
		p->backing = b;
		p->flags = a->backing[i] & 3;
		/* May wrap after the very last one; the check finds all others. */
		next = p->iova + p->length;
		ends[b] = p->offset + p->length;
	}
	return 0;
}

static int attachment_to_message(const struct kho_context *c, const struct kho_device *o,
				 Kho__Image__Device *w, struct kho_error **err)
{
	const struct kho_translation *t = &o->translation;
	Kho__Image__Attachment *a;

	w->attachments = malloc(sizeof(*w->attachments));
	a = malloc(sizeof(*a));
	if (!w->attachments || !a) {
		free(a);
		return nomem(err);
	}
	kho__image__attachment__init(a);
	a->hwpt_id = c->hwpts[o->hwpt].id;
	w->attachments[w->n_attachments++] = a;
	if (t->mode == KHO_TRANSLATION_UNKNOWN)
		return 0;
	a->translation = malloc(sizeof(*a->translation));
	if (!a->translation)
		return nomem(err);
	kho__image__translation__init(a->translation);
	a->translation->mode = t->mode;
	a->translation->unit = t->unit;
	a->translation->domain_id = t->domain_id;
	a->translation->hitless = t->hitless;
	return 0;
}

static int context_to_message(const struct kho_graph *graph, const struct kho_context *c,
			      Kho__Image__Context *m, struct kho_error **err)
{
	size_t i;

	m->token = c->token;
	m->ioas = calloc(c->n_ioas + 1, sizeof(*m->ioas));
	m->hwpts = calloc(c->n_hwpts + 1, sizeof(*m->hwpts));
	m->devices = calloc(c->n_devices + 1, sizeof(*m->devices));
	if (!m->ioas || !m->hwpts || !m->devices)
		return nomem(err);

	for (i = 0; i < c->n_ioas; i++) {
		const struct kho_ioas *o = &c->ioas[i];
		Kho__Image__Ioas *w = m->ioas[m->n_ioas++] = malloc(sizeof(*w));
		int r;

		if (!w)
			return nomem(err);
		kho__image__ioas__init(w);
		w->id = o->id;
		w->client_id = client_to_wire(o->id, o->client_id);
		if (o->n_areas == 0)
			continue;
		w->areas = malloc(sizeof(*w->areas));
		if (!w->areas)
			return nomem(err);
		kho__image__areas__init(w->areas);
		r = areas_to_message(graph, o, w->areas, err);
		if (r < 0)
			return r;
	}
	for (i = 0; i < c->n_hwpts; i++) {
		const struct kho_hwpt *o = &c->hwpts[i];
		Kho__Image__Hwpt *w = m->hwpts[m->n_hwpts++] = malloc(sizeof(*w));

		if (!w)
			return nomem(err);
		kho__image__hwpt__init(w);
		w->id = o->id;
		w->client_id = client_to_wire(o->id, o->client_id);
		w->ioas_id = c->ioas[o->ioas].id;
		w->flags = o->flags;
		w->format = o->format;
		w->top_level = o->top_level;
		w->page_sizes = o->page_sizes;
		w->first_iova = o->first_iova;
		w->last_iova = o->last_iova;
	}
	for (i = 0; i < c->n_devices; i++) {
		const struct kho_device *o = &c->devices[i];
		Kho__Image__Device *w = m->devices[m->n_devices++] = malloc(sizeof(*w));
		int r;

		if (!w)
			return nomem(err);
		kho__image__device__init(w);
		w->id = o->id;
		w->client_id = client_to_wire(o->id, o->client_id);
		w->token = o->token;
		w->name = (char *)o->name;
		w->flags = o->noiommu ? DEVICE_NOIOMMU : 0;
		w->may_have_lost_irq = o->may_have_lost_irq;
		if (o->hwpt == KHO_NONE)
			continue;
		r = attachment_to_message(c, o, w, err);
		if (r < 0)
			return r;
	}
	return 0;
}

int kho_graph_to_message(const struct kho_graph *graph, Kho__Image__Image *m,
			 struct kho_error **err)
{
	m->contexts = calloc(graph->n_contexts + 1, sizeof(*m->contexts));
	if (!m->contexts)
		return nomem(err);
	for (size_t i = 0; i < graph->n_contexts; i++) {
		Kho__Image__Context *w = m->contexts[m->n_contexts++] = malloc(sizeof(*w));
		int r;

		if (!w)
			return nomem(err);
		kho__image__context__init(w);
		r = context_to_message(graph, &graph->contexts[i], w, err);
		if (r < 0)
			return r;
	}
	m->backings = graph->backings;
	m->n_backings = graph->n_backings;
	return 0;
}

static void context_message_free(Kho__Image__Context *m)
{
	if (!m)
		return;
	for (size_t i = 0; i < m->n_ioas; i++) {
		Kho__Image__Areas *a = m->ioas[i] ? m->ioas[i]->areas : NULL;

		if (a) {
			free(a->gap);
			free(a->length);
			free(a->offset);
			free(a->backing);
			free(a);
		}
		free(m->ioas[i]);
	}
	for (size_t i = 0; i < m->n_hwpts; i++)
		free(m->hwpts[i]);
	for (size_t i = 0; i < m->n_devices; i++) {
		Kho__Image__Device *d = m->devices[i];

		for (size_t k = 0; d && k < d->n_attachments; k++) {
			free(d->attachments[k]->translation);
			free(d->attachments[k]);
		}
		if (d)
			free(d->attachments);
		free(d);
	}
	free(m->ioas);
	free(m->hwpts);
	free(m->devices);
	free(m);
}

void kho_graph_message_free(Kho__Image__Image *m)
{
	for (size_t i = 0; i < m->n_contexts; i++)
		context_message_free(m->contexts[i]);
	free(m->contexts);
	m->contexts = NULL;
	m->n_contexts = 0;
	/* The graph's own. */
	m->backings = NULL;
	m->n_backings = 0;
}

/* A mode that a newer khod knows is not known here. */
static struct kho_translation translation_from_message(const Kho__Image__Translation *w)
{
	if (!w || w->mode > KHO_TRANSLATION_NESTED)
		return (struct kho_translation){};
	return (struct kho_translation){
		.mode = (enum kho_translation_mode)w->mode,
		.unit = w->unit,
		.domain_id = w->domain_id,
		.hitless = w->hitless,
	};
}

static int device_from_message(const Kho__Image__Device *w, const struct kho_context *c,
			       struct kho_device *o, struct kho_error **err)
{
	o->id = w->id;
	o->client_id = client_from_wire(w->id, w->client_id);
	o->token = w->token;
	o->hwpt = KHO_NONE;
	if (strlen(w->name) > KHO_DEVICE_NAME_MAX)
		return kho_error_new(err, EFBIG, "graph", "a device's name is longer than %d bytes",
				     KHO_DEVICE_NAME_MAX);
	strcpy(o->name, w->name);
	if (w->flags & ~DEVICE_NOIOMMU)
		return kho_error_new(err, EOPNOTSUPP, "graph",
				     "device %" PRIu32 " has properties that this khod does not know: upgrade khod",
				     w->id);
	o->noiommu = w->flags & DEVICE_NOIOMMU;
	o->may_have_lost_irq = w->may_have_lost_irq;
	if (w->n_attachments > 1 || (w->n_attachments == 1 && w->attachments[0]->pasid != 0))
		return kho_error_new(err, EOPNOTSUPP, "graph",
				     "device %" PRIu32 " has a PASID attached, which this khod cannot restore: upgrade khod",
				     w->id);
	if (w->n_attachments == 1) {
		o->hwpt = kho_context_find_hwpt(c, w->attachments[0]->hwpt_id);
		if (o->hwpt == KHO_NONE)
			return kho_error_new(err, EINVAL, "graph",
					     "device %" PRIu32 " is attached to HWPT %" PRIu32 ", which is not there",
					     w->id, w->attachments[0]->hwpt_id);
		o->translation = translation_from_message(w->attachments[0]->translation);
	}
	return 0;
}

static int context_from_message(const Kho__Image__Context *m, size_t n_backings,
				struct kho_context *c, struct kho_error **err)
{
	int r;

	for (size_t i = 0; i < m->n_ioas; i++) {
		struct kho_ioas *o = kho_context_add_ioas(c);

		if (!o)
			return nomem(err);
		o->id = m->ioas[i]->id;
		o->client_id = client_from_wire(o->id, m->ioas[i]->client_id);
		if (!m->ioas[i]->areas)
			continue;
		r = areas_from_message(m->ioas[i]->areas, n_backings, o, err);
		if (r < 0)
			return r;
	}
	for (size_t i = 0; i < m->n_hwpts; i++) {
		const Kho__Image__Hwpt *w = m->hwpts[i];
		struct kho_hwpt *o = kho_context_add_hwpt(c);

		if (!o)
			return nomem(err);
		o->id = w->id;
		o->client_id = client_from_wire(w->id, w->client_id);
		o->ioas = kho_context_find_ioas(c, w->ioas_id);
		o->flags = w->flags;
		o->format = w->format;
		o->top_level = w->top_level;
		o->page_sizes = w->page_sizes;
		o->first_iova = w->first_iova;
		o->last_iova = w->last_iova;
	}
	for (size_t i = 0; i < m->n_devices; i++) {
		struct kho_device *o = kho_context_add_device(c);

		if (!o)
			return nomem(err);
		r = device_from_message(m->devices[i], c, o, err);
		if (r < 0)
			return r;
	}
	return 0;
}

static void graph_freep(struct kho_graph **g)
{
	kho_graph_free(*g);
}

int kho_graph_from_message(const Kho__Image__Image *m, struct kho_graph **ret,
			   struct kho_error **err)
{
	_cleanup_(graph_freep) struct kho_graph *g = kho_graph_new();
	size_t objects = 0;
	int r;

	if (!g)
		return nomem(err);
	/* Finding one object is linear: so the cap comes first. */
	for (size_t i = 0; i < m->n_contexts; i++)
		objects += m->contexts[i]->n_ioas + m->contexts[i]->n_hwpts +
			   m->contexts[i]->n_devices;
	if (objects > KHO_GRAPH_OBJECTS_MAX)
		return kho_error_new(err, EFBIG, "graph", "more than %d objects",
				     KHO_GRAPH_OBJECTS_MAX);
	for (size_t i = 0; i < m->n_backings; i++)
		if (kho_graph_add_backing(g, m->backings[i]) < 0)
			return nomem(err);
	for (size_t i = 0; i < m->n_contexts; i++) {
		struct kho_context *c = kho_graph_add_context(g, m->contexts[i]->token);

		if (!c)
			return nomem(err);
		r = context_from_message(m->contexts[i], g->n_backings, c, err);
		if (r < 0)
			return r;
	}
	r = kho_graph_check(g, err);
	if (r < 0)
		return r;
	*ret = TAKE_PTR(g);
	return 0;
}
