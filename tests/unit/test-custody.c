/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The real khod, in a process of its own, on a simulated kernel and a simulated PID 1
 * (sim.h): custody over kexecs, over SIGKILL at every fault point, with every single
 * kernel call failing once.
 */
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "common.h"

#define N_FILES 3

struct files {
	int fd[N_FILES];
	ino_t ino[N_FILES];
	char name[N_FILES][16];
};

static const size_t sizes[N_FILES] = { 5000, 0, 70000 };

static void files_make(struct files *f)
{
	for (int i = 0; i < N_FILES; i++) {
		f->fd[i] = make_memfd(sizes[i], 100 + i);
		f->ino[i] = ino_of(f->fd[i]);
		snprintf(f->name[i], sizeof(f->name[i]), "ram%d", i);
	}
}

static void files_close(struct files *f)
{
	for (int i = 0; i < N_FILES; i++)
		close(f->fd[i]);
}

static struct kho *kho;

static void setup(void)
{
	raise_limits();
	cr_assert(kho_new(&kho, NULL, NULL) == 0);
}

static void teardown(void)
{
	kho = kho_free(kho);
}

static int try_register(struct sim *s, const char *name, struct files *f, struct kho_error **err)
{
	struct kho_client_file cf[N_FILES];
	struct kho_client *c = dial(kho, s);
	int r;

	if (!c)
		return -ECONNREFUSED;
	for (int i = 0; i < N_FILES; i++)
		cf[i] = (struct kho_client_file){ f->name[i], f->fd[i] };
	r = kho_client_register(c, name, cf, N_FILES, NULL, 0, err);
	kho_client_free(c);
	return r;
}

static void must_register(struct sim *s, const char *name, struct files *f)
{
	struct kho_error *err = NULL;
	int r = try_register(s, name, f, &err);

	cr_assert(r == 0, "register %s: %s\n%s", name, kho_error_format(err, r), sim_log(s));
}

static bool claim_is(struct kho_claim *claim, struct files *f)
{
	bool ok = kho_claim_n_files(claim) == N_FILES;

	for (int i = 0; ok && i < N_FILES; i++)
		ok = ino_of(kho_claim_fd(claim, i)) == f->ino[i] &&
		     strcmp(kho_claim_name(claim, i), f->name[i]) == 0 &&
		     check_memfd(kho_claim_fd(claim, i), sizes[i], 100 + i);
	return ok;
}

/* Claim, compare, acknowledge. @acked: did khod say that custody ended? */
static int try_claim(struct sim *s, const char *name, struct files *f, bool *got, bool *acked,
		     struct kho_error **err)
{
	struct kho_client *c = dial(kho, s);
	struct kho_claim *claim = NULL;
	int r;

	*got = *acked = false;
	if (!c)
		return -ECONNREFUSED;
	r = kho_client_claim(c, name, NULL, 0, &claim, err);
	if (r == 0) {
		cr_assert(claim_is(claim, f), "what came back is not what went in");
		*got = true;
		r = kho_client_claim_ack(c, claim, err);
		*acked = r == 0;
	}
	kho_claim_free(claim);
	kho_client_free(c);
	return r;
}

static void must_claim(struct sim *s, const char *name, struct files *f)
{
	struct kho_error *err = NULL;
	bool got, acked;
	int r = try_claim(s, name, f, &got, &acked, &err);

	cr_assert(r == 0, "claim %s: %s\n%s", name, kho_error_format(err, r), sim_log(s));
}

/* 0: unknown; else its state. */
static int state_of(struct sim *s, const char *name)
{
	struct kho_workloads *w = NULL;
	struct kho_client *c = dial(kho, s);
	int r, state = 0;

	cr_assert(c);
	r = kho_client_show(c, name, &w, NULL, NULL);
	cr_assert(r == 0 || r == -ENOENT, "show: %d\n%s", r, sim_log(s));
	if (r == 0)
		state = kho_workloads_get(w, 0)->state;
	kho_workloads_free(w);
	kho_client_free(c);
	return state;
}

static void must_be_empty(struct sim *s)
{
	/* These wait until PID 1 has heard all that khod has said. */
	cr_assert(sim_sessions(s, false) == 0, "an outgoing session is left:\n%s", sim_log(s));
	cr_assert(sim_sessions(s, true) == 0, "an incoming session is left:\n%s", sim_log(s));
	cr_assert(sim_store_count(s) == 0, "%zu left in the fd store:\n%s", sim_store_count(s),
		  sim_log(s));
}

/* One workload, vm1, registered and taken over a kexec; khod is not started yet. */
static void must_carry(struct sim *s, struct files *f)
{
	files_make(f);
	must_start(s);
	must_register(s, "vm1", f);
	must_stop(s);
	sim_kexec(s);
}

/* It is given back, and that was all. */
static void must_end(struct sim *s, struct files *f)
{
	must_claim(s, "vm1", f);
	must_be_empty(s);
	must_stop(s);
	files_close(f);
	sim_free(s);
}

/* One outgoing session per workload, no memfd in the store. */
static void must_rest(struct sim *s, size_t workloads)
{
	cr_assert(sim_store_count(s) == workloads, "%zu in the fd store for %zu workloads:\n%s",
		  sim_store_count(s), workloads, sim_log(s));
	cr_assert(sim_store_memfds(s) == 0);
	cr_assert(sim_sessions(s, false) == workloads);
	cr_assert(sim_sessions(s, true) == 0);
}

