#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# catalog.sh LOG_H CATALOG: each message's id is explained once, and nothing else is.
set -eu
ids=$(sed -n 's/^#define MSG_[A-Z_]* "\([0-9a-f]\{32\}\)"$/\1/p' "$1" | sort)
explained=$(sed -n 's/^-- \([0-9a-f]\{32\}\)$/\1/p' "$2" | sort)
[ "$(echo "$ids" | wc -l)" -eq "$(grep -c '^#define MSG_' "$1")" ] || { echo "an id is malformed"; exit 1; }
[ "$(echo "$ids" | uniq -d)" = "" ] || { echo "two messages have one id"; exit 1; }
[ "$ids" = "$explained" ] || { echo "ids of $1:"; echo "$ids"; echo "explained in $2:"; echo "$explained"; exit 1; }
