/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A handover up to the kexec, and back. */
#include <errno.h>
#include <getopt.h>
#include <unistd.h>

#include "khoctl.h"

static const char help_preserve[] =
	"\n"
	"Asks each workload that has a client to get ready, preserves them all, and stops there:\n"
	"a kexec carries them then, and khoctl abort undoes it. If one that must survive is not\n"
	"ready, everything is as before; exit status 5.\n"
	"\n"
	"  --force  go on without those that are not ready: a kexec would lose them\n";

static void left_behind(const char *name, const char *reason, void *userdata)
{
	fprintf(stderr, "khoctl: %s is left behind: %s\n", name, reason);
}

int khoctl_preserve(struct khoctl *ctl, bool force)
{
	struct kho_client *client = NULL;
	struct kho_error *err = NULL;
	int r = khoctl_connect(ctl, &client);

	if (r > 0)
		return r;
	r = kho_client_preserve(client, force, left_behind, NULL, &err);
	kho_client_free(client);
	if (r >= 0) {
		printf("%d workload%s preserved: the next kexec carries %s.\n", r, r == 1 ? "" : "s",
		       r == 1 ? "it" : "them");
		return 0;
	}
	khoctl_fail(r, err);
	/* EBUSY and EPERM are about the request, the rest is about a workload. */
	return r == -EBUSY || r == -EPERM || r == -ECONNRESET || r == -ETIMEDOUT ? EXIT_REFUSED :
										   EXIT_OBSTACLE;
}

int khoctl_abort(struct khoctl *ctl)
{
	struct kho_client *client = NULL;
	struct kho_error *err = NULL;
	int r = khoctl_connect(ctl, &client);

	if (r > 0)
		return r;
	r = kho_client_abort(client, &err);
	kho_client_free(client);
	return r < 0 ? khoctl_fail(r, err) : 0;
}

static int run_preserve(struct khoctl *ctl, int argc, char **argv)
{
	static const struct option options[] = {
		{ "force", no_argument, NULL, 'f' },
		{},
	};
	bool force = false;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (c != 'f')
			return EXIT_USAGE;
		force = true;
	}
	if (optind < argc)
		return khoctl_usage(&verb_preserve, "preserve takes no argument");
	return khoctl_preserve(ctl, force);
}

static int run_abort(struct khoctl *ctl, int argc, char **argv)
{
	static const struct option none[] = { {} };

	if (getopt_long(argc, argv, "", none, NULL) >= 0 || optind < argc)
		return khoctl_usage(&verb_abort, "abort takes no argument");
	return khoctl_abort(ctl);
}

const struct verb verb_preserve = {
	.name = "preserve",
	.args = "[--force]",
	.summary = "Prepare a handover and preserve everything, without a kexec",
	.help = help_preserve,
	.run = run_preserve,
};

const struct verb verb_abort = {
	.name = "abort",
	.args = "",
	.summary = "Undo preserve: every workload may change its mappings again",
	.run = run_abort,
};
