#!/usr/bin/env bash
# A real Slurm on this machine alone, for the tests: run as root, on Debian or Ubuntu, after
#   apt-get install --no-install-recommends slurm-wlm munge
#
#   tests/slurm/single_node.sh start    # munged, slurmctld and slurmd, without systemd
#   tests/slurm/single_node.sh stop
#
# A configuration that is not this script's is never replaced.
set -euo pipefail

CONF=/etc/slurm/slurm.conf
MARK="# Written by tests/slurm/single_node.sh"
STATE=/var/lib/slurm-single-node

start() {
    if [ -e "$CONF" ] && ! grep -q "^$MARK" "$CONF"; then
        echo "error: $CONF is of another Slurm; this script does not touch it" >&2
        exit 2
    fi
    local host memory
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    mkdir -p "$(dirname "$CONF")" "$STATE/ctld" "$STATE/d" /run/munge
    cat > "$CONF" <<EOF
$MARK
ClusterName=single
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/d
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
NodeName=$host CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
    if ! munge -n > /dev/null 2>&1; then
        chown -R munge: /run/munge /etc/munge /var/lib/munge /var/log/munge
        setpriv --reuid munge --regid munge --init-groups munged
    fi
    # The daemons fork; those of an earlier start are left as they are.
    [ -e "$STATE/slurmctld.pid" ] && kill -0 "$(cat "$STATE/slurmctld.pid")" 2> /dev/null || slurmctld
    [ -e "$STATE/slurmd.pid" ] && kill -0 "$(cat "$STATE/slurmd.pid")" 2> /dev/null || slurmd
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --format %t 2> /dev/null)" = idle ]; then
            sinfo
            return
        fi
        sleep 0.5
    done
    echo "error: no idle node after 30 s; see $STATE/slurmctld.log and slurmd.log" >&2
    exit 1
}

stop() {
    for daemon in slurmd slurmctld; do
        [ -e "$STATE/$daemon.pid" ] && kill "$(cat "$STATE/$daemon.pid")" 2> /dev/null || true
    done
    [ -e "$CONF" ] && grep -q "^$MARK" "$CONF" && rm -f "$CONF"
    rm -rf "$STATE"
}

case "${1:-}" in
    start) start ;;
    stop) stop ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
