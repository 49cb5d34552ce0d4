/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Errors as objects. A caller three layers up must be able to tell an operator
 * which object failed and why, without the library printing anything: each layer
 * adds one sentence in front of what the layer below said.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "util.h"

struct kho_error {
	int errnum;
	char *object;
	char *message;
	struct kho_error *cause;
};

int kho_error_new(struct kho_error **err, int errnum, const char *object, const char *fmt, ...)
{
	struct kho_error *e;
	va_list ap;

	if (errnum < 0)
		errnum = -errnum;
	if (!err)
		return -errnum;

	e = calloc(1, sizeof(*e));
	if (!e)
		return -errnum;
	e->errnum = errnum;
	if (object) {
		e->object = strdup(object);
		if (!e->object)
			goto nomem;
	}
	va_start(ap, fmt);
	if (vasprintf(&e->message, fmt, ap) < 0)
		e->message = NULL;
	va_end(ap);
	if (!e->message)
		goto nomem;

	e->cause = *err;
	*err = e;
	return -errnum;

nomem:
	/* The causes below are worth more than this sentence: keep them. */
	kho_error_free(e);
	return -errnum;
}

struct kho_error *kho_error_free(struct kho_error *err)
{
	while (err) {
		struct kho_error *cause = err->cause;

		free(err->object);
		free(err->message);
		free(err);
		err = cause;
	}
	return NULL;
}

int kho_error_errno(const struct kho_error *err)
{
	return err ? err->errnum : 0;
}

const char *kho_error_object(const struct kho_error *err)
{
	return err && err->object ? err->object : "";
}

const char *kho_error_message(const struct kho_error *err)
{
	return err ? err->message : "";
}

const struct kho_error *kho_error_cause(const struct kho_error *err)
{
	return err ? err->cause : NULL;
}

char *kho_error_format(const struct kho_error *err, int errnum)
{
	char *buf = NULL;
	size_t size = 0;
	FILE *f;

	if (!err)
		return strdup(strerror(abs(errnum)));

	f = open_memstream(&buf, &size);
	if (!f)
		return NULL;
	for (const struct kho_error *e = err; e; e = e->cause) {
		if (e != err)
			fputs(": ", f);
		if (e->object)
			fprintf(f, "%s: ", e->object);
		fputs(e->message, f);
	}
	if (fclose(f) != 0) {
		free(buf);
		return NULL;
	}
	return buf;
}