/* Descriptors of a khod without clients; the first client makes the event loop open its own. */
static size_t idle_fds(struct sim *s)
{
	kho_client_free(dial(kho, s));
	usleep(50000);
	return sim_khod_fds(s);
}

TestSuite(custody, .init = setup, .fini = teardown, .timeout = 900);

Test(custody, register_claim_same_kernel)
{
	struct sim *s = sim_new(true);
	struct files f;
	size_t fds;

	files_make(&f);
	must_start(s);
	fds = idle_fds(s);
	must_register(s, "vm1", &f);
	must_rest(s, 1);
	cr_assert(state_of(s, "vm1") == KHO_WORKLOAD_HELD);
	must_claim(s, "vm1", &f);
	must_be_empty(s);
	cr_assert(state_of(s, "vm1") == 0);
	/* One more: the manifest stays. */
	fds++;
	cr_assert(sim_khod_comes_to_fds(s, fds), "khod leaks descriptors: %zu, then %zu", fds, idle_fds(s));
	must_stop(s);
	files_close(&f);
	sim_free(s);
}

Test(custody, restart_keeps)
{
	for (int patched = 0; patched < 2; patched++) {
		struct sim *s = sim_new(patched);
		struct kho_error *err = NULL;
		struct files f;
		bool got, acked;

		files_make(&f);
		must_start(s);
		must_register(s, "vm1", &f);
		must_stop(s);
		must_start(s);
		must_rest(s, 1);
		if (patched) {
			must_claim(s, "vm1", &f);
		} else {
			cr_assert(state_of(s, "vm1") == KHO_WORKLOAD_UNREADABLE);
			cr_assert(try_claim(s, "vm1", &f, &got, &acked, &err) == -EOPNOTSUPP);
			cr_assert(strstr(kho_error_message(err), "before the next kexec"));
			kho_error_free(err);
			must_stop(s);
			sim_kexec(s);
			must_start(s);
			must_claim(s, "vm1", &f);
		}
		must_be_empty(s);
		must_stop(s);
		files_close(&f);
		sim_free(s);
	}
}

Test(custody, many_kexecs_nobody_claims)
{
	for (int patched = 0; patched < 2; patched++) {
		struct sim *s = sim_new(patched);
		struct kho_workloads *w = NULL;
		struct kho_client *c;
		struct files f, g;

		files_make(&f);
		files_make(&g);
		must_start(s);
		must_register(s, "vm1", &f);
		must_register(s, "vm.two@x", &g);
		for (int i = 1; i <= 10; i++) {
			must_stop(s);
			sim_kexec(s);
			must_start(s);
			must_rest(s, 2);
			c = dial(kho, s);
			cr_assert(kho_client_show(c, "vm1", &w, NULL, NULL) == 0);
			cr_assert(kho_workloads_get(w, 0)->handovers == (uint32_t)i);
			w = kho_workloads_free(w);
			kho_client_free(c);
		}
		must_claim(s, "vm1", &f);
		must_claim(s, "vm.two@x", &g);
		must_be_empty(s);
		must_stop(s);
		files_close(&f);
		files_close(&g);
		sim_free(s);
	}
}

Test(custody, client_dies_before_ack)
{
	struct sim *s = sim_new(true);
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;
	struct kho_client *c;
	bool got, acked;
	struct files f;

	files_make(&f);
	must_start(s);
	must_register(s, "vm1", &f);
	c = dial(kho, s);
	cr_assert(kho_client_claim(c, "vm1", NULL, 0, &claim, NULL) == 0);
	cr_assert(state_of(s, "vm1") == KHO_WORKLOAD_CLAIMING);
	cr_assert(try_claim(s, "vm1", &f, &got, &acked, &err) == -EBUSY);
	err = kho_error_free(err);
	kho_claim_free(claim);
	kho_client_free(c);
	usleep(50000);
	cr_assert(state_of(s, "vm1") == KHO_WORKLOAD_HELD);
	must_end(s, &f);
}

