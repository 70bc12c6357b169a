
# --- Ray over the allocation, and the run on it (launch/cluster/ray.sh).
# Not `ray symmetric-run`: it passes no signal on, and its `ray stop` ends the Ray of every other job on the node.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # or everybody on the network could run code in the job
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # when the run has ended there is nothing to wait for
temporary=/tmp/ray-$(id -u)-$SLURM_JOB_ID

node() {
    set -euo pipefail
    local ray=(ray start --block --temp-dir="$temporary" --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0)
    local pid=''
    trap 'rm -rf "$temporary"' EXIT
    trap 'if [ -n "$pid" ]; then kill -TERM "$pid"; else exit 143; fi' TERM
    if [ "$SLURM_NODEID" = 0 ]; then
        # Ray's client listens where it can be imported, else the option is refused.
        if python -c 'import grpc' 2>/dev/null; then ray+=(--ray-client-server-port=$((port + 1))); fi
        "${ray[@]}" --head --node-ip-address="$ip" --port="$port" --include-dashboard=false &
    else
        until (exec 3<>"/dev/tcp/$ip/$port") 2>/dev/null; do sleep 1; done
        "${ray[@]}" --address="$ip:$port" &
    fi
    pid=$!
    wait "$pid" || wait "$pid"
}
export -f node
export ip port cpus gpus temporary

on_each_node node &
cluster=$!
end() {
    kill -TERM "$cluster" 2>/dev/null || true
    wait "$cluster" || true
}
trap end EXIT

since=$SECONDS
until [ -n "$told" ] || (exec 3<>"/dev/tcp/$ip/$port") 2>/dev/null; do
    if ! kill -0 "$cluster" 2>/dev/null || [ $((SECONDS - since)) -gt "$wait_seconds" ]; then
        say "Ray does not start; see $logs/$SLURM_JOB_ID-*.log"
        exit 1
    fi
    sleep 1
done
run python -m launch.cluster.ready "$ip:$port" --nodes "$nodes" --workers "$workers" --seconds "$wait_seconds" \
    ${gpu:+--gpu}
if [ "$status" = 0 ]; then
    run polyclinic train "$config" "cluster.address=$ip:$port" ${resume:+"$resume"}
fi
leave
