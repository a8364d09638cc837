#!/usr/bin/env bash
# The one command of this repository. `./run.sh --help` lists what it does.
# Written for bash 3.2 (macOS) and later. Notes go to stderr, so `./run.sh config > file` stays clean.
set -euo pipefail

help() {
    cat <<'EOF'
usage: ./run.sh [COMMAND] [ARGUMENTS]          (works from any directory)

  train [key=value...]   train, export the artifact, score it, draw the plot; the default command
                           ./run.sh train seed=42 run_id=first
                           ./run.sh                     everything chosen for this machine
  eval ARTIFACT [key=value...]
                         score an artifact from its file       ./run.sh eval logs/first.int6.xz
  audit ARTIFACT [--script PATH] [key=value...]
                         is the score legal? nine tests        ./run.sh audit logs/first.int6.xz
  config [key=value...]  print the resolved configuration      ./run.sh config preset=record
  bench [--json FILE] [--sustain SECONDS] [key=value...]
                         time the step and its sections        ./run.sh bench --json bench.json
  bench --candidates FILE.py [--only NAME,NAME] [--all] [--json FILE] [key=value...]
                         replacements against plain lines      ./run.sh bench --candidates tools/lab/candidates.py
  bench --timeline FILE.json [--steps N] [--json FILE] [key=value...]
                         compute, communication, exposed       NPROC=8 ./run.sh bench --timeline t.json
  bench --attention [--paths NAME,NAME] [--json FILE] [key=value...]
                         every attention on several masks      ./run.sh bench --attention --paths flex
  data VERB              get or make training data             ./run.sh data --help
  record VERB            make, check and list records          ./run.sh record verify
                         compare many settings fairly          ./run.sh record sweep --help
  test [pytest args]     run the tests                         ./run.sh test -k style

The first use makes .venv and installs requirements.txt into it (once: again only when that file changes), and
requirements-flash4.txt where a GPU is a Hopper or later.
Unless told, train chooses (eval and audit its data and preset, bench and config their preset, in the same way):
  data_path=   what `data/prepare.py auto` finds or makes
  preset=      8 NVIDIA GPUs or more: record (8 processes);  1 or more: h100x1 (1 process);  none: cpu
  run_id=      time, preset and seed; names the log and the artifact in out_dir= (logs)
Any key=value may also be an environment variable in capitals: SEED=42 ./run.sh

environment: NPROC            number of processes for train, eval, audit and bench
             PYTHON           interpreter that makes .venv (3.10 to 3.14)
             BANKSHOT_PYTHON  interpreter to use as it is: no .venv, nothing is installed
EOF
}

say() { printf '[run.sh %ds] %s\n' "$SECONDS" "$*" >&2; }
die() { printf 'run.sh: %s\n' "$*" >&2; exit 2; }

caller=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv
py=

# A path that the caller gave is relative to where the caller stands; the trainer runs in the root.
absolute() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        *) if [ "$caller" = "$root" ]; then printf '%s\n' "$1"; else printf '%s\n' "$caller/$1"; fi ;;
    esac
}

needs() { [ -f "$root/$1" ] || die "$1 is missing from $root: get a complete copy of the repository"; }

# ----------------------------------------------------------------------------- the interpreter

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
supported() { case $1 in 3.10 | 3.11 | 3.12 | 3.13 | 3.14) return 0 ;; *) return 1 ;; esac; }

find_python() {  # prints the first fit interpreter
    local candidate version seen=''
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        version=$(version_of "$candidate") || continue
        if supported "$version"; then printf '%s\n' "$candidate"; return 0; fi
        seen="$seen${seen:+, }$candidate is $version"
    done
    die "needs Python 3.10 to 3.14 (${seen:-no python3 found}): install one or set PYTHON=/path/to/python"
}

venv_python() {
    local name
    for name in bin/python Scripts/python.exe; do
        if [ -x "$venv/$name" ]; then printf '%s\n' "$venv/$name"; return 0; fi
    done
    return 1
}

wanted_stamp() {  # wanted_stamp PYTHON FILE: the file's sha256, and the Python it is installed for
    "$1" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), "python%d.%d" % sys.version_info[:2])' \
        "$root/$2" 2>/dev/null
}

