/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The image of a workload: model, bytes, sealed memfd.
 *
 * What is read here was written by another kernel's khod, perhaps an older or a
 * newer one, and has passed through memory nobody watched. So the order is fixed:
 * size, magic, version, length, checksum, and only then the protobuf, unpacked
 * under a budget; then must-understand features; then every value. The model is
 * handed out only when all of it has passed.
 *
 * Header, little endian, 128 bytes:
 *	0  magic[8]        "KHOIMAGE"
 *	8  version         u32, of the format
 *	12 oldest_reader   u32, the oldest format version whose reader understands it
 *	16 header_size     u32
 *	20 seal_kind       u32, 0: none
 *	24 payload_size    u64
 *	32 checksum[32]    SHA-256 over bytes 0 to 31 and the payload
 *	64 seal[64]        over bytes 0 to 63; zero when seal_kind is 0
 */
#define OPENSSL_SUPPRESS_DEPRECATED	/* see sha256_2() */

#include <endian.h>
#include <fcntl.h>
#include <inttypes.h>
#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "image.pb-c.h"

#include "budget.h"
#include "graph-codec.h"
#include "util.h"

#define SHA256_SIZE 32
#define SALT_SIZE 16
#define TEXT_MAX 128		/* writer, release */
#define BOOT_ID_MAX 36
#define FEATURES_MAX 64
#define SEALS_WANTED (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)
#define BUDGET_MAX (512u << 20)

struct header {
	uint8_t magic[8];
	uint32_t version;
	uint32_t oldest_reader;
	uint32_t header_size;
	uint32_t seal_kind;
	uint64_t payload_size;
	uint8_t checksum[SHA256_SIZE];
	uint8_t seal[64];
};
_Static_assert(sizeof(struct header) == KHO_IMAGE_HEADER_SIZE, "image header size");
_Static_assert(offsetof(struct header, checksum) == 32, "image checksum offset");
_Static_assert(offsetof(struct header, seal) == 64, "image seal offset");

struct file {
	char name[KHO_NAME_MAX + 1];
	enum kho_file_kind kind;
	uint32_t seals;
	uint64_t token;
	uint64_t size;
};

struct kho_image {
	char name[KHO_NAME_MAX + 1];
	char unit[KHO_IMAGE_UNIT_MAX + 1];
	char writer[TEXT_MAX + 1];
	char boot_id[BOOT_ID_MAX + 1];
	char kernel_release[TEXT_MAX + 1];
	uint32_t uid;
	uint32_t handovers;
	uint64_t registered_usec;
	uint64_t written_usec;
	bool has_secret;
	uint8_t secret_salt[SALT_SIZE];
	uint8_t secret_hash[SHA256_SIZE];
	struct file *files;
	size_t n_files;
	struct kho_graph *graph;
	enum kho_outcome outcome;
	char reason[KHO_REASON_MAX + 1];
	enum kho_survival survival;
	enum kho_restore_failure restore_failure;
	uint32_t claim_sec;
	bool may_lose_irq;
	char arrived_boot_id[BOOT_ID_MAX + 1];
	uint64_t arrived_usec;
};

/*
 * Features that this reader understands, by name. "devices": there are iommufds or
 * devices among the files. Who does not know them would discard them one by one. "graph":
 * there is an object graph. Who does not know it would leave devices as they came.
 */
enum { FEATURE_DEVICES, FEATURE_GRAPH, N_FEATURES };
static const char *const features[N_FEATURES] = {
	[FEATURE_DEVICES] = "devices",
	[FEATURE_GRAPH] = "graph",
};

const char *kho_file_kind_name(enum kho_file_kind kind)
{
	switch (kind) {
	case KHO_FILE_MEMFD:
		return "memfd";
	case KHO_FILE_IOMMUFD:
		return "iommufd";
	case KHO_FILE_VFIO:
		return "vfio";
	}
	return NULL;
}

bool kho_name_valid(const char *name)
{
	size_t len;

	if (!name)
		return false;
	len = strnlen(name, KHO_NAME_MAX + 1);
	if (len == 0 || len > KHO_NAME_MAX || name[0] == '.' || name[0] == '-')
		return false;
	return strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.@-") == len;
}

/* Printable, no control characters: these strings end up in terminals and logs. */
static int set_text(char *to, size_t max, const char *from, const char *what,
		    struct kho_error **err)
{
	size_t len = from ? strnlen(from, max + 1) : 0;

