/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The thin wrappers: what each answer of the kernel becomes, and the error object. */
#include <linux/liveupdate.h>

#include "common.h"

static int open_result, ioctl_result, closes;
static unsigned long last_request;
static int last_fd;

static int t_open(void *u, const char *path, int flags)
{
	cr_assert_str_eq(path, "/dev/liveupdate");
	cr_assert(flags & O_CLOEXEC);
	return open_result;
}

static int t_close(void *u, int fd)
{
	closes++;
	return 0;
}

static int t_ioctl(void *u, int fd, unsigned long request, void *arg)
{
	last_request = request;
	last_fd = fd;
	if (ioctl_result < 0)
		return ioctl_result;
	switch (request) {
	case LIVEUPDATE_IOCTL_CREATE_SESSION: {
		struct liveupdate_ioctl_create_session *a = arg;

		cr_assert(a->size == sizeof(*a));
		a->fd = 77;
		break;
	}
	case LIVEUPDATE_IOCTL_RETRIEVE_SESSION:
		((struct liveupdate_ioctl_retrieve_session *)arg)->fd = 78;
		break;
	case LIVEUPDATE_SESSION_RETRIEVE_FD:
		((struct liveupdate_session_retrieve_fd *)arg)->fd = 79;
		break;
	case LIVEUPDATE_SESSION_GET_NAME:
		memset(((struct liveupdate_session_get_name *)arg)->name, 'x', 64);
		break;
	}
	return 0;
}

static struct kho *kho;

static void setup(void)
{
	struct kho_ops ops = *kho_ops_kernel();

	ops.open = t_open;
	ops.close = t_close;
	ops.ioctl = t_ioctl;
	cr_assert(kho_new(&kho, &ops, NULL) == 0);
	open_result = 70;
	ioctl_result = 0;
	closes = 0;
}

static void teardown(void)
{
	kho_free(kho);
}

TestSuite(luo, .init = setup, .fini = teardown, .timeout = 30);

Test(luo, device_is_closed_again)
{
	cr_assert(kho_luo_session_create(kho, "s", NULL) == 77);
	cr_assert(closes == 1);
	cr_assert(kho_luo_session_retrieve(kho, "s", NULL) == 78);
	cr_assert(closes == 2);
	ioctl_result = -EEXIST;
	cr_assert(kho_luo_session_create(kho, "s", NULL) == -EEXIST);
	cr_assert(closes == 3);
	ioctl_result = -ENOENT;
	cr_assert(kho_luo_session_retrieve(kho, "s", NULL) == -ENOENT);
	cr_assert(closes == 4);
	ioctl_result = 0;
	cr_assert(kho_luo_available(kho, NULL) == 0);
	cr_assert(closes == 5);
}

Test(luo, no_device)
{
	static const int errors[] = { ENOENT, ENODEV, ENXIO, EIO, EACCES, EPERM, EMFILE };
	struct kho_error *err = NULL;

	for (size_t i = 0; i < sizeof(errors) / sizeof(errors[0]); i++) {
		open_result = -errors[i];
		cr_assert(kho_luo_available(kho, &err) == -errors[i]);
		cr_assert_str_eq(kho_error_object(err), "/dev/liveupdate");
		cr_assert(strlen(kho_error_message(err)) > 0);
		err = kho_error_free(err);
		cr_assert(kho_luo_session_create(kho, "s", &err) == -errors[i]);
		cr_assert_str_eq(kho_error_object(err), "s");
		cr_assert(kho_error_cause(err) != NULL);
		err = kho_error_free(err);
	}
	open_result = -EBUSY;	/* somebody has it: so it is there */
	cr_assert(kho_luo_available(kho, NULL) == 0);
	cr_assert(closes == 0);
}

/* A table may be longer than the library's, and gets what it lacks from the kernel's. */
Test(luo, tables_of_other_sizes)
{
	struct {
		struct kho_ops ops;
		void *later;
	} newer = { .ops = kho->ops };
	struct kho_ops older = kho->ops;
	struct kho *other = NULL;

	newer.ops.size = sizeof(newer);
	cr_assert(kho_new(&other, &newer.ops, NULL) == 0);
	cr_assert(kho_luo_session_create(other, "s", NULL) == 77);
	cr_assert(other->ops.size == sizeof(struct kho_ops));
	kho_free(other);
	older.size = offsetof(struct kho_ops, getrandom);
	cr_assert(kho_new(&other, &older, NULL) == -EINVAL);
	older.size = 0;
	cr_assert(kho_new(&other, &older, NULL) == -EINVAL);
	older.size = sizeof(older);
	older.readlink = NULL;
	cr_assert(kho_new(&other, &older, NULL) == -EINVAL);
}