Test(custody, refusals_name_object_and_reason)
{
	struct sim *s = sim_new(true);
	struct kho_error *err = NULL;
	struct kho_client_file cf[2];
	struct kho_client *c;
	struct files f, g;
	int p[2], fd;
	char *text;

	files_make(&f);
	files_make(&g);
	must_start(s);
	must_register(s, "vm1", &f);

	cr_assert(try_register(s, "vm1", &g, &err) == -EEXIST);
	cr_assert(strcmp(kho_error_object(err), "vm1") == 0);
	cr_assert(strstr(kho_error_message(err), "in use"));
	err = kho_error_free(err);

	cr_assert(try_register(s, "vm2", &f, &err) == -EBUSY);
	text = kho_error_format(err, 0);
	cr_assert(strstr(text, "ram0: ") && strstr(text, "it is 'ram0' of workload vm1"), "%s", text);
	free(text);
	err = kho_error_free(err);

	c = dial(kho, s);
	cr_assert(pipe2(p, O_CLOEXEC) == 0);
	cf[0] = (struct kho_client_file){ "pipe", p[0] };
	cr_assert(kho_client_register(c, "vm3", cf, 1, NULL, 0, &err) == -EMEDIUMTYPE);
	cr_assert(strcmp(kho_error_object(err), "pipe") == 0);
	cr_assert(strstr(kho_error_message(err), "a pipe; only memfds"));
	err = kho_error_free(err);

	fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	cf[0] = (struct kho_client_file){ "exe", fd };
	cr_assert(kho_client_register(c, "vm3", cf, 1, NULL, 0, &err) == -EMEDIUMTYPE);
	err = kho_error_free(err);
	close(fd);

	cf[0] = cf[1] = (struct kho_client_file){ "a", g.fd[0] };
	cf[1].name = "b";
	cr_assert(kho_client_register(c, "vm3", cf, 2, NULL, 0, &err) == -EINVAL);
	cr_assert(strstr(kho_error_message(err), "same memfd as 'a'"));
	err = kho_error_free(err);

#ifdef F_SEAL_EXEC
	fd = memfd_create("x", MFD_CLOEXEC | 0x0008U /* MFD_NOEXEC_SEAL */);
	if (fd >= 0) {
		cf[0] = (struct kho_client_file){ "noexec", fd };
		cr_assert(kho_client_register(c, "vm3", cf, 1, NULL, 0, &err) == -EOPNOTSUPP);
		cr_assert(strstr(kho_error_message(err), "MFD_EXEC"));
		err = kho_error_free(err);
		close(fd);
	}
#endif
	/* The connection is still good, and nothing is left of what was refused. */
	must_rest(s, 1);
	cr_assert(kho_client_release(c, "nobody", NULL, 0, &err) == -ENOENT);
	err = kho_error_free(err);
	cr_assert(kho_client_release(c, "vm1", NULL, 0, NULL) == 0);
	kho_client_free(c);
	must_be_empty(s);
	must_register(s, "vm2", &f);
	must_claim(s, "vm2", &f);
	must_stop(s);
	close(p[0]);
	close(p[1]);
	files_close(&f);
	files_close(&g);
	sim_free(s);
}

Test(custody, many_files_in_batches)
{
	enum { N = 300 };
	struct sim *s = sim_new(true);
	struct kho_client_file cf[N];
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;
	char names[N][16];
	struct kho_client *c;
	int fds[N], r;

	must_start(s);
	for (int i = 0; i < N; i++) {
		fds[i] = make_memfd(8, i);
		snprintf(names[i], sizeof(names[i]), "f%d", i);
		cf[i] = (struct kho_client_file){ names[i], fds[i] };
	}
	c = dial(kho, s);
	r = kho_client_register(c, "big", cf, N, NULL, 0, &err);
	cr_assert(r == 0, "%s", kho_error_format(err, r));
	kho_client_free(c);
	must_stop(s);
	sim_kexec(s);
	must_start(s);
	must_rest(s, 1);
	c = dial(kho, s);
	cr_assert(kho_client_claim(c, "big", NULL, 0, &claim, &err) == 0);
	cr_assert(kho_claim_n_files(claim) == N);
	for (int i = 0; i < N; i++) {
		cr_assert(strcmp(kho_claim_name(claim, i), names[i]) == 0);
		cr_assert(ino_of(kho_claim_fd(claim, i)) == ino_of(fds[i]));
	}
	cr_assert(kho_client_claim_ack(c, claim, &err) == 0);
	kho_claim_free(claim);
	kho_client_free(c);
	must_be_empty(s);
	for (int i = 0; i < N; i++)
		close(fds[i]);
	must_stop(s);
	sim_free(s);
}

Test(custody, fd_store_too_small)
{
	struct sim *s = sim_new(true);
	struct kho_error *err = NULL;
	struct files f;

	sim_set_fdstore_max(s, 5);
	files_make(&f);
	must_start(s);
	cr_assert(try_register(s, "vm1", &f, &err) == -ENOSPC);
	cr_assert(strstr(kho_error_message(err), "FileDescriptorStoreMax="));
	kho_error_free(err);
	must_be_empty(s);
	must_stop(s);
	files_close(&f);
	sim_free(s);
}

/* Of many workloads not all can be in transit at a time: one after the other finds its places. */
Test(custody, fd_store_with_places_for_one_in_transit)
{
	struct sim *s = sim_new(true);
	struct files f[4];
	char name[16];

	must_start(s);
	for (int i = 0; i < 4; i++) {
		files_make(&f[i]);
		snprintf(name, sizeof(name), "vm%d", i);
		must_register(s, name, &f[i]);
	}
	must_stop(s);
	/* What is in the store, and what two are not in transit with. */
	sim_set_fdstore_max(s, (unsigned int)sim_store_count(s) + 2 * (N_FILES + 2) - 1);
	for (int n = 0; n < 2; n++) {
		sim_kexec(s);
		must_start(s);
		must_rest(s, 4);
		must_stop(s);
	}
	must_start(s);
	for (int i = 0; i < 4; i++) {
		snprintf(name, sizeof(name), "vm%d", i);
		must_claim(s, name, &f[i]);
		files_close(&f[i]);
	}
	must_be_empty(s);
	must_stop(s);
	sim_free(s);
}

