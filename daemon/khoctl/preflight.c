/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <endian.h>
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include "compat.h"
#include "khoctl.h"

static const char help[] =
	"\n"
	"Looks at everything a handover needs and says what to do about what is missing.\n"
	"Changes nothing. Exit status 5 if a required item is missing.\n"
	"\n"
	"  --kernel FILE  also compare what the kernel in FILE can take over (a bzImage or a\n"
	"                 vmlinux, and its modules in /lib/modules) with the running one, and\n"
	"                 count its size into the scratch memory that it needs\n"
	"  --json         print it as JSON\n";

struct flight {
	struct json j;
	bool json;
	bool quiet;	/* only what is not ok, to stderr */
	bool obstacle;
};

static void item(struct flight *p, const char *name, bool ok, bool required, const char *fmt, ...)
	__attribute__((format(printf, 5, 6)));

static void item(struct flight *p, const char *name, bool ok, bool required, const char *fmt, ...)
{
	const char *verdict = ok ? "ok" : required ? "OBSTACLE" : "warning";
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	p->obstacle |= !ok && required;
	if (p->json) {
		json_open(&p->j, NULL, '{');
		json_string(&p->j, "item", name);
		json_string(&p->j, "verdict", verdict);
		json_string(&p->j, "text", text);
		json_close(&p->j, '}');
	} else if (!p->quiet || !ok) {
		fprintf(p->quiet ? stderr : stdout, "%-9s %-14s %s\n", verdict, name, text);
	}
}

static bool read_line(const char *path, char *buf, size_t size)
{
	FILE *f = fopen(path, "re");
	bool ok;

	if (!f)
		return false;
	ok = fgets(buf, (int)size, f) != NULL;
	fclose(f);
	if (ok)
		buf[strcspn(buf, "\n")] = 0;
	return ok;
}

/* Of KHO's scratch memory, in bytes, from /sys/kernel/kexec. False: the kernel does not tell. */
static bool read_bytes(const char *name, uint64_t *ret)
{
	char path[64], line[32];

	snprintf(path, sizeof(path), "/sys/kernel/kexec/%s", name);
	if (!read_line(path, line, sizeof(line)))
		return false;
	*ret = strtoull(line, NULL, 10);
	return true;
}

/*
 * How much scratch memory there is, and what a kernel like this one takes of it with what is loaded.
 * False: there is no kexec handover, or a kernel that does not tell.
 */
static bool scratch(uint64_t *size, uint64_t *needed, uint64_t *loaded)
{
	*loaded = 0;
	if (!read_bytes("kho_scratch_size", size) || *size == 0 || !read_bytes("kho_scratch_needed", needed))
		return false;
	/* -EBUSY while an image is being loaded, or a kexec begins. */
	for (int i = 0; i < 50 && !read_bytes("kho_image_size", loaded) && errno == EBUSY; i++)
		usleep(100000);
	return true;
}

bool khoctl_loaded_refuses(struct khoctl *ctl)
{
	uint64_t size, needed, loaded;
	char have[32], want[32];
	const char *why;

	/* What khod holds it looks at itself. */
	if (kho_luo_image_refuses(ctl->kho, false, &why) > 0) {
		fprintf(stderr, "khoctl: the loaded kernel would not take over what is held: %s\n", why);
		return true;
	}
	if (scratch(&size, &needed, &loaded) && size < needed + loaded) {
		fprintf(stderr,
			"khoctl: there is %s of scratch memory, and the loaded kernel needs about %s with its initrd: boot with a larger kho_scratch=\n",
			human_size(size, have), human_size(needed + loaded, want));
		return true;
	}
	return false;
}

/* @kernel: going to be loaded instead of what is; NULL: none. */
static void check_kernel(struct flight *p, struct khoctl *ctl, const char *kernel)
{
	const char *why;
	char line[4096];

	if (!read_line("/sys/kernel/kexec_loaded", line, sizeof(line)))
		item(p, "kexec", false, true, "this kernel cannot kexec (CONFIG_KEXEC_FILE)");
	else if (strcmp(line, "1") == 0 && !kernel && kho_luo_image_refuses(ctl->kho, false, &why) > 0)
		item(p, "kexec", false, true,
		     "the loaded kernel would not take over what is held, and a kexec would end in a cold reboot: %s",
		     why);
	else if (strcmp(line, "1") == 0 && !kernel && kho_luo_image_refuses(ctl->kho, true, &why) > 0)
		item(p, "kexec", false, false,
		     "a kernel is loaded, but %s: a kexec with a workload that has some is refused", why);
	else if (strcmp(line, "1") == 0)
		item(p, "kexec", true, true, "a kernel is loaded");
	else
		item(p, "kexec", false, false,
		     "no kernel is loaded: kexec -s -l KERNEL (systemctl kexec loads the default one, if there is a boot loader entry)");
	if (read_line("/proc/sys/kernel/kexec_load_disabled", line, sizeof(line)) &&
	    strcmp(line, "0") != 0)
		item(p, "kexec-load", false, true,
		     "loading a kernel is disabled until the next reboot (kernel.kexec_load_disabled)");
	if (read_line("/proc/cmdline", line, sizeof(line))) {
		if (strstr(line, "liveupdate=off") || strstr(line, "liveupdate=0"))
			item(p, "cmdline", false, true, "this kernel was booted with liveupdate=off");
		if (strstr(line, "kho=off") || strstr(line, "kho=0"))
			item(p, "cmdline", false, true, "this kernel was booted with kho=off");
	}
}

