// SPDX-License-Identifier: GPL-2.0-or-later
/* The device: its driver, its file, its BAR, its interrupts. */

#include "guest.h"
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>

volatile uint8_t *bar;
int dev = -1;
uint32_t dev_id;
int irqfd[MAX_VECTORS];
unsigned int irqs;

static size_t bar_size;

uint32_t rd(int reg)
{
	return *(volatile uint32_t *)(bar + reg);
}

void wr(int reg, uint32_t val)
{
	*(volatile uint32_t *)(bar + reg) = val;
}

void bind_vfio_pci(const char *bdf)
{
	char path[128];

	snprintf(path, sizeof(path), PCI_DEVICE "%s/driver/unbind", bdf);
	put(path, bdf);			/* there may be no driver */
	snprintf(path, sizeof(path), PCI_DEVICE "%s/driver_override", bdf);
	must(put(path, "vfio-pci"), "driver_override");
	must(put("/sys/bus/pci/drivers_probe", bdf), "drivers_probe");
}

void show_driver(void)
{
	char link[256] = "none";
	ssize_t n = readlink(PCI_DEVICE BDF "/driver", link, sizeof(link) - 1);

	if (n > 0)
		link[n] = 0;
	say("driver %s", strrchr(link, '/') ? strrchr(link, '/') + 1 : link);
}

int open_dev(int nr)
{
	char path[64];

	snprintf(path, sizeof(path), "/dev/vfio/devices/%svfio%d",
		 iommu ? "" : "noiommu-", nr);
	return open(path, O_RDWR);
}

/* The id of the device in the context, or a negative errno. */
int bind_dev(int fd, int ctx)
{
	struct vfio_device_bind_iommufd bind = {
		.argsz = sizeof(bind), .iommufd = ctx,
	};

	return ioctl(fd, VFIO_DEVICE_BIND_IOMMUFD, &bind) ? -errno : (int)bind.out_devid;
}

/* A virtual function, by the token that its physical function @pf has got. */
int bind_vf(int fd, int ctx, int pf)
{
	static const uint8_t token[16] = "khod-dma-guest";
	char buf[sizeof(struct vfio_device_feature) + sizeof(token)];
	struct vfio_device_feature *f = (void *)buf;
	struct vfio_device_bind_iommufd bind = {
		.argsz = sizeof(bind), .iommufd = ctx,
		.flags = VFIO_DEVICE_BIND_FLAG_TOKEN, .token_uuid_ptr = (uintptr_t)token,
	};

	*f = (struct vfio_device_feature) {
		.argsz = sizeof(buf),
		.flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_PCI_VF_TOKEN,
	};
	memcpy(f->data, token, sizeof(token));
	check(ioctl(pf, VFIO_DEVICE_FEATURE, f), "VF token");
	return ioctl(fd, VFIO_DEVICE_BIND_IOMMUFD, &bind) ? -errno : (int)bind.out_devid;
}

int try_bind(void)
{
	int ret = bind_dev(dev, iommufd);

	if (ret >= 0)
		dev_id = ret;
	return ret;
}

int attach_dev(int fd, uint32_t pt)
{
	struct vfio_device_attach_iommufd_pt attach = {
		.argsz = sizeof(attach), .pt_id = pt,
	};

	return ioctl(fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach) ? -errno : 0;
}

int try_attach(uint32_t id)
{
	return attach_dev(dev, id);
}

int try_detach(int fd)
{
	struct vfio_device_detach_iommufd_pt detach = { .argsz = sizeof(detach) };

	return ioctl(fd, VFIO_DEVICE_DETACH_IOMMUFD_PT, &detach) ? -errno : 0;
}

static struct vfio_region_info region(int fd, uint32_t index)
{
	struct vfio_region_info info = { .argsz = sizeof(info), .index = index };

	check(ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &info), "REGION_INFO");
	return info;
}

static int try_map_bar(void)
{
	struct vfio_region_info info = region(dev, VFIO_PCI_BAR0_REGION_INDEX);

	bar_size = info.size;
	bar = mmap(NULL, bar_size, PROT_READ | PROT_WRITE, MAP_SHARED, dev, info.offset);
	return bar == MAP_FAILED ? -errno : 0;
}

