/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How long it takes to restore a context after a kexec, beside setting up the same mappings
 * cold. For lablib/bench_restore.py, in a guest without systemd.
 *
 *	restore-bench old AREAS DEVICE		map, attach, preserve, and wait for the kexec
 *	restore-bench new ORDER OTHER		restore, and set up cold for another device; ORDER:
 *						restore or cold, which comes first
 *
 * Both are the same: an IOAS, AREAS mappings of one memfd of 400 MiB that cannot be merged, an
 * HWPT, a device under it. Restored is what khod restores, by the same functions: the context is
 * read, the steps are planned and done, the frozen HWPT is destroyed. What either needs before,
 * descriptors and a bound device, is not counted: it does not depend on the mappings.
 *
 * Prints a line when each of the two begins, and when it ends one with the seconds of each step.
 * A restore begins for that when the device is bound. Reading the context comes before, and costs
 * some ten thousand instructions, however many areas there were: they are not in it yet.
 */
#include <errno.h>
#include <inttypes.h>
#include <kho/kho.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define SESSION "restore-bench"
#define MEM_SIZE (UINT64_C(400) << 20)
#define PAGE UINT64_C(4096)
#define IOVA UINT64_C(0x100000000)

enum { TOKEN_IMAGE = 1, TOKEN_MEM, TOKEN_CTX, TOKEN_DEV };

static struct kho *kho;
static struct kho_error *err;

/* What is measured by itself; cold set-up does the three in the middle. */
enum { READ, MAP, TABLE, ATTACH, DESTROY, N_PARTS };
static const char *const part_names[] = { "read", "map", "table", "attach", "destroy" };

static double parts[N_PARTS], lap_began;

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static void laps_begin(void)
{
	memset(parts, 0, sizeof(parts));
	lap_began = now();
}

/* What has passed since the last lap belongs to @part. */
static void lap(int part)
{
	double t = now();

	parts[part] += t - lap_began;
	lap_began = t;
}

static void laps_print(const char *what)
{
	printf("%s took", what);
	for (int i = 0; i < N_PARTS; i++)
		printf(" %s=%.6f", part_names[i], parts[i]);
	puts("");
}

/* Returns what the library did, or ends. */
static int must(int r, const char *what)
{
	char *text;

	if (r >= 0)
		return r;
	text = kho_error_format(err, r);
	fprintf(stderr, "restore-bench: %s: %s\n", what, text ? text : strerror(-r));
	exit(1);
}

/* A page stays free after each, and each leads elsewhere than where the one before ended. */
static void set_up(int ctx, int memfd, int dev, uint32_t dev_id, uint64_t areas)
{
	uint64_t length = MEM_SIZE / areas / PAGE * PAGE;
	uint32_t ioas, hwpt, pt;

	must(kho_iommufd_ioas_alloc(kho, ctx, &ioas, &err), "IOAS");
	lap(MAP);
	for (uint64_t i = 0; i < areas; i++) {
		must(kho_iommufd_map_file(kho, ctx, ioas, memfd, (areas - 1 - i) * length, length,
					  IOVA + i * (length + PAGE),
					  KHO_AREA_READABLE | KHO_AREA_WRITEABLE, &err), "map");
		lap(MAP);	/* each, as where it is restored */
	}
	must(kho_iommufd_hwpt_alloc(kho, ctx, dev_id, ioas, 0, &hwpt, &err), "HWPT");
	lap(TABLE);
	pt = hwpt;
	must(kho_vfio_attach(kho, dev, &pt, false, &err), "attach");
	lap(ATTACH);
}

static struct kho_image *make_image(int memfd, int ctx)
{
	struct kho_image *image = NULL;
	struct kho_graph *g = kho_graph_new();
	struct kho_image_file files[] = {
		{ .name = "memory", .kind = KHO_FILE_MEMFD, .token = TOKEN_MEM, .size = MEM_SIZE },
		{ .name = "iommufd", .kind = KHO_FILE_IOMMUFD, .token = TOKEN_CTX },
		{ .name = "device", .kind = KHO_FILE_VFIO, .token = TOKEN_DEV },
	};
	struct kho_context *c;

	must(kho_image_new(&image, "bench", 0, "", &err), "image");
	for (size_t i = 0; i < 3; i++)
		must(kho_image_add_file(image, &files[i], &err), "image");
	must(g ? kho_graph_add_backing(g, TOKEN_MEM) : -ENOMEM, "graph");
	c = kho_graph_add_context(g, TOKEN_CTX);
	must(c ? kho_snapshot(kho, ctx, &memfd, 1, c, &err) : -ENOMEM, "snapshot");
	c->devices[0].token = TOKEN_DEV;
	must(kho_image_set_graph(image, g, &err), "graph");
	return image;
}

