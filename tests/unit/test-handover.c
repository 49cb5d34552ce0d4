/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Getting ready for a kexec on the simulated machine: clients that are ready, that veto, stall,
 * die, lie, and a khod that is killed on the way. Whatever happens, either everybody is
 * preserved, or everybody may change mappings as before.
 */
#include <pthread.h>
#include <linux/iommufd.h>
#include <sys/socket.h>

#include "machine.h"
#include "wire.h"

#define IOVA 0x10000
#define SIZE 65536

/* A workload with one device of its own, and the connection over which it is leased. */
struct client {
	const char *name;
	int memfd, ctx, dev;
	uint32_t ioas, dev_id;
	unsigned int seed;
	struct kho_client *k;
};

TestSuite(handover, .init = setup, .fini = teardown, .timeout = 300);

static void attach(struct client *c)
{
	struct kho_error *err = NULL;
	uint32_t pt = c->ioas;

	must(kho_vfio_attach(kho, c->dev, &pt, false, &err), err, "attach");
}

/* With a device that is bound, and attached to nothing. */
static void client_bound(struct client *c, const char *name, const char *device)
{
	struct kho_error *err = NULL;
	char path[64];

	*c = (struct client){ .name = name, .seed = 7 + (unsigned char)name[strlen(name) - 1] };
	c->memfd = make_memfd(SIZE, c->seed);
	c->ctx = kho_iommufd_open(kho, &err);
	must(c->ctx, err, "iommufd");
	must(kho_iommufd_ioas_alloc(kho, c->ctx, &c->ioas, &err), err, "ioas");
	must(kho_iommufd_map_file(kho, c->ctx, c->ioas, c->memfd, 0, SIZE, IOVA, 3, &err), err, "map");
	snprintf(path, sizeof(path), "/dev/vfio/devices/%s", device);
	c->dev = kho_vfio_open(kho, path, &err);
	must(c->dev, err, "open");
	must(kho_vfio_bind(kho, c->dev, c->ctx, &c->dev_id, &err), err, "bind");
}

static void client_new(struct client *c, const char *name, const char *device)
{
	client_bound(c, name, device);
	attach(c);
}

static int try_lease(struct client *c, const struct kho_policy *policy, struct kho_error **err)
{
	struct kho_client_file files[] = {
		{ "device", c->dev }, { "iommufd", c->ctx }, { "memory", c->memfd },
	};
	int r;

	if (!c->k)
		c->k = dial(kho, sim);
	cr_assert(c->k, "khod does not listen\n%s", sim_log(sim));
	r = kho_client_register_policy(c->k, c->name, files, 3, NULL, 0, policy, err);
	return r;
}

static const struct kho_policy lease = { .keep = KHO_KEEP_LEASE };

static void must_lease(struct client *c, const struct kho_policy *policy)
{
	struct kho_error *err = NULL;

	must(try_lease(c, policy, &err), err, "lease");
}

/* Its process ends: all of its descriptors at once. */
static void client_exit(struct client *c)
{
	c->k = kho_client_free(c->k);
	close(c->memfd);
	close(c->dev);
	close(c->ctx);
}

/* May it change its mappings? */
static bool is_free(struct client *c)
{
	static uint64_t at = 0x1000000;
	int r;

	/* What khod has closed is not a moment later. */
	(void)sim_lock_devices(sim);
	sim_unlock_devices(sim);
	at += SIZE;
	r = kho_iommufd_map_file(kho, c->ctx, c->ioas, c->memfd, 0, SIZE, at, 3, NULL);
	cr_assert(r >= 0 || r == -EBUSY, "map: %d\n%s", r, sim_log(sim));
	return r >= 0;
}

static void devices_run(size_t n)
{
	static const char *const names[] = { "0000:01:00.0", "0000:02:00.0" };
	struct simdev *d = sim_lock_devices(sim);

	cr_assert(!simdev_violation(d), "%s\n%s", simdev_violation(d), sim_log(sim));
	for (size_t i = 0; i < 2; i++)
		cr_assert(simdev_running(d, names[i]) == (i < n), "%s: %d\n%s", names[i], i >= n,
			  sim_log(sim));
	sim_unlock_devices(sim);
}

/* 0: there is none; else its state. */
static int state_of(const char *name)
{
	struct kho_workloads *w = NULL;
	struct kho_client *c = dial(kho, sim);
	int r, state = 0;

	cr_assert(c, "%s", sim_log(sim));
	r = kho_client_show(c, name, &w, NULL, NULL);
	cr_assert(r == 0 || r == -ENOENT);
	if (r == 0)
		state = kho_workloads_get(w, 0)->state;
	kho_workloads_free(w);
	kho_client_free(c);
	return state;
}

/* The operator, in a thread of its own: what it asks for takes until the clients have answered. */
struct operator {
	pthread_t thread;
	struct kho_client *c;	/* NULL: one of its own */
	bool force;
	int r;
	char text[1024], left[1024];
};

static void left_behind(const char *name, const char *reason, void *userdata)
{
	struct operator *o = userdata;
	size_t n = strlen(o->left);

	snprintf(o->left + n, sizeof(o->left) - n, "%s: %s\n", name, reason);
}

static void *operate(void *arg)
{
	struct operator *o = arg;
	struct kho_error *err = NULL;
	struct kho_client *c = o->c;
	struct kho *own = NULL;	/* a handle is for one thread */
	char *text;

	if (!c) {
		cr_assert(kho_new(&own, NULL, NULL) == 0);
		c = dial(own, sim);
	}
	cr_assert(c);
	o->r = kho_client_preserve(c, o->force, left_behind, o, &err);
	text = kho_error_format(err, o->r);
	snprintf(o->text, sizeof(o->text), "%s", o->r < 0 && text ? text : "");
	free(text);
	kho_error_free(err);
	if (!o->c)
		kho_client_free(c);
	kho_free(own);
	return NULL;
}

