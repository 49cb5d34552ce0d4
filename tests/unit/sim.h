/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A simulated machine for tests: the kernel's live update orchestrator (sessions,
 * tokens, the rule that an inode is in one session only, what closing a session does,
 * what a kexec carries) and the part of PID 1 that keeps descriptors for a service.
 * Both outlive khod, which is the real daemon in a process of its own, with nothing
 * replaced but libkho's table of operations.
 */
#ifndef SIM_H
#define SIM_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include <kho/kho.h>

struct sim;

/* @patched: RETRIEVE_FD works on outgoing sessions too. */
struct sim *sim_new(bool patched);
void sim_free(struct sim *s);

/* The kernel has no orchestrator at all. */
void sim_set_absent(struct sim *s, bool absent);
/* Room in the fd store that khod is told about. */
void sim_set_fdstore_max(struct sim *s, unsigned int max);
/* How long khod puts off what is for the next kexec; 0, if not set, as tests look at what it does. */
void sim_set_preserve_delay(struct sim *s, unsigned int sec);
const char *sim_socket(struct sim *s);
const char *sim_dir(struct sim *s);

/*
 * Start khod as systemd does. @fault: KHOD_FAULT or NULL; @fail: KHO_SIM_FAIL or NULL.
 * Waits until it is ready or has died. Return: its pid, also if it died.
 */
pid_t sim_start(struct sim *s, const char *fault, const char *fail);
/* Has it said READY=1 since the last start? */
bool sim_ready(struct sim *s);
/* SIGTERM and wait. Return: wait status. */
int sim_stop(struct sim *s);
/* Wait for it to die by itself, up to 20 s; then it is killed. Return: wait status. */
int sim_wait(struct sim *s);
/* True if the last khod that ended was killed by a fault point. */
bool sim_killed(int status);
pid_t sim_pid(struct sim *s);

/* After a kexec: what was preserved under @token cannot be restored, now and ever after. */
void sim_lose(struct sim *s, unsigned long long token);
/* After a kexec: what is preserved under @token of the one session that there is; the caller's. */
int sim_preserved_fd(struct sim *s, unsigned long long token);
/* After a kexec: something else is preserved under @token, @fd, borrowed. */
void sim_replace(struct sim *s, unsigned long long token, int fd);

/* PID 1 closes what is taken out of its store so much later than it says so; 0: at once. */
void sim_close_late(struct sim *s, unsigned int msec);
/* After a kexec: the session of this workload cannot be retrieved, a handler is missing. NULL: none. */
void sim_without_handler(struct sim *s, const char *workload);
/* What all sessions together hold: files, images. */
size_t sim_preserved(struct sim *s);
/* The same at this moment, whatever is under way. */
size_t sim_preserved_now(struct sim *s);

/* khod must not run. PID 1 hands its store over, the kernel its outgoing sessions. */
void sim_kexec(struct sim *s);

/* Descriptors in the store that are a workload's. */
size_t sim_store_count(struct sim *s);
/* Those of them that are no sessions. */
size_t sim_store_memfds(struct sim *s);
size_t sim_sessions(struct sim *s, bool incoming);
/* Descriptors that khod has open, when their number has not changed for 100 ms. */
size_t sim_khod_fds(struct sim *s);
/* Does khod come to have as many within 10 s? It closes those of clients on threads. */
bool sim_khod_comes_to_fds(struct sim *s, size_t n);
/* The least that it has in a tenth of a second, as it closes some a moment later. */
size_t sim_khod_fds_at_rest(struct sim *s);
/* What khod wrote to stderr since sim_new(), terminated. */
const char *sim_log(struct sim *s);

/* The simulated devices (sim-devices.h), once everything that was closed has been seen. */
struct simdev *sim_lock_devices(struct sim *s);
void sim_unlock_devices(struct sim *s);

/* In this process: the @n-th call through sim_ops() from now on fails; 0: none does. */
void sim_fail(long n, int errnum);
/* How many there were since. */
long sim_calls(void);

/* The table of operations of a process whose KHO_SIM is set; for khod-sim. */
const struct kho_ops *sim_ops(void);

#endif
