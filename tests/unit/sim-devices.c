/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "sim-devices.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <linux/iommufd.h>
#ifndef __counted_by
#define __counted_by(m)
#endif
#include <linux/pci_regs.h>
#include <linux/vfio.h>

#define MAX_CTX 16
#define MAX_DEV 8
#define MAX_OBJ 64

struct area {
	__u64 iova, length, offset;
	__u32 flags;
	ino_t ino;
	int fd;			/* pins the memory */
};

struct table {
	struct area *areas;
	size_t n;
};

struct object {
	__u32 type;		/* enum iommu_object_type; 0: free. The index is the id. */
	struct table table;	/* of an IOAS, and what a frozen HWPT translates */
	__u32 ioas, old_id, old_ioas;
	__u32 flags;		/* enum iommu_hwpt_info_flags */
	int dev;		/* of a device: index */
};

struct ctx {
	bool used, preserved, gone;	/* gone: closed, but devices are bound */
	int server;
	ino_t ino;
	__u64 generation;
	struct object obj[MAX_OBJ];
};

struct dev {
	char name[32];
	int server;		/* -1: nobody has it open */
	ino_t ino;
	bool running, preserved, retrieved;
	int ctx;		/* -1: not bound */
	int incoming;		/* ctx that it came with; -1 */
	__u32 id, hwpt;		/* hwpt: object it is attached to; 0: none */
	__u32 frozen;		/* while it is not bound: what it uses in @incoming */
	enum simdev_irq irq;
	bool may_lose_irq;	/* VFIO_DEVICE_FEATURE_LIVEUPDATE */
};

struct simdev {
	struct ctx ctx[MAX_CTX];
	struct dev dev[MAX_DEV];
	int kept_ctx[MAX_CTX];	/* kexec: the new index of an old context + 1 */
	bool kept_dev[MAX_DEV];
	char refuse[32];
	bool vtd;		/* see simdev_set_vtd() */
	__u32 vtd_mode;
	bool discards;		/* see simdev_set_hitless() */
	char violation[200];
};

static ino_t inode_of(int fd)
{
	struct stat st = {};

	return fstat(fd, &st) < 0 ? 0 : st.st_ino;
}

static void violation(struct simdev *d, const char *what, const char *name)
{
	if (!d->violation[0])
		snprintf(d->violation, sizeof(d->violation), "%s: %s", name, what);
}

static void table_free(struct table *t)
{
	for (size_t i = 0; i < t->n; i++)
		close(t->areas[i].fd);
	free(t->areas);
	*t = (struct table){};
}

static void table_copy(struct table *to, const struct table *from)
{
	to->n = from->n;
	to->areas = calloc(from->n + 1, sizeof(*to->areas));
	if (!to->areas)
		abort();
	for (size_t i = 0; i < from->n; i++) {
		to->areas[i] = from->areas[i];
		to->areas[i].fd = fcntl(from->areas[i].fd, F_DUPFD_CLOEXEC, 3);
	}
}

/* Do both lead to the same bytes everywhere? Areas may be cut differently. */
static bool table_equal(const struct table *a, const struct table *b)
{
	size_t i = 0, k = 0;
	__u64 done_a = 0, done_b = 0;

	while (i < a->n && k < b->n) {
		const struct area *x = &a->areas[i], *y = &b->areas[k];
		__u64 left_x = x->length - done_a, left_y = y->length - done_b;
		__u64 step = left_x < left_y ? left_x : left_y;

		if (x->iova + done_a != y->iova + done_b || x->ino != y->ino ||
		    x->offset + done_a != y->offset + done_b ||
		    (x->flags & 3) != (y->flags & 3))
			return false;
		done_a = left_x == step ? 0 : done_a + step;
		done_b = left_y == step ? 0 : done_b + step;
		i += done_a == 0;
		k += done_b == 0;
	}
	return i == a->n && k == b->n;
}

static struct table *table_of(struct ctx *c, __u32 hwpt)
{
	struct object *o = &c->obj[hwpt];

	return o->type == IOMMU_OBJECT_HWPT_FROZEN ? &o->table : &c->obj[o->ioas].table;
}

static void object_free(struct ctx *c, __u32 id)
{
	table_free(&c->obj[id].table);
	c->obj[id] = (struct object){};
	c->generation++;
}

/* The lowest free id, as in the kernel. */
static __u32 object_new(struct ctx *c, __u32 type)
{
	for (__u32 i = 1; i < MAX_OBJ; i++)
		if (!c->obj[i].type) {
			c->obj[i].type = type;
			c->generation++;
			return i;
		}
	return 0;
}

