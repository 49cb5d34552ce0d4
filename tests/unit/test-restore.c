/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot and restore on the simulated kernel (sim-devices.h): a workload with two
 * contexts, four devices, of which two are one IOMMU group, an IOAS with two HWPTs and one with an
 * automatic one, over a simulated kexec; every single call made to fail; cut off after every single call.
 */
#include "common.h"
#include "sim-devices.h"

#define N_MEMFDS 3
#define N_CTX 2
#define N_DEV 4

static const char *const dev_names[N_DEV] = { "0000:01:00.0", "0000:02:00.0", "0000:02:00.1",
					      "0000:04:00.0" };
static const int dev_ctx[N_DEV] = { 0, 0, 0, 1 };

/* The machine, and what a client and an agent hold in it. */
struct world {
	struct sim *sim;
	struct kho *kho;
	int memfds[N_MEMFDS], ctx[N_CTX], dev[N_DEV], session;
	struct kho_graph *graph;	/* read in the old kernel, with tokens */
};

static size_t fds_at_start;

static void must(int r, struct kho_error *err)
{
	if (r < 0)
		test_fail(__FILE__, __LINE__, "a step of the set-up", "%d %s", r,
			  err ? kho_error_format(err, r) : "");
}

static void map(struct world *w, int ctx, uint32_t ioas, int memfd, uint64_t offset, uint64_t length,
		uint64_t iova, uint32_t flags)
{
	struct kho_error *err = NULL;

	must(kho_iommufd_map_file(w->kho, w->ctx[ctx], ioas, w->memfds[memfd], offset, length, iova,
				  flags, &err), err);
}

static void bind_attach(struct world *w, int i, uint32_t pt)
{
	struct kho_error *err = NULL;
	uint32_t id;

	if (w->dev[i] < 0) {
		char path[64];

		snprintf(path, sizeof(path), "/dev/vfio/devices/%s", dev_names[i]);
		w->dev[i] = kho_vfio_open(w->kho, path, &err);
		must(w->dev[i], err);
		must(kho_vfio_bind(w->kho, w->dev[i], w->ctx[dev_ctx[i]], &id, &err), err);
	}
	if (pt)
		must(kho_vfio_attach(w->kho, w->dev[i], &pt, false, &err), err);
}

/* As a client sets it up, with ids that are not simply ascending. */
static void client_sets_up(struct world *w)
{
	struct kho_error *err = NULL;
	uint32_t a, b, gone, hwpt;

	for (int i = 0; i < N_MEMFDS; i++)
		w->memfds[i] = make_memfd(65536, i);
	for (int i = 0; i < N_DEV; i++)
		w->dev[i] = -1;
	for (int i = 0; i < N_CTX; i++) {
		w->ctx[i] = kho_iommufd_open(w->kho, &err);
		must(w->ctx[i], err);
	}
	must(kho_iommufd_ioas_alloc(w->kho, w->ctx[0], &gone, &err), err);
	must(kho_iommufd_ioas_alloc(w->kho, w->ctx[0], &a, &err), err);
	must(kho_iommufd_ioas_alloc(w->kho, w->ctx[0], &b, &err), err);
	must(kho_iommufd_destroy(w->kho, w->ctx[0], gone, &err), err);
	map(w, 0, a, 0, 0, 32768, 0x100000, 3);
	map(w, 0, a, 1, 4096, 8192, 0x200000, 1);
	map(w, 0, a, 0, 40960, 4096, 0x300000, 3);
	map(w, 0, b, 2, 0, 65536, 0x1000, 3);
	for (int i = 0; i < 3; i++)
		bind_attach(w, i, 0);
	must(kho_iommufd_hwpt_alloc(w->kho, w->ctx[0], 1, a, 0, &hwpt, &err), err);
	bind_attach(w, 0, hwpt);
	must(kho_iommufd_hwpt_alloc(w->kho, w->ctx[0], 1, a, 0, &hwpt, &err), err);	/* unused */
	bind_attach(w, 1, b);
	bind_attach(w, 2, b);
	must(kho_iommufd_ioas_alloc(w->kho, w->ctx[1], &a, &err), err);
	map(w, 1, a, 1, 0, 4096, 0, 3);
	bind_attach(w, 3, a);
}

