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

/* A workload of that name, with memory, a context and the device @at, all of its own. */
static inline void register_device(const char *name, const char *at)
{
	struct kho_error *err = NULL;
	struct kho_client *c = dial(kho, sim);
	char path[64];
	uint32_t ioas, id;
	int memfd = make_memfd(4096, 50), ctx = kho_iommufd_open(kho, NULL), dev;
	struct kho_client_file files[] = { { "ram", memfd }, { "iommufd", ctx }, { "nic", -1 } };

	snprintf(path, sizeof(path), "/dev/vfio/devices/%s", at);
	files[2].fd = dev = kho_vfio_open(kho, path, NULL);
	must(kho_iommufd_ioas_alloc(kho, ctx, &ioas, &err), err, "ioas");
	must(kho_iommufd_map_file(kho, ctx, ioas, memfd, 0, 4096, 0, 3, &err), err, "map");
	must(kho_vfio_bind(kho, dev, ctx, &id, &err), err, "bind");
	must(kho_vfio_attach(kho, dev, &ioas, false, &err), err, "attach");
	must(kho_client_register(c, name, files, 3, NULL, 0, &err), err, "register");
	kho_client_free(c);
	close(memfd);
	close(ctx);
	close(dev);
}

#endif