use_python() {  # sets $py; makes .venv and installs into it where that is not done yet
    local stamp=$venv/.requirements.sha256 want='' base began
    if [ -n "${BANKSHOT_PYTHON:-}" ]; then
        py=$BANKSHOT_PYTHON
        case $py in */*) py=$(absolute "$py") ;; esac
        command -v "$py" >/dev/null 2>&1 ||
            die "BANKSHOT_PYTHON=$BANKSHOT_PYTHON is no program: give the path of a Python interpreter"
        return
    fi
    needs requirements.txt
    if py=$(venv_python); then want=$(wanted_stamp "$py" requirements.txt) || want=; fi
    if [ -n "$want" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then return; fi

    if [ -z "$want" ] || ! "$py" -c 'import pip' >/dev/null 2>&1 || ! supported "$(version_of "$py")"; then
        base=$(find_python)
        "$base" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
            die "$base has no venv module: get it (Debian, Ubuntu: apt install python3-venv) or set PYTHON"
        say "making .venv with $base (Python $(version_of "$base"))"
        "$base" -m venv --clear "$venv" >&2 ||
            die "making $venv failed (message above): it needs free disk and write permission there"
        py=$(venv_python) || die "$venv holds no interpreter: delete that folder and run again"
        want=$(wanted_stamp "$py" requirements.txt) || die "$venv/bin/python does not run: delete $venv and run again"
    fi
    rm -f "$stamp"
    began=$SECONDS
    say "installing requirements.txt into .venv: once, some minutes (torch for NVIDIA GPUs is several GB)"
    "$py" -m pip install --disable-pip-version-check --no-input -r "$root/requirements.txt" >&2 ||
        die "installing requirements.txt failed (pip's message is above): run the same command again to retry"
    printf '%s\n' "$want" >"$stamp"    # last, so that an install cut short is done again
    say "installed in $((SECONDS - began)) s"
}

use_flash4() {  # FlashAttention-4 into .venv where a GPU can run it; tried once, for attention works without it
    local stamp=$venv/.flash4.sha256 want major=''
    if [ -n "${BANKSHOT_PYTHON:-}" ] || ! command -v nvidia-smi >/dev/null 2>&1; then return; fi
    major=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1s/\..*//p') || return 0
    case $major in '' | *[!0-9]*) return ;; esac
    if [ "$major" -lt 9 ]; then return; fi
    needs requirements-flash4.txt
    want=$(wanted_stamp "$py" requirements-flash4.txt)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then return; fi
    say "installing requirements-flash4.txt into .venv: once"
    "$py" -m pip install --disable-pip-version-check --no-input -r "$root/requirements-flash4.txt" >&2 ||
        say "no FlashAttention-4 (pip's message is above): layers with windows may be slow, attn_windows= trains" \
            "without them; .venv/bin/pip install -r requirements-flash4.txt tries again"
    printf '%s\n' "$want" >"$stamp"
}

# ----------------------------------------------------------------------------- what to run, and on how much

count_gpus() {
    local listed='' shown count
    if command -v nvidia-smi >/dev/null 2>&1; then listed=$(nvidia-smi -L 2>/dev/null) || listed=; fi
    count=$(printf '%s\n' "$listed" | grep -c '^GPU ' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then    # torch sees at most these; an empty list or -1 hides all
        case $CUDA_VISIBLE_DEVICES in
            '' | -1*) shown=0 ;;
            *) shown=$(printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .) ;;
        esac
        if [ "$shown" -lt "$count" ]; then count=$shown; fi
    fi
    printf '%s\n' "$count"
}

# setting KEY DEFAULT ARGS...: the value of KEY as the trainer sees it (key=value beats the environment)
setting() {
    local key=$1 value=$2 name arg
    name=$(printf '%s' "$key" | tr '[:lower:]' '[:upper:]')
    if [ -n "${!name:-}" ]; then value=${!name}; fi
    shift 2
    for arg in "$@"; do
        case $arg in "$key="*) value=${arg#*=} ;; esac
    done
    printf '%s\n' "$value"
}

machine_preset() {  # machine_preset GPUS
    if [ "$1" -ge 8 ]; then echo record; elif [ "$1" -ge 1 ]; then echo h100x1; else echo cpu; fi
}

check_nproc() {
    case ${NPROC:-1} in
        *[!0-9]* | 0*) die "NPROC=$NPROC is not a number of processes: give 1, 2, 4 or 8" ;;
    esac
}

# launch PROCESSES SCRIPT ARGS...: one process without a GPU is plain python, the rest goes through torchrun.
# The script keeps this terminal as its own: no pipe in between, so its status line stays live.
launch() {
    local processes=$1
    shift
    if [ "$processes" = plain ]; then
        set -- "$py" "$@"
    else
        set -- "$py" -m torch.distributed.run --standalone "--nproc_per_node=$processes" "$@"
    fi
    say "running: $*"
    "$@"
}

