/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "khoctl.h"

static const char help[] =
	"\n"
	"FILE's contents are copied into a new memfd, which khod holds over the next kexec.\n"
	"With --fd, descriptors that khoctl inherited are registered as they are; --fd and\n"
	"--fd-name may be repeated.\n"
	"\n"
	"They are preserved now. Pages that lie in KHO's scratch memory are moved out of it, which\n"
	"can take seconds for each GiB, and is done when the command returns: nothing is moved when\n"
	"the kernel is replaced.\n"
	"\n"
	"  --fd N           register descriptor N instead of a file\n"
	"  --fd-name X      its name (the file's, or fdN)\n"
	"  --best-effort    a handover goes on without it if it cannot be carried over\n"
	"  --on-failure X   if its devices cannot be restored they are stopped; then, with X\n"
	"                   quiesce (default), the memory is kept, or, with release, freed\n"
	"  --claim-within S the same if nobody has claimed it S seconds after a handover (for ever)\n"
	"  --may-lose-irq   its devices may use INTx and MSI, by which interrupts may get lost\n"
	"  --secret-file F  whoever knows the 16 to 64 bytes in F may claim it\n"
	"\n"
	"Prints the name, the number of files and their size.\n";

enum { MAX_FDS = KHO_IMAGE_FILES_MAX };

