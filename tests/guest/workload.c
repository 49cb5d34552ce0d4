/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * workload: one that does nothing but say when it runs and when it was stopped, on the console,
 * where the host stamps it: the two ends of the service gap. It adds the CPU's counter, which goes
 * on over a kexec.
 *
 *	workload
 *		MEMORY in the environment says who keeps 1 GiB of memfd for it over a kexec: "khod",
 *		"fdstore" (systemd, in the store of its unit), or nobody. It runs when it has it in
 *		hand: new in the first kernel and in the others what came over, by what is in it.
 */
#include <errno.h>
#include <fcntl.h>
#include <kho/kho.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#define NAME "bench"
#define SIZE (UINT64_C(1) << 30)
#define FILL 0x5a

static void say(const char *what)
{
	int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);

	dprintf(fd, "lab: workload %s counter=%llu\n", what, __builtin_ia32_rdtsc());
	close(fd);
}

static _Noreturn void die(const char *what, int r, struct kho_error *err)
{
	char *text = kho_error_format(err, r);

	fprintf(stderr, "workload: %s: %s\n", what, text ? text : strerror(-r));
	exit(EXIT_FAILURE);
}

static int create(void)
{
	int fd = memfd_create(NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	char *p;

	if (fd < 0 || ftruncate(fd, (off_t)SIZE) < 0)
		die("memfd", -errno, NULL);
	p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		die("memfd", -errno, NULL);
	memset(p, FILL, SIZE);
	munmap(p, SIZE);
	return fd;
}

static void from_fdstore(void)
{
	int fd;

	if (sd_listen_fds(0) > 0)
		return;		/* SD_LISTEN_FDS_START */
	fd = create();
	if (sd_pid_notify_with_fds(0, 0, "FDSTORE=1\nFDNAME=" NAME, &fd, 1) <= 0)
		die("fd store", -EIO, NULL);
	if (dup2(fd, SD_LISTEN_FDS_START) < 0)
		die("dup2", -errno, NULL);
}

static void from_khod(void)
{
	struct kho_client *client = NULL;
	struct kho_claim *claim = NULL;
	struct kho_error *err = NULL;
	struct kho *kho;
	int fd, r = kho_new(&kho, NULL, NULL);

	if (r >= 0)
		r = kho_client_connect(kho, NULL, &client, &err);
	if (r < 0)
		die("khod", r, err);
	r = kho_client_claim(client, NAME, NULL, 0, &claim, &err);
	if (r >= 0) {
		fd = kho_claim_take_fd(claim, 0);
		r = kho_client_claim_ack(client, claim, &err);
	} else if (r == -ENOENT) {
		err = kho_error_free(err);
		fd = create();
		r = kho_client_register(client, NAME, &(struct kho_client_file){ NAME, fd }, 1, NULL, 0, &err);
	}
	if (r < 0)
		die(NAME, r, err);
	if (dup2(fd, SD_LISTEN_FDS_START) < 0)
		die("dup2", -errno, NULL);
}

static void in_hand(void)
{
	char c[2] = "";

	if (pread(SD_LISTEN_FDS_START, &c[0], 1, 0) != 1 ||
	    pread(SD_LISTEN_FDS_START, &c[1], 1, (off_t)SIZE - 1) != 1 || c[0] != FILL || c[1] != FILL)
		die("the memory", -EIO, NULL);
}

int main(void)
{
	const char *memory = getenv("MEMORY");
	bool khod = memory && strcmp(memory, "khod") == 0;
	sigset_t mask;
	int sig;

	sigemptyset(&mask);
	sigaddset(&mask, SIGTERM);
	sigprocmask(SIG_BLOCK, &mask, NULL);
	if (khod)
		from_khod();
	else if (memory && strcmp(memory, "fdstore") == 0)
		from_fdstore();
	if (memory && *memory)
		in_hand();
	say("runs");
	sigwait(&mask, &sig);
	say("stopped");
	return EXIT_SUCCESS;
}
