/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Clients that do not behave, against the real khod: garbage, too much, too early,
 * wrong order, other users, a second khod.
 */
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#include "common.h"
#include "wire.h"

static struct kho *kho;
static struct sim *sim;

static void setup(void)
{
	cr_assert(kho_new(&kho, NULL, NULL) == 0);
	sim = sim_new(true);
	must_start(sim);
}

static void teardown(void)
{
	must_stop(sim);
	sim_free(sim);
	kho_free(kho);
}

TestSuite(protocol, .init = setup, .fini = teardown, .timeout = 120);

static int dial_raw(void)
{
	return kho_ops_kernel()->connect(NULL, sim_socket(sim), 20000);
}

/* The connection still works for everybody else. */
static void must_work(void)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_status *st = NULL;

	cr_assert(c, "%s", sim_log(sim));
	cr_assert(kho_client_status(c, &st, NULL) == 0);
	kho_status_free(st);
	kho_client_free(c);
}

/* One reply, which must be a refusal; free with kho_wire_reply_free(). */
static Kho__Control__Reply *refusal(int sock)
{
	uint8_t buf[KHO_WIRE_PACKET_MAX];
	Kho__Control__Reply *a;
	int fds[KHO_WIRE_FDS_MAX];
	size_t n_fds;
	ssize_t n;

	n = kho_wire_recv(kho, sock, buf, fds, &n_fds);
	if (n == -ECONNRESET)
		n = kho_wire_recv(kho, sock, buf, fds, &n_fds);
	cr_assert(n > 0, "no answer: %zd", n);
	cr_assert(n_fds == 0);
	a = kho_wire_reply_unpack(buf, n);
	cr_assert(a && a->body_case == KHO__CONTROL__REPLY__BODY_ERROR);
	cr_assert(strlen(a->error->reason) > 10 && strlen(a->error->object) > 0);
	return a;
}

/* A refusal; and then, if it is fatal, the end. */
static void must_refuse(int sock, int errnum, bool fatal)
{
	Kho__Control__Reply *a = refusal(sock);
	uint8_t buf[KHO_WIRE_PACKET_MAX];
	int fds[KHO_WIRE_FDS_MAX];
	size_t n_fds;

	cr_assert(a->error->error == errnum, "%d: %s", a->error->error, a->error->reason);
	cr_assert(a->error->fatal == fatal);
	kho_wire_reply_free(a);
	if (fatal)
		cr_assert(kho_wire_recv(kho, sock, buf, fds, &n_fds) <= 0);
}

static void send_request(int sock, Kho__Control__Request *q, const int *fds, size_t n_fds)
{
	uint8_t buf[KHO_WIRE_PACKET_MAX];
	size_t n = kho__control__request__pack(q, buf);

	(void)kho_wire_send(kho, sock, buf, n, fds, n_fds);
}

static void hello(int sock)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Hello h = KHO__CONTROL__HELLO__INIT;
	uint8_t buf[KHO_WIRE_PACKET_MAX];
	int fds[KHO_WIRE_FDS_MAX];
	size_t n_fds;

	h.min_version = h.max_version = 1;
	q.body_case = KHO__CONTROL__REQUEST__BODY_HELLO;
	q.hello = &h;
	send_request(sock, &q, NULL, 0);
	cr_assert(kho_wire_recv(kho, sock, buf, fds, &n_fds) > 0);
}

Test(protocol, garbage)
{
	int s = dial_raw();

	cr_assert(send(s, "\xff\xff\xff\xff\033[2J evil", 14, 0) == 14);
	must_refuse(s, EBADMSG, true);
	close(s);
	cr_assert(strstr(sim_log(sim), "breaks the protocol"));
	cr_assert(!strstr(sim_log(sim), "evil"), "raw input in the log");

	s = dial_raw();
	hello(s);
	cr_assert(send(s, "", 0, 0) == 0);	/* an empty packet is an end of file */
	close(s);
	must_work();
}

/* A TCP socket of which the last close waits for a peer that does not read. */
static int lingering_socket(int *peer)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct linger linger = { .l_onoff = 1, .l_linger = 20 };
	int l = socket(AF_INET, SOCK_STREAM, 0), s = socket(AF_INET, SOCK_STREAM, 0);
	socklen_t len = sizeof(a);
	static char full[1 << 20];

	cr_assert(bind(l, (struct sockaddr *)&a, len) == 0 && listen(l, 1) == 0);
	cr_assert(getsockname(l, (struct sockaddr *)&a, &len) == 0);
	cr_assert(connect(s, (struct sockaddr *)&a, len) == 0);
	*peer = accept(l, NULL, NULL);
	close(l);
	cr_assert(setsockopt(s, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)) == 0);
	while (send(s, full, sizeof(full), MSG_DONTWAIT) > 0)
		;
	return s;
}