/* A copy, page by page, so that what is registered is a memfd whatever FILE is. */
static int copy_to_memfd(const char *path)
{
	static char buf[1 << 20];
	const char *base = strrchr(path, '/');
	int in, out;
	ssize_t n;

	in = open(path, O_RDONLY | O_CLOEXEC);
	if (in < 0) {
		fprintf(stderr, "khoctl: %s: %s\n", path, strerror(errno));
		return -1;
	}
#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif
	/* Sealed against exec it would come back read-only, see khod(8). */
	out = memfd_create(base ? base + 1 : path, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC);
	if (out < 0 && errno == EINVAL)
		out = memfd_create(base ? base + 1 : path, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (out < 0) {
		fprintf(stderr, "khoctl: memfd_create: %s\n", strerror(errno));
		close(in);
		return -1;
	}
	while ((n = read(in, buf, sizeof(buf))) != 0) {
		if (n < 0 && errno == EINTR)
			continue;
		for (ssize_t done = 0; n > 0 && done < n;) {
			ssize_t k = write(out, buf + done, n - done);

			if (k < 0 && errno == EINTR)
				continue;
			if (k < 0) {
				n = -1;
				break;
			}
			done += k;
		}
		if (n < 0) {
			fprintf(stderr, "khoctl: %s: cannot be copied: %s\n", path, strerror(errno));
			close(in);
			close(out);
			return -1;
		}
	}
	(void)lseek(out, 0, SEEK_SET);
	close(in);
	return out;
}

static int run(struct khoctl *ctl, int argc, char **argv)
{
	static const struct option options[] = {
		{ "fd", required_argument, NULL, 'f' },
		{ "fd-name", required_argument, NULL, 'n' },
		{ "best-effort", no_argument, NULL, 'b' },
		{ "on-failure", required_argument, NULL, 'o' },
		{ "claim-within", required_argument, NULL, 'c' },
		{ "may-lose-irq", no_argument, NULL, 'i' },
		{ "secret-file", required_argument, NULL, 's' },
		{},
	};
	static struct kho_client_file files[MAX_FDS];
	static char default_names[MAX_FDS][16];
	const char *given[MAX_FDS] = {};
	size_t n = 0, n_names = 0, secret_size = 0;
	struct kho_client *client = NULL;
	struct kho_policy policy = {};
	struct kho_error *err = NULL;
	void *secret = NULL;
	const char *name;
	uint64_t bytes = 0;
	unsigned long seconds, number;
	char buf[32], *end;
	int c, r, copied = -1;

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (c) {
		case 'f':
			if (n == MAX_FDS)
				return khoctl_usage(&verb_register, "too many --fd");
			number = strtoul(optarg, &end, 10);
			files[n].fd = number > INT_MAX ? -1 : (int)number;
			if (*end || optarg[0] < '0' || optarg[0] > '9' || fcntl(files[n].fd, F_GETFD) < 0) {
				fprintf(stderr, "khoctl: --fd %s is not an open descriptor\n", optarg);
				return EXIT_USAGE;
			}
			snprintf(default_names[n], sizeof(default_names[n]), "fd%d", files[n].fd);
			n++;
			break;
		case 'n':
			if (n_names == MAX_FDS)
				return khoctl_usage(&verb_register, "too many --fd-name");
			given[n_names++] = optarg;
			break;
		case 'b':
			policy.survival = KHO_SURVIVAL_BEST_EFFORT;
			break;
		case 'o':
			if (strcmp(optarg, "release") != 0 && strcmp(optarg, "quiesce") != 0)
				return khoctl_usage(&verb_register, "--on-failure is quiesce or release");
			policy.restore_failure = strcmp(optarg, "release") == 0 ?
							 KHO_RESTORE_FAILURE_RELEASE :
							 KHO_RESTORE_FAILURE_QUIESCE;
			break;
		case 'i':
			policy.may_lose_irq = true;
			break;
		case 'c':
			errno = 0;
			seconds = strtoul(optarg, &end, 10);
			if (errno || *end || optarg[0] < '0' || optarg[0] > '9' || seconds == 0 ||
			    seconds > UINT32_MAX)
				return khoctl_usage(&verb_register, "--claim-within is a number of seconds");
			policy.claim_sec = (uint32_t)seconds;
			break;
		case 's':
			r = khoctl_secret(optarg, &secret, &secret_size);
			if (r > 0)
				return r;
			break;
		default:
			return EXIT_USAGE;
		}
	}
	if (optind >= argc)
		return khoctl_usage(&verb_register, "register what, under which name?");
	name = argv[optind++];
	if (!kho_name_valid(name)) {
		fprintf(stderr, "khoctl: '%s' cannot be a workload's name: 1 to %d of A-Z a-z 0-9 _ . @ -, and no . or - at its beginning\n",
			name, KHO_NAME_MAX);
		return EXIT_USAGE;
	}
	if ((n > 0) == (optind < argc) || argc - optind > 1)
		return khoctl_usage(&verb_register, "give either one FILE or --fd");
	if (n == 0) {
		const char *base = strrchr(argv[optind], '/');

		copied = copy_to_memfd(argv[optind]);
		if (copied < 0)
			return EXIT_REFUSED;
		files[0].fd = copied;
		base = base ? base + 1 : argv[optind];
		files[0].name = kho_name_valid(base) ? base : "file";
		n = 1;
	} else {
		for (size_t i = 0; i < n; i++)
			files[i].name = default_names[i];
	}
	if (n_names > n)
		return khoctl_usage(&verb_register, "more --fd-name than descriptors");
	for (size_t i = 0; i < n_names; i++)
		files[i].name = given[i];
	for (size_t i = 0; i < n; i++) {
		struct stat st;

		if (fstat(files[i].fd, &st) == 0)
			bytes += st.st_size;
	}

	r = khoctl_connect(ctl, &client);
	if (r > 0)
		return r;
	r = kho_client_register_policy(client, name, files, n, secret, secret_size, &policy, &err);
	kho_client_free(client);
	free(secret);
	if (r == -ECONNRESET)
		fprintf(stderr, "khoctl: whether %s is held is not known: khoctl show %s\n", name, name);
	if (r < 0)
		return khoctl_fail(r, err);
	printf("%s: held, %zu file%s, %s\n", name, n, n == 1 ? "" : "s", human_size(bytes, buf));
	if (copied >= 0)
		close(copied);
	return EXIT_SUCCESS;
}

const struct verb verb_register = {
	.name = "register",
	.args = "NAME FILE|--fd N [OPTION]...",
	.summary = "Give a file's contents or descriptors into custody",
	.help = help,
	.run = run,
};
