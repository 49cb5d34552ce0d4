/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_ERROR_H
#define KHO_ERROR_H

#ifdef __cplusplus
extern "C" {
#endif

/**
 * struct kho_error - why a call failed
 *
 * Every fallible function of libkho returns a negative errno and, if the caller
 * asked for it, one of these: the object it is about, one sentence, and the
 * error that caused it. Functions take it as their last argument, a pointer to
 * a NULL pointer or NULL. It is set only on failure and then owned by the
 * caller. When memory for it cannot be had it stays NULL; the returned errno is
 * always right.
 */
struct kho_error;

/**
 * kho_error_new() - make an error
 * @err: where to put it; NULL: nothing is made. What was there becomes the cause.
 * @errnum: a positive or negative errno
 * @object: name of the object it is about; NULL: none
 * @fmt: printf format of one sentence without a full stop
 *
 * Return: -|@errnum|, always.
 */
int kho_error_new(struct kho_error **err, int errnum, const char *object, const char *fmt, ...)
#if defined(__GNUC__)
	__attribute__((format(printf, 4, 5)))
#endif
	;

/**
 * kho_error_free() - free an error and its causes
 * @err: the error; NULL is allowed
 *
 * Return: NULL.
 */
struct kho_error *kho_error_free(struct kho_error *err);

/** kho_error_errno() - the positive errno of @err; 0 if @err is NULL */
int kho_error_errno(const struct kho_error *err);
/** kho_error_object() - name of the object @err is about, "" if none; owned by @err */
const char *kho_error_object(const struct kho_error *err);
/** kho_error_message() - the sentence of @err alone, "" if NULL; owned by @err */
const char *kho_error_message(const struct kho_error *err);
/** kho_error_cause() - the error that caused @err, or NULL; owned by @err */
const struct kho_error *kho_error_cause(const struct kho_error *err);

/**
 * kho_error_format() - the whole chain in one line, outermost first
 * @err: the error; NULL is allowed
 * @errnum: used when @err is NULL (an errno without an error object); else ignored
 *
 * Return: a string that the caller frees with free(), or NULL without memory.
 */
char *kho_error_format(const struct kho_error *err, int errnum);

#ifdef __cplusplus
}
#endif
#endif
