"""What rank processes are forked with: see mindspeed_cp/testing/rank_pool.py."""

PRELOAD = ["pytest", "torch", "megatron.core.models.gpt", "megatron.training"]
"""Modules whose import takes longer than a test, and starts no thread; those that are not installed are passed over.

One list for all pools: a process of pytest's has one server to fork from, and its first pool says what that imports.
"""
