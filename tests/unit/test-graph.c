/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The object graph: through the image and back, a million areas, everything that is refused. */
#include <time.h>

#include "common.h"
#include "graph-sample.h"

TestSuite(graph, .timeout = 120);

/* One context with two IOAS, three HWPTs and two devices; ids as after a restore. */
Test(graph, round_trip)
{
	struct kho_image *a = sample_image(), *b = NULL;
	const struct kho_graph *g;
	struct kho_error *err = NULL;
	size_t size;
	void *buf;

	cr_assert(kho_image_set_graph(a, sample_graph(), &err) == 0, "%s", kho_error_message(err));
	kho_image_set_outcome(a, KHO_OUTCOME_RESTORED, NULL);
	cr_assert(kho_image_encode(a, &buf, &size, NULL) == 0);
	cr_assert(kho_image_decode(buf, size, &b, &err) == 0, "%s", kho_error_message(err));
	g = kho_image_graph(b);
	cr_assert(g);
	graphs_must_be_same(g, kho_image_graph(a));
	cr_assert(kho_image_outcome(b) == KHO_OUTCOME_RESTORED);
	cr_assert(g->contexts[0].ioas[1].client_id == 40 && g->contexts[0].ioas[1].id == 5);
	kho_image_drop_devices(b);
	cr_assert(kho_image_n_files(b) == 3 && !kho_image_graph(b) && !kho_image_has_devices(b));
	kho_image_set_outcome(b, KHO_OUTCOME_QUIESCED, "a\tb\xff");
	free(buf);
	cr_assert(kho_image_encode(b, &buf, &size, NULL) == 0);
	a = kho_image_free(a);
	cr_assert(kho_image_decode(buf, size, &a, NULL) == 0);
	cr_assert_str_eq(kho_image_reason(a), "a?b?");
	cr_assert(kho_image_outcome(a) == KHO_OUTCOME_QUIESCED);
	free(buf);
	kho_image_free(a);
	kho_image_free(b);
}

/* Whole address spaces: the first and the last byte, and areas that touch. */
Test(graph, extremes)
{
	static const struct kho_area areas[] = {
		{ 0, 1, 0, 0, 0 },
		{ 1, 4095, UINT64_MAX - 4095, 0, 3 },
		{ 4096, UINT64_C(1) << 63, 0, 2, 1 },
		{ UINT64_MAX, 1, UINT64_MAX - 1, 1, 2 },
	};
	struct kho_image *a = sample_image(), *b = NULL;
	struct kho_graph *g = sample_graph();
	struct kho_error *err = NULL;
	size_t size;
	void *buf;

	memcpy(kho_ioas_add_areas(&g->contexts[0].ioas[1], 4), areas, sizeof(areas));
	cr_assert(kho_image_set_graph(a, g, &err) == 0, "%s", kho_error_message(err));
	cr_assert(kho_image_encode(a, &buf, &size, NULL) == 0);
	cr_assert(kho_image_decode(buf, size, &b, &err) == 0, "%s", kho_error_message(err));
	graphs_must_be_same(kho_image_graph(b), g);
	free(buf);
	kho_image_free(a);
	kho_image_free(b);
}

static double seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

/* Bytes an area; and the CPU time that both ways take. */
static double encode_many(size_t n, double *cpu)
{
	struct kho_image *a = sample_image(), *b = NULL;
	struct kho_graph *g = random_graph(n, 8);
	struct kho_error *err = NULL;
	size_t size, empty;
	double start;
	void *buf;

	cr_assert(kho_image_encode(a, &buf, &empty, NULL) == 0);
	free(buf);
	for (uint64_t i = 4; i <= 8; i++) {
		char name[16];
		struct kho_image_file f = { .name = name, .kind = KHO_FILE_MEMFD, .token = 100 + i };

		snprintf(name, sizeof(name), "more%d", (int)i);
		cr_assert(kho_image_add_file(a, &f, NULL) == 0);
	}
	start = seconds();
	cr_assert(kho_image_set_graph(a, g, &err) == 0, "%s", kho_error_message(err));
	cr_assert(kho_image_encode(a, &buf, &size, &err) == 0, "%s", kho_error_message(err));
	cr_assert(kho_image_decode(buf, size, &b, &err) == 0, "%s", kho_error_message(err));
	*cpu = seconds() - start;
	graphs_must_be_same(kho_image_graph(b), g);
	free(buf);
	kho_image_free(a);
	kho_image_free(b);
	return (double)(size - empty) / (double)n;
}

