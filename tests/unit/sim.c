/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "sim.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/liveupdate.h>

#include "sim-devices.h"
#include "sim-wire.h"

#define MAX_SESSIONS 256
#define MAX_TOKENS 640
#define MAX_STORE 2048
#define MAX_DEVICES 8
#define MAX_OPEN 32	/* iommufds and VFIO devices */

struct token {
	__u64 token;
	int fd;
	ino_t ino;
	bool retrieved;
	bool lost;
};

struct session {
	char name[LIVEUPDATE_SESSION_NAME_LENGTH];
	bool used;
	bool incoming;
	bool retrieved;		/* an incoming one that somebody has a descriptor of */
	int server;		/* our end; -1: nobody has one */
	ino_t client_ino;	/* of the other end */
	struct token tokens[MAX_TOKENS];
	size_t n_tokens;
};

struct entry {
	char name[256];
	int fd;
};

struct sim {
	pthread_mutex_t lock;
	pthread_t thread;
	bool patched, absent, started, ready, quit;	/* ready: it serves */
	char dir[64], sock_path[96];
	int listen_device, listen_open, notify, listen_khod, wake[2], log_fd;
	struct simdev *dev;
	int devices[MAX_DEVICES];
	struct session sessions[MAX_SESSIONS];
	struct entry store[MAX_STORE];
	size_t n_store;
	unsigned int fdstore_max;
	unsigned int preserve_delay;
	/* Out of the store, and not closed yet. */
	struct {
		int fd;
		long at_msec;
	} closing[MAX_STORE];
	size_t n_closing;
	unsigned int close_late;
	char no_handler[64];
	pid_t pid;
	char *log;
};

static ino_t inode_of(int fd)
{
	struct stat st = {};

	return fstat(fd, &st) < 0 ? 0 : st.st_ino;
}

static bool is_memfd(int fd)
{
	return fcntl(fd, F_GET_SEALS) >= 0;
}

static bool inode_taken(struct sim *s, ino_t ino)
{
	for (int i = 0; i < MAX_SESSIONS; i++) {
		struct session *ss = &s->sessions[i];

		if (!ss->used)
			continue;
		for (size_t t = 0; t < ss->n_tokens; t++)
			if (ss->tokens[t].ino == ino && (!ss->incoming || ss->tokens[t].retrieved))
				return true;
	}
	return false;
}

static struct token *token_find(struct session *ss, __u64 token)
{
	for (size_t t = 0; t < ss->n_tokens; t++)
		if (ss->tokens[t].token == token)
			return &ss->tokens[t];
	return NULL;
}

/* Devices before what they depend on. */
static void tokens_drop(struct sim *s, struct session *ss)
{
	for (size_t t = ss->n_tokens; t > 0; t--)
		if (ss->incoming)
			simdev_abandon(s->dev, ss->tokens[t - 1].fd);
		else
			simdev_unpreserve(s->dev, ss->tokens[t - 1].fd);
	for (size_t t = ss->n_tokens; t > 0; t--)
		close(ss->tokens[t - 1].fd);
	ss->n_tokens = 0;
}

static bool member(void *userdata, ino_t ino)
{
	struct session *ss = userdata;

	for (size_t t = 0; t < ss->n_tokens; t++)
		if (ss->tokens[t].ino == ino)
			return true;
	return false;
}

/* The last descriptor has gone: unpreserve, or finish; both let go of everything. */
static void session_release(struct sim *s, struct session *ss)
{
	tokens_drop(s, ss);
	if (ss->server >= 0)
		close(ss->server);
	memset(ss, 0, sizeof(*ss));
	ss->server = -1;
}

/* A new descriptor for a session. */
static int session_open(struct session *ss)
{
	int sv[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv) < 0)
		return -errno;
	(void)fcntl(sv[0], F_SETFL, O_NONBLOCK);
	ss->server = sv[0];
	ss->client_ino = inode_of(sv[1]);
	return sv[1];
}

static struct session *session_by_name(struct sim *s, const char *name, bool incoming)
{
	for (int i = 0; i < MAX_SESSIONS; i++)
		if (s->sessions[i].used && s->sessions[i].incoming == incoming &&
		    strcmp(s->sessions[i].name, name) == 0)
			return &s->sessions[i];
	return NULL;
}

