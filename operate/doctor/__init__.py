"""Is this allocation fit for this run? `run_checks` measures on every rank, `assess` compares, `page` prints."""
