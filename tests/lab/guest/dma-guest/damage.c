// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Damage what is handed over. A device that the next kernel cannot know, or take over,
 * must not write to memory that may be free.
 */

#include "guest.h"
#include <endian.h>
#include <sys/mount.h>

/* The first property of eight bytes of KHO's device tree: where the map of memory is. */
static uint64_t find_map(const uint8_t *fdt, uint32_t size)
{
	uint32_t at = be32toh(*(uint32_t *)(fdt + 8));

	while (at + 20 <= size) {
		uint32_t token = be32toh(*(uint32_t *)(fdt + at));
		uint32_t len = be32toh(*(uint32_t *)(fdt + at + 4));
		uint64_t phys;

		if (token == 1) {		/* a node: skip its name */
			at += 4 + ((strlen((char *)fdt + at + 4) + 4) & ~3u);
		} else if (token != 3) {
			at += 4;
		} else if (len != sizeof(phys)) {
			at += 12 + ((len + 3) & ~3u);
		} else {
			memcpy(&phys, fdt + at + 12, sizeof(phys));
			return phys;
		}
	}
	errno = ENOENT;
	die("no map of memory in KHO's device tree");
	return 0;
}

static void read_fdt(uint8_t *fdt, size_t size)
{
	int fd;

	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	fd = open("/sys/kernel/debug/kho/out/fdt", O_RDONLY);
	check(read(fd, fdt, size), "KHO's FDT");
	close(fd);
}

/* The physical address of the root of KHO's map of memory, for the next kernel. */
uint64_t kho_map(void)
{
	uint8_t fdt[8192] = {};

	read_fdt(fdt, sizeof(fdt));
	return find_map(fdt, sizeof(fdt));
}

/* Every page of memory below 1 GiB that begins like KHO's FDT. */
static void damage_fdt(int mem_fd)
{
	uint8_t fdt[40];
	static const uint8_t nothing[40];
	uint8_t page[40];
	int n = 0;

	read_fdt(fdt, sizeof(fdt));
	for (off_t at = 1 << 20; at < 1 << 30; at += 4096) {
		if (pread(mem_fd, page, sizeof(page), at) != sizeof(page) ||
		    memcmp(page, fdt, sizeof(page)))
			continue;
		check(pwrite(mem_fd, nothing, sizeof(nothing), at), "damage the FDT");
		n++;
	}
	say("%s damaged the FDT: %d", n ? "ok" : "FAIL", n);
}

/* A pointer to nowhere in the root of the map. */
static void damage_map(int mem_fd, uint64_t root)
{
	uint64_t table[512];

	check(pread(mem_fd, table, sizeof(table), root), "read the map");
	for (int i = 0; i < 512; i++) {
		if (table[i])
			table[i] = 0x7ffdeadbe000ull;
	}
	check(pwrite(mem_fd, table, sizeof(table), root), "damage the map");
	say("ok damaged the map at %#llx", (unsigned long long)root);
}

/* include/linux/kho/abi/pci.h */
struct pci_liveupdate_ser {
	uint64_t devices;
	uint32_t count;
	uint32_t capacity;
};

struct pci_dev_ser {
	uint32_t domain;
	uint8_t bus, devfn, hdr_type, reserved;
	uint16_t vendor, device;
	uint32_t flags;
	uint8_t rest[40];
	uint8_t driver[32];
};

/* The records of the device and of the port above it: not the device, not valid, ... */
static void damage_records(int mem_fd, const char *what)
{
	struct pci_liveupdate_ser ser;
	struct pci_dev_ser r[46];
	int fd = open("/sys/kernel/debug/kho/out/sub_fdts/dma", O_RDONLY);
	size_t size;

	if (read(fd, &ser, sizeof(ser)) != sizeof(ser) || !ser.count || ser.count > 46)
		die("the records of PCI devices");
	size = ser.count * sizeof(r[0]);
	check(pread(mem_fd, r, size, ser.devices), "read the records");
	for (uint32_t i = 0; i < ser.count; i++) {
		bool is_bridge = r[i].flags & 1;

		if (!strcmp(what, "flags"))
			r[i].flags |= 1 << 20;
		else if (!strcmp(what, "driver") && !is_bridge)
			memset(r[i].driver, 'x', sizeof(r[i].driver));
		else if (!strcmp(what, "bridge") ? is_bridge : !strcmp(what, "vendor") && !is_bridge)
			r[i].vendor ^= 0xffff;
		else if (!strcmp(what, "slot") && !is_bridge)
			r[i].devfn = 0xff;
	}
	check(pwrite(mem_fd, r, size, ser.devices), "damage the records");
	say("ok damaged %u records", ser.count);
}

