#!/usr/bin/env bash
# Builds llama-server from the llama.cpp that travels in the source package of llama-cpp-python: about six minutes on two
# cores. What is built stays, so later calls cost nothing.
#
#   build_llama_server.sh PYTHON FOLDER
#
# PYTHON has pip, cmake and ninja, and the llama-cpp-python whose version is taken. FOLDER gets `source/`, which is
# llama.cpp with its converter, and `cmake/bin/llama-server`.
set -euo pipefail
python=$1
folder=$2
PATH="$(dirname "$python"):$PATH"
version=$("$python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))')
stamp="$folder/built-$version"
test -e "$stamp" && exit 0

rm -rf "$folder"
mkdir -p "$folder/download"
"$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$folder/download" \
  "llama-cpp-python==$version"
tar --extract --gzip --file "$folder/download/"*.tar.gz --directory "$folder/download"
mv "$folder/download/"*/vendor/llama.cpp "$folder/source"
rm -r "$folder/download"

# Its page in the browser would be downloaded; nobody looks at it here.
cmake -S "$folder/source" -B "$folder/cmake" -G Ninja \
  -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
cmake --build "$folder/cmake" --target llama-server
touch "$stamp"
