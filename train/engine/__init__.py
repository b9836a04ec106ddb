"""The DeepSpeed engine and what a step computes with: optimizer, EMA, batch norm, schedule, prefetching."""
