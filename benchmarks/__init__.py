"""What `smca bench` runs. workloads.py: what and on what; bench_*.py: how; results/: what came out."""
