#!/usr/bin/env bash
# Trains on this machine:
#
#   ./launch_deepspeed.sh --num_gpus 4 --preset 7b_mamba [--port 29501] [any option of train_deepspeed.py]
#
# Finds a Python that has the trainer and hands every option to train_deepspeed.py, which launches and supervises
# the ranks: GPUs, or CPU processes where there is none (the plan that it prints says which).
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")

has_trainer() { # -P (Python 3.11): the folder one stands in must not pass for an installation
  "$1" -P -c '
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("mamba_trainer", "torch", "deepspeed", "typer"))))
' 2>/dev/null
}

candidates=(
  ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} # an environment that is active was meant
  "$here/../.venv/bin/python"
  python3
)
for python in "${candidates[@]}"; do
  if has_trainer "$python"; then
    exec "$python" "$here/train_deepspeed.py" "$@"
  fi
done

{
  echo "No Python here has the trainer. Looked at:"
  printf '  %s\n' "${candidates[@]}"
  echo "Install it, then start again:"
  echo "  $here/install_deepspeed.sh"
} >&2
exit 64