	if (len > max)
		return kho_error_new(err, EFBIG, what, "longer than %zu bytes", max);
	for (size_t i = 0; i < len; i++)
		if ((unsigned char)from[i] < 0x20 || (unsigned char)from[i] >= 0x7f)
			return kho_error_new(err, EINVAL, what, "not printable ASCII");
	memcpy(to, from ? from : "", len);
	to[len] = 0;
	return 0;
}

int kho_image_new(struct kho_image **ret, const char *name, uint32_t uid, const char *unit,
		  struct kho_error **err)
{
	_cleanup_image_ struct kho_image *image = NULL;
	int r;

	if (!kho_name_valid(name))
		return kho_error_new(err, EINVAL, "workload",
				     "a name has 1 to %d of A-Z a-z 0-9 _ . @ - and does not begin with . or -",
				     KHO_NAME_MAX);
	image = calloc(1, sizeof(*image));
	if (!image)
		return kho_error_new(err, ENOMEM, name, "out of memory");
	strcpy(image->name, name);
	image->uid = uid;
	r = set_text(image->unit, KHO_IMAGE_UNIT_MAX, unit, "unit", err);
	if (r < 0)
		return r;
	*ret = TAKE_PTR(image);
	return 0;
}

struct kho_image *kho_image_free(struct kho_image *image)
{
	if (image) {
		free(image->files);
		kho_graph_free(image->graph);
		OPENSSL_cleanse(image->secret_hash, sizeof(image->secret_hash));
		free(image);
	}
	return NULL;
}

const char *kho_image_name(const struct kho_image *image)
{
	return image->name;
}

uint32_t kho_image_uid(const struct kho_image *image)
{
	return image->uid;
}

const char *kho_image_unit(const struct kho_image *image)
{
	return image->unit;
}

uint32_t kho_image_handovers(const struct kho_image *image)
{
	return image->handovers;
}

uint64_t kho_image_registered_usec(const struct kho_image *image)
{
	return image->registered_usec;
}

const char *kho_image_writer(const struct kho_image *image)
{
	return image->writer;
}

const char *kho_image_boot_id(const struct kho_image *image)
{
	return image->boot_id;
}

const char *kho_image_kernel_release(const struct kho_image *image)
{
	return image->kernel_release;
}

uint64_t kho_image_written_usec(const struct kho_image *image)
{
	return image->written_usec;
}

bool kho_image_has_secret(const struct kho_image *image)
{
	return image->has_secret;
}

size_t kho_image_n_files(const struct kho_image *image)
{
	return image->n_files;
}

bool kho_image_has_devices(const struct kho_image *image)
{
	for (size_t i = 0; i < image->n_files; i++)
		if (image->files[i].kind != KHO_FILE_MEMFD)
			return true;
	return false;
}

uint64_t kho_image_bytes(const struct kho_image *image)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < image->n_files; i++)
		if (__builtin_add_overflow(sum, image->files[i].size, &sum))
			return UINT64_MAX;
	return sum;
}

int kho_image_file(const struct kho_image *image, size_t index, struct kho_image_file *file)
{
	const struct file *f;

	if (index >= image->n_files)
		return -ENOENT;
	f = &image->files[index];
	*file = (struct kho_image_file){
		.name = f->name,
		.kind = f->kind,
		.seals = f->seals,
		.token = f->token,
		.size = f->size,
	};
	return 0;
}

int kho_image_add_file(struct kho_image *image, const struct kho_image_file *file,
		       struct kho_error **err)
{
	struct file *f;

	if (!kho_name_valid(file->name))
		return kho_error_new(err, EINVAL, image->name,
				     "a file's name has 1 to %d of A-Z a-z 0-9 _ . @ - and does not begin with . or -",
				     KHO_NAME_MAX);
	if (!kho_file_kind_name(file->kind))
		return kho_error_new(err, EINVAL, file->name, "unknown kind of file %d",
				     (int)file->kind);
	if (file->token == KHO_TOKEN_IMAGE || file->token == UINT64_MAX)
		return kho_error_new(err, EINVAL, file->name, "token %" PRIu64 " is reserved",
				     file->token);
	if (image->n_files >= KHO_IMAGE_FILES_MAX)
		return kho_error_new(err, E2BIG, image->name, "more than %d files",
				     KHO_IMAGE_FILES_MAX);
	for (size_t i = 0; i < image->n_files; i++) {
		if (strcmp(image->files[i].name, file->name) == 0)
			return kho_error_new(err, EEXIST, file->name,
					     "the workload has a file of that name already");
		if (image->files[i].token == file->token)
			return kho_error_new(err, EEXIST, file->name, "token %" PRIu64 " twice",
					     file->token);
	}

