/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Live update notes in kernels: made by hand, compressed by the tools a kernel's build uses. */
#include <elf.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../daemon/khoctl/compat.h"
#include "common.h"

#define SECTS	4
#define PAYLOAD	64	/* behind the set-up code */

static char dir[] = "/tmp/test-compat-XXXXXX";
static struct compat found;
static const char *why;

static void setup(void)
{
	cr_assert(mkdtemp(dir));
	cr_assert(chdir(dir) == 0);
}

static void teardown(void)
{
	char cmd[64];

	snprintf(cmd, sizeof(cmd), "rm -r %s", dir);
	cr_assert(system(cmd) == 0);
}

TestSuite(compat, .init = setup, .fini = teardown, .timeout = 60);

static size_t note(uint8_t *p, const char *owner, uint32_t type, const char *desc)
{
	Elf32_Nhdr n = { (Elf32_Word)strlen(owner) + 1, (Elf32_Word)strlen(desc) + 1, type };
	size_t name = (n.n_namesz + 3) & ~3U, size = sizeof(n) + name + ((n.n_descsz + 3) & ~3U);

	memset(p, 0, size);
	memcpy(p, &n, sizeof(n));
	memcpy(p + sizeof(n), owner, n.n_namesz);
	memcpy(p + sizeof(n) + name, desc, n.n_descsz);
	return size;
}

/* A vmlinux with the notes of two owners. Return: its size. */
static size_t make_vmlinux(uint8_t *p)
{
	Elf64_Phdr *ph = (void *)(p + sizeof(Elf64_Ehdr));
	Elf64_Ehdr *eh = (void *)p;
	size_t start = sizeof(*eh) + sizeof(*ph), n = start;

	memset(p, 0, start);
	memcpy(eh->e_ident, ELFMAG, SELFMAG);
	eh->e_ident[EI_CLASS] = ELFCLASS64;
	eh->e_phoff = sizeof(*eh);
	eh->e_phentsize = sizeof(*ph);
	eh->e_phnum = 1;
	n += note(p + n, "Linux", 1, "luo-v0");
	n += note(p + n, "LiveUpdate", LIVEUPDATE_NOTE_LUO, "luo-v5");
	n += note(p + n, "LiveUpdate", LIVEUPDATE_NOTE_HANDLER, "memfd-v2");
	n += note(p + n, "LiveUpdate", 77, "of-a-newer-kernel");
	n += note(p + n, "LiveUpdate", LIVEUPDATE_NOTE_FLB, "pci-v1");
	ph->p_type = PT_NOTE;
	ph->p_offset = start;
	ph->p_filesz = n - start;
	return n;
}

static void save(const char *path, const void *p, size_t n)
{
	FILE *f = fopen(path, "we");

	cr_assert(f && fwrite(p, 1, n, f) == n && fclose(f) == 0);
}

/* A bzImage around the vmlinux, packed by @tool. Return: its size. */
static size_t make_bzimage(uint8_t *image, const char *tool)
{
	const uint16_t version = 0x020f, release = 0x300;
	uint8_t elf[1024];
	uint32_t size = (uint32_t)make_vmlinux(elf), offset = PAYLOAD, length;
	uint8_t *payload = image + (SECTS + 1) * 512 + PAYLOAD;
	char cmd[64];
	FILE *f;

	save("vmlinux", elf, size);
	snprintf(cmd, sizeof(cmd), "%s < vmlinux", tool);
	f = popen(cmd, "r");
	cr_assert(f);
	memset(image, 0, 65536);
	length = (uint32_t)fread(payload, 1, 4096, f);
	cr_assert(pclose(f) == 0, "%s", cmd);
	memcpy(payload + length, &size, sizeof(size));
	length += sizeof(size);
	image[0x1f1] = SECTS;
	memcpy(image + 0x202, "HdrS", 4);
	memcpy(image + 0x206, &version, 2);
	memcpy(image + 0x20e, &release, 2);
	strcpy((char *)image + 0x500, "7.3.4-test (someone@somewhere) #1 SMP");
	memcpy(image + 0x248, &offset, 4);
	memcpy(image + 0x24c, &length, 4);
	return (size_t)(payload + length - image);
}

