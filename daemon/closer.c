/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The descriptors of clients are closed on threads of their own.
 *
 * What a client sends can be anything, and the last close of it can take any time: of a
 * socket that lingers, of a file in a file system that another process of the client's is,
 * of a memfd of many GiB. The event loop must not wait for that: all other clients, and the
 * watchdog, would wait with it.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "closer.h"

/* More than that are closed one after the other. */
#define MAX_THREADS 64
#define STACK_SIZE (64 * 1024)

struct batch {
	struct batch *next;
	size_t n;
	int fds[];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct batch *queue, **queue_tail = &queue;
static unsigned int n_threads;

static struct batch *next_batch(void)
{
	struct batch *b;

	pthread_mutex_lock(&lock);
	b = queue;
	if (!b)
		n_threads--;
	else if (!(queue = b->next))
		queue_tail = &queue;
	pthread_mutex_unlock(&lock);
	return b;
}

static void *run(void *unused)
{
	struct batch *b;

	while ((b = next_batch())) {
		for (size_t i = 0; i < b->n; i++)
			close(b->fds[i]);
		free(b);
	}
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

void closer_add(const int *fds, size_t n)
{
	struct batch *b;
	bool start;

	if (n == 0)
		return;
	b = malloc(sizeof(*b) + n * sizeof(*fds));
	if (!b) {
		while (n > 0)
			close(fds[--n]);
		return;
	}
	b->next = NULL;
	b->n = n;
	memcpy(b->fds, fds, n * sizeof(*fds));

	pthread_mutex_lock(&lock);
	*queue_tail = b;
	queue_tail = &b->next;
	start = n_threads < MAX_THREADS;
	n_threads += start;
	pthread_mutex_unlock(&lock);
	/* Without a thread of its own it is closed by another one, or here. */
	if (start && start_thread() < 0)
		run(NULL);
}