void map_bar(void)
{
	must(try_map_bar(), "mmap BAR 0");
}

bool can_map_bar(void)
{
	if (try_map_bar() < 0)
		return false;
	unmap_bar();
	return true;
}

void unmap_bar(void)
{
	munmap((void *)bar, bar_size);
	bar = NULL;
}

void bus_master(int fd)
{
	struct vfio_region_info info = region(fd, VFIO_PCI_CONFIG_REGION_INDEX);
	uint16_t cmd;

	check(pread(fd, &cmd, 2, info.offset + 4), "read command");
	cmd |= 6;
	check(pwrite(fd, &cmd, 2, info.offset + 4), "write command");
}

bool is_master(const char *bdf)
{
	char path[128];
	uint16_t cmd;
	int fd;

	snprintf(path, sizeof(path), PCI_DEVICE "%s/config", bdf);
	fd = open(path, O_RDONLY);
	check(fd, path);
	check(pread(fd, &cmd, sizeof(cmd), 4), path);
	close(fd);
	return cmd & 4;
}

/*
 * A write to a register that nobody can write to: QEMU's trace has it in order with the others, so
 * that the host can tell what came before the device was bound, and what after.
 */
void mark_trace(void)
{
	const uint16_t mark = 0xb0d0;
	int fd = open(PCI_DEVICE "0000:00:00.0/config", O_WRONLY);

	check(fd, "host bridge");
	check(pwrite(fd, &mark, sizeof(mark), PCI_VENDOR_ID), "mark");
	close(fd);
}

/* Where the capability @id is in the configuration space at @base of @fd. */
static off_t find_capability(int fd, off_t base, uint8_t id)
{
	uint8_t cap[2];		/* what it is, and where the next one is */

	check(pread(fd, &cap[1], 1, base + PCI_CAPABILITY_LIST), "read capabilities");
	while (cap[1]) {
		off_t at = base + cap[1];

		check(pread(fd, cap, sizeof(cap), at), "read capability");
		if (cap[0] == id)
			return at;
	}
	errno = ENODEV;
	die("capability");
}

/*
 * Ask the device for D3hot, by VFIO if it is open, which may refuse it, else by sysfs, which writes
 * without an error in any case: what came of it is in the device.
 */
bool goes_to_d3hot(void)
{
	int config = open(PCI_DEVICE BDF "/config", O_RDWR), fd = dev < 0 ? config : dev;
	off_t base = dev < 0 ? 0 : region(dev, VFIO_PCI_CONFIG_REGION_INDEX).offset, at;
	uint16_t ctrl;

	check(config, "config");
	at = find_capability(fd, base, PCI_CAP_ID_PM) + PCI_PM_CTRL;
	check(pread(fd, &ctrl, sizeof(ctrl), at), "read power state");
	ctrl |= PCI_PM_CTRL_STATE_MASK;
	if (pwrite(fd, &ctrl, sizeof(ctrl), at) < 0 && errno != EBUSY)
		die("write power state");
	check(pread(config, &ctrl, sizeof(ctrl), at - base), "read power state");
	close(config);
	return ctrl & PCI_PM_CTRL_STATE_MASK;
}

static off_t find_express(void)
{
	return find_capability(dev, region(dev, VFIO_PCI_CONFIG_REGION_INDEX).offset, PCI_CAP_ID_EXP);
}

bool has_flr(void)
{
	off_t at = find_express();
	uint32_t cap;

	check(pread(dev, &cap, sizeof(cap), at + PCI_EXP_DEVCAP), "device capabilities");
	return cap & PCI_EXP_DEVCAP_FLR;
}

/* As a VMM does for its guest. */
int try_flr(void)
{
	off_t at = find_express();
	uint16_t ctrl;

	check(pread(dev, &ctrl, sizeof(ctrl), at + PCI_EXP_DEVCTL), "device control");
	ctrl |= PCI_EXP_DEVCTL_BCR_FLR;
	return pwrite(dev, &ctrl, sizeof(ctrl), at + PCI_EXP_DEVCTL) < 0 ? -errno : 0;
}

