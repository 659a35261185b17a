#!/usr/bin/env bash
# Runs benchmarks/norm.py with two workers in two network namespaces, which a link of 10 and then of
# 1 Gbit/s joins: two machines, as far as gloo can tell. Needs root, and ip and tc (iproute2).
#
#     sudo PYTHON=.venv/bin/python benchmarks/link.sh [options of norm.py, such as --quick]
#
# Ends with a message and status 0 where the system does not allow it.
set -euo pipefail

python=${PYTHON:-python}
here=$(dirname "$(readlink -f "$0")")
a=bn-a-$$ b=bn-b-$$
export GLOO_SOCKET_IFNAME=link0 TORCH_CPP_LOG_LEVEL=ERROR

skip() {
    echo "skipped: $1" >&2
    exit 0
}

pids=()
clean_up() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait
    ip netns del "$a" 2>/dev/null || true
    ip netns del "$b" 2>/dev/null || true
}

command -v ip >/dev/null || skip "there is no ip command (package iproute2)"
command -v tc >/dev/null || skip "there is no tc command (package iproute2)"
[[ $EUID -eq 0 ]] || skip "network namespaces need root"
trap clean_up EXIT
trap 'exit 130' INT TERM
ip netns add "$a" 2>/dev/null && ip netns add "$b" || skip "network namespaces are not allowed here"
ip -n "$a" link add link0 type veth peer name link0 netns "$b" || skip "no veth pairs here"
for end in "$a 10.77.0.1" "$b 10.77.0.2"; do
    read -r namespace address <<<"$end"
    ip -n "$namespace" address add "$address/24" dev link0
    ip -n "$namespace" link set link0 up
    ip -n "$namespace" link set lo up
done

for rate in 10gbit 1gbit; do
    for namespace in "$a" "$b"; do
        # A burst of about a millisecond: longer messages see the rate.
        burst=128kb
        [[ $rate == 10gbit ]] && burst=1mb
        tc -n "$namespace" qdisc replace dev link0 root tbf rate "$rate" burst "$burst" \
            latency 50ms || skip "tc cannot limit the rate here (kernel module sch_tbf)"
    done
    pids=()
    for rank in 0 1; do
        namespace=$a
        [[ $rank == 1 ]] && namespace=$b
        ip netns exec "$namespace" "$python" "$here/norm.py" --num-machines 2 \
            --machine-rank "$rank" --dist-url tcp://10.77.0.1:29500 --link "$rate" "$@" &
        pids+=($!)
    done
    # The first to fail ends the other.
    for _ in "${pids[@]}"; do wait -n; done
    pids=()
done