	f = reallocarray(image->files, image->n_files + 1, sizeof(*f));
	if (!f)
		return kho_error_new(err, ENOMEM, image->name, "out of memory");
	image->files = f;
	f += image->n_files++;
	*f = (struct file){
		.kind = file->kind,
		.seals = file->seals,
		.token = file->token,
		.size = file->size,
	};
	strcpy(f->name, file->name);
	return 0;
}

const struct kho_graph *kho_image_graph(const struct kho_image *image)
{
	return image->graph;
}

static const struct file *file_by_token(const struct kho_image *image, uint64_t token,
					enum kho_file_kind kind)
{
	for (size_t i = 0; i < image->n_files; i++)
		if (image->files[i].token == token && image->files[i].kind == kind)
			return &image->files[i];
	return NULL;
}

/* Each token in the graph is a file of the right kind, and used once. */
static int graph_fits(const struct kho_image *image, const struct kho_graph *graph,
		      struct kho_error **err)
{
	_cleanup_free_ uint64_t *seen = NULL;
	size_t n_seen = 0, n = graph->n_backings;

	for (size_t i = 0; i < graph->n_contexts; i++)
		n += 1 + graph->contexts[i].n_devices;
	if (n > KHO_GRAPH_OBJECTS_MAX + 2 * (size_t)KHO_IMAGE_FILES_MAX)
		return kho_error_new(err, EFBIG, image->name, "the graph refers to too many files");
	seen = calloc(n + 1, sizeof(*seen));
	if (!seen)
		return kho_error_new(err, ENOMEM, image->name, "out of memory");

	for (size_t i = 0; i < graph->n_backings; i++) {
		seen[n_seen++] = graph->backings[i];
		if (!file_by_token(image, graph->backings[i], KHO_FILE_MEMFD))
			return kho_error_new(err, EINVAL, image->name,
					     "the graph maps token %" PRIu64 ", which is no memfd of the workload",
					     graph->backings[i]);
	}
	for (size_t i = 0; i < graph->n_contexts; i++) {
		const struct kho_context *c = &graph->contexts[i];

		seen[n_seen++] = c->token;
		if (!file_by_token(image, c->token, KHO_FILE_IOMMUFD))
			return kho_error_new(err, EINVAL, image->name,
					     "the graph has a context with token %" PRIu64 ", which is no iommufd of the workload",
					     c->token);
		for (size_t k = 0; k < c->n_devices; k++) {
			if (c->devices[k].token == 0)
				continue;
			seen[n_seen++] = c->devices[k].token;
			if (!file_by_token(image, c->devices[k].token, KHO_FILE_VFIO))
				return kho_error_new(err, EINVAL, image->name,
						     "the graph has a device with token %" PRIu64 ", which is no device of the workload",
						     c->devices[k].token);
		}
	}
	for (size_t i = 0; i < n_seen; i++)
		for (size_t k = 0; k < i; k++)
			if (seen[i] == seen[k])
				return kho_error_new(err, EINVAL, image->name,
						     "the graph has token %" PRIu64 " twice", seen[i]);
	return 0;
}

int kho_image_set_graph(struct kho_image *image, struct kho_graph *graph,
			struct kho_error **err)
{
	int r = 0;

	if (graph) {
		r = kho_graph_check(graph, err);
		if (r >= 0)
			r = graph_fits(image, graph, err);
	}
	if (r < 0)
		return r;
	kho_graph_free(image->graph);
	image->graph = graph;
	return 0;
}

enum kho_outcome kho_image_outcome(const struct kho_image *image)
{
	return image->outcome;
}

const char *kho_image_reason(const struct kho_image *image)
{
	return image->reason;
}

void kho_image_set_outcome(struct kho_image *image, enum kho_outcome outcome, const char *reason)
{
	image->outcome = outcome;
	snprintf(image->reason, sizeof(image->reason), "%s", reason ? reason : "");
	/* It will be printed, by whoever reads the image. */
	for (char *p = image->reason; *p; p++)
		if ((unsigned char)*p < 0x20 || (unsigned char)*p >= 0x7f)
			*p = '?';
}

void kho_image_drop_file(struct kho_image *image, size_t index)
{
	if (index >= image->n_files)
		return;
	image->n_files--;
	memmove(&image->files[index], &image->files[index + 1],
		(image->n_files - index) * sizeof(*image->files));
}

