/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_GRAPH_H
#define KHO_GRAPH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kho/error.h>

#ifdef __cplusplus
extern "C" {
#endif

/** KHO_GRAPH_OBJECTS_MAX - IOAS, HWPTs and devices in one graph */
#define KHO_GRAPH_OBJECTS_MAX 2048
/** KHO_GRAPH_AREAS_MAX - areas in one graph */
#define KHO_GRAPH_AREAS_MAX (4u << 20)
/** KHO_DEVICE_NAME_MAX - bytes in the name of a device, without the NUL */
#define KHO_DEVICE_NAME_MAX 63
/** KHO_NONE - no such object, where an index is expected */
#define KHO_NONE UINT32_MAX

/** enum kho_area_flags - what a device may do with an area */
enum kho_area_flags {
	KHO_AREA_READABLE = 1 << 0,
	KHO_AREA_WRITEABLE = 1 << 1,
};

/**
 * struct kho_area - a mapping
 * @iova: first IOVA
 * @length: bytes, never 0
 * @offset: of @iova in the memfd, bytes
 * @backing: the memfd: index in &kho_graph.backings
 * @flags: enum kho_area_flags
 */
struct kho_area {
	uint64_t iova;
	uint64_t length;
	uint64_t offset;
	uint32_t backing;
	uint32_t flags;
};

/**
 * struct kho_ioas - an IO address space
 * @id: in the kernel that it was read from
 * @client_id: that its client knows it by
 * @areas: ascending, not overlapping
 * @n_areas: how many
 */
struct kho_ioas {
	uint32_t id;
	uint32_t client_id;
	struct kho_area *areas;
	size_t n_areas;
};

/** enum kho_hwpt_flags - the same bits as the kernel's enum iommu_hwpt_info_flags */
enum kho_hwpt_flags {
	KHO_HWPT_AUTO = 1 << 0,			/* made by attaching a device to an IOAS */
	KHO_HWPT_NEST_PARENT = 1 << 1,
	KHO_HWPT_DIRTY = 1 << 2,
	KHO_HWPT_DIRTY_TRACKING = 1 << 3,
	KHO_HWPT_ENFORCE_CC = 1 << 4,
	KHO_HWPT_PASID = 1 << 5,
	KHO_HWPT_FAULT = 1 << 6,
	KHO_HWPT_NOIOMMU = 1 << 7,
};

/**
 * struct kho_hwpt - a page table
 * @id: in the kernel that it was read from
 * @client_id: that its client knows it by
 * @ioas: index of its IOAS; KHO_NONE if it is frozen
 * @flags: enum kho_hwpt_flags
 * @format: of the page table, see struct iommu_hwpt_info
 * @top_level: of the page table
 * @page_sizes: bit n: pages of 2^n bytes are possible
 * @first_iova: that can be mapped
 * @last_iova: that can be mapped
 * @frozen: it is one of the previous kernel
 * @old_id: if so, its id there
 */
struct kho_hwpt {
	uint32_t id;
	uint32_t client_id;
	uint32_t ioas;
	uint32_t flags;
	uint32_t format;
	uint32_t top_level;
	uint64_t page_sizes;
	uint64_t first_iova;
	uint64_t last_iova;
	bool frozen;
	uint32_t old_id;
};

/**
 * enum kho_translation_mode - how an IOMMU translates DMA
 * @KHO_TRANSLATION_UNKNOWN: not asked for, there is no IOMMU, or it does not tell
 * @KHO_TRANSLATION_LEGACY: VT-d in legacy mode, by a second-stage table
 * @KHO_TRANSLATION_SECOND_STAGE: VT-d in scalable mode, likewise
 * @KHO_TRANSLATION_FIRST_STAGE: VT-d in scalable mode, by a first-stage table
 * @KHO_TRANSLATION_NESTED: VT-d in scalable mode, by a table of either stage
 */
enum kho_translation_mode {
	KHO_TRANSLATION_UNKNOWN = 0,
	KHO_TRANSLATION_LEGACY = 1,
	KHO_TRANSLATION_SECOND_STAGE = 2,
	KHO_TRANSLATION_FIRST_STAGE = 3,
	KHO_TRANSLATION_NESTED = 4,
};

/**
 * struct kho_translation - what an IOMMU does for a device at some moment
 * @mode: how it translates; if that is unknown there is nothing else
 * @unit: number of the IOMMU, N of dmarN
 * @domain_id: by which the IOMMU knows the page table; another one after each replace
 * @hitless: the device can be moved to another page table with no DMA discarded
 */
struct kho_translation {
	enum kho_translation_mode mode;
	uint32_t unit;
	uint32_t domain_id;
	bool hitless;
};

/** kho_translation_mode_name() - "legacy" etc.; "unknown" for every other value; static */
const char *kho_translation_mode_name(enum kho_translation_mode mode);

/**
 * struct kho_device - a device that is bound
 * @id: in the kernel that it was read from
 * @client_id: that its client knows it by
 * @token: of its file; 0 if that is not known
 * @name: bus and name as in sysfs, with a slash between
 * @noiommu: there is no IOMMU for it
 * @hwpt: index of what it is attached to; KHO_NONE
 * @may_have_lost_irq: in a handover since it was registered
 * @translation: for people to see, nothing depends on it; unknown unless from
 *	kho_client_show()
 */
struct kho_device {
	uint32_t id;
	uint32_t client_id;
	uint64_t token;
	char name[KHO_DEVICE_NAME_MAX + 1];
	bool noiommu;
	uint32_t hwpt;
	bool may_have_lost_irq;
	struct kho_translation translation;
};

/**
 * struct kho_context - an iommufd and what is in it
 * @token: of its file
 * @ioas: by ascending id, @n_ioas of them; likewise the others
 * @hwpts: page tables
 * @devices: devices
 */
struct kho_context {
	uint64_t token;
	struct kho_ioas *ioas;
	size_t n_ioas;
	struct kho_hwpt *hwpts;
	size_t n_hwpts;
	struct kho_device *devices;
	size_t n_devices;
};

/**
 * struct kho_graph - the contexts of one workload
 * @contexts: @n_contexts of them
 * @backings: tokens of the memfds that areas refer to, @n_backings of them
 *
 * A plain model, which knows nothing of descriptors or of the kernel.
 */
struct kho_graph {
	struct kho_context *contexts;
	size_t n_contexts;
	uint64_t *backings;
	size_t n_backings;
};

/** kho_graph_new() - an empty one, freed with kho_graph_free(). Return: it, NULL without memory. */
struct kho_graph *kho_graph_new(void);
/** kho_graph_free() - NULL is allowed. Return: NULL. */
struct kho_graph *kho_graph_free(struct kho_graph *graph);
/** kho_graph_n_areas() - in all of its contexts */
size_t kho_graph_n_areas(const struct kho_graph *graph);

/**
 * kho_graph_add_context() - append an empty context
 *
 * Return: it, owned by the graph and valid until the next is added; NULL without memory.
 */
struct kho_context *kho_graph_add_context(struct kho_graph *graph, uint64_t token);
/** kho_graph_add_backing() - append a memfd by its token. Return: 0, -ENOMEM. */
int kho_graph_add_backing(struct kho_graph *graph, uint64_t token);

/** kho_context_clear() - free what is in it; it is empty then, but for its token */
void kho_context_clear(struct kho_context *context);
/**
 * kho_context_add_ioas() - append an IOAS; likewise the others
 *
 * Return: it, zeroed, owned by the context and valid until the next is added; NULL
 * without memory.
 */
struct kho_ioas *kho_context_add_ioas(struct kho_context *context);
struct kho_hwpt *kho_context_add_hwpt(struct kho_context *context);
struct kho_device *kho_context_add_device(struct kho_context *context);
/** kho_ioas_add_areas() - append room for @n areas. Return: the first, NULL without memory. */
struct kho_area *kho_ioas_add_areas(struct kho_ioas *ioas, size_t n);

/** kho_context_find_ioas() - index of the IOAS with that id, KHO_NONE if there is none */
uint32_t kho_context_find_ioas(const struct kho_context *context, uint32_t id);
/** kho_context_find_hwpt() - index of the HWPT with that id, KHO_NONE if there is none */
uint32_t kho_context_find_hwpt(const struct kho_context *context, uint32_t id);
/** kho_context_find_device() - index of the device of that name, KHO_NONE if there is none */
uint32_t kho_context_find_device(const struct kho_context *context, const char *name);

/**
 * kho_graph_check() - does it make sense?
 * @graph: from anywhere, indices and flags trusted in nothing
 * @err: names the object that does not
 *
 * Counts within their caps; ids unique in a context and not 0; indices in range; areas
 * ascending, not empty, not overlapping; nothing frozen, with a fault queue or with dirty
 * tracking on, which a graph cannot carry.
 * Return: 0, -EFBIG, -EINVAL, -EOPNOTSUPP, -ENOMEM.
 */
int kho_graph_check(const struct kho_graph *graph, struct kho_error **err);

#ifdef __cplusplus
}
#endif
#endif
