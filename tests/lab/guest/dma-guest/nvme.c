// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * NVMe: reads are in flight all the time, in several queues with a vector each
 *
 * The disk is throttled, so that reads which were posted before the freeze complete
 * during the blackout and after it. Its content is known (tests/lab/lablib/disk.py): every
 * read is compared with what it must have brought, and its buffer was overwritten before.
 * A reset would lose the queues and every command in them.
 */

#include "guest.h"

#define ENTRIES		128u		/* of each queue */
#define READ_SIZE	8192u		/* two pages, which need not be contiguous */
#define SECTOR		512u
#define CHUNKS		1024u		/* of READ_SIZE, on the disk */
#define NREADS		(NVME_QUEUES * NVME_DEPTH)

_Static_assert(NREADS * READ_SIZE <= BUF_SIZE, "no room for the buffers");
_Static_assert(NVME_DEPTH < ENTRIES, "no room in the queues");

enum { CC = 0x14, CSTS = 0x1c, AQA = 0x24, ASQ = 0x28, ACQ = 0x30, DOORBELL = 0x1000 };
enum { CREATE_SQ = 1, CREATE_CQ = 5, READ = 2 };

struct command {
	uint8_t opcode, flags;
	uint16_t id;
	uint32_t nsid;
	uint64_t reserved[2];
	uint64_t prp[2];
	uint32_t cdw[6];		/* 10 to 15 */
};

struct completion {
	uint32_t result, reserved;
	uint16_t head, queue;
	uint16_t id;
	uint16_t status;		/* bit 0 is the phase */
};

/* Queue 0 is the administrator's, the others are those of the state, from 1 on. */
static uint32_t sq_off(uint32_t queue)
{
	return queue * 4 * PAGE;
}

static uint32_t cq_off(uint32_t queue)
{
	return sq_off(queue) + 2 * PAGE;
}

static struct completion *completion(uint32_t queue, uint32_t i)
{
	return (struct completion *)(mem + cq_off(queue)) + i;
}

static uint32_t buffer_off(uint32_t q, uint32_t id)
{
	return BUF_OFF + (q * NVME_DEPTH + id) * READ_SIZE;
}

/* The disk's word @i of a sector. */
static uint64_t word(uint64_t sector, uint32_t i)
{
	return sector * 0x9e3779b97f4a7c15ull + i * 0xc2b2ae3d27d4eb4full;
}

static bool right(const uint8_t *buf, uint32_t chunk)
{
	const uint64_t *p = (const void *)buf;

	for (uint32_t i = 0; i < READ_SIZE / 8; i++) {
		if (p[i] != word(chunk * (uint64_t)(READ_SIZE / SECTOR) + i / (SECTOR / 8),
				 i % (SECTOR / 8)))
			return false;
	}
	return true;
}

static void submit(uint32_t queue, uint32_t *tail, const struct command *c)
{
	((struct command *)(mem + sq_off(queue)))[*tail] = *c;
	*tail = (*tail + 1) % ENTRIES;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	wr(DOORBELL + queue * 8, *tail);
}

static void admin(const struct command *c, const char *what)
{
	static uint32_t tail, head;
	struct completion *e = completion(0, head);
	double end = now() + 10;

	submit(0, &tail, c);
	while (!(__atomic_load_n(&e->status, __ATOMIC_ACQUIRE) & 1)) {
		errno = ETIMEDOUT;
		if (now() > end)
			die(what);
		usleep(1000);
	}
	errno = EIO;
	if (e->status >> 1)
		die(what);
	wr(DOORBELL + 4, ++head);
}

static void create_queue(uint32_t queue, bool irq)
{
	struct command cq = {
		.opcode = CREATE_CQ,
		.prp[0] = dma_addr(cq_off(queue)),
		.cdw[0] = (ENTRIES - 1) << 16 | queue,
		/* Vector, interrupts on, contiguous; without MSI-X there is vector 0 only. */
		.cdw[1] = (irq ? queue << 16 | 1u << 1 : 0) | 1,
	};
	struct command sq = {
		.opcode = CREATE_SQ,
		.prp[0] = dma_addr(sq_off(queue)),
		.cdw[0] = (ENTRIES - 1) << 16 | queue,
		.cdw[1] = queue << 16 | 1,
	};

	admin(&cq, "create completion queue");
	admin(&sq, "create submission queue");
}

