/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <getopt.h>

#include "khoctl.h"

static const char help[] =
	"\n"
	"  --secret-file F  release it by the secret in F\n"
	"  --of USER        for root: it is this user's, from whatever unit\n";

static int run(struct khoctl *ctl, int argc, char **argv)
{
	static const struct option options[] = {
		{ "secret-file", required_argument, NULL, 's' },
		{ "of", required_argument, NULL, 'u' },
		{},
	};
	struct kho_client *client = NULL;
	struct kho_error *err = NULL;
	size_t secret_size = 0;
	void *secret = NULL;
	uint32_t uid = 0;
	bool of = false;
	int c, r;

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (c == 's')
			r = khoctl_secret(optarg, &secret, &secret_size);
		else if (c == 'u')
			r = khoctl_user(optarg, &uid);
		else
			r = EXIT_USAGE;
		of |= c == 'u';
		if (r > 0)
			return r;
	}
	if (argc - optind != 1)
		return khoctl_usage(&verb_release, "release which workload?");
	r = khoctl_connect(ctl, &client);
	if (r > 0)
		return r;
	if (of)
		kho_client_set_owner(client, uid);
	r = kho_client_release(client, argv[optind], secret, secret_size, &err);
	kho_client_free(client);
	free(secret);
	if (r < 0)
		return khoctl_fail(r, err);
	printf("%s: released\n", argv[optind]);
	return EXIT_SUCCESS;
}

const struct verb verb_release = {
	.name = "release",
	.args = "NAME [--of USER] [--secret-file F]",
	.summary = "Discard a workload: nothing of it is carried over",
	.help = help,
	.run = run,
};