/* A packet of @size bytes, however large, with a descriptor. */
static void send_with(int sock, size_t size, int fd)
{
	static char zeros[KHO_WIRE_PACKET_MAX + 1];
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {};
	struct iovec iov = { .iov_base = zeros, .iov_len = size };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.buf,
		.msg_controllen = sizeof(control.buf),
	};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	*c = (struct cmsghdr){
		.cmsg_level = SOL_SOCKET,
		.cmsg_type = SCM_RIGHTS,
		.cmsg_len = CMSG_LEN(sizeof(int)),
	};
	memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	(void)sendmsg(sock, &msg, MSG_NOSIGNAL);
}

static time_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec;
}

/* Others have waited for nothing since @begin, and do not until everything sent before was heard. */
static void nobody_waits(time_t begin)
{
	for (int i = 0; i < 50; i++) {
		must_work();
		usleep(10000);
	}
	cr_assert(now() - begin < 10, "%ld s", (long)(now() - begin));
}

/* khod, which was stopped at @begin at the earliest, with sockets that linger for these peers. */
static void go_on_with(const int *peer, size_t n, time_t begin)
{
	kill(sim_pid(sim), SIGCONT);
	nobody_waits(begin);
	for (size_t i = 0; i < n; i++)
		close(peer[i]);
}

/* In a packet without a byte, in one that is cut off: nobody else waits for it. */
Test(protocol, a_descriptor_that_lingers_in_a_packet_that_is_none)
{
	const size_t sizes[] = { 0, KHO_WIRE_PACKET_MAX + 1 };
	time_t begin = now();
	int socks[4], peer[4];

	for (int i = 0; i < 4; i++) {
		socks[i] = dial_raw();
		if (i > 1)
			hello(socks[i]);
	}
	/* Until it goes on these are the last descriptors of what they are of. */
	kill(sim_pid(sim), SIGSTOP);
	for (int i = 0; i < 4; i++) {
		int slow = lingering_socket(&peer[i]);

		send_with(socks[i], sizes[i % 2], slow);
		close(slow);
		close(socks[i]);
	}
	go_on_with(peer, 4, begin);
}

/* With more connections than a user may have: what comes with the next one is closed unread. */
Test(protocol, a_descriptor_that_lingers_in_a_connection_too_many)
{
	enum { MAX = 128 };
	time_t begin = now();
	int socks[MAX], peer, slow, s;

	for (int i = 0; i < MAX; i++) {
		socks[i] = dial_raw();
		hello(socks[i]);
	}
	slow = lingering_socket(&peer);
	kill(sim_pid(sim), SIGSTOP);
	s = dial_raw();
	send_with(s, 1, slow);
	close(slow);
	close(s);
	kill(sim_pid(sim), SIGCONT);
	for (int i = 0; i < 4; i++)
		close(socks[i]);
	usleep(500000);	/* until that is seen a new one is one too many, too */
	nobody_waits(begin);
	close(peer);
	for (int i = 4; i < MAX; i++)
		close(socks[i]);
}

/* Before and after HELLO, read or not: nobody else waits for it. */
Test(protocol, a_descriptor_that_lingers)
{
	time_t begin = now();
	int socks[4], peer[4];

	for (int i = 0; i < 4; i++) {
		socks[i] = dial_raw();
		if (i % 2)
			hello(socks[i]);
	}
	kill(sim_pid(sim), SIGSTOP);
	for (int i = 0; i < 4; i++) {
		int slow = lingering_socket(&peer[i]);

		cr_assert(kho_wire_send(kho, socks[i], "\xff", 1, &slow, 1) >= 0);
		if (i > 1)
			(void)kho_wire_send(kho, socks[i], "\xff", 1, &slow, 1);
		close(slow);
		close(socks[i]);
	}
	go_on_with(peer, 4, begin);
}

/* It is an end of file as well if it brings descriptors: they must not stay open. */
Test(protocol, empty_packets_with_descriptors)
{
	int pair[2] = { make_memfd(100, 1), make_memfd(100, 2) };
	size_t before;

	must_work();
	before = sim_khod_fds(sim);
	for (int i = 0; i < 8; i++) {
		int s = dial_raw();
		uint8_t end;

		hello(s);
		cr_assert(kho_wire_send(kho, s, NULL, 0, pair, 2) >= 0);
		cr_assert(recv(s, &end, 1, 0) <= 0);
		close(s);
	}
	must_work();
	cr_assert(sim_khod_comes_to_fds(sim, before), "%zu, not %zu", sim_khod_fds(sim), before);
	close(pair[0]);
	close(pair[1]);
}

