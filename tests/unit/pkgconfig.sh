#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# A program that knows of the installed library what libkho.pc says builds, and runs.
# usage: pkgconfig.sh BUILD
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
DESTDIR=$dir meson install -C "$1" --no-rebuild --quiet
pc=$(find "$dir" -name libkho.pc)
export PKG_CONFIG_LIBDIR="${pc%/*}" PKG_CONFIG_SYSROOT_DIR="$dir" PKG_CONFIG_ALLOW_SYSTEM_LIBS=1
cat >"$dir/user.c" <<'C'
#include <stdio.h>
#include <kho/kho.h>

int main(void)
{
	return puts(kho_file_kind_name(KHO_FILE_MEMFD)) < 0;
}
C
# shellcheck disable=SC2046
${CC:-cc} -Werror $(pkg-config --cflags libkho) -o "$dir/user" "$dir/user.c" $(pkg-config --libs libkho)
[ "$(LD_LIBRARY_PATH=$(pkg-config --variable=libdir libkho) "$dir/user")" = memfd ]
