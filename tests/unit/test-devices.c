/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The real khod with a workload that has devices, on the simulated machine: restored in each
 * kernel with nobody claiming, killed at every fault point of the way, every kernel call
 * failing once. Whatever happens, the end is one of two: restored, or quiesced with the
 * reason; no device runs without a table, and the memory is there.
 */
#include <linux/iommufd.h>

#include "machine.h"

#define N_DEV 2

static const char *const dev_names[N_DEV] = { "0000:01:00.0", "0000:02:00.0" };

/* What a client has, and how it knows it. */
struct client {
	int memfds[2], ctx, dev[N_DEV];
	uint32_t ioas[2], hwpt, dev_id[N_DEV];
};

TestSuite(devices, .init = setup, .fini = teardown, .timeout = 900);

/* One IOAS with an HWPT of the client's own, one with an automatic one; two memfds. */
static void client_new(struct client *c)
{
	struct kho_error *err = NULL;
	uint32_t pt;

	for (int i = 0; i < 2; i++)
		c->memfds[i] = make_memfd(65536, 40 + i);
	c->ctx = kho_iommufd_open(kho, &err);
	must(c->ctx, err, "iommufd");
	for (int i = 0; i < 2; i++) {
		must(kho_iommufd_ioas_alloc(kho, c->ctx, &c->ioas[i], &err), err, "ioas");
		must(kho_iommufd_map_file(kho, c->ctx, c->ioas[i], c->memfds[i], 0, 65536, 0x10000, 3,
					  &err), err, "map");
	}
	must(kho_iommufd_map_file(kho, c->ctx, c->ioas[0], c->memfds[1], 4096, 8192, 0x1000, 1, &err),
	     err, "map");
	for (int i = 0; i < N_DEV; i++) {
		char path[64];

		snprintf(path, sizeof(path), "/dev/vfio/devices/%s", dev_names[i]);
		c->dev[i] = kho_vfio_open(kho, path, &err);
		must(c->dev[i], err, "open");
		must(kho_vfio_bind(kho, c->dev[i], c->ctx, &c->dev_id[i], &err), err, "bind");
	}
	must(kho_iommufd_hwpt_alloc(kho, c->ctx, c->dev_id[0], c->ioas[0], 0, &c->hwpt, &err), err,
	     "hwpt");
	pt = c->hwpt;
	must(kho_vfio_attach(kho, c->dev[0], &pt, false, &err), err, "attach");
	pt = c->ioas[1];
	must(kho_vfio_attach(kho, c->dev[1], &pt, false, &err), err, "attach");
}

static void client_exit(struct client *c)
{
	for (int i = 0; i < 2; i++)
		close(c->memfds[i]);
	close(c->ctx);
	for (int i = 0; i < N_DEV; i++)
		close(c->dev[i]);
}

/* As devices before memory: khod puts it into order. */
static int try_register(struct client *c, int n_dev, int n_memfds, struct kho_error **err)
{
	struct kho_client_file files[] = {
		{ "disk", c->dev[1] },	 { "nic", c->dev[0] },	  { "iommufd", c->ctx },
		{ "ram0", c->memfds[0] }, { "ram1", c->memfds[1] },
	};
	struct kho_client *k = dial(kho, sim);
	int r;

	if (!k)
		return -ECONNREFUSED;
	r = kho_client_register(k, "vm", files + N_DEV - n_dev, 3 - N_DEV + n_dev + n_memfds, NULL, 0, err);
	kho_client_free(k);
	return r;
}

static void registered(void)
{
	struct kho_error *err = NULL;
	struct client c;
	int r;

	client_new(&c);
	must_start(sim);
	r = try_register(&c, N_DEV, 2, &err);
	must(r, err, "register");
	client_exit(&c);
	must_stop(sim);
}

static uint32_t handovers;

/* What khod lists: state and outcome, and @handovers. 0: nothing of that name. */
static int listed(enum kho_outcome *outcome, char *reason, size_t size)
{
	struct kho_workloads *w = NULL;
	struct kho_client *c = dial(kho, sim);
	int r, state = 0;

	cr_assert(c, "khod does not listen\n%s", sim_log(sim));
	r = kho_client_show(c, "vm", &w, NULL, NULL);
	cr_assert(r == 0 || r == -ENOENT);
	if (r == 0) {
		state = kho_workloads_get(w, 0)->state;
		*outcome = kho_workloads_get(w, 0)->outcome;
		handovers = kho_workloads_get(w, 0)->handovers;
		snprintf(reason, size, "%s", kho_workloads_get(w, 0)->outcome_reason);
	}
	kho_workloads_free(w);
	kho_client_free(c);
	return state;
}

static void devices_are(bool running, const char *where)
{
	struct simdev *d = sim_lock_devices(sim);

	cr_assert(!simdev_violation(d), "%s\n%s", simdev_violation(d), sim_log(sim));
	for (int i = 0; i < N_DEV; i++) {
		cr_assert(simdev_running(d, dev_names[i]) == running, "%s %s\n%s", dev_names[i],
			  running ? "does not run" : "still runs", sim_log(sim));
		cr_assert(!where || strcmp(simdev_attached(d, dev_names[i]), where) == 0,
			  "%s is attached to: %s\n%s", dev_names[i], simdev_attached(d, dev_names[i]),
			  sim_log(sim));
	}
	sim_unlock_devices(sim);
}

/* At rest, in one of the two ends. Return: which. */
static enum kho_outcome must_rest(const char *when)
{
	enum kho_outcome outcome = 0;
	char reason[600];
	int state = listed(&outcome, reason, sizeof(reason));

	cr_assert(state == KHO_WORKLOAD_HELD, "%s: state %d\n%s", when, state, sim_log(sim));
	cr_assert(sim_store_count(sim) == 1 && sim_sessions(sim, true) == 0 &&
		  sim_sessions(sim, false) == 1, "%s: %zu in the store\n%s", when, sim_store_count(sim),
		  sim_log(sim));
	if (outcome == KHO_OUTCOME_QUIESCED) {
		cr_assert(reason[0], "%s: quiesced without a reason", when);
		devices_are(false, "none");
	} else {
		cr_assert(!reason[0]);
		devices_are(true, "paging");
	}
	return outcome;
}

static int fd_named(struct kho_claim *claim, const char *name)
{
	for (size_t i = 0; i < kho_claim_n_files(claim); i++)
		if (strcmp(kho_claim_name(claim, i), name) == 0)
			return kho_claim_fd(claim, i);
	return -1;
}

/* Claim: what came back must work, under the ids that the map gives. */
static void must_claim(const struct client *known)
{
	/* One that has not been preserved again is its client's already. */
	bool preserved = sim_sessions(sim, true) == 0;
	struct kho_client *c = dial(kho, sim);
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;
	uint32_t pt, other;

	must(kho_client_claim(c, "vm", NULL, 0, &claim, &err), err, "claim");
	cr_assert(check_memfd(fd_named(claim, "ram0"), 65536, 40));
	cr_assert(check_memfd(fd_named(claim, "ram1"), 65536, 41));
	if (kho_claim_outcome(claim) == KHO_OUTCOME_QUIESCED) {
		cr_assert(kho_claim_n_files(claim) == 2 && kho_claim_reason(claim)[0]);
		cr_assert(kho_claim_id(claim, "iommufd", known->ioas[0]) == 0);
		must(kho_client_claim_ack(c, claim, &err), err, "ack");
	} else {
		cr_assert(kho_claim_n_files(claim) == 5);
		cr_assert(kho_claim_id(claim, "iommufd", known->hwpt) &&
			  kho_claim_id(claim, "iommufd", known->dev_id[1]));
		cr_assert(kho_claim_id(claim, "iommufd", 60) == 0 && kho_claim_id(claim, "nic", 1) == 0);
		pt = kho_claim_id(claim, "iommufd", known->ioas[0]);
		other = kho_claim_id(claim, "iommufd", known->ioas[1]);
		cr_assert(pt && other && pt != other);
		/* Preserved until the acknowledgement, and the client's after it. */
		cr_assert(!preserved || kho_vfio_attach(kho, fd_named(claim, "nic"), &pt, true, NULL) == -EBUSY);
		must(kho_client_claim_ack(c, claim, &err), err, "ack");
		devices_are(true, "paging");	/* and the simulation has seen the last close */
		must(kho_vfio_attach(kho, fd_named(claim, "nic"), &pt, true, &err), err, "attach");
		cr_assert(kho_vfio_attach(kho, fd_named(claim, "nic"), &other, true, NULL) == -EBADE);
	}
	kho_claim_free(claim);
	kho_client_free(c);
	devices_are(false, "none");	/* the last close stops them */
	cr_assert(sim_store_count(sim) == 0 && sim_sessions(sim, false) == 0);
}