/* PID 1 closes what it takes out of its store a moment later: what is registered then has it still. */
Test(custody, closed_a_moment_later)
{
	struct sim *s = sim_new(true);
	struct kho_error *err = NULL;
	struct kho_client *c;
	struct files f;
	char *text;

	files_make(&f);
	sim_close_late(s, 300);
	must_start(s);
	for (int i = 0; i < 2; i++) {
		must_register(s, "vm1", &f);
		/* What somebody has is refused at once, though something is being closed. */
		cr_assert(try_register(s, "vm2", &f, &err) == -EBUSY);
		text = kho_error_format(err, 0);
		cr_assert(strstr(text, "of workload vm1"), "%s", text);
		free(text);
		err = kho_error_free(err);
		if (i == 0) {
			c = dial(kho, s);
			cr_assert(kho_client_release(c, "vm1", NULL, 0, NULL) == 0);
			kho_client_free(c);
		} else {
			must_claim(s, "vm1", &f);
		}
		/* What has been told is true: it is not preserved any more. */
		cr_assert(sim_preserved_now(s) == 0, "%zu", sim_preserved_now(s));
	}
	must_register(s, "vm1", &f);
	must_claim(s, "vm1", &f);
	files_close(&f);
	must_stop(s);
	sim_free(s);
}

/* A handler is missing when PID 1 asks, and khod has nothing of the workload; later it is there. */
Test(custody, a_session_that_pid_1_cannot_retrieve)
{
	struct sim *s = sim_new(true);
	struct kho_workloads *w = NULL;
	struct files f, g;
	struct kho_client *c;

	files_make(&f);
	files_make(&g);
	must_start(s);
	must_register(s, "vm1", &f);
	must_register(s, "vm2", &g);
	must_stop(s);
	sim_without_handler(s, "vm1");
	sim_kexec(s);
	for (int i = 0; i < 2; i++) {
		must_start(s);
		c = dial(kho, s);
		cr_assert(kho_client_show(c, "vm1", &w, NULL, NULL) == 0, "%s", sim_log(s));
		cr_assert(kho_workloads_get(w, 0)->state == KHO_WORKLOAD_FAILED);
		cr_assert(strstr(kho_workloads_get(w, 0)->reason, "the handler of a file in it is missing"),
			  "%s", kho_workloads_get(w, 0)->reason);
		w = kho_workloads_free(w);
		kho_client_free(c);
		cr_assert(state_of(s, "vm2") == KHO_WORKLOAD_HELD);
		must_stop(s);
	}
	sim_without_handler(s, NULL);
	must_start(s);
	cr_assert(state_of(s, "vm1") == KHO_WORKLOAD_HELD, "%s", sim_log(s));
	must_claim(s, "vm1", &f);
	/* What was let go in this kernel is not missed. */
	kill(sim_pid(s), SIGKILL);
	cr_assert(sim_killed(sim_wait(s)));
	must_start(s);
	cr_assert(state_of(s, "vm1") == 0);
	must_stop(s);
	sim_kexec(s);
	must_start(s);
	cr_assert(state_of(s, "vm1") == 0);
	must_claim(s, "vm2", &g);
	must_rest(s, 0);
	files_close(&f);
	files_close(&g);
	must_stop(s);
	sim_free(s);
}

/* Other users may connect, too. */
static void open_to_all(struct sim *s)
{
	cr_assert(chmod(sim_dir(s), 0755) == 0 && chmod(sim_socket(s), 0777) == 0);
}

/* In a process of user @uid. Return: what @fn returns, 0 to 100. */
static int as_user(uid_t uid, int (*fn)(struct sim *s, void *arg), struct sim *s, void *arg)
{
	pid_t pid = fork();
	int status;

	if (pid == 0)
		_exit(setresuid(uid, uid, uid) < 0 ? 101 : fn(s, arg));
	cr_assert(pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status));
	return WEXITSTATUS(status);
}

static int register_it(struct sim *s, void *arg)
{
	return try_register(s, "vm1", arg, NULL) == 0 ? 0 : 1;
}

static int release_as_own(struct sim *s, void *arg)
{
	struct kho_client *c = dial(kho, s);

	kho_client_set_owner(c, *(uid_t *)arg);
	return -kho_client_release(c, "vm1", NULL, 0, NULL);
}

Test(custody, root_says_whose_it_is)
{
	struct kho_error *err = NULL;
	struct kho_claim *claim = NULL;
	struct kho_client *c;
	struct files f;
	struct sim *s;
	uid_t owner = 60001;

	if (geteuid() != 0)
		cr_skip_test("only root can have processes of several users");
	s = sim_new(true);
	files_make(&f);
	must_start(s);
	open_to_all(s);
	cr_assert(as_user(owner, register_it, s, &f) == 0, "%s", sim_log(s));
	c = dial(kho, s);
	cr_assert(kho_client_claim(c, "vm1", NULL, 0, &claim, &err) == -EPERM);
	cr_assert(strstr(kho_error_message(err), "it belongs to uid 60001"), "%s", kho_error_message(err));
	err = kho_error_free(err);
	cr_assert(kho_client_release(c, "vm1", NULL, 0, NULL) == -EPERM);
	kho_client_set_owner(c, 60002);
	cr_assert(kho_client_claim(c, "vm1", NULL, 0, &claim, NULL) == -EPERM);
	cr_assert(kho_client_release(c, "vm1", NULL, 0, NULL) == -EPERM);
	/* Nobody else may say so. */
	cr_assert(as_user(60002, release_as_own, s, &owner) == EPERM);
	kho_client_set_owner(c, owner);
	cr_assert(kho_client_claim(c, "vm1", NULL, 0, &claim, &err) == 0, "%s", sim_log(s));
	cr_assert(kho_claim_uid(claim) == owner && claim_is(claim, &f));
	kho_claim_free(claim);
	kho_client_free(c);
	c = dial(kho, s);
	kho_client_set_owner(c, owner);
	cr_assert(kho_client_release(c, "vm1", NULL, 0, &err) == 0, "%s", sim_log(s));
	kho_client_free(c);
	must_rest(s, 0);
	files_close(&f);
	must_stop(s);
	sim_free(s);
}

