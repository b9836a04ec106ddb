#!/usr/bin/env bash
# Build the fuzz target and run it: bash data_pipeline/native/fuzz/run.sh [RUNS] [FOLDER OF MORE SEEDS …].
set -euo pipefail
cd "$(dirname "$0")"
runs=${1:-1000000}
shift $(($# > 0 ? 1 : 0))
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir "$build/found"
# LIBJPEG: a libjpeg.a that was built with sanitizers and coverage. Else the system's, whose heap use alone is checked.
flags=(-g -O2 -std=c11 -Wall -Wextra -ffp-contract=off ${INCLUDE:+-I"$INCLUDE"} -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all)
# No branch of the resampling depends on pixels, so tracing its comparisons would only cost time.
for name in resample resample_avx2; do
  clang "${flags[@]}" -fno-sanitize-coverage=trace-cmp -c "../$name.c" -o "$build/$name.o"
done
clang "${flags[@]}" fuzz.c ../decode.c ../huffman.c "$build"/*.o "${LIBJPEG:--ljpeg}" -lm -o "$build/fuzz"
"$build/fuzz" -runs="$runs" -max_len=8192 -timeout=60 -rss_limit_mb=4096 -print_final_stats=1 \
  -artifact_prefix="$PWD/" "$build/found" corpus "$@"
