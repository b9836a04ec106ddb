"""Making prepared datasets: listing and checking sources, packing images into shards, indexing foreign shards."""