/* The ids that every client gets in a new context; what registered() used. */
static const struct client known = { .ioas = { 1, 2 }, .dev_id = { 3, 4 }, .hwpt = 5 };

Test(devices, many_kexecs_nobody_claims)
{
	size_t fds = 0;

	registered();
	for (int i = 1; i <= 5; i++) {
		sim_kexec(sim);
		devices_are(true, "frozen");
		must_start(sim);
		cr_assert(must_rest("kexec") == KHO_OUTCOME_RESTORED);
		cr_assert(handovers == (uint32_t)i);
		/* Its clients and the session; nothing of the restore. */
		usleep(50000);
		if (!fds)
			fds = sim_khod_fds(sim);
		cr_assert(sim_khod_comes_to_fds(sim, fds), "%zu descriptors, then %zu", fds, sim_khod_fds(sim));
		/* A restart in the same kernel changes nothing, and has as many. */
		must_stop(sim);
		must_start(sim);
		cr_assert(must_rest("restart") == KHO_OUTCOME_RESTORED);
		usleep(50000);
		cr_assert(sim_khod_comes_to_fds(sim, fds), "%zu descriptors, after a restart %zu", fds,
			  sim_khod_fds(sim));
		if (i < 5)
			must_stop(sim);
	}
	must_claim(&known);
	must_stop(sim);
}

Test(devices, claimed_in_the_same_kernel)
{
	registered();
	must_start(sim);
	must_claim(&known);
	must_stop(sim);
}

Test(devices, refusals_name_what_is_missing)
{
	static const struct {
		int n_dev, n_memfds;
		const char *word;
	} cases[] = {
		{ 2, 1, "cannot be preserved" },
		{ 1, 2, "is attached, and is not in the workload" },
	};
	struct kho_error *err = NULL;
	struct client c;
	char *text;

	client_new(&c);
	must_start(sim);
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		int r = try_register(&c, cases[i].n_dev, cases[i].n_memfds, &err);

		cr_assert(r == -EOPNOTSUPP, "case %zu: %d", i, r);
		text = kho_error_format(err, r);
		cr_assert(strstr(text, cases[i].word), "case %zu: %s", i, text);
		free(text);
		err = kho_error_free(err);
		cr_assert(sim_store_count(sim) == 0 && sim_sessions(sim, false) == 0);
		devices_are(true, "paging");
	}
	must(try_register(&c, N_DEV, 2, &err), err, "register");
	client_exit(&c);
	must_claim(&known);
	must_stop(sim);
}

/* One failure domain is one workload: what another one has already is refused, and whose it is. */
Test(devices, shared_files_are_refused_by_name)
{
	struct kho_error *err = NULL;
	struct client c;

	client_new(&c);
	for (int restarted = 0; restarted < 2; restarted++) {
		const struct kho_client_file files[] = {
			{ "mine", c.memfds[1] }, { "mine", c.ctx }, { "mine", c.dev[1] },
		};
		static const char *const names[] = { "ram1", "iommufd", "disk" };

		must_start(sim);
		if (!restarted)
			must(try_register(&c, N_DEV, 2, &err), err, "register");
		for (size_t i = 0; i < ARRAY_SIZE(files); i++) {
			struct kho_client *k = dial(kho, sim);
			int r = kho_client_register(k, "other", &files[i], 1, NULL, 0, &err);
			char *text = kho_error_format(err, r), want[80];

			snprintf(want, sizeof(want), "it is '%s' of workload vm;", names[i]);
			cr_assert(r == -EBUSY && strstr(text, want), "%d: %s", r, text);
			cr_assert(strcmp(kho_error_object(err), "mine") == 0);
			free(text);
			err = kho_error_free(err);
			kho_client_free(k);
		}
		cr_assert(sim_store_count(sim) == 1 && sim_sessions(sim, false) == 1);
		devices_are(true, "paging");
		/* The same with a khod that has nothing but the session. */
		must_stop(sim);
	}
	must_start(sim);
	client_exit(&c);
	must_claim(&known);
	must_stop(sim);
}

/* Every fault point of a phase, with every N at which it fires. */
static void sweep(const char *phase, void (*one)(const char *fault, bool *killed))
{
	size_t kills = 0, points = 0;
	char name[64], in[64];
	FILE *f = fault_points();

	while (next_fault_point(f, name, in)) {
		char fault[80];
		bool killed = true;

		if (strcmp(in, phase) != 0)
			continue;
		points++;
		for (int n = 1; killed; n++) {
			cr_assert(n < 100);
			snprintf(fault, sizeof(fault), "%s:%d", name, n);
			killed = false;
			one(fault, &killed);
			again();
			kills += killed;
			cr_assert(killed || n > 1, "%s never fired", name);
		}
	}
	cr_assert(pclose(f) == 0 && points > 0);
	fprintf(stderr, "%s with devices: killed at %zu fault points, %zu times\n", phase, points, kills);
}

/* Another kexec, and a claim, before what came over the first has been preserved again. */
Test(devices, before_it_is_preserved_again)
{
	registered();
	sim_set_preserve_delay(sim, 600);
	for (int i = 0; i < 3; i++) {
		sim_kexec(sim);
		must_start(sim);
		devices_are(true, "paging");
		cr_assert(sim_sessions(sim, true) == 1 && sim_store_memfds(sim) == 3, "%s", sim_log(sim));
		must_stop(sim);
		devices_are(true, "paging");
	}
	sim_kexec(sim);
	must_start(sim);
	must_claim(&known);
	must_stop(sim);
}

/* The client has the devices when it has acknowledged, and they go on, whatever becomes of khod. */
static void kill_in_early_claim(const char *fault, bool *killed)
{
	struct kho_claim *claim = NULL;
	enum kho_outcome outcome = 0;
	struct kho_client *c;
	char reason[600];
	bool got;

	registered();
	sim_kexec(sim);
	sim_set_preserve_delay(sim, 600);
	sim_start(sim, fault, NULL);
	cr_assert(sim_ready(sim), "%s", sim_log(sim));
	c = dial(kho, sim);
	got = kho_client_claim(c, "vm", NULL, 0, &claim, NULL) == 0;
	if (got)
		(void)kho_client_claim_ack(c, claim, NULL);
	usleep(20000);
	*killed = sim_killed(sim_stop(sim));
	devices_are(true, "paging");
	must_start(sim);
	devices_are(true, "paging");
	cr_assert(got || listed(&outcome, reason, sizeof(reason)) == KHO_WORKLOAD_HELD, "%s: lost\n%s", fault,
		  sim_log(sim));
	kho_claim_free(claim);
	kho_client_free(c);
	if (listed(&outcome, reason, sizeof(reason)) != 0)
		must_claim(&known);
	devices_are(false, "none");
	cr_assert(sim_sessions(sim, false) == 0 && sim_sessions(sim, true) == 0 && sim_store_count(sim) == 0, "%s",
		  sim_log(sim));
	must_stop(sim);
}

Test(devices, killed_in_an_early_claim)
{
	sweep("claim", kill_in_early_claim);
}

