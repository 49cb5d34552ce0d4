/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How long the image of a workload with many areas takes: to bytes and back, beside a memcpy()
 * of the same bytes and beside json-c doing the same job (the same model to a JSON text, and
 * from the text to the model again). All are run in turn, as often as asked for; printed are
 * the median of each and the median of the ratios of the same round.
 *
 *	image-bench [AREAS [ROUNDS]]
 */
#include <inttypes.h>
#include <json-c/json.h>
#include <kho/kho.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define N_MEMFDS 8
#define ROUNDS_MAX 99

enum { ENCODE, DECODE, COPY, JSON_ENCODE, JSON_DECODE, N_TIMES };

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static void check(int ok, const char *what)
{
	if (!ok) {
		fprintf(stderr, "image-bench: %s failed\n", what);
		exit(1);
	}
}

/* Random lengths, gaps and offsets in pages, over 8 memfds of 64 GiB; always the same. */
static struct kho_image *make(size_t n)
{
	struct kho_graph *g = kho_graph_new();
	struct kho_image *image = NULL;
	uint64_t rnd = 20261120, iova = 0;
	struct kho_ioas *ioas;
	struct kho_area *a;

	check(g && kho_image_new(&image, "bench", 0, "", NULL) == 0, "image");
	for (uint64_t i = 1; i <= N_MEMFDS + 1; i++) {
		char name[16];
		struct kho_image_file f = {
			.name = name,
			.kind = i <= N_MEMFDS ? KHO_FILE_MEMFD : KHO_FILE_IOMMUFD,
			.token = i,
		};

		snprintf(name, sizeof(name), "file%d", (int)i);
		check(kho_image_add_file(image, &f, NULL) == 0, "file");
		if (i <= N_MEMFDS)
			check(kho_graph_add_backing(g, i) == 0, "backing");
	}
	ioas = kho_context_add_ioas(kho_graph_add_context(g, N_MEMFDS + 1));
	ioas->id = ioas->client_id = 1;
	a = kho_ioas_add_areas(ioas, n);
	check(a != NULL, "areas");
	for (size_t i = 0; i < n; i++) {
		rnd = rnd * UINT64_C(6364136223846793005) + 1442695040888963407;
		iova += (rnd >> 20 & 0xfff) << 12;
		a[i] = (struct kho_area){
			.iova = iova,
			.length = ((rnd >> 32 & 0x1fff) + 1) << 12,
			.offset = (rnd >> 40) << 12,
			.backing = rnd >> 61,
			.flags = 3,
		};
		iova += a[i].length;
	}
	check(kho_image_set_graph(image, g, NULL) == 0, "graph");
	return image;
}

static char *json_encode(const struct kho_ioas *ioas)
{
	struct json_object *top = json_object_new_object(), *areas = json_object_new_array();
	char *text;

	for (size_t i = 0; i < ioas->n_areas; i++) {
		const struct kho_area *a = &ioas->areas[i];
		struct json_object *o = json_object_new_object();

		json_object_object_add(o, "iova", json_object_new_uint64(a->iova));
		json_object_object_add(o, "length", json_object_new_uint64(a->length));
		json_object_object_add(o, "offset", json_object_new_uint64(a->offset));
		json_object_object_add(o, "backing", json_object_new_int((int)a->backing));
		json_object_object_add(o, "flags", json_object_new_int((int)a->flags));
		json_object_array_add(areas, o);
	}
	json_object_object_add(top, "areas", areas);
	text = strdup(json_object_to_json_string_ext(top, JSON_C_TO_STRING_PLAIN));
	json_object_put(top);
	return text;
}

static uint64_t number(struct json_object *o, const char *key)
{
	struct json_object *v = NULL;

	check(json_object_object_get_ex(o, key, &v), key);
	return json_object_get_uint64(v);
}

static struct kho_area *json_decode(const char *text, size_t n)
{
	struct json_object *top = json_tokener_parse(text), *areas = NULL;
	struct kho_area *a = calloc(n, sizeof(*a));

