/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What is in a workload's iommufds, as a tree and as JSON; for show and inspect. */
#include "khoctl.h"

static const char *file_name(const struct kho_image *image, uint64_t token)
{
	for (size_t i = 0; i < kho_image_n_files(image); i++) {
		struct kho_image_file f = {};

		kho_image_file(image, i, &f);
		if (f.token == token)
			return f.name;
	}
	return "?";
}

static uint64_t mapped(const struct kho_ioas *ioas)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < ioas->n_areas; i++)
		sum += ioas->areas[i].length;
	return sum;
}

static const struct {
	uint32_t flag;
	const char *name;
} hwpt_flags[] = {
	{ KHO_HWPT_AUTO, "auto" },	       { KHO_HWPT_NEST_PARENT, "nest parent" },
	{ KHO_HWPT_DIRTY, "dirty tracking" },  { KHO_HWPT_ENFORCE_CC, "coherent" },
	{ KHO_HWPT_PASID, "PASID" },	       { KHO_HWPT_NOIOMMU, "no IOMMU" },
};

/* &iommu_hwpt_info.out_format. What VT-d calls first stage, AMD calls v2. */
static const char *const formats[] = {
	[1] = "AMD v1 tables", [2] = "second-stage tables", [3] = "first-stage tables",
	[4] = "RISC-V tables", [5] = "tables of a test",
};

/* "4 KiB, 2 MiB and 1 GiB", or the smallest and the largest if there are more. */
static void print_page_sizes(uint64_t sizes)
{
	int n = __builtin_popcountll(sizes), nr = 0;
	char size[32];

	for (int bit = 0; bit < 64; bit++) {
		if (!(sizes >> bit & 1))
			continue;
		nr++;
		if (n > 3 && nr > 1 && nr < n)
			continue;
		printf("%s%s", nr == 1 ? ", pages of " : n > 3 ? " to " : nr == n ? " and " : ", ",
		       human_size(1ull << bit, size));
	}
}

/* ", by dmar0 in legacy mode, domain id 3" */
static void print_translation(const struct kho_translation *t)
{
	if (t->mode == KHO_TRANSLATION_UNKNOWN)
		return;
	printf(", by dmar%" PRIu32 " in %s mode", t->unit,
	       t->mode == KHO_TRANSLATION_LEGACY ? "legacy" : "scalable");
	if (t->mode != KHO_TRANSLATION_LEGACY)
		printf(", %s", kho_translation_mode_name(t->mode));
	printf(", domain id %" PRIu32, t->domain_id);
	if (t->hitless)
		printf(", replaced without a gap");
}

/* "17, once 4": the client's id where it is another one. */
static const char *ids(uint32_t id, uint32_t client_id, char buf[40])
{
	if (id == client_id)
		snprintf(buf, 40, "%" PRIu32, id);
	else
		snprintf(buf, 40, "%" PRIu32 " (the client's %" PRIu32 ")", id, client_id);
	return buf;
}

static void print_context(const struct kho_image *image, const struct kho_graph *g,
			  const struct kho_context *c, bool last)
{
	const char *bar = last ? "      " : "  |   ";
	char id[40], size[32];

	printf("  %s in %s\n", last ? "`--" : "|--", file_name(image, c->token));
	for (size_t i = 0; i < c->n_ioas; i++) {
		const struct kho_ioas *o = &c->ioas[i];

		printf("%s%s IOAS %s: %zu areas, %s\n", bar,
		       i + 1 < c->n_ioas || c->n_hwpts + c->n_devices > 0 ? "|--" : "`--",
		       ids(o->id, o->client_id, id), o->n_areas, human_size(mapped(o), size));
		for (size_t k = 0; k < o->n_areas; k++) {
			const struct kho_area *a = &o->areas[k];

			printf("%s|   %s 0x%" PRIx64 " to 0x%" PRIx64 ": %s + 0x%" PRIx64 ", %s%s\n", bar,
			       k + 1 < o->n_areas ? "|--" : "`--", a->iova, a->iova + a->length - 1,
			       file_name(image, g->backings[a->backing]), a->offset,
			       a->flags & KHO_AREA_READABLE ? "r" : "-",
			       a->flags & KHO_AREA_WRITEABLE ? "w" : "-");
		}
	}
	for (size_t i = 0; i < c->n_hwpts; i++) {
		const struct kho_hwpt *o = &c->hwpts[i];

		printf("%s%s HWPT %s of IOAS %" PRIu32, bar,
		       i + 1 < c->n_hwpts || c->n_devices > 0 ? "|--" : "`--",
		       ids(o->id, o->client_id, id), c->ioas[o->ioas].id);
		for (size_t k = 0; k < sizeof(hwpt_flags) / sizeof(hwpt_flags[0]); k++)
			if (o->flags & hwpt_flags[k].flag)
				printf(", %s", hwpt_flags[k].name);
		if (o->format > 0 && o->format < sizeof(formats) / sizeof(formats[0]))
			printf(", %s", formats[o->format]);
		print_page_sizes(o->page_sizes);
		printf("\n");
	}
	for (size_t i = 0; i < c->n_devices; i++) {
		const struct kho_device *o = &c->devices[i];

		printf("%s%s device %s, %s", bar, i + 1 < c->n_devices ? "|--" : "`--",
		       ids(o->id, o->client_id, id), o->name);
		if (o->token)
			printf(", %s", file_name(image, o->token));
		if (o->hwpt != KHO_NONE)
			printf(", attached to HWPT %" PRIu32, c->hwpts[o->hwpt].id);
		if (o->may_have_lost_irq)
			printf(", may have lost interrupts");
		print_translation(&o->translation);
		printf("\n");
	}
}

