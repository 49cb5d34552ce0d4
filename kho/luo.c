/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Sessions and files over /dev/liveupdate.
 *
 * The device is exclusive and PID 1 needs it late in shutdown and early in boot,
 * so it is open here only for the one request that needs it. Everything else
 * goes to a session's own descriptor.
 *
 * Two questions have no ioctl of their own, and are asked by a PRESERVE_FD of
 * descriptor -1 (luo_session.c, luo_file.c): the kernel first refuses incoming
 * sessions (EINVAL), then a token that is in use (EEXIST), then the descriptor
 * (EBADF). None of the three changes anything.
 */
#include <fcntl.h>
#include <string.h>

#include <linux/liveupdate.h>

#include "util.h"

_Static_assert(KHO_LUO_NAME_MAX == LIVEUPDATE_SESSION_NAME_LENGTH, "session name length");

/* A token that no session of ours uses. */
#define TOKEN_PROBE UINT64_MAX

static int device_open(struct kho *kho, struct kho_error **err)
{
	int fd = kho_op(kho, open, KHO_LUO_DEVICE, O_RDWR | O_CLOEXEC);

	switch (fd) {
	case -ENOENT:
	case -ENODEV:
	case -ENXIO:
		return kho_error_new(err, fd, KHO_LUO_DEVICE,
				     "this kernel has no live update orchestrator: boot it with kho=on liveupdate=on (CONFIG_LIVEUPDATE)");
	case -EBUSY:
		return kho_error_new(err, fd, KHO_LUO_DEVICE,
				     "another program has it open; only one may at a time");
	case -EIO:
		return kho_error_new(err, fd, KHO_LUO_DEVICE,
				     "the kernel could not read what the previous kernel handed over (a file handler is missing or the data is damaged; see dmesg): reboot to get a working orchestrator");
	case -EACCES:
	case -EPERM:
		return kho_error_new(err, fd, KHO_LUO_DEVICE,
				     "opening it needs root and DeviceAllow=");
	}
	if (fd < 0)
		return kho_error_new(err, fd, KHO_LUO_DEVICE, "open: %s", strerror(-fd));
	return fd;
}

int kho_luo_available(struct kho *kho, struct kho_error **err)
{
	struct kho_error *e = NULL;
	int fd = device_open(kho, &e);

	if (fd == -EBUSY) {
		kho_error_free(e);
		return 0;
	}
	if (fd < 0) {
		if (err)
			*err = e;
		else
			kho_error_free(e);
		return fd;
	}
	kho_close(kho, fd);
	return 0;
}