static void preserve(struct operator *o)
{
	o->r = 0;
	o->text[0] = o->left[0] = 0;
	cr_assert(pthread_create(&o->thread, NULL, operate, o) == 0);
}

static void wait_for(struct operator *o)
{
	cr_assert(pthread_join(o->thread, NULL) == 0);
}

static void must_event(struct client *c, enum kho_event_kind kind, struct kho_event *ev)
{
	struct kho_error *err = NULL;

	must(kho_client_event(c->k, 20000, ev, &err), err, "event");
	cr_assert(ev->kind == kind && strcmp(ev->workload, c->name) == 0, "%s: event %d of %s: %s\n%s",
		  c->name, ev->kind, ev->workload, ev->reason, sim_log(sim));
}

static void must_be_ready(struct client *c)
{
	struct kho_error *err = NULL;
	struct kho_event ev;

	must_event(c, KHO_EVENT_PREPARE, &ev);
	cr_assert(ev.msec > 0 && ev.msec <= 10000);
	must(kho_client_ready(c->k, &ev, &err), err, "ready");
}

static void abort_it(void)
{
	struct kho_error *err = NULL;
	struct kho_client *c = dial(kho, sim);

	must(kho_client_abort(c, &err), err, "abort");
	kho_client_free(c);
}

/* In the next kernel: restored, with the memory. */
static void must_come_back_after(const char *name, unsigned int seed, uint32_t handovers)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;
	bool found = false;

	must(kho_client_claim(c, name, NULL, 0, &claim, &err), err, "claim");
	cr_assert(kho_claim_outcome(claim) == KHO_OUTCOME_RESTORED &&
		  kho_claim_handovers(claim) == handovers);
	for (size_t i = 0; i < kho_claim_n_files(claim); i++)
		if (strcmp(kho_claim_name(claim, i), "memory") == 0)
			found = check_memfd(kho_claim_fd(claim, i), SIZE, seed);
	cr_assert(found && kho_claim_n_files(claim) == 3);
	must(kho_client_claim_ack(c, claim, &err), err, "ack");
	kho_claim_free(claim);
	kho_client_free(c);
}

static void must_come_back(const char *name, unsigned int seed)
{
	must_come_back_after(name, seed, 1);
}

static void must_be_empty(void)
{
	/* A close is noticed a little later. */
	for (int i = 0; i < 2000 && (sim_store_count(sim) || sim_sessions(sim, false)); i++)
		usleep(10000);
	cr_assert(sim_store_count(sim) == 0 && sim_sessions(sim, false) == 0 &&
		  sim_sessions(sim, true) == 0, "%zu in the store\n%s", sim_store_count(sim), sim_log(sim));
}

/* Both are leased, free, and asked by the next handover, which carries them. */
static void must_go_on(struct client *a, struct client *b)
{
	struct operator o = {};
	unsigned int seed[] = { a->seed, b->seed };

	cr_assert(state_of(a->name) == KHO_WORKLOAD_LEASED && state_of(b->name) == KHO_WORKLOAD_LEASED);
	cr_assert(is_free(a) && is_free(b));
	preserve(&o);
	must_be_ready(a);
	must_be_ready(b);
	wait_for(&o);
	cr_assert(o.r == 2 && !o.left[0], "%d %s %s", o.r, o.text, o.left);
	devices_run(2);
	client_exit(a);
	client_exit(b);
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	devices_run(2);
	must_come_back(a->name, seed[0]);
	must_come_back(b->name, seed[1]);
	must_be_empty();
	must_stop(sim);
}

static void two(struct client *a, struct client *b, const struct kho_policy *pb)
{
	must_start(sim);
	client_new(a, "vm-a", "0000:01:00.0");
	client_new(b, "vm-b", "0000:02:00.0");
	must_lease(a, &lease);
	must_lease(b, pb);
}

Test(handover, mappings_change_until_prepared_and_after_an_abort)
{
	struct client a, b;
	struct kho_event ev;
	struct operator o = {};

	two(&a, &b, &lease);
	cr_assert(sim_store_count(sim) == 2 && is_free(&a) && is_free(&b));
	preserve(&o);
	must_be_ready(&a);
	cr_assert(!is_free(&a) && is_free(&b), "only who is ready is preserved");
	must_be_ready(&b);
	wait_for(&o);
	cr_assert(o.r == 2, "%s", o.text);
	cr_assert(!is_free(&a) && !is_free(&b));
	cr_assert(state_of("vm-a") == KHO_WORKLOAD_HELD);
	abort_it();
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	cr_assert(strstr(ev.reason, "operator"));
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	abort_it();	/* there is nothing to undo */
	must_go_on(&a, &b);
}

Test(handover, a_veto_refuses_by_name_and_is_rolled_back)
{
	struct client a, b;
	struct kho_error *err = NULL;
	struct kho_event ev;
	struct operator o = {};

	two(&a, &b, &lease);
	preserve(&o);
	must_be_ready(&a);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	must(kho_client_veto(b.k, &ev, "a \033[31mmigration\nis running", &err), err, "veto");
	wait_for(&o);
	cr_assert(o.r == -ECANCELED && strstr(o.text, "vm-b: vetoed: a ?[31mmigration?is running"),
		  "%d: %s", o.r, o.text);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	cr_assert(strstr(ev.reason, "vm-b: vetoed"), "%s", ev.reason);
	must_go_on(&a, &b);
}

