
# --- From here on the script is the same for every run (launch/cluster/job.sh).
# Slurm tells it with SIGTERM, $grace seconds before the end, that its time is over; it passes that on, once, to what is
# running. Exit status: that of the run, or 75 where the run has stopped at a checkpoint and is queued again.
told='' passed='' woken='' child='' status=0

say() { echo "polyclinic: $*" >&2; }

pass_on() {
    if [ -n "$told" ] && [ -n "$child" ] && [ -z "$passed" ]; then
        passed=1 # a second SIGTERM would end the run at once, without a checkpoint
        kill -TERM "$child" 2>/dev/null || true
    fi
}
trap 'told=1 woken=1; pass_on' TERM

# Run a command to its end, which may be told to go meanwhile, and keep its exit status; nothing where told already.
run() {
    status=75
    [ -z "$told" ] || return 0
    "$@" &
    child=$!
    pass_on
    while :; do
        woken='' status=0
        wait "$child" || status=$?
        if [ "$status" != 143 ] || [ -z "$woken" ]; then break; fi # else it is the signal that has ended `wait`
    done
    child=''
    if [ "$status" = 143 ]; then status=75; fi # told before it had anything to save
}

# One command on each node, its output in a file of its own; to be put in the background, where signals reach it. A node
# that is lost does not end the others.
on_each_node() {
    exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=0 \
        --wait=0 --no-kill --output="${logs//%/%%}/$SLURM_JOB_ID-%N.log" --open-mode=append bash -c "$1"
}

# Exit, queued again where the run has stopped so that it can go on.
leave() {
    if [ "$status" = 75 ]; then
        if scontrol requeue "$SLURM_JOB_ID"; then
            say "job $SLURM_JOB_ID is queued again, and goes on from its last checkpoint"
        else
            say "job $SLURM_JOB_ID could not be queued again; to go on: sbatch $script"
        fi
    elif [ "$status" != 0 ]; then
        say "job $SLURM_JOB_ID has ended with status $status and is not queued again"
    fi
    exit "$status"
}

# Of this node, which is the first, as the others reach it: some /etc/hosts call it 127.0.1.1.
ip=$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127\./ && !found++ {print $1}') || true
[ -n "$ip" ] || ip=$(hostname -I | awk '{print $1}') || true
ip=${ip:-127.0.0.1}
port=$((10000 + SLURM_JOB_ID % 10000 * 2)) # and the next one: jobs that share a node do not meet
start=$((${SLURM_RESTART_COUNT:-0} + 1))
resume=''
[ ! -e "$folder/config.yaml" ] || resume=--resume
say "job $SLURM_JOB_ID, start $start: $nodes nodes with $workers workers each from $ip:$port${resume:+; going on}"
