/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One workload in custody.
 *
 * The resting state is one outgoing LUO session per workload that holds its files
 * and, preserved last, its image; the session's descriptor is in systemd's fd
 * store, and nothing else of the workload is. The image under KHO_TOKEN_IMAGE is the
 * commit record: a session with it is complete, a session without it never was.
 *
 * Register: create the session, store it, preserve each file, preserve the image,
 * answer. A khod that dies on the way leaves a session without an image, which the
 * next one discards: the client has had no answer and still owns its files.
 *
 * Devices: a workload may also hold iommufds and VFIO devices. They are preserved after
 * the memfds, contexts before devices, as the kernel looks for what a mapping or a device
 * depends on among what the session has already. A preserved context does not change any
 * more: then what is in it is read from the kernel, for the image (restore.c). What a
 * descriptor is, khod finds out for itself; what the kernel refuses is passed on by name,
 * with the reason it gives. After a kexec adopt.c restores such a workload.
 *
 * A lease (lease.c) is preserved for a handover only.
 *
 * Claim: send descriptors, wait for the acknowledgement, take the session out of the
 * store, close it. Until the acknowledgement nothing has changed; after the session
 * is out of the store its last descriptor is khod's, so dying closes it too.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statfs.h>
#include <time.h>

#include "fault.h"
#include "file.h"
#include "khod.h"
#include "log.h"

#ifndef F_SEAL_EXEC
#define F_SEAL_EXEC 0x0020
#endif
#ifndef HUGETLBFS_MAGIC
#define HUGETLBFS_MAGIC 0x958458f6
#endif

#define SESSION_PREFIX "khod:"
#define SUFFIX_LEN 8	/* origin and 7 hexadecimal digits */
_Static_assert(sizeof(SESSION_PREFIX) - 1 + KHO_NAME_MAX + 1 + SUFFIX_LEN < KHO_LUO_NAME_MAX,
	       "a session name holds any workload name");

struct workload *workload_find(struct khod *k, const char *name)
{
	for (struct workload *w = k->workloads; w; w = w->next)
		if (strcmp(w->name, name) == 0)
			return w;
	return NULL;
}

struct workload *workload_new(struct khod *k, const char *name)
{
	struct workload *w = calloc(1, sizeof(*w));

	if (!w)
		return NULL;
	snprintf(w->name, sizeof(w->name), "%s", name);
	w->session = -1;
	w->next = k->workloads;
	k->workloads = w;
	timeline_need(k);
	return w;
}

void workload_free(struct khod *k, struct workload *w)
{
	for (struct workload **p = &k->workloads; *p; p = &(*p)->next)
		if (*p == w) {
			*p = w->next;
			break;
		}
	adopt_forget(w);
	workload_close_fds(k, w->fds, workload_n_files(w));
	for (size_t i = 0; i < w->n_stored; i++)
		if (w->stored[i].fd != w->session)
			kho_close(k->kho, w->stored[i].fd);
	kho_close(k->kho, w->session);
	kho_image_free(w->image);
	sd_event_source_disable_unref(w->watch);
	free(w->stored);
	free(w->reason);
	free(w);
}

size_t workload_n_files(const struct workload *w)
{
	return w->image ? kho_image_n_files(w->image) : 0;
}

uint64_t workload_bytes(const struct workload *w)
{
	return w->image ? kho_image_bytes(w->image) : 0;
}

const char *workload_reason(const struct workload *w)
{
	if (w->reason)
		return w->reason;
	if (w->state == WORKLOAD_UNREADABLE)
		return "this kernel cannot give back what it preserved before the next kexec (LIVEUPDATE_SESSION_RETRIEVE_FD refuses outgoing sessions); it will be carried over";
	return "";
}

int workload_add_stored(struct workload *w, const char *fdname, int fd)
{
	struct stored *s = reallocarray(w->stored, w->n_stored + 1, sizeof(*s));

	if (!s)
		return -ENOMEM;
	w->stored = s;
	s += w->n_stored++;
	snprintf(s->fdname, sizeof(s->fdname), "%s", fdname);
	s->fd = fd;
	return 0;
}

int workload_unstore(struct khod *k, struct workload *w, const char *fdname,
		     struct kho_error **err)
{
	bool asked = false;