static void expect_notes(void)
{
	cr_assert(found.n == 3, "%zu notes", found.n);
	cr_assert(compat_has(&found, LIVEUPDATE_NOTE_LUO, "luo-v5"));
	cr_assert(compat_has(&found, LIVEUPDATE_NOTE_HANDLER, "memfd-v2"));
	cr_assert(compat_has(&found, LIVEUPDATE_NOTE_FLB, "pci-v1"));
	cr_assert(!compat_has(&found, LIVEUPDATE_NOTE_FLB, "memfd-v2"));
	cr_assert(!compat_has(&found, LIVEUPDATE_NOTE_LUO, "luo-v0"));
}

Test(compat, vmlinux)
{
	uint8_t elf[1024];
	size_t n = make_vmlinux(elf);

	save("vmlinux", elf, n);
	cr_assert(compat_image("vmlinux", &found, &why) == 0, "%s", why);
	expect_notes();
	cr_assert_str_eq(found.release, "");
}

Test(compat, every_compression)
{
	static const char *const tools[] = {
		"gzip -9", "bzip2", "xz --check=crc32", "lzma", "zstd -q -19", "lz4 -q -l -9",
	};
	static uint8_t image[65536];

	for (size_t i = 0; i < sizeof(tools) / sizeof(tools[0]); i++) {
		save("bzImage", image, make_bzimage(image, tools[i]));
		cr_assert(compat_image("bzImage", &found, &why) == 0, "%s: %s", tools[i], why);
		expect_notes();
		cr_assert_str_eq(found.release, "7.3.4-test");
	}
}

/* An image cut off anywhere is refused with a reason. */
Test(compat, cut_off)
{
	static uint8_t image[65536];
	size_t n = make_bzimage(image, "gzip -9");

	for (size_t cut = 0; cut < n; cut += cut < 0x260 || cut > 2500 ? 1 : 97) {
		save("bzImage", image, cut);
		why = NULL;
		cr_assert(compat_image("bzImage", &found, &why) < 0, "cut at %zu", cut);
		cr_assert(why);
	}
}

/* Whatever stands in a header, nothing outside of the file is read (the sanitizer looks on). */
Test(compat, nonsense_in_headers)
{
	static const uint32_t values[] = { 0, 1, 0x7fffffff, 0x80000000, 0xffffffff };
	uint8_t elf[1024];
	size_t n = make_vmlinux(elf);

	for (size_t at = 4; at + 4 <= n; at += 4) {
		for (size_t i = 0; i < sizeof(values) / sizeof(values[0]); i++) {
			uint8_t copy[1024];

			memcpy(copy, elf, n);
			memcpy(copy + at, &values[i], 4);
			save("vmlinux", copy, n);
			(void)compat_image("vmlinux", &found, &why);
		}
	}
}

Test(compat, not_a_kernel)
{
	save("text", "hello", 5);
	cr_assert(compat_image("text", &found, &why) == -ENOEXEC);
	cr_assert_str_eq(why, "it is neither a bzImage nor a vmlinux");
	cr_assert(compat_image("nothing", &found, &why) == -ENOENT);
	cr_assert(compat_image("/dev/zero", &found, &why) == -ENOEXEC);
	cr_assert(compat_image("/", &found, &why) == -ENOEXEC);
}

Test(compat, modules)
{
	char name[64];

	cr_assert(!compat_module("", "memfd-v2", name, sizeof(name)));
	cr_assert(!compat_module("../../tmp", "memfd-v2", name, sizeof(name)));
	cr_assert(!compat_module("0.0.0-none", "memfd-v2", name, sizeof(name)));
}
