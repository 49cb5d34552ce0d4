/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_TIMELINE_LOG_H
#define KHO_TIMELINE_LOG_H

#include <stdint.h>

#include <kho/timeline.h>

/*
 * The log that khod writes marks into: a memfd in systemd's fd store, which systemd carries
 * over a kexec. It is written in place, so that what is in it survives khod at every moment;
 * docs/formats/timeline.md.
 *
 * Two banks, one for each of the last two kernels. The one with the higher generation is the
 * running kernel's. A bank is valid once its generation is written, a mark once n counts it.
 */
#define KHO_TIMELINE_MAGIC "KHOTIME1"
#define KHO_TIMELINE_MARKS 2048

/* A moment, as all clocks have it; 0: not known. */
struct kho_timeline_time {
	uint64_t monotonic;	/* CLOCK_MONOTONIC, ns: from the start of each kernel */
	uint64_t counter;	/* of the CPU: goes on over a kexec */
	uint64_t realtime;	/* CLOCK_REALTIME, ns: what the RTC makes of it after a kexec */
};

enum kho_timeline_what {
	/* Of the old kernel. */
	KHO_MARK_STOPPED = 1,		/* the client of a workload has ended */
	KHO_MARK_KHOD_STOPPED,
	KHO_MARK_PREPARING,		/* clients are asked to prepare */
	KHO_MARK_PREPARED,		/* everything is preserved */
	KHO_MARK_ABORTED,
	/* Of the new kernel, from PID 1: in the clock of the old one. */
	KHO_MARK_REQUESTED = 16,	/* units begin to be stopped */
	KHO_MARK_UNITS_STOPPED,
	KHO_MARK_REBOOT,		/* reboot(2) is called */
	/* Of the new kernel; each ends what the one before it began. */
	KHO_MARK_USERSPACE = 32,	/* from PID 1: its own start */
	KHO_MARK_KHOD_STARTED,
	KHO_MARK_RETRIEVED,
	KHO_MARK_BUILT,
	KHO_MARK_REPLACED,
	KHO_MARK_QUIESCED,
	KHO_MARK_FINISHED,
	KHO_MARK_PRESERVED,
	KHO_MARK_READY,
	KHO_MARK_CLAIMED,
};

struct kho_timeline_mark {
	uint32_t what;
	uint32_t reserved;
	struct kho_timeline_time at;
	char workload[56];	/* "": of all */
};

struct kho_timeline_bank {
	uint64_t generation;	/* 0: empty */
	uint32_t n;
	uint32_t dropped;	/* marks for which there was no room */
	char boot_id[40];
	char release[72];
	struct kho_timeline_time opened;
	struct kho_timeline_mark marks[KHO_TIMELINE_MARKS];
};

struct kho_timeline_log {
	char magic[8];
	uint32_t bank_size;
	uint32_t reserved;
	struct kho_timeline_bank banks[2];
};

_Static_assert(KHO_NAME_MAX < sizeof(((struct kho_timeline_mark *)0)->workload), "a name fits");
_Static_assert(sizeof(struct kho_timeline_mark) == 88, "this is a format");
_Static_assert(sizeof(struct kho_timeline_log) == 360768, "this is a format");
_Static_assert(sizeof(struct kho_timeline_bank) == 152 + KHO_TIMELINE_MARKS * 88, "this is a format");

/** kho_timeline_now() - read all clocks */
struct kho_timeline_time kho_timeline_now(void);
/** kho_timeline_log_valid() - is it a log that this version wrote? */
bool kho_timeline_log_valid(const struct kho_timeline_log *log);
/** kho_timeline_newest() - index of the bank of the newer kernel; -1: all are empty */
int kho_timeline_newest(const struct kho_timeline_log *log);
/**
 * kho_timeline_from_log() - make phases of marks
 * @log: valid
 * @ret: the timeline, freed with kho_timeline_free()
 * @err: error
 *
 * Return: 0, -ENODATA (no handover is recorded), -ENOMEM.
 */
int kho_timeline_from_log(const struct kho_timeline_log *log, struct kho_timeline **ret,
			  struct kho_error **err);
/** kho_timeline_read() - the same from a descriptor of a log, borrowed; also -EBADMSG, -errno */
int kho_timeline_read(struct kho *kho, int fd, struct kho_timeline **ret, struct kho_error **err);

#endif