static bool hwpt_used(struct simdev *d, struct ctx *c, __u32 id)
{
	for (int i = 0; i < MAX_DEV; i++) {
		struct dev *v = &d->dev[i];

		if (v->ctx >= 0 && &d->ctx[v->ctx] == c && v->hwpt == id)
			return true;
		if (v->running && v->ctx < 0 && v->incoming >= 0 &&
		    &d->ctx[v->incoming] == c && v->frozen == id)
			return true;
	}
	return false;
}

static void ctx_free(struct simdev *d, struct ctx *c)
{
	for (int i = 0; i < MAX_DEV; i++) {
		struct dev *v = &d->dev[i];

		if (v->ctx >= 0 && &d->ctx[v->ctx] == c) {
			c->gone = true;	/* goes with the last device */
			return;
		}
		/* The kernel's hold on a frozen domain outlives the file. */
		if (v->running && v->ctx < 0 && v->incoming >= 0 && &d->ctx[v->incoming] == c) {
			c->gone = true;
			return;
		}
	}
	for (__u32 i = 1; i < MAX_OBJ; i++)
		if (c->obj[i].type)
			object_free(c, i);
	if (c->server >= 0)
		close(c->server);
	*c = (struct ctx){ .server = -1 };
}

static void put_auto(struct simdev *d, struct ctx *c, __u32 hwpt)
{
	if (hwpt && c->obj[hwpt].flags & IOMMU_HWPT_INFO_AUTO && !hwpt_used(d, c, hwpt))
		object_free(c, hwpt);
}

/* The functions of a slot are one IOMMU group. */
static bool same_group(const struct dev *a, const struct dev *b)
{
	size_t n = strcspn(a->name, ".");

	return n > 0 && a->name[n] && strncmp(a->name, b->name, n + 1) == 0;
}

/* Does a device of the group use the frozen HWPT of that context without being bound? */
static struct dev *unbound(struct simdev *d, const struct dev *v, int ctx)
{
	for (int i = 0; i < MAX_DEV; i++)
		if (&d->dev[i] != v && same_group(v, &d->dev[i]) && d->dev[i].incoming == ctx)
			return &d->dev[i];
	return NULL;
}

/* The last one that is bound takes those of its group along that are not. */
static bool last_bound(struct simdev *d, const struct dev *v)
{
	if (v->ctx < 0 || !v->hwpt || d->ctx[v->ctx].obj[v->hwpt].type != IOMMU_OBJECT_HWPT_FROZEN)
		return false;
	for (int i = 0; i < MAX_DEV; i++)
		if (&d->dev[i] != v && same_group(v, &d->dev[i]) && d->dev[i].ctx == v->ctx &&
		    d->dev[i].hwpt)
			return false;
	return true;
}

/* The last close of a device, or the kernel's decision: no DMA any more. */
static void dev_stop(struct simdev *d, struct dev *v)
{
	while (last_bound(d, v) && unbound(d, v, v->ctx))
		dev_stop(d, unbound(d, v, v->ctx));
	struct ctx *c = v->ctx >= 0 ? &d->ctx[v->ctx] : NULL;
	struct ctx *in = v->incoming >= 0 ? &d->ctx[v->incoming] : NULL;
	__u32 hwpt = v->hwpt;

	v->running = false;
	v->incoming = -1;
	v->frozen = 0;
	if (c) {
		v->hwpt = 0;
		v->ctx = -1;
		put_auto(d, c, hwpt);
		object_free(c, v->id);
		if (c->gone)
			ctx_free(d, c);
	} else if (in && in->gone) {
		ctx_free(d, in);
	}
	v->preserved = false;
}

struct simdev *simdev_new(void)
{
	struct simdev *d = calloc(1, sizeof(*d));

	if (!d)
		abort();
	for (int i = 0; i < MAX_CTX; i++)
		d->ctx[i].server = -1;
	for (int i = 0; i < MAX_DEV; i++)
		d->dev[i] = (struct dev){ .server = -1, .ctx = -1, .incoming = -1 };
	return d;
}

void simdev_free(struct simdev *d)
{
	for (int i = 0; i < MAX_DEV; i++) {
		dev_stop(d, &d->dev[i]);
		if (d->dev[i].server >= 0)
			close(d->dev[i].server);
	}
	for (int i = 0; i < MAX_CTX; i++)
		if (d->ctx[i].used)
			ctx_free(d, &d->ctx[i]);
	free(d);
}