enum { PER_USER = 16 };

/* As many connections as one user may have, until the pipe is closed. Return: the first error. */
static int connect_many(struct sim *s, void *arg)
{
	const int *p = arg;
	char byte = 0;
	int n = 0;

	/* Not to be left behind by a test that fails. */
	(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(p[0]);
	while (n < PER_USER && dial(kho, s))
		n++;
	byte = (char)n;
	(void)!write(p[1], &byte, 1);
	pause();	/* until it is killed */
	return 0;
}

Test(custody, places_are_kept_for_root)
{
	pid_t pids[40];
	size_t n = 0, users = 0;
	struct kho_client *c;
	struct sim *s;
	int p[2];
	char got = PER_USER;

	if (geteuid() != 0)
		cr_skip_test("only root can have processes of several users");
	s = sim_new(true);
	must_start(s);
	open_to_all(s);
	cr_assert(pipe2(p, O_CLOEXEC) == 0);
	while (got == PER_USER) {
		cr_assert(users < ARRAY_SIZE(pids), "there is no limit");
		pids[users] = fork();
		if (pids[users] == 0)
			_exit(setresuid(60000 + users, 60000 + users, 60000 + users) < 0 ? 101 :
			      connect_many(s, p));
		users++;
		cr_assert(read(p[0], &got, 1) == 1);
		n += (size_t)got;
	}
	cr_assert(n == 512 - 32, "%zu connections of %zu users", n, users);
	c = dial(kho, s);
	cr_assert(c, "root cannot connect any more\n%s", sim_log(s));
	kho_client_free(c);
	for (size_t i = 0; i < users; i++) {
		kill(pids[i], SIGKILL);
		waitpid(pids[i], NULL, 0);
	}
	must_stop(s);
	sim_free(s);
}

Test(custody, no_liveupdate)
{
	struct sim *s = sim_new(true);
	struct kho_error *err = NULL;
	struct kho_status *st = NULL;
	struct kho_client *c;
	struct files f;

	sim_set_absent(s, true);
	files_make(&f);
	must_start(s);
	cr_assert(strstr(sim_log(s), "liveupdate=on"));
	cr_assert(try_register(s, "vm1", &f, &err) == -EOPNOTSUPP);
	cr_assert(strstr(kho_error_message(err), "liveupdate=on"), "%s", kho_error_message(err));
	kho_error_free(err);
	c = dial(kho, s);
	cr_assert(kho_client_status(c, &st, NULL) == 0);
	cr_assert(!st->liveupdate && strstr(st->liveupdate_reason, "liveupdate=on"));
	kho_status_free(st);
	kho_client_free(c);
	must_stop(s);
	files_close(&f);
	sim_free(s);
}

/* Every fault point of a phase, with every N at which it fires. */
static size_t sweep(const char *phase, void (*one)(const char *fault, bool *killed, bool patched),
		    bool patched)
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
			one(fault, &killed, patched);
			kills += killed;
			cr_assert(killed || n > 1, "%s never fired", name);
		}
	}
	cr_assert(pclose(f) == 0);
	cr_assert(points > 0);
	fprintf(stderr, "%s (%s kernel): killed at %zu fault points, %zu times\n", phase,
		patched ? "patched" : "unpatched", points, kills);
	return kills;
}

/* What must hold whatever happened to an unanswered registration. */
static void settle_registration(struct sim *s, struct files *f, bool answered)
{
	int state = state_of(s, "vm1");

	if (answered)
		cr_assert(state != 0, "an answered registration was lost:\n%s", sim_log(s));
	if (state == 0) {
		must_be_empty(s);
		must_register(s, "vm1", f);
	}
	must_rest(s, 1);
	if (state_of(s, "vm1") == KHO_WORKLOAD_UNREADABLE) {
		must_stop(s);
		sim_kexec(s);
		must_start(s);
	}
	must_claim(s, "vm1", f);
	must_be_empty(s);
}

static void kill_in_register(const char *fault, bool *killed, bool patched)
{
	for (int kexec = 0; kexec < 2; kexec++) {
		struct sim *s = sim_new(patched);
		struct kho_error *err = NULL;
		struct files f;
		int r;

		files_make(&f);
		sim_start(s, fault, NULL);
		r = try_register(s, "vm1", &f, &err);
		kho_error_free(err);
		if (r < 0) {
			*killed = sim_killed(sim_wait(s));
			cr_assert(*killed, "%s: register failed but khod lives: %d", fault, r);
		} else {
			/* The answer may be out before the kill. */
			usleep(20000);
			*killed = sim_killed(sim_stop(s));
		}
		if (kexec)
			sim_kexec(s);
		must_start(s);
		settle_registration(s, &f, r == 0);
		must_stop(s);
		files_close(&f);
		sim_free(s);
	}
}