Test(graph, a_million_areas)
{
	double few, many, bytes;

	(void)encode_many(100000, &few);
	(void)encode_many(100000, &few);
	bytes = encode_many(1000000, &many);
	fprintf(stderr, "a million areas: %.2f bytes each, both ways %.3f s of CPU; 100,000: %.3f s\n",
		bytes, many, few);
	cr_assert(bytes <= 16, "%.2f bytes an area", bytes);
	/* Ten times as many; a quadratic step would take a hundred times. */
	cr_assert(many < 40 * few, "%.3f s for a million, %.3f s for 100,000", many, few);
}

/* One wrong thing at a time, in the model; what is wrong is named. */
Test(graph, refused)
{
	struct kho_image *image = sample_image();

	for (int i = 0;; i++) {
		struct kho_graph *g = sample_graph();
		struct kho_context *c = &g->contexts[0];
		struct kho_error *err = NULL;
		const char *word = NULL;
		int want = -EINVAL, r;

		switch (i) {
		case 0: c->ioas[0].id = 0; word = "without an id"; break;
		case 1: c->hwpts[0].id = c->ioas[0].id; word = "two objects"; break;
		case 2: c->devices[1].client_id = c->devices[0].client_id; word = "two objects"; break;
		case 3: c->ioas[0].areas[1].iova = c->ioas[0].areas[0].iova; word = "overlaps"; break;
		case 4: c->ioas[0].areas[0].length = 0; word = "length"; break;
		case 5: c->ioas[0].areas[2].length = UINT64_MAX; word = "length"; break;
		case 6: c->ioas[0].areas[0].offset = UINT64_MAX; word = "length"; break;
		case 7: c->ioas[0].areas[0].backing = 3; word = "memfd"; break;
		case 8: c->ioas[0].areas[0].flags = 8; word = "flags"; break;
		case 9: c->hwpts[1].ioas = 2; word = "without an IOAS"; break;
		case 10: c->hwpts[1].ioas = KHO_NONE; word = "without an IOAS"; break;
		case 11: c->hwpts[1].frozen = true; want = -EOPNOTSUPP; word = "previous kernel"; break;
		case 12: c->hwpts[1].flags |= KHO_HWPT_FAULT; want = -EOPNOTSUPP; word = "fault queue"; break;
		case 13: c->hwpts[1].flags |= KHO_HWPT_DIRTY_TRACKING; want = -EOPNOTSUPP; word = "dirty"; break;
		case 14: c->hwpts[1].flags |= 1u << 30; want = -EOPNOTSUPP; word = "unknown"; break;
		case 15: c->devices[0].hwpt = 3; word = "attached to nothing"; break;
		case 16: c->devices[0].name[0] = 0; word = "without a name"; break;
		case 17: c->devices[0].name[0] = '\n'; word = "printable"; break;
		case 18: c->token = 1; word = "no iommufd"; break;
		case 19: c->devices[0].token = 4; word = "no device"; break;
		case 20: g->backings[0] = 4; word = "no memfd"; break;
		case 21: g->backings[0] = g->backings[1]; word = "twice"; break;
		case 22: c->devices[0].token = c->devices[1].token; word = "twice"; break;
		case 23:
			while (c->n_devices <= KHO_GRAPH_OBJECTS_MAX)
				cr_assert(kho_context_add_device(c));
			want = -EFBIG;
			word = "objects";
			break;
		default:
			kho_graph_free(g);
			kho_image_free(image);
			return;
		}
		r = kho_image_set_graph(image, g, &err);
		cr_assert(r == want && err && strstr(kho_error_message(err), word), "case %d: %d %s", i, r,
			  err ? kho_error_message(err) : "");
		cr_assert(!kho_image_graph(image), "case %d was taken", i);
		kho_error_free(err);
		kho_graph_free(g);
	}
}