void kho_image_drop_devices(struct kho_image *image)
{
	size_t n = 0;

	for (size_t i = 0; i < image->n_files; i++)
		if (image->files[i].kind == KHO_FILE_MEMFD)
			image->files[n++] = image->files[i];
	image->n_files = n;
	image->graph = kho_graph_free(image->graph);
}

enum kho_survival kho_image_survival(const struct kho_image *image)
{
	return image->survival;
}

enum kho_restore_failure kho_image_restore_failure(const struct kho_image *image)
{
	return image->restore_failure;
}

void kho_image_set_policy(struct kho_image *image, enum kho_survival survival,
			  enum kho_restore_failure restore_failure)
{
	image->survival = survival;
	image->restore_failure = restore_failure;
}

uint32_t kho_image_claim_sec(const struct kho_image *image)
{
	return image->claim_sec;
}

void kho_image_set_claim_sec(struct kho_image *image, uint32_t sec)
{
	image->claim_sec = sec;
}

bool kho_image_may_lose_irq(const struct kho_image *image)
{
	return image->may_lose_irq;
}

void kho_image_set_may_lose_irq(struct kho_image *image, bool may)
{
	image->may_lose_irq = may;
}

uint64_t kho_image_arrived_usec(const struct kho_image *image, const char *boot_id)
{
	return strcmp(image->arrived_boot_id, boot_id) == 0 ? image->arrived_usec : 0;
}

int kho_image_set_arrived(struct kho_image *image, const char *boot_id, uint64_t usec,
			  struct kho_error **err)
{
	int r = set_text(image->arrived_boot_id, BOOT_ID_MAX, boot_id, "boot id of the arrival", err);

	if (r < 0)
		return r;
	image->arrived_usec = usec;
	return 0;
}

void kho_image_set_handovers(struct kho_image *image, uint32_t handovers)
{
	image->handovers = handovers;
}

void kho_image_set_registered_usec(struct kho_image *image, uint64_t usec)
{
	image->registered_usec = usec;
}

int kho_image_set_origin(struct kho_image *image, const char *boot_id,
			 const char *kernel_release, uint64_t usec, struct kho_error **err)
{
	int r;

	r = set_text(image->writer, TEXT_MAX, "khod " KHO_VERSION, "writer", err);
	if (r < 0)
		return r;
	r = set_text(image->boot_id, BOOT_ID_MAX, boot_id, "boot id", err);
	if (r < 0)
		return r;
	r = set_text(image->kernel_release, TEXT_MAX, kernel_release, "kernel release", err);
	if (r < 0)
		return r;
	image->written_usec = usec;
	return 0;
}

/*
 * SHA-256 over two pieces. Not by EVP, whose first use reads libcrypto's configuration and sets up all of
 * its algorithms: in a guest without KVM 30 ms, twice what khod needs for all else before it retrieves
 * memory, and every workload waits for that.
 */
static bool sha256_2(const void *a, size_t na, const void *b, size_t nb,
		     uint8_t out[SHA256_SIZE])
{
	SHA256_CTX ctx;
	bool ok;

	ok = SHA256_Init(&ctx) == 1 && SHA256_Update(&ctx, a, na) == 1 &&
	     SHA256_Update(&ctx, b, nb) == 1 && SHA256_Final(out, &ctx) == 1;
	OPENSSL_cleanse(&ctx, sizeof(ctx));	/* it may have seen a claim secret */
	return ok;
}

int kho_image_set_secret(struct kho *kho, struct kho_image *image, const void *secret,
			 size_t size, struct kho_error **err)
{
	uint8_t salt[SALT_SIZE];
	ssize_t n;

	if (size < KHO_SECRET_MIN || size > KHO_SECRET_MAX)
		return kho_error_new(err, EINVAL, image->name, "a claim secret has %d to %d bytes",
				     KHO_SECRET_MIN, KHO_SECRET_MAX);
	n = kho_op(kho, getrandom, salt, sizeof(salt));
	if (n != sizeof(salt))
		return kho_error_new(err, n < 0 ? (int)n : EIO, image->name,
				     "no random bytes for the salt");
	if (!sha256_2(salt, sizeof(salt), secret, size, image->secret_hash))
		return kho_error_new(err, ENOMEM, image->name, "cannot hash the secret");
	memcpy(image->secret_salt, salt, sizeof(salt));
	image->has_secret = true;
	return 0;
}

