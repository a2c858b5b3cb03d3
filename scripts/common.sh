# shellcheck shell=bash
# Sourced by the scripts beside it: where the repository and its environment are, and which Pythons exist.
# Works with bash 3.2 (macOS).
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${QUANTJAX_VENV:-.venv}  # a relative one counts from the repository root
case $venv in /*) ;; *) venv=$root/$venv ;; esac

say() { printf 'quantjax: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1; }

# "MINOR MICRO PATH" of an interpreter that can make an environment; nothing for any other: older than
# 3.11, a pre-release, not CPython, without venv or ensurepip (Debian packs them apart), a dead shim.
probe_python() {
  "$1" -I -c '
import sys
if sys.version_info[:2] >= (3, 11) and sys.version_info[0] == 3 and sys.version_info[3] == "final":
    import ensurepip, sysconfig, venv
    if sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
        base = getattr(sys, "_base_executable", None) or sys.executable
        print("%d %d %s" % (sys.version_info[1], sys.version_info[2], base))
' 2>/dev/null </dev/null || true
}

# All such interpreters on PATH and in pyenv's folder, newest first, each once.
find_pythons() {
  {
    for name in python3 python python3.{11,12,13,14,15,16,17,18,19}; do type -aP "$name" || true; done
    for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python; do
      [ ! -x "$path" ] || printf '%s\n' "$path"
    done
  } | awk '!seen[$0]++' | while IFS= read -r path; do probe_python "$path"; done |
    awk '!seen[$0]++' | sort -s -k1,1nr -k2,2nr
}
