#!/usr/bin/env bash
# Builds the Debian package and unpacks it: its headers are those of the tree, its CMake files those that `cmake --install`
# brings, and lintian, if there, is content.
#   unpack_debian_package.sh BUILD_FOLDER FOLDER INSTALLED       FOLDER is made anew
set -euo pipefail
build=$1 folder=$2 installed=$3
sources=$(cd "$(dirname "$0")/../.." && pwd)

rm -rf "$folder"
mkdir -p "$folder"
cpack -G DEB --config "$build/CPackConfig.cmake" -B "$folder"
package=$(echo "$folder"/libfree-transformer-dev_*_all.deb)
dpkg-deb --info "$package"
dpkg-deb --extract "$package" "$folder/unpacked"

diff -r "$sources/include" "$folder/unpacked/usr/include"
diff -r "$installed/share/cmake" "$folder/unpacked/usr/share/cmake"
cmp "$sources/LICENSE" "$folder/unpacked/usr/share/doc/libfree-transformer-dev/copyright"
if grep -rlF -e "$sources" -e "$build" "$folder/unpacked"; then
  echo "The package names a folder of the machine that built it." >&2
  exit 1
fi
# Not an upload to Debian, where a bug report would have asked for the package.
! command -v lintian >/dev/null || lintian --allow-root --fail-on error,warning \
  --suppress-tags initial-upload-closes-no-bugs "$package"
