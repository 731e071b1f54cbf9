#!/usr/bin/env bash
# Pins the builder images of .github/cuda-matrix.json by digest.
#
# usage: scripts/pin_images.sh            asks the registry for the digest of each image without one, and writes it
#        scripts/pin_images.sh --update   asks anew for those that have one, too
#        scripts/pin_images.sh --check    fails and names the images without a digest; asks nobody
# It needs docker (with buildx), skopeo or crane.
set -euo pipefail
cd "$(dirname "$0")/.."
list=.github/cuda-matrix.json

digest_of() {
  if command -v docker >/dev/null; then
    docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$1"
  elif command -v skopeo >/dev/null; then
    skopeo inspect --no-tags --format '{{.Digest}}' "docker://$1"
  elif command -v crane >/dev/null; then
    crane digest "$1"
  else
    echo "pin_images.sh: it needs docker, skopeo or crane" >&2
    exit 1
  fi
}

mapfile -t images < <(grep --only-matching 'pytorch/[^"]*' "$list")
unpinned=()
for image in "${images[@]}"; do
  [[ "$image" == *@sha256:* ]] || unpinned+=("$image")
done
case "${1:-}" in
  --check)
    ((${#unpinned[@]} == 0)) && exit
    printf 'pin_images.sh: %s has no digest; run scripts/pin_images.sh\n' "${unpinned[@]}" >&2
    exit 1
    ;;
  --update) ;;
  "") images=("${unpinned[@]}") ;;
  *) sed -n 's/^# usage: /usage: /p' scripts/pin_images.sh >&2; exit 2 ;;
esac
for image in "${images[@]}"; do
  name="${image%@*}"
  digest="$(digest_of "$name")"
  if [[ ! "$digest" =~ ^sha256:[0-9a-f]{64}$ ]]; then
    echo "pin_images.sh: the registry answers \"$digest\" for $name" >&2
    exit 1
  fi
  sed --in-place "s|\"$image\"|\"$name@$digest\"|" "$list"
  echo "$name@$digest"
done
