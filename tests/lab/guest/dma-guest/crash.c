// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A panic with a crash kernel loaded, and that kernel
 *
 * Nobody stops the device. The crash kernel copies what the IOMMU translates it by, and the
 * device goes on writing to its buffers, which belong to what the crash kernel is to save. That
 * has memory of its own, in which nothing may change.
 */

#include "guest.h"
#include <elf.h>

#define MARK	0x68736172632d6f68ull
#define PFN	((1ull << 55) - 1)	/* of an entry of /proc/self/pagemap */

/* A word behind the state, where the device does not write. Returns its physical address. */
static uint64_t make_mark(void)
{
	uint64_t *mark = (void *)(mem + MEM_SIZE - PAGE), entry;
	int fd = open("/proc/self/pagemap", O_RDONLY);

	_Static_assert(sizeof(struct state) <= STATE_SIZE - PAGE, "no room for the mark");
	*mark = MARK;
	check(fd, "pagemap");
	check(pread(fd, &entry, sizeof(entry), (uintptr_t)mark / PAGE * sizeof(entry)), "pagemap");
	close(fd);
	return (entry & PFN) * PAGE;
}

/* In the last kernel, with everything as it is at work. */
void crash_end(void)
{
	int fd = open("/proc/sysrq-trigger", O_WRONLY);
	char add[64];

	check(fd, "sysrq-trigger");
	snprintf(add, sizeof(add), "dma.mark=%#llx", (unsigned long long)make_mark());
	load_crash_kernel(add);
	run_for(0.5);
	say("CRASH");
	check(write(fd, "c", 1), "sysrq-trigger");
	die("crash");
}

/* What the dump has at the physical address @pa, or 0. */
static uint64_t word_at(int fd, const Elf64_Ehdr *elf, uint64_t pa)
{
	uint64_t word = 0;

	for (int i = 0; i < elf->e_phnum; i++) {
		Elf64_Phdr p;

		check(pread(fd, &p, sizeof(p), elf->e_phoff + i * sizeof(p)), "program header");
		if (p.p_type == PT_LOAD && pa >= p.p_paddr && pa - p.p_paddr < p.p_filesz)
			check(pread(fd, &word, sizeof(word), p.p_offset + pa - p.p_paddr), "dump");
	}
	return word;
}

static void read_all(int fd)
{
	static uint8_t buf[1 << 20];
	uint64_t total = 0;
	ssize_t n;

	while ((n = read(fd, buf, sizeof(buf))) > 0)
		total += n;
	say("%s the dump was read: %llu MiB", n ? "FAIL" : "ok", (unsigned long long)total >> 20);
}

/* The crash kernel */
void __attribute__((noreturn)) crashed(void)
{
	int fd = open("/proc/vmcore", O_RDONLY);
	Elf64_Ehdr elf = {};

	say("CRASHED");
	fill_memory();
	check(fd, "/proc/vmcore");
	check(pread(fd, &elf, sizeof(elf), 0), "/proc/vmcore");
	verdict(!memcmp(elf.e_ident, ELFMAG, SELFMAG), "the dump is an ELF file", 0);
	verdict(word_at(fd, &elf, strtoull(param("dma.mark", "0"), NULL, 0)) == MARK,
		"the memory of the device is in it", 0);
	read_all(fd);
	sleep(2);
	check_filler();
	say("STOP");
	power_off();
}