static void post(uint32_t q, uint32_t id)
{
	struct nvme_read *r = &st->nvme.queue[q].read[id];
	uint32_t off = buffer_off(q, id);
	struct command c = {
		.opcode = READ,
		.id = id,
		.nsid = 1,
		.prp = { dma_addr(off), dma_addr(off + PAGE) },
	};

	r->chunk = st->nvme.next_chunk++ % CHUNKS;
	r->busy = true;
	memset(mem + off, 0xee, READ_SIZE);
	c.cdw[0] = r->chunk * (READ_SIZE / SECTOR);
	c.cdw[2] = READ_SIZE / SECTOR - 1;
	submit(q + 1, &st->nvme.queue[q].tail, &c);
}

/* As many reads as there are idle, of the first @each of every queue. */
void nvme_post(uint32_t each)
{
	for (uint32_t q = 0; q < NVME_QUEUES; q++)
		for (uint32_t id = 0; id < each; id++)
			if (!st->nvme.queue[q].read[id].busy)
				post(q, id);
}

static void ready(uint32_t want)
{
	double end = now() + 10;

	while ((rd(CSTS) & 1) != want) {
		errno = ETIMEDOUT;
		if (now() > end)
			die("nvme ready");
		usleep(1000);
	}
}

static void start(bool irq)
{
	wr(CC, 0);
	ready(0);
	wr(AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1));
	wr(ASQ, (uint32_t)dma_addr(sq_off(0)));
	wr(ASQ + 4, dma_addr(sq_off(0)) >> 32);
	wr(ACQ, (uint32_t)dma_addr(cq_off(0)));
	wr(ACQ + 4, dma_addr(cq_off(0)) >> 32);
	wr(CC, 4u << 20 | 6u << 16 | 1);	/* entries of 16 and 64 bytes, enable */
	ready(1);
	for (uint32_t q = 0; q < NVME_QUEUES; q++) {
		st->nvme.queue[q].phase = 1;
		create_queue(q + 1, irq);
	}
	nvme_post(NVME_DEPTH);
}

static void finish_read(uint32_t q, const struct completion *e)
{
	struct nvme_state *s = &st->nvme;
	struct nvme_read *r;

	if (e->id >= NVME_DEPTH || !s->queue[q].read[e->id].busy) {
		s->bad++;
		return;
	}
	r = &s->queue[q].read[e->id];
	r->busy = false;
	if (e->status >> 1)
		s->failed++;
	else if (right(mem + buffer_off(q, e->id), r->chunk))
		s->completed++;
	else
		s->bad++;
}

static uint64_t take(bool give)
{
	uint64_t n = 0;

	for (uint32_t q = 0; q < NVME_QUEUES; q++) {
		struct nvme_queue *nq = &st->nvme.queue[q];
		uint64_t before = n;

		for (;;) {
			struct completion *e = completion(q + 1, nq->head);

			if ((__atomic_load_n(&e->status, __ATOMIC_ACQUIRE) & 1) != nq->phase)
				break;
			finish_read(q, e);
			nq->head = (nq->head + 1) % ENTRIES;
			nq->phase ^= !nq->head;
			n++;
		}
		if (n > before && give && bar)
			wr(DOORBELL + (q + 1) * 8 + 4, nq->head);
	}
	if (n && give && bar && !stopping)
		nvme_post(NVME_DEPTH);
	return n;
}

static void resume(void)
{
	for (uint32_t q = 0; q < NVME_QUEUES; q++)
		wr(DOORBELL + (q + 1) * 8 + 4, st->nvme.queue[q].head);
	nvme_post(NVME_DEPTH);
}

static void report(void)
{
	struct nvme_state *s = &st->nvme;
	unsigned int lost = 0;

	for (uint32_t q = 0; q < NVME_QUEUES; q++)
		for (uint32_t id = 0; id < NVME_DEPTH; id++)
			lost += s->queue[q].read[id].busy;
	say("RESULT posted=%u completed=%llu failed=%llu bad=%llu lost=%u", s->next_chunk,
	    (unsigned long long)s->completed, (unsigned long long)s->failed,
	    (unsigned long long)s->bad, lost);
}

static const struct driver nvme_driver = {
	.name = "nvme",
	.vectors = NVME_QUEUES + 1,
	.start = start,
	.take = take,
	.resume = resume,
	.report = report,
};

const struct driver *const nvme = &nvme_driver;
