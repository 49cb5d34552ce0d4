/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What an operator types, and the example, against khod on a simulated kernel. */
#include <stdarg.h>
#include <sys/wait.h>

#include "common.h"

static struct sim *sim;
static char out[65536];

static void setup(void)
{
	sim = sim_new(true);
	must_start(sim);
}

static void teardown(void)
{
	must_stop(sim);
	sim_free(sim);
}

TestSuite(khoctl, .init = setup, .fini = teardown, .timeout = 60);

/* Runs a shell command in which K is khoctl on our socket. Return: exit status. */
__attribute__((format(printf, 1, 2)))
static int sh(const char *fmt, ...)
{
	char body[1024], cmd[2048];
	va_list ap;
	size_t n;
	FILE *f;
	int status;

	va_start(ap, fmt);
	vsnprintf(body, sizeof(body), fmt, ap);
	va_end(ap);
	snprintf(cmd, sizeof(cmd), "K() { %s --socket %s \"$@\"; }; cd %s; { %s; } 2>&1",
		 getenv("KHOCTL"), sim_socket(sim), sim_dir(sim), body);
	f = popen(cmd, "r");
	cr_assert(f);
	n = fread(out, 1, sizeof(out) - 1, f);
	out[n] = 0;
	status = pclose(f);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

#define must(code, text, ...)                                                              \
	do {                                                                               \
		int _r = sh(__VA_ARGS__);                                                  \
		cr_assert(_r == (code), "exit status %d instead of %d: %s", _r, code, out); \
		cr_assert(strstr(out, text) != NULL, "'%s' is not in: %s", text, out);     \
	} while (0)

Test(khoctl, usage)
{
	static const char *const verbs[] = { "status", "list", "show", "register", "claim",
					     "release", "preflight", "inspect", "preserve", "abort",
					     "kexec", "timeline" };

	must(0, "Usage: khoctl", "K --help");
	must(2, "Usage: khoctl", "K");
	must(2, "no verb 'frobnicate'", "K frobnicate");
	must(0, "khoctl 0.", "K --version");
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
		must(0, "Usage: khoctl", "K %s --help", verbs[i]);
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
		char text[64];

		snprintf(text, sizeof(text), "khoctl: %s: unrecognized option '--frobnicate'", verbs[i]);
		must(2, text, "K %s --frobnicate", verbs[i]);
	}
	must(2, "register what", "K register");
	must(2, "cannot be a workload's name", "K register ../x /etc/passwd");
	must(2, "either one FILE or --fd", "K register x");
	must(2, "not an open descriptor", "K register x --fd 77");
	must(2, "not an open descriptor", "K register x --fd 4294967296 < /dev/null");
	must(2, "not an open descriptor", "K register x --fd ''");
	must(2, "Usage: khoctl show", "K show");
	must(2, "Usage: khoctl inspect", "K inspect");
	must(2, "Usage: khoctl list", "K list x");
	must(2, "Usage: khoctl status", "K status x");
	must(2, "kexec takes no argument", "K kexec x");
	must(2, "need --kernel", "K kexec --initrd x");
	must(2, "-o FILE", "K claim x");
	must(2, "release which", "K release");
	must(2, "preserve takes no argument", "K preserve x");
	must(2, "abort takes no argument", "K abort x");
	must(3, "systemctl start khod.socket", "%s --socket /nonexistent/s list", getenv("KHOCTL"));
}

Test(khoctl, policies)
{
	static const char *const seconds[] = { "", "0", "-1", " 5", "5s", "4294967296" };

	must(0, "policy      must-survive; if a restore fails: quiesce",
	     "echo > f; K register vm1 f; K show vm1");
	must(0, "policy      best-effort; if a restore fails: quiesce",
	     "K register vm2 f --best-effort; K show vm2");
	must(0, "\"survival\": \"best-effort\"", "K show vm2 --json");
	must(0, "\"restore_failure\": \"quiesce\"", "K show vm1 --json");
	/* With nobody to ask all that there is to do is to say so. */
	must(0, "2 workloads preserved: the next kexec carries them.", "K preserve");
	must(0, "", "K abort");
	must(0, "held", "K list");
	must(0, "if a restore fails: release", "K register vm3 f --on-failure release; K show vm3");
	must(0, "\"restore_failure\": \"release\"", "K show vm3 --json");
	must(2, "--on-failure is quiesce or release", "K register vm4 f --on-failure keep");
	must(0, "claim       within 90 s of a handover", "K register vm4 f --claim-within 90; K show vm4");
	must(0, "\"claim_sec\": 90", "K show vm4 --json");
	must(0, "\"claim_left_sec\": 0", "K list --json");
	must(0, "interrupts may get lost", "K register vm6 f --may-lose-irq; K show vm6");
	must(0, "\"may_lose_irq\": false", "K show vm4 --json");
	for (size_t i = 0; i < sizeof(seconds) / sizeof(seconds[0]); i++)
		must(2, "--claim-within is a number of seconds", "K register vm5 f --claim-within '%s'",
		     seconds[i]);
}

Test(khoctl, owners)
{
	must(2, "there is no user 'no such'", "K claim --of 'no such' vm1 --discard");
	must(2, "there is no user '12x'", "K release --of 12x vm1");
	must(0, "held", "echo text > f; K register vm1 f");
	must(1, geteuid() == 0 ? "it belongs to uid 0" : "only root may have it as another user's",
	     "K release --of 12345 vm1");
	if (geteuid() != 0)
		return;
	must(0, "vm1 is of uid 0", "K claim --of root vm1 --keep -o -");
	must(0, "vm1: released", "K release --of 0 vm1");
}

