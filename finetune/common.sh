# What the launchers share: -m MODEL -d DATA -o OUTPUT, everything after -- for finetune.py; source it, then call
# `launch single|distributed FLAGS...`.
#
# Distributed over all GPUs of this machine. GPUS_PER_NODE says otherwise; several machines set NNODES, NODE_RANK,
# MASTER_ADDR and MASTER_PORT, or run under Slurm, whose variables are read.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
[ -x "$ROOT/.venv/bin/python" ] && [ "$PYTHON" = python ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && PYTHON=$ROOT/.venv/bin/python

usage() {
  echo "usage: $(basename "$0") [-m MODEL] -d DATA -o OUTPUT [-- FLAGS OF finetune.py]" >&2
  exit 2
}

launch() {
  local way=$1 model=$DEFAULT_MODEL data="" output=""
  shift
  while getopts m:d:o:h option "${ARGS[@]}"; do
    case $option in
      m) model=$OPTARG ;;
      d) data=$OPTARG ;;
      o) output=$OPTARG ;;
      *) usage ;;
    esac
  done
  local rest=("${ARGS[@]:OPTIND - 1}")
  if [ ${#rest[@]} -gt 0 ] && [ "${ARGS[OPTIND - 2]:-}" != -- ]; then usage; fi
  if [ -z "$data" ] || [ -z "$output" ]; then usage; fi
  local command=("$PYTHON")
  if [ "$way" = distributed ]; then
    local nodes=${NNODES:-${SLURM_NNODES:-1}} gpus=${GPUS_PER_NODE:-}
    [ -n "$gpus" ] || gpus=$("$PYTHON" -c "import torch; print(max(torch.accelerator.device_count(), 1))")
    command+=(-m torch.distributed.run --nproc_per_node "$gpus")
    if [ "$nodes" -gt 1 ]; then
      local address=${MASTER_ADDR:-}
      [ -n "$address" ] || address=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?set MASTER_ADDR}" | head -n 1)
      command+=(--nnodes "$nodes" --node_rank "${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK}}"
        --master_addr "$address" --master_port "${MASTER_PORT:-29500}")
    else
      command+=(--standalone)
    fi
  fi
  exec "${command[@]}" "$ROOT/finetune.py" --model_name_or_path "$model" --data_path "$data" --output_dir "$output" \
    "$@" ${rest[@]+"${rest[@]}"}
}
