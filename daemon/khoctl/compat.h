/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a kernel can take over, read from the ELF notes that our series puts into kernels and
 * modules ("What a kernel can take over" in include/uapi/linux/liveupdate.h).
 */
#ifndef KHOCTL_COMPAT_H
#define KHOCTL_COMPAT_H

#include <linux/liveupdate.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * struct compat - what a kernel can take over
 * @n: number of strings
 * @entry: their types (enum liveupdate_note_type) and the strings
 * @release: of an image: what uname -r will say, "" if the image does not tell
 */
struct compat {
	size_t n;
	struct {
		uint32_t type;
		char string[64];
	} entry[64];
	char release[65];
};

/**
 * compat_notes() - take the live update notes out of a note segment
 * @c: receives them; not cleared
 * @notes, @size: the segment (bytes), 4-byte aligned within itself (elf(5))
 * Notes of other owners and of unknown types are left out, a damaged note ends the reading.
 */
void compat_notes(struct compat *c, const void *notes, size_t size);

/**
 * compat_running() - what the running kernel and its loaded modules can take over
 * @c: receives it
 * @why: receives the reason of a failure, static or up to @c's next use
 * Return: 0 or -errno.
 */
int compat_running(struct compat *c, const char **why);

/**
 * compat_image() - what a kernel image can take over
 * @path: a bzImage (Documentation/arch/x86/boot.rst, compressed by anything but LZO) or a vmlinux
 * @c: receives it
 * @why: receives the reason of a failure, static
 * Return: 0 or -errno.
 */
int compat_image(const char *path, struct compat *c, const char **why);

/** compat_has() - whether @c has this string */
bool compat_has(const struct compat *c, uint32_t type, const char *string);

/**
 * compat_module() - the module of a kernel that has a file handler, or an IOMMU's domains
 * @release: the kernel's
 * @string: what its note would say
 * @name, @size: receives the module's name
 * Return: whether there is one, by the aliases in /lib/modules.
 */
bool compat_module(const char *release, const char *string, char *name, size_t size);

/** compat_type_name() - "version of KHO", "file handler", ... for a sentence */
const char *compat_type_name(uint32_t type);

#endif