	for (size_t i = 0; i < w->n_stored;) {
		int fd, r;

		if (strcmp(w->stored[i].fdname, fdname) != 0) {
			i++;
			continue;
		}
		if (!asked) {
			r = fdstore_remove(&k->fdstore, fdname, err);
			if (r < 0)
				return r;
			asked = true;
		}
		fd = w->stored[i].fd;
		w->stored[i] = w->stored[--w->n_stored];
		/* The session's own descriptor is closed by whoever ends the session. */
		if (fd != w->session)
			kho_close(k->kho, fd);
	}
	return 0;
}

void workload_fail(struct workload *w, struct kho_error **err, int r)
{
	free(w->reason);
	w->reason = kho_error_format(err ? *err : NULL, r);
	w->state = WORKLOAD_FAILED;
	if (err)
		*err = kho_error_free(*err);
}

void session_fdname(const char *session, char fdname[FDSTORE_NAME_MAX])
{
	/* A colon separates names in LISTEN_FDNAMES. */
	snprintf(fdname, FDSTORE_NAME_MAX, "%s", session);
	for (char *p = fdname; *p; p++)
		if (*p == ':')
			*p = '+';
}

bool session_parse(const char *session, char name[KHO_NAME_MAX + 1], char *origin)
{
	const char *p, *colon;
	size_t len;

	if (strncmp(session, SESSION_PREFIX, strlen(SESSION_PREFIX)) != 0)
		return false;
	p = session + strlen(SESSION_PREFIX);
	colon = strchr(p, ':');
	if (!colon || strlen(colon + 1) != SUFFIX_LEN ||
	    strspn(colon + 2, "0123456789abcdef") != SUFFIX_LEN - 1 ||
	    (colon[1] != 'r' && colon[1] != 't'))
		return false;
	len = colon - p;
	if (len == 0 || len > KHO_NAME_MAX)
		return false;
	memcpy(name, p, len);
	name[len] = 0;
	*origin = colon[1];
	return kho_name_valid(name);
}

int session_new(struct khod *k, const char *name, char origin, char ret[KHO_LUO_NAME_MAX],
		struct kho_error **err)
{
	int r = 0;

	/*
	 * The device is exclusive: somebody may just be using it. And seven random digits
	 * may be taken. Both pass.
	 */
	for (int try = 0; try < 10; try++) {
		struct kho_error *e = NULL;
		uint32_t rnd;
		ssize_t n;

		n = kho_op(k->kho, getrandom, &rnd, sizeof(rnd));
		if (n != sizeof(rnd))
			return kho_error_new(err, n < 0 ? (int)n : EIO, name, "no random bytes");
		snprintf(ret, KHO_LUO_NAME_MAX, SESSION_PREFIX "%s:%c%07" PRIx32, name, origin,
			 rnd & 0xfffffff);
		r = kho_luo_session_create(k->kho, ret, &e);
		if (r >= 0)
			return r;
		if ((r != -EBUSY && r != -EEXIST) || try == 9) {
			*err = e;
			return r;
		}
		kho_error_free(e);
		if (r == -EBUSY)
			nanosleep(&(struct timespec){ .tv_nsec = 50 * 1000 * 1000 }, NULL);
	}
	return r;
}

/*
 * PID 1 closes what it takes out of its store a little later than
 * it says so. A session is gone when another one can have its name.
 */
void session_await_end(struct khod *k, const char *session)
{
	for (int try = 0; session[0] && try < 100; try++) {
		int fd = kho_luo_session_create(k->kho, session, NULL);

		if (fd >= 0)
			kho_close(k->kho, fd);
		if (fd != -EEXIST && fd != -EBUSY)
			return;
		nanosleep(&(struct timespec){ .tv_nsec = 20 * 1000 * 1000 }, NULL);
	}
}

static uint64_t now_usec(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return ts.tv_sec * 1000000ULL + ts.tv_nsec / 1000;
}

int image_commit(struct khod *k, struct kho_image *image, int session, struct kho_error **err)
{
	int fd, r;

	r = kho_image_set_origin(image, k->boot_id, k->kernel_release, now_usec(), err);
	if (r < 0)
		return r;
	fd = kho_image_write_memfd(k->kho, image, err);
	if (fd < 0)
		return fd;
	r = kho_luo_preserve(k->kho, session, fd, KHO_TOKEN_IMAGE, err);
	kho_close(k->kho, fd);
	if (r < 0)
		return kho_error_new(err, r, kho_image_name(image), "the image");
	return 0;
}

