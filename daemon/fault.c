/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fault.h"

static const struct {
	const char *name;
	const char *phase;
	const char *what;
} points[FAULT_N] = {
#define X(id, name, phase, what) [FAULT_##id] = { name, phase, what },
	KHOD_FAULT_POINTS(X)
#undef X
};

void fault_list(FILE *f)
{
	for (int i = 0; i < FAULT_N; i++)
		fprintf(f, "%-32s %-16s %s\n", points[i].name, points[i].phase, points[i].what);
	if (!KHOD_WITH_FAULT_POINTS)
		fputs("(this build does not stop at them: build with -Dfault_points=true)\n", f);
}

#if KHOD_WITH_FAULT_POINTS

static int armed = -1;
static unsigned long left;

int fault_init(void)
{
	const char *env = getenv("KHOD_FAULT");
	const char *colon;
	size_t len;

	if (!env || !*env)
		return 0;
	colon = strchr(env, ':');
	len = colon ? (size_t)(colon - env) : strlen(env);
	left = colon ? strtoul(colon + 1, NULL, 10) : 1;
	if (left == 0)
		return -EINVAL;
	for (int i = 0; i < FAULT_N; i++)
		if (strlen(points[i].name) == len && strncmp(points[i].name, env, len) == 0)
			armed = i;
	return armed < 0 ? -EINVAL : 0;
}

void fault_pass(enum fault_point point)
{
	if ((int)point != armed || --left > 0)
		return;
	/* On the console too: a test looks for it to know that the point was reached. */
	dprintf(STDERR_FILENO, "khod: fault point %s: killing myself\n", points[point].name);
	(void)raise(SIGKILL);		/* tgkill(): its sandbox has no kill() */
	for (;;)
		pause();
}

#else

int fault_init(void)
{
	return getenv("KHOD_FAULT") ? -EOPNOTSUPP : 0;
}

#endif