Test(handover, who_stalls_is_not_waited_for)
{
	struct kho_policy brief = { .keep = KHO_KEEP_LEASE, .prepare_msec = 2000 };
	struct client a, b;
	struct kho_event ev;
	struct operator o = {};

	two(&a, &b, &brief);
	preserve(&o);
	must_be_ready(&a);
	wait_for(&o);
	cr_assert(o.r == -ECANCELED && strstr(o.text, "vm-b: its client did not answer in time"), "%s",
		  o.text);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	cr_assert(ev.msec == 2000);
	/* Too late. */
	cr_assert(kho_client_ready(b.k, &ev, NULL) == -ESTALE);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_go_on(&a, &b);
}

static int send_to(int sock, Kho__Control__Request *q)
{
	uint8_t buf[256];
	size_t n = kho__control__request__pack(q, buf);

	return send(sock, buf, n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* More requests than khod can answer, over as many connections, and each answer is read. */
static void *keep_busy(void *stop)
{
	static Kho__Control__Status status = KHO__CONTROL__STATUS__INIT;
	static Kho__Control__Hello hello = KHO__CONTROL__HELLO__INIT;
	Kho__Control__Request greet = KHO__CONTROL__REQUEST__INIT, ask = KHO__CONTROL__REQUEST__INIT;
	static __thread uint8_t buf[4096];
	int socks[16];

	hello.min_version = hello.max_version = 1;
	greet.body_case = KHO__CONTROL__REQUEST__BODY_HELLO;
	greet.hello = &hello;
	ask.body_case = KHO__CONTROL__REQUEST__BODY_STATUS;
	ask.status = &status;
	for (size_t i = 0; i < 16; i++) {
		socks[i] = kho_ops_kernel()->connect(NULL, sim_socket(sim), 20000);
		cr_assert(socks[i] >= 0 && send_to(socks[i], &greet) == 0);
	}
	while (!*(volatile bool *)stop)
		for (size_t i = 0; i < 16; i++) {
			while (send_to(socks[i], &ask) == 0)
				;
			while (recv(socks[i], buf, sizeof(buf), MSG_DONTWAIT) > 0)
				;
		}
	for (size_t i = 0; i < 16; i++)
		close(socks[i]);
	return NULL;
}

/* Clients that always have something to say: the time of others runs out all the same. */
Test(handover, who_keeps_khod_busy_puts_no_deadline_off)
{
	struct kho_policy brief = { .keep = KHO_KEEP_LEASE, .prepare_msec = 2000 };
	struct timespec begin, end;
	struct client a, b;
	struct kho_event ev;
	struct operator o = {};
	pthread_t busy[2];
	bool stop = false;

	two(&a, &b, &brief);
	for (size_t i = 0; i < 2; i++)
		cr_assert(pthread_create(&busy[i], NULL, keep_busy, &stop) == 0);
	clock_gettime(CLOCK_MONOTONIC, &begin);
	preserve(&o);
	must_be_ready(&a);
	wait_for(&o);
	clock_gettime(CLOCK_MONOTONIC, &end);
	stop = true;
	for (size_t i = 0; i < 2; i++)
		cr_assert(pthread_join(busy[i], NULL) == 0);
	cr_assert(o.r == -ECANCELED && strstr(o.text, "vm-b: its client did not answer in time"), "%s",
		  o.text);
	cr_assert(end.tv_sec - begin.tv_sec < 15, "%ld s", (long)(end.tv_sec - begin.tv_sec));
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_go_on(&a, &b);
}

Test(handover, who_dies_before_it_is_ready_refuses_or_is_left_behind)
{
	struct kho_policy best = { .keep = KHO_KEEP_LEASE, .survival = KHO_SURVIVAL_BEST_EFFORT };

	for (int b_must = 0; b_must < 2; b_must++) {
		struct client a, b;
		struct kho_event ev;
		struct operator o = {};

		two(&a, &b, b_must ? &lease : &best);
		preserve(&o);
		must_be_ready(&a);
		must_event(&b, KHO_EVENT_PREPARE, &ev);
		client_exit(&b);
		wait_for(&o);
		cr_assert(state_of("vm-b") == 0, "the lease did not end");
		if (b_must) {
			cr_assert(o.r == -ECANCELED && strstr(o.text, "vm-b: its client died"), "%s", o.text);
			must_event(&a, KHO_EVENT_ABORTED, &ev);
			cr_assert(is_free(&a));
		} else {
			cr_assert(o.r == 1 && strstr(o.left, "vm-b: its client died"), "%d %s", o.r, o.left);
			cr_assert(!is_free(&a));
		}
		devices_run(1);
		client_exit(&a);
		if (!b_must)
			abort_it();	/* of one whose client has exited: it stays held */
		cr_assert(b_must || state_of("vm-a") == KHO_WORKLOAD_HELD);
		must_stop(sim);
		again();
	}
}

Test(handover, best_effort_is_left_behind_and_may_go_on)
{
	struct kho_policy best = { .keep = KHO_KEEP_LEASE, .survival = KHO_SURVIVAL_BEST_EFFORT };
	struct client a, b;
	struct kho_event ev;
	struct operator o = {};

	two(&a, &b, &best);
	preserve(&o);
	must_be_ready(&a);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	cr_assert(kho_client_veto(b.k, &ev, "not now", NULL) == 0);
	wait_for(&o);
	cr_assert(o.r == 1 && strcmp(o.left, "vm-b: vetoed: not now\n") == 0, "%d %s", o.r, o.left);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	cr_assert(is_free(&b) && !is_free(&a));
	/* Asked again alone: the other one is ready. */
	preserve(&o);
	must_be_ready(&b);
	wait_for(&o);
	cr_assert(o.r == 2 && !o.left[0], "%d %s", o.r, o.left);
	abort_it();
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	must_go_on(&a, &b);
}

Test(handover, force_leaves_behind_who_must_survive)
{
	struct client a, b;
	struct kho_event ev;
	struct operator o = { .force = true };

	two(&a, &b, &lease);
	preserve(&o);
	must_be_ready(&a);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	cr_assert(kho_client_veto(b.k, &ev, "", NULL) == 0);
	wait_for(&o);
	cr_assert(o.r == 1 && strcmp(o.left, "vm-b: vetoed: no reason given\n") == 0, "%d %s", o.r, o.left);
	/* Its lease ends with the old kernel, and its device with it. */
	client_exit(&a);
	client_exit(&b);
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	devices_run(1);
	must_come_back("vm-a", a.seed);
	cr_assert(state_of("vm-b") == 0);
	must_be_empty();
	must_stop(sim);
}

Test(handover, two_at_a_time_are_one_too_many)
{
	struct client a, b;
	struct operator o = {}, o2 = {};
	struct kho_error *err = NULL;
	struct kho_client *c;

	two(&a, &b, &lease);
	preserve(&o);
	must_be_ready(&a);
	preserve(&o2);
	wait_for(&o2);
	cr_assert(o2.r == -EBUSY && strstr(o2.text, "already"), "%d %s", o2.r, o2.text);
	/* Nor does anybody come in who would not be asked. */
	c = b.k;
	b.k = NULL;
	b.name = "vm-c";
	cr_assert(try_lease(&b, &lease, &err) == -EBUSY);
	cr_assert(strstr(kho_error_message(err), "a handover is being prepared"), "%s", kho_error_message(err));
	kho_error_free(err);
	kho_client_free(b.k);
	b.k = c;
	b.name = "vm-b";
	must_be_ready(&b);
	wait_for(&o);
	cr_assert(o.r == 2, "%s", o.text);
	/* And once more when all are ready: nobody is asked twice. */
	preserve(&o2);
	wait_for(&o2);
	cr_assert(o2.r == 2);
	abort_it();
	client_exit(&a);
	client_exit(&b);
	must_be_empty();
	must_stop(sim);
}

Test(handover, abort_breaks_it_off)
{
	struct client a, b;
	struct kho_event ev;
	struct operator o = {};

	two(&a, &b, &lease);
	preserve(&o);
	must_be_ready(&a);
	abort_it();
	wait_for(&o);
	cr_assert(o.r == -ECANCELED && strstr(o.text, "given up by the operator"), "%s", o.text);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	must_go_on(&a, &b);
}

/* Memory that grows once its user's quota has been looked at is not preserved before it is as it was. */
Test(handover, memory_of_another_size_is_a_refusal)
{
	struct kho_error *err = NULL;
	struct operator o = {};
	struct client a, b;
	struct kho_event ev;

	two(&a, &b, &lease);
	preserve(&o);
	must_be_ready(&a);
	must_be_ready(&b);
	wait_for(&o);
	cr_assert(ftruncate(a.memfd, SIZE * 4) == 0);
	abort_it();
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);

	preserve(&o);
	must_event(&a, KHO_EVENT_PREPARE, &ev);
	cr_assert(kho_client_ready(a.k, &ev, &err) == -ESTALE &&
		  strcmp(kho_error_object(err), "memory") == 0 &&
		  strstr(kho_error_message(err), "has 262144 bytes now, and had 65536"), "%s",
		  kho_error_message(err));
	err = kho_error_free(err);
	wait_for(&o);
	cr_assert(o.r < 0 && strstr(o.text, "vm-a"), "%d %s", o.r, o.text);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);

	cr_assert(ftruncate(a.memfd, SIZE) == 0);
	must_go_on(&a, &b);
}

