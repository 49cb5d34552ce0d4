// SPDX-License-Identifier: GPL-2.0-or-later
/* Intel 82574, with legacy descriptors. */

#include "nic.h"

enum {
	IMS = 0x00d0, IMC = 0x00d8, EIAC = 0x00dc, IVAR = 0x00e4, RFCTL = 0x5008,
	RXQ0 = 1u << 20,
};

struct desc {
	uint64_t addr;
	uint16_t len;
	uint16_t csum;
	uint8_t status;
	uint8_t errors;
	uint16_t special;
};

static struct desc *desc(uint32_t i)
{
	return (struct desc *)mem + i;
}

static void arm(uint32_t i, uint64_t buf)
{
	*desc(i) = (struct desc) { .addr = buf };
}

static int done(uint32_t i)
{
	if (!(__atomic_load_n(&desc(i)->status, __ATOMIC_ACQUIRE) & 1))
		return 0;
	return desc(i)->errors ? -1 : 1;
}

static void setup(bool irq)
{
	wr(IMC, ~0u);
	wr(RFCTL, 0);
	if (!irq)
		return;
	wr(IVAR, 0x8);			/* receive queue 0: vector 0, valid */
	/* Clear the cause by a message, and do not mask it */
	wr(CTRL_EXT, rd(CTRL_EXT) | 1u << 31 | 1u << 27);
	wr(EIAC, RXQ0);
	wr(IMS, RXQ0);
}

static const struct nic card = {
	.driver = {
		.name = "e1000e",
		.vectors = 1,
		.start = nic_start,
		.take = nic_take,
		.resume = nic_resume,
		.report = nic_report,
	},
	.setup = setup,
	.arm = arm,
	.done = done,
};

const struct driver *const e1000e = &card.driver;
