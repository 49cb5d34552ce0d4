// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The receive ring of a network card: numbered packets come from a sender outside of
 * the machine, as tests/lab/lablib/sender.py makes them.
 */

#include "nic.h"
#include <endian.h>

#define ETHERTYPE 0x88b5
#define OUTSIDE (16u << 20)	/* so far before the memory nothing is mapped */

struct packet {
	uint8_t destination[6];
	uint8_t source[6];
	uint16_t ethertype;	/* big-endian, as what follows */
	uint64_t number;
	uint64_t time_ns;
} __attribute__((packed));

static const struct nic *card(void)
{
	return (const void *)((const char *)driver - offsetof(struct nic, driver));
}

static void arm(uint32_t i)
{
	uint64_t buf = dma_addr(BUF_OFF + i * BUF);

	if (outside && i % outside == outside - 1)
		buf = mem_iova - OUTSIDE;
	card()->arm(i, buf);
}

void nic_start(bool irq)
{
	struct nic_state *s = &st->nic;

	for (uint32_t i = 0; i < NDESC; i++)
		arm(i);
	wr(RCTL, 0);
	wr(CTRL, rd(CTRL) | CTRL_SLU);
	card()->setup(irq);
	wr(RDBAL, (uint32_t)dma_addr(0));
	wr(RDBAH, dma_addr(0) >> 32);
	wr(RDLEN, NDESC * 16);
	wr(RCTL, RCTL_VALUE);
	if (card()->begin)
		card()->begin();
	wr(RDH, 0);
	wr(RDT, s->tail = NDESC - 1);
}

/* Takes every completed descriptor; without @give the device does not hear of it. */
uint64_t nic_take(bool give)
{
	struct nic_state *s = &st->nic;
	uint64_t n = 0;
	int done;

	/* Not before the descriptor is seen to be done. */
	while (n <= NDESC && (done = card()->done(s->next))) {
		struct packet *p = (void *)(mem + BUF_OFF + s->next * BUF);
		uint64_t seq = be64toh(p->number);

		if (done < 0 || be16toh(p->ethertype) != ETHERTYPE) {
			s->bad++;
		} else if (seq < s->expect) {
			s->doubled++;
		} else {
			if (seq > s->expect && s->received) {
				say("gap: %llu..%llu at descriptor %u",
				    (unsigned long long)s->expect,
				    (unsigned long long)seq - 1, s->next);
				s->lost += seq - s->expect;
			}
			s->expect = seq + 1;
			s->received++;
		}
		p->ethertype = 0;
		arm(s->next);
		s->tail = s->next;
		s->next = (s->next + 1) % NDESC;
		n++;
	}
	if (n && give && bar)
		wr(RDT, s->tail);
	return n;
}

void nic_resume(void)
{
	wr(RDT, st->nic.tail);
}

/* A descriptor that is not done, before one that is, was never completed. */
static uint64_t count_incomplete(void)
{
	uint64_t n = 0, hole = 0;

	for (uint32_t i = 0; i < NDESC - 1; i++) {
		if (card()->done((st->nic.next + i) % NDESC)) {
			n += hole;
			hole = 0;
		} else {
			hole++;
		}
	}
	return n;
}

void nic_report(void)
{
	struct nic_state *s = &st->nic;

	s->incomplete = count_incomplete();
	say("RESULT next_seq=%llu received=%llu lost=%llu doubled=%llu bad=%llu incomplete=%llu",
	    (unsigned long long)s->expect, (unsigned long long)s->received,
	    (unsigned long long)s->lost, (unsigned long long)s->doubled,
	    (unsigned long long)s->bad, (unsigned long long)s->incomplete);
}
