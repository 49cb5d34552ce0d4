/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * khoctl: what an operator types. Thin over libkho's public interface: what it can
 * do, a VMM that links the library can.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pwd.h>
#include <time.h>
#include <unistd.h>

#include "khoctl.h"

static const struct verb *const verbs[] = {
	&verb_status, &verb_list,    &verb_show,      &verb_register,
	&verb_claim,  &verb_release, &verb_preflight, &verb_inspect,
	&verb_preserve, &verb_abort, &verb_kexec, &verb_timeline,
};

static void usage(FILE *f)
{
	fputs("Usage: khoctl [--socket PATH] VERB [ARGUMENT]...\n"
	      "Keep file descriptors over a kexec, with khod.\n\nVerbs:\n", f);
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
		char left[64];

		snprintf(left, sizeof(left), "%s %s", verbs[i]->name, verbs[i]->args);
		fprintf(f, "  %-34s %s\n", left, verbs[i]->summary);
	}
	fputs("\nOptions:\n"
	      "  --socket PATH    where khod listens (" KHO_SOCKET ")\n"
	      "  --help           print this; after a verb: its options\n"
	      "  --version        print the version\n"
	      "\n"
	      "Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 khod cannot be reached,\n"
	      "4 no such workload, 5 something is in the way of a handover. See khoctl(1).\n", f);
}

int khoctl_usage(const struct verb *verb, const char *why)
{
	fprintf(stderr, "khoctl: %s\nUsage: khoctl %s %s\n", why, verb->name, verb->args);
	return EXIT_USAGE;
}

int khoctl_json_option(const struct verb *verb, int argc, char **argv, int n, const char *why,
		       bool *json)
{
	static const struct option options[] = {
		{ "json", no_argument, NULL, 'j' },
		{},
	};
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (c != 'j')
			return EXIT_USAGE;
		*json = true;
	}
	return argc - optind == n ? 0 : khoctl_usage(verb, why);
}

int khoctl_fail(int r, struct kho_error *err)
{
	char *text = kho_error_format(err, r);

	fprintf(stderr, "khoctl: %s\n", text ? text : strerror(-r));
	free(text);
	kho_error_free(err);
	return r == -ENOENT ? EXIT_NOT_FOUND : EXIT_REFUSED;
}

int khoctl_connect(struct khoctl *ctl, struct kho_client **ret)
{
	struct kho_error *err = NULL;
	int r = kho_client_connect(ctl->kho, ctl->socket, ret, &err);

	if (r < 0) {
		khoctl_fail(r, err);
		return EXIT_NO_KHOD;
	}
	return 0;
}

int khoctl_user(const char *user, uint32_t *uid)
{
	const struct passwd *p = getpwnam(user);
	unsigned long n;
	char *end;

	if (p) {
		*uid = p->pw_uid;
		return 0;
	}
	n = strtoul(user, &end, 10);
	if (*user < '0' || *user > '9' || *end || n >= UINT32_MAX) {
		fprintf(stderr, "khoctl: there is no user '%s'\n", user);
		return EXIT_USAGE;
	}
	*uid = (uint32_t)n;
	return 0;
}

int khoctl_secret(const char *path, void **secret, size_t *size)
{
	char buf[KHO_SECRET_MAX + 1];
	ssize_t n;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0) {
		fprintf(stderr, "khoctl: %s: %s\n", path, strerror(errno));
		return EXIT_REFUSED;
	}
	n = read(fd, buf, sizeof(buf));
	close(fd);
	if (n < KHO_SECRET_MIN || n > KHO_SECRET_MAX) {
		fprintf(stderr, "khoctl: %s: a claim secret has %d to %d bytes\n", path,
			KHO_SECRET_MIN, KHO_SECRET_MAX);
		return EXIT_REFUSED;
	}
	*secret = malloc(n);
	if (!*secret)
		return EXIT_REFUSED;
	memcpy(*secret, buf, n);
	explicit_bzero(buf, sizeof(buf));
	*size = n;
	return 0;
}