static int session_create(struct sim *s, const char *name, int *fd)
{
	if (!*name)
		return -EINVAL;
	if (session_by_name(s, name, false))
		return -EEXIST;
	for (int i = 0; i < MAX_SESSIONS; i++) {
		struct session *ss = &s->sessions[i];

		if (ss->used)
			continue;
		memset(ss, 0, sizeof(*ss));
		ss->used = true;
		snprintf(ss->name, sizeof(ss->name), "%.63s", name);
		*fd = session_open(ss);
		return *fd < 0 ? *fd : 0;
	}
	return -ENOMEM;
}

static int session_retrieve(struct sim *s, const char *name, int *fd)
{
	struct session *ss = session_by_name(s, name, true);

	if (!ss)
		return -ENOENT;
	if (ss->retrieved)
		return -EINVAL;
	if (s->no_handler[0] && strstr(name, s->no_handler))
		return -ENOPKG;
	*fd = session_open(ss);
	ss->retrieved = *fd >= 0;
	return *fd < 0 ? *fd : 0;
}

/* One ioctl on a session. *@fd: in: what came with it; out: what goes back. */
static int session_ioctl(struct sim *s, struct session *ss, struct sim_packet *p, int *fd)
{
	int in = *fd;

	*fd = -1;
	switch (p->request) {
	case LIVEUPDATE_SESSION_GET_NAME: {
		struct liveupdate_session_get_name *a = (void *)p->arg;

		memcpy(a->name, ss->name, sizeof(a->name));
		return 0;
	}
	case LIVEUPDATE_SESSION_PRESERVE_FD: {
		struct liveupdate_session_preserve_fd *a = (void *)p->arg;
		int r = 0;

		if (ss->incoming)
			r = -EINVAL;
		else if (token_find(ss, a->token))
			r = -EEXIST;
		else if (in < 0)
			r = -EBADF;
		else if (!is_memfd(in) && !simdev_is(s->dev, in))
			r = -ENOENT;
		else if (inode_taken(s, inode_of(in)))
			r = -EBUSY;
		else if (ss->n_tokens == MAX_TOKENS)
			r = -ENOSPC;
		else if (!is_memfd(in))
			r = simdev_preserve(s->dev, in, member, ss);
		if (r < 0) {
			if (in >= 0)
				close(in);
			return r;
		}
		ss->tokens[ss->n_tokens++] = (struct token){
			.token = a->token,
			.fd = in,
			.ino = inode_of(in),
		};
		return 0;
	}
	case LIVEUPDATE_SESSION_RETRIEVE_FD: {
		struct liveupdate_session_retrieve_fd *a = (void *)p->arg;
		struct token *t;

		if (!ss->incoming && !s->patched)
			return -EINVAL;
		t = token_find(ss, a->token);
		if (!t)
			return -ENOENT;
		if (t->lost)
			return -EIO;
		t->retrieved = true;
		*fd = fcntl(t->fd, F_DUPFD_CLOEXEC, 3);
		return 0;
	}
	case LIVEUPDATE_SESSION_FINISH:
		if (!ss->incoming)
			return -EINVAL;
		for (size_t t = 0; t < ss->n_tokens; t++)
			if (ss->tokens[t].retrieved && simdev_can_finish(s->dev, ss->tokens[t].fd) < 0)
				return -EBUSY;
		tokens_drop(s, ss);
		return 0;
	}
	return -EINVAL;
}

static void serve_session(struct sim *s, struct session *ss)
{
	static struct sim_packet p;
	int fd, r;

	r = sim_recv(ss->server, &p, &fd);
	if (r == -EAGAIN)
		return;	/* polled before a kexec, the number is another socket's now */
	if (r <= 0) {
		session_release(s, ss);
		return;
	}
	p.ret = session_ioctl(s, ss, &p, &fd);
	(void)sim_send(ss->server, &p, fd);
	if (fd >= 0)
		close(fd);
}

