"""Job scripts and manifests for clusters that somebody else runs: Slurm, with Ray or with plain torchrun, Kubernetes
with KubeRay, and machines that Ray's own launcher starts. All are made from a run's config; what is to happen there is
in the shell files beside this one, word for word. Knows Ray only where it looks at a cluster that is up (`ready`).
"""