/* Memory that a bzImage takes while it boots, in bytes; 0 for any other file. */
static uint64_t boot_size(const char *path)
{
	/* Documentation/arch/x86/boot.rst: the magic, and init_size. */
	enum { MAGIC = 0x202, INIT_SIZE = 0x260 };
	unsigned char header[INIT_SIZE + sizeof(uint32_t)];
	FILE *f = fopen(path, "re");
	uint32_t size = 0;

	if (!f)
		return 0;
	if (fread(header, sizeof(header), 1, f) == 1 && !memcmp(header + MAGIC, "HdrS", 4))
		memcpy(&size, header + INIT_SIZE, sizeof(size));
	fclose(f);
	return le32toh(size);
}

/*
 * Until it knows what is preserved, the next kernel can use KHO's scratch memory only,
 * and dies before it has a console if there is too little of it.
 */
static void check_scratch(struct flight *p, const char *kernel)
{
	uint64_t size, needed, loaded;
	char have[32], want[32];

	if (!scratch(&size, &needed, &loaded))
		return;
	needed += kernel ? boot_size(kernel) : loaded;
	item(p, "scratch", size >= needed, true,
	     size >= needed ? "%s, a kernel like this one needs about %s" :
	     "%s, but a kernel like this one needs about %s and would die before it has a console: boot with a larger kho_scratch=",
	     human_size(size, have), human_size(needed, want));
}

/* Return: whether the next kernel has what the running one would hand over as @i. */
static bool check_entry(struct flight *p, const char *path, const struct compat *running,
			const struct compat *next, size_t i)
{
	const char *string = running->entry[i].string;
	uint32_t type = running->entry[i].type;
	char module[64];

	if (compat_has(next, type, string))
		return true;
	if ((type == LIVEUPDATE_NOTE_HANDLER || type == LIVEUPDATE_NOTE_IOMMU) &&
	    compat_module(next->release, string, module, sizeof(module))) {
		item(p, "next kernel", true, true, "the %s %s is in its module %s",
		     compat_type_name(type), string, module);
		return true;
	}
	item(p, "next kernel", false, true,
	     "%s has not the %s %s of the running kernel: what depends on it would be lost", path,
	     compat_type_name(type), string);
	return false;
}

static void check_next_kernel(struct flight *p, const char *path)
{
	struct compat running, next;
	const char *why = NULL;
	bool all = true;

	if (compat_running(&running, &why) < 0 || !running.n) {
		item(p, "compatibility", false, true,
		     "the running kernel does not say what it hands over (%s)",
		     why ? why : "no live update notes in /sys/kernel/notes");
		return;
	}
	if (compat_image(path, &next, &why) < 0) {
		item(p, "next kernel", false, true, "%s cannot be read as a kernel: %s", path, why);
		return;
	}
	if (!next.n) {
		item(p, "next kernel", false, true,
		     "%s does not say what it can take over: it was built without the live update series",
		     path);
		return;
	}
	for (size_t i = 0; i < running.n; i++)
		all &= check_entry(p, path, &running, &next, i);
	if (all)
		item(p, "next kernel", true, true, "%s%s%s takes over all that this kernel hands over",
		     path, next.release[0] ? ", " : "", next.release);
}

/* Each device that an IOMMU translates for: can it be moved to a page table of the next kernel? */
static void check_devices(struct flight *p, const struct kho_workload *w, const struct kho_image *image)
{
	const struct kho_graph *g = image ? kho_image_graph(image) : NULL;

	for (size_t i = 0; g && i < g->n_contexts; i++)
		for (size_t j = 0; j < g->contexts[i].n_devices; j++) {
			const struct kho_device *d = &g->contexts[i].devices[j];
			const struct kho_translation *t = &d->translation;

			if (t->mode == KHO_TRANSLATION_UNKNOWN)
				continue;
			item(p, w->name, t->hitless, w->survival == KHO_SURVIVAL_MUST,
			     t->hitless ? "%s, behind dmar%" PRIu32 ": its page table is replaced without a gap" :
			     "%s, behind dmar%" PRIu32 ": the IOMMU could discard its DMA while its page table is replaced",
			     d->name, t->unit);
		}
}