static const char *preflight(void)
{
	static char out[8192];
	char cmd[512];
	FILE *f;

	snprintf(cmd, sizeof(cmd), "%s --socket %s preflight", getenv("KHOCTL"), sim_socket(sim));
	f = popen(cmd, "r");
	cr_assert(f);
	out[fread(out, 1, sizeof(out) - 1, f)] = 0;
	(void)pclose(f);	/* this host may have obstacles of its own */
	return out;
}

static void set_hitless(bool hitless)
{
	struct simdev *d = sim_lock_devices(sim);

	simdev_set_vtd(d, IOMMU_ATTACH_INFO_VTD_LEGACY);
	simdev_set_hitless(d, hitless);
	sim_unlock_devices(sim);
}

/* What the kernel would refuse is told ahead of the handover that it stops, by name. */
Test(handover, preflight_tells_what_would_stop_it)
{
	static const char gap[] = "leased, and as it is now it would stop a handover: pci/0000:01:00.0: is behind an IOMMU that could discard its DMA";
	struct operator o = {};
	struct client a, b;
	struct kho_event ev;
	int other;

	two(&a, &b, &lease);
	set_hitless(true);
	cr_assert(strstr(preflight(), "ok        vm-a           leased, 3 files, 64 KiB, preserved already") &&
		  strstr(preflight(), "ok        vm-b           pci/0000:02:00.0, behind dmar1: its page table is replaced without a gap"),
		  "%s", preflight());
	set_hitless(false);
	cr_assert(strstr(preflight(), "OBSTACLE  vm-a") && strstr(preflight(), gap), "%s", preflight());
	preserve(&o);
	must_event(&a, KHO_EVENT_PREPARE, &ev);
	cr_assert(kho_client_ready(a.k, &ev, NULL) == -EOPNOTSUPP);
	wait_for(&o);
	cr_assert(strstr(o.text, "an IOMMU that could discard DMA"), "%s", o.text);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	set_hitless(true);
	must_go_on(&a, &b);

	must_start(sim);
	client_new(&a, "vm-a", "0000:01:00.0");
	must_lease(&a, &lease);
	other = make_memfd(SIZE, 1);
	must(kho_iommufd_map_file(kho, a.ctx, a.ioas, other, 0, SIZE, IOVA + 16 * SIZE, 3, NULL), NULL, "map");
	cr_assert(strstr(preflight(), "would stop a handover: iommufd: cannot be read: ") &&
		  strstr(preflight(), "map a memfd that is not in the workload"), "%s", preflight());
	client_exit(&a);
	close(other);
	must_stop(sim);
}

