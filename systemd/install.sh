#!/bin/sh
# Install promptdrop as a service: user, folders, configuration, units. Shows what it would do;
#   sudo systemd/install.sh --run [MODEL]
# does it. MODEL is a directory in diffusers' layout or an id (default: Tongyi-MAI/Z-Image-Turbo).
# The package itself is in /opt/promptdrop/.venv already (README.md, "systemd"). Run it again after
# an update: a configuration that is there stays as it is. Nothing is started.
set -eu
cd "$(dirname "$0")"

run=echo
if [ "${1:-}" = --run ]; then
    run=
    shift
fi
model=${1:-Tongyi-MAI/Z-Image-Turbo}
promptdrop=/opt/promptdrop/.venv/bin/promptdrop
home=/srv/promptdrop
config=/etc/promptdrop/config.yaml

if [ ! -x "$promptdrop" ]; then
    echo "$promptdrop is not there; install the package first (README.md, systemd)" >&2
    exit 1
fi

$run install -D -m 644 sysusers.d/promptdrop.conf /etc/sysusers.d/promptdrop.conf
$run install -D -m 644 tmpfiles.d/promptdrop.conf /etc/tmpfiles.d/promptdrop.conf
$run systemd-sysusers /etc/sysusers.d/promptdrop.conf
$run systemd-tmpfiles --create /etc/tmpfiles.d/promptdrop.conf

# config.yaml and the spool, as the user that will own them; then the configuration to /etc, where
# the daemon cannot change it.
if [ ! -e "$config" ]; then
    $run setpriv --reuid promptdrop --regid promptdrop --init-groups \
        env HOME="$home" "$promptdrop" init "$home" --model "$model"
    $run sed -i "s|^root: spool |root: $home/spool |" "$home/config.yaml"
    $run install -m 644 "$home/config.yaml" "$config"
    $run rm "$home/config.yaml"
fi

$run install -m 644 promptdrop.service promptdrop@.service /etc/systemd/system/
$run systemctl daemon-reload
[ -z "$run" ] || echo "nothing was done; to do it: sudo systemd/install.sh --run $model"
