"""Suites, runner, statistics and throughput; installed as ``rlhf_gym.benchmarks``."""
