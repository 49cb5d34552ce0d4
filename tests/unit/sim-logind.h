/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A logind, and the part of PID 1 that it asks, on a bus of their own in the simulated machine's
 * directory: inhibitor locks, the announcement of a shutdown, a target that can be masked.
 */
#ifndef SIM_LOGIND_H
#define SIM_LOGIND_H

#include <stdbool.h>
#include <stddef.h>

struct logind;

/* Before khod is started. @dir: sim_dir(). */
struct logind *logind_new(const char *dir);
void logind_free(struct logind *l);

/* Locks of that mode ("block", "delay") that are held now. */
size_t logind_locks(struct logind *l, const char *mode);
/* Wait up to 20 s until there are @n of them. Return: whether it came to it. */
bool logind_comes_to(struct logind *l, const char *mode, size_t n);
/* What the newest lock of that mode was taken for, "" if there was none. */
const char *logind_why(struct logind *l, const char *mode);

/* Announce a shutdown of that type; no lock is granted until it has ended. */
void logind_announce(struct logind *l, const char *type);
/*
 * When no delay lock is held any more, after 20 s at the latest, start the target.
 * Return: 1 it is started; 0 it is masked, and all have been told that it is over; -1 a delay lock
 * was held to the end.
 */
int logind_proceed(struct logind *l);
bool logind_masked(struct logind *l);
/* It dies and is started again: its locks are still there, what it had announced is not. */
void logind_restart(struct logind *l);

#endif
