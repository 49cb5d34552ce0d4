/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The image: round trip, damage of every kind, caps, and every call failing once. */
#include <endian.h>
#include <openssl/evp.h>

#include "common.h"
#include "image.pb-c.h"

static struct kho *kho;

static void setup(void)
{
	raise_limits();
	cr_assert(kho_new(&kho, NULL, NULL) == 0);
}

static void teardown(void)
{
	kho = kho_free(kho);
}

TestSuite(image, .init = setup, .fini = teardown, .timeout = 60);

static struct kho_image *sample(size_t n)
{
	struct kho_image *i = NULL;

	cr_assert(kho_image_new(&i, "vm1", 1000, "vm@1.service", NULL) == 0);
	kho_image_set_handovers(i, 7);
	kho_image_set_registered_usec(i, 1234567);
	kho_image_set_policy(i, KHO_SURVIVAL_BEST_EFFORT, KHO_RESTORE_FAILURE_QUIESCE);
	kho_image_set_claim_sec(i, 90);
	kho_image_set_may_lose_irq(i, true);
	cr_assert(kho_image_set_arrived(i, "0123-boot", 77, NULL) == 0);
	cr_assert(kho_image_set_origin(i, "0123-boot", "7.3.4", 42, NULL) == 0);
	for (size_t k = 0; k < n; k++) {
		char name[32];
		struct kho_image_file f = {
			.name = name,
			.kind = KHO_FILE_MEMFD,
			.token = 1 + k,
			.size = k * 4096,
			.seals = 3,
		};

		snprintf(name, sizeof(name), "ram%zu", k);
		cr_assert(kho_image_add_file(i, &f, NULL) == 0);
	}
	return i;
}

static void must_be_same(const struct kho_image *a, const struct kho_image *b)
{
	cr_assert_str_eq(kho_image_name(a), kho_image_name(b));
	cr_assert_str_eq(kho_image_unit(a), kho_image_unit(b));
	cr_assert_str_eq(kho_image_boot_id(a), kho_image_boot_id(b));
	cr_assert_str_eq(kho_image_kernel_release(a), kho_image_kernel_release(b));
	cr_assert(kho_image_uid(a) == kho_image_uid(b));
	cr_assert(kho_image_handovers(a) == kho_image_handovers(b));
	cr_assert(kho_image_survival(a) == kho_image_survival(b));
	cr_assert(kho_image_restore_failure(a) == kho_image_restore_failure(b));
	cr_assert(kho_image_claim_sec(a) == kho_image_claim_sec(b));
	cr_assert(kho_image_may_lose_irq(a) == kho_image_may_lose_irq(b));
	cr_assert(kho_image_arrived_usec(a, "0123-boot") == kho_image_arrived_usec(b, "0123-boot"));
	cr_assert(kho_image_arrived_usec(b, "0124-boot") == 0);
	cr_assert(kho_image_registered_usec(a) == kho_image_registered_usec(b));
	cr_assert(kho_image_written_usec(a) == kho_image_written_usec(b));
	cr_assert(kho_image_n_files(a) == kho_image_n_files(b));
	for (size_t i = 0; i < kho_image_n_files(a); i++) {
		struct kho_image_file f, g;

		kho_image_file(a, i, &f);
		kho_image_file(b, i, &g);
		cr_assert_str_eq(f.name, g.name);
		cr_assert(f.kind == g.kind && f.token == g.token && f.size == g.size &&
			  f.seals == g.seals);
	}
}

Test(image, round_trip)
{
	static const size_t counts[] = { 0, 1, 3, KHO_IMAGE_FILES_MAX };

	for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
		struct kho_image *a = sample(counts[c]), *b = NULL;
		size_t size;
		void *buf;
		int fd;

		cr_assert(kho_image_encode(a, &buf, &size, NULL) == 0);
		cr_assert(kho_image_decode(buf, size, &b, NULL) == 0);
		must_be_same(a, b);
		b = kho_image_free(b);
		free(buf);

		fd = kho_image_write_memfd(kho, a, NULL);
		cr_assert(fd >= 0);
		cr_assert(kho_image_read_fd(kho, fd, true, &b, NULL) == 0);
		must_be_same(a, b);
		cr_assert(pwrite(fd, "x", 1, 0) < 0, "the image is not sealed");
		close(fd);
		kho_image_free(a);
		kho_image_free(b);
	}
}

