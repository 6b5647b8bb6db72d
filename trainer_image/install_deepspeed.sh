#!/usr/bin/env bash
# Installs all that training needs into the active virtual environment, or into the checkout's .venv:
#
#   ./install_deepspeed.sh [--dry_run] [--without_kernels]
#
#   --dry_run          print each command and change nothing
#   --without_kernels  leave out mamba-ssm and causal-conv1d, the fused kernels
#
# May be run again at any time: what is there already stays as it is. Says which CUDA it found in driver, toolkit
# and PyTorch, and what to do where they do not fit each other. PYTHON names the Python for a new environment.
set -euo pipefail

readonly KERNELS=(causal-conv1d==1.7.0 mamba-ssm==2.3.2.post1)
readonly PINNED_TORCH_CUDA=13.0 # of the torch that constraints.txt pins
readonly DRIVER_FOR_CUDA=([12]=525 [13]=580) # oldest driver for each CUDA major

root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
dry_run=false
kernels=true

main() {
  read_options "$@"
  choose_environment
  install_trainer
  look_for_cuda
  show_cuda
  advise
  install_kernels
}

read_options() {
  for option in "$@"; do
    case $option in
      --dry_run | --dry-run) dry_run=true ;;
      --without_kernels | --without-kernels) kernels=false ;;
      -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
      *) fail "There is no option $option. Options: --dry_run, --without_kernels, --help." ;;
    esac
  done
}

fail() {
  echo "$*" >&2
  exit 64
}

run() { # shows a command, and carries it out unless --dry_run
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  $dry_run || "$@"
}

