/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Writes golden/image-vN, with the argument "devices" image-vN-devices, with "policy" image-vN-policy,
 * when a format version is released or has got new fields; what is there is never written again.
 */
#include "common.h"
#include "graph-sample.h"

int main(int argc, char **argv)
{
	struct kho_image *i = NULL;
	struct kho *kho = NULL;
	size_t size;
	void *buf;

	if (argc > 1 && (strcmp(argv[1], "devices") == 0 || strcmp(argv[1], "policy") == 0)) {
		struct kho_graph *g = sample_graph();

		i = sample_image();
		kho_image_set_outcome(i, KHO_OUTCOME_RESTORED, NULL);
		if (strcmp(argv[1], "policy") == 0) {
			g->contexts[0].devices[0].may_have_lost_irq = true;
			kho_image_set_policy(i, KHO_SURVIVAL_BEST_EFFORT, KHO_RESTORE_FAILURE_RELEASE);
			kho_image_set_claim_sec(i, 90);
			kho_image_set_may_lose_irq(i, true);
			if (kho_image_set_arrived(i, "01234567-89ab-cdef-0123-456789abcdef",
						  UINT64_C(4000000), NULL) < 0)
				return 1;
		}
		if (kho_image_set_graph(i, g, NULL) < 0 ||
		    kho_image_set_origin(i, "01234567-89ab-cdef-0123-456789abcdef", "7.3.4",
					 UINT64_C(1763632801000000), NULL) < 0 ||
		    kho_image_encode(i, &buf, &size, NULL) < 0 || fwrite(buf, 1, size, stdout) != size)
			return 1;
		free(buf);
		kho_image_free(i);
		return 0;
	}
	if (kho_new(&kho, NULL, NULL) < 0 ||
	    kho_image_new(&i, "golden", 1000, "vm@1.service", NULL) < 0)
		return 1;
	kho_image_set_handovers(i, 7);
	kho_image_set_registered_usec(i, UINT64_C(1763632800000000));
	if (kho_image_set_origin(i, "01234567-89ab-cdef-0123-456789abcdef", "7.3.4", UINT64_C(1763632801000000), NULL) < 0 ||
	    kho_image_set_secret(kho, i, "0123456789abcdef", 16, NULL) < 0)
		return 1;
	for (int k = 0; k < 3; k++) {
		char name[8];
		struct kho_image_file f = {
			.name = name, .kind = KHO_FILE_MEMFD, .token = 1 + k, .size = 1u << (12 + k),
		};

		snprintf(name, sizeof(name), "ram%d", k);
		if (kho_image_add_file(i, &f, NULL) < 0)
			return 1;
	}
	if (kho_image_encode(i, &buf, &size, NULL) < 0 || fwrite(buf, 1, size, stdout) != size)
		return 1;
	free(buf);
	kho_image_free(i);
	kho_free(kho);
	return 0;
}
