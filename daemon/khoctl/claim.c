/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

#include "khoctl.h"

static const char help[] =
	"\n"
	"Without -o or CMD the workload is claimed and its contents are gone with khoctl:\n"
	"that needs --discard.\n"
	"\n"
	"  -o FILE          write the contents of its file here ('-': standard output); with\n"
	"                   more than one file, --fd-name chooses\n"
	"  --fd-name X      the file that -o writes\n"
	"  --secret-file F  claim by the secret in F\n"
	"  --of USER        for root: it is this user's, from whatever unit. Without it root gets\n"
	"                   what it registered itself, from the same unit if that was a service.\n"
	"  --keep           do not end khod's custody: look, do not take\n"
	"  --discard        allow a claim that keeps nothing\n"
	"  -- CMD...        run CMD with the files as descriptors from 3 on, LISTEN_FDS,\n"
	"                   LISTEN_FDNAMES and LISTEN_PID as systemd sets them. Custody ends\n"
	"                   before CMD is run.\n";

static int write_out(const char *path, int fd)
{
	static char buf[1 << 20];
	off_t off = 0;
	ssize_t n;
	int out;

	out = strcmp(path, "-") == 0 ? dup(STDOUT_FILENO) :
				       open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (out < 0)
		goto fail;
	while ((n = pread(fd, buf, sizeof(buf), off)) > 0) {
		for (ssize_t done = 0; done < n;) {
			ssize_t k = write(out, buf + done, n - done);

			if (k < 0 && errno == EINTR)
				continue;
			if (k < 0)
				goto fail;
			done += k;
		}
		off += n;
	}
	if (n < 0 || (fsync(out) < 0 && errno != EINVAL && errno != EROFS) || close(out) < 0)
		goto fail;
	return 0;

fail:
	fprintf(stderr, "khoctl: %s: cannot be written: %s\n", path, strerror(errno));
	return -1;
}

/* Descriptors to 3, 4, ... in order; those in the way are moved up first. */
static int exec_with(struct kho_claim *claim, char **cmd)
{
	size_t n = kho_claim_n_files(claim), len = 1;
	char pid[32], count[32], *names;
	int *fds;

	fds = calloc(n + 1, sizeof(int));
	for (size_t i = 0; i < n; i++)
		len += strlen(kho_claim_name(claim, i)) + 1;
	names = calloc(1, len);
	if (!fds || !names)
		goto fail;
	for (size_t i = 0; i < n; i++) {
		if (i > 0)
			strcat(names, ":");
		strcat(names, kho_claim_name(claim, i));
		fds[i] = fcntl(kho_claim_fd(claim, i), F_DUPFD_CLOEXEC, (int)(3 + n));
		if (fds[i] < 0)
			goto fail;
	}
	for (size_t i = 0; i < n; i++)
		if (dup2(fds[i], (int)(3 + i)) < 0)
			goto fail;
	snprintf(pid, sizeof(pid), "%d", (int)getpid());
	snprintf(count, sizeof(count), "%zu", n);
	if (setenv("LISTEN_PID", pid, 1) < 0 || setenv("LISTEN_FDS", count, 1) < 0 ||
	    setenv("LISTEN_FDNAMES", names, 1) < 0)
		goto fail;
	execvp(cmd[0], cmd);
fail:
	fprintf(stderr, "khoctl: %s: cannot be run: %s\n", cmd[0], strerror(errno));
	free(fds);
	free(names);
	return EXIT_EXEC;
}

/* Can it be run? Return: 0 or -errno. */
static int program(const char *path)
{
	struct stat st;

	if (access(path, X_OK) < 0 || stat(path, &st) < 0)
		return -errno;
	return S_ISREG(st.st_mode) ? 0 : -EACCES;
}

/* As execvp() will look for it, when it is too late. Return: 0 or -errno. */
static int find_command(const char *cmd)
{
	const char *dirs = getenv("PATH"), *end;

	if (strchr(cmd, '/'))
		return program(cmd);
	for (dirs = dirs ? dirs : "/bin:/usr/bin"; ; dirs = end + 1) {
		char path[PATH_MAX];
		int n;

		end = dirs + strcspn(dirs, ":");
		n = snprintf(path, sizeof(path), "%.*s/%s", (int)(end - dirs), end > dirs ? dirs : ".", cmd);
		if (n > 0 && (size_t)n < sizeof(path) && program(path) == 0)
			return 0;
		if (!*end)
			return -ENOENT;
	}
}