static void old(uint64_t areas, const char *device)
{
	int memfd = memfd_create("bench", MFD_CLOEXEC), ctx, dev, session, fd;
	uint32_t dev_id;
	uint8_t *mem;

	must(memfd < 0 || ftruncate(memfd, MEM_SIZE) < 0 ? -errno : 0, "memfd");
	mem = mmap(NULL, MEM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	must(mem == MAP_FAILED ? -errno : 0, "mmap");
	memset(mem, 0x5a, MEM_SIZE);
	ctx = must(kho_iommufd_open(kho, &err), "iommufd");
	dev = must(kho_vfio_open(kho, device, &err), device);
	must(kho_vfio_bind(kho, dev, ctx, &dev_id, &err), "bind");
	set_up(ctx, memfd, dev, dev_id, areas);

	session = must(kho_luo_session_create(kho, SESSION, &err), "session");
	must(kho_luo_preserve(kho, session, memfd, TOKEN_MEM, &err), "preserve the memfd");
	must(kho_luo_preserve(kho, session, ctx, TOKEN_CTX, &err), "preserve the iommufd");
	fd = must(kho_image_write_memfd(kho, make_image(memfd, ctx), &err), "image");
	must(kho_luo_preserve(kho, session, dev, TOKEN_DEV, &err), "preserve the device");
	must(kho_luo_preserve(kho, session, fd, TOKEN_IMAGE, &err), "preserve the image");
	puts("preserved");
	pause();
}

static void passed(void *userdata, enum kho_step step)
{
	switch (step) {
	case KHO_STEP_BIND:
		puts("restored begins");
		lap_began = now();
		break;
	case KHO_STEP_IOAS:
	case KHO_STEP_MAP:
		lap(MAP);
		break;
	case KHO_STEP_HWPT:
		lap(TABLE);
		break;
	case KHO_STEP_REPLACE:
		lap(ATTACH);
		break;
	case KHO_STEP_DESTROY:
		lap(DESTROY);
		break;
	}
}

static void restore(struct kho_image *image, int memfd, int ctx, int dev)
{
	struct kho_context *want = &((struct kho_graph *)kho_image_graph(image))->contexts[0];
	struct kho_graph *g = kho_graph_new();
	struct kho_restore_files files = {
		.iommufd = ctx, .memfds = &memfd, .n_memfds = 1, .devices = &dev,
	};
	struct kho_plan *plan = NULL;
	struct kho_context *have;

	have = g ? kho_graph_add_context(g, TOKEN_CTX) : NULL;
	must(have ? 0 : -ENOMEM, "graph");
	laps_begin();
	must(kho_snapshot(kho, ctx, &memfd, 1, have, &err), "snapshot");
	must(kho_plan_new(want, have, &plan, &err), "plan");
	lap(READ);
	must(kho_plan_run(kho, plan, &files, passed, NULL, &err), "restore");
	must(kho_plan_commit(kho, plan, &files, passed, NULL, &err), "commit");
	laps_print("restored");
}

static void cold(int memfd, const char *device, size_t areas)
{
	int ctx = must(kho_iommufd_open(kho, &err), "iommufd");
	int dev = must(kho_vfio_open(kho, device, &err), device);
	uint32_t dev_id;

	must(kho_vfio_bind(kho, dev, ctx, &dev_id, &err), "bind");
	puts("cold begins");
	laps_begin();
	set_up(ctx, memfd, dev, dev_id, areas);
	laps_print("cold");
}

static void new(bool cold_first, const char *other)
{
	int session = must(kho_luo_session_retrieve(kho, SESSION, &err), "session");
	int dev = must(kho_luo_retrieve(kho, session, TOKEN_DEV, &err), "device");
	int ctx = must(kho_luo_retrieve(kho, session, TOKEN_CTX, &err), "iommufd");
	int memfd = must(kho_luo_retrieve(kho, session, TOKEN_MEM, &err), "memfd");
	int fd = must(kho_luo_retrieve(kho, session, TOKEN_IMAGE, &err), "image");
	struct kho_image *image = NULL;
	size_t areas;

	must(kho_image_read_fd(kho, fd, true, &image, &err), "image");
	areas = kho_graph_n_areas(kho_image_graph(image));
	if (cold_first)
		cold(memfd, other, areas);
	restore(image, memfd, ctx, dev);
	if (!cold_first)
		cold(memfd, other, areas);
	must(kho_luo_finish(kho, session, &err), "finish");
	puts("finished");
}

int main(int argc, char **argv)
{
	setlinebuf(stdout);
	must(kho_new(&kho, NULL, NULL), "libkho");
	if (argc == 4 && strcmp(argv[1], "old") == 0 && atoi(argv[2]) > 0)
		old(strtoull(argv[2], NULL, 10), argv[3]);
	else if (argc == 4 && strcmp(argv[1], "new") == 0)
		new(strcmp(argv[2], "cold") == 0, argv[3]);
	else
		return 2;
	return 0;
}