/* Only what will come back as it went is taken. */
static int file_check(struct khod *k, const char *name, int fd, struct kho_image_file *file,
		      struct stat *st, struct kho_error **err)
{
	struct statfs sfs;
	int seals, r;

	r = kho_op(k->kho, fstat, fd, st);
	if (r < 0)
		return kho_error_new(err, r, name, "cannot be examined: %s", strerror(-r));
	file->name = name;
	file->kind = kho_file_device_kind(k->kho, fd, st);
	if (file->kind)
		return 0;
	seals = kho_op(k->kho, fcntl, fd, F_GET_SEALS, 0);
	if (!S_ISREG(st->st_mode) || seals < 0)
		return kho_error_new(err, EMEDIUMTYPE, name, "is %s; only memfds, iommufds and VFIO devices can be preserved",
				     S_ISREG(st->st_mode) ? "a file of a file system" :
				     S_ISDIR(st->st_mode) ? "a directory" :
				     S_ISSOCK(st->st_mode) ? "a socket" :
				     S_ISFIFO(st->st_mode) ? "a pipe" :
				     S_ISCHR(st->st_mode) ? "a character device" :
				     S_ISBLK(st->st_mode) ? "a block device" :
							    "an anonymous kernel object");
	if (fstatfs(fd, &sfs) == 0 && sfs.f_type == (__fsword_t)HUGETLBFS_MAGIC)
		return kho_error_new(err, EOPNOTSUPP, name,
				     "is a hugetlb memfd, which the kernel cannot preserve: use an ordinary memfd (transparent huge pages are carried over)");
	if (st->st_nlink > 0)
		return kho_error_new(err, EMEDIUMTYPE, name,
				     "is a file of a tmpfs; only memfds can be preserved");
	/*
	 * memfd_luo restores seals onto an inode whose mode has exec bits, where
	 * F_SEAL_EXEC implies F_SEAL_WRITE (memfd_add_seals): a memfd that was writable
	 * would come back read-only.
	 */
	if ((seals & F_SEAL_EXEC) && !(seals & F_SEAL_WRITE))
		return kho_error_new(err, EOPNOTSUPP, name,
				     "is sealed against exec but not against writing, and would come back from the kexec sealed against both: create it with MFD_EXEC instead of MFD_NOEXEC_SEAL");
	file->kind = KHO_FILE_MEMFD;
	file->size = st->st_size;
	file->seals = seals;
	return 0;
}

bool workload_must(const struct workload *w)
{
	return !w->image || kho_image_survival(w->image) == KHO_SURVIVAL_MUST;
}

/* @old: goes for it; NULL: none. */
static int quota_check(struct khod *k, uid_t uid, size_t n_files, const struct workload *old,
		       struct kho_error **err)
{
	size_t workloads = 0, files = 0;
	size_t max_w = uid ? MAX_WORKLOADS_UID : MAX_WORKLOADS_ROOT;
	size_t max_f = uid ? MAX_FILES_UID : MAX_FILES_ROOT;

	for (struct workload *w = k->workloads; w; w = w->next) {
		if (w == old || !w->image || kho_image_uid(w->image) != uid)
			continue;
		workloads++;
		files += workload_n_files(w);
	}
	if (workloads >= max_w)
		return kho_error_new(err, EDQUOT, "user", "uid %u has %zu workloads, the most it may have: release one",
				     (unsigned int)uid, workloads);
	if (files + n_files > max_f)
		return kho_error_new(err, EDQUOT, "user", "uid %u has %zu files and asks for %zu more; it may have %zu",
				     (unsigned int)uid, files, n_files, max_f);
	return 0;
}

static int quota_check_bytes(struct khod *k, const struct kho_image *image, const struct workload *old,
			     struct kho_error **err)
{
	uint64_t bytes = kho_image_bytes(image);
	uid_t uid = kho_image_uid(image);

	if (uid == 0)
		return 0;
	for (struct workload *w = k->workloads; w; w = w->next)
		if (w != old && w->image && kho_image_uid(w->image) == uid)
			bytes += workload_bytes(w);
	if (bytes > k->user_bytes)
		return kho_error_new(err, EDQUOT, "user",
				     "uid %u would have %" PRIu64 " MiB in custody; it may have %" PRIu64 " (KHOD_USER_MEMORY_PERCENT= of khod.service)",
				     (unsigned int)uid, bytes >> 20, k->user_bytes >> 20);
	return 0;
}