Test(protocol, random_garbage)
{
	unsigned int seed = 20261120;
	char buf[512];

	fprintf(stderr, "seed %u\n", seed);
	srandom(seed);
	for (int i = 0; i < 300; i++) {
		int s = dial_raw();

		if (i % 2)
			hello(s);
		for (int k = 0; k < 3; k++) {
			size_t n = 1 + random() % sizeof(buf);

			for (size_t j = 0; j < n; j++)
				buf[j] = (char)random();
			(void)send(s, buf, n, MSG_NOSIGNAL);
		}
		close(s);
	}
	usleep(50000);
	must_work();
}

Test(protocol, log_is_rate_limited)
{
	const char *p;
	int n = 0;

	for (int i = 0; i < 100; i++) {
		int s = dial_raw();

		(void)send(s, "\xff", 1, MSG_NOSIGNAL);
		must_refuse(s, EBADMSG, true);
		close(s);
	}
	for (p = sim_log(sim); (p = strstr(p, "breaks the protocol")); p++)
		n++;
	cr_assert(n > 0 && n <= 20, "%d messages", n);
	must_work();
}

Test(protocol, wrong_order)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__List l = KHO__CONTROL__LIST__INIT;
	Kho__Control__ClaimAck ack = KHO__CONTROL__CLAIM_ACK__INIT;
	Kho__Control__Hello h = KHO__CONTROL__HELLO__INIT;
	int s = dial_raw();

	q.body_case = KHO__CONTROL__REQUEST__BODY_LIST;
	q.list = &l;
	send_request(s, &q, NULL, 0);
	must_refuse(s, EPROTO, true);
	close(s);

	s = dial_raw();
	hello(s);
	ack.name = (char *)"vm1";
	q.body_case = KHO__CONTROL__REQUEST__BODY_CLAIM_ACK;
	q.claim_ack = &ack;
	send_request(s, &q, NULL, 0);
	must_refuse(s, EPROTO, true);
	close(s);

	s = dial_raw();
	h.min_version = 9;
	h.max_version = 12;
	q.body_case = KHO__CONTROL__REQUEST__BODY_HELLO;
	q.hello = &h;
	send_request(s, &q, NULL, 0);
	must_refuse(s, EPROTO, true);
	close(s);

	s = dial_raw();
	hello(s);
	q.body_case = KHO__CONTROL__REQUEST__BODY__NOT_SET;
	q.serial = 5;
	send_request(s, &q, NULL, 0);
	must_refuse(s, EOPNOTSUPP, true);
	close(s);
	must_work();
}

Test(protocol, policies_that_nobody_knows)
{
	enum { KEEP, SURVIVAL, RESTORE, MSEC, N };

	for (int bad = 0; bad < N; bad++) {
		Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
		Kho__Control__Register r = KHO__CONTROL__REGISTER__INIT;
		Kho__Control__FileSpec spec = KHO__CONTROL__FILE_SPEC__INIT, *specs[1] = { &spec };
		Kho__Control__Policy p = KHO__CONTROL__POLICY__INIT;
		int s = dial_raw(), fd = STDERR_FILENO;

		hello(s);
		spec.name = (char *)"a";
		r.name = (char *)"vm1";
		r.files = specs;
		r.n_files = 1;
		p.keep = bad == KEEP ? 77 : KHO__CONTROL__KEEP_MODE__KEEP_LEASE;
		p.survival = bad == SURVIVAL ? -1 : KHO__CONTROL__SURVIVAL__SURVIVAL_MUST;
		p.restore_failure = bad == RESTORE ? 77 : 0;
		p.prepare_msec = bad == MSEC ? UINT32_MAX : 1;
		r.policy = &p;
		q.body_case = KHO__CONTROL__REQUEST__BODY_REGISTRATION;
		q.registration = &r;
		send_request(s, &q, &fd, 1);
		must_refuse(s, EOPNOTSUPP, true);
		close(s);
	}
}

