#!/usr/bin/env bash
# All that a GPU is asked, in parts that can be taken up again, less than ten minutes at a time:
#
#   benchmarks/gpu_session.sh FOLDER [--graded] [--wheel FILE] [--commit HASH] [--seconds 570] [--steps 0] [--dry-run]
#       [PART ...]
#
#   1 tests            native and Triton kernels, by tests/gpu/from_wheel.sh
#   2 tune             tables of configurations, in FOLDER/tuned and then in lowrank_ops/ops/tuned, so that what follows
#                      measures what will ship; with --steps 0 chosen from what ships, which takes minutes, with more by
#                      a search, which takes minutes for every shape
#   3 covariance       covariance updates and their convolution form beside the alternatives
#   4 lowrank_linear   layers beside the alternatives
#   5 model            whole models and their calibration
#   6 grade            the results against the targets
#
# --graded is for a GPU that is there for minutes: of 2 to 5 only what the targets speak of, with shorter timings; tests
# and tuner leave time to the suites; and what has to be compiled is, on all cores, while the tests run.
#
# Everything is written to FOLDER as it is measured: a kill loses one case. Call it again with the same FOLDER as long as
# its exit code is 3: there is more to do. 0: all parts are done; 1: they are, and some of them failed, each tried twice,
# or were given up: killed by a signal or by the time, or left unfinished, three times in a row without one more result.
# A FOLDER is for one kind of GPU, and a call for at least 180 seconds. Where the machine is a bare one in each call, copy
# what came back into its FOLDER first. A PART that is named runs though it was done or given up. FOLDER/N-PART.code
# keeps how a part ended: 0, or one line per failure; N-PART.cut the ends without a result, a line each. --dry-run shows
# what each part would do and needs no GPU. Run it in a checkout with the python3 whose torch sees the GPU.
set -uo pipefail
self=$(realpath "$0")

usage() { sed -n '2,/^set/p' "$self" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }

parts=(tests tune covariance lowrank_linear model grade)
folder='' wheel='' commit='' total=570 steps=0 dry=false graded=false named=()
while [ $# -gt 0 ]; do
  case $1 in --wheel | --commit | --seconds | --steps) [ $# -ge 2 ] || usage ;; esac
  case $1 in
    --wheel) wheel=$2; shift ;;
    --commit) commit=$2; shift ;;
    --seconds) total=$2; shift ;;
    --steps) steps=$2; shift ;;
    --dry-run) dry=true ;;
    --graded) graded=true ;;
    -*) usage ;;
    *) if [ -z "$folder" ]; then folder=$1; else named+=("$1"); fi ;;
  esac
  shift
done
[ -n "$folder" ] && [ "$total" -ge 180 ] || usage
for part in ${named[@]+"${named[@]}"}; do
  [[ " ${parts[*]} " == *" $part "* ]] || usage
done

python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(realpath "$folder")
[ -z "$wheel" ] || wheel=$(realpath "$wheel")  # as the caller names it, from where the caller is
cd "$(dirname "$self")/.."
results=$folder/results.json
[ -n "$commit" ] || commit=$(git rev-parse --short=12 HEAD 2>/dev/null) || commit=
as=(); [ -z "$commit" ] || as=(--commit "$commit")
if [ -z "$wheel" ]; then
  wheels=(dist/lowrank_ops-*.whl)
  [ -e "${wheels[0]}" ] && wheel=${wheels[0]}
fi
if ! $dry; then
  if ! device=$("$python" -c 'import torch; torch.cuda.is_available() or exit(1); print(torch.cuda.get_device_name())')
  then
    echo "$python sees no CUDA device; --dry-run shows what would be done" >&2
    exit 2
  fi
  [ -e "$folder/device" ] || echo "$device" > "$folder/device"
  if [ "$(cat "$folder/device")" != "$device" ]; then  # where machines alternate, suites would start anew in every call
    echo "$folder has results of $(cat "$folder/device"), which those of $device would replace: name another folder" >&2
    exit 2
  fi