/* Who asked for it goes away before the answer. */
Test(handover, without_its_operator_it_is_given_up)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Hello hello = KHO__CONTROL__HELLO__INIT;
	Kho__Control__Preserve body = KHO__CONTROL__PRESERVE__INIT;
	uint8_t buf[1024];
	struct client a, b;
	struct kho_event ev;
	int s;

	two(&a, &b, &lease);
	s = kho_ops_kernel()->connect(NULL, sim_socket(sim), 20000);
	hello.min_version = hello.max_version = 1;
	q.body_case = KHO__CONTROL__REQUEST__BODY_HELLO;
	q.hello = &hello;
	cr_assert(send(s, buf, kho__control__request__pack(&q, buf), 0) > 0);
	q.body_case = KHO__CONTROL__REQUEST__BODY_PRESERVE;
	q.preserve = &body;
	cr_assert(send(s, buf, kho__control__request__pack(&q, buf), 0) > 0);
	must_be_ready(&a);
	close(s);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	cr_assert(strstr(ev.reason, "has gone"), "%s", ev.reason);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	must_go_on(&a, &b);
}

Test(handover, who_lies_about_ids_is_refused)
{
	struct client a, b;
	struct kho_error *err = NULL;
	struct kho_event ev, lie;
	struct operator o = {};
	struct kho_client *other;

	two(&a, &b, &lease);
	/* Nobody has asked. */
	lie = (struct kho_event){ .workload = "vm-a", .handover = 1 };
	cr_assert(kho_client_ready(a.k, &lie, &err) == -ESTALE && strstr(kho_error_message(err), "not waiting"));
	err = kho_error_free(err);
	cr_assert(kho_client_veto(a.k, &lie, "x", NULL) == -ESTALE);

	preserve(&o);
	must_event(&a, KHO_EVENT_PREPARE, &ev);
	/* Another handover, another's workload, one that does not exist, another connection. */
	lie = ev;
	lie.handover++;
	cr_assert(kho_client_ready(a.k, &lie, NULL) == -ESTALE);
	lie = ev;
	strcpy(lie.workload, "vm-b");
	cr_assert(kho_client_ready(a.k, &lie, &err) == -EPERM && strcmp(kho_error_object(err), "vm-b") == 0);
	err = kho_error_free(err);
	cr_assert(kho_client_veto(a.k, &lie, "to harm it", NULL) == -EPERM);
	strcpy(lie.workload, "nobody");
	cr_assert(kho_client_ready(a.k, &lie, NULL) == -EPERM);
	strcpy(lie.workload, "../x");
	cr_assert(kho_client_ready(a.k, &lie, NULL) == -EPERM);
	other = dial(kho, sim);
	cr_assert(kho_client_ready(other, &ev, NULL) == -EPERM);
	cr_assert(kho_client_claim(other, "vm-a", NULL, 0, &(struct kho_claim *){ NULL }, &err) == -EBUSY &&
		  strstr(kho_error_message(err), "leased"));
	err = kho_error_free(err);
	kho_client_free(other);
	cr_assert(is_free(&a) && is_free(&b), "a lie was believed");

	must(kho_client_ready(a.k, &ev, &err), err, "ready");
	cr_assert(kho_client_ready(a.k, &ev, NULL) == -ESTALE, "ready twice");
	must_be_ready(&b);
	wait_for(&o);
	cr_assert(o.r == 2, "%s", o.text);
	abort_it();
	/* An answer to the one that was given up does not count for the next. */
	lie = ev;
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	preserve(&o);
	must_event(&a, KHO_EVENT_PREPARE, &ev);
	cr_assert(kho_client_ready(a.k, &lie, NULL) == -ESTALE);
	abort_it();
	wait_for(&o);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	must_go_on(&a, &b);
}

/* What the kernel refuses is found out in PREPARE only: a device that is not attached. */
Test(handover, what_cannot_be_preserved_is_a_refusal)
{
	struct client a, b;
	struct kho_error *err = NULL;
	struct kho_event ev;
	struct operator o = {};

	must_start(sim);
	client_new(&a, "vm-a", "0000:01:00.0");
	client_bound(&b, "vm-b", "0000:02:00.0");
	must_lease(&a, &lease);
	must_lease(&b, &lease);
	preserve(&o);
	must_be_ready(&a);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	cr_assert(kho_client_ready(b.k, &ev, &err) == -EOPNOTSUPP);
	cr_assert(strstr(kho_error_message(err), "attached to no page table"), "%s", kho_error_message(err));
	kho_error_free(err);
	wait_for(&o);
	cr_assert(o.r == -ECANCELED && strstr(o.text, "vm-b: ") && strstr(o.text, "device"), "%d %s", o.r, o.text);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	attach(&b);
	must_go_on(&a, &b);
}