Test(luo, names)
{
	char longest[66], name[KHO_LUO_NAME_MAX];

	memset(longest, 'a', sizeof(longest));
	longest[63] = 0;
	cr_assert(kho_luo_session_create(kho, longest, NULL) == 77);
	longest[63] = 'a';
	longest[64] = 0;
	cr_assert(kho_luo_session_create(kho, longest, NULL) == -EINVAL);
	cr_assert(kho_luo_session_create(kho, "", NULL) == -EINVAL);
	/* A kernel that does not terminate it does not make us read on. */
	cr_assert(kho_luo_session_name(kho, 5, name, NULL) == 0);
	cr_assert(strlen(name) == 63);
}

Test(luo, probes)
{
	struct kho_error *err = NULL;
	static const struct {
		int kernel, direction, has;
	} cases[] = {
		{ -EBADF, KHO_LUO_OUTGOING, 0 },
		{ -EEXIST, KHO_LUO_OUTGOING, 1 },
		{ -EINVAL, KHO_LUO_INCOMING, -EINVAL },
		{ -ENOMEM, -ENOMEM, -ENOMEM },
		{ 0, -EPROTO, -EPROTO },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		ioctl_result = cases[i].kernel;
		cr_assert(kho_luo_session_has(kho, 5, 1, &err) == cases[i].has);
		err = kho_error_free(err);
	}
	ioctl_result = -ENOTTY;
	cr_assert(kho_luo_session_direction(kho, 5, &err) == -ENOTTY);
	kho_error_free(err);
}

Test(luo, files)
{
	struct kho_error *err = NULL;
	static const int errors[] = { EBUSY, ENOENT, EEXIST, EOPNOTSUPP, EFBIG, EINVAL, ENOMEM };

	cr_assert(kho_luo_preserve(kho, 5, 6, 1, NULL) == 0);
	cr_assert(last_request == LIVEUPDATE_SESSION_PRESERVE_FD && last_fd == 5);
	cr_assert(kho_luo_retrieve(kho, 5, 1, NULL) == 79);
	cr_assert(kho_luo_finish(kho, 5, NULL) == 0);
	for (size_t i = 0; i < sizeof(errors) / sizeof(errors[0]); i++) {
		ioctl_result = -errors[i];
		cr_assert(kho_luo_preserve(kho, 5, 6, 1, &err) == -errors[i]);
		cr_assert(strstr(kho_error_message(err), "token 1"));
		err = kho_error_free(err);
		cr_assert(kho_luo_retrieve(kho, 5, 1, &err) == -errors[i]);
		err = kho_error_free(err);
		cr_assert(kho_luo_finish(kho, 5, &err) == -errors[i]);
		err = kho_error_free(err);
	}
	cr_assert(closes == 0);
}

Test(luo, error_chain)
{
	struct kho_error *err = NULL;
	char *text;

	cr_assert(kho_error_new(NULL, EIO, "x", "not asked for") == -EIO);
	cr_assert(kho_error_new(&err, EBUSY, NULL, "it is taken") == -EBUSY);
	cr_assert(kho_error_new(&err, -EBUSY, "ram", "cannot be preserved") == -EBUSY);
	text = kho_error_format(err, 0);
	cr_assert_str_eq(text, "ram: cannot be preserved: it is taken");
	free(text);
	cr_assert(kho_error_errno(err) == EBUSY);
	cr_assert_str_eq(kho_error_object(kho_error_cause(err)), "");
	kho_error_free(err);
	cr_assert(kho_error_errno(NULL) == 0 && kho_error_cause(NULL) == NULL);
	text = kho_error_format(NULL, -ENOENT);
	cr_assert_str_eq(text, "No such file or directory");
	free(text);
}

Test(luo, ops_table)
{
	struct kho_ops ops = *kho_ops_kernel();
	struct kho *k = NULL;

	ops.size = 8;
	cr_assert(kho_new(&k, &ops, NULL) == -EINVAL);
	ops = *kho_ops_kernel();
	ops.ioctl = NULL;
	cr_assert(kho_new(&k, &ops, NULL) == -EINVAL);
	cr_assert(k == NULL);
}
