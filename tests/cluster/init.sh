#!/bin/bash
# PID 1 of a make-believe machine: NAME ETC. Its own hostname, /run, /dev/shm and cards; what lies in ETC covers the same
# names under /etc; all else is the machine's own, and so is shared. It ends, and everything in it, when its standard
# input is closed: whoever started it has gone, however that came.
set -e
hostname "$1"
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
# slurmd 22.05 does not start without a cgroup mount, used or not, and a fresh /sys would hide it
mkdir -p /run/cgroup
if mountpoint -q /sys/fs/cgroup; then mount --rbind /sys/fs/cgroup /run/cgroup; else mount -t cgroup2 cgroup2 /run/cgroup; fi
mount -t sysfs sysfs /sys # /sys/class/net names the cards of this machine
mount --rbind /run/cgroup /sys/fs/cgroup
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir -p /run/munge /run/sshd /run/lock
mount --bind "$2/munge" /run/munge
for name in slurm hosts nsswitch.conf resolv.conf ssh/ssh_config.d; do
  if [[ -e $2/$name && -e /etc/$name ]]; then mount --bind "$2/$name" "/etc/$name"; fi
done
ip link set lo up
touch /run/ready
set +e
while read -r _; do :; done
