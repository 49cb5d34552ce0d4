/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Packets: one protobuf message and its descriptors in one SOCK_SEQPACKET packet.
 * The kernel keeps packet boundaries, so nothing is ever split or merged; what it
 * had to cut off is an error here, never a shorter message.
 */
#include <string.h>

#include "budget.h"
#include "wire.h"

int kho_wire_send(struct kho *kho, int sock, const void *buf, size_t size, const int *fds,
		  size_t n_fds)
{
	union {
		char buf[CMSG_SPACE(sizeof(int) * KHO_WIRE_FDS_MAX)];
		struct cmsghdr align;
	} control;
	struct iovec iov = { .iov_base = (void *)buf, .iov_len = size };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;

	if (size > KHO_WIRE_PACKET_MAX || n_fds > KHO_WIRE_FDS_MAX)
		return -E2BIG;
	if (n_fds > 0) {
		struct cmsghdr *c;

		memset(&control, 0, sizeof(control));
		msg.msg_control = control.buf;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * n_fds);
		c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int) * n_fds);
		memcpy(CMSG_DATA(c), fds, sizeof(int) * n_fds);
	}
	do {
		n = kho_op(kho, sendmsg, sock, &msg, MSG_NOSIGNAL);
	} while (n == -EINTR);
	return n < 0 ? (int)n : 0;
}

ssize_t kho_wire_recv(struct kho *kho, int sock, void *buf, int fds[KHO_WIRE_FDS_MAX],
		      size_t *n_fds)
{
	union {
		/* Room for what a peer may send, and for more kinds of messages than asked for. */
		char buf[CMSG_SPACE(sizeof(int) * KHO_WIRE_FDS_MAX) + CMSG_SPACE(64)];
		struct cmsghdr align;
	} control;
	struct iovec iov = { .iov_base = buf, .iov_len = KHO_WIRE_PACKET_MAX };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.buf,
		.msg_controllen = sizeof(control.buf),
	};
	ssize_t n;

	*n_fds = 0;
	do {
		n = kho_op(kho, recvmsg, sock, &msg, MSG_CMSG_CLOEXEC);
	} while (n == -EINTR);
	if (n < 0)
		return n;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		size_t k;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		k = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < k; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
			/* SCM_MAX_FD is the same number: more cannot come. */
			if (*n_fds < KHO_WIRE_FDS_MAX)
				fds[(*n_fds)++] = fd;
			else
				kho_close(kho, fd);
		}
	}
	/* A packet may bring descriptors and no byte; to the caller it is the end. */
	if (n > 0 && (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		return msg.msg_flags & MSG_CTRUNC ? -EMFILE : -EMSGSIZE;
	return n;
}

/* What was unpacked is freed by plain free(), which is what the budget's allocator uses. */
static ProtobufCAllocator plain = { .alloc = kho_budget_alloc, .free = kho_budget_free };

Kho__Control__Request *kho_wire_request_unpack(const void *buf, size_t size)
{
	struct kho_budget budget;

	if (size > KHO_WIRE_PACKET_MAX)
		return NULL;
	kho_budget_init(&budget, KHO_WIRE_BUDGET);
	return kho__control__request__unpack(&budget.allocator, size, buf);
}

void kho_wire_request_free(Kho__Control__Request *request)
{
	if (request)
		kho__control__request__free_unpacked(request, &plain);
}

Kho__Control__Reply *kho_wire_reply_unpack(const void *buf, size_t size)
{
	struct kho_budget budget;

	if (size > KHO_WIRE_PACKET_MAX)
		return NULL;
	kho_budget_init(&budget, KHO_WIRE_BUDGET);
	return kho__control__reply__unpack(&budget.allocator, size, buf);
}

void kho_wire_reply_free(Kho__Control__Reply *reply)
{
	if (reply)
		kho__control__reply__free_unpacked(reply, &plain);
}