static int build_image(struct khod *k, const struct registration *reg, const struct identity *who,
		       struct kho_image **ret, struct kho_error **err)
{
	_cleanup_image_ struct kho_image *image = NULL;
	_cleanup_free_ struct stat *st = NULL;
	const char *name = reg->name;
	char *const *names = reg->names;
	const int *fds = reg->fds;
	size_t n = reg->n;
	int r;

	r = kho_image_new(&image, name, who->uid, who->unit, err);
	if (r < 0)
		return r;
	kho_image_set_registered_usec(image, now_usec());
	kho_image_set_policy(image, reg->survival, reg->restore_failure);
	kho_image_set_claim_sec(image, reg->claim_sec);
	kho_image_set_may_lose_irq(image, reg->may_lose_irq);
	if (reg->secret_size > 0) {
		r = kho_image_set_secret(k->kho, image, reg->secret, reg->secret_size, err);
		if (r < 0)
			return r;
	}
	st = calloc(n + 1, sizeof(*st));
	if (!st)
		return kho_error_new(err, ENOMEM, name, "out of memory");
	for (size_t i = 0; i < n; i++) {
		struct kho_image_file file = {};

		if (!kho_name_valid(names[i]))
			return kho_error_new(err, EINVAL, name, "the name of file %zu is not valid", i);
		r = file_check(k, names[i], fds[i], &file, &st[i], err);
		if (r < 0)
			return r;
		/* Anonymous inodes are all one; the kernel knows two files of these apart. */
		for (size_t j = 0; j < i && file.kind == KHO_FILE_MEMFD; j++)
			if (st[j].st_dev == st[i].st_dev && st[j].st_ino == st[i].st_ino)
				return kho_error_new(err, EINVAL, names[i],
						     "is the same memfd as '%s'", names[j]);
		file.token = KHO_TOKEN_IMAGE + 1 + i;
		r = kho_image_add_file(image, &file, err);
		if (r < 0)
			return r;
	}
	*ret = TAKE_PTR(image);
	return 0;
}

int *workload_dup_fds(struct khod *k, const int *fds, size_t n, int *ret)
{
	int *copy = malloc((n + 1) * sizeof(int));

	*ret = -ENOMEM;
	for (size_t i = 0; copy && i < n; i++) {
		copy[i] = kho_op(k->kho, fcntl, fds[i], F_DUPFD_CLOEXEC, 3);
		if (copy[i] >= 0)
			continue;
		*ret = copy[i];
		workload_close_fds(k, copy, i);
		copy = NULL;
	}
	return copy;
}

void workload_close_fds(struct khod *k, int *fds, size_t n)
{
	for (size_t i = 0; fds && i < n; i++)
		kho_close(k->kho, fds[i]);
	free(fds);
}

/*
 * Ask a complete session for its image, to learn whether this kernel gives back what
 * is preserved before a kexec. Where it does not, khod keeps descriptors of its own.
 */
static void keep_fds(struct khod *k, struct workload *w, const int *fds, size_t n)
{
	int r = kho_luo_retrieve(k->kho, w->session, KHO_TOKEN_IMAGE, NULL);

	if (r >= 0) {
		k->retrieve_outgoing = true;
		kho_close(k->kho, r);
		return;
	}
	if (r == -EINVAL)
		k->retrieve_outgoing = false;

	w->fds = workload_dup_fds(k, fds, n, &r);
	if (!w->fds)
		w->state = WORKLOAD_UNREADABLE;
}

/*
 * PID 1 closes what it takes out of its store a little later than it says so, and until then the file
 * is in that session. Is @r, for a file that is in no workload, worth another try? Then this waits.
 */
static bool busy_closing(struct khod *k, int r, struct kho_error **err)
{
	if (r != -EBUSY || !fdstore_closing(&k->fdstore))
		return false;
	*err = kho_error_free(*err);
	nanosleep(&(struct timespec){ .tv_nsec = 20 * 1000 * 1000 }, NULL);
	return true;
}

/*
 * The policy for interrupts, for the kernel, which enforces it from here to the freeze. What is
 * preserved already, or cannot be told, is for PRESERVE_FD to judge.
 */
