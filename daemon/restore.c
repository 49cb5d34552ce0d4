/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Workloads with devices: what of them goes into the image, and what is made of it in the
 * next kernel. The work is libkho's (kho_snapshot(), kho_plan_run()); here is which
 * descriptors belong to what.
 */
#include <fcntl.h>
#include <string.h>

#include "fault.h"
#include "khod.h"
#include "log.h"

static void graph_freep(struct kho_graph **g)
{
	kho_graph_free(*g);
}

static int fd_by_token(const struct kho_image *image, const int *fds, uint64_t token)
{
	for (size_t i = 0; i < kho_image_n_files(image); i++) {
		struct kho_image_file f = {};

		kho_image_file(image, i, &f);
		if (f.token == token)
			return fds[i];
	}
	return -1;
}

/* The context with that device, by the name that the device's own descriptor tells. */
static int find_device(struct khod *k, const struct kho_image *image, struct kho_graph *g,
		       const struct kho_image_file *f, int fd, struct kho_error **err)
{
	char name[KHO_DEVICE_NAME_MAX + 1];
	int r;

	r = kho_vfio_name(k->kho, fd, name, err);
	if (r < 0)
		return kho_error_new(err, r, f->name, "cannot be identified");
	for (size_t i = 0; i < g->n_contexts; i++)
		for (size_t j = 0; j < g->contexts[i].n_devices; j++) {
			struct kho_device *d = &g->contexts[i].devices[j];
			const char *slash = strchr(d->name, '/');

			if (!slash || strcmp(slash + 1, name) != 0)
				continue;
			if (d->hwpt == KHO_NONE)
				return kho_error_new(err, EOPNOTSUPP, f->name,
						     "is attached to no page table, so that there is nothing to carry over: attach it first");
			d->token = f->token;
			return 0;
		}
	if (domain_explain(k, image, KHO_FILE_VFIO, fd, err) < 0)
		return kho_error_new(err, EBUSY, f->name, "cannot be preserved");
	return kho_error_new(err, EOPNOTSUPP, f->name,
			     "is not bound to an iommufd of the workload: register that, too");
}

/* An attached device without its file would be the kernel's refusal in reboot(2). */
static int all_there(const struct kho_graph *g, struct kho_error **err)
{
	for (size_t i = 0; i < g->n_contexts; i++)
		for (size_t j = 0; j < g->contexts[i].n_devices; j++) {
			const struct kho_device *d = &g->contexts[i].devices[j];

			if (d->hwpt != KHO_NONE && d->token == 0)
				return kho_error_new(err, EOPNOTSUPP, d->name,
						     "is attached, and is not in the workload: register it, too");
		}
	return 0;
}

static int *memfds_of(const struct kho_image *image, const int *fds, size_t *n)
{
	int *memfds = calloc(kho_image_n_files(image) + 1, sizeof(int));

	*n = 0;
	for (size_t i = 0; memfds && i < kho_image_n_files(image); i++) {
		struct kho_image_file f = {};

		kho_image_file(image, i, &f);
		if (f.kind == KHO_FILE_MEMFD)
			memfds[(*n)++] = fds[i];
	}
	return memfds;
}

