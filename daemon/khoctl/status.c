/* SPDX-License-Identifier: GPL-2.0-or-later */

#include "khoctl.h"

static int run(struct khoctl *ctl, int argc, char **argv)
{
	struct kho_client *client = NULL;
	struct kho_status *s = NULL;
	struct kho_error *err = NULL;
	bool json = false;
	char size[32];
	int r;

	r = khoctl_json_option(&verb_status, argc, argv, 0, "status takes no argument", &json);
	if (r > 0)
		return r;
	r = khoctl_connect(ctl, &client);
	if (r > 0)
		return r;
	r = kho_client_status(client, &s, &err);
	kho_client_free(client);
	if (r < 0)
		return khoctl_fail(r, err);

	if (json) {
		struct json j = { .f = stdout };

		json_open(&j, NULL, '{');
		json_string(&j, "server", s->server);
		json_bool(&j, "liveupdate", s->liveupdate);
		json_string(&j, "liveupdate_reason", s->liveupdate_reason);
		json_bool(&j, "retrieve_outgoing", s->retrieve_outgoing);
		json_bool(&j, "fdstore", s->fdstore);
		json_u64(&j, "fdstore_used", s->fdstore_used);
		json_u64(&j, "fdstore_max", s->fdstore_max);
		json_u64(&j, "workloads", s->workloads);
		json_u64(&j, "workloads_failed", s->workloads_failed);
		json_u64(&j, "bytes", s->bytes);
		json_u64(&j, "connections", s->connections);
		json_string(&j, "boot_id", s->boot_id);
		json_string(&j, "kernel_release", s->kernel_release);
		json_bool(&j, "fault_points", s->fault_points);
		json_close(&j, '}');
	} else {
		printf("khod         %s%s\n", s->server, s->fault_points ? " (test build)" : "");
		printf("kernel       %s, boot %s\n", s->kernel_release, s->boot_id);
		if (s->liveupdate)
			puts("live update  available");
		else
			printf("live update  NOT available: %s\n", s->liveupdate_reason);
		if (s->fdstore)
			printf("fd store     %" PRIu32 " of %" PRIu32 " places taken\n", s->fdstore_used,
			       s->fdstore_max);
		else
			puts("fd store     NONE: khod was not started by systemd, nothing can be held");
		printf("workloads    %" PRIu32 ", %s%s\n", s->workloads, human_size(s->bytes, size),
		       s->workloads_failed ? "; SOME FAILED, see khoctl list" : "");
		printf("connections  %" PRIu32 "\n", s->connections);
	}
	kho_status_free(s);
	return EXIT_SUCCESS;
}

const struct verb verb_status = {
	.name = "status",
	.args = "[--json]",
	.summary = "Say how khod is, and whether this kernel can hand over",
	.run = run,
};