static int set_liveupdate(struct khod *k, int fd, bool may_lose_irq, struct kho_error **err)
{
	int r;

	do {
		r = kho_vfio_set_liveupdate(k->kho, fd, may_lose_irq, 0, err);
	} while (busy_closing(k, r, err));
	if (r != -EBUSY && r != -ENOTTY && r != -EINVAL)
		return r;
	*err = kho_error_free(*err);
	return 0;
}

/*
 * Why the kernel refuses a device: if it is taken once lost interrupts are accepted, then because of
 * these. The session that has it then is given up.
 */
static void explain_irq(struct khod *k, struct workload *w, const struct kho_image_file *f, int fd,
			struct kho_error **err)
{
	if (kho_image_may_lose_irq(w->image) || kho_vfio_set_liveupdate(k->kho, fd, true, 0, NULL) < 0)
		return;
	if (kho_luo_preserve(k->kho, w->session, fd, f->token, NULL) >= 0)
		kho_error_new(err, EOPNOTSUPP, NULL,
			      "it uses INTx or MSI, by which interrupts would be lost in the handover: use MSI-X, or register it with a policy that accepts that (khoctl register --may-lose-irq)");
}

/* Preserve a file; whose it is if it is in another workload. */
static int preserve_file(struct khod *k, struct workload *w, const struct kho_image_file *f, int fd,
			 struct kho_error **err)
{
	int r;

	do {
		r = kho_luo_preserve(k->kho, w->session, fd, f->token, err);
		if (r == -EBUSY && domain_explain(k, w->image, f->kind, fd, err) < 0)
			return r;
	} while (busy_closing(k, r, err));
	return r;
}

/*
 * A memfd as large as it was when its user's quota was looked at. Its client can change that until it
 * is preserved, so it is looked at before, as the kernel fills its holes then, and after.
 */
static int same_size(struct khod *k, const struct kho_image_file *f, int fd, struct kho_error **err)
{
	struct stat st;
	int r;

	if (f->kind != KHO_FILE_MEMFD)
		return 0;
	r = kho_op(k->kho, fstat, fd, &st);
	if (r < 0)
		return kho_error_new(err, r, f->name, "cannot be examined: %s", strerror(-r));
	if ((uint64_t)st.st_size == f->size)
		return 0;
	return kho_error_new(err, ESTALE, f->name, "has %" PRIu64 " bytes now, and had %" PRIu64 " when it was registered",
			     (uint64_t)st.st_size, f->size);
}

static int preserve_one(struct khod *k, struct workload *w, const struct kho_image_file *f, int fd,
			bool again, struct kho_error **err)
{
	int r;

	if (again) {
		r = kho_luo_session_has(k->kho, w->session, f->token, err);
		if (r != 0)
			return r;
	}
	khod_busy(k, f->size);
	r = f->kind == KHO_FILE_VFIO ?
		    set_liveupdate(k, fd, kho_image_may_lose_irq(w->image), err) :
		    same_size(k, f, fd, err);
	if (r >= 0)
		r = preserve_file(k, w, f, fd, err);
	if (r >= 0)
		r = same_size(k, f, fd, err);
	if (r < 0) {
		if (r == -EOPNOTSUPP && f->kind == KHO_FILE_VFIO && !again)
			explain_irq(k, w, f, fd, err);
		if (r != -EBUSY && f->kind == KHO_FILE_IOMMUFD)
			(void)kho_iommufd_obstacle(k->kho, fd, err);
		/* To a client ENOENT means that there is no such workload. */
		return kho_error_new(err, r == -ENOENT ? -EOPNOTSUPP : r, f->name,
				     "cannot be preserved%s", again ? " again" : "");
	}
	if (again)
		FAULT(START_INCOMING_FILE_PRESERVED);
	else
		FAULT(REGISTER_FILE_PRESERVED);
	return 0;
}

static int preserve_kind(struct khod *k, struct workload *w, const int *fds,
			 enum kho_file_kind kind, bool again, struct kho_error **err)
{
	for (size_t i = 0; i < workload_n_files(w); i++) {
		struct kho_image_file f = {};
		int r;

		kho_image_file(w->image, i, &f);
		if (f.kind != kind)
			continue;
		r = preserve_one(k, w, &f, fds[i], again, err);
		if (r < 0)
			return r;
	}
	return 0;
}

