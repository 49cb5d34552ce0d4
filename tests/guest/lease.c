/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * lease: a workload that is asked before a handover.
 *
 *	lease NAME [--best-effort] [--msec N]
 *		Lease the memfd that is descriptor 3 (from memfd-pages) under NAME, and answer as
 *		/run/lease-NAME says each time it is asked: "ready" (also if there is no such file),
 *		"veto REASON", "stall", "die". What khod says and what is answered goes to stdout.
 *		If khod ends, the lease is taken again from the next one.
 */
#include <errno.h>
#include <getopt.h>
#include <kho/kho.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct kho *kho;
static const char *name;
static struct kho_policy policy = { .keep = KHO_KEEP_LEASE };

static _Noreturn void die(const char *what, int r, struct kho_error *err)
{
	char *text = kho_error_format(err, r);

	printf("lease: %s: %s: %s\n", name, what, text ? text : strerror(-r));
	exit(EXIT_FAILURE);
}

static struct kho_client *take_lease(void)
{
	struct kho_client_file file = { .name = "memory", .fd = 3 };
	struct kho_client *client = NULL;
	struct kho_error *err = NULL;
	int r = kho_client_connect(kho, NULL, &client, &err);

	if (r < 0)
		die("khod", r, err);
	r = kho_client_register_policy(client, name, &file, 1, NULL, 0, &policy, &err);
	if (r == -EEXIST) {
		/* The khod before had it preserved, and could not tell how that went on. */
		err = kho_error_free(err);
		r = kho_client_release(client, name, NULL, 0, &err);
		if (r >= 0)
			r = kho_client_register_policy(client, name, &file, 1, NULL, 0, &policy, &err);
	}
	if (r < 0)
		die("register", r, err);
	printf("lease: %s: taken\n", name);
	return client;
}

static void answer(struct kho_client *client, const struct kho_event *event)
{
	struct kho_error *err = NULL;
	char path[64], mode[200] = "ready";
	FILE *f;
	int r;

	snprintf(path, sizeof(path), "/run/lease-%s", name);
	f = fopen(path, "re");
	if (f) {
		if (fgets(mode, sizeof(mode), f))
			mode[strcspn(mode, "\n")] = 0;
		fclose(f);
	}
	printf("lease: %s: asked, within %u ms: %s\n", name, event->msec, mode);
	if (strcmp(mode, "die") == 0)
		_exit(EXIT_FAILURE);
	if (strcmp(mode, "stall") == 0)
		return;
	if (strncmp(mode, "veto ", 5) == 0)
		r = kho_client_veto(client, event, mode + 5, &err);
	else
		r = kho_client_ready(client, event, &err);
	/* Another's veto may have been faster: then this has been given up already. */
	if (r < 0 && r != -ECONNRESET && r != -ESTALE)
		die("answer", r, err);
	kho_error_free(err);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "best-effort", no_argument, NULL, 'b' },
		{ "msec", required_argument, NULL, 'm' },
		{},
	};
	struct kho_client *client;
	struct kho_error *err = NULL;
	struct kho_event event;
	int c, r;

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (c == 'b')
			policy.survival = KHO_SURVIVAL_BEST_EFFORT;
		else if (c == 'm')
			policy.prepare_msec = (uint32_t)strtoul(optarg, NULL, 10);
		else
			return 2;
	}
	if (optind != argc - 1)
		return 2;
	name = argv[optind];
	setvbuf(stdout, NULL, _IOLBF, 0);
	r = kho_new(&kho, NULL, NULL);
	if (r < 0)
		die("libkho", r, NULL);
	for (client = take_lease();;) {
		r = kho_client_event(client, -1, &event, &err);
		if (r == -ECONNRESET || r == -ENOTCONN) {
			err = kho_error_free(err);
			kho_client_free(client);
			client = take_lease();
		} else if (r < 0) {
			die("event", r, err);
		} else if (event.kind == KHO_EVENT_PREPARE) {
			answer(client, &event);
		} else if (event.kind == KHO_EVENT_ABORTED) {
			printf("lease: %s: aborted: %s\n", name, event.reason);
		}
	}
}
