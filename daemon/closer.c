/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The descriptors of clients are closed on threads of their own.
 *
 * What a client sends can be anything, and the last close of it can take any time: of a
 * socket that lingers, of a file in a file system that another process of the client's is,
 * of a memfd of many GiB. The event loop must not wait for that: all other clients, and the
 * watchdog, would wait with it. Nor must other users: each has a few of the threads at most,
 * and is told how many of its descriptors are still waited for, which the server limits.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "closer.h"

#define MAX_THREADS 64
#define MAX_THREADS_UID 8	/* and as many are root's only */
#define STACK_SIZE (64 * 1024)
/* Packets that may wait in a connection; systemd lets 512 (net.unix.max_dgram_qlen). */
#define MAX_PACKETS 600

struct owner {
	struct owner *next;
	uid_t uid;
	size_t pending;			/* descriptors; 0: there is nothing of it */
	unsigned int threads;
};

struct batch {
	struct batch *next;
	struct owner *owner;
	bool socket;
	size_t n;
	int fds[];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct batch *queue, **queue_tail = &queue;
static struct owner *owners;
static unsigned int n_threads;

/* @lock is held. */
static struct owner *owner_get(uid_t uid)
{
	struct owner *o;

	for (o = owners; o; o = o->next)
		if (o->uid == uid)
			return o;
	o = calloc(1, sizeof(*o));
	if (!o)
		return NULL;
	o->uid = uid;
	o->next = owners;
	return owners = o;
}

/* @lock is held. */
static void owner_put(struct owner *owner, size_t n)
{
	owner->pending -= n;
	if (owner->pending > 0)
		return;
	for (struct owner **p = &owners; *p; p = &(*p)->next)
		if (*p == owner) {
			*p = owner->next;
			break;
		}
	free(owner);
}

/*
 * Read and drop what is left in a connection. A descriptor in it is closed by the kernel as its packet
 * is read, in the time of who reads. Return: whether there is one: with @wait false it is still there.
 */
static bool drain(int fd, bool wait)
{
	/* An empty packet looks like the end, and there may be one. */
	for (int i = 0; i < MAX_PACKETS; i++) {
		struct msghdr msg = {};
		char byte;

		if (!wait && recvmsg(fd, &msg, MSG_DONTWAIT | MSG_PEEK) < 0)
			return false;
		/* It came with more than there is room for here, which is none. */
		if (msg.msg_flags & MSG_CTRUNC)
			return true;
		if (recv(fd, &byte, sizeof(byte), MSG_DONTWAIT) < 0)
			return false;
	}
	return false;
}

static void end_connection(int fd)
{
	(void)drain(fd, true);
	close(fd);
}

static void close_all(const struct batch *b)
{
	for (size_t i = 0; i < b->n; i++)
		if (b->socket)
			end_connection(b->fds[i]);
		else
			close(b->fds[i]);
}

/* After @done, of which the owner has a thread no more. */
static struct batch *next_batch(struct batch *done)
{
	struct batch *b, **p;

	pthread_mutex_lock(&lock);
	if (done) {
		done->owner->threads--;
		owner_put(done->owner, done->n);
	}
	for (p = &queue; (b = *p); p = &b->next)
		if (b->owner->threads < MAX_THREADS_UID)
			break;
	if (b) {
		b->owner->threads++;
		*p = b->next;
		if (!b->next)
			queue_tail = p;
	} else {
		n_threads--;
	}
	pthread_mutex_unlock(&lock);
	free(done);
	return b;
}

static void *run(void *unused)
{
	struct batch *b = NULL;

	while ((b = next_batch(b)))
		close_all(b);
	return NULL;
}

static int start_thread(void)
{
	pthread_attr_t attr;
	pthread_t thread;
	int r;

	r = -pthread_attr_init(&attr);
	if (r < 0)
		return r;
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attr, STACK_SIZE);
	r = -pthread_create(&thread, &attr, run, NULL);
	pthread_attr_destroy(&attr);
	return r;
}

static void add(uid_t uid, const int *fds, size_t n, bool socket)
{
	bool start, alone = false;
	struct owner *owner;
	struct batch *b;

	if (n == 0)
		return;
	b = calloc(1, sizeof(*b) + n * sizeof(*fds));
	pthread_mutex_lock(&lock);
	owner = b ? owner_get(uid) : NULL;
	if (!owner) {
		pthread_mutex_unlock(&lock);
		free(b);
		while (n > 0)
			close(fds[--n]);
		return;
	}
	b->owner = owner;
	b->socket = socket;
	b->n = n;
	memcpy(b->fds, fds, n * sizeof(*fds));
	owner->pending += n;
	*queue_tail = b;
	queue_tail = &b->next;
	start = n_threads < MAX_THREADS - (uid ? MAX_THREADS_UID : 0) &&
		owner->threads < MAX_THREADS_UID;
	n_threads += start;
	pthread_mutex_unlock(&lock);

	if (!start || start_thread() == 0)
		return;
	/* Without a thread of its own it is closed by another one, or here. */
	pthread_mutex_lock(&lock);
	alone = n_threads == 1;
	n_threads -= !alone;
	pthread_mutex_unlock(&lock);
	if (alone)
		run(NULL);
}

void closer_add(uid_t uid, const int *fds, size_t n)
{
	add(uid, fds, n, false);
}

void closer_end_connection(uid_t uid, int fd)
{
	(void)shutdown(fd, SHUT_RD);
	/* Most bring nothing that could make anybody wait. */
	if (drain(fd, false))
		add(uid, &fd, 1, true);
	else
		close(fd);
}

size_t closer_pending(uid_t uid)
{
	size_t n = 0;

	pthread_mutex_lock(&lock);
	for (const struct owner *o = owners; o; o = o->next)
		if (o->uid == uid)
			n = o->pending;
	pthread_mutex_unlock(&lock);
	return n;
}