int workload_preserve_memory(struct khod *k, struct workload *w, const int *fds, bool again,
			     struct kho_error **err)
{
	return preserve_kind(k, w, fds, KHO_FILE_MEMFD, again, err);
}

int workload_preserve_devices(struct khod *k, struct workload *w, const int *fds, bool again,
			      struct kho_error **err)
{
	int r = preserve_kind(k, w, fds, KHO_FILE_IOMMUFD, again, err);

	if (r >= 0 && !again && kho_image_has_devices(w->image)) {
		r = graph_read(k, w->image, fds, err);
		if (r >= 0)
			FAULT(REGISTER_GRAPH_READ);
	}
	return r < 0 ? r : preserve_kind(k, w, fds, KHO_FILE_VFIO, again, err);
}

int workload_preserve(struct khod *k, struct workload *w, const int *fds, bool again,
		      struct kho_error **err)
{
	int r = workload_preserve_memory(k, w, fds, again, err);

	return r < 0 ? r : workload_preserve_devices(k, w, fds, again, err);
}

int session_open(struct khod *k, struct workload *w, struct kho_error **err)
{
	char fdname[FDSTORE_NAME_MAX];
	int r;

	r = session_new(k, w->name, 'r', w->session_name, err);
	if (r < 0)
		return r;
	w->session = r;
	FAULT(REGISTER_SESSION_CREATED);

	session_fdname(w->session_name, fdname);
	r = fdstore_push(&k->fdstore, fdname, w->session, err);
	if (r >= 0 && workload_add_stored(w, fdname, w->session) < 0) {
		r = kho_error_new(err, ENOMEM, w->name, "out of memory");
		(void)fdstore_remove(&k->fdstore, fdname, NULL);
	}
	if (r < 0) {
		w->session = kho_close(k->kho, w->session);
		return r;
	}
	FAULT(REGISTER_SESSION_STORED);
	return 0;
}

/* Out of the store first: our own is the last then. */
int session_discard(struct khod *k, struct workload *w, struct kho_error **err)
{
	char fdname[FDSTORE_NAME_MAX];
	int r;

	if (w->session < 0)
		return 0;
	session_fdname(w->session_name, fdname);
	r = workload_unstore(k, w, fdname, err);
	if (r < 0)
		return r;
	FAULT(ABORT_REMOVED);
	w->session = kho_close(k->kho, w->session);
	session_await_end(k, w->session_name);
	FAULT(ABORT_CLOSED);
	return 0;
}

/* Preserved now, or for a lease: as much of it as there is between handovers. */
static int take(struct khod *k, struct workload *w, const struct registration *reg,
		struct kho_error **err)
{
	int r;

	if (reg->lease) {
		w->fds = workload_dup_fds(k, reg->fds, reg->n, &r);
		if (!w->fds)
			return kho_error_new(err, r, w->name, "%s", strerror(-r));
		r = lease_memory(k, w, err);
		if (r < 0)
			return r;
		w->state = WORKLOAD_LEASED;
		w->lease = true;
		return 0;
	}
	r = session_open(k, w, err);
	if (r >= 0)
		r = workload_preserve(k, w, reg->fds, false, err);
	if (r >= 0)
		r = image_commit(k, w->image, w->session, err);
	if (r < 0)
		return r;
	FAULT(REGISTER_IMAGE_PRESERVED);
	w->state = WORKLOAD_HELD;
	keep_fds(k, w, reg->fds, reg->n);
	return 0;
}

static int register_check(struct khod *k, const struct registration *reg,
			  const struct identity *who, const struct workload *old, struct kho_error **err)
{
	const char *name = reg->name;
	int r;

	if (!kho_name_valid(name))
		return kho_error_new(err, EINVAL, "workload",
				     "a name has 1 to %d of A-Z a-z 0-9 _ . @ - and does not begin with . or -",
				     KHO_NAME_MAX);
	if (workload_find(k, name) != old)
		return kho_error_new(err, EEXIST, name,
				     "the name is in use: claim or release that workload, or choose another name");
	if (reg->n == 0)
		return kho_error_new(err, EINVAL, name, "a workload needs at least one file");
	if (k->luo_reason)
		return kho_error_new(err, EOPNOTSUPP, name, "%s", k->luo_reason);
	if (!k->fdstore.available)
		return kho_error_new(err, ENODEV, name,
				     "khod has no fd store, so it could not hold anything over a crash: run it as khod.service");
	/* Nobody would ask it any more. */
	r = reg->lease || reg->prepare ? handover_busy(k, name, NULL, err) : 0;
	if (r < 0)
		return r;
	r = quota_check(k, who->uid, reg->n, old, err);
	if (r < 0)
		return r;
	/*
	 * In the next kernel every file is in the store for a moment, both sessions, the image,
	 * and the one without devices, should these have to be given up.
	 */
	if (k->fdstore.used + reg->n + 4 > k->fdstore.max)
		adopt_rest(k);
	if (k->fdstore.used + reg->n + 4 > k->fdstore.max)
		return kho_error_new(err, ENOSPC, name,
				     "systemd's fd store has no room for it (%u of %u places taken): raise FileDescriptorStoreMax= of khod.service",
				     k->fdstore.used, k->fdstore.max);
	return 0;
}

