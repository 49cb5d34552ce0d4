/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * As much of Intel's 82574 as receiving packets needs: registers, legacy receive
 * descriptors. From the "Intel 82574 GbE Controller Family Datasheet", chapters 7 and 10.
 */
#ifndef E1000E_H
#define E1000E_H

#include <stdint.h>

enum {
	E1000E_CTRL = 0x0000,
	E1000E_STATUS = 0x0008,
	E1000E_IMC = 0x00d8,	/* interrupt mask clear */
	E1000E_RCTL = 0x0100,
	E1000E_RDBAL = 0x2800,	/* physical address of the ring */
	E1000E_RDBAH = 0x2804,
	E1000E_RDLEN = 0x2808,	/* its bytes, a multiple of 128 */
	E1000E_RDH = 0x2810,	/* the descriptor that the device uses next */
	E1000E_RDT = 0x2818,	/* the device stops in front of this one */
	E1000E_RFCTL = 0x5008,
};

#define E1000E_CTRL_SLU (1u << 6)	/* set link up */

#define E1000E_RCTL_EN (1u << 1)
#define E1000E_RCTL_UPE (1u << 3)	/* every unicast address */
#define E1000E_RCTL_MPE (1u << 4)	/* every multicast address */
#define E1000E_RCTL_BAM (1u << 15)	/* broadcasts */
#define E1000E_RCTL_BSIZE_256 (3u << 16)
#define E1000E_RCTL_SECRC (1u << 26)	/* without the checksum at the end */

#define E1000E_RXD_DD (1u << 0)		/* descriptor done */

struct e1000e_rxd {
	uint64_t addr;			/* of the buffer, physical without an IOMMU */
	uint16_t length;
	uint16_t csum;
	uint8_t status;
	uint8_t errors;
	uint16_t special;
};
_Static_assert(sizeof(struct e1000e_rxd) == 16, "receive descriptor");

#endif
