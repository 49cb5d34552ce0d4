/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KHOD_LOG_H
#define KHOD_LOG_H

#include <syslog.h>

/* Explained to the operator in systemd/khod.catalog; new ones by systemd-id128 new. */
#define MSG_STARTED "7d1c1cf5a3a948d9a2b3f3c6f0d1e0a1"
#define MSG_NO_LIVEUPDATE "0f8a4d3e6c5b4b0f9a44f1ad2d0c7b52"
#define MSG_SECOND "c2f6f1a0d9634b5c8d8e5f0be7a9c403"
#define MSG_REGISTERED "5b9e0a7c44d14d6fb1a57e3c2f6d8e14"
#define MSG_CLAIMED "a8d30f1be26c4f9a9c7b5e41d07f2c65"
#define MSG_RELEASED "e1742bc09f5a4f18b6de03a97c58d1f6"
#define MSG_CARRIED "3ac95d7e10f84b27a5c2f49b8e6d0a77"
#define MSG_RESTORED "47b0c95be1a64d0c9f8e62d3a05c7b18"
#define MSG_QUIESCED "c81e5f3a7d9246b8b0a4e9175f2d6c30"
#define MSG_EXPIRED "5d2c0e4b7f9a4c61b38e1d94a6f07e52"
#define MSG_INHIBITED "9d3f6a20c5e14b7f8a61d0b3e94c2f57"
#define MSG_IMAGE_REFUSES "75149c03345247a682f4310121adf0bf"
#define MSG_PREPARED "ca71718f1b8149fb86a2f7ae88e555c9"
#define MSG_NOT_PREPARED "2251daa75f894c57a3dc683876182b5c"
#define MSG_LEFT_BEHIND "3222fa556b264b69b12fd062b5ad4be8"
#define MSG_KEXEC_REFUSED "27bbfc5e4ac5420a96de4070b10f440f"
#define MSG_KEXEC_NOT_REFUSED "a7aa965fbb5b42db8a0c75e858e60838"
#define MSG_LEFT_OVER "4e11472e7bdf4986b8dd75e39c240758"
#define MSG_STOPPED "9fe2abe4267a47e79a06ba05d51fc4bd"
#define MSG_FAILED "96e3b8f4d71a4c0cbb28a5d1c90f4e88"
#define MSG_DISCARDED "b04f6c2d8e9147a3901ce7f5a26bd399"
#define MSG_REFUSED "4de18b7a9c0f4f65b35df86e12a7c0aa"
#define MSG_FOREIGN "d97a2e6bf4c14e80a7195c3b0d8ef2bb"

/**
 * log_event() - one structured message
 * @priority: LOG_INFO etc.
 * @id: MSG_*, or NULL
 * @workload: becomes KHO_WORKLOAD=; NULL: none
 * @fmt: the sentence
 *
 * Into the journal when stderr is the journal's, else to stderr. What a client sent
 * never appears in it unless it passed kho_name_valid().
 */
void log_event(int priority, const char *id, const char *workload, const char *fmt, ...)
	__attribute__((format(printf, 4, 5)));

/**
 * log_limited() - as log_event() with MSG_REFUSED, at most 10 in 10 s
 *
 * The next message that gets through says how many did not.
 */
void log_limited(const char *workload, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

#endif