const char *human_size(uint64_t bytes, char *buf)
{
	static const char *const unit[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB" };
	double v = (double)bytes;
	size_t i = 0;

	while (v >= 1024 && i < 5) {
		v /= 1024;
		i++;
	}
	snprintf(buf, 32, v == (double)(uint64_t)v ? "%.0f %s" : "%.1f %s", v, unit[i]);
	return buf;
}

const char *human_time(uint64_t usec, char *buf)
{
	time_t t = (time_t)(usec / 1000000);
	struct tm tm;

	if (usec == 0 || !localtime_r(&t, &tm) || strftime(buf, 64, "%F %T", &tm) == 0)
		return "-";
	return buf;
}

static void json_lead(struct json *j, const char *key)
{
	if (j->depth > 0) {
		fprintf(j->f, "%s\n", j->first ? "" : ",");
		for (int i = 0; i < j->depth; i++)
			fputs("  ", j->f);
	}
	j->first = false;
	if (key)
		fprintf(j->f, "\"%s\": ", key);
}

void json_open(struct json *j, const char *key, char bracket)
{
	json_lead(j, key);
	fputc(bracket, j->f);
	j->depth++;
	j->first = true;
}

void json_close(struct json *j, char bracket)
{
	j->depth--;
	if (!j->first) {
		fputc('\n', j->f);
		for (int i = 0; i < j->depth; i++)
			fputs("  ", j->f);
	}
	j->first = false;
	fputc(bracket, j->f);
	if (j->depth == 0)
		fputc('\n', j->f);
}

void json_string(struct json *j, const char *key, const char *value)
{
	json_lead(j, key);
	fputc('"', j->f);
	for (const unsigned char *p = (const unsigned char *)value; *p; p++) {
		if (*p == '"' || *p == '\\')
			fprintf(j->f, "\\%c", *p);
		else if (*p < 0x20 || *p == 0x7f)
			fprintf(j->f, "\\u%04x", *p);
		else
			fputc(*p, j->f);
	}
	fputc('"', j->f);
}

void json_u64(struct json *j, const char *key, uint64_t value)
{
	json_lead(j, key);
	fprintf(j->f, "%" PRIu64, value);
}

void json_null(struct json *j, const char *key)
{
	json_lead(j, key);
	fputs("null", j->f);
}

void json_bool(struct json *j, const char *key, bool value)
{
	json_lead(j, key);
	fputs(value ? "true" : "false", j->f);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "socket", required_argument, NULL, 's' },
		{ "help", no_argument, NULL, 'h' },
		{ "version", no_argument, NULL, 'v' },
		{},
	};
	struct khoctl ctl = {};
	char called[32];
	int c, r;

	while ((c = getopt_long(argc, argv, "+h", options, NULL)) >= 0) {
		switch (c) {
		case 's':
			ctl.socket = optarg;
			break;
		case 'h':
			usage(stdout);
			return EXIT_SUCCESS;
		case 'v':
			puts("khoctl " KHO_VERSION);
			return EXIT_SUCCESS;
		default:
			return EXIT_USAGE;
		}
	}
	if (optind >= argc) {
		usage(stderr);
		return EXIT_USAGE;
	}
	argc -= optind;
	argv += optind;
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
		const struct verb *v = verbs[i];

		if (strcmp(v->name, argv[0]) != 0)
			continue;
		if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
			printf("Usage: khoctl %s %s\n%s.\n%s", v->name, v->args, v->summary,
			       v->help ? v->help : "");
			return EXIT_SUCCESS;
		}
		if (kho_new(&ctl.kho, NULL, NULL) < 0) {
			fputs("khoctl: out of memory\n", stderr);
			return EXIT_REFUSED;
		}
		/* The verb parses its own options, and getopt's complaints begin with its argv[0]. */
		snprintf(called, sizeof(called), "khoctl: %s", v->name);
		argv[0] = called;
		optind = 0;
		r = v->run(&ctl, argc, argv);
		kho_free(ctl.kho);
		if (fflush(stdout) != 0 && r == 0) {
			fprintf(stderr, "khoctl: cannot write the output: %s\n", strerror(errno));
			r = EXIT_REFUSED;
		}
		return r;
	}
	fprintf(stderr, "khoctl: there is no verb '%s'; see khoctl --help\n", argv[0]);
	return EXIT_USAGE;
}