bool kho_image_check_secret(const struct kho_image *image, const void *secret, size_t size)
{
	uint8_t hash[SHA256_SIZE];
	bool ok;

	if (!image->has_secret || size < KHO_SECRET_MIN || size > KHO_SECRET_MAX)
		return false;
	if (!sha256_2(image->secret_salt, SALT_SIZE, secret, size, hash))
		return false;
	ok = CRYPTO_memcmp(hash, image->secret_hash, sizeof(hash)) == 0;
	OPENSSL_cleanse(hash, sizeof(hash));
	return ok;
}

int kho_image_encode(const struct kho_image *image, void **buf, size_t *size,
		     struct kho_error **err)
{
	Kho__Image__Image m = KHO__IMAGE__IMAGE__INIT;
	Kho__Image__Workload w = KHO__IMAGE__WORKLOAD__INIT;
	Kho__Image__Origin o = KHO__IMAGE__ORIGIN__INIT;
	Kho__Image__Secret s = KHO__IMAGE__SECRET__INIT;
	_cleanup_free_ Kho__Image__File *files = NULL;
	_cleanup_free_ Kho__Image__File **filep = NULL;
	_cleanup_free_ uint8_t *out = NULL;
	Kho__Image__Outcome outcome = KHO__IMAGE__OUTCOME__INIT;
	Kho__Image__Policy policy = KHO__IMAGE__POLICY__INIT;
	Kho__Image__Arrival arrival = KHO__IMAGE__ARRIVAL__INIT;
	char *needs[N_FEATURES];
	struct header *h;
	size_t payload = 0;
	int r = 0;

	files = calloc(image->n_files + 1, sizeof(*files));
	filep = calloc(image->n_files + 1, sizeof(*filep));
	if (!files || !filep)
		return kho_error_new(err, ENOMEM, image->name, "out of memory");
	for (size_t i = 0; i < image->n_files; i++) {
		struct file *f = &image->files[i];

		kho__image__file__init(&files[i]);
		files[i].name = f->name;
		files[i].kind = (Kho__Image__FileKind)f->kind;
		files[i].token = f->token;
		files[i].size = f->size;
		files[i].seals = f->seals;
		filep[i] = &files[i];
	}

	m.must_understand = needs;
	if (kho_image_has_devices(image))
		needs[m.n_must_understand++] = (char *)features[FEATURE_DEVICES];
	if (image->graph)
		needs[m.n_must_understand++] = (char *)features[FEATURE_GRAPH];
	if (image->outcome) {
		outcome.kind = (Kho__Image__OutcomeKind)image->outcome;
		outcome.reason = (char *)image->reason;
		m.outcome = &outcome;
	}
	if (image->arrived_usec) {
		arrival.boot_id = (char *)image->arrived_boot_id;
		arrival.boottime_usec = image->arrived_usec;
		m.arrival = &arrival;
	}
	m.workload = &w;
	m.origin = &o;
	o.writer = (char *)image->writer;
	o.boot_id = (char *)image->boot_id;
	o.kernel_release = (char *)image->kernel_release;
	o.realtime_usec = image->written_usec;
	w.name = (char *)image->name;
	w.owner_uid = image->uid;
	w.unit = (char *)image->unit;
	w.registered_realtime_usec = image->registered_usec;
	w.handovers = image->handovers;
	w.keep = KHO__IMAGE__KEEP_MODE__KEEP_HOLD;
	/* As old images are: without it all is the default. */
	if (image->survival || image->restore_failure || image->claim_sec || image->may_lose_irq) {
		policy.survival = (Kho__Image__Survival)image->survival;
		policy.restore_failure = (Kho__Image__RestoreFailure)image->restore_failure;
		policy.claim_sec = image->claim_sec;
		policy.may_lose_irq = image->may_lose_irq;
		w.policy = &policy;
	}
	w.files = filep;
	w.n_files = image->n_files;
	if (image->has_secret) {
		s.salt.data = (uint8_t *)image->secret_salt;
		s.salt.len = SALT_SIZE;
		s.sha256.data = (uint8_t *)image->secret_hash;
		s.sha256.len = SHA256_SIZE;
		w.claim_secret = &s;
	}

	if (image->graph)
		r = kho_graph_to_message(image->graph, &m, err);
	if (r >= 0) {
		payload = kho__image__image__get_packed_size(&m);
		if (payload > KHO_IMAGE_PAYLOAD_MAX)
			r = kho_error_new(err, E2BIG, image->name,
					  "the image is larger than %u bytes", KHO_IMAGE_PAYLOAD_MAX);
	}
	if (r >= 0) {
		out = malloc(sizeof(*h) + payload);
		if (out)
			kho__image__image__pack(&m, out + sizeof(*h));
		else
			r = kho_error_new(err, ENOMEM, image->name, "out of memory");
	}
	kho_graph_message_free(&m);
	if (!out)
		return r;
	memset(out, 0, sizeof(*h));

