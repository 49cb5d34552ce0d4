/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Any bytes as a request and as a reply: malformed, or packed again to what unpacks. */
#include "fuzz.h"
#include "wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	Kho__Control__Request *q = kho_wire_request_unpack(data, size);
	Kho__Control__Reply *a = kho_wire_reply_unpack(data, size);

	if (q) {
		size_t n = kho__control__request__get_packed_size(q);
		uint8_t *buf = malloc(n + 1);

		if (buf && kho__control__request__pack(q, buf) != n)
			abort();
		free(buf);
	}
	if (a) {
		size_t n = kho__control__reply__get_packed_size(a);
		uint8_t *buf = malloc(n + 1);

		if (buf && kho__control__reply__pack(a, buf) != n)
			abort();
		free(buf);
	}
	kho_wire_request_free(q);
	kho_wire_reply_free(a);
	return 0;
}