static void serve_device(struct sim *s, int i)
{
	static struct sim_packet p;
	int fd, out = -1, r;

	r = sim_recv(s->devices[i], &p, &fd);
	if (r == -EAGAIN)
		return;
	if (fd >= 0)
		close(fd);
	if (r <= 0) {
		close(s->devices[i]);
		s->devices[i] = -1;
		return;
	}
	if (p.request == LIVEUPDATE_IOCTL_CREATE_SESSION)
		p.ret = session_create(s, (char *)((struct liveupdate_ioctl_create_session *)p.arg)->name, &out);
	else if (p.request == LIVEUPDATE_IOCTL_RETRIEVE_SESSION)
		p.ret = session_retrieve(s, (char *)((struct liveupdate_ioctl_retrieve_session *)p.arg)->name, &out);
	else
		p.ret = -EINVAL;
	(void)sim_send(s->devices[i], &p, out);
	if (out >= 0)
		close(out);
}

/* A device node is opened: one packet with its path, one with the descriptor. */
static void serve_open(struct sim *s)
{
	static struct sim_packet p;
	int fd, in, sock = accept4(s->listen_open, NULL, NULL, SOCK_CLOEXEC);

	if (sock < 0)
		return;
	if (sim_recv(sock, &p, &in) > 0) {
		fd = simdev_open(s->dev, (char *)p.data);
		p.ret = fd < 0 ? fd : 0;
		p.data_size = 0;
		(void)sim_send(sock, &p, fd);
		if (fd >= 0)
			close(fd);
	}
	close(sock);
}

static long now_msec(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000L + ts.tv_nsec / 1000000;
}

/* Close what is due. Return: for how long there is nothing to do, in ms; -1: for ever. */
static int close_due(struct sim *s)
{
	long next = -1;

	for (size_t i = 0; i < s->n_closing;) {
		long left = s->closing[i].at_msec - now_msec();

		if (left <= 0) {
			close(s->closing[i].fd);
			s->closing[i] = s->closing[--s->n_closing];
			continue;
		}
		next = next < 0 || left < next ? left : next;
		i++;
	}
	return (int)next;
}

static void store_close(struct sim *s, int fd)
{
	if (s->close_late == 0 || s->n_closing == MAX_STORE) {
		close(fd);
		return;
	}
	s->closing[s->n_closing].fd = fd;
	s->closing[s->n_closing++].at_msec = now_msec() + s->close_late;
}

static void store_remove(struct sim *s, const char *name)
{
	for (size_t i = 0; i < s->n_store;) {
		if (strcmp(s->store[i].name, name) != 0) {
			i++;
			continue;
		}
		store_close(s, s->store[i].fd);
		s->store[i] = s->store[--s->n_store];
	}
}

static void store_add(struct sim *s, const char *name, int fd)
{
	/* As systemd: the same file twice is dropped, so is what exceeds the limit. */
	for (size_t i = 0; i < s->n_store; i++)
		if (inode_of(s->store[i].fd) == inode_of(fd)) {
			close(fd);
			return;
		}
	if (s->n_store >= s->fdstore_max || s->n_store >= MAX_STORE) {
		close(fd);
		return;
	}
	snprintf(s->store[s->n_store].name, sizeof(s->store[0].name), "%s", name);
	s->store[s->n_store++].fd = fd;
}

static void serve_notify(struct sim *s)
{
	union {
		char buf[CMSG_SPACE(sizeof(int) * 253) + CMSG_SPACE(sizeof(struct ucred))];
		struct cmsghdr align;
	} control;
	char text[4096], *save = NULL, name[256] = "stored";
	struct iovec iov = { .iov_base = text, .iov_len = sizeof(text) - 1 };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.buf,
		.msg_controllen = sizeof(control.buf),
	};
	bool store = false, remove = false;
	int fds[253], n_fds = 0;
	ssize_t n = recvmsg(s->notify, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);

	if (n < 0)
		return;
	text[n] = 0;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
			n_fds = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
			memcpy(fds, CMSG_DATA(c), n_fds * sizeof(int));
		}
	for (char *l = strtok_r(text, "\n", &save); l; l = strtok_r(NULL, "\n", &save)) {
		if (strcmp(l, "READY=1") == 0)
			s->started = true;
		else if (strncmp(l, "STATUS=", 7) == 0)
			s->ready = s->started;
		else if (strcmp(l, "FDSTORE=1") == 0)
			store = true;
		else if (strcmp(l, "FDSTOREREMOVE=1") == 0)
			remove = true;
		else if (strncmp(l, "FDNAME=", 7) == 0)
			snprintf(name, sizeof(name), "%.255s", l + 7);
	}
	if (remove)
		store_remove(s, name);
	for (int i = 0; i < n_fds; i++) {
		if (store)
			store_add(s, name, fds[i]);
		else
			close(fds[i]);	/* a barrier: closing is the answer */
	}
}