int graph_read(struct khod *k, struct kho_image *image, const int *fds, struct kho_error **err)
{
	_cleanup_(graph_freep) struct kho_graph *g = kho_graph_new();
	_cleanup_free_ int *memfds = NULL;
	size_t n = kho_image_n_files(image), n_memfds;
	struct kho_image_file f;
	int r;

	memfds = memfds_of(image, fds, &n_memfds);
	if (!g || !memfds)
		return kho_error_new(err, ENOMEM, kho_image_name(image), "out of memory");
	for (size_t i = 0; i < n; i++) {
		kho_image_file(image, i, &f);
		if (f.kind == KHO_FILE_MEMFD && kho_graph_add_backing(g, f.token) < 0)
			return kho_error_new(err, ENOMEM, f.name, "out of memory");
	}
	for (size_t i = 0; i < n; i++) {
		struct kho_context *c;

		kho_image_file(image, i, &f);
		if (f.kind != KHO_FILE_IOMMUFD)
			continue;
		c = kho_graph_add_context(g, f.token);
		if (!c)
			return kho_error_new(err, ENOMEM, f.name, "out of memory");
		r = kho_snapshot(k->kho, fds[i], memfds, n_memfds, c, err);
		if (r < 0)
			return kho_error_new(err, r, f.name, "cannot be read");
	}
	for (size_t i = 0; i < n; i++) {
		kho_image_file(image, i, &f);
		if (f.kind != KHO_FILE_VFIO)
			continue;
		r = find_device(k, image, g, &f, fds[i], err);
		if (r < 0)
			return r;
	}
	r = all_there(g, err);
	if (r >= 0)
		r = kho_image_set_graph(image, g, err);
	if (r < 0)
		return r;
	(void)TAKE_PTR(g);
	return 0;
}

/* One that could not be moved with its DMA going on is refused by the kernel, when it is preserved. */
static int all_hitless(struct khod *k, const struct workload *w, struct kho_error **err)
{
	const struct kho_graph *g = kho_image_graph(w->image);

	for (size_t i = 0; g && i < g->n_contexts; i++) {
		const struct kho_context *c = &g->contexts[i];
		int fd = fd_by_token(w->image, w->fds, c->token);

		for (size_t j = 0; j < c->n_devices; j++) {
			const struct kho_device *d = &c->devices[j];
			int r = d->noiommu || d->hwpt == KHO_NONE ? 1 :
				kho_iommufd_hitless(k->kho, fd, d->id, err);

			if (r < 0)
				return r;
			if (r == 0)
				return kho_error_new(err, EOPNOTSUPP, d->name,
						     "is behind an IOMMU that could discard its DMA while its page table is replaced");
		}
	}
	return 0;
}

int graph_look(struct khod *k, struct workload *w, struct kho_error **err)
{
	int r = graph_read(k, w->image, w->fds, err);

	return r < 0 ? r : all_hitless(k, w, err);
}

static int open_iommufd(struct khod *k, const struct workload *w, uint64_t token)
{
	if (w->fds)
		return kho_op(k->kho, fcntl, fd_by_token(w->image, w->fds, token), F_DUPFD_CLOEXEC, 3);
	/* One that is to be given up is not touched any more. */
	return w->state == WORKLOAD_HELD ? kho_luo_retrieve(k->kho, w->session, token, NULL) : -EIO;
}

void graph_translations(struct khod *k, struct workload *w, bool ask)
{
	const struct kho_graph *g = w->image ? kho_image_graph(w->image) : NULL;

	for (size_t i = 0; g && i < g->n_contexts; i++) {
		const struct kho_context *c = &g->contexts[i];
		int fd = ask ? open_iommufd(k, w, c->token) : -1;

		for (size_t j = 0; j < c->n_devices; j++) {
			struct kho_device *d = &c->devices[j];

			d->translation = (struct kho_translation){};
			if (fd < 0 || kho_iommufd_translation(k->kho, fd, d->id, &d->translation, NULL) < 0)
				continue;
			d->translation.hitless = kho_iommufd_hitless(k->kho, fd, d->id, NULL) > 0;
		}
		if (fd >= 0)
			kho_close(k->kho, fd);
	}
}

void graph_mapped(const struct kho_image *image, bool *mapped)
{
	const struct kho_graph *g = kho_image_graph(image);
	bool backing[KHO_IMAGE_FILES_MAX] = {};

	for (size_t i = 0; g && i < g->n_contexts; i++)
		for (size_t j = 0; j < g->contexts[i].n_ioas; j++) {
			const struct kho_ioas *ioas = &g->contexts[i].ioas[j];

			for (size_t a = 0; a < ioas->n_areas; a++)
				if (ioas->areas[a].backing < ARRAY_SIZE(backing))
					backing[ioas->areas[a].backing] = true;
		}
	for (size_t i = 0; i < kho_image_n_files(image); i++) {
		struct kho_image_file f = {};

		kho_image_file(image, i, &f);
		mapped[i] = false;
		for (size_t b = 0; g && b < g->n_backings && b < ARRAY_SIZE(backing); b++)
			mapped[i] |= backing[b] && g->backings[b] == f.token;
	}
}

