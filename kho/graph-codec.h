/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_GRAPH_CODEC_H
#define KHO_GRAPH_CODEC_H

#include <kho/graph.h>

#include "image.pb-c.h"

/*
 * Graph to message. What @m points to afterwards is freed with kho_graph_message_free(),
 * also on error. The graph must have passed kho_graph_check(), and outlive the message.
 */
int kho_graph_to_message(const struct kho_graph *graph, Kho__Image__Image *m,
			 struct kho_error **err);
void kho_graph_message_free(Kho__Image__Image *m);

/* Message to graph, checked. @ret is untouched on error. */
int kho_graph_from_message(const Kho__Image__Image *m, struct kho_graph **ret,
			   struct kho_error **err);

#endif