/* include/linux/kho/abi/iommu.h: one domain, of an IOMMU, with one device */
static bool is_domain(int mem_fd, uint64_t at)
{
	struct {
		uint64_t next, context;
		uint32_t kind, flags, hwpt_id, reserved;
		uint64_t pt[3], pages[2];
		uint64_t attachments, nr_attachments;
	} d;

	return at && !(at % 4096) && pread(mem_fd, &d, sizeof(d), at) == sizeof(d) &&
	       !d.next && d.kind == 2 && d.nr_attachments == 1;
}

/* One domain more than there is, in the structure that leads to it. */
static void damage_domains(int mem_fd)
{
	static const uint64_t nothing[508];
	struct {
		uint64_t domains, nr_domains, instances, nr_instances;
		uint64_t rest[508];
	} ser;
	int n = 0;

	for (off_t at = 1 << 20; at < 1 << 30; at += sizeof(ser)) {
		if (pread(mem_fd, &ser, sizeof(ser), at) != sizeof(ser) ||
		    ser.nr_domains != 1 || ser.nr_instances != 1 ||
		    memcmp(ser.rest, nothing, sizeof(nothing)) || !is_domain(mem_fd, ser.domains))
			continue;
		ser.nr_domains++;
		check(pwrite(mem_fd, &ser, sizeof(ser), at), "damage the list of domains");
		n++;
	}
	say("%s damaged the list of domains: %d", n == 1 ? "ok" : "FAIL", n);
}

/* include/linux/kho/abi/iommufd.h: a context with one HWPT, and its block of HWPTs */
struct iommufd_ctx_ser {
	uint64_t hwpts;
	uint32_t nr_hwpts, flags;
};

static bool is_context(int mem_fd, uint64_t at, const struct iommufd_ctx_ser *ser)
{
	struct {
		uint64_t next, count;
		uint64_t domain;
	} block;
	uint64_t domain[2];		/* next, context */

	return ser->hwpts && !(ser->hwpts % PAGE) && ser->nr_hwpts == 1 && !ser->flags &&
	       pread(mem_fd, &block, sizeof(block), ser->hwpts) == sizeof(block) &&
	       !block.next && block.domain && !(block.domain % PAGE) &&
	       pread(mem_fd, domain, sizeof(domain), block.domain) == sizeof(domain) &&
	       domain[1] == at;
}

/* A flag that the next kernel does not know, in the description of the context. */
static void damage_context(int mem_fd)
{
	struct iommufd_ctx_ser ser;
	int n = 0;

	for (off_t at = 1 << 20; at < 1 << 30; at += PAGE) {
		if (pread(mem_fd, &ser, sizeof(ser), at) != sizeof(ser) ||
		    !is_context(mem_fd, at, &ser))
			continue;
		ser.flags |= 1 << 20;
		check(pwrite(mem_fd, &ser, sizeof(ser), at), "damage the context");
		n++;
	}
	say("%s damaged the context: %d", n == 1 ? "ok" : "FAIL", n);
}

/*
 * include/linux/liveupdate.h: the IOMMU core's object in this kernel, under another name. It is
 * handed over by that, as by a kernel whose descriptions of domains are of another version.
 */
static void rename_domains(int mem_fd)
{
	struct {
		uint64_t ops;
		char compatible[48];
	} *flb, want = { .compatible = "iommu-v1" };
	static uint8_t page[PAGE + sizeof(*flb)];
	int n = 0;

	for (off_t at = 1 << 20; at < 1 << 30; at += PAGE) {
		if (pread(mem_fd, page, sizeof(page), at) != sizeof(page))
			continue;
		for (size_t i = 0; i < PAGE; i += sizeof(flb->ops)) {
			flb = (void *)(page + i);
			if (flb->ops >> 32 != 0xffffffff ||
			    memcmp(flb->compatible, want.compatible, sizeof(want.compatible)))
				continue;
			check(pwrite(mem_fd, "iommu-v0", 8, at + i + sizeof(flb->ops)), "rename");
			n++;
		}
	}
	/* Once more where this program has read it to. */
	say("%s renamed the domains: %d", n ? "ok" : "FAIL", n);
}

/* include/linux/kho/abi/intel_iommu.h, and the instance that leads to it */
struct vtd_unit_ser {
	uint64_t rtaddr, cap, ecap, entries;
};

struct iommu_instance_ser {
	uint64_t next, base;
	uint32_t kind, version;
	uint64_t blob, blob_size;
};

#define RTADDR_SCALABLE	(1u << 10)

/* Another root table, another mode, another unit, a list that is none. */
static void damage_unit(struct vtd_unit_ser *ser, const char *what)
{
	if (!strcmp(what, "unitroot"))
		ser->rtaddr += PAGE;
	else if (!strcmp(what, "unitmode"))
		ser->rtaddr ^= RTADDR_SCALABLE;
	else if (!strcmp(what, "unitcap"))
		ser->cap ^= 1;
	else if (!strcmp(what, "unitlist"))
		ser->entries += sizeof(uint64_t);
}

