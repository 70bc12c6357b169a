
# --- From here on the script is the same for every run (launch/cluster/train.sh). It runs on the head of a Ray cluster.
cd "$chdir"
if [ -n "$failed" ] && [ -e "$failed" ]; then
    echo "polyclinic: this job has failed for good: $(cat "$failed")" >&2
    exit 1
fi
python -m launch.cluster.ready auto --nodes "$nodes" --workers "$workers" --seconds "$wait_seconds" ${gpu:+--gpu}
resume=''
[ ! -e "$folder/config.yaml" ] || resume=--resume
status=0
polyclinic train "$config" cluster.address=auto ${resume:+"$resume"} || status=$?
case $status in
0 | 75) ;;
*) # starting it again would not help
    if [ -n "$failed" ]; then
        mkdir -p "$(dirname "$failed")"
        echo "exit status $status" >"$failed"
    fi
    ;;
esac
exit "$status"
