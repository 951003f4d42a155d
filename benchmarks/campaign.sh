#!/usr/bin/env bash
# Everything that is asked of a GPU, from a plain checkout: native build, tests/gpu, the engine at 8B, kernels, launches.
#
#   benchmarks/campaign.sh [--device cuda|cpu] [--quick] [build] [tests] [engine] [kernels] [launches] [packages] [train]
#
# Without a name all parts but `packages`, other people's that are here or that the checkout brings (make carried), three
# minutes more, and `train`, whole iterations of training at 8B (bitsandbytes is wanted), four minutes more.
# At most seven minutes, two with --quick: every part is a process of its own with its own limit, and one that fails
# or runs out of time does not stop the next. Results: JSON by part, campaign.log and table.md in $OUT, or else in
# benchmarks/results/<device>/campaign. The table is printed last. Exit code 1 if a part failed.
set -u
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=. PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-$(command -v python3 || command -v python)}
device=cuda quick="" parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:?--device wants cuda or cpu}; shift 2 ;;
        --quick) quick=--quick; shift ;;
        build | tests | engine | kernels | launches | packages | train) parts+=("$1"); shift ;;
        *) echo "campaign.sh: unknown argument '$1'" >&2; sed -n '4p' "$0" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(build tests engine kernels launches)

# seconds; their sums are the campaign's. A CPU is for rehearsing and may take its time.
limit() {
    if [ "$device" = cpu ]; then echo 300; return; fi
    case $1$quick in
        build) echo 60 ;; tests) echo 90 ;; engine) echo 170 ;; kernels) echo 55 ;; launches) echo 40 ;; packages) echo 180 ;;
        train) echo 240 ;;
        build--quick) echo 32 ;; tests--quick) echo 22 ;; engine--quick) echo 34 ;;
        kernels--quick) echo 15 ;; launches--quick) echo 17 ;; packages--quick) echo 120 ;;
        train--quick) echo 60 ;;
    esac
}

if [ -z "${OUT:-}" ]; then
    OUT=$("$python" -m benchmarks.gpu_campaign folder --device "$device" $quick) || exit 2
fi
mkdir -p "$OUT" && : >"$OUT/campaign.log" || exit 2
status=0 ended=()
for part in "${parts[@]}"; do
    rm -f "$OUT/$part.json"
    threads=()
    [ "$part" = tests ] && threads=(OMP_NUM_THREADS=1)
    env "${threads[@]}" timeout --kill-after=5 "$(limit "$part")" \
        "$python" -m benchmarks.gpu_campaign "$part" --device "$device" $quick --out "$OUT" 2>>"$OUT/campaign.log"
    code=$?
    ended+=("$part=$code")
    if [ $code -ne 0 ]; then
        status=1
        echo "[$part] ended with $code; the log's last lines:"
        tail -n 15 "$OUT/campaign.log"
    fi
done
"$python" -m benchmarks.gpu_campaign table "${ended[@]}" --device "$device" $quick --out "$OUT" || status=1
exit $status
