#!/usr/bin/env bash
# The one command of this repository: finds Python, makes .venv, hands over to tools/cli.py.
# `./run.sh --help` lists what it does.
# Written for bash 3.2 (macOS) and later. Notes go to stderr, so `./run.sh config > file` stays clean.
set -euo pipefail
unset PYTHONSAFEPATH    # with it, a program would not find the modules beside it
unset PYTHONHOME        # with it, a .venv would not find the standard library
unset CDPATH            # with it, cd may go elsewhere, and prints where

self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do    # a symlink to this file; macOS has no readlink -f
    link=$(readlink "$self")
    case $link in /*) self=$link ;; *) self=$(dirname "$self")/$link ;; esac
done
root=$(cd "$(dirname "$self")" && pwd)
venv=$root/.venv
made=.made_by_run.sh    # in .venv: run.sh made it and may replace it
cli=$root/tools/cli.py
packages='numpy torch sentencepiece'

say() { printf '[run.sh %ds] %s\n' "$SECONDS" "$*" >&2; }
die() { printf 'run.sh: %s\n' "$*" >&2; exit 2; }
needs() { [ -f "$root/$1" ] || die "$1 is missing from $root; get a complete copy of the repository"; }

# ----------------------------------------------------------------------------- interpreters

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
supported() { case $1 in 3.10 | 3.11 | 3.12 | 3.13 | 3.14) return 0 ;; *) return 1 ;; esac; }

find_python() {    # prints the first supported interpreter
    local candidate version seen=''
    if [ -n "${PYTHON:-}" ]; then
        version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON is not a Python interpreter; give the path of one"
        supported "$version" || die "PYTHON=$PYTHON is Python $version; give one of 3.10 to 3.14"
        printf '%s\n' "$PYTHON"
        return 0
    fi
    # after the machine's own: 3.12, with which GPUs were measured, then its neighbours
    for candidate in python3 python3.12 python3.11 python3.10 python3.13 python3.14; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        version=$(version_of "$candidate") || continue
        if supported "$version"; then printf '%s\n' "$candidate"; return 0; fi
        seen="$seen${seen:+, }$candidate is $version"
    done
    die "needs Python 3.10 to 3.14 (${seen:-no python3 found}); install one or set PYTHON=/path/to/python"
}

venv_python() {    # prints the interpreter in .venv
    local name
    for name in bin/python Scripts/python.exe; do
        if [ -x "$venv/$name" ]; then printf '%s\n' "$venv/$name"; return 0; fi
    done
    return 1
}

# ----------------------------------------------------------------------------- packages

requirements_stamp() {    # requirements_stamp PYTHON FILE: the file's sha256, and the Python it is installed for
    "$1" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), "python%d.%d" % sys.version_info[:2])' \
        "$root/$2" 2>/dev/null
}

# Run long programs as jobs: bash handles a signal only after a foreground program ends.
ends_with_us() {    # ends_with_us PROGRAM...: SIGTERM and Ctrl-C end the program and what it started, then run.sh
    local job status=0
    set -m    # the job gets a process group, which Ctrl-C of the terminal does not reach
    "$@" &
    job=$!
    set +m
    trap 'end_job "$job" 143' TERM
    trap 'end_job "$job" 130' INT
    trap 'end_job "$job" 129' HUP
    wait "$job" || status=$?
    trap - TERM INT HUP
    return "$status"
}

end_job() {    # end_job GROUP STATUS: give the group one second to clean up, kill it, then exit
    trap '' TERM INT HUP
    say "interrupted; run the same command again to continue"
    kill -INT -- "-$1" 2>/dev/null || :
    local tenths=0
    while kill -0 -- "-$1" 2>/dev/null && [ "$tenths" -lt 10 ]; do sleep 0.1; tenths=$((tenths + 1)); done
    kill -KILL -- "-$1" 2>/dev/null || :
    exit "$2"
}

# -qq: only errors. Progress bars and warnings about this machine's settings are hundreds of lines.
pip_install() { ends_with_us "$py" -m pip install -qq --disable-pip-version-check --no-input -r "$root/$1" >&2; }

has_packages() {    # has_packages NAMES...: whether $py is a Python that finds them, without importing them
    [ "$("$py" -c 'import importlib.util, sys
print(all(map(importlib.util.find_spec, sys.argv[1:])))' "$@" 2>/dev/null)" = True ]
}

make_venv() {    # make_venv PYTHON; sets $py
    "$1" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        die "$1 has no venv module; get it (Debian, Ubuntu: apt install python3-venv) or set PYTHON"
    say "making .venv with $1 (Python $(version_of "$1"))"
    if [ -e "$venv" ] || [ -L "$venv" ]; then
        [ -e "$venv/$made" ] || [ -e "$venv/.requirements.sha256" ] ||
            die "$venv does not work, and run.sh did not make it; move it away, or set BANKSHOT_PYTHON to an" \
                "interpreter that has the packages"
        rm -rf "$venv"    # of a symlink, only the link
    fi
    { mkdir "$venv" && : >"$venv/$made" && ends_with_us "$1" -m venv "$venv"; } >&2 ||
        die "making $venv failed (message above); see that there is free disk and write permission"
    py=$(venv_python) || die "$venv holds no interpreter; delete that folder and run again"
}

use_venv() {    # use_venv WORDS...: sets $py; makes .venv and installs into it where that is not done yet
    local stamp_file=$venv/.requirements.sha256 wanted='' base='' began
    needs requirements.txt
    if py=$(venv_python); then wanted=$(requirements_stamp "$py" requirements.txt) || wanted=; fi
    if [ -n "$wanted" ] && [ -f "$stamp_file" ] && [ "$(cat "$stamp_file")" = "$wanted" ] &&
        has_packages $packages; then
        return 0
    fi

    if [ -z "$wanted" ] || ! "$py" -c 'import pip' >/dev/null 2>&1 || ! supported "$(version_of "$py")"; then
        base=$(find_python)
    fi
    "${base:-$py}" "$cli" --check "$@" || exit    # a misspelt command is refused before minutes of installing
    if [ -n "$base" ]; then
        make_venv "$base"
        wanted=$(requirements_stamp "$py" requirements.txt) ||
            die "$venv/bin/python does not run; delete $venv and run again"
    fi

    rm -f "$stamp_file"
    began=$SECONDS
    say "installing requirements.txt into .venv: once, some minutes (torch for NVIDIA GPUs is several GB)"
    pip_install requirements.txt ||
        die "installing requirements.txt failed (pip's message is above); run the same command again to retry"
    printf '%s\n' "$wanted" >"$stamp_file"    # last, so that an interrupted install is done again
    say "installed in $((SECONDS - began)) s"
}

use_flash4() {    # use_flash4 WORDS...: FlashAttention-4 into .venv if a GPU can run it and the command would
    local stamp_file=$venv/.flash4.sha256 wanted major
    command -v nvidia-smi >/dev/null 2>&1 || return 0
    major=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1s/\..*//p') || return 0
    case $major in '' | *[!0-9]*) return 0 ;; esac
    if [ "$major" -lt 9 ]; then return 0; fi    # 9: Hopper
    needs requirements-flash4.txt
    wanted=$(requirements_stamp "$py" requirements-flash4.txt)
    if [ -f "$stamp_file" ] && [ "$(cat "$stamp_file")" = "$wanted" ]; then return 0; fi
    "$py" "$cli" --runs-attention "$@" 2>/dev/null || return 0
    say "installing requirements-flash4.txt into .venv: once"
    pip_install requirements-flash4.txt ||
        say "no FlashAttention-4 (pip's message is above): layers with windows may be slow, attn_windows= trains" \
            "without them; .venv/bin/pip install -r requirements-flash4.txt tries again"
    printf '%s\n' "$wanted" >"$stamp_file"    # even if that failed: attention works without it
}

