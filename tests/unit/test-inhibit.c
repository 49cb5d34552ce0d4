/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A kexec that is asked of logind, on the simulated machine: refused as long as something would be
 * lost by it, also by a khod that was killed in the middle, and let go when all is well.
 */
#include <signal.h>

#include "machine.h"
#include "sim-logind.h"

#define SIZE 65536

static struct logind *logind;

static void setup_logind(void)
{
	setup();
	logind = logind_new(sim_dir(sim));
}

static void teardown_logind(void)
{
	logind_free(logind);
	teardown();
}

TestSuite(inhibit, .init = setup_logind, .fini = teardown_logind, .timeout = 300);

/* What the kernel says of the loaded image. */
static void image_is(const char *word)
{
	char path[128];
	FILE *f;

	snprintf(path, sizeof(path), "%s/kho_image", sim_dir(sim));
	f = fopen(path, "we");
	cr_assert(f && fprintf(f, "%s\n", word) > 0 && fclose(f) == 0);
}

static void must_come_to(const char *mode, size_t n)
{
	cr_assert(logind_comes_to(logind, mode, n), "%zu locks of mode %s, not %zu\n%s",
		  logind_locks(logind, mode), mode, n, sim_log(sim));
}

static void must_be_for(const char *word)
{
	for (int i = 0; i < 2000 && !strstr(logind_why(logind, "block"), word); i++)
		usleep(10000);
	cr_assert(strstr(logind_why(logind, "block"), word), "'%s' is not in: %s", word,
		  logind_why(logind, "block"));
	must_come_to("block", 1);
}

static void must_unmask(void)
{
	for (int i = 0; i < 2000 && logind_masked(logind); i++)
		usleep(10000);
	cr_assert(!logind_masked(logind), "%s", sim_log(sim));
}

/* A workload of one memfd; a lease keeps its connection. */
static struct kho_client *take(const char *name, enum kho_keep keep, int memfd)
{
	struct kho_policy policy = { .keep = keep };
	struct kho_client_file file = { "memory", memfd };
	struct kho_client *c = dial(kho, sim);
	struct kho_error *err = NULL;

	cr_assert(c, "%s", sim_log(sim));
	must(kho_client_register_policy(c, name, &file, 1, NULL, 0, &policy, &err), err, "register");
	return keep == KHO_KEEP_LEASE ? c : kho_client_free(c);
}

static void hold(const char *name)
{
	int memfd = make_memfd(SIZE, 3);

	take(name, KHO_KEEP_HOLD, memfd);
	close(memfd);
}

static void discard(const char *name)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_error *err = NULL;

	must(kho_client_release(c, name, NULL, 0, &err), err, "release");
	kho_client_free(c);
}

static void must_hold(const char *name, unsigned int seed)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;

	must(kho_client_claim(c, name, NULL, 0, &claim, &err), err, "claim");
	cr_assert(kho_claim_n_files(claim) == 1 && check_memfd(kho_claim_fd(claim, 0), SIZE, seed));
	must(kho_client_claim_ack(c, claim, &err), err, "ack");
	kho_claim_free(claim);
	kho_client_free(c);
}

/* The kernel that is loaded, and only if there is something to lose. */
Test(inhibit, an_image_that_would_not_take_over_is_refused)
{
	must_start(sim);
	hold("mem");
	must_come_to("delay", 1);
	cr_assert(logind_locks(logind, "block") == 0);
	image_is("liveupdate-off");
	must_be_for("lacks liveupdate=on");
	/* Another reason: whoever asks is told that one, and there is always a lock. */
	image_is("kho-off");
	must_be_for("says kho=off");
	image_is("ok");
	must_come_to("block", 0);
	image_is("no-devices");
	register_device("vm", "0000:09:00.0");
	must_be_for("knows nothing of devices");
	discard("vm");
	must_come_to("block", 0);
	image_is("no-data");
	must_be_for("kexec_file_load");
	discard("mem");
	must_come_to("block", 0);
	must_come_to("delay", 0);
	hold("mem");
	must_come_to("block", 1);
	image_is("none");
	must_come_to("block", 0);
	must_stop(sim);
	must_come_to("delay", 0);
}

