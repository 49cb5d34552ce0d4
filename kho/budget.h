/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_BUDGET_H
#define KHO_BUDGET_H

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stdlib.h>

/*
 * An allocator for protobuf-c that gives out no more than a set number of bytes
 * over its whole life. A message of empty submessages grows fifty-fold when it
 * is unpacked; the budget is what bounds that, whatever the message says.
 */
struct kho_budget {
	ProtobufCAllocator allocator;
	size_t left;
	bool exhausted;
};

static inline void *kho_budget_alloc(void *data, size_t size)
{
	struct kho_budget *b = data;

	if (size > b->left) {
		b->exhausted = true;
		return NULL;
	}
	b->left -= size;
	return malloc(size ? size : 1);
}

static inline void kho_budget_free(void *data, void *p)
{
	free(p);
}

static inline void kho_budget_init(struct kho_budget *b, size_t bytes)
{
	*b = (struct kho_budget){
		.allocator = {
			.alloc = kho_budget_alloc,
			.free = kho_budget_free,
			.allocator_data = b,
		},
		.left = bytes,
	};
}

#endif