static int open_pair(int *server, ino_t *ino)
{
	int sv[2], size = 1 << 20;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv) < 0)
		return -errno;
	(void)fcntl(sv[0], F_SETFL, O_NONBLOCK);
	for (int i = 0; i < 2; i++)
		(void)setsockopt(sv[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	*server = sv[0];
	*ino = inode_of(sv[1]);
	return sv[1];
}

static int ctx_new(struct simdev *d, int *index)
{
	for (int i = 0; i < MAX_CTX; i++) {
		struct ctx *c = &d->ctx[i];

		if (c->used)
			continue;
		*c = (struct ctx){ .used = true, .generation = 1 };
		*index = i;
		return open_pair(&c->server, &c->ino);
	}
	return -ENOMEM;
}

int simdev_open(struct simdev *d, const char *path)
{
	const char *name = strrchr(path, '/') + 1;
	struct dev *free_slot = NULL;
	int index;

	if (strcmp(path, "/dev/iommu") == 0)
		return ctx_new(d, &index);
	for (int i = 0; i < MAX_DEV; i++) {
		struct dev *v = &d->dev[i];

		if (strcmp(v->name, name) == 0) {
			if (v->server >= 0 || v->incoming >= 0)
				return -EBUSY;
			return open_pair(&v->server, &v->ino);
		}
		if (!v->name[0] && !free_slot)
			free_slot = v;
	}
	if (!free_slot)
		return -ENOMEM;
	snprintf(free_slot->name, sizeof(free_slot->name), "%s", name);
	return open_pair(&free_slot->server, &free_slot->ino);
}

size_t simdev_sockets(struct simdev *d, int *fds, size_t max)
{
	size_t n = 0;

	for (int i = 0; i < MAX_CTX && n < max; i++)
		if (d->ctx[i].used && d->ctx[i].server >= 0)
			fds[n++] = d->ctx[i].server;
	for (int i = 0; i < MAX_DEV && n < max; i++)
		if (d->dev[i].server >= 0)
			fds[n++] = d->dev[i].server;
	return n;
}

static int ctx_by_ino(struct simdev *d, ino_t ino)
{
	for (int i = 0; i < MAX_CTX; i++)
		if (d->ctx[i].used && d->ctx[i].ino == ino)
			return i;
	return -1;
}

static struct dev *dev_by_ino(struct simdev *d, ino_t ino)
{
	for (int i = 0; i < MAX_DEV; i++)
		if (d->dev[i].server >= 0 && d->dev[i].ino == ino)
			return &d->dev[i];
	return NULL;
}

static int map_file(struct ctx *c, struct iommu_ioas_map_file *a, int fd)
{
	struct object *o = a->ioas_id < MAX_OBJ ? &c->obj[a->ioas_id] : NULL;
	struct stat st = {};
	struct area *areas;
	size_t at = 0;

	if (!o || o->type != IOMMU_OBJECT_IOAS)
		return -ENOENT;
	if (fd < 0 || fstat(fd, &st) < 0)
		return -EBADF;
	if (a->length == 0 || a->start + a->length > (__u64)(st.st_size + 4095) / 4096 * 4096)
		return -EINVAL;
	while (at < o->table.n && o->table.areas[at].iova < a->iova)
		at++;
	if ((at > 0 && o->table.areas[at - 1].iova + o->table.areas[at - 1].length > a->iova) ||
	    (at < o->table.n && a->iova + a->length > o->table.areas[at].iova))
		return -EEXIST;
	areas = realloc(o->table.areas, (o->table.n + 1) * sizeof(*areas));
	if (!areas)
		return -ENOMEM;
	o->table.areas = areas;
	memmove(areas + at + 1, areas + at, (o->table.n - at) * sizeof(*areas));
	areas[at] = (struct area){
		.iova = a->iova,
		.length = a->length,
		.offset = a->start,
		.flags = (a->flags & IOMMU_IOAS_MAP_READABLE ? 1 : 0) |
			 (a->flags & IOMMU_IOAS_MAP_WRITEABLE ? 2 : 0),
		.ino = st.st_ino,
		.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3),
	};
	o->table.n++;
	c->generation++;
	return 0;
}

static int destroy(struct simdev *d, struct ctx *c, __u32 id)
{
	struct object *o = id < MAX_OBJ ? &c->obj[id] : NULL;

	if (!o || !o->type)
		return -ENOENT;
	if (o->type == IOMMU_OBJECT_DEVICE)
		return -EBUSY;
	if (o->type == IOMMU_OBJECT_IOAS) {
		for (__u32 i = 1; i < MAX_OBJ; i++)
			if (c->obj[i].type == IOMMU_OBJECT_HWPT_PAGING && c->obj[i].ioas == id)
				return -EBUSY;
	} else if (hwpt_used(d, c, id)) {
		return -EBUSY;
	}
	object_free(c, id);
	return 0;
}

