/* SPDX-License-Identifier: GPL-2.0-or-later */
/* khod on a simulated kernel: the same daemon, another table of operations. */
#include "../../daemon/khod.h"
#include "sim.h"

int main(int argc, char **argv)
{
	return khod_main(argc, argv, sim_ops(), NULL);
}
