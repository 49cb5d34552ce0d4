#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# What the library exports is what its version script lists, no more and no less.
# usage: symbols.sh LIBRARY MAP
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
nm -D --defined-only "$1" | sed -n 's/.* [A-Z] \(kho[a-z0-9_]*\)@@\{0,1\}LIBKHO_[0-9]*$/\1/p' | sort >"$dir/exported"
nm -D --defined-only "$1" | grep -v ' A ' | wc -l >"$dir/n"
sed -n 's/^[[:space:]]*\(kho_[a-z0-9_]*\);$/\1/p' "$2" | sort >"$dir/listed"
diff -u "$dir/listed" "$dir/exported"
[ "$(wc -l <"$dir/exported")" -eq "$(cat "$dir/n")" ] || {
	echo "symbols are exported without a version"
	exit 1
}
echo "$(wc -l <"$dir/listed") symbols"