Test(image, every_truncation_and_extension)
{
	struct kho_image *a = sample(3), *b = NULL;
	struct kho_error *err = NULL;
	size_t size;
	uint8_t *copy;
	void *buf;

	cr_assert(kho_image_encode(a, &buf, &size, NULL) == 0);
	for (size_t n = 0; n < size; n++) {
		/* A copy of just that size, so that a sanitizer sees any look beyond. */
		copy = malloc(n + 1);
		memcpy(copy, buf, n);
		cr_assert(kho_image_decode(copy, n, &b, &err) == -EBADMSG, "%zu bytes", n);
		cr_assert(strlen(kho_error_message(err)) > 0);
		err = kho_error_free(err);
		free(copy);
	}
	copy = calloc(1, size + 1);
	memcpy(copy, buf, size);
	cr_assert(kho_image_decode(copy, size + 1, &b, NULL) == -EBADMSG);
	cr_assert(b == NULL);
	free(copy);
	free(buf);
	kho_image_free(a);
}

Test(image, every_bit_flipped)
{
	struct kho_image *a = sample(3), *b = NULL;
	size_t size;
	uint8_t *buf;
	void *p;

	cr_assert(kho_image_encode(a, &p, &size, NULL) == 0);
	buf = p;
	for (size_t i = 0; i < size * 8; i++) {
		int r;

		buf[i / 8] ^= 1 << (i % 8);
		r = kho_image_decode(buf, size, &b, NULL);
		cr_assert(r < 0 && b == NULL, "bit %zu went unnoticed", i);
		cr_assert(r == -EBADMSG || r == -EFBIG || r == -EOPNOTSUPP, "bit %zu: %d", i, r);
		buf[i / 8] ^= 1 << (i % 8);
	}
	cr_assert(kho_image_decode(buf, size, &b, NULL) == 0);
	kho_image_free(b);
	kho_image_free(a);
	free(buf);
}

/* A payload under a correct header. */
static uint8_t *wrap(const void *payload, size_t n, uint32_t version, uint32_t oldest,
		     uint32_t seal_kind, size_t *size)
{
	uint8_t *buf = calloc(1, KHO_IMAGE_HEADER_SIZE + n);
	uint32_t v;
	uint64_t w = htole64(n);
	EVP_MD_CTX *md = EVP_MD_CTX_new();

	memcpy(buf, KHO_IMAGE_MAGIC, 8);
	v = htole32(version);
	memcpy(buf + 8, &v, 4);
	v = htole32(oldest);
	memcpy(buf + 12, &v, 4);
	v = htole32(KHO_IMAGE_HEADER_SIZE);
	memcpy(buf + 16, &v, 4);
	v = htole32(seal_kind);
	memcpy(buf + 20, &v, 4);
	memcpy(buf + 24, &w, 8);
	memcpy(buf + KHO_IMAGE_HEADER_SIZE, payload, n);
	cr_assert(EVP_DigestInit_ex(md, EVP_sha256(), NULL) == 1 &&
		  EVP_DigestUpdate(md, buf, 32) == 1 &&
		  EVP_DigestUpdate(md, payload, n) == 1 &&
		  EVP_DigestFinal_ex(md, buf + 32, NULL) == 1);
	EVP_MD_CTX_free(md);
	*size = KHO_IMAGE_HEADER_SIZE + n;
	return buf;
}

static int decode_message(Kho__Image__Image *m, struct kho_error **err)
{
	size_t n = kho__image__image__get_packed_size(m), size;
	uint8_t *payload = malloc(n + 1), *buf;
	struct kho_image *b = NULL;
	int r;

	kho__image__image__pack(m, payload);
	buf = wrap(payload, n, 1, 1, 0, &size);
	r = kho_image_decode(buf, size, &b, err);
	kho_image_free(b);
	free(payload);
	free(buf);
	return r;
}

