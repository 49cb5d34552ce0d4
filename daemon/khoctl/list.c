/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <errno.h>

#include "khoctl.h"

static int by_name(const void *a, const void *b)
{
	return strcmp((*(const struct kho_workload *const *)a)->name,
		      (*(const struct kho_workload *const *)b)->name);
}

static void print_json(const struct kho_workload **w, size_t n)
{
	struct json j = { .f = stdout };

	json_open(&j, NULL, '[');
	for (size_t i = 0; i < n; i++) {
		json_open(&j, NULL, '{');
		json_string(&j, "name", w[i]->name);
		json_string(&j, "state", kho_workload_state_name(w[i]->state));
		if (w[i]->uid != UINT32_MAX)
			json_u64(&j, "uid", w[i]->uid);
		json_string(&j, "unit", w[i]->unit);
		json_string(&j, "session", w[i]->session);
		json_u64(&j, "files", w[i]->n_files);
		json_u64(&j, "bytes", w[i]->bytes);
		json_u64(&j, "handovers", w[i]->handovers);
		json_u64(&j, "registered_usec", w[i]->registered_usec);
		json_bool(&j, "claim_secret", w[i]->secret);
		json_string(&j, "reason", w[i]->reason);
		json_string(&j, "memory", memory_name(w[i]->memory));
		json_u64(&j, "claim_left_sec", w[i]->claim_left_sec);
		json_string(&j, "outcome", outcome_name(w[i]->outcome));
		json_string(&j, "outcome_reason", w[i]->outcome_reason);
		json_close(&j, '}');
	}
	json_close(&j, ']');
}

static int run(struct khoctl *ctl, int argc, char **argv)
{
	struct kho_workloads *workloads = NULL;
	struct kho_client *client = NULL;
	struct kho_error *err = NULL;
	const struct kho_workload **w;
	bool json = false;
	size_t n;
	int r;

	r = khoctl_json_option(&verb_list, argc, argv, 0, "list takes no names; see khoctl show", &json);
	if (r > 0)
		return r;
	r = khoctl_connect(ctl, &client);
	if (r > 0)
		return r;
	r = kho_client_list(client, &workloads, &err);
	kho_client_free(client);
	if (r < 0)
		return khoctl_fail(r, err);

	n = kho_workloads_n(workloads);
	w = calloc(n + 1, sizeof(*w));
	if (!w) {
		kho_workloads_free(workloads);
		return khoctl_fail(-ENOMEM, NULL);
	}
	for (size_t i = 0; i < n; i++)
		w[i] = kho_workloads_get(workloads, i);
	qsort(w, n, sizeof(*w), by_name);
	if (json) {
		print_json(w, n);
	} else {
		if (n > 0)
			printf("%-24s %-10s %6s %6s %10s %9s  %s\n", "NAME", "STATE", "UID",
			       "FILES", "SIZE", "HANDOVERS", "UNIT");
		for (size_t i = 0; i < n; i++) {
			char size[32], uid[16] = "?";

			if (w[i]->uid != UINT32_MAX)
				snprintf(uid, sizeof(uid), "%" PRIu32, w[i]->uid);
			printf("%-24s %-10s %6s %6zu %10s %9" PRIu32 "  %s\n", w[i]->name,
			       kho_workload_state_name(w[i]->state), uid, w[i]->n_files,
			       human_size(w[i]->bytes, size), w[i]->handovers,
			       w[i]->unit[0] ? w[i]->unit : "-");
			if (w[i]->reason[0])
				printf("  %s\n", w[i]->reason);
			if (w[i]->memory == KHO_MEMORY_SOON)
				puts("  preserved for the next kexec in a moment, at the latest when one is announced");
			if (w[i]->memory == KHO_MEMORY_AT_HANDOVER)
				puts("  preserved when a handover is prepared: pages in scratch memory are moved then");
			if (w[i]->claim_left_sec)
				printf("  to be claimed within %" PRIu32 " s\n", w[i]->claim_left_sec);
			if (w[i]->outcome == KHO_OUTCOME_QUIESCED)
				printf("  quiesced: %s\n", w[i]->outcome_reason);
		}
		if (n == 0)
			puts("No workloads.");
	}
	free(w);
	kho_workloads_free(workloads);
	return EXIT_SUCCESS;
}

const struct verb verb_list = {
	.name = "list",
	.args = "[--json]",
	.summary = "List your workloads (root: all)",
	.run = run,
};