static int snapshots(struct world *w, const int *ctx, struct kho_graph *g, struct kho_error **err)
{
	for (int i = 0; i < N_MEMFDS; i++)
		if (kho_graph_add_backing(g, 1 + i) < 0)
			return -ENOMEM;
	for (int i = 0; i < N_CTX; i++) {
		struct kho_context *c = kho_graph_add_context(g, 10 + i);
		int r = kho_snapshot(w->kho, ctx[i], w->memfds, N_MEMFDS, c, err);

		if (r < 0)
			return r;
	}
	return 0;
}

/* What khod does before a kexec, by hand. */
static void agent_preserves(struct world *w)
{
	struct kho_error *err = NULL;

	w->session = kho_luo_session_create(w->kho, "s", &err);
	must(w->session, err);
	for (int i = 0; i < N_MEMFDS; i++)
		must(kho_luo_preserve(w->kho, w->session, w->memfds[i], 1 + i, &err), err);
	for (int i = 0; i < N_CTX; i++)
		must(kho_luo_preserve(w->kho, w->session, w->ctx[i], 10 + i, &err), err);
	w->graph = kho_graph_new();
	must(snapshots(w, w->ctx, w->graph, &err), err);
	for (int i = 0; i < N_DEV; i++) {
		struct kho_context *c = &w->graph->contexts[dev_ctx[i]];
		char name[80], own[KHO_DEVICE_NAME_MAX + 1];
		uint32_t at;

		must(kho_vfio_name(w->kho, w->dev[i], own, &err), err);
		snprintf(name, sizeof(name), "pci/%s", own);
		at = kho_context_find_device(c, name);
		cr_assert(at != KHO_NONE, "%s", name);
		c->devices[at].token = 20 + i;
		must(kho_luo_preserve(w->kho, w->session, w->dev[i], 20 + i, &err), err);
	}
	must(kho_graph_check(w->graph, &err), err);
}

static void close_all(struct world *w)
{
	for (int i = 0; i < N_MEMFDS; i++)
		close(w->memfds[i]);
	for (int i = 0; i < N_CTX; i++)
		close(w->ctx[i]);
	for (int i = 0; i < N_DEV; i++)
		close(w->dev[i]);
}

static void next_kernel(struct world *w)
{
	struct kho_error *err = NULL;

	close_all(w);
	sim_kexec(w->sim);
	close(w->session);
	w->session = kho_luo_session_retrieve(w->kho, "s", &err);
	must(w->session, err);
	for (int i = 0; i < N_MEMFDS; i++)
		w->memfds[i] = -1;
	for (int i = 0; i < N_CTX; i++)
		w->ctx[i] = -1;
	for (int i = 0; i < N_DEV; i++)
		w->dev[i] = -1;
}

static int retrieve(struct world *w, int *fd, uint64_t token, struct kho_error **err)
{
	int r;

	if (*fd >= 0)
		return 0;
	r = kho_luo_retrieve(w->kho, w->session, token, err);
	if (r < 0)
		return r;
	*fd = r;
	return 0;
}

static void world_new(struct world *w)
{
	fds_at_start = count_fds();
	*w = (struct world){ .sim = sim_new(true) };
	setenv("KHO_SIM", sim_dir(w->sim), 1);
	cr_assert(kho_new(&w->kho, sim_ops(), NULL) == 0);
	sim_fail(0, 0);
	client_sets_up(w);
	agent_preserves(w);
	next_kernel(w);
}

static void world_free(struct world *w)
{
	close(w->session);
	close_all(w);
	kho_graph_free(w->graph);
	kho_free(w->kho);
	sim_free(w->sim);
	cr_assert(count_fds() == fds_at_start, "%zu descriptors, then %zu", fds_at_start, count_fds());
}

static void all_devices(struct world *w, const char *where)
{
	struct simdev *d = sim_lock_devices(w->sim);

	cr_assert(!simdev_violation(d), "%s", simdev_violation(d));
	for (int i = 0; i < N_DEV; i++) {
		cr_assert(simdev_running(d, dev_names[i]), "%s does not run", dev_names[i]);
		cr_assert(strcmp(simdev_attached(d, dev_names[i]), where) == 0, "%s is attached to: %s",
			  dev_names[i], simdev_attached(d, dev_names[i]));
	}
	sim_unlock_devices(w->sim);
}

static size_t steps_done;

static void passed(void *userdata, enum kho_step step)
{
	steps_done++;
}

enum end { END_RESTORED, END_UNDONE, END_CUT };

