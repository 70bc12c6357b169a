
# --- torchrun on each node, without Ray (launch/cluster/torchrun.sh).
# torchrun ends with 1 whatever its ranks end with: what has become of them is in the last line of events.jsonl.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$grace # seconds for a checkpoint, of which torchrun would give 30
events=$folder/stages/train/events.jsonl

node() {
    set -euo pipefail
    [ "$SLURM_NODEID" = 0 ] && is_host=1 || is_host=0
    exec torchrun --nnodes="$nodes" --nproc-per-node="$workers" --max-restarts="$max_restarts" --rdzv-backend=c10d \
        --rdzv-endpoint="$ip:$port" --rdzv-id="$SLURM_JOB_ID-$start" --rdzv-conf="is_host=$is_host" \
        -m moe.job "$config" ${resume:+"$resume"}
}
export -f node
export ip port nodes workers max_restarts start config resume

lines() {
    if [ -e "$events" ]; then wc -l <"$events"; else echo 0; fi
}
newest() { # checkpoint
    local found=("$folder"/stages/train/checkpoints/step-*)
    echo "${found[${#found[@]} - 1]}"
}
before=$(lines) had=$(newest)
run on_each_node node
if [ "$status" != 0 ]; then
    ending=''
    [ "$(lines)" = "$before" ] || ending=$(tail -n 1 "$events")
    case $ending in
    *'"event": "refused"'*) status=2 ;;
    *'"event": "preempted"'*)
        # Not told here, so by somebody else; or torchrun did it, because a rank was killed: that would never end.
        if [ -n "$told" ] || [ "$(newest)" != "$had" ]; then status=75; else status=1; fi
        ;;
    *) if [ -n "$told" ]; then status=75; elif [ "$status" = 75 ]; then status=1; fi ;; # it had no time to say so
    esac
fi
leave