# ----------------------------------------------------------------------------- hand over

wants_help() {    # help needs no packages; test and the verbs of data and record have options of their own
    local word
    case ${1:-} in
        help) return 0 ;;
        test) return 1 ;;
        data | record) case ${2:-} in -h | --help) return 0 ;; *) return 1 ;; esac ;;
    esac
    for word in "$@"; do
        case $word in -h | --help) return 0 ;; esac
    done
    return 1
}

needs tools/cli.py
if [ -n "${BANKSHOT_PYTHON:-}" ]; then
    py=$BANKSHOT_PYTHON
    command -v "$py" >/dev/null 2>&1 ||
        die "BANKSHOT_PYTHON=$BANKSHOT_PYTHON is not a program; give the path of a Python interpreter"
    case ${1:-train} in data | record) packages=numpy ;; esac
    if ! wants_help "$@" && ! has_packages $packages; then
        if supported "$(version_of "$py")"; then
            "$py" "$cli" --check "$@" || exit    # a misspelt command is refused before packages are asked for
        fi
        die "BANKSHOT_PYTHON=$BANKSHOT_PYTHON lacks one of ${packages// /, };" \
            "run $py -m pip install -r requirements.txt"
    fi
elif wants_help "$@"; then
    py=$(venv_python) || py=$(find_python)
else
    use_venv "$@"
    use_flash4 "$@"
fi
RUN_SH_SECONDS=$SECONDS exec "$py" "$cli" "$@"    # its notes go on counting