# processes PRESET GPUS: how many. NPROC decides; else one per GPU for the record preset, one for the others.
processes() {
    local preset=$1 gpus=$2
    if [ -n "${NPROC:-}" ]; then
        if [ "$NPROC" = 1 ] && [ "$gpus" -eq 0 ]; then echo plain; else echo "$NPROC"; fi
    elif [ "$gpus" -eq 0 ] || [ "$preset" = cpu ]; then echo plain
    elif [ "$preset" != record ] || [ "$gpus" -lt 2 ]; then echo 1
    elif [ "$gpus" -lt 4 ]; then echo 2
    elif [ "$gpus" -lt 8 ]; then echo 4
    else echo 8
    fi
}

find_data() {  # find_data [OPTIONS]: prints data_path=DIR, what data/prepare.py auto prints last; shows all
    local last
    needs data/prepare.py
    say "no data_path given: data/prepare.py auto${*:+ $*}"
    last=$(PYTHONUNBUFFERED=1 "$py" data/prepare.py auto "$@" | while IFS= read -r line; do
        printf '%s\n' "$line" >&2
        printf '%s\n' "$line"
    done | tail -n 1) || die "data/prepare.py auto found no data (message above): give data_path=DIR"
    case $last in
        data_path=?*) printf '%s\n' "$last" ;;
        *) die "data/prepare.py auto did not end with data_path=DIR but with '$last': give data_path=DIR" ;;
    esac
}

# ----------------------------------------------------------------------------- the commands

check_settings() {
    local arg
    for arg in "$@"; do
        case $arg in
            -h | --help) help; exit 0 ;;
            [a-z]*=*) ;;
            *) die "'$arg' is no setting: settings are key=value, ./run.sh config prints them all" ;;
        esac
    done
}

train() {
    local gpus preset data_path run_id out_dir seed log artifact plot score before=0 status=0 arg
    gpus=$(count_gpus)
    preset=$(setting preset "$(machine_preset "$gpus")" "$@")
    data_path=$(setting data_path '' "$@")
    out_dir=$(setting out_dir logs "$@")
    seed=$(setting seed "$(sed -n 's/^    seed: int = \([0-9]*\).*/\1/p' train_gpt.py)" "$@")
    run_id=$(setting run_id "$(date -u +%Y%m%d_%H%M%S)_${preset}_seed$seed" "$@")
    log=$out_dir/$run_id.txt
    artifact=$out_dir/$run_id.int6.xz
    if [ -z "$(setting resume '' "$@")" ] && { [ -e "$log" ] || [ -e "$artifact" ]; }; then
        die "run_id=$run_id is taken ($out_dir/$run_id.* exists): choose another run_id, or move those files"
    fi
    if [ -z "$data_path" ]; then
        case $preset in    # FineWeb shards of 100 M tokens and 200 MB, enough that no token is seen twice
            record) data_path=$(find_data --train-shards 80) ;;
            h100x1) data_path=$(find_data --train-shards 10) ;;
            *) data_path=$(find_data) ;;
        esac
        data_path=${data_path#*=}
    fi

    for arg in "$@"; do    # what is settled goes first, once each
        shift
        case $arg in preset=* | data_path=* | run_id=*) ;; *) set -- "$@" "$arg" ;; esac
    done
    if [ -f "$log" ]; then before=$(wc -c <"$log"); fi    # of a run that goes on: another score may stand there
    say "$gpus NVIDIA GPU(s), preset $preset, log $log"
    launch "$(processes "$preset" "$gpus")" train_gpt.py train \
        "preset=$preset" "data_path=$data_path" "run_id=$run_id" "$@" || status=$?

    if [ ! -f "$log" ]; then
        say "the trainer ended with status $status and left no log at $log"
        if [ "$status" -eq 0 ]; then status=1; fi
        exit "$status"
    fi
    if plot=$("$py" tools/ledger/record.py plot "$log"); then
        plot=$(printf '%s\n' "$plot" | tail -n 1)
        plot=${plot#plot: }
    else
        plot="none (tools/ledger/record.py plot failed, message above)"
    fi
    echo
    score=$(tail -c "+$((before + 1))" "$log" | sed -n 's/^final_score //p' | tail -n 1)
    echo "score: ${score:-none (this run left no final_score line)}"
    if [ -f "$artifact" ]; then echo "artifact: $artifact"; else echo "artifact: none"; fi
    echo "log: $log"
    echo "plot: $plot"
    say "done, the trainer's exit status is $status"
    exit "$status"
}