static void accept_device(struct sim *s)
{
	int fd = accept4(s->listen_device, NULL, NULL, SOCK_CLOEXEC), free_slot = -1;
	bool busy = false;
	char answer = 'k';

	if (fd < 0)
		return;
	for (int i = 0; i < MAX_DEVICES; i++) {
		/* A close that has not been served yet is a close all the same. */
		struct pollfd p = { .fd = s->devices[i], .events = POLLIN };

		if (s->devices[i] >= 0 && poll(&p, 1, 0) > 0 && (p.revents & POLLHUP)) {
			close(s->devices[i]);
			s->devices[i] = -1;
		}
		if (s->devices[i] >= 0)
			busy = true;
		else
			free_slot = i;
	}
	if (s->absent)
		answer = 'n';
	else if (busy || free_slot < 0)
		answer = 'b';
	(void)send(fd, &answer, 1, MSG_NOSIGNAL);
	if (answer != 'k')
		close(fd);
	else {
		(void)fcntl(fd, F_SETFL, O_NONBLOCK);
		s->devices[free_slot] = fd;
	}
}

static void *serve(void *arg)
{
	struct sim *s = arg;

	for (;;) {
		struct pollfd p[4 + MAX_DEVICES + MAX_SESSIONS + MAX_OPEN];
		int what[4 + MAX_DEVICES + MAX_SESSIONS + MAX_OPEN], open_fds[MAX_OPEN];
		size_t n_open;
		int n = 0, timeout;

		pthread_mutex_lock(&s->lock);
		timeout = close_due(s);
		p[n++] = (struct pollfd){ .fd = s->wake[0], .events = POLLIN };
		p[n++] = (struct pollfd){ .fd = s->listen_device, .events = POLLIN };
		p[n++] = (struct pollfd){ .fd = s->notify, .events = POLLIN };
		p[n++] = (struct pollfd){ .fd = s->listen_open, .events = POLLIN };
		n_open = simdev_sockets(s->dev, open_fds, MAX_OPEN);
		for (size_t i = 0; i < n_open; i++) {
			what[n] = -1;
			p[n++] = (struct pollfd){ .fd = open_fds[i], .events = POLLIN };
		}
		for (int i = 0; i < MAX_DEVICES; i++)
			if (s->devices[i] >= 0) {
				what[n] = i;
				p[n++] = (struct pollfd){ .fd = s->devices[i], .events = POLLIN };
			}
		for (int i = 0; i < MAX_SESSIONS; i++)
			if (s->sessions[i].used && s->sessions[i].server >= 0) {
				what[n] = MAX_DEVICES + i;
				p[n++] = (struct pollfd){ .fd = s->sessions[i].server, .events = POLLIN };
			}
		pthread_mutex_unlock(&s->lock);
		if (poll(p, n, timeout) < 0)
			continue;
		pthread_mutex_lock(&s->lock);
		if (s->quit) {
			pthread_mutex_unlock(&s->lock);
			return NULL;
		}
		/* Whoever wakes us up all the time must not keep us from the rest. */
		if (p[0].revents) {
			char c[4096];

			(void)!read(s->wake[0], c, sizeof(c));
		}
		/* What khod told PID 1 comes before what it told the kernel afterwards. */
		if (p[2].revents)
			serve_notify(s);
		if (p[1].revents)
			accept_device(s);
		if (p[3].revents)
			serve_open(s);
		for (int i = 4; i < n; i++) {
			if (!p[i].revents)
				continue;
			if (what[i] < 0) {
				simdev_serve(s->dev, p[i].fd);
			} else if (what[i] < MAX_DEVICES) {
				if (s->devices[what[i]] == p[i].fd)
					serve_device(s, what[i]);
			} else if (s->sessions[what[i] - MAX_DEVICES].server == p[i].fd) {
				serve_session(s, &s->sessions[what[i] - MAX_DEVICES]);
			}
		}
		pthread_mutex_unlock(&s->lock);
	}
}