static int list_objects(struct simdev *d, struct ctx *c, struct sim_packet *p)
{
	struct iommu_list_objects *a = (void *)p->arg;
	struct iommu_object_entry *e = (void *)p->data;
	__u32 n = 0, id = a->cursor;

	if (a->generation && a->generation != c->generation)
		return -EAGAIN;
	for (; id < MAX_OBJ && n < a->num; id++) {
		struct object *o = &c->obj[id];

		if (!o->type)
			continue;
		e[n++] = (struct iommu_object_entry){
			.id = id,
			.type = o->type,
			.ref_id = o->type == IOMMU_OBJECT_DEVICE ? d->dev[o->dev].hwpt : o->ioas,
			.old_id = o->old_id,
		};
	}
	a->cursor = 0;
	for (__u32 rest = id; rest < MAX_OBJ; rest++)
		if (c->obj[rest].type)
			a->cursor = id;
	a->num = n;
	a->generation = c->generation;
	p->data_size = n * sizeof(*e);
	return 0;
}

static int hwpt_info(struct ctx *c, struct iommu_hwpt_info *a)
{
	struct object *o = a->hwpt_id < MAX_OBJ ? &c->obj[a->hwpt_id] : NULL;

	if (!o || (o->type != IOMMU_OBJECT_HWPT_PAGING && o->type != IOMMU_OBJECT_HWPT_FROZEN))
		return -ENOENT;
	a->out_type = o->type;
	a->out_flags = o->flags;
	a->out_ioas_id = o->ioas;
	a->out_old_id = o->old_id;
	a->out_old_ioas_id = o->old_ioas;
	a->out_format = 1;
	a->out_top_level = 2;
	a->out_page_sizes = 4096;
	a->out_last_iova = UINT64_MAX;
	return 0;
}

/* Data: the attachments, then the name. */
static int device_info(struct simdev *d, struct ctx *c, struct sim_packet *p)
{
	struct iommu_device_info *a = (void *)p->arg;
	struct object *o = a->dev_id < MAX_OBJ ? &c->obj[a->dev_id] : NULL;
	struct iommu_device_attachment *at = (void *)p->data;
	struct dev *v;

	if (!o || o->type != IOMMU_OBJECT_DEVICE)
		return -ENOENT;
	v = &d->dev[o->dev];
	a->out_flags = (d->vtd ? 0 : IOMMU_DEVICE_INFO_NOIOMMU) | (v->preserved ? IOMMU_DEVICE_INFO_PRESERVED : 0);
	a->out_group_id = -1;
	a->num_attachments = v->hwpt ? 1 : 0;
	*at = (struct iommu_device_attachment){ .hwpt_id = v->hwpt };
	a->name_len = 1 + sprintf((char *)(at + 1), "pci/%s", v->name);
	p->data_size = sizeof(*at) + a->name_len;
	return 0;
}

/* As VT-d's driver tells it; data: what it tells. */
static int attach_info(struct simdev *d, struct ctx *c, struct sim_packet *p)
{
	struct iommu_attach_info *a = (void *)p->arg;
	struct object *o = a->dev_id < MAX_OBJ ? &c->obj[a->dev_id] : NULL;
	struct iommu_attach_info_vtd vtd = { .unit = 1, .mode = d->vtd_mode };

	if (!o || o->type != IOMMU_OBJECT_DEVICE || !d->dev[o->dev].hwpt)
		return -ENOENT;
	a->out_hwpt_id = d->dev[o->dev].hwpt;
	vtd.domain_id = 100 + a->out_hwpt_id;
	a->out_data_type = d->vtd ? IOMMU_ATTACH_INFO_TYPE_INTEL_VTD : IOMMU_ATTACH_INFO_TYPE_NONE;
	a->data_len = d->vtd ? sizeof(vtd) : 0;
	memcpy(p->data, &vtd, a->data_len);
	p->data_size = a->data_len;
	return 0;
}

static int list_areas(struct ctx *c, struct sim_packet *p, int fd)
{
	struct iommu_ioas_list_areas *a = (void *)p->arg;
	struct object *o = a->ioas_id < MAX_OBJ ? &c->obj[a->ioas_id] : NULL;
	struct iommu_ioas_area *e = (void *)p->data;
	ino_t ino = fd >= 0 ? inode_of(fd) : 0;
	__u32 n = 0;

	if (!o || o->type != IOMMU_OBJECT_IOAS)
		return -ENOENT;
	if (a->generation && a->generation != c->generation)
		return -EAGAIN;
	for (size_t i = 0; i < o->table.n && n < a->num && n < SIM_DATA_MAX / sizeof(*e); i++) {
		struct area *area = &o->table.areas[i];

		if (area->iova < a->cursor)
			continue;
		e[n++] = (struct iommu_ioas_area){
			.iova = area->iova,
			.length = area->length,
			.offset = area->offset,
			.flags = (area->flags & 3) | IOMMU_AREA_OFFSET_VALID |
				 (ino && area->ino == ino ? IOMMU_AREA_MATCH : 0),
			.backing = IOMMU_AREA_FILE,
		};
	}
	if (n > 0)
		a->cursor = e[n - 1].iova + e[n - 1].length;
	a->num = n;
	a->generation = c->generation;
	p->data_size = n * sizeof(*e);
	return 0;
}