/* Each leases a device of one iommufd: who comes first lacks what the other one has. */
Test(handover, two_leases_in_one_failure_domain)
{
	struct client a, b = { .name = "vm-b", .seed = 1 };
	struct kho_error *err = NULL;
	struct operator o = {};
	struct kho_event ev;

	must_start(sim);
	client_new(&a, "vm-a", "0000:01:00.0");
	b.memfd = make_memfd(SIZE, b.seed);
	b.ctx = fcntl(a.ctx, F_DUPFD_CLOEXEC, 3);
	b.ioas = a.ioas;
	b.dev = kho_vfio_open(kho, "/dev/vfio/devices/0000:02:00.0", &err);
	must(b.dev, err, "open");
	must(kho_vfio_bind(kho, b.dev, b.ctx, &b.dev_id, &err), err, "bind");
	attach(&b);
	must_lease(&a, &lease);
	must_lease(&b, &lease);
	preserve(&o);
	must_event(&a, KHO_EVENT_PREPARE, &ev);
	cr_assert(kho_client_ready(a.k, &ev, &err) == -EOPNOTSUPP);
	kho_error_free(err);
	wait_for(&o);
	cr_assert(o.r == -ECANCELED && strstr(o.text, "vm-a: ") && strstr(o.text, "0000:02:00.0") &&
		  strstr(o.text, "is attached, and is not in the workload"), "%d %s", o.r, o.text);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	cr_assert(is_free(&a));
	devices_run(2);
	/* The other one goes, and the first is carried. */
	client_exit(&b);
	preserve(&o);
	must_be_ready(&a);
	wait_for(&o);
	cr_assert(o.r == 1, "%s", o.text);
	client_exit(&a);
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	devices_run(1);
	must_come_back("vm-a", a.seed);
	must_be_empty();
	must_stop(sim);
}

/* Preserved from the start, and asked all the same. */
Test(handover, a_held_workload_may_veto)
{
	struct kho_policy asked = { .prepare = true };
	struct client a, b;
	struct kho_event ev;
	struct operator o = {};

	two(&a, &b, &asked);
	cr_assert(state_of("vm-b") == KHO_WORKLOAD_HELD && !is_free(&b));
	preserve(&o);
	must_be_ready(&a);
	must_event(&b, KHO_EVENT_PREPARE, &ev);
	cr_assert(kho_client_veto(b.k, &ev, "later", NULL) == 0);
	wait_for(&o);
	cr_assert(o.r == -ECANCELED && strstr(o.text, "vm-b: vetoed: later"), "%s", o.text);
	must_event(&a, KHO_EVENT_ABORTED, &ev);
	must_event(&b, KHO_EVENT_ABORTED, &ev);
	/* It is held whether its client lives or not. */
	client_exit(&b);
	usleep(50000);
	cr_assert(state_of("vm-b") == KHO_WORKLOAD_HELD);
	preserve(&o);
	must_be_ready(&a);
	wait_for(&o);
	cr_assert(o.r == 2, "%s", o.text);
	client_exit(&a);
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	devices_run(2);
	must_come_back("vm-a", a.seed);
	must_come_back("vm-b", b.seed);
	must_stop(sim);
}

/* What belongs to a lease is replaced, all of it or nothing, and not while a handover is prepared. */
Test(handover, a_lease_is_updated_at_once)
{
	struct kho_policy hold = { .keep = KHO_KEEP_HOLD };
	struct kho_error *err = NULL;
	struct kho_claim *claim = NULL;
	struct kho_client *other;
	struct operator o = {};
	struct kho_event ev;
	struct client a;
	int more = make_memfd(SIZE, 99), p[2];

	must_start(sim);
	client_new(&a, "vm", "0000:01:00.0");
	{
		struct kho_client_file files[] = {
			{ "device", a.dev }, { "iommufd", a.ctx }, { "memory", a.memfd }, { "more", more },
		};
		struct kho_client_file bad[] = {
			{ "device", a.dev }, { "iommufd", a.ctx }, { "memory", a.memfd }, { "more", -1 },
		};

		cr_assert(pipe(p) == 0);
		bad[3].fd = p[0];
		a.k = dial(kho, sim);
		cr_assert(kho_client_update(a.k, "vm", files, 4, NULL, 0, &lease, NULL) == -ENOENT);
		must_lease(&a, &lease);
		other = dial(kho, sim);
		cr_assert(kho_client_update(other, "vm", files, 4, NULL, 0, &lease, NULL) == -ENOENT);
		kho_client_free(other);
		must(kho_iommufd_map_file(kho, a.ctx, a.ioas, more, 0, SIZE, IOVA + 16 * SIZE, 3, &err), err,
		     "map");
		preserve(&o);
		must_event(&a, KHO_EVENT_PREPARE, &ev);
		cr_assert(kho_client_update(a.k, "vm", files, 4, NULL, 0, &lease, &err) == -EBUSY);
		err = kho_error_free(err);
		cr_assert(kho_client_ready(a.k, &ev, NULL) == -EOPNOTSUPP);
		wait_for(&o);
		cr_assert(strstr(o.text, "iommufd: cannot be preserved"), "%s", o.text);
		must_event(&a, KHO_EVENT_ABORTED, &ev);

		must(kho_client_update(a.k, "vm", files, 4, NULL, 0, &lease, &err), err, "update");
		cr_assert(is_free(&a) && state_of("vm") == KHO_WORKLOAD_LEASED);
		cr_assert(kho_client_update(a.k, "vm", bad, 4, NULL, 0, &lease, &err) == -EMEDIUMTYPE &&
			  strcmp(kho_error_object(err), "more") == 0);
		err = kho_error_free(err);
		cr_assert(kho_client_update(a.k, "vm", files, 4, NULL, 0, &hold, NULL) == -EINVAL);
	}
	cr_assert(is_free(&a) && state_of("vm") == KHO_WORKLOAD_LEASED && sim_store_count(sim) == 1);
	preserve(&o);
	must_be_ready(&a);
	wait_for(&o);
	cr_assert(o.r == 1, "%s", o.text);
	client_exit(&a);
	close(more);
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	other = dial(kho, sim);
	must(kho_client_claim(other, "vm", NULL, 0, &claim, &err), err, "claim");
	cr_assert(kho_claim_n_files(claim) == 4 && check_memfd(kho_claim_fd(claim, 3), SIZE, 99));
	must(kho_client_claim_ack(other, claim, &err), err, "ack");
	kho_claim_free(claim);
	kho_client_free(other);
	close(p[0]);
	close(p[1]);
	must_stop(sim);
}

