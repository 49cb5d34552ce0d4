/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The phases of the last handover in both kernels, and what workloads noticed of it. */
#include <errno.h>
#include <getopt.h>

#include "khoctl.h"

static const char help[] =
	"\n"
	"What the last handover spent its time on, from the request in the old kernel to the last\n"
	"claim in the new one. For root.\n"
	"\n"
	"  --json        as JSON: times in nanoseconds since it began, null if not known\n"
	"  --svg FILE    also write it as a picture\n";

#define WIDTH 48	/* of the bars, in characters */

static double seconds(uint64_t ns)
{
	return (double)ns / 1e9;
}

static const char *time_text(uint64_t ns, char buf[32])
{
	if (ns == KHO_TIME_UNKNOWN)
		return "-";
	snprintf(buf, 32, "%.2f s", seconds(ns));
	return buf;
}

static size_t column(const struct kho_timeline *t, uint64_t ns)
{
	size_t c = t->total ? (size_t)((double)ns / (double)t->total * WIDTH) : 0;

	return c < WIDTH ? c : WIDTH - 1;
}

/* However short it is, it has its place. */
static void print_bar(const struct kho_timeline *t, const char *name, char mark,
		      const struct kho_timeline_span *spans, size_t n, uint64_t total)
{
	char bar[WIDTH + 1];

	memset(bar, ' ', WIDTH);
	bar[WIDTH] = 0;
	for (size_t i = 0; i < n; i++) {
		size_t from = column(t, spans[i].start), to = column(t, spans[i].end);

		memset(bar + from, mark, to > from ? to - from : 1);
	}
	printf("  %-24s%s %7.2f s\n", name, bar, seconds(total));
}

static void print_workloads(const struct kho_timeline *t)
{
	char stopped[32], restored[32], claimed[32], gap[32];

	if (t->n_workloads > 0)
		printf("\n  %-24s %10s %10s %10s %12s\n", "WORKLOAD", "STOPPED", "RESTORED", "CLAIMED",
		       "SERVICE GAP");
	for (size_t i = 0; i < t->n_workloads; i++) {
		const struct kho_timeline_workload *w = &t->workloads[i];

		printf("  %-24s %10s %10s %10s %12s\n", w->name, time_text(w->stopped, stopped),
		       time_text(w->restored, restored), time_text(w->claimed, claimed),
		       time_text(w->gap, gap));
	}
}

static void print_text(const struct kho_timeline *t)
{
	char buf[32];

	printf("%s to %s, from its beginning on:\n\n", t->old_release, t->new_release);
	for (size_t i = 0; i < t->n_phases; i++) {
		const struct kho_timeline_phase *p = &t->phases[i];

		print_bar(t, p->name, p->blackout ? '#' : '=', p->spans, p->n_spans, p->total);
	}
	print_workloads(t);
	printf("\n  blackout     %-10s reboot(2) to the first instruction of userspace (#)\n",
	       time_text(t->blackout, buf));
	printf("  service gap  %-10s the longest from a workload stopped to it having its files again\n",
	       time_text(t->service_gap, buf));
	if (strcmp(t->clock, "realtime") == 0)
		puts("  The time between the kernels is from the real-time clock, and about a second wrong.");
	if (strcmp(t->clock, "none") == 0)
		puts("  The time in which neither kernel had a clock is missing.");
	if (t->dropped > 0)
		printf("  %" PRIu32 " marks are missing: there were more than are kept.\n", t->dropped);
}

static void json_time(struct json *j, const char *key, uint64_t ns)
{
	if (ns == KHO_TIME_UNKNOWN)
		json_null(j, key);
	else
		json_u64(j, key, ns);
}

static void print_json(const struct kho_timeline *t)
{
	struct json j = { .f = stdout };

	json_open(&j, NULL, '{');
	json_string(&j, "old_release", t->old_release);
	json_string(&j, "new_release", t->new_release);
	json_string(&j, "clock", t->clock);
	json_time(&j, "total_ns", t->total);
	json_time(&j, "blackout_ns", t->blackout);
	json_time(&j, "service_gap_ns", t->service_gap);
	json_u64(&j, "dropped_marks", t->dropped);
	json_open(&j, "phases", '[');
	for (size_t i = 0; i < t->n_phases; i++) {
		const struct kho_timeline_phase *p = &t->phases[i];

		json_open(&j, NULL, '{');
		json_string(&j, "name", p->name);
		json_bool(&j, "blackout", p->blackout);
		json_u64(&j, "total_ns", p->total);
		json_open(&j, "spans", '[');
		for (size_t k = 0; k < p->n_spans; k++) {
			json_open(&j, NULL, '{');
			json_u64(&j, "start_ns", p->spans[k].start);
			json_u64(&j, "end_ns", p->spans[k].end);
			json_close(&j, '}');
		}
		json_close(&j, ']');
		json_close(&j, '}');
	}
	json_close(&j, ']');
	json_open(&j, "workloads", '[');
	for (size_t i = 0; i < t->n_workloads; i++) {
		const struct kho_timeline_workload *w = &t->workloads[i];

		json_open(&j, NULL, '{');
		json_string(&j, "name", w->name);
		json_time(&j, "stopped_ns", w->stopped);
		json_time(&j, "restored_ns", w->restored);
		json_time(&j, "claimed_ns", w->claimed);
		json_time(&j, "service_gap_ns", w->gap);
		json_close(&j, '}');
	}
	json_close(&j, ']');
	json_close(&j, '}');
}

