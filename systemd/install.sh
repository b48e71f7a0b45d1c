#!/bin/sh
# Install promptdrop as a systemd service. `systemd/install.sh --help` says how.
set -eu

usage() {
    cat <<'END'
usage: systemd/install.sh [--run] [MODEL]

Installs promptdrop as a systemd service: user, folders, configuration, units,
and the command `promptdrop` in /usr/local/bin. Without --run it only prints
the commands, to read or to paste. Nothing is started. A configuration that is
there stays as it is, so run it again after an upgrade.

  --run   run the commands, as root
  MODEL   the model's folder, in diffusers' layout
          (default: /srv/models/Z-Image-Turbo)

Before it, the package and the model, where the service can read them:

  sudo python3 -m venv /opt/promptdrop/.venv
  sudo /opt/promptdrop/.venv/bin/pip install .
  sudo /opt/promptdrop/.venv/bin/promptdrop model fetch \
      Tongyi-MAI/Z-Image-Turbo --to /srv/models/Z-Image-Turbo
END
}

fail() {
    printf 'install.sh: %s\n' "$1" >&2
    shift
    [ $# = 0 ] || printf '%s\n' "$@" >&2
    exit 1
}

wrong_usage() {
    printf 'install.sh: %s\n' "$1" >&2
    usage >&2
    exit 2
}

# A word as a shell would read it.
quoted() {
    case $1 in
        '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")" ;;
        *) printf %s "$1" ;;
    esac
}

# Run a command; without --run, print it, to be pasted, in lines of at most 80 columns.
run() {
    if [ "$mode" = run ]; then
        "$@"
        return
    fi
    line=$sudo
    for word in "$@"; do
        word=$(quoted "$word")
        if [ -n "$line" ] && [ $((${#line} + ${#word})) -gt 77 ]; then
            printf '%s \\\n' "$line"
            line="    $word"
        else
            line=${line:+$line }$word
        fi
    done
    printf '%s\n' "$line"
}

# Where ProtectHome=yes of the unit lets nobody look.
in_a_home() {
    case $1 in /home/* | /root/* | /run/user/*) return 0 ;; esac
    return 1
}

mode=print model=
for argument in "$@"; do
    case $argument in
        --run) mode=run ;;
        -h | --help) usage; exit 0 ;;
        -*) wrong_usage "unknown option: $argument" ;;
        *) [ -z "$model" ] || wrong_usage "more than one MODEL: $argument"; model=$argument ;;
    esac
done

source=$(cd "$(dirname "$0")/.." && pwd -P)
opt=/opt/promptdrop
promptdrop=$opt/.venv/bin/promptdrop
link=/usr/local/bin/promptdrop
home=/srv/promptdrop
config=/etc/promptdrop/config.yaml
default_model=/srv/models/Z-Image-Turbo
sudo=sudo
[ "$(id -u)" != 0 ] || sudo=

# --- what has to be there before ----------------------------------------------------------------

[ "$mode" = print ] || [ -z "$sudo" ] || fail "--run needs root: sudo systemd/install.sh --run"
[ -x "$promptdrop" ] || fail "$promptdrop is not there. Install the package first:" \
    "  sudo python3 -m venv $opt/.venv" "  sudo $opt/.venv/bin/pip install $(quoted "$source")"
python=$(readlink -f "$opt/.venv/bin/python")
! in_a_home "$python" || fail "$opt/.venv uses $python, in a home, which the service cannot see." \
    "Make it anew with the system's own: sudo /usr/bin/python3 -m venv --clear $opt/.venv"

if [ -e "$config" ]; then
    [ -z "$model" ] || echo "install.sh: $config stays as it is; its model.path, not $model, counts" >&2
else
    model=${model:-$default_model}
    [ ! -d "$model" ] || model=$(cd "$model" && pwd -P)
    ! in_a_home "$model" || fail "$model is in a home, which the service cannot see:" \
        "move it, for example to $default_model"
    HOME=$home "$promptdrop" model path "$model" >/dev/null || fail \
        "no whole model there. This fetches Z-Image-Turbo, 32 GB, or what is missing of it:" \
        "  sudo $promptdrop model fetch \\" "      Tongyi-MAI/Z-Image-Turbo --to $(quoted "$model")"
fi

# --- what is done -------------------------------------------------------------------------------

cd "$source"
[ "$mode" = run ] || (sudo= && run cd "$source")

# The texts that the units' Documentation= names.
[ "$source" = "$opt" ] || run cp -R README.md CHANGELOG.md SECURITY.md LICENSE docs "$opt/"
if [ ! -e "$link" ] && [ ! -L "$link" ]; then
    run ln -s "$promptdrop" "$link"
fi

run install -D -m 644 systemd/sysusers.d/promptdrop.conf /etc/sysusers.d/promptdrop.conf
run install -D -m 644 systemd/tmpfiles.d/promptdrop.conf /etc/tmpfiles.d/promptdrop.conf
run systemd-sysusers /etc/sysusers.d/promptdrop.conf
run systemd-tmpfiles --create /etc/tmpfiles.d/promptdrop.conf

# config.yaml and the spool, as the user that will own them; then the configuration to /etc, where
# the daemon cannot change it.
as_service() {
    run setpriv --reuid promptdrop --regid promptdrop --init-groups \
        env HOME="$home" "$promptdrop" "$@"
}
exec 3>&1
[ "$mode" = print ] || exec 3>/dev/null  # what init says comes next is not so here
if [ ! -e "$config" ]; then
    as_service init "$home" --model "$model" >&3
    run sed -i "s|^root: spool *#|root: $home/spool  #|" "$home/config.yaml"
    run install -m 644 "$home/config.yaml" "$config"
    run rm "$home/config.yaml"
fi

run install -m 644 systemd/promptdrop.service systemd/promptdrop@.service /etc/systemd/system/
run systemctl daemon-reload

# Folders, model and device as the service will find them.
as_service doctor --config "$config" || fail "installed; what doctor calls bad is yet to be cured"

if [ "$mode" = print ]; then
    echo "nothing was done; to do it: sudo $(quoted "$0") --run${1:+ $(quoted "$1")}" >&2
else
    echo "installed; start it with: systemctl enable --now promptdrop"
fi