static int ctx_ioctl(struct simdev *d, struct ctx *c, struct sim_packet *p, int fd)
{
	bool change = p->request == IOMMU_IOAS_ALLOC || p->request == IOMMU_IOAS_MAP_FILE ||
		      p->request == IOMMU_HWPT_ALLOC || p->request == IOMMU_DESTROY;

	p->data_size = 0;
	if (change && c->preserved)
		return -EBUSY;
	switch (p->request) {
	case SIM_WHAT:
		p->data_size = 1 + sprintf((char *)p->data, "anon_inode:[iommufd]");
		return 0;
	case IOMMU_IOAS_ALLOC: {
		struct iommu_ioas_alloc *a = (void *)p->arg;

		a->out_ioas_id = object_new(c, IOMMU_OBJECT_IOAS);
		return a->out_ioas_id ? 0 : -ENOMEM;
	}
	case IOMMU_IOAS_MAP_FILE:
		return map_file(c, (void *)p->arg, fd);
	case IOMMU_HWPT_ALLOC: {
		struct iommu_hwpt_alloc *a = (void *)p->arg;

		if (a->pt_id >= MAX_OBJ || c->obj[a->pt_id].type != IOMMU_OBJECT_IOAS ||
		    a->dev_id >= MAX_OBJ || c->obj[a->dev_id].type != IOMMU_OBJECT_DEVICE)
			return -ENOENT;
		a->out_hwpt_id = object_new(c, IOMMU_OBJECT_HWPT_PAGING);
		c->obj[a->out_hwpt_id].ioas = a->pt_id;
		c->obj[a->out_hwpt_id].flags = IOMMU_HWPT_INFO_NOIOMMU;
		return a->out_hwpt_id ? 0 : -ENOMEM;
	}
	case IOMMU_DESTROY:
		return destroy(d, c, ((struct iommu_destroy *)p->arg)->id);
	case IOMMU_LIST_OBJECTS:
		return list_objects(d, c, p);
	case IOMMU_GET_HWPT_INFO:
		return hwpt_info(c, (void *)p->arg);
	case IOMMU_GET_DEVICE_INFO:
		return device_info(d, c, p);
	case IOMMU_GET_ATTACH_INFO:
		return attach_info(d, c, p);
	case IOMMU_GET_HW_INFO:
		((struct iommu_hw_info *)p->arg)->out_capabilities =
			d->discards ? 0 : IOMMU_HW_CAP_HITLESS_REPLACE;
		return 0;
	case IOMMU_IOAS_LIST_AREAS:
		return list_areas(c, p, fd);
	case IOMMU_LIVEUPDATE_STATUS:
		((struct iommu_liveupdate_status *)p->arg)->out_reason =
			d->refuse[0] ? IOMMU_LIVEUPDATE_NOT_EQUAL :
			d->discards  ? IOMMU_LIVEUPDATE_NOT_HITLESS :
				       IOMMU_LIVEUPDATE_OK;
		return 0;
	}
	return -ENOTTY;
}

static int dev_bind(struct simdev *d, struct dev *v, struct vfio_device_bind_iommufd *a, int fd)
{
	int c = fd >= 0 ? ctx_by_ino(d, inode_of(fd)) : -1;

	if (v->ctx >= 0)
		return -EINVAL;
	if (c < 0)
		return -EBADF;
	if (v->incoming >= 0 && v->incoming != c)
		return -EINVAL;
	v->id = object_new(&d->ctx[c], IOMMU_OBJECT_DEVICE);
	if (!v->id)
		return -ENOMEM;
	d->ctx[c].obj[v->id].dev = (int)(v - d->dev);
	v->ctx = c;
	v->hwpt = v->incoming >= 0 ? v->frozen : 0;
	v->incoming = -1;
	v->frozen = 0;
	a->out_devid = v->id;
	return 0;
}

static bool refused(const struct simdev *d, const struct dev *v)
{
	return strcmp(d->refuse, "*") == 0 || strcmp(d->refuse, v->name) == 0;
}

