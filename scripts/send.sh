#!/usr/bin/env bash
# Sends a correctly signed delivery to the local stack: scripts/send.sh SHAPE [options of `webhook-api send`].
set -euo pipefail
shape=${1:-portrait-ok}
shift || true
name=${SITE_NAME:-aisha-webhook}
url=${URL:-https://localhost:8443/api/v1/avatar/status_update}
key=/opt/$name/secrets/fal_dev_key
secret=/opt/$name/secrets/fal_webhook_secret
as_root=()
if [[ $(id -u) -ne 0 ]]; then
	command -v sudo >/dev/null || {
		echo "The key is root's: run this as root, or install the package sudo." >&2
		exit 1
	}
	as_root=(sudo)
fi
image=$("${as_root[@]}" docker inspect --format '{{.Config.Image}}' "$name-api-1") || {
	echo "No stack is here: run make up first." >&2
	exit 1
}
if [[ $shape == help ]]; then
	exec "${as_root[@]}" docker run --rm "$image" send "$url" --list
fi
owner=$("${as_root[@]}" stat -c %u "$key") || {
	echo "$key is not here: only the local inventory generates a development key." >&2
	exit 1
}
exec "${as_root[@]}" docker run --rm --network host --read-only --cap-drop ALL --user "$owner" \
	--volume "$key:/run/secrets/fal_dev_key:ro" --volume "$secret:/run/secrets/fal_webhook_secret:ro" \
	"$image" send "$url" --shape "$shape" --key-file /run/secrets/fal_dev_key --secret-file /run/secrets/fal_webhook_secret \
	--user-id "${ACCOUNT:-aisha-dev}" --insecure "$@"
