/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Whom khod expects back.
 *
 * After a kexec PID 1 retrieves each session once, before khod runs. One that it cannot retrieve,
 * because the handler of a file in it is not there yet, is in nobody's hands then, and khod,
 * which looks at what systemd passes, would not know of it. So the names of all complete
 * sessions are in a memfd in the fd store, which comes over whatever becomes of the sessions:
 *
 *	khod-manifest 1 BOOT_ID
 *	SESSION
 *	...
 *	end
 *
 * It is written when what is held changes, and read at start only (adopt.c), where a workload of
 * which nothing was passed is asked for by name, and listed as failed if it cannot be had.
 * Nothing else depends on it: what is passed is adopted whether it is in it or not.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "khod.h"
#include "log.h"

#define HEAD "khod-manifest 1 "
#define END "end\n"
#define SIZE_MAX_READ (1 << 20)

static void without(const char *why)
{
	log_event(LOG_WARNING, NULL, NULL,
		  "A workload that does not come over the next kexec will not be missed: %s.", why);
}

static bool complete(const struct workload *w)
{
	return w->session_name[0] && w->state != WORKLOAD_LEASED;
}

/* The text, or NULL; *@n: how many sessions are in it. */
static char *compose(const struct khod *k, size_t *n, size_t *size)
{
	char *text = NULL;
	FILE *f = open_memstream(&text, size);

	*n = 0;
	if (!f)
		return NULL;
	fprintf(f, HEAD "%s\n", k->boot_id);
	for (const struct workload *w = k->workloads; w; w = w->next) {
		if (!complete(w))
			continue;
		fprintf(f, "%s\n", w->session_name);
		(*n)++;
	}
	fputs(END, f);
	if (fclose(f) == 0)
		return text;
	free(text);
	return NULL;
}

static int create(struct khod *k, struct kho_error **err)
{
	int fd = memfd_create("khod-manifest", MFD_CLOEXEC), r;

	if (fd < 0)
		return kho_error_new(err, errno, "manifest", "memfd: %s", strerror(errno));
	r = fdstore_push(&k->fdstore, MANIFEST_FDNAME, fd, err);
	if (r < 0) {
		close(fd);
		return r;
	}
	k->manifest_fd = fd;
	return 0;
}

void manifest_write(struct khod *k)
{
	_cleanup_error_ struct kho_error *err = NULL;
	_cleanup_free_ char *text = NULL, *why = NULL;
	size_t n, size;
	int r = 0;

	if (!k->fdstore.available)
		return;
	text = compose(k, &n, &size);
	if (!text || (n == 0 && k->manifest_fd < 0))
		return;
	if (k->manifest_fd < 0)
		r = create(k, &err);
	if (r >= 0 && pwrite(k->manifest_fd, text, size, 0) != (ssize_t)size)
		r = -EIO;
	/* What is behind the end does not count, should khod die here. */
	if (r >= 0 && ftruncate(k->manifest_fd, (off_t)size) < 0)
		r = -errno;
	if (r < 0)
		without(why = kho_error_format(err, r));
}

/* Its whole text; NULL if it is none. */
static char *load(int fd)
{
	struct stat st;
	char *text;

	if (fstat(fd, &st) < 0 || st.st_size <= 0 || st.st_size > SIZE_MAX_READ)
		return NULL;
	text = calloc(1, st.st_size + 1);
	if (text && pread(fd, text, st.st_size, 0) == st.st_size &&
	    strncmp(text, HEAD, strlen(HEAD)) == 0 && strstr(text, "\n" END))
		return text;
	free(text);
	return NULL;
}

static bool same_boot(const struct khod *k, const char *text)
{
	size_t n = strlen(k->boot_id);

	text += strlen(HEAD);
	return strncmp(text, k->boot_id, n) == 0 && text[n] == '\n';
}

bool manifest_of_this_boot(struct khod *k)
{
	_cleanup_free_ char *text = k->manifest_fd < 0 ? NULL : load(k->manifest_fd);

	return text && same_boot(k, text);
}

int manifest_each(struct khod *k, void (*each)(struct khod *k, const char *session,
						  bool same_boot, void *userdata), void *userdata)
{
	_cleanup_free_ char *text = NULL;
	char *save = NULL, *line;
	bool same;

	if (k->manifest_fd < 0)
		return 0;
	text = load(k->manifest_fd);
	if (!text) {
		without("what the fd store has is not of this version, or was not written to its end");
		return -EBADMSG;
	}
	same = same_boot(k, text);
	(void)strtok_r(text, "\n", &save);
	while ((line = strtok_r(NULL, "\n", &save)) && strcmp(line, "end") != 0)
		each(k, line, same, userdata);
	return 0;
}