Test(image, newer_formats)
{
	Kho__Image__Image m = KHO__IMAGE__IMAGE__INIT;
	Kho__Image__Workload w = KHO__IMAGE__WORKLOAD__INIT;
	struct kho_error *err = NULL;
	struct kho_image *b = NULL;
	char *features[] = { (char *)"time-travel" };
	uint8_t payload[256], *buf;
	size_t n, size;

	w.name = (char *)"vm1";
	w.keep = KHO__IMAGE__KEEP_MODE__KEEP_HOLD;
	m.workload = &w;
	n = kho__image__image__pack(&m, payload);

	/* Newer, and this reader suffices; a field it does not know is passed over. */
	payload[n] = 0xa0;	/* field 100, varint */
	payload[n + 1] = 0x06;
	payload[n + 2] = 0x01;
	buf = wrap(payload, n + 3, 9, 1, 0, &size);
	cr_assert(kho_image_decode(buf, size, &b, &err) == 0, "%s", kho_error_message(err));
	b = kho_image_free(b);
	free(buf);

	buf = wrap(payload, n, 9, 2, 0, &size);
	cr_assert(kho_image_decode(buf, size, &b, &err) == -EOPNOTSUPP);
	cr_assert(strstr(kho_error_message(err), "needs a reader of at least 2"));
	err = kho_error_free(err);
	free(buf);

	buf = wrap(payload, n, 1, 1, 1, &size);
	cr_assert(kho_image_decode(buf, size, &b, &err) == -EOPNOTSUPP);
	cr_assert(strstr(kho_error_message(err), "sealed in kind 1"));
	err = kho_error_free(err);
	free(buf);

	m.must_understand = features;
	m.n_must_understand = 1;
	cr_assert(decode_message(&m, &err) == -EOPNOTSUPP);
	cr_assert(strstr(kho_error_message(err), "'time-travel'"));
	err = kho_error_free(err);
}

Test(image, values_that_no_writer_writes)
{
	struct kho_error *err = NULL;
	enum { NO_WORKLOAD, NAME, UNIT, KEEP, KIND, TOKEN_IMAGE, TOKEN_TWICE, NAME_TWICE, SALT, SURVIVAL,
	       RESTORE, ARRIVAL, N };

	for (int bad = 0; bad < N; bad++) {
		Kho__Image__Image m = KHO__IMAGE__IMAGE__INIT;
		Kho__Image__Workload w = KHO__IMAGE__WORKLOAD__INIT;
		Kho__Image__File f[2] = { KHO__IMAGE__FILE__INIT, KHO__IMAGE__FILE__INIT };
		Kho__Image__File *fp[2] = { &f[0], &f[1] };
		Kho__Image__Secret s = KHO__IMAGE__SECRET__INIT;
		Kho__Image__Policy p = KHO__IMAGE__POLICY__INIT;
		Kho__Image__Arrival arrival = KHO__IMAGE__ARRIVAL__INIT;

		arrival.boot_id = (char *)(bad == ARRIVAL ? "longer than any boot id that there ever was" : "0123");
		m.arrival = &arrival;
		p.survival = bad == SURVIVAL ? 77 : KHO__IMAGE__SURVIVAL__SURVIVAL_MUST;
		p.restore_failure = bad == RESTORE ? 77 : KHO__IMAGE__RESTORE_FAILURE__RESTORE_FAILURE_QUIESCE;
		w.policy = &p;
		w.name = (char *)(bad == NAME ? "../x" : "vm1");
		w.unit = (char *)(bad == UNIT ? "a\033[31m" : "u.service");
		w.keep = bad == KEEP ? 77 : KHO__IMAGE__KEEP_MODE__KEEP_HOLD;
		f[0].name = (char *)"a";
		f[1].name = (char *)(bad == NAME_TWICE ? "a" : "b");
		f[0].kind = bad == KIND ? 99 : KHO__IMAGE__FILE_KIND__FILE_MEMFD;
		f[1].kind = KHO__IMAGE__FILE_KIND__FILE_MEMFD;
		f[0].token = bad == TOKEN_IMAGE ? 0 : 1;
		f[1].token = bad == TOKEN_TWICE ? 1 : 2;
		w.files = fp;
		w.n_files = 2;
		if (bad == SALT)
			w.claim_secret = &s;
		if (bad != NO_WORKLOAD)
			m.workload = &w;
		cr_assert(decode_message(&m, &err) < 0, "case %d", bad);
		err = kho_error_free(err);
	}
}

