/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef SIM_WIRE_H
#define SIM_WIRE_H

#include <stddef.h>

#define SIM_ARG_MAX 128
#define SIM_DATA_MAX 40960

/* Not ioctls: what /proc would say of the file. */
#define SIM_WHAT 1UL	/* data: the target of its link in /proc/self/fd */
#define SIM_FDINFO 2UL	/* data: its /proc/self/fdinfo */
#define SIM_CONFIG 3UL	/* data: a device's configuration space */

/*
 * One ioctl. @data is what a pointer in @arg points to: copied in if @data_size is not 0,
 * out of the answer likewise.
 */
struct sim_packet {
	unsigned long request;
	int ret;
	unsigned char arg[SIM_ARG_MAX] __attribute__((aligned(8)));
	size_t data_size;
	unsigned char data[SIM_DATA_MAX] __attribute__((aligned(8)));
};

/* @fd: -1: none. A descriptor that is not open is sent as none, as the kernel would see it. */
int sim_send(int sock, const struct sim_packet *p, int fd);
/* Return: 1, 0 when the peer has gone, -errno. */
int sim_recv(int sock, struct sim_packet *p, int *fd);

#endif
