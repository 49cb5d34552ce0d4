/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Graphs for tests and for the golden image. */
#ifndef GRAPH_SAMPLE_H
#define GRAPH_SAMPLE_H

#include <openssl/evp.h>

#include <kho/kho.h>

#include "common.h"

static inline struct kho_image *sample_image(void)
{
	static const struct kho_image_file files[] = {
		{ "ram0", KHO_FILE_MEMFD, 0, 1, 1 << 20 },    { "ram1", KHO_FILE_MEMFD, 0, 2, 1 << 21 },
		{ "ram2", KHO_FILE_MEMFD, 0, 3, 1 << 22 },    { "iommufd", KHO_FILE_IOMMUFD, 0, 4, 0 },
		{ "nic", KHO_FILE_VFIO, 0, 5, 0 },	      { "disk", KHO_FILE_VFIO, 0, 6, 0 },
	};
	struct kho_image *i = NULL;

	cr_assert(kho_image_new(&i, "vm1", 1000, "vm@1.service", NULL) == 0);
	for (size_t k = 0; k < ARRAY_SIZE(files); k++)
		cr_assert(kho_image_add_file(i, &files[k], NULL) == 0);
	return i;
}

static inline struct kho_graph *sample_graph(void)
{
	static const struct kho_area areas[] = {
		{ 0x100000000, 0x100000, 0, 0, 3 },
		{ 0x100100000, 0x1000, 0x2000, 1, 1 },
		{ 0x200000000, 0x80000, 0x10000, 2, 3 },
	};
	static const struct kho_hwpt hwpts[] = {
		{ 6, 31, 0, KHO_HWPT_NOIOMMU, 1, 2, 0x201000, 0, UINT64_MAX },
		{ 7, 7, 0, KHO_HWPT_NOIOMMU | KHO_HWPT_AUTO, 1, 3, 0x201000, 0, UINT64_MAX },
		{ 8, 33, 1, KHO_HWPT_DIRTY | KHO_HWPT_ENFORCE_CC, 3, 2, 0x40201000, 0x1000, (UINT64_C(1) << 48) - 1 },
	};
	static const struct kho_device devices[] = {
		{ 1, 21, 5, "pci/0000:01:00.0", true, 1 },
		{ 2, 22, 6, "pci/0000:02:00.0", false, 2 },
	};
	struct kho_graph *g = kho_graph_new();
	struct kho_context *c;
	struct kho_ioas *ioas;

	cr_assert(g);
	for (uint64_t token = 1; token <= 3; token++)
		cr_assert(kho_graph_add_backing(g, token) == 0);
	c = kho_graph_add_context(g, 4);
	ioas = kho_context_add_ioas(c);
	ioas->id = ioas->client_id = 4;
	memcpy(kho_ioas_add_areas(ioas, 3), areas, sizeof(areas));
	ioas = kho_context_add_ioas(c);
	ioas->id = 5;
	ioas->client_id = 40;
	for (size_t i = 0; i < ARRAY_SIZE(hwpts); i++)
		*kho_context_add_hwpt(c) = hwpts[i];
	for (size_t i = 0; i < ARRAY_SIZE(devices); i++)
		*kho_context_add_device(c) = devices[i];
	return g;
}

/* Random lengths, gaps and offsets, in pages, over @memfds memfds; always the same ones. */
static inline struct kho_graph *random_graph(size_t n, size_t memfds)
{
	struct kho_graph *g = kho_graph_new();
	struct kho_ioas *ioas;
	uint64_t rnd = 20261120, iova = 0;
	struct kho_area *a;

	for (uint64_t i = 0; i < memfds; i++)
		cr_assert(kho_graph_add_backing(g, i < 3 ? 1 + i : 101 + i) == 0);
	ioas = kho_context_add_ioas(kho_graph_add_context(g, 4));
	ioas->id = ioas->client_id = 1;
	a = kho_ioas_add_areas(ioas, n);
	for (size_t i = 0; i < n; i++) {
		rnd = rnd * UINT64_C(6364136223846793005) + 1442695040888963407;
		a[i] = (struct kho_area){
			.iova = iova += (rnd >> 20 & 0xfff) << 12,
			.length = ((rnd >> 32 & 0x1fff) + 1) << 12,
			.offset = (rnd >> 40) << 12,	/* in 64 GiB */
			.backing = rnd >> 61,
			.flags = 3,
		};
		iova += a[i].length;
	}
	return g;
}

static inline void graphs_must_be_same(const struct kho_graph *a, const struct kho_graph *b)
{
	cr_assert(a && b && a->n_contexts == b->n_contexts && a->n_backings == b->n_backings);
	for (size_t i = 0; i < a->n_backings; i++)
		cr_assert(a->backings[i] == b->backings[i]);
	for (size_t i = 0; i < a->n_contexts; i++) {
		const struct kho_context *c = &a->contexts[i], *d = &b->contexts[i];

		cr_assert(c->token == d->token && c->n_ioas == d->n_ioas &&
			  c->n_hwpts == d->n_hwpts && c->n_devices == d->n_devices);
		for (size_t k = 0; k < c->n_ioas; k++) {
			cr_assert(c->ioas[k].id == d->ioas[k].id &&
				  c->ioas[k].client_id == d->ioas[k].client_id &&
				  c->ioas[k].n_areas == d->ioas[k].n_areas);
			for (size_t l = 0; l < c->ioas[k].n_areas; l++)
				cr_assert(memcmp(&c->ioas[k].areas[l], &d->ioas[k].areas[l],
						 sizeof(struct kho_area)) == 0, "area %zu", l);
		}
		for (size_t k = 0; k < c->n_hwpts; k++) {
			const struct kho_hwpt *h = &c->hwpts[k], *j = &d->hwpts[k];

			cr_assert(h->id == j->id && h->client_id == j->client_id &&
				  h->ioas == j->ioas && h->flags == j->flags &&
				  h->format == j->format && h->top_level == j->top_level &&
				  h->page_sizes == j->page_sizes && h->first_iova == j->first_iova &&
				  h->last_iova == j->last_iova);
		}
		for (size_t k = 0; k < c->n_devices; k++) {
			const struct kho_device *h = &c->devices[k], *j = &d->devices[k];

			cr_assert(h->id == j->id && h->client_id == j->client_id &&
				  h->token == j->token && strcmp(h->name, j->name) == 0 &&
				  h->noiommu == j->noiommu && h->hwpt == j->hwpt &&
				  h->may_have_lost_irq == j->may_have_lost_irq);
		}
	}
}

/* After a change on purpose: as if it had been written like that. */
static inline void rechecksum(uint8_t *buf, size_t size)
{
	EVP_MD_CTX *md = EVP_MD_CTX_new();

	cr_assert(EVP_DigestInit_ex(md, EVP_sha256(), NULL) == 1 &&
		  EVP_DigestUpdate(md, buf, 32) == 1 &&
		  EVP_DigestUpdate(md, buf + KHO_IMAGE_HEADER_SIZE, size - KHO_IMAGE_HEADER_SIZE) == 1 &&
		  EVP_DigestFinal_ex(md, buf + 32, NULL) == 1);
	EVP_MD_CTX_free(md);
}

#endif