static void kill_in_register(const char *fault, bool *killed)
{
	struct kho_error *err = NULL;
	enum kho_outcome outcome;
	struct client c;
	char reason[600];
	int r;

	client_new(&c);
	sim_start(sim, fault, NULL);
	r = try_register(&c, N_DEV, 2, NULL);
	if (r < 0) {
		*killed = sim_killed(sim_wait(sim));
		cr_assert(*killed, "%s: %d\n%s", fault, r, sim_log(sim));
	} else {
		usleep(20000);
		*killed = sim_killed(sim_stop(sim));
	}
	must_start(sim);
	devices_are(true, "paging");
	if (listed(&outcome, reason, sizeof(reason)) == 0) {
		cr_assert(r < 0, "%s: answered, and lost", fault);
		must(try_register(&c, N_DEV, 2, &err), err, "register again");
	}
	client_exit(&c);
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	cr_assert(must_rest(fault) == KHO_OUTCOME_RESTORED);
	must_claim(&known);
	must_stop(sim);
}

Test(devices, killed_in_register)
{
	sweep("register", kill_in_register);
	sweep("register-devices", kill_in_register);
}

/* @variant 0: started again; 1: killed at the same place again; 2: another kexec at once. */
static void kill_after_kexec(const char *fault, bool *killed, bool refuse, int variant)
{
	enum kho_outcome want = refuse ? KHO_OUTCOME_QUIESCED : KHO_OUTCOME_RESTORED, got;
	bool one_more = false;

	registered();
	sim_kexec(sim);
	simdev_refuse_replace(sim_lock_devices(sim), refuse ? "*" : "");
	sim_unlock_devices(sim);
	sim_start(sim, fault, NULL);
	*killed = !sim_ready(sim);
	if (*killed)
		cr_assert(sim_killed(sim_wait(sim)), "%s:\n%s", fault, sim_log(sim));
	else
		must_stop(sim);
	if (variant == 1) {
		sim_start(sim, fault, NULL);
		if (!sim_ready(sim))
			cr_assert(sim_killed(sim_wait(sim)));
		else
			must_stop(sim);
	}
	if (variant == 2 && *killed) {
		enum kho_outcome outcome = 0;
		char reason[600];
		int state;

		/* Not preserved again: the old kernel stops what no session has. */
		sim_kexec(sim);
		must_start(sim);
		state = listed(&outcome, reason, sizeof(reason));
		if (state != KHO_WORKLOAD_HELD) {
			/* Before anything was in the store: the session is lost with the kernel. */
			cr_assert(state == 0 || state == KHO_WORKLOAD_FAILED, "%s: %d", fault, state);
			devices_are(false, "none");
			must_stop(sim);
			return;
		}
		got = must_rest(fault);
		one_more = true;
		/* The incoming session was not finished yet: what it had is lost with the kernel. */
		if (got == KHO_OUTCOME_QUIESCED && strstr(reason, "ram0: is missing")) {
			must_stop(sim);
			return;
		}
	} else {
		must_start(sim);
		got = must_rest(fault);
		cr_assert(got == want, "%s, variant %d: outcome %d\n%s", fault, variant, got, sim_log(sim));
		cr_assert(handovers == 1, "%s, variant %d: handover %u", fault, variant, handovers);
	}
	if (!one_more)
		cr_assert(!strstr(sim_log(sim), "could not be brought into order"), "%s", sim_log(sim));
	must_claim(&known);
	must_stop(sim);
}

static void kill_restoring(const char *fault, bool *killed)
{
	for (int variant = 0; variant < 3; variant++) {
		if (variant > 0)
			again();
		kill_after_kexec(fault, killed, false, variant);
	}
}

Test(devices, killed_in_restore)
{
	sweep("restore", kill_restoring);
}

Test(devices, killed_in_start_incoming)
{
	sweep("start-incoming", kill_restoring);
}

static void kill_quiescing(const char *fault, bool *killed)
{
	for (int variant = 0; variant < 3; variant++) {
		if (variant > 0)
			again();
		kill_after_kexec(fault, killed, true, variant);
	}
}

Test(devices, killed_in_quiesce)
{
	sweep("quiesce", kill_quiescing);
	sweep("start-incoming", kill_quiescing);
}

static void unequal(const char *refused, const char *named)
{
	enum kho_outcome outcome = 0;
	char reason[600];

	registered();
	sim_kexec(sim);
	simdev_refuse_replace(sim_lock_devices(sim), refused);
	sim_unlock_devices(sim);
	must_start(sim);
	cr_assert(must_rest("refused") == KHO_OUTCOME_QUIESCED);
	(void)listed(&outcome, reason, sizeof(reason));
	cr_assert(strstr(reason, named) && strstr(reason, "does not translate as the frozen"), "%s",
		  reason);
	cr_assert(strstr(sim_log(sim), "have been stopped: "));
	cr_assert(!strstr(sim_log(sim), "Not all of the restore"), "%s", sim_log(sim));
	must_stop(sim);
	/* It is remembered over further kexecs, until somebody claims it. */
	sim_kexec(sim);
	must_start(sim);
	cr_assert(must_rest("once more") == KHO_OUTCOME_QUIESCED);
	must_claim(&known);
	must_stop(sim);
}

/* At the first device; and at the second, when the first has moved already. */
Test(devices, unequal_tables_are_quiesced)
{
	unequal("*", "pci/0000:01:00.0");
	again();
	unequal("0000:02:00.0", "pci/0000:02:00.0");
}

static const char *khoctl(const char *verb, const char *options)
{
	static char out[65536];
	char cmd[512];
	FILE *f;

	snprintf(cmd, sizeof(cmd), "%s --socket %s %s %s", getenv("KHOCTL"), sim_socket(sim), verb,
		 options);
	f = popen(cmd, "r");
	cr_assert(f);
	out[fread(out, 1, sizeof(out) - 1, f)] = 0;
	cr_assert(pclose(f) == 0, "%s: %s", cmd, out);
	return out;
}

/* What it says of the workload. */
static const char *shown(const char *options)
{
	return khoctl("show vm", options);
}

/* The translation of the first device, and what the image that is handed over has of it. */
static void translated(__u32 mode, const char *text)
{
	struct kho_workloads *w = NULL;
	struct kho_image *image = NULL;
	struct kho_client *c;
	const struct kho_context *ctx;

	simdev_set_vtd(sim_lock_devices(sim), mode);
	sim_unlock_devices(sim);
	c = dial(kho, sim);
	cr_assert(kho_client_show(c, "vm", &w, &image, NULL) == 0);
	cr_assert(image && kho_image_graph(image));
	ctx = &kho_image_graph(image)->contexts[0];
	cr_assert(ctx->n_devices == N_DEV);
	for (size_t i = 0; i < ctx->n_devices; i++) {
		const struct kho_device *d = &ctx->devices[i];

		cr_assert(d->translation.mode == KHO_TRANSLATION_UNKNOWN ||
			  (d->translation.unit == 1 &&
			   d->translation.domain_id == 100 + ctx->hwpts[d->hwpt].id));
	}
	cr_assert_str_eq(kho_translation_mode_name(ctx->devices[0].translation.mode), text);
	kho_image_free(image);
	kho_workloads_free(w);
	kho_client_free(c);
}

/* It is asked for each time, and does not go along; it is others after a kexec. */
Test(devices, show_how_they_are_translated)
{
	registered();
	must_start(sim);
	cr_assert(!strstr(shown(""), "domain id"), "%s", shown(""));
	cr_assert(strstr(shown("--json"), "\"translation\": null"), "%s", shown("--json"));
	translated(IOMMU_ATTACH_INFO_VTD_LEGACY, "legacy");
	cr_assert(strstr(shown(""), ", by dmar1 in legacy mode, domain id 10"), "%s", shown(""));
	cr_assert(strstr(shown(""), ", replaced without a gap"), "%s", shown(""));
	cr_assert(strstr(shown("--json"), "\"hitless\": true"), "%s", shown("--json"));
	translated(IOMMU_ATTACH_INFO_VTD_NESTED, "nested");
	translated(IOMMU_ATTACH_INFO_VTD_SECOND_STAGE, "second-stage");
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	cr_assert(must_rest("translated") == KHO_OUTCOME_RESTORED);
	translated(IOMMU_ATTACH_INFO_VTD_FIRST_STAGE, "first-stage");
	cr_assert(strstr(shown(""), ", by dmar1 in scalable mode, first-stage, domain id 1"), "%s",
		  shown(""));
	cr_assert(strstr(shown("--json"), "\"mode\": \"first-stage\""), "%s", shown("--json"));
	/* One that only a newer khod knows */
	translated(77, "unknown");
	must_stop(sim);
}