Test(khoctl, life)
{
	must(0, "No workloads", "K list");
	must(0, "vm1: held, 1 file, 10 B", "printf 0123456789 > f; K register vm1 f");
	must(1, "vm1: the name is in use", "K register vm1 f");
	must(0, "held", "K list");
	must(0, "\"state\": \"held\"", "K list --json");
	must(0, "`-- f  memfd, 10 B, token 1", "K show vm1");
	must(0, "\"token\": 1", "K show vm1 --json");
	must(4, "no workload of that name", "K show nobody");
	must(0, "1, 10 B", "K status");
	must(0, "\"workloads\": 1", "K status --json");
	must(0, "0123456789", "K claim vm1 --keep -o -");
	must(0, "vm1 3 1", "K claim vm1 --keep -- sh -c 'echo vm1 3 $LISTEN_FDS; test $LISTEN_PID = $$'");
	must(127, "cannot be run", "K claim vm1 --keep -- /nonexistent");
	/* Nor is it lost by a slip of the finger. */
	must(2, "a command after --", "K claim vm1 vm2");
	must(127, "nothing has been claimed", "K claim vm1 -- /nonexistent");
	must(127, "nothing has been claimed", "K claim vm1 -- ./vm2");
	must(127, "nothing has been claimed", "K claim vm1 -- no-such-program");
	must(127, "nothing has been claimed", "K claim vm1 -- /etc/passwd");
	must(0, "held", "K list");
	must(1, "cannot be written", "K claim vm1 -o /nonexistent/x");
	must(0, "held", "K list");
	must(0, "0123456789f", "K claim vm1 -- sh -c 'cat <&3; echo $LISTEN_FDNAMES'");
	must(4, "no workload", "K claim vm1 -o -");
	must(0, "3 files", "python3 -c '\n"
	     "import os, sys\n"
	     "for i in range(3):\n"
	     "    fd = os.memfd_create(\"x\", 0); os.write(fd, b\"%%d\" %% i); os.dup2(fd, 10 + i)\n"
	     "os.execv(\"%s\", [\"khoctl\", \"--socket\", \"%s\", \"register\", \"vm2\", \"--fd\", \"10\",\n"
	     "  \"--fd\", \"11\", \"--fd\", \"12\", \"--fd-name\", \"a\"])'", getenv("KHOCTL"), sim_socket(sim));
	must(2, "--fd-name says which", "K claim vm2 -o -");
	must(0, "1", "K claim vm2 --keep -o - --fd-name fd11");
	must(0, "vm2: released", "K release vm2");
	must(4, "no workload", "K release vm2");
}

Test(khoctl, timeline)
{
	must(2, "takes no argument", "K timeline x");
	must(1, "recorded nothing yet", "K timeline");
	must(0, "held", "printf 0123456789 > f; K register vm1 f");
	must(1, "no handover is recorded", "K timeline --json");
}

Test(khoctl, secret)
{
	must(0, "held", "printf 0123456789abcdef > s; printf short > t; echo x > f; "
	     "K register vm1 f --secret-file s");
	must(1, "16 to 64 bytes", "K register vm2 f --secret-file t");
	must(0, "or the claim secret", "K show vm1");
	must(0, "x", "K claim vm1 -o - --secret-file s");
}

Test(khoctl, inspect)
{
	must(0, "image of workload golden", "K inspect %s/golden/image-v1", getenv("UNIT_SRC"));
	must(0, "\"boot_id\": \"01234567-", "K inspect --json %s/golden/image-v1", getenv("UNIT_SRC"));
	must(0, "golden", "K inspect --json %s/golden/image-v1 | python3 -c 'import json,sys; "
	     "print(json.load(sys.stdin)[\"workload\"][\"name\"])'", getenv("UNIT_SRC"));
	must(1, "truncated", "head -c 200 %s/golden/image-v1 > cut; K inspect cut",
	     getenv("UNIT_SRC"));
	must(1, "wrong magic", "head -c 300 /dev/zero > zero; K inspect zero");
	must(1, "nothere", "K inspect nothere");
	must(0, "policy      best-effort; if a restore fails: release", "K inspect %s/golden/image-v1-policy",
	     getenv("UNIT_SRC"));
}

Test(khoctl, preflight)
{
	(void)sh("K preflight --json | python3 -c 'import json,sys; json.load(sys.stdin)'");
	cr_assert(strcmp(out, "") == 0, "%s", out);
	must(5, "OBSTACLE  khod", "K() { %s --socket /nonexistent/s \"$@\"; }; K preflight",
	     getenv("KHOCTL"));
}

/* The real daemon on this machine's kernel: without an orchestrator it says so. */
Test(khoctl, real_khod)
{
	if (access("/dev/liveupdate", F_OK) == 0)
		cr_skip_test("this kernel has live update");
	must(0, "liveupdate=on", "unset NOTIFY_SOCKET LISTEN_FDS; mkdir -p real; "
	     "%s --socket real/s 2>log & pid=$!; for i in $(seq 100); do "
	     "test -S real/s && break; sleep 0.2; done; "
	     "%s --socket real/s status; echo x > f; %s --socket real/s register a f; r=$?; "
	     "kill $pid; wait $pid || exit 9; rm -rf real; test $r = 1", getenv("KHOD"),
	     getenv("KHOCTL"), getenv("KHOCTL"));
}

Test(khoctl, example)
{
	if (!getenv("COUNTER"))
		cr_skip_test("examples are not built");
	must(0, "1\n", "%s %s", getenv("COUNTER"), sim_socket(sim));
	must(0, "2\n", "%s %s", getenv("COUNTER"), sim_socket(sim));
	must_stop(sim);
	sim_kexec(sim);
	must_start(sim);
	must(0, "3\n", "%s %s", getenv("COUNTER"), sim_socket(sim));
}