void print_graph(const struct kho_image *image)
{
	const struct kho_graph *g = kho_image_graph(image);

	for (size_t i = 0; g && i < g->n_contexts; i++)
		print_context(image, g, &g->contexts[i], i + 1 == g->n_contexts);
}

static void json_ids(struct json *j, uint32_t id, uint32_t client_id)
{
	json_u64(j, "id", id);
	json_u64(j, "client_id", client_id);
}

static void json_ioas(struct json *j, const struct kho_image *image, const struct kho_graph *g,
		      const struct kho_ioas *o)
{
	json_open(j, NULL, '{');
	json_ids(j, o->id, o->client_id);
	json_open(j, "areas", '[');
	for (size_t i = 0; i < o->n_areas; i++) {
		const struct kho_area *a = &o->areas[i];

		json_open(j, NULL, '{');
		json_u64(j, "iova", a->iova);
		json_u64(j, "length", a->length);
		json_string(j, "file", file_name(image, g->backings[a->backing]));
		json_u64(j, "offset", a->offset);
		json_bool(j, "readable", a->flags & KHO_AREA_READABLE);
		json_bool(j, "writeable", a->flags & KHO_AREA_WRITEABLE);
		json_close(j, '}');
	}
	json_close(j, ']');
	json_close(j, '}');
}

static void json_translation(struct json *j, const struct kho_translation *t)
{
	char unit[16];

	if (t->mode == KHO_TRANSLATION_UNKNOWN) {
		json_null(j, "translation");
		return;
	}
	snprintf(unit, sizeof(unit), "dmar%" PRIu32, t->unit);
	json_open(j, "translation", '{');
	json_string(j, "mode", kho_translation_mode_name(t->mode));
	json_string(j, "iommu", unit);
	json_u64(j, "domain_id", t->domain_id);
	json_bool(j, "hitless", t->hitless);
	json_close(j, '}');
}

static void json_context(struct json *j, const struct kho_image *image, const struct kho_graph *g,
			 const struct kho_context *c)
{
	json_open(j, NULL, '{');
	json_string(j, "file", file_name(image, c->token));
	json_open(j, "ioas", '[');
	for (size_t i = 0; i < c->n_ioas; i++)
		json_ioas(j, image, g, &c->ioas[i]);
	json_close(j, ']');
	json_open(j, "hwpts", '[');
	for (size_t i = 0; i < c->n_hwpts; i++) {
		const struct kho_hwpt *o = &c->hwpts[i];

		json_open(j, NULL, '{');
		json_ids(j, o->id, o->client_id);
		json_u64(j, "ioas", c->ioas[o->ioas].id);
		json_u64(j, "flags", o->flags);
		json_u64(j, "format", o->format);
		json_u64(j, "page_sizes", o->page_sizes);
		json_u64(j, "first_iova", o->first_iova);
		json_u64(j, "last_iova", o->last_iova);
		json_close(j, '}');
	}
	json_close(j, ']');
	json_open(j, "devices", '[');
	for (size_t i = 0; i < c->n_devices; i++) {
		const struct kho_device *o = &c->devices[i];

		json_open(j, NULL, '{');
		json_ids(j, o->id, o->client_id);
		json_string(j, "name", o->name);
		json_string(j, "file", o->token ? file_name(image, o->token) : "");
		json_bool(j, "noiommu", o->noiommu);
		json_bool(j, "may_have_lost_irq", o->may_have_lost_irq);
		json_u64(j, "hwpt", o->hwpt == KHO_NONE ? 0 : c->hwpts[o->hwpt].id);
		json_translation(j, &o->translation);
		json_close(j, '}');
	}
	json_close(j, ']');
	json_close(j, '}');
}

void json_graph(struct json *j, const struct kho_image *image)
{
	const struct kho_graph *g = kho_image_graph(image);

	json_open(j, "contexts", '[');
	for (size_t i = 0; g && i < g->n_contexts; i++)
		json_context(j, image, g, &g->contexts[i]);
	json_close(j, ']');
}

const char *survival_name(enum kho_survival survival)
{
	return survival == KHO_SURVIVAL_BEST_EFFORT ? "best-effort" : "must-survive";
}

const char *memory_name(enum kho_memory memory)
{
	switch (memory) {
	case KHO_MEMORY_PRESERVED:
		return "preserved";
	case KHO_MEMORY_SOON:
		return "soon";
	case KHO_MEMORY_AT_HANDOVER:
		return "at-handover";
	case KHO_MEMORY_UNKNOWN:
		break;
	}
	return "unknown";
}

const char *restore_failure_name(enum kho_restore_failure failure)
{
	return failure == KHO_RESTORE_FAILURE_RELEASE ? "release" : "quiesce";
}

const char *outcome_name(enum kho_outcome outcome)
{
	return outcome == KHO_OUTCOME_RESTORED ? "restored" :
	       outcome == KHO_OUTCOME_QUIESCED ? "quiesced" : "none";
}