/* In the time in which it waits: what khod refused is forgotten, and the next one is announced to it. */
Test(inhibit, logind_is_started_again)
{
	must_start(sim);
	hold("mem");
	must_come_to("delay", 1);
	image_is("no-data");
	logind_announce(logind, "kexec");
	must_come_to("delay", 0);
	cr_assert(logind_masked(logind), "%s", sim_log(sim));
	logind_restart(logind);
	must_unmask();
	must_come_to("delay", 1);
	image_is("ok");
	must_come_to("block", 0);
	logind_announce(logind, "kexec");
	cr_assert(logind_proceed(logind) == 1, "%s", sim_log(sim));
	must_stop(sim);
}

/* systemctl loads a kernel itself, just before it asks logind. */
Test(inhibit, an_image_is_looked_at_when_a_kexec_is_announced)
{
	must_start(sim);
	hold("mem");
	must_come_to("delay", 1);
	image_is("no-data");
	logind_announce(logind, "kexec");
	cr_assert(logind_proceed(logind) == 0, "%s", sim_log(sim));
	cr_assert(strstr(sim_log(sim), "The loaded kernel would not take over what is held"), "%s",
		  sim_log(sim));
	must_unmask();
	must_come_to("delay", 1);
	/* Another kind of shutdown is nobody's business. */
	logind_announce(logind, "reboot");
	cr_assert(logind_proceed(logind) == 1, "%s", sim_log(sim));
	must_stop(sim);
	must_start(sim);
	image_is("ok");
	logind_announce(logind, "kexec");
	cr_assert(logind_proceed(logind) == 1, "%s", sim_log(sim));
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	must_hold("mem", 3);
	must_stop(sim);
}

static void kill_khod(void)
{
	kill(sim_pid(sim), SIGKILL);
	cr_assert(sim_killed(sim_wait(sim)));
}

static int times(const char *text, const char *words)
{
	int n = 0;

	for (; (text = strstr(text, words)); text++)
		n++;
	return n;
}

/* So often: logind may have given out a lock that khod has not got yet. */
static void must_have_refused(int n)
{
	for (int i = 0; i < 2000 && times(sim_log(sim), "A kexec is refused.") < n; i++)
		usleep(10000);
	cr_assert(times(sim_log(sim), "A kexec is refused.") >= n, "not %d\n%s", n, sim_log(sim));
}

/* It failed in the last handover; the lock outlives khod, but not its ordered end. */
Test(inhibit, a_refusal_outlives_khod)
{
	must_start(sim);
	hold("mem");
	must_stop(sim);
	sim_kexec(sim);
	sim_lose(sim, 1);
	for (int i = 0; i < 3; i++) {
		must_start(sim);
		must_be_for("Workload mem would be lost");
		must_have_refused(i + 1);
		kill_khod();
		cr_assert(logind_locks(logind, "block") == 1, "start %d", i);
	}
	must_start(sim);
	must_come_to("block", 1);
	must_stop(sim);
	must_come_to("block", 0);
	must_start(sim);
	must_come_to("block", 1);
	discard("mem");
	must_come_to("block", 0);
	must_stop(sim);
}

/*
 * khod dies at @fault, or, with NULL, while its client takes its time; logind waits all the same,
 * until the next khod has refused the kexec. Nothing is lost, and the next one is carried.
 */