/* No flipped bit gets past the checksum, and with a good checksum none does harm. */
Test(graph, every_byte_changed)
{
	struct kho_image *a = sample_image(), *b = NULL;
	size_t size, good = 0;
	uint8_t *buf;
	void *p;

	cr_assert(kho_image_set_graph(a, sample_graph(), NULL) == 0);
	cr_assert(kho_image_encode(a, &p, &size, NULL) == 0);
	buf = p;
	for (size_t i = KHO_IMAGE_HEADER_SIZE; i < size; i++)
		for (int k = 0; k < 8; k++) {
			buf[i] ^= 1 << k;
			cr_assert(kho_image_decode(buf, size, &b, NULL) == -EBADMSG);
			rechecksum(buf, size);
			if (kho_image_decode(buf, size, &b, NULL) == 0) {
				const struct kho_graph *g = kho_image_graph(b);

				cr_assert(!g || kho_graph_check(g, NULL) == 0);
				b = kho_image_free(b);
				good++;
			}
			cr_assert(b == NULL);
			buf[i] ^= 1 << k;
			rechecksum(buf, size);
		}
	cr_assert(kho_image_decode(buf, size, &b, NULL) == 0);
	fprintf(stderr, "%zu of %zu changed bits make another good image\n", good,
		(size - KHO_IMAGE_HEADER_SIZE) * 8);
	kho_image_free(a);
	kho_image_free(b);
	free(buf);
}

/* Released, and never changed again: an image with devices, as this version writes it. */
static void read_golden(const char *name, struct kho_image **ret)
{
	struct kho_error *err = NULL;
	struct kho *kho = NULL;
	char path[256];
	int fd;

	cr_assert(kho_new(&kho, NULL, NULL) == 0);
	snprintf(path, sizeof(path), "%s/golden/%s", getenv("UNIT_SRC"), name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	cr_assert(fd >= 0, "%s", path);
	cr_assert(kho_image_read_fd(kho, fd, false, ret, &err) == 0, "%s", kho_error_message(err));
	close(fd);
	kho_free(kho);
}

/* The older one asks for nothing, and nothing has happened to it. */
Test(graph, golden)
{
	struct kho_graph *want = sample_graph();
	struct kho_image *b = NULL;

	read_golden("image-v1-devices", &b);
	graphs_must_be_same(kho_image_graph(b), want);
	cr_assert(kho_image_outcome(b) == KHO_OUTCOME_RESTORED);
	cr_assert(kho_image_claim_sec(b) == 0 && !kho_image_may_lose_irq(b) &&
		  kho_image_restore_failure(b) == KHO_RESTORE_FAILURE_QUIESCE &&
		  kho_image_arrived_usec(b, "01234567-89ab-cdef-0123-456789abcdef") == 0);
	kho_image_free(b);

	read_golden("image-v1-policy", &b);
	want->contexts[0].devices[0].may_have_lost_irq = true;
	graphs_must_be_same(kho_image_graph(b), want);
	cr_assert(kho_image_claim_sec(b) == 90 && kho_image_may_lose_irq(b) &&
		  kho_image_survival(b) == KHO_SURVIVAL_BEST_EFFORT &&
		  kho_image_restore_failure(b) == KHO_RESTORE_FAILURE_RELEASE &&
		  kho_image_arrived_usec(b, "01234567-89ab-cdef-0123-456789abcdef") == 4000000);
	kho_image_free(b);
	kho_graph_free(want);
}
