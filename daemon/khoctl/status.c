/* SPDX-License-Identifier: GPL-2.0-or-later */

#include "khoctl.h"

/* A workload that an operator should know of. */
static bool notable(const struct kho_workload *w)
{
	return w->state == KHO_WORKLOAD_FAILED || w->outcome != KHO_OUTCOME_NONE || w->claim_left_sec;
}

static void json_workloads(struct json *j, const struct kho_workloads *list)
{
	json_open(j, "notable", '[');
	for (size_t i = 0; i < kho_workloads_n(list); i++) {
		const struct kho_workload *w = kho_workloads_get(list, i);

		if (!notable(w))
			continue;
		json_open(j, NULL, '{');
		json_string(j, "name", w->name);
		json_string(j, "state", kho_workload_state_name(w->state));
		json_string(j, "reason", w->reason);
		json_string(j, "outcome", outcome_name(w->outcome));
		json_string(j, "outcome_reason", w->outcome_reason);
		json_u64(j, "claim_left_sec", w->claim_left_sec);
		json_close(j, '}');
	}
	json_close(j, ']');
}

static void print_workloads(const struct kho_workloads *list)
{
	for (size_t i = 0; i < kho_workloads_n(list); i++) {
		const struct kho_workload *w = kho_workloads_get(list, i);

		if (!notable(w))
			continue;
		if (w->state == KHO_WORKLOAD_FAILED)
			printf("  %s  FAILED: %s\n", w->name, w->reason);
		if (w->outcome != KHO_OUTCOME_NONE)
			printf("  %s  devices %s by the last handover%s%s\n", w->name,
			       outcome_name(w->outcome), w->outcome_reason[0] ? ": " : "",
			       w->outcome_reason);
		if (w->claim_left_sec)
			printf("  %s  to be claimed within %" PRIu32 " s\n", w->name, w->claim_left_sec);
	}
}

static int run(struct khoctl *ctl, int argc, char **argv)
{
	struct kho_workloads *list = NULL;
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
	if (r >= 0)
		r = kho_client_list(client, &list, &err);
	kho_client_free(client);
	if (r < 0) {
		kho_status_free(s);
		return khoctl_fail(r, err);
	}

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
		json_workloads(&j, list);
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
		       s->workloads_failed ? "; SOME FAILED" : "");
		print_workloads(list);
		printf("connections  %" PRIu32 "\n", s->connections);
	}
	kho_workloads_free(list);
	kho_status_free(s);
	return EXIT_SUCCESS;
}

const struct verb verb_status = {
	.name = "status",
	.args = "[--json]",
	.summary = "Say how khod is, and whether this kernel can hand over",
	.run = run,
};