bool graph_may_have_lost_irq(const struct kho_image *image, uint64_t token)
{
	const struct kho_graph *g = kho_image_graph(image);

	for (size_t i = 0; g && i < g->n_contexts; i++)
		for (size_t j = 0; j < g->contexts[i].n_devices; j++)
			if (g->contexts[i].devices[j].token == token)
				return g->contexts[i].devices[j].may_have_lost_irq;
	return false;
}

/*
 * Who accepts that interrupts get lost has to know which device to look after. One that came over
 * with MSI-X enabled has kept its own pending. Of all others it is not known whether they used
 * INTx or MSI, which the kernel before has turned off, or none.
 */
static void mark_lost_irq(struct khod *k, const struct kho_image *image, struct kho_context *c,
			  const int *fds)
{
	for (size_t i = 0; kho_image_may_lose_irq(image) && i < c->n_devices; i++) {
		struct kho_device *d = &c->devices[i];

		if (d->token && kho_vfio_msix_enabled(k->kho, fd_by_token(image, fds, d->token), NULL) <= 0)
			d->may_have_lost_irq = true;
	}
}

/* What the contexts of one workload are restored with. */
struct restore {
	struct khod *k;
	const struct kho_image *image;
	const struct kho_graph *want;
	struct kho_graph *have;
	struct kho_plan **plans;
	struct kho_restore_files *files;
	int *memfds;
};

static void restore_clear(struct restore *s)
{
	for (size_t i = 0; i < s->want->n_contexts; i++) {
		if (s->plans)
			kho_plan_free(s->plans[i]);
		if (s->files)
			free((void *)s->files[i].devices);
	}
	free(s->plans);
	free(s->files);
	free(s->memfds);
	kho_graph_free(s->have);
}

static void passed(void *userdata, enum kho_step step)
{
	struct restore *s = userdata;

	/* Not each area: to map it costs next to nothing before there is a page table. */
	if (step == KHO_STEP_BIND || step == KHO_STEP_HWPT)
		timeline_ended(s->k, KHO_MARK_BUILT, kho_image_name(s->image));
	else if (step == KHO_STEP_REPLACE)
		timeline_ended(s->k, KHO_MARK_REPLACED, kho_image_name(s->image));
	switch (step) {
	case KHO_STEP_BIND:
		FAULT(RESTORE_BOUND);
		break;
	case KHO_STEP_IOAS:
		FAULT(RESTORE_IOAS);
		break;
	case KHO_STEP_MAP:
		FAULT(RESTORE_MAPPED);
		break;
	case KHO_STEP_HWPT:
		FAULT(RESTORE_HWPT);
		break;
	case KHO_STEP_REPLACE:
		FAULT(RESTORE_REPLACED);
		break;
	case KHO_STEP_DESTROY:
		FAULT(RESTORE_DESTROYED);
		break;
	}
}

/* Descriptors of a context, a reading of it, and the plan. */
static int plan_one(struct restore *s, size_t i, const int *fds, size_t n_memfds,
		    struct kho_error **err)
{
	const struct kho_context *want = &s->want->contexts[i];
	struct kho_context *have = &s->have->contexts[i];
	int *devices = calloc(want->n_devices + 1, sizeof(int));
	int r;

	s->files[i] = (struct kho_restore_files){
		.iommufd = fd_by_token(s->image, fds, want->token),
		.memfds = s->memfds,
		.n_memfds = n_memfds,
		.devices = devices,
	};
	if (!devices)
		return kho_error_new(err, ENOMEM, NULL, "out of memory");
	for (size_t j = 0; j < want->n_devices; j++)
		devices[j] = want->devices[j].token ?
				     fd_by_token(s->image, fds, want->devices[j].token) : -1;
	r = kho_snapshot(s->k->kho, s->files[i].iommufd, s->memfds, n_memfds, have, err);
	return r < 0 ? r : kho_plan_new(want, have, &s->plans[i], err);
}

