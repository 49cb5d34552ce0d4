/* SPDX-License-Identifier: GPL-2.0-or-later */
#define SD_JOURNAL_SUPPRESS_LOCATION
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <systemd/sd-journal.h>
#include <time.h>

#include "log.h"

#define BURST 10
#define WINDOW_SEC 10

static void emit(int priority, const char *id, const char *workload, const char *text)
{
	if (!getenv("JOURNAL_STREAM")) {
		fprintf(stderr, "khod: %s\n", text);
		return;
	}
	if (id && workload)
		sd_journal_send("MESSAGE=%s", text, "PRIORITY=%i", priority, "MESSAGE_ID=%s", id,
				"KHO_WORKLOAD=%s", workload, NULL);
	else if (id)
		sd_journal_send("MESSAGE=%s", text, "PRIORITY=%i", priority, "MESSAGE_ID=%s", id,
				NULL);
	else if (workload)
		sd_journal_send("MESSAGE=%s", text, "PRIORITY=%i", priority, "KHO_WORKLOAD=%s",
				workload, NULL);
	else
		sd_journal_send("MESSAGE=%s", text, "PRIORITY=%i", priority, NULL);
}

__attribute__((format(printf, 4, 0)))
static void vlog(int priority, const char *id, const char *workload, const char *fmt, va_list ap)
{
	char *text = NULL;

	if (vasprintf(&text, fmt, ap) < 0)
		text = NULL;
	emit(priority, id, workload, text ? text : "out of memory while writing a message");
	free(text);
}

void log_event(int priority, const char *id, const char *workload, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vlog(priority, id, workload, fmt, ap);
	va_end(ap);
}

void log_limited(const char *workload, const char *fmt, ...)
{
	static time_t window;
	static unsigned int in_window, dropped;
	struct timespec now;
	va_list ap;

	clock_gettime(CLOCK_MONOTONIC, &now);
	if (now.tv_sec - window >= WINDOW_SEC) {
		window = now.tv_sec;
		in_window = 0;
	}
	if (++in_window > BURST) {
		dropped++;
		return;
	}
	if (dropped > 0) {
		log_event(LOG_WARNING, MSG_REFUSED, NULL, "%u messages about refused clients left out",
			  dropped);
		dropped = 0;
	}
	va_start(ap, fmt);
	vlog(LOG_WARNING, MSG_REFUSED, workload, fmt, ap);
	va_end(ap);
}
