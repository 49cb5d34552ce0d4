/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <unistd.h>

#include "khoctl.h"

static void print_json(const struct kho_workload *w, const struct kho_image *image)
{
	struct json j = { .f = stdout };

	json_open(&j, NULL, '{');
	json_string(&j, "name", w->name);
	json_string(&j, "state", kho_workload_state_name(w->state));
	if (w->uid != UINT32_MAX)
		json_u64(&j, "uid", w->uid);
	json_string(&j, "unit", w->unit);
	json_string(&j, "session", w->session);
	json_u64(&j, "bytes", w->bytes);
	json_u64(&j, "handovers", w->handovers);
	json_u64(&j, "registered_usec", w->registered_usec);
	json_bool(&j, "claim_secret", w->secret);
	json_string(&j, "reason", w->reason);
	json_string(&j, "obstacle", w->obstacle);
	json_string(&j, "survival", survival_name(w->survival));
	json_string(&j, "restore_failure", restore_failure_name(w->restore_failure));
	json_string(&j, "memory", memory_name(w->memory));
	json_u64(&j, "claim_sec", w->claim_sec);
	json_u64(&j, "claim_left_sec", w->claim_left_sec);
	json_bool(&j, "may_lose_irq", w->may_lose_irq);
	json_bool(&j, "asked", w->prepare);
	json_string(&j, "outcome", outcome_name(w->outcome));
	json_string(&j, "outcome_reason", w->outcome_reason);
	json_open(&j, "files", '[');
	for (size_t i = 0; w->files && i < w->n_files; i++) {
		json_open(&j, NULL, '{');
		json_string(&j, "name", w->files[i].name);
		json_string(&j, "kind", w->files[i].kind);
		json_u64(&j, "token", w->files[i].token);
		json_u64(&j, "size", w->files[i].size);
		json_bool(&j, "may_have_lost_irq", w->files[i].may_have_lost_irq);
		json_close(&j, '}');
	}
	json_close(&j, ']');
	if (image)
		json_graph(&j, image);
	json_close(&j, '}');
}

static void print_text(const struct kho_workload *w, const struct kho_image *image)
{
	char size[32], when[64];

	printf("%s (%s)\n", w->name, kho_workload_state_name(w->state));
	if (w->reason[0])
		printf("  reason      %s\n", w->reason);
	if (w->obstacle[0])
		printf("  obstacle    %s\n", w->obstacle);
	if (w->outcome != KHO_OUTCOME_NONE)
		printf("  devices     %s by the last handover%s%s\n", outcome_name(w->outcome),
		       w->outcome_reason[0] ? ": " : "", w->outcome_reason);
	if (w->uid != UINT32_MAX)
		printf("  owner       uid %" PRIu32 "%s%s%s\n", w->uid, w->unit[0] ? ", " : "",
		       w->unit, w->secret ? ", or the claim secret" : "");
	printf("  policy      %s%s; if a restore fails: %s%s\n", survival_name(w->survival),
	       w->prepare ? ", asked before a handover" : "", restore_failure_name(w->restore_failure),
	       w->may_lose_irq ? "; interrupts may get lost" : "");
	if (w->claim_sec)
		printf("  claim       within %" PRIu32 " s of a handover, or the same\n", w->claim_sec);
	if (w->claim_left_sec)
		printf("              %" PRIu32 " s are left\n", w->claim_left_sec);
	printf("  registered  %s\n", human_time(w->registered_usec, when));
	printf("  handovers   %" PRIu32 "\n", w->handovers);
	printf("  session     %s\n", w->session[0] ? w->session : "-");
	for (size_t i = 0; w->files && i < w->n_files; i++)
		printf("  %s %s  %s, %s, token %" PRIu64 "%s\n",
		       i + 1 == w->n_files && !(image && kho_image_graph(image)) ? "`--" : "|--",
		       w->files[i].name, w->files[i].kind,
		       human_size(w->files[i].size, size), w->files[i].token,
		       w->files[i].may_have_lost_irq ? ", MAY HAVE LOST INTERRUPTS" : "");
	if (image)
		print_graph(image);
}

static int run(struct khoctl *ctl, int argc, char **argv)
{
	struct kho_workloads *workloads = NULL;
	struct kho_client *client = NULL;
	struct kho_error *err = NULL;
	struct kho_image *image = NULL;
	const struct kho_workload *w;
	bool json = false;
	int r;

	r = khoctl_json_option(&verb_show, argc, argv, 1, "show which workload?", &json);
	if (r > 0)
		return r;
	r = khoctl_connect(ctl, &client);
	if (r > 0)
		return r;
	r = kho_client_show(client, argv[optind], &workloads, &image, &err);
	kho_client_free(client);
	if (r < 0)
		return khoctl_fail(r, err);
	w = kho_workloads_get(workloads, 0);
	if (w && json)
		print_json(w, image);
	else if (w)
		print_text(w, image);
	kho_image_free(image);
	kho_workloads_free(workloads);
	return EXIT_SUCCESS;
}

const struct verb verb_show = {
	.name = "show",
	.args = "NAME [--json]",
	.summary = "Show one workload, its files and what is in its iommufds",
	.run = run,
};
