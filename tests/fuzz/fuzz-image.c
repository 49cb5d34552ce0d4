/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Any bytes as an image: refused with an error, or decoded to what encodes again. The
 * checksum would stop a fuzzer at the door, so every input is also tried with the header
 * put right.
 */
#include <endian.h>
#include <openssl/evp.h>
#include <string.h>

#include "fuzz.h"
#include "util.h"

static void one(const uint8_t *data, size_t size)
{
	_cleanup_image_ struct kho_image *a = NULL, *b = NULL;
	_cleanup_error_ struct kho_error *err = NULL;
	_cleanup_free_ void *buf = NULL;
	size_t n;

	if (kho_image_decode(data, size, &a, &err) < 0) {
		if (a)
			abort();
		return;
	}
	if (kho_image_encode(a, &buf, &n, NULL) < 0 || kho_image_decode(buf, n, &b, NULL) < 0)
		abort();
	if (kho_image_n_files(a) != kho_image_n_files(b) ||
	    strcmp(kho_image_name(a), kho_image_name(b)) != 0)
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint64_t payload;
	uint8_t *copy;
	EVP_MD_CTX *md;

	one(data, size);
	if (size < KHO_IMAGE_HEADER_SIZE)
		return 0;
	copy = malloc(size);
	md = EVP_MD_CTX_new();
	if (copy && md) {
		memcpy(copy, data, size);
		payload = htole64(size - KHO_IMAGE_HEADER_SIZE);
		memcpy(copy + 24, &payload, sizeof(payload));
		if (EVP_DigestInit_ex(md, EVP_sha256(), NULL) == 1 &&
		    EVP_DigestUpdate(md, copy, 32) == 1 &&
		    EVP_DigestUpdate(md, copy + KHO_IMAGE_HEADER_SIZE, size - KHO_IMAGE_HEADER_SIZE) == 1 &&
		    EVP_DigestFinal_ex(md, copy + 32, NULL) == 1)
			one(copy, size);
	}
	EVP_MD_CTX_free(md);
	free(copy);
	return 0;
}