static int bind_at(const char *dir, const char *name, int type, bool do_listen)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);

	snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/%s", dir, name);
	if (fd < 0 || bind(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0 ||
	    (do_listen && listen(fd, 64) < 0))
		abort();
	return fd;
}

struct sim *sim_new(bool patched)
{
	struct sim *s = calloc(1, sizeof(*s));

	if (!s)
		abort();
	s->patched = patched;
	s->fdstore_max = 1024;
	for (int i = 0; i < MAX_SESSIONS; i++)
		s->sessions[i].server = -1;
	for (int i = 0; i < MAX_DEVICES; i++)
		s->devices[i] = -1;
	strcpy(s->dir, "/tmp/kho-sim-XXXXXX");
	if (!mkdtemp(s->dir) || pipe2(s->wake, O_CLOEXEC | O_NONBLOCK) < 0)
		abort();
	snprintf(s->sock_path, sizeof(s->sock_path), "%s/khod.sock", s->dir);
	s->listen_device = bind_at(s->dir, "liveupdate", SOCK_SEQPACKET, true);
	s->listen_open = bind_at(s->dir, "open", SOCK_SEQPACKET, true);
	s->dev = simdev_new();
	s->notify = bind_at(s->dir, "notify", SOCK_DGRAM, false);
	s->listen_khod = bind_at(s->dir, "khod.sock", SOCK_SEQPACKET, true);
	s->log_fd = memfd_create("log", MFD_CLOEXEC);
	pthread_mutex_init(&s->lock, NULL);
	if (pthread_create(&s->thread, NULL, serve, s) != 0)
		abort();
	return s;
}

static void wake(struct sim *s)
{
	(void)!write(s->wake[1], "w", 1);
}

void sim_free(struct sim *s)
{
	static const char *const names[] = { "liveupdate", "notify", "khod.sock", "lock", "open", "no-bus",
					     "kho_image", "kexec-refused" };

	if (s->pid > 0) {
		kill(s->pid, SIGKILL);
		waitpid(s->pid, NULL, 0);
	}
	pthread_mutex_lock(&s->lock);
	s->quit = true;
	pthread_mutex_unlock(&s->lock);
	wake(s);
	pthread_join(s->thread, NULL);
	for (size_t i = 0; i < s->n_store; i++)
		close(s->store[i].fd);
	for (size_t i = 0; i < s->n_closing; i++)
		close(s->closing[i].fd);
	for (int i = 0; i < MAX_SESSIONS; i++)
		if (s->sessions[i].used)
			session_release(s, &s->sessions[i]);
	for (int i = 0; i < MAX_DEVICES; i++)
		if (s->devices[i] >= 0)
			close(s->devices[i]);
	simdev_free(s->dev);
	close(s->listen_device);
	close(s->listen_open);
	close(s->notify);
	close(s->listen_khod);
	close(s->wake[0]);
	close(s->wake[1]);
	close(s->log_fd);
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		char path[128];

		snprintf(path, sizeof(path), "%s/%s", s->dir, names[i]);
		(void)unlink(path);
	}
	if (rmdir(s->dir) < 0) {
		char cmd[96];

		/* What a test left there. */
		snprintf(cmd, sizeof(cmd), "rm -rf %s", s->dir);
		(void)!system(cmd);
	}
	free(s->log);
	free(s);
}

void sim_set_absent(struct sim *s, bool absent)
{
	s->absent = absent;
}

void sim_set_preserve_delay(struct sim *s, unsigned int sec)
{
	s->preserve_delay = sec;
}

void sim_set_fdstore_max(struct sim *s, unsigned int max)
{
	s->fdstore_max = max;
}

const char *sim_socket(struct sim *s)
{
	return s->sock_path;
}

const char *sim_dir(struct sim *s)
{
	return s->dir;
}

pid_t sim_pid(struct sim *s)
{
	return s->pid;
}

bool sim_ready(struct sim *s)
{
	bool r;

	pthread_mutex_lock(&s->lock);
	r = s->ready;
	pthread_mutex_unlock(&s->lock);
	return r;
}

