"""What a run reports: metrics.jsonl, TensorBoard, logs and goodput."""
