// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The device is used while it is frozen, by a freeze that fails: no access of its user's is an
 * error, or lost.
 */

#include "guest.h"
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>

/* A register of the e1000e that nothing depends on: what its LEDs show. */
#define LEDCTL 0xe00
#define BLINKING 0x55

static volatile bool over;
static volatile unsigned int frozen;
static double longest;
static pthread_t user;
static int by_eventfd;

/* Before all others, look for when it is frozen; that is for a moment. */
static void *use(void *arg)
{
	const struct sched_param param = { .sched_priority = 1 };

	errno = pthread_setschedparam(pthread_self(), SCHED_FIFO, &param);
	if (errno)
		die("SCHED_FIFO");
	for (; !over; usleep(50)) {
		double start = now();

		if (can_read_config())
			continue;
		check(eventfd_write(by_eventfd, 1), "write by an eventfd");
		rd(LEDCTL);	/* and wait */
		frozen++;
		if (now() - start > longest)
			longest = now() - start;
	}
	return arg;
}

void use_while_frozen(void)
{
	if (!can_read_config())
		die("configuration space");
	by_eventfd = write_by_eventfd(LEDCTL, BLINKING);
	check(eventfd_write(by_eventfd, 1), "write by an eventfd");
	verdict(rd(LEDCTL) == BLINKING, "a register written by an eventfd", 0);
	wr(LEDCTL, 0);
	errno = pthread_create(&user, NULL, use, NULL);
	if (errno)
		die("pthread_create");
}

/* The moment may have been too short. */
bool used_while_frozen(void)
{
	return frozen > 0;
}

/* After it was frozen, and goes on. */
void was_used_while_frozen(void)
{
	over = true;
	pthread_join(user, NULL);
	close(by_eventfd);
	say("note: used %u times while it was frozen, waiting for at most %.1f ms", frozen, longest * 1e3);
	verdict(frozen > 0 && rd(LEDCTL) == BLINKING, "what was done while it was frozen", rd(LEDCTL) ? 0 : -EIO);
}
