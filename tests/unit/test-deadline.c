/* SPDX-License-Identifier: GPL-2.0-or-later */
/* From when on the time of a claim counts: khod's own arithmetic, without a kernel. */
#include "../../daemon/khod.h"
#include "common.h"

#define BOOT "00000000000000000000000000000001"
#define SEC UINT64_C(1000000)
#define LIMIT 100

static struct khod k;
static struct workload w;
static struct kho_timeline_bank *bank;

static void setup(void)
{
	struct kho_image_file file = { .name = "ram", .kind = KHO_FILE_MEMFD, .token = 1, .size = 4096 };

	bank = calloc(1, sizeof(*bank));
	k = (struct khod){ .timeline.bank = bank };
	strcpy(k.boot_id, BOOT);
	w = (struct workload){ .name = "vm", .session = -1, .state = WORKLOAD_HELD };
	cr_assert(kho_image_new(&w.image, "vm", 0, "", NULL) == 0);
	cr_assert(kho_image_add_file(w.image, &file, NULL) == 0);
	/* It is to be freed, so that there is something to wait for. */
	kho_image_set_policy(w.image, KHO_SURVIVAL_MUST, KHO_RESTORE_FAILURE_RELEASE);
	kho_image_set_claim_sec(w.image, LIMIT);
}

static void teardown(void)
{
	kho_image_free(w.image);
	free(bank);
}

TestSuite(deadline, .init = setup, .fini = teardown, .timeout = 60);

static void arrived_ago(unsigned int sec)
{
	cr_assert(kho_image_set_arrived(w.image, BOOT, boottime_usec() - sec * SEC, NULL) == 0);
}

static void ready_ago(unsigned int sec)
{
	bank->n = 1;
	bank->marks[0] = (struct kho_timeline_mark){
		.what = KHO_MARK_READY, .at.monotonic = (monotonic_usec() - sec * SEC) * 1000,
	};
}

static void must_be_left(unsigned int sec)
{
	uint64_t left = deadline_left(&k, &w);

	cr_assert(left <= sec * SEC && left + 5 * SEC > sec * SEC, "%f s, not %u", (double)left / SEC, sec);
}

/* Others took longer, and nobody could claim it before. */
Test(deadline, counts_from_ready_if_that_is_later)
{
	arrived_ago(25);
	ready_ago(5);
	must_be_left(LIMIT - 5);
}

/* A khod that is started again, and brings one that failed into order then. */
Test(deadline, counts_from_the_arrival_if_that_is_later)
{
	arrived_ago(5);
	ready_ago(25);
	must_be_left(LIMIT - 5);
	kho_image_set_claim_sec(w.image, 10);
	must_be_left(10 - 5);
	arrived_ago(15);
	cr_assert(deadline_left(&k, &w) == 0);
}

/* Without READY no time would be known to count from; what has not arrived waits for nobody. */
Test(deadline, without_the_one_or_the_other)
{
	arrived_ago(25);
	must_be_left(LIMIT - 25);
	ready_ago(5);
	strcpy(k.boot_id, "00000000000000000000000000000002");
	cr_assert(deadline_left(&k, &w) == UINT64_MAX);
}

/* Only what is held, or about to be taken, is waited for; and only if there is something to end. */
Test(deadline, of_whom)
{
	arrived_ago(5);
	ready_ago(5);
	w.state = WORKLOAD_CLAIMING;
	must_be_left(LIMIT - 5);
	w.state = WORKLOAD_FAILED;
	cr_assert(deadline_left(&k, &w) == UINT64_MAX);
	w.state = WORKLOAD_HELD;
	kho_image_set_policy(w.image, KHO_SURVIVAL_MUST, KHO_RESTORE_FAILURE_QUIESCE);
	cr_assert(deadline_left(&k, &w) == UINT64_MAX);
}
