# What the launchers share, for sh (dash) and bash alike: -m MODEL -d DATA -o OUTPUT, everything after -- for finetune.py.
# A launcher sources this, calls `parse DEFAULT_MODEL "$@"`, shifts, and calls `launch single|distributed FLAGS...`.
#
# Distributed over all GPUs of this machine. GPUS_PER_NODE says otherwise; several machines set NNODES, NODE_RANK,
# MASTER_ADDR and MASTER_PORT, or run under Slurm or torchrun's PET_ variables, which are read.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python}
if [ "$PYTHON" = python ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$ROOT/.venv/bin/python" ]; then
  PYTHON=$ROOT/.venv/bin/python
fi

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

parse() {
  MODEL=$1 DATA='' OUTPUT=''
  shift
  usage="usage: $(basename "$0") [-m MODEL] -d DATA -o OUTPUT [-- FLAGS OF finetune.py]"
  while getopts m:d:o:h option; do
    case $option in
      m) MODEL=$OPTARG ;;
      d) DATA=$OPTARG ;;
      o) OUTPUT=$OPTARG ;;
      *) echo "$usage" >&2 && exit 2 ;;
    esac
  done
  PARSED=$((OPTIND - 1))
  [ -n "$DATA" ] && [ -n "$OUTPUT" ] || fail "-d DATA and -o OUTPUT must be given; $usage"
  if [ "$#" -gt "$PARSED" ]; then
    eval "last=\${$PARSED}; next=\${$OPTIND}"
    [ "$last" = -- ] || fail "flags of finetune.py such as $next go after --, several files into one quoted pattern; $usage"
  fi
}

launch() {
  way=$1
  shift
  command -v "$PYTHON" >/dev/null || fail "$PYTHON is not found: activate an environment, or name its python in PYTHON"
  has torch || fail "$PYTHON has no torch: pip install -r requirements_finetune.txt, or name another python in PYTHON"
  set -- "$ROOT/finetune.py" --model_name_or_path "$MODEL" --data_path "$DATA" --output_dir "$OUTPUT" "$@"
  if [ "$way" = single ]; then
    exec "$PYTHON" "$@"
  fi
  case " $* " in
    *" --deepspeed "*) has deepspeed || fail "$PYTHON has no deepspeed: pip install deepspeed ninja, or use finetune_fsdp.sh" ;;
  esac
  found=$("$PYTHON" -c "import torch; print(torch.accelerator.device_count())")
  gpus=${GPUS_PER_NODE:-$((found > 0 ? found : 1))}
  if [ "$found" -gt 0 ] && [ "$gpus" -gt "$found" ]; then
    fail "GPUS_PER_NODE is $gpus, and this machine has $found"
  fi
  nodes=${NNODES:-${PET_NNODES:-${SLURM_NNODES:-1}}}
  if [ "$nodes" -gt 1 ]; then
    rank=${NODE_RANK:-${PET_NODE_RANK:-${SLURM_NODEID:-}}}
    [ -n "$rank" ] || fail "NNODES is $nodes: give each machine its number in NODE_RANK, 0 to $((nodes - 1))"
    address=${MASTER_ADDR:-}
    if [ -z "$address" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
      address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | head -n 1)
    fi
    [ -n "$address" ] || fail "NNODES is $nodes: give all machines the address of the first in MASTER_ADDR"
    set -- --nnodes "$nodes" --node_rank "$rank" --master_addr "$address" --master_port "${MASTER_PORT:-29500}" "$@"
  else
    set -- --standalone "$@"
  fi
  exec "$PYTHON" "$ROOT/training/launch.py" --nproc_per_node "$gpus" "$@"
}

has() {
  "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}