pid_t sim_start(struct sim *s, const char *fault, const char *fail)
{
	const char *bin = getenv("KHOD_SIM");
	char names[65536] = "control", env[128];
	size_t len = strlen(names), n;
	int fds[MAX_STORE + 1];

	pthread_mutex_lock(&s->lock);
	s->started = s->ready = false;
	fds[0] = s->listen_khod;
	n = 1;
	for (size_t i = 0; i < s->n_store; i++) {
		len += snprintf(names + len, sizeof(names) - len, ":%s", s->store[i].name);
		fds[n++] = s->store[i].fd;
	}
	fflush(NULL);
	s->pid = fork();
	if (s->pid == 0) {
		int up[MAX_STORE + 1];

		/* A test that fails leaves no daemon behind. */
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (size_t i = 0; i < n; i++)
			up[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, 4000);
		dup2(s->log_fd, STDERR_FILENO);
		for (size_t i = 0; i < n; i++)
			dup2(up[i], (int)(3 + i));
		close_range((unsigned int)(3 + n), ~0U, 0);
		unsetenv("JOURNAL_STREAM");
		unsetenv("KHOD_FAULT");
		unsetenv("KHO_SIM_FAIL");
		setenv("LISTEN_FDNAMES", names, 1);
		snprintf(env, sizeof(env), "%zu", n);
		setenv("LISTEN_FDS", env, 1);
		snprintf(env, sizeof(env), "%d", (int)getpid());
		setenv("LISTEN_PID", env, 1);
		snprintf(env, sizeof(env), "%s/notify", s->dir);
		setenv("NOTIFY_SOCKET", env, 1);
		snprintf(env, sizeof(env), "%u", s->fdstore_max);
		setenv("FDSTORE", env, 1);
		snprintf(env, sizeof(env), "%u", s->preserve_delay);
		setenv("KHOD_PRESERVE_DELAY_SEC", env, 1);
		setenv("KHO_SIM", s->dir, 1);
		/* The machine that the tests run on is not to be kept from rebooting. */
		snprintf(env, sizeof(env), "unix:path=%s/no-bus", s->dir);
		setenv("DBUS_SYSTEM_BUS_ADDRESS", env, 1);
		if (fault)
			setenv("KHOD_FAULT", fault, 1);
		if (fail)
			setenv("KHO_SIM_FAIL", fail, 1);
		execl(bin, bin, "--socket", s->sock_path, (char *)NULL);
		_exit(126);
	}
	pthread_mutex_unlock(&s->lock);

	for (int i = 0; i < 4000; i++) {
		siginfo_t si = {};

		if (sim_ready(s))
			break;
		if (waitid(P_PID, s->pid, &si, WEXITED | WNOHANG | WNOWAIT) == 0 && si.si_pid)
			break;
		usleep(5000);
	}
	return s->pid;
}

/* Until everything khod still said has been heard and every close seen. */
static void settle(struct sim *s)
{
	for (int quiet = 0, tries = 0; quiet < 3; tries++) {
		struct pollfd p[1 + MAX_DEVICES + MAX_SESSIONS + MAX_OPEN];
		int n = 0, open_fds[MAX_OPEN];
		size_t n_open;

		pthread_mutex_lock(&s->lock);
		p[n++] = (struct pollfd){ .fd = s->notify, .events = POLLIN };
		for (int i = 0; i < MAX_DEVICES; i++)
			if (s->devices[i] >= 0)
				p[n++] = (struct pollfd){ .fd = s->devices[i], .events = POLLIN };
		for (int i = 0; i < MAX_SESSIONS; i++)
			if (s->sessions[i].used && s->sessions[i].server >= 0)
				p[n++] = (struct pollfd){ .fd = s->sessions[i].server, .events = POLLIN };
		n_open = simdev_sockets(s->dev, open_fds, MAX_OPEN);
		for (size_t i = 0; i < n_open; i++)
			p[n++] = (struct pollfd){ .fd = open_fds[i], .events = POLLIN };
		quiet = poll(p, n, 0) == 0 && s->n_closing == 0 ? quiet + 1 : 0;
		pthread_mutex_unlock(&s->lock);
		if (tries > 20000)
			abort();
		wake(s);
		usleep(1000);
	}
}