Test(custody, killed_in_register)
{
	sweep("register", kill_in_register, true);
	sweep("register", kill_in_register, false);
}

static void kill_in_start_outgoing(const char *fault, bool *killed, bool patched)
{
	struct sim *s = sim_new(patched);
	struct kho_error *err = NULL;
	struct files f, g;

	files_make(&f);
	files_make(&g);
	must_start(s);
	must_register(s, "held", &g);
	must_stop(s);
	sim_start(s, "register-file-preserved:2", NULL);
	cr_assert(try_register(s, "vm1", &f, &err) < 0);
	kho_error_free(err);
	cr_assert(sim_killed(sim_wait(s)));

	sim_start(s, fault, NULL);
	*killed = !sim_ready(s);
	if (*killed)
		cr_assert(sim_killed(sim_wait(s)));
	else
		must_stop(s);
	must_start(s);
	must_rest(s, 1);
	must_register(s, "vm1", &f);
	must_stop(s);
	sim_kexec(s);
	must_start(s);
	must_claim(s, "vm1", &f);
	must_claim(s, "held", &g);
	must_be_empty(s);
	must_stop(s);
	files_close(&f);
	files_close(&g);
	sim_free(s);
}

Test(custody, killed_in_start_outgoing)
{
	sweep("start-outgoing", kill_in_start_outgoing, true);
	sweep("start-outgoing", kill_in_start_outgoing, false);
}

/* @variant 0: restart; 1: killed at the same place again; 2: the kernel is replaced at once. */
static void kill_in_start_incoming_variant(const char *fault, bool *killed, bool patched,
					   int variant)
{
	struct sim *s = sim_new(patched);
	struct files f;
	bool in_time;

	must_carry(s, &f);
	sim_start(s, fault, NULL);
	*killed = !sim_ready(s);
	if (*killed)
		cr_assert(sim_killed(sim_wait(s)), "%s:\n%s", fault, sim_log(s));
	else
		must_stop(s);
	if (variant == 1) {
		sim_start(s, fault, NULL);
		if (!sim_ready(s))
			cr_assert(sim_killed(sim_wait(s)));
		else
			must_stop(s);
	}
	/* Before the incoming session is finished the kernel does not carry it: documented. */
	in_time = sim_sessions(s, true) == 0 || sim_store_count(s) == 0 ||
		  strstr(fault, "start-incoming-finished");
	if (variant == 2)
		sim_kexec(s);
	must_start(s);
	if (variant == 2 && !in_time) {
		int state = state_of(s, "vm1");

		cr_assert(state == 0 || state == KHO_WORKLOAD_FAILED || state == KHO_WORKLOAD_HELD,
			  "%s: state %d", fault, state);
	} else {
		if (state_of(s, "vm1") == KHO_WORKLOAD_UNREADABLE) {
			must_rest(s, 1);
			must_stop(s);
			sim_kexec(s);
			must_start(s);
		}
		cr_assert(state_of(s, "vm1") == KHO_WORKLOAD_HELD, "%s, variant %d:\n%s", fault,
			  variant, sim_log(s));
		must_rest(s, 1);
		must_claim(s, "vm1", &f);
		must_be_empty(s);
	}
	must_stop(s);
	files_close(&f);
	sim_free(s);
}

static void kill_in_start_incoming(const char *fault, bool *killed, bool patched)
{
	for (int variant = 0; variant < 3; variant++)
		kill_in_start_incoming_variant(fault, killed, patched, variant);
}

Test(custody, killed_in_start_incoming)
{
	sweep("start-incoming", kill_in_start_incoming, true);
	sweep("start-incoming", kill_in_start_incoming, false);
}

/* What was put off is done when khod is stopped, and it dies there; the next one goes on, and is stopped, too. */
static void kill_put_off(const char *fault, bool *killed, bool patched)
{
	struct sim *s = sim_new(patched);
	struct files f;

	must_carry(s, &f);
	sim_set_preserve_delay(s, 600);
	sim_start(s, fault, NULL);
	*killed = sim_killed(sim_ready(s) ? sim_stop(s) : sim_wait(s));
	must_start(s);
	must_stop(s);
	must_rest(s, 1);
	sim_kexec(s);
	must_start(s);
	must_end(s, &f);
}

Test(custody, killed_in_what_was_put_off)
{
	sweep("start-incoming", kill_put_off, true);
	sweep("start-incoming", kill_put_off, false);
}

/* What khod tells of when the memory of the first workload is preserved. */
static enum kho_memory memory_of_one(struct sim *s)
{
	struct kho_workloads *w = NULL;
	struct kho_client *c = dial(kho, s);
	enum kho_memory memory;

	cr_assert(c && kho_client_list(c, &w, NULL) == 0 && kho_workloads_n(w) > 0, "%s", sim_log(s));
	memory = kho_workloads_get(w, 0)->memory;
	kho_workloads_free(w);
	kho_client_free(c);
	return memory;
}

