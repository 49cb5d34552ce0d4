/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOD_CLOSER_H
#define KHOD_CLOSER_H

#include <stddef.h>
#include <sys/types.h>

/**
 * closer_add() - close descriptors that a client sent, without waiting for it
 * @uid: the client's user
 * @fds: owned by the closer from now on
 * @n: how many
 */
void closer_add(uid_t uid, const int *fds, size_t n);

/**
 * closer_end_connection() - end a client's connection, without waiting for it
 * @uid: the client's user
 * @fd: the socket, does not block, owned by the closer from now on
 *
 * What the client has sent and nobody has read goes first: close() would reset the connection, and
 * our last words would be lost.
 */
void closer_end_connection(uid_t uid, int fd);

/** closer_pending() - how many descriptors of a user are not closed yet */
size_t closer_pending(uid_t uid);

#endif