int sim_wait(struct sim *s)
{
	int status = 0;

	for (int i = 0; i < 4000; i++) {
		if (waitpid(s->pid, &status, WNOHANG) == s->pid) {
			s->pid = 0;
			settle(s);
			return status;
		}
		usleep(5000);
	}
	kill(s->pid, SIGKILL);
	waitpid(s->pid, &status, 0);
	s->pid = 0;
	settle(s);
	return -1;
}

int sim_stop(struct sim *s)
{
	kill(s->pid, SIGTERM);
	return sim_wait(s);
}

bool sim_killed(int status)
{
	return status >= 0 && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
}

static struct session *session_of(struct sim *s, int fd)
{
	ino_t ino = inode_of(fd);

	for (int i = 0; i < MAX_SESSIONS; i++)
		if (s->sessions[i].used && s->sessions[i].client_ino == ino)
			return &s->sessions[i];
	return NULL;
}

void sim_kexec(struct sim *s)
{
	struct entry kept[MAX_STORE];
	char session_names[MAX_STORE][LIVEUPDATE_SESSION_NAME_LENGTH];
	size_t n = 0;

	settle(s);
	pthread_mutex_lock(&s->lock);
	/* Old kernel: PID 1 preserves its store; what is in a session already it cannot. */
	for (size_t i = 0; i < s->n_store; i++) {
		struct session *ss = session_of(s, s->store[i].fd);
		/* Devices alone it cannot, without what they depend on. */
		bool keep = ss ? !ss->incoming : is_memfd(s->store[i].fd) &&
						 !inode_taken(s, inode_of(s->store[i].fd));

		if (!keep) {
			close(s->store[i].fd);
			continue;
		}
		session_names[n][0] = 0;
		if (ss) {
			strcpy(session_names[n], ss->name);
			close(s->store[i].fd);
			s->store[i].fd = -1;
		}
		kept[n++] = s->store[i];
	}
	/* Outgoing becomes incoming; what was incoming and unfinished is gone. */
	for (int i = 0; i < MAX_SESSIONS; i++) {
		struct session *ss = &s->sessions[i];

		if (!ss->used)
			continue;
		if (ss->incoming) {
			session_release(s, ss);
			continue;
		}
		close(ss->server);
		ss->server = -1;
		ss->client_ino = 0;
		ss->incoming = true;
		ss->retrieved = false;
		for (size_t t = 0; t < ss->n_tokens; t++) {
			struct token *tok = &ss->tokens[t];
			int fd;

			tok->retrieved = false;
			if (is_memfd(tok->fd))
				continue;
			fd = simdev_kexec(s->dev, tok->fd);
			close(tok->fd);
			tok->fd = fd;
			tok->ino = inode_of(fd);
		}
	}
	simdev_kexec_end(s->dev);
	/* New kernel: PID 1 gets it all back under the same names. */
	s->n_store = 0;
	for (size_t i = 0; i < n; i++) {
		if (session_names[i][0] && session_retrieve(s, session_names[i], &kept[i].fd) < 0)
			continue;
		s->store[s->n_store++] = kept[i];
	}
	pthread_mutex_unlock(&s->lock);
	wake(s);
}

/* Timeline and manifest are nobody's: once made they stay. Locks of logind come and go. */
static bool of_workload(const struct entry *e)
{
	return strcmp(e->name, "timeline") != 0 && strcmp(e->name, "manifest") != 0 &&
	       strncmp(e->name, "inhibit-", 8) != 0;
}

void sim_close_late(struct sim *s, unsigned int msec)
{
	pthread_mutex_lock(&s->lock);
	s->close_late = msec;
	pthread_mutex_unlock(&s->lock);
}

void sim_without_handler(struct sim *s, const char *workload)
{
	pthread_mutex_lock(&s->lock);
	s->no_handler[0] = 0;
	if (workload)
		snprintf(s->no_handler, sizeof(s->no_handler), "khod:%.48s:", workload);
	pthread_mutex_unlock(&s->lock);
}

size_t sim_preserved(struct sim *s)
{
	settle(s);
	return sim_preserved_now(s);
}

size_t sim_preserved_now(struct sim *s)
{
	size_t n = 0;

	pthread_mutex_lock(&s->lock);
	for (int i = 0; i < MAX_SESSIONS; i++)
		n += s->sessions[i].used ? s->sessions[i].n_tokens : 0;
	pthread_mutex_unlock(&s->lock);
	return n;
}

