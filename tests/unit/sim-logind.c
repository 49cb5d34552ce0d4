/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "sim-logind.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-bus.h>
#include <systemd/sd-id128.h>
#include <unistd.h>

#define MAX_BUSES 16
#define MAX_LOCKS 64
#define LOGIND_PATH "/org/freedesktop/login1"
#define LOGIND_MANAGER "org.freedesktop.login1.Manager"

struct lock {
	char mode[16], why[512];
	int fd;		/* the end that sees the other one's last close; -1: seen */
};

struct logind {
	pthread_mutex_t lock;
	pthread_t thread;
	bool quit, masked;
	char type[16];	/* announced; "": nothing */
	int emit;	/* 1: announce it, 2: say that it is over, 3: be a new one */
	int listen_fd, wake[2];
	sd_bus *buses[MAX_BUSES];
	struct lock locks[MAX_LOCKS];
	size_t n_locks;
};

static int append_metadata(sd_bus_message *m, const char *type)
{
	int r = sd_bus_message_open_container(m, 'a', "{sv}");

	if (r >= 0 && type[0])
		r = sd_bus_message_append(m, "{sv}", "type", "s", type);
	return r < 0 ? r : sd_bus_message_close_container(m);
}

static int on_inhibit(struct logind *l, sd_bus_message *m)
{
	const char *what, *who, *why, *mode;
	int p[2], r;

	if (l->type[0])
		return sd_bus_reply_method_errorf(m, "org.freedesktop.login1.OperationInProgress",
						  "a shutdown is under way");
	if (l->n_locks == MAX_LOCKS || sd_bus_message_read(m, "ssss", &what, &who, &why, &mode) < 0 ||
	    pipe2(p, O_CLOEXEC | O_NONBLOCK) < 0)
		abort();
	snprintf(l->locks[l->n_locks].mode, sizeof(l->locks[0].mode), "%s", mode);
	snprintf(l->locks[l->n_locks].why, sizeof(l->locks[0].why), "%s", why);
	l->locks[l->n_locks++].fd = p[0];
	r = sd_bus_reply_method_return(m, "h", p[1]);
	close(p[1]);
	return r;
}

static int on_get(struct logind *l, sd_bus_message *m)
{
	const char *interface, *property;
	sd_bus_message *a = NULL;
	int r;

	if (sd_bus_message_read(m, "ss", &interface, &property) < 0)
		abort();
	if (strcmp(property, "InhibitDelayMaxUSec") == 0)
		return sd_bus_reply_method_return(m, "v", "t", UINT64_C(20000000));
	r = sd_bus_message_new_method_return(m, &a);
	if (r >= 0)
		r = sd_bus_message_open_container(a, 'v', "a{sv}");
	if (r >= 0)
		r = append_metadata(a, l->type);
	if (r >= 0)
		r = sd_bus_message_close_container(a);
	if (r >= 0)
		r = sd_bus_send(NULL, a, NULL);
	sd_bus_message_unref(a);
	return r;
}

/* Every call that khod makes; called with the lock held. */
static int on_message(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const char *member = sd_bus_message_get_member(m);
	struct logind *l = userdata;
	uint8_t type;

	if (sd_bus_message_get_type(m, &type) < 0 || type != SD_BUS_MESSAGE_METHOD_CALL)
		return 0;
	if (strcmp(member, "Hello") == 0)
		return sd_bus_reply_method_return(m, "s", ":1.1");
	if (strcmp(member, "Inhibit") == 0)
		return on_inhibit(l, m);
	if (strcmp(member, "Get") == 0)
		return on_get(l, m);
	if (strcmp(member, "MaskUnitFiles") == 0 || strcmp(member, "UnmaskUnitFiles") == 0) {
		l->masked = member[0] == 'M';
		return sd_bus_reply_method_return(m, "a(sss)", 0);
	}
	return sd_bus_reply_method_return(m, "");	/* AddMatch etc. */
}

static void tell_all(struct logind *l, bool active)
{
	for (int i = 0; i < MAX_BUSES; i++) {
		sd_bus_message *m = NULL;

		if (!l->buses[i])
			continue;
		if (sd_bus_message_new_signal(l->buses[i], &m, LOGIND_PATH, LOGIND_MANAGER,
					      "PrepareForShutdownWithMetadata") < 0 ||
		    sd_bus_message_append(m, "b", active) < 0 || append_metadata(m, l->type) < 0 ||
		    sd_bus_message_set_sender(m, ":1.0") < 0)
			abort();
		(void)sd_bus_send(l->buses[i], m, NULL);
		sd_bus_message_unref(m);
	}
}

static void tell_new_owner(struct logind *l)
{
	for (int i = 0; i < MAX_BUSES; i++) {
		sd_bus_message *m = NULL;

		if (!l->buses[i])
			continue;
		if (sd_bus_message_new_signal(l->buses[i], &m, "/org/freedesktop/DBus", "org.freedesktop.DBus",
					      "NameOwnerChanged") < 0 ||
		    sd_bus_message_append(m, "sss", "org.freedesktop.login1", "", ":1.7") < 0 ||
		    sd_bus_message_set_sender(m, "org.freedesktop.DBus") < 0)
			abort();
		(void)sd_bus_send(l->buses[i], m, NULL);
		sd_bus_message_unref(m);
	}
}

static void accept_bus(struct logind *l)
{
	int fd = accept4(l->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), i = 0;
	sd_id128_t id;

	if (fd < 0)
		return;
	while (i < MAX_BUSES && l->buses[i])
		i++;
	if (i == MAX_BUSES || sd_id128_randomize(&id) < 0 || sd_bus_new(&l->buses[i]) < 0 ||
	    sd_bus_set_fd(l->buses[i], fd, fd) < 0 || sd_bus_set_server(l->buses[i], 1, id) < 0 ||
	    sd_bus_negotiate_fds(l->buses[i], 1) < 0 ||
	    sd_bus_add_filter(l->buses[i], NULL, on_message, l) < 0 || sd_bus_start(l->buses[i]) < 0)
		abort();
}