score() {  # score [key=value...]: eval or audit of $artifact
    local gpus preset data_path
    gpus=$(count_gpus)
    preset=$(setting preset '' "$@")
    if [ -z "$preset" ]; then set -- "preset=$(machine_preset "$gpus")" "$@"; fi
    data_path=$(setting data_path '' "$@")
    if [ -z "$data_path" ]; then data_path=$(find_data); set -- "$data_path" "$@"; fi
    if [ "$command" = eval ]; then set -- train_gpt.py eval "$artifact" "$@"
    elif [ -n "$script" ]; then set -- tools/audit.py "$artifact" --script "$script" "$@"
    else set -- tools/audit.py "$artifact" "$@"
    fi
    launch "$(processes record "$gpus")" "$@"
}

command=train
case ${1:-} in
    -h | --help | help) help; exit 0 ;;
    -*) die "unknown option '$1': ./run.sh --help lists the commands" ;;
    '' | *=*) ;;
    *) command=$1; shift ;;
esac

case $command in
    test)
        use_python
        cd "$root"
        # two at a time, a file's tests in one process; -n0: one after the other
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
        exec "$py" -m pytest -n auto --maxprocesses 2 --dist loadfile "$@"
        ;;
    data | record)    # these take paths of the caller's, so they run where the caller stands
        tool=data/prepare.py
        if [ "$command" = record ]; then tool=tools/ledger/record.py; fi
        needs "$tool"
        use_python
        if [ "$command" = record ]; then use_flash4; fi      # of its verbs some train
        exec "$py" "$root/$tool" "$@"
        ;;
    train | eval | audit | bench | config) ;;
    *) die "unknown command '$command': train, eval, audit, config, bench, data, record or test (./run.sh --help)" ;;
esac

# What is left are the commands of train_gpt.py: the same settings, the same care for paths.
artifact=
script=    # of audit: whose code is audited
if [ "$command" = eval ] || [ "$command" = audit ]; then
    case ${1:-} in
        -h | --help) ;;
        '' | *=*) die "$command needs an artifact: ./run.sh $command logs/RUN.int6.xz" ;;
        *)
            [ -f "$1" ] || die "no artifact at $1: train writes them as logs/RUN.int6.xz"
            artifact=$(absolute "$1")
            shift
            ;;
    esac
fi
if [ "$command" = audit ] && [ "${1:-}" = --script ]; then
    [ -f "${2:-}" ] || die "no script at '${2:-}': --script names the train_gpt.py to audit"
    script=$(absolute "$2")
    shift 2
fi
options=()    # of bench, which come first; its files are the caller's
if [ "$command" = bench ]; then
    while [ $# -gt 0 ]; do
        case $1 in
            --attention | --all) options+=("$1"); shift ;;
            --json | --candidates | --timeline | --script | --only | --seconds | --sustain | --steps | --paths)
                [ $# -gt 1 ] || die "bench: $1 needs a value: python tools/lab/bench.py --help lists the options"
                case $1 in
                    --only | --seconds | --sustain | --steps | --paths) options+=("$1" "$2") ;;
                    *) options+=("$1" "$(absolute "$2")") ;;
                esac
                shift 2
                ;;
            *) break ;;
        esac
    done
fi
check_settings "$@"
check_nproc
needs train_gpt.py
if [ "$command" = train ]; then needs tools/ledger/record.py; fi
if [ "$command" = audit ] || [ "$command" = bench ]; then needs "records/$command.py"; fi
for arg in "$@"; do
    shift
    case $arg in
        resume=auto) ;;
        data_path=?* | out_dir=?* | tokenizer_path=?* | resume=?*) arg=${arg%%=*}=$(absolute "${arg#*=}") ;;
    esac
    set -- "$@" "$arg"
done
for name in DATA_PATH OUT_DIR TOKENIZER_PATH; do
    if [ -n "${!name:-}" ]; then export "$name=$(absolute "${!name}")"; fi
done
if [ "${RESUME:-auto}" != auto ]; then export RESUME="$(absolute "$RESUME")"; fi
use_python
if [ "$command" != config ]; then use_flash4; fi
cd "$root"
case $command in
    train) train "$@" ;;
    eval | audit) score "$@" ;;
    *)
        if [ -z "$(setting preset '' "$@")" ]; then set -- "preset=$(machine_preset "$(count_gpus)")" "$@"; fi
        if [ "$command" = config ]; then exec "$py" train_gpt.py config "$@"; fi
        if [ "${NPROC:-1}" = 1 ]; then exec "$py" tools/lab/bench.py ${options[@]+"${options[@]}"} "$@"; fi
        launch "$NPROC" tools/lab/bench.py ${options[@]+"${options[@]}"} "$@"
        ;;
esac