	h = (struct header *)out;
	memcpy(h->magic, KHO_IMAGE_MAGIC, sizeof(h->magic));
	h->version = htole32(KHO_IMAGE_VERSION);
	h->oldest_reader = htole32(1);
	h->header_size = htole32(sizeof(*h));
	h->payload_size = htole64(payload);
	if (!sha256_2(out, offsetof(struct header, checksum), out + sizeof(*h), payload,
		      h->checksum))
		return kho_error_new(err, ENOMEM, image->name, "cannot compute the checksum");

	*buf = TAKE_PTR(out);
	*size = sizeof(*h) + payload;
	return 0;
}

static int header_check(const struct header *h, uint64_t size, struct kho_error **err)
{
	uint32_t version, oldest, header_size;
	uint64_t payload;

	if (size < sizeof(*h))
		return kho_error_new(err, EBADMSG, "image", "truncated: %" PRIu64 " bytes are less than a header",
				     size);
	if (memcmp(h->magic, KHO_IMAGE_MAGIC, sizeof(h->magic)) != 0)
		return kho_error_new(err, EBADMSG, "image", "this is not an image (wrong magic)");
	version = le32toh(h->version);
	oldest = le32toh(h->oldest_reader);
	header_size = le32toh(h->header_size);
	payload = le64toh(h->payload_size);
	if (version == 0 || oldest == 0 || oldest > version)
		return kho_error_new(err, EBADMSG, "image", "impossible version %" PRIu32 " (oldest reader %" PRIu32 ")",
				     version, oldest);
	if (oldest > KHO_IMAGE_VERSION)
		return kho_error_new(err, EOPNOTSUPP, "image",
				     "written in format %" PRIu32 ", which needs a reader of at least %" PRIu32 "; this one reads %d: upgrade khod",
				     version, oldest, KHO_IMAGE_VERSION);
	if (header_size != sizeof(*h))
		return kho_error_new(err, EBADMSG, "image", "the header has %" PRIu32 " bytes instead of %zu",
				     header_size, sizeof(*h));
	if (payload > KHO_IMAGE_PAYLOAD_MAX)
		return kho_error_new(err, EFBIG, "image", "the payload has %" PRIu64 " bytes, more than %u",
				     payload, KHO_IMAGE_PAYLOAD_MAX);
	if (size - sizeof(*h) < payload)
		return kho_error_new(err, EBADMSG, "image", "truncated: %" PRIu64 " of %" PRIu64 " bytes",
				     size, payload + sizeof(*h));
	if (size - sizeof(*h) > payload)
		return kho_error_new(err, EBADMSG, "image", "%" PRIu64 " bytes too long",
				     size - sizeof(*h) - payload);
	if (le32toh(h->seal_kind) != 0)
		return kho_error_new(err, EOPNOTSUPP, "image", "sealed in kind %" PRIu32 ", which this reader does not know",
				     le32toh(h->seal_kind));
	for (size_t i = 0; i < sizeof(h->seal); i++)
		if (h->seal[i])
			return kho_error_new(err, EBADMSG, "image", "not sealed, yet with a seal");
	return 0;
}

static int features_check(const Kho__Image__Image *m, struct kho_error **err)
{
	if (m->n_must_understand > FEATURES_MAX)
		return kho_error_new(err, EFBIG, "image", "more than %d features", FEATURES_MAX);
	for (size_t i = 0; i < m->n_must_understand; i++) {
		const char *name = m->must_understand[i];
		bool known = false;

		for (size_t j = 0; j < N_FEATURES; j++)
			known |= strcmp(features[j], name) == 0;
		if (!known)
			return kho_error_new(err, EOPNOTSUPP, "image",
					     "needs the feature '%.64s', which this khod does not have: upgrade khod",
					     kho_name_valid(name) ? name : "(unprintable)");
	}
	return 0;
}

static int from_message(const Kho__Image__Image *m, struct kho_image **ret,
			struct kho_error **err)
{
	_cleanup_image_ struct kho_image *image = NULL;
	const Kho__Image__Workload *w = m->workload;
	int r;