size_t sim_store_count(struct sim *s)
{
	size_t n = 0;

	pthread_mutex_lock(&s->lock);
	for (size_t i = 0; i < s->n_store; i++)
		n += of_workload(&s->store[i]);
	pthread_mutex_unlock(&s->lock);
	return n;
}

size_t sim_store_memfds(struct sim *s)
{
	size_t n = 0;

	pthread_mutex_lock(&s->lock);
	for (size_t i = 0; i < s->n_store; i++)
		n += of_workload(&s->store[i]) && is_memfd(s->store[i].fd);
	pthread_mutex_unlock(&s->lock);
	return n;
}

void sim_lose(struct sim *s, unsigned long long token)
{
	pthread_mutex_lock(&s->lock);
	for (int i = 0; i < MAX_SESSIONS; i++) {
		struct session *ss = &s->sessions[i];
		struct token *t = ss->used && ss->incoming ? token_find(ss, token) : NULL;

		if (t)
			t->lost = true;
	}
	pthread_mutex_unlock(&s->lock);
}

/* @s->lock is held. */
static struct token *incoming_token(struct sim *s, unsigned long long token)
{
	struct token *t = NULL;

	for (int i = 0; i < MAX_SESSIONS && !t; i++)
		if (s->sessions[i].used && s->sessions[i].incoming)
			t = token_find(&s->sessions[i], token);
	return t;
}

int sim_preserved_fd(struct sim *s, unsigned long long token)
{
	struct token *t;
	int fd;

	pthread_mutex_lock(&s->lock);
	t = incoming_token(s, token);
	fd = t ? fcntl(t->fd, F_DUPFD_CLOEXEC, 3) : -1;
	pthread_mutex_unlock(&s->lock);
	return fd;
}

void sim_replace(struct sim *s, unsigned long long token, int fd)
{
	struct token *t;

	pthread_mutex_lock(&s->lock);
	t = incoming_token(s, token);
	if (t) {
		close(t->fd);
		t->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
		t->ino = inode_of(t->fd);
	}
	pthread_mutex_unlock(&s->lock);
}

size_t sim_sessions(struct sim *s, bool incoming)
{
	size_t n = 0;

	settle(s);
	pthread_mutex_lock(&s->lock);
	for (int i = 0; i < MAX_SESSIONS; i++)
		n += s->sessions[i].used && s->sessions[i].incoming == incoming;
	pthread_mutex_unlock(&s->lock);
	return n;
}

static size_t count_khod_fds(struct sim *s)
{
	char path[64];
	size_t n = 0;
	DIR *d;

	snprintf(path, sizeof(path), "/proc/%d/fd", (int)s->pid);
	d = opendir(path);
	while (d && readdir(d))
		n++;
	if (d)
		closedir(d);
	return n;
}

size_t sim_khod_fds(struct sim *s)
{
	size_t n = count_khod_fds(s);

	for (int same = 0; same < 5; same++) {
		size_t now;

		usleep(20000);
		now = count_khod_fds(s);
		if (now != n)
			same = -1;
		n = now;
	}
	return n;
}

bool sim_khod_comes_to_fds(struct sim *s, size_t n)
{
	for (int i = 0; i < 1000; i++) {
		if (count_khod_fds(s) == n)
			return true;
		usleep(10000);
	}
	return false;
}

size_t sim_khod_fds_at_rest(struct sim *s)
{
	size_t least = SIZE_MAX;

	for (int i = 0; i < 10; i++) {
		size_t n = sim_khod_fds(s);

		least = n < least ? n : least;
		usleep(10000);
	}
	return least;
}

struct simdev *sim_lock_devices(struct sim *s)
{
	settle(s);
	pthread_mutex_lock(&s->lock);
	return s->dev;
}

void sim_unlock_devices(struct sim *s)
{
	pthread_mutex_unlock(&s->lock);
}

const char *sim_log(struct sim *s)
{
	struct stat st = {};

	fstat(s->log_fd, &st);
	free(s->log);
	s->log = calloc(1, st.st_size + 1);
	if (!s->log || pread(s->log_fd, s->log, st.st_size, 0) < 0)
		abort();
	return s->log;
}