/* Said to who gets it, whatever becomes of it then. */
static void tell_outcome(const struct kho_claim *claim, const char *name, bool of)
{
	if (of || kho_claim_uid(claim) != geteuid())
		fprintf(stderr, "khoctl: %s is of uid %" PRIu32 "%s%s\n", name, kho_claim_uid(claim),
			kho_claim_unit(claim)[0] ? ", unit " : "", kho_claim_unit(claim));
	if (kho_claim_outcome(claim) == KHO_OUTCOME_QUIESCED)
		fprintf(stderr, "khoctl: the devices of %s have been stopped: %s\n", name,
			kho_claim_reason(claim));
	for (size_t i = 0; i < kho_claim_n_files(claim); i++)
		if (kho_claim_may_have_lost_irq(claim, i))
			fprintf(stderr, "khoctl: %s may have lost interrupts in a handover\n",
				kho_claim_name(claim, i));
}

static int run(struct khoctl *ctl, int argc, char **argv)
{
	static const struct option options[] = {
		{ "fd-name", required_argument, NULL, 'n' },
		{ "secret-file", required_argument, NULL, 's' },
		{ "of", required_argument, NULL, 'u' },
		{ "keep", no_argument, NULL, 'k' },
		{ "discard", no_argument, NULL, 'd' },
		{},
	};
	const char *name, *output = NULL, *which = NULL;
	struct kho_client *client = NULL;
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;
	bool keep = false, discard = false, of = false, command = false;
	uint32_t uid = 0;
	size_t secret_size = 0, index = 0, n;
	void *secret = NULL;
	int c, r;

	/* A second NAME is no command. */
	for (int i = 1; i < argc; i++)
		command |= strcmp(argv[i], "--") == 0;
	/* No '+': options may follow NAME, but "--" ends them. */
	while ((c = getopt_long(argc, argv, "o:", options, NULL)) >= 0) {
		switch (c) {
		case 'o':
			output = optarg;
			break;
		case 'n':
			which = optarg;
			break;
		case 's':
			r = khoctl_secret(optarg, &secret, &secret_size);
			if (r > 0)
				return r;
			break;
		case 'u':
			r = khoctl_user(optarg, &uid);
			if (r > 0)
				return r;
			of = true;
			break;
		case 'k':
			keep = true;
			break;
		case 'd':
			discard = true;
			break;
		default:
			return EXIT_USAGE;
		}
	}
	if (optind >= argc)
		return khoctl_usage(&verb_claim, "claim which workload?");
	name = argv[optind++];
	if (optind < argc && !command)
		return khoctl_usage(&verb_claim, "one workload at a time, and a command after --");
	r = optind < argc ? find_command(argv[optind]) : 0;
	if (r < 0) {
		fprintf(stderr, "khoctl: %s: cannot be run: %s; nothing has been claimed\n", argv[optind],
			strerror(-r));
		free(secret);
		return EXIT_EXEC;
	}
	if (!output && optind >= argc && !keep && !discard)
		return khoctl_usage(&verb_claim, "give -o FILE or -- CMD, or --discard to throw the contents away");

	r = khoctl_connect(ctl, &client);
	if (r > 0)
		return r;
	if (of)
		kho_client_set_owner(client, uid);
	r = kho_client_claim(client, name, secret, secret_size, &claim, &err);
	free(secret);
	if (r < 0) {
		kho_client_free(client);
		return khoctl_fail(r, err);
	}
	tell_outcome(claim, name, of);
	n = kho_claim_n_files(claim);
	if (which) {
		while (index < n && strcmp(kho_claim_name(claim, index), which) != 0)
			index++;
	} else if (output && n > 1) {
		index = n;
	}
	if (output && index >= n) {
		fprintf(stderr, "khoctl: %s has %zu files; --fd-name says which one -o writes:", name, n);
		for (size_t i = 0; i < n; i++)
			fprintf(stderr, " %s", kho_claim_name(claim, i));
		fputs("\n", stderr);
		r = EXIT_USAGE;
		goto out;
	}
	/* Everything that can fail, but for running CMD, comes before the acknowledgement. */
	if (output && write_out(output, kho_claim_fd(claim, index)) < 0) {
		r = EXIT_REFUSED;
		goto out;
	}
	if (!keep) {
		r = kho_client_claim_ack(client, claim, &err);
		if (r == -ECONNRESET)
			fprintf(stderr, "khoctl: the files are here, but whether %s is still held is not known: khoctl show %s\n",
				name, name);
		/*
		 * khod may have let go before it died: then these descriptors are the
		 * only ones, and must not end with this process.
		 */
		if (r < 0 && !(r == -ECONNRESET && optind < argc)) {
			r = khoctl_fail(r, err);
			goto out;
		}
		err = kho_error_free(err);
	}
	client = kho_client_free(client);
	r = optind < argc ? exec_with(claim, argv + optind) : EXIT_SUCCESS;
out:
	kho_claim_free(claim);
	kho_client_free(client);
	return r;
}

const struct verb verb_claim = {
	.name = "claim",
	.args = "NAME [--of USER] [-o FILE] [-- CMD...]",
	.summary = "Take a workload's files back",
	.help = help,
	.run = run,
};