	r = features_check(m, err);
	if (r < 0)
		return r;
	if (!w)
		return kho_error_new(err, EINVAL, "image", "without a workload");
	if (w->n_files > KHO_IMAGE_FILES_MAX)
		return kho_error_new(err, EFBIG, "image", "more than %d files",
				     KHO_IMAGE_FILES_MAX);
	if (w->keep != KHO__IMAGE__KEEP_MODE__KEEP_HOLD)
		return kho_error_new(err, EOPNOTSUPP, "image", "keep mode %d is unknown: upgrade khod",
				     (int)w->keep);

	r = kho_image_new(&image, w->name, w->owner_uid, w->unit, err);
	if (r < 0)
		return r;
	image->handovers = w->handovers;
	image->registered_usec = w->registered_realtime_usec;
	if (w->policy) {
		if ((int)w->policy->survival < 0 ||
		    w->policy->survival > KHO__IMAGE__SURVIVAL__SURVIVAL_BEST_EFFORT ||
		    (int)w->policy->restore_failure < 0 ||
		    w->policy->restore_failure > KHO__IMAGE__RESTORE_FAILURE__RESTORE_FAILURE_RELEASE)
			return kho_error_new(err, EOPNOTSUPP, w->name, "its policy is unknown: upgrade khod");
		kho_image_set_policy(image, (enum kho_survival)w->policy->survival,
				     (enum kho_restore_failure)w->policy->restore_failure);
		kho_image_set_claim_sec(image, w->policy->claim_sec);
		kho_image_set_may_lose_irq(image, w->policy->may_lose_irq);
	}
	if (m->arrival) {
		r = kho_image_set_arrived(image, m->arrival->boot_id, m->arrival->boottime_usec, err);
		if (r < 0)
			return r;
	}
	if (m->origin) {
		r = set_text(image->writer, TEXT_MAX, m->origin->writer, "writer", err);
		if (r >= 0)
			r = set_text(image->boot_id, BOOT_ID_MAX, m->origin->boot_id, "boot id", err);
		if (r >= 0)
			r = set_text(image->kernel_release, TEXT_MAX, m->origin->kernel_release,
				     "kernel release", err);
		if (r < 0)
			return r;
		image->written_usec = m->origin->realtime_usec;
	}
	if (w->claim_secret) {
		if (w->claim_secret->salt.len != SALT_SIZE ||
		    w->claim_secret->sha256.len != SHA256_SIZE)
			return kho_error_new(err, EINVAL, w->name, "the claim secret is malformed");
		memcpy(image->secret_salt, w->claim_secret->salt.data, SALT_SIZE);
		memcpy(image->secret_hash, w->claim_secret->sha256.data, SHA256_SIZE);
		image->has_secret = true;
	}
	for (size_t i = 0; i < w->n_files; i++) {
		const Kho__Image__File *f = w->files[i];
		struct kho_image_file file = {
			.name = f->name,
			.kind = (enum kho_file_kind)f->kind,
			.seals = f->seals,
			.token = f->token,
			.size = f->size,
		};

		r = kho_image_add_file(image, &file, err);
		if (r < 0)
			return r;
	}
	if (m->n_contexts > 0 || m->n_backings > 0) {
		struct kho_graph *graph = NULL;

		r = kho_graph_from_message(m, &graph, err);
		if (r < 0)
			return r;
		r = kho_image_set_graph(image, graph, err);
		if (r < 0) {
			kho_graph_free(graph);
			return r;
		}
	}
	if (m->outcome) {
		if (m->outcome->kind != KHO__IMAGE__OUTCOME_KIND__OUTCOME_RESTORED &&
		    m->outcome->kind != KHO__IMAGE__OUTCOME_KIND__OUTCOME_QUIESCED)
			return kho_error_new(err, EOPNOTSUPP, "image",
					     "outcome %d is unknown: upgrade khod",
					     (int)m->outcome->kind);
		image->outcome = (enum kho_outcome)m->outcome->kind;
		r = set_text(image->reason, KHO_REASON_MAX, m->outcome->reason, "reason", err);
		if (r < 0)
			return r;
	}
	*ret = TAKE_PTR(image);
	return 0;
}

int kho_image_decode(const void *buf, size_t size, struct kho_image **ret,
		     struct kho_error **err)
{
	const uint8_t *bytes = buf;
	uint8_t sum[SHA256_SIZE];
	struct header h = {};
	struct kho_budget budget;
	Kho__Image__Image *m;
	uint64_t payload;
	int r;

