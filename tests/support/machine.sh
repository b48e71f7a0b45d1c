#!/bin/bash
# A machine for tests/machine.py: this system's own systemd as PID 1 of fresh namespaces, over a
# throw-away overlay of /. Everything lives in one private mount namespace and goes with it.
#   machine.sh DIR SOURCE:TARGET...     DIR: for its root, its log and the pid of its systemd
# Starts itself three times: here, then inside (new mounts, own cgroup), then as PID 1.
set -eu
stage=${STAGE:-begin}

begin() {
    exec env STAGE=host setpriv --pdeathsig KILL unshare --mount --propagation private bash "$0" "$@"
}

# In a private mount namespace: the overlay, the binds, a cgroup of our own.
host() {
    dir=$1; shift
    root=$dir/root; groups=$dir/cgroup
    mkdir -p "$root" "$dir/upper" "$groups"
    mount -t tmpfs -o mode=755 promptdrop-machine "$dir/upper"
    mkdir "$dir/upper/files" "$dir/upper/work"
    mount -t overlay -o "lowerdir=/,upperdir=$dir/upper/files,workdir=$dir/upper/work" overlay "$root"
    for bind in "$@"; do
        source=${bind%%:*}; target=$root${bind#*:}
        if [ -d "$source" ]; then mkdir -p "$target"; else mkdir -p "${target%/*}"; : > "$target"; fi
        mount --rbind "$source" "$target"
        mount -o remount,bind,ro "$target"  # what a test removes in there must not go from here
    done
    mount -t cgroup2 cgroup2 "$groups"
    own=$groups$(sed -n s/^0:://p /proc/self/cgroup)/promptdrop-test.$$
    mkdir "$own"
    echo 0 > "$own/cgroup.procs"
    STAGE=init setpriv --pdeathsig KILL unshare --pid --fork --kill-child=KILL --mount \
        --propagation private --uts --ipc --net --cgroup bash "$0" "$dir" &
    wait $! || true
    echo 0 > "$groups/cgroup.procs" || echo $$ > "$groups$(dirname "${own#"$groups"}")/cgroup.procs"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        find "$own" -depth -type d -exec rmdir {} \; 2>/dev/null || true
        [ -d "$own" ] || break
        sleep 0.1
    done
}

# PID 1 of the new machine, before systemd takes its place.
init() {
    dir=$1; root=$dir/root
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
    mount -t tmpfs -o mode=755,nosuid,nodev,noexec tmpfs "$root/sys/fs/cgroup"
    umount "$root/sys/fs/cgroup"
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
    if [ -e "$root/proc/sysrq-trigger" ]; then  # the host's kernel is this one
        mount --bind /dev/null "$root/proc/sysrq-trigger"
    fi
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
    for node in null zero full random urandom tty; do
        : > "$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"
    done
    mkdir "$root/dev/shm"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    ln -s /proc/self/fd "$root/dev/fd"; ln -s fd/0 "$root/dev/stdin"
    ln -s fd/1 "$root/dev/stdout"; ln -s fd/2 "$root/dev/stderr"
    : > "$root/dev/console"; mount --bind "$dir/log" "$root/dev/console"
    mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    rm -rf "$root/etc/machine-id" "$root/etc/fstab" "$root/etc/systemd/system" "$root/var/log/journal"
    tr -d - < /proc/sys/kernel/random/uuid > "$root/etc/machine-id"
    : > "$root/etc/fstab"
    mkdir -p "$root/etc/systemd/system" "$root/run/systemd/system"
    printf '[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n' \
        > "$root/run/systemd/system/machine.target"
    for unit in systemd-udevd.service systemd-timesyncd.service systemd-networkd.service \
        systemd-logind.service timers.target paths.target systemd-update-utmp.service \
        systemd-journald-audit.socket dev-hugepages.mount sys-kernel-debug.mount \
        sys-kernel-tracing.mount sys-fs-fuse-connections.mount systemd-remount-fs.service \
        systemd-modules-load.service systemd-sysctl.service systemd-hwdb-update.service \
        systemd-tmpfiles-setup-dev.service; do
        ln -sf /dev/null "$root/run/systemd/system/$unit"
    done
    cd "$root"; mkdir -p .old; pivot_root . .old; cd /; umount -l /.old
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=promptdrop-test LANG=C.UTF-8 \
        /lib/systemd/systemd --system --unit=machine.target --show-status=no \
        < /dev/console > /dev/console 2>&1
}

"$stage" "$@"