int workload_new_image(struct khod *k, const struct registration *reg, const struct identity *who,
		       const struct workload *old, struct kho_image **ret, struct kho_error **err)
{
	_cleanup_image_ struct kho_image *image = NULL;
	int r = register_check(k, reg, who, old, err);

	if (r >= 0)
		r = build_image(k, reg, who, &image, err);
	if (r >= 0)
		r = quota_check_bytes(k, image, old, err);
	if (r >= 0)
		*ret = TAKE_PTR(image);
	return r;
}

int workload_register(struct khod *k, const struct registration *reg, const struct identity *who,
		      struct workload **ret, struct kho_error **err)
{
	_cleanup_image_ struct kho_image *image = NULL;
	const char *name = reg->name;
	struct workload *w;
	int r = workload_new_image(k, reg, who, NULL, &image, err);

	if (r < 0)
		return r;
	w = workload_new(k, name);
	if (!w)
		return kho_error_new(err, ENOMEM, name, "out of memory");
	w->image = TAKE_PTR(image);
	w->prepare_msec = reg->prepare_msec;
	FAULT(REGISTER_BEGIN);
	r = take(k, w, reg, err);
	khod_idle(k);
	if (r < 0)
		goto fail;
	khod_status_line(k);
	log_event(LOG_INFO, MSG_REGISTERED, name,
		  "Workload %s %s by uid %u%s%s: %zu files, %" PRIu64 " bytes, session %s.", name,
		  reg->lease ? "leased" : "registered", (unsigned int)who->uid,
		  who->unit[0] ? ", unit " : "", who->unit, reg->n, workload_bytes(w),
		  w->session_name);
	*ret = w;
	return 0;

fail:
	/* Out of the store first: closing our own then unpreserves everything in it. */
	if (w->n_stored > 0 && fdstore_remove(&k->fdstore, w->stored[0].fdname, NULL) < 0)
		log_event(LOG_WARNING, MSG_FAILED, name,
			  "The remains of the failed registration of %s stay in the fd store until khod is restarted.",
			  name);
	workload_free(k, w);
	return r;
}

/* A service keeps its name over a kexec; a login's scope does not. */
static bool same_unit(const char *unit, const char *theirs)
{
	size_t n = strlen(unit);

	return n <= 8 || strcmp(unit + n - 8, ".service") != 0 || strcmp(unit, theirs) == 0;
}

int workload_authorise(const struct workload *w, const struct identity *who, const uid_t *owner,
		       const void *secret, size_t secret_size, struct kho_error **err)
{
	const char *unit, *hint = who->uid ? "" : "; root says whose it wants (khoctl --of USER)";
	uid_t uid;

	if (!w->image)
		return who->uid == 0 ? 0 : kho_error_new(err, EPERM, w->name,
				     "its owner cannot be read, so only root may have it");
	if (secret_size > 0) {
		if (kho_image_check_secret(w->image, secret, secret_size))
			return 0;
		return kho_error_new(err, EPERM, w->name, "the claim secret is wrong");
	}
	uid = kho_image_uid(w->image);
	unit = kho_image_unit(w->image);
	if (owner && who->uid != 0)
		return kho_error_new(err, EPERM, w->name, "only root may have it as another user's");
	if (owner && *owner == uid)
		return 0;
	if (who->uid != 0 && who->uid != uid)
		return kho_error_new(err, EPERM, w->name, "it belongs to another user");
	if (owner || who->uid != uid)
		return kho_error_new(err, EPERM, w->name, "it belongs to uid %u%s%s%s", (unsigned int)uid,
				     unit[0] ? ", unit " : "", unit, hint);
	if (!same_unit(unit, who->unit))
		return kho_error_new(err, EPERM, w->name,
				     "it belongs to %s, and this client runs in %s%s", unit,
				     who->unit[0] ? who->unit : "no unit", hint);
	return 0;
}

