/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOCTL_H
#define KHOCTL_H

#include <inttypes.h>
#include <kho/kho.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Exit codes, documented in khoctl(1). */
enum {
	EXIT_REFUSED = 1,	/* khod or the kernel refused, or a file could not be read */
	EXIT_USAGE = 2,		/* wrong usage */
	EXIT_NO_KHOD = 3,	/* khod cannot be reached */
	EXIT_NOT_FOUND = 4,	/* no workload of that name */
	EXIT_OBSTACLE = 5,	/* preflight, preserve or kexec found an obstacle */
	EXIT_EXEC = 127,	/* the command of claim, or systemctl, could not be run */
};

struct khoctl {
	struct kho *kho;
	const char *socket;
};

/**
 * struct verb - one command
 * @name: what is typed
 * @args: for the usage line
 * @summary: one line for --help
 * @help: the options of this verb, or NULL
 * @run: argv[0] is the verb. Return: exit code.
 */
struct verb {
	const char *name;
	const char *args;
	const char *summary;
	const char *help;
	int (*run)(struct khoctl *ctl, int argc, char **argv);
};

extern const struct verb verb_register, verb_claim, verb_release, verb_list, verb_status,
	verb_show, verb_inspect, verb_preflight, verb_preserve, verb_abort, verb_kexec,
	verb_timeline;

/** khoctl_connect() - connect to khod, or say why not. Return: 0 or an exit code. */
int khoctl_connect(struct khoctl *ctl, struct kho_client **ret);
/** khoctl_fail() - print an error of the library, free it. Return: its exit code. */
int khoctl_fail(int r, struct kho_error *err);
/** khoctl_usage() - print how a verb is used to stderr. Return: EXIT_USAGE. */
int khoctl_usage(const struct verb *verb, const char *why);
/**
 * khoctl_json_option() - parse the options of a verb that has --json and no other
 * @n: how many arguments there must be besides, from argv[optind] on
 * @why: what is said if there are more or fewer
 * @json: set if --json was given
 * Return: 0 or an exit code.
 */
int khoctl_json_option(const struct verb *verb, int argc, char **argv, int n, const char *why,
		       bool *json);
/**
 * khoctl_obstacles() - as preflight, but only what is in the way, to stderr
 * @kernel: to compare with the running one; NULL: none
 *
 * Return: 0, EXIT_OBSTACLE.
 */
int khoctl_obstacles(struct khoctl *ctl, const char *kernel);

/**
 * khoctl_loaded_refuses() - would reboot(2) refuse the kernel that is loaded, or would it die for want of
 * scratch memory? If so, stderr says why
 */
bool khoctl_loaded_refuses(struct khoctl *ctl);
/**
 * khoctl_preserve() - have every workload prepared and preserved
 * @force: in spite of workloads that are not ready
 *
 * What is left behind goes to stderr.
 * Return: 0, EXIT_OBSTACLE (a workload is not ready, everything is as before), another exit code.
 */
int khoctl_preserve(struct khoctl *ctl, bool force);
/** khoctl_abort() - undo khoctl_preserve(). Return: 0 or an exit code. */
int khoctl_abort(struct khoctl *ctl);
/** khoctl_user() - a user's id, from its name or number. Return: 0 or an exit code. */
int khoctl_user(const char *user, uint32_t *uid);
/** khoctl_secret() - read a claim secret from a file; owned by the caller. 0 or an exit code. */
int khoctl_secret(const char *path, void **secret, size_t *size);

/* A writer of JSON, indented; strings are escaped. */
struct json {
	FILE *f;
	int depth;
	bool first;
};
void json_open(struct json *j, const char *key, char bracket);
void json_close(struct json *j, char bracket);
void json_string(struct json *j, const char *key, const char *value);
void json_u64(struct json *j, const char *key, uint64_t value);
void json_null(struct json *j, const char *key);
void json_bool(struct json *j, const char *key, bool value);

/** print_graph() - what is in the workload's iommufds, as a tree; nothing if there is nothing */
void print_graph(const struct kho_image *image);
/** json_graph() - the same as "contexts" */
void json_graph(struct json *j, const struct kho_image *image);
/** survival_name() - "must-survive" or "best-effort" */
const char *survival_name(enum kho_survival survival);
/** memory_name() - "preserved", "soon", "at-handover" or "unknown" */
const char *memory_name(enum kho_memory memory);
/** restore_failure_name() - "quiesce" or "release" */
const char *restore_failure_name(enum kho_restore_failure failure);
/** outcome_name() - "restored" etc. */
const char *outcome_name(enum kho_outcome outcome);

/** human_size() - "64 MiB"; buf of 32 bytes */
const char *human_size(uint64_t bytes, char *buf);
/** human_time() - CLOCK_REALTIME in local time, "-" for 0; buf of 64 bytes */
const char *human_time(uint64_t usec, char *buf);

#endif
