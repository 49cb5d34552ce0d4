/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the network cards have in common: one receive ring. */
#ifndef DMA_GUEST_NIC_H
#define DMA_GUEST_NIC_H

#include "guest.h"

#define NDESC		32768u		/* 16 bytes each */
#define BUF		256u

_Static_assert(NDESC * 16 <= QUEUE_SIZE && NDESC * BUF <= BUF_SIZE, "no room for the ring");

/* Registers that both have at the same place; of the ring it is queue 0's. */
enum {
	CTRL = 0x0000, STATUS = 0x0008, CTRL_EXT = 0x0018, RCTL = 0x0100,
	RDBAL = 0x2800, RDBAH = 0x2804, RDLEN = 0x2808, RDH = 0x2810, RDT = 0x2818,
};

enum { CTRL_SLU = 1u << 6 };

/* Enable, promiscuous, broadcast, 256 byte buffers, strip CRC. */
enum {
	RCTL_VALUE = 1u << 1 | 1u << 3 | 1u << 4 | 1u << 15 | 3u << 16 | 1u << 26,
};

/*
 * @setup: Everything but the ring's address and size: turn receiving off, and what
 *         the card needs besides; @irq: let packets raise vector 0.
 * @arm:   Write a descriptor whose buffer is at the DMA address @buf.
 * @done:  0 not yet, 1 a packet is there, -1 with an error.
 * @begin: Receiving was enabled by RCTL and the ring is set up.
 */
struct nic {
	struct driver driver;
	void (*setup)(bool irq);
	void (*arm)(uint32_t i, uint64_t buf);
	int (*done)(uint32_t i);
	void (*begin)(void);
};

void nic_start(bool irq);
uint64_t nic_take(bool give);
void nic_resume(void);
void nic_report(void);

#endif