struct attempt {
	struct kho_graph *have;
	struct kho_plan *plans[N_CTX];
	struct kho_restore_files files[N_CTX];
	int devices[N_CTX][N_DEV];
	size_t steps;
};

static int prepare(struct world *w, struct attempt *a, struct kho_error **err)
{
	int r = 0;

	for (int i = 0; r >= 0 && i < N_MEMFDS; i++)
		r = retrieve(w, &w->memfds[i], 1 + i, err);
	for (int i = 0; r >= 0 && i < N_CTX; i++)
		r = retrieve(w, &w->ctx[i], 10 + i, err);
	for (int i = 0; r >= 0 && i < N_DEV; i++)
		r = retrieve(w, &w->dev[i], 20 + i, err);
	if (r >= 0)
		r = snapshots(w, w->ctx, a->have, err);
	for (int i = 0; r >= 0 && i < N_CTX; i++) {
		const struct kho_context *c = &w->graph->contexts[i];

		for (size_t k = 0; k < c->n_devices; k++)
			a->devices[i][k] = w->dev[c->devices[k].token - 20];
		a->files[i] = (struct kho_restore_files){ w->ctx[i], w->memfds, N_MEMFDS, a->devices[i] };
		r = kho_plan_new(c, &a->have->contexts[i], &a->plans[i], err);
		if (r >= 0)
			a->steps += kho_plan_n_steps(a->plans[i]);
	}
	return r;
}

/* The whole of it, as khod does it. With @cut nothing is undone: as if we had died. */
static enum end restore(struct world *w, bool cut, bool apply, size_t *steps)
{
	struct attempt a = { .have = kho_graph_new() };
	struct kho_error *err = NULL;
	enum end end = END_RESTORED;
	int r;

	r = prepare(w, &a, &err);
	*steps = a.steps;
	if (r < 0) {
		end = cut ? END_CUT : END_UNDONE;
		goto out;
	}
	for (int i = 0; r >= 0 && i < N_CTX; i++)
		r = kho_plan_run(w->kho, a.plans[i], &a.files[i], passed, NULL, &err);
	if (r < 0 && !cut) {
		cr_assert(err && kho_error_message(err)[0]);
		for (int i = N_CTX - 1; i >= 0; i--)
			cr_assert(kho_plan_undo(w->kho, a.plans[i], &a.files[i], NULL) == 0);
		end = END_UNDONE;
		goto out;
	}
	for (int i = 0; r >= 0 && i < N_CTX; i++) {
		r = kho_plan_commit(w->kho, a.plans[i], &a.files[i], passed, NULL, NULL);
		/* One failure does not stop it: the next asking has no more to fail. */
		if (r < 0 && !cut)
			r = kho_plan_commit(w->kho, a.plans[i], &a.files[i], passed, NULL, &err);
	}
	if (r < 0)
		end = END_CUT;
	for (int i = 0; end == END_RESTORED && apply && i < N_CTX; i++)
		kho_plan_apply(a.plans[i], &w->graph->contexts[i]);
out:
	for (int i = 0; i < N_CTX; i++)
		kho_plan_free(a.plans[i]);
	kho_graph_free(a.have);
	kho_error_free(err);
	return end;
}

/* What the kernel says after a restore is what was wanted, under new ids. */
static void must_be_as_wanted(struct world *w)
{
	struct kho_graph *now = kho_graph_new();
	struct kho_error *err = NULL;

	must(snapshots(w, w->ctx, now, &err), err);
	for (int i = 0; i < N_CTX; i++) {
		const struct kho_context *a = &w->graph->contexts[i], *b = &now->contexts[i];

		cr_assert(a->n_ioas == b->n_ioas && a->n_hwpts == b->n_hwpts &&
			  a->n_devices == b->n_devices);
		for (size_t k = 0; k < a->n_ioas; k++) {
			uint32_t at = kho_context_find_ioas(b, a->ioas[k].id);

			cr_assert(at != KHO_NONE && b->ioas[at].n_areas == a->ioas[k].n_areas);
			cr_assert(memcmp(a->ioas[k].areas, b->ioas[at].areas,
					 a->ioas[k].n_areas * sizeof(struct kho_area)) == 0);
		}
		for (size_t k = 0; k < a->n_devices; k++) {
			uint32_t at = kho_context_find_device(b, a->devices[k].name);

			cr_assert(at != KHO_NONE && b->devices[at].id == a->devices[k].id);
			cr_assert(b->hwpts[b->devices[at].hwpt].id == a->hwpts[a->devices[k].hwpt].id);
		}
		for (size_t k = 0; k < a->n_hwpts; k++) {
			uint32_t at = kho_context_find_hwpt(b, a->hwpts[k].id);

			cr_assert(at != KHO_NONE && b->hwpts[at].flags == a->hwpts[k].flags);
			cr_assert(b->ioas[b->hwpts[at].ioas].id == a->ioas[a->hwpts[k].ioas].id);
		}
	}
	kho_graph_free(now);
}