static int prepare(struct restore *s, const int *fds, struct kho_error **err)
{
	size_t n = s->want->n_contexts, n_memfds = s->want->n_backings;
	int r = 0;

	s->plans = calloc(n + 1, sizeof(*s->plans));
	s->files = calloc(n + 1, sizeof(*s->files));
	s->memfds = calloc(n_memfds + 1, sizeof(*s->memfds));
	s->have = kho_graph_new();
	if (!s->plans || !s->files || !s->memfds || !s->have)
		return kho_error_new(err, ENOMEM, NULL, "out of memory");
	for (size_t i = 0; i < n_memfds; i++)
		s->memfds[i] = fd_by_token(s->image, fds, s->want->backings[i]);
	/* All of them first: a plan points to the one it was made with. */
	for (size_t i = 0; i < n; i++)
		if (!kho_graph_add_context(s->have, s->want->contexts[i].token))
			return kho_error_new(err, ENOMEM, NULL, "out of memory");
	for (size_t i = 0; r >= 0 && i < n; i++)
		r = plan_one(s, i, fds, n_memfds, err);
	return r;
}

static void undo(struct restore *s)
{
	for (size_t i = s->want->n_contexts; i > 0; i--) {
		_cleanup_error_ struct kho_error *e = NULL;
		_cleanup_free_ char *text = NULL;
		int r;

		if (!s->plans || !s->plans[i - 1])
			continue;
		r = kho_plan_undo(s->k->kho, s->plans[i - 1], &s->files[i - 1], &e);
		if (r >= 0)
			continue;
		text = kho_error_format(e, r);
		log_event(LOG_ERR, MSG_LEFT_OVER, kho_image_name(s->image),
			  "Not all of the restore of %s can be undone: %s.", kho_image_name(s->image),
			  text ? text : strerror(-r));
	}
}

/* The devices are restored, whatever happens here; but only once all is gone can it go on. */
static void commit(struct restore *s)
{
	for (size_t i = 0; i < s->want->n_contexts; i++) {
		_cleanup_error_ struct kho_error *e = NULL;
		_cleanup_free_ char *text = NULL;
		int r = kho_plan_commit(s->k->kho, s->plans[i], &s->files[i], passed, s, NULL);

		if (r < 0)
			r = kho_plan_commit(s->k->kho, s->plans[i], &s->files[i], passed, s, &e);
		if (r >= 0)
			continue;
		text = kho_error_format(e, r);
		log_event(LOG_ERR, MSG_LEFT_OVER, kho_image_name(s->image),
			  "%s is restored, but a page table of the previous kernel is left over: %s.",
			  kho_image_name(s->image), text ? text : strerror(-r));
	}
}

int workload_restore(struct khod *k, struct kho_image *image, const int *fds, size_t *steps,
		     struct kho_error **err)
{
	struct kho_graph *graph = (struct kho_graph *)kho_image_graph(image);
	struct restore s = { .k = k, .image = image, .want = graph };
	int r;

	*steps = 0;
	if (!graph)
		return kho_error_new(err, ENODATA, kho_image_name(image),
				     "its image does not say what its iommufds held (it was written by an older khod)");
	khod_busy(k, kho_image_bytes(image));
	r = prepare(&s, fds, err);
	for (size_t i = 0; r >= 0 && i < graph->n_contexts; i++)
		*steps += kho_plan_n_steps(s.plans[i]);
	for (size_t i = 0; r >= 0 && i < graph->n_contexts; i++)
		r = kho_plan_run(k->kho, s.plans[i], &s.files[i], passed, &s, err);
	if (r < 0) {
		undo(&s);
	} else {
		commit(&s);
		for (size_t i = 0; i < graph->n_contexts; i++) {
			kho_plan_apply(s.plans[i], &graph->contexts[i]);
			mark_lost_irq(k, image, &graph->contexts[i], fds);
		}
	}
	restore_clear(&s);
	return r;
}
