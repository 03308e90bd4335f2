"""Benchmarks of the operator and the detector, installed as smca_benchmarks.

bench_attention.py is `smca bench`, bench_model.py `smca bench-model`, predict.py `smca predict`, and test_attention.py
single cases by `pytest benchmarks`. workloads.py, peers.py and bars.py are the tables they work from; results/ holds
measured numbers.
"""