/* Locks whose last copy has been closed. */
static void look_at_locks(struct logind *l)
{
	for (size_t i = 0; i < l->n_locks; i++) {
		struct pollfd p = { .fd = l->locks[i].fd };

		if (p.fd < 0 || poll(&p, 1, 0) <= 0 || !(p.revents & POLLHUP))
			continue;
		close(p.fd);
		l->locks[i].fd = -1;
	}
}

static void *serve(void *arg)
{
	struct logind *l = arg;

	for (;;) {
		struct pollfd p[2 + MAX_BUSES];
		int n = 2;

		pthread_mutex_lock(&l->lock);
		for (int i = 0; i < MAX_BUSES; i++) {
			int r = 1;

			while (l->buses[i] && r > 0)
				r = sd_bus_process(l->buses[i], NULL);
			if (l->buses[i] && r < 0)
				l->buses[i] = sd_bus_close_unref(l->buses[i]);
		}
		if (l->emit == 3)
			tell_new_owner(l);
		else if (l->emit)
			tell_all(l, l->emit == 1);
		if (l->emit > 1)
			l->type[0] = 0;
		l->emit = 0;
		p[0] = (struct pollfd){ .fd = l->wake[0], .events = POLLIN };
		p[1] = (struct pollfd){ .fd = l->listen_fd, .events = POLLIN };
		for (int i = 0; i < MAX_BUSES; i++)
			if (l->buses[i])
				p[n++] = (struct pollfd){ .fd = sd_bus_get_fd(l->buses[i]),
							  .events = (short)sd_bus_get_events(l->buses[i]) };
		pthread_mutex_unlock(&l->lock);
		(void)poll(p, n, 100);
		pthread_mutex_lock(&l->lock);
		if (p[0].revents) {
			char c[64];

			(void)!read(l->wake[0], c, sizeof(c));
		}
		if (p[1].revents)
			accept_bus(l);
		for (int i = 0; l->quit && i < MAX_BUSES; i++)
			sd_bus_close_unref(l->buses[i]);
		if (l->quit) {
			pthread_mutex_unlock(&l->lock);
			return NULL;
		}
		pthread_mutex_unlock(&l->lock);
	}
}

struct logind *logind_new(const char *dir)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	struct logind *l = calloc(1, sizeof(*l));

	if (!l || pipe2(l->wake, O_CLOEXEC | O_NONBLOCK) < 0)
		abort();
	/* Where sim_start() says that there is a bus. */
	snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/no-bus", dir);
	l->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (l->listen_fd < 0 || bind(l->listen_fd, (struct sockaddr *)&sa, sizeof(sa)) < 0 ||
	    listen(l->listen_fd, 16) < 0)
		abort();
	pthread_mutex_init(&l->lock, NULL);
	if (pthread_create(&l->thread, NULL, serve, l) != 0)
		abort();
	return l;
}

static void wake(struct logind *l)
{
	(void)!write(l->wake[1], "w", 1);
}

void logind_free(struct logind *l)
{
	pthread_mutex_lock(&l->lock);
	l->quit = true;
	pthread_mutex_unlock(&l->lock);
	wake(l);
	pthread_join(l->thread, NULL);
	for (size_t i = 0; i < l->n_locks; i++)
		if (l->locks[i].fd >= 0)
			close(l->locks[i].fd);
	close(l->listen_fd);
	close(l->wake[0]);
	close(l->wake[1]);
	free(l);
}

size_t logind_locks(struct logind *l, const char *mode)
{
	size_t n = 0;

	pthread_mutex_lock(&l->lock);
	look_at_locks(l);
	for (size_t i = 0; i < l->n_locks; i++)
		n += l->locks[i].fd >= 0 && strcmp(l->locks[i].mode, mode) == 0;
	pthread_mutex_unlock(&l->lock);
	return n;
}

bool logind_comes_to(struct logind *l, const char *mode, size_t n)
{
	for (int i = 0; i < 2000; i++) {
		if (logind_locks(l, mode) == n)
			return true;
		usleep(10000);
	}
	return false;
}

const char *logind_why(struct logind *l, const char *mode)
{
	const char *why = "";

	pthread_mutex_lock(&l->lock);
	for (size_t i = 0; i < l->n_locks; i++)
		if (strcmp(l->locks[i].mode, mode) == 0)
			why = l->locks[i].why;
	pthread_mutex_unlock(&l->lock);
	return why;
}

static void emit(struct logind *l, int what)
{
	pthread_mutex_lock(&l->lock);
	l->emit = what;
	pthread_mutex_unlock(&l->lock);
	wake(l);
}

void logind_announce(struct logind *l, const char *type)
{
	pthread_mutex_lock(&l->lock);
	snprintf(l->type, sizeof(l->type), "%s", type);
	pthread_mutex_unlock(&l->lock);
	emit(l, 1);
}

int logind_proceed(struct logind *l)
{
	if (!logind_comes_to(l, "delay", 0))
		return -1;
	if (!logind_masked(l))
		return 1;
	emit(l, 2);
	return 0;
}

bool logind_masked(struct logind *l)
{
	bool masked;

	pthread_mutex_lock(&l->lock);
	masked = l->masked;
	pthread_mutex_unlock(&l->lock);
	return masked;
}

void logind_restart(struct logind *l)
{
	emit(l, 3);
}