fi

# A part that failed is tried once more: the next call has another process, often another machine.
done_before() { [ -e "$1" ] && { [ "$(tail -n 1 "$1")" = 0 ] || [ "$(wc -l < "$1")" -ge 2 ]; }; }

# A part that is cut short goes on in the next call, but not for ever where it never gets any further.
most_cuts=3
given_up() { [ -e "$1" ] && [ "$(wc -l < "$1")" -ge $most_cuts ]; }
cuts() { paste -sd ' ' "$1"; }

# Grows with every case and shape that is measured, and where one that had failed gets its time.
results_so_far() {
  cat "$results" "$folder"/tuning/*.json 2>/dev/null | grep -cE '"(arm|tokens)":|"median_us": [0-9]'
}

left() { echo $((total - SECONDS)); }

# In the background, once; whoever measures waits for its end, and it does not outlive this script.
warming=''
trap '[ -z "$warming" ] || kill "$warming" 2>/dev/null' EXIT
warm() {
  local limit=$((total * 40 / 100))
  take_library
  timeout --kill-after=10 "$limit" "$python" -m benchmarks.warm --seconds $((limit - 15)) > "$folder/warm.log" 2>&1 &
  warming=$!
}
warmed() {
  [ -n "$warming" ] || return 0
  wait "$warming"
  echo "== warming ended with exit code $?: $(tail -n 1 "$folder/warm.log")"
  warming=''
}

# Chosen here or in an earlier call.
take_tables() {
  compgen -G "$folder/tuned/*.json" > /dev/null || return 0
  mkdir -p lowrank_ops/ops/tuned
  cp "$folder"/tuned/*.json lowrank_ops/ops/tuned
}

# The native library of the wheel, where this checkout has none: what is measured are the checkout's own sources.
take_library() {
  [ -n "$wheel" ] && [ ! -e lowrank_ops/liblowrank_ops.so ] || return 0
  "$python" - "$wheel" <<'EOF'
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
for name in wheel.namelist():
    if name == "lowrank_ops/liblowrank_ops.so":
        wheel.extract(name)
EOF
}

# Sets ``command`` and the seconds that it may take; the last case that a suite begins may take a minute, with compiling,
# half of that where it was compiled before. The seconds are the part's share of what is left, unless given.
prepare() {
  local last=60
  limit=$(left)
  local measure=() search=() only=()
  if $graded; then
    last=30 only=(--graded) measure=(--graded --seconds 0.3) search=(--graded --seconds 0.15)
    case $1 in tests) limit=$((limit * 40 / 100)) ;; tune) limit=$((limit * 60 / 100)) ;; esac
  fi
  limit=${2:-$limit}
  local budget=$((limit - last))
  case $1 in
    tests)
      if [ -z "$wheel" ]; then
        echo "no wheel (make wheel builds one, where nvcc is): the tests of this checkout, its CUDA kernels if they are built"
        command=("$python" -m pytest -m gpu tests/gpu)
      else command=(tests/gpu/from_wheel.sh "$wheel" $((limit - 15))); fi
      if $dry; then command=(echo "would run ${command[*]}"); fi ;;
    tune)
      command=("$python" -m benchmarks.tune --budget "$budget" --steps "$steps" "${as[@]}" "${search[@]}")
      command+=(--progress "$folder/tuning" --tables "$folder/tuned")
      if $dry; then command=("$python" -m benchmarks.tune --dry-run "${only[@]}"); else take_library; fi ;;
    covariance | lowrank_linear | model)
      command=("$python" -m "benchmarks.bench_$1" --out "$results" --resume --budget "$budget" "${as[@]}" "${measure[@]}")
      if $dry; then command=("$python" -m "benchmarks.bench_$1" --dry-run "${only[@]}"); else take_library; take_tables; fi ;;
    grade)
      limit=60
      [ -e "$results" ] || echo '{"suites": {}}' > "$results"
      command=("$python" -m benchmarks.grade "$results") ;;
  esac
}

unfinished=false failed=() begun=false
order=("${!parts[@]}")
if [ -e "$folder/1-tests.code" ]; then order=(1 2 3 4 0 5); fi  # a second try waits for what has had none
for number in "${order[@]}"; do
  part=${parts[$number]}
  code=$folder/$((number + 1))-$part.code
  # What was asked of the graded shapes alone is still to be asked of all.
  if $graded && [[ $part != tests && $part != grade ]]; then code=${code%.code}.graded.code; fi
  cut=${code%.code}.cut
  if [ ${#named[@]} -gt 0 ]; then
    [[ " ${named[*]} " == *" $part "* ]] || continue
    if ! $dry && given_up "$cut"; then rm "$cut"; fi
  elif ! $dry && [ "$part" != grade ] && given_up "$cut"; then
    echo "== $part: given up before, after these ends without a result: $(cuts "$cut")"
    failed+=("$part")
    continue
  elif ! $dry && [ "$part" != grade ] && done_before "$code"; then
    ended=$(tail -n 1 "$code")
    echo "== $part: done before, with exit code $ended"
    [ "$ended" = 0 ] || failed+=("$part")
    continue
  fi
  least=120
  if $graded && [[ $part != tests && $part != tune ]]; then least=60; fi
  if ! $dry && [ "$part" != grade ] && [ "$(left)" -lt $least ]; then
    echo "== $part: $(left) s are left, too few to begin"
    unfinished=true
    continue
  fi
  if $graded && ! $dry && [ "$part" != grade ]; then
    $begun || warm
    begun=true
    if [ "$part" != tests ]; then warmed; fi
  fi
  prepare "$part"
  before=$(results_so_far) end=$((SECONDS + limit)) again=true first=true
  while $again; do
    echo "== $part, at most $limit s"
    began=$SECONDS found=$(results_so_far)
    timeout --kill-after=10 "$limit" "${command[@]}" 2>&1 | tee -a "$folder/$part.log"
    ended=${PIPESTATUS[0]}
    echo "== $part ended with exit code $ended after $((SECONDS - began)) s"
    # Before its time a process ends where the device gives it nothing more; another one goes on, and where it broke at
    # the first shape of one op, with the next op.
    again=false
    if [ "$ended" = 3 ] && [ $((end - SECONDS)) -ge $least ]; then
      if [ "$(results_so_far)" -gt "$found" ] || { [ "$part" = tune ] && $first; }; then
        again=true first=false
        prepare "$part" $((end - SECONDS))
      fi
    fi
  done
  if $dry; then continue; fi
  if [ "$ended" != 0 ] && [ -e "$code" ] && [ "$(tail -n 1 "$code")" = 0 ]; then rm "$code"; fi  # it has passed before
  if [ "$ended" = 3 ] || [ "$ended" = 124 ] || [ "$ended" -gt 128 ]; then  # the budget, the time, or a signal
    if [ "$(results_so_far)" -gt "$before" ]; then rm -f "$cut"; else echo "$ended" >> "$cut"; fi
    if given_up "$cut"; then
      echo "== $part: given up, after these ends without a result: $(cuts "$cut"); to try again, name it"
      failed+=("$part")
    else unfinished=true; fi
    continue
  fi
  rm -f "$cut"
  case $ended in
    0) echo 0 > "$code" ;;
    *)
      echo "$ended" >> "$code"
      if [ "$part" = grade ] && [ "$ended" = 4 ]; then continue; fi  # targets missed: a result like others
      if done_before "$code"; then failed+=("$part"); else unfinished=true; fi ;;
  esac
done
if $unfinished; then
  echo "== there is more to do: call again with the same folder"
  exit 3
fi
echo "== all parts that were asked for are done; how each ended: $folder/*.code, *.cut"
if [ ${#failed[@]} -gt 0 ]; then
  echo "== failed: ${failed[*]}; see $folder/*.log"
  exit 1
fi