/* All that is held is ram0, or nothing; why, names what is lost. */
static void files_are(size_t n, const char *lost_file)
{
	struct kho_workloads *w = NULL;
	struct kho_client *c = dial(kho, sim);
	const struct kho_workload *vm;

	cr_assert(kho_client_show(c, "vm", &w, NULL, NULL) == 0);
	vm = kho_workloads_get(w, 0);
	cr_assert(vm->n_files == n, "%zu files", vm->n_files);
	cr_assert(n == 0 || strcmp(vm->files[0].name, "ram0") == 0);
	cr_assert(strstr(vm->outcome_reason, lost_file), "%s", vm->outcome_reason);
	kho_workloads_free(w);
	kho_client_free(c);
}

/* Memory of a workload is lost, and its devices write into it: they are stopped, at once. */
static void lost(bool all, const char *fault)
{
	int status;

	registered();
	sim_kexec(sim);
	devices_are(true, NULL);
	sim_lose(sim, 5);	/* ram1 */
	if (all)
		sim_lose(sim, 4);
	if (fault) {
		sim_start(sim, fault, NULL);
		status = sim_wait(sim);
		cr_assert(sim_killed(status), "%s never fired\n%s", fault, sim_log(sim));
	}
	for (int i = 0; i < 3; i++) {
		must_start(sim);
		cr_assert(must_rest("lost memory") == KHO_OUTCOME_QUIESCED);
		files_are(!all, all ? "ram0" : "ram1");
		must_stop(sim);
		if (i > 0)
			sim_kexec(sim);
	}
}

Test(devices, lost_memory_stops_the_devices)
{
	static const char *const faults[] = { NULL, "quiesce-decided", "quiesce-stopped" };

	for (int all = 0; all < 2; all++)
		for (size_t i = 0; i < ARRAY_SIZE(faults); i++) {
			lost(all, faults[i]);
			again();
		}
}

enum damage { BIT_FLIPPED, CUT_OFF, TOO_LARGE, NOT_AN_IMAGE, EMPTY, NEWER_FORMAT, OF_ANOTHER, NOT_SEALED, N_DAMAGES };