/* Not while it is frozen. */
bool can_read_config(void)
{
	static off_t config;
	uint16_t id;

	if (!config)
		config = region(dev, VFIO_PCI_CONFIG_REGION_INDEX).offset;
	return pread(dev, &id, sizeof(id), config) == sizeof(id);
}

/* Return: an eventfd, by which @val comes into the register. */
int write_by_eventfd(int reg, uint32_t val)
{
	struct vfio_device_ioeventfd io = {
		.argsz = sizeof(io), .flags = VFIO_DEVICE_IOEVENTFD_32, .data = val,
		.offset = region(dev, VFIO_PCI_BAR0_REGION_INDEX).offset + reg, .fd = eventfd(0, 0),
	};

	check(io.fd, "eventfd");
	check(ioctl(dev, VFIO_DEVICE_IOEVENTFD, &io), "IOEVENTFD");
	return io.fd;
}

/* Of all devices on its bus, or in its slot, by the owner of one of them. */
int try_hot_reset(int fd)
{
	struct vfio_pci_hot_reset reset = { .argsz = sizeof(reset) };

	return ioctl(fd, VFIO_DEVICE_PCI_HOT_RESET, &reset) ? -errno : 0;
}

static int try_set_irqs(int fd, uint32_t index, const int *efd, unsigned int nr)
{
	char buf[sizeof(struct vfio_irq_set) + MAX_VECTORS * sizeof(int)];
	struct vfio_irq_set *set = (void *)buf;

	*set = (struct vfio_irq_set) {
		.argsz = sizeof(*set) + nr * sizeof(int),
		.flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
		.index = index,
		.count = nr,
	};
	memcpy(set->data, efd, nr * sizeof(int));
	return ioctl(fd, VFIO_DEVICE_SET_IRQS, set) ? -errno : 0;
}

static void make_eventfds(int *efd, unsigned int nr)
{
	for (unsigned int i = 0; i < nr; i++) {
		efd[i] = eventfd(0, EFD_NONBLOCK);
		check(efd[i], "eventfd");
	}
}

/* One of the vectors cannot be had, when those before it can: its eventfd is none. */
void fail_to_set_irqs(void)
{
	unsigned int nr = driver->vectors;
	int efd[MAX_VECTORS], ret;

	make_eventfds(efd, nr);
	close(efd[nr - 1]);
	ret = try_set_irqs(dev, VFIO_PCI_MSIX_IRQ_INDEX, efd, nr);
	verdict(ret == -EBADF, "setting the vectors up fails", ret);
	for (unsigned int i = 0; i < nr - 1; i++)
		close(efd[i]);
}

/* One vector, and then none: to have more of them MSI-X has to be turned off. */
void set_few_irqs(void)
{
	struct vfio_irq_set none = {
		.argsz = sizeof(none),
		.flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER,
		.index = VFIO_PCI_MSIX_IRQ_INDEX,
	};
	int efd;

	make_eventfds(&efd, 1);
	must(try_set_irqs(dev, VFIO_PCI_MSIX_IRQ_INDEX, &efd, 1), "SET_IRQS of one");
	check(ioctl(dev, VFIO_DEVICE_SET_IRQS, &none), "SET_IRQS of none");
	close(efd);
}

/* An eventfd for each of @nr vectors; of the device under test they are irqfd[]. */
void set_irqs(int fd, uint32_t index, unsigned int nr)
{
	int efd[MAX_VECTORS];

	make_eventfds(efd, nr);
	must(try_set_irqs(fd, index, efd, nr), "SET_IRQS");
	if (fd != dev)
		return;
	memcpy(irqfd, efd, nr * sizeof(int));
	irqs = nr;
}

uint64_t irq_count(unsigned int vector)
{
	uint64_t n = 0;

	if (read(irqfd[vector], &n, sizeof(n)) != sizeof(n))
		return 0;
	return n;
}