/* An update that fails half way: what was leased before is. */
Test(handover, an_update_that_fails_changes_nothing)
{
	struct kho_error *err = NULL;
	struct client a, b;

	two(&a, &b, &lease);
	{
		/* Seen when its own session has gone already. */
		struct kho_client_file files[] = {
			{ "memory", a.memfd }, { "theirs", b.memfd },
		};

		cr_assert(kho_client_update(a.k, "vm-a", files, 2, NULL, 0, &lease, &err) == -EBUSY &&
			  strstr(kho_error_message(err), "failure domain"), "%s", kho_error_message(err));
	}
	kho_error_free(err);
	must_go_on(&a, &b);
}

/* Claimed, and leased in one step: the next kexec takes it along, whoever comes when. */
static void leased_by_claim(unsigned int delay, uint32_t claim_sec)
{
	struct kho_policy policy = { .prepare_msec = 9000, .claim_sec = claim_sec };
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;
	struct operator o = {};
	struct client a, b, c = { .name = "vm-a" };
	size_t index = 0;

	two(&a, &b, &lease);
	preserve(&o);
	must_be_ready(&a);
	must_be_ready(&b);
	wait_for(&o);
	client_exit(&a);
	client_exit(&b);
	must_stop(sim);
	sim_kexec(sim);
	sim_set_preserve_delay(sim, delay);
	must_start(sim);
	c.k = dial(kho, sim);
	must(kho_client_claim(c.k, "vm-a", NULL, 0, &claim, &err), err, "claim");
	cr_assert(kho_client_claim_lease(c.k, claim, NULL, &err) == -EINVAL && err);
	err = kho_error_free(err);
	must(kho_client_claim_lease(c.k, claim, &policy, &err), err, "lease");
	cr_assert(state_of("vm-a") == KHO_WORKLOAD_LEASED);
	while (strcmp(kho_claim_name(claim, index), "iommufd") != 0)
		index++;
	c.ctx = kho_claim_fd(claim, index);
	for (index = 0; strcmp(kho_claim_name(claim, index), "memory") != 0; index++)
		;
	c.memfd = kho_claim_fd(claim, index);
	c.ioas = kho_claim_id(claim, "iommufd", a.ioas);
	cr_assert(is_free(&c), "%s", sim_log(sim));
	/* It has been claimed, and in time. */
	if (claim_sec)
		sleep(claim_sec + 1);
	preserve(&o);
	must_be_ready(&c);
	wait_for(&o);
	cr_assert(o.r == 2, "%d %s", o.r, o.text);
	if (claim_sec)
		sleep(1);
	cr_assert(!is_free(&c) && state_of("vm-a") == KHO_WORKLOAD_HELD, "%s", sim_log(sim));
	devices_run(2);
	c.k = kho_client_free(c.k);
	kho_claim_free(claim);
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	devices_run(2);
	c.k = dial(kho, sim);
	must(kho_client_claim(c.k, "vm-a", NULL, 0, &claim, &err), err, "claim");
	cr_assert(kho_claim_handovers(claim) == 2 && kho_claim_outcome(claim) == KHO_OUTCOME_RESTORED);
	/* And a lease that began so ends with its client as others do. */
	must(kho_client_claim_lease(c.k, claim, &policy, &err), err, "lease");
	c.k = kho_client_free(c.k);
	kho_claim_free(claim);
	for (int i = 0; i < 200 && state_of("vm-a"); i++)
		usleep(10000);
	cr_assert(state_of("vm-a") == 0);
	must_come_back_after("vm-b", b.seed, 2);
	must_be_empty();
	must_stop(sim);
}

Test(handover, a_claim_becomes_a_lease)
{
	leased_by_claim(0, 4);
	again();
	leased_by_claim(60, 0);
}

Test(handover, a_lease_ends_with_its_client)
{
	struct kho_client *c;
	struct client a, b;
	size_t fds;

	must_start(sim);
	kho_client_free(dial(kho, sim));
	usleep(50000);
	fds = sim_khod_fds(sim);
	must_stop(sim);
	two(&a, &b, &lease);
	client_exit(&a);
	usleep(50000);
	cr_assert(state_of("vm-a") == 0 && state_of("vm-b") == KHO_WORKLOAD_LEASED);
	/* And by release, which leaves the client its own. */
	c = dial(kho, sim);
	cr_assert(kho_client_release(c, "vm-b", NULL, 0, NULL) == 0);
	kho_client_free(c);
	cr_assert(is_free(&b));
	client_exit(&b);
	must_be_empty();
	devices_run(0);
	cr_assert(sim_khod_comes_to_fds(sim, fds), "%zu descriptors, then %zu", fds, sim_khod_fds(sim));
	must_stop(sim);
}

/*
 * One pass of everything, in which khod may be killed; the clients live on. Connections are made
 * before: systemd holds the socket of a khod that is dead, and nobody would answer.
 */