/* The next kernel does not find the unit as it is described. */
static void damage_instance(int mem_fd, const char *what)
{
	uint64_t base = unit_register("address"), cap = unit_register("cap");
	struct iommu_instance_ser instance;
	struct vtd_unit_ser ser;
	int n = 0;

	for (off_t at = 1 << 20; at < 1 << 30; at += PAGE) {
		if (pread(mem_fd, &instance, sizeof(instance), at) != sizeof(instance) ||
		    instance.next || instance.base != base || instance.kind != 1 ||
		    instance.blob_size != sizeof(ser) ||
		    pread(mem_fd, &ser, sizeof(ser), instance.blob) != sizeof(ser) ||
		    ser.cap != cap)
			continue;
		damage_unit(&ser, what);
		if (!strcmp(what, "unitversion"))
			instance.version++;
		else if (!strcmp(what, "unitbase"))
			instance.base += PAGE;
		check(pwrite(mem_fd, &ser, sizeof(ser), instance.blob), "damage the unit");
		check(pwrite(mem_fd, &instance, sizeof(instance), at), "damage the instance");
		n++;
	}
	say("%s damaged the IOMMU's description: %d", n == 1 ? "ok" : "FAIL", n);
}

/* The whole handover is damaged, not only the records of PCI devices. */
static bool all_damaged(void)
{
	return !strcmp(mode->name, "map") || !strcmp(mode->name, "fdt");
}

void damage_first(void)
{
	int fd;

	load_kernel(2, 0, param("dma.next", ""));
	create_session("dma");
	if (atoi(param("dma.memonly", "0")))
		must(try_preserve(memfd, TOK_MEM), "preserve memfd");
	else
		preserve_all();
	run_for(0.5);
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	fd = open("/dev/mem", O_RDWR);
	check(fd, "/dev/mem");
	if (!strcmp(mode->name, "domains"))
		damage_domains(fd);
	else if (!strcmp(mode->name, "context"))
		damage_context(fd);
	else if (!strcmp(mode->name, "flb"))
		rename_domains(fd);
	else if (!strncmp(mode->name, "unit", 4))
		damage_instance(fd, mode->name);
	else if (!all_damaged())
		damage_records(fd, mode->name);
	else if (!strcmp(mode->name, "fdt"))
		damage_fdt(fd);
	else
		damage_map(fd, kho_map());
	do_kexec();
	die("kexec");
}

/* Another device, with a driver of the kernel's: random bytes come by DMA. */
static void other_device(void)
{
	int fd = open("/dev/hwrng", O_RDONLY | O_NONBLOCK);
	double end = now() + 10;
	uint8_t buf[16];
	ssize_t n = -1;

	check(fd, "/dev/hwrng");
	while (n <= 0 && now() < end) {
		n = read(fd, buf, sizeof(buf));
		usleep(10000);
	}
	verdict(n > 0, "DMA of another device", n > 0 ? 0 : -errno);
	close(fd);
}

void damage_next(int stage)
{
	int ret;

	(void)stage;
	say("QUIESCED");
	if (iommu)
		other_device();
	ret = try_retrieve_session("dma");
	verdict((ret < 0) == all_damaged(), "retrieve the session", ret);
	/* No device runs any more, and nobody has lost sight of one */
	session = ret;
	if (!strcmp(mode->name, "flb"))
		verdict(try_retrieve(TOK_DEV) == -ENODEV, "a device that was stopped is not retrieved", 0);
	if (!strcmp(mode->name, "flags") || !strcmp(mode->name, "flb"))
		must(try_finish(), "finish, as all devices are stopped");
	fill_memory();
	sleep(3);
	check_filler();
	power_off();
}

/*
 * Only iommufd's own description of its context is damaged: the device goes on, and its memory
 * can be had, but nobody can be given control of it.
 */
void damage_context_next(int stage)
{
	int ret;

	(void)stage;
	retrieve_session("dma");
	memfd = try_retrieve(TOK_MEM);
	must(memfd, "retrieve memfd");
	map_mem();
	ret = try_retrieve(TOK_IOMMUFD);
	verdict(ret == -EINVAL, "retrieve the context", ret);
	dma_goes_on();
	retrieve_device();
	iommufd = open("/dev/iommu", O_RDWR);
	check(iommufd, "/dev/iommu");
	ret = try_bind();
	verdict(ret == -EINVAL, "bind to another context", ret);
	ret = try_finish();
	verdict(ret == -EBUSY, "finish with the device going on", ret);
	close(dev);
	close(iommufd);
	end_session();
	say("%s the device is stopped", is_master(BDF) ? "FAIL" : "ok");
	driver->take(false);
	driver->report();
	close(memfd);
	quiesced();
}
