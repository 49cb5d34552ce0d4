/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KHO_KHO_H
#define KHO_KHO_H

#include <kho/client.h>
#include <kho/error.h>
#include <kho/graph.h>
#include <kho/image.h>
#include <kho/iommufd.h>
#include <kho/luo.h>
#include <kho/ops.h>
#include <kho/restore.h>
#include <kho/snapshot.h>
#include <kho/timeline.h>
#include <kho/vfio.h>

#endif