static void one_round(struct client *c, struct operator *o)
{
	struct kho_workloads *w = NULL;
	struct kho *own = NULL;
	struct kho_event ev;

	cr_assert(kho_new(&own, NULL, NULL) == 0);
	*o = (struct operator){ .c = dial(own, sim), .r = -ENOTCONN };
	c->k = dial(kho, sim);
	cr_assert(o->c && c->k);
	if (try_lease(c, &lease, NULL) == 0) {
		preserve(o);
		if (kho_client_event(c->k, 20000, &ev, NULL) == 0 && ev.kind == KHO_EVENT_PREPARE)
			(void)kho_client_ready(c->k, &ev, NULL);
		wait_for(o);
		if (o->r >= 0) {
			cr_assert(kho_client_show(o->c, "vm", &w, NULL, NULL) < 0 ||
				  kho_workloads_get(w, 0)->state == KHO_WORKLOAD_HELD,
				  "told that it is preserved, and it is not\n%s", sim_log(sim));
			kho_workloads_free(w);
			(void)kho_client_abort(o->c, NULL);
		}
	}
	o->c = kho_client_free(o->c);
	kho_free(own);
}

/* khod killed at each point of a lease, a handover and its abort: the client goes on. */
Test(handover, killed_at_every_point)
{
	static const char *const phases[] = { "register", "register-devices", "handover", "abort" };
	size_t kills = 0, points = 0;
	char name[64], in[64];
	FILE *f = fault_points();

	while (next_fault_point(f, name, in)) {
		char fault[80];
		bool killed = true, wanted = false;

		for (size_t i = 0; i < sizeof(phases) / sizeof(phases[0]); i++)
			wanted |= strcmp(in, phases[i]) == 0;
		if (!wanted)
			continue;
		points++;
		for (int n = 1; killed; n++) {
			struct client c;
			struct operator o = {};
			struct kho_client *k;
			struct kho_error *err = NULL;
			int state;

			cr_assert(n < 100);
			snprintf(fault, sizeof(fault), "%s:%d", name, n);
			sim_start(sim, fault, NULL);
			client_new(&c, "vm", "0000:01:00.0");
			one_round(&c, &o);
			killed = sim_killed(sim_stop(sim));
			kills += killed;
			cr_assert(killed || n > 1, "%s never fired", name);
			/* The next khod: nothing, or held because it had been committed. */
			must_start(sim);
			devices_run(1);
			state = state_of("vm");
			cr_assert(state == 0 || state == KHO_WORKLOAD_HELD, "%s: state %d\n%s", fault, state,
				  sim_log(sim));
			cr_assert(!(o.r == 1 && state == 0) || strncmp(name, "abort", 5) == 0 ||
				  strncmp(name, "register", 8) == 0 || !killed,
				  "%s: preserve was answered, and it is lost", fault);
			c.k = kho_client_free(c.k);
			if (state) {
				k = dial(kho, sim);
				must(kho_client_release(k, "vm", NULL, 0, &err), err, "release");
				kho_client_free(k);
			}
			cr_assert(is_free(&c), "%s", fault);
			must_lease(&c, &lease);
			preserve(&o);
			must_be_ready(&c);
			wait_for(&o);
			cr_assert(o.r == 1, "%s: %s", fault, o.text);
			client_exit(&c);
			must_stop(sim);
			sim_kexec(sim);
			must_start(sim);
			must_come_back("vm", c.seed);
			must_be_empty();
			must_stop(sim);
			again();
		}
	}
	cr_assert(pclose(f) == 0);
	fprintf(stderr, "lease, handover, abort: killed at %zu fault points, %zu times\n", points, kills);
	cr_assert(points > 14);
}

/* Every single kernel call of khod's from the lease to the abort fails once. */
Test(handover, fail_nth)
{
	int fired = 0;

	for (int n = 1;; n++) {
		struct operator o = {};
		struct client c;
		char fail[32];
		size_t fds;
		bool done;

		snprintf(fail, sizeof(fail), "%d:%d", n, n % 2 ? ENOMEM : EIO);
		sim_start(sim, NULL, fail);
		cr_assert(sim_ready(sim), "%s", sim_log(sim));
		client_new(&c, "vm", "0000:01:00.0");
		one_round(&c, &o);
		done = strstr(sim_log(sim), "sim: call ") == NULL;
		devices_run(1);
		if (state_of("vm") == KHO_WORKLOAD_LEASED)
			cr_assert(is_free(&c), "call %d: leased, and not free\n%s", n, sim_log(sim));
		c.k = kho_client_free(c.k);
		usleep(30000);
		fds = state_of("vm") == 0 ? sim_khod_fds_at_rest(sim) : 0;
		/* A new khod, for the look for the device at its start, too. */
		must_stop(sim);
		must_start(sim);
		cr_assert(state_of("vm") == 0, "call %d: the lease outlives its client\n%s", n, sim_log(sim));
		cr_assert(fds <= sim_khod_fds_at_rest(sim), "call %d: %zu descriptors, then %zu", n, fds,
			  sim_khod_fds(sim));
		cr_assert(is_free(&c), "call %d\n%s", n, sim_log(sim));
		must_lease(&c, &lease);
		preserve(&o);
		must_be_ready(&c);
		wait_for(&o);
		cr_assert(o.r == 1, "call %d: %s", n, o.text);
		abort_it();
		client_exit(&c);
		must_be_empty();
		must_stop(sim);
		again();
		if (done)
			break;
		fired++;
	}
	fprintf(stderr, "lease, handover, abort: %d calls failed one by one\n", fired);
	cr_assert(fired > 30);
}