int kho_luo_image_refuses(struct kho *kho, bool devices, const char **why)
{
	static const struct {
		const char *word;
		const char *why;
		bool devices;		/* of them only */
	} words[] = {
		{ "no-devices", "it knows nothing of devices that keep running", .devices = true },
		{ "no-data", "it was not loaded by kexec_file_load(2): use khoctl kexec --kernel, or kexec -s" },
		{ "kho-off", "its command line says kho=off or elfcorehdr=, or lacks kho=on" },
		{ "liveupdate-off", "its command line lacks liveupdate=on" },
	};
	char text[32];
	ssize_t n;
	int fd;

	fd = kho_op(kho, open, KHO_LUO_IMAGE, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	n = kho_op(kho, pread, fd, text, sizeof(text) - 1, 0);
	kho_close(kho, fd);
	if (n < 0)
		return n == -EBUSY ? -EBUSY : 0;
	text[n] = 0;
	text[strcspn(text, "\n")] = 0;
	for (size_t i = 0; i < ARRAY_SIZE(words); i++)
		if (strcmp(text, words[i].word) == 0 && (devices || !words[i].devices)) {
			*why = words[i].why;
			return 1;
		}
	return 0;
}

static int name_check(const char *name, struct kho_error **err)
{
	size_t len = strnlen(name, KHO_LUO_NAME_MAX);

	if (len == 0 || len >= KHO_LUO_NAME_MAX)
		return kho_error_new(err, EINVAL, name, "a session name has 1 to %d bytes",
				     KHO_LUO_NAME_MAX - 1);
	return 0;
}

int kho_luo_session_create(struct kho *kho, const char *name, struct kho_error **err)
{
	struct liveupdate_ioctl_create_session arg = { .size = sizeof(arg), .fd = -1 };
	int dev, r;

	r = name_check(name, err);
	if (r < 0)
		return r;
	dev = device_open(kho, err);
	if (dev < 0)
		return kho_error_new(err, dev, name, "cannot create the session");

	strncpy((char *)arg.name, name, sizeof(arg.name) - 1);
	r = kho_op(kho, ioctl, dev, LIVEUPDATE_IOCTL_CREATE_SESSION, &arg);
	kho_close(kho, dev);
	if (r < 0)
		return kho_error_new(err, r, name, "cannot create the session: %s",
				     r == -EEXIST ? "the name is in use" : strerror(-r));
	return arg.fd;
}

int kho_luo_session_retrieve(struct kho *kho, const char *name, struct kho_error **err)
{
	struct liveupdate_ioctl_retrieve_session arg = { .size = sizeof(arg), .fd = -1 };
	int dev, r;

	r = name_check(name, err);
	if (r < 0)
		return r;
	dev = device_open(kho, err);
	if (dev < 0)
		return kho_error_new(err, dev, name, "cannot retrieve the session");

	strncpy((char *)arg.name, name, sizeof(arg.name) - 1);
	r = kho_op(kho, ioctl, dev, LIVEUPDATE_IOCTL_RETRIEVE_SESSION, &arg);
	kho_close(kho, dev);
	if (r == -ENOENT)
		return kho_error_new(err, r, name, "the previous kernel handed over no such session");
	if (r == -EINVAL)
		return kho_error_new(err, r, name, "the session has been retrieved already");
	if (r == -ENOPKG)
		return kho_error_new(err, r, name,
				     "cannot retrieve the session: the handler of a file in it is missing (dmesg names it): load its module, and try again");
	if (r < 0)
		return kho_error_new(err, r, name, "cannot retrieve the session: %s", strerror(-r));
	return arg.fd;
}

int kho_luo_session_name(struct kho *kho, int session, char name[KHO_LUO_NAME_MAX],
			 struct kho_error **err)
{
	struct liveupdate_session_get_name arg = { .size = sizeof(arg) };
	int r;

	name[0] = 0;
	r = kho_op(kho, ioctl, session, LIVEUPDATE_SESSION_GET_NAME, &arg);
	if (r < 0)
		return kho_error_new(err, r, NULL, "descriptor %d is not a session: %s", session,
				     strerror(-r));
	memcpy(name, arg.name, KHO_LUO_NAME_MAX);
	name[KHO_LUO_NAME_MAX - 1] = 0;
	return 0;
}

/* -EINVAL: incoming; -EEXIST: outgoing, token in use; -EBADF: outgoing, token free. */
static int probe(struct kho *kho, int session, uint64_t token)
{
	struct liveupdate_session_preserve_fd arg = {
		.size = sizeof(arg),
		.fd = -1,
		.token = token,
	};
	int r = kho_op(kho, ioctl, session, LIVEUPDATE_SESSION_PRESERVE_FD, &arg);

	/* Success is impossible; a kernel that says so is not one we know. */
	return r >= 0 ? -EPROTO : r;
}

int kho_luo_session_direction(struct kho *kho, int session, struct kho_error **err)
{
	char name[KHO_LUO_NAME_MAX];
	int r;

	r = kho_luo_session_name(kho, session, name, err);
	if (r < 0)
		return r;
	r = probe(kho, session, TOKEN_PROBE);
	switch (r) {
	case -EINVAL:
		return KHO_LUO_INCOMING;
	case -EEXIST:
	case -EBADF:
		return KHO_LUO_OUTGOING;
	}
	return kho_error_new(err, r, name, "cannot tell an outgoing from an incoming session: %s",
			     strerror(-r));
}

int kho_luo_session_has(struct kho *kho, int session, uint64_t token, struct kho_error **err)
{
	int r = probe(kho, session, token);

	switch (r) {
	case -EEXIST:
		return 1;
	case -EBADF:
		return 0;
	case -EINVAL:
		return kho_error_new(err, r, NULL, "the session is incoming");
	}
	return kho_error_new(err, r, NULL, "cannot ask for token %llu: %s",
			     (unsigned long long)token, strerror(-r));
}

int kho_luo_preserve(struct kho *kho, int session, int fd, uint64_t token,
		     struct kho_error **err)
{
	struct liveupdate_session_preserve_fd arg = {
		.size = sizeof(arg),
		.fd = fd,
		.token = token,
	};
	const char *why;
	int r;

	r = kho_op(kho, ioctl, session, LIVEUPDATE_SESSION_PRESERVE_FD, &arg);
	if (r >= 0)
		return 0;
	switch (r) {
	case -EBUSY:
		why = "it is preserved already, in this or another session, or a device that is being reset or removed";
		break;
	case -ENOENT:
		why = "the kernel cannot preserve this kind of file";
		break;
	case -EEXIST:
		why = "the token is in use";
		break;
	case -EOPNOTSUPP:
		why = "it has a property that the kernel cannot preserve";
		break;
	case -EFBIG:
		why = "it is too large";
		break;
	case -EINVAL:
		why = "the session is incoming, or the file has a property that the kernel cannot preserve";
		break;
	default:
		why = strerror(-r);
	}
	return kho_error_new(err, r, NULL, "cannot preserve under token %llu: %s",
			     (unsigned long long)token, why);
}

int kho_luo_retrieve(struct kho *kho, int session, uint64_t token, struct kho_error **err)
{
	struct liveupdate_session_retrieve_fd arg = {
		.size = sizeof(arg),
		.fd = -1,
		.token = token,
	};
	int r = kho_op(kho, ioctl, session, LIVEUPDATE_SESSION_RETRIEVE_FD, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL, "cannot retrieve token %llu: %s",
				     (unsigned long long)token,
				     r == -ENOENT ? "nothing is preserved under it" : strerror(-r));
	return arg.fd;
}

int kho_luo_finish(struct kho *kho, int session, struct kho_error **err)
{
	struct liveupdate_session_finish arg = { .size = sizeof(arg) };
	int r = kho_op(kho, ioctl, session, LIVEUPDATE_SESSION_FINISH, &arg);

	if (r < 0)
		return kho_error_new(err, r, NULL, "cannot finish the session: %s",
				     r == -EBUSY ? "a file in it cannot be let go yet" :
						   strerror(-r));
	return 0;
}
