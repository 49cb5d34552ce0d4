// SPDX-License-Identifier: GPL-2.0-or-later
/* Intel 82576, with advanced descriptors. */

#include "nic.h"

enum {
	MDIC = 0x0020, GPIE = 0x1514, EIMS = 0x1524, EIMC = 0x1528, EIAC = 0x152c,
	IVAR0 = 0x1700, SRRCTL = 0x280c, RXDCTL = 0x2828,
	GPIE_MSIX = 1u << 4, IVAR_VALID = 0x80,
	SRRCTL_ADVANCED = 1u << 25,	/* one buffer; its size is RCTL's */
	RXDCTL_ENABLE = 1u << 25,
	STATUS_LINK_UP = 1u << 1,
};

/* Write 0x1340 to the control register of PHY 1: negotiate the link. */
enum { MDIC_NEGOTIATE = 1u << 26 | 1u << 21 | 0x1340 };

union desc {
	struct {
		uint64_t addr;
		uint64_t header;
	} read;
	struct {
		uint64_t info;
		uint32_t status;	/* errors in the upper bits */
		uint16_t len;
		uint16_t vlan;
	} done;
};

static union desc *desc(uint32_t i)
{
	return (union desc *)mem + i;
}

static void arm(uint32_t i, uint64_t buf)
{
	*desc(i) = (union desc) { .read.addr = buf };
}

static int done(uint32_t i)
{
	uint32_t status = __atomic_load_n(&desc(i)->done.status, __ATOMIC_ACQUIRE);

	if (!(status & 1))
		return 0;
	return status >> 20 ? -1 : 1;
}

static void link_up(void)
{
	double end = now() + 10;

	wr(MDIC, MDIC_NEGOTIATE);
	while (!(rd(STATUS) & STATUS_LINK_UP)) {
		errno = ETIMEDOUT;
		if (now() > end)
			die("link");
		usleep(10000);
	}
}

static void setup(bool irq)
{
	link_up();
	wr(EIMC, ~0u);
	wr(SRRCTL, SRRCTL_ADVANCED);
	if (!irq)
		return;
	wr(GPIE, GPIE_MSIX);
	wr(IVAR0, IVAR_VALID);		/* receive queue 0: vector 0 */
	wr(EIAC, 1);			/* a message clears its cause */
	wr(EIMS, 1);
}

static void begin(void)
{
	wr(RXDCTL, rd(RXDCTL) | RXDCTL_ENABLE);
}

static const struct nic card = {
	.driver = {
		.name = "igb",
		.vectors = 1,
		.start = nic_start,
		.take = nic_take,
		.resume = nic_resume,
		.report = nic_report,
	},
	.setup = setup,
	.arm = arm,
	.done = done,
	.begin = begin,
};

const struct driver *const igb = &card.driver;