TestSuite(restore, .timeout = 300);

Test(restore, twice_over)
{
	struct kho_error *err = NULL;
	struct world w;
	uint32_t client;
	size_t steps;

	world_new(&w);
	all_devices(&w, "frozen");
	for (int i = 0; i < 2; i++) {
		client = w.graph->contexts[0].ioas[1].client_id;
		steps_done = 0;
		cr_assert(restore(&w, false, true, &steps) == END_RESTORED);
		/* 4 devices bound, 3 IOAS, 5 areas, 2 HWPTs, 4 replaced, 3 frozen ones destroyed */
		cr_assert(steps == 21 && steps_done == 21, "%zu planned, %zu done", steps, steps_done);
		all_devices(&w, "paging");
		must_be_as_wanted(&w);
		cr_assert(w.graph->contexts[0].ioas[1].client_id == client);
		/* Nothing is left to do, and nothing is done. */
		cr_assert(kho_luo_finish(w.kho, w.session, &err) == 0, "%s", kho_error_message(err));
		close(w.session);
		kho_graph_free(w.graph);
		agent_preserves(&w);
		if (i == 0)
			next_kernel(&w);
	}
	world_free(&w);
}

/* Each call fails once: restored, or as it was; and then a second try succeeds. */
Test(restore, fail_nth)
{
	int undone = 0, restored = 0;

	for (int n = 1;; n++) {
		struct world w;
		enum end end;
		size_t steps;
		long calls;

		world_new(&w);
		sim_fail(n, n % 2 ? ENOMEM : EIO);
		end = restore(&w, false, false, &steps);
		calls = sim_calls();
		sim_fail(0, 0);
		all_devices(&w, end == END_RESTORED ? "paging" : "frozen");
		if (end == END_UNDONE) {
			undone++;
			cr_assert(restore(&w, false, true, &steps) == END_RESTORED, "call %d", n);
			all_devices(&w, "paging");
			must_be_as_wanted(&w);
		} else {
			restored++;
		}
		world_free(&w);
		if (calls < n)
			break;
	}
	fprintf(stderr, "restore: %d calls failed one by one: %d undone, %d restored all the same\n",
		undone + restored - 1, undone, restored - 1);
	cr_assert(undone > 30 && restored >= 4);
}

/* Cut off after each call: the next one does what is missing, and no step twice. */
Test(restore, cut_off)
{
	int cut = 0, together = 0;

	for (int n = 1;; n++) {
		struct world w;
		enum end end;
		size_t steps, all = 21;
		long calls;

		world_new(&w);
		steps_done = 0;
		sim_fail(n, EINTR);
		end = restore(&w, true, false, &steps);
		calls = sim_calls();
		sim_fail(0, 0);
		cr_assert(!simdev_violation(sim_lock_devices(w.sim)));
		sim_unlock_devices(w.sim);
		if (end == END_CUT) {
			size_t before = steps_done;

			cut++;
			/* Whoever comes next has nothing but the session. */
			close_all(&w);
			for (int i = 0; i < N_MEMFDS; i++)
				w.memfds[i] = -1;
			for (int i = 0; i < N_CTX; i++)
				w.ctx[i] = -1;
			for (int i = 0; i < N_DEV; i++)
				w.dev[i] = -1;
			cr_assert(restore(&w, false, true, &steps) == END_RESTORED, "call %d", n);
			/* Of the group the first has moved, and the other is where it belongs. */
			if (before + steps == all - 1) {
				together++;
				all--;
			}
			cr_assert(steps == all - before, "call %d: %zu done before, %zu missing", n, before,
				  steps);
			cr_assert(steps_done == all, "call %d: %zu steps in all", n, steps_done);
			must_be_as_wanted(&w);
		}
		all_devices(&w, "paging");
		world_free(&w);
		if (calls < n)
			break;
	}
	fprintf(stderr, "restore: cut off %d times\n", cut);
	cr_assert(cut > 30);
	cr_assert(together == 1, "%d", together);
}

