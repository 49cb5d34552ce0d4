/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_WIRE_H
#define KHO_WIRE_H

#include "control.pb-c.h"

#include "util.h"

/* One version so far; a client and khod agree on the highest they share. */
#define KHO_WIRE_VERSION 1
/* Bytes in one packet, in either direction. */
#define KHO_WIRE_PACKET_MAX 65536
/* SCM_MAX_FD in the kernel. */
#define KHO_WIRE_FDS_MAX 253
/* Bytes a received message may unpack to. */
#define KHO_WIRE_BUDGET (1u << 20)

/**
 * kho_wire_send() - send one packet
 * @fds: borrowed
 *
 * Return: 0, -EAGAIN, -EPIPE, -errno.
 */
int kho_wire_send(struct kho *kho, int sock, const void *buf, size_t size, const int *fds,
		  size_t n_fds);

/**
 * kho_wire_recv() - receive one packet
 * @buf: KHO_WIRE_PACKET_MAX bytes
 * @fds: KHO_WIRE_FDS_MAX of them; the caller owns the first @n_fds, whatever is returned, as only
 *	it knows whether it can wait for them to be closed
 *
 * A packet or a set of descriptors that was truncated is an error (-EMSGSIZE, -EMFILE).
 * Return: bytes, 0 when the peer has gone, -EAGAIN, -errno.
 */
ssize_t kho_wire_recv(struct kho *kho, int sock, void *buf, int fds[KHO_WIRE_FDS_MAX],
		      size_t *n_fds);

/* Unpack under a budget; NULL if malformed. Free with the functions beside them. */
Kho__Control__Request *kho_wire_request_unpack(const void *buf, size_t size);
void kho_wire_request_free(Kho__Control__Request *request);
Kho__Control__Reply *kho_wire_reply_unpack(const void *buf, size_t size);
void kho_wire_reply_free(Kho__Control__Reply *reply);

#endif