	check(a && top && json_object_object_get_ex(top, "areas", &areas) &&
	      json_object_array_length(areas) == n, "json");
	for (size_t i = 0; i < n; i++) {
		struct json_object *o = json_object_array_get_idx(areas, i);

		a[i] = (struct kho_area){
			.iova = number(o, "iova"),
			.length = number(o, "length"),
			.offset = number(o, "offset"),
			.backing = number(o, "backing"),
			.flags = number(o, "flags"),
		};
	}
	json_object_put(top);
	return a;
}

static void round_of(const struct kho_image *image, size_t n, double t[N_TIMES], size_t *bytes,
		     size_t *json_bytes)
{
	const struct kho_ioas *ioas = &kho_image_graph(image)->contexts[0].ioas[0];
	struct kho_image *back = NULL;
	struct kho_area *areas;
	double start;
	void *buf, *copy;
	char *text;

	start = now();
	check(kho_image_encode(image, &buf, bytes, NULL) == 0, "encode");
	t[ENCODE] = now() - start;
	start = now();
	check(kho_image_decode(buf, *bytes, &back, NULL) == 0, "decode");
	t[DECODE] = now() - start;
	check(memcmp(kho_image_graph(back)->contexts[0].ioas[0].areas, ioas->areas,
		     n * sizeof(*areas)) == 0, "comparing");
	kho_image_free(back);
	start = now();
	copy = malloc(*bytes);
	check(copy != NULL, "memory");
	memcpy(copy, buf, *bytes);
	t[COPY] = now() - start;
	/* Looked at, so that it is done. */
	check(memcmp(copy, buf, *bytes) == 0, "comparing");
	free(copy);
	free(buf);

	start = now();
	text = json_encode(ioas);
	t[JSON_ENCODE] = now() - start;
	check(text != NULL, "json");
	*json_bytes = strlen(text);
	start = now();
	areas = json_decode(text, n);
	t[JSON_DECODE] = now() - start;
	check(memcmp(areas, ioas->areas, n * sizeof(*areas)) == 0, "comparing");
	free(areas);
	free(text);
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(double *x, size_t n)
{
	qsort(x, n, sizeof(*x), compare);
	return x[n / 2];
}

/* The median, and the worst of the rounds. */
static void ratio(const char *what, double t[][N_TIMES], size_t rounds, int a, int b)
{
	double r[ROUNDS_MAX];

	for (size_t i = 0; i < rounds; i++)
		r[i] = t[i][a] / t[i][b];
	printf("  %-36s %8.1f times", what, median(r, rounds));
	printf(" (%.1f to %.1f in %zu rounds)\n", r[0], r[rounds - 1], rounds);
}

int main(int argc, char **argv)
{
	static const char *const names[N_TIMES] = { "encode", "decode", "memcpy", "json-c encode",
						    "json-c decode" };
	size_t n = argc > 1 ? strtoul(argv[1], NULL, 10) : 1000000;
	size_t rounds = argc > 2 ? strtoul(argv[2], NULL, 10) : 9, bytes = 0, json_bytes = 0;
	static double t[ROUNDS_MAX][N_TIMES];
	struct kho_image *image;

	if (n == 0 || rounds == 0 || rounds > ROUNDS_MAX) {
		fputs("Usage: image-bench [AREAS [ROUNDS]]\n", stderr);
		return 2;
	}
	image = make(n);
	for (size_t i = 0; i < rounds; i++)
		round_of(image, n, t[i], &bytes, &json_bytes);
	printf("%zu areas: %.2f bytes each; as JSON %.2f\n", n, (double)bytes / (double)n,
	       (double)json_bytes / (double)n);
	for (int k = 0; k < N_TIMES; k++) {
		double x[ROUNDS_MAX];

		for (size_t i = 0; i < rounds; i++)
			x[i] = t[i][k];
		printf("  %-14s %9.2f ms\n", names[k], 1e3 * median(x, rounds));
	}
	ratio("json-c encode / encode", t, rounds, JSON_ENCODE, ENCODE);
	ratio("json-c decode / decode", t, rounds, JSON_DECODE, DECODE);
	ratio("encode / memcpy of the same bytes", t, rounds, ENCODE, COPY);
	ratio("decode / memcpy of the same bytes", t, rounds, DECODE, COPY);
	kho_image_free(image);
	return 0;
}