static int dev_attach(struct simdev *d, struct dev *v, struct vfio_device_attach_iommufd_pt *a)
{
	struct ctx *c = v->ctx >= 0 ? &d->ctx[v->ctx] : NULL;
	__u32 old = v->hwpt, pt = a->pt_id;
	bool frozen, made = false;

	if (!c)
		return -EINVAL;
	if (v->preserved)
		return -EBUSY;
	if (pt >= MAX_OBJ || !c->obj[pt].type)
		return -ENOENT;
	if (c->obj[pt].type == IOMMU_OBJECT_IOAS) {
		__u32 ioas = pt;

		for (pt = 1; pt < MAX_OBJ; pt++)
			if (c->obj[pt].type == IOMMU_OBJECT_HWPT_PAGING && c->obj[pt].ioas == ioas &&
			    c->obj[pt].flags & IOMMU_HWPT_INFO_AUTO)
				break;
		if (pt == MAX_OBJ) {
			pt = object_new(c, IOMMU_OBJECT_HWPT_PAGING);
			if (!pt)
				return -ENOMEM;
			made = true;
			c->obj[pt].ioas = ioas;
			c->obj[pt].flags = IOMMU_HWPT_INFO_AUTO | IOMMU_HWPT_INFO_NOIOMMU;
		}
	} else if (c->obj[pt].type != IOMMU_OBJECT_HWPT_PAGING &&
		   c->obj[pt].type != IOMMU_OBJECT_HWPT_FROZEN) {
		return -EINVAL;
	}
	frozen = old && (c->obj[old].type == IOMMU_OBJECT_HWPT_FROZEN ||
			 c->obj[pt].type == IOMMU_OBJECT_HWPT_FROZEN);
	if ((frozen || a->flags & VFIO_DEVICE_ATTACH_MUST_EQUAL) &&
	    (refused(d, v) || !old || !table_equal(table_of(c, old), table_of(c, pt)))) {
		if (made)
			object_free(c, pt);
		return -EBADE;
	}
	/* What is bound of the group moves together, or not at all */
	if (frozen && c->obj[old].type == IOMMU_OBJECT_HWPT_FROZEN && old != pt &&
	    unbound(d, v, v->ctx)) {
		if (made)
			object_free(c, pt);
		return -EBUSY;
	}
	for (int i = 0; i < MAX_DEV; i++)
		if (same_group(v, &d->dev[i]) && d->dev[i].ctx == v->ctx && d->dev[i].hwpt)
			d->dev[i].hwpt = pt;
	v->hwpt = pt;
	v->running = true;
	a->pt_id = pt;
	c->generation++;
	if (old != pt)
		put_auto(d, c, old);
	return 0;
}

static int dev_feature(struct dev *v, struct vfio_device_feature *a)
{
	struct vfio_device_feature_liveupdate *lu = (void *)a->data;

	if (a->flags != (VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LIVEUPDATE))
		return -ENOTTY;
	if (v->ctx < 0 || a->argsz != sizeof(*a) + sizeof(*lu))
		return -EINVAL;
	if (v->preserved)
		return -EBUSY;
	v->may_lose_irq = lu->flags & VFIO_DEVICE_LIVEUPDATE_MAY_LOSE_IRQ;
	return 0;
}

/* A capability that is none of ours, then MSI-X. */
static int dev_config(const struct dev *v, struct sim_packet *p)
{
	p->data_size = 256;
	memset(p->data, 0, p->data_size);
	p->data[PCI_STATUS] = PCI_STATUS_CAP_LIST;
	p->data[PCI_CAPABILITY_LIST] = 0x50;
	p->data[0x50] = PCI_CAP_ID_PM;
	p->data[0x51] = 0xa0;
	p->data[0xa0] = PCI_CAP_ID_MSIX;
	if (v->irq == SIMDEV_MSIX)
		p->data[0xa0 + PCI_MSIX_FLAGS + 1] = PCI_MSIX_FLAGS_ENABLE >> 8;
	return 0;
}

static int dev_region(struct vfio_region_info *a)
{
	if (a->index != VFIO_PCI_CONFIG_REGION_INDEX)
		return -EINVAL;
	a->offset = 0;
	a->size = 256;
	return 0;
}

