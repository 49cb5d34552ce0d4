/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The devices of the simulated kernel: iommufds and VFIO devices, as far as they matter for
 * a handover. A device that runs must be attached to a page table at every moment, and
 * what the table maps must not change under it: whoever breaks that is remembered. The
 * functions of a slot are one IOMMU group: they move together, when all of them are bound.
 */
#ifndef SIM_DEVICES_H
#define SIM_DEVICES_H

#include <stdbool.h>
#include <stddef.h>
#include <linux/types.h>
#include <sys/types.h>

#include "sim-wire.h"

struct simdev;

struct simdev *simdev_new(void);
void simdev_free(struct simdev *d);

/* A new iommufd, or the VFIO device of that name below /dev/vfio/devices. Return: fd, -errno. */
int simdev_open(struct simdev *d, const char *path);
/* Our ends of everything that is open. Return: how many. */
size_t simdev_sockets(struct simdev *d, int *fds, size_t max);
/* @sock is one of these and can be read. */
void simdev_serve(struct simdev *d, int sock);

/* LUO's handlers. @member: is the file with this inode in the session already? */
bool simdev_is(struct simdev *d, int fd);
int simdev_preserve(struct simdev *d, int fd, bool (*member)(void *, ino_t), void *userdata);
void simdev_unpreserve(struct simdev *d, int fd);
int simdev_can_finish(struct simdev *d, int fd);
void simdev_abandon(struct simdev *d, int fd);
/*
 * The kernel is replaced: of the file @fd what comes out on the other side, a new descriptor.
 * Everything that is not handed over in this way is lost at simdev_kexec_end().
 */
int simdev_kexec(struct simdev *d, int fd);
void simdev_kexec_end(struct simdev *d);

/* The first rule that was broken; NULL. */
const char *simdev_violation(struct simdev *d);
/* Does the device of that name do DMA? */
bool simdev_running(struct simdev *d, const char *name);
/* "frozen", "paging", "none": what it is attached to. */
const char *simdev_attached(struct simdev *d, const char *name);
/*
 * From now on the kernel says of all devices that a VT-d unit translates for them, in that
 * mode (enum iommu_attach_info_vtd_mode), with domain ids that follow from the HWPT's.
 */
void simdev_set_vtd(struct simdev *d, __u32 mode);
/* Whether its IOMMUs replace page tables with no DMA discarded; without that no context is preserved. */
void simdev_set_hitless(struct simdev *d, bool hitless);
/*
 * How the user of a device has set up its interrupts. All but MSI-X cannot be kept pending;
 * after a kexec MSI-X is enabled still, and of the others nothing is to be seen.
 */
enum simdev_irq { SIMDEV_NONE, SIMDEV_INTX, SIMDEV_MSI, SIMDEV_MSIX };
void simdev_set_irq(struct simdev *d, const char *name, enum simdev_irq irq);
/* From now on no replace of that device is found to be equal; "*": of any; "": of none. */
void simdev_refuse_replace(struct simdev *d, const char *name);

#endif
