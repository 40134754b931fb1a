#!/usr/bin/env bash
# Runs on a GPU, in one go of less than ten minutes, the tests that need one and the measurements of README.md.
#
#   benchmarks/gpu.sh                        on a machine with a GPU, from any folder
#   OUT=folder benchmarks/gpu.sh             results go there; default: benchmarks/results/gpu-<date>
#   PARTS="tests loader" benchmarks/gpu.sh   only these of: tests model-bf16 loader inference model-fp16 train
#   PYTHON=python3.12 benchmarks/gpu.sh      with this interpreter; default: python3
#   CPU_SMOKE=1 benchmarks/gpu.sh            the script itself in tiny sizes, with or without a GPU: no figures
#
# Needs Python 3.10 or later with torch 2.11 or later, torchvision, numpy, pillow, pydantic, pyyaml and rich; no data
# set, no network, not the package installed. Takes pytest (for the tests) and DALI (nvidia-dali-cuda120 or -cuda130,
# for its loaders) where they are there, and says where they are not.
#
# Writes log.txt (all output), model-bf16.json, loader.json, inference.json, model-fp16.json and train.json. Every part
# has a time limit, and what one leaves of it the later ones may use; one that fails or is cut off leaves the figures that it had
# in its file, and the others run all the same.
#
# Exit code: 0 all parts passed, 1 one failed or was cut off, 2 Python or a package is missing, 3 there is no GPU.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
PARTS=${PARTS:-tests model-bf16 loader inference model-fp16 train}
smoke=${CPU_SMOKE:-}
out=${OUT:-benchmarks/results/gpu-$(date +%F-%H%M%S)}
export WANDB_MODE=disabled PYTHONUNBUFFERED=1

# What is there: 2 for a needed package that is not, 3 for no GPU.
lacks=$("$PYTHON" - "$smoke" <<'PY'
import sys
from importlib.util import find_spec

needed = {"torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PIL": "pillow", "pydantic": "pydantic",
          "yaml": "pyyaml", "rich": "rich"}
missing = [package for module, package in needed.items() if find_spec(module) is None]
if missing:
    print(f"gpu.sh: {sys.executable} lacks {', '.join(missing)}: pip install them, or set PYTHON=", file=sys.stderr)
    sys.exit(2)
import torch

if not sys.argv[1] and not torch.cuda.is_available():
    print("gpu.sh: torch sees no GPU here; CPU_SMOKE=1 tries the script out without one", file=sys.stderr)
    sys.exit(3)
if find_spec("pytest") is None:
    print("gpu.sh: pytest is not installed: no tests")
if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
    print("gpu.sh: DALI is not installed: its loaders are left out, train.py loads with torchvision")
PY
) || exit

mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
exec > >(tee "$out/log.txt") 2>&1

# Sizes: of the real thing, and of the try-out.
if [ -z "$smoke" ]; then
  network="--model resnet50 --size 224" batch=256 photos=4000
  train="--batch $batch --steps 80 --pairs 2 --compile" model="--batch $batch --warm-up 20 --steps 50 --compile"
  loader="--rounds 3" rounds_bf16=3 rounds_fp16=2 inference="--rounds 1"
else
  network="--model resnet18 --size 32" photos=20
  train="--batch 4 --steps 16 --pairs 1" model="--batch 4 --warm-up 1 --steps 1"
  loader="--rounds 1 --batch 4 --batches 2 --size 32" rounds_bf16=1 rounds_fp16=1
  inference="--rounds 1"
fi

failed=0 due=0
# part NAME LIMIT COMMAND…: runs it, if it is one of PARTS, until all LIMITs up to its own are over.
part() {
  local name=$1 limit began=$SECONDS code
  due=$((due + $2)) limit=$((due - SECONDS))
  shift 2
  case " $PARTS " in *" $name "*) ;; *) return ;; esac
  printf '\n== %s: %s\n' "$name" "$*"
  timeout --kill-after=10 "$limit" "$@"
  code=$?
  case $code in
    0) echo "== $name: passed in $((SECONDS - began)) s" ;;
    124 | 137) echo "== $name: CUT OFF after $limit s" && failed=1 ;;
    *) echo "== $name: FAILED with exit code $code" && failed=1 ;;
  esac
}

bench="$PYTHON -m distrib.tools.bench"
echo "$(date -u +%FT%TZ) $(uname -srm), $(nproc) processors, load $(cut -d' ' -f1-3 /proc/loadavg 2>/dev/null)"
[ -z "$lacks" ] || echo "$lacks"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader 2>/dev/null

# The limits add up to 560 s. The longest comes last and takes what is left: two pairs are six processes, which compile
# ten times, seven of them from a cache. Variables without quotes hold several words.
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
  part tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py
fi
part model-bf16 110 $bench model $network --precision bf16 $model --rounds $rounds_bf16 --deterministic \
  --json "$out/model-bf16.json"
part loader 50 $bench loader --photos $photos $loader --json "$out/loader.json"
part inference 40 $bench inference $network --photos $photos $inference --json "$out/inference.json"
part model-fp16 70 $bench model $network --precision fp16 $model --rounds $rounds_fp16 --json "$out/model-fp16.json"
part train 140 $bench train $network --precision bf16 $train --photos $photos --json "$out/train.json"

printf '\nresults: %s; %s s in all\n' "$out" "$SECONDS"
exit "$failed"