choose_environment() {
  local environment=${VIRTUAL_ENV:-$root/.venv} new=${PYTHON:-python3}
  python=$environment/bin/python
  if [[ ! -x $python ]]; then
    is_recent "$new" || fail "$new is missing or older than Python 3.11: set PYTHON=/path/to/python3.11 or newer."
    run "$new" -m venv "$environment"
    $dry_run && return
  fi
  is_recent "$python" || fail "$python is older than Python 3.11: activate an environment of 3.11 or newer."
  "$python" -m pip --version >/dev/null 2>&1 || fail "$environment has no pip. Add it: $python -m ensurepip"
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

install_trainer() {
  if trainer_is_installed; then
    echo "The trainer is installed in ${python%/bin/python}, with all it needs in the pinned versions."
  else
    run "$python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" -e "$root/trainer_image[train]"
  fi
}

trainer_is_installed() { # from this checkout, with every requirement of [train] in the version of constraints.txt
  "$python" - "$root" 2>/dev/null <<'PYTHON'
import json, re, sys, tomllib
from importlib.metadata import distribution, version
from pathlib import Path

root = Path(sys.argv[1])
normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
origin = json.loads(distribution("mamba-trainer").read_text("direct_url.json") or "{}")
if origin.get("url") != (root / "trainer_image").as_uri():
    sys.exit(1)
lines = (root / "constraints.txt").read_text().splitlines()
pins = {normal(name): pin for name, found, pin in (line.partition("==") for line in lines) if found}
project = tomllib.loads((root / "trainer_image/pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["train"]:
    name = normal(re.match(r"[\w.-]+", requirement)[0])
    if version(name).partition("+")[0] != pins.get(name, version(name)).strip():
        sys.exit(1)
PYTHON
}

look_for_cuda() {
  local report
  driver="" driver_cuda="" driver_fails=false
  if command -v nvidia-smi >/dev/null; then
    if report=$(nvidia-smi 2>&1); then
      driver=$(first_match 'Driver Version: *\([0-9.]*\)' <<<"$report")
      driver_cuda=$(first_match 'CUDA[A-Z ]* Version: *\([0-9.]*\)' <<<"$report")
    else
      driver_fails=true
    fi
  fi
  torch_cuda=$(cuda_of_torch 2>/dev/null || true)
  torch_planned=false
  if [[ -z $torch_cuda ]]; then
    torch_cuda=$PINNED_TORCH_CUDA torch_planned=true
  fi
  find_toolkit
}

first_match() { sed -n "/$1/{s/.*$1.*/\1/p;q;}"; }

cuda_of_torch() { # "13.0"; "cpu"; nothing where torch is missing. Read from its files: importing it takes seconds
  "$python" -P -c '
import importlib.util, pathlib, runpy
spec = importlib.util.find_spec("torch")
if spec:
    print(runpy.run_path(str(pathlib.Path(spec.origin).with_name("version.py")))["cuda"] or "cpu")
'
}

find_toolkit() { # CUDA_HOME if it is set; else one of torch's CUDA major; else any
  local home version
  toolkit="" toolkit_home=""
  for home in "${CUDA_HOME:-}" "$(nvcc_home)" /usr/local/cuda /usr/local/cuda-*; do
    [[ -n $home && -x $home/bin/nvcc ]] || continue
    [[ -z ${CUDA_HOME:-} || $home == "$CUDA_HOME" ]] || continue
    version=$("$home/bin/nvcc" --version 2>/dev/null | first_match 'release \([0-9.]*\)')
    if [[ -z $toolkit || $(major "$version") == $(major "$torch_cuda") ]]; then
      toolkit=$version toolkit_home=$home
    fi
    [[ $(major "$toolkit") != $(major "$torch_cuda") ]] || return 0
  done
}

nvcc_home() {
  local nvcc
  nvcc=$(command -v nvcc) || return 0
  dirname -- "$(dirname -- "$(readlink -f -- "$nvcc")")"
}

major() { echo "${1%%.*}"; }

show_cuda() {
  local seen=none
  [[ -z $driver ]] || seen="$driver, runs programs for CUDA up to ${driver_cuda:-unknown}"
  $driver_fails && seen="nvidia-smi fails"
  echo "NVIDIA driver  $seen"
  echo "CUDA toolkit   ${toolkit:-none}${toolkit_home:+ in $toolkit_home}"
  case $torch_cuda in
    cpu) echo "PyTorch        without CUDA" ;;
    *) echo "PyTorch        for CUDA $torch_cuda$($torch_planned && echo ' (not installed yet)')" ;;
  esac
}

advise() { # what does not fit, with the fix
  local wanted=$PINNED_TORCH_CUDA
  [[ $torch_cuda == cpu ]] || wanted=$torch_cuda
  wanted=$(major "$wanted")
  if $driver_fails; then
    problem "The NVIDIA driver does not answer: $(nvidia-smi 2>&1 | head -n 1)" \
      "restart the machine; if that does not help, install the driver again."
  elif [[ -z $driver ]]; then
    echo "No NVIDIA driver: training runs on CPU processes here. For GPUs install the driver" \
      "(${DRIVER_FOR_CUDA[$wanted]:-a recent one} or newer) and run this again."
  elif [[ $torch_cuda == cpu ]]; then
    problem "This PyTorch was built without CUDA and cannot use the GPU." \
      "$python -m pip install --force-reinstall -c $root/constraints.txt torch"
  elif [[ -n $driver_cuda && $(major "$driver_cuda") -lt $wanted ]]; then
    problem "Driver $driver runs CUDA up to $driver_cuda, but PyTorch is built for CUDA $torch_cuda." \
      "update the driver to ${DRIVER_FOR_CUDA[$wanted]:-a newer version} or newer, or install" \
      "the build of torch for CUDA $(major "$driver_cuda") (PyTorch's Get Started page has the command)."
  elif ! $torch_planned && ! $dry_run; then
    check_gpu
  fi
  $kernels || return 0
  if [[ $torch_cuda != cpu && -n $toolkit && $(major "$toolkit") != "$wanted" ]]; then
    problem "CUDA toolkit $toolkit cannot build kernels for a PyTorch of CUDA $torch_cuda." \
      "install a CUDA toolkit $wanted.x and run:  CUDA_HOME=/usr/local/cuda-$torch_cuda $0"
  elif [[ -n ${CUDA_HOME:-} && -z $toolkit ]]; then
    problem "CUDA_HOME is $CUDA_HOME, and there is no bin/nvcc in it." \
      "set it to a CUDA toolkit $wanted.x, or unset it to have one searched for."
  fi
}

problem() {
  echo "PROBLEM: $1"
  shift
  echo "  Fix: $*"
}

check_gpu() {
  local error
  error=$("$python" -c 'import torch; torch.zeros(1, device="cuda")' 2>&1) ||
    problem "PyTorch cannot use the GPU: $(tail -n 1 <<<"$error")" \
      "see that nvidia-smi lists a GPU and that CUDA_VISIBLE_DEVICES does not hide it."
}

install_kernels() {
  $kernels || return 0
  if "$python" -c 'import torch, selective_scan_cuda, causal_conv1d_cuda' 2>/dev/null; then
    echo "The fused kernels are installed and load."
  elif [[ $torch_cuda != cpu && -n $toolkit && $(major "$toolkit") == $(major "$torch_cuda") ]]; then
    echo "Building the fused kernels with CUDA toolkit $toolkit; this takes many minutes."
    build_kernels
  else
    echo "The fused kernels are not built: that takes a PyTorch with CUDA and a CUDA toolkit of the same major version."
    echo "Without them training uses the slower torch scan. The commands for later:"
    [[ $torch_cuda != cpu ]] || torch_cuda=$PINNED_TORCH_CUDA
    (dry_run=true toolkit_home=/usr/local/cuda-$torch_cuda && build_kernels)
  fi
}

build_kernels() { # without MAMBA_KEEP_CUDA_BUILD mamba-ssm 2.3 leaves the Mamba-1 kernel out
  local pip=("$python" -m pip install --disable-pip-version-check -c "$root/constraints.txt")
  run "${pip[@]}" ninja packaging setuptools wheel
  run env MAMBA_KEEP_CUDA_BUILD=TRUE "CUDA_HOME=$toolkit_home" "MAX_JOBS=${MAX_JOBS:-4}" \
    "${pip[@]}" --no-build-isolation "${KERNELS[@]}"
}

main "$@"