Test(image, caps_before_allocation)
{
	size_t n = 3 << 20, size;
	uint8_t *payload = malloc(n), *buf;
	struct kho_error *err = NULL;
	struct kho_image *b = NULL;
	struct stat st;
	int fd;

	/* Millions of empty features: fifty times that in memory, were there no budget. */
	for (size_t i = 0; i < n; i += 2) {
		payload[i] = 0x0a;
		payload[i + 1] = 0x00;
	}
	buf = wrap(payload, n - n % 2, 1, 1, 0, &size);
	cr_assert(kho_image_decode(buf, size, &b, &err) == -EFBIG, "%s", kho_error_message(err));
	err = kho_error_free(err);
	free(buf);
	free(payload);

	/* A file that claims to be enormous. */
	fd = memfd_create("x", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	buf = wrap("", 0, 1, 1, 0, &size);
	memset(buf + 24, 0x7f, 8);
	cr_assert(pwrite(fd, buf, size, 0) == (ssize_t)size && ftruncate(fd, 1LL << 40) == 0);
	cr_assert(fstat(fd, &st) == 0);
	cr_assert(kho_image_read_fd(kho, fd, false, &b, &err) == -EFBIG);
	err = kho_error_free(err);
	cr_assert(kho_image_read_fd(kho, fd, true, &b, &err) == -EPERM);
	err = kho_error_free(err);
	close(fd);
	free(buf);

	{
		struct kho_image *a = sample(KHO_IMAGE_FILES_MAX);
		struct kho_image_file f = { .name = "more", .kind = KHO_FILE_MEMFD, .token = 9999 };

		cr_assert(kho_image_add_file(a, &f, NULL) == -E2BIG);
		kho_image_free(a);
	}
}

Test(image, secret)
{
	struct kho_image *a = sample(0), *b = NULL;
	size_t size;
	void *buf;

	cr_assert(kho_image_set_secret(kho, a, "short", 5, NULL) == -EINVAL);
	cr_assert(!kho_image_check_secret(a, "0123456789abcdef", 16));
	cr_assert(kho_image_set_secret(kho, a, "0123456789abcdef", 16, NULL) == 0);
	cr_assert(kho_image_encode(a, &buf, &size, NULL) == 0);
	cr_assert(memmem(buf, size, "0123456789abcdef", 16) == NULL, "the secret is in the image");
	cr_assert(kho_image_decode(buf, size, &b, NULL) == 0);
	cr_assert(kho_image_check_secret(b, "0123456789abcdef", 16));
	cr_assert(!kho_image_check_secret(b, "0123456789abcdeF", 16));
	cr_assert(!kho_image_check_secret(b, "0123456789abcde", 15));
	cr_assert(!kho_image_check_secret(b, "", 0));
	free(buf);
	kho_image_free(a);
	kho_image_free(b);
}

Test(image, names)
{
	char longest[KHO_NAME_MAX + 2];

	memset(longest, 'a', sizeof(longest));
	longest[KHO_NAME_MAX] = 0;
	cr_assert(kho_name_valid("vm1") && kho_name_valid("a") && kho_name_valid("A_z-9.x@1"));
	cr_assert(kho_name_valid(longest));
	longest[KHO_NAME_MAX] = 'a';
	longest[KHO_NAME_MAX + 1] = 0;
	cr_assert(!kho_name_valid(longest));
	cr_assert(!kho_name_valid("") && !kho_name_valid(NULL) && !kho_name_valid(".x") &&
		  !kho_name_valid("-x") && !kho_name_valid("a:b") && !kho_name_valid("a/b") &&
		  !kho_name_valid("a b") && !kho_name_valid("a+b") && !kho_name_valid("\xc3\xa4"));
}

/* A golden image of every released version; what was written must stay readable. */
Test(image, golden)
{
	struct kho_error *err = NULL;
	struct kho_image *b = NULL;
	char path[512];
	int fd, r;

	snprintf(path, sizeof(path), "%s/golden/image-v1", getenv("UNIT_SRC"));
	fd = open(path, O_RDONLY | O_CLOEXEC);
	cr_assert(fd >= 0, "%s", path);
	r = kho_image_read_fd(kho, fd, false, &b, &err);
	cr_assert(r == 0, "%s", kho_error_format(err, r));
	cr_assert_str_eq(kho_image_name(b), "golden");
	cr_assert_str_eq(kho_image_unit(b), "vm@1.service");
	cr_assert(kho_image_uid(b) == 1000 && kho_image_handovers(b) == 7);
	cr_assert(kho_image_n_files(b) == 3);
	cr_assert(kho_image_check_secret(b, "0123456789abcdef", 16));
	kho_image_free(b);
	close(fd);
}

/* The kernel, with its n-th call failing. */
static long calls, fail_at;
static bool fails(void)
{
	return ++calls == fail_at;
}

static int f_memfd_create(void *u, const char *name, unsigned int flags)
{
	return fails() ? -EMFILE : kho_ops_kernel()->memfd_create(u, name, flags);
}

static int f_ftruncate(void *u, int fd, off_t length)
{
	return fails() ? -EFBIG : kho_ops_kernel()->ftruncate(u, fd, length);
}

static ssize_t f_pread(void *u, int fd, void *buf, size_t count, off_t offset)
{
	return fails() ? -EIO : kho_ops_kernel()->pread(u, fd, buf, count, offset);
}

static ssize_t f_pwrite(void *u, int fd, const void *buf, size_t count, off_t offset)
{
	return fails() ? -ENOSPC : kho_ops_kernel()->pwrite(u, fd, buf, count, offset);
}

static int f_fstat(void *u, int fd, struct stat *st)
{
	return fails() ? -EIO : kho_ops_kernel()->fstat(u, fd, st);
}

static int f_fcntl(void *u, int fd, int cmd, long arg)
{
	return fails() ? -EPERM : kho_ops_kernel()->fcntl(u, fd, cmd, arg);
}

static ssize_t f_getrandom(void *u, void *buf, size_t count)
{
	return fails() ? -EAGAIN : kho_ops_kernel()->getrandom(u, buf, count);
}

Test(image, fail_nth)
{
	struct kho_ops ops = *kho_ops_kernel();
	struct kho *k = NULL;
	size_t fds = count_fds();
	int fired = 0;

	ops.memfd_create = f_memfd_create;
	ops.ftruncate = f_ftruncate;
	ops.pread = f_pread;
	ops.pwrite = f_pwrite;
	ops.fstat = f_fstat;
	ops.fcntl = f_fcntl;
	ops.getrandom = f_getrandom;
	cr_assert(kho_new(&k, &ops, NULL) == 0);
	for (fail_at = 1;; fail_at++) {
		struct kho_image *a = sample(2), *b = NULL;
		struct kho_error *err = NULL;
		int fd = -1, r;

		calls = 0;
		r = kho_image_set_secret(k, a, "0123456789abcdef", 16, &err);
		if (r == 0)
			r = fd = kho_image_write_memfd(k, a, &err);
		if (r >= 0)
			r = kho_image_read_fd(k, fd, true, &b, &err);
		cr_assert((r < 0) == (calls >= fail_at), "call %ld", fail_at);
		cr_assert((r < 0) == (err != NULL));
		cr_assert((r < 0) == (b == NULL));
		if (fd >= 0)
			close(fd);
		kho_image_free(a);
		kho_image_free(b);
		kho_error_free(err);
		cr_assert(count_fds() == fds, "call %ld leaks a descriptor", fail_at);
		if (r >= 0)
			break;
		fired++;
	}
	cr_assert(fired >= 8, "%d", fired);
	kho_free(k);
}
