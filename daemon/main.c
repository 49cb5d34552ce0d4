/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "khod.h"

int main(int argc, char **argv)
{
	return khod_main(argc, argv, NULL, NULL);
}
