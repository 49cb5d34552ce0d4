/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <archive.h>
#include <archive_entry.h>
#include <elf.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <libkmod.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "compat.h"

#define NOTE_NAME	LIVEUPDATE_NOTE_NAME
#define MODALIAS	"liveupdate-"	/* LIVEUPDATE_MODALIAS in include/linux/liveupdate.h */
#define MAX_VMLINUX	(1U << 30)

/* Where things are in a bzImage: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header" */
#define SETUP_SECTS	0x1f1
#define SETUP_MAGIC	0x202
#define SETUP_VERSION	0x206
#define KERNEL_VERSION	0x20e
#define PAYLOAD_OFFSET	0x248
#define PAYLOAD_LENGTH	0x24c
#define SETUP_END	0x250

struct bytes {
	const uint8_t *p;
	size_t n;
};

static const void *at(struct bytes b, uint64_t offset, uint64_t size)
{
	return offset <= b.n && size <= b.n - offset ? b.p + offset : NULL;
}

static uint32_t le32(const void *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return le32toh(v);
}

static void add(struct compat *c, uint32_t type, struct bytes desc)
{
	const size_t max = sizeof(c->entry[0].string);
	const size_t places = sizeof(c->entry) / sizeof(c->entry[0]);

	if (type < LIVEUPDATE_NOTE_KHO || type > LIVEUPDATE_NOTE_IOMMU || c->n == places)
		return;
	if (!desc.n || desc.n > max || desc.p[desc.n - 1])
		return;
	c->entry[c->n].type = type;
	memcpy(c->entry[c->n].string, desc.p, desc.n);
	c->n++;
}

void compat_notes(struct compat *c, const void *notes, size_t size)
{
	struct bytes b = { notes, size };
	uint64_t offset = 0;

	for (;;) {
		const void *head = at(b, offset, sizeof(Elf32_Nhdr));
		uint64_t name_at = offset + sizeof(Elf32_Nhdr), desc_at;
		const void *name, *desc;
		Elf32_Nhdr nhdr;

		if (!head)
			return;
		memcpy(&nhdr, head, sizeof(nhdr));
		desc_at = name_at + ((nhdr.n_namesz + 3ULL) & ~3ULL);
		name = at(b, name_at, nhdr.n_namesz);
		desc = at(b, desc_at, nhdr.n_descsz);
		if (!name || !desc)
			return;
		if (nhdr.n_namesz == sizeof(NOTE_NAME) && !memcmp(name, NOTE_NAME, sizeof(NOTE_NAME)))
			add(c, nhdr.n_type, (struct bytes){ desc, nhdr.n_descsz });
		offset = desc_at + ((nhdr.n_descsz + 3ULL) & ~3ULL);
	}
}

/* Files of sysfs say no size: read until the end. */
static int read_notes(struct compat *c, const char *path)
{
	char buf[65536];
	size_t n;
	FILE *f;

	f = fopen(path, "re");
	if (!f)
		return -errno;
	n = fread(buf, 1, sizeof(buf), f);
	fclose(f);
	compat_notes(c, buf, n);
	return 0;
}

int compat_running(struct compat *c, const char **why)
{
	glob_t modules = {};
	int r;

	*c = (struct compat){};
	r = read_notes(c, "/sys/kernel/notes");
	if (r < 0) {
		*why = "/sys/kernel/notes cannot be read";
		return r;
	}
	if (glob("/sys/module/*/notes/.note." NOTE_NAME, 0, NULL, &modules) == 0)
		for (size_t i = 0; i < modules.gl_pathc; i++)
			read_notes(c, modules.gl_pathv[i]);
	globfree(&modules);
	return 0;
}

static int notes_of_vmlinux(struct bytes elf, struct compat *c, const char **why)
{
	const Elf64_Ehdr *e = at(elf, 0, sizeof(*e));
	Elf64_Ehdr eh;

	if (!e || memcmp(e, ELFMAG, SELFMAG)) {
		*why = "there is no vmlinux in it";
		return -ENOEXEC;
	}
	memcpy(&eh, e, sizeof(eh));
	if (eh.e_ident[EI_CLASS] != ELFCLASS64 || eh.e_phentsize != sizeof(Elf64_Phdr)) {
		*why = "its vmlinux is not a 64-bit one";
		return -ENOEXEC;
	}
	for (unsigned int i = 0; i < eh.e_phnum; i++) {
		uint64_t offset = (uint64_t)i * sizeof(Elf64_Phdr);
		const void *p = eh.e_phoff <= elf.n ? at(elf, eh.e_phoff + offset, sizeof(Elf64_Phdr))
						    : NULL;
		Elf64_Phdr ph;

		if (!p) {
			*why = "its vmlinux is cut off";
			return -ENOEXEC;
		}
		memcpy(&ph, p, sizeof(ph));
		p = at(elf, ph.p_offset, ph.p_filesz);
		if (ph.p_type == PT_NOTE && p)
			compat_notes(c, p, ph.p_filesz);
	}
	return 0;
}

/*
 * The decompressed size stands in the last four bytes of the payload: gzip puts it there itself,
 * behind the others the build appends it (scripts/Makefile.lib, size_append).
 */