static int dev_ioctl(struct simdev *d, struct dev *v, struct sim_packet *p, int fd)
{
	p->data_size = 0;
	switch (p->request) {
	case SIM_WHAT:
		p->data_size = 1 + sprintf((char *)p->data, "anon_inode:[vfio-device]");
		return 0;
	case SIM_FDINFO:
		p->data_size = 1 + sprintf((char *)p->data,
					   "pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:00/%s\n",
					   v->name);
		return 0;
	case SIM_CONFIG:
		return dev_config(v, p);
	case VFIO_DEVICE_FEATURE:
		return dev_feature(v, (void *)p->arg);
	case VFIO_DEVICE_GET_REGION_INFO:
		return dev_region((void *)p->arg);
	case VFIO_DEVICE_BIND_IOMMUFD:
		return dev_bind(d, v, (void *)p->arg, fd);
	case VFIO_DEVICE_ATTACH_IOMMUFD_PT:
		return dev_attach(d, v, (void *)p->arg);
	}
	return -ENOTTY;
}

void simdev_serve(struct simdev *d, int sock)
{
	static struct sim_packet p;
	struct ctx *c = NULL;
	struct dev *v = NULL;
	int fd, r;

	for (int i = 0; i < MAX_CTX; i++)
		if (d->ctx[i].used && d->ctx[i].server == sock)
			c = &d->ctx[i];
	for (int i = 0; i < MAX_DEV; i++)
		if (d->dev[i].server == sock)
			v = &d->dev[i];
	if (!c && !v)
		return;
	r = sim_recv(sock, &p, &fd);
	if (r == -EAGAIN)
		return;
	if (r <= 0) {
		close(sock);
		if (c) {
			c->server = -1;
			ctx_free(d, c);
		} else {
			v->server = -1;
			dev_stop(d, v);
		}
		return;
	}
	p.ret = c ? ctx_ioctl(d, c, &p, fd) : dev_ioctl(d, v, &p, fd);
	for (int i = 0; i < MAX_DEV; i++)
		if (d->dev[i].running && !d->dev[i].hwpt && !d->dev[i].frozen)
			violation(d, "runs without a page table", d->dev[i].name);
	(void)sim_send(sock, &p, -1);
	if (fd >= 0)
		close(fd);
}

bool simdev_is(struct simdev *d, int fd)
{
	ino_t ino = inode_of(fd);

	return ctx_by_ino(d, ino) >= 0 || dev_by_ino(d, ino);
}

static int ctx_preserve(struct simdev *d, struct ctx *c, bool (*member)(void *, ino_t),
			void *userdata)
{
	for (__u32 i = 1; i < MAX_OBJ; i++) {
		struct table *t;

		if (c->obj[i].type == IOMMU_OBJECT_HWPT_FROZEN)
			return -EOPNOTSUPP;
		if (c->obj[i].type != IOMMU_OBJECT_HWPT_PAGING || !hwpt_used(d, c, i))
			continue;
		t = table_of(c, i);
		for (size_t k = 0; k < t->n; k++)
			if (!member(userdata, t->areas[k].ino))
				return -EOPNOTSUPP;
	}
	c->preserved = true;
	return 0;
}

int simdev_preserve(struct simdev *d, int fd, bool (*member)(void *, ino_t), void *userdata)
{
	ino_t ino = inode_of(fd);
	int c = ctx_by_ino(d, ino);
	struct dev *v = dev_by_ino(d, ino);

	if (c >= 0 && d->discards)
		return -EOPNOTSUPP;
	if (c >= 0)
		return ctx_preserve(d, &d->ctx[c], member, userdata);
	if (!v || v->ctx < 0 || !v->hwpt)
		return -EINVAL;
	if (!d->ctx[v->ctx].preserved || !member(userdata, d->ctx[v->ctx].ino))
		return -ENOENT;
	if ((v->irq == SIMDEV_INTX || v->irq == SIMDEV_MSI) && !v->may_lose_irq)
		return -EOPNOTSUPP;
	v->preserved = true;
	return 0;
}

void simdev_unpreserve(struct simdev *d, int fd)
{
	ino_t ino = inode_of(fd);
	int c = ctx_by_ino(d, ino);
	struct dev *v = dev_by_ino(d, ino);

	if (c >= 0)
		d->ctx[c].preserved = false;
	if (v)
		v->preserved = false;
}

int simdev_can_finish(struct simdev *d, int fd)
{
	ino_t ino = inode_of(fd);
	int c = ctx_by_ino(d, ino);
	struct dev *v = dev_by_ino(d, ino);

	if (v && v->incoming >= 0)
		return -EBUSY;
	for (__u32 i = 1; c >= 0 && i < MAX_OBJ; i++)
		if (d->ctx[c].obj[i].type == IOMMU_OBJECT_HWPT_FROZEN && hwpt_used(d, &d->ctx[c], i))
			return -EBUSY;
	return 0;
}

void simdev_abandon(struct simdev *d, int fd)
{
	struct dev *v = dev_by_ino(d, inode_of(fd));

	if (v && v->incoming >= 0)
		dev_stop(d, v);
}