/* Is it as it came over, and not preserved again yet? */
static void must_be_put_off(struct sim *s, size_t workloads)
{
	cr_assert(memory_of_one(s) == KHO_MEMORY_SOON);
	cr_assert(sim_sessions(s, true) == workloads, "%zu incoming sessions:\n%s", sim_sessions(s, true),
		  sim_log(s));
	cr_assert(sim_sessions(s, false) == workloads);
	cr_assert(sim_store_memfds(s) == workloads * (N_FILES + 1), "%zu in transit:\n%s",
		  sim_store_memfds(s), sim_log(s));
}

/* Kexec upon kexec, each before khod comes to preserving again by itself. */
Test(custody, kexec_before_it_is_preserved_again)
{
	for (int patched = 0; patched < 2; patched++) {
		struct sim *s = sim_new(patched);
		struct files f, g;

		files_make(&f);
		files_make(&g);
		sim_set_preserve_delay(s, 600);
		must_start(s);
		must_register(s, "vm1", &f);
		must_register(s, "vm2", &g);
		must_stop(s);
		for (int i = 0; i < 4; i++) {
			sim_kexec(s);
			must_start(s);
			must_be_put_off(s, 2);
			if (i == 2) {
				kill(sim_pid(s), SIGKILL);
				cr_assert(sim_killed(sim_wait(s)));
				must_start(s);
				must_be_put_off(s, 2);
			}
			must_stop(s);
			must_rest(s, 2);
		}
		sim_kexec(s);
		must_start(s);
		must_claim(s, "vm1", &f);
		must_claim(s, "vm2", &g);
		must_be_empty(s);
		must_stop(s);
		files_close(&f);
		files_close(&g);
		sim_free(s);
	}
}

/* It is given back as it came, nothing else is touched, and can be registered again at once. */
Test(custody, claimed_before_it_is_preserved_again)
{
	for (int patched = 0; patched < 2; patched++) {
		struct sim *s = sim_new(patched);
		struct kho_client *c;
		struct files f, g, h;

		files_make(&f);
		files_make(&g);
		files_make(&h);
		must_start(s);
		must_register(s, "vm1", &f);
		must_register(s, "vm2", &g);
		must_register(s, "vm3", &h);
		must_stop(s);
		sim_kexec(s);
		sim_set_preserve_delay(s, 600);
		must_start(s);
		must_be_put_off(s, 3);
		must_claim(s, "vm1", &f);
		must_be_put_off(s, 2);
		must_register(s, "vm1", &f);
		c = dial(kho, s);
		cr_assert(kho_client_release(c, "vm3", NULL, 0, NULL) == 0);
		kho_client_free(c);
		must_stop(s);
		must_rest(s, 2);
		sim_kexec(s);
		must_start(s);
		/* Its client goes without a word: as if it had not been there. */
		c = dial(kho, s);
		{
			struct kho_claim *claim = NULL;

			cr_assert(kho_client_claim(c, "vm2", NULL, 0, &claim, NULL) == 0);
			kho_claim_free(claim);
		}
		kho_client_free(c);
		must_claim(s, "vm1", &f);
		must_claim(s, "vm2", &g);
		must_be_empty(s);
		must_stop(s);
		files_close(&f);
		files_close(&g);
		files_close(&h);
		sim_free(s);
	}
}

/* By khod itself, when the time has come, or at once by a khod that is started later. */
Test(custody, preserved_again_in_time)
{
	struct sim *s = sim_new(true);
	struct files f;

	files_make(&f);
	must_start(s);
	must_register(s, "vm1", &f);
	must_stop(s);
	for (int i = 0; i < 2; i++) {
		sim_kexec(s);
		sim_set_preserve_delay(s, 3);
		must_start(s);
		for (int n = 0; n < 1000 && sim_store_memfds(s) > 0; n++)
			usleep(10000);
		must_rest(s, 1);
		cr_assert(memory_of_one(s) == KHO_MEMORY_PRESERVED);
		must_stop(s);
	}
	sim_kexec(s);
	must_start(s);
	must_end(s, &f);
}

static void kill_in_claim(const char *fault, bool *killed, bool patched)
{
	/* In the same kernel, in the next one, there before it has been preserved again. */
	for (int kexec = 0; kexec < 3; kexec++) {
		struct sim *s = sim_new(patched);
		struct kho_error *err = NULL;
		bool got, acked;
		struct files f;
		int state;

		files_make(&f);
		must_start(s);
		must_register(s, "vm1", &f);
		must_stop(s);
		if (kexec || !patched)
			sim_kexec(s);
		if (kexec == 2)
			sim_set_preserve_delay(s, 600);
		sim_start(s, fault, NULL);
		(void)try_claim(s, "vm1", &f, &got, &acked, &err);
		kho_error_free(err);
		usleep(20000);
		*killed = sim_killed(sim_stop(s));
		must_start(s);
		state = state_of(s, "vm1");
		cr_assert(got || state != 0, "%s: lost:\n%s", fault, sim_log(s));
		if (acked)
			cr_assert(state == 0, "%s: acknowledged, but still held", fault);
		if (state == KHO_WORKLOAD_UNREADABLE) {
			must_stop(s);
			sim_kexec(s);
			must_start(s);
		}
		if (state != 0)
			must_claim(s, "vm1", &f);
		must_be_empty(s);
		must_register(s, "vm1", &f);
		must_stop(s);
		files_close(&f);
		sim_free(s);
	}
}

