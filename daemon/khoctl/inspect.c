/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "khoctl.h"

static void print_json(const struct kho_image *image)
{
	struct json j = { .f = stdout };

	json_open(&j, NULL, '{');
	json_open(&j, "origin", '{');
	json_string(&j, "writer", kho_image_writer(image));
	json_string(&j, "boot_id", kho_image_boot_id(image));
	json_string(&j, "kernel_release", kho_image_kernel_release(image));
	json_u64(&j, "realtime_usec", kho_image_written_usec(image));
	json_close(&j, '}');
	json_open(&j, "workload", '{');
	json_string(&j, "name", kho_image_name(image));
	json_u64(&j, "uid", kho_image_uid(image));
	json_string(&j, "unit", kho_image_unit(image));
	json_u64(&j, "registered_usec", kho_image_registered_usec(image));
	json_u64(&j, "handovers", kho_image_handovers(image));
	json_bool(&j, "claim_secret", kho_image_has_secret(image));
	json_string(&j, "survival", survival_name(kho_image_survival(image)));
	json_string(&j, "restore_failure", restore_failure_name(kho_image_restore_failure(image)));
	json_u64(&j, "claim_sec", kho_image_claim_sec(image));
	json_bool(&j, "may_lose_irq", kho_image_may_lose_irq(image));
	json_open(&j, "files", '[');
	for (size_t i = 0; i < kho_image_n_files(image); i++) {
		struct kho_image_file f = {};

		kho_image_file(image, i, &f);
		json_open(&j, NULL, '{');
		json_string(&j, "name", f.name);
		json_string(&j, "kind", kho_file_kind_name(f.kind));
		json_u64(&j, "token", f.token);
		json_u64(&j, "size", f.size);
		json_u64(&j, "seals", f.seals);
		json_close(&j, '}');
	}
	json_close(&j, ']');
	json_string(&j, "outcome", outcome_name(kho_image_outcome(image)));
	json_string(&j, "outcome_reason", kho_image_reason(image));
	json_graph(&j, image);
	json_close(&j, '}');
	json_close(&j, '}');
}

static void print_text(const struct kho_image *image)
{
	char buf[64];

	printf("image of workload %s\n", kho_image_name(image));
	printf("  written     %s by %s\n", human_time(kho_image_written_usec(image), buf),
	       kho_image_writer(image));
	printf("  on          %s, boot %s\n", kho_image_kernel_release(image),
	       kho_image_boot_id(image));
	printf("  owner       uid %" PRIu32 "%s%s%s\n", kho_image_uid(image),
	       kho_image_unit(image)[0] ? ", " : "", kho_image_unit(image),
	       kho_image_has_secret(image) ? ", or the claim secret" : "");
	printf("  policy      %s; if a restore fails: %s%s\n", survival_name(kho_image_survival(image)),
	       restore_failure_name(kho_image_restore_failure(image)),
	       kho_image_may_lose_irq(image) ? "; interrupts may get lost" : "");
	printf("  registered  %s\n", human_time(kho_image_registered_usec(image), buf));
	printf("  handovers   %" PRIu32 "\n", kho_image_handovers(image));
	if (kho_image_claim_sec(image))
		printf("  claim       within %" PRIu32 " s of a handover\n", kho_image_claim_sec(image));
	if (kho_image_outcome(image) != KHO_OUTCOME_NONE)
		printf("  devices     %s by the last handover%s%s\n",
		       outcome_name(kho_image_outcome(image)), kho_image_reason(image)[0] ? ": " : "",
		       kho_image_reason(image));
	for (size_t i = 0; i < kho_image_n_files(image); i++) {
		struct kho_image_file f = {};

		kho_image_file(image, i, &f);
		printf("  %s %s  %s, %s, token %" PRIu64 ", seals 0x%" PRIx32 "\n",
		       i + 1 == kho_image_n_files(image) && !kho_image_graph(image) ? "`--" : "|--",
		       f.name,
		       kho_file_kind_name(f.kind), human_size(f.size, buf), f.token, f.seals);
	}
	print_graph(image);
}

static int run(struct khoctl *ctl, int argc, char **argv)
{
	struct kho_image *image = NULL;
	struct kho_error *err = NULL;
	bool json = false;
	int r, fd;

	r = khoctl_json_option(&verb_inspect, argc, argv, 1, "inspect which image?", &json);
	if (r > 0)
		return r;
	fd = open(argv[optind], O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) {
		fprintf(stderr, "khoctl: %s: %s\n", argv[optind], strerror(errno));
		return EXIT_REFUSED;
	}
	/* A copy on disk has no seals; what it says is all there is to judge it by. */
	r = kho_image_read_fd(ctl->kho, fd, false, &image, &err);
	close(fd);
	if (r < 0) {
		fprintf(stderr, "khoctl: %s:\n", argv[optind]);
		return khoctl_fail(r, err);
	}
	if (json)
		print_json(image);
	else
		print_text(image);
	kho_image_free(image);
	return EXIT_SUCCESS;
}

const struct verb verb_inspect = {
	.name = "inspect",
	.args = "IMAGE [--json]",
	.summary = "Print a state image as text or JSON",
	.run = run,
};
