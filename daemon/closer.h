/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOD_CLOSER_H
#define KHOD_CLOSER_H

#include <stdbool.h>
#include <stddef.h>

/**
 * closer_add() - close descriptors that a client sent, without waiting for it
 * @fds: owned by the closer from now on
 * @n: how many
 */
void closer_add(const int *fds, size_t n);

#endif
