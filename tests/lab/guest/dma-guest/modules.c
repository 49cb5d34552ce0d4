// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * iommufd and VFIO as modules: where the next kernel finds them, or not
 *
 * Modules of the root file system are those of the share with the host, once they are put in
 * their place, and nobody but LUO asks for them in the next kernel. A second session
 * with memory alone is there in each mode, and has to come through whatever happens
 * to the other one.
 */

#include "guest.h"
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define MODULES		"/lib/modules"
#define MEMORY		"memory"
#define MEMORY_SIZE	(4u << 20)
#define ASKED		"/dev/asked-for-a-module"

/* The modules of this kernel are on its root file system from now on. */
static void put_modules(void)
{
	mkdir(MODULES, 0755);
	check(mount("/lab/modules", MODULES, NULL, MS_BIND, NULL), MODULES);
}

static void modprobe(const char *name)
{
	int status;
	pid_t pid = fork();

	check(pid, "fork");
	if (!pid) {
		execl("/sbin/modprobe", "modprobe", name, NULL);
		_exit(127);
	}
	check(waitpid(pid, &status, 0), "waitpid");
	say("%s modprobe %s: status %#x", status ? "FAIL" : "ok", name, status);
}

/*
 * Before anything else. What the initrd had to load is loaded already, and nothing is
 * to be done if all is built in.
 */
void modules_start(int stage)
{
	if (stage > 1 || strcmp(param("dma.modules", ""), "root"))
		return;
	put_modules();
	modprobe("iommufd");
	modprobe("vfio-pci");
}

static void memory_first(void)
{
	int fd = new_memfd(MEMORY, MEMORY_SIZE);
	uint32_t *p = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (p == MAP_FAILED)
		die("mmap memory");
	for (uint32_t i = 0; i < MEMORY_SIZE / sizeof(*p); i++)
		p[i] = i * 2654435761u;
	munmap(p, MEMORY_SIZE);
	create_session(MEMORY);
	must(try_preserve(fd, TOK_MEM), "preserve memory");
	close(fd);		/* the session stays open */
}

static void memory_back(void)
{
	int fd, changed = 0;
	uint32_t *p;

	retrieve_session(MEMORY);
	fd = try_retrieve(TOK_MEM);
	must(fd, "retrieve memory");
	p = mmap(NULL, MEMORY_SIZE, PROT_READ, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		die("mmap memory");
	for (uint32_t i = 0; i < MEMORY_SIZE / sizeof(*p); i++)
		changed += p[i] != i * 2654435761u;
	munmap(p, MEMORY_SIZE);
	close(fd);
	say("%s memory of the other session: %d words changed", changed ? "FAIL" : "ok", changed);
	must(try_finish(), "finish " MEMORY);
	end_session();
}

static void no_handler(const char *when)
{
	int ret = try_retrieve_session("dma");

	verdict(ret == -ENOPKG, when, ret);
}

void modules_first(void)
{
	memory_first();
}

/* With the modules in the initrd, or built in. */
void modules_waiting(void)
{
	memory_back();
}

/* Asked for twice: nothing is lost by having come too early. */
void modules_late_waiting(void)
{
	no_handler("retrieve before there are modules");
	memory_back();
	say("%s the device runs", is_master(BDF) ? "ok" : "FAIL");
	put_modules();
}

void modules_never_first(void)
{
	set_deadline(15000);
	memory_first();
}

/* Nobody can come for the device, so that it is stopped at its deadline. */
void modules_never_next(int stage)
{
	(void)stage;
	no_handler("retrieve without modules");
	memory_back();
	say("%s the device runs", is_master(BDF) ? "ok" : "FAIL");
	deadline_next(stage);
}

/* This program in the place of modprobe: it does not come back. */
void modules_hang(void)
{
	close(open(ASKED, O_CREAT | O_WRONLY, 0600));
	for (;;)
		pause();
}

/* Who waits for a module holds up neither other sessions nor, see above, the device's end. */
void modules_hang_next(int stage)
{
	pid_t child;

	must(put("/proc/sys/kernel/modprobe", "/proc/1/exe"), "modprobe");
	keep_luo();
	child = fork();
	check(child, "fork");
	if (!child)
		_exit(try_retrieve_session("dma") == -ENOPKG);
	while (access(ASKED, F_OK))
		usleep(10000);
	memory_back();
	verdict(!waitpid(child, NULL, WNOHANG), "the module is waited for", 0);
	kill(child, SIGKILL);
	check(waitpid(child, NULL, 0), "waitpid");
	deadline_next(stage);
}