/* The image at @fd, damaged. */
static int damaged(int fd, enum damage how)
{
	static uint8_t buf[65536];
	ssize_t n = pread(fd, buf, sizeof(buf), 0);
	char path[512];
	int out;

	cr_assert(n > 128 && n < (ssize_t)sizeof(buf));
	switch (how) {
	case BIT_FLIPPED:
		buf[n - 1] ^= 0x10;
		break;
	case CUT_OFF:
		n -= 10;
		break;
	case NOT_AN_IMAGE:
		memset(buf, 0, n);
		break;
	case EMPTY:
		n = 0;
		break;
	case NEWER_FORMAT:	/* little endian: version, and the oldest that can read it */
		buf[8] = buf[12] = 99;
		break;
	case OF_ANOTHER:
		snprintf(path, sizeof(path), "%s/golden/image-v1-devices", getenv("UNIT_SRC"));
		out = open(path, O_RDONLY | O_CLOEXEC);
		n = pread(out, buf, sizeof(buf), 0);
		cr_assert(n > 128);
		close(out);
		break;
	default:
		break;
	}
	out = memfd_create("image", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	cr_assert(write(out, buf, n) == n);
	if (how == TOO_LARGE)
		cr_assert(ftruncate(out, 1ULL << 30) == 0);
	if (how != NOT_SEALED)
		cr_assert(fcntl(out, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) == 0);
	return out;
}

static void bad_image(enum damage how, const char *reason)
{
	struct kho_workloads *w = NULL;
	struct kho_error *err = NULL;
	struct kho_client *c;
	int good, bad;

	registered();
	sim_kexec(sim);
	good = sim_preserved_fd(sim, KHO_TOKEN_IMAGE);
	bad = damaged(good, how);
	sim_replace(sim, KHO_TOKEN_IMAGE, bad);
	for (int i = 0; i < 2; i++) {
		must_start(sim);
		c = dial(kho, sim);
		must(kho_client_show(c, "vm", &w, NULL, &err), err, "show");
		cr_assert(kho_workloads_get(w, 0)->state == KHO_WORKLOAD_FAILED);
		cr_assert(strstr(kho_workloads_get(w, 0)->reason, "nothing of it can be restored") &&
			  strstr(kho_workloads_get(w, 0)->reason, reason), "%d: '%s' is not in: %s", how, reason,
			  kho_workloads_get(w, 0)->reason);
		w = kho_workloads_free(w);
		cr_assert(kho_client_claim(c, "vm", NULL, 0, &(struct kho_claim *){ NULL }, NULL) == -EIO);
		/* As the previous kernel left them: in memory that nobody else can get. */
		devices_are(true, "frozen");
		cr_assert(sim_store_count(sim) == 1 && sim_sessions(sim, true) == 1);
		if (i == 1)
			must(kho_client_release(c, "vm", NULL, 0, &err), err, "release");
		kho_client_free(c);
		if (i == 0)
			must_stop(sim);
	}
	devices_are(false, "none");
	must_stop(sim);
	close(good);
	close(bad);
}

/* What is not an image of this workload, whole, and of a known format restores nothing, and loses nothing. */
Test(devices, bad_images)
{
	static const char *const reasons[N_DAMAGES] = {
		[BIT_FLIPPED] = "checksum", [CUT_OFF] = "truncated", [TOO_LARGE] = "bytes too long",
		[NOT_AN_IMAGE] = "wrong magic", [EMPTY] = "less than a header", [NEWER_FORMAT] = "upgrade khod",
		[OF_ANOTHER] = "its session holds the image of '", [NOT_SEALED] = "not sealed",
	};

	for (int how = 0; how < N_DAMAGES; how++) {
		bad_image((enum damage)how, reasons[how]);
		again();
	}
}

/* The devices are restored by then, but nobody could make use of them. */
Test(devices, lost_memory_that_no_device_maps)
{
	struct kho_error *err = NULL;
	struct kho_client *k;
	struct client c;
	int other = make_memfd(4096, 70);

	client_new(&c);
	must_start(sim);
	k = dial(kho, sim);
	{
		struct kho_client_file files[] = {
			{ "ram0", c.memfds[0] }, { "ram1", c.memfds[1] }, { "other", other },
			{ "iommufd", c.ctx }, { "nic", c.dev[0] }, { "disk", c.dev[1] },
		};

		must(kho_client_register(k, "vm", files, ARRAY_SIZE(files), NULL, 0, &err), err,
		     "register");
	}
	kho_client_free(k);
	client_exit(&c);
	close(other);
	must_stop(sim);
	sim_kexec(sim);
	sim_lose(sim, 3);
	for (int i = 0; i < 2; i++) {
		must_start(sim);
		cr_assert(must_rest("lost memory") == KHO_OUTCOME_QUIESCED);
		files_are(2, "other");
		must_stop(sim);
		sim_kexec(sim);
	}
}

/* One workload that fails does not touch another. */
Test(devices, two_workloads_two_ends)
{
	struct kho_workloads *w = NULL;
	struct kho_client *c;
	struct simdev *d;

	registered();
	must_start(sim);
	register_device("other", "0000:09:00.0");
	must_stop(sim);
	sim_kexec(sim);
	simdev_refuse_replace(sim_lock_devices(sim), "0000:09:00.0");
	sim_unlock_devices(sim);
	for (int i = 0; i < 2; i++) {
		must_start(sim);
		c = dial(kho, sim);
		cr_assert(kho_client_show(c, "other", &w, NULL, NULL) == 0);
		cr_assert(kho_workloads_get(w, 0)->outcome == KHO_OUTCOME_QUIESCED, "%s", sim_log(sim));
		cr_assert(strstr(kho_workloads_get(w, 0)->outcome_reason, "0000:09:00.0"));
		w = kho_workloads_free(w);
		cr_assert(kho_client_show(c, "vm", &w, NULL, NULL) == 0);
		cr_assert(kho_workloads_get(w, 0)->outcome == KHO_OUTCOME_RESTORED, "%s", sim_log(sim));
		w = kho_workloads_free(w);
		kho_client_free(c);
		devices_are(true, "paging");
		d = sim_lock_devices(sim);
		cr_assert(!simdev_running(d, "0000:09:00.0"));
		sim_unlock_devices(sim);
		must_stop(sim);
		sim_kexec(sim);
	}
	must_start(sim);
	c = dial(kho, sim);
	cr_assert(kho_client_release(c, "other", NULL, 0, NULL) == 0);
	kho_client_free(c);
	must_claim(&known);
	must_stop(sim);
}

static void register_memory(const char *name)
{
	struct kho_error *err = NULL;
	struct kho_client *k = dial(kho, sim);
	struct kho_client_file file = { "ram", make_memfd(4096, 60) };

	must(kho_client_register(k, name, &file, 1, NULL, 0, &err), err, "register");
	kho_client_free(k);
	close(file.fd);
}

/*
 * Of two workloads that are memory alone, one known before and one after those with devices,
 * and of a memfd of one of these that no IOAS maps: after a kexec nothing of it is retrieved
 * before the devices of both are restored.
 */
Test(devices, do_not_wait_for_memory_that_they_do_not_map)
{
	const char *vm, *before, *after;
	enum kho_outcome outcome = 0;
	struct kho_error *err = NULL;
	struct kho_client *k;
	struct client c;
	char reason[600];
	int other = make_memfd(4096, 70);

	client_new(&c);
	must_start(sim);
	register_memory("before");
	k = dial(kho, sim);
	{
		struct kho_client_file files[] = {
			{ "other", other }, { "ram0", c.memfds[0] }, { "ram1", c.memfds[1] },
			{ "iommufd", c.ctx }, { "nic", c.dev[0] }, { "disk", c.dev[1] },
		};

		must(kho_client_register(k, "vm", files, ARRAY_SIZE(files), NULL, 0, &err), err,
		     "register");
	}
	kho_client_free(k);
	register_device("other", "0000:09:00.0");
	register_memory("after");
	client_exit(&c);
	close(other);
	must_stop(sim);

	/* Five are devices and contexts, of both: the sixth is the first memory that one is restored with. */
	sim_kexec(sim);
	sim_start(sim, "start-incoming-file-retrieved:6", NULL);
	cr_assert(sim_killed(sim_wait(sim)), "%s", sim_log(sim));
	cr_assert(!strstr(sim_log(sim), "is restored"), "%s", sim_log(sim));

	/* The ninth file is the first that no device needs. */
	sim_start(sim, "start-incoming-file-retrieved:9", NULL);
	cr_assert(sim_killed(sim_wait(sim)), "%s", sim_log(sim));
	cr_assert(strstr(sim_log(sim), "Workload vm is restored"), "%s", sim_log(sim));
	cr_assert(strstr(sim_log(sim), "Workload other is restored"), "%s", sim_log(sim));
	cr_assert(!strstr(sim_log(sim), "was carried into"), "%s", sim_log(sim));
	devices_are(true, "paging");
	must_start(sim);
	must_stop(sim);

	sim_kexec(sim);
	must_start(sim);
	vm = strstr(sim_log(sim), "handover 2");
	cr_assert(vm && strncmp(vm - strlen("vm was carried into this kernel ("), "vm ", 3) == 0,
		  "%s", sim_log(sim));
	before = strstr(sim_log(sim), "before was carried into this kernel (handover 2");
	after = strstr(sim_log(sim), "after was carried into this kernel (handover 2");
	cr_assert(before && after, "%s", sim_log(sim));
	cr_assert(listed(&outcome, reason, sizeof(reason)) == KHO_WORKLOAD_HELD &&
		  outcome == KHO_OUTCOME_RESTORED);
	devices_are(true, "paging");
	must_stop(sim);
}

/* The n-th kernel call after a kexec fails once. Return: is there an n-th? */
static bool fail_start(int n, bool refuse, enum kho_outcome *end)
{
	enum kho_outcome outcome = 0;
	char fail[32], reason[600];
	size_t fds, clean;
	bool fired;
	int state;

	registered();
	sim_kexec(sim);
	simdev_refuse_replace(sim_lock_devices(sim), refuse ? "0000:02:00.0" : "");
	sim_unlock_devices(sim);
	snprintf(fail, sizeof(fail), "%d:%d", n, n % 2 ? ENOMEM : EIO);
	sim_start(sim, NULL, fail);
	cr_assert(sim_ready(sim), "%s", sim_log(sim));
	fired = strstr(sim_log(sim), "sim: call ") != NULL;
	state = listed(&outcome, reason, sizeof(reason));
	/* 0: its session could not even be looked at. Until they are stopped on purpose
	 * they run, and have a table. */
	if (state == 0 || (state == KHO_WORKLOAD_FAILED && outcome != KHO_OUTCOME_QUIESCED))
		devices_are(true, NULL);
	fds = sim_khod_fds_at_rest(sim);
	must_stop(sim);
	must_start(sim);
	*end = must_rest(fail);
	cr_assert(handovers == 1);
	/*
	 * It has no more than one that had nothing to do, or those of all files, five or without devices
	 * two: of a kernel that did not say whether it would give them back.
	 */
	clean = sim_khod_fds_at_rest(sim);
	cr_assert(state != KHO_WORKLOAD_HELD || fds <= clean ||
			  fds == clean + (outcome == KHO_OUTCOME_QUIESCED ? 2 : 5),
		  "call %d: %zu descriptors, then %zu", n, fds, clean);
	must_claim(&known);
	must_stop(sim);
	again();
	return fired;
}

/* One of the two ends, at the latest after a restart. */
Test(devices, fail_nth_start)
{
	int fired = 0, quiesced = 0;
	enum kho_outcome end;

	while (fail_start(fired + 1, false, &end)) {
		fired++;
		quiesced += end == KHO_OUTCOME_QUIESCED;
	}
	fprintf(stderr, "start with devices: %d calls failed one by one, %d quiesced\n", fired, quiesced);
	cr_assert(end == KHO_OUTCOME_RESTORED);
	cr_assert(fired > 50 && quiesced > 0 && quiesced < fired);
}

/* And when the restore cannot succeed, each call of the undo and of the quiesce as well. */
Test(devices, fail_nth_quiesce)
{
	enum kho_outcome end;
	int fired = 0;

	while (fail_start(fired + 1, true, &end)) {
		fired++;
		cr_assert(end == KHO_OUTCOME_QUIESCED, "call %d: outcome %d", fired, end);
	}
	fprintf(stderr, "quiesce: %d calls failed one by one\n", fired);
	cr_assert(end == KHO_OUTCOME_QUIESCED && fired > 50);
}

/* Devices that are stopped at once, and a workload whose memory is worth nothing without them. */
static void registered_to_release(void)
{
	struct kho_policy policy = { .restore_failure = KHO_RESTORE_FAILURE_RELEASE };
	struct kho_error *err = NULL;
	struct kho_client *k;
	struct client c;

	client_new(&c);
	must_start(sim);
	k = dial(kho, sim);
	{
		struct kho_client_file files[] = {
			{ "ram0", c.memfds[0] }, { "ram1", c.memfds[1] }, { "iommufd", c.ctx },
			{ "nic", c.dev[0] }, { "disk", c.dev[1] },
		};

		must(kho_client_register_policy(k, "vm", files, ARRAY_SIZE(files), NULL, 0, &policy, &err),
		     err, "register");
	}
	kho_client_free(k);
	client_exit(&c);
	must_stop(sim);
}

static void must_claim_nothing(void)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;

	must(kho_client_claim(c, "vm", NULL, 0, &claim, &err), err, "claim");
	cr_assert(kho_claim_outcome(claim) == KHO_OUTCOME_QUIESCED && kho_claim_n_files(claim) == 0);
	cr_assert(strstr(kho_claim_reason(claim), "does not translate as the frozen"), "%s",
		  kho_claim_reason(claim));
	must(kho_client_claim_ack(c, claim, &err), err, "ack");
	kho_claim_free(claim);
	kho_client_free(c);
}

