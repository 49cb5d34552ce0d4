/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A workload in its smallest form: a counter in a memfd that goes on counting after a
 * kexec. At its start it claims what it registered before; if there is nothing, it begins
 * at 0. Then it counts, and gives the memfd into custody again.
 *
 *	cc counter.c $(pkg-config --cflags --libs libkho)
 */
#include <errno.h>
#include <kho/kho.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define NAME "counter"

static int fail(const char *what, int r, struct kho_error *err)
{
	char *text = kho_error_format(err, r);

	fprintf(stderr, "counter: %s: %s\n", what, text ? text : strerror(-r));
	free(text);
	kho_error_free(err);
	return EXIT_FAILURE;
}

int main(int argc, char **argv)
{
	const char *socket_path = argc > 1 ? argv[1] : NULL;
	struct kho_client_file file = { .name = "state" };
	struct kho_client *client = NULL;
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;
	struct kho *kho = NULL;
	uint64_t *counter;
	int fd, r;

	r = kho_new(&kho, NULL, NULL);
	if (r < 0)
		return fail("libkho", r, NULL);
	r = kho_client_connect(kho, socket_path, &client, &err);
	if (r < 0)
		return fail("khod", r, err);

	r = kho_client_claim(client, NAME, NULL, 0, &claim, &err);
	if (r == 0) {
		fd = kho_claim_take_fd(claim, 0);
		/* Only now is it ours alone: until here a crash would have lost nothing. */
		r = kho_client_claim_ack(client, claim, &err);
		kho_claim_free(claim);
		if (r < 0)
			return fail("acknowledge", r, err);
	} else if (r == -ENOENT) {
		err = kho_error_free(err);
		fd = memfd_create("counter", MFD_CLOEXEC);
		if (fd < 0 || ftruncate(fd, sizeof(*counter)) < 0)
			return fail("memfd", -errno, NULL);
	} else {
		return fail("claim", r, err);
	}

	counter = mmap(NULL, sizeof(*counter), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (counter == MAP_FAILED)
		return fail("mmap", -errno, NULL);
	printf("%llu\n", (unsigned long long)++*counter);

	file.fd = fd;
	r = kho_client_register(client, NAME, &file, 1, NULL, 0, &err);
	if (r < 0)
		return fail("register", r, err);
	kho_client_free(client);
	kho_free(kho);
	return EXIT_SUCCESS;
}