Test(custody, killed_in_claim)
{
	sweep("claim", kill_in_claim, true);
	sweep("claim", kill_in_claim, false);
}

static void kill_in_release(const char *fault, bool *killed, bool patched)
{
	struct sim *s = sim_new(patched);
	struct kho_client *c;
	struct files f;
	int r;

	files_make(&f);
	sim_start(s, fault, NULL);
	must_register(s, "vm1", &f);
	c = dial(kho, s);
	r = kho_client_release(c, "vm1", NULL, 0, NULL);
	kho_client_free(c);
	usleep(20000);
	*killed = sim_killed(sim_stop(s));
	must_start(s);
	if (r == 0 || state_of(s, "vm1") == 0)
		must_be_empty(s);
	else
		must_rest(s, 1);
	if (state_of(s, "vm1") != 0) {
		c = dial(kho, s);
		cr_assert(kho_client_release(c, "vm1", NULL, 0, NULL) == 0);
		kho_client_free(c);
	}
	must_be_empty(s);
	must_register(s, "vm1", &f);
	must_stop(s);
	files_close(&f);
	sim_free(s);
}

Test(custody, killed_in_release)
{
	sweep("release", kill_in_release, true);
	sweep("release", kill_in_release, false);
}

static bool injection_fired(struct sim *s)
{
	return strstr(sim_log(s), "sim: call ") != NULL;
}

/* Every single kernel call during a registration and a claim fails once. */
Test(custody, fail_nth_register_claim)
{
	int fired = 0;

	for (int n = 1;; n++) {
		struct sim *s = sim_new(true);
		struct kho_error *err = NULL;
		bool got, acked, done;
		struct files f;
		char fail[32];
		size_t fds;
		int r;

		files_make(&f);
		snprintf(fail, sizeof(fail), "%d:%d", n, n % 2 ? ENOMEM : EIO);
		sim_start(s, NULL, fail);
		cr_assert(sim_ready(s), "%s", sim_log(s));
		fds = idle_fds(s);
		r = try_register(s, "vm1", &f, &err);
		err = kho_error_free(err);
		if (r < 0) {
			must_be_empty(s);
			if (r == -EOPNOTSUPP) {
				/* It was the look for the device at start. */
				must_stop(s);
				must_start(s);
				fds = idle_fds(s);
			}
			must_register(s, "vm1", &f);
		}
		r = try_claim(s, "vm1", &f, &got, &acked, &err);
		err = kho_error_free(err);
		if (r < 0)
			must_claim(s, "vm1", &f);
		must_be_empty(s);
		fds++;	/* the manifest stays */
		cr_assert(sim_khod_comes_to_fds(s, fds), "call %d: %zu descriptors, then %zu", n, fds,
			  idle_fds(s));
		done = !injection_fired(s);
		must_stop(s);
		files_close(&f);
		sim_free(s);
		if (done)
			break;
		fired++;
	}
	fprintf(stderr, "register, claim: %d calls failed one by one\n", fired);
	cr_assert(fired > 15);
}

/* Every single kernel call after a kexec fails once. */
Test(custody, fail_nth_start_incoming)
{
	for (int patched = 0; patched < 2; patched++) {
		int fired = 0;

		for (int n = 1;; n++) {
			struct sim *s = sim_new(patched);
			struct files f;
			char fail[32];
			size_t fds, clean;
			bool done;
			int state;

			files_make(&f);
			must_start(s);
			must_register(s, "vm1", &f);
			must_stop(s);
			sim_kexec(s);
			snprintf(fail, sizeof(fail), "%d:%d", n, n % 2 ? ENOMEM : EIO);
			sim_start(s, NULL, fail);
			cr_assert(sim_ready(s), "%s", sim_log(s));
			done = !injection_fired(s);
			state = state_of(s, "vm1");
			fds = sim_khod_fds_at_rest(s);
			must_stop(s);
			/* A failed workload comes right at the next start: nothing was discarded. */
			must_start(s);
			if (state_of(s, "vm1") == KHO_WORKLOAD_UNREADABLE) {
				must_stop(s);
				sim_kexec(s);
				must_start(s);
			}
			cr_assert(state_of(s, "vm1") == KHO_WORKLOAD_HELD, "call %d, state %d:\n%s", n,
				  state, sim_log(s));
			/* Or those of the files, of a kernel that did not say whether it gives them back. */
			clean = sim_khod_fds_at_rest(s);
			cr_assert(state != KHO_WORKLOAD_HELD || fds <= clean || fds == clean + N_FILES,
				  "call %d: %zu descriptors, then %zu", n, fds, clean);
			must_rest(s, 1);
			must_claim(s, "vm1", &f);
			must_be_empty(s);
			must_stop(s);
			files_close(&f);
			sim_free(s);
			if (done)
				break;
			fired++;
		}
		fprintf(stderr, "start after kexec (%s kernel): %d calls failed one by one\n",
			patched ? "patched" : "unpatched", fired);
		cr_assert(fired > 20);
	}
}