/* With @fault khod is killed there first. */
static void released(const char *fault)
{
	size_t fds = 0;

	registered_to_release();
	sim_kexec(sim);
	simdev_refuse_replace(sim_lock_devices(sim), "0000:02:00.0");
	sim_unlock_devices(sim);
	if (fault) {
		sim_start(sim, fault, NULL);
		cr_assert(sim_killed(sim_wait(sim)), "%s never fired\n%s", fault, sim_log(sim));
	}
	for (int i = 0; i < 3; i++) {
		must_start(sim);
		cr_assert(must_rest("release") == KHO_OUTCOME_QUIESCED);
		/* Only the image is left. */
		cr_assert(sim_preserved(sim) == 1 && sim_store_memfds(sim) == 0, "%zu\n%s",
			  sim_preserved(sim), sim_log(sim));
		/* Nor is it open in khod: a restart has as many descriptors. */
		if (i == 0)
			fds = sim_khod_fds(sim);
		cr_assert(i > 1 || sim_khod_comes_to_fds(sim, fds), "%zu descriptors, after a restart %zu", fds,
			  sim_khod_fds(sim));
		if (i == 2)
			break;
		must_stop(sim);
		if (i == 1)
			sim_kexec(sim);
	}
	must_claim_nothing();
	must_stop(sim);
}

Test(devices, memory_is_freed_if_that_is_the_policy)
{
	static const char *const faults[] = {
		NULL, "quiesce-decided", "quiesce-stopped", "restore-replaced",
		"start-incoming-session-stored", "start-incoming-image-preserved",
	};

	for (size_t i = 0; i < ARRAY_SIZE(faults); i++) {
		if (i > 0)
			again();
		released(faults[i]);
	}
	/* And a restore that succeeds is none of its business. */
	again();
	registered_to_release();
	sim_kexec(sim);
	must_start(sim);
	cr_assert(must_rest("restored") == KHO_OUTCOME_RESTORED);
	must_claim(&known);
	must_stop(sim);
}

/* The incoming session is there until PID 1 has closed it, and has the memory. */
Test(devices, quiesced_though_closed_a_moment_later)
{
	registered();
	sim_kexec(sim);
	sim_close_late(sim, 300);
	simdev_refuse_replace(sim_lock_devices(sim), "*");
	sim_unlock_devices(sim);
	must_start(sim);
	cr_assert(must_rest("closed late") == KHO_OUTCOME_QUIESCED);
	must_claim(&known);
	must_stop(sim);
}

/* A workload that can be claimed for as long after each kexec. */
static void registered_for(uint32_t sec, enum kho_restore_failure then)
{
	struct kho_policy policy = { .restore_failure = then, .claim_sec = sec };
	struct kho_error *err = NULL;
	struct kho_client *k;
	struct client c;

	client_new(&c);
	must_start(sim);
	k = dial(kho, sim);
	{
		struct kho_client_file files[] = {
			{ "ram0", c.memfds[0] }, { "ram1", c.memfds[1] }, { "iommufd", c.ctx },
			{ "nic", c.dev[0] }, { "disk", c.dev[1] },
		};

		must(kho_client_register_policy(k, "vm", files, ARRAY_SIZE(files), NULL, 0, &policy, &err),
		     err, "register");
	}
	kho_client_free(k);
	client_exit(&c);
	must_stop(sim);
}

static uint32_t seconds_left(void)
{
	struct kho_workloads *w = NULL;
	struct kho_client *c = dial(kho, sim);
	uint32_t left;

	cr_assert(kho_client_show(c, "vm", &w, NULL, NULL) == 0);
	left = kho_workloads_get(w, 0)->claim_left_sec;
	kho_workloads_free(w);
	kho_client_free(c);
	return left;
}

/* Its time runs out, and that within @msec. */
static void must_expire(int msec, enum kho_restore_failure then)
{
	enum kho_outcome outcome = 0;
	char reason[600] = "";

	for (; outcome != KHO_OUTCOME_QUIESCED; msec -= 20) {
		cr_assert(msec > 0, "outcome %d\n%s", outcome, sim_log(sim));
		usleep(20000);
		(void)listed(&outcome, reason, sizeof(reason));
	}
	cr_assert(strstr(reason, "nobody has claimed it within "), "%s", reason);
	cr_assert(must_rest("expired") == KHO_OUTCOME_QUIESCED && seconds_left() == 0);
	/* The image, and the memory if it is kept. */
	cr_assert(sim_preserved(sim) == (then == KHO_RESTORE_FAILURE_RELEASE ? 1 : 3), "%zu\n%s",
		  sim_preserved(sim), sim_log(sim));
	cr_assert(sim_store_memfds(sim) == 0);
}

/* Too late: the reason, and the memory if it is kept. */
static void must_claim_late(enum kho_restore_failure then)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;

	must(kho_client_claim(c, "vm", NULL, 0, &claim, &err), err, "claim");
	cr_assert(kho_claim_outcome(claim) == KHO_OUTCOME_QUIESCED);
	cr_assert(strstr(kho_claim_reason(claim), "nobody has claimed it within "), "%s",
		  kho_claim_reason(claim));
	if (then == KHO_RESTORE_FAILURE_RELEASE) {
		cr_assert(kho_claim_n_files(claim) == 0);
	} else {
		cr_assert(kho_claim_n_files(claim) == 2);
		cr_assert(check_memfd(fd_named(claim, "ram0"), 65536, 40));
		cr_assert(check_memfd(fd_named(claim, "ram1"), 65536, 41));
	}
	must(kho_client_claim_ack(c, claim, &err), err, "ack");
	kho_claim_free(claim);
	kho_client_free(c);
	cr_assert(sim_store_count(sim) == 0 && sim_sessions(sim, false) == 0);
}

/* Until a handover there is no end; then there is, said everywhere; and it is remembered. */
static void expires(enum kho_restore_failure then)
{
	bool release = then == KHO_RESTORE_FAILURE_RELEASE;

	registered_for(3, then);
	must_start(sim);
	cr_assert(seconds_left() == 0);
	usleep(3300000);
	cr_assert(must_rest("not handed over") == KHO_OUTCOME_NONE);
	must_stop(sim);
	for (int i = 0; i < 2; i++) {
		sim_kexec(sim);
		must_start(sim);
		if (i == 0) {
			cr_assert(must_rest("in time") == KHO_OUTCOME_RESTORED);
			cr_assert(seconds_left() >= 1 && seconds_left() <= 3);
			cr_assert(strstr(shown(""), "within 3 s of a handover"), "%s", shown(""));
			cr_assert(strstr(khoctl("list", ""), "to be claimed within 3 s"), "%s",
				  khoctl("list", ""));
			cr_assert(strstr(khoctl("status", ""), "vm  to be claimed within 3 s"), "%s",
				  khoctl("status", ""));
		}
		must_expire(4000, then);
		if (i == 0)
			must_stop(sim);
	}
	cr_assert(strstr(sim_log(sim), "Nobody has claimed workload vm within 3 s of the handover: its devices have been stopped, its memory is "),
		  "%s", sim_log(sim));
	cr_assert(!!strstr(sim_log(sim), "its memory is freed") == release);
	cr_assert(strstr(shown(""), "quiesced by the last handover: nobody has claimed it within 3 s"), "%s",
		  shown(""));
	cr_assert(strstr(khoctl("list", ""), "quiesced: nobody has claimed it within 3 s"), "%s",
		  khoctl("list", ""));
	cr_assert(strstr(khoctl("status", ""), "by the last handover: nobody has claimed it within"), "%s",
		  khoctl("status", ""));
	must_claim_late(then);
	must_stop(sim);
}

