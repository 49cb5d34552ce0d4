/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef SIM_WIRE_H
#define SIM_WIRE_H

struct sim_packet {
	unsigned long request;
	int ret;
	unsigned char arg[96] __attribute__((aligned(8)));
};

/* @fd: -1: none. A descriptor that is not open is sent as none, as the kernel would see it. */
int sim_send(int sock, const struct sim_packet *p, int fd);
/* Return: 1, 0 when the peer has gone, -errno. */
int sim_recv(int sock, struct sim_packet *p, int *fd);

#endif