Test(protocol, descriptors_that_do_not_belong)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__List l = KHO__CONTROL__LIST__INIT;
	Kho__Control__Register r = KHO__CONTROL__REGISTER__INIT;
	Kho__Control__FileSpec spec = KHO__CONTROL__FILE_SPEC__INIT, *specs[1] = { &spec };
	size_t fds_before;
	int s, fds[2];

	must_work();
	usleep(50000);
	fds_before = sim_khod_fds(sim);

	s = dial_raw();
	hello(s);
	fds[0] = fds[1] = STDERR_FILENO;
	q.body_case = KHO__CONTROL__REQUEST__BODY_LIST;
	q.list = &l;
	send_request(s, &q, fds, 2);
	must_refuse(s, EPROTO, true);
	close(s);

	s = dial_raw();
	hello(s);
	spec.name = (char *)"a";
	r.name = (char *)"vm1";
	r.files = specs;
	r.n_files = 1;
	q.body_case = KHO__CONTROL__REQUEST__BODY_REGISTRATION;
	q.registration = &r;
	send_request(s, &q, fds, 2);
	must_refuse(s, EPROTO, true);
	close(s);

	/* Half a registration, then nothing: what came is closed with the connection. */
	s = dial_raw();
	hello(s);
	r.more = true;
	send_request(s, &q, fds, 1);
	close(s);

	/* Half a registration, then something else. */
	s = dial_raw();
	hello(s);
	send_request(s, &q, fds, 1);
	q.body_case = KHO__CONTROL__REQUEST__BODY_LIST;
	q.list = &l;
	send_request(s, &q, NULL, 0);
	must_refuse(s, EPROTO, true);
	close(s);

	usleep(50000);
	cr_assert(sim_khod_comes_to_fds(sim, fds_before), "khod leaks: %zu, then %zu", fds_before,
		  sim_khod_fds(sim));
}

Test(protocol, oversized)
{
	static char big[KHO_WIRE_PACKET_MAX + 100];
	int s = dial_raw();

	hello(s);
	memset(big, 'x', sizeof(big));
	cr_assert(send(s, big, sizeof(big), 0) > 0);
	must_refuse(s, EMSGSIZE, true);
	close(s);
	must_work();
}

Test(protocol, bad_names_are_refused_not_logged)
{
	Kho__Control__Request q = KHO__CONTROL__REQUEST__INIT;
	Kho__Control__Register r = KHO__CONTROL__REGISTER__INIT;
	Kho__Control__FileSpec spec = KHO__CONTROL__FILE_SPEC__INIT, *specs[1] = { &spec };
	Kho__Control__Claim c = KHO__CONTROL__CLAIM__INIT;
	int s = dial_raw(), fd = make_memfd(100, 1);

	hello(s);
	spec.name = (char *)"a";
	r.name = (char *)"bad\nname";
	r.files = specs;
	r.n_files = 1;
	q.body_case = KHO__CONTROL__REQUEST__BODY_REGISTRATION;
	q.registration = &r;
	send_request(s, &q, &fd, 1);
	must_refuse(s, EINVAL, false);
	c.name = (char *)"bad\nname";
	q.body_case = KHO__CONTROL__REQUEST__BODY_CLAIM;
	q.claim = &c;
	send_request(s, &q, NULL, 0);
	must_refuse(s, ENOENT, false);
	close(s);
	close(fd);
	cr_assert(!strstr(sim_log(sim), "bad\nname"));
	must_work();
}

Test(protocol, connection_limit)
{
	const int limit = getuid() ? 16 : 128;
	int socks[200];
	int refused = 0;

	for (int i = 0; i < 200; i++)
		socks[i] = dial_raw();
	/* Those beyond the limit are told so at once; the others, after 5 s, that they were silent. */
	for (int i = 0; i < 200; i++) {
		Kho__Control__Reply *a = refusal(socks[i]);

		refused += a->error->error == EDQUOT;
		kho_wire_reply_free(a);
	}
	for (int i = 0; i < 200; i++)
		close(socks[i]);
	cr_assert(refused == 200 - limit, "%d refused", refused);
	usleep(100000);
	must_work();
}

Test(protocol, hello_deadline)
{
	int s = dial_raw();

	must_refuse(s, ETIMEDOUT, true);	/* after 5 s */
	close(s);
	must_work();
}

Test(protocol, second_khod)
{
	char cmd[512], out[512] = "";
	int status;
	FILE *f;

	snprintf(cmd, sizeof(cmd), "KHO_SIM=%s %s --socket %s 2>&1", sim_dir(sim),
		 getenv("KHOD_SIM"), sim_socket(sim));
	f = popen(cmd, "r");
	cr_assert(f);
	cr_assert(fread(out, 1, sizeof(out) - 1, f) > 0);
	status = pclose(f);
	cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 3, "0x%x", status);
	cr_assert(strstr(out, "Another khod (pid "), "%s", out);
	must_work();
}