Test(devices, nobody_claims_in_time)
{
	expires(KHO_RESTORE_FAILURE_QUIESCE);
	again();
	expires(KHO_RESTORE_FAILURE_RELEASE);
}

/* The clock is the kernel's: it runs while khod does not, and a restart does not turn it back. */
Test(devices, time_runs_out_whatever_becomes_of_khod)
{
	registered_for(2, KHO_RESTORE_FAILURE_QUIESCE);
	sim_kexec(sim);
	must_start(sim);
	usleep(1000000);
	must_stop(sim);
	must_start(sim);
	cr_assert(must_rest("restarted") == KHO_OUTCOME_RESTORED);
	cr_assert(seconds_left() == 1, "%u", seconds_left());
	must_expire(1500, KHO_RESTORE_FAILURE_QUIESCE);
	must_claim_late(KHO_RESTORE_FAILURE_QUIESCE);
	must_stop(sim);

	again();
	registered_for(1, KHO_RESTORE_FAILURE_QUIESCE);
	sim_kexec(sim);
	must_start(sim);
	must_stop(sim);
	usleep(1100000);
	must_start(sim);
	/* Before any client was heard. */
	cr_assert(must_rest("late") == KHO_OUTCOME_QUIESCED);
	must_claim_late(KHO_RESTORE_FAILURE_QUIESCE);
	must_stop(sim);
	/* In the next kernel it counts anew. */
	again();
	registered_for(2, KHO_RESTORE_FAILURE_QUIESCE);
	for (int i = 0; i < 2; i++) {
		sim_kexec(sim);
		must_start(sim);
		usleep(1200000);
		cr_assert(must_rest("kexec") == KHO_OUTCOME_RESTORED);
		must_stop(sim);
	}
}

/* Who has been answered has everything, however long it takes; until it goes away without. */
Test(devices, a_claim_in_hand_is_waited_for)
{
	for (int acknowledged = 0; acknowledged < 2; acknowledged++) {
		struct kho_policy policy = {
			.restore_failure = KHO_RESTORE_FAILURE_RELEASE, .claim_sec = 1,
		};
		struct kho_client_file file = { "ram", make_memfd(4096, 60) };
		struct kho_claim *claim = NULL;
		struct kho_error *err = NULL;
		struct kho_client *c;

		registered_for(1, KHO_RESTORE_FAILURE_RELEASE);
		must_start(sim);
		/* Of another one the time runs out, too. */
		c = dial(kho, sim);
		must(kho_client_register_policy(c, "other", &file, 1, NULL, 0, &policy, &err), err, "register");
		kho_client_free(c);
		close(file.fd);
		must_stop(sim);
		sim_kexec(sim);
		must_start(sim);
		c = dial(kho, sim);
		must(kho_client_claim(c, "vm", NULL, 0, &claim, &err), err, "claim");
		for (int i = 0; i < 400 && !strstr(sim_log(sim), "Nobody has claimed workload other"); i++)
			usleep(50000);
		/* Both had the same time. */
		usleep(500000);
		devices_are(true, "paging");
		cr_assert(kho_claim_outcome(claim) == KHO_OUTCOME_RESTORED &&
			  kho_claim_n_files(claim) == 5);
		cr_assert(strstr(sim_log(sim), "Nobody has claimed workload other"), "%s", sim_log(sim));
		cr_assert(!strstr(sim_log(sim), "Nobody has claimed workload vm"), "%s", sim_log(sim));
		{
			struct kho_client *k = dial(kho, sim);

			must(kho_client_release(k, "other", NULL, 0, &err), err, "release");
			kho_client_free(k);
		}
		if (acknowledged) {
			must(kho_client_claim_ack(c, claim, &err), err, "ack");
			devices_are(true, "paging");
			cr_assert(check_memfd(fd_named(claim, "ram1"), 65536, 41));
		}
		kho_claim_free(claim);
		kho_client_free(c);
		if (!acknowledged) {
			must_expire(1000, KHO_RESTORE_FAILURE_RELEASE);
			must_claim_late(KHO_RESTORE_FAILURE_RELEASE);
		}
		must_stop(sim);
		again();
	}
}

/* @variant 0: started again; 1: killed at the same place again; 2: another kexec at once. */
static void kill_expiring(const char *fault, bool *killed, enum kho_restore_failure then, int variant)
{
	bool died;

	registered_for(1, then);
	sim_kexec(sim);
	must_start(sim);
	must_stop(sim);
	usleep(1050000);
	sim_start(sim, fault, NULL);
	died = sim_ready(sim) ? sim_killed(sim_stop(sim)) : sim_killed(sim_wait(sim));
	*killed |= died;
	if (died && variant == 1) {
		sim_start(sim, fault, NULL);
		(void)(sim_ready(sim) ? sim_stop(sim) : sim_wait(sim));
	}
	if (died && variant == 2)
		sim_kexec(sim);
	must_start(sim);
	/* A kexec before anything was decided begins anew; nothing else is one or the other. */
	if (must_rest(fault) == KHO_OUTCOME_RESTORED)
		cr_assert(variant == 2 && died && seconds_left() == 1, "%s, variant %d\n%s", fault, variant,
			  sim_log(sim));
	must_expire(2000, then);
	cr_assert(!strstr(sim_log(sim), "could not be brought into order"), "%s", sim_log(sim));
	must_claim_late(then);
	must_stop(sim);
}

static void kill_expiring_in_all_ways(const char *fault, bool *killed)
{
	for (int variant = 0; variant < 3; variant++) {
		if (variant > 0)
			again();
		kill_expiring(fault, killed, KHO_RESTORE_FAILURE_QUIESCE, variant);
	}
	again();
	kill_expiring(fault, killed, KHO_RESTORE_FAILURE_RELEASE, 0);
}

Test(devices, killed_in_expire)
{
	sweep("expire", kill_expiring_in_all_ways);
}

/* And in what it has in common with the start in a new kernel. */
Test(devices, killed_in_expire_and_on)
{
	static const char *const faults[] = {
		"start-incoming-transit-stored:1", "start-incoming-transit-stored:3",
		"start-incoming-session-created:1", "start-incoming-session-stored:1",
		"start-incoming-file-preserved:1", "start-incoming-file-preserved:2",
		"start-incoming-image-preserved:1", "start-incoming-transit-removed:1",
		"start-incoming-transit-removed:3",
	};

	for (size_t i = 0; i < ARRAY_SIZE(faults); i++)
		for (int variant = 0; variant < 3; variant++) {
			bool killed = false;

			kill_expiring(faults[i], &killed, KHO_RESTORE_FAILURE_QUIESCE, variant);
			cr_assert(killed, "%s never fired", faults[i]);
			again();
		}
}

/* The n-th kernel call of a khod that starts too late fails once. Return: is there an n-th? */
static bool fail_expire(int n, enum kho_restore_failure then)
{
	enum kho_outcome outcome = 0;
	char fail[32], reason[600];
	bool fired;
	int state;

	registered_for(1, then);
	sim_kexec(sim);
	must_start(sim);
	must_stop(sim);
	usleep(1050000);
	snprintf(fail, sizeof(fail), "%d:%d", n, n % 2 ? ENOMEM : EIO);
	sim_start(sim, NULL, fail);
	cr_assert(sim_ready(sim), "%s", sim_log(sim));
	/* It is answered when what comes after READY=1 has been done, too. */
	state = listed(&outcome, reason, sizeof(reason));
	fired = strstr(sim_log(sim), "sim: call ") != NULL;
	/* Either the devices run and have a table, or they are stopped and it says so. */
	if (state && outcome == KHO_OUTCOME_QUIESCED)
		devices_are(false, "none");
	else
		devices_are(true, "paging");
	must_stop(sim);
	must_start(sim);
	must_expire(500, then);
	must_claim_late(then);
	must_stop(sim);
	again();
	return fired;
}