/* The picture's measures, in pixels. */
enum { LEFT = 210, SCALE = 680, ROW = 26, RIGHT = 90 };

static double x_of(const struct kho_timeline *t, uint64_t ns)
{
	return LEFT + (t->total ? (double)ns / (double)t->total * SCALE : 0);
}

static void svg_row(FILE *f, const struct kho_timeline *t, size_t row, const char *name,
		    const char *colour, const struct kho_timeline_span *spans, size_t n,
		    uint64_t total)
{
	size_t y = 44 + row * ROW;
	double end = LEFT;

	fprintf(f, "<text x=\"10\" y=\"%zu\">%s</text>", y + 15, name);
	for (size_t i = 0; i < n; i++) {
		double x = x_of(t, spans[i].start), width = x_of(t, spans[i].end) - x;

		fprintf(f, "<rect x=\"%.1f\" y=\"%zu\" width=\"%.1f\" height=\"%d\" fill=\"%s\"/>", x, y,
			width < 1 ? 1 : width, ROW - 6, colour);
		end = x + width;
	}
	fprintf(f, "<text x=\"%.1f\" y=\"%zu\">%.2f s</text>\n", end + 4, y + 15, seconds(total));
}

/* Of the workloads those whose gap is known; names have no character that means anything in XML. */
static void write_svg(FILE *f, const struct kho_timeline *t)
{
	size_t rows = t->n_phases, row = 0, height;
	char blackout[32], gap[32];

	for (size_t i = 0; i < t->n_workloads; i++)
		rows += t->workloads[i].gap != KHO_TIME_UNKNOWN;
	height = 44 + (rows + 1) * ROW;
	fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%zu\" font-family=\"sans-serif\" font-size=\"13\">\n"
		"<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n"
		"<text x=\"10\" y=\"24\" font-size=\"15\">", LEFT + SCALE + RIGHT, height);
	for (const char *p = t->old_release; *p; p++)
		fputc(strchr("<>&", *p) ? '?' : *p, f);
	fputs(" to ", f);
	for (const char *p = t->new_release; *p; p++)
		fputc(strchr("<>&", *p) ? '?' : *p, f);
	fputs("</text>\n", f);
	for (size_t i = 0; i < t->n_phases; i++) {
		const struct kho_timeline_phase *p = &t->phases[i];

		svg_row(f, t, row++, p->name, p->blackout ? "#c0392b" : "#2e86c1", p->spans,
			p->n_spans, p->total);
	}
	for (size_t i = 0; i < t->n_workloads; i++) {
		const struct kho_timeline_workload *w = &t->workloads[i];
		struct kho_timeline_span s = { w->stopped, w->claimed };

		if (w->gap != KHO_TIME_UNKNOWN)
			svg_row(f, t, row++, w->name, "#7f8c8d", &s, 1, w->gap);
	}
	fprintf(f, "<text x=\"10\" y=\"%zu\">blackout (red) %s; service gap (grey, by workload) %s</text>\n</svg>\n",
		44 + row * ROW + 15, time_text(t->blackout, blackout), time_text(t->service_gap, gap));
}

static int save_svg(const char *path, const struct kho_timeline *t)
{
	FILE *f = fopen(path, "we");
	bool ok;

	if (f)
		write_svg(f, t);
	ok = f && !ferror(f);
	if ((f && fclose(f) != 0) || !ok) {
		fprintf(stderr, "khoctl: %s: cannot be written: %s\n", path, strerror(errno));
		return EXIT_REFUSED;
	}
	return EXIT_SUCCESS;
}

static int run(struct khoctl *ctl, int argc, char **argv)
{
	static const struct option options[] = {
		{ "json", no_argument, NULL, 'j' },
		{ "svg", required_argument, NULL, 's' },
		{},
	};
	struct kho_timeline *t = NULL;
	struct kho_client *client = NULL;
	struct kho_error *err = NULL;
	const char *svg = NULL;
	bool json = false;
	int c, r;

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (c == 'j')
			json = true;
		else if (c == 's')
			svg = optarg;
		else
			return EXIT_USAGE;
	}
	if (optind < argc)
		return khoctl_usage(&verb_timeline, "timeline takes no argument");
	r = khoctl_connect(ctl, &client);
	if (r > 0)
		return r;
	r = kho_client_timeline(client, &t, &err);
	kho_client_free(client);
	if (r < 0)
		return khoctl_fail(r, err);
	if (json)
		print_json(t);
	else
		print_text(t);
	r = svg ? save_svg(svg, t) : EXIT_SUCCESS;
	kho_timeline_free(t);
	return r;
}

const struct verb verb_timeline = {
	.name = "timeline",
	.args = "[--json] [--svg FILE]",
	.summary = "Show the phases of the last handover, and the service gap",
	.help = help,
	.run = run,
};