static int unpack(struct bytes payload, struct bytes *vmlinux, const char **why)
{
	uint32_t size = payload.n > 4 ? le32(payload.p + payload.n - 4) : 0;
	bool gzip = payload.n > 4 && payload.p[0] == 0x1f && payload.p[1] == 0x8b;
	struct archive_entry *entry;
	struct archive *a;
	uint8_t *out;
	size_t n = 0;
	la_ssize_t r = 0;

	*why = "its payload has no believable size";
	if (!size || size > MAX_VMLINUX)
		return -ENOEXEC;
	*why = "not enough memory";
	out = malloc(size);
	a = archive_read_new();
	if (!out || !a) {
		free(out);
		archive_read_free(a);
		return -ENOMEM;
	}
	*why = "its payload cannot be decompressed";
	archive_read_support_filter_all(a);
	archive_read_support_format_raw(a);
	if (archive_read_open_memory(a, payload.p, payload.n - (gzip ? 0 : 4)) == ARCHIVE_OK &&
	    archive_read_next_header(a, &entry) == ARCHIVE_OK) {
		do {
			r = archive_read_data(a, out + n, size - n);
			n += r > 0 ? (size_t)r : 0;
		} while (r > 0 && n < size);
	}
	archive_read_free(a);
	if (n < size) {
		free(out);
		return -ENOEXEC;
	}
	*vmlinux = (struct bytes){ out, n };
	return 0;
}

/* The string that starts with what uname -r says; its offset does not count the boot sector. */
static void release_of(struct bytes image, struct compat *c)
{
	uint16_t offset;
	const char *s;
	size_t n;

	memcpy(&offset, image.p + KERNEL_VERSION, sizeof(offset));
	s = at(image, le16toh(offset) + 0x200ULL, sizeof(c->release));
	if (!offset || !s)
		return;
	n = strcspn(s, " ");
	if (n < sizeof(c->release))
		snprintf(c->release, sizeof(c->release), "%.*s", (int)n, s);
}

static int notes_of_bzimage(struct bytes image, struct compat *c, const char **why)
{
	const uint8_t *head = at(image, 0, SETUP_END);
	struct bytes payload, vmlinux = {};
	uint64_t sects, offset;
	int r;

	if (!head || memcmp(head + SETUP_MAGIC, "HdrS", 4)) {
		*why = "it is neither a bzImage nor a vmlinux";
		return -ENOEXEC;
	}
	if (head[SETUP_VERSION + 1] < 2 || (head[SETUP_VERSION + 1] == 2 && head[SETUP_VERSION] < 8)) {
		*why = "its boot protocol is older than 2.08";
		return -ENOEXEC;
	}
	release_of(image, c);
	sects = head[SETUP_SECTS] ? head[SETUP_SECTS] : 4;
	offset = (sects + 1) * 512 + le32(head + PAYLOAD_OFFSET);
	payload.n = le32(head + PAYLOAD_LENGTH);
	payload.p = at(image, offset, payload.n);
	if (!payload.p) {
		*why = "it is cut off";
		return -ENOEXEC;
	}
	r = unpack(payload, &vmlinux, why);
	if (r < 0)
		return r;
	r = notes_of_vmlinux(vmlinux, c, why);
	free((void *)vmlinux.p);
	return r;
}

int compat_image(const char *path, struct compat *c, const char **why)
{
	struct bytes image;
	struct stat st;
	int fd, r = 0;
	void *p;

	*c = (struct compat){};
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) < 0)
		r = -errno;
	else if (!S_ISREG(st.st_mode) || !st.st_size)
		r = -ENOEXEC;
	p = r ? MAP_FAILED : mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (!r && p == MAP_FAILED)
		r = -errno;
	if (fd >= 0)
		close(fd);
	if (r < 0) {
		*why = r == -ENOEXEC ? "it is not a file with a kernel in it" : strerror(-r);
		return r;
	}
	image = (struct bytes){ p, (size_t)st.st_size };
	if (image.n >= SELFMAG && !memcmp(image.p, ELFMAG, SELFMAG))
		r = notes_of_vmlinux(image, c, why);
	else
		r = notes_of_bzimage(image, c, why);
	munmap(p, image.n);
	return r;
}

bool compat_has(const struct compat *c, uint32_t type, const char *string)
{
	for (size_t i = 0; i < c->n; i++)
		if (c->entry[i].type == type && !strcmp(c->entry[i].string, string))
			return true;
	return false;
}

bool compat_module(const char *release, const char *string, char *name, size_t size)
{
	char dir[128], alias[128];
	struct kmod_list *list = NULL;
	struct kmod_module *module;
	struct kmod_ctx *ctx;

	if (!release[0] || strchr(release, '/'))
		return false;
	snprintf(dir, sizeof(dir), "/lib/modules/%s", release);
	snprintf(alias, sizeof(alias), MODALIAS "%s", string);
	ctx = kmod_new(dir, NULL);
	if (!ctx)
		return false;
	if (kmod_module_new_from_lookup(ctx, alias, &list) >= 0 && list) {
		module = kmod_module_get_module(list);
		snprintf(name, size, "%s", kmod_module_get_name(module));
		kmod_module_unref(module);
	} else {
		size = 0;
	}
	kmod_module_unref_list(list);
	kmod_unref(ctx);
	return size > 0;
}

const char *compat_type_name(uint32_t type)
{
	switch (type) {
	case LIVEUPDATE_NOTE_KHO:
		return "version of KHO";
	case LIVEUPDATE_NOTE_LUO:
		return "version of LUO";
	case LIVEUPDATE_NOTE_HANDLER:
		return "file handler";
	case LIVEUPDATE_NOTE_FLB:
		return "shared data (FLB)";
	case LIVEUPDATE_NOTE_IOMMU:
		return "IOMMU";
	default:
		return "note";
	}
}