Test(devices, fail_nth_expire)
{
	int fired = 0;

	while (fail_expire(fired + 1, KHO_RESTORE_FAILURE_QUIESCE))
		fired++;
	fprintf(stderr, "expire: %d calls failed one by one\n", fired);
	cr_assert(fired > 20);
}

/* Memory alone has an end if it is to be freed; else there is nothing to be done. */
Test(devices, memory_that_nobody_claims_in_time)
{
	for (int release = 0; release < 2; release++) {
		struct kho_policy policy = {
			.restore_failure = release ? KHO_RESTORE_FAILURE_RELEASE :
						     KHO_RESTORE_FAILURE_QUIESCE,
			.claim_sec = 1,
		};
		struct kho_client_file file = { "ram", make_memfd(4096, 60) };
		enum kho_outcome outcome = 0;
		struct kho_error *err = NULL;
		struct kho_client *k;
		char reason[600];

		must_start(sim);
		k = dial(kho, sim);
		must(kho_client_register_policy(k, "vm", &file, 1, NULL, 0, &policy, &err), err, "register");
		kho_client_free(k);
		close(file.fd);
		must_stop(sim);
		sim_kexec(sim);
		must_start(sim);
		cr_assert(seconds_left() == (uint32_t)release);
		usleep(1500000);
		cr_assert(listed(&outcome, reason, sizeof(reason)) == KHO_WORKLOAD_HELD);
		cr_assert(outcome == (release ? KHO_OUTCOME_QUIESCED : KHO_OUTCOME_NONE));
		cr_assert(sim_preserved(sim) == (release ? 1 : 2), "%zu", sim_preserved(sim));
		cr_assert(!!strstr(sim_log(sim), "of the handover: its memory is freed") == release, "%s",
			  sim_log(sim));
		must_stop(sim);
		again();
	}
}

static void signals_by(enum simdev_irq nic, enum simdev_irq disk)
{
	struct simdev *d = sim_lock_devices(sim);

	simdev_set_irq(d, dev_names[0], nic);
	simdev_set_irq(d, dev_names[1], disk);
	sim_unlock_devices(sim);
}

static int register_irq(struct client *c, bool may_lose_irq, struct kho_error **err)
{
	struct kho_client_file files[] = {
		{ "ram0", c->memfds[0] }, { "ram1", c->memfds[1] }, { "iommufd", c->ctx },
		{ "nic", c->dev[0] }, { "disk", c->dev[1] },
	};
	struct kho_policy policy = { .may_lose_irq = may_lose_irq };
	struct kho_client *k = dial(kho, sim);
	int r = kho_client_register_policy(k, "vm", files, ARRAY_SIZE(files), NULL, 0, &policy, err);

	kho_client_free(k);
	return r;
}

/* Which of the devices the client, and who looks, are told of. */
static void lost_irq(bool nic, bool disk)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_workloads *w = NULL;
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;

	must(kho_client_claim(c, "vm", NULL, 0, &claim, &err), err, "claim");
	for (size_t i = 0; i < kho_claim_n_files(claim); i++) {
		const char *name = kho_claim_name(claim, i);
		bool want = (strcmp(name, "nic") == 0 && nic) || (strcmp(name, "disk") == 0 && disk);

		cr_assert(kho_claim_may_have_lost_irq(claim, i) == want, "%s", name);
	}
	kho_claim_free(claim);
	kho_client_free(c);
	c = dial(kho, sim);
	cr_assert(kho_client_show(c, "vm", &w, NULL, NULL) == 0);
	for (size_t i = 0; i < 5; i++) {
		const struct kho_workload_file *f = &kho_workloads_get(w, 0)->files[i];
		bool want = (strcmp(f->name, "nic") == 0 && nic) || (strcmp(f->name, "disk") == 0 && disk);

		cr_assert(f->may_have_lost_irq == want, "%s", f->name);
	}
	kho_workloads_free(w);
	kho_client_free(c);
	cr_assert(!!strstr(shown(""), "MAY HAVE LOST INTERRUPTS") == (nic || disk));
}

/* Refused by name, unless that is accepted; then it is carried, and the client is told. */
Test(devices, interrupts_that_may_get_lost)
{
	static const enum simdev_irq irqs[] = { SIMDEV_INTX, SIMDEV_MSI };

	for (size_t i = 0; i < ARRAY_SIZE(irqs); i++) {
		struct kho_error *err = NULL;
		struct client c;
		char *text;
		int r;

		client_new(&c);
		signals_by(irqs[i], SIMDEV_MSIX);
		must_start(sim);
		/* Again after it was refused: to find out why must not have left a trace. */
		for (int again = 0; again < 2; again++) {
			r = register_irq(&c, false, &err);
			text = kho_error_format(err, r);
			cr_assert(r == -EOPNOTSUPP && strstr(text, "nic: cannot be preserved: it uses INTx or MSI"),
				  "%d: %s", r, text);
			free(text);
			err = kho_error_free(err);
			cr_assert(sim_store_count(sim) == 0 && sim_sessions(sim, false) == 0);
			devices_are(true, "paging");
		}
		must(register_irq(&c, true, &err), err, "register");
		lost_irq(false, false);
		client_exit(&c);
		must_stop(sim);
		/* It is remembered over kernels in which nobody claims it. */
		for (int k = 0; k < 2; k++) {
			sim_kexec(sim);
			must_start(sim);
			cr_assert(must_rest("kexec") == KHO_OUTCOME_RESTORED);
			lost_irq(true, false);
			cr_assert(strstr(shown("--json"), "\"may_lose_irq\": true"));
			must_stop(sim);
		}
		must_start(sim);
		must_claim(&known);
		must_stop(sim);
		again();
	}
	/* With a policy that does not accept it there is nothing to tell. */
	{
		struct kho_error *err = NULL;
		struct client c;

		client_new(&c);
		signals_by(SIMDEV_MSIX, SIMDEV_NONE);
		must_start(sim);
		must(register_irq(&c, false, &err), err, "register");
		client_exit(&c);
		must_stop(sim);
		sim_kexec(sim);
		must_start(sim);
		lost_irq(false, false);
		must_stop(sim);
	}
}

/* Each call of a start fails once: what cannot be read is told as lost, and nothing else changes. */
Test(devices, fail_nth_interrupts)
{
	int fired = 0;
	bool more = true;

	while (more) {
		struct kho_error *err = NULL;
		struct client c;
		char fail[32];

		client_new(&c);
		signals_by(SIMDEV_MSI, SIMDEV_MSIX);
		must_start(sim);
		must(register_irq(&c, true, &err), err, "register");
		client_exit(&c);
		must_stop(sim);
		sim_kexec(sim);
		snprintf(fail, sizeof(fail), "%d:%d", fired + 1, fired % 2 ? ENOMEM : EIO);
		sim_start(sim, NULL, fail);
		cr_assert(sim_ready(sim), "%s", sim_log(sim));
		more = strstr(sim_log(sim), "sim: call ") != NULL;
		fired += more;
		must_stop(sim);
		must_start(sim);
		if (must_rest(fail) == KHO_OUTCOME_RESTORED)
			cr_assert(strstr(shown("--json"), "\"may_have_lost_irq\": true"), "call %d: %s", fired,
				  shown("--json"));
		must_claim(&known);
		must_stop(sim);
		again();
	}
	fprintf(stderr, "interrupts: %d calls failed one by one\n", fired);
	cr_assert(fired > 50);
}
