#!/bin/sh
# Makes DIR for versus_llama.py, versus_batched.py and versus_server.py: llama.cpp built for this machine (from the source inside
# llama-cpp-python's sdist), a full-size Qwen-1.8B of random weights, and the same weights as GGUF. Needs cmake, a
# compiler, 11 GB of disk, 20 minutes.
set -eu
dir=${1:?usage: benchmarks/peer_llama.sh DIR}
python=${PYTHON:-python}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$dir"
cd "$dir"
[ -d model ] || "$python" -m qwenlet random model --like qwen-1.8b --seed 0
# a server speaks text
if [ ! -f model/qwen.tiktoken ]; then
  PYTHON="$python" "$here/../scripts/fetch-test-data"
  cp "${QWENLET_TEST_DATA:-$HOME/.cache/qwenlet-test-data}/qwen.tiktoken" model/
fi
tools="llama-bench llama-batched-bench llama-perplexity llama-quantize llama-server"
missing=
for tool in $tools; do [ -x "$tool" ] || missing=$tool; done
if [ -n "$missing" ]; then
  [ -d source ] || {
    "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest source.part llama-cpp-python
    tar -xzf source.part/llama_cpp_python-*.tar.gz -C source.part
    mv source.part source
  }
  # its AMX product crashes with gcc 12 (0c1e570, in ggml_backend_amx_mul_mat); AVX-512 VNNI is what is left
  flags=
  grep -qw amx_int8 /proc/cpuinfo 2>/dev/null && flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
  cmake -S source/llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" \
    -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=ON
  cmake --build build -j "$(nproc)" --target $tools
  for tool in $tools; do ln -sf "build/bin/$tool" "$tool"; done
fi
# a && inside a || would hide a failure from set -e
if [ ! -f f16.gguf ]; then
  "$python" "$here/peer_gguf.py" model f16.part.gguf
  mv f16.part.gguf f16.gguf
fi
for type in Q4_0 Q8_0; do
  file=$(echo "$type" | tr Q q).gguf
  if [ ! -f "$file" ]; then
    ./llama-quantize f16.gguf "$file.part" "$type"
    mv "$file.part" "$file"
  fi
done