static void killed(const char *fault)
{
	int memfd = make_memfd(SIZE, 9);
	struct kho_error *err = NULL;
	struct kho_event ev = {};
	struct kho_client *c;

	sim_start(sim, fault, NULL);
	cr_assert(sim_ready(sim), "%s", sim_log(sim));
	c = take("vm", KHO_KEEP_LEASE, memfd);
	must_come_to("delay", 1);
	logind_announce(logind, "kexec");
	if (kho_client_event(c, 20000, &ev, NULL) == 0 && ev.kind == KHO_EVENT_PREPARE && fault)
		(void)kho_client_ready(c, &ev, NULL);
	/* Before the client ends, which khod would answer by giving the handover up. */
	if (!fault)
		kill_khod();
	kho_client_free(c);
	if (fault)
		cr_assert(sim_killed(sim_wait(sim)), "%s never fired\n%s", fault, sim_log(sim));
	cr_assert(logind_locks(logind, "delay") == 1, "%s: the lock has gone with khod", fault);
	must_start(sim);
	cr_assert(logind_proceed(logind) == 0, "%s\n%s", fault, sim_log(sim));
	cr_assert(strstr(sim_log(sim), "khod has died since"), "%s", sim_log(sim));
	must_unmask();
	c = dial(kho, sim);
	(void)kho_client_release(c, "vm", NULL, 0, NULL);
	kho_client_free(c);
	c = take("vm", KHO_KEEP_LEASE, memfd);
	close(memfd);
	must_come_to("delay", 1);
	logind_announce(logind, "kexec");
	must(kho_client_event(c, 20000, &ev, &err), err, "event");
	must(kho_client_ready(c, &ev, &err), err, "ready");
	kho_client_free(c);
	cr_assert(logind_proceed(logind) == 1, "%s", sim_log(sim));
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	must_hold("vm", 9);
	must_stop(sim);
}

Test(inhibit, khod_killed_while_logind_waits)
{
	static const char *const faults[] = {
		NULL, "handover-asked", "handover-ready", "handover-preserved", "handover-done",
	};

	for (size_t i = 0; i < ARRAY_SIZE(faults); i++) {
		if (i > 0) {
			teardown_logind();
			setup_logind();
		}
		killed(faults[i]);
	}
}

/* Nobody is kept waiting by a lock of a khod that died, if it is no kexec. */
Test(inhibit, khod_killed_before_a_reboot)
{
	must_start(sim);
	hold("mem");
	must_come_to("delay", 1);
	kill_khod();
	logind_announce(logind, "reboot");
	must_start(sim);
	cr_assert(logind_proceed(logind) == 1, "%s", sim_log(sim));
	must_stop(sim);
}

/*
 * What came over a kexec, when the next one is announced before khod has preserved it again.
 * Return: false: it has failed before, so that logind refuses the kexec.
 */
static bool comes_early(const char *fail)
{
	must_start(sim);
	hold("mem");
	must_stop(sim);
	sim_kexec(sim);
	sim_set_preserve_delay(sim, 600);
	sim_start(sim, NULL, fail);
	cr_assert(sim_ready(sim), "%s", sim_log(sim));
	for (int i = 0; i < 2000 && !logind_locks(logind, "delay"); i++) {
		if (logind_locks(logind, "block") > 0)
			return false;
		usleep(10000);
	}
	must_come_to("delay", 1);
	logind_announce(logind, "kexec");
	return true;
}

Test(inhibit, a_kexec_that_comes_early_is_granted)
{
	cr_assert(comes_early(NULL), "%s", sim_log(sim));
	cr_assert(logind_proceed(logind) == 1, "%s", sim_log(sim));
	/* What would be done when khod is stopped has been done. */
	kill_khod();
	cr_assert(sim_store_memfds(sim) == 0 && sim_sessions(sim, true) == 0);
	sim_kexec(sim);
	must_start(sim);
	must_hold("mem", 3);
	must_stop(sim);
}

/* Whatever fails on the way: it goes on and all is carried, or it is refused and all is here. */
Test(inhibit, a_kexec_that_comes_early_is_refused)
{
	int failed = 0, refused = 0, granted = 0;

	for (int n = 1;; n++) {
		char fail[32];
		bool fired;

		snprintf(fail, sizeof(fail), "%d:%d", n, EIO);
		if (!comes_early(fail)) {
			failed++;
			must_stop(sim);
		} else if (logind_proceed(logind) == 1) {
			granted++;
			must_stop(sim);
			sim_kexec(sim);
		} else {
			refused++;
			cr_assert(strstr(sim_log(sim), "Workload mem could not be brought into order"), "%s",
				  sim_log(sim));
			must_unmask();
			kill_khod();
		}
		fired = strstr(sim_log(sim), "sim: call ") != NULL;
		must_start(sim);
		must_hold("mem", 3);
		must_stop(sim);
		if (!fired)
			break;
		teardown_logind();
		setup_logind();
	}
	fprintf(stderr, "early kexec: %d failed before, %d refused, %d granted\n", failed, refused, granted);
	cr_assert(failed > 2 && refused > 2 && granted > 2);
}
