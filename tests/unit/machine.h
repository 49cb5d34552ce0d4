/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A simulated machine with devices for each test, and a connection to its kernel. */
#ifndef TEST_MACHINE_H
#define TEST_MACHINE_H

#include "common.h"
#include "sim-devices.h"

static struct kho *kho;
static struct sim *sim;

static inline void must(int r, struct kho_error *err, const char *what)
{
	cr_assert(r >= 0, "%s: %s\n%s", what, err ? kho_error_format(err, r) : strerror(-r),
		  sim_log(sim));
}

static inline void setup(void)
{
	raise_limits();
	sim = sim_new(true);
	setenv("KHO_SIM", sim_dir(sim), 1);
	cr_assert(kho_new(&kho, sim_ops(), NULL) == 0);
	sim_fail(0, 0);
}

static inline void teardown(void)
{
	kho = kho_free(kho);
	sim_free(sim);
	sim = NULL;
}

static inline void again(void)
{
	teardown();
	setup();
}

#endif