	memcpy(&h, bytes, size < sizeof(h) ? size : sizeof(h));
	r = header_check(&h, size, err);
	if (r < 0)
		return r;
	payload = le64toh(h.payload_size);
	if (!sha256_2(bytes, offsetof(struct header, checksum), bytes + sizeof(h), payload, sum))
		return kho_error_new(err, ENOMEM, "image", "cannot compute the checksum");
	if (CRYPTO_memcmp(sum, h.checksum, sizeof(sum)) != 0)
		return kho_error_new(err, EBADMSG, "image", "damaged: the checksum does not match");

	kho_budget_init(&budget, payload > (BUDGET_MAX - (1u << 20)) / 32 ?
					 BUDGET_MAX : (1u << 20) + 32 * payload);
	m = kho__image__image__unpack(&budget.allocator, payload, bytes + sizeof(h));
	if (!m) {
		if (budget.exhausted)
			return kho_error_new(err, EFBIG, "image",
					     "unpacks to more memory than any image needs");
		return kho_error_new(err, EBADMSG, "image", "malformed protobuf");
	}
	r = from_message(m, ret, err);
	kho__image__image__free_unpacked(m, &budget.allocator);
	return r;
}

static int write_all(struct kho *kho, int fd, const uint8_t *p, size_t size)
{
	off_t off = 0;

	while (size > 0) {
		ssize_t n = kho_op(kho, pwrite, fd, p + off, size, off);

		if (n == -EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? (int)n : -EIO;
		off += n;
		size -= n;
	}
	return 0;
}

int kho_image_write_memfd(struct kho *kho, const struct kho_image *image,
			  struct kho_error **err)
{
	_cleanup_free_ void *buf = NULL;
	size_t size;
	int fd, r;

	r = kho_image_encode(image, &buf, &size, err);
	if (r < 0)
		return r;
	fd = kho_op(kho, memfd_create, "kho-image", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return kho_error_new(err, fd, image->name, "no memfd for the image: %s",
				     strerror(-fd));
	r = kho_op(kho, ftruncate, fd, size);
	if (r >= 0)
		r = write_all(kho, fd, buf, size);
	if (r >= 0)
		r = kho_op(kho, fcntl, fd, F_ADD_SEALS, SEALS_WANTED);
	if (r < 0) {
		kho_close(kho, fd);
		return kho_error_new(err, r, image->name, "cannot write the image: %s",
				     strerror(-r));
	}
	return fd;
}

int kho_image_write_public(struct kho *kho, const struct kho_image *image,
			   struct kho_error **err)
{
	struct kho_image copy = *image;

	/* What it points to stays the image's. */
	copy.has_secret = false;
	return kho_image_write_memfd(kho, &copy, err);
}

int kho_image_read_fd(struct kho *kho, int fd, bool require_seals, struct kho_image **ret,
		      struct kho_error **err)
{
	_cleanup_free_ uint8_t *buf = NULL;
	struct header h = {};
	struct stat st = {};
	size_t size, done = 0;
	ssize_t n;
	int r;

	r = kho_op(kho, fstat, fd, &st);
	if (r < 0)
		return kho_error_new(err, r, "image", "cannot be examined: %s", strerror(-r));
	if (!S_ISREG(st.st_mode))
		return kho_error_new(err, EINVAL, "image", "neither a memfd nor a regular file");
	if (require_seals) {
		r = kho_op(kho, fcntl, fd, F_GET_SEALS, 0);
		if (r < 0)
			return kho_error_new(err, r, "image", "cannot read its seals: %s",
					     strerror(-r));
		if ((r & SEALS_WANTED) != SEALS_WANTED)
			return kho_error_new(err, EPERM, "image", "it is not sealed against changes");
	}
	n = kho_op(kho, pread, fd, &h, sizeof(h), 0);
	if (n < 0)
		return kho_error_new(err, (int)n, "image", "cannot be read: %s", strerror((int)-n));
	/* Caps come before the allocation: a file may claim any size. */
	r = header_check(&h, n < (ssize_t)sizeof(h) ? (uint64_t)n : (uint64_t)st.st_size, err);
	if (r < 0)
		return r;

	size = st.st_size;
	buf = malloc(size);
	if (!buf)
		return kho_error_new(err, ENOMEM, "image", "out of memory");
	while (done < size) {
		n = kho_op(kho, pread, fd, buf + done, size - done, done);
		if (n == -EINTR)
			continue;
		if (n < 0)
			return kho_error_new(err, (int)n, "image", "cannot be read: %s",
					     strerror((int)-n));
		if (n == 0)
			return kho_error_new(err, EBADMSG, "image", "truncated while it was read");
		done += n;
	}
	return kho_image_decode(buf, size, ret, err);
}