/* As another user: in a child, over its own connection. */
static int as_user(uid_t uid, int (*fn)(void))
{
	int status;
	pid_t pid;

	fflush(NULL);
	pid = fork();
	if (pid == 0) {
		if (chmod(sim_dir(sim), 0755) < 0 || chmod(sim_socket(sim), 0666) < 0 ||
		    setresuid(uid, uid, uid) < 0)
			_exit(100);
		_exit(fn());
	}
	waitpid(pid, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 101;
}

static int user_tries(void)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_claim *claim = NULL;
	struct kho_workloads *w = NULL;
	struct kho_client_file cf;

	if (!c)
		return 1;
	if (kho_client_claim(c, "roots", NULL, 0, &claim, NULL) != -EPERM)
		return 2;
	if (kho_client_release(c, "roots", NULL, 0, NULL) != -EPERM)
		return 3;
	if (kho_client_show(c, "roots", &w, NULL, NULL) != -EPERM)
		return 4;
	if (kho_client_list(c, &w, NULL) != 0 || kho_workloads_n(w) != 0)
		return 5;
	kho_workloads_free(w);
	if (kho_client_claim(c, "roots", "wrong-wrong-wrong", 17, &claim, NULL) != -EPERM)
		return 6;
	if (kho_client_claim(c, "roots", "0123456789abcdef", 16, &claim, NULL) != 0)
		return 7;
	claim = kho_claim_free(claim);
	kho_client_free(c);

	/* Not more memory than its part of the machine's. */
	c = dial(kho, sim);
	cf = (struct kho_client_file){ "a", memfd_create("a", MFD_CLOEXEC) };
	if (ftruncate(cf.fd, (off_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE) / 8) < 0 ||
	    kho_client_register(c, "large", &cf, 1, NULL, 0, NULL) != -EDQUOT)
		return 10;
	close(cf.fd);
	kho_client_free(c);

	/* Its own workloads, up to its limit. */
	c = dial(kho, sim);
	for (int i = 0; i < 33; i++) {
		char name[32];
		int r;

		snprintf(name, sizeof(name), "mine%d", i);
		/* Not make_memfd(): criterion's asserts hang in a child of a test. */
		cf = (struct kho_client_file){ "a", memfd_create("a", MFD_CLOEXEC) };
		r = kho_client_register(c, name, &cf, 1, NULL, 0, NULL);
		close(cf.fd);
		if (r != (i < 32 ? 0 : -EDQUOT))
			return 8;
	}
	if (kho_client_list(c, &w, NULL) != 0 || kho_workloads_n(w) != 32)
		return 9;
	kho_workloads_free(w);
	kho_client_free(c);
	return 0;
}

static int other_user_tries(void)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_claim *claim = NULL;

	if (!c)
		return 1;
	if (kho_client_claim(c, "mine0", NULL, 0, &claim, NULL) != -EPERM)
		return 2;
	kho_client_free(c);
	return 0;
}

/* A workload of @n empty memfds. */
static int register_files(struct kho_client *c, const char *name, size_t n)
{
	struct kho_client_file cf[500];
	char names[500][8];
	int r;

	for (size_t i = 0; i < n; i++) {
		snprintf(names[i], sizeof(names[i]), "f%zu", i);
		cf[i] = (struct kho_client_file){ names[i], memfd_create("f", MFD_CLOEXEC) };
	}
	r = kho_client_register(c, name, cf, n, NULL, 0, NULL);
	for (size_t i = 0; i < n; i++)
		close(cf[i].fd);
	return r;
}

/* 1,024 files in all its workloads together. */
static int user_with_many_files(void)
{
	struct kho_client *c = dial(kho, sim);

	if (!c || register_files(c, "a", 500) != 0 || register_files(c, "b", 500) != 0)
		return 1;
	if (register_files(c, "c", 25) != -EDQUOT)
		return 2;
	if (register_files(c, "c", 24) != 0)
		return 3;
	if (register_files(c, "d", 1) != -EDQUOT)
		return 4;
	kho_client_free(c);
	return 0;
}

Test(protocol, users)
{
	struct kho_client *c = dial(kho, sim);
	struct kho_client_file cf = { "a", make_memfd(100, 1) };
	int r;

	if (geteuid() != 0)
		cr_skip_test("needs root to become other users");
	cr_assert(kho_client_register(c, "roots", &cf, 1, "0123456789abcdef", 16, NULL) == 0);
	kho_client_free(c);
	close(cf.fd);
	r = as_user(65534, user_tries);
	cr_assert(r == 0, "step %d:\n%s", r, sim_log(sim));
	r = as_user(65533, other_user_tries);
	cr_assert(r == 0, "step %d", r);
	r = as_user(65532, user_with_many_files);
	cr_assert(r == 0, "step %d:\n%s", r, sim_log(sim));
	must_work();
}