bool workload_visible(const struct workload *w, const struct identity *who)
{
	return who->uid == 0 || (w->image && kho_image_uid(w->image) == who->uid);
}

int workload_open_files(struct khod *k, struct workload *w, int *fds, struct kho_error **err)
{
	size_t n = workload_n_files(w), i;
	int r;

	if (w->state == WORKLOAD_CLAIMING)
		return kho_error_new(err, EBUSY, w->name,
				     "another client is claiming it; try again when it has finished");
	if (w->lease && w->client)
		return kho_error_new(err, EBUSY, w->name,
				     "it is leased: the client that registered it is connected, and has it");
	if (w->state == WORKLOAD_UNREADABLE)
		return kho_error_new(err, EOPNOTSUPP, w->name, "%s", workload_reason(w));
	if (!w->image || (w->state == WORKLOAD_FAILED && !w->fds))
		return kho_error_new(err, EIO, w->name, "it cannot be given back: %s",
				     workload_reason(w));

	for (i = 0; i < n; i++) {
		struct kho_image_file f = {};

		kho_image_file(w->image, i, &f);
		if (w->fds)
			r = kho_op(k->kho, fcntl, w->fds[i], F_DUPFD_CLOEXEC, 3);
		else
			r = kho_luo_retrieve(k->kho, w->session, f.token, err);
		if (r < 0) {
			while (i > 0)
				kho_close(k->kho, fds[--i]);
			return kho_error_new(err, r, f.name, "of workload %s cannot be given back",
					     w->name);
		}
		fds[i] = r;
	}
	return 0;
}

/* Out of the fd store. @wait: systemd confirms it, once for all of it. */
static int unstore_all(struct khod *k, struct workload *w, enum custody_end how, bool wait,
		       struct kho_error **err)
{
	int r = 0;

	fdstore_batch(&k->fdstore);
	while (r >= 0 && w->n_stored > 0) {
		char fdname[FDSTORE_NAME_MAX];

		strcpy(fdname, w->stored[0].fdname);
		r = workload_unstore(k, w, fdname, err);
		if (r < 0)
			break;
		if (how == CUSTODY_CLAIMED)
			FAULT(CLAIM_REMOVED);
		else
			FAULT(RELEASE_REMOVED);
	}
	if (wait)
		(void)fdstore_confirm(&k->fdstore, w->name, NULL);
	else
		fdstore_unbatch(&k->fdstore);
	return r;
}

int workload_end(struct khod *k, struct workload *w, enum custody_end how,
		 struct kho_error **err)
{
	char name[KHO_NAME_MAX + 1], session[KHO_LUO_NAME_MAX];
	bool left = true;	/* something in the session */
	int r;

	strcpy(name, w->name);
	strcpy(session, w->session_name);
	if (how == CUSTODY_CLAIMED)
		FAULT(CLAIM_ACKED);
	else
		FAULT(RELEASE_BEGIN);

	r = w->brought ? adopt_end(k, w, &left, err) : 0;
	if (r >= 0)
		r = unstore_all(k, w, how, left, err);
	if (r < 0)
		return kho_error_new(err, r, name, "is still held");
	workload_free(k, w);
	if (left)
		session_await_end(k, session);
	if (how == CUSTODY_CLAIMED)
		timeline_claimed(k, name);
	if (how == CUSTODY_CLAIMED)
		FAULT(CLAIM_CLOSED);
	else
		FAULT(RELEASE_CLOSED);

	khod_status_line(k);
	if (how == CUSTODY_CLAIMED)
		log_event(LOG_INFO, MSG_CLAIMED, name, "Workload %s claimed: it is no longer held.",
			  name);
	else if (how == CUSTODY_RELEASED)
		log_event(LOG_INFO, MSG_RELEASED, name,
			  "Workload %s released: it is no longer held.", name);
	else
		log_event(LOG_NOTICE, MSG_RELEASED, name,
			  "The client of %s has gone, and its lease with it.", name);
	return 0;
}