/* The kernel finds the tables unequal: it is undone, and why is said. */
Test(restore, not_equal)
{
	struct attempt a = { .have = kho_graph_new() };
	struct kho_error *err = NULL;
	struct world w;
	char *text;
	int r = 0;

	world_new(&w);
	must(prepare(&w, &a, &err), err);
	simdev_refuse_replace(sim_lock_devices(w.sim), "*");
	sim_unlock_devices(w.sim);
	for (int i = 0; r >= 0 && i < N_CTX; i++)
		r = kho_plan_run(w.kho, a.plans[i], &a.files[i], NULL, NULL, &err);
	cr_assert(r == -EBADE, "%d", r);
	text = kho_error_format(err, r);
	cr_assert(strstr(text, "pci/0000:01:00.0") && strstr(text, "does not translate as the frozen"),
		  "%s", text);
	free(text);
	kho_error_free(err);
	for (int i = 0; i < N_CTX; i++) {
		cr_assert(kho_plan_undo(w.kho, a.plans[i], &a.files[i], NULL) == 0);
		kho_plan_free(a.plans[i]);
	}
	kho_graph_free(a.have);
	all_devices(&w, "frozen");
	world_free(&w);
}

/* What is there is compared with all that is known, never taken for something else. */
Test(restore, unclean)
{
	for (int i = 0; i < 6; i++) {
		struct kho_error *err = NULL;
		struct world w;
		struct attempt a = { .have = kho_graph_new() };
		struct kho_context *want, *have;
		struct kho_area *area;
		size_t steps;
		int r;

		world_new(&w);
		/* Half way: everything is there, nothing is moved. */
		sim_fail(0, 0);
		if (i < 4)
			cr_assert(restore(&w, false, false, &steps) == END_RESTORED);
		must(snapshots(&w, w.ctx[0] >= 0 ? w.ctx :
			       (must(retrieve(&w, &w.memfds[0], 1, &err), err),
				must(retrieve(&w, &w.memfds[1], 2, &err), err),
				must(retrieve(&w, &w.memfds[2], 3, &err), err),
				must(retrieve(&w, &w.ctx[0], 10, &err), err),
				must(retrieve(&w, &w.ctx[1], 11, &err), err), w.ctx), a.have, &err), err);
		want = &w.graph->contexts[0];
		have = &a.have->contexts[0];
		switch (i) {
		case 0:
			have->ioas[0].areas[1].offset += 4096;
			break;
		case 1:
			area = kho_ioas_add_areas(&have->ioas[1], 1);
			*area = (struct kho_area){ UINT64_C(1) << 40, 4096, 0, 0, 3 };
			break;
		case 2:
			kho_context_add_ioas(have)->id = 60;
			break;
		case 3:
			have->devices[0].hwpt = KHO_NONE;
			break;
		case 4:
			have->hwpts[0].old_id = 61;
			break;
		case 5:
			want->devices[0].hwpt = want->devices[1].hwpt;
			want->hwpts[want->devices[0].hwpt].id = 62;
			break;
		}
		r = kho_plan_new(want, have, &a.plans[0], &err);
		cr_assert(r == -EUCLEAN && err, "case %d: %d", i, r);
		kho_error_free(err);
		kho_graph_free(a.have);
		world_free(&w);
	}
}

/* What a snapshot refuses, it names. */
Test(restore, foreign_memory)
{
	struct kho_context c = {};
	struct kho_error *err = NULL;
	struct world w;
	size_t steps;

	world_new(&w);
	cr_assert(restore(&w, false, false, &steps) == END_RESTORED);
	cr_assert(kho_snapshot(w.kho, w.ctx[0], w.memfds, 2, &c, &err) == -EOPNOTSUPP);
	cr_assert(strstr(kho_error_message(err), "not in the workload"), "%s", kho_error_message(err));
	cr_assert(c.n_ioas == 0);
	err = kho_error_free(err);
	cr_assert(kho_snapshot(w.kho, w.memfds[0], w.memfds, 2, &c, &err) == -ENOTTY);
	kho_error_free(err);
	world_free(&w);
}
