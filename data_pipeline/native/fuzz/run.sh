#!/usr/bin/env bash
# Builds the fuzz target and runs it: bash data_pipeline/native/fuzz/run.sh [RUNS] [FOLDER OF MORE SEEDS …]. README.md says more.
set -euo pipefail
cd "$(dirname "$0")"
runs=${1:-1000000}
shift $(($# > 0 ? 1 : 0))
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir "$build/found"
# LIBJPEG: a libjpeg.a that was built with sanitizers and coverage; else the system's, of which only its use of the heap is watched.
clang -g -O1 -std=c11 -Wall -Wextra -ffp-contract=off ${INCLUDE:+-I"$INCLUDE"} \
  -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
  fuzz.c ../decode.c ../huffman.c ../resample.c ../resample_avx2.c "${LIBJPEG:--ljpeg}" -lm -o "$build/fuzz"
"$build/fuzz" -runs="$runs" -max_len=8192 -timeout=60 -rss_limit_mb=4096 -print_final_stats=1 \
  -artifact_prefix="$PWD/" "$build/found" corpus "$@"