static void check_workload(struct flight *p, const struct kho_workload *w)
{
	bool must = w->survival == KHO_SURVIVAL_MUST;
	char size[32];

	switch (w->state) {
	case KHO_WORKLOAD_HELD:
		/* Pages in scratch were moved out of it when they were preserved, or the last time. */
		item(p, w->name, true, true, "held, %zu files, %s, %s: no page is moved in the blackout",
		     w->n_files, human_size(w->bytes, size),
		     w->memory == KHO_MEMORY_SOON ? "to be preserved before the next kexec" :
						    "preserved already");
		return;
	case KHO_WORKLOAD_LEASED:
		if (w->obstacle[0])
			item(p, w->name, false, must, "leased, and as it is now %s: %s",
			     must ? "it would stop a handover" : "a handover would leave it behind", w->obstacle);
		else
			item(p, w->name, true, true,
			     "leased, %zu files, %s%s: its client is asked before a handover%s", w->n_files,
			     human_size(w->bytes, size),
			     w->memory == KHO_MEMORY_AT_HANDOVER ?
				     ", which could not be preserved ahead of it and takes its time then" :
				     ", preserved already",
			     must ? "" : ", which goes on without it if it is not ready");
		return;
	case KHO_WORKLOAD_UNREADABLE:
		item(p, w->name, true, true, "held; it can be claimed after the kexec only");
		return;
	case KHO_WORKLOAD_CLAIMING:
		item(p, w->name, false, false,
		     "a client is claiming it just now: what it acknowledges is not carried over");
		return;
	case KHO_WORKLOAD_FAILED:
		break;
	}
	item(p, w->name, false, must, "would be lost: %s", w->reason);
}

/* With what is in it, which the list does not tell. */
static void look_at(struct flight *p, struct kho_client *client, const struct kho_workload *listed)
{
	struct kho_workloads *shown = NULL;
	struct kho_image *image = NULL;
	int r = kho_client_show(client, listed->name, &shown, &image, NULL);

	if (r >= 0) {
		check_workload(p, kho_workloads_get(shown, 0));
		check_devices(p, kho_workloads_get(shown, 0), image);
	} else if (r != -ENOENT) {	/* it has ended since */
		check_workload(p, listed);
	}
	kho_image_free(image);
	kho_workloads_free(shown);
}

static void check_khod(struct flight *p, struct khoctl *ctl)
{
	struct kho_client *client = NULL;
	struct kho_workloads *list = NULL;
	struct kho_status *s = NULL;
	struct kho_error *err = NULL;
	char *text;
	int r;

	r = kho_client_connect(ctl->kho, ctl->socket, &client, &err);
	if (r >= 0)
		r = kho_client_status(client, &s, &err);
	if (r >= 0)
		r = kho_client_list(client, &list, &err);
	if (r < 0) {
		text = kho_error_format(err, r);
		item(p, "khod", false, true, "%s", text ? text : strerror(-r));
		free(text);
		kho_error_free(err);
		goto out;
	}
	item(p, "khod", true, true, "%s answers%s", s->server,
	     s->fault_points ? " (a test build: not for production)" : "");
	if (s->liveupdate)
		item(p, "live update", true, true, "available");
	else
		item(p, "live update", false, true, "%s", s->liveupdate_reason);
	if (!s->fdstore)
		item(p, "fd store", false, true,
		     "none: start khod as khod.service with FileDescriptorStoreMax= and FileDescriptorStorePreserve=yes");
	else
		item(p, "fd store", true, true, "%" PRIu32 " of %" PRIu32 " places taken",
		     s->fdstore_used, s->fdstore_max);
	for (size_t i = 0; i < kho_workloads_n(list); i++)
		look_at(p, client, kho_workloads_get(list, i));
out:
	kho_workloads_free(list);
	kho_status_free(s);
	kho_client_free(client);
}

static void check_all(struct flight *p, struct khoctl *ctl, const char *kernel)
{
	check_kernel(p, ctl, kernel);
	check_scratch(p, kernel);
	if (kernel)
		check_next_kernel(p, kernel);
	check_khod(p, ctl);
}

int khoctl_obstacles(struct khoctl *ctl, const char *kernel)
{
	struct flight p = { .quiet = true };

	check_all(&p, ctl, kernel);
	return p.obstacle ? EXIT_OBSTACLE : EXIT_SUCCESS;
}

static int run(struct khoctl *ctl, int argc, char **argv)
{
	static const struct option options[] = {
		{ "json", no_argument, NULL, 'j' },
		{ "kernel", required_argument, NULL, 'k' },
		{},
	};
	struct flight p = { .j = { .f = stdout } };
	const char *kernel = NULL;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (c == 'j')
			p.json = true;
		else if (c == 'k')
			kernel = optarg;
		else
			return EXIT_USAGE;
	}
	if (optind < argc)
		return khoctl_usage(&verb_preflight, "preflight takes no argument");
	if (p.json)
		json_open(&p.j, NULL, '[');
	check_all(&p, ctl, kernel);
	if (p.json)
		json_close(&p.j, ']');
	return p.obstacle ? EXIT_OBSTACLE : EXIT_SUCCESS;
}

const struct verb verb_preflight = {
	.name = "preflight",
	.args = "[--kernel FILE] [--json]",
	.summary = "Say whether a handover would succeed now",
	.help = help,
	.run = run,
};