/* Memory first, then contexts, then devices: what is kept of a device needs its context. */
static int kexec_ctx(struct simdev *d, int old_index)
{
	struct ctx *old = &d->ctx[old_index], *c;
	int index, fd = ctx_new(d, &index);

	if (fd < 0)
		abort();
	c = &d->ctx[index];
	for (__u32 i = 1; i < MAX_OBJ; i++) {
		__u32 id;

		if (old->obj[i].type != IOMMU_OBJECT_HWPT_PAGING || !hwpt_used(d, old, i))
			continue;
		id = object_new(c, IOMMU_OBJECT_HWPT_FROZEN);
		table_copy(&c->obj[id].table, table_of(old, i));
		c->obj[id].old_id = i;
		c->obj[id].old_ioas = old->obj[i].ioas;
		c->obj[id].flags = IOMMU_HWPT_INFO_NOIOMMU;
	}
	d->kept_ctx[old_index] = index + 1;
	return fd;
}

static int kexec_dev(struct simdev *d, struct dev *v)
{
	int index = d->kept_ctx[v->ctx] - 1, fd, server;
	ino_t ino;

	if (index < 0)
		abort();
	for (__u32 i = 1; i < MAX_OBJ; i++)
		if (d->ctx[index].obj[i].old_id == v->hwpt)
			v->frozen = i;
	fd = open_pair(&server, &ino);
	close(v->server);
	v->server = server;
	v->ino = ino;
	v->incoming = index;
	v->ctx = -1;
	v->hwpt = 0;
	v->preserved = false;
	v->may_lose_irq = false;
	if (v->irq != SIMDEV_MSIX)
		v->irq = SIMDEV_NONE;
	d->kept_dev[v - d->dev] = true;
	return fd;
}

int simdev_kexec(struct simdev *d, int fd)
{
	ino_t ino = inode_of(fd);
	int c = ctx_by_ino(d, ino);

	return c >= 0 ? kexec_ctx(d, c) : kexec_dev(d, dev_by_ino(d, ino));
}

void simdev_kexec_end(struct simdev *d)
{
	bool fresh[MAX_CTX] = {};

	for (int i = 0; i < MAX_CTX; i++)
		if (d->kept_ctx[i])
			fresh[d->kept_ctx[i] - 1] = true;
	for (int i = 0; i < MAX_DEV; i++) {
		struct dev *v = &d->dev[i];

		if (!v->name[0] || d->kept_dev[i])
			continue;
		if (v->preserved)
			violation(d, "was preserved and is lost", v->name);
		dev_stop(d, v);
		if (v->server >= 0)
			close(v->server);
		v->server = -1;
	}
	for (int i = 0; i < MAX_CTX; i++)
		if (d->ctx[i].used && !fresh[i]) {
			if (d->ctx[i].server >= 0)
				close(d->ctx[i].server);
			d->ctx[i].server = -1;
			ctx_free(d, &d->ctx[i]);
		}
	memset(d->kept_ctx, 0, sizeof(d->kept_ctx));
	memset(d->kept_dev, 0, sizeof(d->kept_dev));
}

const char *simdev_violation(struct simdev *d)
{
	return d->violation[0] ? d->violation : NULL;
}

static struct dev *dev_by_name(struct simdev *d, const char *name)
{
	for (int i = 0; i < MAX_DEV; i++)
		if (strcmp(d->dev[i].name, name) == 0)
			return &d->dev[i];
	return NULL;
}

bool simdev_running(struct simdev *d, const char *name)
{
	struct dev *v = dev_by_name(d, name);

	return v && v->running;
}

const char *simdev_attached(struct simdev *d, const char *name)
{
	struct dev *v = dev_by_name(d, name);

	if (v && v->ctx < 0 && v->incoming >= 0)
		return "frozen";
	if (!v || v->ctx < 0 || !v->hwpt)
		return "none";
	return d->ctx[v->ctx].obj[v->hwpt].type == IOMMU_OBJECT_HWPT_FROZEN ? "frozen" : "paging";
}

void simdev_set_vtd(struct simdev *d, __u32 mode)
{
	d->vtd = true;
	d->vtd_mode = mode;
}

void simdev_set_hitless(struct simdev *d, bool hitless)
{
	d->discards = !hitless;
}

void simdev_set_irq(struct simdev *d, const char *name, enum simdev_irq irq)
{
	struct dev *v = dev_by_name(d, name);

	if (v)
		v->irq = irq;
}

void simdev_refuse_replace(struct simdev *d, const char *name)
{
	snprintf(d->refuse, sizeof(d->refuse), "%s", name);
}
